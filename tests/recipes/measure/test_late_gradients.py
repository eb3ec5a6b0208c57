"""What takes LayUp apart in one process: `local_adam.py` and `late_gradients.py`."""

import json
import sys
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stock import gpt2

from layup_hf.ledger.mixing import UNIT
from layup_hf.optim.matrices import layer_matrices
from layup_hf.optim.muon import MuonAdamW
from recipes.measure import late_gradients, local_adam
from recipes.measure.late_gradients import Optimizer, Replicas, make_replicas, matrices_of

TASK = ["--workers=2", "--steps=4", "--batch_size=2", "--block_size=16", "--vocab_size=300", "--learning_rates=1e-2",
        "--seeds=1", "--config_overrides=n_layer=2,n_embd=16,n_head=2", "--warmup=0.25", "--at_once=1"]  # fmt: skip


@given(workers=st.integers(2, 6), turns=st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=40))
def test_replicas_keep_their_mass_and_their_mean(workers, turns):
    start = [torch.zeros(3, dtype=torch.float64), torch.ones(2, dtype=torch.float64)]
    replicas = Replicas(start, workers, begins=0)
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
    replicas = Replicas([torch.zeros(1, dtype=torch.float64)], 2, begins=0)
    replicas.values[0][0] += 1.0
    replicas.offer(0)
    assert (replicas.own, replicas.offers) == ([UNIT // 2, UNIT], {(0, 1): UNIT // 2})
    replicas.merge(1)
    assert float(replicas.values[1][0]) == pytest.approx(float(Fraction(1, 3)))
    assert (replicas.own, replicas.offers) == ([UNIT // 2, UNIT + UNIT // 2], {})


def test_the_later_a_block_comes_in_the_model_the_less_late_is_its_gradient():
    """From 0, where forward begins, to 1, where backward ends; GPT-2's output layer is tied to its embeddings."""
    model = gpt2()
    blocks = make_replicas(model, 2, whole=False)
    layer, norm, output = 3280, 32, 50 * 16
    total = 2 * layer + norm + output
    assert [block.begins for block in blocks] == [0, 0, layer / total, 2 * layer / total]
    assert [len(block.parameters) for block in blocks] == [2, 12, 12, 2]
    assert (blocks[0].read_at, blocks[0].stepped_at) == (0, 1)
    lateness = [block.stepped_at - block.read_at for block in blocks]
    assert lateness == pytest.approx([1 - block.begins for block in blocks])

    (whole,) = make_replicas(model, 2, whole=True)
    assert len(whole.parameters) == 28
    assert (whole.read_at, whole.stepped_at) == (0, 1)


def test_muon_steps_the_matrices_of_layers_as_the_real_one():
    """And AdamW, in its first step, all else by about the learning rate."""
    model = gpt2()
    gradients = [torch.randn_like(p) for p in model.parameters()]
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = Optimizer(list(model.parameters()), matrices_of(model, "muon"))
    real = MuonAdamW(model.parameters(), layer_matrices(model), lr=1.0)
    for _ in range(2):
        optimizer.update(gradients)
        steps = optimizer.step("local", 2, looks_ahead=False)
        for parameter, gradient, value in zip(model.parameters(), gradients, before, strict=True):
            parameter.grad = gradient
            parameter.data.copy_(value)
        real.step()
        for parameter, step, value in zip(model.parameters(), steps, before, strict=True):
            assert torch.allclose(value - step, parameter, rtol=1e-4, atol=1e-5)


@pytest.fixture
def measure(monkeypatch, tmp_path, capsys, text_file, hub_cache):
    """Runs one of the two by its command line; what it has printed, and its results."""
    monkeypatch.chdir(tmp_path)

    def run(name, *options):
        monkeypatch.setattr(
            sys, "argv", [f"{name}.py", *TASK, f"--train_file={text_file}", f"--folder={tmp_path}", *options]
        )
        {"late_gradients": late_gradients, "local_adam": local_adam}[name].main()
        return capsys.readouterr().out, json.loads((tmp_path / f"{name.replace('_', '-')}.json").read_text())

    return run


def test_both_train_the_same(measure):
    """What one calls DDP is what the other calls the mean; the rest differs from it, and from each other."""
    table, late = measure("late_gradients")
    losses = {(run["at_once"], run["looks_ahead"]): run["loss"] for run in late}
    assert losses.keys() == {(number, ahead) for number in (0, 1, 2) for ahead in (False, True)}
    assert len(set(losses.values())) == 6
    assert "| LayUp, 2 at once | yes |" in table

    table, local = measure("local_adam")
    by_rule = {run["rule"]: run["loss"] for run in local}
    assert by_rule.keys() == {"mean", "local", "compared", "in time"}
    assert len(set(by_rule.values())) == 4
    assert by_rule["mean"] == losses[0, False]
    assert "| compared |" in table

    table, both = measure("late_gradients", "--whole", "--momentum", "nesterov", "--computing", "1", "2")
    whole = {run["at_once"]: run["loss"] for run in both if run["whole"]}
    assert whole[1] == pytest.approx(losses[1, True], rel=1e-6)  # nobody steps meanwhile, so it is the same
    assert whole[2] != pytest.approx(losses[2, True], rel=1e-6)  # the last block is read after the other has stepped it
    assert "| LayUp, 2 at once, the model as one block | yes |" in table
    late = both

    table, several = measure(
        *("late_gradients", "--optimizer", "muon", "--second_moment", "mean", "own"),
        *("--computing", "0", "2", "--momentum", "nesterov"),
    )
    muon = {(run["second_moment"], run["at_once"]): run["loss"] for run in several if run["optimizer"] == "muon"}
    assert muon.keys() == {("mean", 0), ("mean", 2), ("own", 2)}
    assert len({*muon.values(), *losses.values()}) == 3 + len(losses)
    assert "| LayUp, 2 at once, Muon, own second moments | yes |" in table
    late = several

    again, more = measure("late_gradients", "--seeds", "1", "2", "--computing", "0")
    assert more[: len(late)] == late  # what has been made is not made again
    assert [run["seed"] for run in more[len(late) :]] == [2, 2]
    assert "(2)" in again
