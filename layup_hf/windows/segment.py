"""Memory that processes of one host share."""

from __future__ import annotations

import mmap
import os
import select
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ..fleet.data import travels


@travels
@dataclass(frozen=True)
class Segment:
    """A piece of anonymous memory: no name in any file system, gone with the last process that maps it."""

    process: int
    descriptor: int
    inode: int
    num_bytes: int

    @classmethod
    def create(cls, num_bytes: int) -> Segment:
        """Reserve memory now, so that too little of it is an error here and not a crash later."""
        descriptor = os.memfd_create("layup_hf", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(descriptor, 0, num_bytes)
        except OSError as error:
            os.close(descriptor)
            raise MemoryError(
                f"Cannot reserve {num_bytes / 2**20:.0f} MiB of shared memory for the parameters: {error.strerror}. "
                "Start fewer workers on this host, use a smaller model, or raise the memory limit of the container."
            ) from error
        return cls(os.getpid(), descriptor, os.fstat(descriptor).st_ino, num_bytes)

    def map(self, *, writable: bool) -> mmap.mmap:
        """Map the segment, from its own process or from another one of the same user."""
        path = f"/proc/{self.process}/fd/{self.descriptor}"
        try:
            descriptor = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except OSError as error:
            raise ValueError(
                f"Cannot map the memory of worker process {self.process} ({error.strerror}). Workers with shared "
                "windows must run as one user in one container, and the peer must be alive."
            ) from error
        try:
            if os.fstat(descriptor).st_ino != self.inode:
                raise ValueError(
                    f"Process {self.process} is not the worker it should be: run all workers in one container."
                )
            return mmap.mmap(descriptor, self.num_bytes, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
        finally:
            os.close(descriptor)

    def release(self) -> None:
        """Close the descriptor in the process that created the segment; mappings stay."""
        os.close(self.descriptor)


def as_bytes(memory: mmap.mmap, offset: int, count: int) -> Tensor:
    """Some of the bytes, as a tensor that keeps the mapping alive."""
    if count == 0:
        return torch.empty(0, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")  # a peer's: for reading only
        return torch.frombuffer(memory, dtype=torch.uint8, count=count, offset=offset)


class Pulse:
    """Whether a process of this host still runs.

    What a process has left behind is not to be read: on a GPU its memory goes with it. One that has ended is seen at
    once, also before its parent has asked for it.

    Args:
        process: Its number.
    """

    def __init__(self, process: int) -> None:
        self._poll = select.poll()
        self._descriptor = -1
        self._has_ended = False
        try:
            self._descriptor = os.pidfd_open(process)
        except ProcessLookupError:
            self._has_ended = True
        except OSError:  # an old kernel, or a sandbox that does not let it
            return
        else:
            self._poll.register(self._descriptor, select.POLLIN)

    @property
    def beats(self) -> bool:
        """Whether it runs, or cannot be told."""
        if self._descriptor >= 0 and not self._has_ended:
            self._has_ended = bool(self._poll.poll(0))
        return not self._has_ended

    def close(self) -> None:
        """Look no more. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
