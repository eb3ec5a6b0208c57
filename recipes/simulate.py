"""Past this machine: what LayUp would do with up to 1024 workers and more, simulated.

    python recipes/simulate.py --workers 64 --topology uniform --peers 2 --rate 1gbit      one case beside all-reduce
    python recipes/simulate.py advice                       topologies and settings for numbers of workers and links
    python recipes/simulate.py check --counts 2 4 8         real runs of the same quadratic beside their simulation
    python recipes/simulate.py show                         tables of what is in `--folder`

Prints Markdown tables and writes the figures as JSON into `--folder`; `advice` goes on where it was stopped. What is
simulated is in `simulate_gossip.py`, what it assumes in `simulate_settings.py`. By default a step takes 0.58 s and the
model 498 MB, as GPT-2 124M in fp32 on one A100 (nanoGPT's published run).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from curve import write_results
from lab import bits_per_second
from simulate_check import check, mean, show_check
from simulate_gossip import Simulation
from simulate_settings import SPEEDS, TIES, TOPOLOGIES, Settings

from layup_hf.ledger.counts import percentile

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


LINKS = [math.inf, 10e9, 1e9]
OFFERS: list[dict[str, Any]] = [
    {},
    {"peers": 1},
    {"topology": "uniform"},
    {"topology": "uniform", "peers": 1},
    {"topology": "ring", "peers": 1},
]
STEPS = {2: 200, 8: 200, 64: 200, 1024: 100}


def advice(counts: list[int], folder: Path) -> list[dict[str, Any]]:
    """Every way to offer for every number of workers and link."""
    file = folder / "simulate-advice.json"
    results = json.loads(file.read_text()) if file.exists() else []
    for workers, rate, offers in itertools.product(counts, LINKS, OFFERS):
        case = {"workers": workers, "steps": STEPS.get(workers, 100), "rate": rate, "slices": 16, **offers}
        key = case | ({"rate": None} if math.isinf(rate) else {})
        is_same = (workers == 2 and offers) or (offers.get("topology") == "uniform" and math.isinf(rate))
        if is_same or any(result["settings"] == key for result in results):
            continue  # as another case, or has been done
        results.append(simulate(case))
        folder.mkdir(parents=True, exist_ok=True)
        write_results(file, results)
        print(f"{key}: {results[-1]['simulated_in']:.0f} s", flush=True)
    show(results)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["one", "advice", "check", "show"], nargs="?", default="one")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200, help="of every worker on average")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--dimension", type=int, default=32, help="of the quadratic")
    parser.add_argument("--topology", choices=TOPOLOGIES, default="auto")
    parser.add_argument("--peers", type=int, default=None, help="offers per block and step; unset: as in LayupConfig")
    parser.add_argument("--offer_every", type=int, default=1)
    parser.add_argument("--speeds", choices=SPEEDS, default="equal")
    parser.add_argument("--step_seconds", type=float, default=0.58)
    parser.add_argument("--model_bytes", type=float, default=498e6)
    parser.add_argument("--rate", default=None, help="of each worker's link, like 1gbit; unset: shared memory")
    parser.add_argument(
        "--delay", type=float, default=0.0, help="seconds until a block that is asked for begins to come"
    )
    parser.add_argument("--ties", choices=TIES, default="rotated")
    parser.add_argument("--learning_rate", type=float, default=0.1)
    parser.add_argument("--noise", type=float, default=0.5)
    parser.add_argument("--slices", type=int, default=32, help="time slices per step; 0: exact times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--counts", type=int, nargs="+", default=None, help="numbers of workers, for advice and check")
    parser.add_argument("--mean_seconds", type=float, default=0.25, help="of a step, for check")
    parser.add_argument("--folder", type=Path, default=Path("bench-output"))
    options = vars(parser.parse_args())
    what, counts, folder = options.pop("what"), options.pop("counts"), options.pop("folder")
    mean_seconds = options.pop("mean_seconds")
    if what == "one":
        options["rate"] = bits_per_second(options["rate"]) if options["rate"] else math.inf
        result = simulate(options)
        show([result])
        folder.mkdir(parents=True, exist_ok=True)
        write_results(folder / "simulate-one.json", result)
    elif what == "advice":
        advice(counts or list(STEPS), folder)
    elif what == "check":
        check(counts or [2, 4, 8], mean_seconds, folder)
    else:
        for name, table in (("advice", show), ("check", show_check)):
            if (file := folder / f"simulate-{name}.json").exists():
                table(json.loads(file.read_text()))


if __name__ == "__main__":
    main()
