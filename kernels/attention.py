"""Attention over paged keys and values, in Triton: one row a sequence (decode) and several rows a sequence (extend).

Both read lengths on the device, so one captured launch serves any lengths up to the block tables' width, and neither
synchronises with the host. fp32 accumulation. The CPU path of `workers/model/attention.py` is the torch twin.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lorafleet.kernels.tiling import dependent_launch

MAX_HEAD_DIM = 256
MAX_SPLITS = 32
PROGRAMS_PER_PROCESSOR = 2
"""Decode splits contexts until this many programs a multiprocessor have work."""
MAX_PROGRAMS_PER_PROCESSOR = 16
"""Room for splitting long contexts further, so that a few of them among short ones do not hold up a launch."""
MIN_PART_TOKENS = 256
"""Shorter parts of a context cost more to combine than they save."""
MAX_PART_TOKENS = 2048
"""Longer parts are split where there is room."""

_LOG2_E = 1.4426950408889634
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class DecodeWorkspace:
    """Scratch memory of split decoding. The launches of one stream may share it; two streams may not."""

    num_processors: int
    """Multiprocessors to keep busy."""
    partials: Tensor
    """float32: unnormalised results of the parts, then their maxima and sums."""
    arrivals: Tensor
    """int32: parts that have arrived at each (sequence, KV head); zero between launches."""

    @classmethod
    def allocate(
        cls,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device,
        num_processors: int | None = None,
    ) -> DecodeWorkspace:
        """For any number of sequences of this shape. `num_processors`: default what the device has."""
        if num_processors is None:
            num_processors = torch.cuda.get_device_properties(device).multi_processor_count
        num_programs = MAX_PROGRAMS_PER_PROCESSOR * num_processors
        elements = num_programs * (num_heads // num_kv_heads) * (head_dim + 2)
        return cls(
            num_processors=num_processors,
            partials=torch.empty(elements, dtype=torch.float32, device=device),
            arrivals=torch.zeros(num_programs, dtype=torch.int32, device=device),
        )

    def splits(self, num_pairs: int) -> tuple[int, int]:
        """(most parts, parts that keep the device busy) of a context, for so many (sequence, KV head) pairs.

        Both are powers of two.
        """
        most = MAX_PROGRAMS_PER_PROCESSOR * self.num_processors // num_pairs
        busy = PROGRAMS_PER_PROCESSOR * self.num_processors // num_pairs
        return min(MAX_SPLITS, _floor_power_of_two(most)), min(MAX_SPLITS, _floor_power_of_two(busy))


def decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    context_lengths: Tensor,
    out: Tensor,
    workspace: DecodeWorkspace,
    *,
    scaling: float,
    window: int | None = None,
) -> None:
    """Compute out[s, h] = softmax(query[s, h] . K[s] * scaling) V[s] over the tokens of sequence s.

    query, out: (num_sequences, num_heads, head_dim), rows may be strided. keys, values: (num_pages, num_kv_heads,
    page_tokens, head_dim). block_tables: (num_sequences, max_pages) int32 or int64. context_lengths: (num_sequences,)
    int32 or int64, the query's own token included; where it is 0, zeros are written. `window`: only the last `window`
    tokens. Raises ValueError for a wrong shape, stride, dtype or device. The caller guarantees that lengths fit the
    tables and page ids the cache.
    """
    num_sequences = query.shape[0]
    _check(query, keys, values, block_tables, context_lengths, out, num_sequences, window)
    if num_sequences == 0:
        return
    num_heads, head_dim = query.shape[1:]
    num_kv_heads, page_tokens = keys.shape[1:3]
    group = num_heads // num_kv_heads
    num_splits, busy_splits = workspace.splits(num_sequences * num_kv_heads)
    if num_splits > 1:
        needed = num_sequences * num_kv_heads * num_splits * group * (head_dim + 2)
        if workspace.partials.numel() < needed or workspace.partials.device != query.device:
            raise ValueError(
                f"the workspace on {workspace.partials.device} has {workspace.partials.numel()} elements; "
                f"{num_heads} heads ({num_kv_heads} of KV) of {head_dim} on {query.device} need {needed}"
            )
    block_dim = max(16, triton.next_power_of_2(head_dim))
    block_tokens, num_warps, num_stages = _decode_tiling(block_dim, query.element_size())
    pdl = dependent_launch(query)
    _decode_kernel[(num_kv_heads, num_sequences, num_splits)](
        query,
        keys,
        values,
        block_tables,
        context_lengths,
        out,
        workspace.partials,
        workspace.arrivals,
        query.stride(0),
        query.stride(1),
        out.stride(0),
        out.stride(1),
        block_tables.stride(0),
        keys.stride(0),
        keys.stride(1),
        scaling * _LOG2_E,
        window or 0,
        HAS_WINDOW=window is not None,
        NUM_SPLITS=num_splits,
        BUSY_SPLITS=busy_splits,
        MIN_PART=MIN_PART_TOKENS,
        MAX_PART=MAX_PART_TOKENS,
        GROUP=group,
        BLOCK_GROUP=max(16, triton.next_power_of_2(group)),
        # As many heads at once as 64 registers a thread hold.
        COMBINED_HEADS=min(triton.next_power_of_2(group), max(1, 8192 // (num_splits * block_dim))),
        HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim,
        PAGE_TOKENS=page_tokens,
        BLOCK_TOKENS=block_tokens,
        STAGES=num_stages,
        PDL=pdl,
        num_warps=num_warps,
        launch_pdl=pdl,
    )


def extend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    context_lengths: Tensor,
    query_indptr: Tensor,
    out: Tensor,
    *,
    scaling: float,
    window: int | None = None,
) -> None:
    """Compute causal attention of each sequence's last rows over all its tokens, which lie in the cache already.

    query, out: (num_rows, num_heads, head_dim). query_indptr: (num_sequences + 1,) int32 or int64, first row of each
    sequence; only rows in [query_indptr[0], query_indptr[-1]) are computed. Row i of a sequence's n rows attends to its
    first `context_length - n + i + 1` tokens, or the last `window` of those. The rest is as in `decode`.
    """
    num_sequences = query_indptr.shape[0] - 1
    _check(query, keys, values, block_tables, context_lengths, out, num_sequences, window)
    _check_ints("query_indptr", query_indptr, 1, num_sequences + 1, query.device)
    num_rows, num_heads, head_dim = query.shape
    if num_sequences == 0 or num_rows == 0:
        return
    num_kv_heads, page_tokens = keys.shape[1:3]
    group = num_heads // num_kv_heads
    block_dim = max(16, triton.next_power_of_2(head_dim))
    mean_rows = -(-num_rows // num_sequences) * group
    block_rows, block_tokens, num_warps, num_stages = _extend_tiling(block_dim, query.element_size(), mean_rows)
    block_rows = max(block_rows, triton.next_power_of_2(group))
    tile_rows = block_rows // group
    # Every sequence may end with a tile that is not full.
    num_tiles = num_rows // tile_rows + num_sequences
    _extend_kernel[(num_kv_heads, num_tiles)](
        query,
        keys,
        values,
        block_tables,
        context_lengths,
        query_indptr,
        out,
        query.stride(0),
        query.stride(1),
        out.stride(0),
        out.stride(1),
        block_tables.stride(0),
        keys.stride(0),
        keys.stride(1),
        scaling * _LOG2_E,
        window or 0,
        num_sequences,
        HAS_WINDOW=window is not None,
        GROUP=group,
        TILE_ROWS=tile_rows,
        BLOCK_ROWS=block_rows,
        HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim,
        PAGE_TOKENS=page_tokens,
        BLOCK_TOKENS=block_tokens,
        BLOCK_SEQUENCES=triton.next_power_of_2(num_sequences),
        STAGES=num_stages,
        num_warps=num_warps,
    )


def _decode_tiling(block_dim: int, element_size: int) -> tuple[int, int, int]:
    """(tokens a step, warps, pipeline stages): 16 KiB of keys a step. Several programs share a multiprocessor, which
    hides more latency than deeper pipelines would.
    """
    tokens = 16384 // (block_dim * element_size)
    return max(16, min(tokens, 128)), 4, 3


def _floor_power_of_two(n: int) -> int:
    return 1 << max(0, n.bit_length() - 1)


def _extend_tiling(block_dim: int, element_size: int, mean_rows: int) -> tuple[int, int, int, int]:
    """(rows a tile, tokens a step, warps, pipeline stages). Rows are (token, query head) pairs."""
    if element_size == 4:
        # No tensor cores for exact fp32: small tiles, which fit the registers.
        return 16, 32 if block_dim <= 128 else 16, 4, 1
    if mean_rows <= 64:
        return 64, 64 if block_dim <= 128 else 32, 4, 3
    return 128, 64, 8, 3 if block_dim <= 128 else 2


def _check(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    context_lengths: Tensor,
    out: Tensor,
    num_sequences: int,
    window: int | None,
) -> None:
    if query.dim() != 3 or keys.dim() != 4:
        raise ValueError(
            f"query must be (rows, heads, head_dim) and keys (pages, kv_heads, page_tokens, head_dim), "
            f"got {tuple(query.shape)} and {tuple(keys.shape)}"
        )
    num_heads, head_dim = query.shape[1:]
    num_kv_heads, cached_dim = keys.shape[1], keys.shape[3]
    if head_dim != cached_dim or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"head_dim must be that of the cache ({cached_dim}) and at most {MAX_HEAD_DIM}, got {head_dim}"
        )
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads are no multiple of {num_kv_heads} KV heads")
    if keys.shape != values.shape or keys.stride() != values.stride():
        raise ValueError(
            f"keys and values must have one shape and strides, got {tuple(keys.shape)} {keys.stride()} "
            f"and {tuple(values.shape)} {values.stride()}"
        )
    if keys.stride()[2:] != (head_dim, 1):
        raise ValueError(f"the tokens of a page must be contiguous, got strides {keys.stride()}")
    if out.shape != query.shape:
        raise ValueError(f"out must have shape {tuple(query.shape)}, got {tuple(out.shape)}")
    for name, tensor in (("query", query), ("out", out)):
        if tensor.stride(2) != 1:
            raise ValueError(f"{name} must have unit stride along head_dim, got strides {tensor.stride()}")
    for name, tensor in (("keys", keys), ("values", values), ("out", out)):
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} must be {query.dtype} on {query.device}, as query is, got {tensor.dtype} on {tensor.device}"
            )
    if query.dtype not in _DTYPES:
        raise ValueError(f"query must be {', '.join(map(str, _DTYPES))}, got {query.dtype}")
    _check_ints("block_tables", block_tables, 2, num_sequences, query.device)
    _check_ints("context_lengths", context_lengths, 1, num_sequences, query.device)
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")


def _check_ints(name: str, tensor: Tensor, dims: int, length: int, device: torch.device) -> None:
    if tensor.dim() != dims or tensor.shape[0] != length or tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} must have {dims} dimension(s), {length} entries and unit stride along the last, "
            f"got shape {tuple(tensor.shape)}, strides {tensor.stride()}"
        )
    if tensor.dtype not in (torch.int32, torch.int64) or tensor.device != device:
        raise ValueError(f"{name} must be int32 or int64 on {device}, got {tensor.dtype} on {tensor.device}")


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
def _decode_kernel(
    query,
    keys,
    values,
    block_tables,
    context_lengths,
    out,
    partials,
    arrivals,
    query_stride,
    query_head_stride,
    out_stride,
    out_head_stride,
    table_stride,
    page_stride,
    head_stride,
    scaling,
    window,
    HAS_WINDOW: tl.constexpr,
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
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        scores = tl.where((positions < end)[None, :], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp2(scores - new_maximum[:, None])
        decay = tl.exp2(maximum - new_maximum)
        total = total * decay + tl.sum(weights, 1)
        v = _load_block(
            values, table, positions, end, kv_head_offset, page_stride, True, HEAD_DIM, BLOCK_DIM, PAGE_TOKENS
        )
        result = tl.dot(weights.to(v.dtype), v, result * decay[:, None], input_precision="ieee")
        maximum = new_maximum

    out_rows = out + sequence.to(tl.int64) * out_stride + kv_head * GROUP * out_head_stride
    if num_parts == 1:
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
                combined = tl.sum(part_results * shares[:, :, None], 1) / some_totals[:, None]
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
    table,
    positions,
    row_positions,
    end,
    kv_head_offset,
    page_stride,
    scaling,
    window,
    maximum,
    total,
    result,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
):
    """Attend to one block of tokens; without `CAUSAL` every row sees all of them."""
    k = _load_block(keys, table, positions, end, kv_head_offset, page_stride, CAUSAL, HEAD_DIM, BLOCK_DIM, PAGE_TOKENS)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
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
    result = tl.dot(weights.to(v.dtype), v, result * decay[:, None], input_precision="ieee")
    return new_maximum, total, result


@triton.jit
def _extend_kernel(
    query,
    keys,
    values,
    block_tables,
    context_lengths,
    query_indptr,
    out,
    query_stride,
    query_head_stride,
    out_stride,
    out_head_stride,
    table_stride,
    page_stride,
    head_stride,
    scaling,
    window,
    num_sequences,
    HAS_WINDOW: tl.constexpr,
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
            q, keys, values, table, start + tl.arange(0, BLOCK_TOKENS), row_positions, length, kv_head_offset,
            page_stride, scaling, window, maximum, total, result, False, HAS_WINDOW, HEAD_DIM, BLOCK_DIM, PAGE_TOKENS,
        )  # fmt: skip
    for start in tl.range(seen_by_all, last_position + 1, BLOCK_TOKENS, num_stages=STAGES):
        maximum, total, result = _extend_block(
            q, keys, values, table, start + tl.arange(0, BLOCK_TOKENS), row_positions, length, kv_head_offset,
            page_stride, scaling, window, maximum, total, result, True, HAS_WINDOW, HEAD_DIM, BLOCK_DIM, PAGE_TOKENS,
        )  # fmt: skip
    total = tl.where(total > 0, total, 1.0)
    pointers = out + (rows * out_stride + heads * out_head_stride)[:, None] + dims[None, :]
    tl.store(pointers, (result / total[:, None]).to(out.dtype.element_ty), mask=mask)
