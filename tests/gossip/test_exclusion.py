"""Workers that are gone: mass stays accounted for to the unit, whatever they have done, do, or are late to do."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layup_hf.ledger import Ledger, effective_masses
from layup_hf.ledger.mixing import MODULUS, UNIT

BLOCKS = 2


class Fleet:
    """Ledgers of workers on one host, or of each on its own; who is gone may go on writing for a while."""

    def __init__(self, workers, distant=False, counter=0):
        size = Ledger.size(BLOCKS, workers)
        memories = [np.zeros(size, np.uint64) for _ in range(workers if distant else 1)]
        for memory in memories:
            memory[: 2 * BLOCKS * workers * workers] = counter
        self.ledgers = [
            Ledger(memories[rank % len(memories)], BLOCKS, workers, rank, {*range(workers)} - {rank} if distant else ())
            for rank in range(workers)
        ]
        self.gone = set()

    @property
    def present(self):
        return [ledger for ledger in self.ledgers if ledger.rank not in self.gone]

    def offer(self, block, worker, peer, part):
        ledger = self.ledgers[worker]
        if peer != worker and ledger.is_present(peer):
            ledger.offer(block, peer, int(part * ledger.own(block)))

    def take(self, block, worker, peer, part):
        ledger = self.ledgers[worker]
        for sender, units in ledger.pending(block):
            ledger.take(block, sender, max(1, int(part * units)))

    def report(self, block, worker, peer, part):
        """Between hosts, what a worker tells a peer; it may be refused, as that peer does without it."""
        sender, receiver = self.ledgers[worker], self.ledgers[peer]
        if worker != peer and receiver._remote[worker]:
            receiver.take_report(worker, sender.report_to(peer), sender.settled, 0, 0, 0.0)

    def exclude(self, block, worker, peer, part):
        """`worker` sees that `peer` is gone. (One at least stays, and does not take itself for gone.)"""
        is_new = peer not in self.gone
        if peer == worker or worker in self.gone or (is_new and len(self.present) == 1):
            return
        self.gone.add(peer)
        self.ledgers[worker].exclude(peer)

    def settle(self, *_):
        """A consensus point: all that are there have done without those that are gone."""
        self.exclude_all()
        accounts = self.accounts()
        for ledger in self.present:
            ledger.settle(accounts)

    def exclude_all(self):
        for ledger in self.present:
            for peer in sorted(self.gone):
                ledger.exclude(peer)

    def accounts(self):
        return {ledger.rank: ledger.account() for ledger in self.present}

    def assert_mass_is_accounted_for(self):
        """Modulo 2**64."""
        accounts = self.accounts()
        lost = sum(account.lost for account in accounts.values())
        assert (effective_masses(accounts).sum(axis=1) + lost).tolist() == [len(accounts) * UNIT % MODULUS] * BLOCKS


@pytest.mark.parametrize("distant", [False, True], ids=["one host", "several hosts"])
@settings(max_examples=150)
@given(
    workers=st.integers(2, 4),
    moves=st.integers(0, 60),
    seed=st.integers(0, 2**32),
    below_wrap=st.sampled_from([None, 0, 2**39, UNIT]),
)
def test_what_is_held_and_what_is_lost_is_a_unit_for_each_who_is_there(workers, moves, seed, below_wrap, distant):
    """Those who are gone offer, take and report on. `below_wrap`: the counters start that far below 2**64."""
    fleet = Fleet(workers, distant, counter=0 if below_wrap is None else MODULUS - 1 - below_wrap)
    schedule = random.Random(seed)
    for _ in range(moves):
        (action,) = schedule.choices(["offer", "take", "report", "exclude", "settle"], [5, 5, 5, 0.7, 0.5])
        block, worker, peer = (schedule.randrange(count) for count in (BLOCKS, workers, workers))
        getattr(fleet, action)(block, worker, peer, schedule.choice([0, 0.3, 0.5, 1]))
    fleet.exclude_all()
    fleet.assert_mass_is_accounted_for()
    for rank in fleet.gone:  # they still write
        for peer in range(workers):
            for block in range(BLOCKS):
                fleet.take(block, rank, peer, 1.0)
                fleet.offer(block, rank, peer, 0.5)
                fleet.report(block, rank, peer, 1.0)
    fleet.assert_mass_is_accounted_for()
    for ledger in fleet.present:
        assert not any(peer in fleet.gone for peer, _ in ledger.pending(0))
        assert not fleet.gone & {*ledger.eligible(0)}
        assert ledger.masses()[:, sorted(fleet.gone)].sum() == 0
    fleet.settle()
    assert effective_masses(fleet.accounts()).tolist() == [[UNIT] * len(fleet.present)] * BLOCKS
    fleet.assert_mass_is_accounted_for()


def test_what_a_worker_that_is_gone_has_not_taken_is_taken_back():
    fleet = Fleet(3)
    first, second, _ = fleet.ledgers
    first.offer(0, 1, 100)
    second.take(0, 0, 30)
    first.exclude(1)
    assert first.own(0) == UNIT - 30
    assert first.untaken(0) == 0
    assert first.account().lost.tolist() == [30, 0]


def test_what_it_gave_stays():
    fleet = Fleet(3)
    first, second, _ = fleet.ledgers
    second.offer(0, 0, 50)
    first.take(0, 1, 50)
    second.offer(0, 0, 7)  # not taken by the time it is gone
    first.exclude(1)
    assert first.own(0) == UNIT + 50
    assert first.pending(0) == []
    assert int(first.account().lost[0]) == MODULUS - 50


def test_what_it_takes_later_has_been_taken_back():
    fleet = Fleet(2)
    first, second = fleet.ledgers
    first.offer(0, 1, 100)
    first.exclude(1)
    second.take(0, 0, 100)
    assert first.own(0) == UNIT
    assert first.untaken(0) == 0
    assert first.account().lost.tolist() == [0, 0]


def test_excluding_twice_is_excluding_once():
    fleet = Fleet(2)
    first, second = fleet.ledgers
    first.offer(0, 1, 100)
    first.exclude(1)
    second.take(0, 0, 60)
    first.exclude(1)
    assert first.own(0) == UNIT
    assert not first.is_present(1)
    assert first.is_present(0)


def test_what_was_exchanged_before_a_consensus_point_is_not_lost_after_it():
    fleet = Fleet(2)
    first, second = fleet.ledgers
    first.offer(0, 1, 100)
    second.take(0, 0, 100)
    fleet.settle()
    first.exclude(1)
    assert first.own(0) == UNIT
    assert first.account().lost.tolist() == [0, 0]


def test_an_offer_made_at_once_after_settling_is_left_for_who_settles_later():
    first, second = (fleet := Fleet(2)).ledgers
    second.offer(0, 0, 10)
    accounts = fleet.accounts()
    first.settle(accounts)
    first.offer(0, 1, 20)
    second.settle(accounts)
    assert first.pending(0) == []
    assert second.pending(0) == [(0, 20)]
    fleet.assert_mass_is_accounted_for()
