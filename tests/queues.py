"""A device that does what it is told when the test lets it, and a way to share its memory, without any GPU."""

from __future__ import annotations

import contextlib
from collections import deque

from torch.utils._python_dispatch import TorchDispatchMode

from layup_hf.windows.segment import Segment, as_bytes


class FakeMark:
    """Done when the queue that it was put into has come so far."""

    def __init__(self, owner):
        self._owner, self.done = owner, False

    def is_done(self):
        return self.done

    def wait(self):
        self._owner.waited += 1
        self._owner.pass_marks()
        while not self.done:
            self._owner.run_one()

    def seconds_since(self, earlier):
        return 0.0


class Late(TorchDispatchMode):
    """Puts copies into a queue in place of making them."""

    def __init__(self, queue):
        super().__init__()
        self._queue = queue

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() == "aten::copy_":
            self._queue.append(lambda: args[0].copy_(args[1]))
            return args[0]
        return func(*args, **(kwargs or {}))


class FakeQueues:
    """As `CudaQueues`; what is computed beside the calls under test is put in by `compute`.

    Attributes:
        waited: How often the processor has waited for a mark.
        finished: How often for the whole device.
    """

    def __init__(self):
        self._computing, self._copies = deque(), deque()
        self.waited = self.finished = 0

    @property
    def left(self):
        """Operations that are still to be computed."""
        return sum(not isinstance(item, FakeMark) for item in self._computing)

    def mark(self):
        self._computing.append(mark := FakeMark(self))
        return mark

    @contextlib.contextmanager
    def copying(self, after=()):
        self._copies.extend(("after", mark) for mark in after)
        with Late(self._copies):
            yield

    def mark_copies(self):
        self._copies.append(mark := FakeMark(self))
        return mark

    def finish(self):
        self.finished += 1
        self.run()

    def compute(self, operation):
        self._computing.append(operation)

    def run_one(self):
        """The next operation that is to be computed, with the marks before and after it."""
        self.pass_marks()
        if self._computing:
            self._computing.popleft()()
        self.pass_marks()

    def pass_marks(self):
        """Those that only wait for what has been computed."""
        while self._computing and isinstance(self._computing[0], FakeMark):
            self._computing.popleft().done = True

    def run_computing(self):
        while self._computing:
            self.run_one()

    def run_copies(self):
        """As far as they need not wait for what is computed."""
        while self._copies:
            match self._copies[0]:
                case ("after", mark):
                    if not mark.done:
                        return
                case FakeMark() as mark:
                    mark.done = True
                case copy:
                    copy()
            self._copies.popleft()

    def run(self):
        self.run_computing()
        self.run_copies()


class SegmentIpc:
    """In place of CUDA's: buffers are shared memory of the host.

    Args:
        device: What this worker calls its own.
        fails: Raised when a buffer is opened.
        wrong: Every buffer that is opened has other bytes than the one that was exported.
    """

    def __init__(self, device, fails=None, wrong=False):
        self.device, self.fails, self.wrong = device, fails, wrong
        self.opened = []
        self._segments = {}

    def allocate(self, num_bytes, device):
        segment = Segment.create(max(num_bytes, 1))
        buffer = as_bytes(segment.map(writable=True), 0, num_bytes)
        self._segments[buffer.data_ptr()] = segment
        return buffer

    def export(self, buffer):
        return (self._segments[buffer.data_ptr()], buffer.numel())

    def open(self, exported, device):
        if self.fails is not None:
            raise self.fails
        segment, num_bytes = exported
        self.opened.append(device)
        buffer = as_bytes(segment.map(writable=True), 0, num_bytes)
        return buffer.flip(0) if self.wrong else buffer

    def name(self, device):
        return self.device

    def close(self):
        for segment in self._segments.values():
            segment.release()
        self._segments.clear()
