"""The decoder: configuration, layers, weights and LoRA on its linears."""
