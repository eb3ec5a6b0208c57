"""What a block is, and when it is ready: the model's structure, hooks, compiled layers, the bias of a gradient."""

from .split import Block, split_into_blocks

__all__ = ["Block", "split_into_blocks"]
