"""What TensorBoard and Trackio get to see: everything that rank 0 logs, once, and from rank 0 alone."""

import json
import sqlite3

import numpy as np
import pytest
from launching import run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

FIGURES = {
    "eval/loss",
    "train/grad_norm",
    "train/layup/bytes_read",
    "train/layup/consensus_distance",
    "train/layup/mass",
    "train/layup/mass_max",
    "train/layup/mass_min",
    "train/layup/merges",
    "train/layup/offers",
    "train/layup/skipped_offers",
    "train/learning_rate",
    "train/loss",
}
AT_THE_END = {"train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
        return run("reporting.py", 2, [], folder)


def logged(reported, without=frozenset()):
    """(tag, step, value) of every figure that rank 0 has logged."""
    figures = []
    for entry in reported.results()[0]["logs"]:
        for key, value in entry.items():
            tag = f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"
            if key not in {"step", *without}:
                figures.append((tag, entry["step"], value))
    return sorted(figures)


def test_tensorboard_has_every_figure_once(reported):
    (file,) = [path for path in (reported.folder / "tensorboard").rglob("*") if path.is_file()]
    events = EventAccumulator(str(file)).Reload()
    figures = [(tag, e.step, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]
    expected = [(tag, step, float(np.float32(value))) for tag, step, value in logged(reported)]
    assert sorted(figures) == sorted(expected)
    assert {tag for tag, *_ in figures} >= FIGURES


def test_trackio_has_every_figure_once(reported):
    (database,) = (reported.folder / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_name, metrics FROM metrics").fetchall()
    assert {name for name, _ in rows} == {"parity"}
    figures = []
    for _, text in rows:
        metrics = json.loads(text)
        step = metrics.pop("train/global_step")
        figures += [(tag, step, value) for tag, value in metrics.items()]
    assert sorted(figures) == logged(reported, without=AT_THE_END)


def test_a_log_of_training_has_its_own_figures_beside_the_trainers(reported):
    for result in reported.results():
        entry = next(entry for entry in result["logs"] if "loss" in entry)
        own = {key for key in entry if key.startswith("layup/")}
        assert entry.keys() - own == {"loss", "grad_norm", "learning_rate", "epoch", "step"}
        assert own


def test_nothing_is_uploaded_and_no_server_is_started(reported):
    """`run` has made sure that no process is left."""
    assert [result["connections"] for result in reported.results()] == [[], []]
