"""Names of adapters as plain data: one record a name, all records at one moment, and what workers are told of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Final, Literal

from lorafleet.adapter_store.manifest import NAME_GRAMMAR, AdapterManifest

NAME_PATTERN: Final = re.compile(NAME_GRAMMAR)
"""Names are matched in full."""

Origin = Literal["admin", "config", "resolve"]
"""Who gave a name: the admin API, a config's desired adapters, or a request for an adapter of a `resolve` source."""


@dataclass(frozen=True, slots=True)
class NameRecord:
    """A name and the version that it points at, as the catalogue keeps it."""

    name: str
    version: str
    source: str
    key: str
    pinned: bool
    warm: int | Literal["all"]
    """Number of workers, beside those that had the former version, on which it was made resident."""
    origin: Origin
    generation: int = 0
    """Given by the catalogue when the record is written."""


@dataclass(frozen=True, slots=True)
class NamedAdapter(NameRecord):
    """A name's record with the manifest of its version."""

    manifest: AdapterManifest = field(kw_only=True)

    @classmethod
    def of(cls, record: NameRecord, manifest: AdapterManifest) -> NamedAdapter:
        """Join a record and its manifest."""
        return cls(*(getattr(record, each.name) for each in fields(NameRecord)), manifest=manifest)


@dataclass(frozen=True, slots=True)
class NameTable:
    """All names at one moment."""

    generation: int
    """Grows with every change of any name, also over restarts."""
    adapters: tuple[NamedAdapter, ...]
    """Sorted by name."""


@dataclass(frozen=True, slots=True)
class VersionsToKeep:
    """The versions that have a name. A worker lets go of all others as soon as nothing uses them."""

    generation: int
    versions: Mapping[str, bool]
    """Version -> whether a name that points at it is pinned."""
