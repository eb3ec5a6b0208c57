"""The recipe for images: its data, what it refuses, and runs with two workers."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Value
from images import CLOTHES, ImageArguments, augment, find_classes, load_fashion_mnist, load_images
from launching import ROOT, run
from pictures import rows, save, stripes
from transformers import ResNetForImageClassification, ViTForImageClassification, ViTImageProcessorPil, pipeline
from vision import DEFAULTS, ModelArguments, make_model, prepare

RECIPE = ROOT / "recipes" / "vision.py"
SHORT = ["--max_steps=4", "--per_device_train_batch_size=8", "--eval_strategy=no", "--logging_steps=2"]

# The recipe as it is; besides, every worker leaves behind what its BatchNorms have counted.
RECORDER = f"""
import os, sys
sys.path.insert(0, {str(RECIPE.parent)!r})
import torch, training, vision

class Recording(training.LayupTrainer):
    def train(self, **options):
        super().train(**options)
        buffers = {{name: buffer.clone() for name, buffer in self.model.named_buffers() if "running" in name}}
        torch.save(buffers, f"{{os.environ['LAYUP_TEST_RESULTS']}}/statistics-{{self.args.process_index}}.pt")

training.LayupTrainer = Recording
vision.main()
"""


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


@pytest.mark.parametrize(
    ("model", "images", "message"),
    [
        ({}, {"image_column": "img"}, "No column 'img': choose --image_column from image, label, text"),
        ({}, {"label_column": "fine"}, "No column 'fine': choose --label_column from"),
        ({}, {"image_column": "text"}, "holds no images: choose --image_column from image"),
        ({}, {"max_eval_samples": 0}, "--max_eval_samples 0 leaves no image"),
        ({}, {"shift": -1}, "--shift -1 is negative"),
        ({"model": "vit", "image_size": 30}, {}, "30 is not a multiple of the ViT's patches of 4"),
        ({"image_size": -4}, {}, "choose another --image_size"),
        ({"config_overrides": "layers=2"}, {}, "no option 'layers'"),
    ],
)
def test_bad_options_are_refused_before_training(hub_cache, tmp_path, model, images, message):
    data = save(tmp_path / "data", rows(6, text=["words"] * 6), rows(3, text=["words"] * 3))
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare(ModelArguments(**model), ImageArguments(**{"dataset_name": data, **images}), seed=1)


def test_what_does_not_exist_is_said(hub_cache, tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        load_images(ImageArguments(dataset_name=str(tmp_path / "none")))
    with pytest.raises(FileNotFoundError, match="an image classifier from the Hub or a folder"):
        make_model(ModelArguments(model_name_or_path=str(tmp_path / "none")), ["a", "b"], seed=1)


def test_a_named_model_reads_what_its_image_processor_makes(tmp_path):
    model = make_model(ModelArguments(model="vit", config_overrides="num_hidden_layers=1"), ["a", "b"], seed=1)[0]
    model.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not read RGB images .*32\*32"):
        make_model(ModelArguments(model_name_or_path=str(tmp_path)), ["a", "b"], seed=1)
    with pytest.raises(ValueError, match="leave out --image_size"):
        make_model(ModelArguments(model_name_or_path=str(tmp_path), image_size=32), ["a", "b"], seed=1)


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


@pytest.mark.timeout(300)
def test_two_workers_train_a_resnet_whose_statistics_agree_and_ddp_goes_on_with_it(hub_cache, tmp_path):
    data = save(tmp_path / "data", rows(300), rows(51))
    script, folder = tmp_path / "recorder.py", tmp_path / "model"
    script.write_text(RECORDER)
    output = run(script, 2, [*SHORT, f"--dataset_name={data}", f"--output_dir={folder}"], tmp_path, timeout=140).output
    assert output.count("2 worker(s) on") == 1
    assert "LayUp: steps by worker" in output

    first, second = (torch.load(tmp_path / f"statistics-{rank}.pt") for rank in range(2))
    saved = ResNetForImageClassification.from_pretrained(folder).state_dict()
    assert len(first) > 20
    for name, statistics in first.items():
        assert torch.equal(statistics, second[name])
        assert torch.equal(statistics.cpu(), saved[name])
        untouched = torch.zeros_like(statistics) if name.endswith("running_mean") else torch.ones_like(statistics)
        assert torch.isclose(statistics, untouched).sum() <= 1, name  # one may come back by chance

    results = json.loads((folder / "results.json").read_text())
    assert (results["trainer"], results["world_size"], results["steps"], results["images_seen"]) == ("layup", 2, 4, 64)
    assert results["points"][-1]["eval_accuracy"] == results["accuracy"]
    assert results["accuracy"] * 51 == pytest.approx(round(results["accuracy"] * 51))  # each image counts once
    assert (folder / "curve.png").stat().st_size > 1000
    answer = pipeline("image-classification", model=str(folder))(stripes(0, 0))
    assert {each["label"] for each in answer} == {"top", "middle", "bottom"}

    # Two classes instead of three, in columns of other names.
    others = rows(240, ("b", "a"), Value("string")).rename_columns({"image": "img", "label": "kind"})
    other = save(tmp_path / "other", others)
    given = [f"--dataset_name={other}", "--image_column=img", "--label_column=kind", f"--output_dir={folder}-2"]
    given += ["--trainer=ddp", f"--model_name_or_path={folder}"]
    assert "Held-out accuracy" in run(RECIPE, 2, [*SHORT, *given], tmp_path, timeout=140).output
    named = ModelArguments(model_name_or_path=f"{folder}-2")
    columns = ImageArguments(dataset_name=other, image_column="img", label_column="kind")
    model, _, _, held_out = prepare(named, columns, seed=1)
    assert model.config.id2label == {0: "a", 1: "b"}
    batch = held_out[:]
    loss = float(model.eval()(batch["pixel_values"], labels=torch.tensor(batch["labels"])).loss.detach())
    # Each of the two evaluates its half with its own statistics, so it is not quite the same; nor twice as much.
    assert json.loads(Path(f"{folder}-2", "results.json").read_text())["eval_loss"] == pytest.approx(loss, rel=0.3)


@pytest.mark.timeout(150)
def test_two_workers_train_a_vit_on_images_that_move(hub_cache, tmp_path):
    data, folder = save(tmp_path / "data", rows(300), rows(51)), tmp_path / "model"
    given = ["--model=vit", "--config_overrides=num_hidden_layers=2", "--shift=2", "--flip", f"--dataset_name={data}"]
    output = run(RECIPE, 2, [*SHORT, *given, f"--output_dir={folder}"], tmp_path, timeout=140).output
    assert re.search(r"Held-out accuracy \d+\.\d %", output)
    assert json.loads((folder / "results.json").read_text())["points"][0]["learning_rate"] <= DEFAULTS["learning_rate"]
    assert ViTForImageClassification.from_pretrained(folder).config.num_hidden_layers == 2
