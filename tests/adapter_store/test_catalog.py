"""The state folder: restarts, crashes at every step of every change, damage, and a second store."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lorafleet.adapter_store import catalog as catalog_module
from lorafleet.adapter_store.catalog import Catalog, NameRecord
from lorafleet.adapter_store.errors import StoreUnusable, UnknownAdapter, UnknownVersion
from lorafleet.adapter_store.manifest import AdapterManifest, ExtraManifest, ModuleManifest


def manifest(version: str) -> AdapterManifest:
    modules = (ModuleManifest("model.layers.0.q_proj", 4, 0.1), ModuleManifest("lm_head", 2, 1 / 3))
    extras = (ExtraManifest("model.layers.0.q_proj", "added", 1, 8), ExtraManifest("norm.weight", "replaced", 1, 4))
    return AdapterManifest(version, 4, ("lm_head", "q_proj"), modules, 1234, extras)


def record(name: str, version: str, **fields: Any) -> NameRecord:
    given = {"source": "s", "key": f"k/{name}", "pinned": False, "warm": 1, "origin": "admin", **fields}
    return NameRecord(name, version, **given)


def publish(catalog: Catalog, version: str) -> None:
    with catalog.staging_folder() as staged:
        staged.joinpath("adapter_config.json").write_text(version)
        staged.joinpath("adapter_model.safetensors").write_bytes(b"weights of " + version.encode())
        catalog.publish(staged, manifest(version))


class Crash(BaseException):
    """The process stops here."""


@contextmanager
def crashing_at(step: int) -> Iterator[Callable[[], int]]:
    """Let the process die at the `step`-th touch of the disk: nothing is done from there on, cleaning up included."""
    steps = 0

    def dying(function: Callable[..., Any], partly: Callable[..., Any] | None = None) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == step and partly is not None:
                partly(*args)
            if steps >= step:
                raise Crash
            return function(*args, **kwargs)

        return call

    def half_bytes(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])

    def half_text(path: Path, content: str) -> None:
        half_bytes(path, content.encode())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_bytes", dying(Path.write_bytes, half_bytes))
        patch.setattr(Path, "write_text", dying(Path.write_text, half_text))
        for name in ("replace", "rename", "mkdir"):
            patch.setattr(Path, name, dying(getattr(Path, name)))
        patch.setattr(os, "fsync", dying(os.fsync))
        patch.setattr(shutil, "rmtree", dying(shutil.rmtree))
        yield lambda: steps


def state(catalog: Catalog) -> tuple[object, ...]:
    return dict(catalog.records), dict(catalog.tombstones), dict(catalog.manifests)


def prepared(folder: Path) -> Catalog:
    catalog = Catalog(folder)
    for version in ("v1", "v2"):
        publish(catalog, version)
    catalog.set_name(record("kept", "v1", pinned=True, warm="all"))
    catalog.set_name(record("gone", "v1"))
    return catalog


CHANGES: dict[str, Callable[[Catalog], object]] = {
    "publish": lambda catalog: publish(catalog, "v3"),
    "set_new": lambda catalog: catalog.set_name(record("new", "v2")),
    "set_again": lambda catalog: catalog.set_name(record("kept", "v2")),
    "pin": lambda catalog: catalog.pin_name("gone", True),
    "delete": lambda catalog: catalog.delete_name("gone", explicit=True),
    "remove": lambda catalog: catalog.remove("v2", lambda: True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_crash_leaves_the_old_state_or_the_new(change: Callable[[Catalog], object], tmp_path: Path) -> None:
    done = prepared(tmp_path / "done")
    before = state(done)
    with crashing_at(10**9) as steps:
        change(done)
    after = state(done)
    assert before != after
    assert steps() > 1
    seen = set()
    for step in range(1, steps() + 1):
        folder = tmp_path / f"step{step}"
        catalog = prepared(folder)
        with crashing_at(step), pytest.raises(Crash):
            change(catalog)
        catalog.close()
        again = Catalog(folder)
        assert state(again) in (before, after), step
        seen.add(state(again) == after)
        assert not list((folder / "staging").iterdir())
        # What was cut short can be done again.
        change(again) if state(again) == before else None
        assert state(again)[2] == after[2]
        assert {name: r.version for name, r in again.records.items()} == {n: r.version for n, r in done.records.items()}
        for version in again.manifests:
            assert (again.folder(version) / "adapter_config.json").read_text() == version
        again.close()
    done.close()
    assert False in seen


def test_all_is_as_it_was_after_a_restart(tmp_path: Path) -> None:
    catalog = prepared(tmp_path)
    catalog.delete_name("gone", explicit=True)
    before, generation = state(catalog), catalog.generation
    catalog.close()
    again = Catalog(tmp_path)
    assert state(again) == before
    assert again.generation == generation == 3
    assert again.set_name(record("new", "v2")).generation == 4
    again.close()


def test_generation_outlives_the_name_that_had_it(tmp_path: Path) -> None:
    catalog = prepared(tmp_path)
    catalog.delete_name("gone", explicit=False)
    generation = catalog.generation
    catalog.close()
    again = Catalog(tmp_path)
    assert again.generation == generation
    assert not again.is_deleted("gone")
    again.close()


def test_names_need_a_version_that_is_there(tmp_path: Path) -> None:
    catalog = prepared(tmp_path)
    with pytest.raises(UnknownVersion):
        catalog.set_name(record("new", "v9"))
    with pytest.raises(UnknownAdapter):
        catalog.delete_name("nobody", explicit=True)
    with pytest.raises(UnknownAdapter):
        catalog.pin_name("nobody", True)
    assert not catalog.remove("v1", lambda: True)
    assert not catalog.remove("v2", lambda: False)
    assert not catalog.remove("v9", lambda: True)
    catalog.close()


def test_a_deleted_name_comes_back_only_when_it_is_set(tmp_path: Path) -> None:
    catalog = prepared(tmp_path)
    catalog.delete_name("gone", explicit=True)
    with pytest.raises(UnknownAdapter):
        catalog.add_name(record("gone", "v2"))
    catalog.set_name(record("gone", "v2"))
    assert catalog.add_name(record("gone", "v1")).version == "v2"
    catalog.close()


def test_damage_is_left_out_and_the_rest_is_served(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prepared(tmp_path).close()
    (tmp_path / "names" / "gone.json").write_text('{"format": 1, "state": "na')
    shutil.rmtree(tmp_path / "versions" / "v2")
    (tmp_path / "versions" / "v3").mkdir()
    (tmp_path / "versions" / "v4").mkdir()
    (tmp_path / "versions" / "v4" / "manifest.json").write_text(json.dumps({"format": 99}))
    (tmp_path / "staging" / "left").mkdir()
    again = Catalog(tmp_path)
    assert set(again.records) == {"kept"}
    assert set(again.manifests) == {"v1"}
    assert not list((tmp_path / "staging").iterdir())
    assert len(caplog.records) == 3
    # A damaged version does not stand in the way of a good one.
    publish(again, "v3")
    assert (again.folder("v3") / "adapter_config.json").read_text() == "v3"
    again.close()


def test_a_name_whose_version_is_missing_is_left_out(tmp_path: Path) -> None:
    prepared(tmp_path).close()
    shutil.rmtree(tmp_path / "versions" / "v1")
    again = Catalog(tmp_path)
    assert again.records == {}
    again.close()


def test_only_one_store_has_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog_module, "_LOCK_PATIENCE_S", 0.0)
    first = Catalog(tmp_path)
    with pytest.raises(StoreUnusable) as caught:
        Catalog(tmp_path)
    assert caught.value.code == "store_locked"
    first.close()
    first.close()
    Catalog(tmp_path).close()


def test_a_folder_that_cannot_be_made_is_an_operators_matter(tmp_path: Path) -> None:
    tmp_path.joinpath("file").touch()
    with pytest.raises(StoreUnusable) as caught:
        Catalog(tmp_path / "file" / "state")
    assert caught.value.code == "store_not_writable"
