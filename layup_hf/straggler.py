"""Delays made on purpose: a worker that computes slowly, or whose messages are late."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from .ledger import Ledger
from .windows.base import PeerWindows

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


class LateWindows:
    """Windows in which everything that a worker reads is late by its own and the peer's communication delay.

    A read that is asked for gives None until the delay has passed, then the peer's block as it is by then; the next one
    is late again. Delays are drawn by the number of the read, counted per peer and block: that is the "step" of a
    `StragglerConfig` here. Never waits.

    Args:
        windows: Read when the delay has passed. Whatever else this object is asked for comes from them.
        stragglers: The delays.
        rank: This worker.
        clock: Gives seconds.
    """

    def __init__(
        self,
        windows: PeerWindows,
        stragglers: Sequence[StragglerConfig],
        rank: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._windows = windows
        self._stragglers = stragglers
        self._rank = rank
        self._clock = clock
        self._due: dict[tuple[int, int], float] = {}
        self._reads: Counter[tuple[int, int]] = Counter()

    @property
    def ledger(self) -> Ledger:
        return self._windows.ledger

    def read(self, peer: int, block: int) -> Sequence[Tensor] | None:
        """The peer's live block, or None while it is late or the windows themselves have none."""
        key, now = (peer, block), self._clock()
        if key not in self._due:
            mine, its = (self._delay(rank, self._reads[key]) for rank in (self._rank, peer))
            self._due[key] = now + mine + its
        tensors = self._windows.read(peer, block) if now >= self._due[key] else None
        if tensors is not None:
            self._reads[key] += 1
            del self._due[key]
        return tensors

    def _delay(self, rank: int, number: int) -> float:
        return total_delay(self._stragglers, "communication", rank, number)

    def close(self) -> None:
        self._windows.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._windows, name)


class StragglerCallback(TrainerCallback):
    """Delays workers of any `Trainer`: `Trainer(..., callbacks=[StragglerCallback("rank=0,compute=0.2")])`.

    A computation delay falls between forward and backward, once per optimizer step, so that gradients are taken with
    weights that are as old as a slow worker's. A communication delay falls before the optimizer's step, as DDP cannot
    go on without the message; a trainer that exchanges through windows calls `late_windows` instead. Evaluation is not
    delayed. Steps are counted from 0 at each call of `train`, also when it resumes from a checkpoint.

    Args:
        stragglers: The delays, or text for `StragglerConfig.parse`.

    Raises:
        ValueError: The text is wrong; or, when training starts, a rank is outside of the run.
    """

    def __init__(self, stragglers: str | Sequence[StragglerConfig]) -> None:
        self.stragglers = StragglerConfig.parse(stragglers) if isinstance(stragglers, str) else list(stragglers)
        self._rank = 0
        self._device = torch.device("cpu")
        self._step = -1
        self._compute_pending = False
        self._windows_are_late = False
        self._hook: RemovableHandle | None = None

    def late_windows(self, windows: PeerWindows, rank: int) -> PeerWindows:
        """`windows` with the communication delays; the callback itself no longer waits for them in this training."""
        self._windows_are_late = True
        return LateWindows(windows, self.stragglers, rank)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._hook is not None:
            self._hook.remove()  # of a training that failed
        for straggler in self.stragglers:
            straggler.check(args.world_size)
        self._rank, self._device, self._step, self._compute_pending = args.process_index, args.device, -1, False
        self._hook = kwargs["model"].register_forward_hook(self._after_forward)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step += 1
        self._compute_pending = True

    def _after_forward(self, model: nn.Module, inputs: Any, output: Any) -> None:
        if self._compute_pending and model.training and torch.is_grad_enabled():
            self._compute_pending = False
            self._wait("compute")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._windows_are_late:
            self._wait("communication")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._windows_are_late = False

    def _wait(self, kind: Kind) -> None:
        for straggler in self.stragglers:
            seconds = straggler.delay(kind, self._rank, self._step)
            if seconds:
                if self._device.type != "cpu":
                    # What the device still has to do would otherwise run during the wait and hide a part of it.
                    torch.accelerator.synchronize(self._device)
                wait(seconds, straggler.busy)
