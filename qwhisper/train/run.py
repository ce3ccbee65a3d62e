"""`qwhisper train`: from arguments to a finished run folder.

Everything that can be refused is refused before a model is loaded.
"""

import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from transformers import TrainerCallback

from qwhisper.data.collator import ConversationCollator
from qwhisper.data.conversation import Conversation, read_conversations
from qwhisper.errors import CheckpointError, DataError, MemoryLimitError, UsageError
from qwhisper.guards.clamp import ActivationClamp, first_q_proj
from qwhisper.guards.fingerprint import fingerprint, frozen_parameters
from qwhisper.guards.snapshot import Snapshots
from qwhisper.model.bases import LoadOptions, resolve_model
from qwhisper.model.kernels import check_kernels
from qwhisper.model.loading import build_from_bases, load_trained, load_trained_weights
from qwhisper.model.lora import add_lora
from qwhisper.model.modeling_qwen3_audio import Qwen3AudioForConditionalGeneration
from qwhisper.model.processing_qwen3_audio import Qwen3AudioProcessor
from qwhisper.report.events import RunLog, read_jsonl
from qwhisper.report.terminal import StepLines, quieten_transformers
from qwhisper.train import checkpoint as checkpoints
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.callbacks import ConfiguringCallback
from qwhisper.train.context import Run
from qwhisper.train.dataset import EncodedDialogues, encode_all, step_samples
from qwhisper.train.executor import Executor
from qwhisper.train.groups import make_optimizer, parameter_groups, parameter_names
from qwhisper.train.hooks import Hooks, hf_arguments, tracker_callbacks
from qwhisper.train.loop import train
from qwhisper.train.probe import ListeningProbe, first_probe_step, make_probe
from qwhisper.train.resume import changed_arguments, save_arguments
from qwhisper.train.run_lock import run_lock
from qwhisper.train.schedule import guarded_factor
from qwhisper.train.state import TrainState, load_generators, load_optimizer, save_generators, save_optimizer

CONFIG_FILE = "config.yaml"


def main(args: TrainArguments, callbacks: Sequence[TrainerCallback] = ()) -> int:
    """Runs a training and returns its exit code. callbacks: any `TrainerCallback`s; ours configure the run."""
    for callback in callbacks:
        if isinstance(callback, ConfiguringCallback):
            args = callback.configure(args)
    quieten_transformers()
    for notice in args.notices():
        print(f"note: {notice}")
    try:
        with run_lock(Path(args.output_dir)):
            return prepare_and_go(args, callbacks)
    except torch.OutOfMemoryError as error:
        raise MemoryLimitError(
            f"out of memory outside of a forward and backward pass, where a smaller pack is no help: "
            f"{str(error).splitlines()[0]}. Use --load_in_4bit, --whisper_cpu, --gradient_checkpointing or a smaller "
            f"--text_model or --lora_r, then go on with: {resume_command(Path(args.output_dir))}"
        ) from error


def prepare_and_go(args: TrainArguments, callbacks: Sequence[TrainerCallback]) -> int:
    folder = Path(args.output_dir)
    resumed = find_resume_point(args, folder)
    trackers = tracker_callbacks(args.report_to)
    conversations = read_conversations(args.train_file, data_root=args.data_root, max_samples=args.max_samples)
    held_out = read_conversations(args.eval_file, data_root=args.data_root) if args.eval_file else []
    print(f"{len(conversations)} dialogues to train on, {len(held_out)} held out")

    set_up_torch(args)
    train_file_sha256 = checkpoints.file_sha256(Path(args.train_file))
    state = TrainState.load(resumed) if resumed else TrainState(train_file_sha256=train_file_sha256)
    if resumed:
        adopt_changes(args, resumed, state, train_file_sha256)
    torch.manual_seed(args.seed)
    model, processor = build(args, resumed)
    write_config(args, folder)
    run = assemble_run(args, model, processor, conversations, held_out, state, [*callbacks, *trackers])
    describe(run)
    if resumed:
        restore(run, resumed)
    try_kernels(run)
    return go(run, processor, conversations)


def go(run: Run, processor: Qwen3AudioProcessor, conversations: list[Conversation]) -> int:
    args, state = run.args, run.state
    steps = step_samples(
        EncodedDialogues(conversations, collator_for(args, processor)),
        samples_per_step=args.samples_per_step,
        seed=args.seed,
        epoch=state.epoch,
        offset=state.offset,
        num_workers=args.dataloader_num_workers,
    )
    code = train(run, steps)
    if code:
        print(
            f"stopped by a signal after step {state.step}; go on with: {resume_command(run.log.folder)}",
            file=sys.stderr,
        )
    else:
        print(closing_line(run))
    return code


def find_resume_point(args: TrainArguments, folder: Path) -> Path | None:
    """The checkpoint to go on from, or None for a new run, which must not overwrite another."""
    if not args.resume_from_checkpoint:
        if (folder / CONFIG_FILE).exists() or checkpoints.checkpoints(folder):
            raise UsageError(
                f"--output_dir {folder} holds another run. To go on with it: {resume_command(folder)}. "
                "For a new run give another folder; nothing was changed"
            )
        return None
    if args.resume_from_checkpoint != "latest":
        path = Path(args.resume_from_checkpoint)
        checkpoints.check_usable(path)
        return path
    newest, passed_over = checkpoints.newest_valid(folder)
    for line in passed_over:
        print(f"passed over a damaged checkpoint: {line}", file=sys.stderr)
    if newest is None and passed_over:
        raise CheckpointError(f"{folder}: no checkpoint is whole and finite; start again in another folder")
    print(f"resuming from {newest}" if newest else f"{folder} has no checkpoint yet: starting from the beginning")
    return newest


def adopt_changes(args: TrainArguments, resumed: Path, state: TrainState, train_file_sha256: str) -> None:
    """Says what is different this time; a changed pack size wins over the one that the run had settled on."""
    changed = changed_arguments(args, resumed)
    if "max_tokens_per_pack" in changed:
        state.max_tokens_per_pack = None
    if changed:
        told = ", ".join(f"--{name} {now} (was {was})" for name, (was, now) in changed.items())
        print(f"note: {resumed.name} goes on with {told}")
    if state.train_file_sha256 != train_file_sha256:
        print(
            f"note: {args.train_file} has changed since {resumed.name}: the order of samples goes on, their content "
            "may differ"
        )


def resume_command(folder: Path) -> str:
    return f"qwhisper train --config {folder / CONFIG_FILE} --resume_from_checkpoint"


def set_up_torch(args: TrainArguments) -> None:
    if args.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def load_options(args: TrainArguments) -> LoadOptions:
    return LoadOptions(**{field.name: getattr(args, field.name) for field in dataclasses.fields(LoadOptions)})


def build(args: TrainArguments, resumed: Path | None) -> tuple[Qwen3AudioForConditionalGeneration, Qwen3AudioProcessor]:
    """The model with LoRA and whatever else is trained set to require gradients, and its processor."""
    start_from = resumed or (checkpoints.resolve_checkpoint(args.init_from) if args.init_from else None)
    if start_from is None:
        assert args.audio_model and args.text_model  # left empty only for a run that starts from a checkpoint
        names = ("projector_scale", "audio_lead_silence", "audio_tail_silence")
        config_values = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        model, processor = build_from_bases(
            args.audio_model,
            args.text_model,
            load_options(args),
            hub=args.hub,
            **config_values,
        )
    else:
        given = {"audio_model": args.audio_model, "text_model": args.text_model}
        moved = {flag: resolve_model(name, args.hub, f"--{flag}") for flag, name in given.items() if name is not None}
        model = load_trained(start_from, load_options(args), **moved)
        processor = Qwen3AudioProcessor.from_pretrained(start_from)
        if args.projector_scale is not None:
            model.config.projector_scale = model.model.multi_modal_projector.scale = args.projector_scale
    model.config.projector_dropout = model.model.multi_modal_projector.dropout.p = args.projector_dropout
    prepare_trainable(model, args)
    if start_from is not None and not args.freeze_whisper:
        load_trained_weights(model, start_from)  # the encoder is in fp32 only now; it was rounded as it came
    return model, processor


def prepare_trainable(model: Qwen3AudioForConditionalGeneration, args: TrainArguments) -> None:
    """Adds LoRA if it is wanted and not there yet, and sets what requires gradients."""
    if args.use_lora and not getattr(model, "peft_config", None):
        add_lora(
            model,
            r=args.lora_r,
            alpha=args.lora_alpha,
            dropout=args.lora_dropout,
            target_modules=args.lora_target_modules,
            init_scale=args.lora_init_scale,
            fp32=args.lora_fp32,
        )
    for parameter in model.model.language_model.parameters():
        parameter.requires_grad_(parameter.requires_grad and args.use_lora)
    model.model.multi_modal_projector.requires_grad_(True)
    if not args.freeze_whisper:
        model.model.audio_tower.requires_grad_(True).float()
        model.model.audio_tower.embed_positions.requires_grad_(False)
    model.manual_loss = args.manual_loss
    if args.gradient_checkpointing:
        model.model.language_model.gradient_checkpointing_enable(
            {"use_reentrant": False, "preserve_rng_state": args.lora_dropout > 0}
        )


def collator_for(args: TrainArguments, processor: Qwen3AudioProcessor) -> ConversationCollator:
    return ConversationCollator(
        processor.tokenizer,
        processor.frames,
        audio_token_id=processor.audio_token_id,
        chat_template=processor.chat_template,
        train_on=args.train_on,
        max_length=args.max_length,
        packed=True,
    )


def write_config(args: TrainArguments, folder: Path) -> None:
    """Everything that is needed to run it again: `qwhisper train --config` reads it."""
    values = {k: v for k, v in dataclasses.asdict(args).items() if v is not None and k != "resume_from_checkpoint"}
    checkpoints.write_whole(folder / CONFIG_FILE, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def assemble_run(args, model, processor, conversations, held_out, state: TrainState, callbacks) -> Run:
    collator = collator_for(args, processor)
    eval_samples, rejections = encode_all(EncodedDialogues(held_out, collator))
    log = RunLog(Path(args.output_dir))
    for rejection in rejections:
        log.quarantine(**dataclasses.asdict(rejection), step=state.step)
    if held_out and not eval_samples:
        raise DataError(f"--eval_file {args.eval_file}: no dialogue can be used; the first: {rejections[0].reason}")
    groups = parameter_groups(model)
    optimizer = make_optimizer(groups, args)
    steps_per_epoch = -(-len(conversations) // args.samples_per_step)
    total_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: guarded_factor(step, args, total_steps, state.guards)
    )
    executor = Executor(
        model, max_tokens_per_pack=state.max_tokens_per_pack or args.pack_limit, pad_token_id=collator.pad_token_id
    )
    hooks = Hooks(
        callbacks,
        hf_arguments(args, total_steps),
        steps_per_epoch=steps_per_epoch,
        model=model,
        processing_class=processor,
        optimizer=optimizer,
        lr_scheduler=scheduler,
    )
    return Run(
        args=args,
        total_steps=total_steps,
        num_dialogues=len(conversations),
        groups=groups,
        optimizer=optimizer,
        scheduler=scheduler,
        executor=executor,
        snapshots=Snapshots(groups, optimizer),
        clamp=make_clamp(args, model, state),
        state=state,
        log=log,
        lines=StepLines(total_steps, state.step),
        hooks=hooks,
        eval_samples=eval_samples,
        probe=probe_of(args, executor, collator, held_out or conversations, state, total_steps),
        base_checksums=fingerprint(frozen_parameters(model)),
        save=lambda run: save_checkpoint(run, processor),
    )


def probe_of(args, executor, collator, dialogues, state: TrainState, total_steps: int) -> ListeningProbe | None:
    """The listening probe; None for a run that ends before its first one, which need not decode its audio."""
    first_step = first_probe_step(
        total_steps=total_steps,
        freeze_projector_steps=args.freeze_projector_steps,
        samples_per_step=args.samples_per_step,
    )
    if first_step > total_steps:
        return None
    return make_probe(executor, collator, dialogues, state.probe, first_step=first_step, seed=args.seed)


def make_clamp(args: TrainArguments, model: torch.nn.Module, state: TrainState) -> ActivationClamp | None:
    """--activation_clamp, as it stands; None for off, and for an LM whose first layer has no q_proj."""
    if args.clamp_bound is None:
        return None
    found = first_q_proj(model)
    if found is None:
        print("note: --activation_clamp has no effect: this language model's first layer has no q_proj")
        return None
    on = state.guards.clamp.on if args.activation_clamp == "auto" else True
    return ActivationClamp(*found, bound=args.clamp_bound, on=on)


def describe(run: Run) -> None:
    counts = {name: sum(p.numel() for p in parameters) for name, parameters in run.groups.items()}
    trained = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in counts.items())
    print(
        f"training {trained}; {run.total_steps} steps of {run.args.samples_per_step} samples on {run.executor.device}"
    )


def try_kernels(run: Run) -> None:
    """Every attention kernel that this run uses, on this device, against fp32; a wrong one is named and replaced."""
    longest = run.args.max_length or run.executor.max_tokens_per_pack
    for wrong in check_kernels(run.executor.model, longest):
        run.log.event("kernel_replaced", step=run.state.step, **dataclasses.asdict(wrong))
        run.lines.say(str(wrong))


def save_checkpoint(run: Run, processor: Qwen3AudioProcessor) -> Path:
    """A new checkpoint, and older ones deleted; none is deleted while the newest is not finite."""
    model, state = run.executor.model, run.state
    state.max_tokens_per_pack = run.executor.max_tokens_per_pack
    trainable = [p for parameters in run.groups.values() for p in parameters]
    finite = bool(torch.stack([torch.isfinite(p).all() for p in trainable]).all())

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


def closing_line(run: Run) -> str:
    """What was done, and after a clean run what may be loosened."""
    acts = read_jsonl(run.log.folder / "events.jsonl")
    where = run.state.best_checkpoint or f"checkpoint-{run.state.step}"
    done = f"done: {run.state.step} steps, {run.state.supervised_tokens} supervised tokens; {run.log.folder / where}"
    if acts:
        kinds = ", ".join(f"{count} × {kind}" for kind, count in Counter(act["kind"] for act in acts).most_common())
        return (
            f"{done}. Events: {kinds}; {run.state.skipped_steps} steps skipped. See {run.log.folder / 'events.jsonl'}"
        )
    return (
        f"{done}. No guard had to act: a larger --per_device_train_batch_size, fewer --early_lr_steps or a higher "
        "--learning_rate may now be tried" + (", and --manual_loss left out" if run.args.manual_loss else "")
    )
