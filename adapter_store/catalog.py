"""Names and the versions that they point at, and the published versions, on disk.

One file a name and one folder a version, each replaced or published by a rename, so that a crash leaves the old state
or the new one. Calls block; any thread may make them.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lorafleet.adapter_store.errors import StoreUnusable, UnknownAdapter, UnknownVersion
from lorafleet.adapter_store.files import make_empty, make_folder_durable, sync, write_durably
from lorafleet.adapter_store.manifest import AdapterManifest, Origin, shared_extra, shared_module

logger = logging.getLogger(__name__)

_FORMAT = 1
_MANIFEST = "manifest.json"
_LOCK_PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True)
class NameRecord:
    """What is kept of a name."""

    name: str
    version: str
    source: str
    key: str
    pinned: bool
    warm: int | Literal["all"]
    origin: Origin
    generation: int = 0
    """Given by the catalogue when the record is written."""


@dataclass(frozen=True, slots=True)
class Tombstone:
    """What is kept of a name that was deleted."""

    name: str
    explicit: bool
    """Somebody deleted it by name, so no `resolve` source may bring it back."""
    generation: int


class Catalog:
    """The state folder of one base; nobody else has it while this lives. What is damaged is left out, and logged."""

    def __init__(self, folder: Path) -> None:
        """Open `folder`, made if need be, and remove what a crash left half done. Raises StoreUnusable."""
        self._names = folder / "names"
        self._versions = folder / "versions"
        self._staging = folder / "staging"
        self._changes = threading.Lock()
        self.records: dict[str, NameRecord] = {}
        self.tombstones: dict[str, Tombstone] = {}
        self.manifests: dict[str, AdapterManifest] = {}
        self._damaged: set[str] = set()
        self._folder_lock: int | None = None
        try:
            for path in (self._names, self._versions):
                path.mkdir(parents=True, exist_ok=True)
            self._folder_lock = _lock(folder / "lock")
            make_empty(self._staging)
            sync(folder)
            self._load()
        except OSError as error:
            self.close()
            raise StoreUnusable("store_not_writable", "the store's state folder cannot be written") from error
        known: list[NameRecord | Tombstone] = [*self.records.values(), *self.tombstones.values()]
        self.generation = max((entry.generation for entry in known), default=0)

    def close(self) -> None:
        """Let another store have the folder; closing twice is fine."""
        if self._folder_lock is not None:
            os.close(self._folder_lock)
            self._folder_lock = None

    def check_writable(self) -> None:
        """Raises StoreUnusable `store_not_writable`."""
        if not os.access(self._names, os.W_OK) or not os.access(self._staging, os.W_OK):
            raise StoreUnusable("store_not_writable", "the store's state folder cannot be written")

    def set_name(self, record: NameRecord) -> NameRecord:
        """Let a name point at a published version, durably. Raises UnknownVersion."""
        with self._changes:
            return self._set_name(record)

    def add_name(self, record: NameRecord) -> NameRecord:
        """As `set_name`, unless the name is there, which is then returned. Raises UnknownAdapter for a deleted name."""
        with self._changes:
            if record.name in self.records:
                return self.records[record.name]
            if self.is_deleted(record.name):
                raise UnknownAdapter("adapter_not_found", f"adapter {record.name} was deleted", "model")
            return self._set_name(record)

    def pin_name(self, name: str, pinned: bool) -> NameRecord:
        """Set a name's `pinned`, durably. Raises UnknownAdapter."""
        with self._changes:
            return self._set_name(replace(self._record(name), pinned=pinned))

    def delete_name(self, name: str, *, explicit: bool) -> NameRecord:
        """Take a name away, durably; its version stays published. Raises UnknownAdapter."""
        with self._changes:
            record = self._record(name)
            tombstone = Tombstone(name, explicit, self.generation + 1)
            self._write(name, {"state": "deleted", **asdict(tombstone)})
            self.generation = tombstone.generation
            self.tombstones[name] = tombstone
            del self.records[name]
            return record

    def is_deleted(self, name: str) -> bool:
        """Whether somebody deleted this name, and nobody has loaded it since."""
        return name in self.tombstones and self.tombstones[name].explicit

    @contextmanager
    def staging_folder(self) -> Iterator[Path]:
        """A new empty folder beside the published ones; what is left of it in the end is removed."""
        folder = self._staging / uuid.uuid4().hex
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish(self, staged: Path, manifest: AdapterManifest) -> None:
        """Give a staged adapter its place among the versions; nothing changes if the same one is there already."""
        (staged / _MANIFEST).write_text(json.dumps({"format": _FORMAT, **asdict(manifest)}))
        make_folder_durable(staged)
        with self._changes:
            if manifest.version in self.manifests and manifest.version not in self._damaged:
                # The same weights may come with another config, and so with other warnings.
                if manifest.warnings != self.manifests[manifest.version].warnings:
                    content = (staged / _MANIFEST).read_bytes()
                    write_durably(self.folder(manifest.version) / _MANIFEST, content, self._staging)
                    self.manifests[manifest.version] = manifest
                return
            self._clear(manifest.version)
            staged.rename(self.folder(manifest.version))
            sync(self._versions)
            self.manifests[manifest.version] = manifest
            self._damaged.discard(manifest.version)

    def folder(self, version: str) -> Path:
        """Where a published version lies."""
        return self._versions / version

    def remove(self, version: str, is_unwanted: Callable[[], bool]) -> bool:
        """Take a version off the disk, unless it has a name, or is wanted at the moment that nothing else changes."""
        with self._changes:
            if version not in self.manifests or self._is_named(version) or not is_unwanted():
                return False
            del self.manifests[version]
            trash = self._clear(version)
        shutil.rmtree(trash, ignore_errors=True)
        return True

    def mark_damaged(self, version: str) -> None:
        """Let the next `publish` of this version replace its files; until then they stay, and names keep pointing."""
        with self._changes:
            self._damaged.add(version)

    def _clear(self, version: str) -> Path:
        # The rename makes it gone at once; what a crash leaves in the staging folder is removed at the next start.
        trash = self._staging / uuid.uuid4().hex
        if self.folder(version).exists():
            self.folder(version).rename(trash)
        return trash

    def _is_named(self, version: str) -> bool:
        return any(record.version == version for record in self.records.values())

    def _record(self, name: str) -> NameRecord:
        if name not in self.records:
            raise UnknownAdapter("adapter_not_found", f"there is no adapter {name[:128]!r}", "model")
        return self.records[name]

    def _set_name(self, record: NameRecord) -> NameRecord:
        if record.version not in self.manifests:
            raise UnknownVersion("version_not_found", f"there is no adapter version {record.version[:40]}", "version")
        stamped = replace(record, generation=self.generation + 1)
        self._write(stamped.name, {"state": "named", **asdict(stamped)})
        self.generation = stamped.generation
        self.records[stamped.name] = stamped
        self.tombstones.pop(stamped.name, None)
        return stamped

    def _write(self, name: str, fields: Mapping[str, object]) -> None:
        content = json.dumps({"format": _FORMAT, **fields}, indent=1).encode()
        try:
            write_durably(self._names / f"{name}.json", content, self._staging)
        except OSError as error:
            raise StoreUnusable("store_not_writable", "the store's state folder cannot be written") from error

    def _load(self) -> None:
        for path in self._versions.iterdir():
            try:
                self.manifests[path.name] = _read_manifest(path / _MANIFEST)
            except (ValueError, KeyError, TypeError):
                logger.exception("adapter version %s is damaged on disk and left out", path.name)
        for path in self._names.iterdir():
            try:
                self._load_name(_read_json(path))
            except (ValueError, KeyError, TypeError):
                logger.exception("the record of adapter name %s is damaged on disk and left out", path.stem)

    def _load_name(self, fields: dict[str, Any]) -> None:
        if fields.pop("state") == "deleted":
            tombstone = Tombstone(**fields)
            self.tombstones[tombstone.name] = tombstone
            return
        record = NameRecord(**fields)
        if record.version not in self.manifests:
            raise ValueError(f"its version {record.version} is not published")
        self.records[record.name] = record


def _lock(path: Path) -> int:
    """A descriptor that holds the lock. A store that is being replaced may need a moment to go."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + _LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise StoreUnusable("store_locked", "another adapter store uses the same state folder") from error
            time.sleep(0.05)
        else:
            return descriptor


def _read_json(path: Path) -> dict[str, Any]:
    fields = json.loads(path.read_bytes())
    if not isinstance(fields, dict) or fields.pop("format") != _FORMAT:
        raise ValueError("it is of another format")
    return fields


def _read_manifest(path: Path) -> AdapterManifest:
    if not path.is_file():
        raise ValueError("it has no manifest")
    fields = _read_json(path)
    modules = tuple(shared_module(m["name"], m["rank"], m["scaling"]) for m in fields.pop("modules"))
    # Manifests of stores that knew no extras have none.
    extras = tuple(shared_extra(e["name"], e["kind"], e["num_rows"], e["width"]) for e in fields.pop("extras", ()))
    warnings = tuple(fields.pop("warnings", ()))
    return AdapterManifest(
        **{**fields, "modules": modules, "targets": tuple(fields["targets"]), "extras": extras, "warnings": warnings}
    )
