"""Runs a function in several processes that are the ranks of one group over gloo, and ends all of them."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import FileStore

from lorafleet.workers.ranks import Ranks, connect

LIMIT_S = 120.0
"""Ranks that take longer are ended, and the test fails."""


def run_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(ranks, *arguments)` of each rank, in order. `function` is a module's, and what it returns is pickled.

    Raises RuntimeError with what a rank raised.
    """
    # A server imports what a rank needs once; its children begin with that.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.ranks", function.__module__])
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(theirs, rank, size, folder, function, arguments), daemon=True)
            process.start()
            theirs.close()
            started.append((process, ours))
        try:
            answers = [_receive(ours) for _, ours in started]
        finally:
            for process, _ in started:
                process.join(5.0)
                if process.is_alive():
                    process.kill()
                    process.join()
    failures = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(answers) if error is not None]
    if failures:
        raise RuntimeError("\n".join(failures))
    return [value for _, value in answers]


def _receive(connection: Connection) -> tuple[str | None, Any]:
    try:
        if connection.poll(LIMIT_S):
            answer: tuple[str | None, Any] = connection.recv()
            return answer
    except EOFError:
        return "it ended without an answer", None
    return f"it did not answer within {LIMIT_S} s", None


def _run(
    connection: Connection,
    rank: int,
    size: int,
    folder: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    ranks = Ranks()
    try:
        if size > 1:
            store = FileStore(str(Path(folder) / "store"), size)
            ranks = connect(rank, size, device=torch.device("cpu"), store=store, timeout_s=LIMIT_S / 2)
        connection.send((None, function(ranks, *arguments)))
    except Exception:
        connection.send((traceback.format_exc(), None))
    finally:
        ranks.close()
        connection.close()
