"""SIGKILL: at every operation of a save, in a step, in an evaluation, and at random until the training ends."""

import dataclasses
import io
import itertools
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from qwhisper import disk
from qwhisper.checkpoint import folders
from qwhisper.checkpoint.folders import checkpoints
from qwhisper.checkpoint.manifest import check_manifest, write_manifest
from qwhisper.checkpoint.reading import newest_usable
from qwhisper.engine.executor import Executor
from qwhisper.errors import CheckpointError
from qwhisper.train import loop, session, start
from qwhisper.train.run import main
from qwhisper.train.session import save_checkpoint
from tests.test_faults.kill_shim import Operations, in_child, kill, killed_everywhere
from tests.test_faults.lives import Lives, Qwhisper, end_state, random_kills
from tests.test_faults.matrix import fault
from tests.train.helpers import make_run, read_lines, same_bits, step
from tests.trained import small_arguments

pytestmark = pytest.mark.trains_in_forks

SAVE = {"freeze_projector_steps": 0, "early_lr_steps": 0, "save_total_limit": 1}

SHORT = {"max_steps": 4, "save_steps": 2, "lora_dropout": 0.2, "freeze_projector_steps": 0}


def written_in_place(monkeypatch) -> None:
    """The plain way to write a checkpoint: straight into its folder."""

    def write(run_folder, step, fill, *, finite=True):
        folder = run_folder / f"checkpoint-{step}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        fill(folder)
        write_manifest(folder, step, finite)
        return folder

    monkeypatch.setattr(folders, "write_checkpoint", write)


def text_written_in_place(monkeypatch) -> None:
    monkeypatch.setattr(disk, "write_whole", lambda path, text: path.write_text(text, encoding="utf-8"))


def deleted_in_place(monkeypatch) -> None:
    monkeypatch.setattr(
        folders, "rotate", lambda folder, keep, protected: [shutil.rmtree(f) for f in checkpoints(folder)[:-keep]]
    )


def without_generators(monkeypatch) -> None:
    monkeypatch.setattr(session, "load_generators", lambda folder: None)


def test_a_child_that_dies_with_tqdms_lock_holds_up_no_other():
    tqdm.get_lock()  # made here, as by the first bar of the process that all are forked from

    def die_with_it() -> None:
        with tqdm.get_lock():
            kill()

    assert in_child(die_with_it) == -signal.SIGKILL
    assert in_child(lambda: list(tqdm(range(2), file=io.StringIO())), kill_after=5.0) == 0


def small_files(folder: Path) -> None:
    for name in ("a.json", "b.json"):
        (folder / name).write_text("{}")


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_what_is_copied_at_an_operation_is_what_a_kill_there_leaves(tmp_path):
    def fill(folder: Path) -> None:
        small_files(folder)
        session.save_file({"zeros": torch.zeros(9)}, folder / "zeros.safetensors")

    def write() -> None:
        folders.write_checkpoint(tmp_path / "run", 1, fill)

    write()
    before = shutil.copytree(tmp_path / "run", tmp_path / "before")
    copies = [(name, contents(tmp_path / "run")) for name in killed_everywhere(write, tmp_path / "run")]
    assert {name.split()[0] for name, _ in copies} >= {"open", "write", "fsync", "rename"}
    for number, (name, copied) in enumerate(copies):
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(before, tmp_path / "run")

        def killed(number: int = number) -> None:
            with Operations(tmp_path / "run", at=number):
                write()

        assert in_child(killed) == -signal.SIGKILL
        assert contents(tmp_path / "run") == copied, name


def assert_only_whole_ones(folder: Path, where: str) -> None:
    broken = []
    for each in checkpoints(folder):
        try:
            check_manifest(each)
        except CheckpointError as error:
            broken.append(str(error))
    assert not broken and newest_usable(folder)[0] is not None, f"killed at {where}: {broken or 'no checkpoint left'}"


def kill_everywhere(save, folder: Path, newest: int) -> None:
    """After each kill only whole checkpoints are there, and the next save clears what was left behind."""
    for where in killed_everywhere(save, folder):
        assert_only_whole_ones(folder, where)
        folders.write_checkpoint(folder, newest, small_files)
        folders.rotate(folder, 1, set())
        assert [path.name for path in folder.glob("*checkpoint-*")] == [f"checkpoint-{newest}"], where


@fault(
    "SIGKILL at any write, fsync or rename of a save",
    of="process",
    guarantee="the older checkpoint or the new one is there, whole; the next save clears what is left",
    without=written_in_place,
)
def test_a_save_killed_anywhere(arguments):
    run, samples = make_run(arguments(**SAVE))
    step(run, samples[:4])
    save_checkpoint(run)
    step(run, samples[4:8])
    kill_everywhere(lambda: save_checkpoint(run), run.log.folder, newest=3)


@fault(
    "SIGKILL while a checkpoint is replaced by one of the same step",
    of="process",
    guarantee="the older one or the new one is there, whole, even if it is the only one",
    without=written_in_place,
)
def test_a_replacement_killed_anywhere(tmp_path):
    folders.write_checkpoint(tmp_path / "run", 1, small_files)
    kill_everywhere(lambda: folders.write_checkpoint(tmp_path / "run", 1, small_files), tmp_path / "run", newest=1)


@fault(
    "SIGKILL while an old checkpoint is deleted",
    of="process",
    guarantee="it is whole or gone: no half of it is taken for a checkpoint",
    without=deleted_in_place,
)
def test_a_deletion_killed_anywhere(tmp_path):
    for number in (1, 2, 3):
        folders.write_checkpoint(tmp_path / "run", number, small_files)
    kill_everywhere(lambda: folders.rotate(tmp_path / "run", 1, set()), tmp_path / "run", newest=4)


@fault(
    "SIGKILL while a resumed run writes its config.yaml",
    of="process",
    guarantee="the file is whole, as it was or as it is to be",
    without=text_written_in_place,
)
def test_config_killed_anywhere(arguments, tmp_path):
    args = arguments()
    (tmp_path / "run").mkdir()
    texts = []
    for rate in (1e-2, 2e-2):
        start.write_config(dataclasses.replace(args, learning_rate=rate), tmp_path / "run", None)
        texts.append((tmp_path / "run/config.yaml").read_text())
    for where in killed_everywhere(lambda: start.write_config(args, tmp_path / "run", None), tmp_path / "run"):
        assert (tmp_path / "run/config.yaml").read_text() in texts, where


@pytest.fixture(scope="module")
def uninterrupted(bases, train_file, tmp_path_factory):
    """How a run of SHORT ends; nothing on a machine with a GPU, where the tests' own process does not use it."""
    if torch.cuda.device_count():  # `trains_in_forks`
        return {}
    folder = tmp_path_factory.mktemp("uninterrupted")
    args = small_arguments(bases, train_file=str(train_file), output_dir=str(folder), **SHORT)
    assert in_child(lambda: main(args)) == 0
    return end_state(folder, args.max_steps)


def killed_then_resumed(args, killing) -> dict[str, torch.Tensor]:
    """How a run ends in which `killing` ended the first child."""
    assert in_child(killing) == -signal.SIGKILL
    folder = Path(args.output_dir)
    reached = max(line["step"] for line in read_lines(folder / "metrics.jsonl"))
    newest, _ = newest_usable(folder)
    assert newest is not None and reached - int(newest.name.split("-")[1]) <= args.save_steps
    assert in_child(lambda: main(dataclasses.replace(args, resume_from_checkpoint="latest"))) == 0
    return end_state(folder, args.max_steps)


@fault(
    "SIGKILL in a step",
    of="process",
    guarantee="at most one save interval is lost; the resumed run ends in the same bits as an uninterrupted one",
    without=without_generators,
)
def test_killed_in_a_step(arguments, uninterrupted, monkeypatch):
    args = arguments(**SHORT, dataloader_num_workers=1)
    honest = loop.train_step

    def killing() -> None:
        def train_step(run, fetched):
            if run.state.step == 3:
                monkeypatch.setattr(run.optimizer, "step", kill)
            return honest(run, fetched)

        monkeypatch.setattr(loop, "train_step", train_step)
        main(args)

    assert same_bits(uninterrupted, killed_then_resumed(args, killing)) == []


@fault(
    "SIGKILL in an evaluation",
    of="process",
    guarantee="at most one save interval is lost; the resumed run ends in the same bits as an uninterrupted one",
    without=without_generators,
)
def test_killed_in_an_evaluation(arguments, uninterrupted, train_file, monkeypatch):
    args = arguments(**SHORT, eval_file=str(train_file), eval_steps=3)

    def killing() -> None:
        honest, steps = Executor.evaluate, iter([0, 3])
        monkeypatch.setattr(Executor, "evaluate", lambda *given: kill() if next(steps) else honest(*given))
        main(args)

    assert same_bits(uninterrupted, killed_then_resumed(args, killing)) == []


@fault(
    "SIGKILL twenty times, at random moments and inside saves",
    of="process",
    guarantee="every resume works and loses at most one save interval; the end is that of an uninterrupted run",
    without=without_generators,
    slow=True,
)
def test_twenty_kills(arguments, tmp_path, train_file):
    args = arguments(
        **SHORT | {"max_steps": 8},
        dataloader_num_workers=2,
        save_total_limit=2,
        eval_file=str(train_file),
        eval_steps=4,
    )
    lives = Lives(Qwhisper(args), tmp_path / "lives")
    kills = random_kills(random.Random(4), seconds=lives.seconds, saves=len(lives.operations), in_save=0.5)
    done = in_saves = 0
    while done < 20 or in_saves < 7:
        life = lives.live(itertools.islice(kills, 6))
        done, in_saves = done + life.kills, in_saves + life.in_save
        assert not life.errors and not life.different and max(life.lost, default=0) <= args.save_steps
