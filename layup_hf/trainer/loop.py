"""The training loop of several workers: by a common clock, and without waiting between two meetings."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import DistributedType, PartialState, skip_first_batches
from accelerate.utils import send_to_device
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers.optimization import GreedyLR

from ..progress.clock import ProgressClock
from ..progress.sharing import SharedLoader, SharedStream, Update
from .meetings import Meetings
from .report import show_shares

_POLL = 0.002  # seconds between two looks at whether a slow peer has given up batches
_PATIENCE = 1000  # looks before asking all to meet


class ClockedLoop(Meetings):
    """The Trainer's loop for several workers. To be mixed into a subclass of `Trainer`; with one worker the Trainer's
    own loop stays.

    A worker's own step and the run's `global_step` are two things here. A worker takes its own steps at its own pace;
    `global_step` is the number of steps that all workers together have begun, divided by the number of workers. What
    the Trainer does once per step by the clock is done once for every value of `global_step` on every worker, also when
    a slow worker catches up on several at once: the scheduler's step and `on_step_end`, and with it the decisions to
    log, evaluate, save and stop. The other events of a step come with every own step.

    Evaluating, saving and stopping need all workers: they meet between two of their steps (see `Meetings`).

    In its own step, in the callbacks that go with steps or begin and end an epoch, and in logging a worker is alone:
    what a subclass or a callback gathers or reduces there through accelerate is this worker's own, as with one process.
    """

    _is_alone = False

    def _start_loop(self, clock: ProgressClock) -> None:
        self._start_meetings(clock)
        self._launched_as = PartialState().distributed_type
        handler = self.callback_handler

        def on_epoch_begin(*call: Any) -> Any:
            with self._alone(may_meet=True):  # others may still be in the epoch before, and meet for something else
                return type(handler).on_epoch_begin(handler, *call)

        handler.on_epoch_begin = on_epoch_begin
        clock.draw()  # for the first step; for each of the others it is drawn after the one before
        self._steps_logged = 0
        self._initial_epoch = self.state.epoch or 0.0
        self._data_has_ended = False
        self._grad_norm: Tensor | None = None
        self._learning_rate: float | None = None

    def _stop_loop(self) -> None:
        self._clock = None
        self._log_evaluate_save = lambda: None  # it refers to this trainer, and so does the next
        vars(self.callback_handler).pop("on_epoch_begin", None)

    def _alone(self, may_meet: bool = False) -> contextlib.AbstractContextManager[None]:
        """Let accelerate's collectives act on this worker only: the others are elsewhere, and would not join in.

        Args:
            may_meet: Whether what needs all workers, such as `evaluate()`, may be called: it waits for them itself.
        """
        return self._acting_as(DistributedType.NO, not may_meet)

    def _together(self) -> contextlib.AbstractContextManager[None]:
        """Let accelerate's collectives act on all workers again, for what all of them come to."""
        return contextlib.nullcontext() if self._clock is None else self._acting_as(self._launched_as, self._is_alone)

    @contextlib.contextmanager
    def _acting_as(self, kind: DistributedType, is_alone: bool) -> Iterator[None]:
        states = PartialState(), self.accelerator.state  # accelerate copies the first into the second now and then
        before = states[0].distributed_type, self._is_alone, PartialState.use_distributed
        # By this one accelerate tells whether `on_main_process` and the like choose among workers: there are several.
        PartialState.use_distributed = property(lambda state: state.num_processes > 1)
        self._is_alone = is_alone
        for state in states:
            state.distributed_type = kind
        try:
            yield
        finally:
            for state in states:
                state.distributed_type = before[0]
            _, self._is_alone, PartialState.use_distributed = before

    def _run_epoch(self, **call: Any) -> None:
        if self._clock is None:
            return super()._run_epoch(**call)
        self._epoch = epoch = call["epoch"]
        is_first = call["resume_from_checkpoint"] is not None and epoch == call["epochs_trained"]
        is_last = epoch + 1 >= self.state.num_train_epochs
        if is_first:
            self._load_rng_state(call["resume_from_checkpoint"])
        self._log_evaluate_save = lambda: self._maybe_log_save_evaluate(
            self._tr_loss,
            self._grad_norm,
            call["model"],
            call["trial"],
            epoch,
            call["ignore_keys_for_eval"],
            call["start_time"],
            learning_rate=self._learning_rate,
        )

        self._take_part(epoch)
        skip = call["steps_trained_in_current_epoch"] if is_first else 0
        for update in self._updates(call["train_dataloader"], epoch, is_last, skip):
            if not self._fits(call["model"], update):
                self._clock.call_meeting()
                self._meet(lacks_memory=True)
            self._follow_clock()
            if self._is_stopped():
                break
        if not self._is_stopped():
            self.state.epoch = epoch + 1
            if is_last:
                self._end_data()
        with self._alone(may_meet=True):
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
        if any(self._wishes()):
            self._meet(has_ended=True)
        elif self.control.should_log:
            self._log_evaluate_save()
        return None

    def _updates(self, loader: Any, epoch: int, is_last: bool, skip: int) -> Iterator[Update]:
        """The batches of this worker's steps until its data of the epoch end, or in the last one the training."""
        while not self._is_stopped():
            if not isinstance(loader, SharedLoader | SharedStream):
                self._shard_place = (epoch, skip)
                is_empty = skip == 0
                for update in _updates_of_shard(loader, epoch, self.args.gradient_accumulation_steps, skip):
                    is_empty = False
                    skip += len(update)
                    self._shard_place = (epoch, skip)
                    yield iter(update)
                if is_empty:
                    raise ValueError(
                        f"The training loader of rank {self.args.process_index} yields not a single batch."
                    )
            else:
                yield from loader.updates(epoch)
                # Where all are about to meet anyway, what a slow worker has drawn ahead is taken over from it.
                meets = is_last or "epoch" in (self.args.eval_strategy, self.args.save_strategy)
                patience = _PATIENCE
                while True:
                    is_finished = loader.is_finished(epoch)
                    yield from loader.given_up(epoch)
                    if is_finished or not meets:
                        break
                    time.sleep(_POLL)
                    patience -= 1
                    if patience == 0:
                        self._clock.call_meeting()  # do the others come here at all?
                    self._clock.look()
                    self._mind_members()
                    if self._clock.called:
                        self._meet()
                        patience = _PATIENCE
                    if self._is_stopped():
                        return
            if self._ends_with_data or not is_last:
                return
            epoch, skip = epoch + 1, 0

    def _fits(self, model: nn.Module, update: Update) -> bool:
        """Take one own step, unless memory runs out in it and `auto_find_batch_size` allows a smaller batch."""
        try:
            with self._alone():
                self._take_step(model, update)
        except RuntimeError as error:
            if not (self.args.auto_find_batch_size and should_reduce_batch_size(error)):
                raise
            return False
        return True

    def _take_step(self, model: nn.Module, update: Update) -> None:
        """One own step: what the Trainer does for one, without the parts that go by the clock."""
        args = self.args
        self._engine.resume()
        if self.accelerator.non_blocking:
            update = (send_to_device(batch, args.device, non_blocking=True) for batch in update)
        batches, num_items = self.get_batch_samples(update, args.gradient_accumulation_steps, args.device)
        self.current_gradient_accumulation_steps = len(batches)
        self.control = self.callback_handler.on_step_begin(args, self.state, self.control)
        for number, inputs in enumerate(batches, start=1):
            is_synchronizing = number == len(batches)
            self.accelerator.gradient_state._set_sync_gradients(is_synchronizing)
            self._add_loss(self.training_step(model, inputs, num_items))
            self.current_flos += float(self.floating_point_ops(inputs))
            self._track_num_input_tokens(inputs)
            if not is_synchronizing:
                self.control = self.callback_handler.on_substep_end(args, self.state, self.control)
        grad_norm = self._clip_grad_norm(model) if args.max_grad_norm > 0 else None
        self._grad_norm = self._get_grad_norm(model, grad_norm=grad_norm)
        self.control = self.callback_handler.on_pre_optimizer_step(args, self.state, self.control)
        self.optimizer.step()
        self.control = self.callback_handler.on_optimizer_step(args, self.state, self.control)
        self._learning_rate = self._get_learning_rate()
        model.zero_grad()
        self._steps_done += 1
        self._ledger.done[self._ledger.rank] = self._steps_done

    def _add_loss(self, loss: Tensor) -> None:
        if self.args.logging_nan_inf_filter:  # as the Trainer's, without asking the device what the loss is
            usual = self._tr_loss / (1 + self._steps_done - self._steps_logged)
            loss = torch.where(torch.isfinite(loss), loss, usual)
        self._tr_loss += loss

    def _follow_clock(self) -> None:
        """After an own step: draw the next, do what has become due, and meet if anybody wants to."""
        self._advance(self._clock.draw() // self._workers, stops_at_wish=True)
        self._mind_members()
        show_shares(self.callback_handler.callbacks, self._ledger.done)
        wants_to_meet = any(self._wishes())
        if wants_to_meet:
            self._clock.call_meeting()
        if wants_to_meet or self._clock.called:
            self._meet()
        elif self.control.should_log:
            self._log_evaluate_save()

    def _advance(self, step: int, stops_at_wish: bool = False) -> None:
        """Let `global_step` catch up with the clock, with all that goes by it.

        Args:
            step: What the clock says.
            stops_at_wish: Go no further than to a step that brings something for which all have to meet.
        """
        if self._ends_with_data and not self._data_has_ended:
            step = min(step, self.state.max_steps - 1)  # the last one ends training: not before all data have been used
        with self._alone():
            while self.state.global_step < min(step, self.state.max_steps):
                if not isinstance(self.lr_scheduler, ReduceLROnPlateau | GreedyLR):
                    self.lr_scheduler.step()
                self.state.global_step += 1
                steps = (self.state.global_step - self._initial_global_step) * self._workers
                epochs = self._initial_epoch + steps / self._updates_per_epoch
                self.state.epoch = max(self._epoch, min(self._epoch + 1, epochs))
                self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
                if stops_at_wish and any(self._wishes()):
                    break

    def _end_data(self) -> None:
        """Nothing is left of the last epoch: once that is so for all workers, training ends."""
        self._meet(has_ended=True, purpose="the end of the data", until_stopped=True)
        if not self._is_stopped():
            self._data_has_ended = True
            if self._last_cut_epoch < 0:
                self._advance(self.state.max_steps)  # all steps have been made, up to rounding
            self._meet(has_ended=True)


def _updates_of_shard(loader: Any, epoch: int, accumulation: int, skip: int) -> Iterator[list[Any]]:
    """Batches of one step each, from a loader of the Trainer's own making, which yields this worker's shard."""
    if skip:
        loader = skip_first_batches(loader, skip)
    inner = getattr(getattr(loader, "batch_sampler", None), "batch_sampler", None)
    for part in (loader, inner):  # accelerate does not pass the epoch on to a batch sampler that it has wrapped
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
    batches = iter(loader)
    while update := list(itertools.islice(batches, accumulation)):
        yield update
