"""What is simulated: workers, their speeds, whom they offer to, their links, and the quadratic that they train."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from layup_hf.gossip.topology import AUTO_PEERS, neighbours

TOPOLOGIES = ("auto", "uniform", "ring", "exponential")
TIES = ("rotated", "rank")
SPEEDS = ("equal", "straggler", "exponential")


@dataclass(frozen=True)
class Settings:
    """One run. Times are in seconds.

    The model is `f_w(x) = 1/2 sum_c curvature_c (x_c - optimum_wc)^2`; a gradient is exact up to Gaussian noise. The
    optima of all workers have the mean 1.

    A step of a worker is `forward_share` forward and the rest backward; its blocks, all of one size, follow each other
    evenly in both, backward in reverse order.

    Args:
        workers: Number of workers.
        steps: Own steps of each worker on average: the run ends when all have made `workers * steps` together.
        blocks: Blocks of the model.
        dimension: Coordinates of the model, a multiple of `blocks`.
        topology: Whom a worker may offer to: "auto" as the library chooses, which is "uniform" in shared memory and
            "exponential" over links; "uniform" all others; "ring" the two beside it; "exponential" those 1, 2, 4, ...
            places on. Among these it chooses at random.
        peers: `peers_per_step` of `LayupConfig`; None for its default, 0 for no communication.
        offer_every: As in `LayupConfig`.
        turns: Whether over links a block is offered to one peer after the other, as in `layup_hf.gossip.turns`; else to
            all that have taken the last offer.
        speeds: "equal": every step takes `step_seconds`, up to 5 % more or less; "straggler": the last worker's take
            five times that; "exponential": each is prolonged by an exponential delay with a mean of `step_seconds`.
        step_seconds: Of one step.
        model_bytes: Size of the model on its way.
        rate: Bits per second of each worker's link, in each direction; infinity for memory that all share.
        delay: Seconds from asking for a block until it begins to come.
        ties: Whom a worker asks first of peers that it has never merged with: "rotated" the one that comes after
            itself, as the courier does; "rank" the lowest rank, as all do, which leaves most links idle.
        learning_rate: Of plain SGD.
        noise: Standard deviation of a gradient's noise in each coordinate.
        spread: Standard deviation of the workers' optima in each coordinate; 0: all have one objective.
        curvatures: The smallest and the largest; those between are spaced evenly in the logarithm.
        start: Of every worker, in every coordinate.
        slices: Time slices per step; within one, all happens at once. 0: events have exact times.
        forward_share: Of a step.
        step_times: Instead of `speeds`: of each worker's steps, shape (workers, any number), repeated as needed.
        starts: When each worker begins, of shape (workers,). None: at 0 with `step_times`, else at random times within
            the first step, so that equal workers are not in lockstep.
        seed: Of all that is drawn.

    Raises:
        ValueError: A value is not allowed.
    """

    workers: int = 8
    steps: int = 200
    blocks: int = 4
    dimension: int = 32
    topology: str = "auto"
    peers: int | None = None
    offer_every: int = 1
    turns: bool = True
    speeds: str = "equal"
    step_seconds: float = 0.58
    model_bytes: float = 498e6
    rate: float = math.inf
    delay: float = 0.0
    ties: str = "rotated"
    learning_rate: float = 0.1
    noise: float = 0.5
    spread: float = 0.0
    curvatures: tuple[float, float] = (0.1, 1.0)
    start: float = 0.0
    slices: int = 32
    forward_share: float = 1 / 3
    step_times: np.ndarray | None = None
    starts: np.ndarray | None = None
    seed: int = 0

    slots = 2
    """Room for blocks that have come, of each worker: as in `layup_hf.windows.staging`."""

    def __post_init__(self) -> None:
        allowed = {
            "workers": (1 <= self.workers <= 4096, "1 to 4096"),
            "steps": (self.steps >= 1, "at least 1"),
            "blocks": (self.blocks >= 1, "at least 1"),
            "dimension": (
                self.dimension >= 1 and self.dimension % max(self.blocks, 1) == 0,
                f"a multiple of `blocks`, which is {self.blocks}",
            ),
            "topology": (self.topology in TOPOLOGIES, "one of " + ", ".join(TOPOLOGIES)),
            "peers": (self.peers is None or self.peers >= 0, "0 or more, or unset"),
            "offer_every": (self.offer_every >= 1, "at least 1"),
            "speeds": (self.speeds in SPEEDS, "one of " + ", ".join(SPEEDS)),
            "step_seconds": (0 < self.step_seconds < math.inf, "positive and finite"),
            "model_bytes": (0 < self.model_bytes < math.inf, "positive and finite"),
            "rate": (self.rate > 0, "positive"),
            "delay": (0 <= self.delay < math.inf, "0 or more, and finite"),
            "learning_rate": (
                0 <= self.learning_rate < 2 / self.curvatures[1],
                "from 0 to below 2 / largest curvature",
            ),
            "noise": (0 <= self.noise < math.inf, "0 or more, and finite"),
            "spread": (0 <= self.spread < math.inf, "0 or more, and finite"),
            "curvatures": (0 < self.curvatures[0] <= self.curvatures[1], "two positive numbers in ascending order"),
            "slices": (self.slices >= 0, "0 or more"),
            "forward_share": (0 <= self.forward_share < 1, "from 0 to below 1"),
            "step_times": (
                self.step_times is None
                or (self.step_times.ndim == 2 and len(self.step_times) == self.workers and self.step_times.min() > 0),
                "positive, of shape (workers, steps)",
            ),
            "starts": (self.starts is None or self.starts.shape == (self.workers,), "of shape (workers,)"),
        }
        for name, (is_allowed, what) in allowed.items():
            if not is_allowed:
                raise ValueError(f"{name}={getattr(self, name)}: `{name}` must be {what}.")

    @property
    def all_steps(self) -> int:
        """Steps of all workers together."""
        return self.workers * self.steps

    @property
    def peers_per_step(self) -> int:
        """Offers per block and step, as `PeerSampler` counts them."""
        wanted = AUTO_PEERS if self.peers is None else self.peers
        return min(wanted, self.neighbours().shape[1])

    @property
    def has_links(self) -> bool:
        """Whether blocks travel; else a peer's live block is read in place."""
        return math.isfinite(self.rate) or self.delay > 0

    @property
    def block_bytes(self) -> float:
        """Size of one block."""
        return self.model_bytes / self.blocks

    @property
    def block_seconds(self) -> float:
        """Time in which a link carries one block."""
        return 8 * self.block_bytes / self.rate

    @property
    def mean_step_seconds(self) -> float:
        """Of a worker that is not the straggler."""
        if self.step_times is not None:
            return float(self.step_times.mean())
        return self.step_seconds * (2 if self.speeds == "exponential" else 1)

    @property
    def slice_seconds(self) -> float:
        """Width of a time slice."""
        return self.step_seconds / self.slices if self.slices else 0.0

    def neighbours(self) -> np.ndarray:
        """Whom each worker may offer to, int64 of shape (workers, neighbours)."""
        everyone = range(1, self.workers)
        topology = self.topology
        if topology == "auto":
            topology = "exponential" if self.has_links else "uniform"
        others = {
            "uniform": everyone,
            "ring": sorted({1, self.workers - 1} - {0, self.workers}),
            "exponential": sorted(neighbours(0, self.workers, everyone)),
        }[topology]
        return (np.arange(self.workers)[:, None] + np.array(others, dtype=np.int64)) % self.workers

    def curvature(self) -> np.ndarray:
        """Of each coordinate, float64 of shape (dimension,); neighbouring blocks get alike ones."""
        curvature = np.geomspace(*self.curvatures, self.dimension)
        return curvature.reshape(-1, self.blocks).T.ravel()

    def worker_optima(self) -> np.ndarray:
        """Of each worker, float64 of shape (workers, dimension); their mean is 1."""
        draws = np.random.default_rng([self.seed, 1]).standard_normal((self.workers, self.dimension))
        return 1.0 + self.spread * (draws - draws.mean(axis=0))

    def moments(self) -> np.ndarray:
        """When the events of a step are, as a share of the step, float64 of shape (2 * blocks,), ascending: each block
        is about to be used, first to last; each block's gradient is complete, last to first.
        """
        forward = self.forward_share * np.arange(self.blocks) / self.blocks
        backward = self.forward_share + (1 - self.forward_share) * np.arange(1, self.blocks + 1) / self.blocks
        return np.concatenate([forward, backward])

    def draw_step_times(self, random: np.random.Generator) -> np.ndarray:
        """Seconds of each worker's own steps, of shape (workers, some); repeated as needed."""
        if self.step_times is not None:
            return self.step_times
        shape = (self.workers, 2 * self.steps)
        if self.speeds == "exponential":
            return self.step_seconds * (1 + random.exponential(size=shape))
        times = self.step_seconds * random.uniform(0.95, 1.05, shape)
        if self.speeds == "straggler":
            times[-1] *= 5
        return times

    def draw_starts(self, random: np.random.Generator) -> np.ndarray:
        """When each worker begins, of shape (workers,)."""
        if self.starts is not None:
            return self.starts
        if self.step_times is not None:
            return np.zeros(self.workers)
        return random.uniform(0, self.step_seconds, self.workers)
