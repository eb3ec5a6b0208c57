"""What a worker did, and when: kept in memory while it trains."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

from .clocks import SharedClock, now


class Kind(NamedTuple):
    """A kind of event.

    Attributes:
        name: As it is shown.
        category: "work", "exchange", "wait" (in vain), "meeting" (with all workers) or "delay" (made on purpose).
        place: What the event's `place` is: "" for nothing, "block", or the number of something.
    """

    name: str
    category: str
    place: str = ""


KINDS: list[Kind] = []
"""By number: that is what is kept of an event."""


def _kind(name: str, category: str, place: str = "") -> int:
    KINDS.append(Kind(name, category, place))
    return len(KINDS) - 1


STEP = _kind("step", "work", "number")
DATA = _kind("data", "wait")
INPUTS = _kind("inputs", "work")
ROLLOUT = _kind("rollout", "work")
FORWARD = _kind("forward", "work")
BACKWARD = _kind("backward", "work")
BLOCK_STEP = _kind("block step", "work", "block")
MERGE = _kind("merge", "exchange", "block")
ON_ITS_WAY = _kind("block on its way", "exchange", "block")
CLOCK = _kind("clock", "wait")
DEVICE = _kind("wait for the device", "wait")
WORKERS = _kind("wait for workers", "wait")
MEETING = _kind("meeting", "meeting")
CONSENSUS = _kind("consensus point", "meeting")
EVALUATION = _kind("evaluation", "meeting")
SAVING = _kind("saving", "meeting")
ERA = _kind("new era", "meeting")
DELAY = _kind("delay", "delay")
# Of training by all-reduce, for comparison
ALL_REDUCE = _kind("all-reduce", "exchange", "bucket")
ALL_REDUCE_WAIT = _kind("wait for all-reduce", "wait")
OPTIMIZER = _kind("optimizer", "work")

MOST_OF_TRAINING, MOST_OF_OTHERS = 1 << 16, 1 << 14
"""Events that are kept of the thread that trains, and of each other track: the last ones."""

_RECORD = struct.Struct("<qqhii")
FIELDS = [("start", "<i8"), ("end", "<i8"), ("kind", "<i2"), ("count", "<i4"), ("place", "<i4")]
"""Of an event, as numpy reads it from what a track keeps."""


class Track:
    """Events of one thread, or of whatever else does one thing after the other: the last so many of them.

    An event is told when it ends, so what it contains comes before it, and is never kept without it. The memory is
    taken at once, and an event takes no more. One thread writes.

    Args:
        most: Events that are kept.

    Attributes:
        count: Events that there have been.
    """

    def __init__(self, most: int) -> None:
        self._most, self._room = most, bytearray(most * _RECORD.size)
        self.count = 0

    def add(self, kind: int, start: int, place: int = -1, count: int = 0) -> None:
        """Something that began at `start` (of `now`) has ended."""
        _RECORD.pack_into(self._room, self.count % self._most * _RECORD.size, start, now(), kind, count, place)
        self.count += 1

    def span(self, kind: int, place: int = -1) -> Span:
        """What is done within it, as an event."""
        return Span(self, kind, place)

    def content(self) -> bytes:
        """What is kept, in the order in which it ended."""
        size = _RECORD.size
        if self.count <= self._most:
            return bytes(self._room[: self.count * size])
        oldest = self.count % self._most * size
        return bytes(self._room[oldest:] + self._room[:oldest])


class Span:
    """An event around a `with`; also where that raises."""

    def __init__(self, track: Track, kind: int, place: int) -> None:
        self._track, self._kind, self._place = track, kind, place

    def __enter__(self) -> Span:
        self._start = now()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._track.add(self._kind, self._start, self._place)


class Trace:
    """All tracks of one worker.

    Attributes:
        training: Of the thread that trains.
        blocks: Names of the blocks, by number.
        clock: How its times become those of a clock that all workers share.
    """

    def __init__(self) -> None:
        self.training = Track(MOST_OF_TRAINING)
        self._tracks = {"training": self.training}
        self.blocks: Sequence[str] = ()
        self.clock = SharedClock()

    def track(self, name: str) -> Track:
        """The one of this name; it is made when it is asked for at first."""
        if name not in self._tracks:
            self._tracks[name] = Track(MOST_OF_OTHERS)
        return self._tracks[name]

    def recording(self, rank: int) -> dict[str, Any]:
        """All that there is to say of this worker, as data that can be sent."""
        return {
            "rank": rank,
            "host": socket.gethostname(),
            "blocks": list(self.blocks),
            "tracks": [(name, track.count, track.content()) for name, track in list(self._tracks.items())],
            "clock": self.clock.told(),
        }
