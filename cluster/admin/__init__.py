"""The control plane: what changes names, and its routes."""
