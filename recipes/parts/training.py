"""What recipes share: reading the options, and a training by LayUp or by the stock Trainer from start to end."""

import time
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import datasets
import torch
from accelerate import PartialState
from transformers import HfArgumentParser, Trainer, TrainingArguments

from layup_hf import LayupConfig, LayupTrainer, MuonMixin, StragglerCallback

from .curve import TimedLog

T = TypeVar("T")
MOMENT = 0.2  # seconds
USAGE = "accelerate launch --multi_gpu --num_processes N %(prog)s [options]"


class DdpTrainer(MuonMixin, Trainer):
    """The stock Trainer, that knows `optim="muon"` as `LayupTrainer` does."""


@dataclass
class RecipeConfig(LayupConfig):
    """`LayupConfig`, as a group of its own in `--help`."""

    _argument_group_name: ClassVar[str] = "training: all of TrainingArguments, and then the options of LayUp"


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it is written."""


def parse_options(
    kinds: Sequence[type], defaults: dict[str, Any], steps: int, arguments: Sequence[str], description: str | None
) -> Any:
    """One object of each of the `kinds` (dataclasses, the training arguments last) from the command line.

    Starts the process group, so call it once.

    Args:
        kinds: dataclasses whose fields are the options.
        defaults: of the recipe; the command line goes before them.
        steps: how many to make, unless steps or epochs were asked for.
        arguments: the command line.
        description: of the recipe, for `--help`.
    """
    parser = HfArgumentParser(kinds, usage=USAGE, description=description, formatter_class=HelpFormatter)
    # The process group starts with the training arguments, so the choice of device has to come first.
    parser.set_defaults(**defaults, use_cpu=not torch.cuda.is_available(), num_train_epochs=None)
    if parser.parse_known_args(arguments)[0].num_train_epochs is None:
        # Steps outrank epochs in the Trainer: only count them if epochs were not asked for.
        parser.set_defaults(max_steps=steps, num_train_epochs=1.0)
    return parser.parse_args_into_dataclasses(arguments)


def checkpoint_of(args: TrainingArguments) -> str | bool | None:
    """What `--resume_from_checkpoint` names; `True` means the last one in the output folder, as in `train()`."""
    given = args.resume_from_checkpoint
    known = {"true": True, "false": None, "none": None}
    return known.get(given.lower(), given) if isinstance(given, str) else given


def in_turn(args: LayupConfig, what: str, prepare: Callable[[], T]) -> T:
    """Call `prepare` on the first worker, which fills the caches, and then on the others, which say nothing."""
    if args.process_index != 0:
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity_error()
    with args.main_process_first(desc=f"preparing {what}"):
        return prepare()


def samples_per_step(args: TrainingArguments) -> int:
    """Samples which all workers together take in one step."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def train_and_report(
    trainer: Literal["layup", "ddp"],
    args: LayupConfig,
    report: Callable[[Trainer, TimedLog, dict[str, float]], None],
    **parts: Any,
) -> None:
    """Train, save and evaluate; the first worker reports; and all leave together.

    Args:
        trainer: LayUp, or the stock Trainer with gradient averaging.
        args: of both.
        report: called on the first worker with the trainer, the times of its log entries and the final metrics.
        parts: model, data and whatever else the trainer takes.
    """
    timed = TimedLog()
    callbacks = [timed]
    if args.straggler and trainer == "ddp":
        callbacks.append(StragglerCallback(args.straggler))  # which LayupTrainer adds itself
    chosen = {"layup": LayupTrainer, "ddp": DdpTrainer}[trainer](args=args, callbacks=callbacks, **parts)
    chosen.train(resume_from_checkpoint=checkpoint_of(args))
    chosen.save_model()
    final = chosen.evaluate()
    if args.process_index == 0:
        report(chosen, timed, final)
    if args.push_to_hub:
        chosen.push_to_hub()
    leave_together(args.distributed_state)


def leave_together(state: PartialState) -> None:
    """End the process group when all workers have done everything. Collective."""
    state.wait_for_everyone()
    leave(state)


def leave(state: PartialState) -> None:
    """End the process group, for this worker.

    Not right after a collective operation: DDP waits, when it ends, with the interpreter's lock for gloo's threads, and
    these need it to let go of what the operation used. On a busy machine that was a deadlock now and then.
    """
    time.sleep(MOMENT)
    state.destroy_process_group()
