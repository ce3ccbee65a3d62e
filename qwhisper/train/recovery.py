"""Recovery from a step that is not finite: run it again, find the bad samples, rewind, or stop."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qwhisper.checkpoint.reading import newest_usable
from qwhisper.data.rows import Sample
from qwhisper.engine.executor import Executor, StepLoss
from qwhisper.errors import MemoryLimitError, NumericalError, first_line
from qwhisper.guards.decide import Decision, StepStatistics
from qwhisper.guards.diagnose import Finding, bad_weight, diagnose
from qwhisper.guards.gradients import drop_gradients, step_statistics
from qwhisper.memory import is_out_of_memory
from qwhisper.report.kinds import DroppedSamples, NoDiagnosis, NoSnapshot, NotRepeated, OutOfMemory, Rewind
from qwhisper.train.execution import report_preparation, run_plain
from qwhisper.train.session import Session


def num_supervised(samples: list[Sample]) -> int:
    return sum(sample.num_supervised for sample in samples)


def run_samples(session: Session, samples: list[Sample], count: int) -> tuple[StepStatistics, Tensor | None]:
    """Run forward and backward; leaves the gradients of sum(token losses) / count. Returns their statistics and the
    divergence from the teacher, in nats a taught token.

    If gradients overflow in fp16, the same samples run again at a smaller loss scale. If no scale helps, it was no
    overflow, and the scale is restored.
    """
    scale = session.state.guards.loss_scale
    before = scale.scale
    while True:
        session.executor.loss_scale = scale.scale if session.executor.half_precision else 1.0
        found = session.executor.forward_backward(samples, count) if samples else StepLoss(torch.zeros(()))
        for halved in found.halvings:
            session.report(OutOfMemory(tokens=halved.tokens, max_tokens_per_pack=halved.now))
        if found.why_plain is not None:
            run_plain(session, found.why_plain)
        report_preparation(session)
        drop_gradients(
            {name: parameters for name, parameters in session.groups.items() if name in session.frozen_groups}
        )
        statistics = step_statistics(found.loss, session.groups)
        overflow = statistics.not_finite and math.isfinite(statistics.loss) and not statistics.broken_weights
        if not (overflow and session.executor.half_precision and scale.shrink()):
            if statistics.not_finite:
                scale.scale = before
            return statistics, found.divergence
        drop_gradients(session.groups)


def drop_bad_samples(
    session: Session, samples: list[Sample], failed: StepStatistics
) -> tuple[list[Sample], StepStatistics]:
    """Run a step that was not finite again and leave the gradients of its finite samples.

    Each pack runs again, plain; a pack that is still not finite runs sample by sample. The samples kept are weighted by
    their tokens, as if the bad samples had never been there. Returns the samples kept and their statistics; without
    any, `failed`. This path may wait for the device.
    """
    count, packs = num_supervised(samples), session.executor.packs(samples)
    kept, dropped, total, finding = [], [], GradientSum(session), None
    was_plain, finite_when_plain = session.executor.execution == "plain", True
    drop_gradients(session.groups)
    with session.executor.plainly():
        for pack in packs:
            if (len(packs) > 1 or not was_plain) and not total.add(pack, count).not_finite:
                kept += pack
                continue
            finite_when_plain = False
            finding = finding or find_cause(session, pack, count)
            for sample in pack:
                if bad := total.add_one(sample, count):
                    dropped.append((sample, bad))
                else:
                    kept.append(sample)
    if finite_when_plain and not was_plain:
        run_plain(session, "a step was not finite, and finite when it ran plain")
    report_dropped(session, kept, dropped, failed, finding)
    session.executor.model.last_logits = None  # they may come from a sample that is left out
    if not kept:
        return [], failed
    return kept, total.leave(weight=count / num_supervised(kept))


class GradientSum:
    """Sums loss and gradients of the runs that are finite; between runs the parameters have no gradient."""

    def __init__(self, session: Session):
        self.session, self.loss = session, 0.0
        self.gradients: dict[torch.nn.Parameter, Tensor] = {}

    def add(self, samples: list[Sample], count: int) -> StepStatistics:
        """Run samples of a step of `count` supervised tokens; add the result if it is finite."""
        statistics, _ = run_samples(self.session, samples, count)
        if not statistics.not_finite:
            self.loss += statistics.loss
            for parameter in (p for parameters in self.session.groups.values() for p in parameters):
                if parameter.grad is not None:
                    known = self.gradients.get(parameter)
                    self.gradients[parameter] = parameter.grad.clone() if known is None else known.add_(parameter.grad)
        drop_gradients(self.session.groups)
        return statistics

    def add_one(self, sample: Sample, count: int) -> str:
        """Like `add`, for one sample. Returns what was not finite, or that memory ran out; "" if it was added."""
        try:
            return " and ".join(self.add([sample], count).not_finite)
        except MemoryLimitError:
            drop_gradients(self.session.groups)
            return "out of memory when it ran alone"

    def leave(self, *, weight: float) -> StepStatistics:
        """Make the sum, times `weight`, the parameters' gradients."""
        buffers = self.session.gradient_buffers
        buffers.start()
        for parameter, gradient in self.gradients.items():
            buffers.attach(parameter)
            torch.mul(gradient, weight, out=parameter.grad)
        return step_statistics(
            torch.tensor(self.loss * weight, device=self.session.executor.device), self.session.groups
        )


def find_cause(session: Session, pack: list[Sample], count: int) -> Finding | None:
    """Find where a number first is not finite, in the whole pack: some faults depend on other samples or the padding.

    Returns None if everything is finite or the search fails, for example without memory: the step matters more.
    """
    session.executor.before_pack()
    session.executor.free_graphs()
    try:
        return diagnose_pack(session.executor, pack, count)
    except (RuntimeError, MemoryError) as error:
        session.report(NoDiagnosis(error=first_line(error)))
        return None


def diagnose_pack(executor: Executor, pack: list[Sample], count: int) -> Finding | None:
    """count: supervised tokens of the step."""
    batch = executor.batch(pack)
    return diagnose(
        executor.model,
        {} if batch.audio is None else {"waveforms": batch.audio.row, "features": batch.audio.known_frames},
        loss_of_batch=lambda: executor.run_pack(batch).tokens.losses.sum() / count,
        loss_scale=executor.loss_scale,
    )


def report_dropped(
    session: Session,
    kept: list[Sample],
    dropped: list[tuple[Sample, str]],
    failed: StepStatistics,
    finding: Finding | None,
) -> None:
    """Report in one event the samples concerned and where a number first was not finite."""
    diagnosis = None if finding is None else finding.as_dict()
    if not dropped:
        ids = [sample.id for sample in kept]
        session.report(NotRepeated(samples=ids, not_finite=failed.not_finite, diagnosis=diagnosis))
        return
    session.report(
        DroppedSamples(
            samples=[{"id": sample.id, "source": sample.source, "not_finite": what} for sample, what in dropped],
            kept=len(kept),
            not_finite=failed.not_finite,
            diagnosis=diagnosis,
            cause=str(finding or "not finite; a second run did not show the cause"),
        )
    )


def after_step(session: Session, statistics: StepStatistics, decision: Decision, samples: list[str]) -> None:
    """After a bad step, continue, or go back to a snapshot at half the learning rate. Raises NumericalError (exit code
    5) if the run has no rewind left.
    """
    guards = session.state.guards
    act = guards.next_act(statistics, max_bad_steps=session.args.max_bad_steps, max_rewinds=session.args.max_rewinds)
    if act != "go on":
        go_back(session, f"{guards.bad_steps_in_a_row} bad steps in a row ({decision.skip or 'peaks'})", samples)
    elif guards.snapshot_due:
        keep_sound(session, samples)
        guards.clean_steps = 0


def keep_sound(session: Session, samples: Sequence[str] = (), *, copy: bool = True) -> None:
    """If weights and moments are finite, take a snapshot (unless `copy=False`); otherwise rewind.

    In a row of bad steps do neither: their cause may be in the weights already.
    """
    if session.state.guards.bad_steps_in_a_row:
        return
    if not (take_snapshot(session) if copy else session.snapshots.sound()):
        go_back(session, "a weight or a moment of the optimizer is not finite", samples)


def take_snapshot(session: Session) -> bool:
    """Copy weights and moments if all are finite; return whether they are. Without memory on the host, copy nothing."""
    try:
        return session.snapshots.take(session.state.step)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        session.report(NoSnapshot(error=first_line(error)))
        return True


def go_back(session: Session, why: str, samples: Sequence[str]) -> None:
    """Restore weights and moments from a snapshot and halve the learning rate; the data continues forward. Raises
    NumericalError after --max_rewinds.
    """
    guards, step = session.state.guards, session.state.step
    weight = bad_weight(session.executor.model)
    if guards.rewinds >= session.args.max_rewinds:
        newest, _ = newest_usable(session.log.folder)
        cure = "with a lower --learning_rate, --lora_grad_clip or --projector_scale"
        raise NumericalError(
            f"numerically dead at step {step} after {guards.rewinds} rewinds: {why} (samples "
            f"{', '.join(samples[:5])}). {session.log.folder / 'events.jsonl'} has every bad step. "
            + (f"{newest} is sound: resume it {cure}" if newest else f"No checkpoint is sound: begin again {cure}")
        )
    bad_steps = guards.bad_steps_in_a_row
    guards.rewound()
    session.state.alarms.forget_weights()
    to = session.snapshots.restore()
    session.set_learning_rates()
    session.report(
        Rewind(
            to_step=to,
            why=why,
            bad_steps=bad_steps,
            lr_factor=guards.lr_factor,
            samples=list(samples),
            diagnosis=weight.as_dict() if weight else None,
        )
    )
