"""LayUp beside its peers: one command trains the same model on the same data with each method.

    python -m recipes.measure.compare --quick                   about ten minutes on two cores
    python -m recipes.measure.compare --workers 4 --steps 320   every method, every learning rate, three seeds
    python -m recipes.measure.compare --straggler "rank=1,compute=0.3,busy=true"
    python -m recipes.measure.compare --hosts 2 --rate 100mbit  each worker on a host of its own (needs root)
    python -m recipes.measure.compare --images resnet           Fashion-MNIST by a small ResNet, not text by a GPT-2
    python -m recipes.measure.compare --task shakespeare        nanoGPT's recipe for characters on Shakespeare's plays
    python -m recipes.measure.compare --task gpt-neo            TinyStories' GPT-Neo on the Linux kernel's documentation
    python -m recipes.measure.compare show                      the table and the pictures again

Each method trains with every learning rate for the first seed, and with its best one for all seeds; with `--whole_grid`
with every learning rate for all seeds, as one seed may be lucky with a rate that is too high. A rate at the edge of the
grid is not called the best; `--widen 2` tries up to two more beyond it. Prints Markdown tables, draws three pictures
(loss over samples and over seconds; costs), and keeps all figures in `compare.json`, in `--folder`. It is written after
every run, so the same command goes on where it was stopped, and repeats what was begun. A run that diverges or fails
counts as infinitely bad, and the others go on.

The second table sets LayUp beside each other method, seed by seed: see `significance.py`. It takes six seeds to show a
difference.

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
- Peak memory: see `PeakMemory` in `recipes/measure/common/meters.py`; of a short run of its own, without evaluation.
- Waiting: share of the time in which the training thread slept, neither running nor waiting for a core (Linux
  schedstat): for a message, for another worker, for a lock. Mean over workers. Delays that sleep count, so give a
  straggler `busy=true`. Not on a GPU, where the thread also sleeps while the device computes.
"""

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

from ..common.command import command_line
from .comparison import Comparison, steps_for
from .decent import PACKAGE, is_installed
from .drawing import draw
from .public import RECIPES
from .report import NAMES, table

DEFAULTS = {
    "methods": [name for name in NAMES if name != "decent-dp" or is_installed()],
    "learning_rates": [1e-3, 2e-3, 4e-3, 8e-3],
    "seeds": [1, 2, 3],
    "steps": 240,
    "evaluations": 10,
    "batch_size": 8,
    "lr_scheduler_type": "cosine",
    "warmup": 0.5,
    "config_overrides": "",
}
QUICK = {"learning_rates": [4e-3, 1.6e-2], "seeds": [1], "steps": 64, "evaluations": 4}
# Of what is learnt from.
TEXT = {"block_size": 128, "vocab_size": 512}
QUICK_TEXT = {"block_size": 64, "vocab_size": 512, "config_overrides": "n_layer=2,n_embd=64,n_head=2"}
OF_TEXT, OF_IMAGES = ("block_size", "vocab_size", "train_file"), ("dataset_name",)
OF_MODELS, OF_TASKS = ("images", "config_overrides", "quick", "lr_scheduler_type", "warmup"), ("texts",)


def defaults_of(options: argparse.Namespace) -> dict[str, Any]:
    """What options are unless they are given.

    Raises:
        ValueError: One is given that belongs to another kind of data.
    """
    if options.task:
        kind, others, remedy = f"--task {options.task}", (*OF_TEXT, *OF_IMAGES, *OF_MODELS), "leave out --task"
    elif options.images:
        kind, others, remedy = "images", (*OF_TEXT, *OF_TASKS), "leave out --images"
    else:
        kind, others, remedy = "text", OF_IMAGES, "name a model with --images"
        if options.texts is not None:
            raise ValueError("--texts is of no use without a --task: leave it out, or name one.")
    for name in others:
        if getattr(options, name) not in (None, False):
            raise ValueError(f"--{name} is of no use for {kind}: leave it out, or {remedy}")
    if options.task:
        recipe = RECIPES[options.task]
        return {
            **DEFAULTS,
            "folder": Path("bench-output", f"compare-{options.task}"),
            **recipe.fixed,
            **recipe.defaults,
        }
    folder = Path("bench-output", "compare-quick" if options.quick else "compare")
    of_text = {} if options.images else QUICK_TEXT if options.quick else TEXT
    return {**DEFAULTS, "folder": folder, **of_text, **(QUICK if options.quick else {})}


def show(folder: Path) -> None:
    """The table, also as `compare.md`, and the pictures."""
    results = json.loads((folder / "compare.json").read_text())
    text = table(results)
    (folder / "compare.md").write_text(text + "\n")
    print(f"\n{text}\n")
    draw(results, folder)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and so end the workers, too
    parser = command_line("recipes.measure.compare", __doc__)
    parser.add_argument("what", nargs="?", choices=["run", "show"], default="run")
    parser.add_argument("--quick", action="store_true", help="a tiny model, few steps, two learning rates, one seed")
    parser.add_argument(
        "--methods", nargs="+", choices=list(NAMES), help="of those of the table; all that are installed by default"
    )
    parser.add_argument("--learning_rates", type=float, nargs="+", help="the grid")
    parser.add_argument("--widen", type=int, help="so many rates more at most, beyond a best one at the grid's edge")
    parser.add_argument("--seeds", type=int, nargs="+", help="of model and data; the grid is for the first")
    parser.add_argument("--whole_grid", action="store_true", help="for all seeds; the best rate is then the mean's")
    parser.add_argument(
        "--memory", action=argparse.BooleanOptionalAction, default=True, help="a short run more of each, for its peak"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, help="of every worker on average; a few more if evaluations need it")
    parser.add_argument("--evaluations", type=int)
    parser.add_argument("--period", type=int, default=8, help="local steps of Local SGD, DiLoCo and CO2")
    parser.add_argument("--batch_size", type=int, help="samples of a worker in a step")
    parser.add_argument("--block_size", type=int, help="tokens of a sample")
    parser.add_argument("--vocab_size", type=int, help="512 by default")
    parser.add_argument("--train_file", help="text; the sources of Python's standard library by default")
    parser.add_argument("--task", choices=list(RECIPES), help="learn this instead, as it is published")
    parser.add_argument("--texts", help="folder of its texts, where their package is not installed")
    parser.add_argument("--images", choices=["resnet", "vit"], help="learn images instead of text, by this model")
    parser.add_argument("--dataset_name", help="images, as in vision.py; Fashion-MNIST by default")
    parser.add_argument("--config_overrides", help="of the model, as in the recipes")
    parser.add_argument("--lr_scheduler_type", choices=["cosine", "constant_with_warmup"])
    parser.add_argument("--warmup", type=float, help="share of the steps, below 1; half by default")
    parser.add_argument("--straggler", help="delays, such as 'rank=1,compute=0.3,busy=true'; not of one process")
    parser.add_argument("--hosts", type=int, help="each worker on a host of its own, so many")
    parser.add_argument("--rate", default="1gbit", help="of the hosts' links")
    parser.add_argument("--folder", type=Path, help="bench-output/compare by default, with -quick or the task")
    options = parser.parse_args()
    try:
        defaults = defaults_of(options)
    except ValueError as error:
        parser.error(str(error))
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if not 0 <= options.warmup < 1:
        parser.error(f"--warmup {options.warmup}: a share of the steps, from 0 to below 1")
    if options.what == "run" and "decent-dp" in options.methods and not is_installed():
        parser.error(f"Decent-DP is not installed: {PACKAGE}, or leave it out of --methods")
    options.workers = options.hosts or options.workers
    if options.widen and len(set(options.learning_rates)) < 2:
        parser.error("--widen goes on as the grid does: give --learning_rates two rates or more")
    if options.workers < 2:
        parser.error("a comparison needs two workers or more")
    for name in ("train_file", "texts"):
        path = getattr(options, name)
        setattr(options, name, path and str(Path(path).resolve()))
    options.steps = steps_for(options.steps, options.evaluations, options.period)
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.what == "run":
        outside = ("what", "quick", "methods", "folder")
        settings = {name: value for name, value in vars(options).items() if name not in outside}
        Comparison(settings, [name for name in NAMES if name in options.methods], options.folder).run()
    show(options.folder)


if __name__ == "__main__":
    main()
