"""Small bases, trainings on them, a small model and a finished run: made once for all tests (tests/fixtures.py)."""

import pytest
import torch
from transformers import AutoTokenizer

from qwhisper.model.bases import LoadOptions
from qwhisper.model.processor import encoder_of
from qwhisper.model.qwen3_audio import build_from_bases
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.run import main as train
from tests.small import write_dialogues, write_small_bases

AUDIO_GAIN = 8.0
LAYER_STD, EMBEDDING_STD = 0.4, 0.3


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    return write_small_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="session")
def qwen3_tokenizer(shared):
    """The real one, which takes most of a second to load: no test may change it."""
    return AutoTokenizer.from_pretrained(shared / "models" / "qwen3-tokenizer")


@pytest.fixture(scope="session")
def train_file(tmp_path_factory):
    return write_dialogues(tmp_path_factory.mktemp("data"))


def small_arguments(bases, **values) -> TrainArguments:
    """A short run on the small bases."""
    base = {
        "audio_model": str(bases[0]),
        "text_model": str(bases[1]),
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


@pytest.fixture
def arguments(bases, train_file, tmp_path):
    """A function that makes `small_arguments` of a test's own folder: `arguments(learning_rate=1e-2, …)`."""
    places = {"train_file": str(train_file), "output_dir": str(tmp_path / "run")}
    return lambda **values: small_arguments(bases, **places | values)


@pytest.fixture
def run_training(arguments):
    """Runs a training with `arguments(**values)` and returns them."""

    def run(*, callbacks=(), **values) -> TrainArguments:
        args = arguments(**values)
        assert train(args, callbacks) == 0
        return args

    return run


@pytest.fixture(scope="session")
def small_model(bases):
    """(model, encoder): random weights, so loud that different prompts have different answers.

    Weights as they are drawn for training repeat the last token whatever stands before it. They are in fp32, and drawn
    on the CPU, on any machine: bf16 rounds by the batch's shape, and a GPU draws other numbers from the same seed.
    """
    audio, text = bases
    torch.manual_seed(2)
    options = LoadOptions(dtype="fp32", device_map="cpu")
    model, processor = build_from_bases(str(audio), str(text), options, audio_lead_silence=0.0, audio_tail_silence=0.1)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.mul_(AUDIO_GAIN)
        model.get_input_embeddings().weight.normal_(std=EMBEDDING_STD)
        for layer in model.model.language_model.layers:
            attention = layer.self_attn
            for linear in (attention.q_proj, attention.v_proj, attention.o_proj, layer.mlp.down_proj):
                linear.weight.normal_(std=LAYER_STD)
    return model.to(LoadOptions().device).eval(), encoder_of(processor)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """Folder of a run with checkpoints of steps 1 and 2; its training file lies beside it as data/train.jsonl."""
    folder = tmp_path_factory.mktemp("finished")
    audio, text = write_small_bases(folder / "bases")
    arguments = TrainArguments(
        train_file=str(write_dialogues(folder / "data")),
        output_dir=str(folder / "run"),
        audio_model=str(audio),
        text_model=str(text),
        audio_lead_silence=0.0,
        audio_tail_silence=0.1,
        max_steps=2,
        save_steps=1,
        freeze_projector_steps=0,
        early_lr_steps=0,
        learning_rate=1e-2,
    )
    assert train(arguments) == 0
    return folder / "run"
