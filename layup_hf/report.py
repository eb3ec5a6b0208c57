"""What the log tells people about the workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from transformers import ProgressCallback, TrainerCallback


def share_text(done: Sequence[int]) -> str:
    """Each worker's share of the steps, in the order of ranks: `51/49 %`."""
    total = max(1, sum(int(steps) for steps in done))
    return "/".join(f"{100 * int(steps) / total:.0f}" for steps in done) + " %"


def show_shares(callbacks: Sequence[TrainerCallback], done: Sequence[int]) -> None:
    """Put the shares behind the Trainer's progress bar, where there is one."""
    for callback in callbacks:
        bar = callback.training_bar if isinstance(callback, ProgressCallback) else None
        if bar is not None:
            bar.set_postfix_str(f"shares {share_text(done)}", refresh=False)


def summary(done: Sequence[int], staleness: Counter[int], masses: Sequence[float]) -> str:
    """One line about a whole run.

    Args:
        done: Steps of each worker.
        staleness: How often a merge was how many clock steps old.
        masses: Mass that each worker held at the end, mean over its blocks.
    """
    steps = "/".join(str(int(count)) for count in done)
    old = (
        f"merges were {percentile(staleness, 50)} clock steps old (median; 95 % at most {percentile(staleness, 95)})"
        if staleness
        else "nothing was merged"
    )
    mass = "/".join(f"{value:.2f}" for value in masses)
    return f"LayUp: steps by worker {steps} ({share_text(done)}); {old}; mass by worker at the end {mass}."


def percentile(counts: Counter[int], percent: int) -> int:
    """The smallest value that at least `percent` per cent of the counted ones do not exceed."""
    needed = sum(counts.values()) * percent / 100
    for value in sorted(counts):
        needed -= counts[value]
        if needed <= 0:
            return value
    raise ValueError("Nothing has been counted.")
