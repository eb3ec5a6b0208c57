"""The simulation of many workers: exact where it can be worked out by hand, equal to one that is written plainly."""

import heapq
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from layup_hf.gossip.turns import Turns
from layup_hf.ledger.counts import percentile
from layup_hf.ledger.mixing import UNIT, merge_weight, share
from recipes.measure.simulate.case import all_reduce, first_loss, gossip, seconds_to, simulate
from recipes.measure.simulate.settings import Settings
from recipes.measure.simulate.simulation import Simulation, mean
from recipes.measure.simulate.turns import ManyTurns

SMALL = {"blocks": 2, "dimension": 4, "steps": 20}
LINK = {"rate": 8e8, "model_bytes": 1e8, "step_seconds": 1.0}  # the model takes a second


def run(**options):
    simulation = Simulation(Settings(**SMALL | options))
    simulation.advance(math.inf)
    return simulation


def uneven(workers, seed=0):
    """Times of steps such that no two events fall together."""
    return np.random.default_rng(seed).uniform(0.5, 1.5, (workers, 40))


@pytest.mark.parametrize("topology", ["auto", "uniform", "ring", "exponential"])
@pytest.mark.parametrize("link", [{}, LINK, {"delay": 0.3}])
@pytest.mark.parametrize("speeds", ["straggler", "exponential"])
def test_mass_is_conserved_and_no_worker_is_lost(topology, link, speeds):
    simulation = Simulation(Settings(workers=6, topology=topology, speeds=speeds, spread=1.0, **SMALL | link))
    for moment in range(0, 200, 5):
        simulation.advance(moment)
        assert (simulation.masses().sum(axis=1) == 6 * UNIT).all()
        assert (simulation.own >= 0).all()
        assert (simulation.waiting.sum(axis=1) == simulation.masses() - simulation.own).all()
    assert simulation.has_ended
    assert (simulation.steps.sum(axis=1) == 6 * 20).all()
    assert (simulation.steps > 0).all()
    assert np.isfinite(simulation.values).all()
    assert simulation.merges > 0


def test_merges_alone_leave_the_mean_where_it_is():
    """Also where many merge with each other at the same time."""
    simulation = Simulation(Settings(workers=6, learning_rate=0.0, slices=4, **SMALL))
    simulation.values[:] = np.random.default_rng(0).standard_normal(simulation.values.shape)
    before = simulation.mean()
    distance = simulation.consensus_distance()
    simulation.advance(math.inf)
    np.testing.assert_allclose(simulation.mean(), before, rtol=1e-12, atol=1e-12)
    assert simulation.consensus_distance() < 1e-3 * distance


@pytest.mark.parametrize("link", [{}, LINK])
def test_equal_starts_without_steps_stay_equal(link):
    assert run(workers=5, learning_rate=0.0, start=0.7, **link).consensus_distance() < 1e-15


@pytest.mark.parametrize("workers", [2, 4, 7])
def test_staleness_of_workers_that_take_turns(workers):
    """All offer to all, and one after the other ends its step: the peer that came m turns ago is m - 1 steps old."""
    turns = np.arange(workers) / workers
    simulation = run(workers=workers, blocks=1, step_times=np.ones((workers, 1)), starts=turns, slices=0, steps=50)
    full = {age: count for age, count in simulation.staleness.items() if count > 1}
    assert sorted(full) == list(range(workers - 1))
    assert mean(simulation.staleness) == pytest.approx((workers - 2) / 2, abs=0.1)


def test_a_link_carries_what_it_can():
    """Two workers, a block takes half a second: it carries two each second, so nearly two merges per step of one."""
    simulation = run(workers=2, slices=64, **LINK)
    carried = simulation.bytes_read * 8 / 8e8 / simulation.now / 2
    assert 0.7 < carried <= 1.0
    slow = run(workers=2, slices=64, **LINK | {"rate": 8e7})
    assert slow.merges < 0.15 * simulation.merges
    assert mean(slow.staleness) > 4 * mean(simulation.staleness)


def plainly(settings, choose):
    """The same without arrays, links and slices: one event after the other, from a heap."""
    s, width = settings, settings.dimension // settings.blocks
    curvature, optima = s.curvature().reshape(s.blocks, width), s.worker_optima().reshape(s.workers, s.blocks, width)
    x = np.full((s.workers, s.blocks, width), float(s.start))
    own = {(w, b): UNIT for w in range(s.workers) for b in range(s.blocks)}
    offers, gradients, staleness = {}, {}, Counter()
    steps, stamps = Counter(), Counter()
    left, events = s.all_steps - s.workers, []

    def plan(worker, begin, number):
        duration = s.step_times[worker, number % s.step_times.shape[1]]
        for place, moment in enumerate(s.moments()):
            heapq.heappush(events, (begin + moment * duration, worker, place, number))

    for worker in range(s.workers):
        plan(worker, 0.0, 0)
    while events:
        now, w, place, number = heapq.heappop(events)
        b = place if place < s.blocks else 2 * s.blocks - 1 - place
        for sender in range(s.workers):
            if units := offers.pop((sender, w, b), 0):
                untaken = sum(u for (i, _, block), u in offers.items() if (i, block) == (w, b))
                x[w, b] += merge_weight(units, own[w, b], untaken) * (x[sender, b] - x[w, b])
                own[w, b] += units
                staleness[sum(steps[i, b] for i in range(s.workers)) - stamps[sender, b]] += 1
        if place < s.blocks:
            gradients[w, b] = curvature[b] * (x[w, b] - optima[w, b])
            continue
        x[w, b] -= s.learning_rate * gradients[w, b]
        steps[w, b] += 1
        stamps[w, b] = sum(steps[i, b] for i in range(s.workers))
        if steps[w, b] % s.offer_every == 0:
            peers = choose([p for p in s.neighbours()[w].tolist() if (w, p, b) not in offers])
            for peer in peers if peers and share(own[w, b], len(peers)) else []:
                offers[w, peer, b] = share(own[w, b], len(peers))
            own[w, b] -= sum(offers[w, peer, b] for peer in peers)
        if place == 2 * s.blocks - 1 and left:
            left -= 1
            plan(w, now, number + 1)
    return x.swapaxes(0, 1), staleness, own


@pytest.mark.parametrize("topology", ["uniform", "ring"])
@pytest.mark.parametrize("offer_every", [1, 3])
def test_it_equals_a_plain_simulation(topology, offer_every):
    """Where all neighbours are offered to, so that nothing is drawn, to the rounding of a sum."""
    settings = Settings(
        workers=5, topology=topology, offer_every=offer_every, noise=0.0, spread=1.0, slices=0, step_times=uneven(5),
        **SMALL,
    )  # fmt: skip
    simulation = Simulation(settings)
    simulation.advance(math.inf)
    values, staleness, own = plainly(settings, choose=lambda eligible: eligible)
    np.testing.assert_allclose(simulation.values, values, rtol=1e-10, atol=1e-12)
    assert simulation.staleness == staleness
    assert [[own[w, b] for w in range(5)] for b in range(2)] == simulation.own.tolist()


def test_it_agrees_with_a_plain_simulation_where_peers_are_drawn():
    settings = Settings(
        workers=6, peers=2, noise=0.0, spread=1.0, slices=0, step_times=uneven(6), blocks=2, dimension=8, steps=150
    )
    simulation = Simulation(settings)
    simulation.advance(math.inf)
    draw = np.random.default_rng(5)

    def choose(eligible):
        return eligible if len(eligible) <= 2 else draw.choice(eligible, 2, replace=False).tolist()

    values, staleness, _ = plainly(settings, choose)
    assert mean(simulation.staleness) == pytest.approx(mean(staleness), rel=0.1)
    assert simulation.staleness.total() == pytest.approx(staleness.total(), rel=0.05)
    plain_mean = values.mean(axis=1)
    plain = np.sqrt(np.square(values - plain_mean[:, None]).sum() / 6 / np.square(plain_mean).sum())
    assert simulation.consensus_distance() == pytest.approx(plain, rel=0.5)  # one moment of each


def test_slices_change_little():
    exact, sliced = (gossip(Settings(workers=6, slices=n, seed=4, steps=100)) for n in (0, 32))
    assert sliced["distance"] == pytest.approx(exact["distance"], rel=0.2)
    assert sliced["staleness"][0] == pytest.approx(exact["staleness"][0], rel=0.2)


def test_all_reduce_waits_for_the_slowest_and_for_the_link():
    settings = Settings(workers=4, speeds="straggler", steps=10, step_seconds=1.0, model_bytes=1e8, rate=8e8)
    seconds = all_reduce(settings)[-1][0] / 10
    assert seconds == pytest.approx(5 + 1.5, abs=0.3)  # 5 times the step, and 2 * 3/4 of the model's second


def test_a_whole_case_says_who_reaches_the_loss():
    result = simulate({"workers": 8, "steps": 150})
    assert result["to_loss"]["alone"] is None
    assert result["to_loss"]["layup"] is not None or result["final_loss"] < 0.1
    assert result["distance"] < 0.5 * result["distance_alone"]
    assert first_loss(Settings(workers=8)) > 1


def test_when_a_loss_is_reached():
    assert seconds_to([(1.0, 3.0), (2.0, 1.0), (3.0, 2.0)], 1.5) == 2.0
    assert seconds_to([(1.0, 3.0)], 1.5) is None
    assert percentile(Counter({1: 3, 5: 1}), 50) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "`workers` must be 1"),
        ({"steps": 0}, "`steps` must be at least 1"),
        ({"dimension": 30}, "`dimension` must be a multiple of `blocks`"),
        ({"topology": "star"}, "`topology` must be one of auto, uniform, ring"),
        ({"peers": -1}, "`peers` must be 0 or more"),
        ({"offer_every": 0}, "`offer_every` must be at least 1"),
        ({"speeds": "fast"}, "`speeds` must be one of"),
        ({"rate": 0.0}, "`rate` must be positive"),
        ({"delay": -1.0}, "`delay` must be 0 or more"),
        ({"learning_rate": 2.0}, "`learning_rate` must be from 0"),
        ({"step_times": np.zeros((8, 2))}, "`step_times` must be positive"),
        ({"starts": np.zeros(3)}, "`starts` must be of shape"),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Settings(**options)


@settings_of_hypothesis(max_examples=30)
@given(seed=st.integers(0, 2**31))
def test_the_turns_of_many_workers_are_those_of_each(seed):
    """Of all blocks and workers at once the same as of one after the other."""
    blocks, workers, neighbours = 2, 3, 4
    draw, many = np.random.default_rng(seed), ManyTurns(blocks, workers, neighbours)
    each = {(b, w): Turns(1, range(neighbours)) for b in range(blocks) for w in range(workers)}
    for _ in range(60):
        acting = [pair for pair in each if draw.random() < 0.7] or [(0, 0)]
        b, w = np.array(acting).T
        eligible = draw.random((len(acting), neighbours)) < draw.choice([0.5, 1.0])
        due = many.due(b, w, eligible)
        for row, pair in enumerate(acting):
            peers = each[pair].due(0, np.flatnonzero(eligible[row]).tolist())
            assert set(peers) == set(np.flatnonzero(due[row]).tolist())
            each[pair].note_offered(0, peers)
        rows, places = np.nonzero(due)
        many.note_offered(b[rows], w[rows], places)
        for pair in (pair for pair in acting if draw.random() < 0.3):
            each[pair].note_merged(0, 0)
            many.note_merged(np.array([pair[0]]), np.array([pair[1]]))


def test_over_links_turns_bring_workers_closer_together():
    settings = {"workers": 8, "steps": 60, "rate": 3e9, "slices": 16, "seed": 1}
    found = {turns: gossip(Settings(turns=turns, **settings)) for turns in (True, False)}
    assert found[True]["reads"] == pytest.approx(found[False]["reads"], rel=0.1)
    assert found[True]["distance"] < 0.9 * found[False]["distance"]
