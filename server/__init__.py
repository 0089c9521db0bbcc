"""The loramux server: command line, HTTP front end and inference engine."""
