"""What only a GPU shows. With two GPUs or more, the workers' exchange over CUDA IPC, too."""

import pytest
import torch
from launching import run
from stock import BOTH, arguments, gpt2, same, text

from layup_hf import LayupTrainer
from layup_hf.blocks import split_into_blocks
from layup_hf.gossip.moments import MeanMoments
from layup_hf.optim.direction import Direction

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
        args = arguments(tmp_path, config, use_cpu=False, full_determinism=True, **chosen)
        cls(model=models[-1], args=args, train_dataset=text()).train()
    assert same(*models)
    assert not same(models[0], gpt2().cuda())


@pytest.mark.parametrize("options", [{}, {"fp16": True}, {"bf16": True}], ids=str)
def test_no_block_makes_the_processor_wait_for_the_device(tmp_path, options):
    class Watched(LayupTrainer):
        def training_step(self, *args, **kwargs):
            torch.cuda.set_sync_debug_mode("error" if self.state.global_step > 2 else "default")
            try:
                return super().training_step(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    args = arguments(tmp_path, use_cpu=False, max_grad_norm=0.3, dataloader_pin_memory=True, **options)
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
    args = arguments(tmp_path, use_cpu=False, torch_compile=True, max_steps=20, logging_steps=1)
    trainer = LayupTrainer(model=gpt2(), args=args, train_dataset=text())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < sum(losses[:4])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("options", [[], ["--bf16=True"], ["--fp16=True"]], ids=str)
def test_workers_exchange_over_cuda_ipc(tmp_path, options):
    common = ["--use_cpu=False", "--max_steps=12", "--per_device_train_batch_size=4", "--learning_rate=1e-2"]
    for result in run("train.py", 2, [*common, *options, f"--output_dir={tmp_path}/out"], tmp_path).results():
        assert result["starts_from_rank_0"]
        assert result["same_at_end"]
        assert result["consensus"][-1]["mass_exact"]
        assert result["consensus"][-1]["error"] < 1e-6
