"""What a worker on a host of its own notes about itself."""

import itertools
import json
import threading
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..common.lab import COUNTERS
from ..common.meters import Stopwatch, proportional_set_size


class LinkMeter(Stopwatch):
    """Notes after each of this worker's own steps the time, the link's counters and the processor's seconds."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.counts: list[tuple[int, int, float]] = []

    def on_optimizer_step(self, *args: object, **kwargs: object) -> None:
        super().on_optimizer_step(*args, **kwargs)
        received, sent = (int((COUNTERS / f"{way}_bytes").read_text()) for way in ("rx", "tx"))
        self.counts.append((received, sent, time.process_time()))

    def figures(self, warm_up: int) -> dict[str, float]:
        """Per second and per step, without the first steps."""
        first = min(warm_up, len(self.times) - 2)
        steps, seconds = len(self.times) - 1 - first, self.times[-1] - self.times[first]
        received, sent, processor = (b - a for a, b in zip(self.counts[first], self.counts[-1], strict=True))
        return {
            "steps": steps,
            "steps_per_second": steps / seconds,
            "step_seconds": seconds / steps,
            "longest_step": max(b - a for a, b in itertools.pairwise(self.times[first:])),
            "received_per_step": received / steps,
            "sent_per_step": sent / steps,
            "received_per_second": received / seconds,
            "processor_per_step": processor / steps,
        }


class Notes(TrainerCallback):
    """Appends a line of JSON to a file for every own step and every log entry, with the seconds since training began.

    `trained` is the same clock without the evaluations.
    """

    def __init__(self, file: Path) -> None:
        self.file = file.open("a", buffering=1)
        self.evaluated = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()
        self.note(event="begin")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note(event="step", step=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        self.note(event="log", step=state.global_step, **(logs or {}))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        self.evaluated += metrics["eval_runtime"]
        self.note(event="evaluation", step=state.global_step, loss=metrics["eval_loss"])

    def note(self, **entry: Any) -> None:
        now = time.perf_counter() - self.start
        entry |= {"at": time.time(), "seconds": now, "trained": now - self.evaluated}
        self.file.write(json.dumps(entry) + "\n")


class Samples(threading.Thread):
    """Appends this process's memory, descriptors and threads to a file every few seconds."""

    def __init__(self, file: Path, seconds: float) -> None:
        super().__init__(daemon=True)
        self.file, self.seconds, self.ended = file.open("a", buffering=1), seconds, threading.Event()
        self.start_time = time.monotonic()

    def run(self) -> None:
        while not self.ended.wait(self.seconds):
            status = Path("/proc/self/status").read_text().splitlines()
            values = {line.split(":")[0]: line.split()[1] for line in status if ":" in line and len(line.split()) > 1}
            sample = {
                "seconds": time.monotonic() - self.start_time,
                "pss": proportional_set_size(),
                "rss": int(values["VmRSS"]) * 1024,
                "own": (int(values["RssAnon"]) + int(values["RssShmem"])) * 1024,
                "threads": int(values["Threads"]),
                "descriptors": len(list(Path("/proc/self/fd").iterdir())),
            }
            self.file.write(json.dumps(sample) + "\n")


class StopAfter(TrainerCallback):
    """Ends training after so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() - self.start > self.seconds:
            control.should_training_stop = True


class Pace(TrainerCallback):
    """Lets each own step take so many seconds longer: a run then lasts as long on any machine.

    Args:
        seconds: How many.
        until: Once this file is there, no more.
    """

    def __init__(self, seconds: float, until: Path) -> None:
        self.seconds, self._until = seconds, until

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.seconds and self._until.exists():
            self.seconds = 0.0
        time.sleep(self.seconds)
