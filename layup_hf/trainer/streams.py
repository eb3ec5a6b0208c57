"""What can be told of an iterable training set without reading it: how it is shuffled, and for whom."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from ..progress.randomness import Checksum


def require_same_seeds(dataset: Any, gather: Callable[[Any], list[Any]]) -> None:
    """Make sure that all workers shuffle and interleave alike. Collective.

    Args:
        dataset: Of the training loader; what is no stream of `datasets` is not looked into.
        gather: Collects one object from every worker.

    Raises:
        ValueError: They do not.
    """
    states = [part.bit_generator.state for part in _parts_of(dataset) if isinstance(part, np.random.Generator)]
    seeds = zlib.crc32(json.dumps(states, default=repr, sort_keys=True).encode())
    if len(set(gather(seeds))) > 1:
        raise ValueError(
            "The workers shuffle or interleave the iterable training set differently, so samples would be left out, "
            "and others used twice. Pass `seed=` to `shuffle()` and `interleave_datasets()`, the same on all workers."
        )


def is_split_by_node(dataset: Any) -> bool:
    """Whether a stream of `datasets` gives each worker a part of it already."""
    return any(type(part).__name__ == "DistributedConfig" and part.world_size > 1 for part in _parts_of(dataset))


class NotedStream(IterableDataset):
    """A stream, of which a checksum of the first sample is noted, wherever it is read: in a process of the loader, too.

    Args:
        dataset: The stream.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._noted = torch.zeros(2, dtype=torch.int64).share_memory_()  # how often, and the latest checksum

    @property
    def first(self) -> int | None:
        """Checksum of the first sample of the pass that has begun last; None if none has."""
        return int(self._noted[1]) if self._noted[0] else None

    def __iter__(self) -> Iterator[Any]:
        process = get_worker_info()
        notes = process is None or process.id == 0
        for sample in self.dataset:
            if notes:
                checksum, notes = Checksum(), False
                checksum.add(sample)
                self._noted[1] = checksum.value
                self._noted[0] += 1
            yield sample

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "dataset" not in vars(self):
            raise AttributeError(name)
        return getattr(self.dataset, name)  # such as `set_epoch`


def _parts_of(dataset: Any) -> Iterator[Any]:
    """What a stream of `datasets` is made of, in its order; nothing of the user's functions."""
    while not _is_of_datasets(dataset) and hasattr(dataset, "dataset"):
        dataset = dataset.dataset  # accelerate has wrapped it
    left, seen = [dataset] if _is_of_datasets(dataset) else [], set()
    while left:
        part = left.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        members = part if isinstance(part, list | tuple) else getattr(part, "__dict__", {}).values()
        left += [member for member in members if _is_part(member)][::-1]


def _is_part(member: Any) -> bool:
    if isinstance(member, list | tuple):
        return any(map(_is_part, member))
    return isinstance(member, np.random.Generator) or _is_of_datasets(member)


def _is_of_datasets(item: Any) -> bool:
    return type(item).__module__.split(".")[0] == "datasets"
