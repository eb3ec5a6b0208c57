"""The one place that knows how a device works through what it is given: streams and events.

On a GPU an operation is only queued when its call returns. What is queued last may run much later, so whoever tells
others of it must know when it has run, and whoever copies beside the computation must order the two. On a CPU
everything has happened when its call returns.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch

MOST_STEPS_AHEAD = 2
"""Own steps that the processor may queue before the device has made the first of them."""


class Mark(Protocol):
    """A point in a queue."""

    def is_done(self) -> bool:
        """Whether the device has come so far. Never waits."""

    def wait(self) -> None:
        """Let the processor wait until the device has come so far."""

    def seconds_since(self, earlier: Mark) -> float:
        """Time between two points of one queue, both done, in which the device worked or waited."""


class Queues(Protocol):
    """The two queues of a worker's device: one computes, and beside it one copies.

    The one that computes is whichever stream is current where a method is called.
    """

    def mark(self) -> Mark:
        """The end of what is queued for computing now."""

    def copying(self, after: Iterable[Mark] = ()) -> AbstractContextManager[None]:
        """Queue what is called in it as copies, to run when these marks are done. Nothing waits here."""

    def mark_copies(self) -> Mark:
        """The end of the copies that are queued now."""

    def finish(self) -> None:
        """Let the processor wait for both. Only where nothing trains."""


def queues_of(device: torch.device) -> Queues:
    """Of the device that a worker's blocks are on."""
    return CudaQueues(device) if device.type == "cuda" else HOST


class HostMark:
    """Done when it is made."""

    def __init__(self) -> None:
        self.made_at = time.perf_counter()

    def is_done(self) -> bool:
        """Always."""
        return True

    def wait(self) -> None:
        """Nothing to wait for."""

    def seconds_since(self, earlier: Mark) -> float:
        """Wall time."""
        assert isinstance(earlier, HostMark)
        return self.made_at - earlier.made_at


class HostQueues:
    """Of a CPU, where nothing is queued."""

    def mark(self) -> Mark:
        """Done."""
        return HostMark()

    def copying(self, after: Iterable[Mark] = ()) -> AbstractContextManager[None]:
        """Copies happen as they are called."""
        return contextlib.nullcontext()

    def mark_copies(self) -> Mark:
        """Done."""
        return HostMark()

    def finish(self) -> None:
        """Nothing to wait for."""


HOST = HostQueues()


class CudaMark:
    """An event on a stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record(stream)

    def is_done(self) -> bool:
        """Whether the stream has passed it."""
        return self.event.query()

    def wait(self) -> None:
        """Let the processor wait until the stream has."""
        self.event.synchronize()

    def seconds_since(self, earlier: Mark) -> float:
        """By the device's clock."""
        assert isinstance(earlier, CudaMark)
        return earlier.event.elapsed_time(self.event) / 1000


class CudaQueues:
    """The current stream of a GPU, and one of its own for copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)

    def mark(self) -> Mark:
        """An event on the current stream."""
        return CudaMark(torch.cuda.current_stream(self._device))

    @contextlib.contextmanager
    def copying(self, after: Iterable[Mark] = ()) -> Iterator[None]:
        """On the stream for copies; it waits for the marks, the processor does not."""
        for mark in after:
            assert isinstance(mark, CudaMark)
            self._copies.wait_event(mark.event)
        with torch.cuda.stream(self._copies):
            yield

    def mark_copies(self) -> Mark:
        """An event on the stream for copies."""
        return CudaMark(self._copies)

    def finish(self) -> None:
        """Let the processor wait for the whole device."""
        torch.cuda.synchronize(self._device)


class StepsAhead:
    """Keeps the processor from queueing more than a few steps: each holds what its kernels need until it has run.

    Args:
        queues: Of the device that steps.
        most: Steps that may be queued and not done.
    """

    def __init__(self, queues: Queues, most: int = MOST_STEPS_AHEAD) -> None:
        self._queues, self._most = queues, most
        self._ends: deque[Mark] = deque()

    def begin_step(self) -> None:
        """A step is about to be queued: wait until no more than `most` before it are on their way."""
        self._ends.append(self._queues.mark())
        while len(self._ends) > self._most:
            self._ends.popleft().wait()
