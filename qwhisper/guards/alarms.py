"""Alarms for failures without a NaN. They observe, report a finding once, and change nothing.

Plain Python: the facts of a step in, alarms out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

STEPS_WITHOUT_GRADIENT = (
    3  # the audio of one step may come after all of its supervised tokens, but not in three steps in a row
)
MEMORISED_LOSS = 0.01  # fp32 rounds a token's loss to 0 at a probability of 1 - 6e-8; small losses lead there first
STEPS_UNTIL_MOVED = 10  # the last steps of a cosine are too small to move a large fp32 weight, but not all weights
WEIGHTS_EVERY = 50  # steps between checksums: about 15 µs a tensor, of which LoRA has hundreds
NOISES = 2.0  # standard errors: a deaf model's gain lies above them in 1 probe of 40
HEARS = (
    0.7  # share of the questions of trained kinds; below it, a wrong answer may only mean that the clip was not heard
)
# benchmarks/results/real_lm.jsonl: runs on two kinds of question kept 0.03 to 0.31 of the others, 0.14 to 0.63 with
# distillation, 0.74 to 1.01 with instructions as well. Distilled adapters moved text by 0.07 nats at most, others by up
# to 1.47.
FORGETTING = 0.5  # of `hearing`: a lower retention counts as forgetting
SHIFT_BOUND = 0.1  # nats a token of the base's own answers to text
AUDIO_GROUPS = ("projector", "encoder")  # without audio they have no gradient

Key = tuple[str, str]  # kind of the alarm, and what it is about
Findings = dict[Key, str | None]  # None: checked and fine


@dataclass(frozen=True)
class Alarm:
    """kind: one of loss_zero, labels_masked, gradient_zero, not_moving, base_changed, not_listening, forgetting.

    about: the group concerned, or "". message: what was found, where, and what to do next.
    """

    kind: str
    about: str
    message: str


@dataclass(frozen=True, kw_only=True)
class StepFacts:
    """The facts of a step that alarms use. Mappings are keyed by the name of a group of weights.

    step: its number. loss: nats a supervised token. tokens: supervised tokens. num_samples, has_audio: of the samples
    that the loss was computed on. divergence: from the teacher, nats a taught token; None without a teacher.
    group_norms: of gradients. frozen: groups whose gradient was dropped on purpose. skipped: no optimizer step.

    Empty or None in steps without the measurement: weight_checksums, which change with any bit of the group's weights;
    changed_weights, names of frozen tensors that have changed; listening_gain and its standard error listening_noise,
    nats a supervised token; text_shift, divergence from the base model on its own answers to text, nats a token;
    retention and hearing, shares of questions answered right on speech: of kinds never trained on (there were
    retention_questions of them) and of trained kinds.
    """

    step: int
    loss: float
    tokens: int
    num_samples: int
    has_audio: bool
    skipped: bool
    group_norms: Mapping[str, float]
    learning_rates: Mapping[str, float]
    divergence: float | None = None
    frozen: frozenset[str] = frozenset()
    weight_checksums: Mapping[str, int] = field(default_factory=dict)
    changed_weights: Sequence[str] | None = None
    listening_gain: float | None = None
    listening_noise: float | None = None
    text_shift: float | None = None
    retention: float | None = None
    retention_questions: int = 0
    hearing: float | None = None

    @property
    def hears(self) -> bool | None:
        """Whether the gain of the true audio exceeds its noise; None if it was not measured."""
        gain, noise = self.listening_gain, self.listening_noise
        if gain is None or noise is None or not (math.isfinite(gain) and math.isfinite(noise)):
            return None
        return gain > NOISES * noise

    def should_learn(self, group: str) -> bool:
        """Whether the group's gradient must differ from 0 in this step."""
        return (
            not self.skipped
            and self.tokens > 0
            and self.loss != 0
            and group not in self.frozen
            and (self.has_audio or group not in AUDIO_GROUPS)
        )


@dataclass
class Alarms:
    """The alarms' memory between steps, in JSON's types: `Alarms(**dataclasses.asdict(alarms))` is an equal copy.

    active: alarms raised and not cleared yet, as "kind/about". last_loss: of the last step whose loss was not 0. By
    group: without_gradient, steps in a row; unmoved, steps taken since the weights last changed; checksums of the
    weights at the last check.
    """

    active: list[str] = field(default_factory=list)
    last_loss: float | None = None
    without_gradient: dict[str, int] = field(default_factory=dict)
    unmoved: dict[str, int] = field(default_factory=dict)
    checksums: dict[str, int] = field(default_factory=dict)

    def wants_weights(self, step: int) -> bool:
        """Whether the facts of this step should have weight_checksums."""
        return not self.checksums or step % WEIGHTS_EVERY == 0

    def forget_weights(self) -> None:
        """Call after a rewind: restored weights must not count as unmoved."""
        self.unmoved, self.checksums = {}, {}

    def observe(self, facts: StepFacts) -> list[Alarm]:
        """The alarms that this step raises. An active alarm is not raised again until it has cleared."""
        found = (
            self.masked_labels(facts)
            | self.zero_loss(facts)
            | self.zero_gradients(facts)
            | self.unmoved_weights(facts)
            | self.changed_base(facts)
            | self.deafness(facts)
            | self.forgetting(facts)
        )
        raised = []
        for (kind, about), message in found.items():
            name = f"{kind}/{about}"
            if message is None and name in self.active:
                self.active.remove(name)
            elif message is not None and name not in self.active:
                self.active.append(name)
                raised.append(Alarm(kind, about, message))
        return raised

    def masked_labels(self, facts: StepFacts) -> Findings:
        if not facts.num_samples:
            return {}
        message = (
            f"all labels are masked: the {facts.num_samples} samples of step {facts.step} have no supervised token, so "
            "nothing is learned from them. `qwhisper data check` names such dialogues; --train_on and --max_length "
            "decide what is supervised"
        )
        return {("labels_masked", ""): None if facts.tokens else message}

    def zero_loss(self, facts: StepFacts) -> Findings:
        if facts.skipped or not facts.tokens or not math.isfinite(facts.loss):
            return {}
        if facts.loss != 0:
            self.last_loss = facts.loss
            return {("loss_zero", ""): None}
        # On text, the model equals its teacher if only the projector is trained or the adapter is still zero.
        if facts.divergence == 0 and not facts.has_audio:
            return {}
        if self.last_loss is not None and self.last_loss < MEMORISED_LOSS:
            return {}
        message = (
            f"the loss of step {facts.step} is exactly 0 over {facts.tokens} supervised tokens, which no model that "
            "still learns can reach. --manual_loss computes it a second way, and stops if the two differ"
        )
        return {("loss_zero", ""): message}

    def zero_gradients(self, facts: StepFacts) -> Findings:
        """Checked by group, not by tensor: at step 0 LoRA's A has no gradient, because B is zero, but B has one."""
        found: Findings = {}
        for group, norm in facts.group_norms.items():
            if not facts.should_learn(group):
                continue
            count = self.without_gradient[group] = self.without_gradient.get(group, 0) + 1 if norm == 0 else 0
            message = (
                f"the gradient of {group} has been exactly 0 for {count} steps, up to step {facts.step}: the loss does "
                "not depend on it. If the loss is far above its first values, the learning rate has killed the model: "
                "begin again with a lower one. In fp16 it may have been rounded away: --dtype bf16. Else look for a "
                "detach, a no_grad or a frozen part between the two in changed code or a callback"
            )
            if count == 0 or count >= STEPS_WITHOUT_GRADIENT:
                found["gradient_zero", group] = message if count else None
        return found

    def unmoved_weights(self, facts: StepFacts) -> Findings:
        for group, norm in facts.group_norms.items():
            if facts.should_learn(group) and norm > 0 and facts.learning_rates.get(group, 0.0) > 0:
                self.unmoved[group] = self.unmoved.get(group, 0) + 1
        found: Findings = {}
        for group, checksum in facts.weight_checksums.items():
            count = self.unmoved.get(group, 0)
            if self.checksums.get(group) != checksum:
                self.checksums[group], self.unmoved[group] = checksum, 0
                found["not_moving", group] = None
            elif count >= STEPS_UNTIL_MOVED:
                found["not_moving", group] = (
                    f"no weight of {group} has changed in {count} steps, up to step {facts.step}, though it has "
                    f"gradients and a learning rate of {facts.learning_rates[group]:.2g}: the optimizer does not hold "
                    "its parameters, or the rate is too small for their dtype (keep --lora_fp32, raise the rate)"
                )
        return found

    def changed_base(self, facts: StepFacts) -> Findings:
        names = facts.changed_weights
        if not names:
            return {} if names is None else {("base_changed", ""): None}
        message = (
            f"{len(names)} frozen weights have changed since the start, found at step {facts.step}; the "
            f"first is {names[0]}. Checkpoints from here on hold the whole model, bases included: look for what writes "
            "into the base models, and resume from an earlier checkpoint"
        )
        return {("base_changed", ""): message}

    def deafness(self, facts: StepFacts) -> Findings:
        if facts.hears is None:
            return {}
        message = (
            f"the model is not listening: at step {facts.step} the true audio gains {facts.listening_gain:.4f} ± "
            f"{facts.listening_noise:.4f} nats a supervised token over audio with another right answer. Check that "
            "audio and transcripts belong together; then --projector_learning_rate 1e-3, the projector alone first "
            "(--no_use_lora), or more steps"
        )
        return {("not_listening", ""): None if facts.hears else message}

    def forgetting(self, facts: StepFacts) -> Findings:
        """No finding for a model that does not hear: its wrong answers on speech prove nothing."""
        if not facts.hears or (facts.hearing is not None and facts.hearing < HEARS):
            return {}
        found = [finding for finding in (lost_kinds(facts), moved_text(facts)) if finding is not None]
        if not found:
            return {}
        message = (
            f"it hears, but is forgetting, found at step {facts.step}: {'; '.join(filter(None, found))}. Try "
            "instructions beside the speech, with the text model's own answers (qwhisper data answer), "
            "--distill_weight 0.5 (clips need transcripts) and --no_use_lora (the projector alone): docs/learning.md"
        )
        return {("forgetting", ""): message if any(found) else None}


def lost_kinds(facts: StepFacts) -> str | None:
    """What retention shows of forgetting; "" if there is none, None if it was not measured."""
    share, count, hearing = facts.retention, facts.retention_questions, facts.hearing
    if share is None or hearing is None:
        return None
    standard_error = math.sqrt(share * (1 - share) / count)
    if share + NOISES * standard_error >= FORGETTING * hearing:
        return ""
    return (
        f"{share:.0%} of {count} questions of kinds that were never trained on are answered right on speech, though "
        f"the text model knows them all, and {hearing:.0%} of trained kinds"
    )


def moved_text(facts: StepFacts) -> str | None:
    """What the text shift shows of forgetting; "" and None as in `lost_kinds`."""
    shift = facts.text_shift
    if shift is None or not math.isfinite(shift):
        return None
    if shift <= SHIFT_BOUND:
        return ""
    return f"its answers to text are {shift:.2f} nats a token away from the text model's"
