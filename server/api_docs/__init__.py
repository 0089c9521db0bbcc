"""docs/api.md, written from the code that serves: `python -m server.api_docs docs/api.md`."""
