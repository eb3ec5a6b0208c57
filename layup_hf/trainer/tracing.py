"""The trace of a run: what is recorded around the Trainer's own methods, and the one file at the end."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from accelerate import Accelerator
from transformers import TrainerCallback

from ..disk import why_not_written
from ..fleet.talk import Talk
from ..trace import file as files
from ..trace.clocks import Reading, clock_domain, now
from ..trace.events import BACKWARD, DATA, FORWARD, INPUTS, ROLLOUT, STEP, Trace, Track
from .host import Host

logger = logging.getLogger(__name__)

T = TypeVar("T")

_EXCHANGES = 8  # to read a clock by: the quickest counts
_MOST_BYTES = 1 << 28  # of a recording


class Records(Protocol):
    """What records, or does not."""

    @property
    def track(self) -> Track | None:
        """Of the thread that trains; None: nothing is recorded."""


class Tracing:
    """Records what this worker does, if the option `trace` is set, and writes it when training ends.

    What happens to blocks is recorded by who does it, in a `Track` that it is given. Here is what goes around methods
    of the Trainer, and what needs other workers: their clocks, and the one file, which rank 0 writes. A worker that
    fails writes what it has aside, as it cannot know who else is left (`layup_hf.trace` joins such parts).

    Attributes:
        trace: Of this worker, while it trains; None: nothing is recorded.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._is_in_step = False
        self.trace: Trace | None = None

    @property
    def track(self) -> Track | None:
        """Of the thread that trains; None: nothing is recorded."""
        return self.trace.training if self.trace is not None else None

    # ---- Recording ----

    def start(self) -> None:
        """Begin to record, if that is wanted; where training begins anew with smaller batches, go on."""
        if self._host.options.trace is None:
            self.trace = None
        elif self.trace is None:
            self.trace = Trace()
        if self.track is not None:
            record_backward(self._host.accelerator, self.track)

    def stop(self) -> None:
        """Leave the Trainer as it was. Idempotent."""
        leave_backward(self._host.accelerator)

    def span(self, kind: int) -> contextlib.AbstractContextManager[Any]:
        """Record what is done within it."""
        track = self.track
        return track.span(kind) if track is not None else contextlib.nullcontext()

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """Around forward and backward: inputs and losses outside of it are of an evaluation."""
        self._is_in_step = True
        try:
            yield
        finally:
            self._is_in_step = False

    def loss(self) -> contextlib.AbstractContextManager[Any]:
        """Around the computation of a loss."""
        return self.span(FORWARD) if self._is_in_step else contextlib.nullcontext()

    def inputs(self, stock: Callable[[], T]) -> T:
        """Get the inputs ready; where the Trainer generates, that makes a rollout now and then."""
        track = self.track
        if track is None or not self._is_in_step:
            return stock()
        before, start = self._host.rollout, now()
        inputs = stock()
        track.add(INPUTS if self._host.rollout is before else ROLLOUT, start)
        return inputs

    def waiting_for(self, updates: Iterable[T]) -> Iterator[T]:
        """The same; how long each takes to come is recorded."""
        return _noting(iter(updates), self.track) if self.track is not None else iter(updates)

    # ---- With the others ----

    def read_clocks(self, talk: Talk) -> list[bool]:
        """Read rank 0's clock, to tell times by it. Collective.

        Returns:
            Who records.
        """
        is_on = self.trace is not None
        says = talk.gather((clock_domain(), time.time_ns() - now()) if is_on else None)
        domain, wall = says[0] or ("", 0)
        for rank, one in enumerate(says):
            if says[0] is None or one is None or talk.rank not in (0, rank):
                continue
            reading = Reading(now())  # of the same clock there is nothing to read
            if one[0] != domain:
                reading = _read_clock(talk) if talk.rank else _show_clock(talk, rank)
            if self.trace is not None and rank == talk.rank:
                self.trace.clock.read(domain, wall, reading)
        return [one is not None for one in says]

    def require_all(self, talk: Talk) -> None:
        """Begin by reading the clocks. Collective.

        Raises:
            ValueError: Some workers record, and others do not.
        """
        records = self.read_clocks(talk)
        if any(records) and not all(records):
            ranks = ", ".join(str(rank) for rank, does in enumerate(records) if does)
            raise ValueError(f"`trace` is set on rank {ranks} alone. Set it on all workers, or on none.")

    def finish(self, talk: Talk) -> None:
        """Bring what all have recorded to rank 0, which writes it. Collective."""
        records = self.read_clocks(talk)
        if not records[0]:  # a worker that has joined may have another configuration
            self.write_aside()
            return
        recording = self.trace.recording(talk.rank) if self.trace is not None else None
        begins = talk.gather(files.begin_of(recording) if recording is not None else None)
        if talk.rank == 0:
            recordings = _recordings(talk, recording, records)
            self._write(lambda file: files.write(file, recordings, min(one for one in begins if one is not None)))
            for _ in recordings:  # where it could not be written, the others are not to wait
                pass
        elif recording is not None:
            talk.send(recording, 0)
        talk.wait()  # whoever is lost before, all of this is done again without
        self.trace = None

    def write_aside(self) -> None:
        """Write what this worker has recorded alone: one that trains alone into the file, others beside it."""
        trace, host = self.trace, self._host
        if trace is None:
            return
        self.trace = None
        recording = trace.recording(host.rank)
        begin = files.begin_of(recording)

        def write(file: str) -> int:
            place = files.part_of(file, host.rank) if host.world_size > 1 else file
            return files.write(place, [recording], begin)

        self._write(write)

    def _write(self, write: Callable[[str], int]) -> None:
        """What cannot be written ends no training."""
        file = self._host.options.trace
        assert file is not None
        try:
            count = write(file)
        except OSError as error:
            why = why_not_written(error, Path(file).parent)
            logger.warning(f"LayUp: the trace could not be written to {file}: {error} ({why}).")
        else:
            logger.info(f"The trace has {count} events: {file}, or beside it what rank {self._host.rank} has alone.")


class StepTracer(TrainerCallback):
    """Records the steps of any Trainer: from the beginning of one to where the optimizer has stepped.

    Args:
        records: Has the track.

    Attributes:
        records: The same.
    """

    def __init__(self, records: Records) -> None:
        self.records = records
        self._start = self._number = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._number = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = now()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._number += 1
        if (track := self.records.track) is not None:
            track.add(STEP, self._start, self._number)


def record_backward(accelerator: Accelerator, track: Track) -> None:
    """From here on, record each backward that is made through an accelerator."""
    stock = type(accelerator).backward

    def backward(*args: Any, **kwargs: Any) -> None:
        with track.span(BACKWARD):
            stock(accelerator, *args, **kwargs)

    vars(accelerator)["backward"] = backward


def leave_backward(accelerator: Accelerator) -> None:
    """Leave the accelerator as it was. Idempotent."""
    vars(accelerator).pop("backward", None)


def _noting(items: Iterator[T], track: Track) -> Iterator[T]:
    while True:
        start = now()
        try:
            item = next(items)
        except StopIteration:
            return
        finally:
            track.add(DATA, start)
        yield item


def _recordings(talk: Talk, mine: Any, records: list[bool]) -> Iterator[dict[str, Any]]:
    """Rank 0's own, and those of the others as they come."""
    yield mine
    for rank in range(1, talk.size):
        if records[rank]:
            yield talk.receive(rank, _MOST_BYTES)


def _read_clock(talk: Talk) -> Reading:
    """Ask rank 0 for the time, as NTP does: what the quickest answer says of the middle of its journey."""
    readings = []
    for _ in range(_EXCHANGES):
        asked = now()
        talk.send(None, 0)
        said = talk.receive(0, 1 << 10)
        answered = now()
        middle, error = (asked + answered) // 2, (answered - asked + 1) // 2
        readings.append(Reading(middle, said - middle, error))
    return min(readings, key=lambda reading: reading.error)


def _show_clock(talk: Talk, rank: int) -> Reading:
    """Let a worker ask."""
    for _ in range(_EXCHANGES):
        talk.receive(rank, 1 << 10)
        talk.send(now(), rank)
    return Reading(now())
