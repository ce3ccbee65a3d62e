"""Checkpoint folders and the runs they lie in: write, list, choose, verify, rotate, read facts. No torch, no models."""
