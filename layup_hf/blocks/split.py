"""The unit of update: a block of parameters whose gradients become complete at about the same time."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

OwnTensors = Callable[[nn.Module], Iterator[tuple[str, Tensor]]]
"""See `_own_tensors`."""

_CONTAINERS = (nn.ParameterDict, nn.ParameterList, nn.ModuleDict, nn.ModuleList)


@dataclass(frozen=True, eq=False)
class Block:
    """A part of the model that is stepped and exchanged as one.

    Attributes:
        index: Position among the model's blocks, in the order of the model's structure.
        name: The layer's path in the model, or `embeddings`, `between.N`, `head`, `model` for what is in no layer.
        parameter_names: Path of each parameter, for messages.
        parameters: The trainable parameters, and frozen ones that the optimizer holds. Empty only where the block has
            nothing but buffers.
        buffers: Floating-point statistics that training itself changes (BatchNorm's running mean and variance).
        modules: The modules whose forward uses the block; the first one to run is the block's first use. Empty where
            that is not known.
        layer: The layer that the block is, or None for what is in no layer.
        completes_late: Whether the last gradient does not show that backward is through with the block: statistics of a
            normalisation without trainable parameters are still needed by its own backward.
    """

    index: int
    name: str
    parameter_names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    buffers: tuple[Tensor, ...]
    modules: tuple[nn.Module, ...]
    layer: nn.Module | None = None
    completes_late: bool = False

    @property
    def tensors(self) -> list[Tensor]:
        """What peers exchange: parameters, then buffers, without gradient but with their version counters."""
        return [tensor.detach() for tensor in (*self.parameters, *self.buffers)]

    @property
    def num_bytes(self) -> int:
        """Size of one exchange of this block."""
        return sum(tensor.nbytes for tensor in (*self.parameters, *self.buffers))

    def __repr__(self) -> str:
        return f"Block({self.index}, {self.name!r}, {len(self.parameters)} parameters, {self.num_bytes} bytes)"


def split_into_blocks(model: nn.Module, held: Iterable[Tensor] = ()) -> list[Block]:
    """Put every trainable parameter of `model` into exactly one block, by the structure of the model alone.

    A *layer* is a member of an `nn.ModuleList` or `nn.Sequential` that is not itself inside a layer; where such a
    member is a stage (a direct child of it is again a stack, of at least two modules of one class, that holds
    most of its parameters: ResNet, Swin, ConvNeXt), its members are the layers. Each layer is a block. What is in
    no layer goes together by position: before the first stack (`embeddings`), between two stacks, after the last
    (`head`). A parameter with several names (a tied LM head) counts where it is named first. Frozen parameters are in
    no block, unless an optimizer holds them: they may be unfrozen later. What an optimizer holds and the model does not
    have (the classifier of a loss) is a block of its own, `beside the model`. Running statistics go with their module.

    Args:
        model: What is trained.
        held: The parameters that the optimizer has.

    Raises:
        ValueError: The model has no trainable parameter.
    """
    by_id = {id(parameter): parameter for parameter in held}
    own_tensors = functools.partial(_own_tensors, held=by_id.keys())
    layers, stages = _find_layers(model, own_tensors)
    members: dict[str, _Members] = {}
    seen: set[int] = set()

    for module_name, module in model.named_modules(remove_duplicate=False):
        tensors = dict(own_tensors(module))
        if not tensors:
            continue
        key = _enclosing(module_name, layers) or _enclosing(module_name, stages) or ""
        if not key:
            key = _position(module_name, layers, model)
        group = members.setdefault(key, _Members())
        for name, tensor in tensors.items():
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if isinstance(tensor, nn.Parameter):
                group.parameters[f"{module_name}.{name}" if module_name else name] = tensor
            else:
                group.buffers.append(tensor)
        group.completes_late |= not any(isinstance(tensor, nn.Parameter) for tensor in tensors.values())

    beside = [parameter for name, parameter in by_id.items() if name not in seen and parameter.requires_grad]
    if not beside and not any(group.parameters for group in members.values()):
        raise ValueError(
            "The model has no trainable parameter, so there is nothing to train or to exchange. "
            "Set `requires_grad=True` on some parameters (or add an adapter) before creating the trainer."
        )

    groups = {key: group for key, group in members.items() if group.parameters or group.buffers}
    users = _users(model, groups, own_tensors)
    blocks = [
        Block(
            index=index,
            name=key if key in layers or key in stages else _rest_name(key, layers),
            parameter_names=tuple(group.parameters),
            parameters=tuple(group.parameters.values()),
            buffers=tuple(group.buffers),
            modules=_first_users(layers.get(key), users[key]),
            layer=layers.get(key),
            completes_late=group.completes_late,
        )
        for index, (key, group) in enumerate(groups.items())
    ]
    return blocks if not beside else [*blocks, _block_beside(beside, len(blocks))]


def _block_beside(parameters: Sequence[Any], index: int) -> Block:
    """What is trained and not the model's: nothing tells when it is used."""
    names = tuple(f"beside the model: {tuple(parameter.shape)}" for parameter in parameters)
    return Block(index, "beside the model", names, tuple(parameters), (), ())


class _Members:
    """What one block will hold, while the model is walked."""

    def __init__(self) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        self.buffers: list[Tensor] = []
        self.completes_late = False


def _own_tensors(module: nn.Module, held: Container[int] = ()) -> Iterator[tuple[str, Tensor]]:
    """Trainable parameters and training statistics that `module` itself (not a child) owns."""
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        if parameter.requires_grad or id(parameter) in held:
            yield name, parameter
    if isinstance(module, _NormBase):
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                yield name, buffer


def _find_layers(model: nn.Module, own_tensors: OwnTensors) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Layers and opened stages of the model by path, in order."""
    layers: dict[str, nn.Module] = {}
    stages: dict[str, nn.Module] = {}

    def visit(module: nn.Module, name: str, stage: bool) -> None:
        in_stack = isinstance(module, (nn.ModuleList, nn.Sequential))
        for child_name, child in module.named_children():
            path = f"{name}.{child_name}" if name else child_name
            if not in_stack or isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                visit(child, path, stage)  # a list of lists is never called itself: look inside
            elif not stage and (inner := _stack_of_stage(child)):
                stages[path] = child
                visit(getattr(child, inner), f"{path}.{inner}", True)
            elif any(True for part in child.modules() for _ in own_tensors(part)):
                layers[path] = child

    visit(model, "", False)
    return layers, stages


def _stack_of_stage(module: nn.Module) -> str | None:
    """Name of the child stack that makes `module` a stage of layers rather than a layer, or None."""
    total = sum(parameter.numel() for parameter in module.parameters())
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and len(child) > 1:
            classes = {type(member) for member in child}
            size = sum(parameter.numel() for parameter in child.parameters())
            if len(classes) == 1 and any(True for _ in child[0].children()) and 2 * size > total:
                return name
    return None


def _enclosing(name: str, paths: dict[str, nn.Module]) -> str | None:
    """The path among `paths` that is `name` or one of its ancestors."""
    while name:
        if name in paths:
            return name
        name = name.rpartition(".")[0]
    return None


def _position(name: str, layers: dict[str, nn.Module], model: nn.Module) -> str:
    """Key of what is in no layer: how many stacks of layers come before it in the order of the model's modules."""
    before = itertools.takewhile(lambda path: path != name, (p for p, _ in model.named_modules(remove_duplicate=False)))
    return f"#{_count_stacks(path for path in before if path in layers)}"


def _count_stacks(layers: Iterable[str]) -> int:
    return len({path.rpartition(".")[0] for path in layers})


def _rest_name(key: str, layers: dict[str, nn.Module]) -> str:
    if not layers:
        return "model"
    if key == "#0":
        return "embeddings"
    return "head" if key == f"#{_count_stacks(layers)}" else f"between.{key[1:]}"


def _first_users(layer: nn.Module | None, users: tuple[nn.Module, ...]) -> tuple[nn.Module, ...]:
    """A layer's forward comes before that of the users inside it; those outside may come first."""
    if layer is None:
        return users
    inside = set(layer.modules())
    return (layer, *(user for user in users if user not in inside))


def _users(model: nn.Module, groups: dict[str, _Members], own_tensors: OwnTensors) -> dict[str, tuple[nn.Module, ...]]:
    """For each group, the modules that own one of its tensors under any name: those whose forward uses it.

    What a `ParameterDict` or another container owns, which is never called itself, is used by the module around it.
    """
    key_of = {
        id(tensor): key for key, group in groups.items() for tensor in (*group.parameters.values(), *group.buffers)
    }
    users: dict[str, dict[int, nn.Module]] = {key: {} for key in groups}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        for _, tensor in own_tensors(module):
            user = _called(name, modules)
            users[key_of[id(tensor)]][id(user)] = user
    return {key: tuple(found.values()) for key, found in users.items()}


def _called(name: str, modules: dict[str, nn.Module]) -> nn.Module:
    """The module of this name, or the nearest around it that has a forward."""
    while name and isinstance(modules[name], _CONTAINERS):
        name = name.rpartition(".")[0]
    return modules[name]
