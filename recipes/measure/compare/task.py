"""What a task is: data, and a model for it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Task:
    """Data, and a model for it.

    Attributes:
        train, held_out: Rows.
        make_model: Makes the model anew from a seed, equal on every worker.
        trainer: What the Trainer has to know besides.
        arguments: Likewise of `LayupConfig`.
        data: What tells the data from others, kept with the results.
    """

    train: Dataset
    held_out: Dataset
    make_model: Callable[[int], PreTrainedModel]
    trainer: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
