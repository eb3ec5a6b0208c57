"""Image classifiers: what is refused before training."""

import re

import pytest
from pictures import rows, save
from transformers import ViTImageProcessorPil

from recipes.parts.classifier import ClassifierArguments, make_model, prepare
from recipes.parts.images import ImageArguments, load_images


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
        prepare(ClassifierArguments(**model), ImageArguments(**{"dataset_name": data, **images}), seed=1)


def test_what_does_not_exist_is_said(hub_cache, tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        load_images(ImageArguments(dataset_name=str(tmp_path / "none")))
    with pytest.raises(FileNotFoundError, match="an image classifier from the Hub or a folder"):
        make_model(ClassifierArguments(model_name_or_path=str(tmp_path / "none")), ["a", "b"], seed=1)


def test_a_named_model_reads_what_its_image_processor_makes(tmp_path):
    model = make_model(ClassifierArguments(model="vit", config_overrides="num_hidden_layers=1"), ["a", "b"], seed=1)[0]
    model.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not read RGB images .*32\*32"):
        make_model(ClassifierArguments(model_name_or_path=str(tmp_path)), ["a", "b"], seed=1)
    with pytest.raises(ValueError, match="leave out --image_size"):
        make_model(ClassifierArguments(model_name_or_path=str(tmp_path), image_size=32), ["a", "b"], seed=1)
