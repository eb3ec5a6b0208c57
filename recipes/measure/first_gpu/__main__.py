"""Ten minutes on one GPU that has never run LayUp: what is right, then what is fast, each part by itself.

    python -m recipes.measure.first_gpu --folder out              all parts, in order
    python -m recipes.measure.first_gpu --parts facts died        some
    python -m recipes.measure.first_gpu --device cpu              the same code without a GPU; its figures mean nothing

Each part runs in processes of its own, has its own time limit, and leaves `PART.json` and `PART.log` in the folder, so
that whatever ends early leaves what came before. NCCL refuses two processes on one GPU, so they talk over gloo.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from ..common.launching import ROOT, path_to_recipes

PARTS = {
    "facts": 60,
    "died": 90,
    "tests": 150,
    "workers": 120,
    "kernels": 60,
    "consensus": 30,
    "bench": 120,
    "bf16": 40,
}
"""In order, with the seconds that each may take."""


def command_of(part: str, options: argparse.Namespace) -> list[str]:
    """What runs a part."""
    python = [sys.executable, "-m"]
    if part == "tests":
        return [*python, "pytest", "-q", "-x", str(ROOT / "tests" / "test_cuda.py")]
    if part == "bench":
        arguments = ["gpu", f"--device={options.device}", "--rounds=2", "--steps=15", f"--folder={options.folder}"]
        return [*python, "recipes.measure.bench", *arguments]
    return [*python, "recipes.measure.first_gpu.part", part, f"--device={options.device}", f"--folder={options.folder}"]


def main() -> None:
    parser = argparse.ArgumentParser("recipes.measure.first_gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("first-gpu-output"))
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **path_to_recipes(), "CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "1"}
    summary = {}
    for part in options.parts:
        began = time.monotonic()
        with open(options.folder / f"{part}.log", "w") as log:
            try:
                done = subprocess.run(
                    command_of(part, options),
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=PARTS[part],
                    check=False,
                )
                outcome = "passed" if done.returncode == 0 else f"exit code {done.returncode}"
            except subprocess.TimeoutExpired:
                outcome = f"not within {PARTS[part]} s"
        summary[part] = {"outcome": outcome, "seconds": round(time.monotonic() - began, 1)}
        print(f"{part}: {outcome} after {summary[part]['seconds']} s", flush=True)
        (options.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
