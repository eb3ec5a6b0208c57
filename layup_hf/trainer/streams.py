"""What can be told of an iterable training set without reading it: how it is shuffled, and for whom."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np


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
