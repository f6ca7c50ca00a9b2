"""Errors of the adapter store. Only the ingress turns a `kind` into an HTTP status.

AdapterStoreError
├── InvalidName         kind invalid       a name outside the grammar
├── InvalidKey          kind invalid       a key that is absolute, climbs, or leads out of its source
├── UnknownSource       kind invalid       no such source is configured
├── UnknownAdapter      kind not_found     no adapter has this name and no source offers it
├── UnknownKey          kind not_found     the source has nothing under this key
├── UnknownVersion      kind not_found     no adapter version of this digest is published
├── UnknownWorker       kind not_found     a worker has not said what it holds
├── AdapterRefused      kind refused       the adapter breaks a rule; `code` is the rule's
├── StaleGeneration     kind invalid       a desired state that is older than the one kept
├── SourceUnavailable   kind unavailable   the source cannot be reached now; trying again may help
└── StoreUnusable       kind internal      the state folder is damaged, locked, full or not writable
"""

# Names say what is wrong; "Error" would add nothing to "refused" or "unknown".
# ruff: noqa: N818

from __future__ import annotations

from typing import ClassVar, Literal

ErrorKind = Literal["invalid", "not_found", "refused", "unavailable", "internal"]


class AdapterStoreError(Exception):
    """Base of all. Messages are for clients: they carry no paths. Pickles by its three arguments."""

    kind: ClassVar[ErrorKind] = "internal"
    retryable: ClassVar[bool] = False
    retryable_elsewhere: ClassVar[bool] = False
    """Whether a worker that has the adapter already may do what this one could not."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(code, message, param)
        self.code = code
        """Stable and for machines: `rank_too_large`."""
        self.message = message
        self.param = param
        """The field, tensor or argument that is at fault, where there is one."""

    def __str__(self) -> str:
        return self.message


class InvalidName(AdapterStoreError):
    """`invalid_name`, `name_reserved`: an adapter name outside the grammar, or one that is the base's."""

    kind = "invalid"


class InvalidKey(AdapterStoreError):
    """`invalid_key`, `key_outside_root`: a key that could lead, or does lead, out of its source."""

    kind = "invalid"


class UnknownSource(AdapterStoreError):
    """`unknown_source`: no source of this name is configured."""

    kind = "invalid"


class UnknownAdapter(AdapterStoreError):
    """`adapter_not_found`: no adapter has this name and no source marked `resolve` offers it."""

    kind = "not_found"


class UnknownKey(AdapterStoreError):
    """`key_not_found`: the source answered, and has nothing under this key."""

    kind = "not_found"


class UnknownVersion(AdapterStoreError):
    """`version_not_found`: no version of this digest is published here."""

    kind = "not_found"


class UnknownWorker(AdapterStoreError):
    """A worker has not said what it holds since the store started. It is told so, and no client."""

    kind = "not_found"


class AdapterRefused(AdapterStoreError):
    """The adapter breaks a rule: `code` names the rule (`validation.py`), `param` the tensor, field or file."""

    kind = "refused"


class StaleGeneration(AdapterStoreError):
    """`stale_generation`: a newer desired state is kept already."""

    kind = "invalid"


class SourceUnavailable(AdapterStoreError):
    """`source_unavailable`, `source_changed`: the source could not be asked or read, or changed while it was read."""

    kind = "unavailable"
    retryable = True


class StoreUnusable(AdapterStoreError):
    """`store_locked`, `store_damaged`, `store_full`, `store_not_writable`: look at the state folder."""

    kind = "internal"
    retryable_elsewhere = True
