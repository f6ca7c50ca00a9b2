"""Clients that ask all the time, and hold each token against the oracle: the answers of the undisturbed service."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

PAUSE_S = 0.5
"""How long a client waits after an answer that failed."""
SILENCE_S = 90.0
"""How long a client waits for the next byte."""


@dataclass(frozen=True, slots=True)
class Question:
    """A greedy request; its answer depends on nothing but itself."""

    model: str
    prompt: str
    max_tokens: int


Oracle = Mapping[Question, tuple[int, ...]]


@dataclass(slots=True)
class Outcome:
    """What one client saw of one request."""

    is_streamed: bool
    began_s: float
    ended_s: float = 0.0
    kind: str = "cut"
    """whole; error_event: ended by exactly one; cut: ended without one; refused: an error reply; plain: one that is no
    JSON; unreachable: no reply; silent: no byte for `SILENCE_S`; wrong: other tokens than the oracle's."""
    detail: str = ""
    num_tokens: int = 0
    longest_gap_s: float = 0.0
    """Longest time without a token, once there was one."""
    gaps_s: list[float] = field(default_factory=list)

    @property
    def is_failed(self) -> bool:
        return self.kind != "whole"


class Load:
    """Keeps `num_clients` requests under way, on a thread of its own. Every third one is not streamed."""

    def __init__(self, url: str, oracle: Oracle, num_clients: int) -> None:
        self._url = url
        self._oracle = oracle
        self._num_clients = num_clients
        self._ending = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="load")
        self.outcomes: list[Outcome] = []
        self.under_way: set[int] = set()
        """Clients whose request has been sent and not ended."""

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ask no more, and wait for the answers under way."""
        self._ending.set()
        self._thread.join()

    async def _run(self) -> None:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=None, sock_read=SILENCE_S)
        async with aiohttp.ClientSession(self._url, connector=connector, timeout=timeout) as session:
            await asyncio.gather(*(self._ask_on(session, number) for number in range(self._num_clients)))

    async def _ask_on(self, session: aiohttp.ClientSession, number: int) -> None:
        questions = list(self._oracle)
        serial = number
        while not self._ending.is_set():
            question = questions[serial % len(questions)]
            self.under_way.add(number)
            outcome = await ask(session, question, is_streamed=serial % 3 != 2, expected=self._oracle[question])
            self.under_way.discard(number)
            self.outcomes.append(outcome)
            serial += self._num_clients + 1
            if outcome.is_failed:
                await asyncio.sleep(PAUSE_S)


async def ask(
    session: aiohttp.ClientSession, question: Question, *, is_streamed: bool, expected: tuple[int, ...] | None
) -> Outcome:
    """Ask once. expected: the oracle's tokens; None: any."""
    outcome = Outcome(is_streamed, time.monotonic())
    tokens: list[int] = []
    body = {
        "model": question.model,
        "prompt": question.prompt,
        "max_tokens": question.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": is_streamed,
    }
    has_reply = False
    try:
        async with session.post("/v1/completions", json=body) as response:
            has_reply = True
            if response.status != 200:
                text = await response.text()
                outcome.kind, outcome.detail = _refusal(response.status, text)
            elif is_streamed:
                await _read_stream(response, tokens, outcome)
            else:
                tokens += (await response.json())["choices"][0]["token_ids"]
                outcome.kind = "whole"
    except TimeoutError:
        outcome.kind = "silent"
    except (aiohttp.ClientError, OSError, ValueError) as error:
        outcome.kind, outcome.detail = "cut" if has_reply else "unreachable", type(error).__name__
    outcome.ended_s = time.monotonic()
    outcome.num_tokens = len(tokens)
    if outcome.kind == "whole" and expected is None:
        outcome.detail = json.dumps(tokens)
    elif expected is not None and tuple(tokens) != (expected if outcome.kind == "whole" else expected[: len(tokens)]):
        outcome.kind, outcome.detail = "wrong", f"{question} got {tokens}"
    return outcome


async def _read_stream(response: aiohttp.ClientResponse, tokens: list[int], outcome: Outcome) -> None:
    """Read events to the end. What comes after an error event or after `[DONE]` is wrong."""
    last_s: float | None = None
    is_done = False
    async for raw in response.content:
        line = raw.decode().strip()
        if not line.startswith("data: "):
            continue
        if is_done or (outcome.kind == "error_event" and line != "data: [DONE]"):
            outcome.kind, outcome.detail = "wrong", f"after the end came {line[:200]}"
            return
        if line == "data: [DONE]":
            is_done = True
            outcome.kind = "whole" if outcome.kind == "cut" else outcome.kind
            continue
        event: dict[str, Any] = json.loads(line.removeprefix("data: "))
        if "error" in event:
            outcome.kind, outcome.detail = "error_event", str(event["error"].get("code"))
            continue
        for choice in event["choices"]:
            if choice.get("token_ids"):
                now_s = time.monotonic()
                if last_s is not None:
                    outcome.gaps_s.append(now_s - last_s)
                    outcome.longest_gap_s = max(outcome.longest_gap_s, now_s - last_s)
                last_s = now_s
                tokens += choice["token_ids"]


def _refusal(status: int, text: str) -> tuple[str, str]:
    try:
        return "refused", f"{status} {json.loads(text)['error']['code']}"
    except (ValueError, KeyError, TypeError):
        return "plain", f"{status} {text[:80]!r}"


async def _answers(url: str, questions: list[Question], *, at_once: int) -> Oracle:
    room = asyncio.Semaphore(at_once)
    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=120)) as session:

        async def answer(question: Question) -> tuple[int, ...]:
            async with room:
                outcome = await ask(session, question, is_streamed=True, expected=None)
            assert outcome.kind == "whole", f"the undisturbed service answered {outcome}"
            return tuple(json.loads(outcome.detail))

        return dict(zip(questions, await asyncio.gather(*map(answer, questions)), strict=True))


def oracle_of(url: str, questions: list[Question]) -> Oracle:
    """Ask each question with nothing else under way, and then all of them at once; the answers must agree."""
    oracle = asyncio.run(_answers(url, questions, at_once=1))
    assert oracle == asyncio.run(_answers(url, questions, at_once=len(questions))), "the service contradicts itself"
    return oracle
