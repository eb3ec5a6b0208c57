"""What blocks are sent as, over a slow link: LayUp with each format in turn, for the same number of samples."""

import argparse
import statistics

from .files import Results, write
from .run import measured, worker_arguments


def formats(options: argparse.Namespace) -> None:
    """All formats and seeds at all rates, in one run of the same processes."""
    arguments = ["--rates", *options.rates, f"--scale={options.scale}", f"--steps={options.steps}"]
    arguments += ["--learning_rates", str(options.learning_rates[0]), "--seeds", *map(str, options.seeds)]
    arguments += ["--wire_dtypes", *options.wire_dtypes, *worker_arguments(options, ["layup"])]
    results = measured("formats", options.hosts, arguments, 3 * 3600)
    write(options.folder, f"hosts-formats-{options.hosts}", results)
    show_formats(results)


def show_formats(results: Results) -> None:
    """The table."""
    print(f"\n{results[0]['hosts']} hosts, {results[0]['parameter_bytes'] / 1e6:.2f} MB of parameters\n")
    heads = ["link", "blocks are sent as", "held-out loss (seeds)", "merges per worker and step", "bytes per merge"]
    heads += ["resent blocks per worker", "consensus distance at the end", "mass at the end"]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for rate, wire_dtype in dict.fromkeys((result["rate"], result["wire_dtype"]) for result in results):
        runs = [r for r in results if (r["rate"], r["wire_dtype"]) == (rate, wire_dtype)]
        firsts = [run for run in runs if run["rank"] == 0]
        losses = [run["loss"] for run in firsts]
        row = [rate, wire_dtype, f"{statistics.mean(losses):.3f} ({', '.join(f'{loss:.3f}' for loss in losses)})"]
        merges = sum(run["merges"] for run in runs)
        row += [f"{merges / sum(run['steps_in_all'] for run in runs):.3f}"]
        received = sum(run["received"] for run in runs)
        row += [f"{received / merges / 1e3:.0f} kB" if merges else "none"]
        row += [f"{statistics.mean(run['resent'] for run in runs):.1f}"]
        row += [f"{statistics.mean(run['consensus_distance'] for run in firsts):.4f}"]
        row += [", ".join(f"{mass:g}" for mass in sorted({run["mass"] for run in runs}))]
        print("| " + " | ".join(row) + " |")
