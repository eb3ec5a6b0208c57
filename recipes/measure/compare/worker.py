"""One worker of a comparison: makes the runs that it is told to, one after the other, and says what each came to.

Launched by `comparison.py`. Rank 0 adds each run to `FOLDER/compare.json` when it has ended, so that a run that fails
takes no other with it, and notes in `FOLDER/progress.json` how far it is.
"""

import argparse
import contextlib
import ctypes
import gc
import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import disable_progress_bars
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.utils import logging

from layup_hf import LayupConfig, StragglerCallback
from recipes.parts.curve import write_results
from recipes.parts.training import leave_together

from ..common.lab import COUNTERS
from ..common.meters import PeakMemory, Stopwatch
from .local import LOCAL, LocalTrainer
from .method import Method, Setup
from .methods import METHODS, ring_bytes
from .tasks import task_of

Run = dict[str, Any]
WARM_UP = 3  # steps of a run that is not counted: allocator, thread pools, caches of kernels


def asleep() -> float:
    """Seconds, from some moment on, in which this thread neither ran nor waited for a core; NaN if Linux does not say.

    It slept: until a message came, another worker was there, or a lock was free.
    """
    try:
        running, runnable = Path("/proc/thread-self/schedstat").read_text().split()[:2]
    except OSError:
        return math.nan
    return time.perf_counter() - (int(running) + int(runnable)) / 1e9


def crossed() -> float:
    """Bytes that have crossed this host's link in a lab, both ways; NaN where there is none."""
    if not COUNTERS.exists():
        return math.nan
    return sum(int((COUNTERS / f"{way}_bytes").read_text()) for way in ("rx", "tx"))


class Meter(Stopwatch):
    """Notes held-out loss, seconds, sleep and bytes on the link, without what falls into evaluations themselves.

    Args:
        state: Of the process.
        batch: Samples of one worker in one step.
        progress: Told now and then which share of the run is done.
    """

    def __init__(self, state: PartialState, batch: int, progress: Callable[[float], None]) -> None:
        super().__init__(state.device)
        self._samples, self._progress = batch * state.num_processes, progress
        self.points: list[dict[str, float]] = []
        self.logs: dict[str, list[float]] = {}
        self._told = 0.0

    def _now(self) -> tuple[float, float, float]:
        return time.perf_counter(), asleep() if self.device.type == "cpu" else math.nan, crossed()

    def around(self, evaluation_loop: Callable[..., Any]) -> Callable[..., Any]:
        """The same loop, which is not counted."""

        def uncounted(*args: Any, **kwargs: Any) -> Any:
            begin = self._now()
            self.figures = tuple(b - a for a, b in zip(self._start, begin, strict=True))
            output = evaluation_loop(*args, **kwargs)
            self._start = tuple(s + b - a for s, a, b in zip(self._start, begin, self._now(), strict=True))
            return output

        return uncounted

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = self._now()
        self.figures = (0.0, 0.0, 0.0)  # seconds, seconds of sleep, bytes: until the latest evaluation began

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_optimizer_step()
        if self.times[-1] > self._told + 0.5:
            self._told = self.times[-1]
            self._progress(state.global_step / state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        for name, value in (logs or {}).items():
            self.logs.setdefault(name, []).append(value)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        loss, samples = metrics["eval_loss"], state.global_step * self._samples
        accuracy = {"accuracy": metrics["eval_accuracy"]} if "eval_accuracy" in metrics else {}
        self.points.append({"samples": samples, "seconds": self.figures[0], "loss": loss, **accuracy})
        if not math.isfinite(loss):
            control.should_training_stop = True  # it has diverged, for all workers alike


class Bench:
    """The task and the arguments that all runs of this process share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self._arguments()  # starts the process group
        self.state = PartialState()
        disable_progress_bars()
        self.task = task_of(options, self.state)

    def _arguments(self, **more: Any) -> LayupConfig:
        options = self.options
        common = dict(
            output_dir=str(options.folder / "output"),
            use_cpu=not torch.cuda.is_available(),
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=16,
            lr_scheduler_type=options.lr_scheduler_type,
            warmup_steps=options.warmup,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            log_level="error",
            ddp_find_unused_parameters=False,
        )
        return LayupConfig(**{**common, **more})

    def make(self, method: Method, callbacks: list[TrainerCallback], seed: int, **arguments: Any) -> Trainer:
        """The trainer of one run."""
        trainer = method.trainer(
            model=self.task.make_model(seed),
            args=self._arguments(seed=seed, **(self.task.arguments | arguments | method.arguments)),
            train_dataset=self.task.train,
            eval_dataset=self.task.held_out,
            **self.task.trainer,
            callbacks=[*method.callbacks, *callbacks],
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def warm_up(self) -> None:
        """A run that is not counted. Collective."""
        self.make(Method(LocalTrainer, LOCAL), [], seed=0, max_steps=WARM_UP).train()

    def run(self, run: Run, progress: Callable[[float], None]) -> Run:
        """Train once, and say what it came to. Collective."""
        options, state, workers = self.options, self.state, self.state.num_processes
        longer = options.workers if run["method"] == "single" else 1
        setup = Setup(options.steps, options.period)
        method = METHODS[run["method"]](setup)
        meter, every = Meter(state, options.batch_size, progress), longer * options.steps // options.evaluations
        callbacks = [*([StragglerCallback(options.straggler)] if options.straggler and workers > 1 else []), meter]
        arguments = {"learning_rate": run["learning_rate"], "max_steps": longer * options.steps}
        arguments |= dict(eval_strategy="steps", eval_steps=every, logging_strategy="steps", logging_steps=every)
        trainer = self.make(method, callbacks, run["seed"], **arguments)
        trainer.evaluation_loop = meter.around(trainer.evaluation_loop)
        trainer.train()
        return self._result(trainer.model, setup, meter)

    def _result(self, model: torch.nn.Module, setup: Setup, meter: Meter) -> Run:
        workers, (seconds, slept, on_link) = self.state.num_processes, meter.figures
        digest = hashlib.blake2b(b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters())).hexdigest()
        read = meter.logs.get("layup/bytes_read")
        slept = max(slept, 0.0)  # two clocks, that differ by less than a tick; NaN stays NaN
        moved = 2 * read[-1] if read else ring_bytes(setup.reduced, workers)
        mine = {"digest": digest, "own_steps": len(meter.times), "slept": slept / seconds, "moved": moved}
        all_of_them = gather_object([mine | {"on_link": on_link}])
        steps = sum(worker["own_steps"] for worker in all_of_them)
        link = sum(worker["on_link"] for worker in all_of_them) / steps
        points = [point | {"loss": finite(point["loss"])} for point in meter.points]
        return {
            "failure": None if points[-1]["loss"] is not None else "diverged",
            "points": points,
            "loss": points[-1]["loss"],
            "accuracy": points[-1].get("accuracy"),
            "seconds": seconds,
            "parameters": model.num_parameters(),
            "own_steps": [worker["own_steps"] for worker in all_of_them],
            "bytes_per_step": sum(worker["moved"] for worker in all_of_them) / steps,
            "link_bytes_per_step": finite(link),
            "waiting": finite(sum(worker["slept"] for worker in all_of_them) / workers),
            "replicas_agree": len({worker["digest"] for worker in all_of_them}) == 1,
            "mass": meter.logs.get("layup/mass", []),
            "consensus_distance": meter.logs.get("layup/consensus_distance", []),
        }

    def memory(self, run: Run, progress: Callable[[float], None]) -> Run:
        """A short run without evaluation, for the peak of memory alone: to look at it takes time. Collective."""
        setup = Setup(2 * self.options.period + 2, self.options.period)
        gc.collect()
        with contextlib.suppress(OSError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # or what the last run has freed would be used again, unseen
        method = METHODS[run["method"]](setup)
        self.state.wait_for_everyone()
        with PeakMemory(self.state.device, sample=True) as memory:
            rate = run["learning_rate"]
            self.make(method, [], run["seed"], max_steps=setup.steps, learning_rate=rate).train()
        peaks = gather_object([memory.bytes])
        return {"failure": None, "peak_bytes": sum(peaks) / len(peaks)}


def finite(value: float) -> float | None:
    """What JSON can hold."""
    return value if math.isfinite(value) else None


def note_data(file: Path, data: dict[str, Any]) -> None:
    """Keep with the results what tells the data from others.

    Raises:
        RuntimeError: They were begun with other data.
    """
    results = json.loads(file.read_text())
    if results.setdefault("data", data) != data:
        raise RuntimeError(f"{file} was begun with other data, {results['data']}, not {data}: choose another --folder.")
    write_results(file, results)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--settings", type=json.loads, required=True)
    parser.add_argument("--runs", type=json.loads, required=True)
    given = parser.parse_args()
    logging.set_verbosity_error()
    bench = Bench(argparse.Namespace(folder=given.folder, **given.settings))
    is_first = bench.state.is_main_process
    if is_first:
        note_data(given.folder / "compare.json", bench.task.data)
    bench.warm_up()

    def progress(share: float) -> None:
        if is_first:
            write_results(given.folder / "progress.json", {"at": time.time(), "share": share})

    for run in given.runs:
        progress(0.0)
        bench.state.wait_for_everyone()
        result = (bench.memory if run["memory"] else bench.run)(run, progress)
        gc.collect()
        if is_first:
            file = given.folder / "compare.json"
            all_results = json.loads(file.read_text())
            all_results["runs"].append({**run, "workers": bench.state.num_processes, **result})
            write_results(file, all_results)
            progress(0.0)
    leave_together(bench.state)


if __name__ == "__main__":
    main()
