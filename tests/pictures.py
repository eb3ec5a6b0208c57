"""Small data sets of images, whose classes are easy to tell."""

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL.Image import Image as Picture
from PIL.Image import fromarray


def stripes(number: int, label: int) -> Picture:
    """A gray image of noise, brighter in the rows of its class."""
    pixels = np.random.default_rng(number).integers(0, 100, (28, 28), np.uint8)
    pixels[8 * label : 8 * label + 8] += 150
    return fromarray(pixels)


def rows(count: int, labels=(0, 1, 2), kind=None, **columns) -> Dataset:
    """So many images with labels in turn."""
    chosen = [labels[number % len(labels)] for number in range(count)]
    data = {"image": [stripes(number, number % 3) for number in range(count)], "label": chosen, **columns}
    features = {"image": Image(), "label": kind or ClassLabel(names=["top", "middle", "bottom"])}
    return Dataset.from_dict(data, Features(**features, **{name: Value("string") for name in columns}))


def save(folder, train: Dataset, test: Dataset | None = None) -> str:
    """The rows as a data set in `folder`."""
    folder.mkdir()
    train.to_parquet(folder / "train.parquet")
    if test is not None:
        test.to_parquet(folder / "test.parquet")
    return str(folder)
