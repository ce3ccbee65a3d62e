"""What `auto` of --max_tokens_per_pack and --recompute_layers becomes, in a run and after a resume."""

import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import pytest

from qwhisper.data.dialogue import read_dialogues
from qwhisper.data.row_sizes import Rows
from qwhisper.engine.plain import _hook_reason, why_plain
from qwhisper.engine.plan_memory import GIB, Job
from qwhisper.engine.plan_sizes import AUDIO_SIZES, TEXT_SIZES
from qwhisper.engine.plan_speed import CARDS
from qwhisper.errors import UsageError
from qwhisper.train import fit
from qwhisper.train.fit import expected_execution, fit_to_memory, job_of
from qwhisper.train.models import build_model, recomputed_layers
from qwhisper.train.plan import resolve
from qwhisper.train.run import main
from qwhisper.train.state import TrainState
from tests.train.helpers import assert_same, loss_and_gradients, make_run, read_lines

H200 = next(card for card in CARDS if card.name == "H200")


@pytest.fixture
def on_a_card(monkeypatch):
    """Let the run believe that its small model is Qwen3-8B on a card with so many GiB free, with its own layers."""

    def believe(gib: float, layers: int = 2) -> None:
        size = dataclasses.replace(TEXT_SIZES["qwen3-8b"], layers=layers)
        monkeypatch.setattr(fit, "room_on_card", lambda model: (int(gib * GIB), H200))
        monkeypatch.setattr(fit, "text_size", lambda config: size)
        monkeypatch.setattr(fit, "audio_size", lambda config: AUDIO_SIZES["whisper-large-v3-turbo"])
        monkeypatch.setattr(fit, "rows_of", lambda dialogues, frames, max_length: Rows())
        monkeypatch.setattr(fit, "why_plain", lambda model, manual_loss, packing: None)
        monkeypatch.setattr(fit, "why_not_compiled", lambda: None)

    return believe


@pytest.fixture
def jobs(monkeypatch) -> list[Job]:
    """Those that are planned."""
    found, choose = [], fit.choose
    monkeypatch.setattr(fit, "choose", lambda job, *args, **values: found.append(job) or choose(job, *args, **values))
    return found


def fitted(args, state=None, total_steps=1000):
    state = state or TrainState()
    model, _ = build_model(args, resolve(args, num_dialogues=1), None)
    fit_to_memory(model, args, read_dialogues(args.train_file), state, total_steps)
    return model, state


def test_on_a_cpu_nothing_is_planned(arguments, capsys):
    model, state = fitted(arguments())
    assert (state.max_tokens_per_pack, state.recompute_layers, recomputed_layers(model)) == (None, 0, 0)
    assert "planned" not in capsys.readouterr().out


def test_a_card_with_less_free_memory_gets_less_and_the_run_says_so(arguments, on_a_card, capsys):
    args = arguments(per_device_train_batch_size=128)
    found = []
    for gib in (140, 8.2, 7.4):
        on_a_card(gib)
        model, state = fitted(args)
        assert recomputed_layers(model) == state.recompute_layers
        found.append((state.max_tokens_per_pack, state.recompute_layers))
    assert found[0] == (8192, 0)
    for more, less in pairwise(found):
        assert less[0] < more[0] or less[1] > more[1]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].startswith("planned: packs of at most 8192 tokens, 0 of 2 layers computed")


def test_a_run_that_will_be_plain_is_planned_so(arguments, on_a_card, jobs, monkeypatch):
    args = arguments(per_device_train_batch_size=128)
    reasons = {
        "nothing": lambda: None,
        "few steps": lambda: None,
        "a resumed run was plain": lambda: None,
        "the model": lambda: monkeypatch.setattr(fit, "why_plain", why_plain),  # it is on the CPU
        "no compiler": lambda: monkeypatch.setattr(fit, "why_not_compiled", lambda: "there is no C compiler"),
    }
    packs = []
    for name, apply in reasons.items():
        on_a_card(8.2)
        apply()
        before = TrainState(execution="plain" if "resumed" in name else None)
        _, state = fitted(args, before, 100 if name == "few steps" else 1000)
        packs.append((state.max_tokens_per_pack, state.recompute_layers))
    assert [job.execution for job in jobs] == ["captured", *["plain"] * 4]
    assert len(set(packs[1:])) == 1 and packs[1] != packs[0]
    monkeypatch.setattr(fit, "why_not_compiled", lambda: None)
    monkeypatch.setattr(fit, "why_plain", lambda model, manual_loss, packing: "manual" if manual_loss else None)
    fitted(arguments(manual_loss=True))
    fitted(arguments(), TrainState(execution="compiled"))
    assert [job.execution for job in jobs[5:]] == ["plain", "compiled"]
    flags = {"whisper_cpu": "plain", "manual_loss": "plain", "use_lora": "captured"}
    assert {flag: expected_execution(arguments(**{flag: True}), 1000) for flag in flags} == flags


def test_a_base_saved_in_4_bits_and_dropout_of_its_layers_are_planned(arguments, on_a_card, jobs):
    on_a_card(8.2)
    args = arguments()
    model, _ = build_model(args, resolve(args, num_dialogues=1), None)
    for change in ({}, {"is_loaded_in_4bit": True}):
        vars(model).update(change)
        fit_to_memory(model, args, [], TrainState(recompute_layers=0), 1000)
    model.config.get_text_config().attention_dropout = 0.1
    fit_to_memory(model, args, [], TrainState(recompute_layers=0), 1000)
    assert [(job.weights, job.dropout) for job in jobs] == [("bf16", False), ("nf4", False), ("nf4", True)]


def test_layers_computed_again_are_switched_on_once(arguments):
    """A second time, transformers' hooks would look like those of somebody else, which a capture would not call."""
    for values in ({"recompute_layers": "1"}, {"gradient_checkpointing": True}):
        model, state = fitted(arguments(**values))
        assert state.recompute_layers == recomputed_layers(model) > 0
        assert len(model.get_input_embeddings()._forward_hooks) == 1 and _hook_reason(model) is None


def test_what_is_given_or_was_decided_before_is_kept(arguments, on_a_card):
    on_a_card(140)
    model, state = fitted(arguments(recompute_layers="1"))
    assert (state.max_tokens_per_pack, state.recompute_layers, recomputed_layers(model)) == (8192, 1, 1)
    model, state = fitted(arguments(max_tokens_per_pack="700"))
    assert (state.max_tokens_per_pack, state.recompute_layers) == (700, 0)
    model, state = fitted(arguments(gradient_checkpointing=True))
    assert (state.recompute_layers, recomputed_layers(model)) == (2, 2)
    before = TrainState(max_tokens_per_pack=512, recompute_layers=1)
    model, state = fitted(arguments(), before)
    assert (state.max_tokens_per_pack, state.recompute_layers, recomputed_layers(model)) == (512, 1, 1)


def test_a_plan_that_finds_no_room_tries_with_the_least_memory(arguments, on_a_card, capsys):
    on_a_card(1)
    model, state = fitted(arguments())
    assert (state.max_tokens_per_pack, state.recompute_layers, recomputed_layers(model)) == (537, 2, 2)
    assert "trying with all layers computed again" in capsys.readouterr().out


def test_an_architecture_that_cannot_be_planned_runs_as_without_a_plan(arguments, on_a_card, monkeypatch, capsys):
    on_a_card(140)

    def refuse(config):
        raise ValueError("a mixture of experts")

    monkeypatch.setattr(fit, "text_size", refuse)
    _, state = fitted(arguments())
    assert (state.max_tokens_per_pack, state.recompute_layers) == (None, 0)
    assert "can't be planned: a mixture of experts" in capsys.readouterr().out


def test_a_resume_does_what_the_run_did_unless_its_flags_change(arguments, on_a_card):
    on_a_card(7.4)
    args = arguments(per_device_train_batch_size=128, max_tokens_per_pack="4000", max_steps=1, save_steps=1)
    assert main(args) == 0
    folder = Path(args.output_dir)
    saved = json.loads((folder / "checkpoint-1" / "state.json").read_text())
    assert (saved["recompute_layers"], saved["max_tokens_per_pack"]) == (1, 4000)
    on_a_card(140)
    changes = {"max_steps": 2, "resume_from_checkpoint": "latest"}
    assert main(dataclasses.replace(args, **changes)) == 0
    begun, resumed = [e for e in read_lines(folder / "events.jsonl") if e["kind"] in ("begin", "resumed")]
    for event in (begun, resumed):
        assert (event["recompute_layers"], event["max_tokens_per_pack"]) == (1, 4000)
    assert main(dataclasses.replace(args, **changes | {"max_steps": 3, "recompute_layers": "0"})) == 0
    assert [e for e in read_lines(folder / "events.jsonl") if e["kind"] == "resumed"][-1]["recompute_layers"] == 0


@pytest.mark.parametrize("layers", [1, 2])
def test_layers_that_are_computed_again_give_equal_losses_and_gradients(arguments, layers):
    plain, samples = make_run(arguments())
    again, _ = make_run(arguments(recompute_layers=str(layers)))
    calls = {0: 0, 1: 0}
    decoder = again.executor.model.model.language_model.layers
    for number, layer in enumerate(decoder):
        layer.input_layernorm.register_forward_hook(lambda *_, n=number: calls.update({n: calls[n] + 1}))
    assert_same(*(loss_and_gradients(run, samples, max_tokens=10_000) for run in (plain, again)))
    # The first layers run twice, the others once.
    assert calls == {number: 2 if number < layers else 1 for number in (0, 1)}
    assert recomputed_layers(again.executor.model) == layers
    assert again.executor.why_plain() == plain.executor.why_plain()


def test_more_layers_than_there_are_is_an_error(arguments):
    args = arguments(recompute_layers="3")
    with pytest.raises(UsageError, match="--recompute_layers 3: the language model has 2 layers"):
        build_model(args, resolve(args, num_dialogues=1), None)


def test_a_job_has_the_flags_that_memory_depends_on(arguments):
    text, audio = TEXT_SIZES["qwen3-8b"], AUDIO_SIZES["whisper-tiny"]
    assert job_of(arguments(dtype="auto"), text, audio) == Job(text=text, audio=audio)
    values = {
        "load_in_4bit": True, "lora_r": 8, "lora_target_modules": ["q_proj"], "lora_fp32": False, "whisper_cpu": True,
        "projector_fp32": False, "distill_weight": 0.5, "dtype": "bf16",
    }  # fmt: skip
    assert job_of(arguments(**values), text, audio) == Job(
        text=text, audio=audio, weights="nf4", lora_r=8, lora_targets=("q_proj",), lora_fp32=False, whisper_cpu=True,
        projector_fp32=False, distils=True,
    )  # fmt: skip
    saved = job_of(arguments(dtype="auto", lora_dropout=0.1), text, audio, in_4bit=True)
    assert saved == Job(text=text, audio=audio, weights="nf4", dropout=True)
    assert job_of(arguments(dtype="auto", load_in_fp8=True), text, audio) == Job(text=text, audio=audio, weights="fp8")
    assert job_of(arguments(use_lora=False, freeze_projector_steps=0), text, audio).lora_parameters == 0
