"""Who may talk to a socket that a library listens on: the kernel drops the packets of everybody else.

UCX does not ask who connects. Over TCP it does what it is told: whoever reaches its port can write to any address of
the process; no key is looked at (`tests/windows/test_strangers.py` shows it). Signing what workers say to each other is
worth nothing while that port is open to all. So a filter is put on UCX's own socket, which lets in packets from the
addresses of the workers alone: a classic socket filter (see `Documentation/networking/filter.rst` of Linux), for which
socket(7) asks no privilege. Some kernels refuse it to users other than root; then a warning says so. gloo's socket gets
one, too, while a group forms (`forming.py`).

What it does not stop: somebody who sends from a worker's address, as another user of its machine does, or who can make
the network believe so.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import logging
import socket
import struct
import threading
from collections.abc import Container, Iterable, Iterator

import psutil

from .sockets import opened, sockets

logger = logging.getLogger(__name__)

_SO_ATTACH_FILTER = 26
_LOAD, _JUMP, _EQUAL, _RETURN = 0x20, 0x05, 0x15, 0x06
"""BPF: load a word; go on so many lines further; the same if it is equal; keep so many bytes of the packet."""

_NETWORK = 0x1_0000_0000 - 0x100000  # offset of the IP header
_PROTOCOL = 0x1_0000_0000 - 0x1000  # offset at which the kernel gives the protocol of the frame
_IPV6_FRAME = 0x86DD
_SOURCE = {4: 12, 6: 8}  # offset of the sender's address in an IP header
_ALL, _NOTHING = 0xFFFFFFFF, 0

_around_one = threading.Lock()  # or threads would take each other's sockets for their own


def addresses(devices: str | None) -> tuple[str, ...]:
    """Addresses that this machine may send from.

    Args:
        devices: Names of the network devices that are used, as in UCX_NET_DEVICES: the loopback's addresses are among
            those of the machine only if it is one of them.
    """
    names = (devices or "").split(",")
    found = []
    for interface, items in psutil.net_if_addrs().items():
        for item in items:
            if item.family in (socket.AF_INET, socket.AF_INET6):
                address = ipaddress.ip_address(item.address.partition("%")[0])
                if not address.is_loopback or interface in names:
                    found.append(str(address))
    return tuple(found)


class Gate:
    """The sockets that something listens on, closed to all until it is opened to some.

        with Gate.around() as gate:
            ...  # makes something that listens
        gate.admit(["10.0.0.1", "10.0.0.2"])

    Connections that came in before the gate was closed are ended.

    Args:
        warns: Whether to say so once, if this system has no such gates.
    """

    def __init__(self, *, warns: bool = True) -> None:
        self._places: dict[str, int] = {}
        self._has_warned = not warns

    @classmethod
    @contextlib.contextmanager
    def around(cls) -> Iterator[Gate]:
        """A gate at every socket that begins to listen within."""
        with _around_one:
            gate, before = cls(), set(sockets(listening=True))
            yield gate
            gate.close_new(before)

    def close_new(self, before: Container[str]) -> None:
        """Be the gate at all sockets that listen and did not before, and close it."""
        self._places = {name: place for name, place in sockets(listening=True).items() if name not in before}
        self.admit([])
        self._end_connections()

    @property
    def ports(self) -> list[int]:
        """Where there is somebody listening behind this gate."""
        return [one.getsockname()[1] for one in opened(self._places)]

    def admit(self, senders: Iterable[str]) -> None:
        """Let in packets from these addresses, and no others."""
        code = _program(senders)
        program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
        for one in opened(self._places):
            try:
                one.setsockopt(
                    socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", len(code), ctypes.addressof(program))
                )
            except OSError as error:
                if not self._has_warned:
                    self._has_warned = True
                    logger.warning(
                        f"LayUp: this system does not let a socket be closed to strangers ({error}). Whoever reaches "
                        f"port {one.getsockname()[1]} can write to this worker's memory: use a private network."
                    )

    def _end_connections(self) -> None:
        ports = set(self.ports)
        for one in opened(sockets(listening=False)):
            with contextlib.suppress(OSError):
                if one.family in (socket.AF_INET, socket.AF_INET6) and one.getsockname()[1] in ports:
                    one.shutdown(socket.SHUT_RDWR)


def _program(senders: Iterable[str]) -> list[tuple[int, int, int, int]]:
    """Instructions (code, lines to skip if true, if false, value) that keep packets from these addresses."""
    known = {ipaddress.ip_address(sender) for sender in senders}
    of_4, of_6 = ([line for one in known if one.version == version for line in _keep(one)] for version in (4, 6))
    drop = (_RETURN, 0, 0, _NOTHING)
    which = [(_LOAD, 0, 0, _PROTOCOL), (_EQUAL, 0, 1, _IPV6_FRAME), (_JUMP, 0, 0, len(of_4) + 1)]
    return [*which, *of_4, drop, *of_6, drop]


def _keep(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> list[tuple[int, int, int, int]]:
    """Keep the packet if it is from this address; else go on with the next line."""
    words = struct.unpack(f"!{len(address.packed) // 4}I", address.packed)
    lines: list[tuple[int, int, int, int]] = []
    for number, word in enumerate(words):
        rest = 2 * (len(words) - 1 - number) + 1  # lines that remain of this address
        lines += [(_LOAD, 0, 0, _NETWORK + _SOURCE[address.version] + 4 * number), (_EQUAL, 0, rest, word)]
    return [*lines, (_RETURN, 0, 0, _ALL)]
