"""Tool calls in text: how models of each family write them, how they are read, and how one is forced."""
