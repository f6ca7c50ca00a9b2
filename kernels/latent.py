"""Attention to latents on pages, in Triton: all heads attend to one head of keys, whose first columns are the values.

One row a sequence (decode) and several rows a sequence (extend), as in `attention`: lengths are read on the device, and
nothing synchronises with the host. fp32 accumulation. The CPU path of `workers/model/paged_attention.py` is the torch
twin, with keys in the place of values.

A cache is (num_pages, 1, page_tokens, rank + rotated): a token's latent, then the rotated part of its key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lorafleet.kernels.latent_triton import combine_kernel, decode_kernel, extend_kernel, store_kernel
from lorafleet.kernels.launching import launch
from lorafleet.kernels.tiling import dependent_launch, power_of_two, shared_bytes

MAX_RANK, MAX_ROTATED = 512, 128
MAX_GROUP = 64
"""Heads of one program, which share the rows that it reads."""
MAX_SPLITS = 32
PROGRAMS_PER_PROCESSOR = 2
"""Decode splits contexts until this many programs a multiprocessor have work: so many have room on one."""
MAX_PROGRAMS_PER_PROCESSOR = 8
"""Bound of the splits of long contexts among short ones: programs without work are not free either."""
MIN_PART_TOKENS = 128
"""Shorter parts of a context cost more to combine than they save."""
MAX_PART_TOKENS = 2048
"""Longer parts are split where there is room."""
MIN_BLOCK_SEQUENCES = 256
"""Up to so many sequences, extend is one kernel."""

_BLOCK_TOKENS = 32
_LOG2_E = 1.4426950408889634
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class LatentWorkspace:
    """Scratch memory of split decoding. The launches of one stream may share it; two streams may not."""

    num_processors: int
    """Multiprocessors to keep busy."""
    partials: Tensor
    """float32: unnormalised results of the parts, then their maxima and sums."""

    @classmethod
    def allocate(
        cls, *, num_heads: int, rank: int, device: torch.device, num_processors: int | None = None
    ) -> LatentWorkspace:
        """For any number of sequences of this shape. `num_processors`: default what the device has."""
        if num_processors is None:
            num_processors = torch.cuda.get_device_properties(device).multi_processor_count
        num_programs = MAX_PROGRAMS_PER_PROCESSOR * num_processors
        elements = num_programs * min(num_heads, MAX_GROUP) * (rank + 2)
        return cls(num_processors, torch.empty(elements, dtype=torch.float32, device=device))

    def splits(self, num_groups: int) -> tuple[int, int]:
        """(most parts, parts that keep the device busy) of a context, for so many (sequence, group of heads) pairs.

        Both are powers of two.
        """
        busy = min(MAX_SPLITS, _floor_power_of_two(PROGRAMS_PER_PROCESSOR * self.num_processors // num_groups))
        most = _floor_power_of_two(MAX_PROGRAMS_PER_PROCESSOR * self.num_processors // num_groups)
        return min(MAX_SPLITS, most), busy


class Angles(Protocol):
    """Angles of rows: `cos` and `sin` are (rows, rotated / 2) with the same strides."""

    @property
    def cos(self) -> Tensor: ...
    @property
    def sin(self) -> Tensor: ...
    @property
    def is_interleaved(self) -> bool:
        """A pair is two neighbours; otherwise element i and element rotated / 2 + i."""


def store(
    latents: Tensor,
    rotated: Tensor,
    keys: Tensor,
    row_pages: Tensor,
    row_offsets: Tensor,
    query_rotated: Tensor | None = None,
    angles: Angles | None = None,
) -> None:
    """Write rows to their places on pages. With angles the second parts are rotated, and those of queries in place.

    latents: (rows, rank); rotated: (rows, rotated); rows may be strided. keys: the cache. row_pages, row_offsets:
    (rows,) int32, page of each row and token of that page. The caller guarantees that the cache has them.
    query_rotated: (rows, heads, rotated), rows and heads may be strided. Raises ValueError.
    """
    _check_cache(keys, latents.shape[-1], rotated.shape[-1])
    for name, tensor in (("latents", latents), ("rotated", rotated)):
        if tensor.dim() != 2 or tensor.shape[0] != row_pages.shape[0] or tensor.stride(1) != 1:
            raise ValueError(
                f"{name} must be ({row_pages.shape[0]}, width) with unit stride along the last dimension, got "
                f"{tuple(tensor.shape)} with strides {tensor.stride()}"
            )
        _check_like(name, tensor, keys)
    for name, tensor in (("row_pages", row_pages), ("row_offsets", row_offsets)):
        _check_ints(name, tensor, 1, latents.shape[0], keys.device)
    num_rows, rank, width = latents.shape[0], latents.shape[1], rotated.shape[1]
    query = query_rotated if angles is not None and query_rotated is not None else rotated[:, None]
    if angles is not None:
        _check_rotation(query_rotated, angles, num_rows, width, keys)
    if num_rows == 0:
        return
    cos, sin = (rotated, rotated) if angles is None else (angles.cos, angles.sin)
    launch(store_kernel, (num_rows,))(
        latents,
        rotated,
        keys,
        row_pages,
        row_offsets,
        query,
        cos,
        sin,
        latents.stride(0),
        rotated.stride(0),
        keys.stride(0),
        query.stride(0),
        query.stride(1),
        cos.stride(0),
        cos.stride(1),
        NUM_HEADS=query.shape[1],
        BLOCK_HEADS=power_of_two(query.shape[1]),
        ROTATES=angles is not None,
        IS_INTERLEAVED=angles is not None and angles.is_interleaved,
        RANK=rank,
        BLOCK_RANK=power_of_two(rank),
        ROTATED=width,
        BLOCK_ROTATED=max(2, power_of_two(width)),
        num_warps=4,
    )


def _check_rotation(query: Tensor | None, angles: Angles, num_rows: int, width: int, keys: Tensor) -> None:
    if query is None or query.dim() != 3 or query.shape[::2] != (num_rows, width) or query.stride(2) != 1:
        shape = None if query is None else tuple(query.shape)
        raise ValueError(f"query_rotated must be ({num_rows}, heads, {width}) with unit stride, got {shape}")
    _check_like("query_rotated", query, keys)
    for name, tensor in (("cos", angles.cos), ("sin", angles.sin)):
        if width % 2 or tensor.shape != (num_rows, width // 2) or tensor.stride() != angles.cos.stride():
            raise ValueError(
                f"{name} must be ({num_rows}, {width} / 2) with the strides of cos, got {tuple(tensor.shape)} with "
                f"{tensor.stride()}"
            )
        if tensor.dtype not in _DTYPES or tensor.device != keys.device:
            raise ValueError(f"{name} must be of floats on {keys.device}, got {tensor.dtype} on {tensor.device}")


def decode(
    query: Tensor,
    query_rotated: Tensor,
    keys: Tensor,
    block_tables: Tensor,
    context_lengths: Tensor,
    out: Tensor,
    workspace: LatentWorkspace,
    *,
    scaling: float,
    window: int | None = None,
) -> None:
    """Compute out[s, h] = softmax((query[s, h], query_rotated[s, h]) . K[s] * scaling) L[s] over a sequence's tokens.

    K is what the sequence's pages hold, and L the latents of that. Both query and out are (num_sequences, num_heads,
    rank), query_rotated is (num_sequences, num_heads, rotated); rows and heads may be strided. The cache is `keys`.
    Tables are (num_sequences, max_pages), lengths (num_sequences,); both are int32 or int64. A length counts the
    query's own token. Zeros are written where it is 0. With `window`, only so many last tokens are read.

    Raises ValueError for a wrong shape, stride, dtype or device. The caller guarantees that lengths fit the tables and
    page ids the cache.
    """
    num_sequences, num_heads, rank = query.shape
    _check(query, query_rotated, keys, block_tables, context_lengths, out, num_sequences, window)
    if num_sequences == 0:
        return
    group = _group(num_heads, _most_heads(query, keys.shape[3]))
    num_splits, busy_splits = workspace.splits(num_sequences * (num_heads // group))
    needed = num_sequences * num_heads * num_splits * (rank + 2) if num_splits > 1 else 0
    if workspace.partials.numel() < needed or workspace.partials.device != query.device:
        raise ValueError(
            f"the workspace on {workspace.partials.device} has {workspace.partials.numel()} elements; {num_heads} "
            f"heads and a rank of {rank} on {query.device} need {needed}"
        )
    block_group = max(16, power_of_two(group))
    block_tokens, num_warps, num_stages = _decode_tiling(query, keys.shape[3], block_group)
    pdl = dependent_launch(query)
    launch(decode_kernel, (num_heads // group, num_sequences, num_splits))(
        query,
        query_rotated,
        keys,
        block_tables,
        context_lengths,
        out,
        workspace.partials,
        *_strides(query, query_rotated, out),
        block_tables.stride(0),
        keys.stride(0),
        scaling * _LOG2_E,
        window or 0,
        HAS_WINDOW=window is not None,
        NUM_SPLITS=num_splits,
        BUSY_SPLITS=busy_splits,
        MIN_PART=MIN_PART_TOKENS,
        MAX_PART=MAX_PART_TOKENS,
        NUM_HEADS=num_heads,
        GROUP=group,
        BLOCK_GROUP=block_group,
        RANK=rank,
        BLOCK_RANK=_block(rank),
        ROTATED=query_rotated.shape[2],
        BLOCK_ROTATED=_block(query_rotated.shape[2]),
        PAGE_TOKENS=keys.shape[2],
        BLOCK_TOKENS=block_tokens,
        STAGES=num_stages,
        PDL=pdl,
        num_warps=num_warps,
        launch_pdl=pdl,
    )
    if num_splits > 1:
        launch(combine_kernel, (num_heads, num_sequences))(
            context_lengths,
            workspace.partials,
            out,
            out.stride(0),
            out.stride(1),
            window or 0,
            HAS_WINDOW=window is not None,
            NUM_SPLITS=num_splits,
            BUSY_SPLITS=busy_splits,
            MIN_PART=MIN_PART_TOKENS,
            MAX_PART=MAX_PART_TOKENS,
            BLOCK_TOKENS=block_tokens,
            RANK=rank,
            BLOCK_RANK=min(128, power_of_two(rank)),
            PDL=pdl,
            num_warps=4,
            launch_pdl=pdl,
        )


def extend(
    query: Tensor,
    query_rotated: Tensor,
    keys: Tensor,
    block_tables: Tensor,
    context_lengths: Tensor,
    query_indptr: Tensor,
    out: Tensor,
    *,
    scaling: float,
    window: int | None = None,
) -> None:
    """Compute causal attention of each sequence's last rows over all its tokens, which lie in the cache already.

    Both query and out are (num_rows, num_heads, rank), query_rotated is (num_rows, num_heads, rotated). A sequence's
    first row is in query_indptr, (num_sequences + 1,) int32 or int64. Only rows in [query_indptr[0], query_indptr[-1])
    are computed. Row i of a sequence's n rows attends to its first `context_length - n + i + 1` tokens, or the last
    `window` of those. The rest is as in `decode`.
    """
    num_sequences = query_indptr.shape[0] - 1
    _check(query, query_rotated, keys, block_tables, context_lengths, out, num_sequences, window)
    _check_ints("query_indptr", query_indptr, 1, num_sequences + 1, query.device)
    num_rows, num_heads, rank = query.shape
    if num_sequences == 0 or num_rows == 0:
        return
    block_rows, block_tokens, num_warps, num_stages = _extend_tiling(query, keys.shape[3])
    group = _group(num_heads, block_rows)
    tile_rows = block_rows // group
    # Every sequence may end with a tile that is not full.
    num_tiles = num_rows // tile_rows + num_sequences
    launch(extend_kernel, (num_heads // group, num_tiles))(
        query,
        query_rotated,
        keys,
        block_tables,
        context_lengths,
        query_indptr,
        out,
        *_strides(query, query_rotated, out),
        block_tables.stride(0),
        keys.stride(0),
        scaling * _LOG2_E,
        window or 0,
        num_sequences,
        HAS_WINDOW=window is not None,
        GROUP=group,
        TILE_ROWS=tile_rows,
        BLOCK_ROWS=block_rows,
        RANK=rank,
        BLOCK_RANK=_block(rank),
        ROTATED=query_rotated.shape[2],
        BLOCK_ROTATED=_block(query_rotated.shape[2]),
        PAGE_TOKENS=keys.shape[2],
        BLOCK_TOKENS=block_tokens,
        BLOCK_SEQUENCES=max(MIN_BLOCK_SEQUENCES, power_of_two(num_sequences)),
        STAGES=num_stages,
        num_warps=num_warps,
    )


def _most_heads(query: Tensor, width: int) -> int:
    """Heads of one program at most, by the memory that their queries take beside a block of tokens."""
    if query.element_size() == 4:
        return 16
    return MAX_GROUP if _fits(query, width, MAX_GROUP + 2 * _BLOCK_TOKENS) else 32


def _fits(query: Tensor, width: int, num_rows: int) -> bool:
    """Return True if so many rows of a page, and what the compiler adds, fit the shared memory of a program."""
    return shared_bytes(query) >= (num_rows + 8) * width * query.element_size()


def _decode_tiling(query: Tensor, width: int, block_group: int) -> tuple[int, int, int]:
    """(tokens a step, warps, pipeline stages).

    Five stages have two blocks in flight, three have one: the first of them load page ids. Two programs share a Hopper
    multiprocessor where there are 16 heads.
    """
    if query.element_size() == 4:
        # No tensor cores for exact fp32: small tiles, which fit the registers.
        return 16, 4, 1
    in_flight = 3 * _BLOCK_TOKENS + (block_group if block_group > 16 else 0)
    return _BLOCK_TOKENS, 4 if block_group == 16 else 8, 5 if _fits(query, width, in_flight) else 3


def _extend_tiling(query: Tensor, width: int) -> tuple[int, int, int, int]:
    """(rows a tile, tokens a step, warps, pipeline stages). Rows are (token, head) pairs."""
    if query.element_size() == 4:
        return 16, 16, 4, 1
    if _fits(query, width, 64 + 2 * _BLOCK_TOKENS):
        return 64, _BLOCK_TOKENS, 8, 5 if _fits(query, width, 64 + 3 * _BLOCK_TOKENS) else 3
    return 16, _BLOCK_TOKENS, 4, 3


def _group(num_heads: int, most: int) -> int:
    """Heads of one program: as many as divide all of them, and no more than `most`."""
    return max(group for group in range(1, min(num_heads, most) + 1) if num_heads % group == 0)


def _block(width: int) -> int:
    return max(16, power_of_two(width))


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(tensor.stride(dim) for tensor in tensors for dim in (0, 1))


def _floor_power_of_two(n: int) -> int:
    return 1 << max(0, n.bit_length() - 1)


def _check(
    query: Tensor,
    query_rotated: Tensor,
    keys: Tensor,
    block_tables: Tensor,
    context_lengths: Tensor,
    out: Tensor,
    num_sequences: int,
    window: int | None,
) -> None:
    if query.dim() != 3 or query_rotated.dim() != 3 or query_rotated.shape[:2] != query.shape[:2]:
        raise ValueError(
            f"query must be (rows, heads, rank) and query_rotated (rows, heads, rotated), got {tuple(query.shape)} and "
            f"{tuple(query_rotated.shape)}"
        )
    _check_cache(keys, query.shape[2], query_rotated.shape[2])
    if out.shape != query.shape:
        raise ValueError(f"out must have shape {tuple(query.shape)}, got {tuple(out.shape)}")
    for name, tensor in (("query", query), ("query_rotated", query_rotated), ("out", out)):
        if tensor.stride(2) != 1:
            raise ValueError(f"{name} must have unit stride along its last dimension, got strides {tensor.stride()}")
        _check_like(name, tensor, keys)
    _check_ints("block_tables", block_tables, 2, num_sequences, keys.device)
    _check_ints("context_lengths", context_lengths, 1, num_sequences, keys.device)
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")


def _check_cache(keys: Tensor, rank: int, rotated: int) -> None:
    if keys.dim() != 4 or keys.shape[1] != 1 or keys.shape[3] != rank + rotated:
        raise ValueError(
            f"keys must be (pages, 1, page_tokens, {rank} + {rotated}), as the other arguments are, got "
            f"{tuple(keys.shape)}"
        )
    if not 0 < rank <= MAX_RANK or not 0 < rotated <= MAX_ROTATED:
        raise ValueError(
            f"latents must have at most {MAX_RANK} elements and rotated parts {MAX_ROTATED}, got {rank} and {rotated}"
        )
    if keys.stride()[2:] != (keys.shape[3], 1):
        raise ValueError(f"the tokens of a page must be contiguous, got strides {keys.stride()}")
    if keys.dtype not in _DTYPES:
        raise ValueError(f"keys must be {', '.join(map(str, _DTYPES))}, got {keys.dtype}")


def _check_like(name: str, tensor: Tensor, keys: Tensor) -> None:
    if tensor.dtype != keys.dtype or tensor.device != keys.device:
        raise ValueError(
            f"{name} must be {keys.dtype} on {keys.device}, as keys are, got {tensor.dtype} on {tensor.device}"
        )


def _check_ints(name: str, tensor: Tensor, dims: int, length: int, device: torch.device) -> None:
    if tensor.dim() != dims or tensor.shape[0] != length or tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} must have {dims} dimension(s), {length} entries and unit stride along the last, "
            f"got shape {tuple(tensor.shape)}, strides {tensor.stride()}"
        )
    if tensor.dtype not in (torch.int32, torch.int64) or tensor.device != device:
        raise ValueError(f"{name} must be int32 or int64 on {device}, got {tensor.dtype} on {tensor.device}")
