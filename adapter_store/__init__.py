"""Adapters as files and host memory."""
