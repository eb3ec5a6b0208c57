"""Who waited: traces of LayUp and of DDP with a slow worker, side by side, and what tracing costs.

    python -m recipes.measure.trace both --processes 2     20 steps of both; the last worker takes 0.3 s longer for each
    python -m recipes.measure.trace draw                   the picture of these again
    python -m recipes.measure.trace cost --processes 2     processor time of a step with and without a trace

Of DDP it is recorded what LayUp's option `trace` records, by the same writer: the beginning and end of each step, of
its forward and backward, and of the all-reduce of each bucket, by a communication hook. DDP waits for the all-reduce
from where the last bucket is handed over, as then no gradient is missing any more, to where backward returns. Writes
`trace-layup.json`, `trace-ddp.json` (open them at https://ui.perfetto.dev), `trace-PROCESSES.json` (seconds by kind)
and `trace.png` into `--folder`; `cost` writes `trace-cost-PROCESSES.json`.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import logging

from layup_hf import LayupConfig, LayupTrainer, StragglerCallback
from layup_hf.trace import file as files
from layup_hf.trace.clocks import now
from layup_hf.trace.events import (
    ALL_REDUCE,
    ALL_REDUCE_WAIT,
    BACKWARD,
    BLOCK_STEP,
    DATA,
    FORWARD,
    INPUTS,
    OPTIMIZER,
    Trace,
    Track,
)
from layup_hf.trainer.tracing import StepTracer
from recipes.parts.model import make_config, make_model
from recipes.parts.tokens import collate
from recipes.parts.training import leave_together

from .common.command import add_worker_arguments, command_line, passed_on
from .common.launching import measure
from .common.meters import Stopwatch
from .common.text import load_blocks
from .common.trainers import StockTrainer

METHODS = ("layup", "ddp")


# ---- DDP, recorded ----


class _DdpTracer(StepTracer):
    """Steps, and in them the optimizer's."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._optimizer_start = now()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (track := self.records.track) is not None:
            track.add(OPTIMIZER, self._optimizer_start)
        super().on_optimizer_step(args, state, control, **kwargs)


class TracedDdp(StockTrainer):
    """The stock Trainer, that records what it does.

    Attributes:
        trace: What has been recorded.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.trace = Trace()
        self._is_hooked = False
        self._all_begun = 0
        vars(self.accelerator)["backward"] = self._backward
        self.add_callback(_DdpTracer(self))
        if self.args.straggler:
            self.add_callback(StragglerCallback(self.args.straggler, self))

    @property
    def track(self) -> Track:
        """Of the thread that trains."""
        return self.trace.training

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        with self.track.span(DATA):
            return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self._is_hooked and isinstance(model, DistributedDataParallel):
            model.register_comm_hook(None, self._all_reduce)
            self._is_hooked = True
        return super().training_step(model, *args, **kwargs)

    def _prepare_inputs(self, inputs: Any) -> Any:
        with self.track.span(INPUTS):
            return super()._prepare_inputs(inputs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with self.track.span(FORWARD):
            return super().compute_loss(*args, **kwargs)

    def _backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        with self.track.span(BACKWARD):
            type(self.accelerator).backward(self.accelerator, loss, **kwargs)
            if self._is_hooked:
                self.track.add(ALL_REDUCE_WAIT, self._all_begun)

    def _all_reduce(self, state: None, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """As DDP does it without a hook, with a look at the clock before and after."""
        start, number = now(), bucket.index()
        if bucket.is_last():
            self._all_begun = start
        track = self.trace.track(f"bucket {number}")

        def note(future: Any) -> Any:
            track.add(ALL_REDUCE, start, number)
            return future.value()

        return allreduce_hook(None, bucket).then(note)  # type: ignore[arg-type]


# ---- The workers ----


def work(options: argparse.Namespace) -> None:
    """One worker: the trainings of `both` or of `cost`."""
    logging.set_verbosity_error()
    state = PartialState(cpu=not torch.cuda.is_available())
    samples = 4 * options.steps * state.num_processes * options.batch_size
    tokenizer, blocks = load_blocks(state, options.block_size, samples)
    config = make_config(None, options.config_overrides, tokenizer, options.block_size)

    def train(trainer: Any, name: str, trace: Path | None, straggler: str | None, *callbacks: Any) -> Any:
        state.wait_for_everyone()
        args = LayupConfig(
            output_dir=options.folder,
            use_cpu=state.device.type == "cpu",
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=1e-3,
            logging_steps=10**6,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            ddp_find_unused_parameters=False,
            trace=str(trace) if trace is not None else None,
            straggler=straggler,
        )
        trained = trainer(
            model=make_model(None, config, seed=1),
            args=args,
            train_dataset=blocks,
            data_collator=collate,
            callbacks=list(callbacks),
        )
        start = time.perf_counter()
        trained.train()
        if state.is_main_process:
            print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        return trained

    results: list[dict[str, Any]] = []
    if options.what == "both":
        delay = f"rank={state.num_processes - 1},compute={options.delay}"
        train(LayupTrainer, "layup", options.folder / "trace-layup.json", delay)
        ddp = train(TracedDdp, "ddp", None, delay)
        recording = ddp.trace.recording(state.process_index)
        file = options.folder / "trace-ddp.json"
        files.write(files.part_of(file, state.process_index), [recording], files.begin_of(recording))
        state.wait_for_everyone()
        if state.is_main_process:
            for part in files.join(file):
                part.unlink()
    else:
        for turn, records in itertools.product(range(options.rounds), (False, True)):
            records = records != bool(turn % 2)
            stopwatch = Stopwatch(state.device)
            file = options.folder / "trace-cost.json" if records else None
            train(LayupTrainer, f"round {turn}, {'with' if records else 'without'} a trace", file, None, stopwatch)
            result = {"round": turn, "records": records, "rank": state.process_index}
            results.append(result | {"processor": stopwatch.processor_step, "wall": stopwatch.median_step})
    Path(options.folder, f"worker-{state.process_index}.json").write_text(json.dumps(results))
    leave_together(state)


# ---- What is found in a trace ----


def workers_of(file: Path) -> dict[int, list[dict[str, Any]]]:
    """The events of the thread that trains, of each worker."""
    events = json.loads(file.read_text())["traceEvents"]
    numbers = sorted({event["pid"] for event in events})
    return {
        rank: [e for e in events if (e["pid"], e["tid"], e["ph"]) == (number, number, "X")]
        for rank, number in enumerate(numbers)
    }


def stretch(workers: dict[int, list[dict[str, Any]]]) -> tuple[float, float]:
    """From the first step's begin to the last one's end, of all workers; in microseconds."""
    steps = [event for events in workers.values() for event in events if event["name"] == "step"]
    return min(step["ts"] for step in steps), max(step["ts"] + step["dur"] for step in steps)


def length(events: Iterable[dict[str, Any]], begin: float, end: float) -> float:
    """Seconds that any of these covers, between two times."""
    spans = sorted((max(begin, e["ts"]), min(end, e["ts"] + e["dur"])) for e in events)
    covered, reached = 0.0, begin
    for first, last in spans:
        covered += max(0.0, last - max(first, reached))
        reached = max(reached, last)
    return covered / 1e6


def seconds_by_kind(file: Path) -> list[dict[str, Any]]:
    """Of each worker: its steps, and how long it did what, while there were steps."""
    workers = workers_of(file)
    begin, end = stretch(workers)
    found = []
    for rank, events in sorted(workers.items()):
        kinds = sorted({event["name"] for event in events})
        found.append(
            {
                "rank": rank,
                "steps": sum(event["name"] == "step" for event in events),
                "merges": sum(event["args"].get("peers", 0) for event in events if event["name"] == "merge"),
                "seconds": round((end - begin) / 1e6, 3),
                "waits": round(length((e for e in events if e["cat"] == "wait"), begin, end), 3),
                "kinds": {
                    kind: round(length((e for e in events if e["name"] == kind), begin, end), 3) for kind in kinds
                },
            }
        )
    return found


COLOURS: dict[str, tuple[str, float, Callable[[dict[str, Any]], bool]]] = {
    "forward": ("#9ecae1", 0.8, lambda event: event["name"] == "forward"),
    "backward": ("#3182bd", 0.8, lambda event: event["name"] == "backward"),
    "the delay made on purpose": ("#bdbdbd", 0.8, lambda event: event["name"] == "delay"),
    "step of a block or of the optimizer": ("#31a354", 0.5, lambda e: e["name"] in ("block step", "optimizer")),
    "merge": ("#fd8d3c", 0.3, lambda event: event["name"] == "merge"),
    "meeting": ("#9e9ac8", 0.8, lambda event: event["cat"] == "meeting"),
    "wait for others, or for data": ("#de2d26", 0.8, lambda event: event["cat"] == "wait"),
}
"""What is drawn, in this order: colour, height of the bar, and which events it is."""


def draw(folder: Path) -> None:
    """Both traces on one axis of time, into `FOLDER/trace.png`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names = {
        "layup": "LayUp: the slow worker makes fewer steps",
        "ddp": "DDP: all wait for the slow worker in each step",
    }
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 1, sharex=True)
    for panel, method in zip(axes, METHODS, strict=True):
        workers = workers_of(folder / f"trace-{method}.json")
        begin, end = stretch(workers)
        for row, (_, events) in enumerate(sorted(workers.items())):
            for colour, height, belongs in COLOURS.values():
                bars = [((e["ts"] - begin) / 1e6, e["dur"] / 1e6) for e in events if belongs(e)]
                panel.broken_barh(bars, (row - height / 2, height), facecolors=colour, linewidth=0)
        steps = "/".join(str(sum(e["name"] == "step" for e in events)) for _, events in sorted(workers.items()))
        panel.set_title(f"{names[method]} ({steps} steps by rank, {(end - begin) / 1e6:.1f} s)", loc="left", size=10)
        panel.set_yticks(range(len(workers)), [f"rank {rank}" for rank in sorted(workers)])
        panel.invert_yaxis()
        panel.grid(axis="x", alpha=0.3)
        panel.axvline((end - begin) / 1e6, color="black", linewidth=0.8)
    axes[1].set_xlabel("seconds")
    axes[0].set_xlim(left=0)
    patches = [Patch(color=colour, label=label) for label, (colour, _, _) in COLOURS.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(folder / "trace.png", dpi=110)
    print(f"Drawn: {folder / 'trace.png'}")


def tables(folder: Path, processes: int) -> None:
    """Who waited, into `FOLDER/trace-PROCESSES.json`, and as a table."""
    found = {method: seconds_by_kind(folder / f"trace-{method}.json") for method in METHODS}
    (folder / f"trace-{processes}.json").write_text(json.dumps(found, indent=1) + "\n")
    print("\n| | rank | steps | seconds | of these waiting |\n|---|---|---|---|---|")
    for method, workers in found.items():
        for worker in workers:
            share = worker["waits"] / worker["seconds"]
            place = f"{method} | {worker['rank']} | {worker['steps']} | {worker['seconds']:.2f}"
            print(f"| {place} | {worker['waits']:.3f} ({100 * share:.1f} %) |")


# ---- What it costs ----


def pairs(results: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(with a trace, without) of each round and worker."""
    by_place = {(one["round"], one["rank"], one["records"]): one for one in results}
    for turn, rank, records in by_place:
        if records:
            yield by_place[turn, rank, True], by_place[turn, rank, False]


def cost_of_event(count: int = 200_000) -> float:
    """Seconds of processor time that an event takes in its dearest form, around a `with`."""
    track, start = Track(1 << 16), time.process_time()
    for _ in range(count):
        with track.span(BLOCK_STEP, 3):
            pass
    return (time.process_time() - start) / count


def cost(results: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Of a step, measured as a whole, and reckoned by its events; into `FOLDER/trace-cost-PROCESSES.json`."""
    events = json.loads((options.folder / "trace-cost.json").read_text())["traceEvents"]
    steps = sum(event["name"] == "step" for event in events)
    per_step = sum(event["ph"] == "X" for event in events) / steps
    ratios = [a["processor"] / b["processor"] for a, b in pairs(results)]
    step = statistics.median(one["processor"] for one in results if not one["records"])
    event = min(cost_of_event() for _ in range(5))
    kept = {
        "processes": options.processes,
        "pairs": len(ratios),
        "ratio_median": round(statistics.median(ratios), 5),
        "ratios": sorted(round(ratio, 4) for ratio in ratios),
        "step_processor_seconds": round(step, 5),
        "events_per_step": round(per_step, 1),
        "event_processor_microseconds": round(event * 1e6, 3),
        "share_reckoned": round(event * per_step / step, 6),
    }
    (options.folder / f"trace-cost-{options.processes}.json").write_text(json.dumps(kept, indent=1) + "\n")
    print(json.dumps(kept, indent=1))


def main() -> None:
    parser = command_line("recipes.measure.trace", __doc__)
    parser.add_argument("what", choices=["both", "draw", "cost"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20, help="of every worker on average")
    parser.add_argument("--rounds", type=int, default=10, help="of `cost`")
    parser.add_argument("--delay", type=float, default=0.3, help="seconds that a step of the last worker takes longer")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--block_size", type=int, default=128)
    parser.add_argument("--config_overrides", default="", help="of the model, as in the recipe")
    add_worker_arguments(parser)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.what == "draw":
        draw(options.folder)
        return
    print(f"{options.processes} workers, {os.cpu_count()} CPU cores, torch {torch.__version__}, {platform.machine()}")
    arguments = [options.what, "--worker"]
    arguments += passed_on(
        options, "steps", "rounds", "delay", "batch_size", "block_size", "config_overrides", "folder"
    )
    results = measure("recipes.measure.trace", options.processes, arguments, options.folder)
    if options.what == "both":
        tables(options.folder, options.processes)
        draw(options.folder)
    else:
        cost(results, options)


if __name__ == "__main__":
    main()
