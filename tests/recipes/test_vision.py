"""The recipe for images: runs with two workers."""

import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Value
from launching import ROOT, run
from pictures import rows, save, stripes
from transformers import ResNetForImageClassification, ViTForImageClassification, pipeline
from vision import DEFAULTS

from recipes.parts.classifier import ClassifierArguments, prepare
from recipes.parts.images import ImageArguments

RECIPE = ROOT / "recipes" / "vision.py"
SHORT = ["--max_steps=4", "--per_device_train_batch_size=8", "--eval_strategy=no", "--logging_steps=2"]

# The recipe as it is; besides, every worker leaves behind what its BatchNorms have counted.
RECORDER = f"""
import os, sys
sys.path.insert(0, {str(RECIPE.parent)!r})
import torch, vision
from parts import training

class Recording(training.LayupTrainer):
    def train(self, **options):
        super().train(**options)
        buffers = {{name: buffer.clone() for name, buffer in self.model.named_buffers() if "running" in name}}
        torch.save(buffers, f"{{os.environ['LAYUP_TEST_RESULTS']}}/statistics-{{self.args.process_index}}.pt")

training.LayupTrainer = Recording
vision.main()
"""


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
    named = ClassifierArguments(model_name_or_path=f"{folder}-2")
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
