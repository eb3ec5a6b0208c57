"""How often the courier looks, and how much processor time it may take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

BUDGET = 0.03
"""Share of the wall time that the exchange may take of a processor that training needs, too."""

_BUSY, _WAITING, _IDLE = 0.001, 0.005, 0.01  # seconds between two looks: things move; something is to come; nothing is
_BURST = 0.05  # seconds of processor time that may be saved up
_LONGEST = 0.25  # seconds: however much has been overdrawn, messages are looked for this often


class Pace:
    """Decides how long a thread sleeps between two looks.

    Args:
        budget: Share of the wall time that the thread may be running; None: as much as it likes.
        clock: Gives seconds of wall time.
        used: Gives seconds of processor time of the calling thread.
    """

    def __init__(
        self,
        budget: float | None,
        clock: Callable[[], float] = time.monotonic,
        used: Callable[[], float] = time.thread_time,
    ) -> None:
        self._budget, self._clock, self._used = budget, clock, used
        self._saved = _BURST
        self._last = (clock(), 0.0)
        self._delay = _BUSY

    @property
    def may_start(self) -> bool:
        """Whether there is time left for one more block."""
        self._count()
        return self._budget is None or self._saved > 0

    def delay(self, moved: bool, expects: bool) -> float:
        """Seconds to sleep now.

        Args:
            moved: Whether something has just come or gone.
            expects: Whether something is under way.
        """
        self._count()
        self._delay = _BUSY if moved else min(self._delay * 1.1, _WAITING if expects else _IDLE)
        if self._budget is None or self._saved > 0:
            return self._delay
        return min(max(-self._saved / self._budget, self._delay), _LONGEST)

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """What is used meanwhile does not count: making a lost connection anew takes what others need for seconds."""
        self._count()
        try:
            yield
        finally:
            self._last = (self._clock(), self._used())

    def _count(self) -> None:
        """Add what the time since the last call was worth, and take off what has been used."""
        now, used = self._clock(), self._used()
        if self._budget is not None:
            earned = self._budget * (now - self._last[0])
            self._saved = min(self._saved + earned - (used - self._last[1]), _BURST)
        self._last = (now, used)
