"""Training: its arguments, the loop, and the start and end of a run."""
