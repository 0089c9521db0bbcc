"""One module a step of the registry's schema."""
