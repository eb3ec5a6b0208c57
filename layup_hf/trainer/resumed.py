"""What a run goes on from: a checkpoint, and what it says."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

POSITION = "layup_hf"
"""Where the position in the data is among the callbacks' states in `trainer_state.json`."""


@dataclass(frozen=True)
class Resumed:
    """What training goes on from.

    Attributes:
        folder: The checkpoint.
        global_step: Its step.
        epoch: Epochs that all workers together had trained, with the fraction of the last one.
        max_steps: The step that training was to end with.
        workers: How many workers there were.
        position: Where they were in the data, from `WorkSharing.keep_position`; None for a checkpoint of one process.
    """

    folder: Path
    global_step: int
    epoch: float
    max_steps: int
    workers: int
    position: dict[str, Any] | None

    @classmethod
    def read(cls, folder: str | None) -> Resumed | None:
        """What `folder` says; None if it is no checkpoint of a Trainer."""
        file = Path(folder or "", TRAINER_STATE_NAME)
        if folder is None or not file.is_file():
            return None
        with readable(folder):
            state = TrainerState.load_from_json(str(file))
        position = state.stateful_callbacks.get(POSITION)
        workers = (position or {}).get("workers") or max(1, len(list(Path(folder).glob("rng_state_*.pth"))))
        return cls(Path(folder), state.global_step, state.epoch or 0.0, state.max_steps, workers, position)

    def optimizer_file(self, rank: int) -> Path | None:
        """The optimizer state for this rank, of the workers in turn if they were fewer; None where it is rank 0's."""
        file = self.folder / optimizer_name(rank % self.workers)
        return file if file.is_file() else None


@contextlib.contextmanager
def readable(folder: str | None) -> Iterator[None]:
    """Say what is wrong where a file of the checkpoint cannot be read.

    Raises:
        ValueError: A file is incomplete or damaged.
    """
    try:
        yield
    except (OSError, EOFError, SafetensorError, JSONDecodeError, UnpicklingError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise  # something else: a model of another shape, say
        raise ValueError(
            f"The checkpoint {folder} cannot be read, as it is incomplete or damaged. Resume from another one. "
            f"({type(error).__name__}: {error})"
        ) from error


def optimizer_name(rank: int) -> str:
    """Of the file with the optimizer state of this rank: as the Trainer names the random states."""
    stem, suffix = os.path.splitext(OPTIMIZER_NAME)
    return f"{stem}_{rank}{suffix}"
