"""What is done about a step whose numbers are not finite: run it again, find the samples, rewind, or stop."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qwhisper.checkpoint.reading import newest_usable
from qwhisper.data.rows import Sample
from qwhisper.errors import MemoryLimitError, NumericalError, first_line
from qwhisper.guards.decide import Decision, StepStatistics
from qwhisper.guards.diagnose import Finding, bad_weight, diagnose
from qwhisper.guards.gradients import drop_gradients, step_statistics
from qwhisper.memory import is_out_of_memory
from qwhisper.report.kinds import DroppedSamples, NoDiagnosis, NoSnapshot, NotRepeated, OutOfMemory, Rewind
from qwhisper.train.session import Session


def num_supervised(samples: list[Sample]) -> int:
    return sum(sample.num_supervised for sample in samples)


def run_samples(session: Session, samples: list[Sample], count: int) -> StepStatistics:
    """Forward and backward; leaves the gradients of sum(token losses) / count and returns what they look like.

    In fp16 an overflow of the gradients is met by a smaller loss scale and the same samples once more. Where no scale
    helps, it was no overflow, and the scale is as before.
    """
    scale = session.state.guards.loss_scale
    before = scale.scale
    while True:
        session.executor.loss_scale = scale.scale if session.executor.half_precision else 1.0
        loss, halvings = session.executor.forward_backward(samples, count) if samples else (torch.zeros(()), [])
        for halved in halvings:
            session.report(OutOfMemory(tokens=halved.tokens, max_tokens_per_pack=halved.now))
        drop_gradients(
            {name: parameters for name, parameters in session.groups.items() if name in session.frozen_groups}
        )
        statistics = step_statistics(loss, session.groups)
        overflow = statistics.not_finite and math.isfinite(statistics.loss) and not statistics.broken_weights
        if not (overflow and session.executor.half_precision and scale.shrink()):
            if statistics.not_finite:
                scale.scale = before
            return statistics
        drop_gradients(session.groups)


def drop_bad_samples(
    session: Session, samples: list[Sample], failed: StepStatistics
) -> tuple[list[Sample], StepStatistics]:
    """Runs a step that was not finite again and leaves the gradients of its finite samples.

    Pack by pack, and a pack that is not finite again sample by sample. What is left is weighted by its tokens, as if
    the bad samples had never been there. Returns the samples kept and their statistics, or none and the failed ones.
    This path may wait for the device.
    """
    count, packs = num_supervised(samples), session.executor.packs(samples)
    kept, dropped, total, finding = [], [], GradientSum(session), None
    drop_gradients(session.groups)
    for pack in packs:
        if len(packs) > 1 and not total.add(pack, count).not_finite:
            kept += pack
            continue
        finding = finding or find_cause(session, pack, count)
        for sample in pack:
            if bad := total.add_one(sample, count):
                dropped.append((sample, bad))
            else:
                kept.append(sample)
    report_dropped(session, kept, dropped, failed, finding)
    session.executor.model.last_logits = session.executor.divergence = (
        None  # they may be those of a sample that is left out
    )
    if not kept:
        return [], failed
    return kept, total.leave(weight=count / num_supervised(kept))


class GradientSum:
    """Sums loss and gradients of what is run and found finite; the groups' own gradients stay dropped meanwhile."""

    def __init__(self, session: Session):
        self.session, self.loss = session, 0.0
        self.gradients: dict[torch.nn.Parameter, Tensor] = {}

    def add(self, samples: list[Sample], count: int) -> StepStatistics:
        """Runs the samples of a step of `count` supervised tokens; what is not finite is not added."""
        statistics = run_samples(self.session, samples, count)
        if not statistics.not_finite:
            self.loss += statistics.loss
            for parameter in (p for parameters in self.session.groups.values() for p in parameters):
                if parameter.grad is not None:
                    known = self.gradients.get(parameter)
                    self.gradients[parameter] = parameter.grad.clone() if known is None else known.add_(parameter.grad)
        drop_gradients(self.session.groups)
        return statistics

    def add_one(self, sample: Sample, count: int) -> str:
        """The same for one sample; what was not finite, or that it did not fit into memory, or ""."""
        try:
            return " and ".join(self.add([sample], count).not_finite)
        except MemoryLimitError:
            drop_gradients(self.session.groups)
            return "out of memory where it was run alone"

    def leave(self, *, weight: float) -> StepStatistics:
        """Puts the sum, times `weight`, where the gradients belong."""
        buffers = self.session.gradient_buffers
        buffers.start()
        for parameter, gradient in self.gradients.items():
            buffers.attach(parameter)
            torch.mul(gradient, weight, out=parameter.grad)
        return step_statistics(
            torch.tensor(self.loss * weight, device=self.session.executor.device), self.session.groups
        )


def find_cause(session: Session, pack: list[Sample], count: int) -> Finding | None:
    """Where the first number breaks in the pack as it was run: some faults need the neighbours or the padding.

    None also if the search itself fails, for example without memory: the step matters more.
    """
    session.executor.before_pack()
    batch = session.executor.batch(pack) | {"num_items_in_batch": count}
    try:
        return diagnose(session.executor.model, batch, loss_scale=session.executor.loss_scale)
    except (RuntimeError, MemoryError) as error:
        session.report(NoDiagnosis(error=first_line(error)))
        return None


def report_dropped(
    session: Session,
    kept: list[Sample],
    dropped: list[tuple[Sample, str]],
    failed: StepStatistics,
    finding: Finding | None,
) -> None:
    """One event with every sample concerned and where the numbers broke first."""
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
            cause=str(finding or "not finite, of no cause that a second run would show"),
        )
    )


def after_step(session: Session, statistics: StepStatistics, decision: Decision, samples: list[str]) -> None:
    """After a bad step: continue, go back to a snapshot at half the rate, or NumericalError (exit 5)."""
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
    """Whether everything is finite. If the host has no memory for the copy, this step has no snapshot."""
    try:
        return session.snapshots.take(session.state.step)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        session.report(NoSnapshot(error=first_line(error)))
        return True


def go_back(session: Session, why: str, samples: Sequence[str]) -> None:
    """Weights and moments as they were, at half the learning rate; the data continues forward. Raises NumericalError
    after --max_rewinds.
    """
    guards, step = session.state.guards, session.state.step
    weight = bad_weight(session.executor.model)
    if guards.rewinds >= session.args.max_rewinds:
        newest, _ = newest_usable(session.log.folder)
        cure = "with a lower --learning_rate, --lora_grad_clip or --projector_scale"
        raise NumericalError(
            f"numerically dead at step {step} after {guards.rewinds} rewinds: {why} (samples "
            f"{', '.join(samples[:5])}). {session.log.folder / 'events.jsonl'} tells of every bad step. "
            + (f"{newest} is sound: go on from it {cure}" if newest else f"No checkpoint is sound: begin again {cure}")
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
