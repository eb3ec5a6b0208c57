"""Nobody else gets to gloo while a group forms: its members find each other through the store of their job."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed import Store

from .gate import Gate, addresses
from .sockets import sockets
from .store import JobStore

_INTERFACE_VARIABLE = "GLOO_SOCKET_IFNAME"
_LOOPBACK = "lo"


class Forming(Store):
    """The job's store, as the process group of one era sees it, from the first member to the last.

    gloo listens, says in the store where, and takes whoever connects first for the member that it waits for, by a small
    number that anybody can guess. Who is there before that member holds the group up until its time-out. So when gloo
    says where it listens, that place is closed to all but the members' machines (see `Gate`), and who has connected
    before is sent away.

    Args:
        store: Of the job.
        era: Number of the era.
        rank: This worker.
        world_size: Number of members.

    Raises:
        RuntimeError: A member does not come.
    """

    def __init__(self, store: JobStore, era: int, rank: int, world_size: int) -> None:
        super().__init__()
        self._store, self._prefix = store, f"group/{era}/"
        # Where nobody has named an interface, all may be on one machine, and gloo may use its loopback.
        mine = addresses(os.environ.get(_INTERFACE_VARIABLE, _LOOPBACK))
        store.set(f"sends_from/{era}/{rank}", json.dumps(mine))
        told = store.multi_get([f"sends_from/{era}/{other}" for other in range(world_size)])
        self._members = {address for each in told for address in _addresses_in(each)}
        self._known = set(sockets(listening=True))
        self._forms = True

    def formed(self) -> None:
        """What begins to listen from here on is not gloo's."""
        self._forms = False

    def _close_to_strangers(self) -> None:
        listening = set(sockets(listening=True))
        if listening - self._known:
            gate = Gate(warns=False)  # UCX's does, of the same kernel
            gate.close_new(self._known)
            gate.admit(self._members)
            self._known = listening

    def set(self, key: str, value: str | bytes) -> None:
        if self._forms:
            self._close_to_strangers()
        self._store.set(self._prefix + key, value)

    # ---- The store, under a prefix ----

    def get(self, key: str) -> bytes:
        return self._store.get(self._prefix + key)

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return self._store.multi_get(self._prefixed(keys))

    def add(self, key: str, amount: int) -> int:
        return self._store.add(self._prefix + key, amount)

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        return self._store.compare_set(self._prefix + key, expected, desired)

    def check(self, keys: Sequence[str]) -> bool:
        return self._store.check(self._prefixed(keys))

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        self._store.wait(self._prefixed(keys), self.timeout if timeout is None else timeout)

    def delete_key(self, key: str) -> bool:
        return self._store.delete_key(self._prefix + key)

    def num_keys(self) -> int:
        return self._store.num_keys()

    def set_timeout(self, timeout: timedelta) -> None:
        self._store.set_timeout(timeout)

    @property
    def timeout(self) -> timedelta:
        return self._store.timeout

    def has_extended_api(self) -> bool:
        return False

    def _prefixed(self, keys: Sequence[str]) -> list[str]:
        return [self._prefix + key for key in keys]


def _addresses_in(text: bytes) -> list[str]:
    """What a member has told; nothing, where somebody has written something else."""
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        return [str(ipaddress.ip_address(address)) for address in json.loads(text)]
    return []
