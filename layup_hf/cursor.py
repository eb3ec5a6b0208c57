"""Which part of an epoch goes to which worker."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch.distributed import Store


class Draw(NamedTuple):
    """A part of an epoch: the samples at places `start` to `stop` of its order."""

    epoch: int
    start: int
    stop: int

    def split(self, size: int) -> Iterator[Draw]:
        """The same in parts of `size` samples, the last one perhaps smaller."""
        for start in range(self.start, self.stop, size):
            yield Draw(self.epoch, start, min(start + size, self.stop))


class Cursor:
    """Hands out every part of an epoch exactly once, to whoever asks, through atomic counters in a store.

    Args:
        store: Shared by all workers.
        rank: This worker.
        world_size: Number of workers.
        position: Where an earlier run stopped, from `position()`: what it had handed out is not handed out again, but
            for what no worker had begun.
        most: Samples that every worker can use at once; what had not been begun is handed out in such parts.
    """

    def __init__(
        self, store: Store, rank: int, world_size: int, position: dict[str, Any] | None = None, most: int = 1 << 62
    ) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        position = position or {"drawn": {}, "not_begun": []}
        self._begins = {int(epoch): place for epoch, place in position["drawn"].items()}
        self._left: dict[int, list[Draw]] = {}
        for draw in sorted(Draw(*numbers) for numbers in position["not_begun"]):
            self._left.setdefault(draw.epoch, []).extend(draw.split(most))

    def draw(self, epoch: int, size: int, end: int) -> Draw | None:
        """The next `size` places of the epoch, fewer at its end; None when all `end` places have been drawn."""
        left = self._left.get(epoch, ())
        if left and (number := self._store.add(f"left/{epoch}", 1)) <= len(left):
            return left[number - 1]
        stop = self._begins.get(epoch, 0) + self._store.add(f"drawn/{epoch}", size)
        return Draw(epoch, stop - size, min(stop, end)) if stop - size < end else None

    def give_up(self, epoch: int, draws: Sequence[Draw]) -> None:
        """Say that this worker found everything drawn; `draws` are those that it has not begun: anybody may."""
        self._store.set(f"not_begun/{epoch}/{self._rank}", json.dumps(draws))
        self._store.add(f"gave_up/{epoch}", 1)

    def all_gave_up(self, epoch: int) -> bool:
        """Whether every worker has, so that nothing can be given up any more."""
        return self._store.add(f"gave_up/{epoch}", 0) == self._world_size

    def claim(self, draw: Draw) -> bool:
        """Whether this worker, and no other, may begin a draw that has been given up."""
        return self._store.add(f"begun/{draw.epoch}/{draw.start}", 1) == 1

    def is_claimed(self, draw: Draw) -> bool:
        """Whether a worker has claimed it."""
        return self._store.check([f"begun/{draw.epoch}/{draw.start}"])

    def given_up_by_peers(self, epoch: int) -> Iterator[Draw]:
        """What peers have given up until now, the last first: its owner begins with the first."""
        for rank in range(self._world_size):
            key = f"not_begun/{epoch}/{rank}"
            if rank != self._rank and self._store.check([key]):
                for numbers in reversed(json.loads(self._store.get(key))):
                    yield Draw(*numbers)

    def require_same(self, name: str, value: str) -> bool:
        """Whether every worker that has asked about `name` gave the same `value`."""
        return self._store.compare_set(name, "", value).decode() == value

    def position(self, epochs: range, not_begun: Sequence[Draw]) -> dict[str, Any]:
        """What a resumed run needs to know, for JSON. Exact while no worker draws.

        Args:
            epochs: Every epoch that a worker is in.
            not_begun: What the workers have drawn and not begun.
        """
        later = {epoch for epoch in (*self._begins, *self._left) if epoch >= epochs.stop}  # reached by an earlier run
        epochs = sorted({*epochs, *later})
        drawn = {epoch: self._begins.get(epoch, 0) + self._store.add(f"drawn/{epoch}", 0) for epoch in epochs}
        left = [self._left[epoch][self._store.add(f"left/{epoch}", 0) :] for epoch in epochs if epoch in self._left]
        return {"drawn": drawn, "not_begun": sorted(itertools.chain(not_begun, *left))}


class FixedShares:
    """In place of a `Cursor` to look at batches: worker r of n gets every n-th part, beginning with the r-th."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size
        self._drawn: Counter[int] = Counter()

    def draw(self, epoch: int, size: int, end: int) -> Draw | None:
        """The next part of the epoch that is this worker's; None after the last."""
        start = (self._rank + self._drawn[epoch] * self._world_size) * size
        self._drawn[epoch] += 1
        return Draw(epoch, start, min(start + size, end)) if start < end else None

    def give_up(self, epoch: int, draws: Sequence[Draw]) -> None:
        """Nobody else would begin them. Who looks again begins again."""
        del self._drawn[epoch]

    def claim(self, draw: Draw) -> bool:
        """Nobody else would have begun it."""
        return True

    def require_same(self, name: str, value: str) -> bool:
        """Nobody else is asked."""
        return True
