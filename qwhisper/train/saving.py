"""A run's checkpoint: what is put into it, and a run brought back to where it was."""

import sys
from pathlib import Path

from safetensors.torch import save_file

from qwhisper.checkpoint import folders
from qwhisper.checkpoint.names import SNAPSHOT_FILE
from qwhisper.disk import file_sha256
from qwhisper.model.processing_qwen3_audio import Qwen3AudioProcessor
from qwhisper.train.context import Session
from qwhisper.train.monitor import collect_clamped
from qwhisper.train.optimizer import parameter_names
from qwhisper.train.resume import check_resumable, write_arguments
from qwhisper.train.state import load_generators, load_optimizer, read_tensors, write_generators, write_optimizer


def save_checkpoint(session: Session, processor: Qwen3AudioProcessor) -> Path:
    """A new checkpoint, and older ones deleted; none is deleted while the newest is not finite.

    With the snapshots where the newest is of an earlier step, as after a signal or in a row of bad steps.
    """
    model, state = session.executor.model, session.state
    state.max_tokens_per_pack = session.executor.max_tokens_per_pack
    collect_clamped(session)
    finite = session.snapshots.sound()

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_optimizer(session.optimizer, parameter_names(model), folder)
        write_generators(folder)
        write_arguments(session.args, folder)
        if session.snapshots.kept and session.snapshots.kept[-1].step != state.step:
            save_file(session.snapshots.as_tensors(), folder / SNAPSHOT_FILE)
        tensor_files = sorted(folder.rglob("*.safetensors"))
        state.saved_with = {str(path.relative_to(folder)): file_sha256(path) for path in tensor_files}
        state.write(folder)

    folder = folders.write_checkpoint(session.log.folder, state.step, fill, finite=finite)
    if finite:
        protected = {name for name in (folder.name, state.best_checkpoint) if name}
        folders.rotate(session.log.folder, session.args.save_total_limit, protected)
    else:
        session.log.event("weights_not_finite", step=state.step, checkpoint=folder.name)
        print(f"{folder.name}: a trained weight is not finite; no older checkpoint will be deleted", file=sys.stderr)
    return folder


def restore(session: Session, folder: Path) -> None:
    """Optimizer, schedule, generators and snapshots as they were; the weights are loaded already.

    Raises CheckpointError where one of them is not what this run can go on with.
    """
    names = parameter_names(session.executor.model)
    check_resumable(folder, {names[parameter]: parameter for parameter in session.snapshots.parameters}, session.state)
    load_optimizer(session.optimizer, names, folder)
    load_generators(folder)
    if (folder / SNAPSHOT_FILE).exists():
        session.snapshots.load(read_tensors(folder / SNAPSHOT_FILE))
    session.set_learning_rates()
