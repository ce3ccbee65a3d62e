"""Observe a step without changing it: metrics.jsonl, the terminal's lines, the trackers' logs, the listening probe and
the alarms for silent failures.
"""

from typing import Any

import torch

from qwhisper.checksums import changed, checksums
from qwhisper.guards.alarms import StepFacts
from qwhisper.guards.clamp import ActivationClamp
from qwhisper.guards.gradients import frozen_parameters, group_checksums
from qwhisper.guards.state import ALL
from qwhisper.report.events import readable
from qwhisper.report.kinds import ActivationsClamped, AlarmRaised, EncoderOverflow
from qwhisper.train.probe import Probed
from qwhisper.train.session import Session, StepReport, collect_clamped
from qwhisper.train.signals import StopSignals


def watch(
    session: Session, report: StepReport, learning_rates: dict[str, float], signals: StopSignals, *, save_is_due: bool
) -> None:
    """Probe the model after a step if that is due, and raise the alarms that its numbers call for.

    The last step is always probed, so that the run can report what it has learned.
    """
    state, probe, found = session.state, session.probe, None
    due = probe is not None and probe.due(state.step, report.seconds)
    if probe and (due or state.step == session.total_steps):
        asks = due and state.step >= probe.asks_from
        found = signals.unless_stopped(session.executor, lambda: probe.measure(ask=asks))
    if found is not None:
        state.learning.gain, state.learning.noise, state.learning.probed = found.gain, found.noise, state.step
        session.measured(as_facts(found), as_line(found))
        session.fire("on_log", logs=as_facts(found))
    if probe and state.step < probe.first_step:
        found = None  # too early to expect that it hears: no alarm
    facts = StepFacts(
        step=state.step,
        loss=report.loss,
        tokens=report.tokens,
        num_samples=report.num_samples,
        has_audio=report.has_audio,
        skipped=bool(report.skipped),
        group_norms=report.group_norms,
        learning_rates=learning_rates,
        divergence=report.divergence,
        frozen=report.frozen,
        weight_checksums=group_checksums(session.groups) if state.alarms.wants_weights(state.step) else {},
        changed_weights=altered_base(session) if save_is_due else None,
        **({} if found is None else as_facts(found)),
    )
    for alarm in state.alarms.observe(facts):
        session.report(AlarmRaised(alarm=alarm.kind, about=alarm.about, message=alarm.message))


def as_facts(found: Probed) -> dict[str, Any]:
    """The results of a probe, under their names in StepFacts and metrics.jsonl."""
    facts: dict[str, Any] = {"listening_gain": found.gain, "listening_noise": found.noise}
    if found.text_shift is not None:
        facts["text_shift"] = found.text_shift
    if found.retention is not None:
        facts |= {"retention": found.retention.share, "retention_questions": found.retention.asked}
    if found.hearing is not None:
        facts["hearing"] = found.hearing.share
    return facts


def as_line(found: Probed) -> str:
    line = f"listening gain {found.gain:.3f} ± {found.noise:.3f} nats a token"
    if found.text_shift is not None:
        line += f"; text shift {found.text_shift:.4f} nats a token"
    if found.retention is not None:
        line += f"; right on speech, of kinds never trained on: {found.retention}"
        line += f", of trained kinds: {found.hearing}" if found.hearing is not None else ""
    return line


def altered_base(session: Session) -> list[str]:
    """Names of frozen weights that have changed since the run began."""
    return changed(session.base_checksums, checksums(frozen_parameters(session.executor.model)))


def log_step(session: Session, report: StepReport, learning_rates: dict[str, float]) -> None:
    values = {"loss": report.loss, "grad_norm": report.grad_norm} | {
        f"grad_norm_{k}": v for k, v in report.group_norms.items()
    }
    if report.divergence is not None:
        values["divergence"] = report.divergence
    peaks = {f"peak_{name}": round(times_average, 2) for name, times_average in report.peaks.items()}
    rates = {f"learning_rate_{name}": rate for name, rate in learning_rates.items()}
    session.log.metric(
        step=session.state.step,
        **readable(values),
        **grad_norm_average(session),
        **peaks,
        valid_label_count=report.tokens,
        **rates,
        **memory(session),
        seconds=round(report.seconds, 4),
    )
    session.lines.step(
        loss=report.loss,
        tokens=report.tokens,
        grad_norm=report.grad_norm,
        learning_rate=max(learning_rates.values()),
        seconds=report.seconds,
    )


def grad_norm_average(session: Session) -> dict[str, float]:
    """Exponential mean and variance of the gradient norm of all groups together."""
    average = session.state.guards.averages.get(ALL)
    return {} if average is None else {"grad_norm_mean": average.mean, "grad_norm_variance": average.variance}


def memory(session: Session) -> dict[str, float]:
    """Peak memory allocated on the GPU, in GiB; empty on a CPU."""
    if session.executor.device.type != "cuda":
        return {}
    return {"peak_memory_gib": round(torch.cuda.max_memory_allocated(session.executor.device) / 2**30, 3)}


def log_window(session: Session, window: list[StepReport], learning_rate: float) -> None:
    """Print one line for the last steps. The loss is weighted by tokens; averages leave out skipped steps.

    The trackers get each group's norm as well, and gradient_peaks: the number of steps in which a group's gradient was
    scaled down to its adaptive bound.
    """
    taken = [report for report in window if not report.skipped]
    tokens = sum(report.tokens for report in taken)
    loss = sum(report.loss * report.tokens for report in taken) / tokens if tokens else float("nan")
    grad_norm = sum(report.grad_norm for report in taken) / len(taken) if taken else float("nan")
    seconds = sum(report.seconds for report in window) / len(window)
    session.lines.line(
        step=session.state.step,
        loss=loss,
        tokens=tokens,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        seconds=seconds,
    )
    if session.clamp and session.clamp.on:
        log_clamped(session, session.clamp)
    if overflow := session.executor.model.model.audio_tower.overflow.take_counts():
        session.report(EncoderOverflow(values=overflow))
    averages = {"loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate, "supervised_tokens": tokens}
    peaks = {"gradient_peaks": sum(bool(report.peaks) for report in window)}
    by_group = {f"grad_norm_{name}": mean_norm(taken, name) for name in session.groups} if taken else {}
    divergences = [report.divergence for report in taken if report.divergence is not None]
    divergence = {"divergence": sum(divergences) / len(divergences)} if divergences else {}
    session.fire("on_log", logs=averages | by_group | divergence | peaks | grad_norm_average(session))


def mean_norm(reports: list[StepReport], group: str) -> float:
    return sum(report.group_norms.get(group, 0.0) for report in reports) / len(reports)


def log_clamped(session: Session, clamp: ActivationClamp) -> None:
    """Report how many activations were clamped since the last such event; no event if there were none."""
    collect_clamped(session)
    switch = session.state.guards.clamp
    if new := switch.clamped - switch.told:
        switch.told = switch.clamped
        session.report(ActivationsClamped(values={clamp.name: new}))
