"""Errors of a worker, each with a stable `code`. Only the ingress turns codes into HTTP.

WorkerError
├── WorkerConfigError       a setting that this worker cannot honour
│   └── UnsupportedModel    the base cannot be served right
├── NoRoomError             an adapter does not fit beside those that must stay
├── AdapterUnavailable      an adapter's weights cannot be fetched now
├── PromptTooLong           a prompt that leaves no room for an answer
├── InvalidTokenId          a token id that the base does not have
├── PoolingUnsupported      a base whose hidden states cannot be had
├── GrammarRefused          a grammar that cannot be followed, or costs too much
├── NonFiniteOutput         logits that are not finite
└── EngineFailed            the step loop ended or stands still
"""

from __future__ import annotations

from typing import ClassVar


class WorkerError(Exception):
    """Base of this package's errors. Arguments are what pickling needs; the message comes from `__str__`."""

    code: ClassVar[str] = "worker_error"
    retryable_elsewhere: ClassVar[bool] = False
    """Whether another worker may do what this one could not."""


class WorkerConfigError(WorkerError):
    """A setting that this worker cannot honour; the message names the setting, the value and the bound."""

    code: ClassVar[str] = "bad_config"


class NoRoomError(WorkerError):
    """An adapter does not fit: too many pages or slots belong to adapters that are leased, pinned, held or loading."""

    code: ClassVar[str] = "no_room"
    retryable_elsewhere = True

    def __init__(self, version: str, needed: int, free: int, in_use: int, pinned: int, total: int) -> None:
        """Pages: `needed` by the adapter; of `total`, `free` now, `in_use` (leased, held or loading), `pinned`."""
        super().__init__(version, needed, free, in_use, pinned, total)
        self.version = version
        self.needed = needed
        self.free = free
        self.in_use = in_use
        self.pinned = pinned
        self.total = total

    def __str__(self) -> str:
        return (
            f"adapter version {self.version[:12]} needs {self.needed} pages and a slot; of {self.total} pages "
            f"{self.free} are free, {self.in_use} serve requests or loads and {self.pinned} are pinned"
        )


class UnsupportedModel(WorkerConfigError):  # noqa: N818
    """The base model cannot be served right, so it is not served; the message says what stands in the way."""

    code: ClassVar[str] = "unsupported_model"


class EngineFailed(WorkerError):  # noqa: N818
    """The step loop ended with an error or stands still; the worker is to be replaced."""

    code: ClassVar[str] = "engine_failed"
    retryable_elsewhere = True


class AdapterUnavailable(WorkerError):  # noqa: N818
    """The weights of an adapter that is not resident cannot be fetched now; the same request may succeed later."""

    code: ClassVar[str] = "adapter_unavailable"
    retryable_elsewhere = True


class PromptTooLong(WorkerError):  # noqa: N818
    """A prompt that leaves no room for an answer."""

    code: ClassVar[str] = "context_length_exceeded"


class InvalidTokenId(WorkerError):  # noqa: N818
    """A request names a token id outside the base's vocabulary."""

    code: ClassVar[str] = "invalid_token_id"


class PoolingUnsupported(WorkerError):  # noqa: N818
    """The base gives logits only, so prompts cannot be embedded."""

    code: ClassVar[str] = "pooling_unsupported"


class NonFiniteOutput(WorkerError):  # noqa: N818
    """The logits of a request are infinite or no numbers, so there is no token to choose."""

    code: ClassVar[str] = "non_finite_output"


class GrammarRefused(WorkerError):  # noqa: N818
    """A grammar that cannot be read, or that costs more to follow than is allowed."""

    code: ClassVar[str] = "grammar_refused"
