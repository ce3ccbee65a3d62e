"""From a checkpoint to answers: in Python, in the terminal, and for a training file."""
