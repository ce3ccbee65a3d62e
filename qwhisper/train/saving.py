"""A run's checkpoint: what is put into it, and a run brought back to where it was."""

import sys
from pathlib import Path

from qwhisper.errors import CheckpointError
from qwhisper.guards.snapshot import all_finite
from qwhisper.model.processing_qwen3_audio import Qwen3AudioProcessor
from qwhisper.train import checkpoint as checkpoints
from qwhisper.train.context import Run
from qwhisper.train.groups import parameter_names
from qwhisper.train.resume import save_arguments
from qwhisper.train.state import load_generators, load_optimizer, save_generators, save_optimizer


def save_checkpoint(run: Run, processor: Qwen3AudioProcessor) -> Path:
    """A new checkpoint, and older ones deleted; none is deleted while the newest is not finite."""
    model, state = run.executor.model, run.state
    state.max_tokens_per_pack = run.executor.max_tokens_per_pack
    weights = [p.detach() for parameters in run.groups.values() for p in parameters]
    moments = [value for entry in run.optimizer.state.values() for value in entry.values()]
    finite = all_finite(weights + moments)

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        save_optimizer(run.optimizer, parameter_names(model), folder)
        save_generators(folder)
        state.save(folder)
        save_arguments(run.args, folder)

    folder = checkpoints.write_checkpoint(run.log.folder, state.step, fill, finite=finite)
    if finite:
        checkpoints.rotate(
            run.log.folder, run.args.save_total_limit, {state.best_checkpoint} if state.best_checkpoint else set()
        )
    else:
        run.log.event("weights_not_finite", step=state.step, checkpoint=folder.name)
        print(f"{folder.name}: a trained weight is not finite; no older checkpoint will be deleted", file=sys.stderr)
    return folder


def restore(run: Run, folder: Path) -> None:
    """Optimizer, schedule and generators as they were; the weights are loaded already."""
    try:
        load_optimizer(run.optimizer, parameter_names(run.executor.model), folder)
    except KeyError as error:
        raise CheckpointError(f"{folder}: its optimizer state does not fit this run ({error})") from error
    load_generators(folder)
    run.set_learning_rates()
