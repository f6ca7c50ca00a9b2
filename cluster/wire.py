"""Every type that crosses from one process to another, and how expected errors cross.

Values are frozen and carry no Ray types. Errors that callers expect travel as values: Serve logs a traceback of
whatever a replica raises.
"""

from __future__ import annotations

import asyncio
import functools
import json
import pickle
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ParamSpec, TypeVar

from msgspec import msgpack

from lorafleet.adapter_store.errors import AdapterStoreError
from lorafleet.adapter_store.manifest import AdapterChat, AdapterManifest
from lorafleet.adapter_store.names import NamedAdapter
from lorafleet.cluster.errors import ClusterError
from lorafleet.workers.errors import WorkerError
from lorafleet.workers.request import EngineRequest, GenerateDelta, SamplingParams
from lorafleet.workers.state import WorkerState
from lorafleet.workers.stats import ServedCounts

WIRE_VERSION = 5
"""Grows with every change of a type that two builds may exchange during a rolling update."""
VERSION_PREFIX = 16
"""Hex digits of a version that routers are told: enough to tell versions apart, short enough to broadcast."""


@dataclass(frozen=True, slots=True)
class NamedVersion:
    """A name, the version it stands for, and where that came from."""

    name: str
    version: str
    root: str
    """Source and key, as in `demo/shout`."""
    created_s: int = 0
    """When the store first saw the version, in Unix seconds."""
    chat: AdapterChat | None = None
    """How its conversations are written; None: as the base's."""
    vocabulary: int | None = None
    """How many tokens it knows; None: those of the base."""


Order = tuple[str, bytes | None]
"""The id of a sequence, and the request as `packed_request` writes it; None: abort the sequence."""
Batch = list[tuple[str, GenerateDelta | bytes]]
"""Request ids and deltas, in the order in which they were made. Bytes: a pickled error, which ends the sequence."""

Lookup = tuple[str, ...]
"""Names of adapters."""
Found = tuple[NamedVersion | None, ...]
"""Their versions at one moment; None for a name without one."""

EXPECTED = (AdapterStoreError, ClusterError, WorkerError)
"""What replicas raise of what callers did, or of what is not there now."""

INGRESS_ID_BYTES = 32
KEY_BYTES = 32
_FRAME_HEAD_BYTES = 4

Params = ParamSpec("Params")
Result = TypeVar("Result")


def _plain(value: object) -> str:
    """Sampling parameters as JSON: it has also what MessagePack lacks, say the large integers of a client's schema."""
    if isinstance(value, SamplingParams):
        return json.dumps(value.model_dump(exclude_defaults=True))
    raise NotImplementedError(f"a {type(value).__name__} does not cross")


def _from_plain(kind: type, value: Any) -> SamplingParams:
    assert kind is SamplingParams
    return SamplingParams.model_validate(json.loads(value))


_to_msgpack = msgpack.Encoder(enc_hook=_plain).encode
_batch_of = msgpack.Decoder(Batch).decode
_order_of = msgpack.Decoder(Order).decode
_lookup_of = msgpack.Decoder(Lookup).decode
_found_of = msgpack.Decoder(Found).decode
_request_of = msgpack.Decoder(EngineRequest, dec_hook=_from_plain).decode


@dataclass(frozen=True, slots=True)
class Address:
    """Address of a process' connections. A client sends the key, and to a worker its ingress id; then frames go."""

    host: str
    port: int
    key: bytes = field(repr=False)


def frame(message: Batch | Order | Lookup | Found) -> bytes:
    """A message as it goes over a connection: its length, big-endian, and itself as MessagePack."""
    body = _to_msgpack(message)
    return len(body).to_bytes(_FRAME_HEAD_BYTES, "big") + body


async def read_batch(reader: asyncio.StreamReader) -> Batch:
    """The next batch of a worker. Raises IncompleteReadError at the connection's end, and OSError."""
    return _batch_of(await _read_frame(reader))


async def read_order(reader: asyncio.StreamReader) -> Order:
    """The next order of an ingress. Raises IncompleteReadError at the connection's end, OSError and MsgspecError."""
    return _order_of(await _read_frame(reader))


async def read_lookup(reader: asyncio.StreamReader) -> Lookup:
    """The next question of an ingress to the store. Raises as `read_order`."""
    return _lookup_of(await _read_frame(reader))


async def read_found(reader: asyncio.StreamReader) -> Found:
    """The store's next answer. Raises as `read_order`."""
    return _found_of(await _read_frame(reader))


async def _read_frame(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readexactly(_FRAME_HEAD_BYTES)
    return await reader.readexactly(int.from_bytes(head, "big"))


def packed_request(request: EngineRequest) -> bytes:
    """A request as plain data. May raise, where a caller's schema holds what no JSON has."""
    return _to_msgpack(request)


def unpacked_request(packed: bytes) -> EngineRequest:
    """The request in an order. Raises ValueError or MsgspecError for one of another build."""
    return _request_of(packed)


def packed_error(error: Exception) -> bytes:
    """An error for `Batch`. Only those of `EXPECTED` survive it for certain."""
    return pickle.dumps(error)


def unpacked_error(packed: bytes) -> Exception:
    """An error of a worker: ingresses connect only to addresses that Serve gave them, and trust what is there."""
    error: Exception = pickle.loads(packed)
    return error


@dataclass(frozen=True, slots=True)
class NamesAt:
    """All names at one moment, or what changed of them since another."""

    generation: int
    """Grows with every change of any name."""
    entries: tuple[NamedVersion, ...]
    deleted: tuple[str, ...] = ()
    is_whole: bool = True
    """Whether names that are not in `entries` are gone."""


def named_version(adapter: NamedAdapter, created_s: int) -> NamedVersion:
    """The store's entry without what only the admin plane shows."""
    root = f"{adapter.source}/{adapter.key}"
    return NamedVersion(
        adapter.name, adapter.version, root, created_s, adapter.manifest.chat, adapter.manifest.vocabulary
    )


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """Weights in the object store. Wrapped, so that Ray hands the reference on and not a copy of the weights."""

    ref: Any
    """ObjectRef of an AdapterWeights."""


@dataclass(frozen=True, slots=True)
class StoreProblem:
    """Something in the store's state folder that is not used, or why the folder cannot be written."""

    code: str
    """`store_damaged`, `store_full` or `store_not_writable`."""
    kind: str
    """`name`, `version`, `desired`, `database` or `folder`; `user_config` for a refused one."""
    entry: str
    """The name, the version or the file; empty for the folder."""
    reason: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """Pages that an adapter would take on one worker now."""

    worker_id: str
    pages: int | None
    evicts: tuple[str, ...]
    """Versions that would have to go."""
    refusal: str | None
    """Why it does not fit; None: it does."""


@dataclass(frozen=True, slots=True)
class Placed:
    """An adapter that has a name, and where it is."""

    adapter: NamedAdapter
    pages: int | None
    """Pages of a worker's pool that it takes; None where that is not known."""
    workers: Mapping[str, str]
    """Worker id -> `resident`, `loading`, `retired` or `absent`; `unknown` if it did not answer in time."""


@dataclass(frozen=True, slots=True)
class ListedWorkers:
    """All workers of the service."""

    states: tuple[WorkerState, ...]
    """Of those that answer, by id."""
    silent: tuple[str, ...]
    """Ids of those that live and did not answer in time."""


@dataclass(frozen=True, slots=True)
class Validation:
    """Result of a dry run."""

    manifest: AdapterManifest
    estimates: tuple[Estimate, ...]


@dataclass(frozen=True, slots=True)
class WorkerCounts:
    """One worker's account for `GET /metrics`."""

    state: WorkerState
    served: ServedCounts


@dataclass(frozen=True, slots=True)
class RoutingReport:
    """A worker's own account of what it holds and how busy it is."""

    resident: tuple[str, ...] = ()
    """Sorted prefixes (`VERSION_PREFIX`) of the versions in its pool, retired ones apart."""
    free_pages: int = 0
    """Free pages of its adapter pool."""
    answering: tuple[tuple[str, int], ...] = ()
    """Ids of ingresses, sorted, and how many answers the worker makes for each: running and waiting."""

    def packed(self) -> dict[str, Any]:
        """The form that Serve's controller carries: a plain dict."""
        return {"wire_version": WIRE_VERSION, **asdict(self)}

    @classmethod
    def unpacked(cls, stats: Mapping[str, Any] | None) -> RoutingReport:
        """The report in a dict of Serve's; an empty one where a worker of another build wrote it, or none did."""
        if not stats or stats.get("wire_version") != WIRE_VERSION:
            return cls()
        answering = tuple((ingress_id, count) for ingress_id, count in stats["answering"])
        return cls(tuple(stats["resident"]), stats["free_pages"], answering)


PART = 500
"""Items that are unpickled before other calls have their turn."""


def in_parts(items: Sequence[Any]) -> list[bytes]:
    """Pickle a long list part by part, for `from_parts`. Call it in a thread."""
    return [pickle.dumps(items[start : start + PART]) for start in range(0, len(items), PART)]


async def from_parts(parts: Iterable[bytes]) -> list[Any]:
    """The items of `in_parts`."""
    items: list[Any] = []
    for part in parts:
        items += pickle.loads(part)
        await asyncio.sleep(0)
    return items


@dataclass(frozen=True, slots=True)
class Failure:
    """Came instead of a result."""

    error: Exception


def replying(method: Callable[Params, Awaitable[Result]]) -> Callable[Params, Awaitable[Result | Failure]]:
    """A replica's method that returns expected errors instead of raising them."""

    @functools.wraps(method)
    async def reply(*args: Params.args, **kwargs: Params.kwargs) -> Result | Failure:
        try:
            return await method(*args, **kwargs)
        except EXPECTED as error:
            return Failure(error)

    return reply


def result_of(reply: Result | Failure) -> Result:
    """Return a method's result, or raise its error."""
    if isinstance(reply, Failure):
        raise reply.error
    return reply
