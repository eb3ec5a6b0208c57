"""The process that holds the store of a job whose workers are started by several launches.

Run as a script by rank 0, apart from it, so that the store outlives every worker and its launcher. It imports nothing
of the package, which would take seconds and memory. It ends when the last worker has left, or when nobody has given a
sign of life for long.
"""

from __future__ import annotations

import socket
import sys
import time

from torch.distributed import PrefixStore, TCPStore

PREFIX = "layup_hf"
BEATS, WORKERS = "beats", "workers"
"""Counters: signs of life of all workers; workers that are there."""

_LOOK_SECONDS = 0.5


def keep(listener: socket.socket, idle_seconds: float) -> None:
    """Serve the store on a socket that listens already, until it is no longer needed."""
    host, port = listener.getsockname()
    server = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    store = PrefixStore(PREFIX, server)
    beats, since = 0, time.monotonic()
    while time.monotonic() - since < idle_seconds:
        time.sleep(_LOOK_SECONDS)
        if beats > 0 and store.add(WORKERS, 0) <= 0:
            time.sleep(_LOOK_SECONDS)  # their last answers are on their way
            return
        if (now := store.add(BEATS, 0)) != beats:
            beats, since = now, time.monotonic()


if __name__ == "__main__":
    keep(socket.socket(fileno=int(sys.argv[1])), float(sys.argv[2]))
