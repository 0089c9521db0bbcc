"""Training of adapters on folders of task rows."""
