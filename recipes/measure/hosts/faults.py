"""What happens to a run across hosts when something breaks.

Every case happens `--times` times, each time in a new run and at another moment (drawn from a seed) between a fifth and
three fifths of the undisturbed run. Results are written after every run, and a stopped series goes on where it was.
"""

import argparse
import concurrent.futures
import contextlib
import itertools
import json
import math
import queue
import random
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..common.lab import Lab
from .cases import CASES
from .files import write
from .forker import Forker
from .run import HostsRun, worker_arguments

FAULT_SECONDS = 30.0  # of a freeze, a pulled cable, a slow or lossy link
RETURN_SECONDS = {True: 8, False: 20}  # for a worker to be at work again, forked or launched
PATIENCE = 400  # seconds for a whole run; a launcher alone waits 300 s at its end for one that has failed
LAUNCHER_PATIENCE = 20  # seconds for a launcher to end after its worker


class Place:
    """A lab that is used for one run after the other, with what starts workers there."""

    def __init__(self, lab: Lab, options: argparse.Namespace) -> None:
        self.lab, self.rate, self.runs = lab, options.rates[0], 0
        self.forkers = [Forker(host) for host in self.lab.hosts] if options.fork else None

    def start(self, folder: Path, arguments: list[str], environment: Mapping[str, str] | None = None) -> HostsRun:
        """A run at a port of its own."""
        self.runs += 1
        return HostsRun(self.lab, folder, "train", arguments, self.forkers, 29500 + self.runs, environment)

    def clear(self, run: HostsRun) -> None:
        """End all workers of a run, and what is wrong with the links."""
        for host in self.lab.hosts:
            run.end_processes(host)
        for host in self.lab.hosts:
            host.mend()
            host.set_loss(0)
            host.set_rate(self.rate)


def faults(options: argparse.Namespace) -> None:
    """Run every case until it has happened `--times` times; the undisturbed run, first, a few times."""
    name = f"hosts-faults-{options.hosts}"
    file = options.folder / f"{name}.json"
    results = json.loads(file.read_text()) if file.exists() else []
    cases = list(dict.fromkeys(["none", *(options.cases or CASES)]))  # which says how long a run takes
    wanted = [(case, seed) for case in cases for seed in range(min(options.times, 5 if case == "none" else 999))]
    wanted.sort(key=lambda item: (item[0] != "none", item[1]))  # so that a stopped series has all cases equally often
    missing = [item for item in wanted if not any((r["case"], r["seed"]) == item for r in results)]
    places: queue.SimpleQueue[Place] = queue.SimpleQueue()

    def run(item: tuple[str, int]) -> dict[str, Any]:
        place = places.get()
        try:
            typical = [r["seconds"] for r in results if r["case"] == "none" and r["seconds"]]
            return one(options, place, *item, statistics.median(typical) if typical else 30.0)
        finally:
            places.put(place)

    with contextlib.ExitStack() as labs:
        for _ in range(options.at_once):
            places.put(Place(labs.enter_context(Lab(options.hosts, options.rates[0])), options))
        pool = labs.enter_context(concurrent.futures.ThreadPoolExecutor(options.at_once))
        runs = [pool.submit(run, item) for item in missing]
        for done in tqdm(concurrent.futures.as_completed(runs), total=len(runs), desc="runs", unit="run"):
            result = done.result()
            results.append(result)
            write(options.folder, name, results)
            if not result["ok"]:
                tqdm.write(f"{result['case']} {result['seed']}: {result['problems']}; logs in {result['logs']}")
    show_faults(results)


def one(options: argparse.Namespace, place: Place, case: str, seed: int, typical: float) -> dict[str, Any]:
    """One run with one fault; what of it there is to tell. Logs of a run with problems are kept."""
    draw = random.Random(f"{case}-{seed}")
    after = draw.uniform(0.2, 0.6) * typical
    fault, others = CASES[case], list(range(1, options.hosts))
    victims = [0] if fault.first else sorted(draw.sample(others, fault.victims))
    folder = Path(tempfile.mkdtemp(prefix="hosts-faults-"))
    # Long enough for a worker to come back before the others have ended.
    longer = FAULT_SECONDS * bool(fault.mend) + RETURN_SECONDS[options.fork] * bool(fault.mend or fault.returns)
    steps = options.steps // 2 * (2 + math.ceil(2 * longer / typical))
    run, lab = place.start(folder, train_arguments(options, seed, steps)), place.lab
    problems, fault_at = [], 0.0
    try:
        run.wait_until(lambda: all(has_stepped(run, n) for n in range(options.hosts)), 120, "first step of all")
        begun = time.time()
        time.sleep(after)
        fault_at = time.time()
        fault.break_(run, victims)
        if fault.mend:
            time.sleep(FAULT_SECONDS)
            fault.mend(run, victims)
    except RuntimeError as error:
        problems.append(str(error)[-3000:])
    survivors = [n for n in range(options.hosts) if not (fault.lost and n in victims)]
    deadline = time.time() + (PATIENCE if not problems else 0)
    while time.time() < deadline and any(is_running(run, n) for n in survivors):
        if any(run.launchers[n].poll() for n in survivors):
            deadline = min(deadline, time.time() + LAUNCHER_PATIENCE)  # it has failed: do not wait for the others
        time.sleep(0.2)
    ended = time.time()
    while time.time() < ended + LAUNCHER_PATIENCE and any(run.launchers[n].poll() is None for n in survivors):
        time.sleep(0.2)
    codes = [launcher.poll() for launcher in run.launchers]
    notes = [run.notes(host) for host in lab.hosts]
    ends = [run.result(host) for host in lab.hosts]
    place.clear(run)
    masses = [entry["layup/mass"] for mine in notes for entry in mine if "layup/mass" in entry]
    problems += find_problems(folder, survivors, codes, ends, masses)
    pauses = [longest_pause(notes[n], fault_at) for n in survivors if n not in victims]
    evaluations = [entry for n in survivors for entry in notes[n] if entry["event"] == "evaluation"]
    same_samples = [entry["loss"] for entry in evaluations if entry["step"] == options.steps // 2 * 2]
    if not problems:
        shutil.rmtree(folder)
    return {
        "case": case,
        "seed": seed,
        "forked": options.fork,
        "ok": not problems,
        "problems": problems,
        "logs": str(folder) if problems else None,
        "victims": victims,
        "fault_after": after,
        "steps": steps,
        "seconds": max((mine[-1]["at"] for mine in notes if mine), default=0) - begun if fault_at else None,
        "exit_codes": codes,
        "launchers_waiting": sum(codes[n] is None for n in survivors),
        "masses": sorted(set(masses)),
        "longest_pause": max(pauses, default=None),
        "loss": statistics.mean(same_samples) if same_samples else None,
        "rejoined_steps": steps_after(notes[victims[0]], fault_at) if not fault.lost and case != "none" else None,
        "evaluations": sorted({(entry["step"], round(entry["loss"], 5)) for entry in evaluations}),
    }


def train_arguments(options: argparse.Namespace, seed: int, steps: int) -> list[str]:
    return [
        *worker_arguments(options, options.methods[:1]),
        *("--evaluate_at_end", "--save_at_end", "--eval_strategy=steps", "--save_strategy=steps"),
        *(f"--eval_steps={options.steps // 2}", f"--save_steps={options.steps // 2}", "--save_total_limit=1"),
        *(f"--max_steps={steps}", f"--warmup_steps={options.steps // 5}", f"--seed={seed + 1}"),
        f"--lease_seconds={options.lease_seconds}",
    ]


def has_stepped(run: HostsRun, host: int) -> bool:
    return any(entry["event"] == "step" for entry in run.notes(run.lab.hosts[host]))


def is_running(run: HostsRun, host: int) -> bool:
    """Whether a worker is still at work; not whether its launcher still waits for other launchers."""
    return run.launchers[host].poll() is None and (
        run.result(run.lab.hosts[host]) is None or run.worker(run.lab.hosts[host]) is not None
    )


def find_problems(
    folder: Path, survivors: list[int], codes: list[int | None], ends: list[Any], masses: list[float]
) -> list[str]:
    """What did not go as it should for workers that nothing has ended."""
    problems = []
    for n in survivors:
        if ends[n] is None:
            log = (folder / f"log-{n}.txt").read_text(errors="replace")
            errors = [line for line in log.splitlines() if re.match(r"(\[rank\d+\]: )?[\w.]*Error\b", line)]
            own = [line for line in errors if "ChildFailedError" not in line]  # that is the launcher's
            problems.append(f"host {n} did not finish: {own[-1][:300] if own else 'no error in its log'}")
        elif codes[n] not in (0, None):
            problems.append(f"host {n} ended with exit code {codes[n]}")
    if not any(list(folder.glob(f"model-{n}/*.safetensors")) for n in survivors):
        problems.append("no survivor has saved the model")
    digests = {f"{end['digest']:.6f}" for n, end in enumerate(ends) if end and n in survivors}
    if len(digests) > 1:
        problems.append(f"the workers ended with different models: {sorted(digests)}")
    if not masses:
        problems.append("no mass was logged")
    return problems


def longest_pause(notes: list[dict[str, Any]], since: float) -> float:
    """Seconds from one own step to the next, from shortly before the fault."""
    steps = [entry["at"] for entry in notes if entry["event"] == "step" and entry["at"] > since - 1]
    return max((b - a for a, b in itertools.pairwise(steps)), default=0.0)


def steps_after(notes: list[dict[str, Any]], fault_at: float) -> int:
    """Own steps that a worker has made from two seconds after the fault on."""
    return sum(entry["event"] == "step" and entry["at"] > fault_at + 2 for entry in notes)


def show_faults(results: list[dict[str, Any]]) -> None:
    """The table: survivors, what they waited, and what they had learnt."""
    undisturbed = [r["loss"] for r in results if r["case"] == "none" and r["loss"] is not None]
    reference = statistics.mean(undisturbed) if undisturbed else float("nan")
    heads = ["fault", "runs", "all survivors trained, evaluated, saved and ended with 0", "mass at consensus points"]
    heads += ["longest pause of a survivor, median (largest)", "held-out loss at equal samples (of undisturbed)"]
    heads += ["victim's own steps afterwards, median"]
    print(f"\n| {' | '.join(heads)} |")
    print("|---|---|---|---|---|---|---|")
    for name, case in CASES.items():
        runs = [r for r in results if r["case"] == name]
        if not runs:
            continue
        masses = sorted({mass for r in runs for mass in r["masses"]})
        pauses = [r["longest_pause"] for r in runs if r["longest_pause"] is not None]
        losses = [r["loss"] for r in runs if r["loss"] is not None]
        again = [r["rejoined_steps"] for r in runs if r["rejoined_steps"] is not None]
        loss = f"{statistics.mean(losses):.3f} ({statistics.mean(losses) / reference:.3f})" if losses else ""
        pause = f"{statistics.median(pauses):.1f} s ({max(pauses):.1f} s)" if pauses else ""
        row = [case.title, str(len(runs)), f"**{sum(r['ok'] for r in runs)} of {len(runs)}**"]
        mass = f"{masses[0]:g}" if masses[:1] == masses[-1:] else f"{masses[0]:.2f} to {masses[-1]:g}"
        row += [mass, pause, loss, f"{statistics.median(again):g}" if again else ""]
        print("| " + " | ".join(row) + " |")
    waiting = [r["launchers_waiting"] for r in results]
    if any(waiting):
        print(
            f"\nIn {sum(map(bool, waiting))} runs, launchers of survivors still waited {LAUNCHER_PATIENCE} s after the "
            "workers' end: torch's launcher waits up to 300 s for those of other machines."
        )
