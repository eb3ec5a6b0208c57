"""A comparison: which runs are made, and what becomes of those that fail."""

import json
import math

import pytest
from made import SETTINGS, made, memory

from recipes.measure.compare.comparison import Comparison, grid, last_error, make_run, steps_for, wanted
from recipes.measure.compare.report import best_rate, final_loss


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


def test_a_best_rate_at_the_edge_is_looked_for_beyond_it():
    settings = {**SETTINGS, "widen": 2}
    runs = [made("ddp", rate, 1, loss=loss) for rate, loss in ((1e-3, 3.0), (2e-3, 2.9))]
    assert grid(SETTINGS, runs, "ddp") == [1e-3, 2e-3]
    assert grid(settings, [], "ddp") == grid(settings, runs[:1], "ddp") == [1e-3, 2e-3]
    assert grid(settings, runs, "ddp") == [1e-3, 2e-3, 4e-3]
    assert make_run("ddp", 4e-3, 1) in wanted(settings, ["ddp"], runs)
    assert make_run("ddp", 2e-3, 2) not in wanted(settings, ["ddp"], [*runs, memory("ddp")])  # not until it has ended
    inside = [*runs, made("ddp", 4e-3, 1, loss=3.0), memory("ddp")]
    assert grid(settings, inside, "ddp") == [1e-3, 2e-3, 4e-3]
    assert wanted(settings, ["ddp"], inside) == [make_run("ddp", 2e-3, 2)]
    diverged = made("ddp", 4e-3, 1, (4.0, None), failure="diverged")
    assert grid(settings, [*runs, diverged], "ddp") == [1e-3, 2e-3, 4e-3]
    higher = [*runs, made("ddp", 4e-3, 1, loss=2.8)]
    assert grid(settings, higher, "ddp") == [1e-3, 2e-3, 4e-3, 8e-3]
    assert grid(settings, [*higher, made("ddp", 8e-3, 1, loss=2.7)], "ddp") == [1e-3, 2e-3, 4e-3, 8e-3]  # two more
    lower = [made("ddp", rate, 1, loss=loss) for rate, loss in ((1e-3, 2.9), (2e-3, 3.0))]
    assert grid(settings, lower, "ddp") == [5e-4, 1e-3, 2e-3]


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
    lines = ["working", "    raise ValueError(", "ValueError: this one", "WorkerFailure: of the other"]
    output = "\n".join([*lines, "ChildFailedError: of the launcher"])
    assert last_error(output).splitlines()[-1] == "ValueError: this one"
