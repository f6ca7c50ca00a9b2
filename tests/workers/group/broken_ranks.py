"""Ranks that fail: each function changes the process that it is called in, which is another rank's."""

from __future__ import annotations

import os
import time
from typing import Any

from lorafleet.adapter_store.manifest import AdapterManifest
from lorafleet.workers.errors import WorkerConfigError
from lorafleet.workers.group import rank_process
from lorafleet.workers.group.followed import FollowingPool
from lorafleet.workers.memory.adapter_pool import AdapterPool

LARGE_RANK = 64


def refuse_to_start() -> None:
    def assemble_model(*arguments: Any, **settings: Any) -> None:
        raise WorkerConfigError("no memory is left here")

    setattr(rank_process, "assemble_model", assemble_model)  # noqa: B010


def end_while_starting() -> None:
    setattr(rank_process, "assemble_model", lambda *arguments, **settings: os._exit(7))  # noqa: B010


def have_no_room_for_large_adapters() -> None:
    def can_allocate(pool: AdapterPool, manifest: AdapterManifest) -> bool:
        return manifest.rank < LARGE_RANK and AdapterPool.can_allocate(pool, manifest)

    setattr(FollowingPool, "can_allocate", can_allocate)  # noqa: B010


def copy_slowly() -> None:
    def upload(*arguments: Any) -> Any:
        time.sleep(0.1)
        return AdapterPool.upload(*arguments)

    setattr(FollowingPool, "upload", upload)  # noqa: B010


def lose_an_upload() -> None:
    def upload(*arguments: Any) -> None:
        raise RuntimeError("the copy failed")

    setattr(FollowingPool, "upload", upload)  # noqa: B010
