"""Images to learn from: where they come from, their classes, and how they are varied."""

import gzip

import numpy as np
import pytest
import torch
from datasets import Value
from pictures import rows, stripes

from recipes.parts.images import CLOTHES, ImageArguments, augment, find_classes, load_fashion_mnist, load_images


def test_files_of_fashion_mnist_are_read(hub_cache, tmp_path):
    images = np.arange(3 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(3, 28, 28)
    for part in ("train", "t10k"):
        with gzip.open(tmp_path / f"{part}-images-idx3-ubyte.gz", "wb") as file:
            file.write(bytes(16) + images.tobytes())
        with gzip.open(tmp_path / f"{part}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(bytes(8) + bytes([9, 0, 2]))
    splits = load_fashion_mnist(str(tmp_path))
    assert {name: len(part) for name, part in splits.items()} == {"train": 3, "test": 3}
    assert np.array_equal(np.stack([np.asarray(image) for image in splits["train"]["image"]]), images)
    assert splits["test"].features["label"].int2str(splits["test"]["label"]) == [CLOTHES[9], CLOTHES[0], CLOTHES[2]]


def test_without_fashion_mnist_the_message_says_where_it_is(hub_cache, tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        load_fashion_mnist(str(tmp_path / "none"))


def test_a_folder_of_images_class_by_class_is_split_at_random(hub_cache, tmp_path):
    for number in range(120):
        folder = tmp_path / "data" / ("even", "odd")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        stripes(number, number % 2).save(folder / f"{number}.png")
    train, held_out = load_images(ImageArguments(dataset_name=str(tmp_path / "data")))
    assert (len(train), len(held_out), set(held_out["label"])) == (114, 6, {0, 1})
    fewer = load_images(ImageArguments(dataset_name=str(tmp_path / "data"), max_train_samples=10))[0]
    assert (len(fewer), set(fewer["label"])) == (10, {0, 1})


@pytest.mark.parametrize(
    ("labels", "kind", "names"),
    [(("b", "a"), Value("string"), ["a", "b"]), ((7, 3), Value("int64"), ["3", "7"]), ((1, 0, 2), None, None)],
)
def test_classes_are_numbered(labels, kind, names):
    data = rows(6, labels, kind)
    found, numbers = find_classes(data, data, "label")
    assert found == (names or ["top", "middle", "bottom"])
    assert numbers == {value: number for number, value in enumerate(sorted(labels))}


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        ((0.5, 1.0), Value("float32"), "not classes: choose another --label_column"),
        ((3,), Value("int64"), "less than two classes"),
        ((0, 1, -1), None, r"rows of no known class \({-1}\)"),
        (("a", "b", None), Value("string"), r"rows of no known class \({None}\)"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, kind, message):
    data = rows(6, labels, kind)
    with pytest.raises(ValueError, match=message):
        find_classes(data, data, "label")


def test_images_move_and_turn_by_the_seed():
    pixels = torch.arange(200 * 3 * 4 * 4.0).view(200, 3, 4, 4)
    assert torch.equal(augment(pixels, 0, False), pixels)
    torch.manual_seed(1)
    flipped, moved = augment(pixels, 0, True), augment(pixels, 1, False)
    torch.manual_seed(1)
    assert torch.equal(augment(pixels, 0, True), flipped)
    as_it_was = (flipped == pixels).flatten(1).all(dim=1)
    assert 60 < int(as_it_was.sum()) < 140
    assert torch.equal(flipped[~as_it_was], pixels[~as_it_was].flip(-1))

    padded = torch.nn.functional.pad(pixels, (1, 1, 1, 1), mode="replicate")
    shifts = {(down, right) for down in range(3) for right in range(3)}
    found = {
        shift
        for image, source in zip(moved, padded, strict=True)
        for shift in shifts
        if torch.equal(image, source[:, shift[0] : shift[0] + 4, shift[1] : shift[1] + 4])
    }
    assert found == shifts
    assert all(
        any(torch.equal(image, source[:, down : down + 4, right : right + 4]) for down, right in shifts)
        for image, source in zip(moved, padded, strict=True)
    )
