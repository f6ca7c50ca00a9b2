"""The catalogue's database: rows in one table, written in one transaction a change. SQLite in the state folder.

All SQL is SQLAlchemy's. SQLite's own words are pragmas in the connect hook and in `salvage`, which reads damaged files.
"""

from __future__ import annotations

import logging
import re
import shutil
import sqlite3
import time
from collections.abc import Iterable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import (
    Column,
    Engine,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    delete,
    event,
    insert,
    inspect,
    select,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import StaticPool

from lorafleet.adapter_store.errors import StoreUnusable
from lorafleet.adapter_store.files import sync, unwritable
from lorafleet.adapter_store.manifest import NAME_GRAMMAR
from lorafleet.adapter_store.records import Row

logger = logging.getLogger(__name__)

_NAMED_ENTRY = re.compile(rf'\{{"entry":"(?:name|lost):({NAME_GRAMMAR})"'.encode())
"""In the raw bytes of a database: a name of which there is a record."""

metadata = MetaData()
entries = Table(
    "entries",
    metadata,
    Column("kind", String(16), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("content", Text, nullable=False),
    Column("checksum", String(64), nullable=False),
)

_COMPANIONS = ("", "-wal", "-shm")


class DamagedDatabaseError(Exception):
    """The file is no database of ours, or its integrity check fails."""


@dataclass(frozen=True, slots=True)
class Salvage:
    """Entries that could be read from a damaged database."""

    rows: tuple[Row, ...]
    """Rows whose checksum holds; the latest of each entry."""
    lost_names: frozenset[str]
    """Names that occur in the file without a readable record."""


class Database:
    """An open database. One thread at a time may write."""

    def __init__(self, path: Path, *, is_new: bool = False) -> None:
        """Open and migrate. Raises DamagedDatabaseError, also for a file without our table unless it `is_new`."""
        self._connections: list[sqlite3.Connection] = []
        self._engine = _engine(path, self._connections)
        try:
            if not is_new and not inspect(self._engine).has_table(entries.name):
                raise DamagedDatabaseError("it has no table of entries")
            _migrate(self._engine)
            self.rows = self._read()
            """All rows as they were at the start."""
        except Exception as error:
            self.close()
            if isinstance(error, DBAPIError) and _is_environmental(error):
                raise _unusable(error) from error
            raise DamagedDatabaseError(str(error)) from error

    def write(self, rows: Iterable[Row], removed: Iterable[tuple[str, str]] = ()) -> None:
        """Replace rows and remove others by kind and key, in one durable transaction. Raises StoreUnusable."""
        given = list(rows)
        gone = [*removed, *((row.kind, row.key) for row in given)]
        values = [{"kind": r.kind, "key": r.key, "content": r.content, "checksum": r.checksum} for r in given]
        try:
            with self._engine.begin() as connection:
                for kind, key in gone:
                    connection.execute(delete(entries).where(entries.c.kind == kind, entries.c.key == key))
                if values:
                    connection.execute(insert(entries), values)
        except DBAPIError as error:
            raise _unusable(error) from error

    def close(self) -> None:
        """Close the connection, which moves the log into the file."""
        self._engine.dispose()
        for connection in self._connections:
            # The pool forgets one that an exception interrupted, and its lock would outlive us.
            with suppress(sqlite3.Error):
                connection.rollback()
            connection.close()

    def _read(self) -> list[Row]:
        with self._engine.connect() as connection:
            return [Row(*(str(value) for value in row)) for row in connection.execute(select(entries))]


def create(path: Path, rows: Iterable[Row]) -> None:
    """Make a database with these rows; it takes its place, replacing a former one, at once and durably."""
    aside = path.with_name(f"{path.name}.new")
    for suffix in _COMPANIONS:
        aside.with_name(aside.name + suffix).unlink(missing_ok=True)
    database = Database(aside, is_new=True)
    try:
        database.write(rows)
    finally:
        database.close()
    # A log left by the former file would be replayed into the new one.
    for suffix in _COMPANIONS[1:]:
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    sync(aside)
    aside.replace(path)
    sync(path.parent)


def set_aside(path: Path, folder: Path) -> Path:
    """Copy a damaged database and its log into `folder`; returns the copy."""
    folder.mkdir(exist_ok=True)
    copy = folder / f"{path.stem}-{time.time_ns()}{path.suffix}"
    for suffix in _COMPANIONS:
        part = path.with_name(path.name + suffix)
        if part.is_file():
            shutil.copyfile(part, copy.with_name(copy.name + suffix))
    sync(folder)
    return copy


def salvage(path: Path) -> Salvage:
    """Read a damaged file from both ends; neither end needs an index."""
    content = b"".join(
        part.read_bytes() for part in (path.with_name(path.name + s) for s in _COMPANIONS[:2]) if part.is_file()
    )
    seen: list[Row] = []
    for order in ("", " ORDER BY rowid DESC"):
        try:
            with closing(sqlite3.connect(path)) as connection:
                connection.text_factory = _text
                query = f"SELECT kind, key, content, checksum FROM entries NOT INDEXED{order}"
                for row in connection.execute(query):
                    seen.append(Row(*(str(value) for value in row)))
        except sqlite3.Error as error:
            logger.warning("the catalogue's database cannot be read to its end: %s", error)
    good: dict[tuple[str, str], tuple[int, Row]] = {}
    for row in seen:
        try:
            generation = row.fields().get("generation", 0)
        except (ValueError, RecursionError):
            continue
        if generation >= good.get((row.kind, row.key), (0, row))[0]:
            good[row.kind, row.key] = (generation, row)
    found = {match.decode() for match in _NAMED_ENTRY.findall(content)}
    for row in seen:
        if row.kind == "name":
            found |= row.names()
    names = {key for kind, key in good if kind == "name"}
    return Salvage(tuple(row for _, row in good.values()), frozenset(found - names))


def _engine(path: Path, connections: list[sqlite3.Connection]) -> Engine:
    """An engine that notes the connections it makes."""
    engine = create_engine(f"sqlite:///{path}", poolclass=StaticPool, connect_args={"check_same_thread": False})

    @event.listens_for(engine, "connect")
    def connected(connection: Any, _: object) -> None:
        connections.append(connection)
        connection.text_factory = _text
        # A checkpoint after each change: a damaged log then loses nothing that was committed.
        pragmas = ("journal_mode=WAL", "synchronous=FULL", "wal_autocheckpoint=1", "secure_delete=ON")
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}").fetchall()
        found = connection.execute("PRAGMA integrity_check").fetchall()
        if found != [("ok",)]:
            raise sqlite3.DatabaseError(f"integrity check: {found[:3]}")

    return engine


def _text(raw: bytes) -> str:
    # A row with a damaged byte must not keep the others from being read.
    return raw.decode(errors="replace")


def _migrate(engine: Engine) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _is_environmental(error: DBAPIError) -> bool:
    """True for a full or unwritable disk, which says nothing about the file."""
    code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)


def _unusable(error: DBAPIError) -> StoreUnusable:
    code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
    return unwritable(is_full=code == sqlite3.SQLITE_FULL)
