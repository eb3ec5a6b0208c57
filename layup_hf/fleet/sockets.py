"""The sockets of this process, also those that libraries have made."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping


def sockets(*, listening: bool) -> dict[str, int]:
    """Descriptors of those that listen, or that do not, by the names that Linux gives them."""
    found = {}
    for place in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            name = os.readlink(f"/proc/self/fd/{place}")
            if name.startswith("socket:"):
                with socket.socket(fileno=os.dup(int(place))) as one:
                    if bool(one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)) == listening:
                        found[name] = int(place)
    return found


def opened(places: Mapping[str, int]) -> Iterator[socket.socket]:
    """Each socket that `sockets` has found, as far as it is still the same one."""
    for name, place in places.items():
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{place}") == name:
                with socket.socket(fileno=os.dup(place)) as one:
                    yield one
