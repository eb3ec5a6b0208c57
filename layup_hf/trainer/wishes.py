"""What callbacks want all workers to do, as they say it through `control`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from transformers import TrainerControl

from ..fleet.data import travels


@travels
class Wishes(NamedTuple):
    """What the callbacks of a worker want all workers to do."""

    evaluate: bool = False
    save: bool = False
    stop_epoch: bool = False
    stop_training: bool = False

    @classmethod
    def of(cls, control: TrainerControl) -> Wishes:
        """What is wanted now."""
        return cls(
            control.should_evaluate, control.should_save, control.should_epoch_stop, control.should_training_stop
        )

    @classmethod
    def any_of(cls, wishes: Iterable[Wishes]) -> Wishes:
        """What at least one of several wants."""
        return cls(*map(any, zip(*wishes, strict=True)))

    def put_into(self, control: TrainerControl) -> None:
        """Want this, and nothing else."""
        control.should_evaluate, control.should_save, control.should_epoch_stop, control.should_training_stop = self
