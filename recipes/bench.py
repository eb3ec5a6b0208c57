"""Measure LayUp beside the stock Trainer (DDP) and beside no communication at all.

    python recipes/bench.py speed    --processes 2      tokens per second and loss, methods in turn within one run
    python recipes/bench.py memory   --processes 2      peak memory, each method in a run of its own
    python recipes/bench.py overhead                    one process: step time of LayupTrainer against Trainer
    python recipes/bench.py meetings --processes 2      what logging costs, and the parts of a meeting to evaluate
    python recipes/bench.py quality  --processes 4      held-out loss at equal samples, each at its best learning rate
    python recipes/bench.py gpu      --device cuda      one GPU: speed and memory by Trainer, workers that share it

Prints a Markdown table and writes the figures as JSON into `--folder`. `quality` goes on where it was stopped.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
NAMES = {"layup": "LayUp", "ddp": "DDP", "alone": "no communication"}


def launch(script: str, processes: int, arguments: list[str]) -> None:
    """Run `script` under `accelerate launch`.

    Raises:
        RuntimeError: It failed; with the end of its output.
    """
    several = ["--multi_gpu", "--main_process_port=0"] if processes > 1 else []
    command = [sys.executable, "-m", "accelerate.commands.launch", *several, f"--num_processes={processes}"]
    # One thread for each worker, so that two methods are given the same cores.
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(
        [*command, str(HERE / script), *arguments], env=environment, text=True, capture_output=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{script} failed with exit code {done.returncode}:\n{(done.stdout + done.stderr)[-8000:]}")


def measure(script: str, processes: int, arguments: list[str], folder: Path) -> list[dict[str, Any]]:
    """Run `script`, and take from `folder` what its workers have written there, in the order of ranks."""
    launch(script, processes, arguments)
    files = sorted(folder.glob("worker-*.json"))
    results = [result for file in files for result in json.loads(file.read_text())]
    for file in files:
        file.unlink()
    return results


def run_workers(options: argparse.Namespace, methods: str, rounds: int, *more: str) -> list[dict[str, Any]]:
    """What every worker measured, one dict per worker, round and method."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [f"--methods={methods}", f"--rounds={rounds}", f"--steps={options.steps}", f"--folder={folder}"]
        arguments += [f"--skipped={options.skipped}"]
        arguments += [f"--batch_size={options.batch_size}", f"--block_size={options.block_size}"]
        arguments += [f"--config_overrides={options.config_overrides}", *(["--bf16"] if options.bf16 else []), *more]
        return measure("bench_worker.py", options.processes, arguments, Path(folder))


def by_round(results: list[dict[str, Any]], method: str, key: str, combine: Any = sum) -> list[float]:
    """One figure per round: the workers' figures combined."""
    rounds = sorted({result["round"] for result in results})
    return [combine([r[key] for r in results if (r["round"], r["method"]) == (turn, method)]) for turn in rounds]


def median_ratio(upper: list[float], lower: list[float]) -> float:
    """Median over rounds of the ratio within a round: what the machine's load does to both alike cancels."""
    return statistics.median(a / b for a, b in zip(upper, lower, strict=True))


def speed(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens per second of all workers together."""
    results = run_workers(options, "layup,ddp,alone", options.rounds)
    rates = {method: by_round(results, method, "tokens_per_second") for method in NAMES}
    print("\n| method | tokens per second | against no communication | training loss |\n|---|---|---|---|")
    for method, name in NAMES.items():
        loss = statistics.median(by_round(results, method, "loss", statistics.mean))
        ratio = median_ratio(rates[method], rates["alone"])
        print(f"| {name} | {statistics.median(rates[method]):,.0f} | {ratio:.3f} | {loss:.3f} |")
    return results


def memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory of one worker, over what it had before the model was made."""
    results = [result for method in NAMES for result in run_workers(options, method, 1, "--memory")]
    print("\n| method | peak memory per worker | of that, parameters |\n|---|---|---|")
    for method, name in NAMES.items():
        peak = statistics.mean(r["peak_bytes"] for r in results if r["method"] == method)
        print(f"| {name} | {peak / 2**20:,.0f} MiB | {results[0]['parameters'] * 4 / 2**20:,.0f} MiB |")
    return results


def overhead(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Step time of one process."""
    options.processes = 1
    results = run_workers(options, "layup,ddp", options.rounds)
    steps = {method: by_round(results, method, "step_seconds") for method in ("layup", "ddp")}
    print("\n| one process | seconds per step | ratio |\n|---|---|---|")
    print(f"| Trainer | {statistics.median(steps['ddp']):.4f} | 1 |")
    print(
        f"| LayupTrainer | {statistics.median(steps['layup']):.4f} | {median_ratio(steps['layup'], steps['ddp']):.3f} |"
    )
    return results


def meetings(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What logging every step costs, and how long the parts of a meeting take once all workers have come."""
    results = run_workers(options, "layup,logging,meeting", options.rounds)
    rates = {method: by_round(results, method, "tokens_per_second") for method in ("layup", "logging")}
    print(f"\nLogging every step: {median_ratio(rates['logging'], rates['layup']):.3f} of the speed without.")
    print("\n| part of a meeting | milliseconds, median |\n|---|---|")
    for part in ("agreeing", "consensus", "evaluation"):
        seconds = [second for result in results for second in result["meeting_seconds"].get(part, [])]
        print(f"| {part} | {1000 * statistics.median(seconds):.1f} |")
    return results


def quality(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Held-out loss of the default recipe: every learning rate with the first seed, the best one with all seeds."""
    file = options.folder / "quality.json"
    results = json.loads(file.read_text()) if file.exists() else []

    def loss(method: str, rate: float, seed: int) -> float:
        key = {"method": method, "learning_rate": rate, "seed": seed, "processes": options.processes}
        for result in results:
            if key.items() <= result.items():
                return result["eval_loss"]
        with tempfile.TemporaryDirectory() as folder:
            arguments = [f"--trainer={method}", f"--learning_rate={rate}", f"--seed={seed}", f"--output_dir={folder}"]
            arguments += ["--eval_strategy=no", "--disable_tqdm=True", *options.recipe_arguments]
            launch("gpt2.py", options.processes, arguments)
            result = json.loads((Path(folder) / "results.json").read_text())
        kept = {name: result[name] for name in ("eval_loss", "seconds", "tokens_seen", "steps", "parameters")}
        results.append(key | kept)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{method} {rate} seed {seed}: {result['eval_loss']:.4f} in {result['seconds']:.0f} s", flush=True)
        return result["eval_loss"]

    best: dict[str, tuple[float, list[float]]] = {}
    for method in ("ddp", "layup"):
        rate = min(options.learning_rates, key=lambda r: loss(method, r, options.seeds[0]))
        best[method] = rate, [loss(method, rate, seed) for seed in options.seeds]
    rates = " | ".join(f"{rate:g}" for rate in options.learning_rates)
    print(f"\n| method | {rates} | best, seeds {options.seeds} | mean |\n|{'---|' * (len(options.learning_rates) + 3)}")
    for method, (_, losses) in best.items():
        grid = " | ".join(f"{loss(method, r, options.seeds[0]):.3f}" for r in options.learning_rates)
        row = ", ".join(f"{value:.3f}" for value in losses)
        print(f"| {NAMES[method]} | {grid} | {row} | {statistics.mean(losses):.3f} |")
    ratio = statistics.mean(best["layup"][1]) / statistics.mean(best["ddp"][1])
    print(f"\nLayUp's loss is {ratio:.4f} of DDP's.")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "memory", "overhead", "meetings", "quality", "gpu"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--skipped", type=int, default=5, help="own steps at the beginning that do not count")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--block_size", type=int, default=128)
    parser.add_argument("--config_overrides", default="", help="of the model, as in the recipe")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43])
    parser.add_argument("--folder", type=Path, default=Path("bench-output"))
    options, options.recipe_arguments = parser.parse_known_args()
    if options.recipe_arguments and options.what != "quality":
        parser.error(f"unknown options: {' '.join(options.recipe_arguments)}")

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    print(f"{options.what}, {options.processes} process(es), {device}, torch {torch.__version__}, {platform.machine()}")
    measures = {"speed": speed, "memory": memory, "overhead": overhead, "meetings": meetings, "quality": quality}
    if options.what == "gpu":
        from bench_gpu import gpu

        measures["gpu"] = gpu
    results = measures[options.what](options)
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.what != "quality":
        (options.folder / f"{options.what}-{options.processes}.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
