"""Packs of samples run forward and backward on one model, and the check of the attention kernels that do it."""
