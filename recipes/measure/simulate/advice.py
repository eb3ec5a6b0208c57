"""Topologies and settings for numbers of workers and links: every case of a grid."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

from recipes.parts.curve import write_results

from .case import show, simulate

LINKS = [math.inf, 10e9, 1e9]
OFFERS: list[dict[str, Any]] = [
    {},
    {"turns": False},
    {"peers": 1, "turns": False},
    {"topology": "uniform", "turns": False},
    {"topology": "uniform", "peers": 1, "turns": False},
    {"topology": "ring", "peers": 1, "turns": False},
]
STEPS = {2: 200, 8: 200, 64: 200, 1024: 100}


def advice(counts: list[int], folder: Path) -> list[dict[str, Any]]:
    """Every way to offer for every number of workers and link."""
    file = folder / "simulate-advice.json"
    results = json.loads(file.read_text()) if file.exists() else []
    for workers, rate, offers in itertools.product(counts, LINKS, OFFERS):
        if math.isinf(rate):  # where there are no turns
            offers = {name: value for name, value in offers.items() if name != "turns"}
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
