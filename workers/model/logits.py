"""Logits of the wanted rows in passes, so that those of few rows exist at once however large the vocabulary is.

A pass is the model's own forward with `logits_to_keep`, so whatever an architecture does about its head (scaling, caps)
is done in each. What lies below the head is computed once a step: `BodyOnce`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


class BodyOnce:
    """Lets the body of a model, which is all below its head, compute once for several calls of the model.

    Within `once()` the first call of the body computes, and every further one returns what the first left. Where it is
    not the body that a model's forward calls, or where that may not be kept, each pass computes anew: slower, as right.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        body: Any = model.base_model
        # The heads of some call the decoder within a wrapper (OPT).
        body = getattr(body, "decoder", body)
        self._compute = body.forward
        self._is_open = False
        self._left: Any = None
        self.may_keep = body is not model
        """Whether what a call left may stand for the next call."""
        self.was_called = False
        """Whether the model's forward has come through here: some call another module."""
        body.forward = self._forward

    @property
    def hidden_states(self) -> Tensor:
        """(rows, width) that the body left in this step: what the head reads."""
        assert self._left is not None, "a pass of the step comes first, and the body may be kept"
        hidden: Tensor = self._left[0]
        return hidden[0]

    @contextmanager
    def once(self) -> Iterator[None]:
        """One step: calls within have the same inputs."""
        self._is_open = self.may_keep
        try:
            yield
        finally:
            self._is_open, self._left = False, None

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        self.was_called = True
        if not self._is_open:
            return self._compute(*args, **kwargs)
        if self._left is None:
            self._left = self._compute(*args, **kwargs)
        return self._left
