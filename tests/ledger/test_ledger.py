"""Mass is conserved to the unit, whatever the order of offers and takes."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layup_hf.ledger import Ledger
from layup_hf.ledger.mixing import MODULUS, UNIT, share

BLOCKS = 2


def ledgers(workers, blocks=BLOCKS, counter=0):
    """One ledger for each worker, on one memory, all cumulative counters at `counter`."""
    memory = np.zeros(Ledger.size(blocks, workers), np.uint64)
    memory[: 2 * blocks * workers * workers] = counter
    return [Ledger(memory, blocks, workers, rank) for rank in range(workers)]


def accounts_of(everybody):
    return {ledger.rank: ledger.account() for ledger in everybody}


class Model:
    """What the ledgers must say, in plain integers: own mass, and offers under way by (block, receiver, sender)."""

    def __init__(self, workers):
        self.workers = workers
        self.own = {(block, rank): UNIT for block in range(BLOCKS) for rank in range(workers)}
        self.under_way = {}

    def pending(self, block, rank):
        offers = ((sender, self.under_way.get((block, rank, sender), 0)) for sender in range(self.workers))
        return [(sender, units) for sender, units in offers if units]

    def untaken_by(self, block, rank):
        offers = ((peer, self.under_way.get((block, peer, rank), 0)) for peer in range(self.workers))
        return {peer: units for peer, units in offers if units}

    def assert_agrees(self, ledger):
        rank = ledger.rank
        for block in range(BLOCKS):
            untaken = self.untaken_by(block, rank)
            assert ledger.own(block) == self.own[block, rank]
            assert ledger.pending(block) == self.pending(block, rank)
            assert ledger.untaken(block) == sum(untaken.values())
            assert ledger.eligible(block) == [
                peer for peer in range(self.workers) if peer != rank and peer not in untaken
            ]
            assert [int(mass) for mass in ledger.masses()[block]] == [
                self.own[block, other] + sum(self.untaken_by(block, other).values()) for other in range(self.workers)
            ]


actions = st.lists(
    st.tuples(
        st.sampled_from(["offer", "offer_any", "take", "take_one"]),
        st.integers(0, BLOCKS - 1),
        st.integers(0, 3),  # worker
        st.integers(0, 3),  # peer
        st.floats(0, 1),  # part of the mass
    ),
    max_size=40,
)


@given(workers=st.integers(2, 4), actions=actions, below_wrap=st.sampled_from([None, 0, 1, 2**39, UNIT]))
@settings(max_examples=150)
def test_any_sequence_of_offers_and_takes_conserves_mass(workers, actions, below_wrap):
    """`below_wrap`: the counters start that far below 2**64, so that they wrap."""
    counter = 0 if below_wrap is None else MODULUS - 1 - below_wrap
    everybody, model = ledgers(workers, counter=counter), Model(workers)

    def offer(block, worker, peer, units):
        everybody[worker].offer(block, peer, units)
        model.own[block, worker] -= units
        model.under_way[block, peer, worker] = model.under_way.get((block, peer, worker), 0) + units

    def take(block, worker, peer, units):
        everybody[worker].take(block, peer, units)
        model.own[block, worker] += units
        model.under_way[block, worker, peer] -= units

    for action, block, worker, peer, part in actions:
        worker, peer = worker % workers, peer % workers
        ledger = everybody[worker]
        if action == "offer":  # as in training: equal parts to all who have taken
            if peers := ledger.eligible(block):
                units = share(ledger.own(block), len(peers))
                for each in peers:
                    offer(block, worker, each, units)
        elif action == "offer_any":
            if peer != worker:
                offer(block, worker, peer, min(int(part * ledger.own(block)), ledger.own(block)))
        elif action == "take":
            for sender, units in ledger.pending(block):
                take(block, worker, sender, units)
        else:  # part of one offer: more may have come since the receiver looked
            for sender, units in ledger.pending(block)[:1]:
                take(block, worker, sender, math.ceil(part * units))
        for each in everybody:
            model.assert_agrees(each)
            assert [sum(map(int, masses)) for masses in each.masses()] == [workers * UNIT] * BLOCKS


def test_every_worker_starts_with_one_unit_and_nothing_under_way():
    for ledger in ledgers(3):
        Model(3).assert_agrees(ledger)
        assert ledger.masses().tolist() == [[UNIT] * 3] * BLOCKS


def test_an_eligible_peer_has_taken_everything():
    first, second, _ = ledgers(3)
    assert first.eligible(0) == [1, 2]
    first.offer(0, 1, 10)
    assert first.eligible(0) == [2]
    assert first.eligible(1) == [1, 2]  # another block
    second.take(0, 0, 9)
    assert first.eligible(0) == [2]
    second.take(0, 0, 1)
    assert first.eligible(0) == [1, 2]


def test_pending_and_untaken_are_two_views_of_an_offer():
    first, second, third = ledgers(3)
    first.offer(1, 2, 5)
    second.offer(1, 2, 7)
    first.offer(1, 2, 1)
    assert third.pending(1) == [(0, 6), (1, 7)]
    assert (first.untaken(1), second.untaken(1), third.untaken(1)) == (6, 7, 0)
    assert (first.pending(1), second.pending(1), third.pending(0)) == ([], [], [])
    third.take(1, 0, 6)
    assert third.pending(1) == [(1, 7)]
    assert (first.untaken(1), second.untaken(1)) == (0, 7)


def test_counters_that_wrap_are_read_right():
    first, second = ledgers(2, counter=MODULUS - 1)
    first.offer(0, 1, UNIT // 2)
    assert second.pending(0) == [(0, UNIT // 2)]
    assert first.untaken(0) == UNIT // 2
    assert first.masses().tolist() == [[UNIT, UNIT]] * BLOCKS
    second.take(0, 0, UNIT // 2)
    assert first.masses()[0].tolist() == [UNIT // 2, UNIT // 2 * 3]


def test_masses_count_an_offer_for_its_sender_until_it_is_taken():
    first, second, _ = ledgers(3)
    first.offer(0, 1, 100)
    assert second.masses()[0].tolist() == [UNIT, UNIT, UNIT]
    second.take(0, 0, 100)
    assert first.masses()[0].tolist() == [UNIT - 100, UNIT + 100, UNIT]
    assert first.masses().dtype == np.uint64


@pytest.mark.parametrize("counter", [0, MODULUS - 1])
def test_when_all_have_settled_everybody_holds_one_unit(counter):
    everybody = ledgers(3, counter=counter)
    everybody[0].offer(0, 1, UNIT // 2)
    everybody[1].offer(0, 2, UNIT // 4)
    everybody[1].take(0, 0, UNIT // 2)
    accounts = accounts_of(everybody)
    for ledger in everybody:
        ledger.settle(accounts)
    for ledger in everybody:
        Model(3).assert_agrees(ledger)


def test_settling_touches_only_what_this_worker_writes():
    first, second, third = ledgers(3)
    first.offer(0, 1, 10)
    first.offer(0, 2, 20)
    second.settle(accounts_of([first, second, third]))
    assert second.pending(0) == []
    assert third.pending(0) == [(0, 20)]
    assert first.own(0) == UNIT - 30
    assert first.untaken(0) == 20


def test_staleness_counts_the_steps_of_all_since_the_peers_last():
    first, second, third = ledgers(3)
    assert first.staleness(0, 1) == 0
    second.count_step(0)
    assert first.staleness(0, 1) == 0
    for ledger in (first, third, third):
        ledger.count_step(0)
    assert first.staleness(0, 1) == 3
    assert first.staleness(0, 2) == 0
    assert first.staleness(1, 1) == 0  # another block


def test_mean_loss_is_over_the_workers_that_have_published():
    first, second, third = ledgers(3)
    first.report_loss(1.0)
    assert third.mean_loss() == 1.0
    second.report_loss(4.0)
    first.report_loss(2.0)
    assert third.mean_loss() == 3.0


def test_everybody_sees_how_many_steps_and_tokens_each_worker_has():
    first, second, third = ledgers(3)
    assert third.done.tolist() == third.tokens.tolist() == [0, 0, 0]
    first.done[0] = 5
    second.done[1] = 2**63
    second.tokens[1] += np.uint64(7)
    second.tokens[1] += np.uint64(7)
    for ledger in (first, second, third):
        assert ledger.done.tolist() == [5, 2**63, 0]
        assert ledger.tokens.tolist() == [0, 14, 0]


def test_settling_keeps_the_counts_of_steps_and_tokens():
    first, second = ledgers(2)
    first.done[0], first.tokens[0] = 3, 4
    accounts = accounts_of([first, second])
    for ledger in (first, second):
        ledger.settle(accounts)
    assert (second.done.tolist(), second.tokens.tolist()) == ([3, 0], [4, 0])


def test_a_ledger_opened_later_sees_what_the_peers_have_counted():
    memory = np.zeros(Ledger.size(BLOCKS, 2), np.uint64)
    first = Ledger(memory, BLOCKS, 2, 0)
    first.done[0], first.tokens[0] = 3, 4
    second = Ledger(memory, BLOCKS, 2, 1)
    assert (second.done.tolist(), second.tokens.tolist()) == ([3, 0], [4, 0])


def test_every_word_has_one_writer():
    def words_written(rank):
        before = np.arange(Ledger.size(BLOCKS, 3), dtype=np.uint64)
        after = before.copy()
        ledger = Ledger(after, BLOCKS, 3, rank)
        ledger.settle({other: ledger.account() for other in range(3)})
        for block in range(BLOCKS):
            for peer in {0, 1, 2} - {rank}:
                ledger.offer(block, peer, 1)
                ledger.take(block, peer, 1)
            ledger.count_step(block)
        ledger.report_loss(1.0)
        ledger.done[rank] = 2**40
        ledger.tokens[rank] = 2**40
        return set(np.flatnonzero(before != after).tolist())

    first, second, third = map(words_written, range(3))
    assert not first & second
    assert not first & third
    assert not second & third
    assert len(first) >= BLOCKS * (2 + 2 + 3) + 3


@pytest.mark.parametrize(
    "memory",
    [
        np.zeros(Ledger.size(2, 3) - 1, np.uint64),
        np.zeros(Ledger.size(2, 3) + 1, np.uint64),
        np.zeros(Ledger.size(2, 3), np.int64),
        np.zeros((1, Ledger.size(2, 3)), np.uint64),
    ],
    ids=["short", "long", "signed", "nested"],
)
def test_a_memory_that_does_not_fit_is_refused(memory):
    with pytest.raises(ValueError, match="2 blocks and 3 workers does not fit"):
        Ledger(memory, 2, 3, 0)


# ---- Workers on other hosts ----


def distant_ledgers(workers=3):
    """Ledgers of workers that are all on different hosts."""
    size = Ledger.size(BLOCKS, workers)
    return [
        Ledger(np.zeros(size, np.uint64), BLOCKS, workers, rank, set(range(workers)) - {rank})
        for rank in range(workers)
    ]


def report(sender, receiver):
    me = sender.rank
    return receiver.take_report(
        me, sender.report_to(receiver.rank), sender.settled, int(sender.done[me]), int(sender.tokens[me]), sender.loss()
    )


def report_all(everybody):
    for sender in everybody:
        for receiver in everybody:
            if sender is not receiver:
                assert report(sender, receiver)


def test_what_is_reported_is_what_a_shared_ledger_shows():
    shared, distant = ledgers(3), distant_ledgers(3)
    for everybody in (shared, distant):
        for ledger in everybody:
            ledger.count_step(0)
        everybody[0].offer(0, 1, 10)
        everybody[0].offer(0, 2, 20)
        if everybody is distant:
            report_all(distant)
        everybody[1].take(0, 0, 10)
        everybody[1].offer(1, 0, 30)
        everybody[1].count_step(0)
        everybody[0].report_loss(2.5)
        everybody[0].done[0], everybody[0].tokens[0] = 4, 5
    for _ in range(2):  # a worker counts what it has offered until it hears that it was taken
        report_all(distant)
    for mine, reported in zip(shared, distant, strict=True):
        assert (mine.masses() == reported.masses()).all()
        assert reported.done.tolist() == [4, 0, 0]
        assert reported.tokens.tolist() == [5, 0, 0]
        assert reported.mean_loss() == 2.5
        for block in range(BLOCKS):
            assert mine.pending(block) == reported.pending(block)
            assert mine.untaken(block) == reported.untaken(block)
            assert mine.eligible(block) == reported.eligible(block)
    assert distant[2].staleness(0, 0) == 3  # as it has stepped before it heard of the others


def test_masses_settle_exactly_although_reports_are_late():
    everybody = distant_ledgers(3)
    everybody[0].offer(0, 1, 10)
    report_all(everybody)
    everybody[1].take(0, 0, 10)
    everybody[2].offer(1, 0, 30)  # neither has been reported
    accounts = accounts_of(everybody)
    late = [(sender, receiver, sender.report_to(receiver.rank)) for sender in everybody for receiver in everybody]
    for ledger in everybody:
        ledger.settle(accounts)
    for sender, receiver, old in late:
        if sender is not receiver:
            assert not receiver.take_report(sender.rank, old, 0, 0, 0, 0.0)
    for ledger in everybody:
        Model(3).assert_agrees(ledger)
    everybody[0].offer(0, 1, 5)
    report_all(everybody)
    assert everybody[1].pending(0) == [(0, 5)]


def test_an_excluded_worker_reports_in_vain():
    first, second, _ = distant_ledgers(3)
    second.offer(0, 0, 10)
    first.exclude(1)
    assert not report(second, first)
    assert first.pending(0) == []
