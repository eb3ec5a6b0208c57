"""Merging at any moment: `merge_at="arrival"`."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..blocks import Block
from ..device import Mark
from .engine import GossipEngine, Offer

_LEAST_SLEEP = 0.001  # seconds between two looks at what has been offered
_SLEEP_PER_LOOK = 20.0  # times what a look took: looking is not to cost more than 5 % of a core


class ArrivalEngine(GossipEngine):
    """Merges an offer as soon as a thread of its own sees it, as in the LayUp paper (arXiv 2410.05985, section 3).

    A block may so change between its use in forward and its gradient, also while a kernel reads it: the gradient is
    taken at weights that have moved (`GradientBias` measures by how much that changes it). A lock per block keeps a
    merge and the optimizer's step of the same block apart, as both read and write it; on CUDA the thread has a stream
    of its own, and the streams wait for each other at the same places, on the device. What forward itself writes
    (BatchNorm's running statistics) has no lock: one update of it may get lost in a merge.

    Autograd would refuse backward after such a merge, as it counts the writes to what it has saved. The thread writes
    by `Tensor.data`, which is not counted.

    It merges only between `resume` and `pause`: not while the workers meet.

    Args:
        blocks, windows, sampler: As of `GossipEngine`.
        may_exchange: Whether this worker's lease holds.
        engine: More, as of `GossipEngine`.
    """

    def __init__(self, blocks: Sequence[Block], *args: Any, may_exchange: Callable[[], bool], **engine: Any) -> None:
        super().__init__(blocks, *args, **engine)
        self._latest: Mark | None = None  # of the last merge
        self.mine = [[tensor.data for tensor in tensors] for tensors in self.mine]
        self._may_exchange = may_exchange
        self._locks = [threading.RLock() for _ in self.mine]
        self._may_merge, self._ends = threading.Event(), threading.Event()
        self._failure: BaseException | None = None
        device = self.mine[0][0].device
        self._turns = [_Turns() for _ in self.mine] if device.type == "cuda" else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = threading.Thread(target=self._run, name="layup-arrival", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def merging(self, block: Block) -> Iterator[list[Offer]]:
        """There is nothing to merge: the thread does it.

        Raises:
            RuntimeError: The thread has failed.
        """
        if self._failure is not None:
            raise RuntimeError(f"Merging has failed: {self._failure}") from self._failure
        self.announce()
        yield []

    def holding(self, block: Block) -> contextlib.AbstractContextManager[None]:
        """Keep the thread off the block; at most one merge of it is waited for."""
        return self._holding(block.index)

    @contextlib.contextmanager
    def _holding(self, index: int) -> Iterator[None]:
        """Be the only one who writes the block, on the device, too."""
        with self._locks[index]:
            if self._turns is not None:
                self._turns[index].wait()
            yield
            if self._turns is not None:
                self._turns[index].note()

    def exclude(self, peer: int) -> None:
        """Do without a peer whose lease has run out. Idempotent."""
        with self._holding_all():
            super().exclude(peer)

    def figures(self) -> dict[str, float]:
        """As of `GossipEngine`."""
        with self._holding_all():  # the thread counts, too
            return super().figures()

    def resume(self) -> None:
        """Merge from here on."""
        super().resume()
        self._may_merge.set()

    def pause(self) -> None:
        """Merge no more until `resume`; returns when the last merge has ended."""
        self._may_merge.clear()
        with self._holding_all():
            super().pause()
            if self._stream is not None:
                torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._ends.set()
        self._may_merge.set()  # lets it see that
        self._thread.join()

    @contextlib.contextmanager
    def _holding_all(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for lock in self._locks:
                stack.enter_context(lock)
            yield

    def _run(self) -> None:
        try:
            with torch.no_grad(), torch.cuda.stream(self._stream):
                while self._may_merge.wait() and not self._ends.is_set():
                    began = time.perf_counter()
                    if self._may_exchange():
                        self._look()
                    time.sleep(max(_LEAST_SLEEP, _SLEEP_PER_LOOK * (time.perf_counter() - began)))
        except BaseException as error:  # the training thread raises it
            self._failure = error

    def announce_step(self, index: int, offers: int) -> None:
        with self._locks[index]:  # a merge changes the mass, too
            super().announce_step(index, offers)

    def _look(self) -> None:
        """Merge what is offered and here, but not more than the device has room for: the training stream waits for all
        that is queued before what it needs.
        """
        for index in self.ledger.waiting():
            if self._latest is not None and not self._latest.is_done():
                return
            with self._holding(index):
                if not self._may_merge.is_set() or self._ends.is_set():
                    return
                self.take_offers(index)
                self._latest = self.queues.mark()


class _Turns:
    """Who writes a block next, on the device: each of two streams waits there for what the other has done last."""

    def __init__(self) -> None:
        self._done = torch.cuda.Event()

    def wait(self) -> None:
        """Let the present stream wait for the latest `note`."""
        torch.cuda.current_stream().wait_event(self._done)

    def note(self) -> None:
        """The present stream has written the block."""
        self._done.record(torch.cuda.current_stream())
