"""Images to learn from: Fashion-MNIST, or any data set of images with a class each that `datasets` can load."""

import gzip
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset
from torch import Tensor
from transformers import BaseImageProcessor

from .tokens import cache_folder

# Where Debian's package dataset-fashion-mnist puts its files, and the same data on the Hub.
FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
FASHION_MNIST_ON_HUB = "zalando-datasets/fashion_mnist"
CLOTHES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
HELD_OUT_SHARE = 0.05  # of a data set that comes in one piece


@dataclass
class ImageArguments:
    """Which images, and how they are varied. With none named: Fashion-MNIST."""

    _argument_group_name: ClassVar[str] = "images"
    dataset_name: str | None = field(
        default=None, metadata={"help": "A data set on the Hub, or a folder of images with one folder for each class."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    label_column: str = field(default="label", metadata={"help": "Column with the classes."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many images at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many images at most."})
    shift: int = field(default=0, metadata={"help": "Move training images at random by up to so many pixels."})
    flip: bool = field(default=False, metadata={"help": "Mirror half of the training images, drawn at random."})


def fashion_mnist(folder: str, part: str) -> Iterator[dict[str, Any]]:
    """The images and classes of Fashion-MNIST's own files; `part` is ``train`` or ``t10k``."""
    with gzip.open(Path(folder, f"{part}-images-idx3-ubyte.gz")) as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28 * 28)
    with gzip.open(Path(folder, f"{part}-labels-idx1-ubyte.gz")) as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    for image, label in zip(images, labels, strict=True):
        # As PGM, a header and the pixels: for such small images packing takes long and saves little.
        yield {"image": {"bytes": b"P5 28 28 255\n" + image.tobytes()}, "label": int(label)}


def load_fashion_mnist(folder: str = FASHION_MNIST) -> DatasetDict:
    """Fashion-MNIST from the files in `folder`, from the Hub if there is no such folder.

    Raises:
        FileNotFoundError: it is in neither place.
    """
    if Path(folder).is_dir():
        options = {
            "features": Features(image=Image(), label=ClassLabel(names=CLOTHES)),
            "cache_dir": str(cache_folder()),
        }
        return DatasetDict(
            {
                split: Dataset.from_generator(fashion_mnist, gen_kwargs={"folder": folder, "part": part}, **options)
                for split, part in (("train", "train"), ("test", "t10k"))
            }
        )
    try:
        return load_dataset(FASHION_MNIST_ON_HUB)
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"Fashion-MNIST is neither in {folder} nor to be had from the Hub: "
            "apt-get install dataset-fashion-mnist, or name other images with --dataset_name."
        ) from error


def load_images(options: ImageArguments) -> tuple[Dataset, Dataset]:
    """Rows to train on, and rows held out: those for validation, else for the test, else some at random.

    Raises:
        ValueError: a column or a split is missing, or there are too few images.
        FileNotFoundError: no such data set.
    """
    name = options.dataset_name or "Fashion-MNIST"
    splits = (
        load_dataset(options.dataset_name, options.dataset_config_name)
        if options.dataset_name
        else load_fashion_mnist()
    )
    if "train" not in splits:
        raise ValueError(f"{name} has no split called 'train', only {', '.join(splits)}: name another data set.")
    train = splits["train"]
    check_columns(train, options)
    held_out = next((splits[other] for other in ("validation", "test") if other in splits), None)
    if len(train) < 2 or (held_out is not None and not len(held_out)):
        raise ValueError(f"{name} has too few images to train on some and hold out others: name another data set.")
    if held_out is None:
        # At random, as folders come class by class; by a seed of its own, so that every run holds out the same.
        parts = train.train_test_split(test_size=max(1, int(HELD_OUT_SHARE * len(train))), seed=0)
        train, held_out = parts["train"], parts["test"]
    columns = [options.image_column, options.label_column]
    return (
        first_of(train.select_columns(columns), options.max_train_samples, "max_train_samples"),
        first_of(held_out.select_columns(columns), options.max_eval_samples, "max_eval_samples"),
    )


def check_columns(rows: Dataset, options: ImageArguments) -> None:
    """Raise a ValueError if the columns that the options name are not there, or hold no images."""
    for option in ("image_column", "label_column"):
        column = getattr(options, option)
        if column not in rows.column_names:
            raise ValueError(f"No column '{column}': choose --{option} from {', '.join(rows.column_names)}.")
    if not isinstance(rows.features[options.image_column], Image):
        images = [column for column, feature in rows.features.items() if isinstance(feature, Image)]
        remedy = f"choose --image_column from {', '.join(images)}" if images else "name another data set"
        raise ValueError(f"Column '{options.image_column}' holds no images: {remedy}.")


def first_of(rows: Dataset, most: int | None, option: str) -> Dataset:
    """At most so many of the rows, drawn at random, as the first may be all of one class."""
    if most is None or most >= len(rows):
        return rows
    if most < 1:
        raise ValueError(f"--{option} {most} leaves no image: give 1 or more.")
    return rows.shuffle(seed=0).select(range(most))


def find_classes(train: Dataset, held_out: Dataset, column: str) -> tuple[list[str], dict[Any, int]]:
    """Names of the classes, and the number of the class for each value in `column`.

    Raises:
        ValueError: the values are no classes, there are less than two, or a row has none of them.
    """
    feature = train.features[column]
    if isinstance(feature, ClassLabel):
        names, values = feature.names, range(feature.num_classes)
    elif isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "string", "large_string", "bool")):
        values = sorted(set(train.unique(column)) - {None})
        names = [str(value) for value in values]
    else:
        raise ValueError(f"Column '{column}' holds {feature}, not classes: choose another --label_column.")
    if len(names) < 2:
        raise ValueError(f"Column '{column}' has less than two classes ({names}): choose another --label_column.")
    numbers = {value: number for number, value in enumerate(values)}
    strange = {*train.unique(column), *held_out.unique(column)} - set(numbers)
    if strange:
        raise ValueError(f"Column '{column}' has rows of no known class ({strange}): leave them out of the data set.")
    return names, numbers


@dataclass(frozen=True)
class Pixels:
    """Turns rows into what a model takes, a batch at a time: for `Dataset.with_transform`.

    Attributes:
        processor: resizes, scales and normalises.
        options: names of the columns; how far to move images, and whether to mirror them.
        numbers: class number of each label.
        augment: whether to move and mirror at all: not what is held out.
    """

    processor: BaseImageProcessor
    options: ImageArguments
    numbers: dict[Any, int]
    augment: bool

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in rows[self.options.image_column]]
        pixels = self.processor(images, return_tensors="pt")["pixel_values"]
        if self.augment:
            pixels = augment(pixels, self.options.shift, self.options.flip)
        return {"pixel_values": pixels, "labels": [self.numbers[label] for label in rows[self.options.label_column]]}


def augment(pixels: Tensor, shift: int, flip: bool) -> Tensor:
    """Move and mirror each image of a batch (N, C, H, W) at random; what moves in repeats the edge."""
    count, channels, height, width = pixels.shape
    if flip:
        mirrored = torch.rand(count) < 0.5
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
    if shift:
        down, right = torch.randint(-shift, shift + 1, (2, count, 1))
        rows = (torch.arange(height) - down).clamp(0, height - 1)
        columns = (torch.arange(width) - right).clamp(0, width - 1)
        image, channel = torch.arange(count)[:, None, None, None], torch.arange(channels)[:, None, None]
        pixels = pixels[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
    return pixels
