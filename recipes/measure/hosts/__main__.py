"""Training across hosts, measured and broken on one machine: LayUp beside DDP and beside no communication.

    python -m recipes.measure.hosts links --hosts 2         steps per second and bytes, at 10 Gbit/s, 1 Gbit/s and less
    python -m recipes.measure.hosts loss --hosts 2          time to the same held-out loss, each at its best rate
    python -m recipes.measure.hosts formats --rates 1mbit   fp32, bf16, int8 and int4 over a slow link
    python -m recipes.measure.hosts faults --times 20       workers killed, frozen, cut off, slow and lossy links
    python -m recipes.measure.hosts memory --counts 2 4 8   memory of a worker, by the number of workers
    python -m recipes.measure.hosts attack                  somebody on the network who does not know the secret
    python -m recipes.measure.hosts attack --minutes 20     the same at random, in one run
    python -m recipes.measure.hosts soak --minutes 60       memory, descriptors and threads over a long run
    python -m recipes.measure.hosts show                    tables and pictures of what has been measured

Needs root and iproute2: hosts are network namespaces (see `recipes/measure/common/lab.py`), which share this machine's
cores. Options that are not listed here go to the workers' `LayupConfig`, such as `--wire_dtype bf16`. Results are JSON
files in `--folder`.

**The model.** What a link costs depends on the bytes that a step produces per second of computation. GPT-2 124M has
498 MB of gradients in fp32; nanoGPT's published run of it takes about 4 days for 600,000 steps of half a million tokens
on 8 A100, 0.58 s a step. That is 0.86 GB of gradients per second of computation. A core of a CPU computes so much less
that a GPT-2 has this ratio only with very few tokens: the default is one sequence of 16 in a GPT-2 of 4 layers of width
384 (29 MB). The ratio that was reached is printed. With a larger batch, `--scale auto` lowers the links' rates with the
ratio, so that a link takes as long for a step's bytes, in steps, as the named one would for GPT-2 on a GPU; the
processor's work for TCP, which a GPU does not do, is then not a large part of a step.
"""

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from ..common.command import command_line
from .attack import attack, show_attacks
from .faults import faults, show_faults
from .formats import formats, show_formats
from .links import links, show_links
from .loss import loss, show_loss
from .memory import memory, show_memory
from .soak import soak

METHODS = ("layup", "ddp", "alone")
COMMON = {
    "hosts": 2,
    "methods": list(METHODS),
    "steps": 200,
    "scale": "1",
    "seconds": 8,
    "batch_size": 1,
    "block_size": 16,
    "config_overrides": "n_layer=4,n_embd=384,n_head=6",
}
TINY = "n_layer=4,n_embd=64,n_head=4"
SMALL = {"batch_size": 4, "block_size": 64, "config_overrides": "n_layer=4,n_embd=128,n_head=4"}
DEFAULTS: dict[str, dict[str, Any]] = {
    "loss": {"methods": ["layup", "ddp"], "steps": 300, "seconds": 60, "scale": "auto", **SMALL},
    "faults": {"hosts": 4, "methods": ["layup"], "steps": 600, **SMALL, "config_overrides": TINY},
    "formats": {**SMALL, "config_overrides": TINY},
    "memory": {"methods": ["layup"], "steps": 20, "batch_size": 4, "block_size": 64},
    "soak": {"methods": ["layup"], "minutes": 60, **SMALL},
    "attack": {"methods": ["layup"], "steps": 400, **SMALL, "config_overrides": TINY},
}


def show(options: argparse.Namespace) -> None:
    """Everything that is in the folder."""
    kinds = {
        "links": show_links,
        "memory": show_memory,
        "faults": show_faults,
        "loss": show_loss,
        "formats": show_formats,
        "attack": show_attacks,
    }
    for kind, table in kinds.items():
        for file in sorted(options.folder.glob(f"hosts-{kind}*.json")):
            print(f"\n## {file.name}")
            table(json.loads(file.read_text()))


MEASURES = {
    "links": links,
    "loss": loss,
    "formats": formats,
    "faults": faults,
    "memory": memory,
    "attack": attack,
    "soak": soak,
    "show": show,
}


def main() -> None:
    parser = command_line("recipes.measure.hosts", __doc__)
    parser.add_argument("what", choices=list(MEASURES))
    parser.add_argument("--hosts", type=int, default=None, help="2; 4 for faults")
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 4, 8], help="numbers of hosts, for memory")
    parser.add_argument("--methods", nargs="+", default=None, choices=METHODS)
    parser.add_argument("--rates", nargs="+", default=["10gbit", "1gbit", "100mbit"])
    parser.add_argument("--scale", default=None, help="of the rates: a number, or auto; 1, for the loss auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=None, help="of a run or an attack: 8; for the loss 60 of DDP")
    parser.add_argument("--steps", type=int, default=None, help="of every worker on average")
    parser.add_argument("--batch_size", type=int, default=None)
    parser.add_argument("--block_size", type=int, default=None)
    parser.add_argument("--config_overrides", default=None, help="of the model, as in the recipe")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--wire_dtypes", nargs="+", default=["fp32", "bf16", "int8", "int4"])
    parser.add_argument("--times", type=int, default=20, help="how often each fault happens")
    parser.add_argument("--cases", nargs="+", default=None, help="faults by name; all by default")
    parser.add_argument(
        "--fork", action=argparse.BooleanOptionalAction, default=True, help="instead of launching, faults"
    )
    parser.add_argument("--at_once", type=int, default=1, help="runs with faults, in labs of their own")
    parser.add_argument("--lease_seconds", type=float, default=5)
    parser.add_argument("--minutes", type=float, default=None, help="of the soak: 60; of random attacks")
    parser.add_argument("--tokens", nargs="+", default=["set", "unset"], choices=["set", "unset"], help="LAYUP_TOKEN")
    parser.add_argument("--bound", type=float, default=10, help="seconds that an attack may let a worker stand still")
    parser.add_argument("--most_growth", type=float, default=2, help="percent of memory per hour that a soak may add")
    parser.add_argument("--folder", type=Path, default=Path("bench-output"))
    options, options.rest = parser.parse_known_args()
    defaults = DEFAULTS.get(options.what, {})
    for name, value in {**COMMON, **defaults}.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    print(f"{options.what}, {options.hosts} hosts on {device}, torch {torch.__version__}, {platform.machine()}")
    MEASURES[options.what](options)


if __name__ == "__main__":
    main()
