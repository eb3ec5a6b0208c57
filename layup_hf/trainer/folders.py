"""The folders of checkpoints: complete under their names, everything else in one folder aside."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from .collectives import Collectives
from .host import Host

logger = logging.getLogger(__name__)

UNFINISHED = "_unfinished"
"""Folder in the output directory where a checkpoint is written. No upload takes what begins with an underscore."""

_REPLACED = "replaced"


def clear(folder: Path) -> None:
    """Clear away what a run has left aside that was killed, or that lost who was to complete a checkpoint.

    Args:
        folder: Where checkpoints go.
    """
    for replaced in (folder / UNFINISHED).glob(f"{_REPLACED}-*"):
        place = folder / replaced.name.split("-", 2)[2]
        if not place.exists():  # killed before what was to replace it had its name
            replaced.rename(place)
    for checkpoint in (folder / UNFINISHED).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        _take_name(folder, checkpoint)  # first: a worker that is slow and not dead cannot give it one any more
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


def publish(folder: Path, name: str) -> None:
    """Give a complete checkpoint its name. What had it goes only then."""
    aside, place = folder / UNFINISHED, folder / name
    if place.exists():
        place.rename(aside / f"{_REPLACED}-{uuid.uuid4().hex}-{name}")
    (aside / name).rename(place)
    shutil.rmtree(aside, ignore_errors=True)


def rotate(folder: Path, limit: int, best: str | None) -> None:
    """Remove the oldest checkpoints beyond `limit`, as the Trainer does: not the latest, not the best."""
    checkpoints = sort_checkpoints(str(folder), use_mtime=True)
    kept = {Path(place).resolve() for place in (checkpoints[-1], best) if place is not None}
    removable = [checkpoint for checkpoint in checkpoints if Path(checkpoint).resolve() not in kept]
    remove(folder, removable[: max(0, len(checkpoints) - max(limit, len(kept)))])


def remove(folder: Path, checkpoints: Sequence[str]) -> None:
    """Remove checkpoints, each at once: what is left of one after a kill no longer has its name.

    As in the Trainer, what cannot be removed stays, and ends no training.
    """
    for checkpoint in checkpoints:
        (folder / UNFINISHED).mkdir(exist_ok=True)
        _take_name(folder, Path(checkpoint))
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


def _take_name(folder: Path, checkpoint: Path) -> None:
    """Put it aside under another name, if that can be."""
    with contextlib.suppress(OSError):
        checkpoint.rename(folder / UNFINISHED / f"removed-{uuid.uuid4().hex}")


class SharedFolder:
    """Whether all workers write into one folder, as far as that shows.

    Attributes:
        has_warned: It has been said that they do not.
    """

    def __init__(self, host: Host, collectives: Collectives) -> None:
        self._host, self._collectives = host, collectives
        self.has_warned = False

    def require(self, aside: Path) -> list[int]:
        """Once all have written, see whether rank 0 has it all; say so if not, and clear away the rest. Collective.

        Returns:
            The ranks whose files are elsewhere.
        """
        args, gather = self._host.args, self._collectives.gather
        gather(None)  # all have written
        written = gather(set(os.listdir(aside)) if aside.is_dir() else set())
        apart = [rank for rank, files in enumerate(written) if files and files.isdisjoint(written[0])]
        if self._host.rank in apart and not args.should_save:
            shutil.rmtree(aside.parent, ignore_errors=True)
        if apart and self._host.is_first and not self.has_warned:
            self.has_warned = True
            logger.warning(
                f"The output directory of rank {', '.join(map(str, apart))} is not that of rank 0, so the checkpoints "
                "have the optimizer and random states of the others alone, and these workers resume with rank 0's. A "
                "file system that all machines share keeps them all."
            )
        return apart
