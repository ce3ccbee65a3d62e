"""From arguments to everything that a run holds: model, optimizer, samples, guards."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import TrainerCallback

from qwhisper.checkpoint.names import ARGUMENTS_FILE
from qwhisper.checkpoint.places import BASES, absolute
from qwhisper.checkpoint.reading import read_checkpoint
from qwhisper.checksums import checksums
from qwhisper.data.collator import ConversationCollator
from qwhisper.data.dialogue import Dialogue
from qwhisper.data.loader import EncodedDialogues, encode_all, how_it_dies
from qwhisper.engine.executor import Executor
from qwhisper.errors import DataError
from qwhisper.evaluate.forgetting import choose_questions
from qwhisper.guards.clamp import ActivationClamp, first_q_proj
from qwhisper.guards.gradients import frozen_parameters
from qwhisper.guards.snapshot import Snapshots
from qwhisper.model.bases import LoadOptions, resolve_model
from qwhisper.model.loading import build_from_bases, load_trained, load_trained_weights
from qwhisper.model.lora import add_lora
from qwhisper.model.modeling_qwen3_audio import Qwen3AudioForConditionalGeneration
from qwhisper.model.processing_qwen3_audio import Qwen3AudioProcessor
from qwhisper.model.trained_folder import load_processor
from qwhisper.report.events import RunLog
from qwhisper.report.terminal import StepLines
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.context import Session
from qwhisper.train.hf import Hooks, hf_arguments
from qwhisper.train.optimizer import all_steps, guarded_factor, make_optimizer, parameter_groups, settled
from qwhisper.train.probe import ListeningProbe, first_probe_step, first_questions_step, make_probe, shortest_probed
from qwhisper.train.resume import saved_arguments
from qwhisper.train.saving import save_checkpoint
from qwhisper.train.state import TrainState


def build(args: TrainArguments, resumed: Path | None) -> tuple[Qwen3AudioForConditionalGeneration, Qwen3AudioProcessor]:
    """The model with LoRA and whatever else is trained set to require gradients, and its processor."""
    if args.init_from and not resumed:  # a run that may still be in training
        return read_checkpoint(args.init_from, lambda folder: _build(args, folder))
    return _build(args, resumed)


def _build(
    args: TrainArguments, start_from: Path | None
) -> tuple[Qwen3AudioForConditionalGeneration, Qwen3AudioProcessor]:
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
        model = load_trained(start_from, load_options(args), **moved_bases(args, start_from))
        processor = load_processor(start_from)
        if args.projector_scale is not None:
            model.config.projector_scale = model.model.multi_modal_projector.scale = args.projector_scale
        for name in ("audio_lead_silence", "audio_tail_silence"):
            if (seconds := getattr(args, name)) is not None:
                setattr(model.config, name, seconds)
                setattr(processor, name, seconds)
    model.config.projector_dropout = model.model.multi_modal_projector.dropout.p = args.projector_dropout
    prepare_trainable(model, args)
    if start_from is not None and not args.freeze_whisper:
        load_trained_weights(model, start_from)  # the encoder is in fp32 only now; it was rounded as it came
    return model, processor


def moved_bases(args: TrainArguments, start_from: Path) -> dict[str, str]:
    """The bases that the flags name, without folders that the run was given before and that no longer exist.

    That one comes from the run's config.yaml; `find_base` looks for where it is now.
    """
    then = absolute(saved_arguments(start_from)) if (start_from / ARGUMENTS_FILE).is_file() else {}
    now = {role: absolute(vars(args))[role] for role in BASES}
    fetched = args.hub == "modelscope"  # whose ids only the flag holds: the checkpoint holds a folder of its cache
    given = {
        role: name for role, name in now.items() if name and (name != then.get(role) or os.path.isdir(name) or fetched)
    }
    return {role: resolve_model(name, args.hub, f"--{role}") for role, name in given.items()}


def load_options(args: TrainArguments) -> LoadOptions:
    return LoadOptions(**{field.name: getattr(args, field.name) for field in dataclasses.fields(LoadOptions)})


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
            {"use_reentrant": False, "preserve_rng_state": args.lora_dropout > 0 or has_dropout(model)}
        )


def has_dropout(model: Qwen3AudioForConditionalGeneration) -> bool:
    """Whether the language model has dropout of its own, by any of the names that configurations give it."""
    values = model.config.get_text_config().to_dict()
    return any(value for name, value in values.items() if ("dropout" in name or "pdrop" in name) and value is not None)


def collator_for(
    args: TrainArguments, processor: Qwen3AudioProcessor, model: Qwen3AudioForConditionalGeneration
) -> ConversationCollator:
    """Without --max_length a sample may be as long as the language model was made for."""
    return ConversationCollator(
        processor.tokenizer,
        processor.frames,
        audio_token_id=processor.audio_token_id,
        chat_template=processor.chat_template,
        train_on=args.train_on,
        max_length=args.max_length or model.config.get_text_config().max_position_embeddings,
        packed=True,
        teach=args.distill_weight > 0,
    )


def assemble_run(
    args: TrainArguments,
    model: Qwen3AudioForConditionalGeneration,
    processor: Qwen3AudioProcessor,
    dialogues: Sequence[Dialogue],
    held_out: Sequence[Dialogue],
    state: TrainState,
    callbacks: Sequence[TrainerCallback],
) -> Session:
    """A run at its first step, or at `state`'s; held-out dialogues are encoded here, bad ones quarantined."""
    collator = collator_for(args, processor, model)
    eval_samples, rejections = encode_all(EncodedDialogues(held_out, collator), args.dataloader_num_workers)
    log = RunLog(Path(args.output_dir))
    for rejection in rejections:
        log.quarantine(**dataclasses.asdict(rejection), step=state.step)
    if held_out and not eval_samples:
        raise DataError(f"--eval_file {args.eval_file}: no dialogue can be used; the first: {rejections[0].reason}")
    groups = parameter_groups(model)
    optimizer = make_optimizer(groups, args)
    total_steps = all_steps(args, len(dialogues))
    args, _ = settled(args, total_steps)  # without effect where a command has done it, with notes
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: guarded_factor(step, args, total_steps, state.guards)
    )
    executor = Executor(
        model,
        max_tokens_per_pack=state.max_tokens_per_pack or args.pack_limit,
        pad_token_id=collator.pad_token_id,
        distill_weight=args.distill_weight,
    )
    hooks = Hooks(
        callbacks,
        hf_arguments(args, total_steps),
        steps_per_epoch=-(-len(dialogues) // args.samples_per_step),
        model=model,
        processing_class=processor,
        optimizer=optimizer,
        lr_scheduler=scheduler,
    )
    return Session(
        args=args,
        total_steps=total_steps,
        num_dialogues=len(dialogues),
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
        probe=probe_of(args, executor, collator, dialogues, held_out, state, total_steps),
        base_checksums=checksums(frozen_parameters(model)),
        save=lambda session: save_checkpoint(session, processor),
    )


def probe_of(
    args: TrainArguments,
    executor: Executor,
    collator: ConversationCollator,
    dialogues: Sequence[Dialogue],
    held_out: Sequence[Dialogue],
    state: TrainState,
    total_steps: int,
) -> ListeningProbe | None:
    """The listening probe; None for a run that is too short even for one at its end, which need not decode its audio,
    and where decoding it kills the process that tries. Without questions where the run ends before it has paid for
    them.
    """
    first_step = first_probe_step(
        total_steps=total_steps,
        freeze_projector_steps=args.freeze_projector_steps,
        samples_per_step=args.samples_per_step,
    )
    asks_from = first_questions_step(samples_per_step=args.samples_per_step)
    shortest = min(first_step, shortest_probed(samples_per_step=args.samples_per_step))
    if shortest > total_steps:
        if held_out:
            print(
                f"note: no listening probe: it takes {shortest} steps to pay for one, and this run has "
                f"{total_steps}; `qwhisper eval` tells whether it hears"
            )
        return None
    asked = held_out if asks_from <= total_steps else []
    if not state.kinds and any(message.kind for dialogue in asked for message in dialogue.messages):
        print(
            "note: no retention in this run: the training data names no `kind`, so what is never trained on is "
            "unknown; give its answers a `kind`"
        )

    def make(_: None) -> ListeningProbe | None:
        return make_probe(
            executor,
            collator,
            held_out or dialogues,
            state.probe,
            first_step=first_step,
            seed=args.seed,
            trained_kinds=state.kinds,
            questions=choose_questions(asked, collator, state.kinds, seed=args.seed),
            asks_from=asks_from,
        )

    if args.dataloader_num_workers and (how := how_it_dies(lambda task: bool(make(task)), None)):
        print(f"note: no listening probe: the process that read the audio for it was lost ({how})")
        return None
    return make(None)


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
