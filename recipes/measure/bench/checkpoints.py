"""How long workers stand still for a checkpoint: while it is written, and while it is only laid out.

    python -m recipes.measure.bench checkpoints --processes 2 --rounds 3

A GPT-2 of 300 MB with AdamW's states: 900 MB of rank 0, 600 MB of every other worker, into a folder beside the
temporary files (set `TMPDIR` for another disk). Within a run the ways take turns, with no checkpoints at all for a
third. What is written goes to the page cache first, as always; nothing is flushed.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from ..common.launching import measure

MODEL = "n_layer=9,n_embd=768,n_head=12,vocab_size=15616"
"""300 MB in single precision."""

WAYS = {"none": "no checkpoints", "wait": '`checkpoints="wait"`', "background": '`checkpoints="background"`'}


def checkpoints(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of standing and of writing, of each checkpoint; then memory, each way in a run of its own."""
    results = run_workers(options, list(WAYS), options.rounds)
    show(results)
    measured = [each for way in WAYS for each in run_workers(options, [way], 1, "--memory")]
    peaks = {way: max(each["peak_bytes"] for each in measured if each["way"] == way) for way in WAYS}
    print(
        "Peak memory of a worker: " + ", ".join(f"{peak / 1e6:,.0f} MB with {WAYS[way]}" for way, peak in peaks.items())
    )
    return [*results, *measured]


def run_workers(options: argparse.Namespace, ways: list[str], rounds: int, *more: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        arguments = [f"--folder={folder}", f"--rounds={rounds}", f"--steps={options.steps}", f"--ways={','.join(ways)}"]
        arguments += [f"--batch_size={options.batch_size}", f"--block_size={options.block_size}"]
        arguments += [f"--config_overrides={options.config_overrides or MODEL}", *more]
        return measure("recipes.measure.bench.checkpoint_worker", options.processes, arguments, Path(folder))


def show(results: list[dict[str, Any]]) -> None:
    first = [result for result in results if result["rank"] == 0]
    written = {way: [each for r in first if r["way"] == way for each in r["written"]] for way in WAYS}
    size = max(result["bytes"] for result in results)
    print(f"\n{results[0]['parameters'] * 4 / 1e6:.0f} MB of parameters, {size / 1e6:.0f} MB on disk.")
    print(
        "\n| | stand still | writing | standing in % of writing | median step | all steps |\n|---|---|---|---|---|---|"
    )
    for way, title in WAYS.items():
        step = statistics.median(r["step_seconds"] for r in results if r["way"] == way)
        total = statistics.median(r["seconds"] for r in first if r["way"] == way)
        figures = ["", "", ""]
        if written[way]:
            standing, writing = ([each[name] for each in written[way]] for name in ("standing", "writing"))
            shares = [100 * a / b for a, b in zip(standing, writing, strict=True)]
            figures = [f"{_range(standing, 3)} s", f"{_range(writing, 2)} s", _range(shares, 1)]
        print(f"| {title} | {' | '.join(figures)} | {step:.3f} s | {total:.1f} s |")
    medians = [statistics.median(each["standing"] for each in written[way]) for way in ("background", "wait")]
    print(f"\nIn the background, workers stand {100 * medians[0] / medians[1]:.1f} % of the time of the other way.")


def _range(values: list[float], digits: int) -> str:
    """The median, and the least and the largest."""
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"
