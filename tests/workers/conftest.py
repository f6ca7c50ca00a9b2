"""Adapters of every kind for a base, read once a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.adapters import make_adapter
from tests.support.bases import BaseKind
from tests.support.fresh_memory import nan_filled
from tests.workers.harness import Shelf

ADAPTERS = (
    "rank1",
    "rank4_qv",
    "rank16",
    "rank64",
    "rslora",
    "rank_pattern",
    "embeddings",
    "embed_tokens",
    "embeddings_all",
    "last_layer",
)


@pytest.fixture(scope="session")
def shelf_of(
    base_of: Callable[[BaseKind], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[BaseKind], Shelf]:
    """`shelf_of("llama")`: a shelf with the adapters of `ADAPTERS` for that base, in their order."""
    made: dict[BaseKind, Shelf] = {}

    def of(kind: BaseKind) -> Shelf:
        if kind not in made:
            shelf = made[kind] = Shelf(base_of(kind))
            folder = tmp_path_factory.mktemp(f"adapters-{kind}")
            for recipe in ADAPTERS:
                shelf.put(make_adapter(folder / recipe, shelf.base, recipe))
        return made[kind]

    return of


@pytest.fixture
def llama(shelf_of: Callable[[BaseKind], Shelf]) -> Shelf:
    """The untied Llama with its adapters."""
    return shelf_of("llama")


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    """No result may depend on memory that nobody wrote."""
    with nan_filled():
        yield
