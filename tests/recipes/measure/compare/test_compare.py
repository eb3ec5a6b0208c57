"""A comparison from its command line: all methods with two workers, and what is refused."""

import json
import math
import os
import subprocess
import sys

import pytest
from launching import ROOT
from pictures import rows, save

from recipes.measure.compare.__main__ import main
from recipes.measure.compare.decent import is_installed
from recipes.measure.compare.methods import METHODS


def compare(tmp_path, *options):
    """Run it from another folder; what it has printed, and its results."""
    command = [sys.executable, "-m", "recipes.measure.compare", "--folder", str(tmp_path / "out"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=880, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout, json.loads((tmp_path / "out" / "compare.json").read_text())


@pytest.mark.timeout(900)
def test_all_methods_train_with_two_workers(tmp_path, text_file):
    options = ["--train_file", str(text_file), "--vocab_size", "300", "--block_size", "32", "--batch_size", "4"]
    options += ["--config_overrides", "n_layer=2,n_embd=32,n_head=2", "--steps", "16", "--evaluations", "2"]
    options += ["--no-memory"]
    printed, results = compare(tmp_path, *options, "--period", "4", "--learning_rates", "8e-3", "--seeds", "1")
    runs = {run["method"]: run for run in results["runs"] if not run["memory"]}
    assert runs.keys() == METHODS.keys() - ({"decent-dp"} if not is_installed() else set())
    assert {name: run["failure"] for name, run in runs.items() if run["failure"]} == {}
    for name, run in runs.items():
        assert [point["samples"] for point in run["points"]] == [64, 128], name
        assert run["loss"] < min(run["points"][0]["loss"], math.log(300)), name
        assert run["replicas_agree"], name
        assert sum(run["own_steps"]) == 32, name
        assert run["waiting"] is None or 0 <= run["waiting"] <= 1, name
    for name in ("gosgd", "adpsgd", "layup", "layup-arrival", "layup-straight", "layup-own", "layup-plain"):
        assert runs[name]["mass"] == [2.0, 2.0], name
        assert runs[name]["bytes_per_step"] > 0, name
        assert runs[name]["consensus_distance"][0] > 0, name

    whole = 4 * runs["ddp"]["parameters"]  # bytes of the gradients, or of the weights
    assert runs["single"]["bytes_per_step"] == 0
    assert runs["ddp"]["bytes_per_step"] == 2 * whole
    assert runs["ddp-nesterov"]["bytes_per_step"] == 2 * whole
    assert runs["ddp-nesterov"]["loss"] != runs["ddp"]["loss"]
    assert runs["ddp-bf16"]["bytes_per_step"] == whole
    assert 0 < runs["ddp-powersgd"]["bytes_per_step"] < whole
    for name in ("localsgd", "diloco", "co2"):
        assert runs[name]["bytes_per_step"] == 2 * whole / 4, name
    assert len(results["runs"]) == len(runs)
    assert "| LayUp | 0.008, the grid's edge |" in printed
    assert {file.name for file in (tmp_path / "out").glob("compare*")} == {
        "compare.json", "compare.md", "compare-samples.png", "compare-seconds.png", "compare-costs.png"}  # fmt: skip


@pytest.mark.skipif(not is_installed(), reason="Decent-DP is not installed")
@pytest.mark.timeout(600)
def test_decent_dp_trains_and_averages_as_its_package_does(tmp_path, text_file):
    options = ["--train_file", str(text_file), "--vocab_size", "300", "--block_size", "32", "--batch_size", "4"]
    options += ["--config_overrides", "n_layer=2,n_embd=32,n_head=2", "--steps", "64", "--evaluations", "4"]
    _, results = compare(
        tmp_path, *options, "--learning_rates", "8e-3", "--seeds", "1", "--methods", "ddp", "decent-dp"
    )
    runs = {run["method"]: run for run in results["runs"] if not run["memory"]}
    assert {name: run["failure"] for name, run in runs.items()} == {"ddp": None, "decent-dp": None}
    assert {run["method"] for run in results["runs"] if run.get("peak_bytes", 0) > 0} == runs.keys()
    assert runs["decent-dp"]["replicas_agree"]
    assert runs["decent-dp"]["bytes_per_step"] == runs["ddp"]["bytes_per_step"]
    assert runs["decent-dp"]["loss"] != runs["ddp"]["loss"]
    for ours, theirs in zip(runs["decent-dp"]["points"], runs["ddp"]["points"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)  # one step behind, by AdamWs of its workers' own


@pytest.mark.timeout(600)
def test_images_are_learnt_by_a_model_with_batchnorm(tmp_path):
    data = save(tmp_path / "data", rows(512), rows(60))
    options = ["--images", "resnet", "--dataset_name", data, "--methods", "ddp", "localsgd", "gosgd", "layup"]
    options += ["--steps", "32", "--evaluations", "2", "--learning_rates", "4e-3", "--seeds", "1", "--warmup", "0.2"]
    options += ["--no-memory"]
    printed, results = compare(tmp_path, *options)
    runs = {run["method"]: run for run in results["runs"] if not run["memory"]}
    assert {name: run["failure"] for name, run in runs.items()} == dict.fromkeys(("ddp", "localsgd", "gosgd", "layup"))
    for name, run in runs.items():
        assert [point["samples"] for point in run["points"]] == [256, 512], name
        assert run["accuracy"] == run["points"][-1]["accuracy"] > 0.5, name  # of three classes
    assert "512 images by a resnet" in printed
    assert "%) | 1.0000 |" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "vit", "--block_size", "64"], "--block_size is of no use for images"),
        (["--images", "vit", "--texts", "somewhere"], "--texts is of no use for images"),
        (["--texts", "somewhere"], "--texts is of no use without a --task"),
        (["--task", "shakespeare", "--block_size", "32"], "--block_size is of no use for --task shakespeare: leave it"),
        (["--task", "gpt-neo", "--quick"], "--quick is of no use for --task gpt-neo"),
        (["--widen", "2", "--learning_rates", "1e-3"], "give --learning_rates two rates or more"),
        (["--dataset_name", "somewhere"], "--dataset_name is of no use for text: leave it out, or name a model with"),
    ],
)
def test_options_of_the_other_kind_of_data_are_refused(monkeypatch, capsys, options, message):
    monkeypatch.setattr(sys, "argv", ["compare.py", *options])
    with pytest.raises(SystemExit):
        main()
    assert message in capsys.readouterr().err
