"""One clock for all workers: monotonic clocks of several machines, read against each other."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

now = time.perf_counter_ns
"""The clock of all events: monotonic, and the same for all processes of a machine."""


def clock_domain() -> str:
    """Names the machine, and the time namespace: where it is the same, so is `now`."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        domain = file.read().strip()
    with contextlib.suppress(OSError):  # an old kernel has none
        domain += os.readlink("/proc/self/ns/time")
    return domain


@dataclass
class Reading:
    """How far the clock of the reference was ahead of this worker's, in nanoseconds.

    Attributes:
        at: When, by this worker's clock.
        ahead: So far.
        error: It is not known better than this, to both sides.
    """

    at: int
    ahead: int = 0
    error: int = 0


class SharedClock:
    """Turns this worker's times into those of one clock, and these into wall time.

    Without a reading, it is this worker's own wall clock. Between two readings it goes evenly, as clocks drift.
    """

    def __init__(self) -> None:
        self.wall = time.time_ns() - now()
        self._reference = ""
        self._readings: list[Reading] = []

    def read(self, reference: str, wall: int, reading: Reading) -> None:
        """Another worker's clock has been read.

        Args:
            reference: Names that clock; another one than before makes what was read before worthless.
            wall: How far wall time is ahead of it, there.
            reading: What was read.
        """
        if reference != self._reference:
            self._readings.clear()
        self._reference, self.wall = reference, wall
        self._readings.append(reading)

    def told(self) -> dict[str, Any]:
        """As data."""
        return {"wall": self.wall, "readings": [(one.at, one.ahead, one.error) for one in self._readings]}


def wall_times(times: np.ndarray, clock: dict[str, Any]) -> np.ndarray:
    """Nanoseconds since 1970, of nanoseconds of a worker's own clock; in whole numbers, in the same order.

    Args:
        clock: From `SharedClock.told`.
    """
    ahead = np.zeros(len(times), np.int64)
    readings = clock["readings"]
    if readings:
        first = readings[0][0]
        at = np.array([reading[0] - first for reading in readings], float)
        # From the first reading's, so that floats are exact enough: offsets between machines may be of days.
        change = np.array([reading[1] - readings[0][1] for reading in readings], float)
        ahead = readings[0][1] + np.rint(np.interp((times - first).astype(float), at, change)).astype(np.int64)
    return times + ahead + clock["wall"]
