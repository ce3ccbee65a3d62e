"""Chooses how many tokens a pack has and how many layers are computed again, from the memory that is there."""

from dataclasses import dataclass

from qwhisper.data.row_sizes import Rows
from qwhisper.engine.plan_memory import GIB, Job, Memory, memory_of, pack_of
from qwhisper.engine.plan_speed import Card, samples_a_second
from qwhisper.errors import MemoryLimitError

MOST_TOKENS = 8192  # of a pack: a larger one is not faster
STEP = 64  # tokens by which packs differ
LONG_RUN = 1000  # steps, if it is not known how many


@dataclass(frozen=True, kw_only=True)
class Choice:
    """max_tokens_per_pack: the limit of a pack. tokens: of the largest pack that will occur, whose peak `memory` is."""

    max_tokens_per_pack: int
    recompute_layers: int
    tokens: int
    memory: Memory


def choose(
    job: Job,
    rows: Rows,
    samples_per_step: int,
    budget: int,
    card: Card,
    *,
    steps: int = LONG_RUN,
    max_tokens_per_pack: int | None = None,
    recompute_layers: int | None = None,
) -> Choice:
    """The number of layers computed again, each with the largest pack that fits, for which the estimated speed is
    highest: a larger pack uses the card better, and each layer that is computed again costs half of its time once more.

    budget: bytes that PyTorch may reserve. steps: of the run. A pack need not hold more than a step, and never less
    than the longest row. max_tokens_per_pack, recompute_layers: given by the user; None: chosen. Raises
    MemoryLimitError if nothing fits.
    """
    step = rows.most(samples_per_step, max(1, steps))
    largest = max(MOST_TOKENS, rows.longest)
    most = min(step, largest if max_tokens_per_pack is None else max(max_tokens_per_pack, rows.longest))
    best: tuple[float, int, int] | None = None
    layers = range(job.text.layers + 1) if recompute_layers is None else [recompute_layers]
    for again in layers:
        tokens = largest_pack(job, rows, again, budget, most)
        if tokens < rows.longest:
            continue
        if max_tokens_per_pack is not None and tokens < most and again < layers[-1]:
            continue  # the packs that the user wants come first
        fast = samples_a_second(job, rows, tokens, again, card, samples_per_step)
        if best is None or fast > best[0]:
            best = fast, tokens, again
        if tokens == most:
            break  # more layers computed again gain nothing
    if best is None:
        raise MemoryLimitError(_nothing_fits(job, rows, layers[-1], budget, card))
    _, tokens, again = best
    # Beyond the expected largest step as far as memory goes: a larger one then makes two packs.
    limit = max_tokens_per_pack or max(tokens, largest_pack(job, rows, again, budget, largest))
    return Choice(
        max_tokens_per_pack=limit,
        recompute_layers=again,
        tokens=tokens,
        memory=memory_of(job, pack_of(rows, tokens), again),
    )


def largest_pack(job: Job, rows: Rows, recompute_layers: int, budget: int, most: int) -> int:
    """Tokens of the largest pack within the budget: `most`, or a multiple of STEP below it; 0 if none fits."""

    def fits(tokens: int) -> bool:
        return memory_of(job, pack_of(rows, tokens), recompute_layers).reserved <= budget

    if fits(most):
        return most
    low, high = 0, -(-most // STEP)  # memory grows with tokens: `low` fits or is 0, `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * STEP) else (low, middle)
    return low * STEP


def _nothing_fits(job: Job, rows: Rows, recompute_layers: int, budget: int, card: Card) -> str:
    memory = memory_of(job, pack_of(rows, rows.longest), recompute_layers)
    largest = max(memory.parts, key=lambda name: memory.parts[name])
    cures = ["--load_in_fp8"] if card.has_fp8 and job.weights not in ("nf4", "fp8") else []
    cures += [] if job.weights == "nf4" else ["--load_in_4bit"]
    cures += [] if job.whisper_cpu or not job.freeze_whisper else ["--whisper_cpu"]
    cures += ["--freeze_whisper"] if not job.freeze_whisper else []
    cures += ["--gradient_checkpointing"] if recompute_layers < job.text.layers else []
    return (
        f"out of memory before a step: one dialogue of {rows.longest} tokens needs {memory.reserved / GIB:.1f} GiB "
        f"({largest}: {memory.parts[largest] / GIB:.1f}), and {budget / GIB:.1f} GiB are there; use "
        f"{', '.join([*cures, '--max_length'])} or a smaller --text_model"
    )
