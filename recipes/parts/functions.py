"""Small functions of Python's standard library: a model that has read them, prompts, a reward that needs no judge."""

import ast
import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import LlamaConfig, PreTrainedTokenizerFast

from layup_hf import LayupConfig, LayupTrainer

from .corpus import is_held_out, python_sources
from .model import make_model
from .tokens import VOCABULARY, cache_folder, cached_tokenizer, collate, corpus_key, make_blocks

LONGEST = 240  # characters of a function
# Positions by rotation: TRL pads prompts on the left, which learnt positions would take for text.
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
PRETRAINING: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "learning_rate": 4e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.3,
    "logging_steps": 0.1,
    "save_strategy": "no",
    "report_to": "none",
    "log_level_replica": "error",
}
BLOCK = 128


@dataclass(frozen=True)
class Functions:
    """What there is to learn from.

    Attributes:
        train, held_out: Rows with a function's whole text in `text`, and its first line in `prompt`.
        tokenizer: Trained on the text.
    """

    train: Dataset
    held_out: Dataset
    tokenizer: PreTrainedTokenizerFast


def functions(root: str, held_out: bool) -> Iterator[dict[str, str]]:
    """Functions under `root` with an argument and without their docstrings, as `ast.unparse` writes them."""
    for path in python_sources(Path(root)):
        if is_held_out(path.relative_to(root).as_posix()) != held_out:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, ast.FunctionDef) and arguments_of(node):
                node.decorator_list = []
                node.body = node.body[ast.get_docstring(node) is not None :] or [ast.Pass()]
                text = ast.unparse(node)
                if len(text) <= LONGEST:
                    yield {"text": text, "prompt": text.partition("\n")[0]}


def arguments_of(node: ast.FunctionDef) -> set[str]:
    """The names of a function's arguments, `self` among them."""
    taken = node.args
    every = [*taken.posonlyargs, *taken.args, *taken.kwonlyargs, *filter(None, (taken.vararg, taken.kwarg))]
    return {argument.arg for argument in every}


def load_functions() -> Functions:
    """Those of the standard library, and a tokenizer, from the cache if they have been made before."""
    root, cache = sysconfig.get_paths()["stdlib"], cache_folder()
    train, held_out = (
        Dataset.from_generator(functions, gen_kwargs={"root": root, "held_out": part}, cache_dir=str(cache))
        for part in (False, True)
    )
    return Functions(train, held_out, cached_tokenizer(train, "text", VOCABULARY, cache))


def pretrained(data: Functions, steps: int, args: LayupConfig) -> str:
    """A folder with a small model that has read the functions, made by LayUp if it is not in the cache. Collective.

    Args:
        data: To read.
        steps: In how many it is read.
        args: Of the training that is to come: its seed and device.
    """
    texts = corpus_key(data.train["text"], VOCABULARY)
    key = json.dumps([SMALL, PRETRAINING, BLOCK, steps, args.seed, args.world_size, texts])
    folder = cache_folder() / f"functions-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if (folder / "config.json").is_file():
        return str(folder)
    with args.main_process_first(desc="packing the functions"):
        cut = {"block_size": BLOCK, "most": None, "name": "functions", "cache": cache_folder()}
        blocks = make_blocks(data.train, "text", data.tokenizer, True, **cut)
    ending = data.tokenizer.eos_token_id
    config = LlamaConfig(**SMALL, vocab_size=len(data.tokenizer), bos_token_id=ending, eos_token_id=ending)
    unfinished = folder.with_suffix(".part")
    trainer = LayupTrainer(
        model=make_model(None, config, args.seed),
        args=LayupConfig(
            str(unfinished), max_steps=steps, seed=args.seed, use_cpu=args.use_cpu, bf16=args.bf16, **PRETRAINING
        ),
        train_dataset=blocks,
        data_collator=collate,
        processing_class=data.tokenizer,
    )
    trainer.train()
    trainer.save_model()
    if args.process_index == 0:
        unfinished.rename(folder)  # appears whole or not at all
    args.distributed_state.wait_for_everyone()
    return str(folder)


# ---- The reward ----

STATEMENTS = 4
"""That a function has which earns all of the reward."""


def reward_of(end: int) -> Callable[..., list[float]]:
    """A reward function as TRL calls it: for a function that is finished and that Python can parse, by how many
    different statements it has; for any other 0.

    Args:
        end: The token that a completion must end with.
    """

    def different_statements(
        prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **others: Any
    ) -> list[float]:
        return [
            share_written(prompt + completion) if tokens and tokens[-1] == end else 0.0
            for prompt, completion, tokens in zip(prompts, completions, completion_ids, strict=True)
        ]

    return different_statements


def share_written(text: str) -> float:
    """How many different statements a function has, `pass` aside, out of `STATEMENTS`; at most 1, and 0 if the text is
    not one function that can be parsed.
    """
    try:
        nodes = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return 0.0
    if len(nodes) != 1 or not isinstance(nodes[0], ast.FunctionDef):
        return 0.0
    inside = (part for part in ast.walk(nodes[0]) if isinstance(part, ast.stmt) and part is not nodes[0])
    different = {ast.dump(part) for part in inside if not isinstance(part, ast.Pass)}
    return min(len(different) / STATEMENTS, 1.0)
