"""HTTP for every front: the application, its description, keys and server-sent events."""
