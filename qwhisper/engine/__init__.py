"""Runs packs of samples forward and backward on one model, and checks the kernels that they use."""
