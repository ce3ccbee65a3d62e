"""Checkpoint folders of a run: write, list, choose, verify, rotate, read facts. No torch, no models."""
