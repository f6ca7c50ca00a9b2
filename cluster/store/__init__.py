"""The adapter store as a deployment, and its client."""
