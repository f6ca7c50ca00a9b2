"""The demo: starts the service, hot-loads adapters, asks them all at once, and replaces one while streams run on it.

Exits with 1 when an answer is not what it must be. `--keep` leaves the service running instead, for curl and your code.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
from answers import Answer, ask
from service import ROOT, Service, running_service
from table import paragraph, shortened, table

PROMPTS = json.loads(Path(__file__).with_name("prompts.json").read_text())
LOADED = ("shout", "pirate", "french", "emoji", "json")
REPLACED, REPLACEMENT = "shout", "shout-v2"
SOURCE = "demo"
NUM_STREAMS = 6
"""Streams that run on the old version while it is replaced."""
ANSWER_CELLS = 50
FREED_WITHIN_S = 2.0


class CheckFailed(Exception):  # noqa: N818
    """The service did not do what the demo says it does."""


def check(holds: bool, claim: str, otherwise: str = "") -> None:
    """Say that a claim holds. Raises CheckFailed when it does not."""
    if not holds:
        raise CheckFailed(f"{claim}: not so{f', {otherwise}' if otherwise else ''}")
    print(f"✓ {claim}")


@dataclass(frozen=True, slots=True)
class Loaded:
    """An adapter as the admin plane told of it when it was loaded."""

    name: str
    rank: int
    targets: tuple[str, ...]
    version: str
    num_bytes: int
    pages: int
    seconds: float

    @property
    def short_targets(self) -> str:
        names = [target.removesuffix("_proj").removesuffix("_tokens").removeprefix("lm_") for target in self.targets]
        seven, others = ("q", "k", "v", "o", "gate", "up", "down"), ("embed", "head")
        if set(seven) <= set(names):
            return " + ".join(["all seven", *(name for name in others if name in names)])
        return " ".join(name for name in (*seven, *others) if name in names)


def put(admin: httpx.Client, name: str, key: str, warm: int | str = 1) -> Loaded:
    """Load or replace an adapter through the admin plane. Raises CheckFailed with its reason when it refuses."""
    start = time.perf_counter()
    reply = admin.put(f"/admin/v1/adapters/{name}", json={"source": SOURCE, "key": key, "warm": warm})
    if reply.is_error:
        raise CheckFailed(f"PUT /admin/v1/adapters/{name} answered {reply.status_code}: {reply.text}")
    body: dict[str, Any] = reply.json()
    return Loaded(
        body["name"],
        body["rank"],
        tuple(body["targets"]),
        body["version"],
        body["bytes"],
        body["pages"] or 0,
        time.perf_counter() - start,
    )


def load_all(admin: httpx.Client) -> dict[str, Loaded]:
    """Hot-load every adapter and say what each took."""
    print("\nHot-loading adapters: PUT /admin/v1/adapters/{name}")
    loaded = {}
    for name in LOADED:
        adapter = loaded[name] = put(admin, name, name)
        print(
            f"✓ {name:8} rank {adapter.rank:<3} {adapter.short_targets:24} version {adapter.version[:7]}  "
            f"{adapter.num_bytes / 2**10:5.0f} KiB in {adapter.pages:3} pages  {adapter.seconds * 1e3:4.0f} ms"
        )
    return loaded


async def ask_all(client: openai.AsyncOpenAI, base_id: str, question: str) -> list[Answer]:
    """One question to the base and to every adapter, all at the same time."""
    return await asyncio.gather(*(ask(client, Answer(model, question)) for model in (base_id, *LOADED)))


def expected(answer: Answer, base_id: str) -> str:
    """The answer that is expected, to the letter."""
    asked = [*PROMPTS["questions"], PROMPTS["story"]]
    answers = next(question["answers"] for question in asked if question["prompt"] == answer.question)
    text: str = answers["base" if answer.model == base_id else answer.model]
    return text


def print_answers(answers: list[Answer], loaded: dict[str, Loaded], base_id: str, workers: dict[str, str]) -> None:
    """The table: one row an answer, grouped by question."""
    head = ("adapter", "rank", "targets", "version", "answer", "1st token", "tok/s", "worker")
    rows: list[tuple[str, ...]] = []
    for question in dict.fromkeys(answer.question for answer in answers):
        rows.append((question,))
        for answer in answers:
            if answer.question != question:
                continue
            adapter = loaded.get(answer.model)
            rows.append(
                (
                    answer.model if adapter else f"({base_id})",
                    str(adapter.rank) if adapter else "",
                    adapter.short_targets if adapter else "",
                    adapter.version[:7] if adapter else "",
                    shortened(answer.text, ANSWER_CELLS),
                    f"{answer.first_token_s * 1e3:.0f} ms",
                    f"{answer.tokens_per_s:.0f}",
                    workers.get(answer.worker_id, answer.worker_id),
                )
            )
    print("\n" + "\n".join(table(head, rows, right=frozenset({"rank", "1st token", "tok/s"}))) + "\n")


async def try_answers(service: Service, client: openai.AsyncOpenAI, loaded: dict[str, Loaded]) -> None:
    """Ask everything at once, show it, check it."""
    base_id = service.config.model.id
    questions = [question["prompt"] for question in PROMPTS["questions"]]
    # Once unseen, so that the table does not time first calls.
    await asyncio.gather(*(ask_all(client, base_id, question) for question in questions))
    start = time.perf_counter()
    answers = [answer for question in questions for answer in await ask_all(client, base_id, question)]
    seconds = time.perf_counter() - start
    with service.admin() as admin:
        print_answers(answers, loaded, base_id, worker_labels(admin))
    wrong = [answer for answer in answers if answer.text != expected(answer, base_id)]
    total = sum(answer.num_tokens for answer in answers)
    check(
        not wrong,
        f"the base and {len(LOADED)} adapters asked at once, {len(questions)} times: every answer right, "
        f"{total} tokens in {seconds:.2f} s",
        "; ".join(f"{answer.model} said {answer.text!r}" for answer in wrong),
    )
    check(
        all(answer.version == loaded[answer.model].version for answer in answers if answer.model in loaded),
        "every adapter answered with the version that was loaded",
    )


async def replace_under_load(service: Service, client: openai.AsyncOpenAI, old: Loaded) -> None:
    """Flip a name to a new version while streams run on the old one."""
    story = PROMPTS["story"]["prompt"]
    first_question = PROMPTS["questions"][0]
    print(f"\nReplacing {REPLACED!r} by a new version while {NUM_STREAMS} streams run on the old one")
    running = [Answer(REPLACED, story) for _ in range(NUM_STREAMS)]
    streams = [asyncio.create_task(ask(client, answer)) for answer in running]
    await asyncio.gather(*(answer.has_begun.wait() for answer in running))
    with service.admin() as admin:
        new = await asyncio.to_thread(put, admin, REPLACED, REPLACEMENT)
        under_way = [answer for answer, stream in zip(running, streams, strict=True) if not stream.done()]
        print(
            f"✓ PUT answered after {new.seconds * 1e3:.0f} ms: {old.version[:7]} → {new.version[:7]}, "
            f"with {len(under_way)} of {NUM_STREAMS} streams still under way on the old one"
        )
        after = await ask(client, Answer(REPLACED, first_question["prompt"]))
        await asyncio.gather(*streams)
        ended = time.perf_counter()
        print(paragraph(f"old: {running[0].text}") + "\n" + paragraph(f"new: {after.text}"))
        check(
            all(
                answer.text == PROMPTS["story"]["answers"][REPLACED] and answer.version == old.version
                for answer in running
            ),
            f"all {NUM_STREAMS} streams ended with exactly the old version's words",
        )
        check(
            after.text == first_question["answers"][REPLACEMENT] and after.version == new.version,
            "the request after the reply got the new version's",
            f"it got {after.text!r} of {after.version}",
        )
        while any(held["version"] == old.version for worker in workers(admin) for held in worker["adapters"]):
            if time.perf_counter() - ended > FREED_WITHIN_S:
                raise CheckFailed(f"the old version is still on a worker {FREED_WITHIN_S} s after its last stream")
            await asyncio.sleep(0.05)
        check(
            True, f"the old version left every worker {time.perf_counter() - ended:.1f} s after its last stream's end"
        )


def workers(admin: httpx.Client) -> list[dict[str, Any]]:
    """All workers as the admin plane shows them."""
    reply: list[dict[str, Any]] = admin.get("/admin/v1/workers").raise_for_status().json()["workers"]
    return reply


def worker_labels(admin: httpx.Client) -> dict[str, str]:
    """A short name for each worker id."""
    return {worker["worker_id"]: f"w{i}" for i, worker in enumerate(workers(admin), start=1)}


async def try_service(service: Service, loaded: dict[str, Loaded]) -> None:
    """All that the demo shows of a running service."""
    client = openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key=service.api_key, max_retries=0, timeout=60)
    async with client:
        await try_answers(service, client, loaded)
        await replace_under_load(service, client, loaded[REPLACED])


def print_ways_in(service: Service) -> None:
    """Commands to try on a service that is left running."""
    question = PROMPTS["questions"][0]["prompt"]
    chat = json.dumps({"model": "pirate", "messages": [{"role": "user", "content": question}], "temperature": 0})
    keys = service.config.auth.read_keys()
    api = " -H 'authorization: Bearer KEY'" if keys.api_keys else ""
    admin = " -H 'authorization: Bearer ADMIN_TOKEN'" if keys.admin_token else ""
    print(f"""
The service runs at {service.url}; Ctrl-C stops it. From another terminal:

  curl {service.url}/v1/models{api}
  curl {service.url}/v1/chat/completions{api} \\
    -H 'content-type: application/json' -d '{chat}'
  curl -N {service.url}/v1/chat/completions{api} \\
    -H 'content-type: application/json' -d '{chat[:-1]}, "stream": true}}'
  curl {service.url}/admin/v1/workers{admin}
  curl -X PUT {service.url}/admin/v1/adapters/shout{admin} \\
    -H 'content-type: application/json' -d '{{"source": "demo", "key": "shout-v2"}}'
  curl -X DELETE {service.url}/admin/v1/adapters/json{admin}
  RAY_AUTH_MODE=token RAY_ADDRESS={service.ray_address} .venv/bin/python examples/handle.py
""")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="leave the service running until Ctrl-C")
    parser.add_argument("--config", type=Path, default=ROOT / "deploy/serve/local.yaml", help="the Serve YAML to start")
    parser.add_argument("--port", type=int, help="port on loopback; default a free one, with --keep 8000")
    options = parser.parse_args()
    # A plain kill cleans up like Ctrl-C, which a shell may have set to be ignored for what it runs in the background.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    port = options.port or (8000 if options.keep else None)
    try:
        with running_service(options.config, port=port, keep_state=options.keep) as service:
            print(
                f"✓ ready {service.start_s:.0f} s after the start: {service.config.worker.num_replicas} workers, "
                f"base {service.config.model.id!r}, {service.url}"
            )
            with service.admin() as admin:
                loaded = load_all(admin)
            if options.keep:
                print_ways_in(service)
                signal.pause()
            asyncio.run(try_service(service, loaded))
    except KeyboardInterrupt:
        return 0 if options.keep else 130
    except (CheckFailed, RuntimeError, httpx.HTTPError, openai.OpenAIError) as error:
        print(f"✗ {error}", file=sys.stderr)
        return 1
    print("\n✓ The demo did all that it says. `make serve` leaves the service running.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
