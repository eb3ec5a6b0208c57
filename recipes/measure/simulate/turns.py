"""Whose turn it is to be offered to, as `layup_hf.gossip.turns` says, for many workers at once."""

from __future__ import annotations

import numpy as np

from layup_hf.gossip.turns import WIDER_AFTER


class ManyTurns:
    """The `Turns` of all workers as arrays. Axes: b blocks, w workers, p neighbours of a worker.

    Args:
        blocks, workers, neighbours: Their numbers.
    """

    def __init__(self, blocks: int, workers: int, neighbours: int) -> None:
        shape = (blocks, workers, neighbours)
        self._since = np.full(shape, -1, dtype=np.int64)  # own merges when each was last offered to
        self._last = np.broadcast_to(np.arange(neighbours), shape).copy()  # when, in order; at first the nearest first
        self._clock = neighbours
        self._merges, self._in_time = np.zeros(shape[:2], dtype=np.int64), np.zeros(shape[:2], dtype=np.int64)
        self._at_once = np.ones(shape[:2], dtype=np.int64)

    def due(self, blocks: np.ndarray, workers: np.ndarray, eligible: np.ndarray) -> np.ndarray:
        """Whom each block of these workers may be offered to now: bool of shape (entries, p).

        Args:
            blocks, workers: Each pair at most once.
            eligible: Who has taken the last offer, of the same shape.
        """
        are_taken, has_offered = eligible.all(axis=1), (self._since[blocks, workers] >= 0).any(axis=1)
        in_time = np.where(are_taken, self._in_time[blocks, workers] + has_offered, 0)
        at_once = np.where(are_taken, self._at_once[blocks, workers], 1) + (in_time == WIDER_AFTER)
        self._in_time[blocks, workers] = in_time % WIDER_AFTER
        self._at_once[blocks, workers] = at_once = np.minimum(at_once, max(eligible.shape[1], 1))
        has_merged = (eligible | (self._merges[blocks, workers][:, None] > self._since[blocks, workers])).all(axis=1)
        turns = np.where(are_taken, at_once, has_merged)
        order = np.where(eligible, self._last[blocks, workers], np.iinfo(np.int64).max).argsort(axis=1).argsort(axis=1)
        return eligible & (order < turns[:, None])

    def note_offered(self, blocks: np.ndarray, workers: np.ndarray, places: np.ndarray) -> None:
        """Blocks have been offered to these of their workers' neighbours. Of one block, in the order of their turns."""
        b, w = blocks, workers
        self._since[b, w, places] = self._merges[b, w]
        order = np.argsort(self._last[b, w, places], kind="stable")
        self._last[b[order], w[order], places[order]] = self._clock + np.arange(len(order))
        self._clock += len(order)

    def note_merged(self, blocks: np.ndarray, workers: np.ndarray) -> None:
        """Each of these has been merged with a peer's once."""
        np.add.at(self._merges, (blocks, workers), 1)
