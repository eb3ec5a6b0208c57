"""Time to the same held-out loss across hosts.

The loss that is to be reached is the one that DDP ends with at its best learning rate, for each seed. DDP makes
`--steps` steps, or as many as take `--seconds` where the link is slow; LayUp may make half as many again. Evaluations
are not counted in the seconds; what LayUp needs to agree on a model before each of them is.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from ..common.figures import NAMES
from ..common.losses import Curve
from .files import Results, write
from .run import measured, worker_arguments


def loss(options: argparse.Namespace) -> None:
    """All rates, methods and learning rates in one run of the same processes."""
    arguments = ["--rates", *options.rates, f"--scale={options.scale}", f"--steps={options.steps}"]
    arguments += [f"--seconds={options.seconds}", "--learning_rates", *map(str, options.learning_rates)]
    arguments += ["--seeds", *map(str, options.seeds), *worker_arguments(options, options.methods)]
    results = measured("loss", options.hosts, arguments, 3 * 3600)
    write(options.folder, f"hosts-loss-{options.hosts}", results)
    show_loss(results)
    draw(results, options.folder / f"hosts-loss-{options.hosts}.png")


def best_runs(results: Results, rate: str, method: str) -> dict[int, dict[str, Any]]:
    """The runs of rank 0 at the learning rate with the lowest loss after DDP's steps, by seed."""
    runs = [r for r in results if (r["rate"], r["method"], r["rank"]) == (rate, method, 0)]
    first = [run for run in runs if run["seed"] == runs[0]["seed"]]
    best = min(first, key=lambda run: Curve(run["points"]).at_step(run["target_steps"])["loss"])
    return {run["seed"]: run for run in runs if run["learning_rate"] == best["learning_rate"]}


def show_loss(results: Results) -> None:
    """The table."""
    hosts = results[0]["hosts"]
    print(f"\n{hosts} hosts, {results[0]['parameter_bytes'] / 1e6:.1f} MB of parameters\n")
    heads = ["link", "of DDP's step, communication", "best learning rate, LayUp and DDP", "DDP's steps"]
    heads += ["loss to reach, by seed", "DDP", "LayUp", "times sooner, by seed", "loss at equal samples, LayUp and DDP"]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for rate in dict.fromkeys(result["rate"] for result in results):
        layup, ddp = (best_runs(results, rate, method) for method in ("layup", "ddp"))
        alone = next(r for r in results if (r["rate"], r["method"]) == (rate, "alone"))
        seeds = sorted(ddp.keys() & layup.keys())
        share = 1 - alone["step_seconds"] / statistics.median(ddp[seed]["step_seconds"] for seed in seeds)
        steps = ddp[seeds[0]]["target_steps"]
        ends = {seed: Curve(ddp[seed]["points"]).at_step(steps) for seed in seeds}
        times = {seed: Curve(layup[seed]["points"]).seconds_to(ends[seed]["loss"]) for seed in seeds}
        sooner = [ends[seed]["seconds"] / times[seed] if times[seed] else float("nan") for seed in seeds]
        equal = [
            statistics.mean(Curve(runs[s]["points"]).at_step(steps)["loss"] for s in seeds) for runs in (layup, ddp)
        ]
        link = alone["link"]
        row = [rate if link == rate else f"{rate} (here {float(link.removesuffix('bit')) / 1e6:.1f} mbit)"]
        row += [f"{share:.2f}", f"{layup[seeds[0]]['learning_rate']:g}, {ddp[seeds[0]]['learning_rate']:g}", str(steps)]
        row += [", ".join(f"{end['loss']:.3f}" for end in ends.values())]
        row += [f"{statistics.median(end['seconds'] for end in ends.values()):.1f} s"]
        row += ["never" if None in times.values() else f"{statistics.median(times.values()):.1f} s"]
        row += [f"**{statistics.median(sooner):.2f}** ({', '.join(f'{value:.2f}' for value in sooner)})"]
        row += [", ".join(f"{value:.3f}" for value in equal)]
        print("| " + " | ".join(row) + " |")


def draw(results: Results, file: Path) -> None:
    """Loss over seconds at each rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    rates = list(dict.fromkeys(result["rate"] for result in results))
    figure = Figure(figsize=(4.5 * len(rates), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, rate in zip(figure.subplots(1, len(rates), squeeze=False)[0], rates, strict=True):
        for method, colour in (("layup", "tab:blue"), ("ddp", "tab:orange")):
            for number, run in enumerate(best_runs(results, rate, method).values()):
                points = [(point["seconds"], point["loss"]) for point in run["points"]]
                line = axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3)[0]
                line.set_label(f"{NAMES[method]}, {run['learning_rate']:g}" if number == 0 else "_")
        axes.set(xscale="log", xlabel="seconds", ylabel="held-out loss (nats per token)", title=rate)
        axes.xaxis.set(
            major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter=NullFormatter()
        )
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=110)
    print(f"Drawn: {file}")
