"""Names and the versions that they point at, the published versions, and the desired state, on disk.

Entries are rows of a database, one transaction a change. A version's weights are a folder, published by a rename.
A crash leaves the old state or the new one. Calls block; any thread may make them.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from lorafleet.adapter_store import folder_layout
from lorafleet.adapter_store.database import DamagedDatabaseError, Database, create, salvage, set_aside
from lorafleet.adapter_store.errors import StaleGeneration, UnknownAdapter, UnknownVersion
from lorafleet.adapter_store.files import locked, make_empty, make_folder_durable, sync, unwritable, write_durably
from lorafleet.adapter_store.folder_layout import MANIFEST, manifest_file, manifest_of, manifest_row
from lorafleet.adapter_store.manifest import AdapterManifest
from lorafleet.adapter_store.name_index import NameIndex
from lorafleet.adapter_store.names import NameRecord
from lorafleet.adapter_store.peft_format import CONFIG_FILE, WEIGHTS_FILE
from lorafleet.adapter_store.records import (
    Damage,
    DesiredRecord,
    DesiredState,
    Row,
    Tombstone,
    counter_row,
    name_entry,
    name_row,
)

logger = logging.getLogger(__name__)

DELETED_S = 365 * 86400.0
"""How long a name that somebody deleted stays away from `resolve` sources."""
FORGOTTEN_S = 86400.0
"""How long other tombstones are kept, for readers of `changes_since`."""

_AFTER_DAMAGE = 10**6
"""Damage may hide the latest generation: numbers go on far behind it."""
_DESIRED_COUNTERS = ("desired", "desired-copy")
_UNREADABLE = (ValueError, KeyError, TypeError, RecursionError, OSError)


class Catalog:
    """The state folder of one base; nobody else has it while this lives. What is damaged is not used, and named."""

    def __init__(self, folder: Path, wall_clock: Callable[[], float] = time.time) -> None:
        """Open `folder`, made if need be, and remove what a crash left half done. Raises StoreUnusable."""
        self._versions = folder / "versions"
        self._staging = folder / "staging"
        self._set_aside = folder / "damaged"
        self._wall_clock = wall_clock
        self._changes = threading.Lock()
        self._indexes = threading.Lock()
        self.names = NameIndex()
        self.manifests: dict[str, AdapterManifest] = {}
        self._desired = DesiredState(0, ())
        self._damaged_desired: dict[str, str] = {}
        self._damaged: dict[str, str] = {}
        self._folder_lock: int | None = None
        self._database: Database | None = None
        try:
            self._versions.mkdir(parents=True, exist_ok=True)
            self._folder_lock = locked(folder / "lock")
            make_empty(self._staging)
            sync(folder)
            self._database = self._opened(folder / "catalog.sqlite", folder / "names")
            self._load(self._database)
        except OSError as error:
            self.close()
            raise unwritable(error) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let another store have the folder; closing twice is fine."""
        with self._changes:
            # A thread may be in a transaction: a connection must not be closed under it.
            if self._database is not None:
                self._database.close()
                self._database = None
        if self._folder_lock is not None:
            os.close(self._folder_lock)
            self._folder_lock = None

    def check_writable(self) -> None:
        """Raises StoreUnusable `store_not_writable`."""
        if not os.access(self._versions, os.W_OK) or not os.access(self._staging, os.W_OK):
            raise unwritable()

    def damaged(self) -> tuple[Damage, ...]:
        """All that is damaged. A database that was moved aside is named until its file is removed."""
        found = self.names.faults()
        with self._indexes:
            found += [Damage("version", version, why) for version, why in self._damaged.items()]
            found += [Damage("desired", name, why) for name, why in self._damaged_desired.items()]
        try:
            files = sorted(path.name for path in self._set_aside.iterdir() if path.suffix in (".sqlite", ".missing"))
        except OSError:
            files = []
        why = "the catalogue's database was damaged or missing; names in a part that cannot be read are not known"
        return (*found, *(Damage("database", file, why) for file in files))

    def desired(self) -> DesiredState:
        """The desired state that was set last."""
        return self._desired

    def set_desired(self, adapters: Sequence[DesiredRecord], generation: int) -> DesiredState:
        """Replace the desired state, durably. Raises StaleGeneration for an older generation than the one kept."""
        state = DesiredState(generation, tuple(sorted(adapters, key=lambda adapter: adapter.name)))
        names = {adapter.name for adapter in state.adapters}
        if len(names) != len(state.adapters):
            raise ValueError("the desired state has two adapters of one name")
        with self._changes:
            if generation < self._desired.generation:
                kept = self._desired.generation
                message = f"desired generation {generation} is older than {kept}: read the desired state again"
                raise StaleGeneration("stale_generation", message, "generation")
            before = {adapter.name: adapter for adapter in self._desired.adapters}
            rows = [Row.of("desired", a.name, asdict(a)) for a in state.adapters if before.get(a.name) != a]
            gone = {*before, *self._damaged_desired} - names
            # Kept twice: without it an older writer could not be told from a newer one.
            totals = {"generation": generation, "count": len(names)}
            counters = [Row.of("counter", key, totals) for key in _DESIRED_COUNTERS]
            self._write([*rows, *counters], [("desired", name) for name in gone])
            with self._indexes:
                self._desired = state
                self._damaged_desired.clear()
        return state

    def expire_tombstones(self) -> int:
        """Remove tombstones that have had their time, durably; returns how many."""
        now = self._wall_clock()
        with self._changes:
            old = [
                tombstone
                for tombstone in self.names.tombstones.values()
                if now - tombstone.deleted_at >= (DELETED_S if tombstone.explicit else FORGOTTEN_S)
            ]
            if old:
                expired = max(self.names.expired, *(tombstone.generation for tombstone in old))
                counter = counter_row(self.names.generation, expired)
                self._write([counter], [("name", tombstone.name) for tombstone in old])
                self.names.expire(old, expired)
        return len(old)

    def set_name(self, record: NameRecord) -> NameRecord:
        """Let a name point at a published version, durably. Raises UnknownVersion."""
        with self._changes:
            return self._set_name(record)

    def add_name(self, record: NameRecord) -> NameRecord:
        """As `set_name`, unless the name is there, which is then returned. Raises UnknownAdapter for a deleted name."""
        with self._changes:
            if record.name in self.names.records:
                return self.names.records[record.name]
            if self.names.is_deleted(record.name):
                raise UnknownAdapter(
                    "adapter_not_found", f"adapter {record.name} was deleted; load it again to use it", "model"
                )
            return self._set_name(record)

    def pin_name(self, name: str, pinned: bool) -> NameRecord:
        """Set a name's `pinned`, durably. Raises UnknownAdapter."""
        with self._changes:
            return self._set_name(replace(self._record(name), pinned=pinned))

    def delete_name(self, name: str, *, explicit: bool, by_config: bool = False) -> NameRecord:
        """Take a name away, durably; its version stays published. Raises UnknownAdapter."""
        with self._changes:
            record = self._record(name)
            self._write_name(Tombstone(name, explicit, self.names.generation + 1, self._wall_clock(), by_config))
            return record

    @contextmanager
    def staging_folder(self) -> Iterator[Path]:
        """A new empty folder beside the published ones; what is left of it in the end is removed."""
        folder = self._staging / uuid.uuid4().hex
        try:
            folder.mkdir()
        except OSError as error:
            raise unwritable(error) from error
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish(self, staged: Path, manifest: AdapterManifest) -> None:
        """Give a staged adapter its place among the versions; nothing changes if the same one is there, on disk too.

        The same weights may come with another config, and so with other warnings: these are kept up to date.
        """
        version, row = manifest.version, manifest_row(manifest)
        try:
            (staged / MANIFEST).write_text(manifest_file(row))
            make_folder_durable(staged)
            with self._changes:
                if version in self.manifests and version not in self._damaged and self._is_on_disk(version):
                    if manifest.warnings != self.manifests[version].warnings:
                        content = (staged / MANIFEST).read_bytes()
                        write_durably(self.folder(version) / MANIFEST, content, self._staging)
                        self._write([row])
                        with self._indexes:
                            self.manifests[version] = manifest
                    return
                trash = self._clear(version)
                try:
                    staged.rename(self.folder(version))
                    sync(self._versions)
                    self._write([row])
                finally:
                    shutil.rmtree(trash, ignore_errors=True)
                with self._indexes:
                    self.manifests[version] = manifest
                    self._damaged.pop(version, None)
        except OSError as error:
            raise unwritable(error) from error

    def folder(self, version: str) -> Path:
        """Return the folder of a published version."""
        return self._versions / version

    def remove(self, version: str, is_unwanted: Callable[[], bool]) -> bool:
        """Take a version off the disk, unless it has a name, or is wanted at the moment that nothing else changes."""
        with self._changes:
            if version not in self.manifests or self.names.is_named(version) or not is_unwanted():
                return False
            self._write([], [("version", version)])
            with self._indexes:
                del self.manifests[version]
                self._damaged.pop(version, None)
            trash = self._clear(version)
        shutil.rmtree(trash, ignore_errors=True)
        return True

    def mark_damaged(self, version: str, why: str = "its files cannot be read back") -> None:
        """Let the next `publish` of this version replace its files; until then they stay, and names keep pointing."""
        with self._changes, self._indexes:
            self._damaged[version] = why

    def _clear(self, version: str) -> Path:
        # The rename makes it gone at once; what a crash leaves in the staging folder is removed at the next start.
        trash = self._staging / uuid.uuid4().hex
        if os.path.lexists(self.folder(version)):
            self.folder(version).rename(trash)
        return trash

    def _is_on_disk(self, version: str) -> bool:
        return all((self.folder(version) / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE, MANIFEST))

    def _record(self, name: str) -> NameRecord:
        if name not in self.names.records:
            raise UnknownAdapter("adapter_not_found", f"no adapter is named {name[:128]!r}", "name")
        return self.names.records[name]

    def _set_name(self, record: NameRecord) -> NameRecord:
        if record.version not in self.manifests:
            raise UnknownVersion("version_not_found", f"there is no adapter version {record.version[:40]}", "version")
        stamped = replace(record, generation=self.names.generation + 1)
        self._write_name(stamped)
        return stamped

    def _write_name(self, entry: NameRecord | Tombstone) -> None:
        """Write a name's new entry, with the generation that it makes, and then let readers see it."""
        rows = [name_row(entry), counter_row(entry.generation, self.names.expired)]
        self._write(rows, [("lost", entry.name)] if entry.name in self.names.damaged else ())
        self.names.put(entry)

    def _write(self, rows: Iterable[Row], removed: Iterable[tuple[str, str]] = ()) -> None:
        if self._database is None:
            raise unwritable()
        self._database.write(rows, removed)

    def _opened(self, path: Path, names: Path) -> Database:
        """The database; made from the layout of former stores, or from what is left of a damaged file."""
        if not path.exists():
            rows = folder_layout.rows_of_names(names, self._wall_clock())
            if not names.exists() and any(self._versions.iterdir()):
                self._set_aside.mkdir(exist_ok=True)
                (self._set_aside / f"{path.stem}-{time.time_ns()}.missing").touch()
            create(path, [*rows, counter_row(max((row.fields().get("generation", 0) for row in rows), default=0), 0)])
        if names.exists():
            names.rename(names.with_name("names.taken-over"))
        try:
            return Database(path)
        except DamagedDatabaseError as error:
            logger.error("the catalogue's database is damaged and moved aside: %s", error)
            copy = set_aside(path, self._set_aside)
            saved = salvage(copy)
            lost = [Row.of("lost", name, {}) for name in saved.lost_names]
            rows = list(saved.rows)
            if all((row.kind, row.key) != ("counter", "names") for row in rows):
                latest = max((row.fields().get("generation", 0) for row in rows if row.kind == "name"), default=0)
                rows.append(counter_row(latest + _AFTER_DAMAGE, 0))
            create(path, {(row.kind, row.key): row for row in [*lost, *rows]}.values())
            return Database(path)

    def _load(self, database: Database) -> None:
        """Judge each row by itself."""
        fields: dict[str, list[tuple[Row, dict[str, object]]]] = {}
        damaged = []
        for row in database.rows:
            try:
                fields.setdefault(row.kind, []).append((row, row.fields()))
            except _UNREADABLE as error:
                damaged.append(row)
                logger.error("entry %s %r of the catalogue is damaged: %s", row.kind, row.key, error)
        self._load_versions({row.key: row for row, _ in fields.get("version", [])})
        entries = []
        for row, values in fields.get("name", []):
            try:
                entries.append(name_entry(values))
            except _UNREADABLE as error:
                damaged.append(row)
                logger.error("entry name %r of the catalogue cannot be read: %s", row.key, error)
        names = self.names
        for entry in sorted(entries, key=lambda entry: entry.generation):
            if isinstance(entry, Tombstone) or entry.version in self.manifests:
                names.put(entry)
            else:
                names.generation = entry.generation
                names.damaged[entry.name] = f"its version {entry.version} is damaged: load it again"
        for row, _ in fields.get("lost", []):
            names.damaged.setdefault(row.key, "its record was lost with a damaged database: load it again")
        for row in damaged:
            # A damaged kind, too, must not let a deleted name come back.
            for key in row.names() - names.records.keys() if row.kind not in ("version", "counter", "desired") else ():
                names.damaged[key] = "its record is damaged: load it again"
        self._load_counters(fields, damaged)

    def _load_counters(self, fields: dict[str, list[tuple[Row, dict[str, object]]]], damaged: list[Row]) -> None:
        counters = {row.key: values for row, values in fields.get("counter", [])}
        counted = counters.get("names", {})
        self.names.generation = max(self.names.generation, _number(counted.get("generation")))
        self.names.expired = _number(counted.get("expired"))
        if "names" not in counters or any(row.kind not in ("version", "desired") for row in damaged):
            self.names.generation += _AFTER_DAMAGE
            self.names.expired = self.names.generation
        adapters = []
        for _, values in fields.get("desired", []):
            adapters.append(DesiredRecord(**values))  # type: ignore[arg-type]
        self._damaged_desired = {
            key: "its entry is damaged: set the desired state again"
            for row in damaged
            if row.kind == "desired"
            for key in row.names()
        }
        counter = next((counters[key] for key in _DESIRED_COUNTERS if key in counters), {})
        is_complete = _number(counter.get("count")) == len(adapters)
        adapters.sort(key=lambda adapter: adapter.name)
        self._desired = DesiredState(_number(counter.get("generation")), tuple(adapters), is_complete)

    def _load_versions(self, rows: dict[str, Row]) -> None:
        """A version's manifest lies in the database and beside its weights; either mends the other."""
        mended = []
        on_disk = {path.name for path in self._versions.iterdir()}
        for version in sorted(rows.keys() | on_disk):
            path = self.folder(version) / MANIFEST
            row = rows.get(version)
            try:
                if row is None:
                    row = folder_layout.read_manifest_row(path, version)
                    mended.append(row)
                self.manifests[version] = manifest_of(row)
            except _UNREADABLE as error:
                self._damaged[version] = "its manifest is damaged: load it again"
                logger.error("adapter version %s is damaged on disk: %s", version, error)
                continue
            try:
                if self.folder(version).is_dir() and not _has_content(path, manifest_file(row)):
                    logger.warning("the manifest of adapter version %s is written again", version)
                    write_durably(path, manifest_file(row).encode(), self._staging)
            except OSError as error:
                logger.error("the manifest of adapter version %s cannot be written again: %s", version, error)
            if not self._is_on_disk(version):
                self._damaged[version] = "its files are gone: load it again"
        self._write(mended)


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _has_content(path: Path, content: str) -> bool:
    try:
        return path.read_bytes() == content.encode()
    except OSError:
        return False
