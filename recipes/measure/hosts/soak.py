"""Whether a worker grows. Two hosts train for an hour, evaluating and saving now and then.

`own` is what is in no file: anonymous and shared memory. The proportional set size is given, too, and not judged: it
counts libraries by their share, so it moves with every other process that uses them.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from ..common.lab import Lab
from .files import read_lines, write
from .run import HostsRun, worker_arguments

SAMPLE_SECONDS = 10
WARM_UP = 0.25  # of the time: caches fill, the allocator finds its size
PARTS = 10  # of the time that is judged
MOST_MORE = 1.0  # descriptors or threads that an hour may add: none, but for the slope's noise


def growth_per_hour(seconds: list[float], values: list[float]) -> float:
    """Slope of the straight line through the largest value of each part of the time.

    The heap gives memory back now and then, a twentieth of it at a time, so how often it just has done so moves a line
    through all values more than what is left over does.
    """
    size = max(len(values) // PARTS, 1)
    largest = [max(range(i, i + size), key=values.__getitem__) for i in range(0, len(values) - size + 1, size)]
    return 3600 * statistics.linear_regression([seconds[i] for i in largest], [values[i] for i in largest]).slope


def soak(options: argparse.Namespace) -> None:
    """Print the growth of every worker; exit code 1 if one grows by more than `--most_growth`."""
    arguments = [
        *(f"--minutes={options.minutes}", f"--sample_seconds={min(SAMPLE_SECONDS, options.minutes)}"),
        *("--max_steps=100000000", "--lr_scheduler_type=constant", "--logging_steps=200", "--eval_strategy=steps"),
        *("--eval_steps=2000", "--save_strategy=steps", "--save_steps=4000", "--save_total_limit=1"),
        *worker_arguments(options, options.methods[:1]),  # last, so that options of the command line count
    ]
    with Lab(options.hosts, options.rates[0]) as lab, tempfile.TemporaryDirectory() as folder:
        run = HostsRun(lab, Path(folder), "train", arguments)
        workers = run.finish(60 * options.minutes + 600)
        samples = [read_lines(Path(folder, f"samples-{host.index}.jsonl")) for host in lab.hosts]
    has_grown = False
    print(f"\n{options.minutes:g} minutes, {workers[0]['global_step']} steps; growth per hour after a quarter of it.\n")
    print("| worker | figure | first | last | largest | growth per hour | allowed |\n|---|---|---|---|---|---|---|")
    for rank, mine in enumerate(samples):
        kept = [sample for sample in mine if sample["seconds"] > WARM_UP * 60 * options.minutes]
        for figure in ("own", "rss", "pss", "descriptors", "threads"):
            values = [sample[figure] for sample in kept]
            growth = growth_per_hour([sample["seconds"] for sample in kept], values)
            unit = 2**20 if figure in ("own", "rss", "pss") else 1
            allowed = options.most_growth / 100 * values[0] if unit > 1 else MOST_MORE
            has_grown |= growth > allowed and figure != "pss"
            row = [str(rank), figure, *(f"{v / unit:.1f}" for v in (values[0], values[-1], max(values)))]
            row += [f"{growth / unit:+.2f}", f"{allowed / unit:.1f}"]
            print("| " + " | ".join(row) + " |")
    write(options.folder, "hosts-soak", {"minutes": options.minutes, "workers": workers, "samples": samples})
    if has_grown:
        sys.exit("A worker grows.")
