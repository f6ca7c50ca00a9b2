"""One device: a base model, its memory, its step loop."""
