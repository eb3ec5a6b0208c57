"""Few peers over a network, all on one host; drawn uniformly, without repetition, and differently by each rank."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layup_hf.gossip.topology import AUTO_PEERS, PeerSampler, neighbours


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


@pytest.mark.parametrize(
    ("rank", "world_size", "remote", "expected"),
    [
        (0, 8, range(1, 8), {1, 2, 4}),
        (6, 8, [0, 1, 2, 3, 4, 5, 7], {7, 0, 2}),
        (1, 2, [0], {0}),
        (2, 3, [0, 1], {0, 1}),
        (1, 8, [4, 5, 6, 7], {0, 2, 3, 5}),  # two hosts of four: all of this one, and the one that is 4 on
        (0, 5, [], {1, 2, 3, 4}),
    ],
)
def test_neighbours_are_all_on_this_host_and_few_on_others(rank, world_size, remote, expected):
    assert neighbours(rank, world_size, remote) == expected


@given(hosts=st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_information_comes_from_anyone_to_anyone_in_few_exchanges(hosts):
    """Whatever the number of workers on each host; as many exchanges as the number of workers has binary digits."""
    homes = [number for number, count in enumerate(hosts) for _ in range(count)]
    ranks = range(len(homes))
    sends = [neighbours(r, len(homes), [p for p in ranks if homes[p] != homes[r]]) for r in ranks]
    for rank in ranks:
        reached = {rank}
        for _ in range((len(homes) - 1).bit_length()):
            reached |= set().union(*(sends[r] for r in reached))
        assert reached == set(ranks)


@given(world_size=st.integers(2, 20), count=st.none() | st.integers(1, 20), data=st.data())
def test_only_neighbours_are_drawn(world_size, count, data):
    remote = data.draw(st.sets(st.sampled_from(range(1, world_size))))
    eligible = sorted(data.draw(st.sets(st.sampled_from(range(1, world_size)))))
    sampler, those = PeerSampler(0, world_size, count, 0, remote), neighbours(0, world_size, remote)
    assert sampler.count == min(count or AUTO_PEERS, len(those))
    drawn = sampler.sample(eligible)
    assert set(drawn) <= those & set(eligible)
    assert len(set(drawn)) == len(drawn) == min(sampler.count, len(those & set(eligible)))
