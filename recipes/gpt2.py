"""Train a GPT-2 by LayUp, on GPUs or on a few processor cores, and see what it has learnt.

    accelerate launch --multi_gpu --num_processes 2 recipes/gpt2.py

As it is, it trains a small GPT-2 on the sources of Python's standard library for two to three minutes, by Muon. The
options take it from there: another text, another model, other settings; `--trainer ddp` trains the very
same with the stock Trainer, `--optim adamw_torch_fused --learning_rate 4e-3` with AdamW, which also suits a
model that AdamW has trained before. The output folder gets the model, its tokenizer, `results.json` and
`curve.png`.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from datasets import Dataset
from parts.corpus import load_corpus
from parts.curve import TimedLog, draw_curve, write_results
from parts.model import make_config, make_model, write_sample
from parts.tokens import VOCABULARY, cache_folder, cached_tokenizer, collate, make_blocks
from parts.training import RecipeConfig, in_turn, parse_options, samples_per_step, train_and_report
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

# The recipe's own defaults for the training options; the command line goes before them.
DEFAULTS: dict[str, Any] = {
    "output_dir": "gpt2-output",
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "optim": "muon",  # ends 9 % lower than AdamW at its best rate, in 1.3 times the time
    "learning_rate": 8e-3,
    "lr_scheduler_type": "cosine",
    # Below 1 these are shares of all steps, so they hold for any length of run. A worker's own small batch makes its
    # first steps noisy: warming up over half of so short a run is what lets the rate be high (see `docs/tuning.md`).
    "warmup_steps": 0.5,
    "logging_steps": 0.02,
    "eval_steps": 0.125,
    "eval_strategy": "steps",
    "logging_first_step": True,
    "save_strategy": "no",
    "report_to": "none",
    # One worker's warnings say it all.
    "log_level_replica": "error",
    # No parameter goes unused, so DDP need not look for any.
    "ddp_find_unused_parameters": False,
}
STEPS = 1000


@dataclass
class ModelArguments:
    """Which model, which tokenizer, and who trains it."""

    _argument_group_name: ClassVar[str] = "model"
    trainer: Literal["layup", "ddp"] = field(
        default="layup", metadata={"help": "LayUp, or the stock Trainer with gradient averaging."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model to go on training. Unset: a small GPT-2 made anew."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Options of the model's configuration, as in 'n_layer=6,n_embd=256'."}
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Tokenizer. Unset: the model's; for a new model one is trained on the text."},
    )
    vocab_size: int = field(default=VOCABULARY, metadata={"help": "Entries of a tokenizer trained on the text."})
    prompt: str = field(default="def", metadata={"help": "What the sample at the end begins with."})


@dataclass
class DataArguments:
    """Which text, and how it is cut. With none named: the sources of Python's standard library."""

    _argument_group_name: ClassVar[str] = "text"
    dataset_name: str | None = field(default=None, metadata={"help": "A dataset on the Hub, or a folder with one."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    train_file: str | None = field(
        default=None, metadata={"help": "Text to train on: .txt, .md, .py, .json or .jsonl (lines), .parquet."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Held-out text. Unset: the last 5 %% of the training text."}
    )
    block_size: int = field(default=128, metadata={"help": "Tokens in a sample."})
    max_train_blocks: int | None = field(default=None, metadata={"help": "Train on so many blocks at most."})
    max_eval_blocks: int = field(default=256, metadata={"help": "Evaluate on so many blocks at most."})


def parse_arguments(arguments: Sequence[str]) -> tuple[ModelArguments, DataArguments, RecipeConfig]:
    """Read the command line. Starts the process group, so call it once."""
    return parse_options((ModelArguments, DataArguments, RecipeConfig), DEFAULTS, STEPS, arguments, __doc__)


def prepare(
    model_args: ModelArguments, data_args: DataArguments, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Dataset, Dataset]:
    """Model, tokenizer, training blocks and held-out blocks.

    Raises:
        ValueError: something in the options or in the text does not fit; the message has a remedy.
        FileNotFoundError: no such file or dataset.
    """
    corpus = load_corpus(
        dataset_name=data_args.dataset_name,
        dataset_config_name=data_args.dataset_config_name,
        train_file=data_args.train_file,
        validation_file=data_args.validation_file,
        text_column=data_args.text_column,
    )
    cache = cache_folder()
    name = model_args.tokenizer_name or model_args.model_name_or_path
    if name:
        tokenizer = AutoTokenizer.from_pretrained(name)
    else:
        tokenizer = cached_tokenizer(corpus.train, corpus.column, model_args.vocab_size, cache)
    config = make_config(model_args.model_name_or_path, model_args.config_overrides, tokenizer, data_args.block_size)
    train, held_out = (
        make_blocks(
            rows,
            corpus.column,
            tokenizer,
            corpus.rows_are_documents,
            block_size=data_args.block_size,
            most=most,
            name=which,
            cache=cache,
        )
        for rows, most, which in (
            (corpus.train, data_args.max_train_blocks, "training"),
            (corpus.held_out, data_args.max_eval_blocks, "held-out"),
        )
    )
    return make_model(model_args.model_name_or_path, config, seed), tokenizer, train, held_out


def tokens_per_step(args: TrainingArguments, block_size: int) -> int:
    """Tokens which all workers together take in one step."""
    return samples_per_step(args) * block_size


def report(
    trainer: Trainer, timed: TimedLog, final: dict[str, float], model_args: ModelArguments, block_size: int
) -> None:
    """Print what came out, and write the results and the curve into the output folder."""
    args, loss = trainer.args, final["eval_loss"]
    perplexity = math.exp(loss) if loss < 700 else math.inf
    step = tokens_per_step(args, block_size)
    results = {
        "trainer": model_args.trainer,
        "world_size": args.world_size,
        "device": args.device.type,
        "parameters": trainer.model.num_parameters(),
        "block_size": block_size,
        "steps": trainer.state.global_step,
        "tokens_per_step": step,
        "tokens_seen": trainer.state.global_step * step,
        "seconds": round(timed.seconds, 3),
        "eval_loss": loss,
        "perplexity": perplexity,
        "points": timed.points,
    }
    folder = Path(args.output_dir)
    write_results(folder / "results.json", results)
    title = f"{model_args.trainer}, {args.world_size} worker(s), {args.device.type}"
    drawn = draw_curve(timed.points, title, folder / "curve.png")
    if math.isfinite(loss):  # a diverged model has no probabilities to draw from
        print(f"\n{write_sample(folder, model_args.prompt, args.device, args.seed)}\n")
    print(f"Held-out loss {loss:.3f}, perplexity {perplexity:.1f}, after {timed.seconds:.0f} s of training.")
    print(f"In {folder}: the model, results.json" + (", curve.png" if drawn else ""))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe with these command-line arguments, those of the process by default."""
    model_args, data_args, args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    parts = in_turn(args, "the text", lambda: prepare(model_args, data_args, args.seed))
    model, tokenizer, train, held_out = parts
    step = tokens_per_step(args, data_args.block_size)
    if args.process_index == 0:
        print(
            f"{args.world_size} worker(s) on {args.device.type}, {model_args.trainer}: "
            f"{model.num_parameters() / 1e6:.1f} M parameters, {len(train):,} + {len(held_out):,} held-out blocks "
            f"of {data_args.block_size} tokens, {step:,} tokens per step.",
            flush=True,
        )
    train_and_report(
        model_args.trainer,
        args,
        partial(report, model_args=model_args, block_size=data_args.block_size),
        model=model,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=collate,
        processing_class=tokenizer,
    )


if __name__ == "__main__":
    main()
