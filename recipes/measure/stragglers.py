"""What a slow worker costs LayUp, and what it costs DDP.

    python -m recipes.measure.stragglers one --processes 2      the last worker takes five times as long for a step
    python -m recipes.measure.stragglers one --processes 4      the same, one of four
    python -m recipes.measure.stragglers random --processes 4   every worker delayed at random, by one step on average
    python -m recipes.measure.stragglers show                   tables and picture of what has been measured

Measures the undelayed step first, then for each seed all cases in turn within one run. The delays are made by
`StragglerCallback`, the same for both trainers, and keep the worker's core busy: a worker that sleeps would lend its
core to the others wherever there are fewer cores than workers. Time is counted without the evaluations themselves.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import TrainerCallback
from transformers.utils import logging

from layup_hf import LayupConfig, StragglerCallback
from recipes.parts.model import make_config, make_model
from recipes.parts.tokens import collate
from recipes.parts.training import leave_together

from .common.command import add_worker_arguments, command_line, passed_on
from .common.figures import NAMES
from .common.launching import measure
from .common.losses import Curve
from .common.meters import Stopwatch
from .common.text import load_blocks
from .common.trainers import METHODS

SLOWER = 5  # times, in the case `one`


# ---- The workers ----


class Clock(TrainerCallback):
    """Seconds since training began, without the evaluations."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.points: list[dict[str, float]] = []
        self._evaluated, self._start = 0.0, time.perf_counter()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        self._evaluated += metrics["eval_runtime"]
        self.points.append({"seconds": self.seconds, "step": state.global_step, "loss": metrics["eval_loss"]})

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.total = self.seconds

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start - self._evaluated


def work(options: argparse.Namespace) -> None:
    """One worker: all cases for all seeds, into `FOLDER/worker-RANK.json`."""
    logging.set_verbosity_error()
    state = PartialState(cpu=not torch.cuda.is_available())
    samples = round(1.5 * options.steps * state.num_processes * options.batch_size)
    tokenizer, blocks = load_blocks(state, options.block_size, samples + 128)
    train, held_out = blocks.select(range(128, len(blocks))), blocks.select(range(128))
    config = make_config(None, options.config_overrides, tokenizer, options.block_size)

    def run(method: str, seed: int, steps: int, straggler: str | None, evaluations: int) -> dict[str, Any]:
        state.wait_for_everyone()
        clock, stopwatch = Clock(), Stopwatch(state.device)
        callbacks = [clock, stopwatch, *([StragglerCallback(straggler)] if straggler else [])]
        args = LayupConfig(
            output_dir=options.folder,
            use_cpu=state.device.type == "cpu",
            max_steps=steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=options.steps // 5,
            eval_strategy="steps" if evaluations else "no",
            eval_steps=max(1, options.steps // max(1, evaluations)),
            logging_steps=10**6,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
            ddp_find_unused_parameters=False,
        )
        trainer = METHODS[method](
            model=make_model(None, config, seed=seed),
            args=args,
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=collate,
            callbacks=callbacks,
        )
        trainer.train()
        loss = trainer.evaluate()["eval_loss"] if method != "alone" else None
        return {
            "method": method,
            "seed": seed,
            "processes": state.num_processes,
            "rank": state.process_index,
            "straggler": straggler,
            "points": clock.points,
            "seconds": clock.total,
            "own_steps": len(stopwatch.times),
            "step_seconds": stopwatch.median_step,
            "loss": loss,
        }

    undelayed = [run("alone", 0, 30, None, 0)["step_seconds"] for _ in range(2)][-1]
    unit = statistics.mean(gather_object([undelayed]))
    results = []
    for seed in options.seeds:
        if options.what == "one":
            delay = f"rank={state.num_processes - 1},compute={(SLOWER - 1) * unit:.4f},busy=true"
            cases = [("layup", None, 1.0), ("ddp", None, 1.0), ("layup", delay, 1.3), ("ddp", delay, 1.0)]
        else:
            delay = f"compute={unit:.4f},distribution=exponential,busy=true,seed={seed}"
            cases = [("alone", delay, 1.0), ("layup", delay, 1.0), ("ddp", delay, 1.0)]
        for method, straggler, length in cases:
            evaluations = 10 if options.what == "one" else 0
            steps = round(options.steps * length)
            results.append({"unit": unit, "steps": steps} | run(method, seed, steps, straggler, evaluations))
            if state.is_main_process:
                print(f"seed {seed} {method} {straggler}: {results[-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    Path(options.folder, f"worker-{state.process_index}.json").write_text(json.dumps(results))
    leave_together(state)


# ---- Tables ----


def table_one(results: list[dict[str, Any]], processes: int, steps: int) -> None:
    """Time to the loss that the same method ends with when nobody is slow."""
    seeds = sorted({result["seed"] for result in results})
    limit = processes / (processes - 1 + 1 / SLOWER)

    def find(method: str, seed: int, delayed: bool) -> dict[str, Any]:
        return next(
            r
            for r in results
            if (r["method"], r["seed"], bool(r["straggler"]), r["rank"]) == (method, seed, delayed, 0)
        )

    case = f"one of {processes} slower by {SLOWER}"
    print(f"\n| {case} | undelayed | to the same loss: ratio | to the same samples: ratio |")
    print("|---|---|---|---|")
    for method in ("layup", "ddp"):
        plain, to_loss, to_samples = [], [], []
        for seed in seeds:
            curve, delayed = (Curve(find(method, seed, case)["points"]) for case in (False, True))
            end = curve.at_step(steps)
            plain.append(end["seconds"])
            to_loss.append((delayed.seconds_to(end["loss"]) or float("nan")) / end["seconds"])
            to_samples.append(delayed.at_step(steps)["seconds"] / end["seconds"])
        ratios = " | ".join(
            f"**{statistics.median(values):.2f}** ({', '.join(f'{value:.2f}' for value in values)})"
            for values in (to_loss, to_samples)
        )
        print(f"| {NAMES[method]} | {statistics.median(plain):.1f} s | {ratios} |")
    print(f"\nWith perfectly shared work, the ratio to the same samples would be {limit:.2f}.\n")
    print("| loss at equal samples | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean |")
    print("|---|" + "---|" * (len(seeds) + 1))
    for method, is_delayed in (("layup", False), ("layup", True), ("ddp", False)):
        losses = [Curve(find(method, seed, is_delayed)["points"]).at_step(steps)["loss"] for seed in seeds]
        name = NAMES[method] + (", one slow" if is_delayed else "")
        print(f"| {name} | {' | '.join(f'{loss:.3f}' for loss in losses)} | {statistics.mean(losses):.3f} |")
    shares = [
        [r["own_steps"] for r in results if (r["method"], r["seed"], bool(r["straggler"])) == ("layup", seed, True)]
        for seed in seeds
    ]
    print(f"\nSteps by worker with the straggler: {'; '.join('/'.join(map(str, share)) for share in shares)}.")


def table_random(results: list[dict[str, Any]], processes: int, steps: int) -> None:
    """Seconds for the same number of steps of all workers together; the ideal is that nobody waits for anything."""
    seeds = sorted({result["seed"] for result in results})
    print("\n| every worker delayed at random | seconds | ratio to no waiting, by seed | median | held-out loss |")
    print("|---|---|---|---|---|")
    ideal = {}
    for seed in seeds:
        alone = [r for r in results if (r["method"], r["seed"]) == ("alone", seed)]
        ideal[seed] = steps * processes / sum(r["own_steps"] / r["seconds"] for r in alone)
    print(f"| {NAMES['alone']}, no waiting | {statistics.median(ideal.values()):.1f} | 1 | 1 | |")
    for method in ("layup", "ddp"):
        runs = [r for r in results if r["method"] == method and r["rank"] == 0]
        ratios = [run["seconds"] / ideal[run["seed"]] for run in runs]
        seconds = statistics.median(run["seconds"] for run in runs)
        by_seed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        loss = statistics.mean(run["loss"] for run in runs)
        print(f"| {NAMES[method]} | {seconds:.1f} | {by_seed} | {statistics.median(ratios):.2f} | {loss:.3f} |")


def show(folder: Path) -> None:
    """All tables of what has been measured, and the picture."""
    for file in sorted(folder.glob("stragglers-*-*.json")):
        results = json.loads(file.read_text())
        table = table_one if "-one-" in file.name else table_random
        table(results, results[0]["processes"], min(result["steps"] for result in results))
    draw(folder)


def draw(folder: Path) -> None:
    """Loss over seconds, with and without the straggler, into `FOLDER/stragglers.png`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    files = sorted(folder.glob("stragglers-one-*.json"))
    figure = Figure(figsize=(5.5 * len(files), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, file in zip(figure.subplots(1, len(files), squeeze=False)[0], files, strict=True):
        results = [result for result in json.loads(file.read_text()) if result["rank"] == 0]
        for method, colour in (("layup", "tab:blue"), ("ddp", "tab:orange")):
            for delayed, style in ((False, "-"), (True, "--")):
                runs = [r for r in results if (r["method"], bool(r["straggler"])) == (method, delayed)]
                label = NAMES[method] + (", one slow" if delayed else "")
                for number, run in enumerate(runs):
                    points = [(point["seconds"], point["loss"]) for point in run["points"]]
                    line = axes.plot(*zip(*points, strict=True), style, color=colour, linewidth=1.2, alpha=0.8)[0]
                    line.set_label(label if number == 0 else "_")
        axes.set(xlabel="seconds", ylabel="held-out loss (nats per token)")
        axes.set_title(f"one of {results[0]['processes']} workers {SLOWER} times slower, {len(runs)} seeds")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(folder / "stragglers.png", dpi=110)
    print(f"Drawn: {folder / 'stragglers.png'}")


def main() -> None:
    parser = command_line("recipes.measure.stragglers", __doc__)
    parser.add_argument("what", choices=["one", "random", "show"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100, help="of every worker on average")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--block_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--config_overrides", default="", help="of the model, as in the recipe")
    add_worker_arguments(parser)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.what == "show":
        show(options.folder)
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    print(f"{options.what}, {options.processes} workers, {device}, torch {torch.__version__}, {platform.machine()}")
    arguments = [options.what, "--worker", f"--folder={options.folder}", "--seeds", *map(str, options.seeds)]
    arguments += passed_on(options, "steps", "batch_size", "block_size", "learning_rate", "config_overrides")
    results = measure("recipes.measure.stragglers", options.processes, arguments, options.folder)
    (options.folder / f"stragglers-{options.what}-{options.processes}.json").write_text(json.dumps(results) + "\n")
    show(options.folder)


if __name__ == "__main__":
    main()
