"""Measurements of a running server, over HTTP only."""
