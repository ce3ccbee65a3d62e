"""A save that is cut off at every operation, by a kill or a full disk, and resumed each time."""

import errno
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from hf_faults.disk import NEWEST, OLDER, in_save
from hf_faults.observe import HARMLESS, UNRESUMABLE, Bench, Verdict, redirect
from tests.test_faults.kill_shim import Operations, fail, in_child, kill, operations_of

Cut = tuple[str, int, str, int]  # the operation, how its child ended, how the resume after it did ("" where it worked),
# and how many files the older checkpoint has left


class CutSaves:
    """The save at step 4 of a run with one checkpoint kept, cut off at each of its operations, and resumed each time.

    Done once for each way to cut it, since several faults are parts of it.
    """

    def __init__(self):
        self._done: dict[tuple, list[Cut]] = {}

    def cuts(self, bench: Bench, act: Callable[[], None], key: str, *, twice: bool = False) -> list[Cut]:
        """act: what happens at the operation. twice: the checkpoint was written before, and is written again."""
        if (key, twice) not in self._done:
            self._done[key, twice] = self._cut(bench, act, twice)
        return self._done[key, twice]

    def _cut(self, bench: Bench, act: Callable[[], None], twice: bool) -> list[Cut]:
        told = bench.fresh() / "cuts"

        def around(save: Callable[[], object], folder: Path) -> object:
            if twice:
                save()
            before = folder.with_name("before")
            shutil.copytree(folder, before)
            for number, name in enumerate(operations_of(save, folder)):
                shutil.rmtree(folder)
                shutil.copytree(before, folder)
                code = in_child(lambda number=number: cut(save, folder, number, act))
                left = len(list((folder / OLDER).glob("*")))
                error = resumed_in_child(bench, folder)
                with told.open("a") as file:
                    file.write(f"{name}\t{code}\t{error}\t{left}\n")
            return None

        seen = bench.train(in_save(4, around), max_steps=4, save_total_limit=1, limit=300)
        assert seen.finished, seen.message
        rows = [line.split("\t") for line in told.read_text().splitlines()]
        return [(name, int(code), error, int(left)) for name, code, error, left in rows]


def cut(save: Callable[[], object], folder: Path, number: int, act: Callable[[], None]) -> None:
    with Operations(folder, at=number, act=act):
        save()


def resumed_in_child(bench: Bench, folder: Path) -> str:
    """The error that a resume of what is there ends with, or nothing."""
    output = folder.with_name("resumed.txt")
    output.unlink(missing_ok=True)

    def work() -> None:
        redirect(output)
        bench.script.trainer(folder, bench.train_file, save_strategy="no").train(resume_from_checkpoint=True)

    if in_child(work) == 0:
        return ""
    errors = re.findall(r"^([A-Za-z_.]*(?:Error|Exception))\b", output.read_text(errors="replace"), flags=re.MULTILINE)
    return errors[-1].split(".")[-1] if errors else "an error"


SAVES = CutSaves()


def counted(cuts: list[Cut], how: str) -> Verdict:
    """how: "killed" or "full disk"."""
    broken = [cut[2] for cut in cuts if cut[2]]
    kinds = ", ".join(sorted(set(broken)))
    text = (
        f"of {len(cuts)} operations of a save, {how} at each in turn, {len(broken)} leave a run that can't be resumed"
    )
    return Verdict(UNRESUMABLE if broken else HARMLESS, f"{text}{f' ({kinds})' if kinds else ''}", {"cuts": cuts})


def writes(cuts: list[Cut]) -> list[Cut]:
    return [cut for cut in cuts if not cut[0].startswith(("unlink", "rmdir"))]


def killed_save(bench: Bench) -> Verdict:
    return counted(writes(SAVES.cuts(bench, kill, "killed")), "killed")


def killed_replacement(bench: Bench) -> Verdict:
    """A checkpoint of the same step is there already, whole, and is written over."""
    return counted(writes(SAVES.cuts(bench, kill, "killed", twice=True)), "killed")


def killed_deletion(bench: Bench) -> Verdict:
    cuts = [cut for cut in SAVES.cuts(bench, kill, "killed") if cut[0].startswith(("unlink", "rmdir"))]
    broken = [cut[2] for cut in cuts if cut[2]]
    halves = sum(0 < cut[3] < max(cut[3] for cut in cuts) for cut in cuts)
    text = (
        f"killed at each of its {len(cuts)} deletions, {halves} leave half a checkpoint under its name, "
        f"{len(broken)} a run that can't be resumed"
    )
    return Verdict(UNRESUMABLE if broken else HARMLESS, text, {"cuts": cuts})


def full_disk_anywhere(bench: Bench) -> Verdict:
    cuts = SAVES.cuts(bench, fail(errno.ENOSPC), "full disk")
    ended = sum(cut[1] != 0 for cut in cuts)
    verdict = counted(cuts, "with the disk full")
    return Verdict(verdict.kind, f"{verdict.outcome}; the run ends at {ended} of them", verdict.seen)


def killed_in_a_line(bench: Bench) -> Verdict:
    """Its log is in trainer_state.json, which a resume needs."""
    cuts = [cut for cut in SAVES.cuts(bench, kill, "killed") if cut[0] == f"write {NEWEST}/trainer_state.json"]
    broken = [cut[2] for cut in cuts if cut[2]]
    text = (
        f"its log is in trainer_state.json: of {len(cuts)} write{'s' * (len(cuts) != 1)} of it, killed in the middle, "
        f"{len(broken)} leave{'s' * (len(broken) == 1)} a run that can't be resumed"
    )
    return Verdict(UNRESUMABLE if broken else HARMLESS, text, {"cuts": cuts})


CASES = {
    "SIGKILL at any write, fsync or rename of a save": killed_save,
    "SIGKILL while a checkpoint is replaced by one of the same step": killed_replacement,
    "SIGKILL while an old checkpoint is deleted": killed_deletion,
    "the disk is full at any write, fsync or rename of a save": full_disk_anywhere,
    "a kill in the middle of a line of a log": killed_in_a_line,
}
