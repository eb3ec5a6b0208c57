"""The table and the pictures of a comparison."""

import math

import pytest
from made import SETTINGS, made, memory

from recipes.measure.compare.comparison import make_run
from recipes.measure.compare.drawing import draw
from recipes.measure.compare.methods import METHODS
from recipes.measure.compare.report import NAMES, best_runs, mean_and_spread, row, significance, sooner, table


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
    assert (name, rate, loss) == ("LayUp", "0.002, the grid's edge", "2.250 ± 0.354")
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


def test_a_rate_is_the_best_only_with_others_on_both_sides():
    runs = [made("ddp", rate, 1, (4.0, loss)) for rate, loss in ((1e-3, 3.2), (2e-3, 3.0), (4e-3, 3.1))]
    assert row(runs, "ddp", 1)[1] == "0.002"
    assert row(runs[1:], "ddp", 1)[1] == "0.002, the grid's edge"
    assert row([*runs[:2], made("ddp", 4e-3, 1, (4.0, None), failure="diverged")], "ddp", 1)[1] == "0.002"


def test_layup_is_set_beside_each_other_method_seed_by_seed():
    seeds = range(1, 7)
    runs = [made("ddp", 1e-3, seed, loss=3.0 + seed) for seed in seeds]
    runs += [made("layup", 2e-3, seed, loss=2.9 + seed - 0.01 * (seed % 2)) for seed in seeds]
    runs += [made("co2", 1e-3, seed, loss=2.9 + seed) for seed in (6, 1)]
    runs += [made("adpsgd", 1e-3, seed, loss=loss) for seed, loss in ((1, 3.0), (2, None))]
    lines = significance({"settings": SETTINGS, "runs": runs}).splitlines()
    assert lines[2] == "| of | loss of LayUp less that |"
    assert lines[4:] == [
        "| DDP | -0.105 ± 0.005 (p = 0.031) |",
        "| CO2 | none (-0.005 with 2 of the 6 seeds that the test needs) |",
        "| AD-PSGD | none (not every seed came to its end) |",
        "| LayUp | - |",
    ]
    assert lines[0] in table({"settings": SETTINGS, "runs": runs})
    assert significance({"settings": SETTINGS, "runs": runs[:6]}) == ""


def test_the_table_says_what_was_learnt():
    parts = {part: {"characters": 12345, "sha256": part * 8} for part in ("train", "held_out")}
    about = table({"settings": SETTINGS, "runs": [made("ddp", 1e-3, 1)], "data": {**parts, "vocabulary": 78}})
    assert "Data: 12,345 characters to train on (SHA-256 traintraintraint), 12,345 characters held out" in about
