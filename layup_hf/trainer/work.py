"""Where a worker's batches come from, and how many there are of them."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import sys
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed import Store
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..progress.cursor import Cursor, position_of_shards
from ..progress.sharing import SharedLoader, SharedStream
from .checkpoint import POSITION, Resumed

logger = logging.get_logger(__name__)

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


class WorkSharing:
    """Lets several workers draw their batches from one order of each epoch. To be mixed into a subclass of `Trainer`.

    With `shared_batches=False`, with one worker, or where a subclass makes its own training loader, every worker keeps
    the shard that the Trainer gives it.
    """

    _resumed: Resumed | None = None
    _position: dict[str, Any] | None = None  # in the data, that training goes on from

    @property
    def _goes_by_clock(self) -> bool:
        """With several workers; and for one that goes on where several were, as only then it knows what is left."""
        resumed = self._resumed
        was_alone = resumed is None or (resumed.workers == 1 and resumed.position is None)
        return self._workers > 1 or not was_alone

    @property
    def _shares_batches(self) -> bool:
        return self._goes_by_clock and getattr(self.args, "shared_batches", True)

    @property
    def _shared_loader(self) -> SharedLoader | SharedStream | None:
        """The training loader, if it draws from what all workers share."""
        return self._train_loader if isinstance(self._train_loader, SharedLoader | SharedStream) else None

    def _get_dataloader(self, dataset: Any, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        if not is_training:
            with _nothing_kept(self.accelerator):
                return super()._get_dataloader(dataset, *args, **kwargs)
        if not self._goes_by_clock:
            return super()._get_dataloader(dataset, *args, is_training=True, **kwargs)
        if not self._shares_batches:
            with _nothing_dispatched(self.accelerator):
                return super()._get_dataloader(dataset, *args, is_training=True, **kwargs)
        with _nothing_prepared(self.accelerator):
            loader = super()._get_dataloader(dataset, *args, is_training=True, **kwargs)
        rank, world_size = self.args.process_index, self._workers
        accumulation = self.args.gradient_accumulation_steps
        if isinstance(loader.dataset, IterableDataset):
            return SharedStream(loader, accumulation, rank, world_size)

        def make_loader(batches: Sampler[list[int]]) -> DataLoader:
            options = {name: getattr(loader, name) for name in _LOADER_OPTIONS}
            return DataLoader(loader.dataset, batch_sampler=batches, **options)

        return SharedLoader(
            make_loader,
            loader.sampler,
            batch_size=loader.batch_size,
            accumulation=accumulation,
            drop_last=loader.drop_last,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            rank=rank,
            world_size=world_size,
        )

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple:
        """As the Trainer's, with epochs and steps of all workers together."""
        self._train_loader, workers = dataloader, self._workers
        is_shared = self._shared_loader is not None
        if self._shares_batches and not is_shared:
            logger.warning(
                f"{type(self).__name__} makes its own training loader, so batches are not shared: every worker keeps "
                "its shard, and a slow worker's shard takes longer. Override `_get_train_sampler` instead of "
                "`get_train_dataloader` to share batches."
            )
        if is_shared:
            sizes = gather_object([dataloader.update_size])
            dataloader.mean_update = sum(sizes) / len(sizes)
            self._least_update = min(sizes)
            if isinstance(dataloader, SharedStream) and len(set(sizes)) > 1:
                raise ValueError(
                    f"Workers have batches of {sizes} samples and an iterable training set, which exclude each other: "
                    "all must cut the stream alike. Give all the same `per_device_train_batch_size`, or set "
                    "`shared_batches=False`."
                )
        values = super().set_initial_training_values(args, dataloader)
        epochs, steps_per_epoch, examples, samples, batch_size, batches_per_epoch, max_steps = values
        self._updates_per_epoch = steps_per_epoch * workers
        self._ends_with_data = args.max_steps <= 0 and float(args.num_train_epochs).is_integer()
        if is_shared and has_length(dataloader):
            self._updates_per_epoch = dataloader.updates_per_epoch
            steps_per_epoch = self._updates_per_epoch / workers
            if args.max_steps > 0:
                epochs = math.ceil(max_steps / steps_per_epoch)
            else:
                max_steps = math.ceil(args.num_train_epochs * self._updates_per_epoch / workers)
        if self._goes_by_clock and self._resumed is not None:
            self._ends_with_data = self._ends_with_data and not args.ignore_data_skip
            if args.max_steps > 0:  # which may be in a later epoch than with as many workers from the beginning
                epochs = max(epochs, int(self._resumed.epoch) + 1)
            else:
                max_steps = self._end_of_data(max_steps)
        return epochs, steps_per_epoch, examples, samples, batch_size, batches_per_epoch, max_steps

    def _end_of_data(self, planned: int) -> int:
        """The step at which a resumed run has used all epochs: as planned, unless earlier steps were of another size.

        They were if there were other workers or batches, in this checkpoint or in one before it.
        """
        resumed, workers = self._resumed, self._workers
        left = (self.args.num_train_epochs - resumed.epoch) * self._updates_per_epoch
        end = resumed.global_step + max(0, math.ceil(round(left / workers, 6)))
        if resumed.workers == workers:
            if planned > resumed.global_step and abs(end - planned) <= 1:
                return planned  # but for rounding
            if end > resumed.global_step and self.is_world_process_zero():
                logger.warning(
                    f"Training ends at step {end}, not {planned}, as that is when the data of all epochs have been "
                    "used: earlier steps were of another size (batches, accumulation, workers or data)."
                )
        return end

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: float, num_train_epochs: int, *args: Any
    ) -> tuple[int, int]:
        epochs_trained, skip = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, *args
        )
        resumed, position = self._resumed, self.state.stateful_callbacks.pop(POSITION, None)
        if self._is_outside:
            return int(self.args.job_to_join.connect().get("epoch")), 0
        if not self._goes_by_clock or resumed is None:
            return epochs_trained, skip
        if resumed.global_step >= max_steps:
            return num_train_epochs, 0  # nothing is left to do
        # Steps tell what has been used of the epoch only if all runs had as many workers, so the epoch does.
        epochs_trained = int(resumed.epoch)
        per_epoch = self._updates_per_epoch
        if not has_length(self._train_loader):  # the Trainer then calls `max_steps` an epoch
            per_epoch = resumed.max_steps * resumed.workers
        updates = round((resumed.epoch - epochs_trained) * per_epoch)
        if self._shared_loader is not None:
            if position is not None and "shards" in position:
                position = self._position_of_shards(position["shards"], position.get("batch_size"))
            if position is None:  # a checkpoint of the stock Trainer, whose workers have all come as far
                samples = round(updates * self._shared_loader.mean_update)
                position = {"epoch": epochs_trained, "drawn": {epochs_trained: samples}, "not_begun": []}
            self._position = None if self.args.ignore_data_skip else position
            return position["epoch"], 0
        shards = (position or {}).get("shards", [])
        skip = updates // self._workers * self.args.gradient_accumulation_steps
        if len(shards) == self._workers:
            epochs_trained, skip = shards[self.args.process_index]
        if epochs_trained >= num_train_epochs:  # only this worker's shard has been used: it comes along for the rest
            epochs_trained, skip = num_train_epochs - 1, sys.maxsize
        return epochs_trained, 0 if self.args.ignore_data_skip else skip

    def _position_of_shards(self, shards: list[tuple[int, int]], batch_size: int | None) -> dict[str, Any] | None:
        """Where workers were that kept to shards, if that can be told."""
        loader = self._shared_loader
        if batch_size is None or batch_size < self._least_update:
            return None  # what is left over comes in batches; each would be a step, which makes more than are planned
        return position_of_shards(shards, batch_size, len(loader.sampler) if isinstance(loader, SharedLoader) else None)

    def _share_work(self, store: Store) -> None:
        """Begin to draw batches together with the peers."""
        loader, membership = self._shared_loader, self._membership
        if loader is None:
            return
        plan = {"position": self._position, "most": self._least_update}
        if self._is_outside:
            plan = json.loads(store.get("plan"))
        elif membership is not None and self.args.process_index == 0:
            store.set("plan", json.dumps(plan))
        members = membership.present if membership is not None else None
        loader.cursor = Cursor(store, self.args.process_index, self._workers, **plan, members=members)
        if membership is not None:
            loader.cursor.name = membership.member

    def _keep_position(self) -> None:
        """Note in the Trainer's state, for a checkpoint, where in the data all workers are. Collective."""
        loader = self._shared_loader
        if loader is None:
            has_ended = self._next_epoch > self._epoch
            place = (self._next_epoch, 0) if has_ended else self._shard_place
            places, sizes = zip(*gather_object([(place, self._train_batch_size)]), strict=True)
            position: dict[str, Any] = {"shards": places, "batch_size": sizes[0] if len(set(sizes)) == 1 else None}
        else:
            places = gather_object([(self._next_epoch, loader.not_begun())])
            first, last = min(epoch for epoch, _ in places), max(epoch for epoch, _ in places)
            not_begun = itertools.chain.from_iterable(draws for _, draws in places)
            position = {"epoch": first, **loader.cursor.position(range(first, last + 1), not_begun)}
        self.state.stateful_callbacks[POSITION] = {"workers": self.args.world_size, **position}


@contextlib.contextmanager
def _nothing_prepared(accelerator: Accelerator) -> Iterator[None]:
    """Let `accelerator.prepare` give back what it gets: the Trainer's own loader without accelerate's shards."""
    accelerator.prepare = lambda loader: loader
    try:
        yield
    finally:
        del accelerator.prepare


@contextlib.contextmanager
def _nothing_kept(accelerator: Accelerator) -> Iterator[None]:
    """Let `accelerator` forget the loaders that it prepares: each evaluation has a new one, and it would keep them all.

    They are small, but each lies behind the large buffers of its evaluation, which the heap then cannot fill again: a
    worker grew by 0.2 MiB with each evaluation (`recipes/hosts.py soak`).
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
