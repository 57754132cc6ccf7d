"""Kubernetes: `kubernetes` submits JobSets, `manifests` builds them, `api` is the connection, `pod` starts the leading pod."""
