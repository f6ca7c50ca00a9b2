"""Attention over paged keys and values, in Triton: one row a sequence (decode) and several rows a sequence (extend).

Both read lengths on the device, so one captured launch serves any lengths up to the block tables' width. Neither
synchronises with the host. fp32 accumulation. The CPU path of `workers/model/paged_attention.py` is the torch twin.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from lorafleet.kernels.attention_triton import decode_kernel, extend_kernel
from lorafleet.kernels.fp8_values import DTYPE
from lorafleet.kernels.kv_place import check_scales
from lorafleet.kernels.launching import launch
from lorafleet.kernels.tiling import dependent_launch

MAX_HEAD_DIM = 512
MAX_SPLITS = 32
PROGRAMS_PER_PROCESSOR = 2
"""Decode splits contexts until this many programs a multiprocessor have work."""
SPARE_SPLITS = 4
"""Long contexts may be split this much further, so that a few of them among short ones do not hold up a launch."""
MAX_PROGRAMS_PER_PROCESSOR = 16
"""Bound of that: programs without work are not free either."""
MIN_PART_TOKENS = 128
"""Shorter parts of a context cost more to combine than they save."""
MAX_PART_TOKENS = 2048
"""Longer parts are split where there is room."""
MIN_BLOCK_SEQUENCES = 256
"""Up to so many sequences, extend is one kernel."""

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
        busy = min(MAX_SPLITS, _floor_power_of_two(PROGRAMS_PER_PROCESSOR * self.num_processors // num_pairs))
        most = _floor_power_of_two(MAX_PROGRAMS_PER_PROCESSOR * self.num_processors // num_pairs)
        return min(MAX_SPLITS, SPARE_SPLITS * busy, most), busy


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
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_bias: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> None:
    """Compute out[s, h] = softmax(query[s, h] . K[s] * scaling) V[s] over the tokens of sequence s.

    query, out: (num_sequences, num_heads, head_dim), rows may be strided.
    keys, values: (num_pages, num_kv_heads, page_tokens, head_dim).
    block_tables: (num_sequences, max_pages) int32 or int64.
    context_lengths: (num_sequences,) int32 or int64, the query's own token included. Zeros are written where it is 0.
    window: only the last `window` tokens are read.
    softcap, sinks, key_bias: as in `Scores`.
    key_scales, value_scales: (num_pages, num_kv_heads, page_tokens) float32, where keys and values are in fp8.

    Raises ValueError for a wrong shape, stride, dtype or device. The caller guarantees that lengths fit the tables and
    page ids the cache.
    """
    num_sequences = query.shape[0]
    _check(query, keys, values, block_tables, context_lengths, out, num_sequences, window, softcap, sinks, key_bias)
    check_scales("key_scales", key_scales, keys)
    check_scales("value_scales", value_scales, values)
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
    launch(decode_kernel, (num_kv_heads, num_sequences, num_splits))(
        query,
        keys,
        values,
        block_tables,
        context_lengths,
        out,
        query if sinks is None else sinks,
        key_bias,
        workspace.partials,
        workspace.arrivals,
        key_scales,
        value_scales,
        query.stride(0),
        query.stride(1),
        out.stride(0),
        out.stride(1),
        block_tables.stride(0),
        keys.stride(0),
        keys.stride(1),
        0 if key_bias is None else key_bias.stride(0),
        scaling * _LOG2_E if softcap is None else scaling / softcap,
        0.0 if softcap is None else softcap * _LOG2_E,
        window or 0,
        HAS_WINDOW=window is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_SINKS=sinks is not None,
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
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_bias: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> None:
    """Compute causal attention of each sequence's last rows over all its tokens, which lie in the cache already.

    query, out: (num_rows, num_heads, head_dim). query_indptr: (num_sequences + 1,) int32 or int64, first row of each
    sequence; only rows in [query_indptr[0], query_indptr[-1]) are computed. Row i of a sequence's n rows attends to its
    first `context_length - n + i + 1` tokens, or the last `window` of those. The rest is as in `decode`.
    """
    num_sequences = query_indptr.shape[0] - 1
    _check(query, keys, values, block_tables, context_lengths, out, num_sequences, window, softcap, sinks, key_bias)
    check_scales("key_scales", key_scales, keys)
    check_scales("value_scales", value_scales, values)
    _check_ints("query_indptr", query_indptr, 1, num_sequences + 1, query.device)
    num_rows, num_heads, head_dim = query.shape
    if num_sequences == 0 or num_rows == 0:
        return
    num_kv_heads, page_tokens = keys.shape[1:3]
    group = num_heads // num_kv_heads
    block_dim = max(16, triton.next_power_of_2(head_dim))
    block_rows, block_tokens, num_warps, num_stages = _extend_tiling(block_dim, query.element_size())
    block_rows = max(block_rows, triton.next_power_of_2(group))
    tile_rows = block_rows // group
    # Every sequence may end with a tile that is not full.
    num_tiles = num_rows // tile_rows + num_sequences
    launch(extend_kernel, (num_kv_heads, num_tiles))(
        query,
        keys,
        values,
        block_tables,
        context_lengths,
        query_indptr,
        out,
        query if sinks is None else sinks,
        key_bias,
        key_scales,
        value_scales,
        query.stride(0),
        query.stride(1),
        out.stride(0),
        out.stride(1),
        block_tables.stride(0),
        keys.stride(0),
        keys.stride(1),
        0 if key_bias is None else key_bias.stride(0),
        scaling * _LOG2_E if softcap is None else scaling / softcap,
        0.0 if softcap is None else softcap * _LOG2_E,
        window or 0,
        num_sequences,
        HAS_WINDOW=window is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_SINKS=sinks is not None,
        GROUP=group,
        TILE_ROWS=tile_rows,
        BLOCK_ROWS=block_rows,
        HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim,
        PAGE_TOKENS=page_tokens,
        BLOCK_TOKENS=block_tokens,
        BLOCK_SEQUENCES=max(MIN_BLOCK_SEQUENCES, triton.next_power_of_2(num_sequences)),
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


def _extend_tiling(block_dim: int, element_size: int) -> tuple[int, int, int, int]:
    """(rows a tile, tokens a step, warps, pipeline stages). Rows are (token, query head) pairs.

    Two programs of 64 rows on a multiprocessor, one's softmax beside the other's products, beat one of 128.
    """
    if element_size == 4:
        # No tensor cores for exact fp32: small tiles, which fit the registers.
        return 16, 32 if block_dim <= 128 else 16, 4, 1
    if block_dim > 256:
        # As many results as 128 registers a thread hold.
        return 32, 16, 4, 2
    return 64, 64 if block_dim <= 128 else 32, 4, 3


def _check(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    context_lengths: Tensor,
    out: Tensor,
    num_sequences: int,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    key_bias: Tensor | None,
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
        raise ValueError(f"{num_heads} query heads are not a multiple of {num_kv_heads} KV heads")
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
        is_own = tensor.dtype == query.dtype or (tensor is not out and tensor.dtype == DTYPE)
        if not is_own or tensor.device != query.device:
            raise ValueError(
                f"{name} must be {query.dtype} on {query.device}, as query is, got {tensor.dtype} on {tensor.device}"
            )
    if query.dtype not in _DTYPES:
        raise ValueError(f"query must be {', '.join(map(str, _DTYPES))}, got {query.dtype}")
    _check_ints("block_tables", block_tables, 2, num_sequences, query.device)
    _check_ints("context_lengths", context_lengths, 1, num_sequences, query.device)
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be more than 0, got {softcap}")
    if sinks is not None and (sinks.shape != (num_heads,) or sinks.stride() != (1,) or sinks.device != query.device):
        raise ValueError(
            f"sinks must be ({num_heads},) and contiguous on {query.device}, as query is, got shape "
            f"{tuple(sinks.shape)}, strides {sinks.stride()} on {sinks.device}"
        )
    if key_bias is not None and (
        key_bias.dim() != 2
        or key_bias.shape[0] != num_heads
        or key_bias.stride(1) != 1
        or key_bias.dtype != torch.float32
        or key_bias.device != query.device
    ):
        raise ValueError(
            f"key_bias must be ({num_heads}, positions) float32 on {query.device} with unit stride along positions, "
            f"got {key_bias.dtype} of shape {tuple(key_bias.shape)}, strides {key_bias.stride()} on {key_bias.device}"
        )


def _check_ints(name: str, tensor: Tensor, dims: int, length: int, device: torch.device) -> None:
    if tensor.dim() != dims or tensor.shape[0] != length or tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} must have {dims} dimension(s), {length} entries and unit stride along the last, "
            f"got shape {tuple(tensor.shape)}, strides {tensor.stride()}"
        )
    if tensor.dtype not in (torch.int32, torch.int64) or tensor.device != device:
        raise ValueError(f"{name} must be int32 or int64 on {device}, got {tensor.dtype} on {tensor.device}")
