"""Real runs beside the simulation of them: staleness and consensus distance, predicted and measured."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from layup_hf.ledger.counts import percentile
from recipes.parts.curve import write_results

from ..common.launching import measure
from .settings import Settings
from .simulation import Simulation, mean

CASES = {
    "default peers": ({}, 1.0),
    "1 peer": ({"peers": 1}, 1.0),
    "the last 4 times slower": ({}, 4.0),
}
"""Settings, and how much slower the last worker is."""
COMMON = {"steps": 60, "blocks": 4, "dimension": 1024, "learning_rate": 0.1, "noise": 1.0}


def check(counts: list[int], mean_seconds: float, folder: Path) -> list[dict[str, Any]]:
    """Run all cases with each number of workers, and simulate each with the times that its steps really took.

    Args:
        counts: Numbers of workers.
        mean_seconds: Of a step; each takes from half to one and a half of it.
        folder: Results go into `simulate-check.json` there, beside those of other numbers of workers.
    """
    file = folder / "simulate-check.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    rows = [row for row in rows if row["workers"] not in counts]
    for count in counts:
        cases = [{"settings": COMMON | s, "slower": k, "mean_seconds": mean_seconds} for s, k in CASES.values()]
        with tempfile.TemporaryDirectory() as work:
            arguments = [f"--folder={work}", f"--cases={json.dumps(cases)}"]
            results = measure("recipes.measure.simulate.worker", count, arguments, Path(work))
        by_worker = [results[rank * len(cases) : (rank + 1) * len(cases)] for rank in range(count)]
        for number, (name, case) in enumerate(zip(CASES, cases, strict=True)):
            rows.append(compare(name, case["settings"], [worker[number] for worker in by_worker]))
    folder.mkdir(parents=True, exist_ok=True)
    write_results(file, rows)
    show_check(rows)
    return rows


def compare(name: str, options: dict[str, Any], workers: list[dict[str, Any]]) -> dict[str, Any]:
    """One case: what was measured, and what the simulation says when each step takes the time that it took."""
    measured = sum((Counter(dict(map(tuple, worker["staleness"]))) for worker in workers), Counter())
    durations = [np.diff(worker["times"]) for worker in workers]
    longest = max(map(len, durations))
    step_times = np.array([np.resize(row, longest) for row in durations])  # nobody makes more steps than it did
    first = min(worker["times"][0] for worker in workers)
    settings = Settings(
        workers=len(workers),
        **options,
        slices=0,
        step_times=step_times,
        starts=np.array([worker["times"][0] - first for worker in workers]),
    )
    simulation = Simulation(settings)
    simulation.advance(math.inf)
    predicted = simulation.staleness
    return {
        "workers": len(workers),
        "case": name,
        "step_seconds": statistics.median(np.concatenate(durations).tolist()),
        "steps_by_worker": {
            "measured": [len(row) for row in durations],
            "predicted": simulation.steps[0].tolist(),
        },
        "merges": {"measured": measured.total(), "predicted": predicted.total()},
        "staleness_mean": {"measured": mean(measured), "predicted": mean(predicted)},
        "staleness_median": {"measured": percentile(measured, 50), "predicted": percentile(predicted, 50)},
        "staleness_95": {"measured": percentile(measured, 95), "predicted": percentile(predicted, 95)},
        "consensus_distance": {
            "measured": workers[0]["consensus_distance"],
            "predicted": simulation.consensus_distance(),
        },
        "mass": workers[0]["mass"],
    }


def show_check(rows: list[dict[str, Any]]) -> None:
    """A table of predictions and measurements."""
    columns = ["merges", "staleness, mean", "median", "95 %", "consensus distance"]
    print(f"\nEach cell: predicted / measured.\n\n| workers | case | {' | '.join(columns)} |")
    print("|---" * (2 + len(columns)) + "|")
    for row in sorted(rows, key=lambda row: row["workers"]):
        keys = {"merges": "d", "staleness_mean": ".2f", "staleness_median": "d", "staleness_95": "d"}
        cells = [f"{row[key]['predicted']:{f}} / {row[key]['measured']:{f}}" for key, f in keys.items()]
        distance = row["consensus_distance"]
        cells.append(f"{distance['predicted']:.4f} / {distance['measured']:.4f}")
        print(f"| {row['workers']} | {row['case']} | {' | '.join(cells)} |")
