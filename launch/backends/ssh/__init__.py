"""Nodes that are reached by ssh."""
