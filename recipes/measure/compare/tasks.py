"""What is trained on: text, by a GPT-2 made anew, or images, by a classifier made anew."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel

from recipes.parts import classifier
from recipes.parts.images import ImageArguments
from recipes.parts.model import make_config, make_model
from recipes.parts.tokens import collate

from ..common.text import load_blocks

HELD_OUT = {"blocks": 128, "images": 2000}


@dataclass(frozen=True)
class Task:
    """Data, and a model for it.

    Attributes:
        train, held_out: Rows.
        make_model: Makes the model anew from a seed, equal on every worker.
        trainer: What the Trainer has to know besides.
        arguments: Likewise of `LayupConfig`.
    """

    train: Dataset
    held_out: Dataset
    make_model: Callable[[int], PreTrainedModel]
    trainer: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)


def text(options: argparse.Namespace, state: PartialState) -> Task:
    """Blocks of a text, as many as the steps take, and others from all over it to evaluate on. Collective."""
    count = options.steps * options.workers * options.batch_size + HELD_OUT["blocks"]
    tokenizer, blocks = load_blocks(state, options.block_size, count, options.vocab_size, options.train_file)
    chosen = {number * len(blocks) // HELD_OUT["blocks"] for number in range(HELD_OUT["blocks"])}
    train = blocks.select([number for number in range(len(blocks)) if number not in chosen])
    config = make_config(None, options.config_overrides, tokenizer, options.block_size)
    return Task(train, blocks.select(sorted(chosen)), partial(make_model, None, config), {"data_collator": collate})


def images(options: argparse.Namespace, state: PartialState) -> Task:
    """Images as `recipes/vision.py` takes them: all to train on, and some that are held out. Collective."""
    chosen = classifier.ClassifierArguments(model=options.images, config_overrides=options.config_overrides)
    data = ImageArguments(dataset_name=options.dataset_name, max_eval_samples=HELD_OUT["images"])
    with state.main_process_first():
        model, _, train, held_out = classifier.prepare(chosen, data, seed=0)
    classes = list(model.config.id2label.values())
    accuracy = {"compute_metrics": classifier.accuracy, "preprocess_logits_for_metrics": classifier.most_likely}

    def new_model(seed: int) -> PreTrainedModel:
        return classifier.make_model(chosen, classes, seed)[0]

    return Task(train, held_out, new_model, accuracy, classifier.TRAINING)
