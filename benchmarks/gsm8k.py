"""Grade-school maths through a running server: few-shot GSM8K by completions over HTTP.

    python benchmarks/gsm8k.py --url http://127.0.0.1:8000 --model llama --data test.jsonl [--num-shots 5]

The data is in GSM8K's own form: a JSON object a line, with `question` and an `answer` that ends in `#### N`. The first
lines are the examples of every prompt, and the lines after them are asked, greedily. An answer is right when its number
is: the one after `####`, or else the last one; without a number it is invalid. `--model` is whatever the server serves,
the base or an adapter. A key for the server is taken from OPENAI_API_KEY. Appends a line of JSON with what came of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import bars
import httpx

HERE = Path(__file__).parent
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
MARK = "####"
QUESTION = "Question:"
MAX_TRIES = 20
"""Of one question, while the server says that it is too busy."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A line of the data."""

    question: str
    answer: str
    number: Decimal
    """What the answer comes to."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The server's answer to one problem."""

    text: str
    is_right: bool
    is_valid: bool
    num_tokens: int
    latency_s: float


@dataclass(slots=True)
class Score:
    """Of the answers so far."""

    num_questions: int
    started_s: float = field(default_factory=time.perf_counter)
    answers: list[Answer] = field(default_factory=list)

    def add(self, answer: Answer) -> None:
        self.answers.append(answer)
        done = len(self.answers)
        if sys.stderr.isatty() or done == self.num_questions or done % max(1, self.num_questions // 20) == 0:
            ending = "\n" if done == self.num_questions or not sys.stderr.isatty() else ""
            figures = self.figures()
            print(
                f"\r{done}/{self.num_questions} answered: accuracy {figures['accuracy']:.3f}, "
                f"invalid {figures['invalid']:.3f}, {figures['output_tokens_per_s']:.0f} tokens/s",
                end=ending,
                file=sys.stderr,
                flush=True,
            )

    def figures(self) -> dict[str, Any]:
        """The record of a run."""
        seconds, done = time.perf_counter() - self.started_s, len(self.answers)
        num_tokens = sum(answer.num_tokens for answer in self.answers)
        return {
            "accuracy": round(sum(answer.is_right for answer in self.answers) / done, 4),
            "invalid": round(sum(not answer.is_valid for answer in self.answers) / done, 4),
            "latency_s": round(seconds, 3),
            "question_s_p50": round(statistics.median(answer.latency_s for answer in self.answers), 3),
            "output_tokens": num_tokens,
            "output_tokens_per_s": round(num_tokens / seconds, 1),
        }


def read_problems(path: Path) -> list[Problem]:
    """The problems of a file. Raises ValueError for a line that is none."""
    problems = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            question, answer = str(found["question"]), str(found["answer"])
            problems.append(Problem(question, answer, _after_mark(answer)))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number}: no object with a question and an answer that ends in '{MARK} N'"
            ) from error
    return problems


def _after_mark(answer: str) -> Decimal:
    number = number_in(answer) if MARK in answer else None
    if number is None:
        raise ValueError("no number")
    return number


def number_in(text: str) -> Decimal | None:
    """Return the number that an answer ends with; None if it has none."""
    _, _, result = text.partition(MARK)
    marked = NUMBER.search(result)
    found = [marked[0]] if marked is not None else NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def prompt_of(shots: Sequence[Problem], question: str) -> str:
    """The examples, then the question, for the answer to follow."""
    examples = [f"{QUESTION} {shot.question}\nAnswer: {shot.answer}\n\n" for shot in shots]
    return "".join(examples) + f"{QUESTION} {question}\nAnswer:"


async def ask(http: httpx.AsyncClient, model: str, prompt: str, max_tokens: int) -> tuple[str, int]:
    """Text and number of tokens of the answer. Raises RuntimeError with the server's words when it refuses."""
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stop": [QUESTION]}
    for _ in range(MAX_TRIES):
        response = await http.post("/v1/completions", json=body)
        if response.status_code not in (429, 503):
            break
        await asyncio.sleep(float(response.headers.get("retry-after", 1)))
    if response.status_code != 200:
        raise RuntimeError(f"the server answered {response.status_code}: {response.text[:500]}")
    reply = response.json()
    return reply["choices"][0]["text"], reply["usage"]["completion_tokens"]


async def measure(
    http: httpx.AsyncClient,
    model: str,
    shots: Sequence[Problem],
    asked: Sequence[Problem],
    parallel: int,
    max_tokens: int,
) -> Score:
    """Ask all questions, `parallel` at a time."""
    places = asyncio.Semaphore(parallel)
    score = Score(len(asked))

    async def answer(problem: Problem) -> None:
        async with places:
            started_s = time.perf_counter()
            text, num_tokens = await ask(http, model, prompt_of(shots, problem.question), max_tokens)
        number = number_in(text)
        latency_s = time.perf_counter() - started_s
        score.add(Answer(text, number == problem.number, number is not None, num_tokens, latency_s))

    await asyncio.gather(*(answer(problem) for problem in asked))
    return score


def _machine() -> dict[str, Any]:
    return {
        "client": bars.cpu_name(),
        "python": platform.python_version(),
        "httpx": httpx.__version__,
    }


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """The line to record."""
    problems = read_problems(options.data)
    shots, asked = problems[: options.num_shots], problems[options.num_shots :][: options.num_questions]
    if not asked:
        raise ValueError(
            f"{options.data} has {len(problems)} problems: none is left after {options.num_shots} examples"
        )
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=options.parallel)
    async with httpx.AsyncClient(base_url=options.url, headers=headers, timeout=600, limits=limits) as http:
        score = await measure(http, options.model, shots, asked, options.parallel, options.max_tokens)
        card = (await http.get(f"/v1/models/{options.model}")).json()
    return {
        **score.figures(),
        "model": options.model,
        "base": card.get("parent") or options.model,
        "version": card.get("lorafleet", {}).get("version"),
        "data": options.data.name,
        "questions": len(asked),
        "shots": len(shots),
        "parallel": options.parallel,
        "max_tokens": options.max_tokens,
        "commit": bars.commit(),
        **_machine(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--num-shots", type=int, default=5)
    parser.add_argument("--num-questions", type=int, help="all that are left, if absent")
    parser.add_argument("--parallel", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gsm8k.jsonl")
    options = parser.parse_args(arguments)
    try:
        line = asyncio.run(run(options))
    except (httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
        print(f"\n{error or type(error).__name__}", file=sys.stderr)
        return 1
    bars.append(options.out, line)
    for name in ("accuracy", "invalid", "latency_s", "question_s_p50", "output_tokens", "output_tokens_per_s"):
        print(f"{name:22} {line[name]:>10,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
