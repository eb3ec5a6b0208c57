"""Consensus points: where evaluating, predicting or saving finds one model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ..trace.events import EVALUATION, SAVING
from .agreement import Agreement
from .collectives import Collectives
from .eras import Eras
from .evaluations import Evaluations
from .exchange import Exchange
from .host import Host
from .logs import Logs
from .meetings import Meetings
from .state import RunState
from .tracing import Tracing

T = TypeVar("T")

_SAVES = ("a checkpoint", "save_model()")
"""Of the purposes; the others evaluate or predict."""


class ConsensusPoints:
    """Lets what needs one model be done by all workers, on the consensus model."""

    def __init__(
        self,
        host: Host,
        state: RunState,
        collectives: Collectives,
        exchange: Exchange,
        logs: Logs,
        agreement: Agreement,
        eras: Eras,
        meetings: Meetings,
        evaluations: Evaluations,
        tracing: Tracing,
    ) -> None:
        self._host, self._state, self._collectives, self._exchange = host, state, collectives, exchange
        self._logs, self._agreement, self._eras, self._meetings = logs, agreement, eras, meetings
        self._evaluations, self._tracing = evaluations, tracing
        self._is_inside = False  # all workers are together, and have one model

    def with_all(self, purpose: str, action: Callable[[], T]) -> T:
        """Do what needs all workers, on the consensus model; with those who are left, if some go meanwhile.

        What is done within it, an evaluation for a checkpoint say, finds the model that all have agreed on.

        Args:
            purpose: What it is for; the same on all workers.
            action: What is to be done.
        """
        if self._is_inside or self._evaluations.goes_on:
            return action()

        def act() -> T:
            self.reach(purpose)
            self._is_inside = True
            try:
                with self._tracing.span(SAVING if purpose in _SAVES else EVALUATION):
                    return action()
            finally:
                self._is_inside = False

        with self._collectives.together():
            return act() if self._state.is_acting else self._eras.enduring(act)  # a meeting begins again itself

    def reach(self, purpose: str) -> None:
        """During training, make all workers hold the mass-weighted mean, and log what was found. Collective.

        Args:
            purpose: What it is for; the same on all workers.

        Raises:
            RuntimeError: It was asked for in the middle of a step, where the workers are not together, or for
                different purposes.
        """
        if self._exchange.engine is None:
            return
        if self._collectives.is_alone:
            raise RuntimeError(
                "Evaluating, predicting or saving during a step or a log, from `on_step_end` say, needs all workers at "
                "once, and they are not at the same step. In a callback, set `control.should_evaluate` or "
                "`control.should_save`, on any worker: all will do it together after their steps."
            )
        if not self._state.is_acting:
            self._meetings.meet(has_ended=True, purpose=purpose)
        self._agree()

    def reach_if_wanted(self) -> None:
        """In a meeting, before the Trainer evaluates and saves: whatever does that then finds one model. Collective."""
        control = self._host.control
        if self._state.is_acting and (control.should_evaluate or control.should_save):
            self._agree()

    def _agree(self) -> None:
        self._logs.sum_tokens()
        if not self._agreement.holds:  # an evaluation and a save after the same step share one consensus point
            self._agreement.agree()
