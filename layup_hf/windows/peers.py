"""What the courier knows of one peer."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from . import wire
from .staging import Slot

_FIRST_RETRY, _LONGEST_RETRY = 0.5, 2.0  # seconds
_PATIENCE = 3.0  # seconds


@dataclass(eq=False)
class Peer:
    """A worker on another host, and what is under way between it and this one.

    Attributes:
        rank: Its rank.
        name: Of its NIXL agent.
        address: How to connect to it.
        is_connected, is_excluded: Whether it can be talked to now; whether it never will be again.
        is_known: Whether NIXL still has its connection, if only as a write on it has not ended.
        was_lost: Whether the connection has ever broken.
        retry_at: When to connect again.
        sent, heard: Sequence numbers of the last message to it, and of the last one from it that was accepted.
        settled: How often it had settled when it last reported.
        told, told_scalars: What it has last been told of each block, and of this worker.
        steps_at, whole_at: When to report steps, and when to report everything, at the latest.
        requests: Number of the last request to it.
        asked_at: When that was sent.
        heard_at: When the last message from it came.
        connected_at: When it was connected.
        request: The slot that it has been asked to write.
        aside: The same, if it has been lost or silent since, so that another slot stands in for it.
        wanted: What it asks for, until that has been written.
        wanted_number: Number of the last request from it.
        answer: To that, once it has been given.
        write: Handle of the write to it that is under way.
        buffer: What that goes out from, if another buffer stands in for it.
        keys: Memory of it that this worker can write to.
    """

    rank: int
    name: str
    address: bytes
    is_connected: bool = True
    is_known: bool = True
    is_excluded: bool = False
    was_lost: bool = False
    retry_at: float = 0.0
    _retry_after: float = _FIRST_RETRY
    sent: int = 0
    heard: int = 0
    settled: int = 0
    told: np.ndarray | None = None
    told_scalars: tuple[int, int] = (0, 0)
    steps_at: float = 0.0
    whole_at: float = 0.0
    requests: int = 0
    asked_at: float = 0.0
    heard_at: float = 0.0
    connected_at: float = field(default_factory=lambda: time.monotonic())
    request: Slot | None = None
    aside: Slot | None = None
    wanted: wire.Request | None = None
    wanted_number: int = 0
    answer: wire.Answer | None = None
    write: Any = None
    buffer: Tensor | None = None
    keys: set[bytes] = field(default_factory=set)

    def is_silent(self, now: float) -> bool:
        """Whether it may be frozen, or its connection cut: a worker reports at least every second."""
        return now - max(self.heard_at, self.connected_at) > _PATIENCE

    @property
    def is_idle(self) -> bool:
        """Whether it may be asked for a block."""
        return self.is_connected and self.request is None and self.aside is None

    def wait_before_retry(self, now: float) -> None:
        """Set when to connect again: each time later, but for one that has lasted."""
        if now - self.retry_at > 2 * _LONGEST_RETRY:
            self._retry_after = _FIRST_RETRY
        self.retry_at = now + self._retry_after
        self._retry_after = min(2 * self._retry_after, _LONGEST_RETRY)


class Postmark:
    """Makes and reads the messages of one worker.

    Args:
        token: The job's secret.
        job: 16 bytes that name the job.
        rank: This worker.
        world_size: Number of workers.
        num_blocks: Number of blocks of the model.
    """

    def __init__(self, token: bytes, job: bytes, rank: int, world_size: int, num_blocks: int) -> None:
        self._token, self._job, self._rank = token, job, rank
        self._world_size, self._num_blocks = world_size, num_blocks

    def encode(self, content: wire.Content, peer: Peer) -> bytes:
        """The next message to a peer."""
        peer.sent += 1
        return wire.encode(
            content, token=self._token, job=self._job, sender=self._rank, receiver=peer.rank, sequence=peer.sent
        )

    def decode(self, message: bytes) -> wire.Message:
        """What a message says; raises `wire.RefusedError`."""
        return wire.decode(
            message,
            token=self._token,
            job=self._job,
            receiver=self._rank,
            world_size=self._world_size,
            num_blocks=self._num_blocks,
        )
