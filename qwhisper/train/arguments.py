"""`TrainArguments`: everything a training run is told. Checks itself; knows no files, models or tensors.

The flags themselves, with defaults and reasons, are in `flags.py`; HF's names that are no flags here in `hf_names.py`.
"""

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Any

from qwhisper.errors import UsageError
from qwhisper.frames import DEFAULT_LEAD_SILENCE_S, DEFAULT_TAIL_SILENCE_S, FrameArithmetic
from qwhisper.guards.switch import BOUND
from qwhisper.train import flags

DEFAULT_AUDIO_MODELS = {  # by hub: the same weights
    "huggingface": "openai/whisper-large-v3-turbo",
    "modelscope": "openai-mirror/whisper-large-v3-turbo",
}
DEFAULT_TEXT_MODEL = "Qwen/Qwen3-8B"
DEFAULT_FREEZE_PROJECTOR_STEPS = 20

AT_LEAST_ONE = (
    "max_samples",
    "max_length",
    "lora_r",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_bad_steps",
    "save_steps",
    "save_total_limit",
    "eval_steps",
    "per_device_eval_batch_size",
    "logging_steps",
)
ABOVE_ZERO = (
    "projector_scale",
    "projector_learning_rate",
    "learning_rate",
    "lora_alpha",
    "lora_init_scale",
    "early_lr_factor",
    "num_train_epochs",
    "adam_epsilon",
)
NOT_NEGATIVE = (
    "max_rewinds",
    "audio_lead_silence",
    "audio_tail_silence",
    "freeze_projector_steps",
    "early_lr_steps",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "lora_grad_clip",
    "dataloader_num_workers",
    "seed",
)
BELOW_ONE = ("lora_dropout", "projector_dropout", "adam_beta1", "adam_beta2")  # and not negative
LARGEST = 2**63 - 1  # of torch's whole numbers; Adam's step overflows in fp32 at a learning rate not far above


@dataclass(frozen=True, kw_only=True)
class TrainArguments(
    flags.RunFlags,
    flags.ExecutionFlags,
    flags.OptimizationFlags,
    flags.LoraFlags,
    flags.ProjectorFlags,
    flags.ModelFlags,
    flags.DataFlags,
):
    """One training run. Raises UsageError for a value or a combination that can't be meant.

    Fields whose default depends on others are filled in on construction. With `init_from` some stay None, which means
    "as in that checkpoint": audio_model, text_model, projector_scale, audio_lead_silence, audio_tail_silence. Without
    it only the two silences may be None: the model configuration's own default.
    """

    def __post_init__(self) -> None:
        self._normalise()
        self._check_numbers()
        self._check_silence()
        self._check_combinations()
        self._fill_in()

    @property
    def pack_limit(self) -> int | None:
        """--max_tokens_per_pack as a number; None for auto."""
        return None if self.max_tokens_per_pack == "auto" else int(self.max_tokens_per_pack)

    @property
    def clamp_bound(self) -> float | None:
        """What --activation_clamp bounds to, whether it is on yet or not; None for off."""
        if self.activation_clamp == "off":
            return None
        return BOUND if self.activation_clamp == "auto" else float(self.activation_clamp)

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimizer step on one device."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def notices(self) -> list[str]:
        """One sentence for every flag that was changed and has no effect in this combination."""
        return [f"--{name} has no effect: {reason}" for name, reason in self._without_effect()] + self._surprises()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen for everybody else

    def _normalise(self) -> None:
        resume = self.resume_from_checkpoint
        if resume is not None and str(resume).lower() in ("true", "latest"):
            self._set("resume_from_checkpoint", "latest")
        elif resume is not None and str(resume).lower() in ("", "false", "none"):
            self._set("resume_from_checkpoint", None)
        self._set("report_to", [name for name in self.report_to if name != "none"])
        self._set("max_tokens_per_pack", str(self.max_tokens_per_pack))
        clamp = str(self.activation_clamp).lower()
        self._set("activation_clamp", "off" if clamp == "false" else clamp)  # YAML reads a bare off as false

    def _check_numbers(self) -> None:
        numbers = (*AT_LEAST_ONE, *ABOVE_ZERO, *NOT_NEGATIVE, "max_steps")
        for names, allowed, wanted in (
            (AT_LEAST_ONE, lambda value: value >= 1, "must be 1 or more"),
            (ABOVE_ZERO, lambda value: value > 0, "must be above 0"),
            (NOT_NEGATIVE, lambda value: value >= 0, "must be 0 or more"),
            (BELOW_ONE, lambda value: 0 <= value < 1, "must be at least 0 and below 1"),
            (("max_bad_fraction", "distill_weight"), lambda value: 0 <= value <= 1, "is a share: from 0 to 1"),
            (("max_steps",), lambda value: value == -1 or value >= 1, "must be 1 or more, or -1 for no limit"),
            (numbers, lambda value: value <= LARGEST, f"must be {LARGEST} or less"),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None and not (-math.inf < value < math.inf and allowed(value)):
                    raise UsageError(f"--{name} {value}: {wanted}")
        if self.max_tokens_per_pack != "auto" and not (
            self.max_tokens_per_pack.isascii()
            and self.max_tokens_per_pack.isdigit()
            and len(self.max_tokens_per_pack) <= len(str(LARGEST))  # Python reads no number of 5000 digits
            and 0 < int(self.max_tokens_per_pack) <= LARGEST
        ):
            raise UsageError(
                f"--max_tokens_per_pack {self.max_tokens_per_pack:.30}: must be auto or a number of tokens, from 1 to "
                f"{LARGEST}"
            )

        if self.activation_clamp not in ("auto", "off") and not _is_positive(self.activation_clamp):
            raise UsageError(f"--activation_clamp {self.activation_clamp}: must be auto, off or a number above 0")

    def _check_silence(self) -> None:
        """Whether a window of Whisper's has room for speech beside it."""
        lead = DEFAULT_LEAD_SILENCE_S if self.audio_lead_silence is None else self.audio_lead_silence
        tail = DEFAULT_TAIL_SILENCE_S if self.audio_tail_silence is None else self.audio_tail_silence
        try:
            FrameArithmetic(lead_silence_s=lead, tail_silence_s=tail)
        except ValueError as error:
            raise UsageError(f"--audio_lead_silence and --audio_tail_silence: {error}") from None

    def _check_combinations(self) -> None:
        if self.early_lr_factor > 1:
            raise UsageError(
                f"--early_lr_factor {self.early_lr_factor}: above 1 it would raise the learning rate where runs are "
                "most fragile"
            )
        if self.whisper_cpu and not self.freeze_whisper:
            raise UsageError(
                "--whisper_cpu with --no_freeze_whisper: an encoder that is trained must be where the training is; "
                "drop one"
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
                f"--init_from and --output_dir are both {self.output_dir}: a new stage needs a folder of its own; to "
                "go on with that run use --resume_from_checkpoint"
            )

    def _fill_in(self) -> None:
        defaults: dict[str, Any] = {
            "freeze_projector_steps": DEFAULT_FREEZE_PROJECTOR_STEPS if self.use_lora else 0,
            "projector_learning_rate": self.learning_rate,
            "eval_steps": self.save_steps,
            "run_name": os.path.basename(os.path.abspath(self.output_dir)),
        }
        if not self.init_from:
            defaults |= {
                "audio_model": DEFAULT_AUDIO_MODELS[self.hub],
                "text_model": DEFAULT_TEXT_MODEL,
                "projector_scale": 1.0,
            }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                self._set(name, value)

    def _changed(self, *names: str) -> list[str]:
        """Those of `names` whose value differs from the default."""
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
            if self.eval_steps != self.save_steps:
                found.append(("eval_steps", "there is no --eval_file"))
        if self.max_steps > 0:
            found += [(name, f"--max_steps {self.max_steps} decides") for name in self._changed("num_train_epochs")]
        if self.early_lr_steps == 0:
            found += [(name, "--early_lr_steps is 0") for name in self._changed("early_lr_factor")]
        if self.early_lr_factor == 1:
            found += [(name, "--early_lr_factor is 1") for name in self._changed("early_lr_steps")]
        if self.resume_from_checkpoint and self.init_from:
            found.append(("init_from", "the checkpoint that is resumed holds these weights already"))
        if self.hub != "huggingface" and all(
            model is not None and os.path.isdir(model) for model in (self.audio_model, self.text_model)
        ):
            found.append(("hub", "both models are folders on this machine"))
        return found

    def _surprises(self) -> list[str]:
        if self.freeze_projector_steps and 0 < self.max_steps <= self.freeze_projector_steps:
            return [
                f"--freeze_projector_steps {self.freeze_projector_steps} is not below --max_steps {self.max_steps}: "
                "the projector does not learn in this run"
            ]
        return []


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False
