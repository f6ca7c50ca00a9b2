"""Chooses the replica for a call."""
