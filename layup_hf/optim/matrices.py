"""Which parameters of a model are matrices that Muon is to step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from ..blocks import split_into_blocks

Matrices = dict[str, list[Tensor]]
"""Parameters by kind, as `MuonAdamW` takes them."""

_CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_LOOKUPS = (nn.Embedding, nn.EmbeddingBag)


def layer_matrices(model: nn.Module, chosen: Callable[[str], bool] | None = None) -> Matrices:
    """The matrices of a model's layers, by kind.

    A *layer* is what is a block of its own (`split_into_blocks`), so that what comes before the first and after the
    last is left to AdamW: embeddings of tokens, positions and patches, and heads; a head also where it is a layer, as
    whatever a model of transformers has beside its `base_model`. In a layer, these are matrices:

    - the weight of whatever module, and other parameters whose names end in `weight` or `proj`, with two axes: each as
      it is, so that a matrix which several projections share (GPT-2's `c_attn`) is one, and LoRA's two are two;
    - the same with three axes: one matrix for each entry of the first, as experts are kept;
    - the weight of a convolution over all channels: one row for each output channel.

    Not among them: embeddings (relative positions), what is tied to one or to a head, convolutions in groups, what has
    an axis of length 1, and complex numbers.

    Args:
        model: With its parameters, of which frozen ones are left out.
        chosen: Whether the matrices of the module with this path are taken: instead of layers, all that have two axes
            or more, and are not of an embedding that looks up rows.

    Returns:
        Parameters by kind: see `as_matrices`.
    """
    found: Matrices = {}
    ours = {id(p) for p in _in_layers(model)} - {id(p) for p in _of_ends(model)} if chosen is None else set()
    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, _LOOKUPS):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            takes = id(parameter) in ours and name.endswith(("weight", "proj")) if chosen is None else chosen(path)
            kind = _kind_of(parameter, module) if takes and id(parameter) not in seen else None
            if kind is not None and parameter.requires_grad:
                seen.add(id(parameter))
                found.setdefault(kind, []).append(parameter)
    return found


def _in_layers(model: nn.Module) -> Iterator[Tensor]:
    for block in split_into_blocks(model):
        if block.layer is not None:
            yield from block.parameters


def _of_ends(model: nn.Module) -> Iterator[Tensor]:
    """What embeddings hold, also under another name, and what models of transformers have beside their bodies."""
    for module in model.modules():
        if isinstance(module, _LOOKUPS):
            yield from module.parameters(recurse=False)
    for whole, body in _bodies(model):
        inside = {id(parameter) for parameter in body.parameters()}
        yield from (parameter for parameter in whole.parameters() if id(parameter) not in inside)


def _bodies(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Each model of transformers that is in no other, with its `base_model`."""
    inside: set[int] = set()
    for module in model.modules():
        prefix = getattr(type(module), "base_model_prefix", None)
        if id(module) not in inside and isinstance(prefix, str):
            inside.update(map(id, module.modules()))
            body = getattr(module, prefix, None) if prefix else None
            yield module, body if isinstance(body, nn.Module) else module


def _kind_of(parameter: Tensor, module: nn.Module) -> str | None:
    if parameter.dim() < 2 or not parameter.is_floating_point():
        return None
    if isinstance(module, _CONVOLUTIONS):
        rows, columns = len(parameter), parameter[0].numel()
        return "flattened" if module.groups == 1 and min(rows, columns) > 1 else None
    if min(parameter.shape[-2:]) < 2 or (parameter.dim() > 2 and len(parameter) < 2):
        return None
    return {2: "whole", 3: "stacked"}.get(parameter.dim())
