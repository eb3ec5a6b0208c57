"""One worker, on a host of its own.

Started by `run.py`. `links` trains by several methods in turn and says how fast, and what crossed the link; `loss`
does so with evaluations, until a loss is reached; `formats` sends blocks in one format after the other; `train` trains
once, and notes every step and every log entry as it comes, so that there is something to read of a worker that was
killed.
"""

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import disable_progress_bars
from transformers import HfArgumentParser, PrinterCallback, TrainerCallback
from transformers.utils import logging

from layup_hf import LayupConfig
from recipes.parts.curve import write_results
from recipes.parts.model import make_config, make_model
from recipes.parts.tokens import collate
from recipes.parts.training import leave, leave_together

from ..common.lab import bits_per_second
from ..common.meters import PeakMemory, Stopwatch
from ..common.text import load_blocks
from ..common.trainers import METHODS
from .files import UNPACED, read_lines
from .meters import LinkMeter, Notes, Pace, Samples, StopAfter
from .scale import GPT2_BYTES_PER_SECOND

EVALUATIONS = 6  # until the loss that is to be reached
LONGER = 1.5  # LayUp may take more samples to the same loss
WARM_UP = 5  # steps not counted, of methods that do not wait for a link
HELD_OUT = 128  # blocks


def ask_for_rate(state: PartialState, folder: Path, rate: str) -> None:
    """Let whoever started the workers set the rate of all links. Collective."""
    state.wait_for_everyone()
    if state.is_main_process:
        (folder / "rate-wanted.txt").write_text(rate)
        while not (folder / "rate.txt").exists() or (folder / "rate.txt").read_text() != rate:
            time.sleep(0.05)
    state.wait_for_everyone()


class Bench:
    """The model, the text and the training arguments that all runs of this process share."""

    def __init__(self, options: argparse.Namespace, rest: list[str]) -> None:
        self.options, self.rest = options, rest
        self.parser = HfArgumentParser(LayupConfig)
        self.parser.set_defaults(
            output_dir=str(options.folder / f"output-{options.host}"),
            use_cpu=not torch.cuda.is_available(),
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=32,
            learning_rate=1e-3,
            lr_scheduler_type="constant_with_warmup",
            logging_steps=10**6,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            log_level="error",
            ddp_find_unused_parameters=False,
            # As many buckets as DDP has of GPT-2 124M: what is reduced while backward goes on depends on that.
            ddp_bucket_cap_mb=1,
        )
        self.args()  # starts the process group
        self.state = PartialState()
        disable_progress_bars()
        count = options.blocks + HELD_OUT
        tokenizer, blocks = load_blocks(self.state, options.block_size, count)
        self.held_out, self.train = blocks.select(range(HELD_OUT)), blocks.select(range(HELD_OUT, len(blocks)))
        self.config = make_config(None, options.config_overrides, tokenizer, options.block_size)

    def args(self, **more: Any) -> LayupConfig:
        words = [f"--{name}={value}" for name, value in more.items()]
        return self.parser.parse_args_into_dataclasses([*words, *self.rest])[0]

    def trainer(self, method: str, args: LayupConfig, callbacks: list[TrainerCallback]) -> Any:
        trainer = METHODS[method](
            model=make_model(None, self.config, seed=args.seed),
            args=args,
            train_dataset=self.train,
            eval_dataset=self.held_out,
            data_collator=collate,
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer


class Turns:
    """Runs of several methods at several rates, one after the other, within the same processes.

    Attributes:
        scale: Of all rates, by `--scale`.
        seconds: Of a step without communication, on the slowest worker.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench, self.options, self.state = bench, bench.options, bench.state
        self.results: list[dict[str, Any]] = []
        first = self.run("alone", 30, seed=1)
        self.seconds = self.slowest(first)
        at = first["parameter_bytes"] / self.seconds
        self.scale = at / GPT2_BYTES_PER_SECOND if self.options.scale == "auto" else float(self.options.scale)

    def set_rate(self, rate: str) -> None:
        self.rate = rate
        self.link = rate if self.scale == 1 else f"{bits_per_second(rate) * self.scale:.0f}bit"
        ask_for_rate(self.state, self.options.folder, self.link)

    def slowest(self, result: dict[str, Any]) -> float:
        """Seconds of a step on the slowest worker: the same on all of them. Collective."""
        return max(gather_object([result["step_seconds"]]))

    def run(self, method: str, steps: int, more: Sequence[TrainerCallback] = (), **arguments: Any) -> dict[str, Any]:
        """One run of one method. Collective."""
        self.state.wait_for_everyone()
        meter = LinkMeter(self.state.device)
        trainer = self.bench.trainer(method, self.bench.args(max_steps=steps, **arguments), [meter, *more])
        trainer.train()
        return {
            "rank": self.state.process_index,
            "hosts": self.state.num_processes,
            "method": method,
            "parameter_bytes": 4 * trainer.model.num_parameters(),
            **meter.figures(1 if method == "ddp" else WARM_UP),
        }

    def keep(self, result: dict[str, Any], **more: Any) -> None:
        self.results.append({"rate": self.rate, "link": self.link, **more, **result})
        if self.state.is_main_process:
            about = " ".join(f"{name}={value}" for name, value in more.items() if name != "points")
            took = f"{result['step_seconds'] * 1000:.1f} ms a step over {result['steps']}"
            print(f"measured {self.rate} {result['method']} {about}: {took}", flush=True)

    def write(self) -> None:
        write_results(self.options.folder / f"worker-{self.state.process_index}.json", self.results)


def links(bench: Bench) -> None:
    """All methods in turn, at all rates in turn, in several rounds; into `FOLDER/worker-RANK.json`."""
    turns = Turns(bench)
    for rate in bench.options.rates:
        turns.set_rate(rate)
        seconds = dict.fromkeys(bench.options.methods, turns.seconds)
        if "ddp" in seconds:
            seconds["ddp"] = turns.slowest(turns.run("ddp", 4, seed=1))
        for turn in range(bench.options.rounds):
            for method in bench.options.methods:
                # DDP's steps are long where the link is slow.
                steps = round(min(max(bench.options.seconds / seconds[method], 4), 2000))
                turns.keep(turns.run(method, steps, seed=turn + 1), round=turn)
    turns.write()


def loss(bench: Bench) -> None:
    """Held-out loss over time: every learning rate with the first seed, the best one of each method with all."""
    turns, options = Turns(bench), bench.options
    notes_file = options.folder / f"notes-{options.host}.jsonl"

    def run(method: str, steps: int, rate: float, seed: int) -> float:
        notes_file.unlink(missing_ok=True)
        length = round(steps * (LONGER if method == "layup" else 1))
        arguments = {"seed": seed, "learning_rate": rate, "warmup_steps": steps // 5}
        arguments |= {"eval_strategy": "steps", "eval_steps": max(1, steps // EVALUATIONS)}
        result = turns.run(method, length, [Notes(notes_file)], **arguments)
        points = [
            {"seconds": note["trained"], "step": note["step"], "loss": note["loss"]}
            for note in read_lines(notes_file)
            if note["event"] == "evaluation"
        ]
        turns.keep(result, learning_rate=rate, seed=seed, target_steps=steps, points=points)
        return next(point["loss"] for point in reversed(points) if point["step"] <= steps)

    for name in options.rates:
        turns.set_rate(name)
        seconds = turns.slowest(turns.run("ddp", 4, seed=1))
        most = max(options.seconds / seconds, EVALUATIONS)
        steps = round(min(bench.options.steps, most)) // EVALUATIONS * EVALUATIONS
        turns.keep(turns.run("alone", 60, seed=1), learning_rate=0, seed=0, target_steps=steps, points=[])
        for method in options.methods:
            losses = {rate: run(method, steps, rate, options.seeds[0]) for rate in options.learning_rates}
            best = min(losses, key=losses.__getitem__)
            for seed in options.seeds[1:]:
                run(method, steps, best, seed)
    turns.write()


def formats(bench: Bench) -> None:
    """LayUp with each format in turn, evaluated when its samples are used up; into `FOLDER/worker-RANK.json`."""
    turns, options = Turns(bench), bench.options
    notes_file = options.folder / f"notes-{options.host}.jsonl"
    fixed = {"learning_rate": options.learning_rates[0], "warmup_steps": options.steps // 5}
    fixed |= {"eval_strategy": "steps", "eval_steps": options.steps, "logging_steps": max(1, options.steps // 4)}
    for name in options.rates:
        turns.set_rate(name)
        for seed, wire_dtype in itertools.product(options.seeds, options.wire_dtypes):
            notes_file.unlink(missing_ok=True)
            result = turns.run("layup", options.steps, [Notes(notes_file)], seed=seed, wire_dtype=wire_dtype, **fixed)
            noted: dict[str, Any] = {}
            for note in read_lines(notes_file):  # totals since the start: what was logged last
                noted |= {key: value for key, value in note.items() if note["event"] == "log"}
                noted |= {"held_out": note["loss"]} if note["event"] == "evaluation" else {}
            turns.keep(
                result,
                wire_dtype=wire_dtype,
                seed=seed,
                loss=noted["held_out"],
                steps_in_all=options.steps,
                merges=noted["layup/merges"],
                received=result["received_per_step"] * result["steps"],
                resent=noted.get("layup/resent_blocks", 0.0),
                consensus_distance=noted["layup/consensus_distance"],
                mass=noted["layup/mass"],
            )
    turns.write()


def train(bench: Bench) -> None:
    """One run, noted into `FOLDER/notes-HOST.jsonl`; its end into `FOLDER/worker-HOST.json`."""
    options = bench.options
    notes = Notes(options.folder / f"notes-{options.host}.jsonl")
    samples = Samples(options.folder / f"samples-{options.host}.jsonl", options.sample_seconds)
    if options.sample_seconds:
        samples.start()
    meter = Stopwatch(bench.state.device)
    args = bench.args()
    more: list[TrainerCallback] = [StopAfter(60 * options.minutes)] if options.minutes else []
    more += [Pace(options.pace, options.folder / UNPACED)] if options.pace else []
    with PeakMemory(bench.state.device, options.memory) as memory:
        trainer = bench.trainer(options.methods[0], args, [notes, meter, *more])
        trainer.train()
        notes.note(event="trained")
        samples.ended.set()
    loss = trainer.evaluate()["eval_loss"] if options.evaluate_at_end else None
    if options.save_at_end:
        trainer.save_model(str(options.folder / f"model-{options.host}"))
    result = {
        "rank": bench.state.process_index,
        "loss": loss,
        "global_step": trainer.state.global_step,
        "own_steps": len(meter.times),
        "parameter_bytes": 4 * trainer.model.num_parameters(),
        "peak_bytes": memory.bytes,
        "digest": sum(float(p.detach().double().sum()) for p in trainer.model.parameters()),
    }
    write_results(options.folder / f"worker-{options.host}.json", result)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["links", "loss", "formats", "train"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--host", type=int, required=True)
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument("--rates", nargs="+", default=[])
    parser.add_argument("--scale", default="1")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--wire_dtypes", nargs="+", default=[])
    parser.add_argument("--minutes", type=float, default=0)
    parser.add_argument("--pace", type=float, default=0)
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--block_size", type=int, required=True)
    parser.add_argument("--blocks", type=int, default=100_000)
    parser.add_argument("--config_overrides", default="")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--sample_seconds", type=float, default=0)
    parser.add_argument("--evaluate_at_end", action="store_true")
    parser.add_argument("--save_at_end", action="store_true")
    options, rest = parser.parse_known_args()

    logging.set_verbosity_error()
    bench = Bench(options, rest)
    {"links": links, "loss": loss, "formats": formats, "train": train}[options.what](bench)
    if options.what == "train":  # somebody may be missing
        leave(bench.state)
    else:
        leave_together(bench.state)


if __name__ == "__main__":
    main()
