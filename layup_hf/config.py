"""What a user sets."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments

from .fleet.launch import prepare_launch
from .trainer.checks import check_options
from .trainer.options import Options, settle_types


@dataclass
class LayupOptions(Options):
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
            super_post_init()


@dataclass
class LayupConfig(LayupOptions, TrainingArguments):
    """`TrainingArguments` with the options of LayUp. A plain `TrainingArguments` gets the defaults of these options."""
