"""The thread that carries blocks and reports between this worker and its peers on other hosts."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable

import numpy as np
import torch

from ..ledger import Ledger
from ..trace.clocks import now
from ..trace.events import ON_ITS_WAY, Trace
from . import wire
from .contacts import Contacts
from .pace import Pace
from .peers import Peer, Postmark
from .receiving import Receiving
from .reports import REPEAT_EVERY, Reporter
from .serving import Serving
from .staging import Slot, Staging
from .transport import Transport

logger = logging.getLogger(__name__)


class Courier:
    """Asks peers for the blocks that they have offered, writes its own to those who ask, and reports to all.

    One thread does everything that has to do with the network, in rounds; the training thread never waits for it, and
    nothing here waits for a peer. Each peer has at most one request under way.

    Args:
        transport: Connections. This thread alone uses it from `start` to `close`.
        ledger: What is reported, and where the peers' reports are written down.
        peers: Whom to talk to, connected.
        staging: Where blocks arrive.
        receiving: Makes blocks of what arrives.
        serving: Writes blocks to peers.
        pace: How often to look.
        postmark: Makes and reads messages.
        trace: Where it is recorded how long blocks are on their way.

    Attributes:
        refused: Messages that were refused, by reason.
        accepts: Which (peer, block) may be asked for. All; tests narrow it.
    """

    def __init__(
        self,
        transport: Transport,
        ledger: Ledger,
        peers: list[Peer],
        staging: Staging,
        receiving: Receiving,
        serving: Serving,
        pace: Pace,
        postmark: Postmark,
        trace: Trace | None = None,
    ) -> None:
        self._transport, self._ledger, self._trace = transport, ledger, trace
        self._pace, self._postmark = pace, postmark
        self._staging, self._receiving, self._serving = staging, receiving, serving
        self._peers = {peer.rank: peer for peer in peers}
        self._by_name = {peer.name: peer for peer in peers}
        self._contacts = Contacts(transport, staging, serving, pace)
        self._reporter = Reporter(ledger, peers)
        num_blocks = len(serving.layout.num_bytes)
        self._merged = np.zeros(num_blocks)  # when the block was last merged with a peer on another host
        # Likewise by peer; before any merge each worker begins with another, or all would ask the first ranks at once.
        workers = ledger.masses().shape[1]
        self._merged_from = np.tile((np.arange(workers) - ledger.rank) % workers / workers - 1, (num_blocks, 1))
        self._settled = ledger.settled
        self._since = self._looked = time.monotonic()
        self._busy = 0.0
        self._bytes = 0
        self.refused: Counter[str] = Counter()
        self._warned: set[tuple[str, int]] = set()
        self.accepts: Callable[[int, int], bool] = lambda peer, block: True
        self._to_exclude: deque[int] = deque()
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="layup-courier", daemon=True)

    # ---- Called by the training thread ----

    def start(self) -> None:
        """Begin to talk to the peers."""
        self._thread.start()

    def note_merged(self, peer: int, block: int) -> None:
        """The block has been merged with the peer's."""
        self._merged[block] = self._merged_from[block, peer] = time.monotonic()

    def exclude(self, peer: int) -> None:
        """Have no more to do with the peer."""
        self._to_exclude.append(peer)

    def figures(self) -> dict[str, float]:
        """What the logs say, since the last call.

        Raises:
            RuntimeError: The thread has failed.
        """
        if self._failure is not None:
            raise RuntimeError("The exchange with other hosts has failed; see above.") from self._failure
        now = time.monotonic()
        seconds, busy, received = max(now - self._since, 1e-9), self._busy, self._bytes
        self._since, self._busy, self._bytes = now, self._busy - busy, self._bytes - received
        figures = {
            "layup/link_busy": min(busy / seconds, 1.0),
            "layup/megabytes_per_second": received / seconds / 1e6,
        }
        if self.refused:
            figures["layup/refused_messages"] = float(sum(self.refused.values()))
        if self._receiving.resent:
            figures["layup/resent_blocks"] = float(self._receiving.resent)
        return figures

    def close(self) -> None:
        """Stop, and end all connections. Idempotent; waits for the round that is being made, for no peer."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        for peer in self._peers.values():
            self._serving.abandon(peer)
        self._transport.close()

    # ---- The thread ----

    def _run(self) -> None:
        try:
            if self._serving.layout.device.type == "cuda":
                torch.cuda.set_device(self._serving.layout.device)
            while not self._stop.wait(self._pace.delay(*self._round())):
                pass
        except BaseException as error:
            self._failure = error
            logger.exception("LayUp: the exchange with other hosts has failed; this worker goes on without.")

    def _round(self) -> tuple[bool, bool]:
        """Do whatever can be done now. Returns whether anything has come or gone, and whether anything is under way."""
        now = time.monotonic()
        under_way = any(peer.request is not None for peer in self._peers.values())
        if under_way:
            self._busy += now - self._looked
        self._looked = now
        while self._to_exclude:
            self._contacts.drop(self._peers[self._to_exclude.popleft()])
        began = time.perf_counter()
        messages = self._transport.receive()
        moved = bool(messages) or time.perf_counter() - began > 5e-5  # it has sent or received something
        for name, message in messages:
            self._open(name, message)
        if self._settled != self._ledger.settled:
            self._settled = self._ledger.settled
            self._staging.discard()
            for peer in self._peers.values():
                peer.whole_at = 0.0
        for peer in self._peers.values():
            self._contacts.attempt(peer, self._serve)
            if peer.request is not None and peer.is_silent(now) and now - peer.asked_at > REPEAT_EVERY:
                self._contacts.let_go(peer)
            if not peer.is_connected:
                self._contacts.mind_lost(peer, now)
        for slot in self._staging.brought():
            self._take_in(slot, is_written=True)
        if self._pace.may_start:
            self._ask()
        self._report(now)
        under_way |= self._staging.is_bringing or any(peer.write is not None for peer in self._peers.values())
        return moved, under_way

    def _send(self, peer: Peer, content: wire.Content) -> None:
        self._transport.send(peer.name, self._postmark.encode(content, peer))

    # ---- Messages ----

    def _open(self, name: str, message: bytes) -> None:
        """Act on a message, or refuse it: then it has changed nothing."""
        sender = self._by_name.get(name)
        try:
            known = self._postmark.decode(message)
            peer = self._peers.get(known.sender)
            if peer is None or peer is not sender:
                raise wire.RefusedError("rank")
            if peer.is_excluded:
                raise wire.RefusedError("excluded")
            if known.sequence <= peer.heard:
                raise wire.RefusedError("sequence")
            self._act(peer, known.content)
            peer.heard, peer.heard_at = known.sequence, time.monotonic()
        except wire.RefusedError as refusal:
            reason, rank = str(refusal), -1 if sender is None else sender.rank
            self.refused[reason] += 1
            if (reason, rank) not in self._warned:
                self._warned.add((reason, rank))
                source = f"rank {rank}" if sender is not None else repr(name)
                logger.warning(f"LayUp: refused a message that came as of {source}: {reason}.")

    def _act(self, peer: Peer, content: wire.Content) -> None:
        match content:
            case wire.Report():
                self._take_report(peer, content)
            case wire.Request():
                if content.number < peer.wanted_number:
                    raise wire.RefusedError("number")
                if content.steps and len(content.steps) != self._serving.layout.num_steps[content.block]:
                    raise wire.RefusedError("steps")
                if content.number > peer.wanted_number:
                    peer.wanted, peer.wanted_number, peer.answer = content, content.number, None
                elif (answer := peer.answer) is not None:  # which has not got there
                    self._contacts.attempt(peer, lambda p: self._send(p, answer))
            case wire.Answer():
                slot = peer.request or peer.aside
                if content.number > peer.requests:
                    raise wire.RefusedError("number")
                if slot is not None and (slot.number, slot.block) == (content.number, content.block):
                    if not content.is_written and not slot.steps:
                        raise wire.RefusedError("answer")
                    self._arrived(peer, slot, content.is_written)  # else it has come before

    def _take_report(self, peer: Peer, report: wire.Report) -> None:
        state = (report.done, report.tokens, report.loss)
        try:
            self._ledger.take_report(peer.rank, report.blocks, report.settled, *state)
        except ValueError as error:
            raise wire.RefusedError(str(error)) from None
        if report.settled != peer.settled:  # what it was told before, it may not have been able to use
            peer.settled, peer.whole_at = report.settled, 0.0

    def _report(self, now: float) -> None:
        """Tell each peer what has changed, and ask again for what has not come."""
        for peer, report in self._reporter.due(now):
            self._contacts.attempt(peer, functools.partial(self._send, content=report))
            if now - peer.asked_at > REPEAT_EVERY:
                self._contacts.attempt(peer, self._send_request)

    # ---- Blocks ----

    def _ask(self) -> None:
        """Give each free slot to what has not been merged for the longest of all that is offered."""
        idle = [peer.rank for peer in self._peers.values() if peer.is_idle]
        if not idle:
            return
        slot = self._staging.take_free()
        while slot is not None and (choice := self._choose(idle)) is not None:
            peer, slot.block = self._peers[choice[0]], choice[1]
            peer.requests += 1
            slot.peer, slot.number, slot.settled = peer.rank, peer.requests, self._ledger.settled
            self._receiving.prepare(slot)
            peer.request, slot.asked_at = slot, now()
            idle.remove(peer.rank)
            self._contacts.attempt(peer, self._send_request)
            slot = self._staging.take_free() if idle else None
        if slot is not None:
            self._staging.give_back(slot)

    def _choose(self, idle: list[int]) -> tuple[int, int] | None:
        """(peer, block) to ask for next."""
        blocks, columns = np.nonzero(self._ledger.waiting_from(idle))
        here = self._staging.holds()
        held = {block for _, block in here} | {peer.request.block for peer in self._peers.values() if peer.request}
        choices = [
            (block in held, self._merged[block], self._merged_from[block, idle[column]], idle[column], block)
            for block, column in zip(blocks.tolist(), columns.tolist(), strict=True)
            if (idle[column], block) not in here and self.accepts(idle[column], block)
        ]
        return min(choices)[3:] if choices else None

    def _send_request(self, peer: Peer) -> None:
        """Ask for the first time or again: the peer knows requests by their numbers."""
        slot = peer.request or peer.aside
        if slot is not None:
            peer.asked_at = time.monotonic()
            address, device = slot.buffer.data_ptr(), self._transport.device_number
            how = (slot.seed, slot.steps)
            self._send(peer, wire.Request(slot.number, slot.block, address, device, slot.key, *how))

    def _arrived(self, peer: Peer, slot: Slot, is_written: bool) -> None:
        if slot is peer.aside:
            self._staging.take_back(slot)
        peer.request = peer.aside = None
        if self._trace is not None:  # one at a time from each peer
            self._trace.track(f"from rank {peer.rank}").add(ON_ITS_WAY, slot.asked_at, slot.block)
        if is_written:
            self._bytes += self._receiving.num_bytes(slot)
            self._staging.bring(slot)
        else:
            self._take_in(slot, is_written=False)

    def _take_in(self, slot: Slot, is_written: bool) -> None:
        """Make a block of what has come, if it can still be used."""
        is_current = slot.settled == self._ledger.settled and not self._peers[slot.peer].is_excluded
        if is_current and not slot.is_doubtful and self._receiving.accept(slot, is_written):
            self._staging.ready[slot.peer, slot.block] = slot
        else:
            self._staging.give_back(slot)

    def _serve(self, peer: Peer) -> None:
        if (answer := self._serving.advance(peer, self._looked)) is not None:
            peer.answer = answer
            self._send(peer, answer)
