"""Where a worker's batches come from, and how many there are of them."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable
from typing import Any

from torch.distributed import Store
from torch.utils.data import IterableDataset
from transformers import TrainingArguments
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..fleet.data import travels
from ..progress.ahead import Ahead
from ..progress.cursor import Cursor, Draw, position_of_shards, within
from ..progress.sharing import SharedLoader
from ..progress.stream import SharedStream
from .checks import check_sharing
from .host import Host
from .loaders import make_shard, make_shared, nothing_kept
from .members import Members
from .resumed import POSITION, Resumed
from .state import RunState
from .streams import NotedStream, require_same_seeds

logger = logging.get_logger(__name__)

travels(Draw)


class WorkSharing:
    """Lets several workers draw their batches from one order of each epoch.

    With `shared_batches=False`, with one worker, or where a subclass makes its own training loader, every worker keeps
    the shard that the Trainer gives it.
    """

    def __init__(self, host: Host, state: RunState, members: Members) -> None:
        self._host, self._state, self._members = host, state, members
        self._train_loader: Any = None
        self._least_draw = 0  # samples that every worker draws at once, or more
        self._position: dict[str, Any] | None = None  # in the data, that training goes on from
        self._cursor: Cursor | None = None  # of the shared loader, while training
        self._stream: NotedStream | None = None  # that this worker takes a shard of
        self._store: Store | None = None

    @property
    def goes_by_clock(self) -> bool:
        """With several workers; and for one that goes on where several were, as only then it knows what is left."""
        resumed = self._state.resumed
        was_alone = resumed is None or (resumed.workers == 1 and resumed.position is None)
        return self._members.workers > 1 or not was_alone

    @property
    def shares_batches(self) -> bool:
        """Whether all draw from one order of each epoch."""
        return self.goes_by_clock and self._host.options.shared_batches

    @property
    def shared_loader(self) -> SharedLoader | SharedStream | None:
        """The training loader, if it draws from what all workers share."""
        return self._train_loader if isinstance(self._train_loader, SharedLoader | SharedStream) else None

    # ---- Making loaders ----

    def evaluation_loader(self, stock: Callable[[], Any]) -> Any:
        """As the Trainer makes it."""
        with nothing_kept(self._host.accelerator):
            return stock()

    def training_loader(self, stock: Callable[[], Any]) -> Any:
        """One that draws from what all workers share; or the Trainer's own, of this worker's shard.

        Args:
            stock: The Trainer's own way to make it.
        """
        if not self.goes_by_clock:
            return stock()
        check_sharing(self._host.args)
        if not self.shares_batches:
            loader, self._stream = make_shard(self._host.accelerator, stock)
            return loader
        return make_shared(self._host, self._members.workers, stock)

    # ---- How long training takes ----

    def plan(self, args: TrainingArguments, dataloader: Any, stock: Callable[[], tuple]) -> tuple:
        """As the Trainer's `set_initial_training_values`, with epochs and steps of all workers together.

        Args:
            args: The Trainer's.
            dataloader: For training.
            stock: The Trainer's own.
        """
        self._train_loader, workers, course = dataloader, self._members.workers, self._state.course
        self._position = self._cursor = None
        is_shared = self.shared_loader is not None
        if self.goes_by_clock:
            require_same_seeds(getattr(dataloader, "dataset", None), self._members.talk.gather)
        if self.shares_batches and not is_shared:
            why, remedy = (
                "makes its own training loader",
                ("Override `_get_train_sampler` instead of `get_train_dataloader` to share batches."),
            )
            if self._host.generates and isinstance(dataloader.dataset, IterableDataset):
                why, remedy = "reads prompts from a stream", "Pass a data set of known length to share batches."
            logger.warning(
                f"{self._host.name} {why}, so batches are not shared: every worker keeps its shard, and a slow "
                f"worker's shard takes longer. {remedy}"
            )
        if is_shared:
            parts = self._members.talk.gather((dataloader.update_size, dataloader.draw_size))
            sizes, drawn = zip(*parts, strict=True)
            dataloader.mean_update = sum(sizes) / len(sizes)
            self._least_draw = min(drawn)
            if isinstance(dataloader, SharedStream) and len(set(sizes)) > 1:
                raise ValueError(
                    f"Workers have batches of {list(drawn)} samples and an iterable training set, which exclude each "
                    "other: all must cut the stream alike. Give all the same `per_device_train_batch_size`, or set "
                    "`shared_batches=False`."
                )
        epochs, steps_per_epoch, examples, samples, batch_size, batches_per_epoch, max_steps = stock()
        course.updates_per_epoch = steps_per_epoch * workers
        course.ends_with_data = args.max_steps <= 0 and float(args.num_train_epochs).is_integer()
        if self.shared_loader is not None and has_length(dataloader):
            course.updates_per_epoch = self.shared_loader.updates_per_epoch
            steps_per_epoch = course.updates_per_epoch / workers
            if args.max_steps > 0:
                epochs = math.ceil(max_steps / steps_per_epoch)
            else:
                max_steps = math.ceil(args.num_train_epochs * course.updates_per_epoch / workers)
        if self.goes_by_clock and self._state.resumed is not None:
            course.ends_with_data = course.ends_with_data and not args.ignore_data_skip
            if args.max_steps > 0:  # which may be in a later epoch than with as many workers from the beginning
                epochs = max(epochs, int(self._state.resumed.epoch) + 1)
            else:
                max_steps = self._end_of_data(self._state.resumed, max_steps)
        return epochs, steps_per_epoch, examples, samples, batch_size, batches_per_epoch, max_steps

    def _end_of_data(self, resumed: Resumed, planned: int) -> int:
        """The step at which a resumed run has used all epochs: as planned, unless earlier steps were of another size.

        They were if there were other workers or batches, in this checkpoint or in one before it.
        """
        workers = self._members.workers
        left = (self._host.args.num_train_epochs - resumed.epoch) * self._state.course.updates_per_epoch
        end = resumed.global_step + max(0, math.ceil(round(left / workers, 6)))
        if resumed.workers == workers:
            if planned > resumed.global_step and abs(end - planned) <= 1:
                return planned  # but for rounding
            if end > resumed.global_step and self._host.is_first:
                logger.warning(
                    f"Training ends at step {end}, not {planned}, as that is when the data of all epochs have been "
                    "used: earlier steps were of another size (batches, accumulation, workers or data)."
                )
        return end

    def place_to_begin(self, max_steps: int, epochs: int, stock: Callable[[], tuple[int, int]]) -> tuple[int, int]:
        """As the Trainer's `_init_training_state`: the epoch that training begins in, and the batches to skip in it.

        Args:
            max_steps: The step that training ends with.
            epochs: How many there are.
            stock: The Trainer's own, which makes or loads its state.
        """
        begins = stock()
        position = self._host.saved_states.pop(POSITION, None)
        resumed = self._state.resumed
        if self._state.is_outside:
            return self._members.epoch_of_others(), 0
        if not self.goes_by_clock or resumed is None:
            return begins
        if resumed.global_step >= max_steps:
            return epochs, 0  # nothing is left to do
        # Steps tell what has been used of the epoch only if all runs had as many workers, so the epoch does.
        epoch = int(resumed.epoch)
        per_epoch = self._state.course.updates_per_epoch
        if not has_length(self._train_loader):  # the Trainer then calls `max_steps` an epoch
            per_epoch = resumed.max_steps * resumed.workers
        updates = round((resumed.epoch - epoch) * per_epoch)
        if self.shared_loader is not None:
            return self._place_in_shared(self.shared_loader, epoch, updates, position)
        return self._place_in_shard(epoch, epochs, updates, position)

    def _place_in_shared(
        self, loader: SharedLoader | SharedStream, epoch: int, updates: int, position: dict[str, Any] | None
    ) -> tuple[int, int]:
        """Where all workers together go on."""
        if position is not None and "shards" in position:
            position = self._position_of_shards(loader, position["shards"], position.get("batch_size"))
        if position is None:  # a checkpoint of the stock Trainer, whose workers have all come as far
            position = {"epoch": epoch, "drawn": {epoch: round(updates * loader.mean_update)}, "not_begun": []}
        if isinstance(loader, SharedLoader):
            position = within(position, len(loader.sampler))
        self._position = None if self._host.args.ignore_data_skip else position
        return position["epoch"], 0

    def _place_in_shard(
        self, epoch: int, epochs: int, updates: int, position: dict[str, Any] | None
    ) -> tuple[int, int]:
        """Where this worker goes on in its shard."""
        args, workers = self._host.args, self._members.workers
        shards = (position or {}).get("shards", [])
        skip = updates // workers * args.gradient_accumulation_steps
        if len(shards) == workers:
            epoch, skip = shards[self._host.rank]
        if epoch >= epochs:  # only this worker's shard has been used: it comes along for the rest
            epoch, skip = epochs - 1, sys.maxsize
        return epoch, 0 if args.ignore_data_skip else skip

    def _position_of_shards(
        self, loader: SharedLoader | SharedStream, shards: list[tuple[int, int]], batch_size: int | None
    ) -> dict[str, Any] | None:
        """Where workers were that kept to shards, if that can be told."""
        if batch_size is None or batch_size < self._least_draw or self._host.generates:
            return None  # what is left over comes in batches; each would be a step, which makes more than are planned
        return position_of_shards(shards, batch_size, len(loader.sampler) if isinstance(loader, SharedLoader) else None)

    # ---- While training ----

    def start(self, store: Store) -> None:
        """Begin to draw batches together with the peers."""
        loader, membership = self.shared_loader, self._members.membership
        self._store = store
        if loader is None:
            return
        plan: dict[str, Any] = {"position": self._position, "most": self._least_draw}
        if self._state.is_outside:
            plan = json.loads(store.get("plan"))
        elif membership is not None and self._host.rank == 0:
            store.set("plan", json.dumps(plan))
        members = membership.present if membership is not None else None
        loader.cursor = self._cursor = Cursor(store, self._host.rank, self._members.workers, **plan, members=members)
        self.name_member()

    def compare_shards(self, epoch: int) -> None:
        """Say so if another worker's stream, of which it takes its shard, begins with another sample."""
        if self._stream is None or self._store is None or (first := self._stream.first) is None:
            return
        if self._store.compare_set(f"stream/{epoch}/first", "", str(first)).decode() != str(first):
            logger.warning(
                f"LayUp: with `shared_batches=False`, workers read different streams in epoch {epoch}. Each uses its "
                "part of what it reads. If it reads a part by its rank already, the rest is left out: let all read the "
                "same. If only what is drawn at random within samples differs, all is well."
            )
            self._stream = None

    def name_member(self) -> None:
        """Let the cursor know this worker as what it is a member of the job as."""
        if self._cursor is not None and self._members.membership is not None:
            self._cursor.name = self._members.membership.member

    def draw_ahead(self, store: Store, make_ahead: Callable[[Callable[[], int]], Ahead[int]]) -> None:
        """From here on, draw in the background.

        Args:
            store: Another connection to the same store, for the thread that draws.
            make_ahead: Makes an `Ahead` for a question.
        """
        if self._cursor is not None:
            self._cursor.draw_ahead(store, make_ahead)

    def keep_position(self) -> None:
        """Note in the Trainer's state, for a checkpoint, where in the data all workers are. Collective."""
        loader, cursor, state, talk = self.shared_loader, self._cursor, self._state, self._members.talk
        if loader is None or cursor is None:
            has_ended = state.next_epoch > state.epoch
            place = (state.next_epoch, 0) if has_ended else state.shard_place
            shards, sizes = zip(*talk.gather((place, self._host.train_batch_size)), strict=True)
            position: dict[str, Any] = {"shards": shards, "batch_size": sizes[0] if len(set(sizes)) == 1 else None}
        else:
            places = talk.gather((state.next_epoch, loader.not_begun()))
            first, last = min(epoch for epoch, _ in places), max(epoch for epoch, _ in places)
            not_begun = list(itertools.chain.from_iterable(draws for _, draws in places))
            position = {"epoch": first, **cursor.position(range(first, last + 1), not_begun)}
        self._host.saved_states[POSITION] = {"workers": self._host.world_size, **position}
