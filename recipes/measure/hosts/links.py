"""What a link costs: steps per second and bytes of all methods in turn, at every rate."""

import argparse
import statistics

from ..common.figures import NAMES, by_round, median_ratio
from ..common.lab import bits_per_second
from .files import Results, write
from .run import measured, worker_arguments
from .scale import GPT2_BYTES_PER_SECOND


def links(options: argparse.Namespace) -> None:
    """All methods in turn at every rate, within one run of the same processes."""
    arguments = ["--rates", *options.rates, f"--rounds={options.rounds}", f"--seconds={options.seconds}"]
    arguments += [f"--scale={options.scale}", *worker_arguments(options, options.methods)]
    results = measured("links", options.hosts, arguments, 3600)
    scaled = "-scaled" if options.scale != "1" else ""
    write(options.folder, f"hosts-links-{options.hosts}{scaled}", results)
    show_links(results)


def show_links(results: Results) -> None:
    """The table: ratios are taken within a round, their median over rounds is given."""
    size, hosts = results[0]["parameter_bytes"], results[0]["hosts"]
    rates = list(dict.fromkeys(result["rate"] for result in results))
    methods = list(dict.fromkeys(result["method"] for result in results))
    alone = statistics.median(r["step_seconds"] for r in results if r["method"] == "alone")
    ratio = size / alone
    faster = GPT2_BYTES_PER_SECOND / ratio
    print(
        f"\n{hosts} hosts, {size / 1e6:.0f} MB of parameters, {1000 * alone:.0f} ms a step without communication: "
        f"{ratio / 1e9:.2f} GB of gradients per second of computation (GPT-2 124M: "
        f"{GPT2_BYTES_PER_SECOND / 1e9:.2f}, so in steps, a link here is what one of {faster:.1f} times the rate is to "
        "that).\n"
    )
    print("| link | method | steps/s of all | ratio to no communication (rounds) | in steps of DDP, communication |"
          " bytes in per worker and step, of the model | bytes in per second | longest step |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for rate in rates:
        at_rate = [result for result in results if result["rate"] == rate]
        speeds = {method: by_round(at_rate, method, "steps_per_second") for method in methods}
        for method in methods:
            ratios = [a / b for a, b in zip(speeds[method], speeds["alone"], strict=True)]
            in_rounds = ", ".join(f"{value:.3f}" for value in ratios)
            mine = [result for result in at_rate if result["method"] == method]
            link = (
                rate if mine[0]["link"] == rate else f"{rate} (here {bits_per_second(mine[0]['link']) / 1e6:.1f} mbit)"
            )
            share = f"{1 - median_ratio(speeds[method], speeds['alone']):.2f}" if method == "ddp" else ""
            per_step = statistics.mean(r["received_per_step"] for r in mine)
            per_second = statistics.mean(r["received_per_second"] for r in mine)
            longest = max(r["longest_step"] for r in mine)
            row = [link, NAMES[method], f"{statistics.median(speeds[method]):.2f}"]
            row += [f"**{statistics.median(ratios):.3f}** ({in_rounds})", share, f"{per_step / size:.2f}"]
            row += [f"{per_second / 1e6:.1f} MB", f"{longest:.2f} s"]
            print("| " + " | ".join(row) + " |")
