"""Weights of a version: one array, and the tensors as views of it."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafleet.adapter_store.manifest import (
    NUMPY_DTYPES,
    AdapterManifest,
    AdapterWeights,
    Array,
    Dtype,
    ExtraManifest,
    ModuleManifest,
    shared_module,
    shared_modules,
)

DTYPES: Sequence[Dtype] = ("float32", "float16", "bfloat16")
SIZES = st.integers(1, 9)
Tensors = Mapping[str, tuple[Array, Array]]


@st.composite
def adapters(draw: st.DrawFn) -> tuple[AdapterManifest, Dtype, Tensors, Mapping[str, Array]]:
    """What `AdapterWeights.of` takes: linear modules, embeddings and extras, contiguous or transposed."""
    dtype = draw(st.sampled_from(DTYPES))
    rng = np.random.default_rng(draw(st.integers(0, 99)))

    def array(rows: int, columns: int) -> Array:
        shape = (columns, rows) if (transposed := draw(st.booleans())) else (rows, columns)
        made: Array = rng.integers(0, 1000, shape).astype(NUMPY_DTYPES[dtype])
        return made.T if transposed else made

    modules, tensors = [], {}
    for number, (rank, in_dim, out_dim, is_embedding) in enumerate(
        draw(st.lists(st.tuples(SIZES, SIZES, SIZES, st.booleans()), max_size=4))
    ):
        modules.append(ModuleManifest(f"m{number}", rank, 1.0))
        a = array(in_dim, rank) if is_embedding else array(rank, in_dim)
        tensors[f"m{number}"] = a, array(rank, out_dim)
    extras, arrays = [], {}
    for number, (rows, width) in enumerate(draw(st.lists(st.tuples(SIZES, SIZES), max_size=3))):
        extras.append(ExtraManifest(f"e{number}", "replaced", rows, width))
        arrays[f"e{number}"] = array(rows, width)
    num_bytes = sum(array.nbytes for array in (*(each for pair in tensors.values() for each in pair), *arrays.values()))
    rank = max((module.rank for module in modules), default=0)
    return AdapterManifest("v", rank, (), tuple(modules), num_bytes, tuple(extras)), dtype, tensors, arrays


def assert_holds(weights: AdapterWeights, tensors: Tensors, extras: Mapping[str, Array]) -> None:
    assert [*weights.tensors] == [*tensors]
    assert [*weights.extras] == [*extras]
    found = [*(each for pair in weights.tensors.values() for each in pair), *weights.extras.values()]
    expected = [*(each for pair in tensors.values() for each in pair), *extras.values()]
    for view, array in zip(found, expected, strict=True):
        np.testing.assert_array_equal(view, array)
        assert view.dtype == NUMPY_DTYPES[weights.dtype]
        assert view.flags.c_contiguous
        assert not view.flags.writeable
        assert np.shares_memory(view, weights.flat)
    assert weights.flat.nbytes == weights.manifest.num_bytes


@given(adapter=adapters())
def test_views_are_what_went_in(adapter: tuple[AdapterManifest, Dtype, Tensors, Mapping[str, Array]]) -> None:
    manifest, dtype, tensors, extras = adapter
    weights = AdapterWeights.of(manifest, dtype, tensors, extras)
    assert_holds(weights, tensors, extras)
    parts = [*(each for pair in tensors.values() for each in pair), *extras.values()]
    end_to_end: Sequence[float] | Array = np.concatenate([np.ravel(array) for array in parts]) if parts else []
    np.testing.assert_array_equal(weights.flat, end_to_end)


@given(adapter=adapters())
@pytest.mark.slow
def test_all_weights_are_one_buffer_of_a_pickle(
    adapter: tuple[AdapterManifest, Dtype, Tensors, Mapping[str, Array]],
) -> None:
    manifest, dtype, tensors, extras = adapter
    weights = AdapterWeights.of(manifest, dtype, tensors, extras)
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(weights, protocol=5, buffer_callback=buffers.append)
    assert [buffer.raw().nbytes for buffer in buffers] == [manifest.num_bytes]
    again: AdapterWeights = pickle.loads(pickled, buffers=buffers)
    assert np.shares_memory(again.flat, weights.flat) or not weights.flat.size
    assert_holds(again, tensors, extras)
    assert_holds(pickle.loads(pickle.dumps(weights, protocol=5)), tensors, extras)


def test_what_does_not_fit_the_manifest_asserts() -> None:
    a, b = np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32)
    row = np.zeros((1, 5), np.float32)
    extra = ExtraManifest("e", "added", 1, 5)
    manifest = AdapterManifest("v", 2, (), (ModuleManifest("m", 2, 1.0),), 76, (extra,))
    AdapterWeights.of(manifest, "float32", {"m": (a, b)}, {"e": row})
    for dtype, tensors, extras in [
        ("float32", {"m": (a, b)}, {}),
        ("float32", {"n": (a, b)}, {"e": row}),
        ("float32", {"m": (a, b.T)}, {"e": row}),
        ("float32", {"m": (a[:1], b)}, {"e": row}),
        ("float32", {"m": (a, b[:, 1:])}, {"e": row}),
        ("float32", {"m": (a, b)}, {"e": row.T}),
        ("float16", {"m": (a, b)}, {"e": row}),
    ]:
        with pytest.raises(AssertionError):
            AdapterWeights.of(manifest, dtype, tensors, extras)  # type: ignore[arg-type]


def test_alike_adapters_have_one_tuple_of_modules_however_many_kinds_there_are() -> None:
    first = shared_modules(shared_module(name, 8, 2.0) for name in ("a", "b"))
    assert first == (ModuleManifest("a", 8, 2.0), ModuleManifest("b", 8, 2.0))
    assert shared_modules([*first]) is first
    for rank in range(1, 3000):  # more than are kept; each is made anew, at places of others that are gone
        modules = [ModuleManifest("a", rank, 1.0), ModuleManifest(f"b{rank}", 8, 2.0)]
        assert shared_modules(modules) == tuple(modules)
    assert shared_modules(first) == first
