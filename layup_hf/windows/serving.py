"""Writes this worker's blocks into the memory of peers that have asked for them."""

from __future__ import annotations

import contextlib
import math
import secrets
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..device import Mark, Queues
from .coders import make_coder
from .coding import factors
from .layout import Layout, Pieces
from .peers import Peer
from .transport import Transport
from .wire import Answer, Request


class Serving:
    """Answers one request of each peer at a time.

    A block that goes as it is goes from where it lies, live. One that is converted or coded, or lies where the network
    does not reach, goes through a buffer with room for the largest, for one peer after the other. A peer that falls
    silent keeps the buffer that it is being written from, and another stands in for it.

    Args:
        layout: How blocks lie in the peers' slots.
        transport: Writes.
        queues: Of the blocks' device. What is copied there or from there, is so beside the computation.
    """

    def __init__(self, layout: Layout, transport: Transport, queues: Queues) -> None:
        self.layout, self._transport, self._queues = layout, transport, queues
        self._coder = make_coder(layout.device, secrets.randbits(60)) if layout.bits else None
        self._buffer = layout.new_sending_buffer()
        if self._buffer is not None:
            transport.register([self._buffer])
        self._room = layout.new_coding_room() if layout.on_host and layout.bits else None
        self._holder: Peer | None = None  # who is being written to from the buffer, or is about to be
        self._content: Request | None = None  # what it was filled for
        self._filled: Mark | None = None

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
        if self._buffer is None or (layout.goes_live and not wanted.steps):
            return layout.live_pieces(wanted.block)
        if self._holder not in (None, peer) and not self._leave_behind(self._holder, now):
            return None
        if self._holder is None or self._content is not wanted:  # it may have asked for another one meanwhile
            self._holder, self._content, self._filled = peer, wanted, None
            if wanted.steps:
                self._code(wanted, self._buffer)
            else:
                self._copy(wanted.block, self._buffer)
        if self._filled is not None and not self._filled.is_done():
            return None
        address = self._buffer.data_ptr()
        if not wanted.steps:
            return layout.pieces(address, wanted.block)
        if layout.on_host:
            return layout.coded_pieces(address, wanted.block)
        return layout.coded_source(address, wanted.block)

    def _begin(self, peer: Peer, wanted: Request, source: Pieces) -> Any:
        if wanted.key not in peer.keys:
            self._transport.accept_key(wanted.key, peer.name)
            peer.keys.add(wanted.key)
        pieces = self.layout.coded_pieces if wanted.steps else self.layout.pieces
        return self._transport.write(peer.name, source, pieces(wanted.address, wanted.block), wanted.device)

    def _code(self, wanted: Request, buffer: Tensor) -> None:
        """Put the live block into the buffer, in as few bits as is wanted."""
        assert self._coder is not None
        steps, begin = np.array(wanted.steps, dtype=np.float32), 0
        multipliers = factors(wanted.seed)
        live = self.layout.live(wanted.block)
        coded = self.layout.coded_views(buffer if self._room is None else self._room, wanted.block)
        for tensor, place in zip(live, coded, strict=True):
            if place is not None:
                plan, into = place
                own = np.ascontiguousarray(steps[begin : begin + plan.parts])
                if not self._coder.encode(plan, tensor, own, multipliers, into):  # on a GPU this waits for what it does
                    raise _MisfitError
                begin += plan.parts
        if self._room is not None:
            first, size = self.layout.spans(wanted.block, is_coded=True)[0]
            views = self.layout.views(buffer, wanted.block)
            rest = [(view, tensor) for view, tensor, place in zip(views, live, coded, strict=True) if place is None]
            self._fill([(buffer[first : first + size], self._room[:size]), *rest])

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

    def _copy(self, block: int, buffer: Tensor) -> None:
        """Put the live block into the buffer, as it is to be on its way."""
        self._fill(list(zip(self.layout.views(buffer, block), self.layout.live(block), strict=True)))

    def _fill(self, copies: list[tuple[Tensor, Tensor]]) -> None:
        """Begin to copy into the buffer.

        Args:
            copies: To where, and from where.
        """
        with torch.no_grad(), self._queues.copying():
            for place, tensor in copies:
                place.copy_(tensor, non_blocking=self.layout.is_pinned)
        self._filled = self._queues.mark_copies()

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
