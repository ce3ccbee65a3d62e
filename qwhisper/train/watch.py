"""What only observes: the alarms for silent failures and the listening probe. Neither touches a step."""

from typing import Any

from qwhisper.checksums import changed, checksums
from qwhisper.guards.alarms import StepFacts
from qwhisper.guards.fingerprint import frozen_parameters, group_checksums
from qwhisper.train.context import Run, StepReport
from qwhisper.train.probe import Probed
from qwhisper.train.signals import StopSignals
from qwhisper.train.step_log import readable


def watch(
    run: Run, report: StepReport, learning_rates: dict[str, float], signals: StopSignals, *, save_is_due: bool
) -> None:
    """After a step: probes the model where that is due, and raises the alarms that its numbers call for.

    The last step is probed whether that is paid for or not, so that the run can say what it has learned.
    """
    state, probe, found = run.state, run.probe, None
    due = probe is not None and probe.due(state.step, report.seconds)
    if probe and (due or state.step == run.total_steps):
        found = signals.unless_stopped(lambda: probe.measure(ask=due and state.step >= probe.asks_from))
    if found is not None:
        state.learning.gain, state.learning.noise, state.learning.probed = found.gain, found.noise, state.step
        run.log.metric(step=state.step, **readable(as_facts(found)))
        run.fire("on_log", logs=as_facts(found))
        run.lines.say(f"step {state.step}: {as_line(found)}")
    if probe and state.step < probe.first_step:
        found = None  # too short to hear yet: no reason for an alarm
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
        weight_checksums=group_checksums(run.groups) if state.alarms.wants_weights(state.step) else {},
        changed_weights=altered_base(run) if save_is_due else None,
        **({} if found is None else as_facts(found)),
    )
    for alarm in state.alarms.observe(facts):
        run.log.event("alarm", step=state.step, alarm=alarm.kind, about=alarm.about, message=alarm.message)
        run.lines.say(f"warning: {alarm.message}")


def as_facts(found: Probed) -> dict[str, Any]:
    """What a probe found, by the names that StepFacts and metrics.jsonl have for it."""
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
        line += f"; right by ear, of kinds never trained on: {found.retention}"
        line += f", of trained kinds: {found.hearing}" if found.hearing is not None else ""
    return line


def altered_base(run: Run) -> list[str]:
    """Names of frozen weights that are no longer what they were when the run began."""
    return changed(run.base_checksums, checksums(frozen_parameters(run.executor.model)))
