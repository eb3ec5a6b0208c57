"""How close clipping by an estimate of the gradient norm comes to clipping by the exact norm.

    python recipes/clipping.py run  --processes 1     every case, for each seed
    python recipes/clipping.py run  --processes 2     the same with two workers
    python recipes/clipping.py show                   table and picture of what has been measured

The cases: the two kinds of clipping, and none, each with and without a spike: a few steps in which the batches are
random tokens and their loss is multiplied, so that the gradient is far longer than any before it. The estimate knows
the norm of the blocks that backward has done, and of the others only that of the step before, so a sudden spike is what
it must be worst at.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from bench import launch

CASES = {"exact": "exact", "estimate": "estimate", "none": "no clipping"}
SPIKE, SPIKE_STEPS, SPIKE_FACTOR = 0.5, 3, 100.0  # where in the run, for how many steps, and what multiplies the loss
SMOOTH = 10  # steps that a point of a curve is the mean of


def work(options: argparse.Namespace) -> None:
    """One worker: all cases for all seeds, into `FOLDER/worker-RANK.json`."""
    from accelerate import PartialState
    from bench_worker import load_blocks
    from model import make_config, make_model
    from tokens import collate
    from transformers.utils import logging

    from layup_hf import LayupConfig, LayupTrainer

    class SpikedTrainer(LayupTrainer):
        """Multiplies the loss on random tokens for a few steps, and leaves them out of the log."""

        has_spike = False

        def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if not model.training:
                return super().compute_loss(model, inputs, *args, **kwargs)
            at = round(SPIKE * self.args.max_steps)
            if not (self.has_spike and at <= self.state.global_step < at + SPIKE_STEPS):
                return super().compute_loss(model, inputs, *args, **kwargs)
            noise = torch.randint_like(inputs["input_ids"], self.model.config.vocab_size)
            inputs = {**inputs, "input_ids": noise, "labels": noise}
            return SPIKE_FACTOR * super().compute_loss(model, inputs, *args, **kwargs)

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
            warmup_steps=options.steps // 10,
            max_grad_norm=0.0 if case == "none" else max_norm,
            clip="estimate" if case == "none" else case,
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
        trainer.has_spike = has_spike
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        return {
            "case": case,
            "has_spike": has_spike,
            "max_norm": max_norm,
            "seed": seed,
            "processes": state.num_processes,
            "losses": [entry["loss"] for entry in logs],
            "norms": [entry["grad_norm"] for entry in logs],
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
    Path(options.folder, f"worker-{state.process_index}.json").write_text(json.dumps(results))
    state.wait_for_everyone()
    state.destroy_process_group()


# ---- The figures ----


def smoothed(losses: list[float]) -> list[float]:
    return [statistics.mean(losses[max(0, at - SMOOTH + 1) : at + 1]) for at in range(len(losses))]


def deviation(results: list[dict[str, Any]]) -> float:
    """Largest relative distance of the smoothed curves to the exact ones, of all seeds; the spike itself left out."""
    largest = 0.0
    for result in (r for r in results if r["case"] != "exact"):
        key = ("seed", "processes", "has_spike")
        exact = next(r for r in results if r["case"] == "exact" and all(r[name] == result[name] for name in key))
        at = round(SPIKE * len(exact["losses"]))
        curves = [losses[:at] + losses[at + SPIKE_STEPS :] for losses in (result["losses"], exact["losses"])]
        largest = max(largest, *(abs(a / b - 1) for a, b in zip(*map(smoothed, curves), strict=True)))
    return largest


def show(options: argparse.Namespace) -> None:
    """Table and picture of all runs in the folder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    files = sorted(options.folder.glob("clipping-*.json"))
    results = [result for file in files for result in json.loads(file.read_text())]
    print("| workers | max_grad_norm | spike | clipping | held-out loss, by seed | largest distance to exact |")
    print("|---|---|---|---|---|---|")
    groups = sorted({(r["processes"], r["max_norm"], r["has_spike"]) for r in results})
    for processes, max_norm, has_spike in groups:
        group = [
            r for r in results if (r["processes"], r["max_norm"], r["has_spike"]) == (processes, max_norm, has_spike)
        ]
        for case, name in CASES.items():
            runs = [r for r in group if r["case"] == case]
            if runs:
                losses = ", ".join(f"{r['held_out']:.3f}" for r in runs)
                distance = deviation([r for r in group if r["case"] in ("exact", case)])
                far = f"{100 * distance:.2f} %" if case != "exact" else ""
                shown = "" if case == "none" else f"{max_norm:g}"
                print(f"| {processes} | {shown} | {'yes' if has_spike else 'no'} | {name} | {losses} | {far} |")

    shown = [r for r in results if r["has_spike"] and r["max_norm"] == results[0]["max_norm"]]
    columns = sorted({r["processes"] for r in shown})
    figure, axes = pyplot.subplots(1, len(columns), figsize=(5 * len(columns), 3.6), sharey=True, squeeze=False)
    for axis, processes in zip(axes[0], columns, strict=True):
        for case, colour in zip(CASES, ("black", "tab:red", "tab:gray"), strict=True):
            runs = [r for r in shown if (r["processes"], r["case"]) == (processes, case)]
            for number, result in enumerate(runs):
                at = round(SPIKE * len(result["losses"]))
                curve = result["losses"]
                curve = [None if at <= step < at + SPIKE_STEPS else loss for step, loss in enumerate(curve)]
                style = {"color": colour, "linewidth": 1, "linestyle": "--" if case == "estimate" else "-"}
                axis.plot(curve, label=CASES[case] if number == 0 else None, **style)
        axis.set_title(f"{processes} worker(s), spike in the middle")
        axis.set_xlabel("step")
    axes[0][0].set_ylabel("training loss")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(options.folder / "clipping.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "show"])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--block_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--max_norms", type=float, nargs="+", default=[1.0, 0.25])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43])
    parser.add_argument("--folder", type=Path, default=Path("bench-output"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.what == "run":
        launch("clipping.py", options.processes, [*sys.argv[1:], "--worker"])
        results = json.loads((options.folder / "worker-0.json").read_text())
        (options.folder / f"clipping-{options.processes}.json").write_text(json.dumps(results) + "\n")
        for file in options.folder.glob("worker-*.json"):
            file.unlink()
    show(options)


if __name__ == "__main__":
    main()
