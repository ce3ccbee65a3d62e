import pytest

from qwhisper.train.arguments import TrainArguments
from qwhisper.train.run import main
from tests.small import write_dialogues, write_small_bases


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    return write_small_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="session")
def train_file(tmp_path_factory):
    return write_dialogues(tmp_path_factory.mktemp("data"))


@pytest.fixture
def arguments(bases, train_file, tmp_path):
    """A function that makes TrainArguments for a short run on the small bases: `arguments(learning_rate=1e-2, …)`."""

    def make(**values) -> TrainArguments:
        audio, text = bases
        base = {
            "train_file": str(train_file),
            "output_dir": str(tmp_path / "run"),
            "audio_model": str(audio),
            "text_model": str(text),
            "max_steps": 6,
            "save_steps": 3,
            "logging_steps": 1,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "freeze_projector_steps": 2,
            "early_lr_steps": 2,
            "learning_rate": 1e-2,
            "audio_lead_silence": 0.0,
            "audio_tail_silence": 0.1,
            "seed": 7,
        }
        return TrainArguments(**base | values)

    return make


@pytest.fixture
def run_training(arguments):
    """Runs a training with `arguments(**values)` and returns them."""

    def run(*, callbacks=(), **values) -> TrainArguments:
        args = arguments(**values)
        assert main(args, callbacks) == 0
        return args

    return run
