"""Configurations that start the service, and their validation."""
