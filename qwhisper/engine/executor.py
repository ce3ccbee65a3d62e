"""Lays the samples of an optimizer step into as few packs as memory allows and runs them forward and backward.

Optimisation (the samples) is independent of execution (the packs): any packing gives the same gradients, except for
rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from qwhisper.data.packing import plan_packs
from qwhisper.data.rows import Sample
from qwhisper.engine.batch import Batch, pack_shape, packed_batch, padded_batch
from qwhisper.engine.capture import MOST_GRAPHS, Graphs
from qwhisper.engine.compiled import compile_layers, compiled_function, plain_layers, uncompiled
from qwhisper.engine.forward import PackResult, by_sample, hidden_states_of, likeliest_tokens, run_pack
from qwhisper.engine.plain import fingerprint, why_plain
from qwhisper.engine.plan_memory import Execution
from qwhisper.engine.prefetch import HostBatches
from qwhisper.engine.reference import compare_with_reference
from qwhisper.engine.regions import Regions
from qwhisper.engine.shapes import rounded_shape
from qwhisper.errors import ExecutionError, MemoryLimitError
from qwhisper.guards.gradient_buffers import GradientBuffers
from qwhisper.memory import is_out_of_memory
from qwhisper.model.attention import IMPLEMENTATIONS, PACKED_ATTENTION, attention_for, text_attention
from qwhisper.model.loss import IGNORE_INDEX, capped, of_chunk
from qwhisper.model.qwen3_audio import Qwen3AudioForConditionalGeneration

AUTO_TOKENS_PER_PACK = {"cpu": 4096, "cuda": 8192}  # halved when memory runs out
Result = TypeVar("Result")
UNPACKABLE_LAYERS = ("linear_attention", "mamba", "conv", "recurrent")


def supports_packing(text_config) -> bool:
    """Whether the LM can keep the samples of one row apart.

    Recurrent layers would leak from one sample to the next. Only our attention has a packed kernel: not the soft-capped
    one, and none that a user has set.
    """
    layers = getattr(text_config, "layer_types", None) or []
    recurrent = any(word in layer for layer in layers for word in UNPACKABLE_LAYERS)
    ours = attention_for(text_config) == PACKED_ATTENTION and text_attention(text_config) in IMPLEMENTATIONS
    return ours and not recurrent


def generators_as_now(device: torch.device) -> Callable[[], None]:
    """Return a function that restores the present state of the random generators of CPU and device."""
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
    """A pack of `tokens` tokens did not fit into memory; packs have at most `now` from here on."""

    tokens: int
    now: int


@dataclass(frozen=True)
class StepLoss:
    """The loss of a step. loss: sum(token losses) / supervised tokens of the step, fp32 scalar. divergence: from the
    teacher, in nats a taught token, fp32 scalar; None if nothing was taught. halvings: of packs that did not fit.
    why_plain: why the run is plain from this step on; None if nothing changed.
    """

    loss: Tensor
    divergence: Tensor | None = None
    halvings: list[Halved] = field(default_factory=list)
    why_plain: str | None = None


class Executor:
    """Runs packs on one model. `max_tokens_per_pack` is halved when memory runs out, and is saved with the run.

    execution: how packs are trained on; "plain" until `execute` changes it. Evaluations are always plain.
    """

    def __init__(
        self,
        model: Qwen3AudioForConditionalGeneration,
        *,
        max_tokens_per_pack: int | None,
        pad_token_id: int,
        distill_weight: float = 0.0,
        manual_loss: bool = False,
    ):
        self.model = model
        self.distill_weight = distill_weight
        self.manual_loss = manual_loss  # compare each pack's loss with a plain one
        self.before_pack: Callable[[], None] = lambda: None  # may raise: the step or evaluation is then incomplete
        self.while_compiling: Callable[[], AbstractContextManager[None]] = nullcontext  # may raise likewise
        self.gradient_buffers: GradientBuffers | None = None  # of a training
        self.execution: Execution = "plain"
        self._regions: Regions | None = None
        self._is_plain = False  # for the time being
        self._fingerprint = 0
        device = model.get_input_embeddings().weight.device
        assert isinstance(device, torch.device)
        self.device = device
        self.max_tokens_per_pack = max_tokens_per_pack or AUTO_TOKENS_PER_PACK.get(self.device.type, 4096)
        self.host_batches = HostBatches(self.device)
        self.pad_token_id = pad_token_id
        self.half_precision = model.model.language_model.dtype == torch.float16
        self.loss_scale = 1.0  # multiplies the loss before the backward pass; the gradients are divided by it
        self.packing = supports_packing(model.config.get_text_config())
        # Values that change with each step are in fixed tensors on the device.
        self._count, self._scale = torch.ones((), device=self.device), torch.ones((), device=self.device)

    def batch(self, samples: Sequence[Sample]) -> Batch:
        """One pack on the model's device; in training with the row that its teacher reads."""
        if self.model.training:
            return self._on_device(self.host_batches.take(samples, self._training_batch))
        return self._on_device(self._host_batch(samples))

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Build the batches of a coming step of a training on the host, but for packs with clips that a feature cache
        lacks; meant for another thread.
        """
        make = self._training_batch if self._regions is None else self._rounded_batch
        packs = [pack for pack in self.packs(samples) if not any(sample.uncached for sample in pack)]
        self.host_batches.prepare(packs, make)

    def _training_batch(self, samples: Sequence[Sample]) -> Batch:
        return self._host_batch(samples, teach=bool(self.distill_weight))

    def _host_batch(self, samples: Sequence[Sample], *, teach: bool = False) -> Batch:
        frames, audio = self.model.config.frames, self.model.config.audio_token_id
        if self.packing:
            return packed_batch(samples, frames, audio, teach=teach)
        return padded_batch(samples, frames, audio, self.pad_token_id, teach=teach)

    def _on_device(self, batch: Batch) -> Batch:
        return batch.to(self.device, self.model.model.audio_tower.conv1.weight.device)

    def why_plain(self) -> str | None:
        """Why a pack has to run plain, see `engine.plain`; None: a CUDA graph would compute the same."""
        return why_plain(self.model, manual_loss=self.manual_loss, packing=self.packing)

    def execute(self, execution: Execution) -> None:
        """Train on packs in this way from here on. Needs `gradient_buffers`, and `why_plain` to be None, if it is not
        "plain".
        """
        self.execution, self._regions = execution, None
        plain_layers(self.model)
        if execution == "plain":
            return
        assert self.gradient_buffers is not None
        self._fingerprint = fingerprint(self.model)
        compile_layers(self.model)
        self._regions = Regions(
            self.model,
            Graphs(self.device, MOST_GRAPHS if execution == "captured" else 0, lambda: self.while_compiling()),
            distill_weight=self.distill_weight,
            count=self._count,
            scale=self._scale,
            buffers=self.gradient_buffers,
            chunk=compiled_function(of_chunk),
        )

    def has_changed(self) -> bool:
        """Whether the model has changed since the last call, or since `execute`, so that graphs would be wrong."""
        before, self._fingerprint = self._fingerprint, fingerprint(self.model)
        return before != self._fingerprint

    def take_preparation(self) -> tuple[int, float]:
        """Number of passes that were compiled or recorded since the last call, and the seconds that it took."""
        return (0, 0.0) if self._regions is None else self._regions.graphs.take_preparation()

    @contextmanager
    def plainly(self) -> Iterator[None]:
        """Packs run plain: their kernels are others, and every hook is called."""
        before, self._is_plain = self._is_plain, True
        try:
            with uncompiled(self.model):
                yield
        finally:
            self._is_plain = before
            if self._regions is not None and not before:
                torch.cuda.empty_cache()  # while a pass takes memory from the pool, torch frees no cached blocks

    def _rounded_batch(self, samples: Sequence[Sample]) -> Batch:
        """One pack on the host, of a shape that occurs again."""
        frames, teach = self.model.config.frames, bool(self.distill_weight)
        longest_window = self.model.config.audio_config.max_source_positions
        shape = rounded_shape(pack_shape(samples, frames, teach=teach), self.max_tokens_per_pack, longest_window)
        return packed_batch(samples, frames, self.model.config.audio_token_id, teach=teach, shape=shape)

    def run_pack(self, batch: Batch) -> PackResult:
        """Forward pass of one pack."""
        return run_pack(self.model, batch, self.distill_weight)

    def packs(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        lengths = [len(sample.input_ids) for sample in samples]
        return [[samples[i] for i in pack] for pack in plan_packs(lengths, self.max_tokens_per_pack)]

    def forward_backward(self, samples: Sequence[Sample], num_supervised: int) -> StepLoss:
        """Leave the gradients of sum(token losses) / num_supervised over all samples; earlier ones are replaced.

        num_supervised: supervised tokens of the whole optimizer step. Raises MemoryLimitError if a pack of one sample
        does not fit, NumericalError if --manual_loss finds another loss.
        """
        put_generators_back, why_plain = generators_as_now(self.device), None
        halvings: list[Halved] = []

        def start_again() -> None:
            self._start_gradients()
            put_generators_back()

        def run() -> StepLoss:
            packs = partial(self.run_packs, samples, num_supervised)
            return self.within_memory(packs, samples, start_again, halvings)[0]

        self._start_gradients()
        try:
            step = run()
        except ExecutionError as error:
            why_plain = str(error)
        if why_plain is not None:  # outside of the handler, as in `within_memory`
            self.execute("plain")
            start_again()
            step = run()
        if self.loss_scale != 1.0:
            scaled = [p.grad for p in self.model.parameters() if p.grad is not None]
            if scaled:
                torch._foreach_mul_(scaled, 1.0 / self.loss_scale)
        return replace(step, halvings=halvings, why_plain=why_plain)

    def _start_gradients(self) -> None:
        if self.gradient_buffers is None:
            self.model.zero_grad()
        else:
            self.gradient_buffers.start()

    @torch.no_grad()
    def evaluate(self, samples: Sequence[Sample]) -> float:
        """Mean loss over all supervised tokens of all samples, in nats; 0 without any sample."""
        if not samples:
            return 0.0
        with self.evaluation_mode():
            step, _ = self.within_memory(lambda: self.run_packs(samples, 1), samples, lambda: None)
        return float(step.loss) / max(1, sum(sample.num_supervised for sample in samples))

    @torch.no_grad()
    def shift_from_base(self, samples: Sequence[Sample]) -> float:
        """Divergence of the language model from itself without its adapter, in nats a supervised token, over samples
        that are text; 0 without any sample.
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
            batch = self._on_device(self._host_batch([replace(s, teacher=s) for s in pack], teach=True))
            total += run_pack(self.model, batch, distill_weight=1.0).tokens.losses.sum()
        return total

    @torch.no_grad()
    def sample_losses(self, samples: Sequence[Sample]) -> list[float]:
        """Loss of each sample, summed over its supervised tokens, in nats. Computed as in `evaluate`, with one wait.

        Raises if memory runs out: packs of this size have been trained on, so they are not halved here.
        """
        return self._of_each(samples, self._losses_of_pack)

    @torch.no_grad()
    def answered_right(self, samples: Sequence[Sample]) -> list[bool]:
        """For each sample, whether the target is the likeliest token at every supervised position. If one answer is
        supervised, this means that greedy decoding gives it, to its last token. Waits and fails as `sample_losses`.
        """
        return self._of_each(samples, self._right_of_pack)

    def _of_each(self, samples: Sequence[Sample], of_pack: Callable[[Batch], Tensor]) -> list:
        """The value of each sample. of_pack: gives those of a pack, [samples or more]."""
        found: dict[int, Tensor] = {}
        with self.evaluation_mode():
            for pack in self.packs(samples):
                self.before_pack()
                found |= dict(zip(map(id, pack), of_pack(self.batch(pack)), strict=False))
        return torch.stack([found[id(sample)] for sample in samples]).tolist() if samples else []

    def _losses_of_pack(self, batch: Batch) -> Tensor:
        return by_sample(batch, self.run_pack(batch).tokens.losses.double())

    def _right_of_pack(self, batch: Batch) -> Tensor:
        likeliest = likeliest_tokens(self.model, batch, hidden_states_of(self.model, batch))
        targets = batch.text.targets.to(likeliest.device)
        wrong = (targets != IGNORE_INDEX) & (likeliest != targets)
        return by_sample(batch, wrong.long()) == 0

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            with self.plainly():
                yield
        finally:
            self.model.train(was_training)

    def within_memory(
        self,
        attempt: Callable[[], Result],
        samples: Sequence[Sample],
        start_again: Callable[[], None],
        halvings: list[Halved] | None = None,
    ) -> tuple[Result, list[Halved]]:
        """Call `attempt` until memory suffices. Halve the packs after each failure; not after the first if graphs
        held memory.

        halvings: those of earlier calls, to which this one's are added.
        """
        halvings, freed = [] if halvings is None else halvings, False
        while True:
            try:
                return attempt(), halvings
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failure = error.with_traceback(None)  # which would keep the failed attempt's tensors alive
            held = self.free_graphs()
            if freed or not held:
                halvings.append(self._halve(samples, failure))
            freed = True
            start_again()
            torch.cuda.empty_cache()

    def free_graphs(self) -> bool:
        """Free the memory of all graphs, which are recorded again when needed. Returns whether there were any."""
        held = self._regions is not None and bool(self._regions.graphs.passes)
        if self._regions is not None:
            self._regions.graphs.forget()
        return held

    def _halve(self, samples: Sequence[Sample], error: Exception) -> Halved:
        largest = max(self.packs(samples), key=lambda pack: sum(len(s.input_ids) for s in pack))
        tokens = sum(len(s.input_ids) for s in largest)
        if all(len(pack) == 1 for pack in self.packs(samples)):
            raise MemoryLimitError(
                f"out of memory with one sample of {tokens} tokens ({largest[0].source}): lower --max_length, or use "
                "--gradient_checkpointing, --load_in_fp8, --load_in_4bit, --whisper_cpu or a smaller --text_model"
            ) from error
        self.max_tokens_per_pack = max(1, min(tokens, self.max_tokens_per_pack) // 2)
        return Halved(tokens=tokens, now=self.max_tokens_per_pack)

    def run_packs(self, samples: Sequence[Sample], num_supervised: int) -> StepLoss:
        """Forward pass of each pack and, if the loss requires gradients, its backward pass."""
        self._count.fill_(num_supervised)
        self._scale.fill_(self.loss_scale)
        found = [self._run_samples(pack, num_supervised) for pack in self.packs(samples)]
        divergences = [divergence for _, divergence in found if divergence is not None]
        num_taught = sum(sample.num_supervised for sample in samples if sample.teacher is not None)
        divergence = torch.stack(divergences).sum() / num_taught if divergences else None
        return StepLoss(torch.stack([loss for loss, _ in found]).sum(), divergence)

    def _run_samples(self, pack: Sequence[Sample], num_supervised: int) -> tuple[Tensor, Tensor | None]:
        """Detached loss and summed divergence from the teacher, in nats; None without a teacher."""
        self.before_pack()
        if self._regions is not None and not self._is_plain:
            loss, divergence = self._regions.run(self.host_batches.take(pack, self._rounded_batch))
            assert loss is not None
            return loss, divergence
        batch = self.batch(pack)
        result = self.run_pack(batch)
        loss = result.tokens.losses.sum() / self._count
        divergence = None if result.tokens.divergences is None else result.tokens.divergences.sum()
        logits = None
        if self.manual_loss:
            logits = compare_with_reference(self.model, pack, batch, result, loss, num_supervised)
        elif self.model.keep_last_logits:
            logits = capped(result.tokens.last_logits.float(), self.model.softcap)
        if self.model.keep_last_logits:
            self.model.last_logits = logits
        del result, logits  # the backward pass needs their memory
        if loss.requires_grad:
            (loss * self._scale).backward()
        return loss.detach(), divergence
