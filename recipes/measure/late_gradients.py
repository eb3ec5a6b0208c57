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
and before its step, and steps by an AdamW with the second moment of the mean gradient (`layup_hf.gossip.moments`; with
`--second_moment own` by that of its own), with and without Nesterov's momentum (`layup_hf.optim.direction`). DDP's
AdamW sees the mean gradient. With `--optimizer muon`, Muon (`layup_hf.optim.muon`) steps the matrices of layers in all
of them, by its own momentum, and what has been said of AdamW is of all else.

Prints held-out losses at equal samples and writes `late-gradients.json` into `--folder`; goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layup_hf.blocks import split_into_blocks
from layup_hf.ledger.mixing import UNIT, merge_weight, share
from layup_hf.optim.matrices import layer_matrices
from layup_hf.optim.muon import MuonAdamW

from .common.command import command_line
from .local_adam import Moments, Task, Tensors, add_task_arguments, mean_of, rate_at, run_all

NAMES = ("optimizer", "second_moment", "at_once", "looks_ahead", "whole", "learning_rate", "seed")
DDP = 0  # workers that compute at the same time, in results of DDP


class Optimizer:
    """AdamW, or Muon on some of the parameters and AdamW on all else.

    Args:
        parameters: What is stepped.
        matrices: Identities of those that Muon steps.
    """

    def __init__(self, parameters: Tensors, matrices: Container[int] = ()) -> None:
        self._is_matrix = [id(parameter) in matrices for parameter in parameters]
        self.moments = Moments(self._split(parameters)[0])
        self._matrices = [nn.Parameter(torch.zeros_like(p)) for p in self._split(parameters)[1]]
        self._muon = MuonAdamW(self._matrices, {"whole": self._matrices}, lr=1.0) if self._matrices else None

    def _split(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        """What AdamW steps, and what Muon does."""
        both = list(zip(tensors, self._is_matrix, strict=True))
        return [t for t, is_matrix in both if not is_matrix], [t for t, is_matrix in both if is_matrix]

    def update(self, gradients: Tensors) -> None:
        of_adamw, of_muon = self._split(gradients)
        self.moments.update(of_adamw)
        for matrix, gradient in zip(self._matrices, of_muon, strict=True):
            matrix.grad = gradient

    @torch.no_grad()
    def step(self, rule: str, workers: int, looks_ahead: bool) -> Tensors:
        """See `Moments.step`. Muon's step is what it makes of zeros with a learning rate of one."""
        of_adamw = iter(self.moments.step(rule, workers, looks_ahead))
        if self._muon is not None:
            torch._foreach_zero_(self._matrices)
            self._muon.step()
        of_muon: list[Tensor] = [-matrix.detach() for matrix in self._matrices]
        return [of_muon.pop(0) if is_matrix else next(of_adamw) for is_matrix in self._is_matrix]


class Replicas:
    """What all workers have of one block: values, masses, offers and moments.

    Attributes:
        begins: Where the block begins among all that forward computes, from 0 to 1.
    """

    def __init__(self, parameters: Tensors, workers: int, begins: float, matrices: Container[int] = ()) -> None:
        self.parameters, self.begins = parameters, begins
        self.values = [[p.detach().clone() for p in parameters] for _ in range(workers)]
        self.optimizers = [Optimizer(parameters, matrices) for _ in range(workers)]
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

    def step(
        self, worker: int, gradient: Tensors, rate: float, looks_ahead: bool, rule: str, draws: torch.Generator
    ) -> None:
        """By the worker's own optimizer, which may compare its moments with those of another worker (`rule`)."""
        optimizer = self.optimizers[worker]
        optimizer.update(gradient)
        others = [o.moments for o in self.optimizers if o is not optimizer and o.moments.steps]
        if others and rule == "compared":
            optimizer.moments.compare(others[int(torch.randint(len(others), (), generator=draws))])
        change = optimizer.step(rule, len(self.values), looks_ahead)
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


def matrices_of(model: PreTrainedModel, optimizer: str) -> set[int]:
    """Identities of what Muon steps."""
    return {id(p) for p in layer_matrices(model)["whole"]} if optimizer == "muon" else set()


def make_replicas(model: PreTrainedModel, workers: int, whole: bool, optimizer: str = "adamw") -> list[Replicas]:
    """Of each block of the model, or of all of it as one."""
    matrices = matrices_of(model, optimizer)
    if whole:
        return [Replicas(list(model.parameters()), workers, 0, matrices)]
    embeddings, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    blocks = split_into_blocks(model)
    # Looking up embeddings takes no time.
    sizes = [0 if block.name == "embeddings" else sum(p.numel() for p in block.parameters) for block in blocks]
    total = sum(sizes) + (output.numel() if output is embeddings else 0)
    begins = [before / total for before in itertools.accumulate(sizes, initial=0)]
    return [
        Replicas(list(block.parameters), workers, start, matrices)
        for block, start in zip(blocks, begins[:-1], strict=True)
    ]


def train(options: argparse.Namespace, *chosen: Any) -> dict[str, Any]:
    """One run, of what `NAMES` are chosen to be; its held-out loss."""
    run = argparse.Namespace(**dict(zip(NAMES, chosen, strict=True)))
    task = Task.load(options, run.seed)
    (run_ddp if run.at_once == DDP else run_layup)(task, options, run)
    return {**vars(run), "loss": task.held_out_loss()}


def run_ddp(task: Task, options: argparse.Namespace, run: argparse.Namespace) -> None:
    parameters = list(task.model.parameters())
    optimizer = Optimizer(parameters, matrices_of(task.model, run.optimizer))
    for step in range(options.steps):
        gradient = mean_of([task.gradient(options.batch_size) for _ in range(options.workers)])
        with torch.no_grad():
            optimizer.update(gradient)
            change = optimizer.step("mean", options.workers, run.looks_ahead)
            torch._foreach_add_(parameters, change, alpha=-rate_at(step, options, run.learning_rate))


def run_layup(task: Task, options: argparse.Namespace, run: argparse.Namespace) -> None:
    """Workers end their steps in turn, one in a unit of time; a step takes as many units as workers compute at once."""
    workers, steps, at_once = options.workers, range(options.steps), run.at_once
    replicas = make_replicas(task.model, workers, run.whole, run.optimizer)
    draws, rule = torch.Generator().manual_seed(run.seed), "compared" if run.second_moment == "mean" else "local"
    gradients: list[dict[torch.Tensor, torch.Tensor]] = [{} for _ in range(workers)]

    def find_gradients(worker: int) -> None:
        """At what the worker has read: until it steps its first block, nothing changes that."""
        for block in replicas:
            block.load(block.values[worker])
        gradients[worker] = dict(zip(task.model.parameters(), task.gradient(options.batch_size), strict=True))

    def step(worker: int, block: Replicas, number: int) -> None:
        block.merge(worker)
        gradient = [gradients[worker].pop(p) for p in block.parameters]
        block.step(worker, gradient, rate_at(number, options, run.learning_rate), run.looks_ahead, rule, draws)
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
    kinds = NAMES[: NAMES.index("learning_rate")]
    for kind in sorted({tuple(result[name] for name in kinds) for result in results}):
        cells = []
        for rate in rates:
            losses = [r["loss"] for r in results if tuple(r[n] for n in (*kinds, "learning_rate")) == (*kind, rate)]
            cells.append(f"{statistics.mean(losses):.3f} ({len(losses)})" if losses else "")
        optimizer, second, at_once, looks_ahead, whole = kind
        method = "DDP" if at_once == DDP else f"LayUp, {at_once} at once{', the model as one block' if whole else ''}"
        method += {"adamw": "", "muon": ", Muon"}[optimizer] + {"mean": "", "own": ", own second moments"}[second]
        print(f"| {method} | {'yes' if looks_ahead else 'no'} | {' | '.join(cells)} |")


def main() -> None:
    parser = command_line("recipes.measure.late_gradients", __doc__)
    parser.add_argument("--computing", type=int, nargs="+", help="at the same time; 1, 2, 4, ... all, and 0: DDP")
    parser.add_argument("--whole", action="store_true", help="read and step the whole model as one block")
    parser.add_argument("--momentum", nargs="+", choices=["plain", "nesterov"], default=["plain", "nesterov"])
    parser.add_argument("--optimizer", nargs="+", choices=["adamw", "muon"], default=["adamw"])
    parser.add_argument("--second_moment", nargs="+", choices=["mean", "own"], default=["mean"], help="LayUp's AdamW's")
    add_task_arguments(parser)
    options = parser.parse_args()
    powers = [2**n for n in range(options.workers.bit_length()) if 2**n < options.workers]
    computing = options.computing or [DDP, *powers, options.workers]
    if not all(0 <= number <= options.workers for number in computing):
        parser.error(f"--computing {computing}: from 0 to the number of workers, {options.workers}")
    looks_ahead = [name == "nesterov" for name in options.momentum]
    # DDP's second moment is of the mean gradient in any case.
    wanted = dict.fromkeys(
        (optimizer, "mean" if at_once == DDP else second, at_once, ahead, options.whole and at_once != DDP, rate, seed)
        for optimizer, second, at_once, ahead, rate, seed in itertools.product(
            options.optimizer, options.second_moment, computing, looks_ahead, options.learning_rates, options.seeds
        )
    )
    show(run_all(train, options, NAMES, list(wanted), options.folder / "late-gradients.json"))


if __name__ == "__main__":
    main()
