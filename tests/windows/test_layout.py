"""How blocks lie in buffers, as they are and in few bits."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from layup_hf.blocks import Block
from layup_hf.windows.coding import PIECE
from layup_hf.windows.layout import BITS, MOST_STEPS, Layout


def block_of(*tensors, index=0):
    parameters = tuple(nn.Parameter(tensor, requires_grad=False) for tensor in tensors)
    return Block(index, "block", tuple(map(str, range(len(tensors)))), parameters, (), ())


kinds = st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.int64])
tensors = st.builds(lambda size, kind: torch.zeros(size, dtype=kind), st.integers(0, 3 * PIECE), kinds)


@given(st.sampled_from(list(BITS)), st.lists(st.lists(tensors, min_size=1, max_size=4), min_size=1, max_size=3))
def test_what_is_coded_has_a_place_of_its_own(wire_dtype, blocks):
    layout = Layout([block_of(*block, index=index) for index, block in enumerate(blocks)], wire_dtype)
    buffer = layout.new_buffer()
    room = buffer[layout.size :]
    for index, block in enumerate(blocks):
        places = [(view.data_ptr(), view.nbytes) for view in layout.views(buffer, index)]
        coded = layout.coded_views(room, index)
        is_coded = [tensor.dtype == torch.float32 and tensor.numel() > 0 for tensor in block]
        assert [entry is not None for entry in coded] == is_coded
        for plan, views in filter(None, coded):
            assert (len(views.sums), len(views.words)) == (plan.pieces, plan.word_bytes)
            places += [(view.data_ptr(), view.nbytes) for view in (views.sums, views.words)]
        places = sorted(place for place in places if place[1])
        assert all(begin + size <= after for (begin, size), (after, _) in itertools.pairwise(places))
        assert all(buffer.data_ptr() <= begin <= buffer.data_ptr() + len(buffer) - size for begin, size in places)
        assert layout.num_steps[index] == sum(plan.parts for plan, _ in filter(None, coded))
        source = layout.coded_source(room.data_ptr(), index)
        target = layout.coded_pieces(buffer.data_ptr(), index)
        assert [size for _, size in source] == [size for _, size in target]
        assert sum(size for _, size in source) == layout.coded_bytes[index]
        assert all(buffer.data_ptr() <= begin <= buffer.data_ptr() + len(buffer) - size for begin, size in target)


@pytest.mark.parametrize("wire_dtype", ["fp32", "bf16"])
def test_without_few_bits_nothing_is_coded(wire_dtype):
    layout = Layout([block_of(torch.zeros(9))], wire_dtype)
    assert (layout.bits, layout.num_steps, layout.coded_size) == (0, [0], 0)
    assert layout.coded_views(layout.new_buffer(), 0) == [None]
    assert (layout.new_sending_buffer() is None) == (wire_dtype == "fp32")


def test_a_block_of_very_many_tensors_has_few_steps_or_goes_as_it_is():
    many = Layout([block_of(*torch.zeros(1000, 5))], "int8")
    assert many.num_steps == [1000]
    too_many = Layout([block_of(*torch.zeros(MOST_STEPS + 1, 1))], "int8")
    assert too_many.num_steps == [0]
    assert too_many.plans(0) == [None] * (MOST_STEPS + 1)
