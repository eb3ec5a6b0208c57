"""What a method is: which Trainer, with which arguments and callbacks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import Trainer, TrainerCallback


@dataclass
class Setup:
    """What a method is told about a run.

    Attributes:
        steps: Of every worker on average.
        period: Local steps between two synchronisations, for methods that have such.
        reduced: Bytes that this worker has handed to all-reduce so far, as they are sent; counted by the method.
    """

    steps: int
    period: int
    reduced: float = 0.0


@dataclass(frozen=True)
class Method:
    """How a run is made.

    Attributes:
        trainer: Makes the trainer; takes the arguments of `Trainer`.
        arguments: Of `LayupConfig`, that differ from those of all methods.
        callbacks: Of this method.
    """

    trainer: Callable[..., Trainer]
    arguments: dict[str, Any] = field(default_factory=dict)
    callbacks: tuple[TrainerCallback, ...] = ()
