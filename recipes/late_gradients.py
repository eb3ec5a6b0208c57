"""What it costs that gradients come late, and what Nesterov's momentum gains: many workers on few cores hide it.

    python recipes/late_gradients.py --workers 8 --learning_rates 8e-3 1.2e-2 --seeds 1 2

While a worker computes a gradient, others step. How many do depends on how many compute at the same time, and of eight
workers on two cores only a few do; on eight GPUs all. So here one process plays all workers, with a model each, and
lets a number of them compute at a time: a worker that has taken its turn begins its next gradient so early that the
others which compute at the same time all step before it is ready. With 1 gradients are never late; with as many as
there are workers each begins its next gradient at once.

Masses and weights are those of `layup_hf.mixing`, every worker offers to all others, merges before its forward and
before its step, and steps by an AdamW with the second moment of the mean gradient (`layup_hf.moments`), with and
without Nesterov's momentum (`layup_hf.direction`). The whole model is one block. DDP's AdamW sees the mean gradient.

Prints held-out losses at equal samples and writes `late-gradients.json` into `--folder`; goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from typing import Any

import torch
from local_adam import Moments, Task, Tensors, add_task_arguments, mean_of, rate_at, run_all

from layup_hf.mixing import UNIT, merge_weight, share

NAMES = ("at_once", "looks_ahead", "learning_rate", "seed")
DDP = 0  # workers that compute at the same time, in results of DDP


class Replicas:
    """The models of all workers, their masses and offers."""

    def __init__(self, parameters: Tensors, workers: int) -> None:
        self.values = [[p.detach().clone() for p in parameters] for _ in range(workers)]
        self.own = [UNIT] * workers
        self.offers: dict[tuple[int, int], int] = {}  # units by sender and receiver

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

    def offer(self, worker: int) -> None:
        """To everybody who has taken the last offer."""
        peers = [p for p in range(len(self.values)) if p != worker and (worker, p) not in self.offers]
        units = share(self.own[worker], len(peers)) if peers else 0
        for peer in peers if units else ():
            self.offers[worker, peer] = units
            self.own[worker] -= units

    def mean(self) -> Tensors:
        """By mass."""
        masses = [own + self.untaken(worker) for worker, own in enumerate(self.own)]
        return [
            sum(mass / sum(masses) * tensor for mass, tensor in zip(masses, tensors, strict=True))
            for tensors in zip(*self.values, strict=True)
        ]


def train(options: argparse.Namespace, at_once: int, looks_ahead: bool, peak_rate: float, seed: int) -> dict[str, Any]:
    """One run; its held-out loss."""
    task = Task.load(options, seed)
    if at_once == DDP:
        run_ddp(task, options, looks_ahead, peak_rate)
    else:
        run_layup(task, options, at_once, looks_ahead, peak_rate, seed)
    return dict(zip(NAMES, (at_once, looks_ahead, peak_rate, seed), strict=True)) | {"loss": task.held_out_loss()}


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
    task: Task, options: argparse.Namespace, at_once: int, looks_ahead: bool, peak_rate: float, seed: int
) -> None:
    """Workers take turns: in its turn a worker steps with the gradient that it has, and one begins its next."""
    workers, parameters = options.workers, list(task.model.parameters())
    replicas, optimizers = Replicas(parameters, workers), [Moments(parameters) for _ in range(workers)]
    gradients: dict[int, Tensors] = {}
    draws = torch.Generator().manual_seed(seed)

    def begin(worker: int) -> None:
        with torch.no_grad():
            replicas.merge(worker)
            torch._foreach_copy_(parameters, replicas.values[worker])
        gradients[worker] = task.gradient(options.batch_size)

    @torch.no_grad()
    def step(worker: int, turn: int) -> None:
        replicas.merge(worker)
        optimizer = optimizers[worker]
        optimizer.update(gradients.pop(worker))
        others = [other for other in optimizers if other is not optimizer and other.steps]
        if others:
            optimizer.compare(others[int(torch.randint(len(others), (), generator=draws))])
        change = optimizer.step("compared", workers, looks_ahead)
        torch._foreach_add_(replicas.values[worker], change, alpha=-rate_at(turn // workers, options, peak_rate))
        replicas.offer(worker)

    for worker in range(at_once):
        begin(worker)
    for turn in range(options.steps * workers):
        step(turn % workers, turn)
        begin((turn + at_once) % workers)
    with torch.no_grad():
        torch._foreach_copy_(parameters, replicas.mean())


def show(results: list[dict[str, Any]]) -> None:
    """For each method the mean over seeds at each rate."""
    rates = sorted({result["learning_rate"] for result in results})
    print(f"\n| | Nesterov's momentum | {' | '.join(f'{rate:g}' for rate in rates)} |\n|---|---|{'---|' * len(rates)}")
    for at_once, looks_ahead in sorted({(r["at_once"], r["looks_ahead"]) for r in results}):
        cells = []
        for rate in rates:
            losses = [r["loss"] for r in results if tuple(r[n] for n in NAMES[:3]) == (at_once, looks_ahead, rate)]
            cells.append(f"{statistics.mean(losses):.3f} ({len(losses)})" if losses else "")
        method = "DDP" if at_once == DDP else f"LayUp, {at_once} at once"
        print(f"| {method} | {'yes' if looks_ahead else 'no'} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--computing", type=int, nargs="+", help="at the same time; 1, 2, 4, ... all, and 0: DDP")
    add_task_arguments(parser)
    options = parser.parse_args()
    powers = [2**n for n in range(options.workers.bit_length()) if 2**n < options.workers]
    computing = options.computing or [DDP, *powers, options.workers]
    if not all(0 <= number <= options.workers for number in computing):
        parser.error(f"--computing {computing}: from 0 to the number of workers, {options.workers}")
    wanted = itertools.product(computing, (False, True), options.learning_rates, options.seeds)
    show(run_all(train, options, NAMES, list(wanted), options.folder / "late-gradients.json"))


if __name__ == "__main__":
    main()
