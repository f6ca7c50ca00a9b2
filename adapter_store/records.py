"""Entries of the catalogue as plain data, and their checked form in the database."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lorafleet.adapter_store.names import NameRecord

EntryKind = Literal["name", "version", "desired", "counter", "lost"]
"""`name`: a name or its tombstone. `lost`: a name whose record could not be read from a damaged database."""


@dataclass(frozen=True, slots=True)
class Tombstone:
    """Record of a name that was deleted."""

    name: str
    explicit: bool
    """Somebody deleted it by name, so no `resolve` source may bring it back."""
    generation: int
    deleted_at: float = 0.0
    """Unix time, for its expiry."""
    by_config: bool = False
    """It left the configuration, which may bring it back."""


@dataclass(frozen=True, slots=True)
class DesiredRecord:
    """One adapter of the desired state."""

    name: str
    source: str
    key: str
    pinned: bool = False
    warm: int | Literal["all"] = 1


@dataclass(frozen=True, slots=True)
class DesiredState:
    """The adapters that the configuration asks for."""

    generation: int
    """Given by the writer; 0 before the first `set_desired`."""
    adapters: tuple[DesiredRecord, ...]
    """Sorted by name."""
    is_complete: bool = True
    """False if entries were damaged: do not delete an adapter because it is missing here; set the state anew."""


@dataclass(frozen=True, slots=True)
class NameChanges:
    """Records and tombstones that were written after a generation."""

    generation: int
    records: tuple[NameRecord, ...]
    deleted: tuple[str, ...]
    is_complete: bool
    """False if tombstones after that generation have expired: read the whole table."""


@dataclass(frozen=True, slots=True)
class Damage:
    """Something in the state folder that cannot be trusted and is not used."""

    kind: Literal["name", "version", "desired", "database"]
    entry: str
    """The name, the version, or the file that was moved aside."""
    reason: str


@dataclass(frozen=True, slots=True)
class Row:
    """An entry as the database holds it."""

    kind: str
    key: str
    content: str
    checksum: str

    @classmethod
    def of(cls, kind: EntryKind, key: str, fields: Mapping[str, object]) -> Row:
        """Pack fields. The content repeats the key, so one damaged byte cannot hide which entry it was."""
        content = json.dumps({"entry": f"{kind}:{key}", **fields}, separators=(",", ":"))
        return cls(kind, key, content, checksum(content))

    def fields(self) -> dict[str, Any]:
        """Unpack. Raises ValueError for a row that is not as it was written."""
        if checksum(self.content) != self.checksum:
            raise ValueError("its checksum is wrong")
        fields = json.loads(self.content)
        if not isinstance(fields, dict) or fields.pop("entry", None) != f"{self.kind}:{self.key}":
            raise ValueError("its content belongs to another entry")
        return fields

    def names(self) -> set[str]:
        """Both copies of the key: of a damaged row either may be the true one."""
        entry = self.content.partition('{"entry":"')[2].partition('"')[0]
        return {self.key, entry.partition(":")[2]} - {""}


def checksum(content: str) -> str:
    """Digest of an entry's content."""
    return hashlib.sha256(content.encode(errors="replace")).hexdigest()[:32]


def name_row(entry: NameRecord | Tombstone) -> Row:
    """The entry of a name, or of one that was deleted."""
    state = "deleted" if isinstance(entry, Tombstone) else "named"
    return Row.of("name", entry.name, {"state": state, **asdict(entry)})


def name_entry(fields: Mapping[str, Any]) -> NameRecord | Tombstone:
    """The inverse of `name_row`. Raises KeyError or TypeError."""
    values = {key: value for key, value in fields.items() if key != "state"}
    return Tombstone(**values) if fields["state"] == "deleted" else NameRecord(**values)


def counter_row(generation: int, expired: int) -> Row:
    """The entry of the generation that names have, and of the latest one that a tombstone was removed of."""
    return Row.of("counter", "names", {"generation": generation, "expired": expired})
