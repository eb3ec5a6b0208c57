"""Train an image classifier by LayUp, on GPUs or on a few processor cores, and see how often it is right.

    accelerate launch --multi_gpu --num_processes 2 recipes/vision.py

As it is, it trains a small ResNet on Fashion-MNIST for two to three minutes. The options take a ViT, any trained
image classifier, other images; ``--trainer ddp`` trains the very same with the stock Trainer. The output folder
gets the model, its image processor, ``results.json`` and ``curve.png``.

BatchNorm: in training each worker normalises by its own batch, as with DDP. With LayUp the running mean and variance
belong to the layer's block: a merge mixes them with a peer's by the same weight as the parameters, and a consensus
point gives every worker the mass-weighted mean, which is what is evaluated and saved. (DDP takes those of rank 0.) The
variance is a mean of the workers' variances, without that between their means, which is small where all draw from the
same data. ``num_batches_tracked`` is a count that this BatchNorm does not use, and stays each worker's own.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from curve import TimedLog, draw_curve, write_results
from datasets import Dataset
from images import ImageArguments, Pixels, find_classes, load_images
from model import apply_overrides
from torch import Tensor
from training import in_turn, parse_options, samples_per_step, train_and_report
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    EvalPrediction,
    PreTrainedModel,
    ResNetConfig,
    Trainer,
    ViTConfig,
    ViTImageProcessorPil,
    set_seed,
)

from layup_hf import LayupConfig

# The recipe's own defaults for the training options; the command line goes before them.
DEFAULTS: dict[str, Any] = {
    "output_dir": "vision-output",
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 128,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    # Below 1 these are shares of all steps, so they hold for any length of run.
    "warmup_steps": 0.2,
    "logging_steps": 0.02,
    "eval_steps": 0.25,
    "eval_strategy": "steps",
    "logging_first_step": True,
    "save_strategy": "no",
    "report_to": "none",
    # The columns are read by what makes pixels of them, not by the model.
    "remove_unused_columns": False,
    # One worker's warnings say it all.
    "log_level_replica": "error",
    # No parameter goes unused, so DDP need not look for any.
    "ddp_find_unused_parameters": False,
    # With it, the stock Trainer multiplies the loss by the number of workers, even where the model does not divide it
    # by the items of all (ResNet).
    "average_tokens_across_devices": False,
}
STEPS = 1500
IMAGE_SIZE = 28
PATCH_SIZE = 4  # of the new ViT


@dataclass
class ModelArguments:
    """Which model, and who trains it. With none named: a small ResNet."""

    trainer: Literal["layup", "ddp"] = field(
        default="layup", metadata={"help": "LayUp, or the stock Trainer with gradient averaging."}
    )
    model: Literal["resnet", "vit"] = field(default="resnet", metadata={"help": "The small model to make anew."})
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Image classifier to go on training; it gets a new head if its classes are not as many."},
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Options of the model's configuration, as in 'num_hidden_layers=6'."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": f"Height and width in pixels that a new model reads. Unset: {IMAGE_SIZE}."}
    )


def parse_arguments(arguments: Sequence[str]) -> tuple[ModelArguments, ImageArguments, LayupConfig]:
    """Read the command line. Starts the process group, so call it once."""
    return parse_options((ModelArguments, ImageArguments, LayupConfig), DEFAULTS, STEPS, arguments)


def make_model(options: ModelArguments, names: Sequence[str], seed: int) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A classifier for these classes, equal on every worker for an equal seed, and its image processor.

    Raises:
        ValueError: the options contradict each other, or the model does not read what the processor makes.
        FileNotFoundError: no such model, or it has no image processor.
    """
    set_seed(seed)
    name = options.model_name_or_path
    size = IMAGE_SIZE if options.image_size is None else options.image_size
    classes = {"id2label": dict(enumerate(names)), "label2id": {each: number for number, each in enumerate(names)}}
    if name:
        if options.image_size is not None:
            raise ValueError(f"The image processor of {name} has a size of its own: leave out --image_size.")
        try:
            processor, config = AutoImageProcessor.from_pretrained(name), AutoConfig.from_pretrained(name, **classes)
        except OSError as error:
            raise FileNotFoundError(
                f"'{name}' is no model with an image processor: give --model_name_or_path an image classifier from the "
                "Hub or a folder with config.json and preprocessor_config.json, or leave it out to make a model anew."
            ) from error
    elif options.model == "vit":
        if size % PATCH_SIZE:
            raise ValueError(f"--image_size {size} is not a multiple of the ViT's patches of {PATCH_SIZE} pixels.")
        shape = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
        config = ViTConfig(image_size=size, patch_size=PATCH_SIZE, **shape, **classes)
    else:
        config = ResNetConfig(
            embedding_size=16, hidden_sizes=[16, 32, 64], depths=[2, 2, 2], layer_type="basic", **classes
        )
    apply_overrides(config, options.config_overrides or "")
    if name:
        # Master weights in float32 whatever the checkpoint was saved in; --bf16 then autocasts.
        model = AutoModelForImageClassification.from_pretrained(
            name, config=config, dtype=torch.float32, ignore_mismatched_sizes=True
        )
    else:
        model = AutoModelForImageClassification.from_config(config)
        processor = ViTImageProcessorPil(size={"height": size, "width": size})
    check_fit(model, processor)
    return model, processor


@torch.no_grad()
def check_fit(model: PreTrainedModel, processor: BaseImageProcessor) -> None:
    """Let the model read one image of its processor.

    Raises:
        ValueError: it cannot.
    """
    training = model.training
    try:
        model.eval()(**processor(np.zeros((64, 64, 3), np.uint8), return_tensors="pt"))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"The model does not read RGB images of the size that its image processor makes ({error}): choose another "
            "--image_size for a new model, or a model whose image processor belongs to it."
        ) from error
    model.train(training)


def prepare(
    model_args: ModelArguments, image_args: ImageArguments, seed: int
) -> tuple[PreTrainedModel, BaseImageProcessor, Dataset, Dataset]:
    """Model, image processor, training data and held-out data.

    Raises:
        ValueError: something in the options or in the data does not fit; the message has a remedy.
        FileNotFoundError: no such data set or model.
    """
    if image_args.shift < 0:
        raise ValueError(f"--shift {image_args.shift} is negative: give the most pixels to move by, or 0.")
    train, held_out = load_images(image_args)
    names, numbers = find_classes(train, held_out, image_args.label_column)
    model, processor = make_model(model_args, names, seed)
    train = train.with_transform(Pixels(processor, image_args, numbers, augment=True))
    return model, processor, train, held_out.with_transform(Pixels(processor, image_args, numbers, augment=False))


def most_likely(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Class with the highest logit: all that the accuracy needs to be gathered from the workers."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the images whose most likely class is the right one."""
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


def report(trainer: Trainer, timed: TimedLog, final: dict[str, float], which: str) -> None:
    """Print what came out, and write the results and the curve into the output folder."""
    args, steps = trainer.args, trainer.state.global_step
    results = {
        "trainer": which,
        "world_size": args.world_size,
        "device": args.device.type,
        "parameters": trainer.model.num_parameters(),
        "steps": steps,
        "images_per_step": samples_per_step(args),
        "images_seen": steps * samples_per_step(args),
        "seconds": round(timed.seconds, 3),
        "eval_loss": final["eval_loss"],
        "accuracy": final["eval_accuracy"],
        "points": timed.points,
    }
    folder = Path(args.output_dir)
    write_results(folder / "results.json", results)
    title = f"{which}, {args.world_size} worker(s), {args.device.type}"
    drawn = draw_curve(timed.points, title, folder / "curve.png", unit="nats per image")
    print(
        f"Held-out accuracy {100 * final['eval_accuracy']:.1f} %, loss {final['eval_loss']:.3f}, "
        f"after {timed.seconds:.0f} s of training."
    )
    print(f"In {folder}: the model, results.json" + (", curve.png" if drawn else ""))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe with these command-line arguments, those of the process by default."""
    model_args, image_args, args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    parts = in_turn(args, "the images", lambda: prepare(model_args, image_args, args.seed))
    model, processor, train, held_out = parts
    if args.process_index == 0:
        print(
            f"{args.world_size} worker(s) on {args.device.type}, {model_args.trainer}: "
            f"{model.num_parameters() / 1e6:.2f} M parameters, {len(train):,} + {len(held_out):,} held-out images, "
            f"{samples_per_step(args):,} images per step.",
            flush=True,
        )
    train_and_report(
        model_args.trainer,
        args,
        partial(report, which=model_args.trainer),
        model=model,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=processor,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=most_likely,
    )


if __name__ == "__main__":
    main()
