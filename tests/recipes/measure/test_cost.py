"""The model of cost: what it says of memory is what operations read and write, and its table is in the documents."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from layup_hf.blocks import split_into_blocks
from layup_hf.gossip.merging import Merger
from layup_hf.optim.clipping import BlockClipper
from layup_hf.optim.direction import Direction
from recipes.measure import cost as model_of_cost
from recipes.measure.cost import (
    ADAMW,
    AHEAD,
    CASES,
    CLIP,
    COPY,
    ETHERNET_100,
    GPT2,
    H100,
    MERGE,
    MODELS,
    NORM,
    NVLINK_4,
    cost,
)

SIZE = 4096


class Traffic(TorchDispatchMode):
    """Bytes that operations on large tensors read and write."""

    def __init__(self):
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.name()
        if not func.is_view:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                moved = sum(t.nbytes for t in tree_leaves(value) if isinstance(t, torch.Tensor) and t.numel() >= SIZE)
                is_written = argument.is_write and not (
                    name.startswith("aten::_fused_adamw_") and argument.name == "grads"
                )
                is_read = not (name == "aten::copy_" and argument.name == "self")
                self.num_bytes += moved * (is_written + is_read)
            if not any(argument.is_write for argument in func._schema.arguments):
                made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.numel() >= SIZE]
                self.num_bytes += sum(t.nbytes for t in made)
        return result


@pytest.fixture
def layer():
    model = nn.Linear(64, 64, bias=False)
    model.weight.grad = torch.randn_like(model.weight)
    return model


def passes(action, layer):
    with Traffic() as traffic, torch.no_grad():
        action()
    return traffic.num_bytes / layer.weight.nbytes


def test_a_merge_of_one_peer(layer):
    theirs = torch.randn_like(layer.weight)
    assert passes(lambda: Merger().merge([layer.weight], [([theirs], 0.3)]), layer) == MERGE.computing
    two = [([theirs], 0.3), ([theirs], 0.2)]
    assert passes(lambda: Merger().merge([layer.weight], two), layer) == 2 * MERGE.computing


def test_a_copy_of_a_peers_block(layer):
    slot = torch.empty_like(layer.weight)
    assert passes(lambda: slot.copy_(layer.weight), layer) == COPY.copying


def test_clipping(layer):
    clipper = BlockClipper(split_into_blocks(layer), 1.0, torch.device("cpu"))
    (block,) = split_into_blocks(layer)
    assert passes(lambda: clipper.clip_block(block), layer) == NORM.computing + CLIP.computing


def test_the_step(layer):
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    optimizer.step()
    assert passes(optimizer.step, layer) == ADAMW.computing


def test_looking_ahead(layer):
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    (block,) = split_into_blocks(layer)
    direction = Direction([block], optimizer, looks_ahead=True)

    def step():
        with direction.stepping(block):
            optimizer.step()

    step()
    assert passes(step, layer) == ADAMW.computing + AHEAD.computing


@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{model.name} {model.tokens}")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[1]} {case[0].name} {case[2].name}")
def test_merging_takes_what_the_budget_gives_and_the_link_carries(model, case):
    device, workers, link = case
    found = cost(model, device, link, workers)
    step = found.compute + found.ours
    assert found.merge <= max(0.02 * step, model_of_cost.LEAST * found.merge / max(found.peers, 1e-9)) * 1.0001
    assert found.link <= step * 1.0001
    assert 0.9 < found.layup <= 1
    assert found.peers <= workers - 1


def test_one_worker_is_the_trainer_and_a_slow_link_slows_only_ddp():
    assert cost(GPT2, H100, NVLINK_4, 1).layup == 1
    slow = cost(GPT2, H100, ETHERNET_100, 64)
    assert slow.ddp < 0.5
    assert slow.layup > 0.94


def test_the_table_in_the_documents_is_what_it_predicts():
    from pathlib import Path

    page = (Path(__file__).parents[3] / "docs" / "gpus.md").read_text("utf-8")
    assert model_of_cost.table() in page
