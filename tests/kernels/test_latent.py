"""Attention to latents against float64: in Triton's interpreter without a GPU, and on the GPU where there is one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lorafleet.kernels import latent
from lorafleet.kernels.latent import LatentWorkspace, decode, extend, store
from lorafleet.workers.model.latent_rotation import Angles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
Shape = tuple[int, int, int, int]
SHAPES: dict[str, Shape] = {"small": (4, 32, 16, 16), "odd": (5, 40, 8, 16)}
"""Heads, rank, width of the rotated part, tokens a page."""
LARGE: dict[str, Shape] = {
    "lite": (16, 512, 64, 16),
    "glm": (20, 512, 64, 16),
    "minicpm": (40, 256, 32, 16),
    "v3": (128, 512, 64, 64),
}
EVERY_SHAPE = [*SHAPES, *(pytest.param(name, marks=pytest.mark.gpu) for name in LARGE)]


@dataclass
class Cache:
    """Sequences' rows in shuffled pages; NaN wherever no token lies, and table tails that lead nowhere."""

    keys: Tensor
    tables: Tensor
    lengths: Tensor
    tokens: list[Tensor]
    """Of each sequence: (length, rank + rotated) in float64."""


def make_cache(lengths: list[int], shape: Shape, dtype: torch.dtype) -> Cache:
    _, rank, rotated, page_tokens = shape
    generator = torch.Generator().manual_seed(0)
    num_pages = [-(-length // page_tokens) for length in lengths]
    pages = torch.randperm(sum(num_pages) + 3, generator=generator)
    tables = torch.full((len(lengths), max(num_pages) + 1), 1 << 30, dtype=torch.int32)
    keys = torch.full((len(pages), 1, page_tokens, rank + rotated), float("nan"), dtype=dtype)
    tokens = []
    for index, (length, count) in enumerate(zip(lengths, num_pages, strict=True)):
        own, pages = pages[:count], pages[count:]
        tables[index, :count] = own
        rows = torch.randn(length, rank + rotated, generator=generator).to(dtype)
        positions = torch.arange(length)
        keys[own[positions // page_tokens], 0, positions % page_tokens] = rows
        tokens.append(rows.double())
    lengths_there = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    return Cache(keys.to(DEVICE), tables.to(DEVICE), lengths_there, tokens)


def attend(query: Tensor, rotated: Tensor, tokens: Tensor, scaling: float, window: int | None) -> Tensor:
    """The oracle: (rows, heads, rank) of the last rows of one sequence, in float64."""
    whole, (rows, length) = torch.cat((query, rotated), -1).double().cpu(), (query.shape[0], tokens.shape[0])
    distance = torch.arange(length - rows, length)[:, None] - torch.arange(length)
    hidden = (distance < 0) | (distance >= (window or length))
    scores = (torch.einsum("rhd,td->hrt", whole, tokens) * scaling).masked_fill(hidden, -torch.inf)
    return torch.einsum("hrt,td->rhd", scores.softmax(-1) if length else scores, tokens[:, : query.shape[2]])


def random_query(rows: int, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Absorbed and rotated parts, laid out by heads as products leave them, and poison for what comes of them."""
    heads, rank, rotated, _ = shape
    generator = torch.Generator().manual_seed(rows)
    query = torch.randn(heads, rows, rank, generator=generator).to(dtype).to(DEVICE).transpose(0, 1)
    turned = torch.randn(heads, rows, rotated + 3, generator=generator).to(dtype).to(DEVICE).transpose(0, 1)
    return query, turned[..., 3:], torch.full_like(query, float("nan"))


def workspace_for(shape: Shape, num_processors: int) -> LatentWorkspace:
    return LatentWorkspace.allocate(num_heads=shape[0], rank=shape[1], device=DEVICE, num_processors=num_processors)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    assert actual.isfinite().all()
    error = (actual.double().cpu() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error < TOLERANCE[actual.dtype], float(error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("num_processors", [0, 8], ids=["whole", "split"])
@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_decode_matches_float64(shape: str, num_processors: int, window: int | None, dtype: torch.dtype) -> None:
    lengths, sizes = [1, 0, 33, 530], (SHAPES | LARGE)[shape]
    cache, (query, turned, out) = make_cache(lengths, sizes, dtype), random_query(4, sizes, dtype)
    workspace = workspace_for(sizes, num_processors)
    scaling = 2.0 / sum(sizes[1:3]) ** 0.5
    decode(query, turned, cache.keys, cache.tables, cache.lengths, out, workspace, scaling=scaling, window=window)
    expected = [attend(query[i : i + 1], turned[i : i + 1], cache.tokens[i], scaling, window) for i in range(4)]
    assert_near(out, torch.cat(expected))
    assert not out[1].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_extend_matches_float64(shape: str, window: int | None, dtype: torch.dtype) -> None:
    """Chunks of several lengths, and rows of padding; the first three rows of the batch are others'."""
    rows, lengths, sizes = [5, 1, 0, 33, 7, 4], [5, 30, 16, 40, 75, 0], (SHAPES | LARGE)[shape]
    cache, (query, turned, out) = make_cache(lengths, sizes, dtype), random_query(3 + sum(rows), sizes, dtype)
    starts = torch.tensor([3, *rows]).cumsum(0)
    indptr, scaling = starts.to(torch.int32).to(DEVICE), 2.0 / sum(sizes[1:3]) ** 0.5
    extend(query, turned, cache.keys, cache.tables, cache.lengths, indptr, out, scaling=scaling, window=window)
    assert out[:3].isnan().all()
    for index, (start, count) in enumerate(zip(starts.tolist(), rows, strict=False)):
        mine = slice(start, start + count)
        if lengths[index] == 0:
            assert not out[mine].any()
        elif count:
            assert_near(out[mine], attend(query[mine], turned[mine], cache.tokens[index], scaling, window))


@pytest.mark.gpu
def test_a_captured_decode_follows_lengths(cuda: torch.device) -> None:
    """Of 64 sequences, from one token to 4,000, and with empty lines."""
    sizes, dtype = LARGE["lite"], torch.bfloat16
    lengths = [1 + 61 * index for index in range(64)] + [4000]
    cache, (query, turned, out) = make_cache(lengths, sizes, dtype), random_query(65, sizes, dtype)
    workspace, now = workspace_for(sizes, 132), torch.zeros_like(cache.lengths)
    given = (query, turned, cache.keys, cache.tables, now, out, workspace)
    decode(*given, scaling=0.05)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode(*given, scaling=0.05)
    for changed in (cache.lengths, cache.lengths // 2, torch.zeros_like(now)):
        now.copy_(changed)
        out.fill_(float("nan"))
        graph.replay()
        for index, length in enumerate(changed.tolist()):
            mine = slice(index, index + 1)
            assert_near(out[mine], attend(query[mine], turned[mine], cache.tokens[index][:length], 0.05, None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_store_writes_rows_to_their_places(dtype: torch.dtype) -> None:
    rows = torch.randn(3, 60, generator=torch.Generator().manual_seed(0)).to(dtype).to(DEVICE)
    keys = torch.full((4, 1, 16, 48), float("nan"), dtype=dtype, device=DEVICE)
    pages, offsets = (torch.tensor(each, dtype=torch.int32, device=DEVICE) for each in ([3, 0, 3], [5, 15, 0]))
    store(rows[:, 2:42], rows[:, 52:], keys, pages, offsets)
    assert torch.equal(keys[pages, 0, offsets], torch.cat((rows[:, 2:42], rows[:, 52:]), dim=1))
    assert int(keys.isfinite().sum()) == 3 * 48, "something else was written"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_interleaved", [False, True])
def test_store_rotates_keys_and_queries(is_interleaved: bool, dtype: torch.dtype) -> None:
    """The oracle: products of complex numbers in float64. Angles as a transposed product leaves them."""
    generator, width, rank = torch.Generator().manual_seed(0), 12, 40
    rows, query = (
        torch.randn(*size, generator=generator).to(dtype).to(DEVICE) for size in ((3, 60), (5, 3, width + 4))
    )
    query = query.transpose(0, 1)[..., 4:]
    phases = torch.randn(width // 2, 3, generator=generator).t()
    turns = torch.polar(torch.full_like(phases, 1.3), phases).to(DEVICE)
    cos, sin = torch.view_as_real(turns).unbind(-1)
    keys = torch.full((4, 1, 16, rank + width), float("nan"), dtype=dtype, device=DEVICE)
    pages, offsets = (torch.tensor(each, dtype=torch.int32, device=DEVICE) for each in ([3, 0, 3], [5, 15, 0]))
    given = rows[:, None, 48:].clone(), query.clone()
    store(rows[:, :rank], rows[:, 48:], keys, pages, offsets, query, Angles(cos, sin, is_interleaved))
    made = keys[pages, 0, offsets]
    assert torch.equal(made[:, :rank], rows[:, :rank])
    for got, x in zip((made[:, None, rank:], query), given, strict=True):
        pairs = x.double().reshape(*x.shape[:-1], -1, 2) if is_interleaved else torch.stack(x.double().chunk(2, -1), -1)
        wanted = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turns[:, None].to(torch.complex128))
        assert_near(got, (wanted.flatten(-2) if is_interleaved else torch.cat(wanted.unbind(-1), -1)).cpu())
    assert int(keys.isfinite().sum()) == 3 * (rank + width), "something else was written"


def test_refuses_what_does_not_fit() -> None:
    shape = SHAPES["small"]
    cache, (query, turned, out) = make_cache([4, 4], shape, torch.float32), random_query(2, shape, torch.float32)
    good = {
        "query": query, "query_rotated": turned, "keys": cache.keys, "block_tables": cache.tables,
        "context_lengths": cache.lengths, "out": out, "workspace": workspace_for(shape, 8), "scaling": 1.0,
    }  # fmt: skip
    decode(**good)  # type: ignore[arg-type]
    for changed, reason in (
        ({"query_rotated": turned[:1]}, "query must be"),
        ({"query": query[..., :-1]}, "as the other arguments are"),
        ({"keys": cache.keys.double()}, "keys must be torch.bfloat16"),
        ({"out": out.half()}, "as keys are"),
        ({"context_lengths": cache.lengths.float()}, "must be int32 or int64"),
        ({"window": 0}, "window must be at least 1"),
        ({"workspace": LatentWorkspace(8, torch.empty(5, device=DEVICE))}, "has 5 elements"),
    ):
        with pytest.raises(ValueError, match=reason):
            decode(**{**good, **changed})  # type: ignore[arg-type]
    places = cache.lengths, cache.lengths
    wide = Angles(torch.zeros(2, 9, device=DEVICE), torch.zeros(2, 9, device=DEVICE), True)
    with pytest.raises(ValueError, match="cos must be"):
        store(query[:, 0], turned[:, 0], cache.keys, *places, turned, wide)
    assert latent._group(128, 64) == 64
    assert [latent._group(heads, 64) for heads in (67, 40, 96)] == [1, 40, 48]
