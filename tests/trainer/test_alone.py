"""One process that trains alone where several were probably meant: one line says so."""

import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from launching import ROOT
from stock import arguments, gpt2

from layup_hf import LayupTrainer
from layup_hf.trainer.alone import why_alone

VARIABLES = ("ACCELERATE_MIXED_PRECISION", "MASTER_PORT", "WORLD_SIZE")
SCRIPT = """
import sys
from stock import arguments, gpt2
from layup_hf import LayupTrainer
args = arguments(sys.argv[1])
LayupTrainer(model=gpt2(), args=args)
print("workers", args.world_size)
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


def process(device="cpu", **options):
    return SimpleNamespace(**{"world_size": 1, "device": torch.device(device), **options})


@pytest.mark.parametrize(
    ("options", "is_said"),
    [(["--cpu", "--num_processes", "2"], True), (["--cpu", "--num_processes", "1"], False)],
    ids=["two", "one"],
)
def test_a_launcher_that_starts_one_process_of_two_is_seen(tmp_path, options, is_said):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *options, str(script), str(tmp_path)]
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launcher, env=os.environ | paths, capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout == "workers 1\n"
    assert (done.stderr.count("LayUp: this process trains alone, but accelerate was asked for several") == 1) == is_said
    assert ("`accelerate launch --multi_gpu --num_processes N`, also on CPUs" in done.stderr) == is_said


def test_gpus_that_nobody_uses_are_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert why_alone(process("cuda")) == (
        "4 GPUs are visible. Launch with `accelerate launch --multi_gpu --num_processes 4`"
    )
    assert why_alone(process("cuda", world_size=2)) is None
    assert why_alone(process("cuda", job_to_join=object())) is None
    assert why_alone(process()) is None  # `use_cpu=True`
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert why_alone(process("cuda")) is None


def test_a_plain_start_is_left_in_peace(tmp_path, caplog, monkeypatch):
    with caplog.at_level(logging.WARNING, logger="layup_hf"):
        LayupTrainer(model=gpt2(), args=arguments(tmp_path))
        monkeypatch.setenv("MASTER_PORT", "29500")  # without accelerate's launcher, for something else
        LayupTrainer(model=gpt2(), args=arguments(tmp_path))
    assert caplog.messages == []
