"""Meetings: where all workers stop between two of their steps, to do what needs all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..fleet.data import travels
from ..trace.events import MEETING
from .agreement import Agreement
from .collectives import Collectives
from .eras import Eras
from .evaluations import Best, Evaluations
from .exchange import Exchange
from .following import ClockFollower
from .host import Host
from .members import Members
from .state import RunState
from .tracing import Tracing
from .waits import UNKNOWN, Waits
from .wishes import Wishes


class BatchTooLarge(RuntimeError):
    """A worker's batch does not fit into memory: all workers begin again with smaller ones (`auto_find_batch_size`)."""


@travels
class _Arrival(NamedTuple):
    """What a worker says when it comes to a meeting."""

    step: int
    epoch: int
    has_ended: bool
    purpose: str
    steps_done: int
    lacks_memory: bool = False
    sees_applicants: bool = False
    best: Best | None = None
    stood: float = UNKNOWN


class Meetings:
    """How workers come together, agree, and part. What the callbacks of any worker ask for through `control` is done
    by all.

    Attributes:
        waits: Who was waited for.
        act: What is done at a meeting: the Trainer logs, evaluates and saves, as `control` says. Set by the loop.
    """

    def __init__(
        self,
        host: Host,
        state: RunState,
        collectives: Collectives,
        members: Members,
        exchange: Exchange,
        agreement: Agreement,
        eras: Eras,
        follower: ClockFollower,
        evaluations: Evaluations,
        tracing: Tracing,
    ) -> None:
        self._host, self._state, self._collectives, self._members = host, state, collectives, members
        self._exchange, self._agreement, self._eras, self._follower = exchange, agreement, eras, follower
        self._evaluations, self._tracing = evaluations, tracing
        self.waits = Waits()
        self._agreed = Wishes()  # at the meeting that is being held
        self.act: Callable[[], None] = _nothing

    def meet(
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
        with self._tracing.span(MEETING):
            steps_done, epoch = self._state.steps_done, self._state.epoch
            self._meet(_Arrival(0, epoch, has_ended, purpose, steps_done, lacks_memory), until_stopped)

    def _meet(self, mine: _Arrival, until_stopped: bool) -> None:
        state = self._state
        if self._exchange.engine is not None:
            self._exchange.engine.pause()
        state.next_epoch = state.epoch + mine.has_ended
        while True:
            came_with, self._agreed = self._wishes, Wishes()
            try:
                may_go = self._hold(mine, until_stopped)
            except RuntimeError as error:
                wanted, state.is_acting = [came_with, self._agreed, self._wishes], False
                before = self._member
                if not self._eras.recover_from(error):
                    raise
                self.waits.begin_anew(tells=self._host.is_first)
                if self._member == before:
                    self._want(Wishes.any_of(wanted))  # what had been agreed upon may not have been done
                continue
            has_evaluated = self._evaluations.make_up()
            if has_evaluated and any(self._wishes):  # early stopping, say, which all are to do
                state.present_clock.call_meeting()
            elif may_go:
                return

    @property
    def _member(self) -> str:
        membership = self._members.membership
        return membership.member if membership is not None else ""

    def _hold(self, mine: _Arrival, until_stopped: bool) -> bool:
        """Gather once, agree and act; whether this worker may go. Collective."""
        host, state, membership = self._host, self._state, self._members.membership
        sees_applicants = membership is not None and bool(membership.applicants) and membership.leads
        mine = mine._replace(step=host.state.global_step, sees_applicants=sees_applicants, best=self._evaluations.best)
        mine = mine._replace(stood=self.waits.stood)
        with self.waits.standing():
            arrivals = self._collectives.gather(mine)
        stood, steps = [arrival.stood for arrival in arrivals], [arrival.steps_done for arrival in arrivals]
        self.waits.note(stood, steps, tells=host.is_first)
        self._evaluations.take_over(arrivals[0].best)
        if any(arrival.sees_applicants for arrival in arrivals):
            self._eras.regroup()
            self.waits.begin_anew(tells=host.is_first)
            return False
        if any(arrival.lacks_memory for arrival in arrivals):
            ranks = ", ".join(str(rank) for rank, arrival in enumerate(arrivals) if arrival.lacks_memory)
            raise BatchTooLarge(f"Rank {ranks} ran out of memory. All workers try again with smaller batches.")
        stays = _has_to_stay(mine, arrivals)
        state.steps_of_all = sum(arrival.steps_done for arrival in arrivals)
        if state.begins_era:  # with a consensus point, after which nobody has made a step
            state.begins_era, state.agreed_at = False, self._agreement.now
        before = self._wishes
        self._want(Wishes())
        self._follower.advance(max(arrival.step for arrival in arrivals))
        if host.rank == 0:
            state.present_clock.answer_calls()  # all are here, and nobody leaves before the next gathering
        # What the step brings concerns all now; what this worker came with may have to wait.
        come_due = self._wishes
        self._agreed = self.what_all_want(come_due if stays else Wishes.any_of([come_due, before]))
        state.present_clock.forget_calls()
        self._want(self._agreed)
        state.is_acting = True
        self.act()
        state.is_acting = False
        if stays:
            self._want(Wishes.any_of([self._wishes, before]))
        return not stays or (until_stopped and self._follower.is_stopped)

    def what_all_want(self, own: Wishes) -> Wishes:
        """What any worker wants. To stop an epoch concerns those who are in it, or have not come to it. Collective."""
        epoch, course = self._state.epoch, self._state.course
        wishes = self._collectives.gather((epoch, own))
        course.last_cut_epoch = max([course.last_cut_epoch, *(place for place, wish in wishes if wish.stop_epoch)])
        union = Wishes.any_of([wish for _, wish in wishes])
        return union._replace(stop_epoch=epoch <= course.last_cut_epoch)

    @property
    def _wishes(self) -> Wishes:
        return Wishes.of(self._host.control)

    def _want(self, wishes: Wishes) -> None:
        wishes.put_into(self._host.control)

    def stop(self) -> None:
        """There is nothing to do at a meeting any more. Idempotent."""
        self.act = _nothing


def _nothing() -> None:
    pass


def _has_to_stay(mine: _Arrival, arrivals: Sequence[_Arrival]) -> bool:
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
