"""How `global_step` follows the clock, and with it all that the Trainer does once per step."""

from __future__ import annotations

from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers.optimization import GreedyLR

from .collectives import Collectives
from .host import Host
from .members import Members
from .state import RunState
from .wishes import Wishes


class ClockFollower:
    """Does what the Trainer does once per step, once for every value of `global_step`, on every worker alike.

    So a slow worker that catches up on several makes up for each: the scheduler's step and `on_step_end`, and with it
    the decisions to log, evaluate, save and stop.
    """

    def __init__(self, host: Host, state: RunState, collectives: Collectives, members: Members) -> None:
        self._host, self._state, self._collectives, self._members = host, state, collectives, members

    @property
    def is_stopped(self) -> bool:
        """Whether to make no more steps in this epoch."""
        return self._state.epoch <= self._state.course.last_cut_epoch or self._host.control.should_training_stop

    def advance(self, step: int, stops_at_wish: bool = False) -> None:
        """Let `global_step` catch up with the clock, with all that goes by it.

        Args:
            step: What the clock says.
            stops_at_wish: Go no further than to a step that brings something for which all have to meet.
        """
        host, course, place = self._host, self._state.course, self._state
        trainer_state = host.state
        if course.ends_with_data and not course.data_has_ended:
            step = min(step, trainer_state.max_steps - 1)  # the last ends training: not before all data have been used
        with self._collectives.alone():
            while trainer_state.global_step < min(step, trainer_state.max_steps):
                if not isinstance(host.lr_scheduler, ReduceLROnPlateau | GreedyLR):
                    host.lr_scheduler.step()
                trainer_state.global_step += 1
                steps = (trainer_state.global_step - host.initial_global_step) * self._members.workers
                epochs = course.initial_epoch + steps / course.updates_per_epoch
                trainer_state.epoch = float(max(place.epoch, min(place.epoch + 1, epochs)))
                host.emit("on_step_end")
                if stops_at_wish and any(Wishes.of(host.control)):
                    break
