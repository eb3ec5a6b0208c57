"""What only a GPU shows; one is enough. Several workers share it, and talk over gloo, as NCCL refuses that."""

import argparse

import pytest
import torch
from launching import run
from stock import BOTH, arguments, gpt2, same, text

from layup_hf import LayupConfig, LayupTrainer
from layup_hf.blocks import split_into_blocks
from layup_hf.gossip.moments import MeanMoments
from layup_hf.ledger.mixing import UNIT
from layup_hf.optim.direction import Direction
from recipes.measure.first_gpu.part import facts

SHARED = ["--use_cpu=False", "--ddp_backend=gloo", "--per_device_train_batch_size=4", "--learning_rate=1e-2"]
ON_ONE = {"ACCELERATE_TORCH_DEVICE": "cuda:0", "CUDA_VISIBLE_DEVICES": "0"}


def on_gpu(folder, cls=LayupConfig, **options):
    """Of one process that uses one GPU, however many it sees: else the Trainer would use DataParallel."""
    args = arguments(folder, cls, use_cpu=False, **options)
    args._n_gpu = 1
    return args


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "activation_checkpointing": True},
        {"bf16": True},
        {"fp16": True},
        {"fp16": True, "clip": "exact", "max_grad_norm": 0.3, "optim": "sgd"},
        {"clip": "exact", "max_grad_norm": 0.3},
    ],
    ids=str,
)
def test_the_trajectory_is_the_trainers(tmp_path, options):
    models = []
    for cls, config in BOTH:
        chosen = {name: value for name, value in options.items() if cls is LayupTrainer or name != "clip"}
        models.append(gpt2())
        args = on_gpu(tmp_path, config, full_determinism=True, **chosen)
        cls(model=models[-1], args=args, train_dataset=text()).train()
    assert same(*models)
    assert not same(models[0], gpt2().cuda())
    assert all(torch.isfinite(parameter).all() for parameter in models[0].parameters())


@pytest.mark.parametrize("options", [{}, {"fp16": True}, {"bf16": True}], ids=str)
def test_no_block_makes_the_processor_wait_for_the_device(tmp_path, options):
    class Watched(LayupTrainer):
        def training_step(self, *args, **kwargs):
            torch.cuda.set_sync_debug_mode("error" if self.state.global_step > 2 else "default")
            try:
                return super().training_step(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    args = on_gpu(tmp_path, max_grad_norm=0.3, dataloader_pin_memory=True, **options)
    assert Watched(model=gpt2(), args=args, train_dataset=text()).train().global_step == 6


def test_comparing_moments_does_not_make_the_processor_wait(monkeypatch):
    model = gpt2().cuda()
    blocks, optimizer = split_into_blocks(model), torch.optim.AdamW(model.parameters(), fused=True)
    moments = MeanMoments.open(blocks, optimizer, 0, [], lambda item: [item])
    theirs = {part.theirs: [torch.ones_like(tensor) for tensor in part.first] for part in moments._parts.values()}
    monkeypatch.setattr(moments, "_peers", [1])
    monkeypatch.setattr(moments._windows, "read", lambda peer, block: theirs[block])
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    direction = Direction(blocks, optimizer, looks_ahead=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            for block in blocks:
                with direction.stepping(block, moments.lengths(block)):
                    pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(part.lengths for part in moments._parts.values())


def test_layers_are_compiled_by_inductor(tmp_path):
    args = on_gpu(tmp_path, torch_compile=True, max_steps=20, logging_steps=1)
    trainer = LayupTrainer(model=gpt2(), args=args, train_dataset=text())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < sum(losses[:4])


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("options", [[], ["--bf16=True"], ["--fp16=True"], ["--merge_at=arrival"]], ids=str)
def test_workers_that_share_a_gpu_exchange_over_cuda_ipc(tmp_path, options, workers, monkeypatch):
    check_shared(tmp_path, options, workers, monkeypatch)


def test_so_they_do_with_expandable_segments(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    check_shared(tmp_path, [], 2, monkeypatch)


def test_and_by_the_host_where_workers_may_end(tmp_path, monkeypatch):
    check_shared(tmp_path, ["--lease_seconds=30"], 2, monkeypatch)


def check_shared(tmp_path, options, workers, monkeypatch):
    """All mass is there, all hold one model, and from the fourth step on no step waits for the device."""
    for name, value in ON_ONE.items():
        monkeypatch.setenv(name, value)
    common = [*SHARED, "--max_steps=12", "--forbid_waits=True", f"--output_dir={tmp_path}/out"]
    for result in run("train.py", workers, [*common, *options], tmp_path).results():
        assert result["starts_from_rank_0"]
        assert result["same_at_end"]
        assert result["consensus"][-1]["mass_exact"]
        assert result["consensus"][-1]["error"] < 1e-6
        assert result["logs"][-1]["layup/mass"] == workers


def test_a_worker_reads_what_its_peer_has_written_in_every_kind_of_memory(tmp_path):
    """As `recipes.measure.first_gpu` looks at it first."""
    options = argparse.Namespace(device="cuda", folder=tmp_path)
    found = {name: value for name, value in facts(options).items() if name.startswith("windows")}
    assert len(found) == 4
    for workers in found.values():
        for worker in workers:
            assert worker["counts"]["merges"] > 0, worker
            assert worker["masses"] == [2 * UNIT] * 4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_workers_exchange_between_two_gpus(tmp_path):
    common = ["--use_cpu=False", "--max_steps=12", "--per_device_train_batch_size=4", f"--output_dir={tmp_path}/out"]
    for result in run("train.py", 2, common, tmp_path).results():
        assert result["same_at_end"]
        assert result["consensus"][-1]["mass_exact"]
