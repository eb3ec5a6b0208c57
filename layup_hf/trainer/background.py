"""A checkpoint that is written while training goes on."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..blocks.snapshot import Snapshots
from ..disk import advice, why_not_written
from .folders import UNFINISHED, publish, rotate
from .hollow import HollowFile

logger = logging.getLogger(__name__)

_POLL = 0.02  # seconds between two looks at whether others have written theirs, in the beginning
_POLL_SHARE = 0.05  # of the time that has passed: a file system in a network is not to be asked for ever more often
_POLL_MOST = 0.5
_PATIENCE = 300.0  # seconds without a sign of another worker's writing, after which it is not waited for any more
_PATIENCE_AT_END = 45.0  # the same, where the other worker may be gone; a network's file system shows marks late
_PATIENCE_WITH_GONE = 1.0  # the same, where it is known that some worker is gone


def parts_of(aside: Path, rank: int, name: str) -> Path:
    """The folder in which a worker has the files that it is still writing.

    It has the checkpoint's name, as the marks have: a worker that the others have done without, and that is only slow,
    finds nothing of theirs, and leaves nothing that they would take for their own.

    Args:
        aside: Where unfinished checkpoints are.
        rank: The worker's, when the checkpoint was taken.
        name: Of the checkpoint.
    """
    return aside / f"parts-{rank}-of-{name}"


class CheckpointFailed(RuntimeError):
    """A checkpoint could not be written in the background."""


class BackgroundCheckpoint:
    """What one worker does for a checkpoint after the meeting, by a thread of its own.

    Each worker fills its files from a snapshot and leaves a mark beside the folder, which is aside. When rank 0 finds
    the marks of all it gives the folder its name, and only then removes older checkpoints. Nobody needs a collective
    for that: workers are elsewhere.

    Args:
        folder: Where checkpoints go.
        name: Of this one.
        rank: This worker's, when the checkpoint was taken.
        workers: How many there were then.
        files: What it has to fill.
        snapshots: Has what they are filled from, until they are.
        awaited: Whose marks are needed, on the worker that completes the checkpoint; None on the others.
        limit: At most so many checkpoints are kept, if not 0.
        best: The best one, which is kept; this one, or another.
        push: What is to be done with the complete folder, on the training thread.

    Attributes:
        folder: Where checkpoints go.
        name: Of the checkpoint.
        standing: Seconds that the workers stood still for it. Set by who makes it.
        seconds: That writing took, until it was complete; of a worker that does not complete it, its own.
        failure: Why it could not be written.
        is_abandoned: It will never be complete, as another worker has not written its part.
        is_published: It is complete, and has its name; on the worker that completes it.
        best: The best checkpoint, when this one is complete.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        rank: int,
        workers: int,
        files: Sequence[HollowFile],
        snapshots: Snapshots,
        *,
        awaited: Sequence[int] | None,
        limit: int = 0,
        best: str | None = None,
        push: Callable[[str], None] | None = None,
    ) -> None:
        self.folder, self.name, self._rank, self._workers, self._files = folder, name, rank, workers, list(files)
        self._snapshots, self._awaited, self._limit, self.best = snapshots, awaited, limit, best
        self._push = push
        self._aside = folder / UNFINISHED
        self._patience, self._asked = _PATIENCE, 0.0
        self._begin = time.perf_counter()
        self._has_written = threading.Event()
        self._thread: threading.Thread | None = None
        self.standing = self.seconds = 0.0
        self.failure: CheckpointFailed | None = None
        self.is_abandoned = self.is_published = False

    @property
    def completes(self) -> bool:
        """Whether this worker gives it its name, when all have written."""
        return self._awaited is not None

    # ---- In the background ----

    def start(self) -> None:
        """Begin to write. The interpreter does not end before the thread has: it is no daemon."""
        self._in_thread(self._run)

    def _in_thread(self, action: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=action, name="layup-checkpoint")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._write()
            if self._awaited is not None and self._others_have_written(self._awaited):
                waits_for_push = self._push is not None  # of which the training thread takes care from here on
                publish(self.folder, self.name)
                self.is_published = True
                if not waits_for_push:
                    self._rotate()
        except Exception as error:
            if self.folder.exists() and not (self._aside / self.name).exists() and not self.is_published:
                self._abandon("the others have done without this worker, and cleared it away")
            else:
                self._fail(error)
        finally:
            self.seconds = time.perf_counter() - self._begin
            self._has_written.set()
        if self.is_published:
            logger.info(
                f"{self.name} is complete: all workers stood still for {self.standing:.3f} s for it, and it was "
                f"written in {self.seconds:.3f} s while they trained."
            )

    def _write(self) -> None:
        snapshot, has_part = self._snapshots.present, bool(self._files)
        try:
            assert snapshot is not None  # nobody else ends it
            for file in self._files:
                file.fill(snapshot)
        finally:
            self._files.clear()
            self._snapshots.end()
        if has_part:
            self._mark("written")
        self._has_written.set()

    def _mark(self, what: str) -> None:
        self._mark_of(what, self._rank).touch()

    def _mark_of(self, what: str, rank: int) -> Path:
        return self._aside / f"{what}-{rank}-of-{self.name}"

    def _fail(self, error: Exception) -> None:
        """Tell people at once; the training thread raises it at its next step."""
        text = f"{type(error).__name__}: {error}".removesuffix(".")
        remedy = advice(error, self.folder, otherwise="mend what is wrong")
        self.failure = CheckpointFailed(
            f"Rank {self._rank} could not write {self.name} in the background: {text}. It is not complete, and "
            f"will not be; the other checkpoints in {self.folder} are. {remedy}; then go on "
            "from the last of them (`resume_from_checkpoint=True`)."
        )
        self.failure.__cause__ = error
        logger.error(str(self.failure))
        with contextlib.suppress(OSError):  # without it, rank 0 sees that nothing more comes
            self._mark("failed")

    def _others_have_written(self, ranks: Sequence[int]) -> bool:
        """Wait until they have; whether it is so."""
        seen, since = None, time.monotonic()
        missing = list(ranks)
        while missing := [rank for rank in missing if not self._mark_of("written", rank).exists()]:
            failed = [rank for rank in missing if self._mark_of("failed", rank).exists()]
            signs = [_sign_of(parts_of(self._aside, rank, self.name)) for rank in missing]
            if signs != seen:
                seen, since = signs, time.monotonic()
            if failed or time.monotonic() - max(since, self._asked) > self._patience:
                self._abandon(f"rank {', '.join(map(str, failed or missing))} has not written its part")
                return False
            time.sleep(min(_POLL_MOST, max(_POLL, _POLL_SHARE * (time.perf_counter() - self._begin))))
        return True

    def _abandon(self, why: str) -> None:
        self.is_abandoned = True
        logger.warning(
            f"{self.name} is not complete, and will not be: {why}. The other checkpoints in {self.folder} are complete."
        )

    # ---- On the training thread ----

    def attend(self) -> None:
        """Do what is to be done on this thread, if it is time for it. Waits for nothing.

        Raises:
            CheckpointFailed: This worker could not write its part.
        """
        if self.failure is not None:
            raise self.failure
        if self.is_published and self._push is not None:
            push, self._push = self._push, None
            push(str(self.folder / self.name))
            self._in_thread(self._rotate)

    def _rotate(self) -> None:
        try:
            if self._limit > 0:
                rotate(self.folder, self._limit, self.best)
        except OSError as error:  # as in the Trainer: what cannot be removed stays
            why = why_not_written(error, self.folder)
            logger.warning(f"Old checkpoints in {self.folder} could not be removed: {error} ({why}).")

    def wait_for_own(self) -> None:
        """Until this worker has written its part, or failed."""
        self._has_written.wait()

    def finish(self, workers: int) -> None:
        """Wait until all is done, and what is to be pushed is. All workers that are left have written their part.

        Args:
            workers: How many of those are left that it was begun with.

        Raises:
            CheckpointFailed: This worker could not write its part.
        """
        self.wait(_PATIENCE_AT_END if workers == self._workers else _PATIENCE_WITH_GONE)
        self.attend()
        self._join()

    def wait(self, patience: float = _PATIENCE_AT_END) -> None:
        """Until this worker has written its part, and where it completes the checkpoint all have, or give no sign."""
        self._patience, self._asked = patience, time.monotonic()
        self._join()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()


def _sign_of(parts: Path) -> tuple[tuple[str, int, int], ...]:
    """What changes while a worker writes."""
    signs = []
    for root, _, names in os.walk(parts):
        for name in names:
            try:
                found = os.stat(os.path.join(root, name))
            except OSError:
                continue
            signs.append((name, found.st_mtime_ns, found.st_blocks))
    return tuple(signs)
