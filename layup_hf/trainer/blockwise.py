"""The model as blocks, and the optimizer that steps them one by one."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..blocks import Block, split_into_blocks
from ..blocks.compiling import CompiledLayers, compile_options, nothing_compiled
from ..blocks.hooks import BlockHooks
from ..blocks.snapshot import Snapshots
from ..optim.optimizer import BlockOptimizer
from .compat import prepared_once
from .host import Host

logger = logging.getLogger(__name__)


class BlockwiseModel:
    """What is trained, cut into blocks.

    Attributes:
        blocks: Of the model; empty before the first training.
        layers: Those that are compiled, while training; None where none are.
        snapshots: What of it is to be kept before it is written.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._hooks: BlockHooks | None = None
        self._prepared: nn.Module | None = None
        self.layers: CompiledLayers | None = None
        self.blocks: list[Block] = []
        self.snapshots = Snapshots()

    def wrap(self, stock: Callable[[nn.Module], Any], model: nn.Module, training: bool) -> Any:
        """As the Trainer's `_wrap_model`, without DDP; with the optimizer, which is there by now, by blocks.

        Args:
            stock: The Trainer's own.
            model: What is to be wrapped.
            training: To train it, and not to evaluate it.
        """
        accelerator = self._host.accelerator
        if training:
            inner = accelerator.unwrap_model(model, keep_torch_compile=False)  # an evaluation may have wrapped it
            own = self._host.model  # what the user has compiled stays so
            model = own if accelerator.unwrap_model(own, keep_torch_compile=False) is inner else inner
        model = stock(model)
        if not training:
            return model
        if self._made_optimizer is None:  # here it has been made, by whichever subclass, and not been used by anything
            optimizer = self._host.optimizer
            self.blocks = self.split(self._host.model, [p for group in optimizer.param_groups for p in group["params"]])
            self._host.optimizer = BlockOptimizer(optimizer, self.blocks)
        with nothing_compiled(accelerator):
            # `evaluation_mode` leaves out the DDP wrapper alone; autocast stays, and the placement on a device. But the
            # device of a worker on the CPU is "cpu:1", say, and moving there copies: the model would get other buffers
            # than those which its block exchanges.
            moves = accelerator.device_placement and self._host.args.device.type != "cpu"
            self._prepared = accelerator.prepare_model(model, device_placement=moves, evaluation_mode=True)
        return self._prepared

    @contextlib.contextmanager
    def wrapped_once(self) -> Iterator[None]:
        """While the Trainer prepares for training: what `wrap` has returned is not wrapped again by accelerate."""
        try:
            with prepared_once(self._host.accelerator, lambda model: model is self._prepared):
                yield
        finally:
            self._prepared = None

    @staticmethod
    def require_no_ddp(model: nn.Module) -> None:
        """Make sure that what is trained is not wrapped in DDP, which would train, and make all wait for each other.

        Raises:
            RuntimeError: It is.
        """
        if isinstance(model, DistributedDataParallel):
            raise RuntimeError(
                "The model has been wrapped in DistributedDataParallel, so all workers would wait for each other in "
                "every step. If your Trainer or script wraps it, do not; else this version of transformers or "
                "accelerate does, which LayUp does not know: install versions that were tested."
            )

    def split(self, model: nn.Module, held: Sequence[Tensor]) -> list[Block]:
        """The blocks of a model, and of what else its optimizer holds."""
        return split_into_blocks(model, held)

    @property
    def _made_optimizer(self) -> BlockOptimizer | None:
        """Ours, also behind accelerate's wrapper."""
        optimizer = getattr(self._host.optimizer, "optimizer", self._host.optimizer)
        return optimizer if isinstance(optimizer, BlockOptimizer) else None

    @property
    def optimizer(self) -> BlockOptimizer:
        """Steps the blocks; there is one as soon as the model has been wrapped for training."""
        optimizer = self._made_optimizer
        if optimizer is None:
            raise RuntimeError("The optimizer has been replaced during training. Give it to the Trainer's constructor.")
        return optimizer

    def install(self, hooks: BlockHooks) -> None:
        """Let backward and forward call the hooks, and compile what is to be compiled."""
        self._hooks = hooks.install()
        options = compile_options(self._host.accelerator)
        if options is not None:
            self.layers = CompiledLayers(self.blocks, options)
            logger.info(f"{len(self.layers)} layers are compiled one by one; what is in no layer is not compiled.")

    def uninstall(self) -> None:
        """Take off what `install` has put on. Idempotent."""
        if self._hooks is not None:
            self._hooks.remove()
        if self.layers is not None:
            self.layers.remove()
        if (optimizer := self._made_optimizer) is not None:  # nothing is to keep this trainer and its model alive
            optimizer.before_step = optimizer.take_block = optimizer.take_whole = optimizer.around_step = None
        self._hooks = self.layers = None

    def is_free(self, index: int) -> bool:
        """Whether the block with this index may be written now: it has stepped, and its next use has not begun."""
        return self._hooks is not None and self._hooks.is_free(index)

    def require_same_parameters(self) -> None:
        """Make sure that every trainable parameter is in a block.

        Raises:
            ValueError: One is not.
        """
        known = {id(parameter) for block in self.blocks for parameter in block.parameters}
        parameters = self._host.model.named_parameters()
        names = [name for name, parameter in parameters if parameter.requires_grad and id(parameter) not in known]
        if names:
            raise ValueError(
                f"The model has parameters that are in no block, such as {names[0]!r}: it was changed after the "
                "optimizer had been created (an embedding resized, a layer added or unfrozen). Change the model before "
                "creating the trainer."
            )
