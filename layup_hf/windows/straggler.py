"""Delays made on purpose: which worker is slow, when, and by how much."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

Kind = Literal["compute", "communication"]

_EXAMPLE = "rank=3,compute=0.4; rank=all,communication=0.05,distribution=exponential"
_DISTRIBUTIONS = ("constant", "exponential", "uniform")
_READERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "rank": (lambda text: None if text == "all" else int(text), "`all` or a rank, counted from 0"),
    "compute": (float, "seconds, finite and not negative"),
    "communication": (float, "seconds, finite and not negative"),
    "distribution": (str, "one of " + ", ".join(_DISTRIBUTIONS)),
    "first": (int, "a step, counted from 0"),
    "last": (int, "a step after `first`"),
    "seed": (int, "an integer"),
    "busy": (lambda text: {"true": True, "false": False}[text.lower()], "`true` or `false`"),
}
"""How the text of each field is read, and what is allowed."""


@dataclass(frozen=True)
class StragglerConfig:
    """One delay. `str` of it is text that `parse` takes.

    Args:
        rank: The worker that is delayed; None for every worker.
        compute: Seconds that each optimizer step of the worker takes longer.
        communication: Seconds that what the worker sends and receives is late.
        distribution: "constant", or "exponential" or "uniform" (on [0, 2 * mean]) with the given seconds as mean.
        first: First of the worker's own steps that is delayed, counted from 0 at the start of training.
        last: First step that is no longer delayed; None for no end.
        seed: Seed of the draws. Delays of one worker that are to be independent need different seeds.
        busy: Keep a core busy while waiting, as a really slow worker would. With fewer cores than workers, a worker
            that sleeps lends its core to the others.

    Raises:
        ValueError: A value is not allowed.
    """

    rank: int | None = None
    compute: float = 0.0
    communication: float = 0.0
    distribution: str = "constant"
    first: int = 0
    last: int | None = None
    seed: int = 0
    busy: bool = False

    def __post_init__(self) -> None:
        allowed = {
            "rank": self.rank is None or self.rank >= 0,
            "compute": 0 <= self.compute < math.inf,
            "communication": 0 <= self.communication < math.inf,
            "distribution": self.distribution in _DISTRIBUTIONS,
            "first": self.first >= 0,
            "last": self.last is None or self.last > self.first,
        }
        for name, is_allowed in allowed.items():
            if not is_allowed:
                raise _error(f"{name}={getattr(self, name)}", f"`{name}` must be {_READERS[name][1]}")

    @classmethod
    def parse(cls, text: str) -> list[StragglerConfig]:
        """Read delays separated by `;`, each of them `name=value` pairs separated by `,`, such as
        "rank=3,compute=0.4; rank=all,communication=0.05".

        Raises:
            ValueError: Naming the part of the text that is wrong and what is allowed.
        """
        return [cls._parse_one(part) for part in text.split(";")]

    @classmethod
    def _parse_one(cls, text: str) -> StragglerConfig:
        values: dict[str, Any] = {}
        for part in text.split(","):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or name not in _READERS:
                raise _error(part.strip(), f"a part must be `name=value`, with a name of {', '.join(_READERS)}")
            if name in values:
                raise _error(part.strip(), f"`{name}` must be given once per delay")
            read, allowed = _READERS[name]
            try:
                values[name] = read(value)
            except (ValueError, KeyError):
                raise _error(part.strip(), f"`{name}` must be {allowed}") from None
        return cls(**values)

    def __str__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return ",".join(f"{name}={value}" for name, value in ({"rank": "all"} | given).items())

    def check(self, world_size: int) -> None:
        """Make sure that the worker exists.

        Raises:
            ValueError: There is no such rank among `world_size` workers.
        """
        if self.rank is not None and self.rank >= world_size:
            raise _error(f"rank={self.rank}", f"this run has {world_size} worker(s), ranks 0 to {world_size - 1}")

    def delay(self, kind: Kind, rank: int, step: int) -> float:
        """Seconds that worker `rank` is delayed in its own step `step`: the same in every process, whenever asked."""
        mean = getattr(self, kind)
        if self.rank not in (None, rank) or step < self.first or (self.last is not None and step >= self.last):
            return 0.0
        if self.distribution == "constant" or not mean:
            return mean
        draws = random.Random(f"{self.seed}/{kind}/{rank}/{step}")
        return mean * (draws.expovariate(1.0) if self.distribution == "exponential" else draws.uniform(0.0, 2.0))


def _error(part: str, reason: str) -> ValueError:
    return ValueError(f"Straggler {part!r}: {reason}. Example: {_EXAMPLE!r}.")


def total_delay(stragglers: Sequence[StragglerConfig], kind: Kind, rank: int, step: int) -> float:
    """Seconds that all of `stragglers` together delay worker `rank` in its own step `step`."""
    return sum(straggler.delay(kind, rank, step) for straggler in stragglers)


def wait(seconds: float, busy: bool = False) -> None:
    """Wait, asleep or (`busy`) keeping a core busy."""
    if not busy:
        time.sleep(seconds)
        return
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
