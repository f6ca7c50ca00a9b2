"""Layers with parameters of some rows' own, against plain products in float64; the other rows keep their bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lorafleet.adapter_store.manifest import AdapterWeights, Array, Dtype, magnitude_of
from lorafleet.kernels.segments import BASE_SLOT, Segments, build_segments
from lorafleet.workers.memory import extra_rows
from lorafleet.workers.memory.adapter_pool import AdapterPool
from lorafleet.workers.memory.pool_layout import PoolLayout
from lorafleet.workers.model import fused_layers
from lorafleet.workers.model.fused_parts import Output
from lorafleet.workers.model.lora_context import LoraContext
from lorafleet.workers.model.lora_layers import FusedProjection, LoraEmbedding
from lorafleet.workers.model.norm_layers import AdapterNorm
from tests.workers.memory.geometries import EVERYTHING, decoder, groups_of, manifest_of

HIDDEN, VOCAB, NUM_ROWS = 36, 203, 60
QKV = tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
EMBEDDING, HEAD, NORM = "model.embed_tokens", "lm_head", "model.norm"
ALL = (*QKV[:2], HEAD, f"{HEAD}.weight", f"{EMBEDDING}.weight", f"{NORM}.weight")
SCALED = tuple(map(magnitude_of, (*QKV[1:], HEAD, EMBEDDING)))
NORM_OF_ROWS = 0.5
"""What magnitudes are divided by here."""
ADAPTERS = [
    ((), EVERYTHING),
    (ALL, EVERYTHING),
    (ALL, ("q_proj",)),
    ((QKV[2], f"{HEAD}.weight"), EVERYTHING),
    ((HEAD, f"{NORM}.weight"), ()),
    ((f"{EMBEDDING}.weight",), ("o_proj",)),
    (SCALED, EVERYTHING),
    ((*SCALED[:1], *QKV), EVERYTHING),
]
"""Extras and targets of each resident adapter, in the order of their slots."""
TOLERANCE: dict[Dtype, float] = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 8e-2}
DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]


class Bench:
    """A pool with `ADAPTERS`, and a batch whose rows belong to all of them and to the base, in no order."""

    def __init__(self, dtype: Dtype, device: str) -> None:
        self.geometry = decoder(layers=1, hidden=HIDDEN, inner=52, kv=12, vocab=VOCAB, dtype=dtype)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.device = torch.device(device)
        self.tolerance = TOLERANCE[dtype]
        layout = PoolLayout.of(self.geometry, groups_of(self.geometry), 8)
        self.pool = AdapterPool(
            layout, pool_bytes=1200 * layout.page_bytes, max_slots=len(ADAPTERS), device=self.device
        )
        self.pool.row_norms = lambda name, a, b, scaling: torch.full_like(b[0], NORM_OF_ROWS**2).float()
        self.weights: dict[int, AdapterWeights] = {}
        for seed, (extras, targets) in enumerate(ADAPTERS):
            weights = self._weights(f"v{seed}", extras, targets, seed)
            allocation = self.pool.allocate(weights.manifest)
            self.pool.publish(self.pool.upload(allocation, weights))
            self.weights[allocation.slot] = weights
        generator = torch.Generator().manual_seed(5)
        slots = torch.randint(BASE_SLOT, len(ADAPTERS), (NUM_ROWS,), generator=generator).int().numpy()
        self.segments: Segments = build_segments(slots, device=self.device)
        self.context = LoraContext(self.pool.extras, self.segments, self.segments)
        self.plain = LoraContext({}, self.segments, self.segments)

    def random(self, *shape: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(self.device, self.dtype)

    def check(self, run: Callable[[LoraContext], Tensor], expected: Callable[[int, int], Tensor], *names: str) -> None:
        """`expected(row, slot)` is what a row should be, in float64; `names` are the extras that change it."""
        got, without = run(self.context), run(self.plain)
        for row, slot in enumerate(self.segments.host_row_slots.tolist()):
            if not any(self.extra(slot, name) is not None for name in names):
                assert torch.equal(got[row], without[row]), (row, slot)
            wanted = expected(row, slot)
            assert (got[row].double() - wanted).abs().max() <= self.tolerance * (1 + wanted.abs().max()), (row, slot)

    def extra(self, slot: int, name: str) -> Tensor | None:
        """(num_rows, width) float64."""
        array = None if slot == BASE_SLOT else self.weights[slot].extras.get(name)
        return None if array is None else self._double(array)

    def factors(self, slot: int, name: str) -> tuple[Tensor, Tensor] | None:
        """A as the store has it, and scaled B, both float64."""
        weights = self.weights.get(slot)
        if weights is None or name not in weights.tensors:
            return None
        a, b = weights.tensors[name]
        (scaling,) = (module.scaling for module in weights.manifest.modules if module.name == name)
        return self._double(a), scaling * self._double(b)

    def _double(self, array: Array) -> Tensor:
        tensor = torch.from_numpy(array.copy())
        return (tensor.view(torch.bfloat16) if self.dtype == torch.bfloat16 else tensor).to(self.device).double()

    def _weights(self, version: str, extras: tuple[str, ...], targets: tuple[str, ...], seed: int) -> AdapterWeights:
        manifest = manifest_of(self.geometry, version, 1 + seed, targets, extras=extras)
        # Deltas as large as what they are added to.
        modules = tuple(replace(module, scaling=0.5) for module in manifest.modules)
        generator = torch.Generator().manual_seed(100 + seed)

        def array(rows: int, columns: int) -> Array:
            made = (0.4 * torch.randn(rows, columns, generator=generator)).to(self.dtype)
            found: Array = (made.view(torch.uint16) if self.dtype == torch.bfloat16 else made).numpy()
            return found

        tensors = {}
        for module in modules:
            shape = self.geometry.modules[module.name]
            a = (shape.in_dim, module.rank) if shape.kind == "embedding" else (module.rank, shape.in_dim)
            tensors[module.name] = (array(*a), array(module.rank, shape.out_dim))
        own = {extra.name: array(extra.num_rows, extra.width) for extra in manifest.extras}
        return AdapterWeights.of(replace(manifest, modules=modules), self.geometry.dtype, tensors, own)


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> Dtype:
    chosen: Dtype = request.param
    return chosen


@pytest.fixture(params=DEVICES)
def bench(request: pytest.FixtureRequest, dtype: Dtype) -> Bench:
    return Bench(dtype, request.param)


def linear(bench: Bench, name: str, seed: int, bias: bool) -> nn.Linear:
    shape = bench.geometry.modules[name]
    made = nn.Linear(shape.in_dim, shape.out_dim, bias=bias, device=bench.device, dtype=bench.dtype)
    made.requires_grad_(False)
    made.weight.copy_(bench.random(shape.out_dim, shape.in_dim, seed=seed) * shape.in_dim**-0.5)
    return made


def expected_linear(bench: Bench, module: nn.Linear, name: str, x: Tensor, slot: int) -> Tensor:
    """What one row of a plain module with the adapter's parameters makes of x."""
    own, added, factors = bench.extra(slot, f"{name}.weight"), bench.extra(slot, name), bench.factors(slot, name)
    y = F.linear(
        x, module.weight.double() if own is None else own, None if module.bias is None else module.bias.double()
    )
    if factors is not None:
        y = y + x @ factors[0].t() @ factors[1]
    magnitude = bench.extra(slot, magnitude_of(name))
    if magnitude is not None:
        bias = 0.0 if module.bias is None else module.bias.double()
        y = (y - bias) * magnitude[0] / NORM_OF_ROWS + bias
    return y if added is None else y + added[0]


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
def test_added_rows_reach_their_members(bench: Bench, bias: bool) -> None:
    linears = [linear(bench, name, seed, bias=bias and seed != 1) for seed, name in enumerate(QKV)]
    x = bench.random(1, NUM_ROWS, HIDDEN, seed=9)

    def run(context: LoraContext) -> Tensor:
        modules: list[nn.Module] = list(linears)
        y: Tensor = FusedProjection(QKV, modules, bench.pool.weights(QKV), context, place="body", is_head=False)(x)
        return y[0]

    def expected(row: int, slot: int) -> Tensor:
        parts = zip(QKV, linears, strict=True)
        return torch.cat([expected_linear(bench, module, name, x[0, row].double(), slot) for name, module in parts])

    bench.check(run, expected, *QKV, *SCALED[:2])


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("gathered", [1, 5 * HIDDEN, 1 << 24], ids=["row_by_row", "in_runs", "at_once"])
def test_heads_of_their_own(bench: Bench, bias: bool, gathered: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extra_rows, "MAX_GATHERED", gathered)
    head = linear(bench, HEAD, 0, bias)
    x = bench.random(1, NUM_ROWS, HIDDEN, seed=9)

    def run(context: LoraContext) -> Tensor:
        # The rows whose logits are wanted, not those of the layers below.
        context = LoraContext(context.resident_extras, None, context.logits_segments)
        y: Tensor = FusedProjection(
            (HEAD,), [head], bench.pool.weights((HEAD,)), context, place="logits", is_head=True
        )(x)
        return y[0]

    def expected(row: int, slot: int) -> Tensor:
        return expected_linear(bench, head, HEAD, x[0, row].double(), slot)

    bench.check(run, expected, HEAD, f"{HEAD}.weight", magnitude_of(HEAD))


def test_embeddings_of_their_own(bench: Bench) -> None:
    base = nn.Embedding(VOCAB, HIDDEN, device=bench.device, dtype=bench.dtype).requires_grad_(False)
    tokens = torch.arange(NUM_ROWS, device=bench.device)[None] * 7 % VOCAB

    def run(context: LoraContext) -> Tensor:
        y: Tensor = LoraEmbedding(EMBEDDING, base, bench.pool.embedding_weights(EMBEDDING), context)(tokens)
        return y[0]

    def expected(row: int, slot: int) -> Tensor:
        token = tokens[0, row]
        own, factors = bench.extra(slot, f"{EMBEDDING}.weight"), bench.factors(slot, EMBEDDING)
        y = (base.weight.double() if own is None else own)[token]
        y = y if factors is None else y + factors[0][token] @ factors[1]
        magnitude = bench.extra(slot, magnitude_of(EMBEDDING))
        return y if magnitude is None else y * magnitude[0] / NORM_OF_ROWS

    bench.check(run, expected, f"{EMBEDDING}.weight", magnitude_of(EMBEDDING))


@pytest.mark.parametrize("shape", [(1, NUM_ROWS, HIDDEN), (NUM_ROWS, HIDDEN), (1, NUM_ROWS, 3, HIDDEN)], ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_of_their_own(bench: Bench, kind: str, shape: tuple[int, ...]) -> None:
    base = nn.LayerNorm(HIDDEN) if kind == "layer" else LlamaRMSNorm(HIDDEN)
    base = base.to(bench.device, bench.dtype).requires_grad_(False)
    x = bench.random(*shape, seed=9)

    def run(context: LoraContext) -> Tensor:
        y: Tensor = AdapterNorm(base, NORM, context, "body")(x)
        return y.view(NUM_ROWS, -1, HIDDEN)

    def expected(row: int, slot: int) -> Tensor:
        own = bench.extra(slot, f"{NORM}.weight")
        wide = x.view(NUM_ROWS, -1, HIDDEN)[row].double()
        if kind == "layer":
            return F.layer_norm(wide, (HIDDEN,), None if own is None else own[0])
        return F.rms_norm(wide, (HIDDEN,), None if own is None else own[0], eps=1e-6)

    bench.check(run, expected, f"{NORM}.weight")


@pytest.mark.parametrize("has_residual", [False, True], ids=["first", "later"])
def test_fused_norms_of_their_own(bench: Bench, has_residual: bool) -> None:
    base = LlamaRMSNorm(HIDDEN).to(bench.device, bench.dtype).requires_grad_(False)
    x, residual = bench.random(NUM_ROWS, HIDDEN, seed=9), bench.random(NUM_ROWS, HIDDEN, seed=10)
    total = x + residual if has_residual else x

    def run(context: LoraContext) -> Tensor:
        changed = residual.clone() if has_residual else None
        norm = AdapterNorm(base, NORM, context, "body", bench.pool.vector(f"{NORM}.weight"))
        entry = fused_layers.Entry(norm, {})
        y = (entry(Output(x), changed) if changed is not None else entry(None, x.clone())).values
        assert changed is None or torch.equal(changed, total)
        return y

    def expected(row: int, slot: int) -> Tensor:
        own = bench.extra(slot, f"{NORM}.weight")
        return F.rms_norm(total[row].double(), (HIDDEN,), None if own is None else own[0], eps=1e-6)

    bench.check(run, expected, f"{NORM}.weight")


def test_who_owns_what_is_found_once_a_pass() -> None:
    bench = Bench("float32", "cpu")
    owners = bench.context.owners(bench.segments)
    assert bench.context.owners(bench.segments) is owners
    slots = bench.segments.host_row_slots
    assert [owner.rows.tolist() for owner in owners] == [
        np.flatnonzero(slots == slot).tolist() for slot in range(1, len(ADAPTERS))
    ]
    pruned = build_segments(slots[[3, 1, 1, 0]], device=bench.device)
    assert sum(len(owner.rows) for owner in bench.context.owners(pruned)) == int((slots[[3, 1, 1, 0]] > 0).sum())
    assert bench.context.owners(build_segments(np.array([0, -1], dtype=np.int32), device=bench.device)) == ()
    assert bench.context.owners(None) == ()
    assert bench.plain.owners(bench.segments) == ()
