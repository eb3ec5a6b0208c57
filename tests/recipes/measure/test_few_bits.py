"""What fewer bytes gain, simulated: the numbers add up, and blocks come as they are to."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from launching import ROOT
from stock import gpt2

from layup_hf.ledger.mixing import UNIT
from recipes.measure import coding
from recipes.measure.few_bits import Worker, mass_mean
from recipes.measure.local_adam import Task


@pytest.mark.parametrize(("wire_dtype", "share"), [("fp32", 1), ("bf16", 1 / 2), ("int8", 1 / 4), ("int4", 1 / 8)])
def test_what_comes_has_its_size_and_mass_stays(wire_dtype, share):
    workers = [Worker(rank, Task(gpt2(), iter(()), []), wire_dtype) for rank in range(3)]
    size = 4 * sum(p.numel() for p in workers[0].parameters)
    draws = torch.Generator().manual_seed(1)
    for _ in range(12):
        for worker in workers:
            with torch.no_grad():
                for parameter in worker.parameters:
                    parameter += 1e-3 * torch.randn(parameter.shape, generator=draws)
            worker.optimizer.steps += 1
            worker.offer([(worker.rank + jump) % 3 for jump in (1, 2)])
        for worker in workers:
            worker.receive(workers, 0.3 * size)
        mass_mean(workers)  # or raises
    for worker in workers:
        assert all(0 < own < 3 * UNIT for own in worker.own)
        merged, came = worker.figures["models"], worker.figures["bytes"] / size
        assert came <= 12 * 0.3
        if wire_dtype in ("fp32", "bf16"):
            assert came == pytest.approx(share * merged)
        else:  # each block has come as it is once
            coded = sum(worker.layout.coded_bytes) / size  # of so small a model, much is what aligns tensors
            assert share < coded < 2.5 * share
            assert merged - 1 > 2
            assert came - 1 <= coded * (merged - 1 + worker.receiving.resent) * 1.1


def test_a_link_that_carries_nothing_merges_nothing():
    workers = [Worker(rank, Task(gpt2(), iter(()), []), "int8") for rank in range(2)]
    workers[0].offer([1])
    workers[1].receive(workers, 0.0)
    assert workers[1].figures == {"bytes": 0.0, "models": 0.0}


def test_the_command_compares_all_formats(tmp_path, text_file):
    task = ["--workers=2", "--steps=4", "--batch_size=2", "--block_size=16", "--vocab_size=300", "--seeds=1"]
    task += ["--learning_rates=1e-2", "--config_overrides=n_layer=2,n_embd=16,n_head=2", "--at_once=1"]
    command = [
        sys.executable,
        "-m",
        "recipes.measure.few_bits",
        *task,
        "--fractions=0.5",
        f"--folder={tmp_path}",
        f"--train_file={text_file}",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    results = {result["wire_dtype"]: result for result in json.loads((tmp_path / "few-bits.json").read_text())}
    assert list(results) == ["ddp", "none", "fp32", "bf16", "int8", "int4"]
    assert (results["none"]["models_per_step"], results["none"]["bytes_per_step"]) == (0, 0)
    assert results["bf16"]["models_per_step"] > results["fp32"]["models_per_step"] > 0
    assert len({result["loss"] for result in results.values()}) == 6
    assert done.stdout.count("\n| ") == 7


def test_the_time_of_coding_is_measured_for_each_format(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["coding", "--numel=5000"])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # other tests want theirs
    coding.main()
    assert re.findall(r"int\d, (?:Native|Torch)Coder: written in [\d.]+ ns, read in [\d.]+ ns", capsys.readouterr().out)
