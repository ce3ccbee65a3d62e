"""Training: arguments, the visible step, and what is around it."""
