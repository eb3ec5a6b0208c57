"""Windows between workers of one host."""

import gc
import os
import resource
import subprocess
import sys

import pytest
import torch
from fleet import Fleet, open_fleet
from torch import nn

from layup_hf.blocks import split_into_blocks
from layup_hf.windows import shared
from layup_hf.windows.memory import HostMemory
from layup_hf.windows.segment import Segment


def model(width=4, dtype=torch.float32):
    return nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width)).to(dtype)


def memory_segments():
    """Descriptors of shared memory in this process; a mapping holds one of its own."""
    gc.collect()
    return [link for link in map(read_link, os.listdir("/proc/self/fd")) if "layup_hf" in link]


def read_link(descriptor):
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


def mappings():
    with open("/proc/self/maps") as file:
        return sum("layup_hf" in line for line in file)


def test_peers_read_the_live_memory():
    models = [model(), model()]
    fleet = Fleet(models)
    with torch.no_grad():
        models[1][0].weight.fill_(3.0)
        models[1][1].running_mean.fill_(5.0)
    linear = fleet.windows[0].read(1, 0)
    norm = fleet.windows[0].read(1, 1)
    assert torch.equal(linear[0], models[1][0].weight)
    assert torch.equal(norm[2], models[1][1].running_mean)


def test_parameters_keep_identity_value_and_a_storage_of_their_own():
    ours = model()
    before = {name: (id(p), p.detach().clone()) for name, p in ours.named_parameters()}
    Fleet([ours, model()])
    for name, parameter in ours.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
    assert len({p.untyped_storage().data_ptr() for p in ours.parameters()}) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_floating_dtype(dtype):
    fleet = Fleet([model(dtype=dtype), model(dtype=dtype)])
    assert fleet.windows[0].read(1, 0)[0].dtype == dtype


def test_only_the_owner_can_write():
    """A stray write into a peer's block must not corrupt it silently; the mapping is for reading only."""
    code = (
        "import torch\nfrom torch import nn\nfrom fleet import Fleet\n"
        "fleet = Fleet([nn.Linear(2, 2), nn.Linear(2, 2)])\nfleet.windows[0].read(1, 0)[0].fill_(1.0)\n"
    )
    tests = os.path.dirname(os.path.dirname(__file__))
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": f"{tests}:{os.path.dirname(tests)}"}, timeout=100
    )
    assert done.returncode == -11  # a segmentation fault, in the process that made the mistake


def test_nothing_is_left_open():
    before = len(memory_segments()), mappings()
    fleet = Fleet([model(), model(), model()])
    assert mappings() > before[1]
    fleet.close()
    fleet.close()
    del fleet
    assert (len(memory_segments()), mappings()) == before


def test_opening_twice_moves_the_parameters_again():
    models = [model(), model()]
    values = [p.detach().clone() for p in models[0].parameters()]
    Fleet(models).close()
    fleet = Fleet(models)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), values, strict=True))
    assert torch.equal(fleet.windows[1].read(0, 0)[0], models[0][0].weight)


def test_different_models_are_refused_on_every_worker():
    errors = open_fleet([split_into_blocks(model(4)), split_into_blocks(model(5))])
    for error in errors:
        assert isinstance(error, ValueError)
        assert "Worker 1 has a different model" in str(error)
        assert "(5, 5)" in str(error)


def test_several_hosts_are_refused_on_every_worker():
    for error in open_fleet([split_into_blocks(model()), split_into_blocks(model())], hosts=["alpha", "beta"]):
        assert isinstance(error, ValueError)
        assert "all workers on one host" in str(error)
        assert "alpha" in str(error)
        assert "beta" in str(error)


def test_too_little_memory_is_an_error_on_every_worker():
    """The limit on file size holds for memory files too."""
    before = len(memory_segments())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    fleet = [split_into_blocks(nn.Linear(1000, 1000)) for _ in range(2)]
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        errors = open_fleet(fleet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    for error in errors:
        assert isinstance(error, MemoryError)
        assert "Cannot reserve 4 MiB of shared memory" in str(error)
    assert len(memory_segments()) == before


def test_a_failure_on_one_worker_is_raised_on_all(monkeypatch):
    before = len(memory_segments())
    original, calls = HostMemory.share, []

    def fail_once(memory):
        calls.append(memory)
        if len(calls) == 1:
            raise OSError("no such device")
        return original(memory)

    monkeypatch.setattr(HostMemory, "share", fail_once)
    errors = open_fleet([split_into_blocks(model()), split_into_blocks(model())])
    assert sorted(type(error).__name__ for error in errors) == ["OSError", "RuntimeError"]
    assert all("no such device" in str(error) for error in errors)
    calls.clear()
    del errors
    assert len(memory_segments()) == before


def test_a_peer_that_has_gone_gives_a_message():
    segment = Segment.create(4096)
    segment.release()
    with pytest.raises(ValueError, match="must run as one user in one container"):
        segment.map(writable=False)


def test_another_process_under_the_same_number_is_noticed():
    segment = Segment.create(4096)
    other = Segment(segment.process, segment.descriptor, segment.inode + 1, 4096)
    with pytest.raises(ValueError, match="is not the worker it should be"):
        other.map(writable=False)
    segment.release()


def test_platforms_without_memfd_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ValueError, match="need Linux"):
        shared.SharedWindows.open([], 0, lambda item: [item])
