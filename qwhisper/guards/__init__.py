"""Guards between gradients and weights: measure on the device, decide in plain Python, branch on the decision."""
