"""Work sharing: each epoch is drawn part by part by whichever worker is ready for more."""

from __future__ import annotations

import copy
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader, Sampler

from .cursor import Cursor, Draw, FixedShares
from .orders import Keys, Order, Repeats, Sampled, checksum
from .randomness import Randomness
from .shared import Shared, Update


class SharedLoader(Shared):
    """The training batches of one worker, out of one seeded order of each epoch for all workers.

    Every sample of an epoch goes to exactly one worker, in the order in which workers are ready for more. With
    `num_workers` of the loader, batches are drawn ahead; what a slow worker has drawn ahead and not begun when all
    others are done is taken over by them.

    Where a trainer generates what it learns from, the sampler repeats prompts and batches (see `Order`). Then samples
    are prompts. All uses of a batch are one worker's: it draws as few batches as make whole optimizer steps with all
    their uses, and takes those steps one after the other.

    Args:
        make_loader: Makes a `DataLoader` with a given batch sampler.
        sampler: Gives the order of an epoch. Under the same seed it must give the same order on every worker.
        batch_size: Samples in a batch of this worker, repeated ones included. Workers may differ.
        accumulation: Batches of one optimizer step.
        drop_last: Leave out what is less than a batch.
        seed: Seed of the orders; with it a random sampler gives the order that DDP would use.
        rank: This worker.
        world_size: Number of workers.

    Attributes:
        draw_size: Samples that this worker draws at once: those of one optimizer step, or of several.
        update_size: Samples of one optimizer step of this worker; a part of one where batches come several times.
        mean_update: Their mean over all workers, once it is known.
        cursor: What all workers draw from; set while training.
    """

    def __init__(
        self,
        make_loader: Callable[[Sampler[list[int]]], DataLoader],
        sampler: Sampled,
        *,
        batch_size: int,
        accumulation: int,
        drop_last: bool,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._order = Order(sampler, seed)
        self.sampler, repeats = self._order.sampler, self._order.repeats
        self.accumulation = accumulation
        self._seed = seed
        samples, uses = batch_size // repeats.samples, math.lcm(accumulation, repeats.batches)
        self.draw_size = samples * uses // repeats.batches
        self.update_size = samples * accumulation / repeats.batches
        self.mean_update = self.update_size
        drop_last = drop_last or repeats != Repeats()  # as TRL's sampler does: a smaller batch cannot be cut alike
        self.cursor: Cursor | FixedShares = FixedShares(rank, world_size)
        self._make_loader = make_loader
        self.drop_last = drop_last
        self._batches = _DrawnBatches(samples, self.draw_size, drop_last, repeats)
        self._taken_over: deque[Draw] = deque()
        super().__init__(make_loader(self._batches), batch_size, rank, world_size)
        self.dataset = self.inner.dataset

    @property
    def batch_sampler(self) -> BatchSamplerShard:
        """The batches of this worker among equally fast ones, as those of a loader of accelerate: to look at."""
        batches = BatchSampler(self.sampler, self._batches.batch_size, self.drop_last)
        return BatchSamplerShard(batches, self.world_size, self.rank, even_batches=False)

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer steps of all workers together in an epoch; an estimate where workers differ in batch size."""
        samples = len(self.sampler)
        if self._batches.drop_last:
            samples -= samples % self._batches.batch_size
        return max(1, math.ceil(samples / self.mean_update))

    def __len__(self) -> int:
        """Batches of an epoch for one worker, on average."""
        return math.ceil(self.updates_per_epoch * self.accumulation / self.world_size)

    def __iter__(self) -> Iterator[Any]:
        """Batches of the first epoch as a worker among equally fast ones would get them, to look at."""
        look = copy.copy(self)  # so that looking during training changes nothing
        look._batches = self._batches.anew()
        look.inner = self._make_loader(look._batches)
        look.cursor = FixedShares(self.rank, self.world_size)
        for update in look.updates(0):
            yield from update

    def updates(self, epoch: int) -> Iterator[Update]:
        """This worker's share of the epoch. An update must be used up before the next is taken.

        Raises:
            ValueError: The workers have different orders of the epoch.
        """
        self._taken_over.clear()
        drawn = self._batches.begin(self.cursor, epoch, self._order_of(epoch))
        batches = iter(self.inner)
        for first in batches:
            draw = drawn.popleft()
            its_own = itertools.chain([first], itertools.islice(batches, self._batches.count(draw) - 1))
            if self._batches.gave_up and not self.cursor.claim(draw):
                deque(its_own, maxlen=0)  # a peer was quicker
            else:
                yield from _in_steps(its_own, self.accumulation)

    def given_up(self, epoch: int) -> Iterator[Update]:
        """What peers have given up, as long as there is any: loaded here and now, as nobody has drawn it ahead."""
        for draw in self.cursor.given_up_by_peers(epoch):
            if self.cursor.claim(draw):
                self._taken_over.extend(draw.split(self.draw_size))  # the peer's steps may be larger
            while self._taken_over:
                part = self._taken_over.popleft()
                yield from _in_steps(map(self._load, self._batches.split(part)), self.accumulation)

    def is_finished(self, epoch: int) -> bool:
        """Whether no peer can give up anything any more."""
        return self.cursor.all_gave_up(epoch)

    def not_begun(self) -> list[Draw]:
        """What this worker has drawn ahead and nobody has begun."""
        mine = [d for d in self._batches.drawn if not (self._batches.gave_up and self.cursor.is_claimed(d))]
        return [*self._taken_over, *mine, *self.cursor.held()]

    def _load(self, places: list[int]) -> Any:
        """A batch, as the loader would make it."""
        get_many = getattr(self.dataset, "__getitems__", None)
        return self.inner.collate_fn(get_many(places) if get_many else [self.dataset[place] for place in places])

    def _order_of(self, epoch: int) -> Keys:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        with Randomness(self._seed + epoch).in_use():
            order = self._order.of(epoch)
        if not self.cursor.require_same(f"order/{epoch}", f"{checksum(order)} of {len(order)}"):
            raise ValueError(
                f"The workers have different orders of epoch {epoch}, so they cannot share its batches: their data "
                "sets differ, or the sampler draws from a generator of its own that is not seeded alike, or groups by "
                "length for another batch size. Give all workers the same data and seed, and with `group_by_length` "
                "the same batch size, or set `shared_batches=False`."
            )
        return order


def _in_steps(batches: Iterable[Any], accumulation: int) -> Iterator[Update]:
    """Batches of one optimizer step each. One must be used up before the next is taken."""
    batches = iter(batches)
    for first in batches:
        yield itertools.chain([first], itertools.islice(batches, accumulation - 1))


class _DrawnBatches(Sampler[list[int]]):
    """The batch sampler of a `SharedLoader`: draws when it is asked for more.

    Args:
        batch_size: Samples in a batch, each counted once.
        draw_size: Samples that are drawn at once.
        drop_last: Leave out what is less than a batch.
        repeats: How often samples and batches come.
    """

    def __init__(self, batch_size: int, draw_size: int, drop_last: bool, repeats: Repeats) -> None:
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.drawn: deque[Draw] = deque()
        self.gave_up = False
        self._draw_size, self._repeats = draw_size, repeats

    def anew(self) -> _DrawnBatches:
        """Another one that is made alike, of which nothing has been drawn."""
        return _DrawnBatches(self.batch_size, self._draw_size, self.drop_last, self._repeats)

    def begin(self, cursor: Cursor | FixedShares, epoch: int, order: Keys) -> deque[Draw]:
        """Get ready for an epoch; the result will hold what has been drawn and is still to be begun."""
        self._cursor, self._epoch, self._order = cursor, epoch, order
        self.drawn.clear()
        self.gave_up = False
        return self.drawn

    def __iter__(self) -> Iterator[list[int]]:
        while draw := self._cursor.draw(self._epoch, self._draw_size, len(self._order)):
            if self.count(draw):
                self.drawn.append(draw)
                yield from self.split(draw)
        self._cursor.give_up(self._epoch, list(self.drawn))
        self.gave_up = True

    def count(self, draw: Draw) -> int:
        """Number of batches in a draw."""
        batches = (draw.stop - draw.start) / self.batch_size
        return (math.floor(batches) if self.drop_last else math.ceil(batches)) * self._repeats.batches

    def split(self, draw: Draw) -> Iterator[list[int]]:
        """The samples of each batch."""
        starts = range(draw.start, draw.stop, self.batch_size)[: self.count(draw) // self._repeats.batches]
        for start in starts:
            samples = self._order[start : min(start + self.batch_size, draw.stop)]
            batch = samples.tolist() if isinstance(samples, np.ndarray) else list(samples)
            batch = [sample for sample in batch for _ in range(self._repeats.samples)]
            yield from itertools.repeat(batch, self._repeats.batches)
