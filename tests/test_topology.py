"""Peers are drawn uniformly, without repetition, and differently by each rank."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layup_hf.topology import AUTO_PEERS, MOST_WAITING, PeerSampler


def draws(number=50, *, rank=0, world_size=6, count=2, seed=0):
    sampler = PeerSampler(rank, world_size, count, seed)
    peers = [peer for peer in range(world_size) if peer != rank]
    return [tuple(sampler.sample(peers)) for _ in range(number)]


@given(
    world_size=st.integers(2, 20),
    count=st.none() | st.integers(1, 20),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
@settings(deadline=None)
def test_a_sample_is_of_eligible_peers_without_repetition_and_as_large_as_can_be(world_size, count, seed, data):
    rank = data.draw(st.integers(0, world_size - 1))
    eligible = data.draw(st.lists(st.sampled_from(range(world_size)), unique=True).map(sorted))
    eligible = [peer for peer in eligible if peer != rank]
    sampler = PeerSampler(rank, world_size, count, seed)
    for _ in range(3):
        peers = sampler.sample(eligible)
        assert rank not in peers
        assert set(peers) <= set(eligible)
        assert len(set(peers)) == len(peers) == min(sampler.count, len(eligible))


@pytest.mark.parametrize(
    ("world_size", "asked", "count"), [(8, 3, 3), (4, 9, 3), (4, None, 3), (8, None, 7), (100, None, AUTO_PEERS)]
)
def test_count_is_what_was_asked_for_as_far_as_there_are_peers(world_size, asked, count):
    assert PeerSampler(0, world_size, asked).count == count


def test_draws_are_the_same_for_the_same_seed_and_rank():
    assert draws(rank=1, seed=3) == draws(rank=1, seed=3)


def test_draws_differ_between_ranks():
    """Of peers that all of these ranks have."""
    sequences = []
    for rank in range(4):
        sampler = PeerSampler(rank, 9, 2, seed=0)
        sequences.append(tuple(tuple(sampler.sample(range(4, 9))) for _ in range(20)))
    assert len(set(sequences)) == 4


def test_draws_differ_between_seeds():
    assert draws(seed=0) != draws(seed=1)


def test_global_seeds_have_no_influence_and_feel_none():
    random.seed(0)
    expected = random.random()
    first = draws()
    random.seed(0)
    assert draws() == first
    assert random.random() == expected


@pytest.mark.parametrize("count", [1, 2, 4])
def test_peers_are_drawn_uniformly(count):
    number = 5000
    times = Counter(peer for sample in draws(number, count=count) for peer in sample)
    expected = number * count / 5
    assert set(times) == {1, 2, 3, 4, 5}
    assert all(abs(times[peer] - expected) < 0.1 * expected for peer in times)


@pytest.mark.parametrize(("count", "expected"), [(None, [4, 3]), (2, [2, 2]), (4, [4, 3])])
def test_with_fewer_peers_there_are_no_more_offers_than_peers(count, expected):
    sampler = PeerSampler(0, 6, count)
    found = []
    for peer in (2, 5):
        sampler.exclude(peer)
        found.append(sampler.count)
    assert found == expected


@given(world_size=st.integers(2, 20), count=st.none() | st.integers(1, 20), seed=st.integers(0, 2**32), data=st.data())
@settings(deadline=None)
def test_no_more_offers_wait_for_peers_on_other_hosts_than_may(world_size, count, seed, data):
    """Whoever has taken what it was offered; with peers on this host, nothing changes."""
    peers = range(1, world_size)
    remote = data.draw(st.sets(st.sampled_from(peers)))
    sampler, waiting = PeerSampler(0, world_size, count, seed, remote), set()
    for _ in range(5):
        eligible = [peer for peer in peers if peer not in waiting]
        chosen = set(sampler.sample(eligible))
        assert chosen <= set(eligible)
        local = [peer for peer in eligible if peer not in remote]
        room = MOST_WAITING - len(waiting & remote)
        assert len(chosen) == min(sampler.count, len(local) + min(room, len(remote - waiting)))
        waiting |= chosen
        assert len(waiting & remote) <= MOST_WAITING
        waiting -= data.draw(st.sets(st.sampled_from(sorted(waiting)))) if waiting else set()


def test_peers_on_other_hosts_are_all_offered_to_in_turn():
    sampler = PeerSampler(0, 8, None, 0, remote=range(4, 8))
    times = Counter(peer for _ in range(4000) for peer in sampler.sample(range(1, 8)))
    assert {peer: times[peer] for peer in (1, 2, 3)} == dict.fromkeys((1, 2, 3), 4000)
    assert all(abs(times[peer] - 1000) < 150 for peer in range(4, 8))


def test_an_excluded_peer_takes_no_room():
    """What it had not taken is taken back, so it does not wait any more."""
    sampler = PeerSampler(0, 3, None, 0, remote=[1, 2])
    assert sampler.sample([2]) == []  # peer 1 has not taken its offer
    sampler.exclude(1)
    assert sampler.sample([2]) == [2]
