"""Peers on other hosts are offered to one after the other; nobody waits for a slow one."""

from collections import Counter

import numpy as np
import pytest
from fleet import Fleet, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import UNIT
from torch import nn

from layup_hf.gossip.engine import GossipEngine
from layup_hf.gossip.topology import PeerSampler
from layup_hf.gossip.turns import PATIENCE, WIDER_AFTER, Turns
from layup_hf.ledger import effective_masses
from layup_hf.ledger.mixing import merge_weight, share

PEERS = [1, 2, 4]


def offered(turns, eligible, block=0):
    """Who is offered to."""
    peers = turns.due(block, eligible)
    turns.note_offered(block, peers)
    return peers


def test_each_peer_has_its_turn_when_the_one_before_has_taken_its_offer():
    turns = Turns(1, PEERS)
    found = []
    for _ in range(6):
        found += offered(turns, PEERS)
        waiting = [peer for peer in PEERS if peer != found[-1]]
        assert offered(turns, waiting) == []  # it waits, and this worker has merged nothing meanwhile
    assert found == [1, 2, 4, 1, 2, 4]


def test_a_peer_that_does_not_take_its_offer_keeps_nobody_waiting():
    turns = Turns(1, PEERS)
    assert offered(turns, PEERS) == [1]
    turns.note_merged(0, 4)
    assert offered(turns, [2, 4]) == [2]
    assert offered(turns, [4]) == []  # nothing has been merged since
    assert offered(turns, [2, 4]) == [4]  # 2 has taken its offer; nobody waits for 1 any more
    turns.note_merged(0, 2)
    assert offered(turns, [2]) == [2]
    assert offered(turns, []) == []


def test_a_peer_that_takes_much_longer_than_the_quickest_keeps_nobody_waiting():
    """Although nothing is merged meanwhile, as all others wait for it, too."""
    turns = Turns(1, PEERS)
    assert offered(turns, PEERS) == [1]
    assert offered(turns, [2, 4]) == []
    assert offered(turns, PEERS) == [2]  # 1 took two steps
    assert [offered(turns, [1, 4]) for _ in range(2 * PATIENCE + 1)] == [[]] * (2 * PATIENCE) + [[4]]
    assert offered(turns, [1]) == []  # 4 has not been waited for


def test_before_anything_is_known_of_peers_nobody_is_slow():
    turns = Turns(1, PEERS)
    assert offered(turns, PEERS) == [1]
    assert [offered(turns, [2, 4]) for _ in range(50)] == [[]] * 50


def test_merges_with_peers_on_this_host_say_nothing_of_links():
    turns = Turns(1, [4, 6])
    assert offered(turns, [1, 4, 6]) == [1, 4]
    turns.note_merged(0, 1)
    assert offered(turns, [1, 6]) == [1]


def test_blocks_have_turns_of_their_own():
    turns = Turns(2, PEERS)
    assert [offered(turns, PEERS, block) for block in (0, 0, 1, 0)] == [[1], [2], [1], [4]]


def test_where_links_carry_more_than_a_block_in_each_step_more_are_offered_to_at_a_time():
    turns = Turns(1, PEERS)
    numbers = [len(offered(turns, PEERS)) for _ in range(3 * WIDER_AFTER + 2)]
    assert numbers == [1] * WIDER_AFTER + [2] * WIDER_AFTER + [3] * (WIDER_AFTER + 2)
    assert offered(turns, [1, 2]) == []  # 4 has not taken its offer
    assert len(offered(turns, PEERS)) == 1


def test_where_some_are_not_in_time_it_stays_at_one():
    """As where a link carries just about a block in each step."""
    turns = Turns(1, PEERS)
    for number in range(8 * WIDER_AFTER):
        eligible = PEERS if number % (WIDER_AFTER // 2) else [2, 4]
        assert len(offered(turns, eligible)) <= 1


def test_who_is_gone_has_no_turn():
    turns = Turns(1, PEERS)
    assert offered(turns, PEERS) == [1]
    turns.exclude(1)
    turns.exclude(1)
    assert [offered(turns, [2, 4]) for _ in range(3)] == [[2], [4], [2]]
    turns.exclude(2)
    turns.exclude(4)
    assert offered(turns, [3]) == [3]  # on this host


@settings(max_examples=50)
@given(data=st.data())
def test_it_chooses_among_those_who_may_be_offered_to(data):
    """Whatever happens; and whoever has taken its offer gets its turn after at most as many others as there are."""
    turns = Turns(1, PEERS)
    since = dict.fromkeys(PEERS, 0)
    for _ in range(40):
        eligible = data.draw(st.lists(st.sampled_from([0, 3, *PEERS]), unique=True))
        peers = offered(turns, eligible)
        assert {0, 3} & set(eligible) <= set(peers) <= set(eligible)
        assert len(set(peers)) == len(peers)
        for peer in PEERS:
            is_passed_over = peer in eligible and peer not in peers and bool(set(peers) & set(PEERS))
            since[peer] = since[peer] + len(set(peers) & set(PEERS)) if is_passed_over else 0
            assert since[peer] < 2 * len(PEERS)
        if data.draw(st.booleans()):
            turns.note_merged(0, data.draw(st.sampled_from([0, *PEERS])))


def test_the_engine_offers_to_peers_on_other_hosts_in_turn():
    """Half of its mass to each instead of a third to both; what is on this host is offered to beside that."""
    fleet = Fleet([nn.Sequential(nn.Linear(2, 2)) for _ in range(4)])
    engine = GossipEngine(fleet.blocks[0], fleet.windows[0], PeerSampler(0, 4, None, 0, [1, 2]))
    ledger = engine.ledger
    engine.offer(fleet.blocks[0][0])
    assert [ledger._offered[0, peer, 0] for peer in (1, 2, 3)] == [UNIT // 3, 0, UNIT // 3]
    fleet.run(("merge", 1, 0))
    engine.offer(fleet.blocks[0][0])
    assert ledger._offered[0, 2, 0] == UNIT - 2 * (UNIT // 3) - ledger.own(0)  # 1 has taken its, so 2 has its turn
    engine.exclude(2)
    engine.offer(fleet.blocks[0][0])
    assert ledger._offered[0, 1, 0] > UNIT // 3
    assert int(ledger.masses().sum()) == 3 * UNIT  # 2 has taken nothing
    fleet.close()


def test_a_merge_with_a_peer_on_another_host_gives_the_next_one_its_turn():
    fleet = Fleet([nn.Sequential(nn.Linear(2, 2)) for _ in range(3)])
    engine = GossipEngine(fleet.blocks[0], fleet.windows[0], PeerSampler(0, 3, None, 0, [1, 2]))
    block = fleet.blocks[0][0]
    engine.offer(block)
    engine.offer(block)
    assert engine.counts["offers"] == 1
    fleet.run(("offer", 2, 0, 2))
    engine.merge(block)
    engine.offer(block)
    assert engine.counts["offers"] == 2
    assert engine.ledger.eligible(0) == []
    fleet.close()


def test_over_a_network_everybody_has_turns_and_mass_stays():
    workers, blocks = 3, 2
    fleet = Fleet([nn.Sequential(*(nn.Linear(2, 2) for _ in range(blocks))) for _ in range(workers)], "nixl")
    ledgers = [windows.ledger for windows in fleet.windows]
    engines = [
        GossipEngine(fleet.blocks[rank], windows, PeerSampler(rank, workers, None, 0, windows.ledger.remote))
        for rank, windows in enumerate(fleet.windows)
    ]
    for distant in fleet.distant:
        distant.courier.accepts = lambda peer, block: True

    def all_have_merged_with_all():
        for engine, own in zip(engines, fleet.blocks, strict=True):
            for block in own:
                engine.merge(block)
                engine.offer(block)
        return all((np.delete(ledger._taken[:, ledger.rank], ledger.rank, axis=1) > 0).all() for ledger in ledgers)

    wait_until(all_have_merged_with_all, "merges")
    fleet.wait_until_all_know()
    masses = effective_masses({ledger.rank: ledger.account() for ledger in ledgers})
    assert masses.sum(axis=1).tolist() == [workers * UNIT] * blocks
    fleet.close()


def spread(workers, slow, in_turn, steps=400, slower=20):
    """Mean square of how far workers are from their mean, who all make a random step of a block at a time and then
    merge one peer's in every eighth, the slow one in fewer; and the mean weight of merges. By the library's arithmetic.
    """
    draws = np.random.default_rng(0)
    values, own = np.zeros((workers, 100)), [UNIT] * workers
    offers, merged = {}, {}
    jumps = [2**n for n in range(workers.bit_length()) if 2**n < workers]
    turns = [Turns(1, [(rank + jump) % workers for jump in jumps]) for rank in range(workers)]
    squares, weights = [], []
    for step in range(steps):
        values += draws.normal(size=values.shape)
        for rank in range(workers):
            peers = [(rank + jump) % workers for jump in jumps]
            free = [peer for peer in peers if (rank, peer) not in offers]
            if in_turn:
                free = offered(turns[rank], free)
            units = share(own[rank], len(free)) if free else 0
            for peer in free if units else []:
                offers[rank, peer] = units
                own[rank] -= units
        for rank in range(workers):
            senders = [sender for sender, receiver in offers if receiver == rank]
            every = 8 * (slower if rank == slow else 1)
            if senders and (step + rank) % every == 0:
                sender = min(senders, key=lambda s: merged.get((rank, s), -1))
                units = offers.pop((sender, rank))
                untaken = sum(u for (s, _), u in offers.items() if s == rank)
                weights.append(merge_weight(units, own[rank], untaken))
                values[rank] += weights[-1] * (values[sender] - values[rank])
                own[rank] += units
                merged[rank, sender] = step
                turns[rank].note_merged(0, sender)
        others = [rank for rank in range(workers) if rank != slow]
        squares.append(values[others].var(0).mean())
    assert sum(own) + sum(offers.values()) == workers * UNIT
    return float(np.mean(squares[steps // 2 :])), float(np.mean(weights))


@pytest.mark.parametrize(
    ("workers", "slow", "at_most"),
    [(3, None, 0.8), (4, None, 0.8), (8, None, 0.6), (4, 3, 1.0), (8, 7, 0.65), (3, 2, 1.1)],
)
def test_with_the_same_bytes_workers_are_closer_together(workers, slow, at_most):
    """Also with a peer that takes hardly anything: only for the two others of three it is a little worse."""
    (distance, weight), (at_once, less) = (spread(workers, slow, in_turn) for in_turn in (True, False))
    assert distance < at_most * at_once
    assert weight > 1.1 * less or slow is not None


def test_turns_are_fair():
    turns = Turns(1, PEERS)
    times = Counter(peer for _ in range(300) for peer in offered(turns, PEERS))
    assert max(times.values()) - min(times.values()) <= 1
