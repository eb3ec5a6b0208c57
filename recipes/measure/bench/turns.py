"""What is measured by letting methods train in turn: speed, memory, overhead, meetings."""

import argparse
import statistics
from typing import Any

from ..common.figures import NAMES, PARTS, by_round, median_ratio
from .run import run_workers


def speed(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens per second of all workers together."""
    names = {**NAMES, **PARTS}
    results = run_workers(options, ",".join(names), options.rounds)
    rates = {method: by_round(results, method, "tokens_per_second") for method in names}
    processor = {method: by_round(results, method, "processor_seconds") for method in names}
    print("\n| method | tokens per second | against no communication | by processor time | training loss |")
    print("|---|---|---|---|---|")
    for method, name in names.items():
        loss = statistics.median(by_round(results, method, "loss", statistics.mean))
        ratio = median_ratio(rates[method], rates["alone"])
        by_processor = median_ratio(processor["alone"], processor[method])
        print(f"| {name} | {statistics.median(rates[method]):,.0f} | {ratio:.3f} | {by_processor:.3f} | {loss:.3f} |")
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
