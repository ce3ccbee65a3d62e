"""`qwhisper train`: fine-tunes a model. Its flags are `TrainArguments`, in train/arguments.py."""

from qwhisper.train.arguments import TrainArguments


def main(arguments: TrainArguments) -> int:
    """Run a training and return its exit code."""
    from qwhisper.train.run import main as train

    return train(arguments)
