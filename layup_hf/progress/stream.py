"""Work sharing of data that have no places: all workers read the same stream, and use different batches of it."""

from __future__ import annotations

import copy
import itertools
import math
from collections import deque
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from .cursor import Cursor, Draw, FixedShares
from .randomness import Checksum, Randomness
from .shared import Shared, Update


class SharedStream(Shared):
    """The training batches of one worker out of an iterable data set that all workers read.

    Each worker reads the whole stream and uses the batches that it has drawn. So the stream must be the same on every
    worker. What it draws from the global generators (of `random`, numpy and torch) is, and the same when a run is
    resumed: they are seeded alike for each pass, and apart from what training draws. Whether the rest is the same is
    seen by a checksum of what has been read, which the workers compare after 1, 2, 4, 8, ... batches and at the end.

    Args:
        loader: Yields the batches of the whole stream; it makes them itself, of `batch_size` samples.
        accumulation: Batches of one optimizer step.
        seed: Of the global generators while the stream is read.
        rank: This worker.
        world_size: Number of workers.

    Attributes:
        draw_size, update_size: Samples of one optimizer step.
        mean_update: The same, as all workers must cut the stream alike.
        cursor: What all workers draw from; set while training.
        is_empty: The latest pass has yielded nothing.
    """

    def __init__(self, loader: DataLoader, accumulation: int, seed: int, rank: int, world_size: int) -> None:
        assert loader.batch_size is not None
        super().__init__(loader, loader.batch_size, rank, world_size)
        self.dataset = loader.dataset
        self._seed = seed
        self.draw_size = self.update_size = loader.batch_size * accumulation
        self.mean_update = float(self.update_size)
        self.cursor: Cursor | FixedShares = FixedShares(rank, world_size)
        self.is_empty = False

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer steps of all workers together in an epoch, if the data set knows its length."""
        return max(1, math.ceil(len(self.inner) * self.batch_size / self.update_size))

    def __len__(self) -> int:
        """Batches of an epoch for one worker, on average.

        Raises:
            TypeError: The data set does not know its length.
        """
        return math.ceil(len(self.inner) / self.world_size)

    def __iter__(self) -> Iterator[Any]:
        """Batches of the first epoch as a worker among equally fast ones would get them, to look at."""
        look = copy.copy(self)  # so that looking during training changes nothing
        look.cursor = FixedShares(self.rank, self.world_size)
        for update in look.updates(0):
            yield from update

    def updates(self, epoch: int) -> Iterator[Update]:
        """This worker's share of the epoch. An update must be used up before the next is taken.

        Raises:
            ValueError: The workers read different streams.
        """
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        randomness = Randomness(self._seed + epoch)
        batches = self._read(epoch)
        place, self.is_empty = 0, False
        while draw := self.cursor.draw(epoch, self.update_size, 1 << 62):
            start, stop = draw.start // self.batch_size, draw.stop // self.batch_size
            with randomness.in_use():
                deque(itertools.islice(batches, start - place), maxlen=0)
                update = list(itertools.islice(batches, stop - start))
            if not update:
                return
            place = stop
            yield iter(update)

    def _read(self, epoch: int) -> Iterator[Any]:
        """All batches, compared with what the others read."""
        checksum, count = Checksum(), 0
        for count, batch in enumerate(self.inner, start=1):
            checksum.add(batch)
            if count & (count - 1) == 0:  # 1, 2, 4, 8, ...
                self._require_same(epoch, count, checksum)
            yield batch
        self._require_same(epoch, "end", checksum, f" of {count}")
        self.is_empty = count == 0

    def _require_same(self, epoch: int, where: int | str, checksum: Checksum, length: str = "") -> None:
        if not self.cursor.require_same(f"stream/{epoch}/{where}", f"{checksum.value}{length}"):
            raise ValueError(
                f"The workers read different streams in epoch {epoch}, so they cannot share its batches: samples would "
                "be left out, and others used twice. Is it shuffled or interleaved without a seed, or by a generator "
                "of its own? Then pass `seed=` to `shuffle()` and `interleave_datasets()`, and seed that generator "
                "alike on all workers. Does each worker take a part of it by its rank? Then let all read the whole: "
                "every batch goes to one of them. If only what is drawn at random within samples differs, set "
                "`shared_batches=False`."
            )

    def given_up(self, epoch: int) -> Iterator[Update]:
        """Nothing: a batch is drawn when it is begun."""
        return iter(())

    def is_finished(self, epoch: int) -> bool:
        return True

    def not_begun(self) -> list[Draw]:
        """What this worker has drawn ahead: it has used what it has got."""
        return self.cursor.held()
