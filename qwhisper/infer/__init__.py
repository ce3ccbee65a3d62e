"""Answers from a checkpoint, in Python and in the terminal, and answers of a text model for a training file."""
