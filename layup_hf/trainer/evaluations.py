"""Evaluations that nobody waits for."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..fleet.data import travels
from ..trace.events import EVALUATION
from .checkpoint import Checkpoints
from .collectives import Collectives
from .host import Host
from .state import RunState
from .tracing import Tracing


@travels
class Best(NamedTuple):
    """The best model so far, as rank 0 knows it: the Trainer's state of the same names."""

    best_metric: float | None
    best_global_step: int | None
    best_model_checkpoint: str | None


class Evaluations:
    """With `evaluations="background"`, rank 0 evaluates alone while the others train on.

    At a consensus point all workers adopt one model, and rank 0 has it until its next own step: so it evaluates between
    the meeting and that step, all of the set, without a copy of the model. To the others it is a slow worker meanwhile.
    The last evaluation, when nobody trains any more, is done by all.

    Attributes:
        goes_on: This worker is evaluating alone.
    """

    def __init__(
        self, host: Host, state: RunState, collectives: Collectives, checkpoints: Checkpoints, tracing: Tracing
    ) -> None:
        self._host, self._state, self._collectives, self._tracing = host, state, collectives, tracing
        self._checkpoints = checkpoints
        self._is_owed, self._ignored = False, None
        self.goes_on = False

    @property
    def _are_in_background(self) -> bool:
        return self._host.options.evaluations == "background" and self._host.world_size > 1

    def put_off(self, ignored: Any) -> None:
        """In a meeting, on the consensus model, before the Trainer evaluates: let it do so later, and rank 0 alone.

        Args:
            ignored: Outputs of the model that the evaluation ignores, or None.
        """
        host, control = self._host, self._host.control
        if not (self._are_in_background and self._state.is_acting and control.should_evaluate):
            return
        if control.should_training_stop or host.state.global_step >= host.state.max_steps:
            return
        control.should_evaluate = False
        self._is_owed, self._ignored = host.is_first, ignored

    def make_up(self) -> bool:
        """After a meeting, before this worker's next step: evaluate, if that has been put off; whether it has."""
        if not self._is_owed:
            return False
        self._is_owed, host = False, self._host
        host.forget_evaluation_loaders()  # they yield the share of one of several workers
        try:
            self.goes_on = True
            with self._collectives.alone(), self._tracing.span(EVALUATION):
                if host.is_best(host.evaluate(self._ignored)):
                    self._checkpoints.note_late_best()
        finally:
            self.goes_on = False
            host.forget_evaluation_loaders()
        return True

    @property
    def best(self) -> Best | None:
        """What the others are to know of the best model; None where all have evaluated alike."""
        state = self._host.state
        if not self._are_in_background:
            return None
        return Best(state.best_metric, state.best_global_step, state.best_model_checkpoint)

    def take_over(self, best: Best | None) -> None:
        """Know what rank 0 knows. Args: `best` is of rank 0."""
        if best is not None:
            for name, value in best._asdict().items():
                setattr(self._host.state, name, value)
