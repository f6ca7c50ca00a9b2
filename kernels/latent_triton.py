"""The Triton programs of `latent`, which checks their arguments and documents them.

A page has a row a token: the latent, then the rotated part of its key. A block of rows is read once, for the scores of
all heads of a program and for their results: values are the latents.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

TABLES = ("block_tables", "context_lengths", "query_indptr", "row_pages", "row_offsets")
"""Views into a step's one array: where they start must not make another kernel of it."""


@triton.jit(do_not_specialize=["angle_stride", "angle_step"], do_not_specialize_on_alignment=(*TABLES, "cos", "sin"))
def store_kernel(
    latents,
    rotated,
    keys,
    row_pages,
    row_offsets,
    query,
    cos,
    sin,
    latents_stride,
    rotated_stride,
    page_stride,
    query_stride,
    query_head_stride,
    angle_stride,
    angle_step,
    NUM_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    ROTATES: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK_ROTATED: tl.constexpr,
):
    """One program a row. With ROTATES it rotates the row's part of its key on the way, and those of its queries."""
    row = tl.program_id(0).to(tl.int64)
    page = tl.load(row_pages + row).to(tl.int64)
    at = keys + page * page_stride + tl.load(row_offsets + row) * (RANK + ROTATED)
    dims = tl.arange(0, BLOCK_RANK)
    tl.store(at + dims, tl.load(latents + row * latents_stride + dims, mask=dims < RANK), mask=dims < RANK)
    part = rotated + row * rotated_stride
    if ROTATES:
        HALF: tl.constexpr = ROTATED // 2
        i = tl.arange(0, BLOCK_ROTATED // 2)
        is_pair = i < HALF
        low = 2 * i if IS_INTERLEAVED else i
        high = 2 * i + 1 if IS_INTERLEAVED else HALF + i
        angles = row * angle_stride + i * angle_step
        row_cos = tl.load(cos + angles, mask=is_pair, other=0.0).to(tl.float32)
        row_sin = tl.load(sin + angles, mask=is_pair, other=0.0).to(tl.float32)
        a = tl.load(part + low, mask=is_pair, other=0.0).to(tl.float32)
        b = tl.load(part + high, mask=is_pair, other=0.0).to(tl.float32)
        tl.store(at + RANK + low, (a * row_cos - b * row_sin).to(keys.dtype.element_ty), mask=is_pair)
        tl.store(at + RANK + high, (b * row_cos + a * row_sin).to(keys.dtype.element_ty), mask=is_pair)
        heads = tl.arange(0, BLOCK_HEADS)
        q = query + row * query_stride + (heads * query_head_stride)[:, None]
        inside = (heads < NUM_HEADS)[:, None] & is_pair[None, :]
        q_a = tl.load(q + low[None, :], mask=inside, other=0.0).to(tl.float32)
        q_b = tl.load(q + high[None, :], mask=inside, other=0.0).to(tl.float32)
        turned_a = q_a * row_cos[None, :] - q_b * row_sin[None, :]
        turned_b = q_b * row_cos[None, :] + q_a * row_sin[None, :]
        tl.store(q + low[None, :], turned_a.to(query.dtype.element_ty), mask=inside)
        tl.store(q + high[None, :], turned_b.to(query.dtype.element_ty), mask=inside)
    else:
        turned = tl.arange(0, BLOCK_ROTATED)
        tl.store(at + RANK + turned, tl.load(part + turned, mask=turned < ROTATED), mask=turned < ROTATED)


@triton.jit
def _parts(
    length,
    window,
    HAS_WINDOW: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BUSY_SPLITS: tl.constexpr,
    MIN_PART: tl.constexpr,
    MAX_PART: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """(first token, tokens of a part, number of parts) of a context; an empty one has one part, of no tokens."""
    first = tl.maximum(length - window, 0) if HAS_WINDOW else 0
    part = tl.minimum(tl.maximum(tl.cdiv(length - first, BUSY_SPLITS), MIN_PART), MAX_PART)
    part = tl.maximum(part, tl.cdiv(length - first, NUM_SPLITS))
    part = tl.cdiv(part, BLOCK_TOKENS) * BLOCK_TOKENS
    return first, part, tl.maximum(tl.cdiv(length - first, part), 1)


@triton.jit
def _load_columns(
    rows, positions, end, first, MASKED: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """(tokens, BLOCK) columns of `rows`, which are pointers, from `first` on; zeros beyond COUNT and what is masked."""
    dims = tl.arange(0, BLOCK)
    pointers = rows[:, None] + first + dims[None, :]
    if COUNT == BLOCK:
        if MASKED:
            return tl.load(pointers, mask=(positions < end)[:, None], other=0.0)
        return tl.load(pointers)
    if MASKED:
        return tl.load(pointers, mask=(positions < end)[:, None] & (dims < COUNT)[None, :], other=0.0)
    return tl.load(pointers, mask=(dims < COUNT)[None, :], other=0.0)


@triton.jit
def _attend(
    q,
    turned,
    keys,
    table,
    positions,
    row_positions,
    end,
    page_stride,
    scaling,
    window,
    maximum,
    total,
    result,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK_ROTATED: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
):
    """Attend to one block of tokens. Without `MASKED` all are there, and every row sees all of them."""
    if MASKED:
        pages = tl.load(table + positions // PAGE_TOKENS, mask=positions < end, other=0)
    else:
        pages = tl.load(table + positions // PAGE_TOKENS)
    rows = keys + (pages.to(tl.int64) * page_stride + positions % PAGE_TOKENS * (RANK + ROTATED))
    k = _load_columns(rows, positions, end, 0, MASKED, RANK, BLOCK_RANK)
    k_turned = _load_columns(rows, positions, end, RANK, MASKED, ROTATED, BLOCK_ROTATED)
    scores = tl.dot(turned, tl.trans(k_turned), input_precision="ieee")
    scores = tl.dot(q, tl.trans(k), scores, input_precision="ieee") * scaling
    if MASKED:
        if CAUSAL:
            scores = tl.where(positions[None, :] <= row_positions[:, None], scores, float("-inf"))
        else:
            scores = tl.where((positions < end)[None, :], scores, float("-inf"))
    if HAS_WINDOW:
        scores = tl.where(positions[None, :] > row_positions[:, None] - window, scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    # A row that has seen no token yet keeps weights of zero instead of NaN.
    shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum) if HAS_WINDOW else new_maximum
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(maximum - shift)
    total = total * decay + tl.sum(weights, 1)
    result = tl.dot(weights.to(k.dtype), k, result * decay[:, None], input_precision="ieee")
    return new_maximum, total, result


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=TABLES)
def decode_kernel(
    query,
    query_rotated,
    keys,
    block_tables,
    context_lengths,
    out,
    partials,
    query_stride,
    query_head_stride,
    rotated_stride,
    rotated_head_stride,
    out_stride,
    out_head_stride,
    table_stride,
    page_stride,
    scaling,
    window,
    HAS_WINDOW: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BUSY_SPLITS: tl.constexpr,
    MIN_PART: tl.constexpr,
    MAX_PART: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK_ROTATED: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program takes one part of a sequence's context for a group of heads."""
    if PDL:
        gdc_wait()
    sequence = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(context_lengths + sequence).to(tl.int32)
    first, part, num_parts = _parts(
        length, window, HAS_WINDOW, NUM_SPLITS, BUSY_SPLITS, MIN_PART, MAX_PART, BLOCK_TOKENS
    )
    if split >= num_parts:
        return
    begin = first + split * part
    end = tl.minimum(begin + part, length)

    lanes = tl.arange(0, BLOCK_GROUP)
    heads = tl.program_id(0) * GROUP + lanes
    is_head = lanes < GROUP
    dims = tl.arange(0, BLOCK_RANK)
    turned_dims = tl.arange(0, BLOCK_ROTATED)
    inside = is_head[:, None] & (dims < RANK)[None, :]
    row = sequence.to(tl.int64)
    q_rows = query + row * query_stride + heads.to(tl.int64) * query_head_stride
    q = tl.load(q_rows[:, None] + dims[None, :], mask=inside, other=0.0)
    turned_rows = query_rotated + row * rotated_stride + heads.to(tl.int64) * rotated_head_stride
    is_turned = is_head[:, None] & (turned_dims < ROTATED)[None, :]
    turned = tl.load(turned_rows[:, None] + turned_dims[None, :], mask=is_turned, other=0.0)
    table = block_tables + row * table_stride
    maximum = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_GROUP], tl.float32)
    result = tl.zeros([BLOCK_GROUP, BLOCK_RANK], tl.float32)
    for start in tl.range(begin, end, BLOCK_TOKENS, num_stages=STAGES):
        positions = start + tl.arange(0, BLOCK_TOKENS)
        maximum, total, result = _attend(
            q, turned, keys, table, positions, lanes, end, page_stride, scaling, window, maximum, total, result,
            True, False, False, RANK, BLOCK_RANK, ROTATED, BLOCK_ROTATED, PAGE_TOKENS,
        )  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    if num_parts == 1:
        total = tl.where(total > 0, total, 1.0)
        out_rows = out + row * out_stride + heads.to(tl.int64) * out_head_stride
        values = (result / total[:, None]).to(out.dtype.element_ty)
        tl.store(out_rows[:, None] + dims[None, :], values, mask=inside)
    elif NUM_SPLITS > 1:
        # (sequence, head, part, rank), then two such arrays without rank.
        lines = (sequence * NUM_HEADS + heads) * NUM_SPLITS + split
        maxima = partials + tl.num_programs(1) * NUM_HEADS * NUM_SPLITS * RANK
        totals = maxima + tl.num_programs(1) * NUM_HEADS * NUM_SPLITS
        tl.store(partials + (lines * RANK)[:, None] + dims[None, :], result, mask=inside)
        tl.store(maxima + lines, maximum, mask=is_head)
        tl.store(totals + lines, total, mask=is_head)


@triton.jit(do_not_specialize_on_alignment=TABLES)
def combine_kernel(
    context_lengths,
    partials,
    out,
    out_stride,
    out_head_stride,
    window,
    HAS_WINDOW: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BUSY_SPLITS: tl.constexpr,
    MIN_PART: tl.constexpr,
    MAX_PART: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program adds up the parts of one head of a sequence, in their order; none where there is one part."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    length = tl.load(context_lengths + sequence).to(tl.int32)
    _, _, num_parts = _parts(length, window, HAS_WINDOW, NUM_SPLITS, BUSY_SPLITS, MIN_PART, MAX_PART, BLOCK_TOKENS)
    if num_parts == 1:
        return
    num_lines = tl.num_programs(1) * tl.num_programs(0) * NUM_SPLITS
    parts = tl.arange(0, NUM_SPLITS)
    is_part = parts < num_parts
    lines = (sequence * tl.num_programs(0) + head) * NUM_SPLITS + parts
    maxima = partials + num_lines * RANK
    part_maxima = tl.load(maxima + lines, mask=is_part, other=float("-inf"))
    part_totals = tl.load(maxima + num_lines + lines, mask=is_part, other=0.0)
    shares = tl.exp2(part_maxima - tl.max(part_maxima, 0))
    total = tl.sum(part_totals * shares, 0)
    out_row = out + sequence.to(tl.int64) * out_stride + head.to(tl.int64) * out_head_stride
    for first in range(0, RANK, BLOCK_RANK):
        dims = first + tl.arange(0, BLOCK_RANK)
        mask = is_part[:, None] & (dims < RANK)[None, :]
        results = tl.load(partials + (lines * RANK)[:, None] + dims[None, :], mask=mask, other=0.0)
        combined = tl.sum(results * shares[:, None], 0) / total
        tl.store(out_row + dims, combined.to(out.dtype.element_ty), mask=dims < RANK)


@triton.jit(do_not_specialize=["table_stride", "num_sequences"], do_not_specialize_on_alignment=TABLES)
def extend_kernel(
    query,
    query_rotated,
    keys,
    block_tables,
    context_lengths,
    query_indptr,
    out,
    query_stride,
    query_head_stride,
    rotated_stride,
    rotated_head_stride,
    out_stride,
    out_head_stride,
    table_stride,
    page_stride,
    scaling,
    window,
    num_sequences,
    HAS_WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK_ROTATED: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_SEQUENCES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program takes TILE_ROWS rows of one sequence, for a group of heads."""
    # Later tiles see more tokens: they go first, so that the launch does not end with them.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    sequences = tl.arange(0, BLOCK_SEQUENCES)
    row_starts = tl.load(query_indptr + sequences, mask=sequences < num_sequences, other=0).to(tl.int32)
    origin = tl.load(query_indptr).to(tl.int32)
    # A sequence's first tile has this number or, if its predecessors do not fill theirs, there are tiles to spare.
    first_tiles = (row_starts - origin) // TILE_ROWS + sequences
    is_past = (first_tiles <= tile) & (sequences < num_sequences)
    sequence = tl.sum(is_past.to(tl.int32), 0) - 1
    row_start = tl.load(query_indptr + sequence).to(tl.int32)
    num_rows = tl.load(query_indptr + sequence + 1).to(tl.int32) - row_start
    tile_start = (tile - (row_start - origin) // TILE_ROWS - sequence) * TILE_ROWS
    if tile_start >= num_rows:
        return
    length = tl.load(context_lengths + sequence).to(tl.int32)
    first_position = length - num_rows + tile_start
    last_position = tl.minimum(first_position + TILE_ROWS, length) - 1

    lanes = tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_RANK)
    turned_dims = tl.arange(0, BLOCK_ROTATED)
    tile_rows = lanes // GROUP
    is_row = (tile_rows < TILE_ROWS) & (tile_start + tile_rows < num_rows)
    heads = (tl.program_id(0) * GROUP + lanes % GROUP).to(tl.int64)
    rows = (row_start + tile_start + tile_rows).to(tl.int64)
    inside = is_row[:, None] & (dims < RANK)[None, :]
    q_rows = query + rows * query_stride + heads * query_head_stride
    q = tl.load(q_rows[:, None] + dims[None, :], mask=inside, other=0.0)
    turned_rows = query_rotated + rows * rotated_stride + heads * rotated_head_stride
    is_turned = is_row[:, None] & (turned_dims < ROTATED)[None, :]
    turned = tl.load(turned_rows[:, None] + turned_dims[None, :], mask=is_turned, other=0.0)
    row_positions = first_position + tile_rows
    table = block_tables + sequence.to(tl.int64) * table_stride
    maximum = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    result = tl.zeros([BLOCK_ROWS, BLOCK_RANK], tl.float32)

    begin = tl.maximum(first_position - window + 1, 0) // BLOCK_TOKENS * BLOCK_TOKENS if HAS_WINDOW else 0
    seen_by_all = tl.maximum((first_position + 1) // BLOCK_TOKENS * BLOCK_TOKENS, begin)
    for start in tl.range(begin, seen_by_all, BLOCK_TOKENS, num_stages=STAGES):
        maximum, total, result = _attend(
            q, turned, keys, table, start + tl.arange(0, BLOCK_TOKENS), row_positions, length, page_stride, scaling,
            window, maximum, total, result, False, True, HAS_WINDOW, RANK, BLOCK_RANK, ROTATED, BLOCK_ROTATED,
            PAGE_TOKENS,
        )  # fmt: skip
    for start in tl.range(seen_by_all, last_position + 1, BLOCK_TOKENS, num_stages=1):
        maximum, total, result = _attend(
            q, turned, keys, table, start + tl.arange(0, BLOCK_TOKENS), row_positions, length, page_stride, scaling,
            window, maximum, total, result, True, True, HAS_WINDOW, RANK, BLOCK_RANK, ROTATED, BLOCK_ROTATED,
            PAGE_TOKENS,
        )  # fmt: skip
    total = tl.where(total > 0, total, 1.0)
    out_rows = out + rows * out_stride + heads * out_head_stride
    tl.store(out_rows[:, None] + dims[None, :], (result / total[:, None]).to(out.dtype.element_ty), mask=inside)
