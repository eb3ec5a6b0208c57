"""Writes this worker's blocks into the memory of peers that have asked for them."""

from __future__ import annotations

import contextlib
import math
import secrets
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .coders import make_coder
from .coding import factors
from .layout import Layout, Pieces
from .peers import Peer
from .transport import Transport
from .wire import Answer, Request


class Serving:
    """Answers one request of each peer at a time.

    A block that goes as it is goes from where it lies, live. One that is converted or coded goes through a buffer with
    room for the largest, for one peer after the other. A peer that falls silent keeps the buffer that it is being
    written from, and another stands in for it.

    Args:
        layout: How blocks lie in the peers' slots.
        transport: Writes.
    """

    def __init__(self, layout: Layout, transport: Transport) -> None:
        self.layout, self._transport = layout, transport
        self._coder = make_coder(layout.device, secrets.randbits(60)) if layout.bits else None
        self._buffer = layout.new_sending_buffer()
        if self._buffer is not None:
            transport.register([self._buffer])
        self._holder: Peer | None = None  # who is being written to from the buffer, or is about to be
        self._converted: torch.cuda.Event | None = None

    def advance(self, peer: Peer, now: float) -> Answer | None:
        """Begin, go on with, or finish what the peer has asked for; gives the answer when it has been written, or when
        it cannot be.

        Args:
            peer: Connected.
            now: Seconds of the monotonic clock.

        Raises:
            Exception: The peer cannot be written to.
        """
        wanted = peer.wanted
        if wanted is None:
            return None
        if peer.write is None:
            try:
                source = self._source(peer, wanted, now)
            except _MisfitError:
                self._holder = peer.wanted = None
                return Answer(wanted.number, wanted.block, is_written=False)
            if source is None:
                return None
            peer.write = self._begin(peer, wanted, source)
        if not self._transport.is_written(peer.write):
            return None
        self._forget(peer)
        peer.wanted = None
        return Answer(wanted.number, wanted.block)

    def _source(self, peer: Peer, wanted: Request, now: float) -> Pieces | None:
        """Where what is to be sent lies; None: not yet.

        Raises:
            _MisfitError: It cannot be coded as is wanted.
        """
        layout = self.layout
        if self._buffer is None or not (layout.converts or wanted.steps):
            return layout.live_pieces(wanted.block)
        if self._holder not in (None, peer) and not self._leave_behind(self._holder, now):
            return None
        if wanted.steps:
            if self._holder is None:
                self._code(peer, wanted, self._buffer)
            return layout.coded_source(self._buffer.data_ptr(), wanted.block)
        if self._holder is None:
            self._convert(peer, wanted.block, self._buffer)
        if self._converted is not None and not self._converted.query():
            return None
        return layout.pieces(self._buffer.data_ptr(), wanted.block)

    def _begin(self, peer: Peer, wanted: Request, source: Pieces) -> Any:
        if wanted.key not in peer.keys:
            self._transport.accept_key(wanted.key, peer.name)
            peer.keys.add(wanted.key)
        pieces = self.layout.coded_pieces if wanted.steps else self.layout.pieces
        return self._transport.write(peer.name, source, pieces(wanted.address, wanted.block), wanted.device)

    def _code(self, peer: Peer, wanted: Request, buffer: Tensor) -> None:
        """Put the live block into the buffer, in as few bits as is wanted."""
        assert self._coder is not None
        self._holder = peer
        steps, begin = np.array(wanted.steps, dtype=np.float32), 0
        multipliers = factors(wanted.seed)
        views = self.layout.coded_views(buffer, wanted.block)
        for tensor, coded in zip(self.layout.live(wanted.block), views, strict=True):
            if coded is not None:
                plan, into = coded
                own = np.ascontiguousarray(steps[begin : begin + plan.parts])
                if not self._coder.encode(plan, tensor, own, multipliers, into):
                    raise _MisfitError
                begin += plan.parts

    def _leave_behind(self, peer: Peer, now: float) -> bool:
        """Take another buffer than the one from which a peer is being written to, if that peer is silent."""
        if not peer.is_silent(now):
            return False
        self._holder = None
        if peer.write is not None:
            peer.buffer, self._buffer = self._buffer, self.layout.new_sending_buffer()
            if self._buffer is not None:
                self._transport.register([self._buffer])
        return True

    def _convert(self, peer: Peer, block: int, buffer: Tensor) -> None:
        """Put the live block into the buffer, as it is to be on its way."""
        self._holder = peer
        with torch.no_grad():
            torch._foreach_copy_(self.layout.views(buffer, block), self.layout.live(block))
        if buffer.is_cuda:
            self._converted = torch.cuda.Event()
            self._converted.record()

    def leave(self, peer: Peer) -> None:
        """Let go of the buffer, so that others can be written to, as it may be long before this peer is again."""
        if self._holder is peer:
            self._leave_behind(peer, math.inf)

    def is_over(self, peer: Peer) -> bool:
        """Whether nothing is under way to a peer any more. Until then NIXL may not forget it: what is under way would
        go on, out of memory that is used for something else.
        """
        ended = True
        if peer.write is not None:
            with contextlib.suppress(Exception):  # a failure is an end, too
                ended = self._transport.is_written(peer.write)
            if ended:
                self._forget(peer)
        return ended

    def abandon(self, peer: Peer) -> None:
        """Forget what is under way to a peer, whether it has ended or not: for the end of all connections."""
        if peer.write is not None:
            with contextlib.suppress(Exception):  # what cannot be released must not keep the rest open
                self._forget(peer)

    def _forget(self, peer: Peer) -> None:
        """Give back the handle of the write to a peer, and the buffer that it went out from."""
        self._transport.release(peer.write)
        peer.write = None
        if self._holder is peer:
            self._holder = None
        if peer.buffer is not None:
            self._transport.forget(peer.buffer)
            peer.buffer = None


class _MisfitError(Exception):
    """Some number of the block is not finite, or too large for the step that it is to be coded with."""
