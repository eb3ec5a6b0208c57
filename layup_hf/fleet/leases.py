"""How long each of the others may be silent before it is done without."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

logger = logging.getLogger(__name__)

_TIMES = 3.0  # as long as the longest time between two signs of life
_MOST = 4.0  # leases that a worker is waited for, however late it is
_FADES = 0.95  # of that longest time, at each sign of life that came sooner
_MUCH = 1.5  # leases, of which the log tells


def now() -> float:
    """Seconds that also go on while this process is stopped or the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass
class _Heard:
    """Of one member.

    Attributes:
        beat: Its last one.
        at: When it was seen first; seconds of `now`.
        longest: Time between two of them, of late; seconds.
        is_told: Whether the log says that it is late.
    """

    beat: bytes
    at: float
    longest: float = 0.0
    is_told: bool = False


class Leases:
    """When the others were last heard, and how long each may be silent.

    A lease is renewed several times before it runs out. Where a machine is overloaded or a link is slow, beats come
    late by as much as that makes them, and a fixed limit would do without a worker that is only late. So with `adapts`
    who is late gets up to four leases, by how late it has been.

    Args:
        seconds: How long a lease holds.
        adapts: Whether it holds longer for who is late.
    """

    def __init__(self, seconds: float, adapts: bool = False) -> None:
        self.seconds, self._adapts = seconds, adapts
        self._heard: dict[str, _Heard] = {}

    def forget(self) -> None:
        """Begin anew with everybody."""
        self._heard.clear()

    def patience(self, member: str) -> float:
        """How long a member may be silent, in seconds."""
        heard = self._heard.get(member)
        if heard is None or not self._adapts:
            return self.seconds
        return min(max(self.seconds, _TIMES * heard.longest), _MOST * self.seconds)

    def has_run_out(self, member: str, beat: bytes, was_away: bool, who: str) -> bool:
        """Look at a member's last beat.

        Args:
            member: Whose.
            beat: It is another one each time that it is renewed.
            was_away: This worker has not looked for long, so everybody begins a whole lease.
            who: How the log names the member.
        """
        heard = self._heard.setdefault(member, _Heard(beat, now()))
        since = now() - heard.at
        if was_away:
            heard.beat, heard.at = beat, now()
        elif heard.beat != beat:
            heard.longest = max(since, _FADES * heard.longest)
            heard.beat, heard.at = beat, now()
            self._tell_if_late(member, heard, who)
        else:
            return since > self.patience(member)
        return False

    def _tell_if_late(self, member: str, heard: _Heard, who: str) -> None:
        patience = self.patience(member)
        if patience <= _MUCH * self.seconds or heard.is_told:
            return
        heard.is_told = True
        logger.warning(
            f"LayUp: {who} gives signs of life up to {heard.longest:.0f} s apart, as its machine is overloaded or the "
            f"network slow. The others do without it when it is silent for {patience:.0f} s, not {self.seconds:g} s."
        )
