"""Fine-tune a language model with TRL's SFTTrainer, by LayUp.

    accelerate launch --multi_gpu --num_processes 2 recipes/sft.py

As it is, a small GPT-2 made anew learns to write the first line of a function's docstring, from the functions of
Python's standard library. The options take a trained model, other data, LoRA, and whatever SFTConfig has.
"""

import ast
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from datasets import Dataset
from parts.corpus import from_hub, is_held_out, python_sources
from parts.model import make_config, make_model, write_sample
from parts.tokens import VOCABULARY, cache_folder, cached_tokenizer
from parts.training import USAGE, HelpFormatter, checkpoint_of, leave_together
from peft import LoraConfig
from transformers import AutoTokenizer, HfArgumentParser
from trl import SFTConfig, SFTTrainer

from layup_hf import LayupMixin, LayupOptions

# The recipe's own defaults for the training options; the command line goes before them.
DEFAULTS = {
    "output_dir": "sft-output",
    "max_length": 128,
    "per_device_train_batch_size": 16,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.2,
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "report_to": "none",
    "gradient_checkpointing": False,  # saves memory, of which a small model needs little
}


@dataclass
class LayupSFTConfig(LayupOptions, SFTConfig):
    """`SFTConfig` with the options of LayUp."""

    _argument_group_name: ClassVar[str] = "training: all of SFTConfig, and then the options of LayUp"


class LayupSFTTrainer(LayupMixin, SFTTrainer):
    """`SFTTrainer` that trains by gossip."""


@dataclass
class RecipeArguments:
    """Which model, which data, and how much of the model is trained."""

    _argument_group_name: ClassVar[str] = "model and data"
    model_name_or_path: str | None = field(default=None, metadata={"help": "Unset: a small GPT-2 made anew."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "On the Hub or a folder, in a format that SFTTrainer knows. Unset: docstrings."}
    )
    lora_rank: int | None = field(default=None, metadata={"help": "Train LoRA adapters of this rank alone."})


def docstrings(root: str, held_out: bool) -> Iterator[dict[str, str]]:
    """The first line of each documented function under `root`, and that of its docstring."""
    for path in python_sources(Path(root)):
        if is_held_out(path.relative_to(root).as_posix()) == held_out:
            source = path.read_text(encoding="utf-8", errors="replace")
            lines = source.splitlines()
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                    completion = f'    """{text.splitlines()[0]}"""'
                    yield {"prompt": f"{lines[node.lineno - 1].strip()}\n", "completion": completion}


def load_data(name: str | None) -> tuple[Dataset, Dataset]:
    """What to train on, and what is held out."""
    if name:
        return from_hub(name, None)
    root, cache = sysconfig.get_paths()["stdlib"], str(cache_folder())
    parts = ({"root": root, "held_out": held_out} for held_out in (False, True))
    train, held_out = (Dataset.from_generator(docstrings, gen_kwargs=part, cache_dir=cache) for part in parts)
    return train, held_out


def main() -> None:
    """Run the recipe with the options of the command line."""
    parser = HfArgumentParser(
        (RecipeArguments, LayupSFTConfig), usage=USAGE, description=__doc__, formatter_class=HelpFormatter
    )
    parser.set_defaults(**DEFAULTS, use_cpu=not torch.cuda.is_available(), bf16=torch.cuda.is_available())
    recipe, args = parser.parse_args_into_dataclasses()
    name, rank = recipe.model_name_or_path, recipe.lora_rank
    if not name and (recipe.dataset_name or rank):
        sys.exit("--dataset_name and --lora_rank need a trained model: name one with --model_name_or_path.")
    with args.main_process_first(desc="preparing the data"):
        train, held_out = load_data(recipe.dataset_name)
        if name:
            tokenizer = AutoTokenizer.from_pretrained(name)
        else:
            texts = Dataset.from_list([{"text": row["prompt"] + row["completion"]} for row in train])
            tokenizer = cached_tokenizer(texts, "text", VOCABULARY, cache_folder())
    trainer = LayupSFTTrainer(
        model=make_model(name, make_config(name, None, tokenizer, args.max_length), args.seed),
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM") if rank else None,
    )
    trainer.train(resume_from_checkpoint=checkpoint_of(args))
    trainer.save_model()
    loss = trainer.evaluate()["eval_loss"]
    if args.process_index == 0:
        if isinstance(prompt := held_out[0].get("prompt"), str):
            print(f"\n{write_sample(args.output_dir, prompt, args.device, args.seed)}\n")
        print(f"Held-out loss {loss:.3f}. In {args.output_dir}: the {'adapters' if rank else 'model'}.")
    leave_together(args.distributed_state)


if __name__ == "__main__":
    main()
