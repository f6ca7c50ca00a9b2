"""A service over fake workers, served over HTTP, for the tests of the data plane."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.cluster.serving import Service, serving


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
