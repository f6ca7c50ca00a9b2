"""Manifests beside the weights, and names as files: the layout of stores before the database, taken over once."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorafleet.adapter_store.manifest import (
    NAME_GRAMMAR,
    AdapterManifest,
    OwnToken,
    shared_chat,
    shared_extra,
    shared_module,
    shared_modules,
)
from lorafleet.adapter_store.names import NameRecord
from lorafleet.adapter_store.records import Row, Tombstone, name_row

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"

_UNCHECKED = 1
_CHECKED = 2
"""Formats of a manifest's file."""


def manifest_row(manifest: AdapterManifest) -> Row:
    """The entry of a version."""
    return Row.of("version", manifest.version, {"manifest": asdict(manifest)})


def manifest_file(row: Row) -> str:
    """The content of the file beside the weights: the entry of the database, with its checksum."""
    return json.dumps({"format": _CHECKED, "content": row.content, "checksum": row.checksum})


def manifest_of(row: Row) -> AdapterManifest:
    """The manifest that an entry holds. Raises ValueError, KeyError or TypeError."""
    return _manifest(row.fields()["manifest"])


def read_manifest_row(path: Path, version: str) -> Row:
    """The entry that a manifest's file holds. Raises ValueError, KeyError, TypeError, RecursionError or OSError."""
    fields = json.loads(path.read_bytes())
    if not isinstance(fields, dict):
        raise ValueError("it is not an object")
    if fields.pop("format") == _CHECKED:
        row = Row("version", version, fields["content"], fields["checksum"])
        row.fields()
        return row
    manifest = _manifest(fields)
    if manifest.version != version:
        raise ValueError("it belongs to another version")
    return manifest_row(manifest)


def rows_of_names(folder: Path, now: float) -> list[Row]:
    """Entries of a `names` folder; a file that cannot be read becomes the entry of a lost name."""
    rows = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = path.name.removesuffix(".json")
        try:
            rows.append(_row_of_name(json.loads(path.read_bytes()), name, now))
        except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
            logger.error("the record of adapter name %r is damaged: %s", name, error)
            if re.fullmatch(NAME_GRAMMAR, name):
                rows.append(Row.of("lost", name, {}))
    return rows


def _row_of_name(fields: Any, name: str, now: float) -> Row:
    if not isinstance(fields, dict) or fields.pop("format") != _UNCHECKED or fields["name"] != name:
        raise ValueError("it is of another format or name")
    state = fields.pop("state")
    if state == "deleted":
        entry: NameRecord | Tombstone = Tombstone(**{"deleted_at": now, **fields})
    elif state == "named":
        entry = NameRecord(**fields)
    else:
        raise ValueError(f"its state is {state!r}")
    if not isinstance(entry.generation, int):
        raise ValueError("its generation is not a number")
    return name_row(entry)


def _manifest(fields: dict[str, Any]) -> AdapterManifest:
    modules = shared_modules(shared_module(m["name"], m["rank"], m["scaling"]) for m in fields.pop("modules"))
    # Manifests of stores that knew no extras have none.
    extras = tuple(shared_extra(e["name"], e["kind"], e["num_rows"], e["width"]) for e in fields.pop("extras", ()))
    lists = {name: tuple(fields.pop(name, ())) for name in ("targets", "invocation", "warnings")}
    chat = fields.pop("chat", None)
    if chat is not None:
        own_tokens = tuple(OwnToken(**token) for token in chat.get("own_tokens", ()))
        chat = shared_chat(chat["template"], tuple(chat["end_token_ids"]), own_tokens)
    return AdapterManifest(**{**fields, **lists, "modules": modules, "extras": extras, "chat": chat})
