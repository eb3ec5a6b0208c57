"""Who was waited for at meetings, for how long, and why."""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence

logger = logging.getLogger(__name__)

UNKNOWN = -1.0
"""In the place of the seconds that a worker stood, where it has not been at the last gathering."""

_LONG = 10.0  # seconds, of which the log tells at once
_WORTH = 1.0  # seconds in all, of which it tells at the end


class Waits:
    """Keeps an account of gatherings, for which all stand still until the last one has come.

    Machines' clocks differ. So each worker measures how long it stood, and says it at the next gathering: who stood for
    the shortest time came last, and the others waited for it.

    Attributes:
        stood: Seconds that this worker stood at the last gathering, or `UNKNOWN`.
        seconds: That all others waited, by the rank they waited for: of each gathering, the time of the first to come.
    """

    def __init__(self) -> None:
        self.stood = UNKNOWN
        self.seconds: defaultdict[int, float] = defaultdict(float)
        self._steps: list[int] = []  # own steps of each at the last gathering
        self._rates: list[float] = []  # and how many a second until then
        self._ended = time.monotonic()  # when it was

    @contextlib.contextmanager
    def standing(self) -> Iterator[None]:
        """Around a gathering."""
        began, self.stood = time.monotonic(), UNKNOWN
        yield
        self.stood = time.monotonic() - began

    def note(self, stood: Sequence[float], steps: Sequence[int], *, tells: bool) -> None:
        """All workers have said how long they stood at the gathering before this one.

        Args:
            stood: Seconds, by rank.
            steps: Own steps of each until now, by rank.
            tells: Whether this worker logs what all know.
        """
        if min(stood) >= 0:
            last = min(range(len(stood)), key=stood.__getitem__)
            waited = max(stood) - stood[last]
            self.seconds[last] += waited
            if tells and waited >= _LONG:
                logger.warning(f"LayUp: the others waited {waited:.0f} s for rank {last}{self._why(last)}.")
        seconds = max(time.monotonic() - self._ended, 1e-9)
        self._rates = [(now - then) / seconds for now, then in zip(steps, self._steps, strict=False)]
        self._steps, self._ended = list(steps), time.monotonic()

    def _why(self, rank: int) -> str:
        """What is known of the cause."""
        if len(self._rates) <= rank or not max(self._rates):
            return ""
        mine, usual = self._rates[rank], statistics.median(self._rates)
        if mine < 0.7 * usual:
            return f", which made {mine:.2g} steps a second where the median was {usual:.2g}"
        return ", whose steps were not slower than the others': it did something else, or was stopped"

    def begin_anew(self, *, tells: bool) -> None:
        """Ranks mean other workers from here on."""
        if tells:
            self.tell()
        self.stood = UNKNOWN
        self.seconds.clear()
        self._steps, self._rates, self._ended = [], [], time.monotonic()

    def summary(self) -> str:
        """What is said at the end; nothing if it is not worth it."""
        most = sorted(self.seconds.items(), key=lambda item: -item[1])
        told = [f"{seconds:.1f} s for rank {rank}" for rank, seconds in most if seconds >= _WORTH]
        return f"LayUp: when all met, the others waited {', '.join(told)}." if told else ""

    def tell(self) -> None:
        """Log that."""
        if summary := self.summary():
            logger.warning(summary)
