"""Whose turn it is to be offered to, as `layup_hf.gossip.turns` says, for many workers at once."""

from __future__ import annotations

import numpy as np

from layup_hf.gossip.turns import PATIENCE, WIDER_AFTER

_NEVER = np.iinfo(np.int64).max // (2 * PATIENCE)


class ManyTurns:
    """The `Turns` of all workers as arrays. Axes: b blocks, w workers, p neighbours of a worker.

    Args:
        blocks, workers, neighbours: Their numbers.
    """

    def __init__(self, blocks: int, workers: int, neighbours: int) -> None:
        shape = (blocks, workers, neighbours)
        self._is_offered = np.zeros(shape, dtype=bool)  # and not seen to be taken
        self._since, self._when = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)  # merges, and asked
        self._waits = np.full(shape, _NEVER)
        self._last = np.broadcast_to(np.arange(neighbours), shape).copy()  # in which order; at first the nearest first
        self._clock = neighbours
        self._merges, self._asked, self._in_time = (np.zeros(shape[:2], dtype=np.int64) for _ in range(3))
        self._at_once = np.ones(shape[:2], dtype=np.int64)

    def due(self, blocks: np.ndarray, workers: np.ndarray, eligible: np.ndarray) -> np.ndarray:
        """Whom each block of these workers may be offered to now: bool of shape (entries, p).

        Args:
            blocks, workers: Each pair at most once.
            eligible: Who has taken the last offer, of the same shape.
        """
        at = (blocks, workers)
        self._asked[at] += 1
        waited = self._asked[at][:, None] - self._when[at]
        self._waits[at] = waits = np.where(self._is_offered[at] & eligible, waited, self._waits[at])
        self._is_offered[at] = is_offered = self._is_offered[at] & ~eligible
        usual, are_taken = waits.min(axis=1), eligible.all(axis=1)
        in_time = np.where(are_taken, self._in_time[at] + (usual < _NEVER), 0)
        at_once = np.where(are_taken, self._at_once[at], 1) + (in_time == WIDER_AFTER)
        self._in_time[at] = in_time % WIDER_AFTER
        self._at_once[at] = at_once = np.minimum(at_once, max(eligible.shape[1], 1))
        is_slow = (self._merges[at][:, None] > self._since[at]) | (waited > PATIENCE * usual[:, None])
        turns = np.where(are_taken, at_once, (is_slow | ~is_offered).all(axis=1))
        order = np.where(eligible, self._last[at], np.iinfo(np.int64).max).argsort(axis=1).argsort(axis=1)
        return eligible & (order < turns[:, None])

    def note_offered(self, blocks: np.ndarray, workers: np.ndarray, places: np.ndarray) -> None:
        """Blocks have been offered to these of their workers' neighbours. Of one block, in the order of their turns."""
        at = (blocks, workers, places)
        self._is_offered[at] = True
        self._since[at], self._when[at] = self._merges[blocks, workers], self._asked[blocks, workers]
        order = np.argsort(self._last[at], kind="stable")
        self._last[blocks[order], workers[order], places[order]] = self._clock + np.arange(len(order))
        self._clock += len(order)

    def note_merged(self, blocks: np.ndarray, workers: np.ndarray) -> None:
        """Each of these has been merged with a peer's once."""
        np.add.at(self._merges, (blocks, workers), 1)
