"""`optim="muon"`, which transformers does not know: its name, its options, and how a Trainer comes to it."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import check_target_module_exists
from transformers.training_args import OptimizerNames
from transformers.utils import ExplicitEnum

from ..optim.matrices import layer_matrices
from ..optim.muon import MuonAdamW

if TYPE_CHECKING:
    _Base = Trainer  # what `super()` is in every class that this is mixed into
else:
    _Base = object

_TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_OPTIONS: dict[str, Callable[[str], Any]] = {
    "momentum": float,
    "nesterov": lambda value: _TRUTH[value.lower()],
    "ns_steps": int,
}
"""Of `optim_args`, and how each is read."""

Optimizers = ExplicitEnum(  # type: ignore[call-overload] # mypy knows none that are made by a call
    "Optimizers", {"MUON": "muon"} | {o.name: o.value for o in OptimizerNames if o.value != "muon"}
)
"""What `optim` can be with the options of LayUp. Its `muon` is ours, whatever a transformers of its own may have."""


def is_muon(optim: Any) -> bool:
    """Whether this value of `optim` means ours: its name, but for what transformers itself may come to call so."""
    return not isinstance(optim, OptimizerNames) and getattr(optim, "value", optim) == "muon"


@contextlib.contextmanager
def muon_hidden(args: Any) -> Iterator[None]:
    """While transformers looks at the arguments: Muon is what it comes closest to."""
    if not is_muon(getattr(args, "optim", None)):
        yield
        return
    args.optim = OptimizerNames.ADAMW_TORCH_FUSED
    try:
        yield
    finally:
        args.optim = Optimizers.MUON


def muon_options(args: Any) -> dict[str, Any]:
    """What `optim_args` says of Muon.

    Raises:
        ValueError: It says something else.
    """
    options: dict[str, Any] = {}
    for item in filter(None, (getattr(args, "optim_args", None) or "").replace(" ", "").split(",")):
        name, _, value = item.partition("=")
        try:
            options[name] = _OPTIONS[name](value)
        except (KeyError, ValueError):
            raise ValueError(
                f"`optim='muon'` does not understand {item!r} in `optim_args`: it takes momentum=0.95, nesterov=true, "
                "ns_steps=5. What AdamW steps has `adam_beta1`, `adam_beta2` and `adam_epsilon`."
            ) from None
    return options


def optimizer_of(stock: Callable[..., tuple[Any, Any]], args: Any, model: Any) -> tuple[Any, Any]:
    """As the Trainer's `get_optimizer_cls_and_kwargs`; for Muon that is asked for AdamW, and changed.

    Args:
        stock: The Trainer's own.
        args: Its arguments.
        model: What is trained.

    Raises:
        ValueError: There is no matrix in it.
    """
    if not is_muon(args.optim):
        return stock(args, model)
    plain = copy.copy(args)
    plain.optim, plain.optim_args = OptimizerNames.ADAMW_TORCH_FUSED, None
    _, kwargs = stock(plain, model)
    kwargs.pop("fused", None)  # where the parameters allow it
    targets = args.optim_target_modules
    matrices = layer_matrices(model, functools.partial(_is_target, model, targets) if targets else None)
    if not matrices:
        raise ValueError(
            f"`optim='muon'` and this model exclude each other: {_lacking(targets)}. Name the modules whose weights it "
            "is to step in `optim_target_modules`, or choose another `optim`, such as 'adamw_torch'."
        )
    return MuonAdamW, {**kwargs, **muon_options(args), "matrices": matrices}


class MuonMixin(_Base):
    """Lets another Trainer take `optim="muon"` of a `LayupConfig`, as `LayupTrainer` does:

        class MuonTrainer(MuonMixin, Trainer): ...

    The rest stays as the Trainer has it: groups of parameters, weight decay, the learning rate.
    """

    def get_optimizer_cls_and_kwargs(  # type: ignore[override] # the Trainer's knows no trainer
        self, args: Any, model: Any = None
    ) -> tuple[Any, Any]:
        """As the Trainer's, and for Muon, too.

        Raises:
            ValueError: There is no matrix in the model that Muon could step.
        """
        return optimizer_of(super().get_optimizer_cls_and_kwargs, args, self.model if model is None else model)


def _is_target(model: nn.Module, targets: Any, path: str) -> bool:
    """Whether `optim_target_modules` names the module with this path, as GaLore's do."""
    if isinstance(targets, str) and targets.replace("_", "-") == "all-linear":
        return isinstance(model.get_submodule(path), nn.Linear)
    return bool(check_target_module_exists(targets, path))


def _lacking(targets: Any) -> str:
    if targets:
        return f"no module that `optim_target_modules={targets!r}` names has a trainable matrix"
    return "none of its layers (members of an `nn.ModuleList` or `nn.Sequential`) has a trainable matrix"
