"""Choosing adapters: routers that turn a prompt or an explicit request into a weighted set of adapters."""
