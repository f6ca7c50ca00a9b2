"""Attention of prompts over paged keys and values by cuDNN: on Hopper 1.4 times as fast as the Triton kernel.

cuDNN compiles a plan for each shape. So a step's prompts are padded to one of few numbers of lines, and their rows to
one of few lengths. A line, or 128 rows of a line, that a step does not have costs a program that ends at once.

Its Python package, cudnn-frontend, is optional: `find` gives None without it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from operator import mul
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lorafleet.kernels.scores import Scores

TILE_ROWS = 128
"""Rows of one of cuDNN's programs, which takes as long for fewer."""
MAX_LINES = 256
SPEED = 1.45
"""Of a full program over the Triton kernel's, at long contexts on an H200."""
PAIRS_A_ROW = 25
"""A row of padding takes as long as the Triton kernel for so many pairs of a row and a token that it sees."""
MAX_HEAD_DIM = 256

logger = logging.getLogger(__name__)


@cache
def _cudnn() -> ModuleType | None:
    """CuDNN's package, if it is installed and finds cuDNN itself."""
    try:
        import cudnn
    except ModuleNotFoundError:
        return None
    except (ImportError, OSError, RuntimeError) as error:
        logger.warning("prompts are attended to by Triton kernels, since cuDNN cannot be used: %s", error)
        return None
    module: ModuleType = cudnn
    return module


@dataclass(frozen=True, slots=True)
class Prompts:
    """A step's prompts as cuDNN reads them. What lies behind the last is empty."""

    num_lines: int
    max_rows: int
    """Of a line, and no less than any has."""
    tables: Tensor
    """(num_lines, max_pages) int32: pages of each line, and behind them its first again."""
    num_rows: Tensor
    """(num_lines,) int32."""
    context_lengths: Tensor
    """(num_lines,) int32."""
    starts: Tensor
    """(num_lines + 1,) int32: first row of each line."""
    offsets: dict[int, Tensor] = field(default_factory=dict)
    """`starts` in elements, by the elements between two rows."""


@dataclass(frozen=True, slots=True)
class _Shape:
    """Shapes and rules that a plan is compiled for."""

    num_lines: int
    max_rows: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype
    query_stride: tuple[int, ...]
    out_stride: tuple[int, ...]
    cache_shape: tuple[int, ...]
    cache_stride: tuple[int, ...]
    scaling: float
    window: int | None


class PromptAttention:
    """cuDNN's plans, and the arrays of a step that they read. One stream may use it."""

    def __init__(self, cudnn: ModuleType, *, max_pages: int, page_tokens: int, device: torch.device) -> None:
        """`max_pages`: of the longest sequence."""
        self._cudnn: Any = cudnn
        self._handle = cudnn.create_handle()
        self._plans: dict[_Shape, _Plan | None] = {}
        self._page_tokens = page_tokens
        self._columns = torch.arange(max_pages, dtype=torch.int32, device=device)
        self._tables = torch.zeros((MAX_LINES, max_pages), dtype=torch.int32, device=device)
        self._lengths = torch.zeros((2, MAX_LINES), dtype=torch.int32, device=device)
        self._starts = torch.zeros(MAX_LINES + 1, dtype=torch.int32, device=device)

    def prompts(
        self,
        query_indptr: Tensor,
        context_lengths: Tensor,
        block_tables: Tensor,
        host_rows: Sequence[int],
        host_lengths: Sequence[int],
    ) -> Prompts | None:
        """A step's prompts, or None where the Triton kernel is faster.

        query_indptr: (num_sequences + 1,) int32; context_lengths: (num_sequences,) int32; block_tables:
        (num_sequences, pages) int32; host_rows, host_lengths: rows and context of each sequence. What this returns is
        valid until the next call.
        """
        count = len(host_rows)
        num_lines, max_rows = _rounded(count, 1), _rounded(max(host_rows, default=1), TILE_ROWS)
        tile_rows = [-(-rows // TILE_ROWS) * TILE_ROWS for rows in host_rows]
        seen = [length - rows // 2 for rows, length in zip(host_rows, host_lengths, strict=True)]
        pairs, tile_pairs = sum(map(mul, host_rows, seen)), sum(map(mul, tile_rows, seen))
        padding = num_lines * max_rows - sum(tile_rows)
        if num_lines > MAX_LINES or tile_pairs / SPEED + padding * PAIRS_A_ROW > pairs:
            return None
        lengths = self._lengths[:, :num_lines]
        lengths[:, count:] = 0
        torch.sub(query_indptr[1:], query_indptr[:-1], out=lengths[0, :count])
        lengths[1, :count] = context_lengths
        starts = self._starts[: num_lines + 1]
        starts[: count + 1] = query_indptr
        starts[count + 1 :] = query_indptr[-1]
        # cuDNN loads pages behind a line's last, and a weight of zero times what is not finite is no number. So what
        # stands there is a page of the line itself.
        width, first_pages = min(block_tables.shape[1], self._tables.shape[1]), block_tables[:, :1]
        is_own = self._columns[:width] * self._page_tokens < context_lengths[:, None]
        self._tables[:count] = first_pages
        self._tables[:count, :width] = torch.where(is_own, block_tables[:, :width], first_pages)
        return Prompts(num_lines, max_rows, self._tables[:num_lines], lengths[0], lengths[1], starts)

    def extend(
        self, query: Tensor, keys: Tensor, values: Tensor, prompts: Prompts, out: Tensor, scores: Scores
    ) -> bool:
        """Compute what `attention.extend` does, of the prompts' rows. Return False, and do nothing, where it cannot be.

        Shapes are those of `attention.extend`, whose caller's promises hold here, too.
        """
        _, num_heads, head_dim = query.shape
        if not scores.is_plain or keys.dtype != query.dtype or query.dtype not in (torch.bfloat16, torch.float16):
            return False
        if head_dim > MAX_HEAD_DIM or head_dim % 8:
            return False
        shape = _Shape(
            prompts.num_lines, prompts.max_rows, num_heads, head_dim, query.dtype, query.stride(), out.stride(),
            tuple(keys.shape), keys.stride(), scores.scaling, scores.window,
        )  # fmt: skip
        if shape not in self._plans:
            self._plans[shape] = self._compile(shape)
        plan = self._plans[shape]
        if plan is None:
            return False
        plan.run(query, keys, values, prompts, out)
        return True

    def compile_others(self, max_rows: int, num_pages: int) -> None:
        """Compile plans like those that were used, for other prompts that make steps of `max_rows` rows.

        Plans for smaller steps are compiled when they come. `num_pages`: of the cache that the plans are for.
        """
        used = [shape for shape in self._plans if shape.cache_shape[0] == num_pages]
        for rows in _powers_of_two(TILE_ROWS, 2 * max_rows):
            for lines in _powers_of_two(1, MAX_LINES + 1):
                if not max_rows // 4 <= lines * rows <= 4 * max_rows:
                    continue
                for shape in {replace(shape, num_lines=lines, max_rows=rows) for shape in used} - self._plans.keys():
                    self._plans[shape] = self._compile(shape)

    def _compile(self, shape: _Shape) -> _Plan | None:
        cudnn, max_pages = self._cudnn, self._tables.shape[1]
        dtype = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}[shape.dtype]
        graph = cudnn.pygraph(
            io_data_type=dtype,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=self._handle,
        )

        def ints(argument: int, length: int, width: int = 1) -> Any:
            return graph.tensor(
                uid=argument, dim=[length, 1, width, 1], stride=[width, width, 1, 1], data_type=cudnn.data_type.INT32
            )

        dims = [shape.num_lines, shape.num_heads, shape.max_rows, shape.head_dim]
        (query_row, *query_rest), (out_row, *out_rest) = shape.query_stride, shape.out_stride
        query = graph.tensor(
            uid=_Plan.QUERY,
            dim=dims,
            stride=[shape.max_rows * query_row, query_rest[0], query_row, query_rest[1]],
            data_type=dtype,
        )
        query.set_ragged_offset(ints(_Plan.QUERY_OFFSETS, shape.num_lines + 1))
        cache = {"dim": list(shape.cache_shape), "stride": list(shape.cache_stride), "data_type": dtype}
        # A window counts the row's own token, in cuDNN as here.
        band = {} if shape.window is None else {"diagonal_band_left_bound": shape.window}
        out, _ = graph.sdpa(
            q=query,
            k=graph.tensor(uid=_Plan.KEYS, **cache),
            v=graph.tensor(uid=_Plan.VALUES, **cache),
            generate_stats=False,
            attn_scale=shape.scaling,
            use_padding_mask=True,
            seq_len_q=ints(_Plan.NUM_ROWS, shape.num_lines),
            seq_len_kv=ints(_Plan.CONTEXT_LENGTHS, shape.num_lines),
            diagonal_alignment=cudnn.diagonal_alignment.BOTTOM_RIGHT,
            diagonal_band_right_bound=0,
            **band,
            paged_attention_k_table=ints(_Plan.KEY_TABLES, shape.num_lines, max_pages),
            paged_attention_v_table=ints(_Plan.VALUE_TABLES, shape.num_lines, max_pages),
            paged_attention_max_seq_len_kv=max_pages * shape.cache_shape[2],
        )
        out.set_output(True).set_uid(_Plan.OUT).set_data_type(dtype).set_dim(dims)
        out.set_stride([shape.max_rows * out_row, out_rest[0], out_row, out_rest[1]])
        out.set_ragged_offset(ints(_Plan.OUT_OFFSETS, shape.num_lines + 1))
        try:
            graph.validate()
            graph.build_operation_graph()
            graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
            graph.check_support()
            graph.build_plans()
        except (cudnn.cudnnGraphNotSupportedError, RuntimeError) as error:
            logger.warning("prompts are attended to by Triton kernels, since cuDNN does not serve %s: %s", shape, error)
            return None
        workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=self._tables.device)
        return _Plan(cudnn, self._handle, graph, workspace)


@dataclass(frozen=True, slots=True)
class _Plan:
    """A compiled plan. The numbers are cuDNN's names of its arguments."""

    QUERY = 1
    KEYS = 2
    VALUES = 3
    KEY_TABLES = 4
    VALUE_TABLES = 5
    NUM_ROWS = 6
    CONTEXT_LENGTHS = 7
    QUERY_OFFSETS = 8
    OUT_OFFSETS = 9
    OUT = 10

    cudnn: Any
    handle: Any
    graph: Any
    workspace: Tensor

    def run(self, query: Tensor, keys: Tensor, values: Tensor, prompts: Prompts, out: Tensor) -> None:
        """On the current stream."""
        self.cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream(query.device).cuda_stream)
        tables = prompts.tables.data_ptr()
        arguments = {
            self.QUERY: query.data_ptr(),
            self.KEYS: keys.data_ptr(),
            self.VALUES: values.data_ptr(),
            self.KEY_TABLES: tables,
            self.VALUE_TABLES: tables,
            self.NUM_ROWS: prompts.num_rows.data_ptr(),
            self.CONTEXT_LENGTHS: prompts.context_lengths.data_ptr(),
            self.QUERY_OFFSETS: _offsets(prompts, query.stride(0)).data_ptr(),
            self.OUT_OFFSETS: _offsets(prompts, out.stride(0)).data_ptr(),
            self.OUT: out.data_ptr(),
        }
        self.graph.execute(arguments, self.workspace.data_ptr(), handle=self.handle)


def find(*, max_pages: int, page_tokens: int, device: torch.device) -> PromptAttention | None:
    """Make one for this device, or None where cuDNN's package is missing or the GPU is older than Hopper.

    max_pages: of the longest sequence.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return None
    cudnn = _cudnn()
    if cudnn is None:
        return None
    with torch.cuda.device(device):
        return PromptAttention(cudnn, max_pages=max_pages, page_tokens=page_tokens, device=device)


def _offsets(prompts: Prompts, stride: int) -> Tensor:
    offsets = prompts.offsets.get(stride)
    if offsets is None:
        offsets = prompts.offsets[stride] = prompts.starts * stride
    return offsets


def _rounded(count: int, least: int) -> int:
    """The first of `least`, and of it times powers of two, that is no less than `count`."""
    return max(least, 1 << (count - 1).bit_length())


def _powers_of_two(first: int, end: int) -> list[int]:
    return [1 << power for power in range(first.bit_length() - 1, end.bit_length()) if 1 << power < end]
