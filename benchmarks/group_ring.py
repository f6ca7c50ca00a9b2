"""Measures how long a step takes from the first rank of a worker to the others, against a bar.

    python benchmarks/group_ring.py [--ranks 2] [--steps 400] [--out results.jsonl]

The first rank writes real messages to the ring; processes of their own read them, as ranks do. `write_us` is what the
first rank pays. `there_us` ends when the last rank has the message as numbers and arrays. Both are medians, and steps
come as far apart as those of a model. Without a GPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lorafleet.workers.group.entries import parts_of_step, read_entry
from lorafleet.workers.group.ring import RingReader, RingWriter
from lorafleet.workers.step.forms import GraphForm
from lorafleet.workers.step.layout import blank_batch, blank_prompt
from lorafleet.workers.step.message import StepMessage

BAR_US = 100.0
"""Of a step of 8,192 rows, for the first rank."""
PAUSE_S = 0.005
NUM_IGNORED = 20
"""First steps, in which the ring's pages are touched for the first time."""


def prompt_rows() -> StepMessage:
    """A step of one long prompt."""
    return blank_prompt(8192, page_tokens=16, null_page=0, has_lora=True, chunk_length=128)


def decodes(num_pages: int) -> StepMessage:
    """A step of 256 sequences, in a graph's form."""
    form = GraphForm(256, 256, num_pages)
    return blank_batch(form, null_page=0, has_lora=True, max_chunks=256, max_logits=256)


STEPS: dict[str, Callable[[], StepMessage]] = {
    "8192 prompt rows": prompt_rows,
    "256 decodes of 1,024 tokens": partial(decodes, 64),
    "256 decodes of 16,384 tokens": partial(decodes, 1024),
}


def read(ring: int, connection: int, times: Connection) -> None:
    """Be another rank: say when each message was read."""
    reader = RingReader(ring, socket.socket(fileno=connection))
    while True:
        try:
            payload = reader.read(1.0)
        except EOFError:
            return
        if payload is not None:
            message = read_entry(payload)
            assert isinstance(message, StepMessage)
            times.send(time.monotonic_ns())


def measure(num_ranks: int, num_steps: int) -> list[dict[str, object]]:
    """A line for each kind of step."""
    writer = RingWriter(num_ranks - 1)
    context = multiprocessing.get_context("fork")
    lines, processes = [], []
    for end in writer.sockets:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=read, args=(writer.descriptor, end.fileno(), theirs), daemon=True)
        process.start()
        end.close()
        lines.append(ours)
        processes.append(process)
    results: list[dict[str, object]] = []
    for name, make in STEPS.items():
        written, there = [], []
        for _ in range(num_steps + NUM_IGNORED):
            time.sleep(PAUSE_S)
            message = make()  # as an engine does, just before
            started = time.monotonic_ns()
            writer.write(*parts_of_step(message))
            written.append((time.monotonic_ns() - started) / 1e3)
            there.append((max(line.recv() for line in lines) - started) / 1e3)
        results.append(
            {
                "step": name,
                "ranks": num_ranks,
                "rows": message.header.num_rows,
                "bytes": message.packed.nbytes,
                "write_us": round(statistics.median(written[NUM_IGNORED:]), 1),
                "there_us": round(statistics.median(there[NUM_IGNORED:]), 1),
                "cores": len(os.sched_getaffinity(0)),
            }
        )
    for process in processes:
        process.terminate()
        process.join()
    return results


def main() -> int:
    """Print and keep the results; 1 if the first is beyond the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = measure(arguments.ranks, arguments.steps)
    text = "".join(json.dumps(result) + "\n" for result in results)
    print(text, end="")
    if arguments.out is not None:
        with arguments.out.open("a") as file:
            file.write(text)
    return int(float(str(results[0]["write_us"])) > BAR_US)


if __name__ == "__main__":
    sys.exit(main())
