"""The pictures of a comparison."""

from pathlib import Path
from typing import Any

from .report import NAMES, best_runs, costs


def draw(results: dict[str, Any], folder: Path) -> None:
    """Held-out loss over samples and over seconds, and what each method costs, as pictures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    for key in ("samples", "seconds", "costs"):
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        if key == "costs":
            draw_costs(results, figure)
        else:
            draw_curves(results, key, figure)
        figure.savefig(folder / f"compare-{key}.png", dpi=110)
        print(f"Drawn: {folder / f'compare-{key}.png'}")


def draw_curves(results: dict[str, Any], key: str, figure: Any) -> None:
    """Held-out loss at each method's best learning rate, a line for each seed.

    Args:
        key: `samples` or `seconds`.
        figure: To draw it into.
    """
    from matplotlib import colormaps

    runs, seed = results["runs"], results["settings"]["seeds"][0]
    figure.set_size_inches(8, 5)
    axes = figure.add_subplot()
    for number, (method, name) in enumerate(NAMES.items()):
        for turn, run in enumerate(best_runs(runs, method, seed).values()):
            points = [(p[key], p["loss"]) for p in run.get("points", []) if p["loss"] is not None]
            if points:
                style = "--" if method == "single" else "-"
                colour = "black" if method == "single" else colormaps["tab20"](number)
                line = axes.plot(*zip(*points, strict=True), style, color=colour, linewidth=1.2)[0]
                line.set_label(f"{name}, {run['learning_rate']:g}" if turn == 0 else "_")
    unit = "samples of all workers" if key == "samples" else "seconds of training"
    sample = "image" if results["settings"].get("images") else "token"
    axes.set(xlabel=unit, ylabel=f"held-out loss (nats per {sample})")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def draw_costs(results: dict[str, Any], figure: Any) -> None:
    """Bytes, memory and waiting of each method, side by side, into the figure."""
    runs, seed = results["runs"], results["settings"]["seeds"][0]
    made = {NAMES[method]: costs(runs, method, seed) for method in reversed(NAMES) if best_runs(runs, method, seed)}
    units = {"bytes": 1e6, "memory": 2**20, "waiting": 1}
    labels = ("MB per worker and step", "peak memory of a worker (MiB)", "share of time waiting")
    figure.set_size_inches(12, 1 + 0.3 * len(made))
    for axes, (key, unit), label in zip(figure.subplots(1, 3, sharey=True), units.items(), labels, strict=True):
        axes.barh(list(made), [(cost[key] or 0) / unit for cost in made.values()])
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)
