"""Which part of an epoch goes to which worker."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch.distributed import Store

from .ahead import Ahead

MOST_PARTS = 10_000_000
"""What nobody has begun is kept in a list, as it comes to so much: a batch of each worker in a run, and in what is left
of shards a batch of each step."""


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
        members: Tells who takes part at the moment, by name; unset, the ranks.

    Attributes:
        name: This worker's name among the members; unset, its rank.

    Raises:
        ValueError: What nobody had begun comes to more parts than any run leaves.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        position: dict[str, Any] | None = None,
        most: int = 1 << 62,
        members: Callable[[], Iterable[str]] | None = None,
    ) -> None:
        self._store = store
        self.name = str(rank)
        self._members = members or (lambda: map(str, range(world_size)))
        self._draw_ahead: Callable[[Callable[[], int]], Ahead[int]] | None = None
        self._ahead: tuple[tuple[int, int, int], Ahead[int]] | None = None
        position = position or {"drawn": {}, "not_begun": []}
        self._begins = {int(epoch): place for epoch, place in position["drawn"].items()}
        self._left: dict[int, list[Draw]] = {}
        _require_few(sum(-(-(stop - start) // most) for _, start, stop in position["not_begun"]))
        for draw in sorted(Draw(*numbers) for numbers in position["not_begun"]):
            self._left.setdefault(draw.epoch, []).extend(draw.split(most))

    def draw_ahead(self, store: Store, make_ahead: Callable[[Callable[[], int]], Ahead[int]]) -> None:
        """From here on, draw in the background; see `ProgressClock.draw_ahead`."""
        self._background, self._draw_ahead = store, make_ahead

    def draw(self, epoch: int, size: int, end: int) -> Draw | None:
        """The next `size` places of the epoch, fewer at its end; None when all `end` places have been drawn."""
        left = self._left.get(epoch, ())
        if left and (number := self._store.add(f"left/{epoch}", 1)) <= len(left):
            return left[number - 1]
        return self._place(epoch, size, end, self._draw_places(epoch, size, end))

    def _draw_places(self, epoch: int, size: int, end: int) -> int:
        if self._draw_ahead is None:
            return self._store.add(f"drawn/{epoch}", size)
        question = (epoch, size, end)
        if self._ahead is None or self._ahead[0] != question:
            store = self._background
            self._ahead = question, self._draw_ahead(lambda: store.add(f"drawn/{epoch}", size))
        return self._ahead[1].take()

    def _place(self, epoch: int, size: int, end: int, drawn: int) -> Draw | None:
        stop = self._begins.get(epoch, 0) + drawn
        return Draw(epoch, stop - size, min(stop, end)) if stop - size < end else None

    def held(self) -> list[Draw]:
        """What has been drawn ahead and not been handed out yet."""
        if self._ahead is None:
            return []
        question, ahead = self._ahead
        places = (self._place(*question, drawn) for drawn in ahead.held())
        return [draw for draw in places if draw is not None]

    def give_up(self, epoch: int, draws: Sequence[Draw]) -> None:
        """Say that this worker found everything drawn; `draws` are those that it has not begun: anybody may."""
        self._store.set(f"not_begun/{epoch}/{self.name}", json.dumps(draws))
        self._store.set(f"gave_up/{epoch}/{self._store.add(f'gave_up/{epoch}', 1)}", self.name)

    def all_gave_up(self, epoch: int) -> bool:
        """Whether every worker has that takes part, so that nothing can be given up any more."""
        return self._store.check([f"not_begun/{epoch}/{name}" for name in self._members()])

    def claim(self, draw: Draw) -> bool:
        """Whether this worker, and no other, may begin a draw that has been given up."""
        return self._store.add(f"begun/{draw.epoch}/{draw.start}", 1) == 1

    def is_claimed(self, draw: Draw) -> bool:
        """Whether a worker has claimed it."""
        return self._store.check([f"begun/{draw.epoch}/{draw.start}"])

    def given_up_by_peers(self, epoch: int) -> Iterator[Draw]:
        """What peers have given up until now, the last first: its owner begins with the first."""
        for number in range(1, self._store.add(f"gave_up/{epoch}", 0) + 1):
            name = self._read(f"gave_up/{epoch}/{number}").decode(errors="replace")
            if name != self.name:
                yield from reversed(_draws_in(self._read(f"not_begun/{epoch}/{name}")))

    def _read(self, key: str) -> bytes:
        return self._store.get(key) if self._store.check([key]) else b""

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
        known = sorted({*epochs, *later})
        drawn = {epoch: self._begins.get(epoch, 0) + self._store.add(f"drawn/{epoch}", 0) for epoch in known}
        left = [self._left[epoch][self._store.add(f"left/{epoch}", 0) :] for epoch in known if epoch in self._left]
        return {"drawn": drawn, "not_begun": sorted(itertools.chain(not_begun, *left))}


def _draws_in(text: bytes) -> list[Draw]:
    """What a worker has given up; none where somebody has written something else."""
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        draws = [Draw(*numbers) for numbers in json.loads(text)]
        if all(type(number) is int for draw in draws for number in draw):
            return draws
    return []


def _require_few(parts: int) -> None:
    if parts > MOST_PARTS:
        raise ValueError(
            f"The position in the data that training is to go on from has {parts} parts that no worker had begun, more "
            "than any run leaves: the checkpoint is damaged, or somebody has edited it. Resume from another one."
        )


def within(position: dict[str, Any], end: int) -> dict[str, Any]:
    """The same position where an epoch has `end` samples: there may be fewer than when it was written."""
    left = [(epoch, start, min(stop, end)) for epoch, start, stop in position["not_begun"] if start < end]
    return {**position, "not_begun": left}


def position_of_shards(places: Sequence[tuple[int, int]], batch_size: int, end: int | None) -> dict[str, Any] | None:
    """Where workers are that keep to shards, for a `Cursor`: of W, rank r has batches r, r + W, r + 2 W...

    Args:
        places: Of every rank, the epoch that it is in, and how many batches of that it has used.
        batch_size: Samples of a batch.
        end: Samples of an epoch; None if that is not known.

    Returns:
        As `Cursor.position()`, with the first epoch that is not over; None where it depends on how long an epoch is,
        and that is not known.

    Raises:
        ValueError: More is left than in any run.
    """
    epochs = sorted(epoch for epoch, _ in places)
    if end is None and epochs[0] < epochs[-1]:
        return None
    most, width = 1 << 62 if end is None else end, len(places) * batch_size
    drawn, not_begun = {}, []
    parts = epochs[-1] - epochs[0]
    _require_few(parts)
    for epoch in range(epochs[0], epochs[-1] + 1):
        used = [number if at == epoch else (at > epoch) * most for at, number in places]
        drawn[epoch] = min(max(used) * width, most)
        for rank, number in enumerate(used):
            first = number * width + rank * batch_size
            parts += max(0, -(-(drawn[epoch] - first) // width))
            _require_few(parts)
            starts = range(first, drawn[epoch], width)
            not_begun += [Draw(epoch, start, min(start + batch_size, most)) for start in starts]
    return {"epoch": epochs[0], "drawn": drawn, "not_begun": sorted(not_begun)}


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

    def held(self) -> list[Draw]:
        """Nothing is drawn ahead."""
        return []

    def given_up_by_peers(self, epoch: int) -> Iterator[Draw]:
        """There are no peers."""
        return iter(())

    def all_gave_up(self, epoch: int) -> bool:
        """There are none who could still give up anything."""
        return True

    def claim(self, draw: Draw) -> bool:
        """Nobody else would have begun it."""
        return True

    def is_claimed(self, draw: Draw) -> bool:
        """By nobody else."""
        return False

    def require_same(self, name: str, value: str) -> bool:
        """Nobody else is asked."""
        return True
