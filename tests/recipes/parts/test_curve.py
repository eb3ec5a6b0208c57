"""What a run leaves behind besides the model."""

import json
import sys

from transformers import TrainerState

from recipes.parts.curve import TimedLog, draw_curve, write_results


def test_log_entries_get_the_time(monkeypatch):
    clock = iter([10.0, 100.0, 102.5, 104.0])
    monkeypatch.setattr("recipes.parts.curve.time.perf_counter", lambda: next(clock))
    timed, state = TimedLog(), TrainerState(global_step=3)
    timed.on_train_begin(None, state, None)
    timed.on_log(None, state, None, logs={"loss": 2.0})
    timed.on_train_end(None, state, None)
    assert timed.points == [{"seconds": 2.5, "step": 3, "loss": 2.0}]
    assert timed.seconds == 4.0


def test_the_curve_is_a_picture(tmp_path):
    points = [{"seconds": 0.1, "loss": 3.0}, {"seconds": 0.2, "eval_loss": 2.5}, {"seconds": 0.3, "other": 1.0}]
    assert draw_curve(points, "title", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not draw_curve([], "title", tmp_path / "curve.png")
    assert "pip install matplotlib" in capsys.readouterr().out


def test_results_appear_whole(tmp_path):
    write_results(tmp_path / "results.json", {"a": 1})
    assert json.loads((tmp_path / "results.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
