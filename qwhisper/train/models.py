"""Build the model of a training from its bases or a checkpoint; add LoRA; choose which parameters require gradients."""

import dataclasses
import os
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qwhisper.checkpoint.names import ARGUMENTS_FILE
from qwhisper.checkpoint.places import BASES, absolute
from qwhisper.checkpoint.reading import read_checkpoint
from qwhisper.errors import UsageError
from qwhisper.model.bases import LoadOptions, resolve_model
from qwhisper.model.loading import load_trained_weights
from qwhisper.model.lora import add_lora
from qwhisper.model.processor import Qwen3AudioProcessor, load_processor
from qwhisper.model.qwen3_audio import Qwen3AudioForConditionalGeneration, build_from_bases, load_trained
from qwhisper.report.terminal import note
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.plan import Plan
from qwhisper.train.resume import saved_arguments


def build_model(
    args: TrainArguments, plan: Plan, resumed: Path | None
) -> tuple[Qwen3AudioForConditionalGeneration, Qwen3AudioProcessor]:
    """The model, with gradients required of LoRA and all other trained parameters, and its processor."""
    if args.init_from and not resumed:  # its run may still be training
        return read_checkpoint(args.init_from, lambda folder: _build(args, plan, folder))
    return _build(args, plan, resumed)


def _build(
    args: TrainArguments, plan: Plan, start_from: Path | None
) -> tuple[Qwen3AudioForConditionalGeneration, Qwen3AudioProcessor]:
    if start_from is None:
        assert plan.audio_model and plan.text_model  # empty only if the run starts from a checkpoint
        silences = ("audio_lead_silence", "audio_tail_silence")
        config_values = {name: getattr(args, name) for name in silences if getattr(args, name) is not None}
        model, processor = build_from_bases(
            plan.audio_model,
            plan.text_model,
            load_options(args),
            hub=args.hub,
            projector_scale=plan.projector_scale,
            **config_values,
        )
    else:
        model = load_trained(start_from, load_options(args), **moved_bases(args, plan, start_from))
        processor = load_processor(start_from)
        if plan.projector_scale is not None:
            model.config.projector_scale = model.model.multi_modal_projector.scale = plan.projector_scale
        for name in ("audio_lead_silence", "audio_tail_silence"):
            if (seconds := getattr(args, name)) is not None:
                setattr(model.config, name, seconds)
                setattr(processor, name, seconds)
    if getattr(model, "is_loaded_in_4bit", False) and not args.load_in_4bit:
        note("the language model is saved in 4 bits and stays so, as with --load_in_4bit")
    model.config.projector_dropout = model.model.multi_modal_projector.dropout.p = args.projector_dropout
    prepare_trainable(model, args)
    if start_from is not None and not args.freeze_whisper:
        load_trained_weights(model, start_from)  # again: loading rounded the encoder, which is in fp32 only now
    return model, processor


def moved_bases(args: TrainArguments, plan: Plan, start_from: Path) -> dict[str, str]:
    """The bases that the flags name, without folders from the run's config.yaml that no longer exist.

    For those `find_base` finds the present place.
    """
    then = absolute(saved_arguments(start_from)) if (start_from / ARGUMENTS_FILE).is_file() else {}
    now = {role: absolute(vars(plan))[role] for role in BASES}
    fetched = args.hub == "modelscope"  # only the flag has its ids: the checkpoint has a folder of its cache
    given = {
        role: name for role, name in now.items() if name and (name != then.get(role) or os.path.isdir(name) or fetched)
    }
    return {role: resolve_model(name, args.hub, f"--{role}") for role, name in given.items()}


def load_options(args: TrainArguments) -> LoadOptions:
    return LoadOptions(**{field.name: getattr(args, field.name) for field in dataclasses.fields(LoadOptions)})


def prepare_trainable(model: Qwen3AudioForConditionalGeneration, args: TrainArguments) -> None:
    """Add LoRA if --use_lora is set and the model has none, and set which parameters require gradients."""
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
    if args.gradient_checkpointing:
        recompute_first_layers(model, num_layers(model), args)
    elif args.recomputed is not None:
        recompute_first_layers(model, args.recomputed, args)


def num_layers(model: Qwen3AudioForConditionalGeneration) -> int:
    return model.config.get_text_config().num_hidden_layers


def recompute_first_layers(model: Qwen3AudioForConditionalGeneration, count: int, args: TrainArguments) -> None:
    """Compute the activations of the LM's first `count` layers again in the backward pass; none if it is 0.

    Of the first ones: when the backward pass arrives at them, it has freed what the later ones kept, so the layer that
    is computed again finds room. Raises UsageError for more layers than there are.
    """
    if count > num_layers(model):
        raise UsageError(f"--recompute_layers {count}: the language model has {num_layers(model)} layers")
    if count == 0:
        return
    body = model.model.language_model
    preserve = args.lora_dropout > 0 or has_dropout(model)
    checkpoint_activations(body, use_reentrant=False, preserve_rng_state=preserve)
    layers = [module for module in body.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers[count:]:
        layer.gradient_checkpointing = False
    mark_recomputed(body)


def recomputed_layers(model: Qwen3AudioForConditionalGeneration) -> int:
    """Number of the LM's layers that the backward pass computes again."""
    modules = model.model.language_model.modules()
    return sum(isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing for m in modules)


def checkpoint_activations(model: PreTrainedModel, **kwargs: bool) -> None:
    """Compute layers again in the backward pass, under the name of the installed transformers (5.24 changed it).

    kwargs: for `torch.utils.checkpoint.checkpoint`.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(kwargs)
    mark_recomputed(model)


def mark_recomputed(model: nn.Module) -> None:
    """Let the 4-bit linears know whether their layer is computed again."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            for module in layer.modules():
                if hasattr(module, "recomputed"):  # four_bit.Linear4bit
                    module.recomputed = layer.gradient_checkpointing


def has_dropout(model: Qwen3AudioForConditionalGeneration) -> bool:
    """Whether the language model's configuration sets any dropout, whatever its name."""
    values = model.config.get_text_config().to_dict()
    return any(value for name, value in values.items() if ("dropout" in name or "pdrop" in name) and value is not None)
