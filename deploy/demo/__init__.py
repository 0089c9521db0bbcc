"""The demo: seven small tasks, the adapters trained on them, and the script that made both."""
