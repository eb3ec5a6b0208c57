"""The arithmetic of a merge, in every precision."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layup_hf.gossip import fused
from layup_hf.gossip.merging import Merger, round_at_random

LOW = [torch.bfloat16, torch.float16]


def test_in_full_precision_peers_are_merged_one_after_the_other_to_the_last_bit():
    torch.manual_seed(0)
    mine = [torch.randn(7, 3), torch.randn(5, dtype=torch.float64), torch.randn(4, dtype=torch.complex64)]
    peers = [([torch.randn_like(tensor) for tensor in mine], weight) for weight in (0.25, 0.5, 0.125)]
    expected = [tensor.clone() for tensor in mine]
    for theirs, weight in peers:
        for tensor, its in zip(expected, theirs, strict=True):
            tensor.lerp_(its, weight)
    Merger().merge(mine, peers)
    assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))


def test_what_came_in_fewer_digits_is_merged_as_it_is():
    mine, theirs = torch.randn(300), torch.randn(300).bfloat16()
    expected = mine.lerp(theirs.float(), 0.3)
    Merger().merge([mine], [([theirs], 0.3)])
    assert torch.equal(mine, expected)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@given(data=st.data())
def test_a_number_is_rounded_to_a_neighbour_and_right_in_the_mean(dtype, data):
    number = data.draw(st.floats(-1000, 1000, width=32).filter(lambda x: abs(x) > 1e-3))
    seed = data.draw(st.integers(0, 2**31))
    exact = torch.full((4000,), number)
    found = round_at_random(exact.clone(), dtype, torch.Generator().manual_seed(seed)).double()
    nearest = exact[:1].to(dtype)
    unit = float((torch.nextafter(nearest, torch.full_like(nearest, float("inf"))) - nearest).abs().double())
    assert bool(((found - number).abs() < 2.01 * unit).all())
    assert len(found.unique()) <= 2
    assert float(found.mean()) == pytest.approx(float(exact[0]), abs=0.05 * unit)  # 6 standard deviations


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_what_can_be_represented_stays_and_so_does_what_is_not_finite(dtype):
    values = torch.randn(10000).to(dtype)
    assert torch.equal(round_at_random(values.float(), dtype), values)
    odd = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0])
    odd = torch.cat([odd, torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)])  # a GPU's own nan
    for _ in range(20):
        found = round_at_random(odd.clone(), dtype)
        assert found[:2].tolist() == [float("inf"), -float("inf")]
        assert bool(found[[2, 5]].isnan().all())
        assert found[3:5].tolist() == [0, 0]


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_all_peers_are_rounded_once(dtype):
    """Eight equal peers with 1/9 of the mass each: one of them alone could not move a number, all together do."""
    mine = torch.ones(20000, dtype=dtype)
    theirs = torch.full_like(mine, 1 + 4 * torch.finfo(dtype).eps)
    peers = [([theirs], 1 / (number + 2)) for number in range(8)]  # one after the other: each counts alike
    Merger().merge([mine], peers)
    expected = 1 + 4 * torch.finfo(dtype).eps * 8 / 9
    assert float(mine.double().mean()) == pytest.approx(expected, abs=0.05 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("shape", [(0,), (), (3, 5), (2**17 + 3,)], ids=str)
def test_tensors_of_every_shape_are_merged_in_place(dtype, shape):
    mine, theirs = torch.zeros(shape, dtype=dtype), torch.ones(shape, dtype=dtype)
    address = mine.data_ptr()
    Merger().merge([mine, mine.new_zeros(4, 6).t()], [([theirs, mine.new_ones(4, 6).t()], 0.5)])
    assert mine.data_ptr() == address
    assert torch.equal(mine, torch.full_like(mine, 0.5))


def gossip(dtype, difference, rounds, noise=0.0, merge=None):
    """Relative distance of eight replicas that merge all to all with a weight of 1/8, and their mean's drift."""
    generator = torch.Generator().manual_seed(0)
    workers, size = 8, 4000
    base = torch.randn(size, generator=generator)
    spread = torch.randn(workers, size, generator=generator)
    spread -= spread.mean(0)
    replicas = list((base * (1 + difference * spread)).to(dtype))
    begin = torch.stack(replicas).double().mean(0)
    mergers = [Merger(rank) for rank in range(workers)]
    for _ in range(rounds):
        before = [replica.clone() for replica in replicas]
        for rank, replica in enumerate(replicas):
            peers = [([before[other]], 1 / 8) for other in _others(rank, workers)]
            (merge or mergers[rank].merge)([replica], peers)
            if noise:  # as an optimizer steps that loses nothing either
                stepped = replica.float() + noise * base * torch.randn(size, generator=generator)
                replica.copy_(stepped if dtype == torch.float32 else round_at_random(stepped, dtype))
    all_of = torch.stack(replicas).double()
    mean = all_of.mean(0)
    distance = float(((all_of - mean).square().sum(1).mean() / mean.square().sum()).sqrt())
    drift = float((mean - begin).norm() / begin.norm())
    return distance, drift


def _others(rank, workers):
    return [other for other in range(workers) if other != rank]


def rounded_to_nearest(mine, peers):
    """As a merge in bf16 itself is."""
    for theirs, weight in peers:
        torch._foreach_lerp_(mine, theirs, weight)


@pytest.mark.parametrize("difference", [0.009, 0.0049, 0.0024])
def test_replicas_in_bf16_come_together_however_near_they_are(difference):
    """Rounded to the nearest they stay where they are: that is what there was before."""
    nearest, _ = gossip(torch.bfloat16, difference, 50, merge=rounded_to_nearest)
    found, drift = gossip(torch.bfloat16, difference, 50)
    assert nearest > 0.5 * difference
    assert found < 0.05 * difference
    assert drift < 0.004  # about half a unit of the last place


def test_workers_with_noise_of_their_own_stay_near_each_other_in_bf16():
    """Each steps by 0.05 % of its weights at random, as in training."""
    exact, nearest, found = (
        gossip(dtype, 0.0, 100, noise=0.0005, merge=merge)[0]
        for dtype, merge in ((torch.float32, None), (torch.bfloat16, rounded_to_nearest), (torch.bfloat16, None))
    )
    assert exact < 0.001
    assert nearest > 0.005
    assert found < 0.003


KERNEL = """
import torch
from layup_hf.gossip import fused
from layup_hf.gossip import fused
from layup_hf.gossip.merging import Merger, _ROUNDED
for dtype, cut in _ROUNDED.items():
    unit = torch.finfo(dtype).eps
    mine, theirs = torch.ones(5000, dtype=dtype), torch.full((5000,), 1 + 4 * unit, dtype=dtype)
    fused.merge(mine, [(theirs, 1 / 8)], cut, 7)
    assert set(mine.tolist()) == {1.0, 1 + unit}
    assert abs((mine.double().mean() - 1) / unit - 0.5) < 0.05
    same = torch.randn(3000).to(dtype)
    before = same.clone()
    fused.merge(same, [(before, 0.3), (before, 0.2)], cut, 8)
    assert torch.equal(same, before)
    for peers in (1, 2, 3, 4):
        mine, others = torch.randn(1500).to(dtype), [(torch.randn(1500).to(dtype), 0.2) for _ in range(peers)]
        exact = mine.float()
        for theirs, weight in others:
            exact.lerp_(theirs.float(), weight)
        assert fused.can_merge(mine, others)
        fused.merge(mine, others, cut, 5)
        assert bool(((mine.float() - exact).abs() <= 1.01 * unit * exact.abs().clamp(min=2**-14)).all())
    odd = torch.tensor([float("nan")], dtype=dtype)
    fused.merge(odd, [(odd.clone(), 0.5)], cut, 3)
    assert bool(odd.isnan().all())
    fused.merge(odd[:0], [(odd[:0], 0.5)], cut, 3)
fused.is_available = lambda device: True
mine = torch.zeros(2, 3, dtype=torch.bfloat16)
Merger().merge([mine], [([torch.ones_like(mine)], 0.5)])
assert torch.equal(mine, torch.full_like(mine, 0.5))
"""


def test_the_kernel_does_the_same():
    """By Triton's interpreter, on a CPU; torch for CPUs comes without Triton."""
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", KERNEL], env={**os.environ, "TRITON_INTERPRET": "1"}, timeout=200)
    assert done.returncode == 0


def test_where_the_kernel_does_not_run_torchs_operations_do(monkeypatch, caplog):
    def fails(*args):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(fused, "is_available", lambda device: True)
    monkeypatch.setattr(fused, "merge", fails)
    monkeypatch.setattr(fused, "can_merge", lambda *args: True)
    merger = Merger()
    for _ in range(2):
        mine = torch.zeros(5, dtype=torch.bfloat16)
        merger.merge([mine], [([torch.ones_like(mine)], 0.5)])
        assert torch.equal(mine, torch.full_like(mine, 0.5))
    assert [record.message for record in caplog.records] == [
        "LayUp: merges in bf16 and fp16 are slow, as Triton does not work (RuntimeError: no C compiler). It needs a C "
        "compiler on this machine."
    ]
