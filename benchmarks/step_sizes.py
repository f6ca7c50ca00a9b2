"""Plays clients against the scheduler, with the times that steps take on a GPU, to compare sizes of steps.

    python benchmarks/step_sizes.py [--out benchmarks/results/step_sizes.jsonl]

The scheduler is the engine's own. A step's time is `step_ms`, which agrees with what `engine.py` measured of a
Llama-3.1-8B with 64 adapters on an H200. Nothing is computed. Each load runs with the steps that `StepBudget` gives,
and with steps of a fixed number of tokens.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bars
import numpy as np

from lorafleet.workers.sequence import Sequence
from lorafleet.workers.step_budget import StepBudget
from tests.workers.stepping import PAGE_TOKENS, Stepping

MAX_TOKENS = 8192
"""Of any step."""
MAX_RUNNING = 256


def step_ms(num_decodes: int, num_prompt_tokens: int) -> float:
    """Decodes and prompts add up; a step without decodes has a launch that nothing hides."""
    return (4.9 + 0.036 * num_decodes if num_decodes else 1.0) + 0.0245 * num_prompt_tokens


class FixedBudget:
    """Stands in for `StepBudget`: all steps may have the same tokens."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def next_step(self, num_decodes: int, num_prompt_tokens: int) -> int:
        return self._num_tokens

    def note(self, num_left: int) -> None:
        pass


Budget = StepBudget | FixedBudget


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of equal size."""

    name: str
    prompt: int = 512
    output: int = 128
    clients: int = 0
    """Each sends one request after another; 0: requests come at `rate`."""
    requests: int = 8
    """Of each client, or in all."""
    way_ms: float = 0.0
    """From a client to the engine."""
    rate: float = 0.0
    """Requests a second, evenly."""


LOADS = (
    Load("64 clients in the engine's process", clients=64),
    Load("64 clients, 6 ms away", clients=64, way_ms=6.0),
    Load("256 requests at once", clients=256, requests=1),
    Load("40 a second", output=64, rate=40, requests=800),
    Load("60 a second, nearly all that it can do", output=64, rate=60, requests=1000),
    Load("80 a second, more than it can do", output=64, rate=80, requests=1000),
    Load("16 prompts of 2,048 tokens a second", prompt=2048, rate=16, requests=400),
)


def play(load: Load, budget: Budget) -> dict[str, float]:
    """Figures of one load: first tokens and gaps in ms, output tokens a second."""
    engine = Stepping(
        num_pages=(MAX_RUNNING + 1) * (load.prompt + load.output) // PAGE_TOKENS,
        max_batch_tokens=MAX_TOKENS,
        max_running=MAX_RUNNING,
        prefix_cache=False,
    )
    engine.scheduler._step_budget = budget  # type: ignore[assignment]
    rng, numbers = random.Random(0), itertools.count()
    now_ms, coming, left, client_of = 0.0, [], {}, {}
    sent_ms: dict[Sequence, float] = {}

    def send(client: int) -> None:
        left[client] -= 1
        heapq.heappush(coming, (now_ms + load.way_ms * rng.uniform(0.7, 1.3), next(numbers), now_ms, client))

    if load.clients:
        left = dict.fromkeys(range(load.clients), load.requests)
        for client in left:
            send(client)
    else:
        left = dict.fromkeys(range(load.requests), 0)
        coming = [(1e3 * n / load.rate, n, 1e3 * n / load.rate, n) for n in range(load.requests)]
    first_ms, gaps_ms = [], []
    while coming or engine.live:
        if not engine.live:
            now_ms = max(now_ms, coming[0][0])
        while coming and coming[0][0] <= now_ms:
            _, _, at_ms, client = heapq.heappop(coming)
            sequence = engine.add(load.prompt, max_tokens=load.output)
            sent_ms[sequence], client_of[sequence] = at_ms, client
        begun = {sequence for sequence in engine.live if sequence.num_made}
        counts = engine.step()
        decodes = [sequence for sequence in counts if sequence in begun]
        took_ms = step_ms(len(decodes), sum(counts.values()) - len(decodes))
        now_ms += took_ms
        gaps_ms += [took_ms] * len(decodes)
        for sequence in counts:
            if sequence not in begun and sequence.num_made:
                first_ms.append(now_ms + load.way_ms - sent_ms[sequence])
            if sequence.is_over and left[client_of[sequence]]:
                send(client_of[sequence])
    return {
        "first_token_ms_p50": float(np.median(first_ms)),
        "first_token_ms_p99": float(np.quantile(first_ms, 0.99)),
        "gap_ms_p50": float(np.median(gaps_ms)),
        "gap_ms_p99": float(np.quantile(gaps_ms, 0.99)),
        "output_tokens_per_s": len(sent_ms) * load.output / now_ms * 1e3,
    }


BUDGETS: dict[str, Callable[[], Budget]] = {
    "StepBudget": lambda: StepBudget(MAX_TOKENS),
    **{f"{tokens:,} always": lambda tokens=tokens: FixedBudget(tokens) for tokens in (8192, 2048, 1024)},  # type: ignore[misc]
}


def measure(loads: tuple[Load, ...] = LOADS) -> Iterator[dict[str, object]]:
    """A line for each load and budget."""
    for load in loads:
        for name, budget in BUDGETS.items():
            figures = {key: round(value, 1) for key, value in play(load, budget()).items()}
            yield {"case": load.name, "steps": name, **figures}


def main() -> None:
    """Print the lines and keep them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    for line in measure():
        print(json.dumps(line), flush=True)
        if args.out is not None:
            bars.append(args.out, line)


if __name__ == "__main__":
    main()
