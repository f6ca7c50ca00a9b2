"""Routed rows in order, against sorting in plain Python, and csgmv over them in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch

from lorafleet.kernels import routing_triton
from lorafleet.kernels.routing import Routed, combine, repeat, route, route_few, spread
from lorafleet.kernels.segments import BASE_SLOT, build_segments

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("num_rows", "num_slots", "num_experts", "top_k"), [(1, 1, 4, 2), (7, 3, 4, 2), (64, 9, 8, 4), (300, 2, 3, 1)]
)
@pytest.mark.parametrize("chunk_length", [None, 16])
@pytest.mark.parametrize("route", [route, route_few])
def test_the_order_and_the_chunks(
    route: Callable[..., Routed], num_rows: int, num_slots: int, num_experts: int, top_k: int, chunk_length: int | None
) -> None:
    generator = np.random.default_rng(num_rows)
    slots = generator.integers(-1, num_slots, num_rows).astype(np.int32)
    # The expert after the last means none.
    experts = torch.from_numpy(
        generator.permuted(np.tile(np.arange(num_experts + 1), (num_rows, 1)), axis=1)[:, :top_k]
    ).to(DEVICE)
    segments = build_segments(slots, device=DEVICE, chunk_length=chunk_length)
    stride = 10
    routed = route(experts, num_experts, segments, stride)
    flat = experts.reshape(-1).tolist()
    wanted = sorted(range(len(flat)), key=lambda place: (flat[place], slots[place // top_k], place))
    assert routed.order.tolist() == wanted
    assert routed.rows.tolist() == [place // top_k for place in wanted]
    assert [wanted[place] for place in routed.places.tolist()] == list(range(len(flat)))
    assert routed.expert_ends.tolist() == [sum(one <= expert for one in flat) for expert in range(num_experts)]
    assert route(experts, num_experts, None, stride).expert_ends.tolist() == routed.expert_ends.tolist()
    made = routed.segments
    assert made is not None
    virtual = [
        BASE_SLOT
        if slots[place // top_k] < 0 or flat[place] == num_experts
        else slots[place // top_k] * stride + flat[place]
        for place in wanted
    ]
    assert made.row_slots.tolist() == virtual
    assert made.permutation.tolist() == list(range(len(flat)))
    ends = made.chunk_indptr.tolist()
    assert ends[0] == 0
    assert ends[-1] == len(flat)
    for (first, last), slot in zip(pairwise(ends), made.chunk_slots.tolist(), strict=True):
        assert last - first <= made.chunk_length
        assert set(virtual[first:last]) <= {slot}
    # Sizes follow from sizes: a captured graph has them whatever the rows are.
    other = route(torch.zeros_like(experts), num_experts, segments, stride).segments
    assert other is not None
    assert (other.max_chunks, other.chunk_length) == (made.max_chunks, made.chunk_length)


@pytest.mark.parametrize(("num_rows", "num_experts", "top_k"), [(3, 4, 2), (517, 5, 3), (300, 128, 8)])
def test_the_order_by_experts_alone(num_rows: int, num_experts: int, top_k: int) -> None:
    """Of runs whose last is not full, where some rows have no expert."""
    generator = torch.Generator().manual_seed(num_rows)
    experts = torch.randint(0, num_experts + 2, (num_rows, top_k), generator=generator).to(DEVICE)
    order, rows, places, ends = routing_triton.order_of_experts(experts, num_experts)
    flat = experts.reshape(-1).clamp(max=num_experts).cpu()
    wanted = torch.sort(flat, stable=True).indices
    assert order.tolist() == wanted.tolist()
    assert rows.tolist() == (wanted // top_k).tolist()
    assert wanted[places.cpu().long()].tolist() == list(range(len(flat)))
    assert ends.tolist() == flat.bincount(minlength=num_experts + 1).cumsum(0)[:num_experts].tolist()


@pytest.mark.parametrize("width", [40, 3000])
def test_rows_are_spread(width: int) -> None:
    experts = torch.tensor([[0, 2], [3, 1], [1, 0], [3, 3]]).to(DEVICE)
    x = torch.randn(4, 2 * width).to(DEVICE)[:, :width]
    routed = route_few(experts, 3, None, 1)
    assert torch.equal(routing_triton.spread(x, 2, routed.places), x[routed.rows])
    assert torch.equal(spread(x, experts, routed), x[routed.rows])


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_experts_gave_is_summed(backend: str, dtype: torch.dtype) -> None:
    """In float64, where what has no expert may hold anything on a GPU."""
    generator = torch.Generator().manual_seed(0)
    experts = torch.tensor([[0, 2], [3, 1], [1, 0], [3, 3]]).to(DEVICE)
    weights = torch.rand(4, 2, generator=generator).to(DEVICE, dtype)
    y = torch.randn(8, 700, generator=generator).to(DEVICE, dtype)
    routed = (route_few if backend == "triton" else route)(experts, 3, None, 1)
    y[int(routed.expert_ends[-1]) :] = float("nan") if backend == "triton" else 0.0
    wanted = torch.zeros(4, 700, dtype=torch.float64, device=DEVICE)
    for place, index in enumerate(routed.order.tolist()):
        if experts.flatten()[index] < 3:
            wanted[index // 2] += y[place].double() * weights.flatten()[index].double()
    if backend == "triton":
        got = torch.empty(4, 700, dtype=dtype, device=DEVICE)
        routing_triton.combine(y, experts, weights, routed.places, 3, got)
    else:
        got = combine(y, experts, weights, routed, 3, dtype)
    bound = 1e-6 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(got, wanted.to(dtype), atol=bound, rtol=bound)


def test_rows_for_every_expert() -> None:
    slots = np.array([1, BASE_SLOT, 0, 1, 0, 0], dtype=np.int32)
    made = repeat(3, build_segments(slots, device=CPU), 10)
    virtual = [BASE_SLOT if slot < 0 else slot * 10 + expert for expert in range(3) for slot in slots.tolist()]
    assert made.row_slots.tolist() == virtual
    assert sorted(made.permutation.tolist()) == list(range(18))
    ends = made.chunk_indptr.tolist()
    for (first, last), slot in zip(pairwise(ends), made.chunk_slots.tolist(), strict=True):
        assert {virtual[row] for row in made.permutation[first:last].tolist()} <= {slot}
    assert ends[-1] == 18


def test_kernels_take_its_segments(interpreter: None) -> None:
    """The kernels for a GPU add for each row the product of its adapter on its expert."""
    from lorafleet.kernels import expand_triton, shrink_triton
    from lorafleet.kernels.weights import ROW_ALIGN, LoraWeights

    num_slots, num_experts, rank, in_dim, out_dim, top_k = 2, 3, 2, 32, 48, 2
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(num_slots * num_experts, rank, in_dim, generator=generator)
    b = torch.randn(num_slots * num_experts, rank, out_dim, generator=generator)
    starts = torch.arange(a.shape[0] * rank, dtype=torch.int32).view(-1, 1, rank)
    weights = LoraWeights(
        pool=torch.cat([a.flatten(), b.flatten()]),
        ranks=torch.full((a.shape[0], 1), rank, dtype=torch.int32),
        scalings=torch.full((a.shape[0], 1), 0.5),
        a_rows=starts * (in_dim // ROW_ALIGN),
        b_rows=starts * (out_dim // ROW_ALIGN) + a.numel() // ROW_ALIGN,
        in_dim=in_dim,
        part_slices=(0,),
        part_starts=(0,),
        part_widths=(out_dim,),
    )
    slots = np.array([0, BASE_SLOT, 1, 1, 0, BASE_SLOT, 1], dtype=np.int32)
    experts = torch.tensor([[0, 1], [2, 0], [1, 2], [1, 0], [2, 0], [0, 1], [1, 3]])
    x = torch.randn(len(slots), in_dim, generator=generator)
    routed = route(experts, num_experts, build_segments(slots, device=CPU), num_experts)
    assert routed.segments is not None
    rows = x[routed.order // top_k]
    y = torch.zeros(len(rows), out_dim)
    expand_triton.expand(shrink_triton.shrink(rows, weights, routed.segments), weights, routed.segments, y)
    for place, index in enumerate(routed.order.tolist()):
        slot, expert = slots[index // top_k], experts.flatten()[index]
        at = slot * num_experts + expert
        is_none = slot < 0 or expert == num_experts
        wanted = torch.zeros(out_dim) if is_none else 0.5 * (x[index // top_k] @ a[at].T) @ b[at]
        torch.testing.assert_close(y[place], wanted, atol=1e-5, rtol=1e-5)
