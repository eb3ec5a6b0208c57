"""Meetings: where all workers stop between two of their steps, to do what needs all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from accelerate.utils import gather_object

from ..fleet.membership import Membership
from ..gossip.engine import GossipEngine
from ..progress.clock import ProgressClock, WorkerFailure


class BatchTooLarge(RuntimeError):
    """A worker's batch does not fit into memory: all workers begin again with smaller ones (`auto_find_batch_size`)."""


class _Arrival(NamedTuple):
    """What a worker says when it comes to a meeting."""

    step: int
    epoch: int
    has_ended: bool
    purpose: str
    steps_done: int
    lacks_memory: bool = False
    sees_applicants: bool = False


class _Wishes(NamedTuple):
    """What the callbacks of a worker want all workers to do."""

    evaluate: bool = False
    save: bool = False
    stop_epoch: bool = False
    stop_training: bool = False


class Meetings:
    """How workers come together, agree, and part. To be mixed into a subclass of `Trainer` that has a clock.

    What the callbacks of any worker ask for through `control` is done by all.
    """

    _clock: ProgressClock | None = None
    _membership: Membership | None = None
    _engine: GossipEngine | None = None
    _agreed = _Wishes()  # at the meeting that is being held
    _begins_era = False  # a new era has just begun
    _is_acting = False  # all workers evaluate or save together

    def _start_meetings(self, clock: ProgressClock) -> None:
        self._clock = clock
        self._steps_done = 0  # own steps in this call of train()
        self._steps_of_all = 0  # at the latest meeting
        self._is_acting = False
        self._epoch, self._last_cut_epoch = 0, -1
        self._log_evaluate_save: Callable[[], None] = lambda: None

    def _meet(
        self,
        *,
        has_ended: bool = False,
        purpose: str = "",
        until_stopped: bool = False,
        lacks_memory: bool = False,
    ) -> None:
        """Wait for all workers between two of their steps, agree on the step, do what any of them wants. Collective.

        Args:
            has_ended: This worker has nothing to do before the others have come as far. It stays until they have; until
                then it joins in what they want, and keeps back what it wants itself.
            purpose: What all workers come for together, from the same line of code. This worker stays until all have.
            until_stopped: It does not stay when training or this epoch is stopped.
            lacks_memory: A batch of this worker did not fit into memory, and a smaller one may be tried.

        Raises:
            BatchTooLarge: So it is for some worker.
            RuntimeError: The workers have come for different purposes, or some do not come at all.
        """
        if self._engine is not None:
            self._engine.pause()
        self._next_epoch = self._epoch + has_ended
        mine = _Arrival(0, self._epoch, has_ended, purpose, self._steps_done, lacks_memory)
        while True:
            came_with, self._agreed = self._wishes(), _Wishes()
            try:
                if self._hold_meeting(mine, until_stopped):
                    return
            except RuntimeError as error:
                wanted, self._is_acting = [came_with, self._agreed, self._wishes()], False
                member = self._membership.member if self._membership is not None else ""
                if not self._recovers_from(error):
                    raise
                if self._membership.member == member:
                    self._set_wishes(_any_of(wanted))  # what had been agreed upon may not have been done

    def _hold_meeting(self, mine: _Arrival, until_stopped: bool) -> bool:
        """Gather once, agree and act; whether this worker may go. Collective."""
        membership = self._membership
        sees_applicants = membership is not None and bool(membership.applicants) and membership.leads
        arrivals = self._gather(mine._replace(step=self.state.global_step, sees_applicants=sees_applicants))
        if any(arrival.sees_applicants for arrival in arrivals):
            self._regroup()
            return False
        if any(arrival.lacks_memory for arrival in arrivals):
            ranks = ", ".join(str(rank) for rank, arrival in enumerate(arrivals) if arrival.lacks_memory)
            raise BatchTooLarge(f"Rank {ranks} ran out of memory. All workers try again with smaller batches.")
        stays = self._has_to_stay(mine, arrivals)
        self._steps_of_all = sum(arrival.steps_done for arrival in arrivals)
        if self._begins_era:  # with a consensus point, after which nobody has made a step
            self._begins_era, self._agreed_at = False, self._now()
        before = self._wishes()
        self._set_wishes(_Wishes())
        self._advance(max(arrival.step for arrival in arrivals))
        if self.args.process_index == 0:
            self._clock.answer_calls()  # all are here, and nobody leaves before the next gathering
        # What the step brings concerns all now; what this worker came with may have to wait.
        come_due = self._wishes()
        self._agreed = self._what_all_want(come_due if stays else _any_of([come_due, before]))
        self._clock.forget_calls()
        self._set_wishes(self._agreed)
        self._is_acting = True
        self._log_evaluate_save()
        self._is_acting = False
        if stays:
            self._set_wishes(_any_of([self._wishes(), before]))
        return not stays or (until_stopped and self._is_stopped())

    def _has_to_stay(self, mine: _Arrival, arrivals: Sequence[_Arrival]) -> bool:
        """Whether this worker has to wait for another meeting."""
        purposes = {arrival.purpose for arrival in arrivals}
        waiting = [arrival for arrival in arrivals if arrival.purpose]
        has_passed = any(a.epoch > w.epoch and not (a.has_ended or a.purpose) for w in waiting for a in arrivals)
        if has_passed or ("" not in purposes and len(purposes) > 1):
            places = " and to ".join(sorted(purposes - {""}))
            raise RuntimeError(
                f"Some workers wait for all others to come to {places}, and the others do not come. What needs all "
                "workers, such as evaluate() or save_model(), must be called on all of them."
            )
        if mine.purpose:
            return "" in purposes
        return mine.has_ended and any(not a.has_ended and a.epoch <= mine.epoch for a in arrivals)

    def _is_stopped(self) -> bool:
        """Whether to make no more steps in this epoch."""
        return self._epoch <= self._last_cut_epoch or self.control.should_training_stop

    def _what_all_want(self, own: _Wishes) -> _Wishes:
        """What any worker wants. To stop an epoch concerns those who are in it, or have not come to it. Collective."""
        wishes = self._gather((self._epoch, own))
        self._last_cut_epoch = max([self._last_cut_epoch, *(epoch for epoch, wish in wishes if wish.stop_epoch)])
        union = _any_of([wish for _, wish in wishes])
        return union._replace(stop_epoch=self._epoch <= self._last_cut_epoch)

    def _gather(self, item: Any) -> list[Any]:
        """One object of every worker. Collective.

        Raises:
            WorkerFailure: A worker has ended meanwhile, and nothing is left to go on with.
        """
        try:
            return gather_object([item])
        except RuntimeError as error:
            if self._membership is not None:
                raise
            message = self._clock.failure() or (
                "A worker has ended without a word: was it killed, or out of memory? Or it has not come to a meeting "
                "within `ddp_timeout`."
            )
            raise WorkerFailure(message) from error

    def _wishes(self) -> _Wishes:
        control = self.control
        return _Wishes(
            control.should_evaluate, control.should_save, control.should_epoch_stop, control.should_training_stop
        )

    def _forget_wishes(self) -> None:
        """Want nothing that others have done meanwhile; but a wish to end stays."""
        self._set_wishes(_Wishes(stop_training=self.control.should_training_stop))

    def _set_wishes(self, wishes: _Wishes) -> None:
        control = self.control
        control.should_evaluate, control.should_save, control.should_epoch_stop, control.should_training_stop = wishes


def _any_of(wishes: Sequence[_Wishes]) -> _Wishes:
    return _Wishes(*map(any, zip(*wishes, strict=True)))
