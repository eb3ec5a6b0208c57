"""The order of an epoch, from any sampler, and how often what is in it comes."""

from __future__ import annotations

import copy
import itertools
import operator
import zlib
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import RandomSampler

Keys = np.ndarray | list[Any]
"""The order of an epoch: numbers of samples, or whatever else the data set takes."""


class Sampled(Protocol):
    """What gives the order of an epoch: a sampler that knows its length, of numbers or of whatever else are keys."""

    def __iter__(self) -> Iterator[Any]: ...

    def __len__(self) -> int: ...


class Repeats(NamedTuple):
    """How often samples and batches come, where a trainer generates what it learns from.

    Attributes:
        samples: A sample (a prompt) comes so many times in its batch: as many completions are made of it.
        batches: A batch comes so many times, one after the other: what was generated for the first is learnt from in
            as many forwards and backwards.
    """

    samples: int = 1
    batches: int = 1


class Order:
    """What a sampler gives for an epoch, whichever epochs it was asked for before, and each sample once.

    A random sampler without a generator of its own gives the order that DDP would use under the same seed. One that has
    a generator gives the orders of all epochs one after the other, so those before are drawn anew. TRL's
    `RepeatSampler` repeats prompts within batches, and batches, for one number of workers; what it repeats is `repeats`
    here, and its order that of the prompts.

    Args:
        sampler: Under the same seed it must give the same order on every worker.
        seed: Of a random sampler without a generator.

    Attributes:
        sampler: The same, or the one that takes its place.
        repeats: What it would repeat.
    """

    def __init__(self, sampler: Sampled, seed: int) -> None:
        self.repeats = Repeats()
        if type(sampler) is RandomSampler and sampler.generator is None and not sampler.replacement:
            sampler = SeedableRandomSampler(sampler.data_source, num_samples=len(sampler), data_seed=seed)
        if hasattr(sampler, "mini_repeat_count") and hasattr(sampler, "repeat_count"):
            self.repeats = Repeats(sampler.mini_repeat_count, sampler.repeat_count)
            sampler = copy.copy(sampler)
            vars(sampler).update(mini_repeat_count=1, repeat_count=1, batch_size=1)
        self.sampler = sampler
        generator = None if hasattr(sampler, "set_epoch") else getattr(sampler, "generator", None)
        self._generator = generator if isinstance(generator, torch.Generator) else None
        self._begins = self._generator.get_state() if self._generator is not None else None

    def __len__(self) -> int:
        return len(self.sampler)

    def of(self, epoch: int) -> Keys:
        """Numbers of samples in an array, which is small; other keys (names, tuples) in a list."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)
        if self._generator is not None and self._begins is not None:
            self._generator.set_state(self._begins)
            for _ in range(epoch):
                deque(iter(self.sampler), maxlen=0)
        samples = iter(self.sampler)
        first = list(itertools.islice(samples, 1))
        if not first or not hasattr(first[0], "__index__"):
            return [*first, *samples]
        return np.fromiter(map(operator.index, itertools.chain(first, samples)), dtype=np.int64)


def checksum(order: Keys) -> int:
    """Of an order, to compare it with that of other workers."""
    return zlib.crc32(order.data if isinstance(order, np.ndarray) else repr(order).encode())
