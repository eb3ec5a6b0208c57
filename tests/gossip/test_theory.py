"""What theory predicts for quadratics, tested on the real engine, ledger and choice of peers.

Every worker `i` has the objective `1/2 |x - c_i|^2`, and its gradients have Gaussian noise. Workers act one after the
other in one process, at times that are given: before its forward a worker merges and takes its gradient; when its
step's time is over it merges, steps and offers.

1. The mass-weighted mean `z` of all workers moves by steps alone, by `w_i / M` of worker i's step, where `w_i` is its
   effective mass at that moment in shares and M the number of workers; a merge does not move it. That is the
   invariant of push-sum (Kempe et al., FOCS 2003), on which stochastic gradient push rests (Assran et al., ICML 2019,
   arXiv 1811.10792), here for offers that are counted with their sender until they are taken.
2. So where `z` comes to rest, `sum_i r_i w_i (x_i - c_i) = 0` with the rates `r_i` of the workers' steps, and `x_i ->
   z` as the learning rate goes to 0: each objective counts in proportion to `r_i w_i`. For AD-PSGD (Lian et al., ICML
   2018, arXiv 1710.06952), whose workers have no masses, it is each worker's share of the updates, `r_i`. With equal
   speeds both are the mean objective. With unequal ones a fast worker counts more, but for LayUp less than by its
   steps, as a fast worker gives away more mass than it gets. If all workers draw from one order of the data, they
   have one objective, and their speeds do not matter.
3. At a constant rate `eta`, one worker's stationary variance is `eta s^2 / 2` for noise of variance `s^2`, to first
   order in `eta`. By 1, `z` makes steps at the rate `eta mean(w)`, and its variance is `mean(w^2) / mean(w) / M` of
   one worker's: the linear speed-up of Lian et al. and of Assran et al., with a factor. That is not 1, as a worker
   steps right after it has taken what was offered to it, so its mass is then at its largest. If all offer to all in
   turn it is exactly `w = 2 M / (M + 1)`: right after a step the masses are `w, w (M - 1) / M, ..., w / M`. At the
   same effective rate, `eta mean(w)`, what is left is the price of unequal masses, `mean(w^2) / mean(w)^2`. The
   workers' own models follow `z`.
4. The workers' distance from `z` is proportional to `eta` (both papers bound its square by a multiple of `eta^2`).
   Without gossip it would grow as `sqrt(eta)`.

The LayUp paper (arXiv 2410.05985) has an analysis of its own of the bias of layer-wise updates, which is not tested
here.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from fleet import open_fleet
from torch import nn

from layup_hf.blocks import split_into_blocks
from layup_hf.gossip.budget import ReadBudget
from layup_hf.gossip.engine import GossipEngine
from layup_hf.gossip.topology import PeerSampler
from layup_hf.ledger.mixing import UNIT


class Point(nn.Module):
    """A model of one block, which is its vector."""

    def __init__(self, dimension):
        super().__init__()
        self.x = nn.Parameter(torch.zeros(dimension, dtype=torch.float64))


@dataclass
class Course:
    """What a run did, in its second half unless said otherwise; shapes: w workers, c coordinates."""

    mean: torch.Tensor  # of z over the steps, (c,)
    z: torch.Tensor  # at the end, (c,)
    accounted: torch.Tensor  # where all steps of the run have moved z, each by its mass, (c,)
    variance: float  # of z around 0, mean over coordinates and steps
    own_variance: float  # of workers' models around 0
    distance: float  # root mean square of |x_i - z| per coordinate
    shares: np.ndarray  # each worker's part of what has moved z, (w,)
    mass: float  # mean of w at steps
    square_mass: float  # mean of w^2 at steps
    done: np.ndarray  # steps of each worker in the whole run, (w,)


class Given(ReadBudget):
    """Gives what it is told to."""

    def __init__(self, rank, peers):
        super().__init__(num_blocks=1, most=1)
        self.peers = peers
        self.due(0)
        for _ in range(rank):  # so that workers offer in different steps
            self.due(0)

    def begin_step(self, now):
        pass

    def note_merge(self, *merge):
        pass


def train(
    optima, *, seconds=None, rate=0.05, noise=0.0, steps=120, peers=2, seed=0, pool=None, jitter=0.1, gossips=True
):
    """Let the workers make `steps` steps each, on average.

    Args:
        optima: float64 of shape (w, c).
        seconds: Of each worker's step; equal by default.
        jitter: Each step takes up to so large a part of it more or less.
        pool: Optima of samples, of shape (any, c): all workers draw theirs from it in one order, again and again.
    """
    workers, dimension = optima.shape
    draws = np.random.default_rng(seed)
    normal = torch.Generator().manual_seed(seed)
    seconds = np.ones(workers) if seconds is None else np.asarray(seconds, dtype=float)
    blocks = [split_into_blocks(Point(dimension))[0] for _ in range(workers)]
    windows = open_fleet([[block] for block in blocks])
    engines = [
        GossipEngine(
            [block],
            window,
            PeerSampler(rank, workers, max(1, int(peers)), seed),
            budget=Given(rank, peers) if peers < 1 else None,
        )
        for rank, (block, window) in enumerate(zip(blocks, windows, strict=True))
    ]
    ledger, x = windows[0].ledger, [block.tensors[0] for block in blocks]
    gradients, cursor = [None] * workers, 0
    accounted, moved, weights = torch.zeros(dimension, dtype=torch.float64), np.zeros(workers), []
    means, variances, own_variances, distances, done = [], [], [], [], np.zeros(workers, dtype=int)

    def shares():
        masses = ledger.masses()[0]
        assert int(masses.sum()) == workers * UNIT  # conserved to the unit
        return torch.from_numpy(masses / (workers * UNIT))

    def begin(worker):
        nonlocal cursor
        if gossips:
            engines[worker].merge(blocks[worker])
        optimum = optima[worker]
        if pool is not None:
            optimum, cursor = pool[cursor % len(pool)], cursor + 1
        gradients[worker] = x[worker] - optimum + noise * torch.randn(dimension, generator=normal, dtype=torch.float64)

    ends = seconds * draws.uniform(0, 1, workers)
    for worker in np.argsort(ends):
        begin(worker)
    for step in range(workers * steps):
        worker = int(ends.argmin())
        if gossips:
            engines[worker].merge(blocks[worker])
        part = shares()
        accounted -= float(part[worker]) * rate * gradients[worker]
        x[worker] -= rate * gradients[worker]
        if gossips:
            engines[worker].offer(blocks[worker])
        done[worker] += 1
        if step >= workers * steps // 2:
            all_x = torch.stack(x)
            z = part @ all_x
            means.append(z)
            moved[worker] += float(part[worker])
            weights.append(float(part[worker]) * workers)
            variances.append(float(z.square().mean()))
            own_variances.append(float(all_x.square().mean()))
            distances.append(float((all_x - z).square().mean()))
        begin(worker)
        ends[worker] += seconds[worker] * draws.uniform(1 - jitter, 1 + jitter)
    course = Course(
        mean=torch.stack(means).mean(0),
        z=shares() @ torch.stack(x),
        accounted=accounted,
        variance=float(np.mean(variances)),
        own_variance=float(np.mean(own_variances)),
        distance=float(np.mean(distances)) ** 0.5,
        shares=moved / moved.sum(),
        mass=float(np.mean(weights)),
        square_mass=float(np.mean(np.square(weights))),
        done=done,
    )
    for window in windows:
        window.close()
    return course


def separate_optima(workers=6, dimension=12):
    """Far from each other, and with a mean other than the start."""
    torch.manual_seed(1)
    return 1.0 + torch.randn(workers, dimension, dtype=torch.float64)


def distance(a, b):
    """Root mean square over coordinates."""
    return float((a - b).square().mean().sqrt())


SLOW_AND_FAST = [0.25, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("seconds", [None, SLOW_AND_FAST])
def test_the_weighted_mean_moves_by_steps_alone_and_mass_is_conserved(seconds):
    """1. That mass is conserved is asserted before and after every step."""
    course = train(separate_optima(), seconds=seconds, noise=1.0, steps=40)
    assert distance(course.z, course.accounted) < 1e-12
    assert course.done.sum() == 6 * 40


def test_with_equal_speeds_workers_find_the_optimum_of_the_mean_objective():
    """2. Up to a twentieth of how far the objectives are from each other."""
    optima = separate_optima()
    assert distance(train(optima).mean, optima.mean(0)) < 0.05 * distance(optima[0], optima.mean(0))


def test_with_unequal_speeds_objectives_count_by_steps_times_mass():
    """2. A fast worker counts more, yet less than by its steps."""
    optima = separate_optima()
    course = train(optima, seconds=SLOW_AND_FAST)
    weighted = torch.from_numpy(course.shares) @ optima
    assert distance(course.mean, weighted) < 0.2 * distance(weighted, optima.mean(0))
    by_steps = course.done / course.done.sum()
    assert 1 / 6 < course.shares[0] < 0.9 * by_steps[0]
    assert course.shares[-1] < 1 / 6


@pytest.mark.parametrize("seconds", [None, SLOW_AND_FAST])
def test_with_batches_from_one_order_all_find_the_optimum_of_the_mean_objective(seconds):
    """2. Whoever is fast: the same tolerance as with equal speeds."""
    pool = separate_optima(workers=24)
    course = train(torch.zeros(6, 12, dtype=torch.float64), seconds=seconds, pool=pool)
    assert distance(course.mean, pool.mean(0)) < 0.05 * distance(pool[0], pool.mean(0))


def noisy(workers, rate, **options):
    return train(torch.zeros(workers, 100, dtype=torch.float64), rate=rate, noise=1.0, **options)


@pytest.mark.parametrize(("workers", "peers"), [(1, 1), (4, 3), (8, 1), (8, 7)])
def test_the_variance_falls_with_the_number_of_workers(workers, peers):
    """3. Within 15 %; the mean variance of workers' own models is less than twice that."""
    rate = 0.05
    course = noisy(workers, rate, peers=peers, steps=1200 // workers, seed=3)
    expected = course.square_mass / course.mass * (rate / 2) / workers
    assert course.variance == pytest.approx(expected, rel=0.15)
    assert course.own_variance < 2 * expected


@pytest.mark.parametrize("peers", [1 / 8, 1 / 2])
def test_few_offers_cost_the_mean_nothing_and_workers_a_distance(peers):
    """What a budget may come to: a block is offered in every eighth step. 3. The variance of the mean is no larger than
    with all peers; that of workers' own models is, but stays below what each would have by itself.
    """
    few, all_peers = (noisy(8, 0.05, peers=count, steps=150, seed=3) for count in (peers, 7))
    assert few.variance < 1.15 * all_peers.variance
    assert all_peers.distance < few.distance < 4 * all_peers.distance
    assert few.own_variance < 0.05 / 2


@pytest.mark.parametrize("workers", [2, 4, 7])
def test_a_worker_steps_when_its_mass_is_largest(workers):
    """3. All offer to all in turn; the masses are in proportion to what is left of each offer."""
    course = noisy(workers, 0.05, peers=workers - 1, steps=80, jitter=0.0)
    assert course.mass == pytest.approx(2 * workers / (workers + 1), rel=1e-6)
    assert course.square_mass == pytest.approx(course.mass**2, rel=1e-6)


def test_the_price_of_unequal_masses_is_small_with_many_peers():
    """3. `mean(w^2) / mean(w)^2` is 1 for equal masses."""
    courses = [noisy(8, 0.05, peers=peers, steps=50) for peers in (1, 7)]
    few, many = (course.square_mass / course.mass**2 for course in courses)
    assert 1 < many < 1.1
    assert many < few < 1.5


def test_the_distance_of_workers_is_proportional_to_the_learning_rate():
    """4. Within 10 % from one doubling to the next."""
    distances = [noisy(6, rate, steps=100).distance for rate in (0.01, 0.02, 0.04)]
    assert distances[1] / distances[0] == pytest.approx(2, rel=0.1)
    assert distances[2] / distances[1] == pytest.approx(2, rel=0.1)


def test_without_gossip_neither_holds():
    """What would happen if mixing did nothing: workers do not agree, and nobody's model gets better by the others."""
    distances = [noisy(6, rate, steps=200, gossips=False).distance for rate in (0.02, 0.04)]
    assert distances[1] / distances[0] < 1.6
    course = noisy(8, 0.05, steps=100, gossips=False)
    assert course.own_variance > 5 * 0.05 / (2 - 0.05) / 8
