"""What only observes: the alarms for silent failures and the listening probe. Neither touches a step."""

from qwhisper.guards.alarms import StepFacts
from qwhisper.guards.fingerprint import changed, fingerprint, frozen_parameters, group_checksums
from qwhisper.train.context import Run, StepReport
from qwhisper.train.signals import StopSignals


def watch(
    run: Run, report: StepReport, learning_rates: dict[str, float], signals: StopSignals, *, save_is_due: bool
) -> None:
    """After a step: probes the model where that is due, and raises the alarms that its numbers call for."""
    state, gain = run.state, None
    if run.probe and run.probe.due(state.step, report.seconds):
        gain = signals.unless_stopped(run.probe.measure)
    if gain is not None:
        found = {"listening_gain": gain.gain, "listening_noise": gain.noise, "text_shift": gain.text_shift}
        run.log.metric(step=state.step, **found)
        run.lines.say(
            f"step {state.step}: listening gain {gain.gain:.3f} ± {gain.noise:.3f} nats a token; text shift "
            f"{gain.text_shift:.4f}"
        )
    facts = StepFacts(
        step=state.step,
        loss=report.loss,
        tokens=report.tokens,
        num_samples=report.num_samples,
        has_audio=report.has_audio,
        skipped=bool(report.skipped),
        group_norms=report.group_norms,
        learning_rates=learning_rates,
        frozen=report.frozen,
        weight_checksums=group_checksums(run.groups) if state.alarms.wants_weights(state.step) else {},
        changed_weights=altered_base(run) if save_is_due else None,
        listening_gain=None if gain is None else gain.gain,
        listening_noise=None if gain is None else gain.noise,
    )
    for alarm in state.alarms.observe(facts):
        run.log.event("alarm", step=state.step, alarm=alarm.kind, about=alarm.about, message=alarm.message)
        run.lines.say(f"warning: {alarm.message}")


def altered_base(run: Run) -> list[str]:
    """Names of frozen weights that are no longer what they were when the run began."""
    return changed(run.base_checksums, fingerprint(frozen_parameters(run.executor.model)))
