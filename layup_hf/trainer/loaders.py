"""Loaders of batches: the Trainer's own, and those that draw from what all workers share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import TrainingArguments

from ..progress.sharing import SharedLoader
from ..progress.stream import SharedStream
from .host import Host
from .streams import NotedStream

_LOADER_OPTIONS = (
    "collate_fn",
    "in_order",
    "multiprocessing_context",
    "num_workers",
    "persistent_workers",
    "pin_memory",
    "prefetch_factor",
    "worker_init_fn",
)


def seed_of_data(args: TrainingArguments) -> int:
    """Of the orders of epochs."""
    return args.seed if args.data_seed is None else args.data_seed


def make_shared(host: Host, workers: int, stock: Callable[[], Any]) -> Any:
    """A loader that draws from what all workers share; or where a subclass makes its batches itself, a shard.

    Args:
        host: The Trainer.
        workers: How many there are.
        stock: The Trainer's own way to make one.

    Raises:
        ValueError: Prompts are repeated in a way that is not known.
    """
    args = host.args
    with _nothing_prepared(host.accelerator):
        loader = stock()
    is_stream = isinstance(loader.dataset, IterableDataset)
    # A subclass makes its batches itself; or repeats prompts for all workers together while it reads them.
    if loader.batch_size is None or (is_stream and host.generates):
        with _nothing_dispatched(host.accelerator):
            return host.accelerator.prepare(loader)
    accumulation, seed = args.gradient_accumulation_steps, seed_of_data(args)
    if is_stream:
        return SharedStream(loader, accumulation, seed, host.rank, workers)
    if host.generates and not hasattr(loader.sampler, "mini_repeat_count"):
        raise ValueError(
            f"A sampler {type(loader.sampler).__name__} and `shared_batches=True` exclude each other in {host.name}: "
            "how often it repeats prompts is not known. Return TRL's `RepeatSampler`, or set `shared_batches=False`."
        )

    def make_loader(batches: Sampler[list[int]]) -> DataLoader:
        options = {name: getattr(loader, name) for name in _LOADER_OPTIONS}
        return DataLoader(loader.dataset, batch_sampler=batches, **options)

    return SharedLoader(
        make_loader,
        loader.sampler,
        batch_size=loader.batch_size,
        accumulation=accumulation,
        drop_last=loader.drop_last,
        seed=seed,
        rank=host.rank,
        world_size=workers,
    )


def make_shard(accelerator: Accelerator, stock: Callable[[], Any]) -> tuple[Any, NotedStream | None]:
    """The Trainer's own loader of this worker's shard.

    Returns:
        The loader, and what notes with what its stream begins, if it is one.
    """
    with _nothing_dispatched(accelerator):
        loader = stock()
    shard = getattr(loader, "dataset", None)
    if not isinstance(shard, IterableDatasetShard):
        return loader, None
    shard.dataset = stream = NotedStream(shard.dataset)  # each worker takes its part of what it reads
    return loader, stream


@contextlib.contextmanager
def _nothing_prepared(accelerator: Accelerator) -> Iterator[None]:
    """Let `accelerator.prepare` give back what it gets: the Trainer's own loader without accelerate's shards."""
    accelerator.prepare = lambda loader: loader
    try:
        yield
    finally:
        del accelerator.prepare


@contextlib.contextmanager
def nothing_kept(accelerator: Accelerator) -> Iterator[None]:
    """Let `accelerator` forget the loaders that it prepares: each evaluation has a new one, and it would keep them all.

    They are small, but each lies behind the large buffers of its evaluation, which the heap then cannot fill again: a
    worker grew by 0.2 MiB with each evaluation (`recipes/measure/hosts`: soak).
    """
    known = len(accelerator._dataloaders)
    try:
        yield
    finally:
        del accelerator._dataloaders[known:]


@contextlib.contextmanager
def _nothing_dispatched(accelerator: Accelerator) -> Iterator[None]:
    """Let every worker read an iterable data set itself; by default rank 0 would, and all would wait for it."""
    config = accelerator.dataloader_config
    before, config.dispatch_batches = config.dispatch_batches, False
    try:
        yield
    finally:
        config.dispatch_batches = before
