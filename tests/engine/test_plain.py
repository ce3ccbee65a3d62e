"""Each reason for which a pack can't be replayed from a CUDA graph is found and named; a sound model has none."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import module as of_all

from qwhisper.engine import plain
from qwhisper.engine.executor import Executor
from qwhisper.guards.clamp import ActivationClamp, first_q_proj
from qwhisper.guards.gradient_buffers import GradientBuffers
from qwhisper.model.lora import add_lora
from qwhisper.train.models import checkpoint_activations
from qwhisper.train.optimizer import parameter_groups
from qwhisper.train.recovery import diagnose_pack
from tests.small import small_model
from tests.train.helpers import make_run, step

LAYER = "model.language_model.layers.1"


@pytest.fixture
def on_cuda() -> Iterator[None]:
    """Tensors of any device can be made and have no values: there is no need for a GPU."""
    with FakeTensorMode():
        yield


def move(module: nn.Module, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                there = torch.empty(parameter.shape, dtype=dtype, device=device)
                part._parameters[name] = nn.Parameter(there, requires_grad=parameter.requires_grad)


@pytest.fixture
def executor(request) -> Executor:
    """A model in bf16 on one GPU, in training."""
    torch.manual_seed(0)
    model = small_model()
    add_lora(model)
    request.getfixturevalue("on_cuda")
    move(model, "cuda:0")
    return Executor(model.train(), max_tokens_per_pack=100, pad_token_id=0)


def test_a_model_on_one_gpu_with_the_hooks_of_the_guards_has_no_reason(executor):
    model = executor.model
    executor.loss_scale = 64.0
    clamp = ActivationClamp(*first_q_proj(model), on=True)
    buffers = GradientBuffers(parameter_groups(model))
    model.register_forward_hook(lambda *_: None)  # a pack does not call the model itself
    assert clamp and buffers.flat and executor.why_plain() is None


def on_the_cpu(executor):
    move(executor.model, "cpu")


def encoder_on_the_cpu(executor):
    move(executor.model.model.audio_tower, "cpu")


def on_two_gpus(executor):
    if torch.cuda.device_count() == 1:
        pytest.skip("torch makes a tensor on the second GPU, fake or not")
    move(executor.model.lm_head, "cuda:1")


def manual_loss(executor):
    executor.manual_loss = True


def logits_kept(executor):
    executor.model.keep_last_logits = True


def padded_rows(executor):
    executor.packing = False


def encoder_in_fp32(executor):
    move(executor.model.model.audio_tower, "cuda:0", torch.float32)


def attention_dropout(executor):
    executor.model.model.language_model.config.attention_dropout = 0.1


def layers_skipped(executor):
    executor.model.model.audio_tower.requires_grad_(True)
    executor.model.model.audio_tower.layerdrop = 0.1


def recomputed_with_dropout(executor):
    checkpoint_activations(executor.model.model.language_model, use_reentrant=False)


def a_parameters_hook(executor):
    executor.model.model.multi_modal_projector.linear_1.weight.register_hook(lambda gradient: gradient)


def an_accumulated_gradients_hook(executor):
    weight = executor.model.model.multi_modal_projector.linear_1.weight
    weight.register_post_accumulate_grad_hook(lambda parameter: None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (on_the_cpu, "the model is on cpu, and a CUDA graph needs one CUDA device"),
        (encoder_on_the_cpu, "the encoder is on cpu, the language model on cuda:0 (--whisper_cpu)"),
        (on_two_gpus, "the model is on cuda:0 and cuda:1, and a CUDA graph needs one CUDA device"),
        (manual_loss, "--manual_loss compares the loss of each pack with a plain one"),
        (logits_kept, "a callback asks for the logits of each pack (keep_last_logits)"),
        (padded_rows, "the language model can't keep samples of one row apart, so batches are padded"),
        (encoder_in_fp32, "the encoder's attention kernel, sdpa_per_segment, needs the lengths of the samples"),
        (attention_dropout, "the language model's attention kernel, sdpa_per_segment, needs "),
        (layers_skipped, "the host draws which of the encoder's layers are skipped (encoder_layerdrop)"),
        (recomputed_with_dropout, "layers computed again (--recompute_layers, --gradient_checkpointing) with dropout "),
        (a_parameters_hook, "a hook on model.multi_modal_projector.linear_1.weight (a_parameters_hook.<locals>."),
        (an_accumulated_gradients_hook, "a hook on model.multi_modal_projector.linear_1.weight (an_accumulated_"),
    ],
)  # fmt: skip
def test_each_reason_is_named(executor, change, reason):
    change(executor)
    assert executor.why_plain().startswith(reason)


def test_a_frozen_encoder_and_a_run_without_dropout_draw_nothing(executor):
    body = executor.model.model
    body.audio_tower.layerdrop = body.audio_tower.config.attention_dropout = 0.1
    checkpoint_activations(body.language_model, use_reentrant=False, preserve_rng_state=False)
    assert executor.why_plain() is None


KINDS = ["forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_foreign_hook_is_named_with_its_module_and_gone_when_it_is_removed(executor, kind):
    def watch(*_):
        """Anything."""

    hook = getattr(executor.model.get_submodule(LAYER), f"register_{kind}")(watch)
    assert executor.why_plain().startswith(f"a hook on {LAYER} (") and ".watch) would not" in executor.why_plain()
    hook.remove()
    hook = getattr(of_all, f"register_module_{kind}")(watch)
    try:
        assert executor.why_plain().startswith("a hook on all modules (")
    finally:
        hook.remove()
    assert executor.why_plain() is None


def test_a_run_has_only_the_hooks_that_a_capture_records_until_it_is_diagnosed(arguments, monkeypatch):
    """On the CPU, with all else that a training adds to a model."""
    for reason in ("_device_reason", "_kernel_reason"):
        monkeypatch.setattr(plain, reason, lambda model: None)
    values = {"activation_clamp": "50", "gradient_checkpointing": True, "lora_dropout": 0.0}
    run, samples = make_run(arguments(**values))
    executor, found = run.executor, []
    step(run, samples[:2])
    assert run.clamp is not None and executor.why_plain() is None
    run_pack = executor.run_pack
    monkeypatch.setattr(executor, "run_pack", lambda batch: found.append(executor.why_plain()) or run_pack(batch))
    diagnose_pack(executor, samples[:2], 9)
    assert found == ["a hook on model (_Trace._before) would not be called"] and executor.why_plain() is None
