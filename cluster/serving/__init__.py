"""A request's way from its fields to its deltas."""
