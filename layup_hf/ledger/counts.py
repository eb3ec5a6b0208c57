"""What is read off many counted values."""

from __future__ import annotations

from collections import Counter


def percentile(counts: Counter[int], percent: int) -> int:
    """The smallest value that at least `percent` per cent of the counted ones do not exceed."""
    needed = sum(counts.values()) * percent / 100
    for value in sorted(counts):
        needed -= counts[value]
        if needed <= 0:
            return value
    raise ValueError("Nothing has been counted.")
