"""What fewer bytes for a block gain where little of the model fits through the links, apart from all that time does.

    python -m recipes.measure.few_bits --fractions 0.06 0.01 --learning_rates 4e-3 8e-3 --seeds 1 2 3

One process plays all workers, each of which is alone on its host and has a model, an AdamW by its own gradients with
Nesterov's momentum, and a link. They make their steps at the same time. Between two steps a link carries so many bytes,
as a fraction of the model in fp32 (`--fractions`): one block after the other, always the one that was not merged for
the longest of all that are offered. It comes as the peer had it when it began to be sent.

Masses and weights are those of `layup_hf.ledger.mixing`, offers go to the ranks 1, 2, 4, ... further on, to one after
the other as in `layup_hf.gossip.turns` (with `--offers all` to all at once), and blocks are written, read and merged by
the library's own parts (`layup_hf.windows.serving`, `receiving`, `gossip.merging`). So with `--wire_dtypes int8 int4`
blocks that turn out to be too far away come again, and their bytes count.

Beside that stand DDP, whose AdamW sees the mean gradient, and workers that do not communicate. All losses are held-out
losses at equal samples, of the mass-weighted mean of all models. Prints them and writes `few-bits.json` into
`--folder`; goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import itertools
import statistics
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from layup_hf.blocks import split_into_blocks
from layup_hf.device import HOST
from layup_hf.gossip.merging import Merger
from layup_hf.gossip.turns import Turns
from layup_hf.ledger.mixing import UNIT, merge_weight, share
from layup_hf.windows.layout import Layout, Pieces
from layup_hf.windows.peers import Peer
from layup_hf.windows.receiving import Receiving
from layup_hf.windows.serving import Serving
from layup_hf.windows.staging import Slot
from layup_hf.windows.wire import Request

from .common.command import command_line
from .local_adam import Moments, Task, Tensors, add_task_arguments, mean_of, rate_at, run_all

NAMES = ("wire_dtype", "offers", "fraction", "learning_rate", "seed")
DDP, ALONE = "ddp", "none"


class Memory:
    """Stands in for a `Transport`: what is written to a peer is copied within this process."""

    device_number = 0

    def register(self, tensors: Any) -> None:
        pass

    def key(self, tensor: Tensor) -> bytes:
        return b""

    def accept_key(self, key: bytes, name: str) -> None:
        pass

    def release(self, handle: Any) -> None:
        pass

    def write(self, name: str, source: Pieces, target: Pieces, device: int) -> str:
        for (begin, size), (end, _) in zip(source, target, strict=True):
            ctypes.memmove(end, begin, size)
        return "written"

    def is_written(self, handle: str) -> bool:
        return True


class Worker:
    """A model with its optimizer and its end of a link.

    Attributes:
        own: Mass that it holds of each block.
        turns: Whose turn it is to be offered to; None: all have theirs at once.
        offers: Mass that it has offered and is still to be taken, by receiver and block.
        merged: When each block was last merged, at all and by peer.
        coming: Bytes that are still to come of what is in the slot; 0: nothing is on its way.
        figures: Totals: bytes that have come, models that have been merged.
    """

    def __init__(self, rank: int, task: Task, wire_dtype: str) -> None:
        self.rank = rank
        self.task = replace(task, model=copy.deepcopy(task.model))
        self.parameters = list(self.task.model.parameters())
        self.optimizer = Moments(self.parameters)
        blocks, memory = split_into_blocks(self.task.model), Memory()
        self.layout = Layout(blocks, wire_dtype)
        self.tensors = [block.tensors for block in blocks]
        self.receiving, self.merger = Receiving(self.layout), Merger(rank)
        self.serving: Any = Serving(self.layout, memory, HOST)  # type: ignore[arg-type]
        self.slot = Slot(self.layout, memory, HOST)  # type: ignore[arg-type]
        self.own = [UNIT] * len(blocks)
        self.turns: Turns | None = None
        self.offers: dict[tuple[int, int], int] = {}
        self.merged: dict[tuple[int, ...], float] = {}
        self.coming = self.credit = 0.0
        self.figures = {"bytes": 0.0, "models": 0.0}

    def untaken(self, block: int) -> int:
        return sum(units for (_, of), units in self.offers.items() if of == block)

    @torch.no_grad()
    def step(self, gradients: Tensors, rate: float) -> None:
        self.optimizer.update(gradients)
        torch._foreach_add_(self.parameters, self.optimizer.step("local", 1, looks_ahead=True), alpha=-rate)

    def offer(self, receivers: list[int]) -> None:
        """Every block, to those who have taken the last offer of it."""
        for block in range(len(self.own)):
            peers = [peer for peer in receivers if (peer, block) not in self.offers]
            if self.turns is not None:
                peers = self.turns.due(block, peers)
                self.turns.note_offered(block, peers)
            units = share(self.own[block], len(peers)) if peers else 0
            for peer in peers if units else ():
                self.offers[peer, block] = units
                self.own[block] -= units

    def receive(self, workers: list[Worker], num_bytes: float) -> None:
        """So many bytes come through the link."""
        self.credit += num_bytes
        while self.coming or self._ask(workers):
            if self.credit < self.coming:
                return
            self.credit -= self.coming
            self.figures["bytes"] += self.coming
            self.coming = 0.0
            if self.receiving.accept(self.slot, is_written=True):
                self._merge(workers[self.slot.peer])
        self.credit = 0.0  # there was nothing to send

    def _ask(self, workers: list[Worker]) -> bool:
        """Begin to send what was not merged for the longest. Whether there is anything."""
        choices = [
            (self.merged.get((block,), block / 1e6), self.merged.get((block, peer.rank), 0.0), peer.rank, block)
            for peer in workers
            for receiver, block in peer.offers
            if receiver == self.rank
        ]
        if not choices:
            return False
        self.slot.peer, self.slot.block = min(choices)[2:]
        self.receiving.prepare(self.slot)
        place = (self.slot.block, self.slot.buffer.data_ptr(), 0, b"", self.slot.seed, self.slot.steps)
        peer = Peer(self.rank, "", b"", wanted=Request(1, *place))
        answer = workers[self.slot.peer].serving.advance(peer, 0.0)
        if not answer.is_written:  # some number is not finite
            self.slot.steps = ()
            peer.wanted = Request(2, *place[:-1], ())
            workers[self.slot.peer].serving.advance(peer, 0.0)
        self.coming = float(self.receiving.num_bytes(self.slot))
        return True

    def _merge(self, peer: Worker) -> None:
        block = self.slot.block
        units = peer.offers.pop((self.rank, block))
        weight = merge_weight(units, self.own[block], self.untaken(block))
        self.merger.merge(self.tensors[block], [(self.slot.views[block], weight)])
        self.own[block] += units
        if self.turns is not None:
            self.turns.note_merged(block, peer.rank)
        now = self.optimizer.steps + self.figures["models"] * 1e-9  # later ones of a step are later
        self.merged[block,] = self.merged[block, peer.rank] = now
        self.figures["models"] += self.layout.num_bytes[block] / sum(self.layout.num_bytes)


def mass_mean(workers: list[Worker]) -> list[Tensors]:
    """Of each block: the mean of all models, weighted with masses."""
    means = []
    for block, own in enumerate(zip(*(worker.own for worker in workers), strict=True)):
        masses = [mine + worker.untaken(block) for mine, worker in zip(own, workers, strict=True)]
        if sum(masses) != len(workers) * UNIT:
            raise RuntimeError(f"Block {block} has a mass of {sum(masses)} units instead of {len(workers) * UNIT}.")
        copies = zip(*(worker.tensors[block] for worker in workers), strict=True)
        means.append([sum(m / sum(masses) * t for m, t in zip(masses, ts, strict=True)) for ts in copies])
    return means


def run_ddp(task: Task, options: argparse.Namespace, peak: float) -> dict[str, float]:
    parameters = list(task.model.parameters())
    optimizer = Moments(parameters)
    for step in range(options.steps):
        gradient = mean_of([task.gradient(options.batch_size) for _ in range(options.workers)])
        with torch.no_grad():
            optimizer.update(gradient)
            change = optimizer.step("mean", options.workers, looks_ahead=options.ddp_nesterov)
            torch._foreach_add_(parameters, change, alpha=-rate_at(step, options, peak))
    return {}


def run_layup(
    task: Task, options: argparse.Namespace, wire_dtype: str, offers: str, fraction: float, peak: float
) -> dict[str, Any]:
    count = options.workers
    workers = [Worker(rank, task, "fp32" if wire_dtype == ALONE else wire_dtype) for rank in range(count)]
    jumps = [2**n for n in range(count.bit_length()) if 2**n < count] if wire_dtype != ALONE else []
    if offers == "turns":
        for worker in workers:
            worker.turns = Turns(len(worker.own), [(worker.rank + jump) % count for jump in jumps])
    size = 4 * sum(p.numel() for p in workers[0].parameters)
    distances = []
    for step in range(options.steps):
        for worker in workers:
            worker.step(worker.task.gradient(options.batch_size), rate_at(step, options, peak))
            worker.offer([(worker.rank + jump) % count for jump in jumps])
        with torch.no_grad():
            for worker in workers:
                worker.receive(workers, fraction * size)
        distances.append(distance(workers))
    for block, mean in enumerate(mass_mean(workers)):
        torch._foreach_copy_([tensor.data for tensor in workers[0].tensors[block]], mean)
    task.model = workers[0].task.model
    return {
        "models_per_step": statistics.mean(w.figures["models"] for w in workers) / options.steps,
        "bytes_per_step": statistics.mean(w.figures["bytes"] for w in workers) / options.steps / size,
        "resent": statistics.mean(w.receiving.resent for w in workers),
        "distance": statistics.mean(distances[len(distances) // 2 :]),
    }


@torch.no_grad()
def distance(workers: list[Worker]) -> float:
    """Consensus distance, by unweighted means."""
    means = [torch.stack(tensors).mean(0) for tensors in zip(*(w.parameters for w in workers), strict=True)]
    away = [torch._foreach_norm(torch._foreach_sub(w.parameters, means)) for w in workers]
    square = sum(float(norm) ** 2 for norms in away for norm in norms) / len(workers)
    return (square / sum(float(mean.square().sum()) for mean in means)) ** 0.5


def train(options: argparse.Namespace, *chosen: Any) -> dict[str, Any]:
    """One run, of what `NAMES` are chosen to be."""
    wire_dtype, offers, fraction, peak, seed = chosen
    task = Task.load(options, seed)
    if wire_dtype == DDP:
        figures: dict[str, Any] = run_ddp(task, options, peak)
    else:
        figures = run_layup(task, options, wire_dtype, offers, fraction, peak)
    return {**dict(zip(NAMES, chosen, strict=True)), "loss": task.held_out_loss(), **figures}


def show(results: list[dict[str, Any]]) -> None:
    """For each link and format the mean over seeds at the best rate."""
    print(
        "\n| link, in models per step | blocks are sent as | learning rate | held-out loss (seeds) | over DDP's |",
        end="",
    )
    print(" models merged per step | sent in vain per worker | consensus distance |\n" + "|---" * 8 + "|")

    def best(*kind: Any) -> tuple[float, list[dict[str, Any]]]:
        mine = [r for r in results if (r["fraction"], r["wire_dtype"], r["offers"]) == kind]
        rates = {rate: [r for r in mine if r["learning_rate"] == rate] for rate in {r["learning_rate"] for r in mine}}
        return min(rates.items(), key=lambda item: statistics.mean(r["loss"] for r in item[1]))

    kinds = dict.fromkeys((result["fraction"], result["wire_dtype"], result["offers"]) for result in results)
    ddp = next((best(*kind) for kind in kinds if kind[1] == DDP), None)
    for fraction, wire_dtype, offers in kinds:
        rate, runs = best(fraction, wire_dtype, offers)
        loss = statistics.mean(run["loss"] for run in runs)
        row = [f"{fraction:g}" if fraction else "", {DDP: "DDP", ALONE: "no communication"}.get(wire_dtype, wire_dtype)]
        row[-1] += " to all at once" if offers == "all" else ""
        by_seed = ", ".join(f"{run['loss']:.3f}" for run in runs)
        row += [f"{rate:g}", f"{loss:.3f} ({by_seed})"]
        row += [f"{loss / statistics.mean(run['loss'] for run in ddp[1]):.3f}" if ddp else ""]
        for figure, form in (("models_per_step", ".3f"), ("resent", ".1f"), ("distance", ".3f")):
            row.append(f"{statistics.mean(run[figure] for run in runs):{form}}" if figure in runs[0] else "")
        print(f"| {' | '.join(row)} |")


def main() -> None:
    parser = command_line("recipes.measure.few_bits", __doc__)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.06, 0.01], help="of the model, per step")
    kinds = [DDP, ALONE, "fp32", "bf16", "int8", "int4"]
    parser.add_argument("--wire_dtypes", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--offers", nargs="+", choices=["turns", "all"], default=["turns"], help="to whom at a time")
    parser.add_argument("--ddp_nesterov", action="store_true", help="DDP's AdamW uses Nesterov's momentum, too")
    add_task_arguments(parser)
    options = parser.parse_args()
    wanted = dict.fromkeys(
        (wire_dtype, *(("", 0.0) if wire_dtype in (DDP, ALONE) else (offers, fraction)), rate, seed)
        for fraction, wire_dtype, offers, rate, seed in itertools.product(
            options.fractions, options.wire_dtypes, options.offers, options.learning_rates, options.seeds
        )
    )
    show(run_all(train, options, NAMES, list(wanted), options.folder / "few-bits.json"))


if __name__ == "__main__":
    main()
