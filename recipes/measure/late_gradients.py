"""What it costs that gradients come late, and what Nesterov's momentum gains: many workers on few cores hide it.

    python -m recipes.measure.late_gradients --workers 8 --learning_rates 8e-3 1.2e-2 --seeds 1 2

While a worker computes a gradient, others step. How many do depends on how many compute at the same time, and of eight
workers on two cores only a few do; on eight GPUs all. So here one process plays all workers, with a model each, and
lets a number of them compute at a time: workers' steps follow each other at equal distances, and each begins its next
one so early that the others which compute at the same time all step before it is through. With 1 gradients are never
late; with as many as there are workers each begins its next gradient at once.

Blocks are those of `layup_hf.blocks`, each read when forward comes to it and stepped when backward is through with it.
Backward takes twice as long as forward, and a block as long as it has parameters, an output layer that is tied to the
embeddings included. So the later a block comes in the model, the less late its gradient is. Beside it stands what
reads and steps the whole model at one time: with `--whole`.

Masses and weights are those of `layup_hf.ledger.mixing`, every worker offers to all others, merges before its forward
and before its step, and steps by an AdamW with the second moment of the mean gradient (`layup_hf.gossip.moments`), with
and without Nesterov's momentum (`layup_hf.optim.direction`). DDP's AdamW sees the mean gradient.

Prints held-out losses at equal samples and writes `late-gradients.json` into `--folder`; goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from typing import Any

import torch
from transformers import PreTrainedModel

from layup_hf.blocks import split_into_blocks
from layup_hf.ledger.mixing import UNIT, merge_weight, share

from .common.command import command_line
from .local_adam import Moments, Task, Tensors, add_task_arguments, mean_of, rate_at, run_all

NAMES = ("at_once", "looks_ahead", "whole", "learning_rate", "seed")
DDP = 0  # workers that compute at the same time, in results of DDP


class Replicas:
    """What all workers have of one block: values, masses, offers and moments.

    Attributes:
        begins: Where the block begins among all that forward computes, from 0 to 1.
    """

    def __init__(self, parameters: Tensors, workers: int, begins: float) -> None:
        self.parameters, self.begins = parameters, begins
        self.values = [[p.detach().clone() for p in parameters] for _ in range(workers)]
        self.optimizers = [Moments(parameters) for _ in range(workers)]
        self.own = [UNIT] * workers
        self.offers: dict[tuple[int, int], int] = {}  # units by sender and receiver

    @property
    def read_at(self) -> float:
        """Part of a step's time after which forward comes to the block."""
        return self.begins / 3

    @property
    def stepped_at(self) -> float:
        """Part of a step's time after which backward is through with the block."""
        return 1 - 2 / 3 * self.begins

    def untaken(self, worker: int) -> int:
        return sum(units for (sender, _), units in self.offers.items() if sender == worker)

    def merge(self, worker: int) -> None:
        """Take all offers, in the order of senders."""
        for sender in range(len(self.values)):
            units = self.offers.get((sender, worker))
            if units is not None:
                weight = merge_weight(units, self.own[worker], self.untaken(worker))
                torch._foreach_lerp_(self.values[worker], self.values[sender], weight)
                self.own[worker] += self.offers.pop((sender, worker))

    def step(self, worker: int, gradient: Tensors, rate: float, looks_ahead: bool, draws: torch.Generator) -> None:
        """By the worker's own optimizer, which compares its moments with those of another worker."""
        optimizer = self.optimizers[worker]
        optimizer.update(gradient)
        others = [other for other in self.optimizers if other is not optimizer and other.steps]
        if others:
            optimizer.compare(others[int(torch.randint(len(others), (), generator=draws))])
        change = optimizer.step("compared", len(self.values), looks_ahead)
        torch._foreach_add_(self.values[worker], change, alpha=-rate)

    def offer(self, worker: int) -> None:
        """To everybody who has taken the last offer."""
        peers = [p for p in range(len(self.values)) if p != worker and (worker, p) not in self.offers]
        units = share(self.own[worker], len(peers)) if peers else 0
        for peer in peers if units else ():
            self.offers[worker, peer] = units
            self.own[worker] -= units

    @torch.no_grad()
    def load(self, values: Tensors) -> None:
        """Give the model these values of the block."""
        torch._foreach_copy_(self.parameters, values)

    def mean(self) -> Tensors:
        """By mass."""
        masses = [own + self.untaken(worker) for worker, own in enumerate(self.own)]
        return [
            sum(mass / sum(masses) * tensor for mass, tensor in zip(masses, tensors, strict=True))
            for tensors in zip(*self.values, strict=True)
        ]


def make_replicas(model: PreTrainedModel, workers: int, whole: bool) -> list[Replicas]:
    """Of each block of the model, or of all of it as one."""
    if whole:
        return [Replicas(list(model.parameters()), workers, begins=0)]
    embeddings, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    blocks = split_into_blocks(model)
    # Looking up embeddings takes no time.
    sizes = [0 if block.name == "embeddings" else sum(p.numel() for p in block.parameters) for block in blocks]
    total = sum(sizes) + (output.numel() if output is embeddings else 0)
    begins = [before / total for before in itertools.accumulate(sizes, initial=0)]
    return [Replicas(list(block.parameters), workers, start) for block, start in zip(blocks, begins[:-1], strict=True)]


def train(
    options: argparse.Namespace, at_once: int, looks_ahead: bool, whole: bool, peak_rate: float, seed: int
) -> dict[str, Any]:
    """One run; its held-out loss."""
    task = Task.load(options, seed)
    if at_once == DDP:
        run_ddp(task, options, looks_ahead, peak_rate)
    else:
        run_layup(task, options, at_once, looks_ahead, whole, peak_rate, seed)
    return dict(zip(NAMES, (at_once, looks_ahead, whole, peak_rate, seed), strict=True)) | {
        "loss": task.held_out_loss()
    }


def run_ddp(task: Task, options: argparse.Namespace, looks_ahead: bool, peak_rate: float) -> None:
    parameters = list(task.model.parameters())
    optimizer = Moments(parameters)
    for step in range(options.steps):
        gradient = mean_of([task.gradient(options.batch_size) for _ in range(options.workers)])
        with torch.no_grad():
            optimizer.update(gradient)
            change = optimizer.step("mean", options.workers, looks_ahead)
            torch._foreach_add_(parameters, change, alpha=-rate_at(step, options, peak_rate))


def run_layup(
    task: Task, options: argparse.Namespace, at_once: int, looks_ahead: bool, whole: bool, peak_rate: float, seed: int
) -> None:
    """Workers end their steps in turn, one in a unit of time; a step takes as many units as workers compute at once."""
    workers, steps = options.workers, range(options.steps)
    replicas, draws = make_replicas(task.model, workers, whole), torch.Generator().manual_seed(seed)
    gradients: list[dict[torch.Tensor, torch.Tensor]] = [{} for _ in range(workers)]

    def find_gradients(worker: int) -> None:
        """At what the worker has read: until it steps its first block, nothing changes that."""
        for block in replicas:
            block.load(block.values[worker])
        gradients[worker] = dict(zip(task.model.parameters(), task.gradient(options.batch_size), strict=True))

    def step(worker: int, block: Replicas, number: int) -> None:
        block.merge(worker)
        gradient = [gradients[worker].pop(p) for p in block.parameters]
        block.step(worker, gradient, rate_at(number, options, peak_rate), looks_ahead, draws)
        block.offer(worker)

    events = []  # their times; steps come before what is read at the same time
    for number, worker, (index, block) in itertools.product(steps, range(workers), enumerate(replicas)):
        begin = number * workers + worker + 1 - at_once
        events.append((round(begin + at_once * block.stepped_at, 6), False, worker, number, index))
        events.append((round(begin + at_once * block.read_at, 6), True, worker, number, index))
    for _, is_read, worker, number, index in sorted(events):
        if is_read:
            replicas[index].merge(worker)
        else:
            if not gradients[worker]:
                find_gradients(worker)
            step(worker, replicas[index], number)
    for block in replicas:
        block.load(block.mean())


def show(results: list[dict[str, Any]]) -> None:
    """For each method the mean over seeds at each rate."""
    rates = sorted({result["learning_rate"] for result in results})
    print(f"\n| | Nesterov's momentum | {' | '.join(f'{rate:g}' for rate in rates)} |\n|---|---|{'---|' * len(rates)}")
    for kind in sorted({tuple(result[name] for name in NAMES[:3]) for result in results}):
        cells = []
        for rate in rates:
            losses = [r["loss"] for r in results if tuple(r[n] for n in NAMES[:4]) == (*kind, rate)]
            cells.append(f"{statistics.mean(losses):.3f} ({len(losses)})" if losses else "")
        at_once, looks_ahead, whole = kind
        method = "DDP" if at_once == DDP else f"LayUp, {at_once} at once{', the model as one block' if whole else ''}"
        print(f"| {method} | {'yes' if looks_ahead else 'no'} | {' | '.join(cells)} |")


def main() -> None:
    parser = command_line("recipes.measure.late_gradients", __doc__)
    parser.add_argument("--computing", type=int, nargs="+", help="at the same time; 1, 2, 4, ... all, and 0: DDP")
    parser.add_argument("--whole", action="store_true", help="read and step the whole model as one block")
    parser.add_argument("--momentum", nargs="+", choices=["plain", "nesterov"], default=["plain", "nesterov"])
    add_task_arguments(parser)
    options = parser.parse_args()
    powers = [2**n for n in range(options.workers.bit_length()) if 2**n < options.workers]
    computing = options.computing or [DDP, *powers, options.workers]
    if not all(0 <= number <= options.workers for number in computing):
        parser.error(f"--computing {computing}: from 0 to the number of workers, {options.workers}")
    looks_ahead = [name == "nesterov" for name in options.momentum]
    wanted = [
        (at_once, ahead, options.whole and at_once != DDP, rate, seed)
        for at_once, ahead, rate, seed in itertools.product(
            computing, looks_ahead, options.learning_rates, options.seeds
        )
    ]
    show(run_all(train, options, NAMES, wanted, options.folder / "late-gradients.json"))


if __name__ == "__main__":
    main()
