"""Many workers as one service: configuration, ingress, routing, roll-outs, metrics."""
