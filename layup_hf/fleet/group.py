"""The process group of an era: formed from whoever is there, and broken when it cannot go on."""

from __future__ import annotations

import atexit
import contextlib
import functools
import socket
import sys
from datetime import timedelta

import torch
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from torch.distributed import ProcessGroup
from torch.distributed import distributed_c10d as c10d

from .forming import Forming
from .sockets import opened, sockets
from .store import JobStore
from .talk import Talk

_FORMING = timedelta(seconds=60)


class Group:
    """The default process group of torch, for the members of one era.

    torch's gloo has no way to end a collective that waits for a frozen peer (`abort()` leaves it waiting, and a
    time-out must be long where one worker may be slow), so `abort` shuts the group's own sockets down: every
    collective of it then raises at once.

    Args:
        store: The store of the job.
        era: Number of the era.
        rank: This worker.
        world_size: Number of members.
        timeout: How long a collective waits for the slowest worker.
        token: The job's secret.
        run: Names the job.

    Attributes:
        talk: With the members of this era. Each connection has proved to lead to the member that it should.

    Raises:
        RuntimeError: A member cannot be reached.
    """

    def __init__(
        self, store: JobStore, era: int, rank: int, world_size: int, timeout: timedelta, *, token: bytes, run: bytes
    ) -> None:
        self._store = forming = Forming(store, era, rank, world_size)  # torch's own reference does not keep it
        backend = PartialState().backend or ("nccl" if torch.cuda.is_available() else "gloo")
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        before = sockets(listening=False)
        torch.distributed.init_process_group(backend, store=forming, rank=rank, world_size=world_size, timeout=_FORMING)
        group = speaking_group(timeout)
        self.talk = Talk(token, run + era.to_bytes(8, "big"), group)
        self.talk.prove()  # connections are made by now
        forming.formed()
        c10d._set_pg_timeout(timeout)
        if group is not None:
            c10d._set_pg_timeout(timeout, group)
        self._sockets = {name: place for name, place in sockets(listening=False).items() if name not in before}
        _tell_accelerate(rank, world_size, backend)

    def abort(self) -> None:
        """Let every collective of this group raise, in whichever thread it waits. Idempotent, for any thread."""
        for connection in opened(self._sockets):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        world = torch.distributed.group.WORLD
        if world is not None and torch.distributed.get_backend() == "nccl":
            world.abort()


def speaking_group(timeout: timedelta) -> ProcessGroup | None:
    """A group of gloo of the members of torch's default group: that one, or one beside it. Collective if it is new.

    Args:
        timeout: How long a new one waits for the slowest worker.
    """
    if not torch.distributed.is_initialized():
        return None
    group = torch.distributed.group.WORLD
    if torch.distributed.get_backend() == "gloo":
        return group
    return torch.distributed.new_group(backend="gloo", timeout=timeout)


@functools.cache
def end_group_at_exit() -> None:
    """Let this process end its process group before the interpreter ends, unless it ends by an error.

    After a collective, gloo's threads let go of its tensors. One that comes to that when the interpreter has begun to
    end aborts the process: with exit code -6, although all has been done. On a busy machine that was so in one of some
    hundred runs of a script whose last line is a collective. (To end a group waits for these threads.)
    """
    atexit.register(_end_group)


def _end_group() -> None:
    has_failed = hasattr(sys, "last_type")  # then a collective may still wait for a peer, and to end would wait for it
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo" and not has_failed:
        torch.distributed.destroy_process_group()


def is_of_group(error: BaseException) -> bool:
    """Whether an error says that a collective could not be completed, and not that something is wrong with its use."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, torch.distributed.DistError) or "gloo" in str(seen).lower():
            return True
        seen = seen.__cause__
    return False


def _tell_accelerate(rank: int, world_size: int, backend: str) -> None:
    """Let accelerate and the Trainer see the members of this era as the processes of the run."""
    several = DistributedType.MULTI_GPU if backend == "nccl" else DistributedType.MULTI_CPU
    for state in (PartialState(), *([AcceleratorState()] if AcceleratorState._shared_state else [])):
        state.num_processes, state.process_index, state.backend = world_size, rank, backend
        if state.distributed_type == DistributedType.NO:
            state.distributed_type = several
