"""What a run goes on from: a checkpoint, and what it says."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from .reading import readable

POSITION = "layup_hf"
"""Where the position in the data is among the callbacks' states in `trainer_state.json`."""

MOST_STEPS = 1 << 32
"""No run makes more steps. (The clock counts those of all workers in 48 bits.)"""

MOST_WORKERS = 1 << 16
"""Messages between workers have 16 bits for a rank."""

_MOST_EPOCHS = 1 << 31
_MOST_PLACES = 1 << 62  # of an epoch: more than a stream has


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
        """What `folder` says; None if it is no checkpoint of a Trainer.

        Raises:
            ValueError: Its file cannot be read, or says what cannot be.
        """
        file = Path(folder or "", TRAINER_STATE_NAME)
        if folder is None or not file.is_file():
            return None
        with readable(folder, [TRAINER_STATE_NAME]):
            try:
                state = TrainerState.load_from_json(str(file))
            except (TypeError, AttributeError) as error:  # JSON of something else
                raise ValueError(f"{file} is no state of a Trainer ({error}). Resume from another one.") from error
        said = _Said(file)
        states = said.must("stateful_callbacks", state.stateful_callbacks, isinstance(state.stateful_callbacks, dict))
        position = states.get(POSITION)
        if position is not None:
            said.require_position(position)
        written = max(1, len(list(Path(folder).glob("rng_state_*.pth"))))
        workers = (position or {}).get("workers")
        return cls(
            folder=Path(folder),
            global_step=said.number("global_step", state.global_step, most=MOST_STEPS),
            epoch=said.epoch(0.0 if state.epoch is None else state.epoch),
            max_steps=said.number("max_steps", state.max_steps, most=MOST_STEPS, least=-1),
            workers=written if workers is None else workers,
            position=position,
        )

    def optimizer_file(self, rank: int) -> Path | None:
        """The optimizer state for this rank, of the workers in turn if they were fewer; None where it is rank 0's."""
        file = self.folder / optimizer_name(rank % self.workers)
        return file if file.is_file() else None


class _Said:
    """Says what is wrong with something in a file that has been edited, before anybody counts by it.

    Args:
        file: Its path, for messages.
    """

    def __init__(self, file: Path) -> None:
        self._file = file

    def must(self, name: str, value: Any, holds: bool) -> Any:
        """The value, if this holds.

        Raises:
            ValueError: It does not.
        """
        if not holds:
            text = repr(value)
            raise ValueError(
                f"{self._file} says {name}={text[:100]}{'...' if len(text) > 100 else ''}, which cannot be: it is "
                "damaged, or somebody has edited it. Resume from another checkpoint."
            )
        return value

    def number(self, name: str, value: Any, *, most: int, least: int = 0) -> int:
        """A whole number from `least` to `most`."""
        return self.must(name, value, type(value) is int and least <= value <= most)

    def epoch(self, value: Any) -> float:
        """How many epochs, with a fraction."""
        is_number = type(value) in (int, float) and math.isfinite(value)
        return self.must("epoch", value, is_number and 0 <= value <= _MOST_EPOCHS)

    def require_position(self, position: Any) -> None:
        """Make sure that it is one, as `WorkSharing.keep_position` writes them."""
        self.must(POSITION, position, isinstance(position, dict))
        if "workers" in position:
            self.number("workers", position["workers"], least=1, most=MOST_WORKERS)
        if "shards" in position:
            self._require_shards(position)
        else:
            self._require_draws(position)

    def _require_shards(self, position: dict[str, Any]) -> None:
        shards, size = position["shards"], position.get("batch_size")
        self.must("shards", shards, isinstance(shards, list) and len(shards) == position.get("workers", len(shards)))
        self.must("shards", shards, len(shards) > 0)
        for place in shards:
            epoch, batches = self.must("shards", place, isinstance(place, list) and len(place) == 2)
            self.number("shards", epoch, most=_MOST_EPOCHS)
            self.number("shards", batches, most=_MOST_PLACES)
        if size is not None:
            self.number("batch_size", size, least=1, most=MOST_STEPS)

    def _require_draws(self, position: dict[str, Any]) -> None:
        """Each part that nobody had begun is one of those that had been drawn, and none is there twice."""
        first = self.number("epoch", position.get("epoch"), most=_MOST_EPOCHS)
        drawn: Any = position.get("drawn")
        left: Any = position.get("not_begun")
        self.must("drawn", drawn, isinstance(drawn, dict) and all(type(key) is str and key.isdigit() for key in drawn))
        for epoch, place in drawn.items():
            self.must("drawn", drawn, first <= int(epoch) <= _MOST_EPOCHS)
            self.number("drawn", place, most=_MOST_PLACES)
        self.must("not_begun", left, isinstance(left, list))
        ends: dict[int, int] = {}
        for draw in left:
            self.must("not_begun", draw, isinstance(draw, list) and len(draw) == 3)
            epoch, start, stop = (self.number("not_begun", number, most=_MOST_PLACES) for number in draw)
            self.must("not_begun", draw, start <= stop <= drawn.get(str(epoch), -1))
        for epoch, start, stop in sorted(left):
            self.must("not_begun", left, start >= ends.get(epoch, 0))
            ends[epoch] = stop


def optimizer_name(rank: int) -> str:
    """Of the file with the optimizer state of this rank: as the Trainer names the random states."""
    stem, suffix = os.path.splitext(OPTIMIZER_NAME)
    return f"{stem}_{rank}{suffix}"
