"""How close clipping by an estimate of the gradient norm comes to clipping by the exact norm.

    python -m recipes.measure.clipping run --processes 1     every case, for each seed
    python -m recipes.measure.clipping run --processes 2     the same with two workers
    python -m recipes.measure.clipping show                  table and picture of what has been measured

The cases: the two kinds of clipping, and none, each with and without a spike: a few steps in which the batches are
random tokens and their loss is multiplied, so that the gradient is far longer than any before it. The estimate knows
the norm of the blocks that backward has done, and of the others only that of the step before, so a sudden spike is what
it must be worst at. How far runs drift apart that differ by next to nothing is shown by a limit that is 0.1 % higher.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers.utils import logging

from layup_hf import LayupConfig, LayupTrainer
from recipes.parts.model import make_config, make_model
from recipes.parts.tokens import collate
from recipes.parts.training import leave_together

from .common.command import add_worker_arguments, command_line
from .common.launching import measure
from .common.text import load_blocks

CASES = {"exact": "exact", "nudged": "exact, limit 0.1 % higher", "estimate": "estimate", "none": "no clipping"}
SPIKE, SPIKE_STEPS, SPIKE_FACTOR = 0.5, 3, 100.0  # where in the run, for how many steps, and what multiplies the loss
SMOOTH = 10  # steps that a point of a curve is the mean of


class SpikedTrainer(LayupTrainer):
    """Multiplies the loss on random tokens for a few steps, and leaves them out of the log."""

    has_spike = False
    block_norms: list[list[float]]

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        at = round(SPIKE * self.args.max_steps)
        if not (self.has_spike and at <= self.state.global_step < at + SPIKE_STEPS):
            return super().compute_loss(model, inputs, *args, **kwargs)
        noise = torch.randint_like(inputs["input_ids"], self.model.config.vocab_size)
        inputs = {**inputs, "input_ids": noise, "labels": noise}
        return SPIKE_FACTOR * super().compute_loss(model, inputs, *args, **kwargs)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        self.block_norms.append(self.layup.steps.clipper.norms.tolist())
        return norm


def work(options: argparse.Namespace) -> None:
    """One worker: all cases for all seeds; rank 0 writes them into `FOLDER/worker-0.json`."""
    logging.set_verbosity_error()
    state = PartialState(cpu=not torch.cuda.is_available())
    samples = options.steps * state.num_processes * options.batch_size
    tokenizer, blocks = load_blocks(state, options.block_size, samples + 128)
    config = make_config(None, "", tokenizer, options.block_size)

    def run(case: str, has_spike: bool, max_norm: float, seed: int) -> dict[str, Any]:
        state.wait_for_everyone()
        args = LayupConfig(
            output_dir=options.folder,
            use_cpu=state.device.type == "cpu",
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=options.steps // 4,
            max_grad_norm={"none": 0.0, "nudged": 1.001 * max_norm}.get(case, max_norm),
            clip="exact" if case in ("exact", "nudged") else "estimate",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            log_level="error",
            seed=seed,
        )
        trainer = SpikedTrainer(
            model=make_model(None, config, seed=seed),
            args=args,
            train_dataset=blocks.select(range(128, len(blocks))),
            eval_dataset=blocks.select(range(128)),
            data_collator=collate,
        )
        trainer.has_spike, trainer.block_norms = has_spike, []
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        return {
            "case": case,
            "has_spike": has_spike,
            "max_norm": max_norm,
            "seed": seed,
            "processes": state.num_processes,
            "steps": options.steps,
            "losses": {entry["step"]: entry["loss"] for entry in logs},  # a worker that catches up leaves steps out
            "block_norms": trainer.block_norms if case == "estimate" else [],
            "held_out": trainer.evaluate()["eval_loss"],
        }

    results = [
        run(case, has_spike, max_norm, seed)
        for seed in options.seeds
        for max_norm in options.max_norms
        for has_spike in (False, True)
        for case in CASES
        if case != "none" or max_norm == options.max_norms[0]
    ]
    if state.is_main_process:
        Path(options.folder, "worker-0.json").write_text(json.dumps(results))
    leave_together(state)


# ---- The figures ----


def smoothed(losses: list[float]) -> list[float]:
    return [statistics.mean(losses[max(0, at - SMOOTH + 1) : at + 1]) for at in range(len(losses))]


def is_in_spike(step: int, steps: int) -> bool:
    """Whether the loss logged at this step may be of the spike: workers publish theirs a little later."""
    return SPIKE * steps <= step - 1 < SPIKE * steps + SPIKE_STEPS + 3


def select(results: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    return [result for result in results if wanted.items() <= result.items()]


def deviation(results: list[dict[str, Any]], exact: list[dict[str, Any]]) -> float:
    """Largest relative distance of the smoothed curves to the exact ones, of all seeds; the spike itself left out."""
    largest = 0.0
    for result in results:
        (other,) = select(exact, seed=result["seed"])
        steps = [step for step in result["losses"] if step in other["losses"]]
        steps = [step for step in steps if not is_in_spike(int(step), result["steps"])]
        curves = [[run["losses"][step] for step in steps] for run in (result, other)]
        largest = max(largest, *(abs(a / b - 1) for a, b in zip(*map(smoothed, curves), strict=True)))
    return largest


def coefficient_errors(results: list[dict[str, Any]], with_growth: bool) -> list[float]:
    """How far the factors that clip the blocks are from the exact one, |log|, for each step after the first and block.

    With or without the growth of the completed blocks in the estimate.
    """
    errors = []
    for result in results:
        for last, now in itertools.pairwise(result["block_norms"]):
            exact = min(1.0, result["max_norm"] / math.hypot(*now))
            for done in range(len(now)):  # backward comes to the last block first
                completed, before, others = math.hypot(*now[done:]), math.hypot(*last[done:]), math.hypot(*last[:done])
                growth = min(100.0, max(0.01, completed / before)) if with_growth else 1.0
                estimate = min(1.0, result["max_norm"] / math.hypot(completed, growth * others))
                errors.append(abs(math.log(estimate / exact)))
    return errors


def row_begin(processes: int, max_norm: float, has_spike: bool) -> str:
    return f"{processes} | {max_norm:g} | {'yes' if has_spike else 'no'}"


def show(options: argparse.Namespace) -> None:
    """Table and picture of all runs in the folder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    files = sorted(options.folder.glob("clipping-*.json"))
    results = [result for file in files for result in json.loads(file.read_text())]
    keys = ("processes", "max_norm", "has_spike")
    groups = sorted({tuple(result[key] for key in keys) for result in results})
    print("| workers | max_grad_norm | spike | clipping | held-out loss, by seed | largest distance to exact |")
    print("|---|---|---|---|---|---|")
    for group in groups:
        wanted = dict(zip(keys, group, strict=True))
        exact = select(results, **wanted, case="exact")
        for case, name in CASES.items():
            runs = select(results, **wanted, case=case)
            losses = ", ".join(f"{result['held_out']:.3f}" for result in runs)
            far = "" if case == "exact" else f"{100 * deviation(runs, exact):.2f} %"
            if runs:
                print(f"| {row_begin(*group)} | {name} | {losses} | {far} |")
    print("\n| workers | max_grad_norm | spike | error of the factor | without what others have grown |")
    print("|---|---|---|---|---|")
    for group in groups:
        runs = select(results, **dict(zip(keys, group, strict=True)), case="estimate")
        rules = [coefficient_errors(runs, with_growth) for with_growth in (True, False)]
        cells = " | ".join(f"{statistics.mean(errors):.3f}, at most {max(errors):.1f}" for errors in rules)
        print(f"| {row_begin(*group)} | {cells} |")

    shown = select(results, has_spike=True, max_norm=max(result["max_norm"] for result in results))
    columns = sorted({result["processes"] for result in shown})
    figure, axes = pyplot.subplots(1, len(columns), figsize=(5 * len(columns), 3.6), sharey=True, squeeze=False)
    for axis, processes in zip(axes[0], columns, strict=True):
        for case, colour in {"exact": "black", "estimate": "tab:red", "none": "tab:gray"}.items():
            for number, result in enumerate(select(shown, processes=processes, case=case)):
                outside = [step for step in result["losses"] if not is_in_spike(int(step), result["steps"])]
                curve = [int(step) for step in outside], [result["losses"][step] for step in outside]
                style = {"color": colour, "linewidth": 1, "linestyle": "--" if case == "estimate" else "-"}
                axis.plot(*curve, label=CASES[case] if number == 0 else None, **style)
        axis.set_title(f"{processes} worker(s), spike in the middle")
        axis.set_xlabel("step")
    axes[0][0].set_ylabel("training loss")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(options.folder / "clipping.png", dpi=110)


def main() -> None:
    parser = command_line("recipes.measure.clipping", __doc__)
    parser.add_argument("what", choices=["run", "show"])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--block_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--max_norms", type=float, nargs="+", default=[1.0, 0.25])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43])
    add_worker_arguments(parser)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.what == "run":
        results = measure("recipes.measure.clipping", options.processes, [*sys.argv[1:], "--worker"], options.folder)
        (options.folder / f"clipping-{options.processes}.json").write_text(json.dumps(results) + "\n")
    show(options)


if __name__ == "__main__":
    main()
