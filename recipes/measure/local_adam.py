"""What it costs that every worker has an AdamW of its own, apart from all that gossip does.

    python -m recipes.measure.local_adam --learning_rates 4e-3 8e-3 --seeds 1 2

One process plays all workers, whose models are averaged exactly after every step and so are always equal. In a step
each worker has the gradient of its own batch, clipped by its own norm. What differs is the step that the model makes:

- `mean`: of one AdamW that sees the mean gradient, which is what DDP does;
- `local`: the mean of the steps of the workers' own AdamWs, which is the best that local optimizers can come to;
- `compared`: as `local`, with second moments from which the noise is taken that a mean gradient would not have, found
  by comparing first moments with one other worker in every step, as `layup_hf.gossip.moments` does at first;
- `in time`: the same, found by each worker alone, from how its gradient changes from step to step.

Prints held-out losses at equal samples and writes `local-adam.json` into `--folder`; goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from layup_hf.gossip.moments import by_row, noise_between
from recipes.parts.corpus import load_corpus
from recipes.parts.curve import write_results
from recipes.parts.model import make_config, make_model
from recipes.parts.tokens import cache_folder, cached_tokenizer, collate, make_blocks

from .common.command import command_line

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
CLIP = 1.0
HELD_OUT = 256
NOISE_KEPT = (1 - BETA1) / (1 + BETA1)  # of independent noise, in the square of a running mean

Tensors = list[Tensor]


class Moments:
    """The moments of one AdamW, and what is known of the noise in them."""

    def __init__(self, parameters: Tensors) -> None:
        self.first, self.second, self.signal = ([torch.zeros_like(p) for p in parameters] for _ in range(3))
        self.noise = [torch.zeros_like(by_row(p)) for p in parameters]
        self.gradients: Tensors = []  # of the latest step
        self.steps = 0

    def update(self, gradients: Tensors) -> None:
        self.steps += 1
        self.gradients = gradients
        torch._foreach_lerp_(self.first, gradients, 1 - BETA1)
        torch._foreach_mul_(self.second, BETA2)
        torch._foreach_addcmul_(self.second, gradients, gradients, 1 - BETA2)
        squares = torch._foreach_mul(self.first, self.first)
        torch._foreach_mul_(self.signal, BETA2)
        torch._foreach_add_(self.signal, squares, alpha=(1 - BETA2) / self._whole(BETA1) ** 2)

    def _whole(self, beta: float) -> float:
        """What a running mean that began at zero has come to."""
        return 1 - beta**self.steps

    def compare(self, other: Moments) -> None:
        """See what of the first moments is noise: see `layup_hf.gossip.moments`."""
        torch._foreach_lerp_(self.noise, noise_between(self.first, other.first, BETA1, self.steps), 1 - BETA2)

    def step(self, rule: str, workers: int, looks_ahead: bool = False) -> Tensors:
        """The step in learning rates; unless by AdamW's own, as if its second moment were that of the mean gradient.

        Args:
            rule: See the module.
            workers: Their number.
            looks_ahead: By Nesterov's momentum, as `layup_hf.optim.direction`.
        """
        steps = []
        for number, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            square = second / self._whole(BETA2)
            if rule == "in time":
                noise = ((square - self.signal[number] / self._whole(BETA2)) / (1 - NOISE_KEPT)).clamp(min=0)
                square = (square - noise + noise / workers).clamp(min=0)
            elif rule == "compared":
                noise = self.noise[number] / self._whole(BETA2)
                square = square * (1 - (1 - 1 / workers) * (noise / by_row(square).clamp(min=1e-38)).clamp(max=1))
            direction = first / self._whole(BETA1)
            if looks_ahead:
                direction = direction.lerp(self.gradients[number], 1 - BETA1)
            steps.append(direction / (square.sqrt() + EPSILON))
        return steps


def clipped(gradients: Sequence[Tensor]) -> Tensors:
    norm = torch.stack(torch._foreach_norm(list(gradients))).norm()
    return torch._foreach_mul(list(gradients), float((CLIP / (norm + 1e-6)).clamp(max=1)))


def mean_of(lists: Sequence[Tensors]) -> Tensors:
    """Of each tensor over the workers."""
    return [sum(tensors) / len(lists) for tensors in zip(*lists, strict=True)]


@dataclass
class Task:
    """What is trained: the model, sequences in a random order that begins again at its end, and the held-out ones."""

    model: PreTrainedModel
    samples: Iterator[dict[str, Any]]
    held_out: list[dict[str, Any]]

    @classmethod
    def load(cls, options: argparse.Namespace, seed: int) -> Task:
        torch.set_num_threads(1)
        datasets.disable_progress_bars()
        corpus, cache = load_corpus(train_file=options.train_file), cache_folder()
        tokenizer = cached_tokenizer(corpus.train, corpus.column, options.vocab_size, cache)
        blocks = functools.partial(make_blocks, column=corpus.column, tokenizer=tokenizer, cache=cache)
        count = options.steps * options.workers * options.batch_size
        shape = {"rows_are_documents": corpus.rows_are_documents, "block_size": options.block_size}
        rows = blocks(corpus.train, most=count, name="training", **shape)
        held_out = blocks(corpus.held_out, most=HELD_OUT, name="held-out", **shape)
        model = make_model(None, make_config(None, options.config_overrides, tokenizer, options.block_size), seed)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        return cls(model.train(), (rows[number] for number in itertools.cycle(order)), list(held_out))

    def gradient(self, batch_size: int) -> Tensors:
        """Of the next batch, clipped by its own norm."""
        batch = collate(list(itertools.islice(self.samples, batch_size)))
        return clipped(torch.autograd.grad(self.model(**batch).loss, list(self.model.parameters())))

    @torch.no_grad()
    def held_out_loss(self) -> float:
        self.model.eval()
        batches = [collate(self.held_out[i : i + 16]) for i in range(0, len(self.held_out), 16)]
        return statistics.mean(float(self.model(**batch).loss) for batch in batches)


def train(options: argparse.Namespace, rule: str, peak_rate: float, seed: int) -> dict[str, Any]:
    """One run; its held-out loss."""
    task = Task.load(options, seed)
    parameters = list(task.model.parameters())
    optimizers = [Moments(parameters) for _ in range(1 if rule == "mean" else options.workers)]
    for step in range(options.steps):
        found = [task.gradient(options.batch_size) for _ in range(options.workers)]
        with torch.no_grad():
            for optimizer, own in zip(optimizers, [mean_of(found)] if rule == "mean" else found, strict=True):
                optimizer.update(own)
            if rule == "compared":
                for rank, optimizer in enumerate(optimizers):
                    others = [other for other in optimizers if other is not optimizer]
                    optimizer.compare(others[(step + rank) % len(others)])
            steps = mean_of([optimizer.step(rule, options.workers) for optimizer in optimizers])
            torch._foreach_add_(parameters, steps, alpha=-rate_at(step, options, peak_rate))
    return {"rule": rule, "learning_rate": peak_rate, "seed": seed, "loss": task.held_out_loss()}


def rate_at(step: int, options: argparse.Namespace, peak: float) -> float:
    """Linear warm-up, then a cosine to zero."""
    warm_up = options.warmup * options.steps
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (options.steps - warm_up)))


def run_all(
    run: Callable[..., dict[str, Any]],
    options: argparse.Namespace,
    names: Sequence[str],
    wanted: Sequence[tuple[Any, ...]],
    file: Path,
) -> list[dict[str, Any]]:
    """The results of all runs that are wanted, of which those in the file have been made already.

    Args:
        run: Takes the options and what is wanted; its result says what was wanted under `names`.
        options: Of all runs; `at_once` of them are made at a time.
        names: Of what tells runs apart.
        wanted: Values of these, for each run.
        file: Is written after each run.
    """
    results = json.loads(file.read_text()) if file.exists() else []
    done = [tuple(result[name] for name in names) for result in results]
    missing = [values for values in wanted if values not in done]
    file.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        run_all_of: Callable[..., Iterable[dict[str, Any]]] = map
        if options.at_once > 1:
            pool = ProcessPoolExecutor(options.at_once, multiprocessing.get_context("spawn"))
            run_all_of = stack.enter_context(pool).map
        runs = run_all_of(functools.partial(run, options), *zip(*missing, strict=True)) if missing else []
        for result in tqdm(runs, total=len(missing), unit="run"):
            results.append(result)
            write_results(file, results)
    return results


def show(results: list[dict[str, Any]]) -> None:
    rates, seeds = (sorted({result[name] for result in results}) for name in ("learning_rate", "seed"))
    losses = {(r["rule"], r["learning_rate"], r["seed"]): r["loss"] for r in results}
    print(f"\n| one step is | {' | '.join(f'{rate:g}' for rate in rates)} |\n|---{'|---' * len(rates)}|")
    for rule in dict.fromkeys(result["rule"] for result in results):
        cells = [[losses[rule, rate, seed] for seed in seeds if (rule, rate, seed) in losses] for rate in rates]
        print(f"| {rule} | {' | '.join(', '.join(f'{loss:.3f}' for loss in cell) for cell in cells)} |")


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """What is trained, for how long, by how many."""
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--block_size", type=int, default=64)
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--config_overrides", default="", help="of the model, as in the recipe")
    parser.add_argument("--warmup", type=float, default=0.4, help="share of the steps")
    parser.add_argument("--train_file", help="text to train on; the sources of Python's standard library by default")
    parser.add_argument("--at_once", type=int, default=2, help="runs, each on one core; 1: in this process")
    parser.add_argument("--folder", type=Path, default=Path("bench-output"))


def main() -> None:
    parser = command_line("recipes.measure.local_adam", __doc__)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    add_task_arguments(parser)
    options = parser.parse_args()
    wanted = itertools.product(options.rules, options.learning_rates, options.seeds)
    show(run_all(train, options, ("rule", "learning_rate", "seed"), list(wanted), options.folder / "local-adam.json"))


RULES = ("mean", "local", "compared", "in time")

if __name__ == "__main__":
    main()
