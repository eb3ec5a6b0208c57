"""Checkpoints that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, get_last_checkpoint, sort_checkpoints
from transformers.utils import logging

from ..windows.opening import together
from .collectives import Collectives
from .compat import on_plain_cpu
from .host import Host
from .hub import HubPushes
from .reading import readable
from .resumed import Resumed, optimizer_name
from .state import RunState

logger = logging.get_logger(__name__)

UNFINISHED = "_unfinished"
"""Folder in the output directory where a checkpoint is written. No upload takes what begins with an underscore."""

_REPLACED = "replaced"
_OF_MODEL = ("*.safetensors", "pytorch_model*.bin", "*.index.json", "adapter_*", "*/adapter_*")


class Checkpoints:
    """Writes a checkpoint so that it appears at once when it is complete.

    All workers write into a folder aside, which is renamed when all have written; only then older checkpoints are
    removed. Whatever ends the run at whatever moment, the folders named `checkpoint-*` are complete. (A machine that
    loses its power may lose what its file system had not written yet.)

    Attributes:
        has_warned_of_folder: It has been said that workers do not write to one folder.
    """

    def __init__(self, host: Host, state: RunState, collectives: Collectives, hub: HubPushes) -> None:
        self._host, self._state, self._collectives, self._hub = host, state, collectives, hub
        self._aside: str | None = None  # where a checkpoint is being written
        self._push: Callable[[str], None] | None = None  # what is to be done when it is complete
        self.has_warned_of_folder = False

    # ---- Writing ----

    def output_dir(self, stock: Callable[[], str]) -> str:
        """Where the Trainer is to write."""
        return self._aside or stock()

    def save(self, output_dir: str, stock: Callable[[], None]) -> None:
        """Write one into `output_dir`. Collective.

        Args:
            output_dir: Where checkpoints go.
            stock: The Trainer's own way to write one.
        """
        args, state, folder = self._host.args, self._host.state, Path(output_dir)
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        with self._writing_aside(folder):
            stock()
        self.require_shared_folder(folder / UNFINISHED / name)
        best, written = self._best_of(output_dir), state.best_model_checkpoint
        state.best_model_checkpoint = best
        if args.should_save:
            if best != written:
                state.save_to_json(str(folder / UNFINISHED / name / TRAINER_STATE_NAME))
            _publish(folder, name)
        push, self._push = self._push, None  # it refers to the trainer, which is not to be kept alive
        if push is not None:
            self._hub.push_checkpoint(str(folder / name), push)
        limit = args.save_total_limit or 0
        if args.should_save and limit > 0:
            _rotate(folder, limit, state.best_model_checkpoint)
        self._collectives.gather(None)  # nobody goes on, perhaps to load the best checkpoint, before it has its name

    def push(self, checkpoint_folder: str, stock: Callable[[str], None]) -> None:
        """Push a checkpoint; one that is being written when it is complete, under its own name.

        Args:
            checkpoint_folder: Where it is now.
            stock: The Trainer's own way to push a folder.
        """
        if self._aside is None:
            self._hub.push_checkpoint(checkpoint_folder, stock)
        else:
            self._push = stock

    @contextlib.contextmanager
    def _writing_aside(self, folder: Path) -> Iterator[None]:
        self._aside, self._push = str(folder / UNFINISHED), None
        try:
            yield
        except Exception as error:
            self._push = None
            error.add_note(f"The checkpoint is not complete; those in {folder} are. Is the disk full?")
            raise
        finally:
            self._aside = None

    def require_shared_folder(self, aside: Path) -> None:
        """Once all have written, see whether rank 0 has it all; say so if not, and clear away the rest. Collective."""
        args, gather = self._host.args, self._collectives.gather
        gather(None)  # all have written
        written = gather(set(os.listdir(aside)) if aside.is_dir() else set())
        apart = [rank for rank, files in enumerate(written) if files and files.isdisjoint(written[0])]
        if self._host.rank in apart and not args.should_save:
            shutil.rmtree(aside.parent, ignore_errors=True)
        if apart and self._host.is_first and not self.has_warned_of_folder:
            self.has_warned_of_folder = True
            logger.warning(
                f"The output directory of rank {', '.join(map(str, apart))} is not that of rank 0, so the checkpoints "
                "have the optimizer and random states of the others alone, and these workers resume with rank 0's. A "
                "file system that all machines share keeps them all."
            )

    def _best_of(self, output_dir: str) -> str | None:
        """The best checkpoint, under the name that the Trainer gives it; it looks where this one is being written."""
        state = self._host.state
        step = state.best_global_step
        if not step or self._host.args.save_strategy == SaveStrategy.NO:
            return state.best_model_checkpoint
        best = os.path.join(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        is_there = step == state.global_step or os.path.exists(best)
        return best if is_there else state.best_model_checkpoint

    def save_optimizer(self, output_dir: str) -> None:
        """Beside what rank 0 writes, the optimizer's state of every other worker."""
        rank = self._host.rank
        if rank > 0:
            os.makedirs(output_dir, exist_ok=True)
            torch.save(self._host.optimizer.state_dict(), os.path.join(output_dir, optimizer_name(rank)))

    def keep_best_alone(self, trial: Any) -> None:
        """At the end of training, with `save_total_limit=1`: remove the others, as the Trainer would file by file."""
        args, best_of_all = self._host.args, self._host.state.best_model_checkpoint
        if args.should_save and best_of_all is not None and args.save_total_limit == 1:
            folder, best = Path(self._host.output_dir(trial)), Path(best_of_all).resolve()
            others = [place for place in sort_checkpoints(str(folder)) if Path(place).resolve() != best]
            _remove(folder, others if best.is_dir() else [])

    # ---- Resuming ----

    def find(self, wanted: str | bool | None) -> str | None:
        """The checkpoint that all workers are to go on from, as the Trainer's `train` is asked for it. Collective.

        Args:
            wanted: A folder; True for the latest in the output directory.

        Raises:
            ValueError: There is none; or workers would go on from different steps, or some from none.
            RuntimeError: So it is for another worker; with its rank.
        """

        def look() -> tuple[str | None, Resumed | None]:
            folder = get_last_checkpoint(self._host.folder) if wanted is True else wanted or None
            if wanted is True and folder is None:
                raise ValueError(f"No valid checkpoint found in output directory ({self._host.folder})")
            return folder, Resumed.read(folder)

        folder, resumed = together(look, self._collectives.gather, "find its checkpoint")
        steps = self._collectives.gather(_place(folder, resumed))
        if len(set(steps)) > 1:
            places = ", ".join(f"rank {rank} from {step}" for rank, step in enumerate(steps))
            raise ValueError(
                f"Workers would not go on from the same: {places}. Give all of them the same checkpoint as "
                "`resume_from_checkpoint`, in a folder that all can read or in copies of it."
            )
        return folder

    def resume(self, checkpoint: str | None, trial: Any) -> None:
        """Find out what training goes on from, and clear away what a killed run has left. Before all workers meet."""
        self._state.resumed = Resumed.read(checkpoint)
        if self._host.args.should_save and not self._state.is_outside:  # the others may be writing just now
            folder = Path(self._host.output_dir(trial))
            for replaced in (folder / UNFINISHED).glob(f"{_REPLACED}-*"):
                place = folder / replaced.name.split("-", 2)[2]
                if not place.exists():  # killed before what was to replace it had its name
                    replaced.rename(place)
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)

    def load_optimizer(self, checkpoint: str | None, stock: Callable[[], None]) -> None:
        """As the Trainer's `_load_optimizer_and_scheduler`, with this worker's own optimizer state. Collective.

        Raises:
            ValueError: A file cannot be read, or has numbers that are not finite.
            RuntimeError: So it is for another worker; with its rank.
        """
        if checkpoint is None:
            return
        resumed = self._state.resumed
        file = resumed.optimizer_file(self._host.rank) if resumed is not None else None

        def load() -> None:
            with readable(checkpoint, [OPTIMIZER_NAME, SCHEDULER_NAME, *([file.name] if file is not None else [])]):
                with on_plain_cpu(self._host.args):
                    stock()
                if file is not None:
                    self._host.optimizer.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
            _require_finite(self._host.optimizer, file or Path(checkpoint, OPTIMIZER_NAME))

        together(load, self._collectives.gather, "read its checkpoint")

    def load_model(self, checkpoint: str, stock: Callable[[], None]) -> None:
        """As the Trainer's `_load_from_checkpoint`. Collective.

        Raises:
            ValueError: A file cannot be read.
            RuntimeError: So it is for another worker; with its rank.
        """

        def load() -> None:
            with readable(checkpoint, _OF_MODEL):
                stock()

        together(load, self._collectives.gather, "read its checkpoint")

    def load_random_state(self, checkpoint: str | None, stock: Callable[[], None]) -> None:
        """As the Trainer's `_load_rng_state`.

        Raises:
            ValueError: The file cannot be read.
        """
        name = f"rng_state_{self._host.rank}.pth" if self._host.world_size > 1 else "rng_state.pth"
        with readable(checkpoint, [name]):
            stock()

    def say_what_is_resumed(self) -> None:
        """Tell what another number of workers than in the checkpoint means."""
        resumed, workers = self._state.resumed, self._host.world_size
        if resumed is None or resumed.workers == workers or not self._host.is_first:
            return
        unused = ", ".join(map(str, range(workers, resumed.workers)))
        states = f"those of rank {unused} are not used" if unused else "new workers begin with those of the old in turn"
        logger.warning(
            f"{workers} worker(s) go on from step {resumed.global_step} (epoch {resumed.epoch:.4g}) of "
            f"{resumed.workers}. Optimizer states: {states}. Training ends at step {self._host.state.max_steps}, and "
            "the learning rate's schedule fits that; what of the epoch has been used is not used again."
        )


def _place(folder: str | None, resumed: Resumed | None) -> str:
    """What a worker goes on from, for people."""
    if folder is None:
        return "no checkpoint"
    if resumed is not None:
        return f"step {resumed.global_step}"
    return f"{folder}, which {'has no state of a Trainer' if os.path.isdir(folder) else 'is not there'}"


def _require_finite(optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Refuse moments that would make a worker's weights NaN in its first step, and by the exchange those of all.

    Raises:
        ValueError: Some numbers are not finite.
    """
    for number, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            is_real = isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
            if is_real and not bool(torch.isfinite(value).all()):
                raise ValueError(
                    f"{file} has numbers that are not finite (NaN or infinity) in {name!r} of parameter {number}: the "
                    "weights would become so, too. Resume from another checkpoint; or remove the file, to go on with "
                    "rank 0's optimizer state, or without that, with a new one."
                )


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
