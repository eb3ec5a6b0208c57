"""Image classifiers: a small ResNet or ViT made anew, or any from the Hub or a folder, and the data for them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    EvalPrediction,
    PreTrainedModel,
    ResNetConfig,
    ViTConfig,
    ViTImageProcessorPil,
    set_seed,
)

from .images import ImageArguments, Pixels, find_classes, load_images
from .model import apply_overrides

IMAGE_SIZE = 28
PATCH_SIZE = 4  # of the new ViT
TRAINING: dict[str, Any] = {
    # The columns are read by what makes pixels of them, not by the model.
    "remove_unused_columns": False,
    # With it, the stock Trainer multiplies the loss by the number of workers, even where the model does not divide it
    # by the items of all (ResNet).
    "average_tokens_across_devices": False,
}
"""What the training arguments have to say for these models and their data."""


@dataclass
class ClassifierArguments:
    """Which model. With none named: a small ResNet."""

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


def make_model(
    options: ClassifierArguments, names: Sequence[str], seed: int
) -> tuple[PreTrainedModel, BaseImageProcessor]:
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
    model_args: ClassifierArguments, image_args: ImageArguments, seed: int
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
