"""What is trained on: text, by a GPT-2 made anew, images, by a classifier made anew, or a task that others know."""

import argparse
from functools import partial

from accelerate import PartialState
from transformers import PreTrainedModel

from recipes.parts import classifier
from recipes.parts.images import ImageArguments
from recipes.parts.model import make_config, make_model
from recipes.parts.tokens import collate

from ..common.text import load_blocks
from .public import RECIPES
from .task import Task

HELD_OUT = {"blocks": 128, "images": 2000}


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


def task_of(options: argparse.Namespace, state: PartialState) -> Task:
    """The one that the options name. Collective."""
    if options.task:
        return RECIPES[options.task].make(options, state)
    return (images if options.images else text)(options, state)
