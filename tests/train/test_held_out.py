"""The held-out loss of a training: in portions, whose audio is decoded as it is needed, in workers if there are any."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import soundfile

from qwhisper.data import dialogue_audio, held_out
from qwhisper.data.dialogue import read_dialogues
from qwhisper.data.held_out import hold_out
from qwhisper.data.loader import read_in_order
from qwhisper.data.processes import nothing
from qwhisper.train import session
from qwhisper.train.loop import loss_in_portions
from qwhisper.train.plan import resolve
from qwhisper.train.probe import MAX_PAIRS
from qwhisper.train.run import main
from qwhisper.train.session import build_session
from qwhisper.train.state import TrainState
from tests.small import tone, write_dialogues
from tests.test_faults.lives import At
from tests.train.helpers import make_run, read_lines


def test_loss_in_portions_is_that_of_all_samples_at_once(arguments, monkeypatch):
    args = arguments()
    run, samples = make_run(args)
    run.held_out, _ = hold_out(read_dialogues(args.train_file), run.encoder)
    evaluated, honest = [], run.executor.evaluate
    monkeypatch.setattr(run.executor, "evaluate", lambda rows: evaluated.append(len(rows)) or honest(rows))
    expected = honest(samples)
    assert loss_in_portions(run, nothing, {}) == expected and evaluated == [len(samples)]
    monkeypatch.setattr(held_out, "PORTION_SAMPLES", 1)
    monkeypatch.setattr(held_out, "read_in_order", partial(read_in_order, chunk=1))
    evaluated.clear()
    assert loss_in_portions(run, nothing, {}) == pytest.approx(expected, rel=1e-6) and sum(evaluated) == len(samples)
    assert len(evaluated) > 8  # text alone joins the portion before


def test_audio_that_changes_during_a_run_is_said_and_what_is_gone_is_not_left_out_silently(arguments, tmp_path):
    data = write_dialogues(tmp_path / "held", 6, name="eval.jsonl")
    longer = At(1, lambda: soundfile.write(tmp_path / "held/clip0.wav", tone(300, 1.0), 16_000))
    gone = At(3, lambda: (tmp_path / "held/clip1.wav").unlink())
    args = arguments(max_steps=6, save_steps=100, eval_file=str(data), eval_steps=2)
    assert main(args, [longer, gone]) == 0
    events = read_lines(Path(args.output_dir) / "events.jsonl")
    again = [(event["step"], event["samples"], event["what"]) for event in events if event["kind"] == "sample_changed"]
    path = (tmp_path / "held/clip0.wav").resolve()
    what = [f"laid out again: {path} has 16000 samples at 16 kHz, and was laid out with 1600"]
    assert again == [(2, ["d0"], what)]
    missing = [(event["step"], event["error"]) for event in events if event["kind"] == "not_evaluated"]
    assert [step for step, _ in missing] == [4, 6]
    assert all("eval.jsonl:2: " in error and "clip1.wav does not exist" in error for _, error in missing)
    losses = [line for line in read_lines(Path(args.output_dir) / "metrics.jsonl") if "eval_loss" in line]
    assert [line["step"] for line in losses] == [0, 2]


def test_with_workers_the_trainer_decodes_nothing_and_the_probe_is_the_same(arguments, tmp_path, monkeypatch):
    trainer, decoded, load = os.getpid(), [], dialogue_audio.load_clip

    def load_in_worker(clip, **how):
        if os.getpid() == trainer:
            decoded.append(clip)
        return load(clip, **how)

    data = write_dialogues(tmp_path / "held", 24, name="eval.jsonl")
    args = arguments(eval_file=str(data))
    run, _ = make_run(args)
    monkeypatch.setattr(dialogue_audio, "load_clip", load_in_worker)
    monkeypatch.setattr(session, "shortest_probed", lambda **_: 1)
    dialogues, held = read_dialogues(args.train_file), read_dialogues(data)
    spoken = sum(bool(dialogue.clips) for dialogue in held)
    made, decoded_for_pairs = [], []
    for num_workers in (0, 1):
        with_workers = replace(args, dataloader_num_workers=num_workers)
        made.append(
            build_session(
                with_workers,
                resolve(with_workers, num_dialogues=len(dialogues)),
                run.executor.model,
                run.processor,
                dialogues,
                held,
                TrainState(),
                [],
            )
        )
        # To find bad clips, for the pairs of the probe, and for the loss.
        decoded_for_pairs.append([clip.path for clip in decoded[spoken:]])
        assert not (num_workers and decoded)
        decoded.clear()
        loss_in_portions(made[-1], nothing, {})
        assert len(decoded) == (0 if num_workers else spoken)
        decoded.clear()
    alone, other = made
    in_pairs = {pair.true.id for pair in alone.probe.pairs}
    own_clips = {clip.path for dialogue in held if dialogue.id in in_pairs for clip in dialogue.clips}
    assert own_clips <= set(decoded_for_pairs[0]) and len(own_clips) == MAX_PAIRS
    assert len(decoded_for_pairs[0]) == len(set(decoded_for_pairs[0]))  # once, though most are in two rows
    assert len(alone.probe.pairs) == len(other.probe.pairs) == MAX_PAIRS
    for pair, same in zip(alone.probe.pairs, other.probe.pairs, strict=True):
        for row, other_row in ((pair.true, same.true), (pair.swapped, same.swapped)):
            assert row.input_ids.tolist() == other_row.input_ids.tolist()
            assert row.labels.tolist() == other_row.labels.tolist()
            assert [w.tobytes() for w in row.windows] == [w.tobytes() for w in other_row.windows]
    assert alone.held_out.num_rows == other.held_out.num_rows == 24
