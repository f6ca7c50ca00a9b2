"""The Triton programs of `attention`, which checks their arguments and documents them.

A cache is (num_pages, num_kv_heads, page_tokens, head_dim); a sequence's line of the block table names its pages. The
query heads of one KV head share a program, so keys and values are read once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

TABLES = ("block_tables", "context_lengths", "query_indptr")
"""Views into a step's one array: where they start must not make another kernel of it."""


@triton.jit
def _load_block(
    cache,
    table,
    positions,
    end,
    kv_head_offset,
    page_stride,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
):
    """(BLOCK_TOKENS, BLOCK_DIM) keys or values of `positions`; zeros at `end` and beyond, whatever the pages hold."""
    dims = tl.arange(0, BLOCK_DIM)
    if MASKED:
        pages = tl.load(table + positions // PAGE_TOKENS, mask=positions < end, other=0)
    else:
        pages = tl.load(table + positions // PAGE_TOKENS)
    rows = pages.to(tl.int64) * page_stride + kv_head_offset + (positions % PAGE_TOKENS) * HEAD_DIM
    pointers = cache + rows[:, None] + dims[None, :]
    if HEAD_DIM == BLOCK_DIM:
        if MASKED:
            return tl.load(pointers, mask=(positions < end)[:, None], other=0.0)
        return tl.load(pointers)
    if MASKED:
        return tl.load(pointers, mask=(positions < end)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    return tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _load_scales(
    scales, table, positions, end, kv_head_offset, page_stride,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_TOKENS: tl.constexpr,
):  # fmt: skip
    """(BLOCK_TOKENS,) scales of the fp8 keys or values that `_load_block` loads with the same arguments."""
    if MASKED:
        pages = tl.load(table + positions // PAGE_TOKENS, mask=positions < end, other=0)
    else:
        pages = tl.load(table + positions // PAGE_TOKENS)
    lines = (pages.to(tl.int64) * page_stride + kv_head_offset) // HEAD_DIM + positions % PAGE_TOKENS
    if MASKED:
        return tl.load(scales + lines, mask=positions < end, other=0.0)
    return tl.load(scales + lines)


@triton.jit
def _add_fp8(q, weights, v, scales, result):
    """Return result + weights @ (v * scales), computed in the dtype of queries."""
    if q.dtype == tl.float16:
        # Scales are small: with weights they may be too small for float16.
        scaled = (v.to(tl.float32) * scales[:, None]).to(tl.float16)
        return tl.dot(weights.to(tl.float16), scaled, result, input_precision="ieee")
    return tl.dot((weights * scales[None, :]).to(q.dtype), v.to(q.dtype), result, input_precision="ieee")


@triton.jit
def _scores(q, k, scaling, softcap, HAS_SOFTCAP: tl.constexpr):
    """Products of queries and keys in units of log 2: scaled, or scaled to units of the cap and capped."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
    if HAS_SOFTCAP:
        scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores) + 1.0))  # tanh
    return scores


@triton.jit
def _add_bias(scores, key_bias, bias_stride, heads, is_head, positions, end):
    """Scores, and what is added to them in units of log 2 for a row's head at the position of each key."""
    pointers = key_bias + (heads * bias_stride)[:, None] + positions[None, :]
    bias = tl.load(pointers, mask=is_head[:, None] & (positions < end)[None, :], other=0.0)
    return scores + bias * 1.4426950408889634


@triton.jit
def _with_sinks(sinks, heads, is_head, maximum, total):
    """(maximum, total, share of what came before) with the heads' sinks, which take weight and give nothing."""
    sink = tl.load(sinks + heads, mask=is_head, other=0.0).to(tl.float32) * 1.4426950408889634
    new_maximum = tl.maximum(maximum, sink)
    share = tl.exp2(maximum - new_maximum)
    return new_maximum, total * share + tl.exp2(sink - new_maximum), share


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=TABLES)
def decode_kernel(
    query,
    keys,
    values,
    block_tables,
    context_lengths,
    out,
    sinks,
    key_bias,
    partials,
    arrivals,
    key_scales,
    value_scales,
    query_stride,
    query_head_stride,
    out_stride,
    out_head_stride,
    table_stride,
    page_stride,
    head_stride,
    bias_stride,
    scaling,
    softcap,
    window,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BUSY_SPLITS: tl.constexpr,
    MIN_PART: tl.constexpr,
    MAX_PART: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    COMBINED_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program takes one part of a sequence's context for all query heads of one KV head."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    kv_head = tl.program_id(0)
    sequence = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(context_lengths + sequence).to(tl.int32)
    first = tl.maximum(length - window, 0) if HAS_WINDOW else 0
    part = tl.minimum(tl.maximum(tl.cdiv(length - first, BUSY_SPLITS), MIN_PART), MAX_PART)
    part = tl.maximum(part, tl.cdiv(length - first, NUM_SPLITS))
    part = tl.cdiv(part, BLOCK_TOKENS) * BLOCK_TOKENS
    # An empty context has one part, of no tokens, which writes zeros.
    num_parts = tl.maximum(tl.cdiv(length - first, part), 1)
    if split >= num_parts:
        return
    begin = first + split * part
    end = tl.minimum(begin + part, length)

    heads = tl.arange(0, BLOCK_GROUP)
    dims = tl.arange(0, BLOCK_DIM)
    inside = (heads < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    rows = sequence.to(tl.int64) * query_stride + (kv_head * GROUP + heads) * query_head_stride
    q = tl.load(query + rows[:, None] + dims[None, :], mask=inside, other=0.0)
    table = block_tables + sequence.to(tl.int64) * table_stride
    kv_head_offset = kv_head.to(tl.int64) * head_stride
    maximum = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_GROUP], tl.float32)
    result = tl.zeros([BLOCK_GROUP, BLOCK_DIM], tl.float32)
    for start in tl.range(begin, end, BLOCK_TOKENS, num_stages=STAGES):
        positions = start + tl.arange(0, BLOCK_TOKENS)
        k = _load_block(
            keys, table, positions, end, kv_head_offset, page_stride, True, HEAD_DIM, BLOCK_DIM, PAGE_TOKENS
        )
        if key_scales is None:
            scores = _scores(q, k, scaling, softcap, HAS_SOFTCAP)
        else:
            token_scales = _load_scales(
                key_scales, table, positions, end, kv_head_offset, page_stride, True, HEAD_DIM, PAGE_TOKENS
            )
            scores = _scores(q, k.to(q.dtype), scaling * token_scales[None, :], softcap, HAS_SOFTCAP)
        if key_bias is not None:
            scores = _add_bias(scores, key_bias, bias_stride, kv_head * GROUP + heads, heads < GROUP, positions, end)
        scores = tl.where((positions < end)[None, :], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp2(scores - new_maximum[:, None])
        decay = tl.exp2(maximum - new_maximum)
        total = total * decay + tl.sum(weights, 1)
        v = _load_block(
            values, table, positions, end, kv_head_offset, page_stride, True, HEAD_DIM, BLOCK_DIM, PAGE_TOKENS
        )
        result = result * decay[:, None]
        if value_scales is None:
            result = tl.dot(weights.to(v.dtype), v, result, input_precision="ieee")
        else:
            token_scales = _load_scales(
                value_scales, table, positions, end, kv_head_offset, page_stride, True, HEAD_DIM, PAGE_TOKENS
            )
            result = _add_fp8(q, weights, v, token_scales, result)
        maximum = new_maximum

    out_rows = out + sequence.to(tl.int64) * out_stride + kv_head * GROUP * out_head_stride
    if num_parts == 1:
        if HAS_SINKS:
            maximum, total, share = _with_sinks(sinks, kv_head * GROUP + heads, heads < GROUP, maximum, total)
            result = result * share[:, None]
        total = tl.where(total > 0, total, 1.0)
        pointers = out_rows + (heads * out_head_stride)[:, None] + dims[None, :]
        tl.store(pointers, (result / total[:, None]).to(out.dtype.element_ty), mask=inside)
    elif NUM_SPLITS > 1:
        # (sequence, KV head, head of the group, part, head_dim), then two such arrays without head_dim.
        pair = sequence * tl.num_programs(0) + kv_head
        lines = (pair * GROUP + heads) * NUM_SPLITS + split
        num_lines = tl.num_programs(1) * tl.num_programs(0) * GROUP * NUM_SPLITS
        maxima = partials + num_lines * HEAD_DIM
        totals = maxima + num_lines
        tl.store(partials + (lines * HEAD_DIM)[:, None] + dims[None, :], result, mask=inside)
        tl.store(maxima + lines, maximum, mask=heads < GROUP)
        tl.store(totals + lines, total, mask=heads < GROUP)
        # All threads' stores come before the arrival; who arrives last combines the parts, in their order.
        tl.debug_barrier()
        num_arrived = tl.atomic_add(arrivals + pair, 1, sem="acq_rel", scope="gpu") + 1
        if num_arrived == num_parts:
            parts = tl.arange(0, NUM_SPLITS)[None, :]
            for first_head in range(0, GROUP, COMBINED_HEADS):
                some = first_head + tl.arange(0, COMBINED_HEADS)
                part_lines = ((pair * GROUP + some) * NUM_SPLITS)[:, None] + parts
                is_part = (some < GROUP)[:, None] & (parts < num_parts)
                part_maxima = tl.load(maxima + part_lines, mask=is_part, other=float("-inf"), cache_modifier=".cg")
                part_totals = tl.load(totals + part_lines, mask=is_part, other=0.0, cache_modifier=".cg")
                part_results = tl.load(
                    partials + (part_lines * HEAD_DIM)[:, :, None] + dims[None, None, :],
                    mask=is_part[:, :, None] & (dims < HEAD_DIM)[None, None, :],
                    other=0.0,
                    cache_modifier=".cg",
                )
                # Heads beyond the group have no maximum and no total; what comes of them is not stored.
                some_maxima = tl.where(some < GROUP, tl.max(part_maxima, 1), 0.0)
                shares = tl.exp2(part_maxima - some_maxima[:, None])
                some_totals = tl.where(some < GROUP, tl.sum(part_totals * shares, 1), 1.0)
                combined = tl.sum(part_results * shares[:, :, None], 1)
                if HAS_SINKS:
                    some_maxima, some_totals, share = _with_sinks(
                        sinks, kv_head * GROUP + some, some < GROUP, some_maxima, some_totals
                    )
                    combined = combined * share[:, None]
                combined = combined / some_totals[:, None]
                tl.store(
                    out_rows + (some * out_head_stride)[:, None] + dims[None, :],
                    combined.to(out.dtype.element_ty),
                    mask=(some < GROUP)[:, None] & (dims < HEAD_DIM)[None, :],
                )
            tl.store(arrivals + pair, 0)


@triton.jit
def _extend_block(
    q,
    keys,
    values,
    key_scales,
    value_scales,
    key_bias,
    heads,
    is_row,
    table,
    positions,
    row_positions,
    end,
    kv_head_offset,
    page_stride,
    bias_stride,
    scaling,
    softcap,
    window,
    maximum,
    total,
    result,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
):
    """Attend to one block of tokens; without `CAUSAL` every row sees all of them."""
    k = _load_block(keys, table, positions, end, kv_head_offset, page_stride, CAUSAL, HEAD_DIM, BLOCK_DIM, PAGE_TOKENS)
    if key_scales is None:
        scores = _scores(q, k, scaling, softcap, HAS_SOFTCAP)
    else:
        token_scales = _load_scales(
            key_scales, table, positions, end, kv_head_offset, page_stride, CAUSAL, HEAD_DIM, PAGE_TOKENS
        )
        scores = _scores(q, k.to(q.dtype), scaling * token_scales[None, :], softcap, HAS_SOFTCAP)
    if key_bias is not None:
        scores = _add_bias(scores, key_bias, bias_stride, heads, is_row, positions, end)
    if CAUSAL:
        scores = tl.where(positions[None, :] <= row_positions[:, None], scores, float("-inf"))
    if HAS_WINDOW:
        scores = tl.where(positions[None, :] > row_positions[:, None] - window, scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    # A row that has seen no token yet keeps weights of zero instead of NaN.
    shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum) if HAS_WINDOW else new_maximum
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(maximum - shift)
    total = total * decay + tl.sum(weights, 1)
    v = _load_block(
        values, table, positions, end, kv_head_offset, page_stride, CAUSAL, HEAD_DIM, BLOCK_DIM, PAGE_TOKENS
    )
    result = result * decay[:, None]
    if value_scales is None:
        result = tl.dot(weights.to(v.dtype), v, result, input_precision="ieee")
    else:
        token_scales = _load_scales(
            value_scales, table, positions, end, kv_head_offset, page_stride, CAUSAL, HEAD_DIM, PAGE_TOKENS
        )
        result = _add_fp8(q, weights, v, token_scales, result)
    return new_maximum, total, result


@triton.jit(do_not_specialize=["table_stride", "num_sequences"], do_not_specialize_on_alignment=TABLES)
def extend_kernel(
    query,
    keys,
    values,
    block_tables,
    context_lengths,
    query_indptr,
    out,
    sinks,
    key_bias,
    key_scales,
    value_scales,
    query_stride,
    query_head_stride,
    out_stride,
    out_head_stride,
    table_stride,
    page_stride,
    head_stride,
    bias_stride,
    scaling,
    softcap,
    window,
    num_sequences,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_SEQUENCES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program takes TILE_ROWS rows of one sequence, for all query heads of one KV head."""
    kv_head = tl.program_id(0)
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
    dims = tl.arange(0, BLOCK_DIM)
    tile_rows = lanes // GROUP
    inside = (tile_rows < TILE_ROWS) & (tile_start + tile_rows < num_rows)
    heads = kv_head * GROUP + lanes % GROUP
    rows = (row_start + tile_start + tile_rows).to(tl.int64)
    mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
    q = tl.load(
        query + (rows * query_stride + heads * query_head_stride)[:, None] + dims[None, :], mask=mask, other=0.0
    )
    row_positions = first_position + tile_rows
    table = block_tables + sequence.to(tl.int64) * table_stride
    kv_head_offset = kv_head.to(tl.int64) * head_stride
    maximum = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    result = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)

    begin = tl.maximum(first_position - window + 1, 0) // BLOCK_TOKENS * BLOCK_TOKENS if HAS_WINDOW else 0
    seen_by_all = tl.maximum((first_position + 1) // BLOCK_TOKENS * BLOCK_TOKENS, begin)
    for start in tl.range(begin, seen_by_all, BLOCK_TOKENS, num_stages=STAGES):
        maximum, total, result = _extend_block(
            q, keys, values, key_scales, value_scales, key_bias, heads, inside, table,
            start + tl.arange(0, BLOCK_TOKENS), row_positions, length, kv_head_offset, page_stride, bias_stride,
            scaling, softcap, window, maximum, total, result, False, HAS_WINDOW, HAS_SOFTCAP, HEAD_DIM, BLOCK_DIM,
            PAGE_TOKENS,
        )  # fmt: skip
    for start in tl.range(seen_by_all, last_position + 1, BLOCK_TOKENS, num_stages=STAGES):
        maximum, total, result = _extend_block(
            q, keys, values, key_scales, value_scales, key_bias, heads, inside, table,
            start + tl.arange(0, BLOCK_TOKENS), row_positions, length, kv_head_offset, page_stride, bias_stride,
            scaling, softcap, window, maximum, total, result, True, HAS_WINDOW, HAS_SOFTCAP, HEAD_DIM, BLOCK_DIM,
            PAGE_TOKENS,
        )  # fmt: skip
    if HAS_SINKS:
        maximum, total, share = _with_sinks(sinks, heads, inside, maximum, total)
        result = result * share[:, None]
    total = tl.where(total > 0, total, 1.0)
    pointers = out + (rows * out_stride + heads * out_head_stride)[:, None] + dims[None, :]
    tl.store(pointers, (result / total[:, None]).to(out.dtype.element_ty), mask=mask)
