"""Checkpoints that are whole or not there, and what a run goes on from."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, sort_checkpoints
from transformers.utils import logging

logger = logging.get_logger(__name__)

UNFINISHED = "_unfinished"
"""Folder in the output directory where a checkpoint is written. No upload takes what begins with an underscore."""

_REPLACED = "replaced"

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
        position: Where they were in the data, from `_keep_position`; None for a checkpoint of one process.
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
        file = self.folder / _optimizer_name(rank % self.workers)
        return file if file.is_file() else None


class Checkpoints:
    """Writes a checkpoint so that it appears at once when it is complete. To be mixed into a subclass of `Trainer`.

    All workers write into a folder aside, which is renamed when all have written; only then older checkpoints are
    removed. Whatever ends the run at whatever moment, the folders named `checkpoint-*` are complete. (A machine that
    loses its power may lose what its file system had not written yet.)
    """

    _resumed: Resumed | None = None
    _aside: str | None = None  # where a checkpoint is being written
    _has_warned_of_folder = False
    _is_outside = False  # this worker is yet to join a running job

    def _get_output_dir(self, trial: Any) -> str:
        return self._aside or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output_dir, name = super()._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder = Path(output_dir)
        with self._writing_aside(folder):
            super()._save_checkpoint(model, trial)
        self._require_shared_folder(folder / UNFINISHED / name)
        best, written = self._best_of(output_dir), self.state.best_model_checkpoint
        self.state.best_model_checkpoint = best
        if self.args.should_save:
            if best != written:
                self.state.save_to_json(str(folder / UNFINISHED / name / TRAINER_STATE_NAME))
            _publish(folder, name)
        if self._is_to_be_pushed:
            super()._push_from_checkpoint(str(folder / name))
        if self.args.should_save and (self.args.save_total_limit or 0) > 0:
            _rotate(folder, self.args.save_total_limit, self.state.best_model_checkpoint)
        self._gather(None)  # nobody goes on, perhaps to load the best checkpoint, before it has its name

    def _require_shared_folder(self, aside: Path) -> None:
        """Once all have written, see whether rank 0 has it all; say so if not, and clear away the rest. Collective."""
        self._gather(None)  # all have written
        written = self._gather(set(os.listdir(aside)) if aside.is_dir() else set())
        apart = [rank for rank, files in enumerate(written) if files and files.isdisjoint(written[0])]
        if self.args.process_index in apart and not self.args.should_save:
            shutil.rmtree(aside.parent, ignore_errors=True)
        if apart and self.is_world_process_zero() and not self._has_warned_of_folder:
            self._has_warned_of_folder = True
            logger.warning(
                f"The output directory of rank {', '.join(map(str, apart))} is not that of rank 0, so the checkpoints "
                "have the optimizer and random states of the others alone, and these workers resume with rank 0's. A "
                "file system that all machines share keeps them all."
            )

    def _best_of(self, output_dir: str) -> str | None:
        """The best checkpoint, under the name that the Trainer gives it; it looks where this one is being written."""
        step = self.state.best_global_step
        if not step or self.args.save_strategy == SaveStrategy.NO:
            return self.state.best_model_checkpoint
        best = os.path.join(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        is_there = step == self.state.global_step or os.path.exists(best)
        return best if is_there else self.state.best_model_checkpoint

    @contextlib.contextmanager
    def _writing_aside(self, folder: Path) -> Iterator[None]:
        self._aside, self._is_to_be_pushed = str(folder / UNFINISHED), False
        try:
            yield
        except Exception as error:
            error.add_note(f"The checkpoint is not complete; those in {folder} are. Is the disk full?")
            raise
        finally:
            self._aside = None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._aside is None:
            super()._push_from_checkpoint(checkpoint_folder)
        else:
            self._is_to_be_pushed = True  # when it is complete, under its own name

    def _resume(self, checkpoint: str | None, trial: Any) -> None:
        """Find out what training goes on from, and clear away what a killed run has left. Before all workers meet."""
        self._resumed = Resumed.read(checkpoint)
        if self.args.should_save and not self._is_outside:  # the others may be writing just now
            folder = Path(self._get_output_dir(trial))
            for replaced in (folder / UNFINISHED).glob(f"{_REPLACED}-*"):
                place = folder / replaced.name.split("-", 2)[2]
                if not place.exists():  # killed before what was to replace it had its name
                    replaced.rename(place)
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        if self.args.should_save and self.state.best_model_checkpoint is not None and self.args.save_total_limit == 1:
            folder, best = Path(self._get_output_dir(trial)), Path(self.state.best_model_checkpoint).resolve()
            others = [place for place in sort_checkpoints(str(folder)) if Path(place).resolve() != best]
            _remove(folder, others if best.is_dir() else [])  # as the Trainer would, one file after the other
        return super()._finalize_training(trial, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.process_index > 0:
            os.makedirs(output_dir, exist_ok=True)
            torch.save(self.optimizer.state_dict(), os.path.join(output_dir, _optimizer_name(self.args.process_index)))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the Trainer's, with this worker's own optimizer state.

        Raises:
            ValueError: A file cannot be read.
        """
        if checkpoint is None:
            return
        file = self._resumed.optimizer_file(self.args.process_index) if self._resumed is not None else None
        with readable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            if file is not None:
                self.optimizer.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's.

        Raises:
            ValueError: A file cannot be read.
        """
        Resumed.read(resume_from_checkpoint)  # which says what is wrong, where the Trainer reads it later
        with readable(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with readable(checkpoint):
            super()._load_rng_state(checkpoint)

    def _say_what_is_resumed(self) -> None:
        """Tell what another number of workers than in the checkpoint means."""
        resumed, workers = self._resumed, self.args.world_size
        if resumed is None or resumed.workers == workers or not self.is_world_process_zero():
            return
        unused = ", ".join(map(str, range(workers, resumed.workers)))
        states = f"those of rank {unused} are not used" if unused else "new workers begin with those of the old in turn"
        logger.warning(
            f"{workers} worker(s) go on from step {resumed.global_step} (epoch {resumed.epoch:.4g}) of "
            f"{resumed.workers}. Optimizer states: {states}. Training ends at step {self.state.max_steps}, and the "
            "learning rate's schedule fits that; what of the epoch has been used is not used again."
        )


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


def _publish(folder: Path, name: str) -> None:
    """Give a complete checkpoint its name. What had it goes only then."""
    aside, place = folder / UNFINISHED, folder / name
    if place.exists():
        place.rename(aside / f"{_REPLACED}-{uuid.uuid4().hex}-{name}")
    (aside / name).rename(place)
    shutil.rmtree(aside, ignore_errors=True)


def _rotate(folder: Path, limit: int, best: str | None) -> None:
    """Remove the oldest checkpoints beyond `limit`, as the Trainer does: not the latest, not the best."""
    checkpoints = sort_checkpoints(str(folder), use_mtime=True)
    kept = {Path(place).resolve() for place in (checkpoints[-1], best) if place is not None}
    removable = [checkpoint for checkpoint in checkpoints if Path(checkpoint).resolve() not in kept]
    _remove(folder, removable[: max(0, len(checkpoints) - max(limit, len(kept)))])


def _remove(folder: Path, checkpoints: Sequence[str]) -> None:
    """Remove checkpoints, each at once: what is left of one after a kill no longer has its name.

    As in the Trainer, what cannot be removed stays, and ends no training.
    """
    for checkpoint in checkpoints:
        (folder / UNFINISHED).mkdir(exist_ok=True)
        with contextlib.suppress(OSError):
            Path(checkpoint).rename(folder / UNFINISHED / f"removed-{uuid.uuid4().hex}")
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


def _optimizer_name(rank: int) -> str:
    """As the Trainer names the random states."""
    stem, suffix = os.path.splitext(OPTIMIZER_NAME)
    return f"{stem}_{rank}{suffix}"
