"""Whether a difference between two methods is one: an exact test over the seeds that both were trained with."""

import math
import statistics
from collections.abc import Sequence
from itertools import product
from operator import mul

LEVEL = 0.05  # a difference is one if chance alone would make as large a one less often than this
SEEDS = 6  # the fewest with which the test can show anything: two of 2**6 choices of signs are less than 5 %


def p_value(differences: Sequence[float]) -> float:
    """Of paired differences, two-sided, by the exact permutation test (Fisher, The Design of Experiments, 1935).

    If two methods were alike, the difference for each seed could as well have the other sign. So all 2**n choices of
    signs are tried: the p-value is the share of those whose sum is at least as far from 0 as the one that was measured.
    Nothing is assumed about how losses are distributed; it is never less than 2 / 2**n.

    Args:
        differences: One for each seed; finite.
    """
    measured = abs(math.fsum(differences))
    nearly = measured * (1 - 1e-9)  # sums of other orders differ in their last digits
    choices = product((1, -1), repeat=len(differences))
    sums = [abs(math.fsum(map(mul, differences, signs))) for signs in choices]
    return sum(total >= nearly for total in sums) / len(sums)


def verdict(differences: Sequence[float]) -> str:
    """The mean difference with its spread over seeds, if the test shows one; otherwise "none", and why."""
    if not differences:
        return "none (no seed in common)"
    if not all(map(math.isfinite, differences)):
        return "none (not every seed came to its end)"
    mean = f"{statistics.mean(differences):+.3f}"
    if len(differences) < SEEDS:
        return f"none ({mean} with {len(differences)} of the {SEEDS} seeds that the test needs)"
    shown = f"{mean} ± {statistics.stdev(differences):.3f}"
    p = p_value(differences)
    return f"{shown} (p = {p:.3f})" if p < LEVEL else f"none ({shown}, p = {p:.3f})"
