"""A comparison: which runs are to be made, and how they are made and kept, also where it was stopped."""

import contextlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from recipes.parts.curve import write_results

from ..common.lab import Lab
from ..common.launching import environment, launcher, on_this_host
from .report import Run, best_rate, is_inside, tried_rates

WORKER = "recipes.measure.compare.worker"
PATIENCE = 600  # seconds without a sign of progress, after which a run counts as failed


# ---- What is to be run ----


def wanted(settings: dict[str, Any], methods: list[str], runs: list[Run]) -> list[Run]:
    """The runs that can be named by now and have not been made: the grid, then the other seeds at the best rate."""
    first, *others = settings["seeds"]
    done = [key_of(run) for run in runs]
    wants: list[Run] = []
    for method in methods:
        grid_seeds = settings["seeds"] if settings.get("whole_grid") else [first]
        rates = grid(settings, runs, method)
        mine = [make_run(method, rate, seed) for rate in rates for seed in grid_seeds]
        if settings.get("memory", True):
            mine += [make_run(method, settings["learning_rates"][0], first, memory=True)]
        best = best_rate(runs, method, first)
        if best is not None and all(run in done for run in mine):
            mine += [make_run(method, best, seed) for seed in others]
        wants += [run for run in mine if run not in done]
    # Methods take turns, so that what else the machine does in the course of time falls on all of them.
    return sorted(wants, key=lambda run: (run["memory"], run["seed"], run["learning_rate"]))


def grid(settings: dict[str, Any], runs: list[Run], method: str) -> list[float]:
    """The learning rates for a method: those of all, and one beyond its best if that is the lowest or highest.

    Of these there are `widen` at most. A best rate with others on both sides of it is the best, one at the edge is not.
    """
    rates, first = settings["learning_rates"], settings["seeds"][0]
    most = len(rates) + (settings.get("widen") or 0)
    if most == len(rates):
        return rates
    tried = tried_rates(runs, method, first)
    wider = sorted({*rates, *tried})
    best = best_rate(runs, method, first)
    if best is None or tried != wider or is_inside(wider, best) or len(wider) >= most:
        return wider
    beyond, before = (wider[-1], wider[-2]) if best == wider[-1] else (wider[0], wider[1])
    return sorted([*wider, float(f"{beyond * beyond / before:.6g}")])


def make_run(method: str, learning_rate: float, seed: int, memory: bool = False) -> Run:
    return {"method": method, "learning_rate": learning_rate, "seed": seed, "memory": memory}


def key_of(run: Run) -> Run:
    """What tells a run from the others."""
    return {name: run[name] for name in make_run("", 0, 0)}


def steps_for(steps: int, evaluations: int, period: int) -> int:
    """As many steps, or a few more, so that evaluations are evenly spread and fall on multiples of `period`."""
    unit = evaluations * period
    return -(-steps // unit) * unit


# ---- Running it ----


class Comparison:
    """The results in a folder, and how they get there.

    Args:
        settings: Of all runs. Results of other settings in the same folder are refused, but for those of other learning
            rates and seeds.
        methods: To run.
        folder: For everything.
    """

    def __init__(self, settings: dict[str, Any], methods: list[str], folder: Path) -> None:
        self.settings, self.methods, self.folder = settings, methods, folder
        self.file = folder / "compare.json"
        machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
        results = {"machine": f"{machine}, torch {torch.__version__}, {platform.machine()}", "runs": []}
        if self.file.exists():
            results = self.results()
            differing = [name for name in settings if results["settings"].get(name) != settings[name]]
            # Of the first there may be more than before; texts are known by their contents.
            if set(differing) - {"learning_rates", "widen", "seeds", "whole_grid", "memory", "texts"}:
                raise SystemExit(
                    f"{self.file} has results with other settings ({', '.join(differing)}). Choose another --folder, "
                    "or the settings with which it was begun."
                )
        write_results(self.file, {**results, "settings": settings})

    def results(self) -> dict[str, Any]:
        return json.loads(self.file.read_text())

    def run(self) -> None:
        """Make every run that is wanted, in as few launches as can be."""
        rates, seeds = len(self.settings["learning_rates"]), len(self.settings["seeds"])
        form = "{l_bar}{bar}| {n:.2f} of {total} runs [{elapsed}<{remaining}]"
        self._told = len(self.results()["runs"])
        whole = rates * seeds if self.settings.get("whole_grid") else rates + seeds - 1
        whole += self.settings.get("memory", True)
        with tqdm(total=len(self.methods) * whole, bar_format=form) as bar:
            while runs := wanted(self.settings, self.methods, self.results()["runs"]):
                bar.total = max(bar.total, self._made() + len(runs))
                is_single = runs[0]["method"] == "single"
                batch = [run for run in runs if (run["method"] == "single") == is_single]
                failure = self._launch(batch, 1 if is_single else self.settings["workers"], bar)
                results = self.results()
                made = [key_of(run) for run in results["runs"]]
                left = [run for run in batch if run not in made]
                if left and not (self.folder / "progress.json").exists():
                    raise RuntimeError(f"The workers did not come to their first run:\n{failure}")
                if left:
                    results["runs"].append({**left[0], "failure": failure or "not made", "loss": None})
                    write_results(self.file, results)
                self._tell(bar, 0.0)

    def _made(self) -> int:
        """How many runs of the methods there are by now."""
        return sum(run["method"] in self.methods for run in self.results()["runs"])

    def _tell(self, bar: tqdm, share: float) -> None:
        """Say what has been made since the last call, and move the bar.

        Args:
            share: Of the present run, that is done.
        """
        runs = self.results()["runs"]
        for run in runs[self._told :]:
            tqdm.write(describe(run))
        self._told = len(runs)
        bar.n = self._made() + share
        bar.refresh()

    def _launch(self, runs: list[Run], processes: int, bar: tqdm) -> str:
        """Start the workers and wait for them; what they said at their end, if they failed."""
        progress, log = self.folder / "progress.json", self.folder / "log.txt"
        progress.unlink(missing_ok=True)
        arguments = [f"--folder={self.folder.resolve()}", f"--settings={json.dumps(self.settings)}"]
        with self._started([*arguments, f"--runs={json.dumps(runs)}"], processes, log) as launchers:
            seen, since = "", time.monotonic()
            while any(each.poll() is None for each in launchers):
                if any(each.poll() for each in launchers):
                    break  # one has failed, and the others would wait for it
                time.sleep(0.3)
                now = progress.read_text() if progress.exists() else ""
                if now != seen:
                    seen, since = now, time.monotonic()
                    self._tell(bar, json.loads(now)["share"])
                if time.monotonic() - since > PATIENCE:
                    return f"nothing happened for {PATIENCE} s"
            failed = any(each.poll() != 0 for each in launchers)
        return last_error(log.read_text(errors="replace")) if failed else ""

    @contextlib.contextmanager
    def _started(self, arguments: list[str], processes: int, log: Path) -> Iterator[list[subprocess.Popen]]:
        """The launcher of the workers, or one on each host; ended at the end."""
        with contextlib.ExitStack() as stack:
            output: dict[str, Any] = {"stdout": stack.enter_context(log.open("w")), "stderr": subprocess.STDOUT}
            if self.settings["hosts"] and processes > 1:
                lab = stack.enter_context(Lab(processes, self.settings["rate"]))
                yield lab.launch(WORKER, arguments, **output)
                return
            command = [*launcher(WORKER, *on_this_host(processes)), *arguments]
            launched = subprocess.Popen(command, env=environment(), start_new_session=True, **output)
            try:
                yield [launched]
            finally:
                launched.terminate()  # it then ends its workers, if there are any left
                launched.wait()


def last_error(output: str) -> str:
    """The end of what failed workers wrote, with the error itself as the last line."""
    lines = [line for line in output[-20000:].splitlines() if line.strip()]
    others = ("ChildFailedError", "raise ")
    errors = [
        line for line in lines if ("Error" in line or "Failure" in line) and not any(other in line for other in others)
    ]
    return "\n".join([*lines[-40:], *errors[:1]])


def describe(run: Run) -> str:
    about = f"{run['method']} {run['learning_rate']:g} seed {run['seed']}"
    if run["failure"] is not None:
        return f"{about}: {run['failure'].splitlines()[-1]}"
    if run["memory"]:
        return f"{about}: {run['peak_bytes'] / 2**20:.1f} MiB"
    return f"{about}: loss {run['loss']:.4f} in {run['seconds']:.1f} s, waiting {run['waiting'] or 0:.2f}"
