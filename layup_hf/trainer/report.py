"""What the log tells people about the workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import ProgressCallback, TrainerCallback

from ..ledger.counts import percentile


def share_text(done: Sequence[int] | np.ndarray) -> str:
    """Each worker's share of the steps, in the order of ranks: `51/49 %`."""
    total = max(1, sum(int(steps) for steps in done))
    return "/".join(f"{100 * int(steps) / total:.0f}" for steps in done) + " %"


def show_shares(callbacks: Sequence[TrainerCallback], done: Sequence[int] | np.ndarray) -> None:
    """Put the shares behind the Trainer's progress bar, where there is one."""
    for callback in callbacks:
        bar = callback.training_bar if isinstance(callback, ProgressCallback) else None
        if bar is not None:
            bar.set_postfix_str(f"shares {share_text(done)}", refresh=False)


def summary(done: Sequence[int] | np.ndarray, staleness: Counter[int], masses: Sequence[float]) -> str:
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


@dataclass(frozen=True)
class RunFacts:
    """What a model card says about the workers.

    Attributes:
        workers: Number of workers.
        blocks: Number of blocks of the model.
        peers_per_step: Offers per block and step.
        windows: How workers read each other's blocks.
        done: Steps of each worker until the latest consensus point.
        consensus_distance: Right before that point; None if there has been none.
        steps_by_mean: Whether the optimizer's second moment was that of the mean gradient.
        looks_ahead: Whether the optimizer stepped by Nesterov's momentum.
    """

    workers: int
    blocks: int
    peers_per_step: int = 0
    windows: str = ""
    done: tuple[int, ...] = ()
    consensus_distance: float | None = None
    steps_by_mean: bool = False
    looks_ahead: bool = False


def add_to_card(card: str, facts: RunFacts) -> str:
    """The model card with a section about the workers, before its list of versions if it has one."""
    before, versions, after = card.partition("### Framework versions\n")
    return f"{before.rstrip()}\n\n{_card_section(facts)}\n{versions}{after}"


def _card_section(facts: RunFacts) -> str:
    title = "### LayUp\n\n"
    if facts.workers == 1:
        return f"{title}Trained with layup_hf by one worker: plain training, nothing was exchanged.\n"
    section = (
        f"{title}Trained with layup_hf by [LayUp](https://arxiv.org/abs/2410.05985): layer-wise gossip in the place of "
        "an all-reduce. The weights are a consensus of all workers.\n"
        f"\n- workers: {facts.workers}"
        f"\n- blocks: {facts.blocks}, each stepped and exchanged by itself"
        f"\n- mixing: offers to {facts.peers_per_step} of {facts.workers - 1} peers per block and step, "
        f"`{facts.windows}` windows\n"
    )
    if facts.steps_by_mean:
        section += "- the optimizer's second moment: that of the mean gradient of the workers on a host\n"
    if facts.looks_ahead:
        section += "- the optimizer stepped by Nesterov's momentum\n"
    if facts.consensus_distance is not None:
        steps = "/".join(str(count) for count in facts.done)
        section += (
            f"- consensus distance at the end: {facts.consensus_distance:.2e}\n"
            f"- steps by worker: {steps} ({share_text(facts.done)})\n"
        )
    return section
