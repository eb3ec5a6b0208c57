"""The kernel for GPUs, by Triton's interpreter on the CPU: the same numbers as by torch's operations."""

import os
import subprocess
import sys

import pytest

CODE = """
import sys

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

sys.path.insert(0, sys.argv[1])
from test_onepass import SHAPES, assert_close, random_step, sides

from layup_hf.optim.on_cuda import CudaPass
from layup_hf.optim.onepass import OnePass, Rows


@settings(max_examples=10, deadline=None, phases=[Phase.generate])
@given(
    shapes=st.lists(st.sampled_from([*SHAPES, (2, 1500), (130, 3), (20000,)]), min_size=1, max_size=4),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    merges=st.integers(0, 3),
    clips=st.booleans(),
    is_longer=st.booleans(),
    compares=st.booleans(),
    looks_ahead=st.booleans(),
    seed=st.integers(0, 100),
)
def test(shapes, layout, merges, clips, is_longer, compares, looks_ahead, seed):
    pair = by_pass, in_parts = sides(shapes, looks_ahead, layout, seed)
    by_pass.one_pass = OnePass([by_pass.block], by_pass.optimizer, by_pass.direction, CudaPass(torch.device("cpu")))
    for _ in range(2):
        gradients, offers, factor, rows = random_step(by_pass, merges, clips, is_longer, compares)
        others = Rows(rows.lengths, rows.theirs)
        for side in pair:
            side.give(gradients)
        by_pass.one_pass.step(by_pass.block, offers, factor, rows)
        in_parts.step_in_parts(offers, factor, others)
        assert_close(by_pass.everything(), in_parts.everything())
        if compares:
            assert_close([rows.squares, rows.seconds], [others.squares, others.seconds])


test()
print("the same")
"""


def test_it_is_what_torchs_operations_make():
    """In a process of its own, as Triton is told to interpret before it is imported."""
    pytest.importorskip("triton", reason="torch brings Triton for CUDA; its CPU builds do not")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", CODE, os.path.dirname(__file__)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.stdout.strip() == "the same", done.stdout + done.stderr
