"""Checkpoints that are damaged or changed, and disks that fail in a save."""

import errno
import json
import os
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerState

from hf_faults.numerical import at_step, nan_weight
from hf_faults.observe import (
    CRASHED,
    HARMLESS,
    POISONED,
    SILENT,
    UNRESUMABLE,
    Bench,
    Plant,
    Seen,
    Verdict,
    how_it_broke,
    judge,
)
from hf_faults.plain import LEARNING_RATE, Script
from tests.small import write_small_bases
from tests.test_faults.kill_shim import Operations, fail
from tests.test_faults.test_checkpoint_files import Payload, flipped_bit, truncated

NEWEST, OLDER = "checkpoint-4", "checkpoint-2"


def stopped(bench: Bench, plant: Plant | None = None, **values) -> Path:
    """The folder of a run that was stopped after step 4, with the checkpoints 2 and 4."""
    folder = bench.fresh()

    def stop(trainer: Trainer) -> None:
        if plant:
            plant(trainer)
        at_step(4, lambda trainer: setattr(trainer.control, "should_training_stop", True))(trainer)

    seen = bench.train(stop, folder=folder, **values)
    assert set(seen.checkpoints) == {NEWEST, OLDER}, seen.message
    return folder


def not_resumed(seen: Seen) -> Verdict:
    how = how_it_broke(seen) if seen.steps else f"ends with {seen.ended}"
    return Verdict(UNRESUMABLE, f"the resume {how}", seen.facts)


def resume(bench: Bench, folder: Path, plant: Plant | None = None, **values) -> Verdict:
    seen = bench.train(plant, folder=folder, resume=True, **values)
    if not seen.finished:
        return not_resumed(seen)
    clean = bench.clean(**{name: value for name, value in values.items() if name != "script"})
    verdict = judge(clean, seen, "resumed, it ends in other weights")
    if verdict.kind == HARMLESS:
        return Verdict(HARMLESS, "resumed, it ends in the same weights as an uninterrupted run", seen.facts)
    return verdict


def damaged_copies(bench: Bench, damage: Callable[[Path], object]) -> Iterator[tuple[str, Path]]:
    """For each file of the newest checkpoint a copy of the run in which it is damaged."""
    whole = stopped(bench)
    for name in sorted(path.name for path in (whole / NEWEST).iterdir()):
        folder = bench.fresh() / "run"
        shutil.copytree(whole, folder)
        damage(folder / NEWEST / name)
        yield name, folder


ORDER = (POISONED, SILENT, UNRESUMABLE, CRASHED, HARMLESS)
SHORT = {
    UNRESUMABLE: "the resume ends in an error with {}",
    SILENT: "it resumes without a word and ends in other weights with {}",
    HARMLESS: "nothing changes with {}",
    POISONED: "it resumes without a word and ends in NaN weights with {}",
}


def together(of: dict[str, Verdict]) -> Verdict:
    """Of several runs one sentence, the worst first, and the worst one's kind."""
    groups = {kind: [name for name, verdict in of.items() if verdict.kind == kind] for kind in ORDER}
    parts = [SHORT[kind].format(", ".join(names)) for kind, names in groups.items() if names]
    worst = next(kind for kind in ORDER if groups[kind])
    return Verdict(worst, "; ".join(parts), {name: verdict.seen for name, verdict in of.items()})


def each_file(damage: Callable[[Path], object], bench: Bench) -> Verdict:
    return together({name: resume(bench, folder) for name, folder in damaged_copies(bench, damage)})


def unreadable_sector(bench: Bench) -> Verdict:
    def plant(trainer: Trainer) -> None:
        honest = torch.load

        def load(path, *args, **kwargs):
            if str(path).endswith("optimizer.pt"):
                fail(errno.EIO)()
            return honest(path, *args, **kwargs)

        torch.load = load

    return resume(bench, stopped(bench), plant)


def damaged_state_file(bench: Bench) -> Verdict:
    """There is no manifest; trainer_state.json alone says what the checkpoint is. It is only read here, not resumed."""
    path = stopped(bench) / NEWEST / "trainer_state.json"
    whole, honest = path.read_bytes(), TrainerState.load_from_json(str(path))
    changed = [whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :] for at in range(len(whole)) for bit in (1, 32)]
    changed += [whole[:cut] for cut in range(len(whole))]
    taken = refused = 0
    for content in changed:
        path.write_bytes(content)
        try:
            taken += TrainerState.load_from_json(str(path)) != honest
        except Exception:
            refused += 1
    text = (
        f"no manifest; of {len(changed)} damaged trainer_state.json {refused} can't be read, "
        f"{taken} are taken with other values in them"
    )
    return Verdict(SILENT if taken else UNRESUMABLE, text)


def added_files(bench: Bench) -> Verdict:
    whole, found = stopped(bench), {}
    for name in ("notes.txt", "pytorch_model.bin", "adapter_model.safetensors", "optimizer.bin"):
        folder = bench.fresh() / "run"
        shutil.copytree(whole, folder)
        (folder / NEWEST / name).write_bytes(b"")
        found[f"an added {name}"] = resume(bench, folder)
    return together(found)


def missing_optimizer(bench: Bench) -> Verdict:
    folder = stopped(bench)
    (folder / NEWEST / "optimizer.pt").unlink()
    seen = bench.train(folder=folder, resume=True)
    if not seen.finished:
        return not_resumed(seen)
    rates = seen.logged("learning_rate")
    verdict = judge(bench.clean(), seen)
    right = bench.clean().logged("learning_rate")[4]
    text = (
        f"resumes{'' if seen.said else ' without a word'}; "
        f"the learning rate of step 5 is {rates[-2]:.1e} instead of {right:.1e}"
    )
    return Verdict(verdict.kind, text, seen.facts)


def pickles(bench: Bench) -> Verdict:
    marker, ran, found = bench.scratch / "ran", [], {}
    for name, folder in damaged_copies(bench, lambda path: path.write_bytes(pickle.dumps(Payload(marker)))):
        found[name] = resume(bench, folder)
        if marker.exists():
            ran.append(name)
            marker.unlink()
    verdict = together({f"a pickle as {name}": v for name, v in found.items()})
    text = f"the code in it is run from {', '.join(ran)}" if ran else "the code in it is never run"
    return Verdict(SILENT if ran else verdict.kind, f"{text}; {verdict.outcome}", verdict.seen)


def newest_not_finite(bench: Bench) -> Verdict:
    folder = stopped(bench, at_step(3, nan_weight))
    verdict = resume(bench, folder)
    return Verdict(verdict.kind, f"takes the newest all the same: {verdict.outcome}", verdict.seen)


def changed_bases(bench: Bench) -> Verdict:
    found = {}
    for file in ("config.json", "model.safetensors"):
        folder = stopped(bench)
        audio, text = write_small_bases(bench.fresh())
        if file == "config.json":
            config = json.loads((text / file).read_text())
            (text / file).write_text(json.dumps(config | {"rms_norm_eps": 1e-2}))
        else:
            tensors = {name: tensor + 0.1 for name, tensor in load_file(text / file).items()}
            save_file(tensors, text / file, metadata={"format": "pt"})
        found[f"another {file} of the base"] = resume(bench, folder, script=Script.on((audio, text)))
    return together(found)


def changed_tokenizer(bench: Bench) -> Verdict:
    folder = stopped(bench)
    audio, text = write_small_bases(bench.fresh())
    tokenizer = json.loads((text / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    letters = sorted(vocabulary, key=vocabulary.get)
    tokenizer["model"]["vocab"] = {
        letter: vocabulary[other] for letter, other in zip(letters, letters[::-1], strict=True)
    }
    (text / "tokenizer.json").write_text(json.dumps(tokenizer))
    return resume(bench, folder, script=Script.on((audio, text)))


def other_flags(bench: Bench) -> Verdict:
    seen = bench.train(folder=stopped(bench), resume=True, learning_rate=LEARNING_RATE / 2)
    if not seen.finished:
        return not_resumed(seen)
    rates, clean = seen.logged("learning_rate"), bench.clean().logged("learning_rate")
    told = "is ignored" if rates[-2:] == clean[-2:] else "is taken"
    rank = resume(bench, stopped(bench), script=Script.on(bench.bases, lora_r=4))
    return Verdict(
        SILENT if told == "is ignored" and not seen.said else rank.kind,
        f"half the learning rate {told}{'' if seen.said else ' without a word'}; with another LoRA rank {rank.outcome}",
        seen.facts,
    )


# Disks that fail. After each the disk is in order again, and the run is resumed.


def in_save(step: int, around: Callable[[Callable[[], object], Path], object]) -> Plant:
    """`around(save, folder)` in the place of the save at that step."""

    def plant(trainer: Trainer) -> None:
        honest = trainer._save_checkpoint

        def save(*args, **kwargs):
            if trainer.state.global_step != step:
                return honest(*args, **kwargs)
            return around(lambda: honest(*args, **kwargs), Path(trainer.args.output_dir))

        trainer._save_checkpoint = save

    return plant


def failing_at(name: str, number: int) -> Callable:
    """The operation whose name begins so fails with that errno."""

    def around(save: Callable[[], object], folder: Path) -> object:
        operations = Operations(folder, act=fail(number))
        honest = operations.hits

        def hits(what: str, path: object) -> bool:
            honest(what, path)
            return str(path).startswith(operations.folder) and f"{what} {path}".replace(
                f"{operations.folder}/", ""
            ).startswith(name)

        operations.hits = hits
        with operations:
            return save()

    return around


def then_resumed(bench: Bench, plant: Plant, **values) -> Verdict:
    """The run breaks in a save; then it is resumed."""
    folder = bench.fresh()
    seen = bench.train(plant, folder=folder, **values)
    if seen.finished:
        return judge(bench.clean(), seen, "the save is taken for written")
    left = resume(bench, folder, **values)
    after = "a resume then works" if left.kind == HARMLESS else f"afterwards {left.outcome}"
    kind = UNRESUMABLE if left.kind == UNRESUMABLE else CRASHED
    return Verdict(kind, f"{how_it_broke(seen)}; {after}", seen.facts)


def full_at_optimizer(step: int) -> Plant:
    return in_save(step, failing_at(f"write checkpoint-{step}/optimizer.pt", errno.ENOSPC))


def failing_fsync(bench: Bench) -> Verdict:
    told = bench.fresh() / "flushed"

    def around(save: Callable[[], object], folder: Path) -> object:
        calls: list[int] = []

        def fsync(descriptor: int) -> None:
            calls.append(descriptor)
            fail(errno.EIO)()

        with mock.patch.object(os, "fsync", fsync):
            result = save()
        told.write_text(str(len(calls)))
        return result

    seen = bench.train(in_save(4, around))
    if not seen.finished:
        return judge(bench.clean(), seen)
    text = f"finishes; the save calls fsync {told.read_text()} times, so that nothing is noticed"
    return Verdict(SILENT if told.read_text() == "0" else HARMLESS, text, seen.facts)


def file_limit(save: Callable[[], object], folder: Path) -> object:
    """As large as three quarters of the largest file may be."""
    largest = max(path.stat().st_size for path in (folder / OLDER).iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest * 3 // 4, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return save()


def best_save_fails(bench: Bench) -> Verdict:
    flags = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_total_limit": 1}
    return then_resumed(bench, full_at_optimizer(4), eval_file=bench.train_file, **flags)


def from_an_older_one(bench: Bench) -> Verdict:
    """Of six checkpoints the second is resumed, for two steps, with two to keep."""
    folder = bench.fresh() / "run"
    bench.train(folder=folder, save_steps=1)
    older = str(folder / "checkpoint-2")
    seen = bench.train(folder=folder, save_steps=1, save_total_limit=2, max_steps=4, resume=older)
    left = sorted(seen.checkpoints, key=lambda name: int(name.split("-")[1]))
    text = f"{how_it_went(seen)}; {', '.join(left)} are left"
    abandoned = [name for name in left if int(name.split("-")[1]) > 4]
    if abandoned:
        text += f", of which the next resume takes {abandoned[-1]}, of the course that was left"
    return Verdict(SILENT if abandoned else HARMLESS, text, seen.facts)


def how_it_went(seen: Seen) -> str:
    return "finishes, says nothing" if seen.finished and not seen.said else "finishes" if seen.finished else seen.ended


CASES = {
    "a run that is resumed from an older checkpoint than its newest": from_an_older_one,
    "a truncated file in a checkpoint, of any kind": partial(each_file, truncated),
    "a flipped bit in a file of a checkpoint, of any kind": partial(each_file, flipped_bit),
    "a missing file in a checkpoint, of any kind": partial(each_file, Path.unlink),
    "a sector that can't be read in a checkpoint": unreadable_sector,
    "a damaged manifest: cut anywhere, or any of its bytes changed": damaged_state_file,
    "a file that was put into a checkpoint": added_files,
    "an optimizer file that is missing, from the manifest as well": missing_optimizer,
    "a pickle in the place of a safetensors file, with a manifest that fits": pickles,
    "the newest checkpoint holds weights that are not finite": newest_not_finite,
    "a base model changed since the checkpoint was written": changed_bases,
    "the base's tokenizer changed since the checkpoint was written": changed_tokenizer,
    "a run is resumed with other flags": other_flags,
    "the disk is full in a periodic save": partial(then_resumed, plant=full_at_optimizer(4)),
    "a disk that reports a failed write only when it is flushed (EIO at fsync)": failing_fsync,
    "the disk turns read-only in the middle of a run": partial(
        then_resumed, plant=in_save(4, failing_at("mkdir checkpoint-4", errno.EROFS))
    ),
    "a file limit or quota is reached, enforced by the kernel, in whichever library writes": partial(
        then_resumed, plant=in_save(4, file_limit)
    ),
    "the last save of a run fails": partial(then_resumed, plant=full_at_optimizer(6)),
    "the save of the best checkpoint fails": best_save_fails,
}
