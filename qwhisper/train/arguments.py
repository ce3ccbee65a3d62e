"""`TrainArguments`: all arguments of a training, which check themselves. Knows no files, models or tensors.

`flag_sections.py` has the flags with defaults and reasons, `hf_names.py` the names of HF that are not flags, `plan.py`
the meaning of None and `auto`.
"""

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, ClassVar

from qwhisper.errors import UsageError
from qwhisper.flags import LARGEST, Arguments
from qwhisper.frames import DEFAULT_LEAD_SILENCE_S, DEFAULT_TAIL_SILENCE_S, FrameArithmetic
from qwhisper.train import flag_sections as flags
from qwhisper.train import hf_names, run_flags

LEAST_CLAMP, MOST_CLAMP = 0.1, 1e4  # a norm precedes the layer: most of its input is around 1
LEAST_LORA_SCALE, MOST_LORA_SCALE = 1e-3, 1e3
MOST_LAYERS = 1000  # of a language model that can be loaded
MOST_DECAY = 0.1  # of a weight in one step


@dataclass(frozen=True, kw_only=True)
class TrainArguments(
    run_flags.RunFlags,
    run_flags.ExecutionFlags,
    flags.OptimizationFlags,
    flags.LoraFlags,
    flags.ProjectorFlags,
    flags.ModelFlags,
    flags.DataFlags,
    Arguments,
):
    """One training run. Raises UsageError for a value or a combination that can't be intended.

    `plan.resolve` decides None and `auto`.
    """

    NO_FLAGS: ClassVar = hf_names.NO_FLAGS

    def __post_init__(self) -> None:
        self._normalise()
        super().__post_init__()
        self._check_numbers()
        self._check_silence()
        self._check_combinations()
        self._check_optimizer()

    @property
    def pack_limit(self) -> int | None:
        """--max_tokens_per_pack as a number; None for auto."""
        return None if self.max_tokens_per_pack == "auto" else int(self.max_tokens_per_pack)

    @property
    def recomputed(self) -> int | None:
        """--recompute_layers as a number; None for auto."""
        return None if self.recompute_layers == "auto" else int(self.recompute_layers)

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimizer step on one device."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def notices(self) -> list[str]:
        """One sentence for every flag that was set and has no effect in this combination."""
        return [f"--{name} has no effect: {reason}" for name, reason in self._without_effect()]

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen for all other code

    def _normalise(self) -> None:
        resume = self.resume_from_checkpoint
        if resume is not None and str(resume).lower() in ("true", "latest"):
            self._set("resume_from_checkpoint", "latest")
        elif resume is not None and str(resume).lower() in ("", "false", "none"):
            self._set("resume_from_checkpoint", None)
        trackers = (
            [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        )  # as transformers accepts it
        self._set("report_to", [name for name in trackers if name != "none"])
        self._set("max_tokens_per_pack", str(self.max_tokens_per_pack))
        self._set("recompute_layers", str(self.recompute_layers))
        clamp = str(self.activation_clamp).lower()
        self._set("activation_clamp", "off" if clamp == "false" else clamp)  # YAML reads a bare off as false

    def _check_numbers(self) -> None:
        if self.max_tokens_per_pack != "auto" and not _is_count(self.max_tokens_per_pack, least=1, most=LARGEST):
            raise UsageError(
                f"--max_tokens_per_pack {self.max_tokens_per_pack:.30}: must be auto or a number of tokens, from 1 to "
                f"{LARGEST}"
            )
        if self.recompute_layers != "auto" and not _is_count(self.recompute_layers, least=0, most=MOST_LAYERS):
            raise UsageError(
                f"--recompute_layers {self.recompute_layers:.30}: must be auto or a number of layers, from 0 to "
                f"{MOST_LAYERS}"
            )
        if self.lora_target_modules == []:
            raise UsageError("--lora_target_modules names no layer: leave it out for all of them, or use --no_use_lora")
        if self.activation_clamp not in ("auto", "off") and not _is_clamp(self.activation_clamp):
            raise UsageError(
                f"--activation_clamp {self.activation_clamp}: must be auto, off or a number from {LEAST_CLAMP:g} to "
                f"{MOST_CLAMP:g}"
            )

    def _check_silence(self) -> None:
        """Raises UsageError if the silences leave no room for speech in one of Whisper's windows."""
        lead = DEFAULT_LEAD_SILENCE_S if self.audio_lead_silence is None else self.audio_lead_silence
        tail = DEFAULT_TAIL_SILENCE_S if self.audio_tail_silence is None else self.audio_tail_silence
        try:
            FrameArithmetic(lead_silence_s=lead, tail_silence_s=tail)
        except ValueError as error:
            raise UsageError(f"--audio_lead_silence and --audio_tail_silence: {error}") from None

    def _check_combinations(self) -> None:
        if self.load_in_4bit and self.load_in_fp8:
            raise UsageError(
                "--load_in_4bit with --load_in_fp8: these are two formats for the same weights; use fp8 for speed, 4 "
                "bits for memory"
            )
        if self.whisper_cpu and not self.freeze_whisper:
            raise UsageError(
                "--whisper_cpu with --no_freeze_whisper: a trained encoder must be on the device of the training; "
                "drop one"
            )
        if self.gradient_checkpointing and self.recompute_layers != "auto":
            raise UsageError(
                f"--gradient_checkpointing with --recompute_layers {self.recompute_layers}: the former means all "
                "layers; drop one"
            )
        if self.feature_cache and not self.freeze_whisper:
            raise UsageError(
                f"--feature_cache {self.feature_cache} with --no_freeze_whisper: the features of a trained encoder "
                "change with every step; drop one"
            )
        if self.freeze_projector_steps and not self.use_lora and self.freeze_whisper:
            raise UsageError(
                f"--freeze_projector_steps {self.freeze_projector_steps} with --no_use_lora: nothing would learn in "
                "these steps; use --freeze_projector_steps 0"
            )
        if self.distill_weight and self.train_on == "all":
            raise UsageError(
                f"--distill_weight {self.distill_weight} with --train_on all: the teacher knows what to answer, not "
                "what users say; use --train_on assistant"
            )
        in_half = [f"--no_{name}" for name in ("projector_fp32", "lora_fp32") if not getattr(self, name)]
        if self.dtype == "fp16" and in_half:
            raise UsageError(
                f"--dtype fp16 with {' and '.join(in_half)}: in fp16 AdamW's epsilon of {self.adam_epsilon:g} is lost, "
                "and the first zero gradient divides by zero; leave out "
                f"{' and '.join(in_half)}, or use --dtype bf16"
            )
        if self.init_from and os.path.abspath(self.init_from) == os.path.abspath(self.output_dir):
            raise UsageError(
                f"--init_from and --output_dir are both {self.output_dir}: a new stage needs another folder; to "
                "continue that run use --resume_from_checkpoint"
            )

    def _check_optimizer(self) -> None:
        """Refuse values that are each valid but together let no weight learn."""
        rate = max(self.learning_rate, self.projector_learning_rate or 0.0)
        if rate * self.weight_decay > MOST_DECAY:
            raise UsageError(
                f"--weight_decay {self.weight_decay} at a learning rate of {rate}: every step would take "
                f"{rate * self.weight_decay:.0%} of each weight; lower one of them"
            )
        if self.adam_beta1**4 >= self.adam_beta2 and self.adam_beta1 > 0:  # Kingma and Ba, 2015, theorem 4.1
            raise UsageError(
                f"--adam_beta1 {self.adam_beta1} with --adam_beta2 {self.adam_beta2}: Adam converges only if "
                "beta1 ** 4 is below beta2; raise --adam_beta2"
            )
        scale = self.lora_alpha / self.lora_r
        if self.use_lora and not LEAST_LORA_SCALE <= scale <= MOST_LORA_SCALE:
            raise UsageError(
                f"--lora_alpha {self.lora_alpha} with --lora_r {self.lora_r}: the adapters' output would be multiplied "
                f"by {scale:.3g}; use {LEAST_LORA_SCALE:g} to {MOST_LORA_SCALE:g}"
            )

    def _changed(self, *names: str) -> list[str]:
        """The flags among `names` whose value is not the default."""
        default = {
            f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            for f in dataclasses.fields(self)
        }
        return [name for name in names if getattr(self, name) != default[name]]

    def _without_effect(self) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        if not self.use_lora:
            lora = [f.name for f in dataclasses.fields(flags.LoraFlags) if f.name != "use_lora"]
            found += [(name, "there is no LoRA with --no_use_lora") for name in self._changed(*lora)]
        if not self.eval_file:
            found += [(name, "there is no --eval_file") for name in self._changed("per_device_eval_batch_size")]
            if self.eval_steps not in (None, self.save_steps):
                found.append(("eval_steps", "there is no --eval_file"))
        if not self.feature_cache:
            found += [(name, "there is no --feature_cache") for name in self._changed("feature_cache_dtype")]
        if self.max_steps > 0:
            found += [(name, f"--max_steps {self.max_steps} replaces it") for name in self._changed("num_train_epochs")]
        if self.early_lr_steps == 0 and self.early_lr_factor != 1:
            found += [(name, "--early_lr_steps is 0") for name in self._changed("early_lr_factor")]
        if self.early_lr_factor == 1 and self.early_lr_steps:
            found.append(("early_lr_steps", "--early_lr_factor is 1"))
        if self.resume_from_checkpoint and self.init_from:
            found.append(("init_from", "the resumed checkpoint already holds these weights"))
        if self.hub != "huggingface" and all(
            model is not None and os.path.isdir(model) for model in (self.audio_model, self.text_model)
        ):
            found.append(("hub", "both models are folders on this machine"))
        return found


def _is_count(text: str, *, least: int, most: int) -> bool:
    # Python refuses to parse 5000 digits.
    return text.isascii() and text.isdigit() and len(text) <= len(str(LARGEST)) and least <= int(text) <= most


def _is_clamp(text: str) -> bool:
    try:
        return LEAST_CLAMP <= float(text) <= MOST_CLAMP
    except ValueError:
        return False
