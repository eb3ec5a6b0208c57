"""One part of `first_gpu`: `python -m recipes.measure.first_gpu.part PART --device cuda --folder FOLDER`."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing, nn

from layup_hf.blocks import Block, split_into_blocks
from layup_hf.device import queues_of
from layup_hf.gossip.consensus import PIECE, reach_consensus
from layup_hf.gossip.engine import GossipEngine
from layup_hf.gossip.merging import Merger, round_at_random
from layup_hf.gossip.topology import PeerSampler
from layup_hf.optim.clipping import BlockClipper
from layup_hf.optim.direction import Direction
from layup_hf.windows import SharedWindows


def gather(item: Any) -> list[Any]:
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def in_processes(count: int, action: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What `action(rank, *arguments)` gives in each of some processes, which talk over gloo; None of one that died."""
    context = multiprocessing.get_context("spawn")
    place = folder / f"group-{time.monotonic_ns()}"
    results = context.Manager().dict()
    workers = [
        context.Process(target=_run, args=(rank, count, str(place), results, action, arguments))
        for rank in range(count)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        if worker.is_alive():
            worker.kill()
    return [results.get(rank) for rank in range(count)]


def _run(rank: int, count: int, place: str, results: Any, action: Callable[..., Any], arguments: tuple) -> None:
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=count)
    try:
        results[rank] = action(rank, *arguments)
    except Exception as error:
        results[rank] = f"{type(error).__name__}: {error}"


class Worker:
    """One worker with a model of equal layers, and windows to its peers."""

    def __init__(
        self, rank: int, device: str, width: int = 1024, dtype: torch.dtype = torch.float32, **options: Any
    ) -> None:
        torch.manual_seed(rank)
        self.device = torch.device(device, 0) if device == "cuda" else torch.device("cpu")
        self.model = nn.Sequential(*(nn.Linear(width, width) for _ in range(4))).to(self.device, dtype)
        self.blocks = split_into_blocks(self.model)
        self.windows = SharedWindows.open(self.blocks, rank, gather, **options)
        self.engine = GossipEngine(self.blocks, self.windows, PeerSampler(rank, dist.get_world_size()))

    def settle(self) -> None:
        """Until what has been queued here and at the peers is done."""
        queues_of(self.device).finish()
        self.engine.announce()
        dist.barrier()


# ---- Facts ----


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """Of the machine; and whether two processes read each other's blocks, with and without expandable segments."""
    found: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    for name, path in {"ptrace_scope": "/proc/sys/kernel/yama/ptrace_scope", "limits": "/proc/self/limits"}.items():
        with contextlib.suppress(OSError):
            found[name] = Path(path).read_text()
    found["shm"] = subprocess.run(["df", "-h", "/dev/shm"], capture_output=True, text=True, check=False).stdout
    if options.device == "cuda":
        found["nvidia-smi"] = subprocess.run(["nvidia-smi", "-q"], capture_output=True, text=True, check=False).stdout
        found["device"] = str(torch.cuda.get_device_properties(0))
    for setting in ("", "expandable_segments:True"):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = setting
        for may_end in (False, True):
            name = f"windows, {setting or 'usual segments'}, {'by the host' if may_end else 'by IPC'}"
            found[name] = in_processes(2, read_each_other, options.folder, options.device, may_end)
    return found


def read_each_other(rank: int, device: str, may_end: bool) -> dict[str, Any]:
    worker = Worker(rank, device, may_end=may_end)
    for block in worker.blocks:
        for tensor in block.tensors:
            tensor.fill_(rank + 1)
        worker.engine.offer(block)
    worker.settle()
    for _ in range(200):
        for block in worker.blocks:
            worker.engine.merge(block)
        time.sleep(0.002)
    worker.settle()
    counts = dict(worker.engine.counts)
    masses = worker.windows.ledger.masses().sum(axis=1).tolist()
    memory = type(worker.windows._memory).__name__ if hasattr(worker.windows, "_memory") else ""
    values = [float(block.tensors[0].mean()) for block in worker.blocks]
    worker.windows.close()
    return {"counts": counts, "masses": masses, "memory": memory, "values": values}


# ---- What a dead peer leaves ----


def died(options: argparse.Namespace) -> dict[str, Any]:
    """A consumer reads in a loop from a producer that ends, is killed, is stopped, or frees its memory."""
    endings = ("exits", "is killed", "is stopped", "frees its memory")
    return {how: in_processes(2, read_a_dying, options.folder, options.device, how)[1] for how in endings}


def read_a_dying(rank: int, device: str, how: str) -> Any:
    worker = Worker(rank, device)
    for block in worker.blocks:
        for tensor in block.tensors:
            tensor.fill_(1.0)
    queues_of(worker.device).finish()
    process = gather(os.getpid())[0]
    if rank == 0:
        time.sleep(1)
        if how == "exits":
            os._exit(0)
        if how != "frees its memory":
            os.kill(os.getpid(), signal.SIGKILL if how == "is killed" else signal.SIGSTOP)
        worker.windows.close()
        for parameter in worker.model.parameters():
            parameter.data = torch.empty(0, device=worker.device)
        torch.cuda.empty_cache() if device == "cuda" else None
        time.sleep(4)
        return None
    view = worker.windows._views[0]
    reads = wrong = 0
    began = time.monotonic()
    while time.monotonic() - began < 4:
        for tensors in view.blocks or []:
            wrong += not bool((tensors[0] == 1.0).all())
            reads += 1
    if how == "is stopped":
        os.kill(process, signal.SIGKILL)
    return {"reads": reads, "wrong": wrong, "is noticed": worker.windows.read(0, 0) is None}


# ---- Several workers ----


def workers(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Two and four whole workers: one model, all mass, and no call that waits for the device in a step."""
    from ..bench.gpu import SIZES, TINY, share_device

    size = next(iter((SIZES if options.device == "cuda" else TINY).values()))
    return [{"workers": count, "results": share_device(options, size, count)} for count in (2, 4)]


# ---- Kernels ----


def kernels(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time of each part of a block's step, and the bytes per second that it makes of the passes it is taken for."""
    device, found = torch.device(options.device), []
    for millions in (7, 50, 200) if options.device == "cuda" else (1,):
        for dtype in (torch.float32, torch.bfloat16):
            side = int((millions * 1e6) ** 0.5)
            model = nn.Linear(side, side, bias=False).to(device, dtype)
            (block,) = split_into_blocks(model)
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)
            parameter = block.parameters[0]
            parameter.grad = torch.randn_like(parameter)
            direction = Direction([block], optimizer, looks_ahead=True)
            clipper, merger = BlockClipper([block], 1.0, device), Merger()
            theirs, mine = [torch.randn_like(parameter)], block.tensors

            parts: dict[str, tuple[Callable[[], Any], int]] = {
                "merge": (functools.partial(merger.merge, mine, [(theirs, 0.3)]), 3),
                "clip": (functools.partial(clipper.clip_block, block), 3),
                "step": (optimizer.step, 7),
                "step, looking ahead": (functools.partial(step_ahead, direction, block, optimizer), 10),
                "copy": (functools.partial(theirs[0].copy_, mine[0]), 2),
            }
            for name, (action, passes) in parts.items():
                seconds, host = timed(action, device)
                rate = passes * parameter.nbytes / seconds / 1e9
                about = {"millions": millions, "dtype": str(dtype), "part": name}
                found.append({**about, "seconds": seconds, "host_seconds": host, "gigabytes_per_second": rate})
    return found


def step_ahead(direction: Direction, block: Block, optimizer: torch.optim.Optimizer) -> None:
    """As `BlockOptimizer` steps a block."""
    with direction.stepping(block):
        optimizer.step()


def timed(action: Callable[[], Any], device: torch.device, repeats: int = 20) -> tuple[float, float]:
    """Seconds of the device and of the processor for one call."""
    queues = queues_of(device)
    for _ in range(3):
        action()
    queues.finish()
    begin, began = queues.mark(), time.perf_counter()
    for _ in range(repeats):
        action()
    host, end = time.perf_counter() - began, queues.mark()
    queues.finish()
    return end.seconds_since(begin) / repeats, host / repeats


# ---- Memory of a consensus point ----


def consensus(options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory beside a block of 500 million numbers."""
    device = torch.device(options.device)
    shape = (2**14, 30000) if options.device == "cuda" else (2**9, 300)
    model = nn.Linear(*shape).to(device)
    blocks = split_into_blocks(model)
    before = torch.cuda.memory_allocated() if options.device == "cuda" else 0
    torch.cuda.reset_peak_memory_stats() if options.device == "cuda" else None
    reach_consensus(blocks, None)
    peak = torch.cuda.max_memory_allocated() - before if options.device == "cuda" else 0
    return {"block_bytes": blocks[0].num_bytes, "peak_bytes": peak, "piece_bytes": 4 * PIECE}


# ---- bf16 ----


def bf16(options: argparse.Namespace) -> dict[str, Any]:
    """How far four workers are apart that step at random and merge, in fp32 and in bf16."""
    return {
        str(dtype): in_processes(4, drift_apart, options.folder, options.device, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }


def drift_apart(rank: int, device: str, dtype: torch.dtype) -> float:
    worker = Worker(rank, device, width=256, dtype=dtype)
    for block in worker.blocks:
        for tensor in block.tensors:
            tensor.fill_(1.0)
    worker.settle()
    for _ in range(60):
        for block in worker.blocks:
            worker.engine.merge(block)
            for tensor in block.tensors:
                stepped = tensor.float().add_(torch.randn(tensor.shape, device=worker.device), alpha=0.0005)
                tensor.copy_(stepped if dtype == torch.float32 else round_at_random(stepped, dtype))
            worker.engine.offer(block)
        worker.settle()
    models = gather(torch.cat([tensor.flatten().double().cpu() for block in worker.blocks for tensor in block.tensors]))
    mean = sum(models) / len(models)
    worker.windows.close()
    return float((sum((model - mean).square().sum() for model in models) / len(models) / mean.square().sum()) ** 0.5)


PARTS = {"facts": facts, "died": died, "workers": workers, "kernels": kernels, "consensus": consensus, "bf16": bf16}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--device", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    result = PARTS[options.part](options)
    (options.folder / f"{options.part}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
