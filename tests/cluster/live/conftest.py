"""One deployment for all tests of this folder that leave it as it was; it ends with the last of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.live.service import TOKEN, LiveService, args_for, live_service, ray_cluster
from tests.support.adapters import make_adapter
from tests.support.bases import BaseKind
from tests.support.wait import eventually

ADAPTERS = {
    "one": ("rank16", 1),
    "two": ("rank16", 2),
    "thin": ("rank4_qv", 1),
    "thick": ("rank64", 1),
    **{f"many{i}": ("rank16", 10 + i) for i in range(10)},
}
"""Keys of the source: kind and seed of each adapter."""


@pytest.fixture(scope="session")
def world(base_of: Callable[[BaseKind], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and adapters."""
    root = tmp_path_factory.mktemp("world")
    (root / "base").symlink_to(base_of("llama"))
    for key, (kind, seed) in ADAPTERS.items():
        make_adapter(root / "adapters" / key, base_of("llama"), kind, seed=seed)
    return root


@pytest.fixture(scope="package")
def cluster() -> Iterator[None]:
    """Ray, without a service."""
    with ray_cluster(LORAFLEET_ADMIN_TOKEN=TOKEN):
        yield


@pytest.fixture(scope="package")
def live(cluster: None, world: Path) -> Iterator[LiveService]:
    """Two workers, and one adapter preloaded."""
    args = args_for(world)
    args["worker"]["spare_processes"] = 1
    args["adapters"]["preload"] = [{"name": "preloaded", "source": "demo", "key": "thin"}]
    with live_service(world, args) as service:
        yield service


@pytest.fixture
def tidy(live: LiveService) -> Iterator[None]:
    """Tests begin with two workers and a store, and leave no names behind."""
    eventually(lambda: live.http.get("/admin/v1/adapters").status_code == 200 and len(live.workers()) == 2)
    yield
    eventually(lambda: live.http.get("/admin/v1/adapters").status_code == 200)
    for adapter in live.http.get("/admin/v1/adapters").json()["adapters"]:
        if adapter["name"] != "preloaded":
            live.http.delete(f"/admin/v1/adapters/{adapter['name']}")
