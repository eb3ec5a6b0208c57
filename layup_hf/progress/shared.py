"""What loaders have in common whose batches all workers share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

Update = Iterator[Any]
"""The batches of one optimizer step: one, or as many as are accumulated."""


class Shared:
    """What every shared loader has: all that a `DataLoader` has, as the one that makes its batches has it.

    Attributes:
        inner: The `DataLoader` that makes the batches.
        batch_size: Samples in a batch of this worker.
        rank, world_size: This worker, and how many there are.
    """

    def __init__(self, inner: DataLoader, batch_size: int, rank: int, world_size: int) -> None:
        self.inner, self.batch_size, self.rank, self.world_size = inner, batch_size, rank, world_size

    def __getattr__(self, name: str) -> Any:
        if name == "inner" or name.startswith("_"):  # while it is copied or unpickled
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.inner, name)

    @property
    def total_batch_size(self) -> int:
        """Samples of a batch of each worker, as a loader of accelerate says it."""
        return self.batch_size * self.world_size

    @property
    def total_dataset_length(self) -> int:
        """Samples that there are, as a loader of accelerate says it."""
        return len(self.inner.dataset)  # type: ignore[arg-type] # an error of its own where it has none
