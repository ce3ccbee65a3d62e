"""The state of one running training: built from arguments, model and data; saved to and restored from a checkpoint."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from qwhisper.checkpoint import folders
from qwhisper.checkpoint.names import SNAPSHOT_FILE
from qwhisper.checksums import checksums
from qwhisper.data.dialogue import Dialogue
from qwhisper.data.encode import DialogueEncoder
from qwhisper.data.held_out import HeldOut, hold_out
from qwhisper.data.processes import Poll, nothing
from qwhisper.data.source import ShuffledDialogues, Source
from qwhisper.disk import file_sha256
from qwhisper.engine.executor import Executor
from qwhisper.engine.feature_cache import FeatureCache
from qwhisper.errors import DataError
from qwhisper.evaluate.forgetting import choose_questions
from qwhisper.guards.clamp import ActivationClamp, first_q_proj
from qwhisper.guards.gradient_buffers import GradientBuffers
from qwhisper.guards.gradients import Groups, frozen_parameters
from qwhisper.guards.snapshot import Snapshots
from qwhisper.model.card import Origin
from qwhisper.model.processor import Qwen3AudioProcessor, encoder_of
from qwhisper.model.qwen3_audio import Qwen3AudioForConditionalGeneration
from qwhisper.report.events import RunLog, readable
from qwhisper.report.kinds import Event, WeightsNotFinite
from qwhisper.report.terminal import StepLines, note, say
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.hf import Hooks, hf_arguments
from qwhisper.train.optimizer import guarded_factor, make_optimizer, parameter_groups, parameter_names
from qwhisper.train.plan import Plan, longest_dialogue, with_values
from qwhisper.train.probe import ListeningProbe, first_probe_step, first_questions_step, make_probe, shortest_probed
from qwhisper.train.resume import check_resumable, write_arguments
from qwhisper.train.state import (
    TrainState,
    load_generators,
    load_optimizer,
    read_tensors,
    write_generators,
    write_optimizer,
)


@dataclass
class Session:
    """Everything that one running training holds."""

    args: TrainArguments
    plan: Plan
    source: Source
    num_dialogues: int
    groups: Groups
    gradient_buffers: GradientBuffers
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    executor: Executor
    processor: Qwen3AudioProcessor
    encoder: DialogueEncoder
    snapshots: Snapshots
    clamp: ActivationClamp | None  # None: off, or an LM without a q_proj
    state: TrainState
    log: RunLog
    lines: StepLines
    hooks: Hooks
    held_out: HeldOut
    probe: ListeningProbe | None  # None: the run is too short, or has too few dialogues with audio
    base_checksums: dict[str, int]  # of the weights that must not change
    features: FeatureCache | None = None  # --feature_cache

    @property
    def total_steps(self) -> int:
        return self.plan.total_steps

    def fire(self, event: str, **values) -> None:
        self.hooks.fire(event, self.state.step, **values)

    def report(self, event: Event) -> None:
        """Writes the event into events.jsonl and prints its line, if its kind has one."""
        self.log.event(event, step=self.state.step)
        if line := event.line(self.state.step):
            say(line, to_stderr=event.to_stderr)

    def measured(self, values: Mapping[str, float], line: str) -> None:
        """Writes numbers into metrics.jsonl and prints them as `line`."""
        self.log.metric(step=self.state.step, **readable(values))
        say(f"step {self.state.step}: {line}")

    @property
    def frozen_groups(self) -> frozenset[str]:
        """Groups whose gradient is dropped in the current or next step."""
        return frozenset({"projector"} if self.state.step < self.plan.freeze_projector_steps else ())

    def set_learning_rates(self) -> None:
        """Set those of the next step, after a resume or if a guard has changed its factor."""
        for group, base in zip(self.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
            group["lr"] = base * self.scheduler.lr_lambdas[0](self.state.step)
        self.scheduler.last_epoch = self.state.step


@dataclass
class StepReport:
    """What a step did.

    loss: nats a supervised token. tokens (supervised), num_samples, has_audio: of the samples kept. grad_norm,
    group_norms: before clipping. peaks: groups above their adaptive bound, with norm / average. skipped: why, or None.
    frozen: groups whose gradient was dropped. divergence: from the teacher, nats a taught token; None without a
    teacher or if samples were dropped.
    """

    loss: float
    tokens: int
    grad_norm: float
    skipped: str | None
    group_norms: dict[str, float]
    peaks: dict[str, float]
    num_samples: int
    has_audio: bool
    frozen: frozenset[str]
    divergence: float | None = None
    seconds: float = 0.0


def encoder_for(
    args: TrainArguments, processor: Qwen3AudioProcessor, model: Qwen3AudioForConditionalGeneration
) -> DialogueEncoder:
    return encoder_of(
        processor,
        train_on=args.train_on,
        max_length=longest_dialogue(args, model.config.get_text_config()),
        teach=args.distill_weight > 0,
    )


def build_session(
    args: TrainArguments,
    plan: Plan,
    model: Qwen3AudioForConditionalGeneration,
    processor: Qwen3AudioProcessor,
    dialogues: Sequence[Dialogue],
    held_out: Sequence[Dialogue],
    state: TrainState,
    callbacks: Sequence[TrainerCallback],
    *,
    resumed: Path | None = None,
    poll: Poll = nothing,
) -> Session:
    """A training at the step of `state`, which is that of the checkpoint `resumed`, if there is one: it is restored.

    Then lays out the held-out dialogues, quarantines bad ones, and reads the probe. poll: called in these waits; what
    it raises ends them. Raises CheckpointError as `restore` does, and DataError if no held-out dialogue can be used.
    """
    encoder = encoder_for(args, processor, model)
    groups = parameter_groups(model)
    gradient_buffers = GradientBuffers(groups)
    optimizer = make_optimizer(groups, args, plan)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: guarded_factor(step, args, plan, state.guards)
    )
    executor = Executor(
        model,
        max_tokens_per_pack=state.max_tokens_per_pack or args.pack_limit,
        pad_token_id=encoder.pad_token_id,
        distill_weight=args.distill_weight,
        manual_loss=args.manual_loss,
    )
    executor.gradient_buffers = gradient_buffers
    hooks = Hooks(
        callbacks,
        hf_arguments(args, plan),
        steps_per_epoch=-(-len(dialogues) // args.samples_per_step),
        model=model,
        processing_class=processor,
        optimizer=optimizer,
        lr_scheduler=scheduler,
    )
    session = Session(
        args=args,
        plan=plan,
        source=ShuffledDialogues(dialogues=dialogues, samples_per_step=args.samples_per_step, seed=args.seed),
        num_dialogues=len(dialogues),
        groups=groups,
        gradient_buffers=gradient_buffers,
        optimizer=optimizer,
        scheduler=scheduler,
        executor=executor,
        processor=processor,
        encoder=encoder,
        snapshots=Snapshots(groups, optimizer),
        clamp=make_clamp(plan, model, state),
        state=state,
        log=RunLog(Path(args.output_dir)),
        lines=StepLines(plan.total_steps, state.step),
        hooks=hooks,
        held_out=HeldOut([], encoder),
        probe=None,
        base_checksums=checksums(frozen_parameters(model)),
    )
    if resumed:
        restore(session, resumed)
    session.held_out = held_out_of(session, held_out, poll)
    session.probe = probe_of(args, plan, executor, encoder, dialogues, held_out, state, poll)
    return session


def held_out_of(session: Session, dialogues: Sequence[Dialogue], poll: Poll) -> HeldOut:
    """The held-out dialogues that can be used; quarantines the others. Raises DataError if all are bad."""
    usable, rejections = hold_out(dialogues, session.encoder, session.args.dataloader_num_workers, poll)
    for rejection in rejections:
        session.log.quarantine(**dataclasses.asdict(rejection), step=session.state.step)
    if dialogues and not usable:
        eval_file = session.args.eval_file
        raise DataError(f"--eval_file {eval_file}: no dialogue can be used; the first: {rejections[0].reason}")
    return usable


def probe_of(
    args: TrainArguments,
    plan: Plan,
    executor: Executor,
    encoder: DialogueEncoder,
    dialogues: Sequence[Dialogue],
    held_out: Sequence[Dialogue],
    state: TrainState,
    poll: Poll,
) -> ListeningProbe | None:
    """The listening probe. None if the run is too short even for one at its end (its audio is then not decoded), or if
    the processes that decode the audio keep dying. It asks no questions if the run is too short for them.
    """
    first_step = first_probe_step(
        total_steps=plan.total_steps,
        freeze_projector_steps=plan.freeze_projector_steps,
        samples_per_step=args.samples_per_step,
    )
    asks_from = first_questions_step(samples_per_step=args.samples_per_step)
    shortest = min(first_step, shortest_probed(samples_per_step=args.samples_per_step))
    if shortest > plan.total_steps:
        if held_out:
            note(
                f"no listening probe: a run needs at least {shortest} steps for one, and this run has "
                f"{plan.total_steps}; `qwhisper eval` shows whether it hears"
            )
        return None
    asked = held_out if asks_from <= plan.total_steps else []
    if not state.kinds and any(message.kind for dialogue in asked for message in dialogue.messages):
        note(
            "no retention in this run: the training data names no `kind`, so the kinds that were never "
            "trained on are unknown; give its answers a `kind`"
        )
    workers = args.dataloader_num_workers
    try:
        return make_probe(
            executor,
            encoder,
            held_out or dialogues,
            state.probe,
            first_step=first_step,
            seed=args.seed,
            trained_kinds=state.kinds,
            questions=choose_questions(asked, encoder, state.kinds, seed=args.seed, num_workers=workers, poll=poll),
            asks_from=asks_from,
            num_workers=workers,
            poll=poll,
        )
    except DataError as error:
        note(f"no listening probe: {error}")
        return None


def make_clamp(plan: Plan, model: torch.nn.Module, state: TrainState) -> ActivationClamp | None:
    """The clamp of --activation_clamp; None if it is off or the LM's first layer has no q_proj."""
    if plan.clamp_bound is None:
        return None
    found = first_q_proj(model)
    if found is None:
        note("--activation_clamp has no effect: this language model's first layer has no q_proj")
        return None
    on = state.guards.clamp.on if plan.clamp_follows_spikes else True
    return ActivationClamp(*found, bound=plan.clamp_bound, on=on)


def save_checkpoint(session: Session) -> Path:
    """Save a checkpoint and delete old ones. While the newest is not finite, none is deleted.

    Snapshots are saved too if the newest is of an earlier step, as after a signal or in a row of bad steps.
    """
    model, state = session.executor.model, session.state
    state.max_tokens_per_pack = session.executor.max_tokens_per_pack
    collect_clamped(session)
    finite = session.snapshots.sound()

    def fill(folder: Path) -> None:
        arguments = with_values(session.args, vars(session.plan))
        model.origin = Origin(vars(arguments), state.step)
        model.save_pretrained(folder)
        session.processor.save_pretrained(folder)
        write_optimizer(session.optimizer, parameter_names(model), folder)
        write_generators(folder)
        write_arguments(arguments, folder)
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
        session.report(WeightsNotFinite(checkpoint=folder.name))
    return folder


def collect_clamped(session: Session) -> None:
    """Add the clamp's count from the device to the state. Waits for the device."""
    if session.clamp and session.clamp.on:
        session.state.guards.clamp.clamped += sum(session.clamp.take_counts().values())


def restore(session: Session, folder: Path) -> None:
    """Load optimizer, schedule, generators and snapshots; the weights are already loaded.

    Raises CheckpointError if one of them does not fit this run.
    """
    names = parameter_names(session.executor.model)
    check_resumable(folder, {names[parameter]: parameter for parameter in session.snapshots.parameters}, session.state)
    load_optimizer(session.optimizer, names, folder)
    load_generators(folder)
    if (folder / SNAPSHOT_FILE).exists():
        session.snapshots.load(read_tensors(folder / SNAPSHOT_FILE))
    session.set_learning_rates()
