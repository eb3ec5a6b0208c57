"""Memory of a GPU in windows: who opens it where, what is copied when, and what happens where it cannot be opened."""

import copy
import logging
import os
import pickle

import pytest
import torch
from fleet import FirstPeers, gather_between_threads, together
from queues import FakeQueues, SegmentIpc
from torch import nn

from layup_hf.blocks import split_into_blocks
from layup_hf.fleet.data import is_data
from layup_hf.gossip.engine import GossipEngine
from layup_hf.ledger.mixing import UNIT
from layup_hf.windows import SharedWindows
from layup_hf.windows.ipc import CudaIpc
from layup_hf.windows.segment import Pulse


class Gpus:
    """Workers on devices that are not there, each with queues of its own."""

    def __init__(self, *devices, width=5, dtype=torch.float32, fails=None, wrong=(), may_end=False, layers=3):
        torch.manual_seed(0)
        count = len(devices)
        self.models = [nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))).to(dtype) for _ in devices]
        self.blocks = [split_into_blocks(model) for model in self.models]
        self.queues = [FakeQueues() for _ in devices]
        self.ipc = [SegmentIpc(d, (fails or {}).get(r), r in wrong) for r, d in enumerate(devices)]
        for_rank = gather_between_threads(count)

        def opening(rank):
            return lambda: SharedWindows.open(
                self.blocks[rank],
                rank,
                for_rank(rank),
                ipc=self.ipc[rank],
                queues=self.queues[rank],
                may_end=may_end,
            )

        self.windows = together([opening(rank) for rank in range(count)])
        for windows in self.windows:
            if isinstance(windows, Exception):
                raise windows
        self.free = set(range(layers))
        self.engines = [
            GossipEngine(
                blocks, windows, FirstPeers(rank, count), queues=queues, is_free=lambda index: index in self.free
            )
            for rank, (blocks, windows, queues) in enumerate(zip(self.blocks, self.windows, self.queues, strict=True))
        ]

    def fill(self, rank, index, value):
        for tensor in self.blocks[rank][index].tensors:
            tensor.fill_(value)

    def close(self):
        for windows, ipc in zip(self.windows, self.ipc, strict=True):
            windows.close()
            ipc.close()


@pytest.fixture
def gpus():
    made = []

    def make(*args, **options):
        made.append(Gpus(*args, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_parameters_live_in_one_buffer_per_block_with_storages_of_their_own(gpus):
    workers = gpus("a", "b")
    first = workers.blocks[0][0]
    ends = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in first.tensors]
    assert ends[1][0] - ends[0][1] < 64
    for parameter in first.parameters:
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
        assert parameter.requires_grad
    assert len(workers.ipc[0]._segments) == 4  # three blocks and the probe


def test_workers_of_one_gpu_read_in_place_and_others_by_copies(gpus):
    workers = gpus("a", "a", "b")
    workers.fill(1, 0, 3.0)
    assert bool((workers.windows[0].read(1, 0)[0] == 3).all())
    assert workers.windows[2].read(1, 0) is None  # has been asked for
    workers.queues[2].run_copies()
    assert bool((workers.windows[2].read(1, 0)[0] == 3).all())


def test_whoever_reads_opens_memory_on_its_own_device(gpus):
    workers = gpus("a", "b")
    assert {device.type for ipc in workers.ipc for device in ipc.opened} == {"cpu"}


def test_nothing_waits_for_a_copy_and_a_merge_comes_when_it_is_there(gpus):
    workers = gpus("a", "b")
    sender, receiver = workers.engines
    workers.fill(0, 0, 2.0)
    workers.fill(1, 0, 0.0)
    sender.offer(workers.blocks[0][0])
    workers.queues[0].run()
    sender.announce()
    finished = workers.queues[1].finished
    receiver.merge(workers.blocks[1][0])
    assert receiver.counts["merges"] == 0
    workers.fill(0, 0, 3.0)  # what is read is what is there when the copy is made
    workers.queues[1].run_copies()
    receiver.merge(workers.blocks[1][2])  # at the next moment, as block 0 is free
    assert receiver.counts["merges"] == 1
    assert float(workers.blocks[1][0].tensors[0][0, 0]) == pytest.approx(3.0 / 3)
    assert workers.queues[1].waited == 0
    assert workers.queues[1].finished == finished


def test_a_slot_is_written_again_only_when_the_merge_of_what_it_held_has_run(gpus):
    workers = gpus("a", "b")
    windows, queues = workers.windows[1], workers.queues[1]
    for block in (0, 1):
        workers.fill(0, block, float(block + 1))
        assert windows.read(0, block) is None
    assert windows.read(0, 2) is None  # no slot is left, and nothing is begun
    queues.run_copies()
    seen = windows.read(0, 0)
    kept = []
    queues.compute(lambda: kept.append(seen[0].clone()))  # the merge, queued
    windows.release(0, 0)
    workers.fill(0, 2, 9.0)
    assert windows.read(0, 2) is None
    queues.run_copies()
    assert windows.read(0, 2) is None  # the copy waits for the merge
    queues.run_computing()
    assert bool((kept[0] == 1).all())
    queues.run_copies()
    assert bool((windows.read(0, 2)[0] == 9).all())


def test_what_is_offered_is_copied_ahead_free_blocks_first(gpus):
    workers = gpus("a", "b")
    for block in workers.blocks[0]:
        workers.engines[0].offer(block)
    workers.queues[0].run()
    workers.engines[0].announce()
    workers.free = {2}
    workers.windows[1].arrived(workers.free.__contains__)
    workers.queues[1].run_copies()
    assert workers.windows[1].arrived(workers.free.__contains__) == [2, 0]


def test_an_offer_is_announced_when_the_device_has_made_the_step(gpus):
    workers = gpus("a", "a")
    sender, receiver = workers.engines
    ledger = workers.windows[1].ledger
    workers.fill(0, 0, 1.0)
    workers.queues[0].compute(lambda: workers.fill(0, 0, 2.0))  # the step
    sender.offer(workers.blocks[0][0])
    assert ledger.pending(0) == []
    assert ledger.staleness(0, 1) == 0  # the step has not been made
    workers.queues[0].run_one()
    sender.merge(workers.blocks[0][1])  # the next moment that the engine has
    assert [peer for peer, _ in ledger.pending(0)] == [0]
    assert ledger.staleness(0, 1) == 1
    workers.fill(1, 0, 0.0)
    receiver.merge(workers.blocks[1][0])
    assert float(workers.blocks[1][0].tensors[0][0, 0]) == pytest.approx(2.0 / 3)


def test_what_was_not_announced_before_a_consensus_point_is_not_offered_after_it(gpus):
    workers = gpus("a", "a")
    sender = workers.engines[0]
    sender.offer(workers.blocks[0][0])
    sender.pause()
    accounts = {rank: windows.ledger.account() for rank, windows in enumerate(workers.windows)}
    for windows in workers.windows:
        windows.ledger.settle(accounts)
    workers.queues[0].run()
    sender.announce()
    assert workers.windows[1].ledger.pending(0) == []
    assert workers.windows[0].ledger.own(0) == UNIT


def test_a_copy_from_before_a_consensus_point_is_not_merged_after_it(gpus):
    workers = gpus("a", "b")
    workers.fill(0, 0, 1.0)
    assert workers.windows[1].read(0, 0) is None
    workers.queues[1].run_copies()
    accounts = {rank: windows.ledger.account() for rank, windows in enumerate(workers.windows)}
    for windows in workers.windows:
        windows.ledger.settle(accounts)
    workers.fill(0, 0, 5.0)
    assert workers.windows[1].read(0, 0) is None
    workers.queues[1].run_copies()
    assert bool((workers.windows[1].read(0, 0)[0] == 5).all())


@pytest.mark.parametrize(
    "fault",
    [
        {"fails": {1: RuntimeError("pidfd_getfd: Operation not permitted")}},
        {"fails": {0: RuntimeError("peer access is not supported between these two devices")}},
        {"wrong": (2,)},
    ],
    ids=str,
)
def test_where_one_worker_cannot_open_the_memory_of_others_all_go_through_the_host(gpus, fault, caplog):
    with caplog.at_level(logging.WARNING):
        workers = gpus("a", "b", "c", **fault)
    said = [record.message for record in caplog.records if "pinned host memory" in record.message]
    assert len(said) == 1
    assert "CUDA IPC" in said[0]
    if "fails" in fault:
        assert str(next(iter(fault["fails"].values()))) in said[0]
    else:
        assert "do not hold what it has written" in said[0]
    check_staged(workers)


def test_where_workers_may_end_memory_of_gpus_is_not_read(gpus, caplog):
    with caplog.at_level(logging.WARNING):
        workers = gpus("a", "b", "c", may_end=True)
    assert not caplog.records
    assert not any(ipc.opened for ipc in workers.ipc)
    check_staged(workers)


def check_staged(workers):
    """What is offered is copied to the host when it has been stepped, and announced when it is there."""
    workers.fill(0, 0, 1.0)
    workers.queues[0].compute(lambda: workers.fill(0, 0, 2.0))
    workers.engines[0].offer(workers.blocks[0][0])
    ledger = workers.windows[1].ledger
    workers.queues[0].run_copies()
    assert ledger.pending(0) == []  # the copy waits for the step
    workers.queues[0].run_computing()
    workers.engines[0].announce()
    assert ledger.pending(0) == []
    workers.queues[0].run_copies()
    workers.engines[0].announce()
    assert [peer for peer, _ in ledger.pending(0)] == [0]
    workers.fill(0, 0, 7.0)  # a later step, not offered: peers do not see it
    workers.fill(1, 0, 0.0)
    workers.engines[1].merge(workers.blocks[1][0])
    workers.queues[1].run_copies()
    workers.engines[1].merge(workers.blocks[1][0])
    assert float(workers.blocks[1][0].tensors[0][0, 0]) == pytest.approx(2.0 / 4)


def test_a_fallback_does_not_move_the_blocks_again(gpus):
    workers = gpus("a", "b", fails={1: RuntimeError("no peer access")})
    ours = {address for address in workers.ipc[0]._segments}
    assert workers.blocks[0][0].tensors[0].data_ptr() in ours


def test_blocks_are_of_every_dtype(gpus):
    for dtype in (torch.bfloat16, torch.float64):
        workers = gpus("a", "b", dtype=dtype)
        workers.windows[1].read(0, 1)
        workers.queues[1].run_copies()
        seen = workers.windows[1].read(0, 1)
        assert all(torch.equal(a, b) for a, b in zip(seen, workers.blocks[0][1].tensors, strict=True))


def test_a_peer_whose_process_has_ended_is_not_read(gpus):
    workers = gpus("a", "a", "b")
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it has ended, and is still there for its parent
    for windows in (workers.windows[1], workers.windows[2]):
        windows._views[0].pulse = Pulse(child)
    assert workers.windows[1].read(0, 0) is None
    assert workers.windows[2].read(0, 0) is None
    workers.queues[2].run_copies()
    assert workers.windows[2].read(0, 0) is None
    os.waitpid(child, 0)
    assert not Pulse(child).beats
    assert Pulse(os.getpid()).beats


def test_an_excluded_peer_is_not_read_once_the_device_is_through(gpus):
    workers = gpus("a", "b")
    workers.windows[1].read(0, 0)
    before = workers.queues[1].finished
    workers.windows[1].exclude(0)
    workers.windows[1].exclude(0)
    assert workers.queues[1].finished == before + 1
    assert workers.windows[1].read(0, 0) is None


def test_a_model_that_lives_in_buffers_is_saved_copied_and_pickled_as_before(gpus, tmp_path):
    from safetensors.torch import load_file, save_file

    workers = gpus("a", "b")
    model = workers.models[0]
    state = model.state_dict()
    save_file(state, tmp_path / "model.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in load_file(tmp_path / "model.safetensors").items())
    torch.save(model[0].bias, tmp_path / "bias.pt")
    assert (tmp_path / "bias.pt").stat().st_size < 3000  # the bias alone, not the block
    twin = copy.deepcopy(model)
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    assert twin[0].weight.data_ptr() != model[0].weight.data_ptr()
    assert all(
        torch.equal(a, b) for a, b in zip(pickle.loads(pickle.dumps(state)).values(), state.values(), strict=True)
    )


def test_what_is_saved_outlives_the_windows(gpus):
    workers = gpus("a", "b")
    kept = workers.blocks[0][0].tensors[0].detach()
    value = kept.clone()
    workers.close()
    workers.models[0] = workers.blocks[0] = None
    assert torch.equal(kept, value)


def test_a_handle_is_opened_on_the_readers_device_without_the_producers_event(monkeypatch):
    """As torch makes it: by the names of what rebuilds a tensor in another process."""
    from torch.multiprocessing import reductions

    names = reductions.rebuild_cuda_tensor.__code__.co_varnames[:15]
    given = dict(zip(names, range(15), strict=True)) | {"storage_handle": b"handle", "storage_size_bytes": 24}
    reduced = (reductions.rebuild_cuda_tensor, tuple(given.values()))
    monkeypatch.setattr(reductions, "reduce_tensor", lambda tensor: reduced)
    exported = CudaIpc().export(torch.zeros(1))
    assert is_data(exported)
    seen = {}
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", lambda **arguments: seen.update(arguments))
    CudaIpc().open(exported, torch.device("cuda", 1))
    assert set(seen) == set(names)
    assert {name: seen[name] for name in exported} == {name: given[name] for name in exported}
    assert (seen["storage_device"], seen["event_sync_required"], seen["tensor_offset"]) == (1, False, 0)
    assert (seen["tensor_size"], seen["dtype"]) == (torch.Size([24]), torch.uint8)


@pytest.mark.parametrize(
    ("variable", "value", "asked"),
    [
        ("PYTORCH_CUDA_ALLOC_CONF", "{}True", ["{}False", "{}True"]),
        ("PYTORCH_ALLOC_CONF", "roundup:8,{}True", ["roundup:8,{}False", "roundup:8,{}True"]),
        ("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64", []),
        ("PYTORCH_CUDA_ALLOC_CONF", "", []),
    ],
)
def test_what_is_exported_is_in_no_expandable_segment(monkeypatch, variable, value, asked):
    for each in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(each, raising=False)
    name = "expandable_segments:"
    monkeypatch.setenv(variable, value.format(name))
    seen = []
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", seen.append)
    CudaIpc().allocate(8, torch.device("cpu"))
    assert seen == [setting.format(name) for setting in asked]
