"""Push-sum arithmetic in integers: how much mass an offer carries and how much a merge weighs.

A worker's *mass* on a block (the push-sum weight of Kempe et al., FOCS 2003) is a whole number of units, so that mass
is conserved exactly, not up to rounding. Nothing here knows about processes, tensors or the network.
"""

from __future__ import annotations

from typing import TypeVar, overload

import numpy as np

Units = TypeVar("Units", int, np.ndarray)

UNIT = 2**40
"""Mass of every worker on every block at a consensus point."""

MODULUS = 2**64
"""Ledger entries are cumulative and wrap around; differences are taken modulo this."""


def share(own: Units, receivers: Units) -> Units:
    """Mass that each of `receivers` peers is offered, in units; what remains with the offering worker is at least as
    much.

    Half of the mass for one peer, a third each for two: after all took their offers, everybody holds an equal part.
    Zero if there is too little mass to divide. Arrays (int64, of one shape) are taken element by element.
    """
    if _any(own < 0) or _any(receivers < 1):
        raise ValueError(f"Mass {own} cannot be divided among {receivers} receivers.")
    return own // (receivers + 1)


@overload
def merge_weight(offered: int, own: int, untaken: int) -> float: ...
@overload
def merge_weight(offered: np.ndarray, own: np.ndarray, untaken: np.ndarray) -> np.ndarray: ...
def merge_weight(offered: Units, own: Units, untaken: Units) -> float | np.ndarray:
    """Weight of a peer's block in a merge, between 0 and 1: `offered / (own + untaken + offered)`.

    What this worker has offered to others and they have not yet taken still stands for its live weights, so it counts
    with its own mass. Then `sum_i (own_i + untaken_i) * x_i` over all workers is the same before and after the merge.
    Arrays (int64, of one shape) are taken element by element.
    """
    if _any(offered <= 0) or _any(own < 0) or _any(untaken < 0):
        raise ValueError(f"Cannot merge an offer of {offered} with own mass {own} and untaken offers {untaken}.")
    return offered / (own + untaken + offered)


def difference(later: int, earlier: int) -> int:
    """`later - earlier` of two cumulative ledger entries that may have wrapped around."""
    return (later - earlier) % MODULUS


def _any(condition: bool | np.ndarray) -> bool:
    return condition if isinstance(condition, bool) else bool(condition.any())
