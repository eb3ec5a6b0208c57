"""The training loop of several workers: by a common clock, and without waiting between two meetings."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import skip_first_batches
from accelerate.utils import send_to_device
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from ..fleet.launch import has_joined
from ..progress.clock import ProgressClock
from ..progress.randomness import Randomness
from ..progress.shared import Update
from ..progress.sharing import SharedLoader
from ..progress.stream import SharedStream
from ..trace.events import CLOCK
from .collectives import Collectives
from .eras import Eras
from .exchange import Exchange
from .following import ClockFollower
from .host import Host
from .loaders import seed_of_data
from .meetings import Meetings
from .members import Members
from .report import show_shares
from .state import RunState
from .tracing import Tracing
from .wishes import Wishes
from .work import WorkSharing

logger = logging.getLogger(__name__)

_POLL = 0.002  # seconds between two looks at whether a slow peer has given up batches
_PATIENCE = 1000  # looks before asking all to meet


class TrainingLoop:
    """The Trainer's loop for several workers; with one worker the Trainer's own stays.

    A worker's own step and the run's `global_step` are two things here. A worker takes its own steps at its own pace;
    `global_step` is the number of steps that all workers together have begun, divided by the number of workers. What
    the Trainer does once per step by the clock is done for every value of `global_step` (see `ClockFollower`); the
    other events of a step come with every own step.

    Evaluating, saving and stopping need all workers: they meet between two of their steps (see `Meetings`).
    """

    def __init__(
        self,
        host: Host,
        state: RunState,
        collectives: Collectives,
        members: Members,
        work: WorkSharing,
        exchange: Exchange,
        eras: Eras,
        follower: ClockFollower,
        meetings: Meetings,
        tracing: Tracing,
    ) -> None:
        self._host, self._state, self._collectives, self._members = host, state, collectives, members
        self._work, self._tracing = work, tracing
        self._exchange, self._eras, self._follower, self._meetings = exchange, eras, follower, meetings
        self._grad_norm: Any = None
        self._learning_rate: float | None = None

    def start(self, clock: ProgressClock) -> None:
        """Begin to go by the clock."""
        self._state.begin(clock, initial_epoch=self._host.state.epoch or 0.0)
        handler, alone = self._host.callbacks, self._collectives.alone

        def on_epoch_begin(*call: Any) -> Any:
            with alone(may_meet=True):  # others may still be in the epoch before, and meet for something else
                return type(handler).on_epoch_begin(handler, *call)

        vars(handler)["on_epoch_begin"] = on_epoch_begin
        clock.draw()  # for the first step; for each of the others it is drawn after the one before
        self._grad_norm = self._learning_rate = None

    def stop(self) -> None:
        """Leave the Trainer as it was. Idempotent."""
        self._state.clock, self._state.is_acting = None, False
        self._meetings.stop()
        vars(self._host.callbacks).pop("on_epoch_begin", None)

    # ---- An epoch ----

    def run_epoch(self, call: dict[str, Any]) -> None:
        """As the Trainer's `_run_epoch`.

        Args:
            call: What the Trainer calls that with.
        """
        host, state, follower = self._host, self._state, self._follower
        state.epoch = epoch = call["epoch"]
        is_first = call["resume_from_checkpoint"] is not None and epoch == call["epochs_trained"]
        is_last = epoch + 1 >= host.state.num_train_epochs
        if is_first:
            host.load_rng_state(call["resume_from_checkpoint"])
        host.forget_rollout()
        self._meetings.act = lambda: host.log_evaluate_save(call, self._grad_norm, self._learning_rate)
        self._take_part(epoch)
        skip = call["steps_trained_in_current_epoch"] if is_first else 0
        for update in self._tracing.waiting_for(self._updates(call["train_dataloader"], epoch, is_last, skip)):
            if not self._fits(call["model"], update):
                state.present_clock.call_meeting()
                self._meetings.meet(lacks_memory=True)
            self._follow_clock()
            if follower.is_stopped:
                break
        if not follower.is_stopped:
            host.state.epoch = float(epoch + 1)
            if is_last:
                self._end_data()
        with self._collectives.alone(may_meet=True):
            host.emit("on_epoch_end")
        if any(Wishes.of(host.control)):
            self._meetings.meet(has_ended=True)
        elif host.control.should_log:
            self._meetings.act()

    def _take_part(self, epoch: int) -> None:
        """At the beginning of an epoch: a worker that joins does so now; the others say where they are."""
        membership = self._members.membership
        if self._state.is_outside:
            self._eras.enter()
            self._state.is_outside = False
            has_joined(self._host.args)
            self._meetings.meet()  # the others are in a meeting, for this worker's sake
        elif membership is not None and membership.leads:
            self._members.store.set("epoch", str(epoch))

    def _updates(self, loader: Any, epoch: int, is_last: bool, skip: int) -> Iterator[Update]:
        """The batches of this worker's steps until its data of the epoch end, or in the last one the training."""
        while not self._follower.is_stopped:
            if isinstance(loader, SharedLoader | SharedStream):
                yield from loader.updates(epoch)
                if isinstance(loader, SharedStream) and loader.is_empty:
                    self._end_as_empty()
                yield from self._given_up(loader, epoch, is_last)
                if self._follower.is_stopped:
                    return
            else:
                yield from self._updates_of_shard(loader, epoch, skip)
            if self._state.course.ends_with_data or not is_last:
                return
            epoch, skip = epoch + 1, 0

    def _updates_of_shard(self, loader: Any, epoch: int, skip: int) -> Iterator[Update]:
        """From a loader of the Trainer's own making."""
        args = self._host.args
        self._state.shard_place = (epoch, skip)
        is_empty = skip == 0
        for update in _read_shard(loader, epoch, args.gradient_accumulation_steps, skip, seed_of_data(args)):
            if is_empty:
                self._work.compare_shards(epoch)
            is_empty = False
            skip += len(update)
            self._state.shard_place = (epoch, skip)
            yield iter(update)
        if is_empty and self._state.steps_done == 0:  # the others may have some
            raise ValueError(f"The training loader of rank {self._host.rank} yields not a single batch.")
        if is_empty:
            self._end_as_empty()

    def _end_as_empty(self) -> None:
        """A pass has yielded nothing: end training as the Trainer does."""
        logger.warning(
            f"The training data yield not a single batch to rank {self._host.rank} in epoch {self._state.epoch}, so "
            f"training ends at step {self._host.state.global_step} of {self._host.state.max_steps}. A stream that can "
            "be read once only ends so, too."
        )
        self._host.control.should_training_stop = True

    def _given_up(self, loader: SharedLoader | SharedStream, epoch: int, is_last: bool) -> Iterator[Update]:
        """What slow workers have drawn ahead and not begun. Where all are about to meet anyway, it is waited for."""
        args, clock = self._host.args, self._state.present_clock
        waits = is_last or "epoch" in (args.eval_strategy, args.save_strategy)
        patience = _PATIENCE
        while True:
            is_finished = loader.is_finished(epoch)
            yield from loader.given_up(epoch)
            if is_finished or not waits:
                return
            time.sleep(_POLL)
            patience -= 1
            if patience == 0:
                clock.call_meeting()  # do the others come here at all?
            clock.look()
            self._eras.mind_members()
            if clock.called:
                self._meetings.meet()
                patience = _PATIENCE
            if self._follower.is_stopped:
                return

    def _end_data(self) -> None:
        """Nothing is left of the last epoch: once that is so for all workers, training ends."""
        self._meetings.meet(has_ended=True, purpose="the end of the data", until_stopped=True)
        if not self._follower.is_stopped:
            course = self._state.course
            course.data_has_ended = True
            if course.last_cut_epoch < 0:
                self._follower.advance(self._host.state.max_steps)  # all steps have been made, up to rounding
            self._meetings.meet(has_ended=True)

    # ---- A step ----

    def _fits(self, model: nn.Module, update: Update) -> bool:
        """Take one own step, unless memory runs out in it and `auto_find_batch_size` allows a smaller batch."""
        try:
            with self._collectives.alone():
                self._take_step(model, update)
        except RuntimeError as error:
            if not (self._host.args.auto_find_batch_size and should_reduce_batch_size(error)):
                raise
            return False
        return True

    def _take_step(self, model: nn.Module, update: Update) -> None:
        """One own step: what the Trainer does for one, without the parts that go by the clock."""
        host, args, accelerator = self._host, self._host.args, self._host.accelerator
        self._exchange.resume()
        if accelerator.non_blocking or args.device.type == "cuda":  # else each batch waits until the device is idle
            update = (send_to_device(batch, args.device, non_blocking=True) for batch in update)
        batches, num_items = host.batches_of(update)
        host.accumulation = len(batches)
        host.emit("on_step_begin")
        for number, inputs in enumerate(batches, start=1):
            is_synchronizing = number == len(batches)
            accelerator.gradient_state._set_sync_gradients(is_synchronizing)
            self._add_loss(host.training_step(model, inputs, num_items))
            host.current_flos += host.floating_point_ops(inputs)
            host.count_tokens(inputs)
            if not is_synchronizing:
                host.emit("on_substep_end")
        grad_norm = host.clip_grad_norm(model) if args.max_grad_norm > 0 else None
        self._grad_norm = host.grad_norm(model, grad_norm)
        host.emit("on_pre_optimizer_step")
        host.optimizer.step()
        host.emit("on_optimizer_step")
        self._learning_rate = host.learning_rate
        model.zero_grad()
        self._state.steps_done += 1
        ledger = self._exchange.ledger
        ledger.done[ledger.rank] = self._state.steps_done

    def _add_loss(self, loss: Tensor) -> None:
        host, state = self._host, self._state
        if host.args.logging_nan_inf_filter:  # as the Trainer's, without asking the device what the loss is
            usual = host.total_loss / (1 + state.steps_done - state.steps_logged)
            loss = torch.where(torch.isfinite(loss), loss, usual)
        host.total_loss += loss

    def _follow_clock(self) -> None:
        """After an own step: draw the next, do what has become due, and meet if anybody wants to."""
        host, clock = self._host, self._state.present_clock
        with self._tracing.span(CLOCK):
            drawn = clock.draw()
        self._follower.advance(drawn // self._members.workers, stops_at_wish=True)
        self._eras.mind_members()
        show_shares(host.callbacks.callbacks, self._exchange.ledger.done)
        wants_to_meet = any(Wishes.of(host.control))
        if wants_to_meet:
            clock.call_meeting()
        if wants_to_meet or clock.called:
            self._meetings.meet()
        elif host.control.should_log:
            self._meetings.act()


def _read_shard(loader: Any, epoch: int, accumulation: int, skip: int, seed: int) -> Iterator[list[Any]]:
    """Batches of one step each, from a loader of the Trainer's own making, which yields this worker's shard.

    Shards of a stream are cut out of what every worker reads: what it draws from global generators is the same for all.
    """
    is_stream = isinstance(getattr(loader, "dataset", None), IterableDataset)
    reading = Randomness(seed + epoch).in_use if is_stream else contextlib.nullcontext
    if skip:
        loader = skip_first_batches(loader, skip)
    inner = getattr(getattr(loader, "batch_sampler", None), "batch_sampler", None)
    for part in (loader, inner):  # accelerate does not pass the epoch on to a batch sampler that it has wrapped
        if part is not None and hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
    with reading():
        batches = iter(loader)
    while True:
        with reading():
            update = list(itertools.islice(batches, accumulation))
        if not update:
            return
        yield update
