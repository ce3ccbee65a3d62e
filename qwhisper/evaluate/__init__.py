"""How well a model answers, and whether it listens."""
