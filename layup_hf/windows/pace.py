"""How often the courier looks, and how much processor time it may take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

BUDGET = 0.02
"""Share of a worker's processor time that the exchange may take where training needs the processor, too."""

_BUSY, _WAITING, _IDLE = 0.001, 0.005, 0.01  # seconds between two looks: things move; something is to come; nothing is
_LEAST = 0.5  # of a core is what a worker is taken to use at least: it may wait for data, or to evaluate
_SLACK = 0.001  # seconds of processor time that may be overdrawn when one more block is begun
_LONGEST = 0.25  # seconds: however much has been overdrawn, messages are looked for this often


class Pace:
    """Decides how long a thread sleeps between two looks.

    With a budget, a look that has taken long is followed by a long sleep. More comes together meanwhile, in the buffers
    of the operating system, and costs less for each byte than if it had been looked for all the time.

    Args:
        budget: Share of the process's processor time that the thread may take; None: as much as it likes.
        clock: Gives seconds of wall time.
        used: Gives seconds of processor time of the calling thread.
        used_by_all: Gives seconds of processor time of the process.
    """

    def __init__(
        self,
        budget: float | None,
        clock: Callable[[], float] = time.monotonic,
        used: Callable[[], float] = time.thread_time,
        used_by_all: Callable[[], float] = time.process_time,
    ) -> None:
        self._budget, self._clock, self._used, self._used_by_all = budget, clock, used, used_by_all
        self._saved = 0.0  # seconds of processor time; what is not used is not kept
        self._last = (clock(), 0.0, used_by_all())
        self._cores = 1.0  # that the process has used in the last second or so
        self._delay = _BUSY

    @property
    def may_start(self) -> bool:
        """Whether there is time left for one more block."""
        self._count()
        return self._budget is None or self._saved > -_SLACK

    def delay(self, moved: bool, expects: bool) -> float:
        """Seconds to sleep now.

        Args:
            moved: Whether something has just come or gone.
            expects: Whether something is under way.
        """
        self._count()
        self._delay = _BUSY if moved else min(self._delay * 1.1, _WAITING if expects else _IDLE)
        if self._budget is None:
            return self._delay
        owed = -self._saved / self._budget / max(self._cores, _LEAST)
        return min(max(owed, self._delay), _LONGEST)

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """What is used meanwhile does not count: making a lost connection anew takes what others need for seconds."""
        self._count()
        try:
            yield
        finally:
            self._last = self._times()

    def _count(self) -> None:
        """Add what the time since the last call was worth, and take off what has been used."""
        times = self._times()
        seconds, used, used_by_all = (now - before for now, before in zip(times, self._last, strict=True))
        if self._budget is not None:
            self._cores += (used_by_all - self._cores * seconds) / max(seconds, 1.0)
            earned = self._budget * max(used_by_all, _LEAST * seconds)
            self._saved = min(self._saved + earned - used, 0.0)
        self._last = times

    def _times(self) -> tuple[float, float, float]:
        return self._clock(), self._used(), self._used_by_all()
