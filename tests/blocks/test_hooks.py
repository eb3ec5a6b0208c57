"""Each block is told complete once, with its gradients whole, at a moment when it may be written."""

import copy
from collections import Counter

import pytest
import torch
from models import TINY, gpt2, loss_of
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from layup_hf.blocks import split_into_blocks
from layup_hf.blocks.hooks import BlockHooks

LEAVES = (nn.Linear, Conv1D)
CHECKPOINTED = [name for name in TINY if name != "resnet"]  # ResNet does not support it


def build(name):
    torch.manual_seed(1)
    return TINY[name].build().train(), TINY[name].batch()


def gradients_of(parameters):
    return [None if p.grad is None else p.grad.clone() for p in parameters]


def plain_gradients(model, *batches):
    """Gradients of one accumulation window without hooks, by block."""
    for batch in batches:
        loss_of(model, batch).backward()
    gradients = [gradients_of(block.parameters) for block in split_into_blocks(model)]
    model.zero_grad()
    return gradients


def assert_same(gradients, expected):
    """Bitwise, and with None where None is expected."""
    for ours, theirs in zip(gradients, expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


@torch.no_grad()
def halve(block):
    for tensor in block.tensors:
        tensor.mul_(0.5)


class Recorder:
    """Hooks that record what they are told, and then do what the test wants."""

    def __init__(self, model, *, ready=lambda block: None, before=lambda block: None, sync=lambda: True):
        self.blocks = split_into_blocks(model)
        self.completed = []
        self.started = []
        self.gradients = {}

        def on_block_ready(block):
            self.completed.append(block.index)
            self.gradients[block.index] = gradients_of(block.parameters)
            ready(block)

        def before_forward(block):
            self.started.append(block.index)
            before(block)

        self.hooks = BlockHooks(
            self.blocks, on_block_ready=on_block_ready, before_forward=before_forward, is_synchronizing=sync
        ).install()

    @property
    def all_once(self):
        return list(range(len(self.blocks)))


class TwoHeads(nn.Module):
    """The second head is never used."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 2)
        self.unused = nn.Linear(4, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)


class Experts(nn.Module):
    """A mixture layer with one module for each expert; the caller says which ones get the tokens."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.experts = nn.ModuleDict({str(number): nn.Linear(4, 4) for number in range(3)})

    def forward(self, x, chosen):
        weights = self.gate(x).softmax(-1)
        return x + sum(weights[:, [number]] * self.experts[str(number)](x) for number in chosen)


class NormThenLinear(nn.Module):
    def __init__(self, affine):
        super().__init__()
        self.norm = nn.BatchNorm1d(4, affine=affine)
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(self.norm(x))


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.layers = nn.ModuleList([Experts(), Experts()])

    def forward(self, x, chosen=(0, 2)):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x, chosen)
        return x


# ---- Completion in backward ----


@pytest.mark.parametrize("name", TINY)
def test_each_block_is_completed_exactly_once_with_complete_gradients(name):
    model, batch = build(name)
    expected = plain_gradients(model, batch)
    recorder = Recorder(model)
    for _ in range(2):
        recorder.completed.clear()
        loss_of(model, batch).backward()
        recorder.hooks.finish_backward()
        assert sorted(recorder.completed) == recorder.all_once
        for index, gradients in enumerate(expected):
            assert_same(recorder.gradients[index], gradients)
        model.zero_grad()


@pytest.mark.parametrize("name", TINY)
def test_backward_completes_every_block_that_has_all_its_gradients(name):
    model, batch = build(name)
    expected = plain_gradients(model, batch)
    recorder = Recorder(model)
    loss_of(model, batch).backward()
    whole = [index for index, gradients in enumerate(expected) if all(g is not None for g in gradients)]
    assert sorted(recorder.completed) == whole == recorder.all_once


@pytest.mark.parametrize("name", TINY)
def test_layers_are_completed_from_last_to_first(name):
    model, batch = build(name)
    recorder = Recorder(model)
    loss_of(model, batch).backward()
    names = [recorder.blocks[index].name for index in recorder.completed]
    assert [name_ for name_ in names if name_ in TINY[name].layers] == list(reversed(TINY[name].layers))


@pytest.mark.parametrize("name", TINY)
def test_writing_a_completed_block_leaves_the_other_gradients_bitwise_unchanged(name):
    """The moment is safe: what backward still needs of the block is nothing."""
    model, batch = build(name)
    expected = plain_gradients(model, batch)
    before = copy.deepcopy(model.state_dict())
    recorder = Recorder(model, ready=halve)
    loss_of(model, batch).backward()
    recorder.hooks.finish_backward()
    for index, gradients in enumerate(expected):
        assert_same(recorder.gradients[index], gradients)
        assert_same(gradients_of(recorder.blocks[index].parameters), gradients)
    after = model.state_dict()
    for name_, parameter in model.named_parameters():
        assert torch.equal(after[name_], before[name_] * (0.5 if parameter.requires_grad else 1))


@pytest.mark.parametrize("affine", [True, False])
def test_writing_statistics_of_a_normalisation_before_a_linear_is_safe(affine):
    """Without a trainable scale, the last gradient of the layer comes before BatchNorm's own backward."""
    model = nn.Sequential(nn.Linear(4, 4), NormThenLinear(affine), NormThenLinear(affine))
    recorder = Recorder(model, ready=halve)
    model(torch.randn(8, 4)).square().sum().backward()
    assert recorder.completed == ([2, 1, 0] if affine else [0])
    recorder.hooks.finish_backward()
    assert sorted(recorder.completed) == [0, 1, 2]


def test_an_unused_head_is_completed_by_finish_backward():
    model = TwoHeads()
    recorder = Recorder(model)
    model(torch.randn(3, 4)).sum().backward()
    assert recorder.completed == [1, 0]
    recorder.hooks.finish_backward()
    assert recorder.completed == [1, 0, 2]
    assert [gradient is None for gradient in recorder.gradients[2]] == [False, False, True, True]


def test_an_expert_without_tokens_is_completed_by_finish_backward():
    model = Mixture()
    recorder = Recorder(model)
    for _ in range(2):
        recorder.completed.clear()
        model(torch.randn(3, 4), chosen=(0, 2)).sum().backward()
        assert recorder.completed == [0]
        recorder.hooks.finish_backward()
        assert recorder.completed == [0, 2, 1]
        model.zero_grad()
    model(torch.randn(3, 4), chosen=(0, 1, 2)).sum().backward()
    assert recorder.completed == [0, 2, 1, 2, 1, 0]


def test_mixtral_with_an_expert_without_tokens_completes_every_block_once():
    """transformers holds all experts in one parameter: it gets a gradient, with zeros for the idle expert."""
    model, batch = build("mixtral")
    batch = {key: tokens[:1, :2] for key, tokens in batch.items()}  # two tokens for four experts
    recorder = Recorder(model)
    loss_of(model, batch).backward()
    recorder.hooks.finish_backward()
    experts = model.model.layers[0].mlp.experts.gate_up_proj
    assert (experts.grad.flatten(1) == 0).all(1).any()
    assert sorted(recorder.completed) == recorder.all_once


def test_a_block_of_statistics_alone_is_completed_by_finish_backward():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].requires_grad_(False)
    recorder = Recorder(model, ready=halve)
    model(torch.randn(3, 4)).square().sum().backward()
    assert recorder.completed == [0]
    recorder.hooks.finish_backward()
    assert recorder.completed == [0, 1]


def test_finish_backward_without_a_backward_since_does_nothing():
    model = TwoHeads()
    recorder = Recorder(model)
    recorder.hooks.finish_backward()
    assert recorder.completed == []
    model(torch.randn(3, 4)).sum().backward()
    recorder.hooks.finish_backward()
    recorder.hooks.finish_backward()
    assert recorder.completed == [1, 0, 2]


# ---- Accumulation windows ----


@pytest.mark.parametrize("name", TINY)
def test_an_accumulation_window_is_completed_by_its_last_backward(name):
    model, batch = build(name)
    expected = plain_gradients(model, batch, batch)
    last = False
    recorder = Recorder(model, ready=halve, sync=lambda: last)
    loss_of(model, batch).backward()
    assert recorder.completed == []
    last = True
    loss_of(model, batch).backward()
    recorder.hooks.finish_backward()
    assert sorted(recorder.completed) == sorted(recorder.started) == recorder.all_once
    for index, gradients in enumerate(expected):
        assert_same(recorder.gradients[index], gradients)


def test_a_gradient_from_an_earlier_backward_of_the_window_alone_is_seen():
    model = Mixture()
    last = False
    recorder = Recorder(model, sync=lambda: last)
    model(torch.randn(3, 4), chosen=(0, 1)).sum().backward()
    last = True
    model(torch.randn(3, 4), chosen=(0, 2)).sum().backward()
    recorder.hooks.finish_backward()
    assert sorted(recorder.completed) == recorder.all_once
    assert all(gradient is not None for gradients in recorder.gradients.values() for gradient in gradients)


# ---- Before forward ----


def test_nothing_is_free_while_it_is_yet_to_be_seen_what_is_used_early():
    model, batch = build(next(iter(TINY)))
    recorder = Recorder(model)
    hooks, indices = recorder.hooks, [block.index for block in recorder.blocks]
    assert all(map(hooks.is_free, indices))
    with hooks.learning():
        assert hooks.is_learning
        assert not any(map(hooks.is_free, indices))
        loss_of(model, batch).backward()
        hooks.finish_backward()
        assert not any(map(hooks.is_free, indices))
    assert not hooks.is_learning
    assert all(map(hooks.is_free, indices))


@pytest.mark.parametrize("name", TINY)
def test_before_forward_comes_once_a_step_before_any_module_that_uses_the_block(name):
    model, batch = build(name)
    recorder = Recorder(model)
    owners = {id(p): block.index for block in recorder.blocks for p in block.parameters}
    late = []

    def on_use(module, _):
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and owners[id(parameter)] not in recorder.started:
                late.append(module)

    for module in model.modules():
        module.register_forward_pre_hook(on_use)
    for _ in range(2):
        recorder.started.clear()
        loss_of(model, batch).backward()
        recorder.hooks.finish_backward()
        model.zero_grad()
        assert sorted(recorder.started) == recorder.all_once
        assert late == []


@pytest.mark.parametrize("name", TINY)
def test_writing_a_block_before_forward_is_seen_by_the_whole_step(name):
    model, batch = build(name)
    reference = copy.deepcopy(model)
    for block in split_into_blocks(reference):
        halve(block)
    expected = plain_gradients(reference, batch)
    recorder = Recorder(model, before=halve)
    loss_of(model, batch).backward()
    recorder.hooks.finish_backward()
    for index, gradients in enumerate(expected):
        assert_same(recorder.gradients[index], gradients)


@pytest.mark.parametrize("name", TINY)
def test_before_forward_does_not_come_in_evaluation(name):
    model, batch = build(name)
    recorder = Recorder(model)
    loss_of(model.eval(), batch)
    assert recorder.started == []
    loss_of(model.train(), batch)
    assert sorted(recorder.started) == recorder.all_once


@pytest.mark.parametrize("name", TINY)
def test_a_forward_without_gradient_is_a_use_of_the_step(name):
    model, batch = build(name)
    recorder = Recorder(model)
    with torch.no_grad():
        loss_of(model, batch)
    assert sorted(recorder.started) == recorder.all_once
    loss_of(model, batch).backward()
    assert sorted(recorder.started) == recorder.all_once


def test_before_forward_comes_once_for_two_forwards_of_one_step():
    model, batch = build("gpt2")
    recorder = Recorder(model)
    (loss_of(model, batch) + loss_of(model, batch)).backward()
    assert Counter(recorder.started) == Counter(recorder.completed) == Counter(recorder.all_once)


def test_before_forward_comes_again_when_the_block_has_been_completed():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    recorder = Recorder(model)
    for step in (1, 2, 3):
        model(torch.randn(1, 2)).sum().backward()
        recorder.hooks.finish_backward()
        assert recorder.started == [0, 1] * step


# ---- Activation checkpointing ----


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_the_recomputation_of_transformers_is_no_use_and_sees_no_written_block(name):
    model, batch = build(name)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    expected = plain_gradients(model, batch)
    linear = next(part for part in model.get_submodule(TINY[name].layers[0]).modules() if type(part) in LEAVES)
    runs = []
    linear.register_forward_pre_hook(lambda *_: runs.append(1))
    recorder = Recorder(model, ready=halve)
    loss_of(model, batch).backward()
    recorder.hooks.finish_backward()
    assert len(runs) == 2  # it was recomputed
    assert sorted(recorder.started) == sorted(recorder.completed) == recorder.all_once
    for index, gradients in enumerate(expected):
        assert_same(recorder.gradients[index], gradients)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputation_that_calls_the_layer_is_no_use_and_sees_no_written_block(use_reentrant):
    model = TwoHeads()
    x = torch.randn(3, 4, requires_grad=True)
    model(x).sum().backward()
    expected = [gradients_of(block.parameters) for block in split_into_blocks(model)]
    model.zero_grad()

    recorder = Recorder(model, ready=halve)
    runs = []
    model.layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
    hidden = x
    for layer in model.layers:
        hidden = checkpoint(layer, hidden, use_reentrant=use_reentrant).tanh()
    model.head(hidden).sum().backward()
    recorder.hooks.finish_backward()
    assert len(runs) == 2
    assert Counter(recorder.started) == Counter(recorder.completed) == Counter(recorder.all_once)
    for index, gradients in enumerate(expected):
        assert_same(recorder.gradients[index], gradients)


def test_reentrant_checkpointing_that_accumulates_a_parameter_twice_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    recorder = Recorder(model)
    hidden = checkpoint(model, torch.randn(2, 4, requires_grad=True), use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"received a second gradient before.*use_reentrant"):
        checkpoint(model, hidden, use_reentrant=True).sum().backward()
    assert recorder.completed == [0]


def test_a_second_backward_in_one_step_is_refused():
    model, batch = build("llama")
    recorder = Recorder(model)
    loss_of(model, batch).backward()
    with pytest.raises(RuntimeError, match="gradient_accumulation_steps"):
        loss_of(model, batch).backward()
    recorder.hooks.remove()


def test_a_second_backward_is_refused_in_a_block_with_an_unused_parameter():
    model = nn.ModuleDict({"used": nn.Linear(2, 2, bias=False), "unused": nn.Linear(2, 2, bias=False)})
    Recorder(model)
    model["used"](torch.ones(1, 2)).sum().backward()
    with pytest.raises(RuntimeError, match="gradient_accumulation_steps"):
        model["used"](torch.ones(1, 2)).sum().backward()


# ---- Installing and removing ----


def hooks_on(model):
    on_parameters = sum(len(parameter._post_accumulate_grad_hooks or ()) for parameter in model.parameters())
    return on_parameters, sum(len(module._forward_pre_hooks) for module in model.modules())


def test_installing_twice_is_refused():
    recorder = Recorder(gpt2())
    with pytest.raises(RuntimeError, match=r"installed already.*remove\(\)"):
        recorder.hooks.install()


def test_remove_leaves_no_hook():
    model, batch = build("t5")
    recorder = Recorder(model)
    assert hooks_on(model) == (len(list(model.parameters())), sum(len(block.modules) for block in recorder.blocks))
    recorder.hooks.remove()
    recorder.hooks.remove()
    assert hooks_on(model) == (0, 0)
    loss_of(model, batch).backward()
    assert (recorder.started, recorder.completed) == ([], [])


def test_hooks_can_be_installed_again_after_remove():
    model, batch = build("gpt2")
    recorder = Recorder(model)
    recorder.hooks.remove()
    recorder.hooks.install()
    loss_of(model, batch).backward()
    assert sorted(recorder.completed) == recorder.all_once


def test_the_context_manager_installs_and_removes_also_after_an_error():
    model = gpt2()
    hooks = BlockHooks(split_into_blocks(model), on_block_ready=halve)

    def train():
        with hooks as entered:
            assert entered is hooks
            assert all(hooks_on(model))
            raise KeyError

    with pytest.raises(KeyError):
        train()
    assert hooks_on(model) == (0, 0)


def test_a_block_is_free_between_its_step_and_its_next_forward():
    model = TwoHeads()
    free = {"forward": [], "backward": []}
    recorder = Recorder(
        model,
        ready=lambda block: free["backward"].append([recorder.hooks.is_free(index) for index in recorder.all_once]),
        before=lambda block: free["forward"].append([recorder.hooks.is_free(index) for index in recorder.all_once]),
    )
    assert all(recorder.hooks.is_free(index) for index in recorder.all_once)
    model(torch.randn(2, 4)).sum().backward()
    number = len(recorder.all_once)
    assert free["forward"][0] == [False, *[True] * (number - 1)]  # the block that is about to be used is not free
    assert not any(free["backward"][0])
    recorder.hooks.finish_backward()
    assert all(recorder.hooks.is_free(index) for index in recorder.all_once)
