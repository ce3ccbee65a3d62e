"""Triton kernels of `model.segment_attention`: attention within the segments of a row, forward and backward.

A program owns one tile of rows of one head and walks the tiles of the other side that its segment, the diagonal and the
window leave. Tiles that all rows of the tile see wholly are computed without a mask. Products are of the tensors' dtype
with sums in fp32; probabilities and the scores' gradient are rounded to that dtype, as FlashAttention-2 does
(arXiv 2307.08691). Each result has one writer and a fixed order of sums, so results repeat to the last bit.

All row numbers in these kernels count from the beginning of the segment. `scale_log2` is the scale times log2(e), and
`lse` the base-2 logarithm of the sum of a row's exponentials: exp2 is the instruction that cards have.
"""

import triton
import triton.language as tl


@triton.jit
def _block(blocks, BLOCK_ROWS: tl.constexpr, TILE: tl.constexpr):
    """This program's tile: first row and number of rows of its segment, and the first row of the tile within it."""
    parts: tl.constexpr = BLOCK_ROWS // TILE
    entry = blocks + tl.program_id(0) // parts * 3
    begin = tl.load(entry + 1)
    first = tl.load(entry) - begin + tl.program_id(0) % parts * TILE
    return begin, tl.load(entry + 2) - begin, first


@triton.jit
def _rows(base, rows, length, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr):
    """[rows, BLOCK_D] of a tensor of rows; zeros behind the segment and the head. WHOLE: no row lies behind it."""
    dims = tl.arange(0, BLOCK_D)
    at = base + rows[:, None] * stride + dims[None, :]
    if WHOLE and HEAD_DIM == BLOCK_D:
        return tl.load(at)
    if WHOLE:
        return tl.load(at, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    return tl.load(at, mask=(rows < length)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _write(base, rows, length, stride, values, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)
    inside = (rows < length)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(base + rows[:, None] * stride + dims[None, :], values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _sees(queries, keys, length, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether a query sees a key, for numbers of rows that broadcast."""
    seen = keys < length
    if CAUSAL:
        seen = seen & (keys <= queries)
    if WINDOW > 0:
        seen = seen & (keys > queries - WINDOW)
    return seen


@triton.jit
def _key_range(first, length, TILE: tl.constexpr, STEP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Keys of the queries [first, first + TILE): begin, begin and end of those that need no mask, end."""
    begin = 0
    end = length
    unmasked_end = length
    if CAUSAL:
        end = tl.minimum(length, first + TILE)
        unmasked_end = tl.minimum(length, first + 1)
    unmasked_end = unmasked_end // STEP * STEP
    unmasked = 0
    if WINDOW > 0:
        begin = tl.maximum(first - WINDOW + 1, 0) // STEP * STEP
        unmasked = tl.maximum(first + TILE - WINDOW, 0)
        unmasked = tl.minimum((unmasked + STEP - 1) // STEP * STEP, end)
        unmasked_end = tl.maximum(unmasked_end, unmasked)
    return begin, unmasked, unmasked_end, end


@triton.jit
def _attend(
    acc, highest, total, query, key, value, begin, end, rows, length, key_stride, value_stride, scale_log2,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Add the keys [begin, end) to the running softmax of a tile of queries."""
    for start in range(begin, end, STEP):
        keys = start + tl.arange(0, STEP)
        scores = tl.dot(query, tl.trans(_rows(key, keys, length, key_stride, HEAD_DIM, BLOCK_D, not MASKED)))
        if MASKED:
            scores = tl.where(_sees(rows[:, None], keys[None, :], length, CAUSAL, WINDOW), scores, float("-inf"))
        new = tl.maximum(highest, tl.max(scores, 1) * scale_log2)
        # Left of its window a row has seen no key yet: its highest score is -inf, which no score may be compared with.
        base = tl.where(new == float("-inf"), 0.0, new) if WINDOW > 0 else new
        p = tl.exp2(scores * scale_log2 - base[:, None])
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(p, 1)
        values = _rows(value, keys, length, value_stride, HEAD_DIM, BLOCK_D, not MASKED)
        acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None])
        highest = new
    return acc, highest, total


@triton.jit
def forward(
    query, key, value, out, lse, blocks, query_stride, query_head, key_stride, key_head, value_stride, value_head,
    out_stride, tokens, scale_log2, groups,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid (parts of blocks, query heads). Writes a tile of `out` [tokens, heads, head_dim] and of `lse` [heads,
    tokens].
    """
    begin, length, first = _block(blocks, BLOCK_ROWS, TILE)
    if first >= length:
        return
    head = tl.program_id(1).to(tl.int64)
    begin = begin.to(tl.int64)
    query += begin * query_stride + head * query_head
    key += begin * key_stride + head // groups * key_head
    value += begin * value_stride + head // groups * value_head
    rows = first + tl.arange(0, TILE)
    q = _rows(query, rows, length, query_stride, HEAD_DIM, BLOCK_D, False)
    acc = tl.zeros([TILE, BLOCK_D], dtype=tl.float32)
    highest = tl.full([TILE], float("-inf"), dtype=tl.float32)
    total = tl.zeros([TILE], dtype=tl.float32)
    start, unmasked, unmasked_end, end = _key_range(first, length, TILE, STEP, CAUSAL, WINDOW)
    if WINDOW > 0:
        acc, highest, total = _attend(
            acc, highest, total, q, key, value, start, unmasked, rows, length, key_stride, value_stride, scale_log2,
            CAUSAL, WINDOW, True, HEAD_DIM, BLOCK_D, STEP,
        )  # fmt: skip
    acc, highest, total = _attend(
        acc, highest, total, q, key, value, unmasked, unmasked_end, rows, length, key_stride, value_stride, scale_log2,
        CAUSAL, WINDOW, False, HEAD_DIM, BLOCK_D, STEP,
    )  # fmt: skip
    acc, highest, total = _attend(
        acc, highest, total, q, key, value, unmasked_end, end, rows, length, key_stride, value_stride, scale_log2,
        CAUSAL, WINDOW, True, HEAD_DIM, BLOCK_D, STEP,
    )  # fmt: skip
    out += begin * out_stride + head * HEAD_DIM
    _write(out, rows, length, out_stride, acc / total[:, None], HEAD_DIM, BLOCK_D)
    tl.store(lse + head * tokens + begin + rows, highest + tl.log2(total), mask=rows < length)


@triton.jit
def backward_query(
    grad, query, key, value, out, lse, delta, query_grad, blocks, grad_stride, grad_head,
    query_stride, query_head, key_stride, key_head, value_stride, value_head, out_stride, tokens, scale, scale_log2,
    groups,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid (parts of blocks, query heads). Writes a tile of `query_grad`, laid out as `out`, and of `delta`, laid out
    as `lse`: sum(grad * out) of each row, which `backward_key` reads.
    """
    begin, length, first = _block(blocks, BLOCK_ROWS, TILE)
    if first >= length:
        return
    head = tl.program_id(1).to(tl.int64)
    begin = begin.to(tl.int64)
    grad += begin * grad_stride + head * grad_head
    query += begin * query_stride + head * query_head
    key += begin * key_stride + head // groups * key_head
    value += begin * value_stride + head // groups * value_head
    out += begin * out_stride + head * HEAD_DIM
    query_grad += begin * out_stride + head * HEAD_DIM
    lse += head * tokens + begin
    delta += head * tokens + begin
    rows = first + tl.arange(0, TILE)
    q = _rows(query, rows, length, query_stride, HEAD_DIM, BLOCK_D, False)
    g = _rows(grad, rows, length, grad_stride, HEAD_DIM, BLOCK_D, False)
    o = _rows(out, rows, length, out_stride, HEAD_DIM, BLOCK_D, False)
    d = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + rows, d, mask=rows < length)
    row_lse = tl.load(lse + rows, mask=rows < length, other=0.0)
    acc = tl.zeros([TILE, BLOCK_D], dtype=tl.float32)
    start, _, _, end = _key_range(first, length, TILE, STEP, CAUSAL, WINDOW)
    for key_start in range(start, end, STEP):
        keys = key_start + tl.arange(0, STEP)
        k = _rows(key, keys, length, key_stride, HEAD_DIM, BLOCK_D, False)
        v = _rows(value, keys, length, value_stride, HEAD_DIM, BLOCK_D, False)
        p = tl.exp2(tl.dot(q, tl.trans(k)) * scale_log2 - row_lse[:, None])
        # Where a query does not see a key, the exponential may be infinite.
        p = tl.where(_sees(rows[:, None], keys[None, :], length, CAUSAL, WINDOW), p, 0.0)
        ds = p * (tl.dot(g, tl.trans(v)) - d[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc)
    _write(query_grad, rows, length, out_stride, acc * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def backward_key(
    grad, query, key, value, lse, delta, key_grad, value_grad, blocks, grad_stride, grad_head,
    query_stride, query_head, key_stride, key_head, value_stride, value_head, out_stride, tokens, scale, scale_log2,
    groups,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid (parts of blocks, key heads). Writes a tile of `key_grad` and `value_grad` [tokens, key heads, head_dim],
    summed over the query heads that share a key head.
    """
    begin, length, first = _block(blocks, BLOCK_ROWS, TILE)
    if first >= length:
        return
    key_head_number = tl.program_id(1).to(tl.int64)
    begin = begin.to(tl.int64)
    keys = first + tl.arange(0, TILE)
    key += begin * key_stride + key_head_number * key_head
    value += begin * value_stride + key_head_number * value_head
    grad += begin * grad_stride
    query += begin * query_stride
    lse += begin
    delta += begin
    k = _rows(key, keys, length, key_stride, HEAD_DIM, BLOCK_D, False)
    v = _rows(value, keys, length, value_stride, HEAD_DIM, BLOCK_D, False)
    dk = tl.zeros([TILE, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([TILE, BLOCK_D], dtype=tl.float32)
    start = 0
    end = length
    if CAUSAL:
        start = first // STEP * STEP
    if WINDOW > 0:
        end = tl.minimum(length, first + TILE - 1 + WINDOW)
    steps = tl.cdiv(end - start, STEP)
    for turn in range(groups * steps):  # one loop for all query heads, so that loads run ahead across them
        head = key_head_number * groups + turn // steps
        rows = start + turn % steps * STEP + tl.arange(0, STEP)
        # Behind the segment queries and gradients are read as zeros, which add nothing.
        q = _rows(query + head * query_head, rows, length, query_stride, HEAD_DIM, BLOCK_D, False)
        g = _rows(grad + head * grad_head, rows, length, grad_stride, HEAD_DIM, BLOCK_D, False)
        row_lse = tl.load(lse + head * tokens + rows, mask=rows < length, other=0.0)
        d = tl.load(delta + head * tokens + rows, mask=rows < length, other=0.0)
        p = tl.exp2(tl.dot(k, tl.trans(q)) * scale_log2 - row_lse[None, :])
        p = tl.where(_sees(rows[None, :], keys[:, None], length, CAUSAL, WINDOW), p, 0.0)
        dv = tl.dot(p.to(g.dtype), g, dv)
        ds = p * (tl.dot(v, tl.trans(g)) - d[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk)
    key_grad += begin * out_stride + key_head_number * HEAD_DIM
    value_grad += begin * out_stride + key_head_number * HEAD_DIM
    _write(key_grad, keys, length, out_stride, dk * scale, HEAD_DIM, BLOCK_D)
    _write(value_grad, keys, length, out_stride, dv, HEAD_DIM, BLOCK_D)


@triton.jit
def write_one(out):
    """To find out whether kernels compile and start here."""
    tl.store(out, 1.0)
