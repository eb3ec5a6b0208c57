"""Where a run is: what several of its parts read and change."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ..progress.clock import ProgressClock
from .report import RunFacts
from .resumed import Resumed


@dataclass
class Course:
    """How far the data reach; the same on all workers, and what one that joins takes over from rank 0.

    Attributes:
        initial_epoch: Epochs that had been trained when training began, with the fraction of the last one.
        updates_per_epoch: Optimizer steps of all workers together in an epoch.
        ends_with_data: Training ends when all data of all epochs have been used, not by the step alone.
        data_has_ended: So they have.
        last_cut_epoch: The latest epoch that was stopped before its end; -1 for none.
    """

    initial_epoch: float = 0.0
    updates_per_epoch: float = 1.0
    ends_with_data: bool = False
    data_has_ended: bool = False
    last_cut_epoch: int = -1


@dataclass
class RunState:
    """What the parts of a run change together. Each field says who sets it.

    Attributes:
        clock: Counts the steps of all workers (`LayupRun`); None while the Trainer's own loop trains, or nothing does.
        course: How far the data reach (`WorkSharing`, `TrainingLoop`).
        epoch: The epoch that this worker is in (`TrainingLoop`).
        next_epoch: The one it will be in after the meeting that it has come to (`Meetings`).
        steps_done: Own steps in this call of `train()` (`TrainingLoop`).
        steps_of_all: Those of all workers at the latest meeting (`Meetings`).
        steps_logged: Own steps until the latest log (`Logs`).
        shard_place: With shards instead of shared batches: the epoch, and the batches of it that this worker has used
            (`TrainingLoop`).
        is_acting: All workers evaluate or save together, in a meeting (`Meetings`).
        begins_era: A new era has just begun, and there has been no meeting in it yet (`Eras`, `Meetings`).
        agreed_at: Era and steps of all workers at the latest consensus point (`Agreement`, `Meetings`).
        is_outside: This worker is yet to join a running job (`Members`, `TrainingLoop`).
        is_new: It does not have the others' model yet (`Members`, `Eras`, `Agreement`).
        ends_early: Training has ended as the machine is about to be taken away (`LayupRun`).
        resumed: The checkpoint that training goes on from (`Checkpoints`).
        facts: What the model card says about the workers.
    """

    clock: ProgressClock | None = None
    course: Course = field(default_factory=Course)
    epoch: int = 0
    next_epoch: int = 0
    steps_done: int = 0
    steps_of_all: int = 0
    steps_logged: int = 0
    shard_place: tuple[int, int] = (0, 0)
    is_acting: bool = False
    begins_era: bool = False
    agreed_at: tuple[int, int] | None = None
    is_outside: bool = False
    is_new: bool = False
    ends_early: bool = False
    resumed: Resumed | None = None
    facts: RunFacts | None = None

    @property
    def present_clock(self) -> ProgressClock:
        """The clock that this worker goes by; not to be asked where it goes by none."""
        assert self.clock is not None
        return self.clock

    def note(self, **facts: Any) -> None:
        """Let the model card know."""
        if self.facts is not None:
            self.facts = replace(self.facts, **facts)

    def begin(self, clock: ProgressClock, initial_epoch: float) -> None:
        """Several workers begin to train: nothing has been done in this call of `train()` yet."""
        self.clock = clock
        self.steps_done = self.steps_of_all = self.steps_logged = self.epoch = 0
        self.is_acting = False
        course = self.course
        course.initial_epoch, course.data_has_ended, course.last_cut_epoch = initial_epoch, False, -1

    def share(self) -> dict[str, Any]:
        """What a worker that joins cannot know of the course, for `take_over`."""
        return vars(self.course).copy()

    def take_over(self, course: dict[str, Any]) -> None:
        """Be where rank 0 is."""
        self.course = Course(**course)
