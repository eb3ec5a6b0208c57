"""What a user sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from .fleet.launch import prepare_launch
from .trainer.checks import check_options
from .trainer.muon import Optimizers, is_muon, muon_hidden
from .trainer.options import Options, settle_types


class _TakesMuon:
    """Not a field, whose default would go before that of another configuration: what a command line offers."""

    optim: Optimizers | str


@dataclass
class LayupOptions(Options, _TakesMuon):
    """The options of LayUp alone, to be combined with any subclass of `TrainingArguments`:

    @dataclass
    class MyConfig(LayupOptions, SFTConfig): ...
    """

    def __post_init__(self) -> None:
        settle_types(self)
        check_options(self)
        prepare_launch(self)
        super_post_init = getattr(super(), "__post_init__", None)
        if super_post_init is not None:
            with muon_hidden(self):
                super_post_init()

    def set_optimizer(self, name: Any = "adamw_torch", *args: Any, **kwargs: Any) -> Any:
        """As that of `TrainingArguments`; the name may be "muon", too."""
        known = OptimizerNames.ADAMW_TORCH if is_muon(name) else name
        settings = super().set_optimizer(known, *args, **kwargs)  # type: ignore[misc] # of what it is mixed into
        if is_muon(name):
            self.optim = Optimizers.MUON
        return settings


@dataclass
class LayupConfig(LayupOptions, TrainingArguments):
    """`TrainingArguments` with the options of LayUp. A plain `TrainingArguments` gets the defaults of these options."""
