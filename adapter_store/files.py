"""Files and folders that are there whole or not at all, whenever the process or the machine stops; and their lock."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
import uuid
from pathlib import Path

from lorafleet.adapter_store.errors import StoreUnusable

_LOCK_PATIENCE_S = 10.0
_FULL = (errno.ENOSPC, errno.EDQUOT)


def unwritable(error: OSError | None = None, *, is_full: bool = False) -> StoreUnusable:
    """`store_full` if the disk has no room, else `store_not_writable`."""
    if is_full or (error is not None and error.errno in _FULL):
        return StoreUnusable("store_full", "the disk of the store's state folder is full: make room on it")
    return StoreUnusable(
        "store_not_writable", "the store's state folder cannot be written; check its permissions and its disk"
    )


def sync(path: Path) -> None:
    """Make a file's or a folder's content durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes, staging: Path) -> None:
    """Replace the file `path` at once; written aside in `staging`, which must lie on the same file system."""
    aside = staging / f"{uuid.uuid4().hex}.tmp"
    try:
        aside.write_bytes(content)
        sync(aside)
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def make_folder_durable(folder: Path) -> None:
    """Make a folder and the files in it durable, before it is given its public name."""
    for path in folder.iterdir():
        sync(path)
    sync(folder)


def make_empty(folder: Path) -> None:
    """Make sure that `folder` exists, and remove all that is in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)


def locked(path: Path) -> int:
    """A descriptor that holds the lock of a state folder. A store that is being replaced may need a moment to go.

    Raises StoreUnusable `store_locked`.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + _LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise StoreUnusable(
                    "store_locked",
                    "another adapter store uses this state folder; stop it or set another adapters.state_dir",
                ) from error
            time.sleep(0.05)
        else:
            return descriptor
