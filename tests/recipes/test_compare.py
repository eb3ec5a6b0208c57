"""The comparison: its arithmetic, its variations of methods, and a run of all of them with two workers."""

import copy
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import compare_methods
import pytest
import torch
from compare import Comparison, last_error, main, make_run, steps_for, wanted
from compare_gossip import EqualEngine, SnapshotEngine, WholeModelEngine, copy_of, one_block
from compare_methods import METHODS, OuterSteps, Setup, ring_bytes
from compare_report import NAMES, best_rate, best_runs, draw, final_loss, mean_and_spread, row, sooner, table
from fleet import open_fleet
from launching import ROOT
from pictures import rows, save
from torch import nn

from layup_hf.blocks import split_into_blocks
from layup_hf.gossip.topology import PeerSampler
from layup_hf.ledger.mixing import UNIT

SETTINGS = {
    "learning_rates": [1e-3, 2e-3],
    "seeds": [1, 2],
    "steps": 8,
    "workers": 2,
    "batch_size": 4,
    "block_size": 16,
    "hosts": None,
    "rate": "1gbit",
    "straggler": None,
}


def made(method, rate, seed, losses=(4.0, 3.0), **more):
    points = [{"samples": 32 * n, "seconds": 10.0 * n, "loss": loss} for n, loss in enumerate(losses, start=1)]
    figures = {"seconds": points[-1]["seconds"], "own_steps": [8, 8], "parameters": 1000, "bytes_per_step": 2e6}
    figures |= {"link_bytes_per_step": None, "waiting": 0.25, "failure": None}
    return {**make_run(method, rate, seed), "points": points, "loss": losses[-1], **figures, **more}


def memory(method, peak=2**20):
    return {**make_run(method, 1e-3, 1, memory=True), "failure": None, "peak_bytes": peak}


# ---- What is run ----


def test_every_rate_for_the_first_seed_then_the_best_for_the_others():
    first = wanted(SETTINGS, ["ddp", "layup"], [])
    in_turn = [(run["method"], run["learning_rate"], run["memory"]) for run in first]
    assert in_turn[:3] == [("ddp", 1e-3, False), ("layup", 1e-3, False), ("ddp", 2e-3, False)]
    assert in_turn[3:] == [("layup", 2e-3, False), ("ddp", 1e-3, True), ("layup", 1e-3, True)]
    assert {run["seed"] for run in first} == {1}

    runs = [made("ddp", 1e-3, 1, (4.0, 3.0)), made("ddp", 2e-3, 1, (4.0, 2.9))]
    assert wanted(SETTINGS, ["ddp"], runs) == [make_run("ddp", 1e-3, 1, memory=True)]
    runs.append(memory("ddp"))
    assert wanted(SETTINGS, ["ddp"], runs) == [make_run("ddp", 2e-3, 2)]
    runs.append(made("ddp", 2e-3, 2))
    assert wanted(SETTINGS, ["ddp"], runs) == []


def test_a_run_that_diverged_or_failed_is_infinitely_bad_and_not_repeated():
    failed = {**make_run("ddp", 1e-3, 1), "failure": "RuntimeError: no", "loss": None}
    diverged = made("ddp", 2e-3, 1, (4.0, None), failure="diverged")
    assert [final_loss(run) for run in (failed, diverged, {"loss": math.nan}, {})] == [math.inf] * 4
    assert best_rate([failed, diverged], "ddp", 1) is None
    assert wanted(SETTINGS, ["ddp"], [failed, diverged, memory("ddp")]) == []
    assert best_rate([failed, made("ddp", 2e-3, 1)], "ddp", 1) == 2e-3
    lucky = [made("ddp", 4e-3, 1, loss=1.0), made("ddp", 4e-3, 2, loss=9.0)]
    steady = [made("ddp", 2e-3, 1, loss=2.0), made("ddp", 2e-3, 2, loss=2.0)]
    assert best_rate([*lucky, *steady], "ddp", 1) == 2e-3
    assert best_rate([*lucky, *steady[:1]], "ddp", 1) == 4e-3  # the others have been run for fewer seeds


@pytest.mark.parametrize(("steps", "expected"), [(64, 64), (65, 96), (1, 32)])
def test_evaluations_fall_on_multiples_of_the_period(steps, expected):
    assert steps_for(steps, evaluations=4, period=8) == expected


def test_results_of_other_settings_are_refused(tmp_path):
    Comparison(SETTINGS, ["ddp"], tmp_path)
    more = Comparison({**SETTINGS, "seeds": [1, 2, 3]}, ["layup"], tmp_path)
    assert more.results()["settings"]["seeds"] == [1, 2, 3]
    with pytest.raises(SystemExit, match="steps"):
        Comparison({**SETTINGS, "steps": 9}, ["ddp"], tmp_path)


def test_a_run_that_fails_takes_no_other_with_it(tmp_path, monkeypatch):
    comparison, launches = Comparison(SETTINGS, ["single", "ddp"], tmp_path), []

    def launch(runs, processes, bar):
        launches.append((processes, len(runs)))
        (tmp_path / "progress.json").write_text("{}")
        for run in runs:
            if (run["method"], run["learning_rate"]) == ("ddp", 1e-3) and not run["memory"]:
                return "many lines\nRuntimeError: no"
            results = comparison.results()
            results["runs"].append(memory(run["method"]) if run["memory"] else made(*list(run.values())[:3]))
            comparison.file.write_text(json.dumps(results))
        return ""

    monkeypatch.setattr(comparison, "_launch", launch)
    comparison.run()
    assert launches == [(1, 3), (2, 3), (2, 2), (1, 1), (2, 1)]
    failures = [run["failure"] for run in comparison.results()["runs"] if run["failure"]]
    assert failures == ["many lines\nRuntimeError: no"]
    comparison.run()
    assert len(launches) == 5  # all has been made

    monkeypatch.setattr(comparison, "_launch", lambda *call: (tmp_path / "progress.json").unlink() or "ImportError: no")
    comparison.methods.append("layup")
    with pytest.raises(RuntimeError, match="first run:\nImportError: no"):
        comparison.run()


def test_the_first_error_is_the_last_line():
    output = "working\nValueError: this one\nWorkerFailure: of the other\nChildFailedError: of the launcher\n"
    assert last_error(output).splitlines()[-1] == "ValueError: this one"


# ---- The table ----


def test_times_to_a_loss_are_interpolated():
    ddp, faster, worse = made("ddp", 1e-3, 1, (4.0, 3.0)), made("layup", 1e-3, 1, (3.5, 2.5)), made("x", 1e-3, 1)
    assert sooner(ddp, ddp) == (20.0, 1.0)
    assert sooner(faster, ddp) == (15.0, pytest.approx(4 / 3))
    assert sooner({**worse, "points": made("x", 1e-3, 1, (4.0, None))["points"]}, ddp) == (math.inf, 0.0)


def test_a_row_has_means_over_seeds():
    runs = [made("ddp", 1e-3, 1), made("ddp", 1e-3, 2), memory("ddp", 3 * 2**20), memory("layup")]
    runs += [made("layup", 1e-3, 1), made("layup", 2e-3, 1, (3.5, 2.5)), made("layup", 2e-3, 2, (4.0, 2.0))]
    assert best_runs(runs, "layup", 1).keys() == {1, 2}
    name, rate, loss, ratio, seconds, times, speed, moved, peak, waiting = row(runs, "layup", 1)
    assert (name, rate, loss) == ("LayUp", "0.002", "2.250 ± 0.354")
    assert float(ratio) == pytest.approx(2.25 / 3, abs=1e-4)
    assert (seconds, times) == ("15.0", "1.33")
    assert (speed, moved, peak, waiting) == ("0.80", "2.000 MB", "1.0 MiB", "0.25")
    assert row(runs, "ddp", 1)[3:6] == ["1.0000", "20.0", "1.00"]
    assert row([*runs, made("co2", 1e-3, 1, (5.0, 4.0))], "co2", 1)[4:6] == ["not reached (0 of 1 seeds)", "-"]
    failed = {**make_run("co2", 1e-3, 1), "failure": "some lines\nRuntimeError: no", "loss": None}
    assert row([*runs, failed], "co2", 1)[2] == "RuntimeError: no"
    assert mean_and_spread([3.0, math.inf]) == "diverged (1 of 2 seeds did not)"
    recognised = [{**run, "accuracy": 0.9} for run in runs if "points" in run]
    assert row(recognised, "layup", 1)[2] == "2.250 ± 0.354 (90.0 %)"
    with_link = [{**run, "link_bytes_per_step": 1e6} for run in runs if "points" in run]
    assert row(with_link, "layup", 1)[7:9] == ["1.000 MB", "-"]


def test_the_table_and_the_pictures_have_what_was_run(tmp_path):
    results = {"settings": SETTINGS, "runs": [made("ddp", 1e-3, 1), made("single", 2e-3, 1, (4.0, None, 3.5))]}
    lines = table(results).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| method", "|---|---|---|---|---|---|---|---|---|---|",
                                                            "| one process", "| DDP"]  # fmt: skip
    draw(results, tmp_path)
    assert all((tmp_path / f"compare-{key}.png").stat().st_size > 1000 for key in ("samples", "seconds", "costs"))
    assert table({"settings": SETTINGS, "runs": []}) == "Nothing has been run."
    assert NAMES.keys() == METHODS.keys()


def test_a_ring_sends_and_receives_all_but_a_worker_s_part_twice():
    assert ring_bytes(100, 1) == 0
    assert ring_bytes(100, 2) == 200
    assert ring_bytes(100, 4) == 300


# ---- Methods ----


@pytest.mark.parametrize("overlaps", [False, True])
def test_outer_steps_use_the_mean_change_at_once_or_one_synchronisation_later(monkeypatch, overlaps):
    """One parameter, which local steps lower by 1 in every period; the other worker changes nothing."""
    monkeypatch.setattr(compare_methods.dist, "all_reduce", lambda tensor, async_op: SimpleNamespace(wait=lambda: None))
    model, setup = nn.Linear(1, 1, bias=False), Setup(steps=6, period=2)
    callback = OuterSteps(setup, overlaps=overlaps, lr=0.5, momentum=0.5)
    args, state = SimpleNamespace(world_size=2), SimpleNamespace(global_step=0, max_steps=6)
    start = model.weight.item()
    callback.on_train_begin(args, state, None, model=model)
    weights = []
    for step in range(1, 7):
        with torch.no_grad():
            model.weight.sub_(0.5)
        state.global_step = step
        callback.on_step_end(args, state, None)
        weights.append(start - model.weight.item())
    # Velocities 0.5, 0.75, 0.875 at rate 0.5; in between, the local steps from the outer weights.
    outer = [0.0, 0.25, 1.0625] if overlaps else [0.25, 0.625, 1.0625]
    assert weights[1::2] == pytest.approx(outer, abs=1e-6)
    assert weights[::2] == pytest.approx([0.5, outer[0] + 0.5, outer[1] + 0.5], abs=1e-6)
    assert setup.reduced == 3 * 4


def models_and_blocks(count):
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)) for _ in range(count)]
    return models, [one_block(split_into_blocks(model), model) for model in models]


def flat(block):
    return torch.cat([tensor.flatten() for tensor in block.tensors]).double()


def test_one_block_has_the_whole_model():
    models, blocks = models_and_blocks(1)
    assert [id(p) for p in blocks[0].parameters] == [id(p) for p in models[0].parameters()]
    assert blocks[0].parameter_names == tuple(name for name, _ in models[0].named_parameters())


def test_snapshots_are_merged_as_they_were_offered_and_the_sum_by_mass_is_kept():
    _, blocks = models_and_blocks(2)
    copies = [copy_of(block) for block in blocks]
    windows = open_fleet([[block] for block in copies])
    engines = [
        SnapshotEngine(
            [blocks[rank]],
            windows[rank],
            PeerSampler(rank, 2, 1),
            copies=[copies[rank]],
        )
        for rank in range(2)
    ]
    before = [flat(block) for block in blocks]
    engines[0].offer(blocks[0])
    with torch.no_grad():
        for parameter in blocks[0].parameters:
            parameter.add_(1.0)  # its next step, of which the peer is to see nothing
    engines[1].merge(blocks[1])
    assert torch.allclose(flat(blocks[1]), (before[0] / 2 + before[1]) / 1.5, atol=1e-6)
    ledger = windows[0].ledger
    assert (ledger.own(0), windows[1].ledger.own(0)) == (UNIT // 2, UNIT + UNIT // 2)
    assert int(ledger.masses().sum()) == 2 * UNIT


def test_pairwise_averages_have_equal_weights_and_masses_and_come_once_per_step():
    _, blocks = models_and_blocks(3)
    windows = open_fleet([[block] for block in blocks])
    engines = [EqualEngine([block], windows[rank], PeerSampler(rank, 3, 1)) for rank, block in enumerate(blocks)]
    before = [flat(block) for block in blocks]
    engines[0].offer(blocks[0])
    chosen = next(rank for rank in (1, 2) if windows[rank].ledger.pending(0))
    engines[chosen].merge(blocks[chosen])
    assert torch.allclose(flat(blocks[chosen]), (before[0] + before[chosen]) / 2, atol=1e-6)
    engines[0].offer(blocks[0])
    halfway = copy.deepcopy(flat(blocks[chosen]))
    engines[chosen].merge(blocks[chosen])  # forward has begun
    assert torch.equal(flat(blocks[chosen]), halfway)
    assert int(windows[0].ledger.masses().sum()) == 3 * UNIT
    assert abs(int(windows[0].ledger.own(0)) - UNIT) <= 2
    assert issubclass(EqualEngine, WholeModelEngine)


# ---- A real run ----


def compare(tmp_path, *options):
    """Run the recipe; what it has printed, and its results."""
    command = [sys.executable, str(ROOT / "recipes" / "compare.py"), "--folder", str(tmp_path / "out"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=880, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout, json.loads((tmp_path / "out" / "compare.json").read_text())


@pytest.mark.timeout(900)
def test_all_methods_train_with_two_workers(tmp_path, text_file):
    options = ["--train_file", str(text_file), "--vocab_size", "300", "--block_size", "32", "--batch_size", "4"]
    options += ["--config_overrides", "n_layer=2,n_embd=32,n_head=2", "--steps", "16", "--evaluations", "2"]
    printed, results = compare(tmp_path, *options, "--period", "4", "--learning_rates", "8e-3", "--seeds", "1")
    runs = {run["method"]: run for run in results["runs"] if not run["memory"]}
    assert runs.keys() == METHODS.keys()
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
    assert {run["method"] for run in results["runs"] if run.get("peak_bytes", 0) > 0} == runs.keys()
    assert "| LayUp | 0.008 |" in printed
    assert {file.name for file in (tmp_path / "out").glob("compare*")} == {
        "compare.json", "compare.md", "compare-samples.png", "compare-seconds.png", "compare-costs.png"}  # fmt: skip


@pytest.mark.timeout(600)
def test_images_are_learnt_by_a_model_with_batchnorm(tmp_path):
    data = save(tmp_path / "data", rows(512), rows(60))
    options = ["--images", "resnet", "--dataset_name", data, "--methods", "ddp", "localsgd", "gosgd", "layup"]
    options += ["--steps", "32", "--evaluations", "2", "--learning_rates", "4e-3", "--seeds", "1", "--warmup", "0.2"]
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
        (["--dataset_name", "somewhere"], "--dataset_name is of no use for text: leave it out, or name a model with"),
    ],
)
def test_options_of_the_other_kind_of_data_are_refused(monkeypatch, capsys, options, message):
    monkeypatch.setattr(sys, "argv", ["compare.py", *options])
    with pytest.raises(SystemExit):
        main()
    assert message in capsys.readouterr().err
