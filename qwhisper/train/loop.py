"""The training loop.

`train_step` reads top to bottom: fetch, count, run, check, clip, step or skip, schedule, report.
"""

import dataclasses
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from qwhisper.data.collator import Sample
from qwhisper.errors import DataError, NumericalError
from qwhisper.guards.apply import drop_gradients, scale_gradients
from qwhisper.guards.decide import decide
from qwhisper.guards.measure import Groups, step_statistics
from qwhisper.report.events import RunLog
from qwhisper.report.terminal import StepLines
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.dataset import StepSamples
from qwhisper.train.executor import Executor
from qwhisper.train.hooks import Hooks
from qwhisper.train.state import TrainState

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Run:
    """Everything that one training run holds; `save` writes a checkpoint of it and returns its folder."""

    args: TrainArguments
    total_steps: int
    num_dialogues: int
    groups: Groups
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    executor: Executor
    state: TrainState
    log: RunLog
    hooks: Hooks
    eval_samples: list[Sample]
    save: Callable[["Run"], Path]

    def fire(self, event: str, **values) -> None:
        self.hooks.fire(event, self.state.step, **values)


@dataclass
class StepReport:
    """What a step did. loss: nats a supervised token; grad_norm: before clipping; skipped: why, or None."""

    loss: float
    tokens: int
    grad_norm: float
    skipped: str | None
    seconds: float
    group_norms: dict[str, float]


def train_step(run: Run, fetched: StepSamples) -> StepReport:
    """One optimizer step on the given samples: the same mathematics however they are packed.

    A step whose loss or gradient is not finite leaves parameters, moments and Adam's step counts untouched; learning
    rate and data go on. So does a step that was left without samples.
    """
    started = time.perf_counter()
    samples, args = fetched.samples, run.args
    quarantine(run, fetched)

    num_supervised = sum(sample.num_supervised for sample in samples)
    if samples:
        loss, halvings = run.executor.forward_backward(samples, num_supervised)
        for halved in halvings:
            run.log.event("out_of_memory", step=run.state.step, tokens=halved.tokens, max_tokens_per_pack=halved.now)
    else:
        loss = torch.zeros(())

    if run.state.step < args.freeze_projector_steps:
        drop_gradients({name: p for name, p in run.groups.items() if name == "projector"})
    statistics = step_statistics(loss, run.groups)
    decision = decide(statistics, group_bounds={"lora": args.lora_grad_clip}, max_grad_norm=args.max_grad_norm)
    skipped = decision.skip if samples else "no sample left"

    if skipped:
        drop_gradients(run.groups)
        run.state.skipped_steps += 1
        run.log.event(
            "skipped",
            step=run.state.step,
            reason=skipped,
            statistics=readable(statistics),
            samples=[s.id for s in samples],
        )
    else:
        scale_gradients(decision, run.groups)
        run.fire("on_pre_optimizer_step")
        run.optimizer.step()
        run.fire("on_optimizer_step")
    run.scheduler.step()
    drop_gradients(run.groups)

    run.state.bad_steps_in_a_row = run.state.bad_steps_in_a_row + 1 if decision.skip else 0
    run.state.step += 1
    run.state.epoch, run.state.offset = fetched.epoch, fetched.offset
    run.state.supervised_tokens += num_supervised
    norms = {name: value for name, value in statistics.items() if name != "loss"}
    return StepReport(
        statistics["loss"], num_supervised, decision.grad_norm, skipped, time.perf_counter() - started, norms
    )


def train(run: Run, steps: Iterator[StepSamples]) -> int:
    """Runs to the end, or to a signal, and leaves a checkpoint.

    Returns the exit code: 0, or 128 + the signal's number.
    """
    args, state = run.args, run.state
    lines = StepLines(run.total_steps, state.step)
    caught: list[int] = []
    previous = {number: signal.signal(number, lambda received, frame: caught.append(received)) for number in SIGNALS}
    # A skipped first step is meant: the schedule goes on, the optimizer does not.
    warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler.step\(\)` before")
    run.executor.model.train()
    run.fire("on_train_begin")
    window: list[StepReport] = []
    last_saved = state.step
    try:
        while state.step < run.total_steps and not caught and not run.hooks.control.should_training_stop:
            begun = time.perf_counter()
            run.fire("on_step_begin")
            learning_rates = {group["name"]: group["lr"] for group in run.optimizer.param_groups}
            report = train_step(run, next(steps))
            report.seconds = time.perf_counter() - begun
            window.append(report)
            log_step(run, report, learning_rates, lines)
            run.fire("on_step_end", step_report=report)
            stop_if_dead(run)
            if state.step % args.logging_steps == 0 or state.step == run.total_steps:
                log_window(run, window, max(learning_rates.values()), lines)
                window = []
            at_end = state.step == run.total_steps or bool(caught)
            if run.eval_samples and (state.step % args.eval_steps == 0 or at_end) and not caught:
                evaluate(run, lines)
            if state.step % args.save_steps == 0 or at_end or state.best_checkpoint == f"checkpoint-{state.step}":
                last_saved = save(run, lines)
        if last_saved != state.step:
            save(run, lines)
    finally:
        lines.close()
        for number, handler in previous.items():
            signal.signal(number, handler)
    run.fire("on_train_end")
    return 128 + caught[0] if caught else 0


def quarantine(run: Run, fetched: StepSamples) -> None:
    """Names bad dialogues; ends the run when they are more than --max_bad_fraction of the data."""
    for rejection in fetched.rejections:
        run.state.bad_samples += 1
        run.log.quarantine(**dataclasses.asdict(rejection), step=run.state.step)
    passes = 1 + run.state.epoch
    if fetched.rejections and run.state.bad_samples > run.args.max_bad_fraction * run.num_dialogues * passes:
        raise DataError(
            f"{run.state.bad_samples} of {run.num_dialogues * passes} dialogues were unusable, more than "
            f"--max_bad_fraction {run.args.max_bad_fraction}; the last: {fetched.rejections[-1].reason}. All are in "
            f"{run.log.folder / 'quarantine.jsonl'}: mend or remove them, or raise the bound"
        )


def readable(statistics: dict[str, float]) -> dict[str, float | str]:
    """JSON has no NaN: non-finite numbers become their names."""
    return {name: value if abs(value) < float("inf") else str(value) for name, value in statistics.items()}


def log_step(run: Run, report: StepReport, learning_rates: dict[str, float], lines: StepLines) -> None:
    values = {"loss": report.loss, "grad_norm": report.grad_norm} | {
        f"grad_norm_{k}": v for k, v in report.group_norms.items()
    }
    rates = {f"learning_rate_{name}": rate for name, rate in learning_rates.items()}
    run.log.metric(
        step=run.state.step,
        **readable(values),
        valid_label_count=report.tokens,
        **rates,
        **memory(run),
        seconds=round(report.seconds, 4),
    )
    lines.step(loss=report.loss, tokens=report.tokens, grad_norm=report.grad_norm)
    if report.skipped:
        lines.say(
            f"step {run.state.step}: skipped, {report.skipped} (events.jsonl names the samples); weights are untouched"
        )


def memory(run: Run) -> dict[str, float]:
    """The most that was ever allocated on the accelerator, in GiB; nothing on a CPU."""
    if run.executor.device.type != "cuda":
        return {}
    return {"peak_memory_gib": round(torch.cuda.max_memory_allocated(run.executor.device) / 2**30, 3)}


def log_window(run: Run, window: list[StepReport], learning_rate: float, lines: StepLines) -> None:
    """One line for the last steps: loss weighted by tokens, skipped steps left out of the averages."""
    taken = [report for report in window if not report.skipped]
    tokens = sum(report.tokens for report in taken)
    loss = sum(report.loss * report.tokens for report in taken) / tokens if tokens else float("nan")
    grad_norm = sum(report.grad_norm for report in taken) / len(taken) if taken else float("nan")
    seconds = sum(report.seconds for report in window) / len(window)
    lines.line(
        step=run.state.step, loss=loss, tokens=tokens, grad_norm=grad_norm, learning_rate=learning_rate, seconds=seconds
    )
    run.fire(
        "on_log",
        logs={"loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate, "supervised_tokens": tokens},
    )


def evaluate(run: Run, lines: StepLines) -> None:
    """Held-out loss over all supervised tokens; remembers the best step, whose checkpoint is kept."""
    loss = run.executor.evaluate(run.eval_samples)
    best = run.state.best_loss is None or loss < run.state.best_loss
    if best:
        run.state.best_loss, run.state.best_checkpoint = loss, f"checkpoint-{run.state.step}"
    run.log.metric(step=run.state.step, **readable({"eval_loss": loss}))
    lines.say(f"step {run.state.step}: held-out loss {loss:.4f}{' (best so far)' if best else ''}")
    run.fire("on_evaluate", metrics={"eval_loss": loss})
    run.fire("on_log", logs={"eval_loss": loss})


def save(run: Run, lines: StepLines) -> int:
    folder = run.save(run)
    lines.say(f"step {run.state.step}: saved {folder}")
    run.fire("on_save")
    return run.state.step


def stop_if_dead(run: Run) -> None:
    if run.state.bad_steps_in_a_row >= run.args.max_bad_steps:
        raise NumericalError(
            f"{run.state.bad_steps_in_a_row} steps in a row had a loss or gradient that is not finite, the last at "
            f"step {run.state.step}: {run.log.folder / 'events.jsonl'} names the samples. The last checkpoint is "
            "sound; resume with a lower --learning_rate, or a lower --lora_grad_clip or --projector_scale"
        )
