"""Many models in one batch compute what each does, and the links' simulation is that of `few_bits`."""

import json
import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from layup_hf.ledger.mixing import UNIT
from recipes.measure import slow_links
from recipes.measure.few_bits import Worker, mass_mean
from recipes.measure.local_adam import Moments, Task, clipped, mean_of
from recipes.measure.many_models import Models, Optimizer
from recipes.measure.slow_links import Links


def make_models(count):
    config = GPT2Config(
        n_layer=2,
        n_embd=12,
        n_head=3,
        vocab_size=20,
        n_positions=8,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",
    )
    models = []
    for seed in range(count):
        set_seed(seed)
        models.append(GPT2LMHeadModel(config))
    return models


def by_model(many, flat):
    """Of each seed and worker, the parameters in the order of the blocks."""
    return [[view[row] for view in many.views(flat).values()] for row in range(flat.size(0) * flat.size(1))]


def test_losses_and_gradients_are_those_of_the_models():
    models = make_models(2)
    many, tokens = Models(models, 2), torch.randint(20, (4, 3, 8))
    losses, gradients = many.loss(many.views(many.flat), tokens), by_model(many, many.gradients(tokens))
    for row, model in enumerate(model for model in models for _ in range(2)):
        loss = model(input_ids=tokens[row], labels=tokens[row]).loss
        torch.testing.assert_close(losses[row], loss, rtol=1e-5, atol=1e-6)
        names = dict(model.named_parameters())
        found = clipped(torch.autograd.grad(loss, [names[f"transformer.{name}"] for name in many.places]))
        for mine, expected in zip(gradients[row], found, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "rule", "ahead"), [("own", "local", True), ("ddp", "mean", True), ("plain", "local", False)]
)
def test_steps_are_those_of_one_after_the_other(kind, rule, ahead):
    many = Models(make_models(1), 2)
    optimizer = Optimizer(many, {kind})
    values = by_model(many, many.flat.clone())
    plain = [Moments(parameters) for parameters in values]
    for step in range(4):
        gradients = 0.1 * torch.randn(many.flat.shape, generator=torch.Generator().manual_seed(step))
        split = by_model(many, gradients)
        optimizer.step(gradients, 1e-2)
        for one, parameters, own in zip(plain, values, split, strict=True):
            one.update(mean_of(split) if rule == "mean" else own)
            for p, change in zip(parameters, one.step(rule, 2, ahead), strict=True):
                p.sub_(change, alpha=1e-2)
    for mine, expected in zip(by_model(many, many.flat), values, strict=True):
        for m, e in zip(mine, expected, strict=True):
            torch.testing.assert_close(m, e, rtol=1e-4, atol=1e-5)


def test_noise_in_rows_is_found_by_comparing_workers():
    """With gradients that are nothing but noise, a second moment as of the mean is a W-th part."""
    many = Models(make_models(1), 4)
    optimizer, draws = Optimizer(many, {"rows"}), torch.Generator().manual_seed(0)
    for _ in range(300):
        optimizer.step(torch.randn(many.flat.shape, generator=draws), 0.0)
    square = optimizer._second / (1 - 0.999**300)
    left = optimizer._without_noise(square, 4, 1 - 0.999**301)
    assert float(left.mean()) == pytest.approx(1 / 4, rel=0.15)


@pytest.mark.parametrize("in_turn", [True, False])
def test_links_carry_what_those_of_few_bits_do(in_turn):
    """The same blocks at the same time, with the same weights."""
    (model,) = make_models(1)
    many = Models([model], 4)
    links = Links(many, {"turns"} if in_turn else set())
    workers = [Worker(rank, Task(model, iter(()), []), "fp32") for rank in range(4)]
    for worker in workers:
        worker.turns = slow_links.Turns(len(worker.own), [(worker.rank + 1) % 4, (worker.rank + 2) % 4])
        if not in_turn:
            worker.turns = None
    draws = torch.Generator().manual_seed(3)
    for _ in range(30):
        noise = torch.randn(many.flat.shape, generator=draws)
        many.flat.add_(noise)
        for worker, parts in zip(workers, by_model(many, noise), strict=True):
            names = dict(worker.task.model.named_parameters())
            for name, part in zip(many.places, parts, strict=True):
                names[f"transformer.{name}"].data.add_(part)
            worker.optimizer.steps += 1
            worker.offer([(worker.rank + jump) % 4 for jump in (1, 2)])
        links.offer()
        for worker in workers:
            worker.receive(workers, 0.3 * 4 * many.flat.size(2))
        links.carry(0.3 * many.flat.size(2))
    assert links.own == [worker.own for worker in workers]
    expected = torch.cat([tensor.flatten() for block in mass_mean(workers) for tensor in block])
    torch.testing.assert_close(links.mean().flatten(), expected, rtol=1e-4, atol=1e-4)
    assert sum(map(sum, links.own)) + sum(links.offers.values()) == 4 * UNIT * len(many.blocks)


@pytest.mark.parametrize("kind", [{"parts"}, {"moved"}, {"fresh"}, {"momentum"}, {"outer"}, {"whole"}])
def test_every_way_to_merge_keeps_equal_models_equal(kind):
    many = Models(make_models(1), 3)
    links, before = Links(many, kind), many.flat.clone()
    for _ in range(6):
        links.offer()
        links.carry(0.5 * many.flat.size(2))
    assert links.merged > 1
    torch.testing.assert_close(many.flat, before)


def test_what_moves_while_a_block_is_on_its_way_is_kept_only_with_moved():
    """A drift that all workers share: stale blocks would take some of it away."""
    kept = {}
    for kind in ("own", "moved", "fresh"):
        many = Models(make_models(1), 4)
        links, before = Links(many, {kind, "whole"}), many.flat[:, :1].clone()
        for _ in range(40):
            many.flat.add_(1.0)
            links.offer()
            links.carry(0.2 * many.flat.size(2))
        kept[kind] = float((links.mean() - before).mean()) / 40
    assert kept["moved"] == pytest.approx(1, abs=1e-4)
    assert kept["fresh"] == pytest.approx(1, abs=1e-4)
    assert kept["own"] < 0.95


def test_an_all_reduce_takes_its_bytes_and_leaves_all_equal():
    many = Models(make_models(1), 4)
    many.flat.add_(torch.randn(many.flat.shape))
    links, mean = Links(many, {"together", "whole"}), many.flat.mean(1, keepdim=True)
    links.average(1.49 * many.flat.size(2))
    assert links.merged == 0
    links.average(0.02 * many.flat.size(2))
    assert links.merged == 1
    torch.testing.assert_close(many.flat, mean.expand_as(many.flat))


def test_the_command_prints_a_row_for_each_method(tmp_path, text_file, monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # other tests want theirs
    task = ["--workers=2", "--steps=4", "--batch_size=2", "--block_size=16", "--vocab_size=300", "--seeds", "1", "2"]
    task += ["--learning_rates=1e-2", "--config_overrides=n_layer=2,n_embd=16,n_head=2", "--at_once=1"]
    methods = ["ddp", "average+exact", "own+turns", "rows", "own+muon", "together+outer9"]
    command = ["slow_links", *task, "--methods", *methods, "--fractions=0.5"]
    monkeypatch.setattr(sys, "argv", [*command, f"--folder={tmp_path}", f"--train_file={text_file}"])
    slow_links.main()
    results = json.loads((tmp_path / "slow-links.json").read_text())
    assert [result["method"] for result in results] == methods
    ddp, same, *others = (result["losses"] for result in results)
    assert same == pytest.approx(ddp, abs=1e-3)  # the mean of all steps is the step of the mean gradient
    assert len({loss for losses in (ddp, *others) for loss in losses}) == 10
    assert capsys.readouterr().out.count("\n| ") == 7
    monkeypatch.setattr(sys, "argv", ["slow_links", "--methods", "own+nothing"])
    with pytest.raises(SystemExit):
        slow_links.main()
