"""One case: LayUp simulated, beside all-reduce and beside no communication."""

from __future__ import annotations

import functools
import math
import time
from dataclasses import replace
from typing import Any

import numpy as np

from layup_hf.ledger.counts import percentile

from .settings import Settings
from .simulation import Simulation, mean

TARGET = 0.025
"""Loss to reach, of that at the start. With the default rate and noise one worker alone never gets there, as its noise
keeps it at 0.032 of it."""

Curve = list[tuple[float, float]]
"""(seconds, loss), in the order of time."""


def seconds_to(curve: Curve, loss: float) -> float | None:
    """When the loss was first as low as this; None: never."""
    return next((seconds for seconds, value in curve if value <= loss), None)


def first_loss(settings: Settings) -> float:
    """At the start of training."""
    return float(0.5 * (settings.curvature() * (settings.start - 1.0) ** 2).sum())


def gossip(settings: Settings) -> dict[str, Any]:
    """Simulate, and look twice per step of a worker.

    Returns:
        `curve`: of the mean loss of the workers' own models, so that disagreement counts, as it would in a network
        that is not a quadratic. `distance`: consensus distance, mean over the second half of the run. `staleness`:
        of merges in clock steps: mean, median, 95 %; and `rounds`, the mean by the number of workers. `link`: the share
        of the link's rate that blocks took. `reads`: models that a worker read per own step. `seconds` of the run.
    """
    simulation, curve, distances = Simulation(settings), [], []
    while not simulation.has_ended:
        simulation.advance(simulation.now + settings.mean_step_seconds / 2)
        curve.append((simulation.now, simulation.own_loss()))
        distances.append(simulation.consensus_distance())
    counts, received = simulation.staleness, simulation.bytes_read / settings.workers
    return {
        "curve": curve,
        "distance": float(np.mean(distances[len(distances) // 2 :])),
        "staleness": [mean(counts), percentile(counts, 50), percentile(counts, 95)] if counts else None,
        "rounds": mean(counts) / settings.workers if counts else None,
        "link": 8 * received / settings.rate / simulation.now,
        "reads": received / settings.model_bytes / settings.steps,
        "seconds": simulation.now,
    }


def all_reduce(settings: Settings) -> Curve:
    """Synchronous training: each step waits for the slowest worker, and then for a ring all-reduce of the gradients.

    The ring takes `2 (workers - 1) / workers` times the model's bytes over each link. None of it is hidden behind
    backward, which is more than DDP takes.
    """
    s, random = settings, np.random.default_rng(settings.seed)
    times = s.draw_step_times(random)
    ring = 2 * (s.workers - 1) / s.workers * 8 * s.model_bytes / s.rate + (2 * s.delay if s.workers > 1 else 0.0)
    x, now, curve = np.full(s.dimension, float(s.start)), 0.0, []
    for step in range(s.steps):
        noise = s.noise / math.sqrt(s.workers) * random.standard_normal(s.dimension)
        x = x - s.learning_rate * (s.curvature() * (x - 1.0) + noise)
        now += times[:, step % times.shape[1]].max() + ring
        curve.append((now, float(0.5 * (s.curvature() * (x - 1.0) ** 2).sum())))
    return curve


@functools.cache
def without_communication(settings: Settings) -> dict[str, Any]:
    """Workers of which each is for itself; the same for every link and way to offer, so it is kept."""
    return gossip(settings)


def simulate(options: dict[str, Any]) -> dict[str, Any]:
    """One case: LayUp, all-reduce and no communication, all at one learning rate."""
    settings, began = Settings(**options), time.perf_counter()
    loss = TARGET * first_loss(settings)
    layup = gossip(settings)
    alone = without_communication(
        replace(settings, peers=0, topology="auto", ties="rotated", rate=math.inf, delay=0.0, offer_every=1)
    )
    synchronous = all_reduce(settings)
    curve = layup.pop("curve")
    return {
        "settings": options | ({"rate": None} if math.isinf(settings.rate) else {}),
        "peers_per_step": settings.peers_per_step,
        **layup,
        "distance_alone": alone["distance"],
        "final_loss": curve[-1][1] / first_loss(settings),
        "to_loss": {
            "layup": seconds_to(curve, loss),
            "all_reduce": seconds_to(synchronous, loss),
            "alone": seconds_to(alone["curve"], loss),
        },
        "all_reduce_seconds": synchronous[-1][0] / settings.steps,
        "simulated_in": time.perf_counter() - began,
    }


def show(results: list[dict[str, Any]]) -> None:
    """One row per case."""
    columns = ["workers", "link", "offers", "speeds", "staleness, median (95 %)", "in rounds", "models read per step"]
    columns += ["of the link", "consensus distance", "of that alone", "to the loss: LayUp", "all-reduce", "alone"]
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for result in results:
        s, old, to = result["settings"], result["staleness"], result["to_loss"]
        rate = s.get("rate")
        offers = f"{s.get('topology', 'auto')}, {result['peers_per_step']} a step"
        offers += f", every {s['offer_every']}" if s.get("offer_every", 1) > 1 else ""
        offers += ", lowest rank first" if s.get("ties") == "rank" else ""
        row = [str(s["workers"]), "shared memory" if rate is None else f"{rate / 1e9:g} Gbit/s", offers]
        row += [s.get("speeds", "equal"), f"{old[1]} ({old[2]})" if old else "-"]
        row += [f"{result['rounds']:.1f}" if old else "-", f"{result['reads']:.3f}"]
        row += [f"{100 * result['link']:.0f} %" if rate else "-", f"{100 * result['distance']:.1f} %"]
        row += [f"{result['distance'] / result['distance_alone']:.2f}" if result["distance_alone"] else "-"]
        row += [f"{to[name]:.0f} s" if to[name] is not None else "never" for name in ("layup", "all_reduce", "alone")]
        print(f"| {' | '.join(row)} |")
    print(f'\n"Never": not within the run. The loss to reach is {TARGET:g} of the first, of the workers\' own models.')
