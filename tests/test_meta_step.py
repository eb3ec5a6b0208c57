"""A whole step on the `meta` device: nothing in it may wait for a device, and each block may queue so much and no more.

Tensors there have no values. What would make the processor wait on a GPU (`item`, a comparison, a copy to the host)
raises.
"""

import sys
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

import layup_hf.optim.direction
from layup_hf.blocks import split_into_blocks
from layup_hf.blocks.hooks import BlockHooks
from layup_hf.device import HOST
from layup_hf.gossip.engine import GossipEngine
from layup_hf.gossip.topology import PeerSampler
from layup_hf.ledger import Ledger
from layup_hf.optim.clipping import BlockClipper
from layup_hf.optim.direction import Direction
from layup_hf.optim.optimizer import BlockOptimizer

VIEWS = {"view", "detach", "slice", "select", "as_strided", "split", "unbind", "t", "alias", "_unsafe_view", "expand"}
"""Operations that queue nothing."""


class Operations(TorchDispatchMode):
    """Counts what is queued, by who asks for it; a copy from one device to another raises.

    Attributes:
        who: Whose operations are counted now.
        counts: By that and name.
    """

    def __init__(self):
        super().__init__()
        self.who, self.counts = "model", Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        result = func(*args, **(kwargs or {}))
        tensors = [a for a in (*args, result) if isinstance(a, torch.Tensor)]
        if name in ("copy_", "_to_copy") and len({tensor.device for tensor in tensors}) > 1:
            raise AssertionError(f"{self.who}: a copy between devices in {name}")
        if name not in VIEWS:
            self.counts[self.who, name] += 1
        return result

    def of(self, who):
        return sum(count for (whose, _), count in self.counts.items() if whose == who)


class MetaWindows:
    """Peers whose blocks are all here."""

    kind = "shared"

    def __init__(self, blocks, workers):
        memory = np.zeros(Ledger.size(len(blocks), workers), np.uint64)
        self.ledgers = [Ledger(memory, len(blocks), workers, rank) for rank in range(workers)]
        self.ledger = self.ledgers[0]
        self.theirs = [[torch.empty_like(tensor) for tensor in block.tensors] for block in blocks]
        self.released = 0

    def read(self, peer, block):
        return self.theirs[block]

    def release(self, peer, block):
        self.released += 1

    def arrived(self, is_free):
        return ()

    def publish(self, block):
        return HOST.mark()


class MetaWorker:
    """One worker of several, with the parts that a step goes through, in the order in which the trainer has them."""

    def __init__(self, monkeypatch, workers=4, dtype=torch.float32):
        monkeypatch.setattr(layup_hf.optim.direction, "age_of", lambda optimizer, parameter: 5)
        for module in ("torch.optim.optimizer", "torch.utils._foreach_utils"):  # a GPU's kernels, without the GPU
            monkeypatch.setattr(sys.modules[module], "_get_fused_kernels_supported_devices", lambda: ["meta"])
        config = GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=2, n_positions=32)
        with torch.device("meta"):
            self.model = GPT2LMHeadModel(config).to(dtype)
        self.model.train()
        inner = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.blocks = split_into_blocks(self.model)
        self.optimizer = BlockOptimizer(inner, self.blocks)
        self.optimizer.parts_for_certain = True
        self.windows = MetaWindows(self.blocks, workers)
        self.engine = GossipEngine(self.blocks, self.windows, PeerSampler(0, workers))
        self.clipper = BlockClipper(self.blocks, 1.0, torch.device("meta"))
        direction = Direction(self.blocks, inner, looks_ahead=True)
        self.optimizer.around_step = direction.stepping
        self.operations = Operations()
        self.hooks = BlockHooks(self.blocks, on_block_ready=self._take, before_forward=self._merge)

    def _as(self, who, action, block):
        before, self.operations.who = self.operations.who, who
        action(block)
        self.operations.who = before

    def _merge(self, block):
        self._as("merge", self.engine.merge, block)

    def _take(self, block):
        self._merge(block)
        self._as("clip", self.clipper.clip_block, block)
        self._as("step", self.optimizer.step_block, block)
        self._as("offer", self.engine.offer, block)

    def step(self, offers):
        """Forward and backward, with so many peers that offer each block."""
        for block in self.blocks:
            for peer in range(1, offers + 1):
                self.windows.ledgers[peer].offer(block.index, 0, 1000)
        tokens = torch.zeros(2, 16, dtype=torch.long, device="meta")
        with self.hooks, self.operations:
            self.hooks.begin_backward()
            self.model(input_ids=tokens).logits.float().square().mean().backward()
            self.hooks.finish_backward()
        self.optimizer.step()
        return self.operations


@pytest.fixture
def worker(monkeypatch):
    return lambda **options: MetaWorker(monkeypatch, **options)


@pytest.mark.parametrize("offers", [0, 1, 3])
def test_a_step_waits_for_nothing_and_a_merge_is_one_operation_for_each_peer(worker, offers):
    mine = worker()
    operations = mine.step(offers)
    blocks = len(mine.blocks)
    assert mine.engine.counts["merges"] == offers * blocks == mine.windows.released
    assert mine.engine.counts["offers"] > 0
    assert operations.of("merge") == operations.counts["merge", "_foreach_lerp_"] == offers * blocks
    assert operations.of("offer") == 0
    assert operations.of("clip") <= 42 * blocks
    assert operations.of("step") <= 12 * blocks


@pytest.mark.parametrize("offers", [1, 3])
def test_in_bf16_a_merge_waits_for_nothing_either(worker, offers):
    mine = worker(dtype=torch.bfloat16)
    operations = mine.step(offers)
    tensors = sum(len(block.tensors) for block in mine.blocks)
    assert operations.of("merge") <= (8 + 3 * offers) * tensors


def test_what_would_wait_raises(worker):
    """So the tests above can fail."""
    mine = worker()
    merge = mine.engine.merge

    def careless(block):
        merge(block)
        float(block.tensors[0].sum())

    mine.engine.merge = careless
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        mine.step(1)
