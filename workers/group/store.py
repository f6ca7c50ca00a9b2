"""The store by which the ranks' collectives find each other: a file, so that no port is open for it.

Torch's store over TCP would listen on all interfaces, and take keys from anybody.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from torch._C._distributed_c10d import FileStore

from lorafleet.workers.group.shared_memory import make_memory


class StoreFile:
    """The first rank's end. On Linux the file has no name, and is gone with the ranks."""

    def __init__(self) -> None:
        self.path: str
        """For `open_store`, in every process that has inherited `descriptor`."""
        if sys.platform == "linux":
            self.descriptor = make_memory(0)
            self.path = f"/proc/self/fd/{self.descriptor}"
        else:
            self.descriptor, self.path = tempfile.mkstemp(prefix="lorafleet-ranks-")

    def close(self) -> None:
        """Let it go, once all ranks have.

        On Linux the descriptor stays open: torch writes to the path once more when it drops its store,
        whenever that is, and the number must not be another file's by then.
        """
        if sys.platform != "linux":
            os.close(self.descriptor)
            Path(self.path).unlink(missing_ok=True)


def open_store(path: str, num_ranks: int) -> FileStore:
    """torch.distributed's store in the file."""
    return FileStore(path, num_ranks)
