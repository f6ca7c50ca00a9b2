"""One worker as a deployment."""
