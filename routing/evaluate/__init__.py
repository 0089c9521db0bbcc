"""Evaluation of routers: how often the right adapter is found, and what the answers are worth."""
