"""Past this machine: what LayUp would do with up to 1024 workers and more, simulated.

    python -m recipes.measure.simulate --workers 64 --topology uniform --peers 2 --rate 1gbit
                                                              one case beside all-reduce
    python -m recipes.measure.simulate advice                 topologies and settings for numbers of workers and links
    python -m recipes.measure.simulate check --counts 2 4 8   real runs of the same quadratic beside their simulation
    python -m recipes.measure.simulate show                   tables of what is in `--folder`

Prints Markdown tables and writes the figures as JSON into `--folder`; `advice` goes on where it was stopped. What is
simulated is in `simulation.py`, what it assumes in `settings.py`. By default a step takes 0.58 s and the
model 498 MB, as GPT-2 124M in fp32 on one A100 (nanoGPT's published run).
"""

import json
import math
from pathlib import Path

from recipes.parts.curve import write_results

from ..common.command import command_line
from ..common.lab import bits_per_second
from .advice import STEPS, advice
from .case import show, simulate
from .check import check, show_check
from .settings import SPEEDS, TIES, TOPOLOGIES


def main() -> None:
    parser = command_line("recipes.measure.simulate", __doc__)
    parser.add_argument("what", choices=["one", "advice", "check", "show"], nargs="?", default="one")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200, help="of every worker on average")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--dimension", type=int, default=32, help="of the quadratic")
    parser.add_argument("--topology", choices=TOPOLOGIES, default="auto")
    parser.add_argument("--peers", type=int, default=None, help="offers per block and step; unset: as in LayupConfig")
    parser.add_argument("--offer_every", type=int, default=1)
    parser.add_argument("--all_at_once", action="store_false", dest="turns", help="over links, no turns of peers")
    parser.add_argument("--speeds", choices=SPEEDS, default="equal")
    parser.add_argument("--step_seconds", type=float, default=0.58)
    parser.add_argument("--model_bytes", type=float, default=498e6)
    parser.add_argument("--rate", default=None, help="of each worker's link, like 1gbit; unset: shared memory")
    parser.add_argument(
        "--delay", type=float, default=0.0, help="seconds until a block that is asked for begins to come"
    )
    parser.add_argument("--ties", choices=TIES, default="rotated")
    parser.add_argument("--learning_rate", type=float, default=0.1)
    parser.add_argument("--noise", type=float, default=0.5)
    parser.add_argument("--slices", type=int, default=32, help="time slices per step; 0: exact times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--counts", type=int, nargs="+", default=None, help="numbers of workers, for advice and check")
    parser.add_argument("--mean_seconds", type=float, default=0.25, help="of a step, for check")
    parser.add_argument("--folder", type=Path, default=Path("bench-output"))
    options = vars(parser.parse_args())
    what, counts, folder = options.pop("what"), options.pop("counts"), options.pop("folder")
    mean_seconds = options.pop("mean_seconds")
    if what == "one":
        options["rate"] = bits_per_second(options["rate"]) if options["rate"] else math.inf
        result = simulate(options)
        show([result])
        folder.mkdir(parents=True, exist_ok=True)
        write_results(folder / "simulate-one.json", result)
    elif what == "advice":
        advice(counts or list(STEPS), folder)
    elif what == "check":
        check(counts or [2, 4, 8], mean_seconds, folder)
    else:
        for name, table in (("advice", show), ("check", show_check)):
            if (file := folder / f"simulate-{name}.json").exists():
                table(json.loads(file.read_text()))


if __name__ == "__main__":
    main()
