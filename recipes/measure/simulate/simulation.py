"""Many workers in one process: LayUp on a noisy quadratic, with the library's own arithmetic of mass and with links.

What happens is an event of one worker: it is about to use a block (merge, take the gradient), or the block's gradient
is complete (merge, step, offer). All events that fall into one short time slice happen at once, as operations on
arrays. With slices of width 0 that is exact unless two workers act at the very same time.

Masses are int64 with the same `UNIT` as in training, so up to 2**22 workers would be counted exactly.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from layup_hf.ledger.mixing import UNIT, merge_weight, share

from .settings import Settings
from .turns import ManyTurns

FREE, ASKED, ON_ITS_WAY, READY = range(4)  # what a slot is


def mean(counts: Counter[int]) -> float:
    """Of all numbers that have been counted."""
    return sum(value * count for value, count in counts.items()) / counts.total()


class Simulation:
    """The state of all workers and its course in time. Axes: b blocks, w workers, c coordinates of a block.

    Attributes:
        now: Seconds since the start.
        values: What each worker holds, float64 of shape (b, w, c).
        own: Mass that each worker holds and has offered to nobody, in units, int64 of shape (b, w).
        waiting: Mass offered and not yet taken, int64 of shape (b, receivers, senders).
        steps: Steps that each worker has made on each block, int64 of shape (b, w).
        staleness: How many merges were how many clock steps old.
        merges, bytes_read: Totals of all workers.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = s = settings
        blocks, workers, width = s.blocks, s.workers, s.dimension // s.blocks
        self._random = np.random.default_rng(s.seed)
        self._curvature = s.curvature().reshape(blocks, width)
        self.optima = s.worker_optima().reshape(workers, blocks, width).swapaxes(0, 1)
        self.values = np.full((blocks, workers, width), float(s.start))
        self._gradients = np.zeros_like(self.values)
        self.own = np.full((blocks, workers), UNIT, dtype=np.int64)
        self._untaken = np.zeros((blocks, workers), dtype=np.int64)  # the sum of `waiting` over receivers
        self.waiting = np.zeros((blocks, workers, workers), dtype=np.int64)
        self.steps = np.zeros((blocks, workers), dtype=np.int64)
        self._stamps = np.zeros((blocks, workers), dtype=np.int64)  # the clock when the worker last stepped the block
        self._has_offer = np.zeros((blocks, workers, workers), dtype=bool)  # [b, sender, receiver]: one is waiting
        self._neighbours, self._count = s.neighbours(), s.peers_per_step
        self._turns = ManyTurns(blocks, workers, self._neighbours.shape[1]) if s.has_links and s.turns else None
        self.staleness: Counter[int] = Counter()
        self.merges = 0
        self.bytes_read = 0.0

        self.now = 0.0
        self._step_times = s.draw_step_times(self._random)
        self._moments = s.moments()  # of the 2 * b events of a step, as a share of the step
        self._begun = s.draw_starts(self._random)  # when each worker's present step began
        self._made = np.zeros(workers, dtype=np.int64)  # own steps that have ended
        self._left = s.all_steps - workers  # steps that nobody has begun
        self._place = np.zeros(workers, dtype=np.int64)  # the next event of the step
        self._next = self._begun + self._moments[0] * self._step_times[:, 0]

        self._in_use = np.zeros((blocks, workers), dtype=bool)  # between a block's forward and its boundary
        self._links = s.has_links
        self._slot = np.full((workers, s.slots), FREE)
        self._slot_peer = np.zeros((workers, s.slots), dtype=np.int64)
        self._slot_block = np.zeros((workers, s.slots), dtype=np.int64)
        self._slot_begin = np.full((workers, s.slots), np.inf)
        self._slot_end = np.full((workers, s.slots), np.inf)
        self._slot_value = np.zeros((workers, s.slots, width))
        self._slot_stamp = np.zeros((workers, s.slots), dtype=np.int64)
        self._travels = np.zeros((workers, s.slots, 2))  # from when to when the link is taken by what a slot waits for
        self._out_free = np.zeros(workers)  # when the worker's link is free, outwards
        self._merged = np.zeros((blocks, workers))  # when each block was last merged, and from whom
        self._merged_from = np.zeros((blocks, workers, workers), dtype=np.float32)
        if s.ties == "rotated":
            order = (np.arange(workers) - np.arange(workers)[:, None]) % workers
            self._merged_from[:] = order / workers - 1

    # ---- What can be seen from outside ----

    @property
    def has_ended(self) -> bool:
        """Whether all steps have been made."""
        return bool(np.isinf(self._next.min()))

    def masses(self) -> np.ndarray:
        """Effective mass, own and untaken, in units: int64 of shape (b, w)."""
        return self.own + self._untaken

    def mean(self) -> np.ndarray:
        """The consensus model, which is the mass-weighted mean: float64 of shape (b, c)."""
        shares = self.masses() / self.masses().sum(axis=1, keepdims=True)
        return np.einsum("bw,bwc->bc", shares, self.values)

    def consensus_distance(self) -> float:
        """`sqrt(mean_i |x_i - mean|^2) / |mean|`, as `layup_hf.gossip.consensus` logs it."""
        mean = self.mean()
        squares = np.square(self.values - mean[:, None]).sum() / self.settings.workers
        return float(np.sqrt(squares / max(np.square(mean).sum(), np.finfo(float).tiny)))

    def loss(self) -> float:
        """Loss of the consensus model, without noise, over the least that is possible."""
        return float((0.5 * self._curvature * np.square(self.mean() - self.optima.mean(axis=1))).sum())

    def own_loss(self) -> float:
        """Mean over workers of the loss that each one's own model has."""
        errors = np.square(self.values - self.optima.mean(axis=1, keepdims=True))
        return float((0.5 * self._curvature[:, None] * errors).sum() / self.settings.workers)

    # ---- The course of time ----

    def advance(self, until: float) -> None:
        """Let everything happen up to a time, in seconds, or until all steps have been made.

        As in training, a worker finishes its step, and begins another one while there are some left.
        """
        while not self.has_ended:
            begin = self._next.min()
            if self._links:
                begin = min(begin, self._slot_begin.min(), self._slot_end.min())
            if begin > until:
                break
            self.now = max(self.now, begin)
            if self._links:
                self._move_blocks(begin + self.settings.slice_seconds)
            acting = np.flatnonzero(self._next <= begin + self.settings.slice_seconds)
            if len(acting):
                self._act(acting)
        if not self.has_ended:
            self.now = max(self.now, until)

    def _act(self, workers: np.ndarray) -> None:
        """The next event of each of these workers."""
        s, place, times = self.settings, self._place[workers], self._next[workers]
        is_boundary = place >= s.blocks
        blocks = np.where(is_boundary, 2 * s.blocks - 1 - place, place)
        if self._links:
            self._merge_arrived(blocks, workers, times)
        else:
            self._merge_live(blocks, workers)
        self._take_gradients(blocks[~is_boundary], workers[~is_boundary])
        self._step(blocks[is_boundary], workers[is_boundary])
        if self._links:
            self._ask(times)

        ended = place == 2 * s.blocks - 1
        done, going = workers[ended], workers[~ended]
        self._begun[done] = times[ended]
        self._made[done] += 1
        self._place[done] = 0
        self._place[going] += 1
        durations = self._step_times[workers, self._made[workers] % self._step_times.shape[1]]
        self._next[workers] = self._begun[workers] + self._moments[self._place[workers]] * durations
        done = done[np.argsort(times[ended], kind="stable")]
        self._next[done[self._left :]] = np.inf
        self._left = max(0, self._left - len(done))

    def _take_gradients(self, blocks: np.ndarray, workers: np.ndarray) -> None:
        self._in_use[blocks, workers] = True
        gradients = self._curvature[blocks] * (self.values[blocks, workers] - self.optima[blocks, workers])
        if self.settings.noise:
            gradients += self.settings.noise * self._random.standard_normal(gradients.shape)
        self._gradients[blocks, workers] = gradients

    def _step(self, blocks: np.ndarray, workers: np.ndarray) -> None:
        """Step, count, and offer after every `offer_every` steps."""
        self.values[blocks, workers] -= self.settings.learning_rate * self._gradients[blocks, workers]
        self._in_use[blocks, workers] = False
        self.steps[blocks, workers] += 1
        self._stamps[blocks, workers] = self.steps[blocks].sum(axis=1)
        offers = self.steps[blocks, workers] % self.settings.offer_every == 0
        self._offer(blocks[offers], workers[offers])

    def _offer(self, blocks: np.ndarray, workers: np.ndarray) -> None:
        """Offer to peers chosen among the neighbours that have taken the last offer, as `PeerSampler` does."""
        count = self._count
        if not count or not len(workers):
            return
        peers = self._neighbours[workers]
        keys = self._random.random(peers.shape, dtype=np.float32)
        keys[self._has_offer[blocks[:, None], workers[:, None], peers]] = 2.0  # has not taken the last one
        places = np.arange(peers.shape[1]) + np.zeros_like(peers)
        if self._turns is not None:
            keys[~self._turns.due(blocks, workers, keys < 1.5)] = 2.0
        if count < peers.shape[1]:
            chosen = np.argpartition(keys, count - 1, axis=1)[:, :count]
            peers, keys, places = (np.take_along_axis(array, chosen, 1) for array in (peers, keys, places))
        eligible = keys < 1.5
        numbers = eligible.sum(axis=1)
        units = np.where(numbers > 0, share(self.own[blocks, workers], np.maximum(numbers, 1)), 0)
        rows, columns = np.nonzero(eligible & (units > 0)[:, None])
        self.waiting[blocks[rows], peers[rows, columns], workers[rows]] = units[rows]
        self._has_offer[blocks[rows], workers[rows], peers[rows, columns]] = True
        if self._turns is not None:
            self._turns.note_offered(blocks[rows], workers[rows], places[rows, columns])
        self.own[blocks, workers] -= units * numbers
        self._untaken[blocks, workers] += units * numbers

    # ---- Merging ----

    def _merge_live(self, blocks: np.ndarray, workers: np.ndarray) -> None:
        """Every offer to these workers, from the senders' values as they are now."""
        rows, senders = np.nonzero(self.waiting[blocks, workers])
        if len(rows):
            b = blocks[rows]
            self._merge(b, workers[rows], senders, self.values[b, senders], self._stamps[b, senders])

    def _merge(
        self, blocks: np.ndarray, workers: np.ndarray, senders: np.ndarray, theirs: np.ndarray, stamps: np.ndarray
    ) -> None:
        """Merge one offer per entry. Entries of one worker and block follow each other.

        The offers of one worker are taken together. That is the same as one after the other, each by its weight:
        both give the mean weighted with effective masses. Of workers that merge with each other at the same time,
        each is read as it was, and has given away what is being taken from it; so the weighted mean of all stays.
        """
        units = self.waiting[blocks, workers, senders]
        self.waiting[blocks, workers, senders] = 0
        self._has_offer[blocks, senders, workers] = False
        np.subtract.at(self._untaken, (blocks, senders), units)
        keys = blocks * self.settings.workers + workers
        begins = np.flatnonzero(np.diff(keys, prepend=-1))
        b, w = blocks[begins], workers[begins]
        offered = np.add.reduceat(units, begins)
        inflow = np.add.reduceat(units[:, None] * theirs, begins) / offered[:, None]
        weight = merge_weight(offered, self.own[b, w], self._untaken[b, w])
        self.values[b, w] += weight[:, None] * (inflow - self.values[b, w])
        self.own[b, w] += offered
        self.staleness.update((self.steps.sum(axis=1)[blocks] - stamps).tolist())
        if self._turns is not None:
            self._turns.note_merged(blocks, workers)
        self.merges += len(units)
        self.bytes_read += len(units) * self.settings.block_bytes

    # ---- Links: what the courier does ----

    def _merge_arrived(self, blocks: np.ndarray, workers: np.ndarray, times: np.ndarray) -> None:
        """What has come of the block at hand, and of others if they are not in use."""
        for number in range(self.settings.slots):
            theirs = self._slot_block[workers, number]
            fits = (theirs == blocks) | ~self._in_use[theirs, workers]
            take = np.flatnonzero(fits & (self._slot[workers, number] == READY))
            take = take[np.argsort(theirs[take] * self.settings.workers + workers[take], kind="stable")]
            if not len(take):
                continue
            b, w, peers = theirs[take], workers[take], self._slot_peer[workers[take], number]
            self._merge(b, w, peers, self._slot_value[w, number], self._slot_stamp[w, number])
            self._merged[b, w] = self._merged_from[b, w, peers] = times[take]
            self._slot[w, number] = FREE

    def _move_blocks(self, until: float) -> None:
        """Blocks leave and arrive. One that leaves is sent as it is then."""
        w, number = np.nonzero((self._slot == ASKED) & (self._slot_begin <= until))
        if len(w):
            b, peers = self._slot_block[w, number], self._slot_peer[w, number]
            self._slot_value[w, number], self._slot_stamp[w, number] = self.values[b, peers], self._stamps[b, peers]
            self._slot[w, number], self._slot_begin[w, number] = ON_ITS_WAY, np.inf
        arrived = (self._slot == ON_ITS_WAY) & (self._slot_end <= until)
        self._slot[arrived], self._slot_end[arrived] = READY, np.inf

    def _ask(self, times: np.ndarray) -> None:
        """Give free slots to what has not been merged for the longest of all that is offered, as the courier does.

        Never two at once from one peer. A request waits until both links are free.
        """
        s, now = self.settings, float(times.max())
        for number in range(s.slots):
            w = np.flatnonzero((self._slot[:, number] == FREE) & (self.own.shape[1] > 1))
            if not len(w):
                continue
            offered = self.waiting[:, w, :] > 0  # (b, receivers, senders)
            is_held = np.zeros((s.blocks, len(w)), dtype=bool)
            for other in set(range(s.slots)) - {number}:
                state, peer, block = self._slot[w, other], self._slot_peer[w, other], self._slot_block[w, other]
                asked, ready = np.flatnonzero((state == ASKED) | (state == ON_ITS_WAY)), np.flatnonzero(state == READY)
                offered[:, asked, peer[asked]] = False
                offered[block[ready], ready, peer[ready]] = False
                is_held[block[state != FREE], np.flatnonzero(state != FREE)] = True
            age = np.where(offered.any(axis=2), self._merged[:, w] + 1e12 * is_held, np.inf)
            blocks = age.argmin(axis=0)
            has = np.isfinite(age[blocks, np.arange(len(w))])
            w, blocks, columns = w[has], blocks[has], np.flatnonzero(has)
            since = np.where(offered[blocks, columns], self._merged_from[blocks, w], np.inf)
            self._request(w, number, blocks, since.argmin(axis=1), now)

    def _request(self, w: np.ndarray, number: int, blocks: np.ndarray, peers: np.ndarray, now: float) -> None:
        """A link carries one block at a time in each direction; a peer sends in the order in which it was asked."""
        s, seconds = self.settings, self.settings.block_seconds
        self._slot[w, number], self._slot_peer[w, number], self._slot_block[w, number] = ASKED, peers, blocks
        for receiver, peer in zip(w.tolist(), peers.tolist(), strict=True):
            begin = max(now + s.delay, float(self._out_free[peer]))
            for first, last in sorted(self._travels[receiver].tolist()):
                if begin < last and begin + seconds > first:  # it does not fit in before what is already to come
                    begin = last
            self._out_free[peer] = begin + seconds
            self._travels[receiver, number] = begin, begin + seconds
        self._slot_begin[w, number], self._slot_end[w, number] = self._travels[w, number].T
