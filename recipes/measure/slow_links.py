"""What makes LayUp's loss higher than DDP's where little of the model fits through the links, and what would lower it.

    python -m recipes.measure.slow_links --methods ddp own exact --fractions 0.06 0.01 --learning_rates 4e-3 8e-3

As `recipes.measure.few_bits`: workers alone on their hosts, which step at the same time, and links that carry so much
of the model between two steps. But workers and seeds are computed together, as one batch of models, and blocks go as
they are: so what is asked here costs a few seconds. Masses and weights are those of `layup_hf.ledger.mixing`.

A method is a name or several, joined by `+`:

- `ddp`: AdamW sees the mean gradient. `average`: all models are averaged exactly after every step, at no cost;
- `own`: second moments are of own gradients. `exact`: of the mean gradient of all workers, which none of them knows.
  `rows`: as `layup_hf.gossip.moments` finds them, with first moments compared over the network in every step;
  `rows2`: the same as if the mean were of two workers. Without any of them: `own`;
- `plain`: no Nesterov's momentum;
- `fresh`: blocks come as the peer has them on arrival, which no link can do;
- `moved`: what a worker moved by itself since it asked is added to what comes, as if the peer had moved as much;
- `parts`: sixteenth parts of blocks travel instead of whole ones. `whole`: the model travels as one;
- `turns`: a block is offered to one peer after the other, as `layup_hf.gossip.turns` does, not to all at once;
- `momentum`: merges move blocks with a momentum of 0.5. `outer`: a block's movement from merge to merge is taken for
  a gradient, as in DiLoCo: Nesterov's momentum of 0.5 and a rate of 1. `outer9`: of 0.9, and 0.7;
- `together`: no gossip, but one block after the other is averaged over all workers when the links have carried what an
  all-reduce of it takes, 2 (W - 1) / W times its size. With `outer9` that is Streaming DiLoCo, without: local SGD;
- `muon`: Muon steps the matrices of layers.

Prints held-out losses at equal samples of the mass-weighted mean of all models, and writes `slow-links.json` into
`--folder`; goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from typing import Any

import torch
from torch import Tensor

from layup_hf.gossip.turns import Turns
from layup_hf.ledger.mixing import UNIT, merge_weight, share
from recipes.parts.tokens import collate

from .common.command import command_line
from .local_adam import Task, add_task_arguments, rate_at, run_all
from .many_models import Models, Optimizer

NAMES = ("workers", "batch_size", "steps", "seeds", "method", "fraction", "learning_rate")
PARTS = 16
WITHOUT_LINK = {"ddp", "average"}
OUTER = {"outer": (1.0, 0.5), "outer9": (0.7, 0.9)}  # rate and momentum
KNOWN = WITHOUT_LINK | {"own", "exact", "rows", "rows2", "plain", "fresh", "moved", "parts", "turns", "momentum"}
KNOWN |= {"muon", "together", "whole", *OUTER}


class Links:
    """Masses, offers and what is on its way; the same for all seeds.

    Attributes:
        merged: Models that each worker has merged, on average.
    """

    def __init__(self, models: Models, kind: set[str]) -> None:
        self._flat, self._kind = models.flat, kind
        self._workers = self._flat.size(1)
        self._jumps = [2**n for n in range(self._workers.bit_length()) if 2**n < self._workers]
        self._pieces: list[slice] = []
        begin = 0
        blocks = [list(itertools.chain(*models.blocks))] if "whole" in kind else models.blocks
        for block in blocks:
            end = begin + sum(p.numel() for p in block)
            cuts = torch.linspace(begin, end, PARTS + 1).long().tolist() if "parts" in kind else [begin, end]
            self._pieces += [slice(a, b) for a, b in itertools.pairwise(cuts) if a < b]
            begin = end
        self.own = [[UNIT] * len(self._pieces) for _ in range(self._workers)]
        self.offers: dict[tuple[int, int, int], int] = {}  # units by sender, receiver, piece
        neighbours = [[(rank + jump) % self._workers for jump in self._jumps] for rank in range(self._workers)]
        self._turns = [Turns(len(self._pieces), peers) for peers in neighbours] if "turns" in kind else []
        self._merged: dict[tuple[int, ...], int] = {}
        self._credit = [0.0] * self._workers
        self._coming: list[tuple[int, int, Tensor, Tensor] | None] = [None] * self._workers
        self._clock, self._numbers = 0, 0
        self._whole = 2 * (self._workers - 1) / self._workers  # times a block, for an all-reduce of it
        self._anchor, self._speed = self._flat.clone(), torch.zeros_like(self._flat)

    def untaken(self, rank: int, piece: int) -> int:
        return sum(units for (sender, _, of), units in self.offers.items() if sender == rank and of == piece)

    @property
    def merged(self) -> float:
        return self._numbers / self._workers / self._flat.size(2)

    def offer(self) -> None:
        """Every piece, to those 1, 2, 4, ... further on who have taken the last offer of it."""
        for rank, piece in itertools.product(range(self._workers), range(len(self._pieces))):
            peers = [(rank + jump) % self._workers for jump in self._jumps]
            free = [peer for peer in peers if (rank, peer, piece) not in self.offers]
            if self._turns:
                free = self._turns[rank].due(piece, free)
                self._turns[rank].note_offered(piece, free)
            units = share(self.own[rank][piece], len(free)) if free else 0
            for peer in free if units else ():
                self.offers[rank, peer, piece] = units
                self.own[rank][piece] -= units

    def carry(self, numbers: float) -> None:
        """So many numbers come to each worker."""
        for rank in range(self._workers):
            self._credit[rank] += numbers
            while (coming := self._coming[rank] or self._ask(rank)) is not None:
                size = coming[2].size(1)
                if self._credit[rank] < size:
                    break
                self._credit[rank] -= size
                self._coming[rank] = None
                self._merge(rank, *coming)
            else:
                self._credit[rank] = 0.0

    def _ask(self, rank: int) -> tuple[int, int, Tensor, Tensor] | None:
        choices = [
            (self._merged.get((rank, piece), piece / 1e6), self._merged.get((rank, piece, sender), 0), sender, piece)
            for sender, receiver, piece in self.offers
            if receiver == rank
        ]
        if not choices:
            return None
        *_, sender, piece = min(choices)
        where = self._pieces[piece]
        self._coming[rank] = (sender, piece, self._flat[:, sender, where].clone(), self._flat[:, rank, where].clone())
        return self._coming[rank]

    def _merge(self, rank: int, sender: int, piece: int, theirs: Tensor, before: Tensor) -> None:
        kind, where = self._kind, self._pieces[piece]
        units = self.offers.pop((sender, rank, piece))
        weight = merge_weight(units, self.own[rank][piece], self.untaken(rank, piece))
        self.own[rank][piece] += units
        if self._turns:
            self._turns[rank].note_merged(piece, sender)
        mine = self._flat[:, rank, where]
        if "fresh" in kind:
            theirs = self._flat[:, sender, where]
        if "moved" in kind:
            theirs = theirs + mine - before
        move = weight * (theirs - mine)
        if "momentum" in kind:
            move = self._speed[:, rank, where].mul_(0.5).add_(move)
        mine += move
        self._go_further(slice(rank, rank + 1), where)
        self._clock += 1
        self._merged[rank, piece] = self._merged[rank, piece, sender] = self._clock
        self._numbers += where.stop - where.start

    def _go_further(self, ranks: slice, where: slice) -> None:
        """An outer optimizer's step, if there is one: these workers have just merged this."""
        for name in self._kind & set(OUTER):
            rate, momentum = OUTER[name]
            mine, speed, anchor = (tensor[:, ranks, where] for tensor in (self._flat, self._speed, self._anchor))
            movement = mine - anchor
            speed.mul_(momentum).add_(movement)
            mine.copy_(anchor + rate * (movement + momentum * speed))
            anchor.copy_(mine)

    def average(self, numbers: float) -> None:
        """So many numbers come to each worker of what it takes to average all."""
        self._credit[0] += numbers
        while self._credit[0] >= (size := self._flat[0, 0, where := self._pieces[self._clock]].numel() * self._whole):
            self._credit[0] -= size
            self._flat[:, :, where] = self._flat[:, :, where].mean(1, keepdim=True)
            self._go_further(slice(None), where)
            self._numbers += (where.stop - where.start) * self._workers
            self._clock = (self._clock + 1) % len(self._pieces)

    def mean(self) -> Tensor:
        """By mass: (seeds, 1, numbers)."""
        means = []
        for piece, where in enumerate(self._pieces):
            masses = [self.own[rank][piece] + self.untaken(rank, piece) for rank in range(self._workers)]
            if sum(masses) != self._workers * UNIT:
                raise RuntimeError(f"Piece {piece} has a mass of {sum(masses)} units.")
            parts = torch.tensor([mass / sum(masses) for mass in masses])
            means.append((self._flat[:, :, where] * parts.view(1, -1, 1)).sum(1, keepdim=True))
        return torch.cat(means, 2)


def train(options: argparse.Namespace, *chosen: Any) -> dict[str, Any]:
    """One run of all seeds, of what `NAMES` are chosen to be."""
    *_, method, fraction, peak = chosen
    tasks, kind = [Task.load(options, seed) for seed in options.seeds], set(method.split("+"))
    models = Models([task.model for task in tasks], options.workers)
    optimizer, links, distances = Optimizer(models, kind), Links(models, kind), []
    count = options.workers * options.batch_size
    for step in range(options.steps):
        batches = [collate(list(itertools.islice(task.samples, count)))["input_ids"] for task in tasks]
        gradients = models.gradients(torch.cat(batches).view(-1, options.batch_size, options.block_size))
        optimizer.step(gradients, rate_at(step, options, peak))
        if "together" in kind:
            links.average(fraction * models.flat.size(2))
        elif not kind & WITHOUT_LINK:
            links.offer()
            links.carry(fraction * models.flat.size(2))
        mean = models.flat.mean(1, keepdim=True)
        distances.append(float(((models.flat - mean).square().sum(2).mean() / mean.square().sum(2).mean()).sqrt()))
        if "average" in kind:
            models.flat.copy_(mean.expand_as(models.flat))
    held_out = [collate(task.held_out)["input_ids"] for task in tasks]
    with torch.no_grad():
        weights = models.views(links.mean())
        parts = zip(*(tokens.split(16) for tokens in held_out), strict=True)
        losses = torch.stack([models.loss(weights, torch.stack(part)) for part in parts]).mean(0)
    return {
        **dict(zip(NAMES, chosen, strict=True)),
        "losses": [round(float(loss), 4) for loss in losses],
        "models_per_step": links.merged / options.steps,
        "distance": statistics.mean(distances[len(distances) // 2 :]),
    }


def show(results: list[dict[str, Any]]) -> None:
    """For each method a row, with the losses of all seeds and the consensus distance at each rate."""
    rates = sorted({result["learning_rate"] for result in results})
    print("\n| workers | sequences | steps | method | models per step |", *(f"{rate:g} |" for rate in rates))
    print("|---" * (5 + len(rates)) + "|")
    kinds = ("workers", "batch_size", "steps", "method", "fraction")
    for kind in dict.fromkeys(tuple(result[name] for name in kinds) for result in results):
        cells = []
        for rate in rates:
            mine = [r for r in results if tuple(r[n] for n in (*kinds, "learning_rate")) == (*kind, rate)]
            losses = [loss for r in mine for loss in r["losses"]]
            apart = f"{statistics.mean(r['distance'] for r in mine):.2f}" if mine else ""
            by_seed = ", ".join(f"{loss:.3f}" for loss in losses)
            cells.append(f"{statistics.mean(losses):.3f} ({by_seed}), {apart}" if mine else "")
        print(f"| {' | '.join(map(str, kind))} | {' | '.join(cells)} |")


def main() -> None:
    parser = command_line("recipes.measure.slow_links", __doc__)
    parser.add_argument("--methods", nargs="+", default=["ddp", "own", "exact"])
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.06, 0.01], help="of the model, per step")
    add_task_arguments(parser)
    options = parser.parse_args()
    for method in options.methods:
        if unknown := set(method.split("+")) - KNOWN:
            parser.error(f"--methods {method}: there is no {', '.join(unknown)}")
    of_all = (options.workers, options.batch_size, options.steps, " ".join(map(str, options.seeds)))
    wanted = dict.fromkeys(
        (*of_all, method, 0.0 if set(method.split("+")) & WITHOUT_LINK else fraction, rate)
        for fraction, method, rate in itertools.product(options.fractions, options.methods, options.learning_rates)
    )
    show(run_all(train, options, NAMES, list(wanted), options.folder / "slow-links.json"))


if __name__ == "__main__":
    main()
