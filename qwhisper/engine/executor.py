"""Lays the samples of an optimizer step into as few packs as memory allows and runs them forward and backward.

What is optimised (the samples) and how it is executed (the packs) are apart: any packing gives the same gradients, to
rounding.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from qwhisper.data.packing import pack_samples, pad_samples, plan_packs
from qwhisper.data.rows import Sample
from qwhisper.errors import MemoryLimitError, NumericalError
from qwhisper.memory import is_out_of_memory
from qwhisper.model.attention import PACKED_ATTENTION, attention_for
from qwhisper.model.loss import IGNORE_INDEX, MAX_LOGITS_AT_ONCE, head_logits, supervised_loss
from qwhisper.model.qwen3_audio import Qwen3AudioForConditionalGeneration

AUTO_TOKENS_PER_PACK = {"cpu": 4096, "cuda": 8192}  # halved on the first out-of-memory; a planner will know better
HOST_KEYS = ("audio_lengths", "valid_label_count")  # read by Python: on the device each would be a wait
UNPACKABLE_LAYERS = ("linear_attention", "mamba", "conv", "recurrent")


def supports_packing(text_config) -> bool:
    """Whether the LM can keep samples of one row apart.

    Recurrent layers would leak from one to the next; soft-capped attention has no packed kernel.
    """
    layers = getattr(text_config, "layer_types", None) or []
    recurrent = any(word in layer for layer in layers for word in UNPACKABLE_LAYERS)
    return not recurrent and attention_for(text_config) == PACKED_ATTENTION


def generators_as_now(device: torch.device) -> Callable[[], None]:
    """Called, it puts the random generators of CPU and device back to where they are now."""
    generators = [(torch.get_rng_state, torch.set_rng_state)]
    if device.type == "cuda":
        generators.append((torch.cuda.get_rng_state, torch.cuda.set_rng_state))
    states = [get() for get, _ in generators]

    def put_back() -> None:
        for state, (_, restore) in zip(states, generators, strict=True):
            restore(state)

    return put_back


@dataclass
class Halved:
    """Out of memory was met by halving the pack; the step was run again."""

    tokens: int
    now: int


class Executor:
    """Runs packs on one model; `max_tokens_per_pack` shrinks when memory runs out, and is saved with the run."""

    def __init__(
        self,
        model: Qwen3AudioForConditionalGeneration,
        *,
        max_tokens_per_pack: int | None,
        pad_token_id: int,
        distill_weight: float = 0.0,
    ):
        self.model = model
        self.distill_weight = distill_weight
        self.before_pack: Callable[[], None] = lambda: None  # what it raises leaves step or evaluation half done
        self.divergence: Tensor | None = None  # from the teacher, of the last training pass, in nats a taught token
        device = model.get_input_embeddings().weight.device
        assert isinstance(device, torch.device)
        self.device = device
        self.max_tokens_per_pack = max_tokens_per_pack or AUTO_TOKENS_PER_PACK.get(self.device.type, 4096)
        self.pad_token_id = pad_token_id
        self.half_precision = model.model.language_model.dtype == torch.float16
        self.loss_scale = 1.0  # what the loss is multiplied by before the backward pass, and gradients divided by after
        self.packing = supports_packing(model.config.get_text_config())

    def batch(self, samples: Sequence[Sample]) -> dict:
        """One pack as the model's keyword arguments, on the model's device; in training with what its teacher reads."""
        batch = self._on_device(samples)
        teachers = [sample.teacher for sample in samples if sample.teacher is not None]
        if not (self.distill_weight and self.model.training and teachers):
            return batch
        taught = [torch.full((sample.num_supervised,), sample.teacher is not None) for sample in samples]
        lesson = {"teacher": self._on_device(teachers), "taught": torch.cat(taught)}
        return batch | lesson | {"distill_weight": self.distill_weight}

    def _on_device(self, samples: Sequence[Sample]) -> dict:
        batch = pack_samples(samples) if self.packing else pad_samples(samples, self.pad_token_id)
        move = {k for k, v in batch.items() if isinstance(v, Tensor) and k not in HOST_KEYS}
        return {k: v.to(self.device, non_blocking=True) if k in move else v for k, v in batch.items()}

    def packs(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        lengths = [len(sample.input_ids) for sample in samples]
        return [[samples[i] for i in pack] for pack in plan_packs(lengths, self.max_tokens_per_pack)]

    def forward_backward(self, samples: Sequence[Sample], num_supervised: int) -> tuple[Tensor, list[Halved]]:
        """Adds the gradients of sum(token losses) / num_supervised over all samples.

        num_supervised: supervised tokens of the whole optimizer step. Gradients must be None or zero before.
        Returns that loss and the halvings that memory forced. Raises MemoryLimitError where a pack of one sample does
        not fit, NumericalError where --manual_loss finds another loss.
        """
        put_generators_back = generators_as_now(self.device)

        def start_again() -> None:
            self.model.zero_grad(set_to_none=True)
            put_generators_back()

        loss, halvings = self.within_memory(lambda: self.run_packs(samples, num_supervised), samples, start_again)
        if self.loss_scale != 1.0:
            scaled = [p.grad for p in self.model.parameters() if p.grad is not None]
            if scaled:
                torch._foreach_mul_(scaled, 1.0 / self.loss_scale)
        return loss, halvings

    @torch.no_grad()
    def evaluate(self, samples: Sequence[Sample]) -> float:
        """Mean loss over all supervised tokens of all samples, in nats; 0 without any sample."""
        if not samples:
            return 0.0
        with self.evaluation_mode():
            total, _ = self.within_memory(lambda: self.run_packs(samples, 1), samples, lambda: None)
        return float(total) / max(1, sum(sample.num_supervised for sample in samples))

    @torch.no_grad()
    def shift_from_base(self, samples: Sequence[Sample]) -> float:
        """Divergence of the language model from what it was before its adapter, in nats a supervised token, where both
        read the samples, which are text; 0 without any.
        """
        if not samples:
            return 0.0
        with self.evaluation_mode():
            total, _ = self.within_memory(lambda: self._divergence_from_base(samples), samples, lambda: None)
        return float(total) / max(1, sum(sample.num_supervised for sample in samples))

    def _divergence_from_base(self, samples: Sequence[Sample]) -> Tensor:
        total = torch.zeros((), device=self.device)
        for pack in self.packs(samples):
            self.before_pack()
            batch = self._on_device(pack)
            taught = torch.ones(sum(sample.num_supervised for sample in pack), dtype=torch.bool)
            total += self.model(**batch, teacher=batch, taught=taught, distill_weight=1.0, num_items_in_batch=1).loss
        return total

    @torch.no_grad()
    def sample_losses(self, samples: Sequence[Sample]) -> list[float]:
        """Loss of each sample, summed over its supervised tokens, in nats; as `evaluate` computes it, in one wait.

        Lets memory run out: packs of this size have been trained on, and are not made smaller here.
        """
        return self._of_each(samples, self._losses_of_pack)

    @torch.no_grad()
    def answered_right(self, samples: Sequence[Sample]) -> list[bool]:
        """Of each sample, whether its target is the likeliest token at every supervised position: where one answer is
        supervised, that is whether greedy decoding gives it, to its last token. Waits and fails as `sample_losses`.
        """
        return self._of_each(samples, self._right_of_pack)

    def _of_each(self, samples: Sequence[Sample], of_pack: Callable[[Sequence[Sample]], Sequence[Tensor]]) -> list:
        found: dict[int, Tensor] = {}
        with self.evaluation_mode():
            for pack in self.packs(samples):
                self.before_pack()
                found |= dict(zip(map(id, pack), of_pack(pack), strict=True))
        return torch.stack([found[id(sample)] for sample in samples]).tolist() if samples else []

    def _losses_of_pack(self, pack: Sequence[Sample]) -> list[Tensor]:
        hidden_states, labels = self._hidden_states_and_labels(pack)
        lengths = [len(sample.input_ids) for sample in pack]
        sizes, dim = (lengths, 1) if self.packing else ([1] * len(pack), 0)
        rows = zip(hidden_states.split(sizes, dim), labels.split(sizes, dim), strict=True)
        head, softcap = self.model.lm_head, self.model._softcap
        return [supervised_loss(row, own, head, num_items_in_batch=1, softcap=softcap)[0] for row, own in rows]

    def _right_of_pack(self, pack: Sequence[Sample]) -> list[Tensor]:
        hidden_states, labels = self._hidden_states_and_labels(pack)
        supervised = labels[:, 1:] != IGNORE_INDEX
        rows = max(1, MAX_LOGITS_AT_ONCE // self.model.lm_head.weight.shape[0])
        likeliest = [self._likeliest(part) for part in hidden_states[:, :-1][supervised].split(rows)]
        right = torch.cat(likeliest) == labels[:, 1:][supervised]
        return [of_sample.all() for of_sample in right.split([sample.num_supervised for sample in pack])]

    def _likeliest(self, hidden_states: Tensor) -> Tensor:
        logits = head_logits(hidden_states, self.model.lm_head, self.model._softcap)
        audio = self.model.config.audio_token_id
        logits[:, audio : audio + 1] = -math.inf  # it is never generated, and may lie outside of the vocabulary
        return logits.argmax(-1)

    def _hidden_states_and_labels(self, pack: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        batch = self.batch(pack)
        labels = batch.pop("labels")
        del batch["valid_label_count"]
        hidden_states = self.model.model(**batch).last_hidden_state
        return hidden_states, labels.to(hidden_states.device)

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    def within_memory(
        self, attempt: Callable[[], Tensor], samples: Sequence[Sample], start_again: Callable[[], None]
    ) -> tuple[Tensor, list[Halved]]:
        """Calls `attempt` until memory suffices, with packs of half the size after each failure."""
        halvings: list[Halved] = []
        while True:
            try:
                return attempt(), halvings
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                halvings.append(self._halve(samples, error))
            # Outside the handler, whose traceback keeps the failed attempt's tensors alive.
            start_again()
            torch.cuda.empty_cache()

    def _halve(self, samples: Sequence[Sample], error: Exception) -> Halved:
        largest = max(self.packs(samples), key=lambda pack: sum(len(s.input_ids) for s in pack))
        tokens = sum(len(s.input_ids) for s in largest)
        if all(len(pack) == 1 for pack in self.packs(samples)):
            raise MemoryLimitError(
                f"out of memory with one sample of {tokens} tokens ({largest[0].source}): lower --max_length, or use "
                "--gradient_checkpointing, --load_in_4bit, --whisper_cpu or a smaller --text_model"
            ) from error
        self.max_tokens_per_pack = max(1, min(tokens, self.max_tokens_per_pack) // 2)
        return Halved(tokens=tokens, now=self.max_tokens_per_pack)

    def run_packs(self, samples: Sequence[Sample], num_supervised: int) -> Tensor:
        losses, divergences, num_taught = [], [], 0
        for pack in self.packs(samples):
            self.before_pack()
            batch = self.batch(pack)
            loss = self.model(**batch, num_items_in_batch=num_supervised).loss
            if self.model.last_divergence is not None:
                divergences.append(self.model.last_divergence)
                num_taught += int(batch["taught"].sum())
            if self.model.manual_loss:
                self._compare_with_reference(pack, loss)
            if loss.requires_grad:
                (loss * self.loss_scale).backward()
            losses.append(loss.detach())
        self.divergence = torch.stack(divergences).sum() / num_taught if divergences else None
        return torch.stack(losses).sum()

    def _compare_with_reference(self, pack: list[Sample], loss: Tensor) -> None:
        """--manual_loss: the loss and the mask, computed the plain way, must agree."""
        counted = sum(int((sample.labels[1:] != -100).sum()) for sample in pack)
        assert self.model.last_valid_label_count is not None and self.model.last_manual_loss is not None
        used = int(self.model.last_valid_label_count)
        names = ", ".join(sample.id for sample in pack)
        if counted != used:
            raise NumericalError(
                f"--manual_loss: {used} positions were supervised, the labels of {names} have {counted}"
            )
        fast, plain = float(loss.detach()), float(self.model.last_manual_loss)
        if not math.isfinite(fast) and not math.isfinite(plain):
            return  # the two agree that the step is lost, and the finite check skips it
        # Both sum the same fp32 terms in another order; the head's matrix product rounds by shape, in its own dtype.
        head = self.model.lm_head.weight
        tolerance = max(1e-5, 4 * torch.finfo(head.dtype).eps if head.is_floating_point() else 0.03)
        if not abs(fast - plain) <= tolerance * max(1.0, abs(plain)):
            raise NumericalError(
                f"--manual_loss: loss {fast:.6g}, computed the plain way {plain:.6g} (samples {names})"
            )
