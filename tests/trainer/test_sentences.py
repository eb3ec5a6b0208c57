"""The trainer of sentence-transformers, where that is installed; and what it has of training sets."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict
from launching import run

from layup_hf.trainer.suitability import check_data


def sizes(workers):
    args = {"train_batch_size": 4, "gradient_accumulation_steps": 1, "dataloader_drop_last": False}
    return SimpleNamespace(world_size=workers, **args)


@pytest.mark.parametrize("kind", [dict, DatasetDict])
def test_several_data_sets_have_the_length_of_all(kind):
    both = kind({"a": Dataset.from_dict({"x": range(8)}), "b": Dataset.from_dict({"x": range(9)})})
    check_data(both, sizes(5))
    with pytest.raises(ValueError, match="17 samples, 5 steps of 4: fewer than the 6 workers"):
        check_data(both, sizes(6))


def test_a_stream_among_several_has_no_length():
    check_data({"a": Dataset.from_dict({"x": range(8)}).to_iterable_dataset()}, sizes(5))


def test_sentence_transformers_trains(tmp_path):
    package = pytest.importorskip("sentence_transformers")
    arguments = [str(tmp_path / "out"), str(Path(package.__file__).parents[1])]
    first, second = run("sentences.py", 2, arguments, tmp_path).results()
    for found in (first.pop("gathers"), second.pop("gathers")):
        assert "gather_across_devices=True) and LayUp with several workers exclude each other" in found["message"]
    # Of 64 pairs each worker has 8 batches of 4; with 33 more there are 16 + 8 batches for both.
    steps = {"one": 8, "several": 12, "several of datasets": 12, "no duplicates": 8, "cached": 8, "with parameters": 8}
    assert {name: found["steps"] for name, found in first.items()} == steps
    for name, found in first.items():
        assert found["same"]
        assert second[name]["same"]
        assert math.isfinite(found["loss"])
        classifier = ["classifier.weight", "classifier.bias"] if name == "with parameters" else []
        assert found["trained of the loss"] == classifier
