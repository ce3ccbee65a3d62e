"""The table of blocks that `model.segment_kernels` works through, made on the host from the borders of the segments.

Its size follows from the sizes of a pack alone, so kernels for packs of one shape have one grid, whatever the borders.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

BLOCK_ROWS = 128  # of a block; a kernel with smaller tiles cuts a block into equal parts


def num_blocks(tokens: int, segments: int) -> int:
    """The most blocks that `segments` segments of together `tokens` rows can have."""
    return (tokens + segments * (BLOCK_ROWS - 1)) // BLOCK_ROWS


@torch.compiler.disable
def segment_blocks(borders: Sequence[int]) -> Tensor:
    """int32 [blocks, 3]: first row of a block, first row of its segment, first row behind its segment.

    borders: [segments + 1], as `cu_seq_lens`, from 0 to the number of tokens; segments may be empty. The number of
    blocks is `num_blocks` of the tokens and segments; blocks that are not needed are (0, 0, 0), which holds no row.
    Every row lies in one block, so kernels leave no row of their results unwritten.
    """
    edges = np.asarray(borders, dtype=np.int32)
    lengths = np.diff(edges)
    counts = -(-lengths // BLOCK_ROWS)
    starts, ends = np.repeat(edges[:-1], counts), np.repeat(edges[1:], counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    blocks = np.zeros((num_blocks(int(edges[-1]), len(lengths)), 3), dtype=np.int32)
    blocks[: len(starts)] = np.stack([starts + BLOCK_ROWS * within, starts, ends], axis=1)
    return torch.from_numpy(blocks)
