"""Memory of a worker, by the number of hosts."""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from ..common.figures import NAMES
from ..common.lab import Lab
from .files import Results, write
from .run import HostsRun, worker_arguments


def memory(options: argparse.Namespace) -> None:
    """Peak memory of a worker, and what of it the number of workers makes."""
    results = []
    for count in options.counts:
        for method in options.methods:
            arguments = ["--memory", f"--max_steps={options.steps}", *worker_arguments(options, [method])]
            with Lab(count) as lab, tempfile.TemporaryDirectory() as folder:
                workers = HostsRun(lab, Path(folder), "train", arguments).finish(1200)
            results += [{"hosts": count, "method": method, **worker} for worker in workers]
            print(f"{count} {method}: {max(w['peak_bytes'] for w in workers) / 2**20:.0f} MiB", file=sys.stderr)
    write(options.folder, "hosts-memory", results)
    show_memory(results)


def show_memory(results: Results) -> None:
    counts = sorted({result["hosts"] for result in results})
    print(f"\nPeak proportional set size of one worker over what it had before the model was made; parameters: "
          f"{results[0]['parameter_bytes'] / 2**20:.0f} MiB.\n")  # fmt: skip
    print("| method | " + " | ".join(f"{count} hosts" for count in counts) + " |")
    print("|---|" + "---|" * len(counts))
    for method in dict.fromkeys(result["method"] for result in results):
        means = [
            statistics.mean(r["peak_bytes"] for r in results if (r["hosts"], r["method"]) == (count, method))
            for count in counts
        ]
        print(f"| {NAMES[method]} | " + " | ".join(f"{mean / 2**20:.0f} MiB" for mean in means) + " |")
