"""Every kind of event of a run, with its fields and the line that it prints.

A record of events.jsonl has `time` (seconds since 1970), `kind`, `step` (optimizer steps taken so far), then the fields
of its kind, in the order of declaration. docs/make_event_tables.py writes docs/events.md from this file.
"""

from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal, get_args

LINE_ONLY = "printed, not written"  # marks a field that only the terminal's line needs

Samples = Annotated[list[str], "ids of the samples of the step"]
NotFinite = Annotated[list[str], "the loss, or the gradient or weights of a group"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """What all kinds share.

    kind: the name in the file. is_course: begin, resume, end and the like, not an act of a guard. to_stderr: the line
    goes to stderr.
    """

    kind: ClassVar[str]
    is_course: ClassVar[bool] = False
    to_stderr: ClassVar[bool] = False

    def written(self) -> dict[str, Any]:
        """The fields that are written, in order."""
        return {field.name: getattr(self, field.name) for field in fields(self) if is_written(field.type)}

    def line(self, step: int) -> str | None:
        """The line on the terminal, or None for no line. step: as in the record."""
        return None


def is_written(annotation: Any) -> bool:
    return LINE_ONLY not in get_args(annotation)[1:]


# The course of a run.


@dataclass(frozen=True, kw_only=True)
class Begin(Event):
    """A run begins."""

    kind = "begin"
    is_course = True
    run_id: Annotated[str, "the run's id in trackers; a resume keeps it"]
    qwhisper: Annotated[str, "version"]
    python: Annotated[str, "version"]
    torch: Annotated[str, "version"]
    transformers: Annotated[str, "version"]
    device: Annotated[str, "name of the accelerator, or `cpu`"]
    total_steps: Annotated[int, "optimizer steps of the whole run"]
    samples_per_step: Annotated[int, "samples in one optimizer step"]
    dialogues: Annotated[int, "dialogues to train on"]
    held_out_samples: Annotated[int, "samples of `--eval_file`"]
    audio_model: Annotated[str | None, "`--audio_model`; null: as in `--init_from`"]
    text_model: Annotated[str | None, "`--text_model`; null: as in `--init_from`"]
    max_tokens_per_pack: Annotated[int, "most tokens of a pack at the beginning"]
    recompute_layers: Annotated[int, "first layers of the language model that the backward pass computes again"]
    why_plain: Annotated[str | None, "why a CUDA graph can't repeat a pack, before callbacks begin; null: it can"]


@dataclass(frozen=True, kw_only=True)
class Resumed(Begin):
    """A run continues from a checkpoint. The other fields are those of `begin`."""

    kind = "resumed"
    checkpoint: Annotated[str, "path of the checkpoint"]

    def written(self) -> dict[str, Any]:
        return {"checkpoint": self.checkpoint} | super().written()


@dataclass(frozen=True, kw_only=True)
class End(Event):
    """A run ends, except by a kill."""

    kind = "end"
    is_course = True
    exit_code: Annotated[int, "exit code of the command"]
    reason: Annotated[str, "`done`, the signal, the callback that stopped it, or the error"]
    total_steps: Annotated[int, "optimizer steps of the whole run"]
    skipped_steps: Annotated[int, "steps that the optimizer did not take"]
    supervised_tokens: Annotated[int, "tokens trained on"]
    rewinds: Annotated[int, "how often the run went back to a snapshot"]
    quarantined: Annotated[int, "dialogues that could not be used"]


@dataclass(frozen=True, kw_only=True)
class OutputLost(Event):
    """The reader of the output stopped; the oldest unread lines were dropped so that no step waits."""

    kind = "output_lost"
    is_course = True
    lines: Annotated[int, "number of lines dropped"]


# Numbers that are not finite.


@dataclass(frozen=True, kw_only=True)
class DroppedSamples(Event):
    """Samples whose loss or gradient is not finite were left out of the step."""

    kind = "dropped_samples"
    samples: Annotated[list[dict[str, str]], "`id`, `source` and `not_finite` (what was not) of each sample left out"]
    kept: Annotated[int, "number of samples left in the step"]
    not_finite: NotFinite
    diagnosis: Annotated[dict[str, Any] | None, "`where` a number broke first, `when`, `message`, and its `inputs`"]
    cause: Annotated[str, "the diagnosis in words", LINE_ONLY]

    def line(self, step: int) -> str:
        names = ", ".join(sample["id"] for sample in self.samples[:3]) + (" …" if len(self.samples) > 3 else "")
        total = self.kept + len(self.samples)
        return f"step {step}: dropped {len(self.samples)} of {total} samples ({names}): {self.cause}"


@dataclass(frozen=True, kw_only=True)
class NotRepeated(Event):
    """A step was not finite at first, but finite when it ran again sample by sample; that result was taken."""

    kind = "not_repeated"
    samples: Samples
    not_finite: NotFinite
    diagnosis: Annotated[dict[str, Any] | None, "as in `dropped_samples`"]

    def line(self, step: int) -> str:
        return f"step {step}: {' and '.join(self.not_finite)} not finite at first, finite sample by sample; taken"


@dataclass(frozen=True, kw_only=True)
class NoDiagnosis(Event):
    """The search for the cause of a number that is not finite failed."""

    kind = "no_diagnosis"
    error: Annotated[str, "why it failed"]


@dataclass(frozen=True, kw_only=True)
class Skipped(Event):
    """The optimizer did not take the step. Weights and moments are unchanged; learning rate and data continue."""

    kind = "skipped"
    reason: Annotated[str, "what was wrong with the step"]
    statistics: Annotated[
        dict[str, float | str], "loss (nats a token) and each group's gradient norm; `nan`, `inf`, `-inf` are strings"
    ]
    samples: Samples

    def line(self, step: int) -> str:
        return f"step {step + 1}: skipped, {self.reason} (events.jsonl names the samples); weights are unchanged"


@dataclass(frozen=True, kw_only=True)
class Rewind(Event):
    """Weights and moments went back to a snapshot, at half the learning rate; the data continues."""

    kind = "rewind"
    to_step: Annotated[int | None, "step of the snapshot; null: there is none"]
    why: Annotated[str, "the bad steps, or that a weight is not finite"]
    bad_steps: Annotated[int, "bad steps in a row"]
    lr_factor: Annotated[float, "factor on the learning rate from here on"]
    samples: Samples
    diagnosis: Annotated[dict[str, Any] | None, "the first weight that is not finite, as in `dropped_samples`"]

    def line(self, step: int) -> str:
        to = self.to_step
        where = "there is no snapshot to go back to" if to is None else f"back to the weights of step {to}"
        return f"step {step}: {self.why}; {where}, learning rate × {self.lr_factor:g} from here on"


@dataclass(frozen=True, kw_only=True)
class NoSnapshot(Event):
    """No snapshot of this step was taken: the host has not enough memory."""

    kind = "no_snapshot"
    error: Annotated[str, "what did not fit"]


# Gradients, activations and the learning rate.


@dataclass(frozen=True, kw_only=True)
class GradientSpike(Event):
    """A gradient norm far above all that a sound run has."""

    kind = "gradient_spike"
    times_average: Annotated[dict[str, float], "by group: its norm / its running average"]
    samples: Samples


@dataclass(frozen=True, kw_only=True)
class LearningRateChanged(Event):
    """`--dynamic_lr` changed the learning rate."""

    kind = "learning_rate"
    dynamic_factor: Annotated[float, "factor on the learning rate from here on"]


@dataclass(frozen=True, kw_only=True)
class ActivationClampTurned(Event):
    """`--activation_clamp auto` turned the clamp on or off."""

    kind = "activation_clamp"
    turned: Annotated[Literal["on", "off"], "state from here on"]
    module: Annotated[str, "the module before which activations are clamped"]
    bound: Annotated[float, "largest absolute value of an activation"]
    values: Annotated[int, "activations clamped while it was on"]

    def line(self, step: int) -> str:
        after = f" after {self.values} values" if self.turned == "off" else ""
        return f"step {step}: activation clamp {self.turned}{after} (±{self.bound:g} before {self.module})"


@dataclass(frozen=True, kw_only=True)
class ActivationsClamped(Event):
    """Activations were clamped since the last event of this kind."""

    kind = "activations_clamped"
    values: Annotated[dict[str, int], "by module: number of values"]


@dataclass(frozen=True, kw_only=True)
class EncoderOverflow(Event):
    """Values in the audio encoder exceeded half of fp16's range and were reduced to it."""

    kind = "encoder_overflow"
    values: Annotated[dict[str, int], "by module: number of values"]


# The machine: memory, disk, processes, kernels.


@dataclass(frozen=True, kw_only=True)
class OutOfMemory(Event):
    """A pack did not fit into memory. Packs are halved from here on, and the step ran again."""

    kind = "out_of_memory"
    tokens: Annotated[int, "tokens of the pack that did not fit"]
    max_tokens_per_pack: Annotated[int, "tokens of a pack from here on"]


@dataclass(frozen=True, kw_only=True)
class NotEvaluated(Event):
    """The held-out loss was not measured: not enough memory, or a dialogue could not be read any more."""

    kind = "not_evaluated"
    error: Annotated[str, "what did not fit, or could not be read"]

    def line(self, step: int) -> str:
        return f"step {step}: held-out loss not measured, training continues: {self.error}"


@dataclass(frozen=True, kw_only=True)
class SaveFailed(Event):
    """A checkpoint could not be written. Older ones are unchanged, and the run continues."""

    kind = "save_failed"
    error: Annotated[str, "why it could not be written"]
    last_whole: Annotated[str | None, "name of the newest whole checkpoint; null: there is none"]
    where: Annotated[str, "where the newest whole checkpoint is, in words", LINE_ONLY]

    def line(self, step: int) -> str:
        return f"step {step}: not saved ({self.error}); {self.where}. Free disk space: the next save tries again"


@dataclass(frozen=True, kw_only=True)
class WeightsNotFinite(Event):
    """A checkpoint holds a weight that is not finite. It is kept, and no older one is deleted."""

    kind = "weights_not_finite"
    to_stderr = True
    checkpoint: Annotated[str, "name of the checkpoint"]

    def line(self, step: int) -> str:
        return f"{self.checkpoint}: a trained weight is not finite; no older checkpoint will be deleted"


@dataclass(frozen=True, kw_only=True)
class WorkerDied(Event):
    """A process that reads data died or hung; another continues from the same position."""

    kind = "worker_died"
    how: Annotated[str, "the signal, exit code or time without an answer that ended it"]
    samples: Annotated[list[str], "ids of the samples that killed it"]

    def line(self, step: int) -> str:
        return f"step {step}: a process that reads data died or hung ({self.how}); another continues from there"


@dataclass(frozen=True, kw_only=True)
class KernelReplaced(Event):
    """A kernel of attention or of an fp8 product failed the check at the start of the run and is not used."""

    kind = "kernel_replaced"
    kernel: Annotated[str, "the wrong kernel"]
    case: Annotated[str, "attention, batch and scores, or layer and rows, for which it was wrong"]
    what: Annotated[str, "which tensor was wrong, and by how much"]
    replaced_by: Annotated[str, "the kernel used instead"]

    def line(self, step: int) -> str:
        return f"kernel {self.kernel}: {self.what}; {self.case}. Replaced by {self.replaced_by}"


@dataclass(frozen=True, kw_only=True)
class FeaturesNotCached(Event):
    """`--feature_cache` can't be written. The run reads what is there, and encodes other clips in each pass."""

    kind = "features_not_cached"
    error: Annotated[str, "why they could not be written"]

    def line(self, step: int) -> str:
        return f"step {step}: no more features are kept in --feature_cache ({self.error}); the run goes on"


@dataclass(frozen=True, kw_only=True)
class CachedFeaturesDamaged(Event):
    """Records of `--feature_cache` don't have their checksums. The clips were encoded again."""

    kind = "cached_features_damaged"
    clips: Annotated[list[str], "the clips, by path or by the place where sound was given"]

    def line(self, step: int) -> str:
        return f"step {step}: clips encoded again because --feature_cache is damaged: {len(self.clips)}"


@dataclass(frozen=True, kw_only=True)
class Executes(Event):
    """How packs run from here on."""

    kind = "executes"
    is_course = True
    execution: Annotated[Literal["plain", "compiled", "captured"], "see `--execution`"]
    why: Annotated[str | None, "why they run plain; null if they don't, or nothing else was asked for"]

    def line(self, step: int) -> str | None:
        if self.execution == "plain":
            return self.why and f"packs run plain: {self.why}"
        return "encoder and language model are compiled in the first steps, which takes about a minute"


@dataclass(frozen=True, kw_only=True)
class Prepared(Event):
    """Passes over packs were compiled or recorded as CUDA graphs."""

    kind = "prepared"
    is_course = True
    passes: Annotated[int, "number of passes"]
    seconds: Annotated[float, "time it took, their first results included"]

    def line(self, step: int) -> str | None:
        return f"step {step + 1}: prepared {self.passes} passes in {self.seconds:.1f} s" if self.seconds >= 1 else None


# Data and learning.


@dataclass(frozen=True, kw_only=True)
class SampleChanged(Event):
    """Part of a dialogue was left out, its audio is unusual (first pass alone), or a clip has changed its length."""

    kind = "sample_changed"
    samples: Annotated[list[str], "id of the sample"]
    what: Annotated[list[str], "what was left out or laid out again, and notes on its audio"]


@dataclass(frozen=True, kw_only=True)
class AlarmRaised(Event):
    """A failure that shows in no NaN. Nothing was changed."""

    kind = "alarm"
    alarm: Annotated[str, "kind of the alarm, such as `loss_zero` or `not_listening`"]
    about: Annotated[str, "the group of weights concerned, or empty"]
    message: Annotated[str, "what was found, where, and what to do next"]

    def line(self, step: int) -> str:
        return f"warning: {self.message}"


KINDS: tuple[type[Event], ...] = (
    Begin, Resumed, End, OutputLost,
    DroppedSamples, NotRepeated, NoDiagnosis, Skipped, Rewind, NoSnapshot,
    GradientSpike, LearningRateChanged, ActivationClampTurned, ActivationsClamped, EncoderOverflow,
    OutOfMemory, NotEvaluated, SaveFailed, WeightsNotFinite, WorkerDied, KernelReplaced,
    FeaturesNotCached, CachedFeaturesDamaged,
    Executes, Prepared, SampleChanged, AlarmRaised,
)  # fmt: skip
