"""What stands between gradients and weights: measure on the device, decide in plain Python, apply by branching."""
