"""Training across hosts, measured and broken on one machine: LayUp beside DDP and beside no communication.

    python recipes/hosts.py links  --hosts 2          steps per second and bytes at 10 Gbit/s, 1 Gbit/s, 100 Mbit/s
    python recipes/hosts.py loss   --hosts 2          time to the same held-out loss, each at its best learning rate
    python recipes/hosts.py faults --times 20         workers killed, frozen, cut off, slow and lossy links
    python recipes/hosts.py memory --counts 2 4 8     memory of a worker, by the number of workers
    python recipes/hosts.py soak   --minutes 60       memory, descriptors and threads over a long run
    python recipes/hosts.py show                      tables and pictures of what has been measured

Needs root and iproute2: hosts are network namespaces (see `lab.py`), which share this machine's cores. Options that are
not listed here go to the workers' `LayupConfig`, such as `--wire_dtype bf16`. Results are JSON files in `--folder`.

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
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench import NAMES, by_round, median_ratio
from curve import write_results
from hosts_run import GPT2_BYTES_PER_SECOND, HostsRun
from lab import Lab, bits_per_second

METHODS = ("layup", "ddp", "alone")
Results = list[dict[str, Any]]


def worker_arguments(options: argparse.Namespace, methods: list[str]) -> list[str]:
    """What every kind of run says to its workers."""
    names = ("batch_size", "block_size", "config_overrides")
    return ["--methods", *methods, *(f"--{name}={getattr(options, name)}" for name in names), *options.rest]


def write(folder: Path, name: str, results: Any) -> None:
    """Write results; the file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_results(folder / f"{name}.json", results)


# ---- Links ----


def links(options: argparse.Namespace) -> None:
    """All methods in turn at every rate, within one run of the same processes."""
    arguments = ["--rates", *options.rates, f"--rounds={options.rounds}", f"--seconds={options.seconds}"]
    arguments += [f"--scale={options.scale}", *worker_arguments(options, options.methods)]
    with Lab(options.hosts) as lab, tempfile.TemporaryDirectory() as folder:
        run = HostsRun(lab, Path(folder), "links", arguments)
        results = [entry for worker in run.finish(3600, lambda line: print(line, file=sys.stderr)) for entry in worker]
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


# ---- Memory ----


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


# ---- The command line ----


def show(folder: Path) -> None:
    """Everything that is in the folder."""
    from hosts_faults import show_faults
    from hosts_loss import show_loss

    kinds = {"links": show_links, "memory": show_memory, "faults": show_faults, "loss": show_loss}
    for kind, table in kinds.items():
        for file in sorted(folder.glob(f"hosts-{kind}*.json")):
            print(f"\n## {file.name}")
            table(json.loads(file.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["links", "loss", "faults", "memory", "soak", "show"])
    parser.add_argument("--hosts", type=int, default=None, help="2; 4 for faults")
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 4, 8], help="numbers of hosts, for memory")
    parser.add_argument("--methods", nargs="+", default=None, choices=METHODS)
    parser.add_argument("--rates", nargs="+", default=["10gbit", "1gbit", "100mbit"])
    parser.add_argument("--scale", default=None, help="of the rates: a number, or auto; 1, for the loss auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=None, help="of a run: 8; for the loss 60 of DDP")
    parser.add_argument("--steps", type=int, default=None, help="of every worker on average")
    parser.add_argument("--batch_size", type=int, default=None)
    parser.add_argument("--block_size", type=int, default=None)
    parser.add_argument("--config_overrides", default=None, help="of the model, as in the recipe")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--times", type=int, default=20, help="how often each fault happens")
    parser.add_argument("--cases", nargs="+", default=None, help="faults by name; all by default")
    parser.add_argument(
        "--fork", action=argparse.BooleanOptionalAction, default=True, help="instead of launching, faults"
    )
    parser.add_argument("--at_once", type=int, default=1, help="runs with faults, in labs of their own")
    parser.add_argument("--lease_seconds", type=float, default=5)
    parser.add_argument("--minutes", type=float, default=60, help="of the soak")
    parser.add_argument("--most_growth", type=float, default=2, help="percent of memory per hour that a soak may add")
    parser.add_argument("--folder", type=Path, default=Path("bench-output"))
    options, options.rest = parser.parse_known_args()
    defaults = DEFAULTS.get(options.what, {})
    for name, value in {**COMMON, **defaults}.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    print(f"{options.what}, {options.hosts} hosts on {device}, torch {torch.__version__}, {platform.machine()}")
    if options.what == "show":
        show(options.folder)
    elif options.what in ("links", "memory"):
        {"links": links, "memory": memory}[options.what](options)
    elif options.what == "loss":
        from hosts_loss import loss

        loss(options)
    elif options.what == "faults":
        from hosts_faults import faults

        faults(options)
    else:
        from hosts_soak import soak

        soak(options)


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
    "memory": {"methods": ["layup"], "steps": 20, "batch_size": 4, "block_size": 64},
    "soak": {"methods": ["layup"], **SMALL},
}

if __name__ == "__main__":
    main()
