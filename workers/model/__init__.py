"""The forward pass: loading a base model, substituting its layers, logits, sampling."""
