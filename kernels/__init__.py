"""Compute kernels. Nothing is imported here: `transformers` probes for a package of this name and imports it."""
