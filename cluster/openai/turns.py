"""One answer to a conversation, for replies of other forms than OpenAI's chats: its pieces, counts and end."""

from __future__ import annotations

from collections.abc import Mapping

from lorafleet.cluster.openai.reading import Piece, reader_of
from lorafleet.cluster.openai.requests import ChatBody
from lorafleet.cluster.serving.dispatch import PreparedRequest
from lorafleet.cluster.serving.prompts import Prompts
from lorafleet.workers.request import GenerateDelta


class Turn:
    """The answer so far."""

    def __init__(self, body: ChatBody, prepared: PreparedRequest, prompts: Prompts) -> None:
        self._reader = reader_of(body, prepared, prompts)
        self._texts: list[str] = []
        self.num_prompt_tokens = len(prepared.prompt_token_ids)
        self.num_tokens = 0
        self.num_reasoning_tokens = 0
        """Tokens that brought thoughts and nothing else; known of a stream only."""
        self.num_calls = 0
        self.last: GenerateDelta | None = None
        """The latest delta: worker, version, counts, and in the end the finish reason."""

    @property
    def num_cached_tokens(self) -> int:
        """Of the prompt."""
        return 0 if self.last is None else self.last.num_cached_tokens

    @property
    def stop_string(self) -> str | None:
        """That ended it."""
        found = None if self.last is None else self.last.stop_reason
        return found if isinstance(found, str) else None

    @property
    def is_cut_off(self) -> bool:
        """True if the bound on tokens ended it."""
        return self.last is not None and self.last.finish_reason == "length"

    def keep(self, delta: GenerateDelta) -> None:
        """Note a delta, to be read with all others."""
        self._note(delta)
        self._texts.append(delta.text)

    def read_all(self) -> list[Piece]:
        """The pieces of all that was kept."""
        return self._counted(self._reader.feed("".join(self._texts), is_last=True))

    def read(self, delta: GenerateDelta) -> list[Piece]:
        """The pieces that a delta brings."""
        self._note(delta)
        pieces = self._counted(self._reader.feed(delta.text, is_last=delta.finish_reason is not None))
        if pieces and all(piece.kind == "reasoning" for piece in pieces):
            self.num_reasoning_tokens += len(delta.token_ids)
        return pieces

    def headers(self) -> Mapping[str, str]:
        """The answering worker, and its version of the adapter."""
        if self.last is None:
            return {}
        headers = {"x-lorafleet-worker": self.last.worker_id, "x-lorafleet-version": self.last.version or ""}
        return {name: value for name, value in headers.items() if value}

    def _note(self, delta: GenerateDelta) -> None:
        self.last = delta
        self.num_tokens += len(delta.token_ids)

    def _counted(self, pieces: list[Piece]) -> list[Piece]:
        self.num_calls += sum(piece.kind == "call" for piece in pieces)
        return pieces
