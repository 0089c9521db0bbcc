"""The console: static pages that speak to the server's own HTTP interface."""
