"""OpenAI's replies, whole and in chunks, written straight as JSON: no model is built for a token.

One reply lives as long as one HTTP request. It is fed with deltas and keeps what the usage, the offsets of later tokens
and the whole answer need.
"""

from __future__ import annotations

import codecs
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from msgspec.structs import replace

from lorafleet.cluster.errors import ErrorReply
from lorafleet.cluster.openai.reading import Piece, call_id, reader_of
from lorafleet.cluster.openai.requests import ChatBody, CompletionBody
from lorafleet.cluster.openai.templates import TEXT, TOKEN_ID, EventTemplate
from lorafleet.cluster.openai.writing import to_json, written
from lorafleet.cluster.serving.dispatch import PreparedRequest
from lorafleet.cluster.serving.prompts import Prompts
from lorafleet.workers.request import GenerateDelta, TokenLogprobs

LOWEST_LOGPROB = -9999.0
"""What OpenAI writes for a token that cannot come; JSON has no infinity."""

DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Answer:
    """One answer as far as it has come."""

    prepared: PreparedRequest
    last: GenerateDelta | None = None
    """The latest delta: worker, version, counts, and in the end the finish reason."""
    num_tokens: int = 0
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """These three only for a whole reply."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    num_characters: int = 0
    """Where the next token begins in the text, echo included; counted only where logprobs are reported."""
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))
    template: EventTemplate | None = None
    """Of its events that have nothing but text and token ids to say."""

    def served_by(self) -> dict[str, str | None]:
        """The worker that answered, and its version of the adapter (None: the base)."""
        assert self.last is not None
        return {"worker_id": self.last.worker_id, "version": self.last.version}


class Reply(ABC):
    """The parts that replies of completions and chats share: the frame, the usage, and who served it."""

    id_prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(
        self,
        body: CompletionBody | ChatBody,
        prepared: Sequence[PreparedRequest],
        request_id: str | None = None,
    ) -> None:
        self._prepared = prepared
        self._wants_token_ids = body.return_token_ids
        self._wants_usage = body.stream_options.include_usage
        self._wants_every_usage = self._wants_usage and body.stream_options.continuous_usage_stats
        self._wants_prompt_logprobs = body.prompt_logprobs is not None
        self._num_prompt_tops = body.prompt_logprobs or 0
        self._answers = [Answer(request) for request in prepared for _ in range(request.request.n)]
        self._frame = {
            "id": f"{self.id_prefix}-{body.request_id or body.rid or request_id or uuid.uuid4().hex}",
            "object": self.kind,
            "created": int(time.time()),
            "model": body.model,
        }
        self._head = f"data: {to_json(self._frame | {'object': self.chunk_kind})[:-1]},"
        self._tail = ',"usage":null}\n\n' if self._wants_usage else "}\n\n"

    def chunk(self, delta: GenerateDelta) -> bytes | None:
        """The event for a delta; None when nothing of it is to be seen yet."""
        answer = self._answers[delta.index]
        if self._is_plain(answer, delta):
            return self._plain_event(answer, delta, delta.text)
        return self._event(answer, delta)

    def _is_plain(self, answer: Answer, delta: GenerateDelta) -> bool:
        """Return True if a delta's event has text, and nothing else but token ids."""
        is_amid = answer.last is not None and delta.finish_reason is None
        return is_amid and bool(delta.text) and delta.logprobs is None and not self._wants_every_usage

    def _plain_event(self, answer: Answer, delta: GenerateDelta, text: str) -> bytes:
        if answer.template is None:
            num_tokens = answer.num_tokens
            event = self._event(answer, replace(delta, text=TEXT, token_ids=(TOKEN_ID,)))
            assert event is not None
            answer.template, answer.num_tokens = EventTemplate(event), num_tokens
        answer.last = delta
        answer.num_tokens += len(delta.token_ids)
        return answer.template.event(text, delta.token_ids)

    def _event(self, answer: Answer, delta: GenerateDelta) -> bytes | None:
        is_first = answer.last is None
        delta = self._noted(answer, delta)
        is_last = delta.finish_reason is not None
        if not (self._has_news(delta) or is_first or is_last or delta.logprobs or self._wants_token_ids):
            return None
        choice = self._chunk_choice(answer, delta, is_first)
        if is_last:
            choice["stop_reason"] = delta.stop_reason
        extra: dict[str, Any] = {}
        if is_first or is_last:
            extra["lorafleet"] = answer.served_by()
        if self._wants_token_ids:
            choice["token_ids"] = delta.token_ids
            if is_first:
                self._put_prompt_token_ids(answer, extra, choice)
        extra_fields = f"{to_json(extra)[1:-1]}," if extra else ""
        return f'{self._head}{extra_fields}"choices":[{to_json(choice)}]{self._tail_of(answer)}'.encode()

    def _tail_of(self, answer: Answer) -> str:
        return f',"usage":{to_json(self._usage_of(answer))}}}\n\n' if self._wants_every_usage else self._tail

    def _has_news(self, delta: GenerateDelta) -> bool:
        """True if a delta has text to show."""
        return bool(delta.text)

    def _finish_reason(self, index: int, delta: GenerateDelta) -> str | None:
        """Return the reason why an answer ended, in the client's terms."""
        return delta.finish_reason

    def end(self) -> bytes:
        """The events that end a stream: the usage if asked for, and [DONE]."""
        if not self._wants_usage:
            return DONE
        return f'{self._head}"choices":[],"usage":{to_json(self._usage())}}}\n\n'.encode() + DONE

    def failure(self, error: ErrorReply) -> bytes:
        """The event that ends a stream whose status is long sent; no [DONE] follows it."""
        return b"data: " + error.body() + b"\n\n"

    def feed(self, delta: GenerateDelta) -> None:
        """Keep a delta for the whole reply."""
        answer = self._answers[delta.index]
        is_first = answer.last is None
        delta = self._noted(answer, delta)
        answer.texts.append(self._echoed(answer) + delta.text if is_first else delta.text)
        answer.token_ids.extend(delta.token_ids)
        answer.prompt_logprobs += delta.prompt_logprobs or ()
        answer.logprobs.extend(self._shown_logprobs(delta))

    def whole(self) -> bytes:
        """The whole reply, once every answer has its finish reason."""
        reply: dict[str, Any] = dict(self._frame)
        choices = []
        for index, answer in enumerate(self._answers):
            assert answer.last is not None
            choice = self._whole_choice(index, answer)
            choice["finish_reason"] = self._finish_reason(index, answer.last)
            choice["stop_reason"] = answer.last.stop_reason
            if self._wants_token_ids:
                choice["token_ids"] = answer.token_ids
                self._put_prompt_token_ids(answer, reply, choice)
            if self._wants_prompt_logprobs:
                self._put_prompt_logprobs(self._prompt_logprobs(answer), reply, choice)
            if len(self._answers) > 1:
                choice["lorafleet"] = answer.served_by()
            choices.append(choice)
        reply |= {"choices": choices, "usage": self._usage(), "lorafleet": self._answers[0].served_by()}
        return written(reply)

    def headers(self) -> Mapping[str, str]:
        """Return the workers that serve the answers begun so far, and the adapter's version."""
        begun = [answer.last for answer in self._answers if answer.last is not None]
        workers = dict.fromkeys(delta.worker_id for delta in begun if delta.worker_id)
        versions = dict.fromkeys(delta.version for delta in begun if delta.version)
        headers = {"x-lorafleet-worker": ",".join(workers), "x-lorafleet-version": ",".join(versions)}
        return {name: value for name, value in headers.items() if value}

    def _noted(self, answer: Answer, delta: GenerateDelta) -> GenerateDelta:
        answer.last = delta
        answer.num_tokens += len(delta.token_ids)
        return delta

    def _shown_logprobs(self, delta: GenerateDelta) -> tuple[TokenLogprobs, ...]:
        """Those that belong into `logprobs`."""
        return delta.logprobs or ()

    def _prompt_logprobs(self, answer: Answer) -> list[dict[str, Any] | None]:
        """As vLLM has them: of each prompt token what it and the likeliest ones have, by token id."""
        found: list[dict[str, Any] | None] = []
        for token in answer.prompt_logprobs:
            if token.logprob is None:
                found.append(None)
                continue
            ranks = {token_id: rank for rank, (token_id, _) in enumerate(token.top, 1)}
            entries = {token.token_id: token.logprob, **dict(token.top[: self._num_prompt_tops])}
            found.append(
                {
                    str(token_id): {
                        "logprob": _finite(logprob),
                        "rank": ranks.get(token_id),
                        "decoded_token": answer.prepared.vocabulary.piece(token_id).text,
                    }
                    for token_id, logprob in entries.items()
                }
            )
        return found

    def _usage_of(self, answer: Answer) -> dict[str, Any]:
        num_prompt_tokens = len(answer.prepared.prompt_token_ids)
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": answer.num_tokens,
            "total_tokens": num_prompt_tokens + answer.num_tokens,
        }

    def _usage(self) -> dict[str, Any]:
        num_prompt_tokens = sum(len(request.prompt_token_ids) for request in self._prepared)
        num_tokens = sum(answer.num_tokens for answer in self._answers)
        # The answers to one prompt share its tokens, so a prompt counts once.
        first_answers, index = [], 0
        for request in self._prepared:
            first_answers.append(self._answers[index])
            index += request.request.n
        num_cached = sum(answer.last.num_cached_tokens for answer in first_answers if answer.last is not None)
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_tokens,
            "total_tokens": num_prompt_tokens + num_tokens,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }

    def _echoed(self, answer: Answer) -> str:
        """Return the text that the answer begins with."""
        return ""

    @abstractmethod
    def _chunk_choice(self, answer: Answer, delta: GenerateDelta, is_first: bool) -> dict[str, Any]:
        """The choice of one chunk."""

    @abstractmethod
    def _whole_choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """The choice of the whole reply, but for how it ended."""

    @abstractmethod
    def _put_prompt_token_ids(self, answer: Answer, reply: dict[str, Any], choice: dict[str, Any]) -> None:
        """The prompt's token ids, where vLLM has them for this kind of reply."""

    @abstractmethod
    def _put_prompt_logprobs(self, found: Sequence[Any], reply: dict[str, Any], choice: dict[str, Any]) -> None:
        """The prompt's logprobs, where vLLM has them for this kind of reply."""


class CompletionReply(Reply):
    """Reply of POST /v1/completions."""

    id_prefix = "cmpl"
    kind = chunk_kind = "text_completion"

    def __init__(
        self, body: CompletionBody, prepared: Sequence[PreparedRequest], request_id: str | None = None
    ) -> None:
        super().__init__(body, prepared, request_id)
        self._echo = body.echo
        self._num_tops = body.logprobs
        self._is_prompt_only = body.is_prompt_only

    def _noted(self, answer: Answer, delta: GenerateDelta) -> GenerateDelta:
        if self._is_prompt_only:
            delta = replace(delta, token_ids=(), text="", logprobs=None, finish_reason="length", stop_reason=None)
        return super()._noted(answer, delta)

    def _echoed(self, answer: Answer) -> str:
        if not self._echo:
            return ""
        prepared = answer.prepared
        prompt = prepared.request.prompt
        return prompt if isinstance(prompt, str) else prepared.vocabulary.text_of(prepared.prompt_token_ids)

    def _shown_logprobs(self, delta: GenerateDelta) -> tuple[TokenLogprobs, ...]:
        is_echoed = self._echo and self._num_tops is not None
        return ((delta.prompt_logprobs or ()) if is_echoed else ()) + (delta.logprobs or ())

    def _chunk_choice(self, answer: Answer, delta: GenerateDelta, is_first: bool) -> dict[str, Any]:
        tokens = self._shown_logprobs(delta)
        return {
            "index": delta.index,
            "text": self._echoed(answer) + delta.text if is_first else delta.text,
            "logprobs": self._logprobs(answer, tokens) if tokens else None,
            "finish_reason": delta.finish_reason,
        }

    def _whole_choice(self, index: int, answer: Answer) -> dict[str, Any]:
        return {
            "index": index,
            "text": "".join(answer.texts),
            "logprobs": self._logprobs(answer, answer.logprobs) if answer.logprobs else None,
        }

    def _put_prompt_token_ids(self, answer: Answer, reply: dict[str, Any], choice: dict[str, Any]) -> None:
        choice["prompt_token_ids"] = answer.prepared.prompt_token_ids

    def _put_prompt_logprobs(self, found: Sequence[Any], reply: dict[str, Any], choice: dict[str, Any]) -> None:
        choice["prompt_logprobs"] = found

    def _logprobs(self, answer: Answer, tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
        texts: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        pieces = answer.prepared.vocabulary.piece
        for token in tokens:
            piece = pieces(token.token_id)
            texts.append(piece.text)
            offsets.append(answer.num_characters)
            if not piece.is_special:
                answer.num_characters += len(answer.decoder.decode(piece.utf8))
            if token.logprob is None:
                values.append(None)
                tops.append(None)
                continue
            values.append(_finite(token.logprob))
            # Worst first, so that of two tokens that read alike the likelier one stays.
            likeliest = reversed(token.top[: self._num_tops])
            top = {pieces(token_id).text: _finite(logprob) for token_id, logprob in likeliest}
            top.setdefault(piece.text, _finite(token.logprob))
            tops.append(top)
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


class ChatReply(Reply):
    """Reply of POST /v1/chat/completions."""

    id_prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(
        self, body: ChatBody, prepared: Sequence[PreparedRequest], prompts: Prompts, request_id: str | None = None
    ) -> None:
        super().__init__(body, prepared, request_id)
        self._readers = [reader_of(body, answer.prepared, prompts) for answer in self._answers]
        self._num_calls = [0] * len(self._answers)
        self._has_role = [False] * len(self._answers)
        """Of which answers the role has been said."""
        self._shown: dict[str, Any] = {}
        """What the present delta shows of its message."""

    def chunk(self, delta: GenerateDelta) -> bytes | None:
        """The events for a delta: one for each part of the message that it adds to."""
        answer = self._answers[delta.index]
        events = self._openings()
        pieces = self._readers[delta.index].feed(delta.text, is_last=delta.finish_reason is not None)
        if len(pieces) == 1 and pieces[0].kind == "content" and self._is_plain(answer, delta):
            self._shown = {"content": TEXT}
            return self._plain_event(answer, delta, pieces[0].text)
        *early, self._shown = [self._message_delta(delta.index, piece) for piece in pieces] or [{}]
        for each in early:
            events += self._part_event(delta.index, self._role(delta.index) | each)
        last = self._event(answer, delta)
        return events + last if last is not None else events or None

    def _openings(self) -> bytes:
        """The events that begin several answers, in their order: OpenAI's client takes them in no other."""
        if len(self._answers) == 1 or any(self._has_role):
            return b""
        opening = {"content": ""}
        return b"".join(self._part_event(n, self._role(n) | opening) for n in range(len(self._answers)))

    def _part_event(self, index: int, part: dict[str, Any]) -> bytes:
        choice = {"index": index, "delta": part, "logprobs": None, "finish_reason": None}
        return f'{self._head}"choices":[{to_json(choice)}]{self._tail_of(self._answers[index])}'.encode()

    def _role(self, index: int) -> dict[str, Any]:
        """The answer's role, once."""
        if self._has_role[index]:
            return {}
        self._has_role[index] = True
        return {"role": "assistant"}

    def _message_delta(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return the piece's part of its answer's message: a call's name first, then its arguments."""
        if piece.kind in ("content", "reasoning"):
            return {"content" if piece.kind == "content" else "reasoning_content": piece.text}
        if piece.kind == "call":
            call = {"index": self._num_calls[index], "id": call_id(), "type": "function"}
            self._num_calls[index] += 1
            return {"tool_calls": [call | {"function": {"name": piece.text, "arguments": ""}}]}
        return {"tool_calls": [{"index": self._num_calls[index] - 1, "function": {"arguments": piece.text}}]}

    def _has_news(self, delta: GenerateDelta) -> bool:
        return bool(self._shown)

    def _finish_reason(self, index: int, delta: GenerateDelta) -> str | None:
        is_called = self._num_calls[index] and delta.finish_reason == "stop"
        return "tool_calls" if is_called else delta.finish_reason

    def _chunk_choice(self, answer: Answer, delta: GenerateDelta, is_first: bool) -> dict[str, Any]:
        content = self._role(delta.index)
        if is_first and not self._shown:
            content["content"] = ""
        return {
            "index": delta.index,
            "delta": content | self._shown,
            "logprobs": self._logprobs(answer, delta.logprobs) if delta.logprobs else None,
            "finish_reason": self._finish_reason(delta.index, delta),
        }

    def _whole_choice(self, index: int, answer: Answer) -> dict[str, Any]:
        pieces = self._readers[index].feed("".join(answer.texts), is_last=True)
        said, thought = (
            "".join(piece.text for piece in pieces if piece.kind == kind) for kind in ("content", "reasoning")
        )
        calls: list[dict[str, Any]] = []
        for piece in pieces:
            if piece.kind == "call":
                calls.append({"id": call_id(), "type": "function", "function": {"name": piece.text, "arguments": ""}})
            elif piece.kind == "arguments":
                calls[-1]["function"]["arguments"] += piece.text
        self._num_calls[index] = len(calls)
        message: dict[str, Any] = {"role": "assistant", "content": said if said or not calls else None, "refusal": None}
        if thought:
            message["reasoning_content"] = thought
        if calls:
            message["tool_calls"] = calls
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(answer, answer.logprobs) if answer.logprobs else None,
        }

    def _put_prompt_token_ids(self, answer: Answer, reply: dict[str, Any], choice: dict[str, Any]) -> None:
        reply["prompt_token_ids"] = answer.prepared.prompt_token_ids

    def _put_prompt_logprobs(self, found: Sequence[Any], reply: dict[str, Any], choice: dict[str, Any]) -> None:
        reply["prompt_logprobs"] = found

    def _logprobs(self, answer: Answer, tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
        def entry(token_id: int, logprob: float) -> dict[str, Any]:
            piece = answer.prepared.vocabulary.piece(token_id)
            return {"token": piece.text, "logprob": _finite(logprob), "bytes": list(piece.utf8)}

        content = []
        for token in tokens:
            assert token.logprob is not None
            top = [entry(token_id, logprob) for token_id, logprob in token.top]
            content.append(entry(token.token_id, token.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}


def _finite(logprob: float) -> float:
    return logprob if logprob >= LOWEST_LOGPROB else LOWEST_LOGPROB  # NaN compares false, and is no JSON either
