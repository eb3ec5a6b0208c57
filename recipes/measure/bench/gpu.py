"""LayUp on one GPU: beside the stock Trainer with one process, and two and four workers that share the GPU.

    python -m recipes.measure.bench gpu --device cuda

**One process.** GPT-2 124M and 355M in bf16: tokens per second, model FLOPs utilisation and peak memory of
`LayupTrainer` and of `Trainer`, in turn within one run. LayUp steps blocks in backward and frees their gradients, so it
should need less memory, by about the gradients' size, at the same speed.

**Sharing.** Workers that share one GPU read each other's blocks by CUDA IPC. That says nothing about speed, and shows
whether it is right: mass is conserved (a consensus point stops a run in which it is not), all hold one model at the
end, and the profiler finds no call in the steps that waits for the device. NCCL refuses two processes on one GPU, so
their few collectives go over gloo.

`--device cpu` runs the same code with a tiny model, to see that it works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..common.figures import by_round, median_ratio
from ..common.launching import measure
from .run import run_workers


class Size(NamedTuple):
    """A GPT-2.

    Attributes:
        layers: Number of layers.
        width: Of the residual stream.
        heads: Of attention.
        vocabulary: Entries of the embedding.
        tokens: Length of a sequence.
        batch: Sequences in a batch.
    """

    layers: int
    width: int
    heads: int
    vocabulary: int = 50304
    tokens: int = 1024
    batch: int = 8

    def overrides(self) -> str:
        shape = f"n_layer={self.layers},n_embd={self.width},n_head={self.heads}"
        return f"{shape},vocab_size={self.vocabulary}"

    def flops_per_token(self, parameters: int) -> float:
        """Of forward and backward: `6 N + 12 L d T` (Chowdhery et al., PaLM, arXiv 2204.02311, appendix B)."""
        without_positions = parameters - self.tokens * self.width
        return 6 * without_positions + 12 * self.layers * self.width * self.tokens


SIZES = {"GPT-2 124M": Size(12, 768, 12), "GPT-2 355M": Size(24, 1024, 16)}
TINY = {"GPT-2, tiny": Size(2, 32, 2, vocabulary=512, tokens=32, batch=2)}

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
"""Dense bf16 per second, as the data sheets say, by a part of the device's name."""

WAITING = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")
"""Calls of the CUDA runtime in which the processor waits for the device."""


def gpu(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All of it; what every worker measured."""
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("There is no GPU here: `--device cpu` runs the same code with a tiny model.")
    sizes, options.bf16, results = SIZES if on_gpu else TINY, True, []
    for name, size in sizes.items():
        options.processes, options.batch_size, options.block_size = 1, size.batch, size.tokens
        options.config_overrides = size.overrides()
        measured = run_workers(options, "layup,ddp", options.rounds, f"--device={options.device}")
        show_one_process(name, size, measured)
        results += [{"model": name, **result} for result in measured]
    for workers in (2, 4):
        shared = share_device(options, next(iter(sizes.values())), workers)
        show_shared(workers, shared)
        results += shared
    return results


def show_one_process(name: str, size: Size, results: list[dict[str, Any]]) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in device), None)
    rates = {method: by_round(results, method, "tokens_per_second") for method in ("layup", "ddp")}
    parameters = results[0]["parameters"]
    print(f"\n{name}, {parameters / 1e6:.0f} M parameters, {size.batch} x {size.tokens} tokens, bf16\n")
    print("| one process | tokens per second | ratio | MFU | peak memory |\n|---|---|---|---|---|")
    for method, title in (("ddp", "Trainer"), ("layup", "LayupTrainer")):
        rate = statistics.median(rates[method])
        use = f"{rate * size.flops_per_token(parameters) / peak:.3f}" if peak else "unknown device"
        memory = max(result["peak_bytes"] for result in results if result["method"] == method)
        ratio = median_ratio(rates[method], rates["ddp"])
        print(f"| {title} | {rate:,.0f} | {ratio:.3f} | {use} | {memory / 2**20:,.0f} MiB |")
    print(f"\nThe gradients are {4 * parameters / 2**20:,.0f} MiB.")


def share_device(options: argparse.Namespace, size: Size, workers: int) -> list[dict[str, Any]]:
    """Run so many workers on one device."""
    if options.device == "cuda":
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cuda:0"
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            f"--folder={folder}",
            f"--device={options.device}",
            f"--batch_size={max(1, size.batch // workers)}",
        ]
        arguments += [f"--block_size={size.tokens}", f"--config_overrides={size.overrides()}"]
        return measure("recipes.measure.bench.gpu_worker", workers, arguments, Path(folder))


def show_shared(workers: int, results: list[dict[str, Any]]) -> None:
    models, masses = {r["digest"] for r in results}, {r["mass"] for r in results}
    waits = {name: sum(r["waits"].get(name, 0) for r in results) for name in WAITING}
    print(f"\n{workers} workers on one device: {len(models)} different model(s) at the end, mass {masses}, ", end="")
    print(
        f"{sum(r['merges'] for r in results):.0f} merges, calls that wait for the device in {results[0]['profiled']} ",
        end="",
    )
    print(f"steps of each: {waits}.")
