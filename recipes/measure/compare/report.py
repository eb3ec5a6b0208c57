"""What is made of a comparison's results: the best learning rates, the tables."""

import math
import statistics
from typing import Any

from ..common.losses import Curve
from .significance import LEVEL, verdict

Run = dict[str, Any]
NAMES = {
    "single": "one process",
    "ddp": "DDP",
    "ddp-nesterov": "DDP, Nesterov's momentum",
    "ddp-muon": "DDP, Muon",
    "ddp-bf16": "DDP, bf16 gradients",
    "ddp-powersgd": "DDP, PowerSGD",
    "localsgd": "Local SGD",
    "localsgd-muon": "Local SGD, Muon",
    "diloco": "DiLoCo",
    "co2": "CO2",
    "decent-dp": "Decent-DP",
    "gosgd": "GoSGD",
    "adpsgd": "AD-PSGD",
    "layup": "LayUp",
    "layup-muon": "LayUp, Muon",
    "layup-arrival": "LayUp, merging on arrival",
    "layup-straight": "LayUp, without Nesterov's momentum",
    "layup-own": "LayUp, second moments of each worker's own",
    "layup-plain": "LayUp, plain AdamW",
}
NONE = "-"
OURS = ("layup", "layup-muon")  # set beside each of the others
HEADS = (
    "method",
    "learning rate",
    "held-out loss at equal samples",
    "of DDP's",
    "seconds to DDP's final loss",
    "times sooner than DDP",
    "steps of all per second",
    "bytes per worker and step",
    "peak memory per worker",
    "share of time waiting",
)


def final_loss(run: Run) -> float:
    """Held-out loss at the end; infinite if the run has diverged or failed."""
    loss = run.get("loss")
    return loss if loss is not None and math.isfinite(loss) else math.inf


def training_runs(runs: list[Run], method: str) -> list[Run]:
    """Those of a method that were not made for their memory alone."""
    return [run for run in runs if run["method"] == method and not run["memory"]]


def best_rate(runs: list[Run], method: str, seed: int) -> float | None:
    """The learning rate with the lowest final loss, mean over seeds, of those that have been run for the most seeds.

    Args:
        seed: For which the grid has been run, at least.

    Returns:
        None if none has come to its end with this seed.
    """
    losses: dict[float, dict[int, float]] = {}
    for run in training_runs(runs, method):
        losses.setdefault(run["learning_rate"], {})[run["seed"]] = final_loss(run)
    losses = {rate: by_seed for rate, by_seed in losses.items() if math.isfinite(by_seed.get(seed, math.inf))}
    most = max(map(len, losses.values()), default=0)
    means = {rate: statistics.mean(by_seed.values()) for rate, by_seed in losses.items() if len(by_seed) == most}
    return min(means, key=means.__getitem__, default=None)


def tried_rates(runs: list[Run], method: str, seed: int) -> list[float]:
    """The learning rates that a method has been run with, also those that it diverged with, from the lowest on."""
    return sorted({run["learning_rate"] for run in training_runs(runs, method) if run["seed"] == seed})


def is_inside(rates: list[float], rate: float) -> bool:
    """Whether lower and higher rates have been tried, so that this may be called the best."""
    return min(rates) < rate < max(rates)


def best_runs(runs: list[Run], method: str, seed: int) -> dict[int, Run]:
    """The runs at the best learning rate, by seed.

    Args:
        seed: For which the grid has been run.
    """
    rate = best_rate(runs, method, seed)
    return {run["seed"]: run for run in training_runs(runs, method) if run["learning_rate"] == rate}


def mean_and_spread(values: list[float]) -> str:
    """Mean and sample standard deviation; without the latter for a single value."""
    if not all(map(math.isfinite, values)):
        return f"diverged ({sum(map(math.isfinite, values))} of {len(values)} seeds did not)"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def seconds_to(run: Run, loss: float) -> float:
    """When the run's held-out loss was first as low as this, between evaluations interpolated; infinite: never."""
    points = [point for point in run["points"] if point["loss"] is not None]
    seconds = Curve(points).seconds_to(loss) if points else None
    return math.inf if seconds is None else seconds


def sooner(run: Run, ddp: Run) -> tuple[float, float]:
    """Seconds that a run takes to the loss which DDP ends with for the same seed, and how many times sooner that is."""
    seconds = seconds_to(run, final_loss(ddp))
    return seconds, seconds_to(ddp, final_loss(ddp)) / seconds


def quantity(value: float | None, unit: float, form: str) -> str:
    """In units, or a dash."""
    return NONE if value is None else form.format(value / unit)


def beside_ddp(mine: dict[int, Run], ddp: dict[int, Run]) -> list[str]:
    """Ratio of losses, seconds to DDP's final loss, and how many times sooner; over the seeds that DDP came through."""
    seeds = [seed for seed in mine if math.isfinite(final_loss(ddp.get(seed, {})))]
    if not seeds:
        return [NONE] * 3
    ratio = statistics.mean(final_loss(mine[seed]) / final_loss(ddp[seed]) for seed in seeds)
    times = [sooner(mine[seed], ddp[seed]) for seed in seeds]
    reached = sum(math.isfinite(seconds) for seconds, _ in times)
    if reached < len(seeds):
        return [f"{ratio:.4f}", f"not reached ({reached} of {len(seeds)} seeds)", NONE]
    mean, median = statistics.mean(seconds for seconds, _ in times), statistics.median(factor for _, factor in times)
    return [f"{ratio:.4f}", f"{mean:.1f}", f"{median:.2f}"]


def completed(runs: dict[int, Run]) -> list[Run]:
    """Those of a method's best runs that have come to their end."""
    return [run for run in runs.values() if run["failure"] is None]


def mean_of(runs: list[Run], figure: str) -> float | None:
    """Of those runs that have the figure; None if there are none."""
    values = [run[figure] for run in runs if run.get(figure) is not None]
    return statistics.mean(values) if values else None


def costs(runs: list[Run], method: str, seed: int) -> dict[str, float | None]:
    """Bytes per worker and step, peak memory and share of time waiting, at a method's best learning rate.

    Args:
        seed: For which the grid has been run.
    """
    done = completed(best_runs(runs, method, seed))
    on_link = mean_of(done, "link_bytes_per_step")
    return {
        "bytes": mean_of(done, "bytes_per_step") if on_link is None else on_link,
        "memory": mean_of([run for run in runs if run["method"] == method and run["memory"]], "peak_bytes"),
        "waiting": mean_of(done, "waiting"),
    }


def row(runs: list[Run], method: str, seed: int) -> list[str]:
    """A method's line of the table: means over seeds.

    Args:
        seed: For which the grid has been run.
    """
    mine, ddp = (best_runs(runs, name, seed) for name in (method, "ddp"))
    if not mine:
        failures = [run["failure"] for run in training_runs(runs, method) if run["failure"]]
        return [NAMES[method], NONE, (failures or ["not run"])[-1].splitlines()[-1], *[NONE] * (len(HEADS) - 3)]
    done, rate = completed(mine), best_rate(runs, method, seed)
    edge = "" if is_inside(tried_rates(runs, method, seed), rate) else ", the grid's edge"
    accuracy, cost = mean_of(done, "accuracy"), costs(runs, method, seed)
    recognised = "" if accuracy is None else f" ({100 * accuracy:.1f} %)"
    return [
        NAMES[method],
        f"{rate:g}{edge}",
        mean_and_spread([final_loss(run) for run in mine.values()]) + recognised,
        *beside_ddp(mine, ddp),
        f"{statistics.median(sum(run['own_steps']) / run['seconds'] for run in done):.2f}",
        quantity(cost["bytes"], 1e6, "{:.3f} MB"),
        quantity(cost["memory"], 2**20, "{:.1f} MiB"),
        quantity(cost["waiting"], 1, "{:.2f}"),
    ]


def differences(runs: list[Run], method: str, other: str, seed: int) -> list[float]:
    """What a method's final loss is above the other's, for each seed that both have been run with at their rates."""
    mine, others = (best_runs(runs, name, seed) for name in (method, other))
    return [final_loss(mine[each]) - final_loss(others[each]) for each in sorted(mine.keys() & others.keys())]


def significance(results: dict[str, Any]) -> str:
    """The Markdown table of LayUp beside each other method, seed by seed."""
    runs, seed = results["runs"], results["settings"]["seeds"][0]
    ours = [name for name in OURS if best_runs(runs, name, seed)]
    others = [name for name in NAMES if best_runs(runs, name, seed)]
    heads = [f"loss of {NAMES[mine]} less that" for mine in ours]
    if not ours or others == ours[:1]:
        return ""
    lines = [
        "Differences in held-out loss between runs of one seed, mean ± standard deviation. By an exact permutation "
        f"test over paired differences, two-sided, there is one where p < {LEVEL:g} (each by itself), otherwise none.",
        "",
        f"| {' | '.join(['of', *heads])} |",
        "|---" * (1 + len(ours)) + "|",
    ]
    for other in others:
        cells = [NONE if mine == other else verdict(differences(runs, mine, other, seed)) for mine in ours]
        lines.append(f"| {' | '.join([NAMES[other], *cells])} |")
    return "\n".join(lines)


def of_data(data: dict[str, Any]) -> list[str]:
    """What was trained and evaluated on, in words, if that was noted."""
    if not data:
        return []
    parts = [
        f"{data[part]['characters']:,} characters {use} (SHA-256 {data[part]['sha256'][:16]})"
        for part, use in (("train", "to train on"), ("held_out", "held out"))
    ]
    return ["", f"Data: {parts[0]}, {parts[1]}; a vocabulary of {data['vocabulary']:,}."]


def table(results: dict[str, Any]) -> str:
    """The Markdown table of all methods that have been run."""
    settings, runs = results["settings"], results["runs"]
    seed = settings["seeds"][0]
    methods = [name for name in NAMES if training_runs(runs, name)]
    if not methods:
        return "Nothing has been run."
    size = next((run["parameters"] for run in runs if "parameters" in run), 0)
    samples = settings["steps"] * settings["workers"] * settings["batch_size"]
    rates = ", ".join(f"{rate:g}" for rate in settings["learning_rates"])
    seeds = ", ".join(map(str, settings["seeds"]))
    choice = "the mean over seeds" if settings.get("whole_grid") else f"seed {seed}"
    unit = "characters" if settings.get("task") == "shakespeare" else "tokens"
    wider = " and beyond" if settings.get("widen") else ""
    images = settings.get("images")
    kind = f"images by a {images}" if images else f"samples of {settings['block_size']} {unit}"
    link = f"hosts joined by links of {settings['rate']}" if settings["hosts"] else "workers on one host"
    lines = [
        f"{settings['workers']} {link}; {size:,} parameters; {settings['steps']} steps of {settings['batch_size']} "
        f"samples per worker, {samples:,} {kind}; rates from {rates}{wider}, chosen by {choice}; "
        f"seeds {seeds}" + (f"; delayed: {settings['straggler']}" if settings["straggler"] else "") + ".",
        *of_data(results.get("data", {})),
        "",
        "| " + " | ".join(HEADS) + " |",
        "|---" * len(HEADS) + "|",
        *("| " + " | ".join(row(runs, method, seed)) + " |" for method in methods),
        *(["", beside] if (beside := significance(results)) else []),
    ]
    return "\n".join(lines)
