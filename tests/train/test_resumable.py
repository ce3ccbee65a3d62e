"""A resume and `verify` refuse the same checkpoints, by the same code, and take what an older version wrote."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwhisper.checkpoint.manifest import write_manifest
from qwhisper.checkpoint.names import GENERATOR_FILE, MANIFEST, OPTIMIZER_FILE, SNAPSHOT_FILE, STATE_FILE
from qwhisper.cli import main as cli
from qwhisper.errors import CheckpointError
from qwhisper.infer.assistant import load_chosen
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.learning import Learning
from qwhisper.train.resume import check_resumable, saved_parameters
from qwhisper.train.run import main
from qwhisper.train.state import TrainState
from tests.train.helpers import checkpoint_tensors, same_bits

MEAN, SQUARE, COUNT = "exp_avg", "exp_avg_sq", "step"

# As it was written before `saved_with` was added: a field that is added later must not be asked for in it.
OLD_STATE = json.loads(
    '{"step": 2, "epoch": 0, "offset": 8, "skipped_steps": 0, "bad_samples": 0, "supervised_tokens": 40, '
    '"max_tokens_per_pack": 4096, "evaluated": 0, "best_loss": null, "best_checkpoint": null, '
    '"train_file_sha256": "ce3676c6ae8ed7ac7386b7bf7a2ff2af43102e2cad220c0264d52f6fc9a2f647", "kinds": [], '
    '"guards": {"averages": {"lora": {"mean": 0.15, "variance": 0.004, "first": [0.08, 0.22], "largest": 0.22}}, '
    '"bad_steps_in_a_row": 0, "clean_steps": 2, "rewinds": 0, "lr_factor": 1.0, '
    '"rate": {"step": 0, "last_peak": 0, "peaks": [], "factor": 1.0, "last_change": 0, "last_uneasy": 0, "losses": 0, '
    '"fast": 0.0, "slow": 0.0, "variance": 0.0}, "loss_scale": {"scale": 32768.0, "clean": 2}, '
    '"clamp": {"step": 2, "last_peak": 0, "peaks": [], "on": false, "clamped": 0}}, '
    '"alarms": {"active": [], "last_loss": 5.5, "without_gradient": {"lora": 0}, "unmoved": {"lora": 1}, '
    '"checksums": {"lora": -10499627345463953684}}, '
    '"probe": {"trained": 0.0, "probed": 0.0, "last_probe": 0.0, "trained_since": 0.0}}'
)


@pytest.fixture(scope="module")
def model(finished_run):
    return load_chosen(finished_run / "checkpoint-2")[0]


@pytest.fixture
def folder(finished_run, tmp_path) -> Path:
    """A checkpoint of step 2 in a run of the test's own, as an older version wrote it."""
    run = shutil.copytree(finished_run, tmp_path / "run")
    edit_json(run / "checkpoint-2" / STATE_FILE, lambda v: v.pop("saved_with"))
    sign(run / "checkpoint-2")
    return run / "checkpoint-2"


def sign(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    write_manifest(folder, 2, True)


def edit_json(file: Path, change) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def edit_tensors(file: Path, change) -> None:
    tensors = load_file(file)
    changed = change(tensors)
    save_file(changed if isinstance(changed, dict) else tensors, file)


def check(folder: Path, model) -> None:
    check_resumable(folder, saved_parameters(model, folder), TrainState.load(folder))


def arguments(folder: Path, **values) -> TrainArguments:
    told = json.loads((folder / "arguments.json").read_text())
    return TrainArguments(
        **told | {"output_dir": str(folder.parent), "resume_from_checkpoint": "latest", "max_steps": 3} | values
    )


def first(key: str, change):
    """`change` on the first entry of that kind, given (tensors, its name)."""
    return lambda tensors: change(tensors, next(name for name in sorted(tensors) if name.endswith(f"|{key}")))


def replace(key: str, make):
    return first(key, lambda tensors, name: tensors.update({name: make(tensors[name])}))


OPTIMIZERS = {
    "empty": lambda tensors: {},
    "another shape": replace(MEAN, lambda t: torch.cat([t, t])),
    "transposed": replace(SQUARE, lambda t: t.T.contiguous() if t.ndim > 1 else t[None]),
    "another dtype": replace(MEAN, lambda t: t.bfloat16()),
    "integers": replace(SQUARE, lambda t: t.long()),
    "a moment is missing": first(MEAN, lambda tensors, name: tensors.pop(name)),
    "a count is missing": first(COUNT, lambda tensors, name: tensors.pop(name)),
    "another moment": first(
        MEAN, lambda tensors, name: tensors.update({name.replace(MEAN, "max"): tensors[name].clone()})
    ),
    "an unknown parameter": lambda tensors: tensors.update({f"model.nothing|{MEAN}": torch.zeros(2)}),
    "no name": lambda tensors: tensors.update({"weight": torch.zeros(2)}),
    "not finite": replace(MEAN, lambda t: t * float("nan")),
    "a negative square": replace(SQUARE, lambda t: -t.abs() - 1e-3),
    "more steps than were taken": replace(COUNT, lambda t: t + 100),
    "no step": replace(COUNT, lambda t: t * 0),
    "half a step": replace(COUNT, lambda t: t * 0 + 1.5),
    "steps in a list": replace(COUNT, lambda t: t[None]),
    "steps as integers": replace(COUNT, lambda t: t.long()),
}
GENERATORS = {
    "empty": lambda tensors: {},
    "too short": lambda tensors: tensors.update(cpu=tensors["cpu"][:-8].clone()),
    "zeros": lambda tensors: tensors.update(cpu=torch.zeros_like(tensors["cpu"])),
    "another dtype": lambda tensors: tensors.update(cpu=tensors["cpu"].float()),
    "two dimensions": lambda tensors: tensors.update(cpu=tensors["cpu"][None].clone()),
    "another device": lambda tensors: tensors.update(tpu=tensors["cpu"].clone()),
    "another device's numbers": lambda tensors: tensors.update(cuda=torch.zeros(4)),
}


@pytest.mark.parametrize("change", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizer_that_no_resume_can_use_is_refused(folder, model, change):
    edit_tensors(folder / OPTIMIZER_FILE, change)
    with pytest.raises(CheckpointError, match=OPTIMIZER_FILE):
        check(folder, model)


@pytest.mark.parametrize("change", GENERATORS.values(), ids=GENERATORS)
def test_generators_that_no_resume_can_use_are_refused(folder, model, change):
    before = torch.get_rng_state()
    edit_tensors(folder / GENERATOR_FILE, change)
    with pytest.raises(CheckpointError, match=GENERATOR_FILE):
        check(folder, model)
    assert torch.equal(torch.get_rng_state(), before)


def set_state(*path, value):
    def change(values):
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] = value

    return change


STATES = {
    "text as step": set_state("step", value="two"),
    "half a step": set_state("step", value=20.5),
    "a whole number with a point": set_state("step", value=2.0),
    "another step than the manifest's": set_state("step", value=7),
    "a position that no source gives": set_state("position", value={"epoch": 0, "offset": -8}),
    "true as a count": set_state("bad_samples", value=True),
    "no position": lambda values: values.pop("position") and None,
    "an unknown key": set_state("stepp", value=1),
    "more steps skipped than there were": set_state("skipped_steps", value=3),
    "an infinite best loss": set_state("best_loss", value=float("inf")),
    "a best checkpoint elsewhere": set_state("best_checkpoint", value="../x"),
    "kinds that are no list": set_state("kinds", value="abc"),
    "a kind that is no text": set_state("kinds", value=[1]),
    "no guards": set_state("guards", value={}),
    "a rising learning rate": set_state("guards", "lr_factor", value=100.0),
    "an average that is text": set_state("guards", "averages", "lora", "mean", value="a"),
    "an average that is not a number": set_state("guards", "averages", "lora", "first", value=[float("nan")]),
    "peaks that are no numbers": set_state("guards", "clamp", "peaks", value=["a"]),
    "a loss scale of 0": set_state("guards", "loss_scale", "scale", value=0.0),
    "alarms that are no list": set_state("alarms", "active", value={}),
    "a checksum that is text": set_state("alarms", "checksums", value={"lora": "1"}),
    "seconds that are text": set_state("probe", "trained", value="1"),
    "a pack of nothing": set_state("max_tokens_per_pack", value=0),
}


@pytest.mark.parametrize("change", STATES.values(), ids=STATES)
def test_state_that_no_run_reaches_is_refused(folder, change):
    edit_json(folder / STATE_FILE, change)
    with pytest.raises(CheckpointError, match=STATE_FILE):
        TrainState.load(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", "[" * 100_000, '"text"', "\x00\xff"])
def test_state_that_is_no_state_is_refused(folder, content):
    (folder / STATE_FILE).write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=STATE_FILE):
        TrainState.load(folder)


def test_state_of_an_older_version_is_read(tmp_path):
    (tmp_path / STATE_FILE).write_text(json.dumps(OLD_STATE))
    state = TrainState.load(tmp_path)
    old = {name: value for name, value in OLD_STATE.items() if name not in ("epoch", "offset")}
    clamp = OLD_STATE["guards"]["clamp"]
    guards = OLD_STATE["guards"] | {"clamp": clamp | {"told": clamp["clamped"]}}
    added = {"saved_with": {}, "learning": dataclasses.asdict(Learning()), "guards": guards}
    added |= {"position": {"epoch": 0, "offset": 8}, "recompute_layers": None, "execution": None}
    assert json.loads(json.dumps(dataclasses.asdict(state))) == old | added


@pytest.mark.parametrize("change", [{"offset": -8}, {"epoch": None}, {"epoch": 1.0}])
def test_a_place_in_an_older_version_that_no_run_reaches_is_refused(tmp_path, change):
    (tmp_path / STATE_FILE).write_text(json.dumps(OLD_STATE | change))
    with pytest.raises(CheckpointError, match=f"{STATE_FILE}.*position"):
        TrainState.load(tmp_path)


def snapshots(model, folder: Path, step: int = 1) -> dict[str, torch.Tensor]:
    weights = saved_parameters(model, folder).values()
    taken = {f"{step}|{n}|weight": torch.zeros(w.shape, dtype=w.dtype) for n, w in enumerate(weights)}
    return taken | {"tried": torch.tensor(-1)}


SNAPSHOTS = {
    "no weight": lambda tensors: tensors.pop("1|0|weight") is None,
    "another shape": lambda tensors: tensors.update({"1|0|weight": torch.zeros(3)}),
    "another dtype": lambda tensors: tensors.update({"1|0|weight": tensors["1|0|weight"].half()}),
    "a parameter too many": lambda tensors: tensors.update({"1|9999|weight": torch.zeros(3)}),
    "a later step": lambda tensors: tensors.update({"9|0|weight": torch.zeros(3)}),
    "no step": lambda tensors: tensors.update({"weight": torch.zeros(3)}),
    "half of the moments": lambda tensors: tensors.update({"1|0|exp_avg": tensors["1|0|weight"].clone()}),
    "nothing was tried": lambda tensors: tensors.pop("tried") is None,
    "a text was tried": lambda tensors: tensors.update(tried=torch.zeros(2)),
    "not finite": lambda tensors: tensors["1|0|weight"].fill_(float("nan")) is None,
}


@pytest.mark.parametrize("change", SNAPSHOTS.values(), ids=SNAPSHOTS)
def test_snapshots_that_no_rewind_can_use_are_refused(folder, model, change):
    tensors = snapshots(model, folder)
    save_file(tensors, folder / SNAPSHOT_FILE)
    check(folder, model)
    change(tensors)
    save_file(tensors, folder / SNAPSHOT_FILE)
    with pytest.raises(CheckpointError, match=SNAPSHOT_FILE):
        check(folder, model)


ARGUMENTS = {
    "text as a rank": set_state("lora_r", value="16"),
    "another rank": set_state("lora_r", value=8),
    "another alpha": set_state("lora_alpha", value=64),
    "another dropout": set_state("lora_dropout", value=0.5),
    "no adapter": set_state("use_lora", value=False),
    "another silence": set_state("audio_tail_silence", value=3.0),
    "a choice that there is not": set_state("train_on", value="none"),
    "no rank": lambda values: values.pop("lora_r") and None,
}


@pytest.mark.parametrize("change", ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_that_are_not_this_checkpoints_are_refused(folder, model, change):
    edit_json(folder / "arguments.json", change)
    with pytest.raises(CheckpointError, match=r"arguments\.json"):
        check(folder, model)


def test_arguments_with_another_versions_flags_pass(folder, model):
    edit_json(folder / "arguments.json", lambda v: v.update(a_later_flag=1) or v.pop("dynamic_lr"))
    check(folder, model)


def test_parameters_are_those_that_the_optimizer_has(folder, model):
    saved = saved_parameters(model, folder)
    stepped = {name.rpartition("|")[0] for name in load_file(folder / OPTIMIZER_FILE)}
    assert saved.keys() == stepped and all(tensor.is_meta for tensor in saved.values())


def test_state_that_is_missing_is_refused(folder, capsys):
    (folder / STATE_FILE).unlink()
    sign(folder)
    assert cli(["verify", str(folder)]) == CheckpointError.exit_code
    assert STATE_FILE in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "change"),
    [
        (OPTIMIZER_FILE, OPTIMIZERS["empty"]),
        pytest.param(OPTIMIZER_FILE, OPTIMIZERS["another dtype"], marks=pytest.mark.slow),
        (GENERATOR_FILE, GENERATORS["zeros"]),
        (STATE_FILE, STATES["half a step"]),
        pytest.param(STATE_FILE, STATES["another step than the manifest's"], marks=pytest.mark.slow),
        ("arguments.json", ARGUMENTS["another rank"]),
    ],
)
def test_verify_and_resume_refuse_alike(folder, file, change, capsys):
    (edit_json if file.endswith(".json") else edit_tensors)(folder / file, change)
    sign(folder)
    shutil.rmtree(folder.parent / "checkpoint-1")
    assert cli(["verify", str(folder)]) == CheckpointError.exit_code
    assert file in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=file):
        main(arguments(folder))


def test_another_runs_moments_are_refused(finished_run, tmp_path, capsys):
    """Of the same shapes, with a manifest that fits: state.json says what was saved with it."""
    run = shutil.copytree(finished_run, tmp_path / "run")
    folder = run / "checkpoint-2"
    edit_tensors(
        folder / OPTIMIZER_FILE, lambda tensors: {k: v if k.endswith("step") else v / 2 for k, v in tensors.items()}
    )
    sign(folder)
    assert cli(["verify", str(folder)]) == CheckpointError.exit_code
    assert "optimizer.safetensors is not the one that was saved with its state.json" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="not the one that was saved"):
        main(arguments(folder))


def test_checkpoint_of_an_older_version_is_verified_and_resumed_to_the_same_bits(folder, finished_run, tmp_path):
    assert cli(["verify", str(folder)]) == 0
    newer = shutil.copytree(finished_run, tmp_path / "newer")
    for run in (folder.parent, newer):
        assert main(arguments(run / "checkpoint-2")) == 0
    assert (
        same_bits(checkpoint_tensors(folder.parent / "checkpoint-3"), checkpoint_tensors(newer / "checkpoint-3")) == []
    )
