"""The recipes that take LayUp apart in one process: `local_adam.py` and `late_gradients.py`."""

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from late_gradients import Replicas

from layup_hf.mixing import UNIT

RECIPES = Path(__file__).parents[2] / "recipes"
TASK = ["--workers=2", "--steps=4", "--batch_size=2", "--block_size=16", "--vocab_size=300", "--learning_rates=1e-2",
        "--seeds=1", "--config_overrides=n_layer=1,n_embd=16,n_head=2", "--warmup=0.25", "--at_once=1"]  # fmt: skip


@settings(deadline=None)
@given(workers=st.integers(2, 6), turns=st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=40))
def test_replicas_keep_their_mass_and_their_mean(workers, turns):
    start = [torch.zeros(3, dtype=torch.float64), torch.ones(2, dtype=torch.float64)]
    replicas = Replicas(start, workers)
    for number, values in enumerate(replicas.values):
        for value in values:
            value += number
    mean = [tensor.clone() for tensor in replicas.mean()]
    for worker, merges in turns:
        (replicas.merge if merges else replicas.offer)(worker % workers)
        assert sum(replicas.own) + sum(replicas.offers.values()) == workers * UNIT
        assert all(units > 0 for units in replicas.offers.values())
    assert all(torch.allclose(*pair, rtol=1e-12) for pair in zip(replicas.mean(), mean, strict=True))


def test_a_merge_moves_towards_the_sender_by_the_mass_that_was_offered():
    replicas = Replicas([torch.zeros(1, dtype=torch.float64)], 2)
    replicas.values[0][0] += 1.0
    replicas.offer(0)
    assert (replicas.own, replicas.offers) == ([UNIT // 2, UNIT], {(0, 1): UNIT // 2})
    replicas.merge(1)
    assert float(replicas.values[1][0]) == pytest.approx(float(Fraction(1, 3)))
    assert (replicas.own, replicas.offers) == ([UNIT // 2, UNIT + UNIT // 2], {})


def recipe(name, folder, *options):
    command = [sys.executable, str(RECIPES / name), *TASK, f"--folder={folder}", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout, json.loads((folder / name.replace("_", "-").replace(".py", ".json")).read_text())


def test_both_recipes_train_the_same(tmp_path):
    """What one calls DDP is what the other calls the mean; the rest differs from it, and from each other."""
    table, late = recipe("late_gradients.py", tmp_path)
    losses = {(run["at_once"], run["looks_ahead"]): run["loss"] for run in late}
    assert losses.keys() == {(number, ahead) for number in (0, 1, 2) for ahead in (False, True)}
    assert len(set(losses.values())) == 6
    assert "| LayUp, 2 at once | yes |" in table

    table, local = recipe("local_adam.py", tmp_path)
    by_rule = {run["rule"]: run["loss"] for run in local}
    assert by_rule.keys() == {"mean", "local", "compared", "in time"}
    assert len(set(by_rule.values())) == 4
    assert by_rule["mean"] == losses[0, False]
    assert "| compared |" in table

    again, more = recipe("late_gradients.py", tmp_path, "--seeds", "1", "2", "--computing", "0")
    assert more[: len(late)] == late  # what has been made is not made again
    assert [run["seed"] for run in more[len(late) :]] == [2, 2]
    assert "(2)" in again
