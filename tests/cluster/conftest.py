"""Services over fake workers, and over a real one, served over HTTP, for the tests of the data plane."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.cluster.engines import engine_service
from tests.cluster.serving import Service, serving
from tests.support.adapters import make_adapter
from tests.support.bases import BaseKind
from tests.workers.harness import Shelf


@pytest.fixture
def service() -> Iterator[Service]:
    """A service of one's own."""
    with serving(Service()) as running:
        yield running


@pytest.fixture(scope="module")
def shared_service() -> Iterator[Service]:
    """A service for tests that leave it as it was."""
    with serving(Service()) as running:
        yield running


@pytest.fixture(scope="module")
def shared_http(shared_service: Service) -> Iterator[httpx.Client]:
    """A connection to the shared service."""
    with shared_service.http() as http:
        yield http


@pytest.fixture(scope="module")
def worker_service(base_of: Callable[[BaseKind], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A real worker's, with the adapter `shout`."""
    shelf = Shelf(base_of("llama"))
    shelf.put(make_adapter(tmp_path_factory.mktemp("adapters") / "shout", shelf.base, "rank4_qv"))
    with engine_service(shelf) as running:
        yield running
