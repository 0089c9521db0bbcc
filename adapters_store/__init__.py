"""Adapters: their file format, their registry and the memory they live in."""
