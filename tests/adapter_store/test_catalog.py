"""The state folder: restarts, crashes at every step of every change, damage, and a second store."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import pytest
from sqlalchemy import Engine, event

from lorafleet.adapter_store import catalog as catalog_module
from lorafleet.adapter_store.catalog import Catalog
from lorafleet.adapter_store.database import salvage
from lorafleet.adapter_store.errors import StaleGeneration, StoreUnusable, UnknownAdapter, UnknownVersion
from lorafleet.adapter_store.records import DesiredRecord, DesiredState, NameChanges
from tests.support.damaged_state import States, manifest, publish, record


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
        # SQLAlchemy rolls back what was not committed, as SQLite does at the next start.
        hooks = {name: dying(lambda *_: None) for name in ("before_cursor_execute", "after_cursor_execute")}
        for name, hook in hooks.items():
            event.listen(Engine, name, hook)
        try:
            yield lambda: steps
        finally:
            for name, hook in hooks.items():
                event.remove(Engine, name, hook)


def state(catalog: Catalog) -> tuple[object, ...]:
    return dict(catalog.names.records), dict(catalog.names.tombstones), dict(catalog.manifests)


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


@pytest.mark.slow
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
        # A cursor in the exception's traceback holds the transaction, which a process would not outlive.
        gc.collect()
        again = Catalog(folder)
        assert state(again) in (before, after), step
        seen.add(state(again) == after)
        assert not list((folder / "staging").iterdir())
        # What was cut short can be done again.
        change(again) if state(again) == before else None
        assert state(again)[2] == after[2]
        assert {name: r.version for name, r in again.names.records.items()} == {
            n: r.version for n, r in done.names.records.items()
        }
        for version in again.manifests:
            assert (again.folder(version) / "adapter_config.json").read_text() == version
        again.close()
    done.close()
    assert False in seen


def test_who_took_a_name_down_is_known_after_a_restart(tmp_path: Path) -> None:
    catalog = prepared(tmp_path)
    catalog.delete_name("gone", explicit=True)
    catalog.delete_name("kept", explicit=True, by_config=True)
    catalog.set_name(record("other", "v2"))
    catalog.delete_name("other", explicit=False)
    assert catalog.names.taken_down() == {"gone"}
    catalog.close()
    again = Catalog(tmp_path)
    assert again.names.taken_down() == {"gone"}
    again.set_name(record("gone", "v1"))
    assert again.names.taken_down() == set()
    again.close()


def test_what_a_publication_replaces_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the database takes nothing: each try would leave one more copy of the weights."""
    catalog = prepared(tmp_path)
    catalog.mark_damaged("v2")
    publish(catalog, "v2")
    assert not list((tmp_path / "staging").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(catalog, "_write", lambda rows: (_ for _ in ()).throw(OSError("disk quota exceeded")))
        for _ in range(3):
            with pytest.raises(StoreUnusable):
                publish(catalog, "v3")
    assert not list((tmp_path / "staging").iterdir())
    publish(catalog, "v3")
    assert "v3" in catalog.manifests
    catalog.close()


def test_all_is_as_it_was_after_a_restart(tmp_path: Path) -> None:
    catalog = prepared(tmp_path)
    catalog.delete_name("gone", explicit=True)
    before, generation = state(catalog), catalog.names.generation
    catalog.close()
    again = Catalog(tmp_path)
    assert state(again) == before
    assert again.names.generation == generation == 3
    assert again.set_name(record("new", "v2")).generation == 4
    again.close()


def test_generation_outlives_the_name_that_had_it(tmp_path: Path) -> None:
    catalog = prepared(tmp_path)
    catalog.delete_name("gone", explicit=False)
    generation = catalog.names.generation
    catalog.close()
    again = Catalog(tmp_path)
    assert again.names.generation == generation
    assert not again.names.is_deleted("gone")
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


def old_layout(folder: Path) -> None:
    """The files of a store before the database."""
    (folder / "names").mkdir(parents=True)
    for version in ("v1", "v2"):
        path = folder / "versions" / version
        path.mkdir(parents=True)
        path.joinpath("adapter_config.json").write_text(version)
        path.joinpath("adapter_model.safetensors").write_bytes(b"weights")
        path.joinpath("manifest.json").write_text(json.dumps({"format": 1, **asdict(manifest(version))}))
    named = {"state": "named", **asdict(record("kept", "v1", pinned=True, warm="all", generation=4))}
    gone = {"state": "deleted", "name": "gone", "explicit": True, "generation": 7}
    for fields in (named, gone):
        (folder / "names" / f"{fields['name']}.json").write_text(json.dumps({"format": 1, **fields}))


def test_the_former_layout_is_taken_over_once(tmp_path: Path) -> None:
    old_layout(tmp_path)
    for _ in range(2):
        catalog = Catalog(tmp_path)
        assert catalog.names.records == {"kept": record("kept", "v1", pinned=True, warm="all", generation=4)}
        assert catalog.names.is_deleted("gone")
        assert catalog.manifests == {version: manifest(version) for version in ("v1", "v2")}
        assert catalog.names.generation == 7
        assert catalog.damaged() == ()
        catalog.close()
    assert not (tmp_path / "names").exists()


def test_damaged_files_of_the_former_layout_are_named(tmp_path: Path) -> None:
    old_layout(tmp_path)
    names, versions = tmp_path / "names", tmp_path / "versions"
    (names / "gone.json").write_text('{"format": 1, "state": "na')
    (names / "deep.json").write_text("[" * 100_000)
    (names / "typed.json").write_text(json.dumps({"format": 1, "state": "deleted", "name": "typed", "generation": "x"}))
    (names / "folder.json").mkdir()
    (names / "link.json").symlink_to("nowhere")
    (versions / "v2" / "manifest.json").write_text("[" * 100_000)
    (versions / "v3").mkdir()
    (versions / "v4").symlink_to("nowhere")
    (versions / "v5").write_text("a file")
    catalog = Catalog(tmp_path)
    assert set(catalog.names.records) == {"kept"}
    named = {(damage.kind, damage.entry) for damage in catalog.damaged()}
    names_of = {("name", name) for name in ("gone", "deep", "typed", "folder", "link")}
    assert named == names_of | {("version", version) for version in ("v2", "v3", "v4", "v5")}
    assert catalog.names.is_deleted("gone")
    for version in ("v2", "v3", "v4", "v5"):
        publish(catalog, version)
    catalog.set_name(record("gone", "v2"))
    assert {damage.entry for damage in catalog.damaged()} == {"deep", "typed", "folder", "link"}
    catalog.close()


def test_a_version_whose_folder_is_gone_is_named_and_published_again(tmp_path: Path) -> None:
    prepared(tmp_path).close()
    shutil.rmtree(tmp_path / "versions" / "v1")
    again = Catalog(tmp_path)
    assert again.names.records["kept"].version == "v1"
    assert [(damage.kind, damage.entry) for damage in again.damaged()] == [("version", "v1")]
    publish(again, "v1")
    assert again.damaged() == ()
    shutil.rmtree(tmp_path / "versions" / "v1")
    publish(again, "v1")
    assert again.folder("v1").is_dir()
    again.close()


def test_desired_state_refuses_an_older_generation(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    assert catalog.desired() == DesiredState(0, ())
    two = [DesiredRecord("b", "s", "k"), DesiredRecord("a", "s", "k", True, "all")]
    catalog.set_desired(two, 5)
    with pytest.raises(StaleGeneration) as caught:
        catalog.set_desired([], 4)
    assert caught.value.code == "stale_generation"
    catalog.close()
    again = Catalog(tmp_path)
    assert again.desired() == DesiredState(5, (two[1], two[0]))
    again.set_desired(two[:1], 5)
    again.close()
    third = Catalog(tmp_path)
    assert third.desired() == DesiredState(5, (two[0],))
    third.close()


def test_changes_since_a_generation(tmp_path: Path) -> None:
    now = [1000.0]
    catalog = Catalog(tmp_path, lambda: now[0])
    publish(catalog, "v1")
    for name in ("a", "b", "c"):
        catalog.set_name(record(name, "v1"))
    catalog.pin_name("a", True)
    catalog.delete_name("b", explicit=False)
    changes = catalog.names.changes_since(3)
    assert ([r.name for r in changes.records], changes.deleted) == (["a"], ("b",))
    assert (changes.generation, changes.is_complete) == (5, True)
    assert catalog.names.changes_since(5) == NameChanges(5, (), (), True)
    now[0] += catalog_module.FORGOTTEN_S
    assert catalog.expire_tombstones() == 1
    assert not catalog.names.changes_since(3).is_complete
    catalog.close()
    again = Catalog(tmp_path)
    assert (again.names.generation, again.names.tombstones) == (5, {})
    assert not again.names.changes_since(3).is_complete
    assert again.names.changes_since(5).is_complete
    assert again.names.versions_to_keep(("v1", "v2")).versions == {"v1": True}
    again.close()


@pytest.mark.parametrize("trials", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_one_damaged_byte_anywhere(tmp_path: Path, trials: int) -> None:
    states = States(tmp_path)
    random = Random(trials)
    for _ in range(trials):
        states.damage(random)


def test_only_one_store_has_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafleet.adapter_store.files._LOCK_PATIENCE_S", 0.0)
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


def test_names_of_any_grammar_are_seen_in_a_damaged_database(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.sqlite"
    names = ("shout", "org/name@v1.2", "/.hidden/a=b~c+d")
    rows = ", ".join(f'{{"entry":"name:{name}","generation":1}}' for name in names)
    path.write_bytes(b"no database " + rows.encode() + b'{"entry":"name:not a name"}')
    assert salvage(path).lost_names == set(names)
