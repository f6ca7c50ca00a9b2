"""Paged attention against float64: in Triton's interpreter without a GPU, and on the GPU where there is one."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lorafleet.kernels import attention_cudnn
from lorafleet.kernels.attention import DecodeWorkspace, decode, extend
from lorafleet.kernels.attention_cudnn import PromptAttention
from lorafleet.kernels.scores import Scores

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
SHAPES = {
    "llama": (8, 2, 64, 16),
    "grouped7": (7, 1, 64, 16),
    "dim80": (2, 2, 80, 32),
    "dim96": (2, 1, 96, 16),
    "dim192": (4, 1, 192, 64),
    "dim256": (2, 1, 256, 16),
    "dim512": (2, 1, 512, 16),
}
"""Query heads, KV heads, head_dim, tokens a page."""


@dataclass
class Cache:
    """Sequences' keys and values in shuffled pages; NaN wherever no token lies, and table tails that lead nowhere."""

    keys: Tensor
    values: Tensor
    tables: Tensor
    lengths: Tensor
    tokens: list[tuple[Tensor, Tensor]]
    """Of each sequence: (length, num_kv_heads, head_dim) keys and values in float64."""


def make_cache(lengths: list[int], shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int = 0) -> Cache:
    _, num_kv_heads, head_dim, page_tokens = shape
    generator = torch.Generator().manual_seed(seed)
    num_pages = [-(-length // page_tokens) for length in lengths]
    pages = torch.randperm(sum(num_pages) + 3, generator=generator)
    tables = torch.full((len(lengths), max(num_pages) + 1), 1 << 30, dtype=torch.int32)
    keys = torch.full((len(pages), num_kv_heads, page_tokens, head_dim), float("nan"), dtype=dtype)
    values = keys.clone()
    tokens = []
    for index, (length, count) in enumerate(zip(lengths, num_pages, strict=True)):
        own, pages = pages[:count], pages[count:]
        tables[index, :count] = own
        k, v = (torch.randn(length, num_kv_heads, head_dim, generator=generator).to(dtype) for _ in range(2))
        positions = torch.arange(length)
        keys[own[positions // page_tokens], :, positions % page_tokens] = k
        values[own[positions // page_tokens], :, positions % page_tokens] = v
        tokens.append((k.double(), v.double()))
    return Cache(
        keys.to(DEVICE),
        values.to(DEVICE),
        tables.to(DEVICE),
        torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        tokens,
    )


def attend(
    query: Tensor,
    tokens: tuple[Tensor, Tensor],
    scaling: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    """The oracle: (rows, heads, head_dim) of the last rows of one sequence, in float64."""
    k, v = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in tokens)
    rows, length = query.shape[0], k.shape[0]
    distance = torch.arange(length - rows, length)[:, None] - torch.arange(length)
    hidden = (distance < 0) | (distance >= (window or length))
    scores = torch.einsum("rhd,thd->hrt", query.double().cpu(), k) * scaling
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if key_bias is not None:
        scores = scores + key_bias[:, None, :length].double().cpu()
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        columns = sinks.double().cpu()[:, None, None].expand(-1, rows, 1)
        weights = torch.cat([scores, columns], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1) if length else scores
    return torch.einsum("hrt,thd->rhd", weights, v)


def random_query(rows: int, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    """A strided view, as of a fused q/k/v product."""
    num_heads, num_kv_heads, head_dim, _ = shape
    qkv = torch.randn(rows, num_heads + 2 * num_kv_heads, head_dim, generator=torch.Generator().manual_seed(rows))
    return qkv.to(dtype).to(DEVICE)[:, :num_heads]


def poisoned(query: Tensor) -> Tensor:
    return torch.full(query.shape, float("nan"), dtype=query.dtype, device=query.device)


def workspace_for(shape: tuple[int, int, int, int], num_processors: int) -> DecodeWorkspace:
    num_heads, num_kv_heads, head_dim, _ = shape
    return DecodeWorkspace.allocate(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, device=DEVICE, num_processors=num_processors
    )


def assert_near(actual: Tensor, expected: Tensor) -> None:
    assert actual.isfinite().all()
    error = (actual.double().cpu() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error < TOLERANCE[actual.dtype], float(error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("num_processors", [0, 8], ids=["whole", "split"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.slow
def test_decode_matches_float64(shape: str, num_processors: int, window: int | None, dtype: torch.dtype) -> None:
    lengths = [1, 0, 33, 530]
    cache = make_cache(lengths, SHAPES[shape], dtype)
    query = random_query(len(lengths), SHAPES[shape], dtype)
    workspace = workspace_for(SHAPES[shape], num_processors)
    out = poisoned(query)
    decode(query, cache.keys, cache.values, cache.tables, cache.lengths, out, workspace, scaling=0.3, window=window)
    expected = torch.cat([attend(query[i : i + 1], cache.tokens[i], 0.3, window) for i in range(len(lengths))])
    assert_near(out, expected)
    assert not out[1].any()
    assert not workspace.arrivals.any(), "the next launch would find what this one left"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.slow
def test_extend_matches_float64(shape: str, window: int | None, dtype: torch.dtype) -> None:
    """Chunks of several lengths, the first three rows of the batch being others'."""
    rows, lengths = [5, 1, 0, 33, 7], [5, 30, 16, 40, 75]
    cache = make_cache(lengths, SHAPES[shape], dtype)
    query = random_query(3 + sum(rows), SHAPES[shape], dtype)
    starts = torch.tensor([3, *rows]).cumsum(0)
    out = poisoned(query)
    extend(
        query,
        cache.keys,
        cache.values,
        cache.tables,
        cache.lengths,
        starts.to(torch.int32).to(DEVICE),
        out,
        scaling=0.2,
        window=window,
    )
    assert out[:3].isnan().all()
    for index, (start, count) in enumerate(zip(starts.tolist(), rows, strict=False)):
        if count:
            mine = slice(start, start + count)
            assert_near(out[mine], attend(query[mine], cache.tokens[index], 0.2, window))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("softcap", "has_sinks"), [(2.0, False), (None, True), (2.0, True)], ids=str)
@pytest.mark.parametrize("shape", ["llama", "grouped7", "dim80"])
@pytest.mark.slow
def test_capped_scores_and_sinks_match_float64(
    shape: str, softcap: float | None, has_sinks: bool, window: int | None, dtype: torch.dtype
) -> None:
    """Scores of several times the cap; sinks from hardly any weight to nearly all; decodes whole and in parts."""
    rows, lengths = [5, 1, 0, 33], [5, 30, 0, 530]
    cache = make_cache(lengths, SHAPES[shape], dtype)
    num_heads = SHAPES[shape][0]
    sinks = torch.linspace(-5, 9, num_heads).to(dtype).to(DEVICE) if has_sinks else None
    query = random_query(sum(rows), SHAPES[shape], dtype)
    out = poisoned(query)
    starts = torch.tensor([0, *rows]).cumsum(0)
    indptr = starts.to(torch.int32).to(DEVICE)
    kv = cache.keys, cache.values, cache.tables, cache.lengths
    extend(query, *kv, indptr, out, scaling=0.5, window=window, softcap=softcap, sinks=sinks)
    for index, (start, count) in enumerate(zip(starts.tolist(), rows, strict=False)):
        if count:
            mine = slice(start, start + count)
            assert_near(out[mine], attend(query[mine], cache.tokens[index], 0.5, window, softcap, sinks))
    query = query[: len(lengths)]
    for num_processors in (0, 8):
        out = poisoned(query)
        workspace = workspace_for(SHAPES[shape], num_processors)
        decode(query, *kv, out, workspace, scaling=0.5, window=window, softcap=softcap, sinks=sinks)
        expected = [attend(query[i : i + 1], cache.tokens[i], 0.5, window, softcap, sinks) for i in range(len(lengths))]
        assert_near(out, torch.cat(expected))
        assert not out[2].any()


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
@pytest.mark.parametrize(("softcap", "window"), [(None, None), (2.0, 40)], ids=str)
@pytest.mark.parametrize("shape", ["llama", "grouped7", "dim96"])
@pytest.mark.slow
def test_a_bias_by_head_and_key_matches_float64(
    shape: str, softcap: float | None, window: int | None, dtype: torch.dtype
) -> None:
    """As ALiBi has it, and as long as the longest context, which is no multiple of a block."""
    rows, lengths = [5, 1, 0, 33], [5, 30, 0, 331]
    cache = make_cache(lengths, SHAPES[shape], dtype)
    num_heads = SHAPES[shape][0]
    slopes = 2.0 ** -torch.linspace(0.5, 6, num_heads)
    key_bias = (slopes[:, None] * torch.arange(331)).to(DEVICE)
    query = random_query(sum(rows), SHAPES[shape], dtype)
    out = poisoned(query)
    starts = torch.tensor([0, *rows]).cumsum(0)
    kv = cache.keys, cache.values, cache.tables, cache.lengths
    indptr = starts.to(torch.int32).to(DEVICE)
    extend(query, *kv, indptr, out, scaling=0.2, window=window, softcap=softcap, key_bias=key_bias)
    for index, (start, count) in enumerate(zip(starts.tolist(), rows, strict=False)):
        if count:
            mine = slice(start, start + count)
            expected = attend(query[mine], cache.tokens[index], 0.2, window, softcap, None, key_bias)
            assert_near(out[mine], expected)
    query = query[: len(lengths)]
    for num_processors in (0, 8):
        out = poisoned(query)
        workspace = workspace_for(SHAPES[shape], num_processors)
        decode(query, *kv, out, workspace, scaling=0.2, window=window, softcap=softcap, key_bias=key_bias)
        each = [attend(query[i : i + 1], cache.tokens[i], 0.2, window, softcap, None, key_bias) for i in range(4)]
        assert_near(out, torch.cat(each))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.slow
def test_lines_that_no_sequence_has_cost_nothing_and_padding_is_zero(window: int | None, dtype: torch.dtype) -> None:
    """As a graph has them: lines for decodes, then for prompts, and one with the padding rows, which attend to nothing.

    On a GPU the launches are captured while all rows are padding.
    """
    shape = SHAPES["llama"]
    decodes, prompts, padding = [30, 1, 0, 0, 0, 0], [(5, 5), (20, 75), (0, 0), (0, 0)], 9
    cache = make_cache([*decodes, *(length for _, length in prompts), 0], shape, dtype)
    starts = torch.tensor([2, *(rows for rows, _ in prompts), padding]).cumsum(0).to(torch.int32).to(DEVICE)
    num_rows = int(starts[-1])
    query, num_lines = random_query(num_rows, shape, dtype), len(decodes)
    lengths, indptr = torch.zeros_like(cache.lengths), torch.zeros_like(starts)
    indptr[-1] = num_rows
    out, workspace = poisoned(query), workspace_for(shape, 8)

    def run() -> None:
        paged = (cache.keys, cache.values)
        lines = (cache.tables[:num_lines], lengths[:num_lines])
        decode(query[:num_lines], *paged, *lines, out[:num_lines], workspace, scaling=0.2, window=window)
        extend(query, *paged, cache.tables[num_lines:], lengths[num_lines:], indptr, out, scaling=0.2, window=window)

    run()
    assert not out.any()
    if DEVICE.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    lengths.copy_(cache.lengths)
    indptr.copy_(starts)
    out.fill_(float("nan"))
    run()
    for index in range(2):
        assert_near(out[index : index + 1], attend(query[index : index + 1], cache.tokens[index], 0.2, window))
    for index, (start, (rows, _)) in enumerate(zip(starts.tolist(), prompts, strict=False)):
        if rows:
            mine = slice(start, start + rows)
            assert_near(out[mine], attend(query[mine], cache.tokens[num_lines + index], 0.2, window))
    assert not out[num_rows - padding :].any()


@pytest.mark.slow
def test_long_tables_are_int64_and_results_do_not_depend_on_their_width() -> None:
    shape = SHAPES["llama"]
    cache = make_cache([200, 300], shape, torch.float32)
    query = random_query(2, shape, torch.float32)
    outs = []
    for tables, lengths in ((cache.tables, cache.lengths), (cache.tables.long().repeat(1, 9), cache.lengths.long())):
        outs.append(poisoned(query))
        decode(query, cache.keys, cache.values, tables, lengths, outs[-1], workspace_for(shape, 16), scaling=0.3)
    assert torch.equal(*outs)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"query": torch.zeros(2, 3, 64)}, "not a multiple of 2 KV heads"),
        ({"query": torch.zeros(2, 4, 32)}, "head_dim must be that of the cache"),
        ({"query": torch.zeros(2, 4, 64, dtype=torch.float16)}, "keys must be torch.float16"),
        ({"query": torch.zeros(2, 4, 128, device=DEVICE)[..., ::2]}, "unit stride"),
        ({"values": torch.zeros(4, 2, 8, 64)}, "keys and values must have one shape"),
        ({"block_tables": torch.zeros(3, 2, dtype=torch.int32)}, "block_tables must have 2 dimension"),
        ({"block_tables": torch.zeros(2, 2)}, "block_tables must be int32 or int64"),
        ({"context_lengths": torch.zeros(3, dtype=torch.int32)}, "context_lengths must have"),
        ({"out": torch.zeros(2, 4, 32)}, "out must have shape"),
        ({"window": 0}, "window must be at least 1"),
        ({"softcap": 0.0}, "softcap must be more than 0"),
        ({"sinks": torch.zeros(2)}, "sinks must be .4,. and contiguous"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_decode_refuses(change: dict[str, object], complaint: str) -> None:
    arguments: dict[str, object] = {
        "query": torch.zeros(2, 4, 64),
        "keys": torch.zeros(4, 2, 16, 64),
        "values": torch.zeros(4, 2, 16, 64),
        "block_tables": torch.zeros(2, 2, dtype=torch.int32),
        "context_lengths": torch.ones(2, dtype=torch.int32),
        "out": torch.zeros(2, 4, 64),
        "window": None,
        **change,
    }
    arguments = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=complaint):
        decode(**arguments, workspace=workspace_for((4, 2, 64, 16), 0), scaling=1.0)  # type: ignore[arg-type]


def test_decode_refuses_a_workspace_that_is_too_small() -> None:
    cache = make_cache([300, 300], (4, 2, 64, 16), torch.float32)
    query = random_query(2, (4, 2, 64, 16), torch.float32)
    small = DecodeWorkspace(16, torch.empty(8, device=DEVICE), torch.zeros(16, dtype=torch.int32, device=DEVICE))
    with pytest.raises(ValueError, match="the workspace on"):
        decode(query, cache.keys, cache.values, cache.tables, cache.lengths, poisoned(query), small, scaling=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[9000, 17, 2500], [700] * 40], ids=["uneven", "even"])
def test_split_decoding_gives_the_same_bits_every_time(lengths: list[int]) -> None:
    shape = (32, 8, 128, 16)
    cache = make_cache(lengths, shape, torch.bfloat16)
    query = random_query(len(lengths), shape, torch.bfloat16)
    workspace = workspace_for(shape, 500)
    assert workspace.splits(8 * len(lengths))[0] > 1
    first = poisoned(query)
    for run in range(300):
        out = first if run == 0 else poisoned(query)
        decode(query, cache.keys, cache.values, cache.tables, cache.lengths, out, workspace, scaling=0.1)
        assert torch.equal(out, first), f"run {run}"
    expected = torch.cat([attend(query[i : i + 1], cache.tokens[i], 0.1, None) for i in range(len(lengths))])
    assert_near(first, expected)


@pytest.mark.gpu
def test_a_captured_decode_replays_with_other_lengths() -> None:
    shape = (32, 8, 128, 16)
    cache = make_cache([1500, 1500, 1500], shape, torch.bfloat16)
    query = random_query(3, shape, torch.bfloat16)
    out, workspace = poisoned(query), workspace_for(shape, 132)
    lengths = torch.zeros(3, dtype=torch.int32, device=DEVICE)

    def run() -> None:
        decode(query, cache.keys, cache.values, cache.tables, lengths, out, workspace, scaling=0.1)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for wanted in ([1500, 3, 0], [0, 0, 1], [700, 1500, 64]):
        lengths.copy_(torch.tensor(wanted))
        out.fill_(float("nan"))
        graph.replay()
        for index, length in enumerate(wanted):
            k, v = cache.tokens[index]
            expected = attend(query[index : index + 1], (k[:length], v[:length]), 0.1, None)
            assert_near(out[index : index + 1], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(32, 8, 128, 16), (32, 32, 128, 16), (28, 4, 128, 16), (16, 2, 256, 64)], ids=str)
def test_extend_of_long_chunks_matches_float64(shape: tuple[int, int, int, int]) -> None:
    rows, lengths = [512, 300, 1, 77], [512, 2300, 1000, 77]
    cache = make_cache(lengths, shape, torch.bfloat16)
    query = random_query(sum(rows), shape, torch.bfloat16)
    starts = torch.tensor([0, *rows]).cumsum(0)
    for window in (None, 200):
        out = poisoned(query)
        extend(
            query,
            cache.keys,
            cache.values,
            cache.tables,
            cache.lengths,
            starts.to(torch.int32).to(DEVICE),
            out,
            scaling=0.1,
            window=window,
        )
        for index, (start, count) in enumerate(zip(starts.tolist(), rows, strict=False)):
            mine = slice(start, start + count)
            assert_near(out[mine], attend(query[mine], cache.tokens[index], 0.1, window))


def cudnn_for(cache: Cache) -> PromptAttention:
    page_tokens = cache.keys.shape[2]
    found = attention_cudnn.find(max_pages=cache.tables.shape[1] + 5, page_tokens=page_tokens, device=DEVICE)
    if found is None:
        pytest.skip("cuDNN's package is not installed")
    return found


CUDNN_SHAPES = {**{name: SHAPES[name] for name in ("llama", "grouped7", "dim96", "dim256")}, "wide": (32, 8, 128, 16)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("shape", CUDNN_SHAPES)
@pytest.mark.gpu
def test_cudnn_matches_float64(shape: str, window: int | None, dtype: torch.dtype) -> None:
    """Chunks of several lengths behind contexts, in two steps. As in a worker, the rest of a sequence's last page is
    finite; other pages are not, and tables' tails lead nowhere.
    """
    steps = [([5, 100, 33, 300, 77], [5, 2130, 33, 3340, 3577]), ([129, 200], [129, 1800])]
    caches = [make_cache(lengths, CUDNN_SHAPES[shape], dtype) for _, lengths in steps]
    cudnn = cudnn_for(max(caches, key=lambda cache: cache.tables.shape[1]))
    for (rows, lengths), cache in zip(steps, caches, strict=True):
        own = cache.tables[cache.tables < len(cache.keys)].long()
        keys, values = (each.index_copy(0, own, each[own].nan_to_num(3.0)) for each in (cache.keys, cache.values))
        query = random_query(3 + sum(rows), CUDNN_SHAPES[shape], dtype)
        starts = torch.tensor([3, *rows]).cumsum(0)
        prompts = cudnn.prompts(starts.to(torch.int32).to(DEVICE), cache.lengths, cache.tables, rows, lengths)
        assert prompts is not None
        out = poisoned(query)
        assert cudnn.extend(query, keys, values, prompts, out, Scores(0.2, window))
        assert out[:3].isnan().all()
        for index, (start, count) in enumerate(zip(starts.tolist(), rows, strict=False)):
            mine = slice(start, start + count)
            assert_near(out[mine], attend(query[mine], cache.tokens[index], 0.2, window))


def test_steps_as_cudnn_reads_them() -> None:
    """Lines and rows are rounded up; what lies behind a step's own is empty, whatever the step before left."""
    cudnn: Any = SimpleNamespace(create_handle=object)
    attention = PromptAttention(cudnn, max_pages=300, page_tokens=4, device=torch.device("cpu"))
    for rows, padded in (([300, 200, 400], (4, 512)), ([100], (1, 128)), ([130, 500], (2, 512)), ([240] * 5, (8, 256))):
        starts = torch.tensor([7, *rows]).cumsum(0).to(torch.int32)
        lengths = torch.tensor([count + 700 for count in rows], dtype=torch.int32)
        tables = torch.arange(400 * len(rows), dtype=torch.int32).view(-1, 400)
        prompts = attention.prompts(starts, lengths, tables, rows, lengths.tolist())
        assert prompts is not None
        assert (prompts.num_lines, prompts.max_rows) == padded
        empty = [0] * (padded[0] - len(rows))
        assert prompts.num_rows.tolist() == rows + empty
        assert prompts.context_lengths.tolist() == lengths.tolist() + empty
        assert prompts.starts.tolist() == starts.tolist() + [7 + sum(rows)] * len(empty)
        for table, found, length in zip(tables, prompts.tables, lengths, strict=False):
            num_pages = -(-int(length) // 4)
            assert torch.equal(found[:num_pages], table[:num_pages])
            assert (found[num_pages:] == table[0]).all(), "where cuDNN may look, but not for this line's tokens"
    # Many lines of padding, and rows that fill a fraction of a program each.
    for rows, seen in (([1] * 60 + [4000], 0), ([5] * 64, 3000)):
        starts = torch.tensor([0, *rows]).cumsum(0).to(torch.int32)
        lengths = torch.tensor(rows, dtype=torch.int32) + seen
        tables = torch.zeros(len(rows), 2, dtype=torch.int32)
        assert attention.prompts(starts, lengths, tables, rows, lengths.tolist()) is None
