"""A local server: a queue of videos, the HTTP API that video clients speak, and a page."""
