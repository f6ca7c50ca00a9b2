"""Breaks a running service in every way that is known, and measures what its clients see: `make chaos`."""
