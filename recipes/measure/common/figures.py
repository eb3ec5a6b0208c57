"""Figures of several methods that were measured in turn, round by round."""

import statistics
from typing import Any

NAMES = {"layup": "LayUp", "ddp": "DDP", "alone": "no communication"}
PARTS = {"parts": "LayUp, by torch's operations"}
"""Of the bench's methods."""


def by_round(results: list[dict[str, Any]], method: str, key: str, combine: Any = sum) -> list[float]:
    """One figure per round: the workers' figures combined."""
    rounds = sorted({result["round"] for result in results})
    return [combine([r[key] for r in results if (r["round"], r["method"]) == (turn, method)]) for turn in rounds]


def median_ratio(upper: list[float], lower: list[float]) -> float:
    """Median over rounds of the ratio within a round: what the machine's load does to both alike cancels."""
    return statistics.median(a / b for a, b in zip(upper, lower, strict=True))
