"""What a worker notes about itself while it trains: when its steps ended, and how large it was."""

import ctypes
import gc
import itertools
import statistics
import threading
import time
from pathlib import Path

import torch
from transformers import TrainerCallback


class Stopwatch(TrainerCallback):
    """Notes when each of this worker's own steps ended.

    Args:
        device: On which the steps are made.
        skipped: Steps at the beginning that do not count: allocator, caches, the optimizer's first state.
    """

    def __init__(self, device: torch.device, skipped: int = 5) -> None:
        self.times: list[float] = []
        self._processor: list[float] = []
        self.device, self.skipped = device, skipped

    def on_optimizer_step(self, *args: object, **kwargs: object) -> None:
        if len(self.times) in (0, self.skipped) and self.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        self._processor.append(time.process_time())

    def on_train_end(self, *args: object, **kwargs: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self.times[-1] = time.perf_counter()

    @property
    def median_step(self) -> float:
        """Seconds from one step to the next, without the first steps."""
        return statistics.median(b - a for a, b in itertools.pairwise(self.times[self.skipped :]))

    @property
    def processor_step(self) -> float:
        """Seconds of processor time of this process, all threads, for a step, without the first steps; median."""
        return statistics.median(b - a for a, b in itertools.pairwise(self._processor[self.skipped :]))


def proportional_set_size() -> int:
    """Bytes of this process, of which a page that several share counts by its share."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def give_back_memory() -> None:
    """Give the system back what this process has freed; glibc keeps it, and what comes next seems to take none."""
    gc.collect()
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


class PeakMemory:
    """Largest memory of this process in bytes, over what it was at the start.

    On CUDA, what the allocator handed out. On the CPU, the proportional set size, sampled by a thread: a page shared by
    several workers counts for each of them by its share, so that the sum over workers is what they really take.
    """

    def __init__(self, device: torch.device, sample: bool) -> None:
        self.device, self.sample = device, sample and device.type == "cpu"

    def __enter__(self) -> "PeakMemory":
        if self.sample:
            give_back_memory()
        self.peak = self.start = proportional_set_size() if self.sample else 0
        if self.device.type == "cuda":
            self.start = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if self.sample:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self.sample:
            self._thread.join()
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated()
        self.bytes = self.peak - self.start

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.peak = max(self.peak, proportional_set_size())
