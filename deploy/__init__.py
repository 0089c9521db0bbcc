"""Ways to run loramux: the demo and its assets."""
