"""From a checkpoint to answers: batches for evaluation, a conversation in the terminal."""
