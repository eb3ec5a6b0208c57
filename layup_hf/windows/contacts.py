"""Connections to peers on other hosts: what breaks, and is made anew."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from .pace import Pace
from .peers import Peer
from .serving import Serving
from .staging import Staging
from .transport import Transport

logger = logging.getLogger(__name__)


class Contacts:
    """Keeps this worker in contact with its peers, and without those that are gone. Used by the courier's thread alone.

    Args:
        transport: Connections.
        staging: Where blocks arrive: what a lost peer was asked for may still be written.
        serving: What is on its way to peers.
        pace: Does not count what it takes to connect again.
    """

    def __init__(self, transport: Transport, staging: Staging, serving: Serving, pace: Pace) -> None:
        self._transport, self._staging, self._serving, self._pace = transport, staging, serving, pace

    def attempt(self, peer: Peer, action: Callable[[Peer], None]) -> None:
        """Do something that fails if the peer has gone or cannot be reached: then its connection has broken."""
        if not peer.is_connected:
            return
        try:
            action(peer)
        except Exception as error:  # NIXL's exceptions have no base of their own
            self._break(peer, error)

    def let_go(self, peer: Peer) -> None:
        """The peer may write what it was asked for at any time, or never: do not use that memory, but go on."""
        if peer.request is not None:
            peer.aside, peer.request = peer.request, None
            self._staging.replace(peer.aside)

    def mind_lost(self, peer: Peer, now: float) -> None:
        """End the old connection as soon as nothing is under way on it; after that, try a new one."""
        if peer.is_known and self._serving.is_over(peer):
            peer.is_known = False
            peer.keys.clear()
            try:
                self._transport.disconnect(peer.name)
            except Exception as error:
                logger.debug(f"LayUp: rank {peer.rank} was not connected: {error}")
        if not peer.is_known and not peer.is_excluded and now >= peer.retry_at:
            with self._pace.uncounted():
                self._reconnect(peer)

    def drop(self, peer: Peer) -> None:
        """Have no more to do with a peer."""
        if not peer.is_excluded:
            peer.is_excluded = True
            self._staging.discard(peer.rank)
            self._leave(peer)

    def _break(self, peer: Peer, error: Exception) -> None:
        """The peer has gone, or the way to it."""
        if not peer.was_lost:
            logger.warning(
                f"LayUp: the connection to rank {peer.rank} has broken ({type(error).__name__}: {error}). It is tried "
                "again until the worker is done without."
            )
            peer.was_lost = True
        self._leave(peer)
        peer.wait_before_retry(time.monotonic())

    def _leave(self, peer: Peer) -> None:
        """Go on without the peer, for a while or for ever."""
        peer.is_connected = False
        self.let_go(peer)
        if peer.aside is not None:
            peer.aside.is_doubtful = True
        self._serving.leave(peer)

    def _reconnect(self, peer: Peer) -> None:
        peer.wait_before_retry(time.monotonic())
        try:
            self._transport.connect(peer.address)
        except Exception as error:
            logger.debug(f"LayUp: rank {peer.rank} is not reached: {error}")
            return
        peer.is_connected = peer.is_known = True
        peer.connected_at, peer.whole_at = time.monotonic(), 0.0
        peer.asked_at = 0.0  # what has not come is asked for again, with the report that is due now
