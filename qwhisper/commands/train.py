"""`qwhisper train`: fine-tunes a model. Its flags are `TrainArguments`, in train/arguments.py."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qwhisper.train.arguments import TrainArguments

if TYPE_CHECKING:
    from transformers import TrainerCallback


def main(arguments: TrainArguments, callbacks: Sequence["TrainerCallback"] = ()) -> int:
    """Run a training and return its exit code. callbacks: any `TrainerCallback`s; qwhisper's own configure the run."""
    from qwhisper.train.run import main as train

    return train(arguments, callbacks)
