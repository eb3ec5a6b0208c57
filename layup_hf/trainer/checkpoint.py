"""Checkpoints that are whole or not there."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, sort_checkpoints
from transformers.utils import logging

from ..blocks.snapshot import Snapshot, owners_of
from ..disk import advice
from ..windows.opening import together
from .background import BackgroundCheckpoint, parts_of
from .blockwise import BlockwiseModel
from .collectives import Collectives
from .folders import UNFINISHED, SharedFolder, clear, publish, remove, rotate
from .hollow import Deferral
from .host import Host
from .hub import HubPushes
from .readers import who_reads
from .resumed import optimizer_name
from .state import RunState

logger = logging.get_logger(__name__)

_NOTABLE = 0.1  # seconds of waiting that are worth a line


class Written(NamedTuple):
    """What a checkpoint has taken.

    Attributes:
        name: Of the checkpoint.
        standing: Seconds that this worker stood still for it.
        writing: Seconds until it was complete.
    """

    name: str
    standing: float
    writing: float


class Checkpoints:
    """Writes a checkpoint so that it appears at once when it is complete.

    All workers write into a folder aside, which is renamed when all have written; only then older checkpoints are
    removed. Whatever ends the run at whatever moment, the folders named `checkpoint-*` are complete. (A machine that
    loses its power may lose what its file system had not written yet.)

    With `checkpoints="background"` only what is small is written while the workers stand still. Files of tensors are
    laid out, and filled while training goes on, from a snapshot (see `Snapshot`, `Deferral`, `BackgroundCheckpoint`).

    Attributes:
        latest: What the latest complete checkpoint has taken, as this worker knows it.
    """

    def __init__(
        self,
        host: Host,
        state: RunState,
        collectives: Collectives,
        hub: HubPushes,
        model: BlockwiseModel,
    ) -> None:
        self._host, self._state, self._collectives, self._hub, self._model = host, state, collectives, hub, model
        self._shared = SharedFolder(host, collectives)
        self._aside: str | None = None  # where a checkpoint is being written
        self._push: Callable[[str], None] | None = None  # what is to be done when it is complete
        self._present: BackgroundCheckpoint | None = None  # is being written in the background
        self._known_reader: str | None = None
        self._folder = ""  # where the latest one is
        self.latest: Written | None = None

    # ---- Writing ----

    def output_dir(self, stock: Callable[[], str]) -> str:
        """Where the Trainer is to write."""
        return self._aside or stock()

    def save(self, output_dir: str, stock: Callable[[], None]) -> None:
        """Write one into `output_dir`. Collective.

        Args:
            output_dir: Where checkpoints go.
            stock: The Trainer's own way to write one.

        Raises:
            CheckpointFailed: The one before could not be written in the background.
            RuntimeError: So it is for another worker.
        """
        begin = time.perf_counter()
        self.finish()
        self._folder = output_dir
        name = f"{PREFIX_CHECKPOINT_DIR}-{self._host.state.global_step}"
        if self._is_for_background():
            self._present = self._begin(output_dir, name, stock)
            self._present.standing = standing = time.perf_counter() - begin
            self._present.start()
        else:
            self._write(output_dir, name, stock)
            standing = time.perf_counter() - begin
            self.latest = Written(name, standing, standing)
            logger.info(f"{name} is complete: all workers stood still for {standing:.3f} s for it.")
        if self._present is not None or self._host.world_size > 1:
            self._host.log({"layup/checkpoint_standing": standing})

    def _write(self, output_dir: str, name: str, stock: Callable[[], None]) -> None:
        """All of it now. Collective."""
        args, state, folder = self._host.args, self._host.state, Path(output_dir)
        with _told_why(folder):
            with self._writing_aside(folder):
                stock()
            self._shared.require(folder / UNFINISHED / name)
            state.best_model_checkpoint = self._note_best(output_dir, name)
            if args.should_save:
                publish(folder, name)
        push, self._push = self._push, None  # it refers to the trainer, which is not to be kept alive
        if push is not None:
            self._hub.push_checkpoint(str(folder / name), push)
        limit = args.save_total_limit or 0
        if args.should_save and limit > 0:
            rotate(folder, limit, state.best_model_checkpoint)
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
        except Exception:
            self._push = None
            raise
        finally:
            self._aside = None

    def _note_best(self, output_dir: str, name: str) -> str | None:
        """The best checkpoint, this one or another; written into this one's state."""
        state = self._host.state
        best, written = self._best_of(output_dir), state.best_model_checkpoint
        if self._host.args.should_save and best != written:
            state.best_model_checkpoint = best
            state.save_to_json(os.path.join(output_dir, UNFINISHED, name, TRAINER_STATE_NAME))
        return best

    def _best_of(self, output_dir: str) -> str | None:
        """The best checkpoint, under the name that the Trainer gives it; it looks where this one is being written."""
        state = self._host.state
        step = state.best_global_step
        if not step or self._host.args.save_strategy == SaveStrategy.NO:
            return state.best_model_checkpoint
        best = os.path.join(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        is_there = step == state.global_step or os.path.exists(best)
        return best if is_there else state.best_model_checkpoint

    def note_late_best(self) -> None:
        """The checkpoint of this step is the best, as its metrics say, which have come after it."""
        state, present = self._host.state, self._present
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        best = os.path.join(self._folder, name)
        if state.best_global_step != state.global_step:
            return
        if present is not None and present.name == name:
            present.best = best  # it is when it is complete
        elif os.path.exists(best):
            state.best_model_checkpoint = best

    def save_optimizer(self, output_dir: str) -> None:
        """Beside what rank 0 writes, the optimizer's state of every other worker."""
        rank = self._host.rank
        if rank > 0:
            os.makedirs(output_dir, exist_ok=True)
            torch.save(self._host.optimizer.state_dict(), os.path.join(output_dir, optimizer_name(rank)))

    # ---- In the background ----

    def _is_for_background(self) -> bool:
        """Whether a checkpoint is to be written while training goes on; the same for all workers. Collective."""
        is_wanted = self._host.options.checkpoints == "background"
        reader = who_reads(self._host.kind, self._host.callbacks.callbacks) if is_wanted else None
        found: list[tuple[bool, str | None]] = self._collectives.gather((is_wanted, reader))
        reader = next((name for _, name in found if name is not None), None)
        if found[0][0] and reader is not None and reader != self._known_reader and self._host.is_first:
            logger.warning(
                f"LayUp: workers wait until a checkpoint is written, although `checkpoints` is 'background': {reader}, "
                "which finds it complete."
            )
        self._known_reader = reader
        return found[0][0] and reader is None

    def _begin(self, output_dir: str, name: str, stock: Callable[[], None]) -> BackgroundCheckpoint:
        """Write what is small; what is left to be written. Collective."""
        host, state, folder = self._host, self._host.state, Path(output_dir)
        aside = folder / UNFINISHED
        best_before = state.best_model_checkpoint
        snapshots = self._model.snapshots
        snapshots.present = snapshot = Snapshot(owners_of(host.model, self._model.blocks, self._model.optimizer.state))
        deferral = Deferral(aside / name, parts_of(aside, host.rank, name), snapshot)
        try:
            with _told_why(folder), self._writing_aside(folder), deferral.deferring():
                stock()
            if host.rank in self._shared.require(aside / name) and not host.args.should_save:
                deferral.files.clear()
            best = self._note_best(output_dir, name)
            writes = self._collectives.gather(bool(deferral.files))
        except BaseException:
            snapshots.end()
            raise
        finally:
            state.best_model_checkpoint = best_before  # until the new one is complete: see `finish`
        push, self._push = self._push, None
        if push is not None:
            push = functools.partial(self._push_of, state.global_step, state.epoch, push)
        return BackgroundCheckpoint(
            folder,
            name,
            host.rank,
            len(writes),
            deferral.files,
            snapshots,
            awaited=[rank for rank, some in enumerate(writes) if some] if host.args.should_save else None,
            limit=host.args.save_total_limit or 0,
            best=best,
            push=push,
        )

    def _push_of(self, step: int, epoch: Any, push: Callable[[str], None], place: str) -> None:
        """Push a checkpoint that has become complete, as when it was taken: the Trainer names it by its state."""
        state = self._host.state
        now = state.global_step, state.epoch
        state.global_step, state.epoch = step, epoch
        try:
            self._hub.push_checkpoint(place, push)
        finally:
            state.global_step, state.epoch = now

    def attend(self) -> None:
        """Before a step: do what is to be done on this thread for the checkpoint in the background. Waits for nothing.

        Raises:
            CheckpointFailed: This worker could not write its part.
        """
        if self._present is not None:
            self._present.attend()

    def finish(self) -> None:
        """Wait until the checkpoint in the background is complete, if there is one. Collective.

        Raises:
            CheckpointFailed: This worker could not write its part.
            RuntimeError: Another one could not.
        """
        begin, present = time.perf_counter(), self._present
        if present is not None:
            present.wait_for_own()
        found: list[tuple[str, bool] | None] = self._collectives.gather(
            (present.name, present.completes) if present is not None else None
        )
        known = [each for each in found if each is not None]
        if not known:
            return

        is_orphan = not any(completes for _, completes in known)  # who was to complete it is gone

        def complete() -> str | None:
            if present is not None:
                present.finish(len(known))  # who have all written
            if self._host.args.should_save and (is_orphan or (present is not None and present.is_abandoned)):
                clear(present.folder if present is not None else Path(self._host.folder))
            return present.name if present is not None and present.is_published else None

        name = together(complete, self._collectives.gather, "write its checkpoint")
        published: list[str | None] = self._collectives.gather(name)
        self._present = None  # not before: if some are gone meanwhile, the others come here once more
        if present is not None and present.name in published:
            self._host.state.best_model_checkpoint = present.best
            self.latest = Written(present.name, present.standing, present.seconds)
        waited = time.perf_counter() - begin
        if waited > _NOTABLE and self._host.is_first:
            logger.warning(
                f"LayUp: all workers waited {waited:.2f} s for {known[0][0]} to be written in the background."
            )

    def end(self) -> None:
        """Training ends, perhaps with an error: complete what is being written, if the others do, too."""
        present, self._present = self._present, None
        if present is not None:
            present.wait()
        self._model.snapshots.end()  # of one that was interrupted before it was begun

    # ---- At the end ----

    def keep_best_alone(self, trial: Any) -> None:
        """At the end of training, with `save_total_limit=1`: remove the others, as the Trainer would file by file."""
        args, best_of_all = self._host.args, self._host.state.best_model_checkpoint
        if args.should_save and best_of_all is not None and args.save_total_limit == 1:
            folder, best = Path(self._host.output_dir(trial)), Path(best_of_all).resolve()
            others = [place for place in sort_checkpoints(str(folder)) if Path(place).resolve() != best]
            remove(folder, others if best.is_dir() else [])


@contextlib.contextmanager
def _told_why(folder: Path) -> Iterator[None]:
    """Where writing a checkpoint fails, say what that means, and if it is the disk's fault what helps."""
    try:
        yield
    except Exception as error:
        why = advice(error, folder)
        error.add_note(f"The checkpoint is not complete; those in {folder} are." + (f" {why}." if why else ""))
        raise
