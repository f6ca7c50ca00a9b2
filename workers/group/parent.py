"""The end of a child with its parent. Imports nothing of ours: it comes before all that takes time."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Have the system kill this process when the thread that started it ends, however it ends.

    Linux only; elsewhere the end of the control line tells. parent: process id.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent decides
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)
