"""The teacher is the same language model, without its adapter, reading the words."""

import dataclasses
import json
import math

import pytest
import soundfile
import torch
from peft.tuners.lora import LoraLayer

from qwhisper.data.encode import DialogueEncoder
from qwhisper.engine.forward import teacher_states
from qwhisper.errors import BadClipError, UsageError
from qwhisper.frames import SAMPLE_RATE, FrameArithmetic
from qwhisper.train.run import main
from tests.small import small_tokenizer, tone
from tests.train.helpers import assert_same, gradients, loss_and_gradients, make_run, read_lines, same_bits, step
from tests.train.test_resume import StopAfter, outcome
from tests.train.test_run import StopsAtOnce

VALUES = {"distill_weight": 0.6, "freeze_projector_steps": 0, "early_lr_steps": 0, "dtype": "fp32"}


def with_a_different_adapter(run) -> None:
    """B is zero at first, and the student its own teacher."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in run.executor.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)


def step_loss(run, samples):
    run.executor.model.zero_grad(set_to_none=True)
    return run.executor.forward_backward(samples, sum(sample.num_supervised for sample in samples))


def as_if_it_were_read(samples) -> list:
    return [dataclasses.replace(sample.teacher, teacher=sample.teacher) for sample in samples]


def test_where_the_audio_is_replaced_by_its_words_a_fresh_student_is_its_teacher(arguments):
    run, samples = make_run(arguments(**VALUES | {"distill_weight": 1.0}))
    found = step_loss(run, as_if_it_were_read(samples[:4]))
    assert abs(found.loss) < 1e-6 and float(found.divergence) == pytest.approx(0.0, abs=1e-6)
    assert max(float(g.abs().max()) for g in gradients(run).values()) < 1e-6
    with_a_different_adapter(run)
    found = step_loss(run, as_if_it_were_read(samples[:4]))
    assert found.loss > 1e-3 and float(found.loss) == pytest.approx(float(found.divergence))


def test_the_teacher_does_not_see_the_adapter(arguments):
    run, samples = make_run(arguments(**VALUES))
    batch = run.executor.batch(samples[:4])
    before = teacher_states(run.executor.model, batch.teacher)
    with_a_different_adapter(run)
    assert torch.equal(before, teacher_states(run.executor.model, batch.teacher))
    assert run.executor.model.model.language_model.training
    layers = [module for module in run.executor.model.modules() if isinstance(module, LoraLayer)]
    assert layers and not any(layer.disable_adapters for layer in layers)


@pytest.mark.parametrize(("max_tokens", "packing"), [(90, True), (10_000, False), (90, False)])
def test_any_packing_gives_the_same_gradients(arguments, max_tokens, packing):
    run, samples = make_run(arguments(**VALUES))
    with_a_different_adapter(run)
    samples = samples[:6]
    samples[1] = dataclasses.replace(samples[1], teacher=None)  # a clip without a transcript
    whole = loss_and_gradients(run, samples, max_tokens=10_000)
    divergence = float(step_loss(run, samples).divergence)
    assert_same(whole, loss_and_gradients(run, samples, max_tokens=max_tokens, packing=packing))
    assert float(step_loss(run, samples).divergence) == pytest.approx(divergence, rel=1e-4)


def test_without_a_transcript_a_dialogue_is_learned_from_its_answers_alone(arguments):
    run, samples = make_run(arguments(**VALUES))
    with_a_different_adapter(run)
    mute = [dataclasses.replace(sample, teacher=None) for sample in samples[:4]]
    assert step_loss(run, mute).divergence is None
    got = loss_and_gradients(run, mute, max_tokens=10_000)
    run.executor.distill_weight = 0.0
    assert_same(got, loss_and_gradients(run, samples[:4], max_tokens=10_000))


def test_dialogues_without_a_teacher_are_counted(arguments, train_file, tmp_path, capsys):
    records = [json.loads(line) for line in train_file.read_text().splitlines()]
    for record in records[:3]:
        del record["messages"][0]["content"][0]["transcript"]
    path = train_file.with_name("mute.jsonl")
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, file, weight in (("a", path, 0.5), ("b", path, 0.0), ("c", train_file, 0.5)):
        values = {"train_file": str(file), "distill_weight": weight, "output_dir": str(tmp_path / name)}
        assert main(arguments(**VALUES | values, max_steps=1), [StopsAtOnce()]) == 0
        assert ("no effect on 3 of 12 dialogues" in capsys.readouterr().out) == (name == "a")


def test_evaluation_has_no_teacher(arguments):
    run, samples = make_run(arguments(**VALUES))
    with_a_different_adapter(run)
    loss = run.executor.evaluate(samples)
    run.executor.distill_weight = 0.0
    assert run.executor.evaluate(samples) == loss


def test_what_a_dropped_sample_made_of_the_divergence_is_not_told(arguments):
    run, samples = make_run(arguments(**VALUES))
    good, bad = samples[0], dataclasses.replace(samples[1], windows=[samples[1].windows[0] * math.nan])
    assert step(run, [good]).divergence > 0
    report = step(run, [good, bad])
    assert report.num_samples == 1 and math.isfinite(report.loss) and report.divergence is None
    step(run, [good])
    assert step(run, []).divergence is None


def test_manual_loss_agrees_with_it(arguments):
    run, samples = make_run(arguments(**VALUES, manual_loss=True))
    with_a_different_adapter(run)
    run.executor.forward_backward(samples[:4], sum(s.num_supervised for s in samples[:4]))
    assert gradients(run)


def test_a_resumed_distillation_ends_in_the_bits_of_the_uninterrupted_one(arguments, tmp_path):
    """Whether the trainer reads the data, as in the whole run and after the resume, or a worker."""
    values = VALUES | {"lora_dropout": 0.2, "max_steps": 4, "save_steps": 100}
    whole = arguments(output_dir=str(tmp_path / "whole"), **values)
    assert main(whole) == 0
    parts = arguments(output_dir=str(tmp_path / "parts"), dataloader_num_workers=1, **values)
    assert main(parts, [StopAfter(2)]) == 0
    assert main(dataclasses.replace(parts, resume_from_checkpoint="latest", dataloader_num_workers=0)) == 0
    (tensors, state), (others, other_state) = outcome(tmp_path / "whole", 4), outcome(tmp_path / "parts", 4)
    assert same_bits(tensors, others) == [] and state == other_state
    found = [line["divergence"] for line in read_lines(tmp_path / "whole/metrics.jsonl")]
    assert len(found) == 4 and all(value > 0 for value in found)


def test_what_users_say_has_no_teacher(arguments):
    with pytest.raises(UsageError, match=r"--distill_weight 0\.6 with --train_on all"):
        arguments(**VALUES, train_on="all")


def heard_and_read(folder, transcript: str) -> dict:
    """Two turns with the same answer, each after the same clip."""
    clip = {"type": "audio", "audio": str(folder / "a.wav"), "transcript": transcript}
    turn = [{"role": "user", "content": [clip]}, {"role": "assistant", "content": "low"}]
    return {"id": "d", "messages": turn * 2}


@pytest.mark.parametrize("train_on", ["assistant", "last"])
@pytest.mark.parametrize("transcript", ["low", "low " * 20])
def test_a_teacher_reads_all_that_is_heard_and_no_more(tmp_path, monkeypatch, train_on, transcript):
    monkeypatch.chdir(tmp_path)
    soundfile.write(tmp_path / "a.wav", tone(300, 0.3), SAMPLE_RATE)
    tokenizer, found = small_tokenizer(), []
    for max_length in range(30, 330, 10):
        encoder = DialogueEncoder(
            tokenizer, FrameArithmetic(), audio_token_id=len(tokenizer), train_on=train_on, max_length=max_length,
            teach=True,
        )  # fmt: skip
        try:
            heard = encoder.encode(heard_and_read(tmp_path, transcript))
        except BadClipError:
            continue
        if heard.teacher is not None:
            read = tokenizer.decode(heard.teacher.input_ids)
            assert len(heard.windows) == read.count(f"user\n{transcript.strip()}") == 2 and read.count("assistant") == 2
            assert heard.teacher.targets.tolist() == heard.targets.tolist()
        found.append(heard.teacher is not None)
    assert not found[0] and found[-1] and found == sorted(found)
