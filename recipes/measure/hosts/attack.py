"""What somebody on the same network can do to a run who does not know its secret.

Two hosts train, and a third machine on their network tries each attack of `outsider.py` in a run of its own, or with
`--minutes` speaks at random to all that listens. A run has held if all workers ended well, at the same step as without
an attack and with one model, the mass of the push-sum is exact, nothing that the outsider sent was run, and nobody
stood still for longer than `--bound` seconds.
"""

import argparse
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layup_hf.fleet.secret import TOKEN_VARIABLE

from ..common.lab import Lab
from .faults import Place, find_problems, has_stepped, is_running, longest_pause
from .files import UNPACED, write
from .outsider import ATTACKS, MARK, SLOW
from .run import HostsRun, worker_arguments

SECRET = "a secret that the outsider does not know"
PACE = 0.05  # seconds that a step takes longer, so that a run lasts as long on any machine
DIED = "Exception in thread"  # what Python says of one
OPEN = f"{TOKEN_VARIABLE} is not set"  # what workers say of a job that everybody can join
DISTURBED = {"taken_places"}
"""Attacks on a group that forms: the last worker is stopped now and then, so that the others do without it, and groups
form while the attack goes on."""

STOPPED, GOING_ON = 8.0, 8.0  # seconds: longer than a lease, and so long that it comes back
PATIENCE = 60.0  # seconds in which nothing was noted by any worker: then a run is taken to stand still for ever


@dataclass
class Outcome:
    """What an attack has done to a run. (Steps that were not made are a problem, too, when the clock says they were.)

    Attributes:
        attack: Its name; None for a run that nobody attacks.
        has_secret: Whether the workers were given LAYUP_TOKEN.
        problems: What did not go as it should; none if the run has held.
        pause: Longest time from one own step to the next, in seconds, on any worker.
        steps: Where `global_step` ended, on each worker that came to its end.
        masses: Mass of all workers at the consensus points.
        notes: What the outsider says of itself.
        logs: Folder with the logs, of a run with problems.
    """

    attack: str | None
    has_secret: bool
    problems: list[str]
    pause: float
    steps: list[int]
    masses: list[float]
    notes: list[dict[str, Any]]
    logs: str | None


def attacked(
    place: Place,
    arguments: list[str],
    attack: str | None,
    *,
    steps: int,
    seconds: float,
    bound: float,
    has_secret: bool = True,
    seed: int = 0,
) -> Outcome:
    """One run, and one attack on it, or several.

    Args:
        place: Where.
        arguments: For the workers.
        attack: Its name, or names with a + between them, or "all"; None for none.
        steps: Of the run; with `PACE`, which ends with the attack, it is to last longer than that.
        seconds: How long the attack goes on.
        bound: Nobody may stand still for longer; seconds.
        has_secret: Whether the workers have a LAYUP_TOKEN.
        seed: Of the outsider's choices.
    """
    lab, folder = place.lab, Path(tempfile.mkdtemp(prefix="hosts-attack-"))
    common = ["--evaluate_at_end", "--save_at_end", f"--pace={PACE}", f"--max_steps={steps}", "--eval_strategy=steps"]
    common += [f"--eval_steps={max(1, steps // 4)}", "--lease_seconds=5"]
    secret = {"LAYUP_TOKEN": SECRET} if has_secret else {}
    run = place.start(folder, [*common, *arguments], secret)
    workers, problems, begun, notes = range(len(lab.hosts)), [], time.time(), []
    try:
        run.wait_until(lambda: all(has_stepped(run, n) for n in workers), 120, "first step of all")
        begun = time.time()
        if attack is not None:
            with disturbing(run) if attack in DISTURBED else contextlib.nullcontext():
                notes = strike(place, folder, run.port, attack, seconds, seed)
        (folder / UNPACED).touch()
    except RuntimeError as error:
        problems.append(str(error)[-3000:])
    while not problems and time.time() < latest(run, begun) + PATIENCE and any(is_running(run, n) for n in workers):
        time.sleep(0.5)
    time.sleep(1)
    codes, entries = [launcher.poll() for launcher in run.launchers], [run.notes(host) for host in lab.hosts]
    ends = [run.result(host) for host in lab.hosts]
    place.clear(run)
    for outsider in lab.outsiders:
        outsider.end_processes()
    masses = sorted({entry["layup/mass"] for mine in entries for entry in mine if "layup/mass" in entry})
    reached = [end["global_step"] for end in ends if end]
    is_disturbed = attack in DISTURBED
    undisturbed = entries[:-1] if is_disturbed else entries
    pause = max(longest_pause(mine, begun) for mine in undisturbed)  # of what did not end, no more is known
    problems += find_problems(folder, list(workers), codes, ends, masses)
    problems += [f"what was sent has been run: {mark.name}" for mark in sorted(folder.glob(f"{MARK}*"))]
    problems += [f"step {step} instead of {steps}" for step in reached if step != steps]
    made = sum(end["own_steps"] for end in ends if end)
    wanted = steps * len(ends)  # but for numbers that a worker has drawn ahead when the run ends; what a lost one held
    if all(ends) and abs(made - wanted) > wanted // 100 and not is_disturbed:
        problems.append(f"{made} steps were made instead of {wanted}")
    problems += [f"on host {host.index} a thread has died" for host in lab.hosts if DIED in run.log(host)]
    all_of_it = len(lab.hosts)  # less, between the loss of a worker and its return
    is_less = [mass for mass in masses if (not 0 < mass <= all_of_it if is_disturbed else mass != all_of_it)]
    problems += [f"mass {mass} instead of {all_of_it}" for mass in is_less]
    told = sum(run.log(host).count(OPEN) for host in lab.hosts)
    if told != (not has_secret):
        problems.append(f"the log says {told} times that the job is open")
    if any("nothing was merged" in run.log(host) for host in lab.hosts):
        problems.append("nothing was exchanged")
    if pause > bound:
        problems.append(f"a worker stood still for {pause:.1f} s")
    if not problems:
        shutil.rmtree(folder)
    logs = str(folder) if problems else None
    return Outcome(attack, has_secret, problems, pause, reached, masses, notes, logs)


@contextlib.contextmanager
def disturbing(run: HostsRun) -> Iterator[None]:
    """Stop the last worker, and let it go on, again and again."""
    is_over, victim = threading.Event(), run.lab.hosts[-1]

    def disturb() -> None:
        while not is_over.is_set():
            run.signal(victim, signal.SIGSTOP)
            is_over.wait(STOPPED)
            run.signal(victim, signal.SIGCONT)
            is_over.wait(GOING_ON)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def latest(run: HostsRun, begun: float) -> float:
    """When a worker has last noted anything."""
    files = [run.folder / f"notes-{host.index}.jsonl" for host in run.lab.hosts]
    return max([begun, *(file.stat().st_mtime for file in files if file.exists())])


def strike(place: Place, folder: Path, port: int, attack: str, seconds: float, seed: int) -> list[dict[str, Any]]:
    """Let the outsider attack, to its end, by all attacks if that is wanted; what it says of itself."""
    hosts = [host.address for host in place.lab.hosts]
    options = ["--hosts", *hosts, f"--port={port}", f"--folder={folder}", f"--seconds={seconds}", f"--seed={seed}"]
    # Some take long in themselves, and go on beside the others.
    turns = (
        [[name] for name in SLOW] + [[name for name in ATTACKS if name not in SLOW]]
        if attack == "all"
        else [attack.split("+")]
    )
    processes = [
        place.lab.outsiders[0].popen(
            [sys.executable, "-m", "recipes.measure.hosts.outsider", *names, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for names in turns
    ]
    outputs = [process.communicate(timeout=len(ATTACKS) * (seconds + 60))[0] for process in processes]
    notes = [json.loads(line) for output in outputs for line in output.splitlines() if line.startswith("{")]
    return sorted(notes, key=lambda note: list(ATTACKS).index(note["attack"]))


def attack(options: argparse.Namespace) -> None:
    """Every attack in a run of its own, with and without LAYUP_TOKEN; with `--minutes`, random ones for so long.

    Exit code 1 if a run has not held.
    """
    arguments = worker_arguments(options, options.methods[:1])
    outcomes: list[Outcome] = []
    with Lab(options.hosts, options.rates[0], outsiders=1) as lab:
        place = Place(lab, options)
        tried: list[tuple[str | None, float, int, bool]] = [(None, 0.0, options.steps, True)]
        if options.minutes is not None:
            seconds = 60 * options.minutes
            tried = [("fuzz", seconds, round((seconds + 10) / PACE), True)]
        else:
            names = options.cases or [name for name in ATTACKS if name != "fuzz"]
            secrets = [token == "set" for token in options.tokens]
            longer = {name: 4 if name in DISTURBED else 1 for name in names}
            tried += [
                (name, longer[name] * options.seconds, longer[name] * options.steps, secret)
                for name in names
                for secret in secrets
            ]
        for name, seconds, steps, has_secret in tried:
            how = {"steps": steps, "seconds": seconds, "bound": options.bound, "has_secret": has_secret}
            outcomes.append(attacked(place, arguments, name, **how))
            print(describe(outcomes[-1]), file=sys.stderr)
            write(options.folder, "hosts-attack", [asdict(outcome) for outcome in outcomes])
    show_attacks([asdict(outcome) for outcome in outcomes])
    if any(outcome.problems for outcome in outcomes):
        sys.exit("A run has not held.")


def describe(outcome: Outcome) -> str:
    return f"{outcome.attack} {'with' if outcome.has_secret else 'without'} LAYUP_TOKEN: " + (
        f"{'; '.join(problem[-300:] for problem in outcome.problems)} ({outcome.logs})" if outcome.problems else "held"
    )


def show_attacks(results: list[dict[str, Any]]) -> None:
    """The table."""
    print("\n| attack | LAYUP_TOKEN | longest pause | what happened |\n|---|---|---|---|")
    for result in results:
        token = "set" if result["has_secret"] else "unset"
        what = "; ".join(problem.splitlines()[-1][:160] for problem in result["problems"] if problem.strip())
        print(f"| {result['attack'] or 'none'} | {token} | {result['pause']:.1f} s | {what or 'held'} |")
