"""Kubernetes: `kubernetes` submits JobSets, `manifests` are their objects, `api` is the connection, `pod` a leader's start."""
