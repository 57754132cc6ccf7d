"""Runs that are led from this machine."""
