"""Held-out loss of the default recipe at equal samples, each method at its best learning rate."""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from ..common.figures import NAMES
from ..common.launching import ROOT, launch

RECIPE = ROOT / "recipes" / "gpt2.py"


def quality(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Held-out loss of the default recipe: every learning rate with the first seed, the best one with all seeds."""
    file = options.folder / "quality.json"
    results = json.loads(file.read_text()) if file.exists() else []

    def loss(method: str, rate: float, seed: int) -> float:
        key = {"method": method, "learning_rate": rate, "seed": seed, "processes": options.processes}
        key["optim"] = options.optim
        for result in results:
            if key.items() <= result.items():
                return result["eval_loss"]
        with tempfile.TemporaryDirectory() as folder:
            arguments = [f"--trainer={method}", f"--learning_rate={rate}", f"--seed={seed}", f"--output_dir={folder}"]
            arguments += ["--eval_strategy=no", "--disable_tqdm=True", f"--optim={options.optim}"]
            arguments += options.recipe_arguments
            launch(RECIPE, options.processes, arguments)
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
