"""LayUp beside its peers: one command trains the same model on the same data with each method.

    python recipes/compare.py --quick                        about ten minutes on two cores
    python recipes/compare.py --workers 4 --steps 320        every method, every learning rate, three seeds
    python recipes/compare.py --straggler "rank=1,compute=0.3,busy=true"
    python recipes/compare.py --hosts 2 --rate 100mbit       each worker on a host of its own (see `lab.py`; needs root)
    python recipes/compare.py --images resnet                Fashion-MNIST by a small ResNet, instead of text by a GPT-2
    python recipes/compare.py show                           the table and the pictures again

Each method trains with every learning rate for the first seed, and with its best one for all seeds; with `--whole_grid`
with every learning rate for all seeds, as one seed may be lucky with a rate that is too high. Prints a Markdown table,
draws three pictures (loss over samples and over seconds; costs), and keeps all figures in `compare.json`, in
`--folder`. It is written after every run, so the same command goes on where it was stopped. A run that diverges or
fails counts as infinitely bad, and the others go on.

What the columns say:

- Loss: held out, after the same number of samples for every method. What is evaluated: LayUp, GoSGD and AD-PSGD: the
  mean of the workers by mass, which they then go on from (a consensus point); Local SGD, DiLoCo, CO2: the model that
  all workers have right after a synchronisation, which is why evaluations fall on multiples of `--period`; the others:
  the model, which is the same everywhere. The spread is the standard deviation over seeds. BatchNorm: LayUp, GoSGD
  and AD-PSGD mix its statistics as they do weights, DDP evaluates those of rank 0; with Local SGD, DiLoCo and CO2 they
  stay each worker's own, and each evaluates its part with its own. With images the share that is recognised is given.
- Seconds: of training, without the evaluations themselves. What a method needs to have one model to evaluate is
  counted.
- Bytes: sent and received by a worker, divided by its steps. With `--hosts` counted on the worker's interface, with
  all that crosses it. On one host, where a method all-reduces: what that takes in a ring, `4 (M - 1) / M` of what is
  reduced (see `ring_bytes`); where it gossips: twice the bytes that a worker has read of its peers, as what one reads
  another sends (on one host it is read in place). Consensus points, the clock and small messages are left out.
- Peak memory: see `bench_worker.PeakMemory`; of a short run of its own, without evaluation.
- Waiting: share of the time in which the training thread slept, neither running nor waiting for a core (Linux
  schedstat): for a message, for another worker, for a lock. Mean over workers. Delays that sleep count, so give a
  straggler `busy=true`. Not on a GPU, where the thread also sleeps while the device computes.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from compare_report import NAMES, Run, best_rate, draw, table
from curve import write_results
from lab import Lab
from tqdm import tqdm

HERE = Path(__file__).parent
WORKER = HERE / "compare_worker.py"
PATIENCE = 600  # seconds without a sign of progress, after which a run counts as failed
QUICK = {
    "methods": list(NAMES),
    "learning_rates": [4e-3, 1.6e-2],
    "seeds": [1],
    "steps": 64,
    "evaluations": 4,
}
DEFAULTS = {
    "methods": list(NAMES),
    "learning_rates": [1e-3, 2e-3, 4e-3, 8e-3],
    "seeds": [1, 2, 3],
    "steps": 240,
    "evaluations": 10,
}
# Of what is learnt from.
TEXT = {"block_size": 128, "vocab_size": 512, "config_overrides": ""}
QUICK_TEXT = {**TEXT, "block_size": 64, "config_overrides": "n_layer=2,n_embd=64,n_head=2"}
OF_TEXT, OF_IMAGES = ("block_size", "vocab_size", "train_file"), ("dataset_name",)


# ---- What is to be run ----


def wanted(settings: dict[str, Any], methods: list[str], runs: list[Run]) -> list[Run]:
    """The runs that can be named by now and have not been made: the grid, then the other seeds at the best rate."""
    first, *others = settings["seeds"]
    done = [key_of(run) for run in runs]
    wants: list[Run] = []
    for method in methods:
        grid_seeds = settings["seeds"] if settings.get("whole_grid") else [first]
        mine = [make_run(method, rate, seed) for rate in settings["learning_rates"] for seed in grid_seeds]
        mine += [make_run(method, settings["learning_rates"][0], first, memory=True)]
        best = best_rate(runs, method, first)
        if best is not None and all(run in done for run in mine):
            mine += [make_run(method, best, seed) for seed in others]
        wants += [run for run in mine if run not in done]
    # Methods take turns, so that what else the machine does in the course of time falls on all of them.
    return sorted(wants, key=lambda run: (run["memory"], run["seed"], run["learning_rate"]))


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
            if set(differing) - {"learning_rates", "seeds", "whole_grid"}:  # of these there may be more than before
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
        whole = 1 + (rates * seeds if self.settings.get("whole_grid") else rates + seeds - 1)  # with one for memory
        with tqdm(total=len(self.methods) * whole, bar_format=form) as bar:
            while runs := wanted(self.settings, self.methods, self.results()["runs"]):
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

    def _tell(self, bar: tqdm, share: float) -> None:
        """Say what has been made since the last call, and move the bar.

        Args:
            share: Of the present run, that is done.
        """
        runs = self.results()["runs"]
        for run in runs[self._told :]:
            tqdm.write(describe(run))
        self._told = len(runs)
        bar.n = sum(run["method"] in self.methods for run in runs) + share
        bar.refresh()

    def _launch(self, runs: list[Run], processes: int, bar: tqdm) -> str:
        """Start the workers and wait for them; what they said at their end, if they failed."""
        progress, log = self.folder / "progress.json", self.folder / "log.txt"
        progress.unlink(missing_ok=True)
        arguments = [f"--folder={self.folder.resolve()}", f"--settings={json.dumps(self.settings)}"]
        with self._started([*arguments, f"--runs={json.dumps(runs)}"], processes, log) as launchers:
            seen, since = "", time.monotonic()
            while any(launcher.poll() is None for launcher in launchers):
                if any(launcher.poll() for launcher in launchers):
                    break  # one has failed, and the others would wait for it
                time.sleep(0.3)
                now = progress.read_text() if progress.exists() else ""
                if now != seen:
                    seen, since = now, time.monotonic()
                    self._tell(bar, json.loads(now)["share"])
                if time.monotonic() - since > PATIENCE:
                    return f"nothing happened for {PATIENCE} s"
            failed = any(launcher.poll() != 0 for launcher in launchers)
        return last_error(log.read_text(errors="replace")) if failed else ""

    @contextlib.contextmanager
    def _started(self, arguments: list[str], processes: int, log: Path) -> Iterator[list[subprocess.Popen]]:
        """The launcher of the workers, or one on each host; ended at the end."""
        with contextlib.ExitStack() as stack:
            output: dict[str, Any] = {"stdout": stack.enter_context(log.open("w")), "stderr": subprocess.STDOUT}
            if self.settings["hosts"] and processes > 1:
                lab = stack.enter_context(Lab(processes, self.settings["rate"]))
                yield lab.launch(str(WORKER), arguments, **output)
                return
            several = ["--multi_gpu", "--main_process_port=0"] if processes > 1 else []
            command = [sys.executable, "-m", "accelerate.commands.launch", *several, f"--num_processes={processes}"]
            environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
            command += [str(WORKER), *arguments]
            launcher = subprocess.Popen(command, env=environment, start_new_session=True, **output)
            try:
                yield [launcher]
            finally:
                launcher.terminate()  # it then ends its workers, if there are any left
                launcher.wait()


def last_error(output: str) -> str:
    """The end of what failed workers wrote, with the error itself as the last line."""
    lines = [line for line in output[-20000:].splitlines() if line.strip()]
    errors = [line for line in lines if ("Error" in line or "Failure" in line) and "ChildFailedError" not in line]
    return "\n".join([*lines[-40:], *errors[:1]])


def describe(run: Run) -> str:
    about = f"{run['method']} {run['learning_rate']:g} seed {run['seed']}"
    if run["failure"] is not None:
        return f"{about}: {run['failure'].splitlines()[-1]}"
    if run["memory"]:
        return f"{about}: {run['peak_bytes'] / 2**20:.1f} MiB"
    return f"{about}: loss {run['loss']:.4f} in {run['seconds']:.1f} s, waiting {run['waiting'] or 0:.2f}"


# ---- The command line ----


def show(folder: Path) -> None:
    """The table, also as `compare.md`, and the pictures."""
    results = json.loads((folder / "compare.json").read_text())
    text = table(results)
    (folder / "compare.md").write_text(text + "\n")
    print(f"\n{text}\n")
    draw(results, folder)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and so end the workers, too
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run", "show"], default="run")
    parser.add_argument("--quick", action="store_true", help="a tiny model, few steps, two learning rates, one seed")
    parser.add_argument("--methods", nargs="+", choices=list(NAMES), help="of those of the table; all by default")
    parser.add_argument("--learning_rates", type=float, nargs="+", help="the grid")
    parser.add_argument("--seeds", type=int, nargs="+", help="of model and data; the grid is for the first")
    parser.add_argument("--whole_grid", action="store_true", help="for all seeds; the best rate is then the mean's")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, help="of every worker on average; a few more if evaluations need it")
    parser.add_argument("--evaluations", type=int)
    parser.add_argument("--period", type=int, default=8, help="local steps of Local SGD, DiLoCo and CO2")
    parser.add_argument("--batch_size", type=int, default=8, help="samples of a worker in a step")
    parser.add_argument("--block_size", type=int, help="tokens of a sample")
    parser.add_argument("--vocab_size", type=int, help="512 by default")
    parser.add_argument("--train_file", help="text; the sources of Python's standard library by default")
    parser.add_argument("--images", choices=["resnet", "vit"], help="learn images instead of text, by this model")
    parser.add_argument("--dataset_name", help="images, as in vision.py; Fashion-MNIST by default")
    parser.add_argument("--config_overrides", help="of the model, as in the recipes")
    parser.add_argument("--lr_scheduler_type", choices=["cosine", "constant_with_warmup"], default="cosine")
    parser.add_argument("--warmup", type=float, default=0.5, help="share of the steps, below 1")
    parser.add_argument("--straggler", help="delays, such as 'rank=1,compute=0.3,busy=true'; not of one process")
    parser.add_argument("--hosts", type=int, help="each worker on a host of its own, so many")
    parser.add_argument("--rate", default="1gbit", help="of the hosts' links")
    parser.add_argument("--folder", type=Path, help="bench-output/compare by default, or bench-output/compare-quick")
    options = parser.parse_args()
    of_text = ("text", OF_IMAGES, "name a model with --images")
    kind, others, remedy = ("images", OF_TEXT, "leave out --images") if options.images else of_text
    for name in others:
        if getattr(options, name) is not None:
            parser.error(f"--{name} is of no use for {kind}: leave it out, or {remedy}")
    folder = Path("bench-output", "compare-quick" if options.quick else "compare")
    task = {"config_overrides": ""} if options.images else QUICK_TEXT if options.quick else TEXT
    for name, value in {"folder": folder, **task, **(QUICK if options.quick else DEFAULTS)}.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if not 0 <= options.warmup < 1:
        parser.error(f"--warmup {options.warmup}: a share of the steps, from 0 to below 1")
    options.workers = options.hosts or options.workers
    if options.workers < 2:
        parser.error("a comparison needs two workers or more")
    options.train_file = options.train_file and str(Path(options.train_file).resolve())
    options.steps = steps_for(options.steps, options.evaluations, options.period)
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.what == "run":
        outside = ("what", "quick", "methods", "folder")
        settings = {name: value for name, value in vars(options).items() if name not in outside}
        Comparison(settings, [name for name in NAMES if name in options.methods], options.folder).run()
    show(options.folder)


if __name__ == "__main__":
    main()
