"""A block's step by itself: the one pass, torch's operations one after the other, and AdamW alone, in turn."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from layup_hf.blocks import split_into_blocks
from layup_hf.gossip.moments import by_row, by_row_of_square
from layup_hf.optim.clipping import BlockClipper
from layup_hf.optim.direction import Direction
from layup_hf.optim.onepass import OnePass, Rows, make_kernel, rows_of

from ..common.figures import median_ratio

WIDTHS = (128, 384, 768)
WEIGHT = 1 / 3


class Layers:
    """Layers of GPT-2 with their AdamW, gradients, and what a peer has of them."""

    def __init__(self, width: int, layers: int) -> None:
        shapes = ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
        vectors = (3 * width, width, 4 * width, *[width] * 5)
        parameters = [nn.ParameterList(torch.randn(s) for s in (*shapes, *vectors)) for _ in range(layers)]
        self.blocks = split_into_blocks(nn.ModuleList(parameters))
        self.optimizer = torch.optim.AdamW((p for each in parameters for p in each), lr=1e-4, fused=True)
        self.direction = Direction(self.blocks, self.optimizer, looks_ahead=True)
        kernel = make_kernel(torch.device("cpu"), self.optimizer)
        if isinstance(kernel, str):
            raise SystemExit(f"There is nothing to compare: {kernel}.")
        self.one_pass = OnePass(self.blocks, self.optimizer, self.direction, kernel)
        self.clipper = BlockClipper(self.blocks, 1.0, torch.device("cpu"))
        tensors = [[p.detach() for p in block.parameters] for block in self.blocks]
        self.theirs = [[torch.randn_like(p) for p in block] for block in tensors]
        self.moments = [[torch.randn_like(p) for p in block] for block in tensors]
        counts = [sum(rows_of(p) for p in block) for block in tensors]
        self.rows = [Rows(torch.rand(n) + 1, None, torch.empty(n), torch.empty(n)) for n in counts]
        for parameter in (p for block in self.blocks for p in block.parameters):
            parameter.grad = torch.randn_like(parameter)

    def alone(self, *, merges: bool = False, directed: bool = False, compares: bool = False) -> None:
        """By torch's operations: clipping and AdamW, and what is asked for beside them."""
        groups = self.optimizer.param_groups
        for block, theirs, moments, rows in zip(self.blocks, self.theirs, self.moments, self.rows, strict=True):
            if merges:
                with torch.no_grad():
                    torch._foreach_lerp_(block.tensors, theirs, WEIGHT)
            self.clipper.clip_block(block)
            self.optimizer.param_groups = [{**groups[0], "params": list(block.parameters)}]
            states = [self.optimizer.state[parameter] for parameter in block.parameters]
            if compares:
                for state, their in zip(states, moments, strict=True):
                    by_row_of_square(state["exp_avg"] - their)
                    by_row(state["exp_avg_sq"])
            if directed:
                with self.direction.stepping(block, shaped(rows.lengths, block.parameters)):
                    self.optimizer.step()
            else:
                self.optimizer.step()
        self.optimizer.param_groups = groups

    def in_one_pass(self, *, compares: bool = False) -> None:
        """The norm, and one pass."""
        for block, theirs, moments, rows in zip(self.blocks, self.theirs, self.moments, self.rows, strict=True):
            rows.theirs = moments if compares else None
            assert self.one_pass.fits(block)
            self.one_pass.step(block, [(theirs, WEIGHT)], self.clipper.factor_of(block), rows)


def shaped(lengths: Tensor | None, parameters: tuple[nn.Parameter, ...]) -> list[Tensor]:
    """Of each parameter one number for each row, of a shape that fits it."""
    assert lengths is not None
    parts = lengths.split([rows_of(p) for p in parameters])
    return [part.view(-1, *[1] * (p.dim() - 1)) for part, p in zip(parts, parameters, strict=True)]


def step(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Processor time of the steps of four layers."""
    torch.set_num_threads(1)
    results = []
    print("\n| width | AdamW alone | + merge, momentum, lengths | + comparing | one pass | + comparing |")
    print("|---|---|---|---|---|---|")
    for width in WIDTHS:
        layers = Layers(width, 4)
        ways: list[tuple[str, Callable[[], None]]] = [
            ("alone", layers.alone),
            ("parts", lambda it=layers: it.alone(merges=True, directed=True)),
            ("parts, comparing", lambda it=layers: it.alone(merges=True, directed=True, compares=True)),
            ("one pass", layers.in_one_pass),
            ("one pass, comparing", lambda it=layers: it.in_one_pass(compares=True)),
        ]
        seconds: dict[str, list[float]] = {name: [] for name, _ in ways}
        for turn in range(options.rounds + 1):
            for name, way in ways:
                began = time.thread_time()
                way()
                if turn:  # the first one is to get warm
                    seconds[name].append(time.thread_time() - began)
        ratios = [f"{median_ratio(seconds[name], seconds['alone']):.2f}" for name, _ in ways[1:]]
        print(f"| {width} | {1000 * statistics.median(seconds['alone']):.1f} ms | {' | '.join(ratios)} |", flush=True)
        results.append({"width": width, "layers": 4, "seconds": seconds})
    return results
