"""Measure LayUp beside the stock Trainer (DDP) and beside no communication at all.

    python -m recipes.measure.bench speed --processes 2      tokens per second and loss, methods in turn in one run
    python -m recipes.measure.bench step                     processor time of a block's step: one pass, torch, AdamW
    python -m recipes.measure.bench memory --processes 2     peak memory, each method in a run of its own
    python -m recipes.measure.bench overhead                 one process: step time of LayupTrainer against Trainer
    python -m recipes.measure.bench meetings --processes 2   what logging costs, and the parts of a meeting to evaluate
    python -m recipes.measure.bench checkpoints              how long workers stand still for a checkpoint, both ways
    python -m recipes.measure.bench quality --processes 4    held-out loss at equal samples, each at its best rate
    python -m recipes.measure.bench gpu --device cuda        one GPU: speed and memory by Trainer; workers that share it

Prints a Markdown table and writes the figures as JSON into `--folder`. `quality` goes on where it was stopped. With
`--optim muon` all methods train with Muon.
"""

import json
import os
import platform
from pathlib import Path

import torch

from ..common.command import command_line
from .checkpoints import checkpoints
from .gpu import gpu
from .quality import quality
from .step import step
from .turns import meetings, memory, overhead, speed

MEASURES = {
    "speed": speed,
    "step": step,
    "memory": memory,
    "overhead": overhead,
    "meetings": meetings,
    "checkpoints": checkpoints,
    "quality": quality,
    "gpu": gpu,
}


def main() -> None:
    parser = command_line("recipes.measure.bench", __doc__)
    parser.add_argument("what", choices=list(MEASURES))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--skipped", type=int, default=5, help="own steps at the beginning that do not count")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--block_size", type=int, default=128)
    parser.add_argument("--config_overrides", default="", help="of the model, as in the recipe")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--optim", default="adamw_torch_fused", help="of all methods, such as muon")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43])
    parser.add_argument("--folder", type=Path, default=Path("bench-output"))
    options, options.recipe_arguments = parser.parse_known_args()
    if options.recipe_arguments and options.what != "quality":
        parser.error(f"unknown options: {' '.join(options.recipe_arguments)}")

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    print(f"{options.what}, {options.processes} process(es), {device}, torch {torch.__version__}, {platform.machine()}")
    results = MEASURES[options.what](options)
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.what != "quality":
        (options.folder / f"{options.what}-{options.processes}.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
