"""Every trainable parameter is in exactly one block, and every layer is a block."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CAUSAL, TINY, gpt2, resnet, t5
from torch import nn

from layup_hf.blocks import split_into_blocks


def blocks_by_name(model):
    return {block.name: block for block in split_into_blocks(model)}


def ids(tensors):
    return sorted(id(tensor) for tensor in tensors)


def assert_partition(model):
    """Each trainable parameter in one block under one of its names, and nothing else in any."""
    blocks = split_into_blocks(model)
    named = dict(model.named_parameters(remove_duplicate=False))
    assert ids(p for block in blocks for p in block.parameters) == ids(p for p in model.parameters() if p.requires_grad)
    for index, block in enumerate(blocks):
        assert block.index == index
        assert block.parameters or block.buffers
        assert [named[name] for name in block.parameter_names] == list(block.parameters)
    return blocks


@pytest.mark.parametrize("name", TINY)
def test_every_trainable_parameter_is_in_exactly_one_block(name):
    assert_partition(TINY[name].build())


@pytest.mark.parametrize("name", TINY)
def test_blocks_follow_the_order_of_the_model(name):
    blocks = split_into_blocks(TINY[name].build())
    assert tuple(block.name for block in blocks) == TINY[name].blocks


@pytest.mark.parametrize("name", TINY)
def test_each_layer_is_a_block_with_precisely_its_parameters(name):
    model = TINY[name].build()
    blocks = blocks_by_name(model)
    for path in TINY[name].layers:
        layer = model.get_submodule(path)
        assert ids(blocks[path].parameters) == ids(p for p in layer.parameters() if p.requires_grad)
        assert blocks[path].modules == (layer,)


@pytest.mark.parametrize("name", CAUSAL)
def test_tied_head_is_in_the_embeddings(name):
    model = CAUSAL[name](tied=True)
    head = model.get_output_embeddings()
    first, *others = split_into_blocks(model)
    assert first.name == "embeddings"
    assert head in first.modules
    assert any(p is head.weight for p in first.parameters)
    assert not any(p is head.weight for block in others for p in block.parameters)


@pytest.mark.parametrize("name", CAUSAL)
def test_untied_head_is_in_the_last_block(name):
    model = CAUSAL[name](tied=False)
    head = model.get_output_embeddings()
    last = split_into_blocks(model)[-1]
    assert last.name == "head"
    assert head in last.modules
    assert any(p is head.weight for p in last.parameters)


@given(name=st.sampled_from(sorted(CAUSAL)), layers=st.integers(1, 4), tied=st.booleans(), data=st.data())
@settings(max_examples=40)
def test_any_set_of_frozen_parameters_is_left_out(name, layers, tied, data):
    model = CAUSAL[name](layers=layers, tied=tied)
    parameters = list(model.parameters())
    trained = data.draw(st.sets(st.integers(0, len(parameters) - 1), min_size=1), label="trained")
    for number, parameter in enumerate(parameters):
        parameter.requires_grad_(number in trained)

    blocks = {block.name: block for block in assert_partition(model)}

    stack = TINY[name].layers[0].rpartition(".")[0]
    for number in range(layers):
        members = [p for p in model.get_submodule(f"{stack}.{number}").parameters() if p.requires_grad]
        block = blocks.pop(f"{stack}.{number}", None)
        assert ids(block.parameters if block else ()) == ids(members)
    assert set(blocks) <= {"embeddings", "head"} or set(blocks) == {"model"}


@given(layers=st.integers(1, 12))
@settings(max_examples=6)
def test_the_number_of_blocks_follows_the_number_of_layers(layers):
    names = [block.name for block in split_into_blocks(gpt2(layers))]
    assert names == ["embeddings", *(f"transformer.h.{number}" for number in range(layers)), "head"]


def test_running_statistics_go_with_their_module():
    model = resnet()
    expected = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            layer = next((layer for layer in TINY["resnet"].layers if path.startswith(layer)), "embeddings")
            expected.setdefault(layer, []).extend([module.running_mean, module.running_var])
    blocks = blocks_by_name(model)
    assert ids(blocks.pop("classifier.1").buffers) == []
    assert {name: ids(block.buffers) for name, block in blocks.items()} == {
        name: ids(buffers) for name, buffers in expected.items()
    }


def test_counters_of_batches_are_in_no_block():
    model = resnet()
    counters = {id(buffer) for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")}
    assert counters
    assert not counters & {id(buffer) for block in split_into_blocks(model) for buffer in block.buffers}


def test_other_buffers_are_in_no_block():
    model = TINY["llama"].build()
    assert any(buffer.is_floating_point() for buffer in model.buffers())
    assert not any(block.buffers for block in split_into_blocks(model))


def test_frozen_normalisation_leaves_a_block_of_statistics_alone():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[1].requires_grad_(False)
    block = split_into_blocks(model)[1]
    assert block.name == "1"
    assert block.parameters == ()
    assert ids(block.buffers) == ids([model[1].running_mean, model[1].running_var])


def test_stages_are_opened_into_layers():
    names = [block.name for block in split_into_blocks(resnet())]
    assert "resnet.encoder.stages.0" not in names
    assert set(TINY["resnet"].layers) < set(names)


def test_what_a_stage_has_beside_its_layers_is_a_block_of_its_own():
    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.downsample = nn.Linear(4, 4)
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)])

    blocks = blocks_by_name(nn.ModuleDict({"stages": nn.ModuleList([Stage(), Stage()])}))
    assert list(blocks) == [
        name for stage in ("stages.0", "stages.1") for name in (stage, f"{stage}.layers.0", f"{stage}.layers.1")
    ]
    assert blocks["stages.0"].parameter_names == ("stages.0.downsample.weight", "stages.0.downsample.bias")


def test_members_of_a_sequential_are_layers():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    blocks = split_into_blocks(model)
    assert [block.name for block in blocks] == ["0", "2"]
    assert ids(blocks[1].parameters) == ids(model[2].parameters())


def test_a_model_without_stack_is_one_block():
    (block,) = split_into_blocks(nn.ModuleDict({"first": nn.Linear(2, 3), "second": nn.Linear(3, 2)}))
    assert block.name == "model"
    assert len(block.parameters) == 4


def test_what_is_between_two_stacks_goes_together():
    blocks = blocks_by_name(t5())
    assert blocks["between.1"].parameter_names == ("encoder.final_layer_norm.weight",)
    assert blocks["head"].parameter_names == ("decoder.final_layer_norm.weight",)


def test_what_is_between_two_stacks_is_not_called_head():
    model = t5()
    model.decoder.final_layer_norm.requires_grad_(False)
    assert [block.name for block in split_into_blocks(model)][3] == "between.1"


def test_a_shared_layer_is_one_block():
    layer = nn.Linear(2, 2)
    blocks = split_into_blocks(nn.ModuleDict({"layers": nn.ModuleList([layer, layer])}))
    assert [block.name for block in blocks] == ["layers.0"]


def test_a_module_tied_to_a_layer_is_among_the_users_of_its_block():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), "input": nn.Linear(2, 2)})
    model["input"].weight = model["layers"][1].weight
    assert model["input"] in split_into_blocks(model)[1].modules


@pytest.mark.parametrize("name", ["gpt2", "resnet"])
def test_a_model_without_trainable_parameter_is_refused(name):
    model = TINY[name].build().requires_grad_(False)
    with pytest.raises(ValueError, match=r"no trainable parameter.*requires_grad=True"):
        split_into_blocks(model)


@pytest.mark.parametrize("name", ["gpt2", "resnet"])
def test_tensors_are_the_parameters_and_buffers_themselves(name):
    for block in split_into_blocks(TINY[name].build()):
        originals = [*block.parameters, *block.buffers]
        assert len(block.tensors) == len(originals)
        for tensor, original in zip(block.tensors, originals, strict=True):
            assert not tensor.requires_grad
            assert tensor.data_ptr() == original.data_ptr()
            before = original._version
            tensor.mul_(0.5)
            assert original._version == before + 1


def test_num_bytes_is_what_one_exchange_moves():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2, dtype=torch.bfloat16))
    norm, linear = split_into_blocks(model)
    assert norm.num_bytes == 4 * 3 * 4
    assert linear.num_bytes == (6 + 2) * 2


def test_layers_of_one_shape_are_exchanged_in_equal_blocks():
    blocks = blocks_by_name(gpt2(3))
    for one, other in pairwise([blocks[f"transformer.h.{number}"] for number in range(3)]):
        assert one.num_bytes == other.num_bytes
        assert [t.shape for t in one.tensors] == [t.shape for t in other.tensors]
