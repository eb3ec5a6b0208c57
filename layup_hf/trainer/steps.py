"""How the Trainer's optimizer comes to step block by block, inside backward."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..blocks import Block, split_into_blocks
from ..blocks.bias import GradientBias
from ..blocks.compiling import CompiledLayers, compile_options, nothing_compiled
from ..blocks.hooks import BlockHooks
from ..fleet.membership import Membership
from ..gossip.engine import GossipEngine
from ..gossip.moments import MeanMoments
from ..optim.adam import is_plain_adam
from ..optim.clipping import BlockClipper
from ..optim.direction import Direction
from ..optim.optimizer import BlockOptimizer
from .checks import check_optimizer
from .report import RunFacts

logger = logging.get_logger(__name__)


class BlockSteps:
    """Steps each block at its boundary. To be mixed into a subclass of `Trainer`.

    A block's boundary is where its gradients are complete in backward; with `clip="exact"`, where the Trainer steps the
    optimizer, all gradients being there. At it the block is merged with what peers offered, clipped, stepped, offered.
    """

    _hooks: BlockHooks | None = None
    _engine: GossipEngine | None = None  # with one worker there is none
    _layers: CompiledLayers | None = None
    _membership: Membership | None = None
    _bias: GradientBias | None = None
    _moments: MeanMoments | None = None
    _direction: Direction | None = None
    _facts: RunFacts | None = None

    def _may_exchange(self) -> bool:
        """Whether this worker's lease holds, if there are leases."""
        return self._membership is None or self._membership.is_current()

    @property
    def _clips_exactly(self) -> bool:
        return getattr(self.args, "clip", "estimate") == "exact"

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        if training:
            model = self.accelerator.unwrap_model(model, keep_torch_compile=False)  # an evaluation may have wrapped it
        model = super()._wrap_model(model, training, dataloader)
        if not training:
            return model
        if self._block_optimizer is None:  # here it has been made, by whichever subclass, and not been used by anything
            self._blocks = split_into_blocks(self.model)
            self.optimizer = BlockOptimizer(self.optimizer, self._blocks)
        with nothing_compiled(self.accelerator):
            # `evaluation_mode` leaves out the DDP wrapper alone; autocast stays, and the placement on a device. But the
            # device of a worker on the CPU is "cpu:1", say, and moving there copies: the model would get other buffers
            # than those which its block exchanges.
            moves = self.accelerator.device_placement and self.args.device.type != "cpu"
            return self.accelerator.prepare_model(model, device_placement=moves, evaluation_mode=True)

    @property
    def _block_optimizer(self) -> BlockOptimizer | None:
        """Ours, also behind accelerate's wrapper."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer if isinstance(optimizer, BlockOptimizer) else None

    def _check_block_steps(self) -> None:
        """Refuse what blocks cannot be stepped by: on every worker, before any of them waits for another.

        Raises:
            ValueError: With the remedy.
        """
        optimizer = self._block_optimizer
        check_optimizer(optimizer.inner, self.args, self.accelerator.scaler)
        if optimizer.sees_gradients and not self._clips_exactly:
            raise ValueError(
                "A hook of `register_step_pre_hook` and `clip='estimate'` exclude each other: blocks step in backward, "
                "so there is no whole gradient to be seen before the step. Set `clip='exact'`."
            )

    def _start_block_steps(self) -> None:
        optimizer, scaler = self._block_optimizer, self.accelerator.scaler
        clips = not self._clips_exactly  # else the Trainer unscales and clips all of them before they step
        optimizer.scaler, optimizer.keeps_gradients = (scaler, False) if clips else (None, True)
        if optimizer.scaler is not None:
            scaler.scale(torch.zeros((), device=self.args.device))  # gives it a scale
            scaler.update(scaler.get_scale())  # and lets it forget a step that memory ran out in
        self._clipper = clipper = BlockClipper(
            self._blocks, self.args.max_grad_norm or 0.0, self.args.device, skips_overflow=scaler is not None
        )

        self._direction = self._choose_direction()
        looks_ahead = self._direction is not None and self._direction.looks_ahead
        self._facts = replace(self._facts, looks_ahead=looks_ahead)
        bias_every = getattr(self.args, "bias_every", 0)
        self._bias = bias = GradientBias(self.model, bias_every) if bias_every else None

        def exchanges() -> bool:
            return self._engine is not None and self._may_exchange()

        def merge(block: Block) -> None:
            if exchanges():  # which engine it is changes with the workers
                self._engine.merge(block)

        def before_forward(block: Block) -> None:
            merge(block)
            if bias is not None:
                bias.note_forward(block)

        def on_block_ready(block: Block) -> None:
            if bias is not None:
                bias.note_gradient(block)
            if clips:
                take_block(block)

        def take_block(block: Block) -> None:
            merge(block)
            if clips:
                optimizer.unscale_block(block)
                clipper.clip_block(block)
            with self._engine.holding(block) if self._engine is not None else contextlib.nullcontext():
                optimizer.step_block(block)
                if exchanges():  # not after a freeze, before it is known whether the others do without this worker
                    self._engine.offer(block)

        self._hooks = BlockHooks(
            self._blocks,
            on_block_ready=on_block_ready,
            before_forward=before_forward,
            is_synchronizing=lambda: self.accelerator.sync_gradients,
        ).install()
        optimizer.before_step, optimizer.take_block = self._hooks.finish_backward, take_block
        optimizer.around_step = self._directing if self._direction is not None else None
        if (options := compile_options(self.accelerator)) is not None:
            self._layers = CompiledLayers(self._blocks, options)
            logger.info(f"{len(self._layers)} layers are compiled one by one; what is in no layer is not compiled.")

    def _choose_direction(self) -> Direction | None:
        """What AdamW is to step by; None where that is as AdamW has it, or the optimizer is another."""
        optimizer, wanted = self._block_optimizer.inner, getattr(self.args, "nesterov", "auto")
        if not is_plain_adam(optimizer):
            return None
        looks_ahead = wanted == "on" or (wanted == "auto" and self._goes_by_clock)
        if looks_ahead:
            logger.info("The optimizer steps by Nesterov's momentum.")
        if not looks_ahead and self._moments is None:
            return None
        return Direction(self._blocks, optimizer, looks_ahead=looks_ahead)

    def _directing(self, block: Block) -> contextlib.AbstractContextManager[None]:
        """Around the optimizer's step of a block."""
        lengths = self._moments.lengths(block) if self._moments is not None else None
        return self._direction.stepping(block, lengths)

    def _stop_block_steps(self) -> None:
        if self._hooks is not None:
            self._hooks.remove()
        if self._layers is not None:
            self._layers.remove()
        if self._block_optimizer is not None:  # nothing is to keep this trainer and its model alive
            for name in ("before_step", "take_block", "around_step"):
                setattr(self._block_optimizer, name, None)
        self._hooks = self._layers = None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As the Trainer's; now and then with a measurement of the gradient's bias."""
        if self._bias is None or not self._bias.is_due():
            return super().training_step(model, inputs, num_items_in_batch)
        with self._bias.recording():
            loss = super().training_step(model, inputs, num_items_in_batch)
            self._hooks.finish_backward()

        def loss_of(other: nn.Module) -> Tensor:
            with self._hooks.muted(), self.compute_loss_context_manager():
                return self.compute_loss(other, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)

        self._bias.measure(loss_of)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        if self._clips_exactly:
            return super()._clip_grad_norm(model)
        return self._get_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor:
        """The norm of the whole gradient before clipping; the Trainer asks for it when backward has ended."""
        self._hooks.finish_backward()
        if grad_norm is not None:
            return grad_norm  # of _clip_grad_norm, a moment ago
        return super()._get_grad_norm(model) if self._clips_exactly else self._clipper.total_norm()

    def _require_same_parameters(self) -> None:
        known = {id(parameter) for block in self._blocks for parameter in block.parameters}
        names = [name for name, p in self.model.named_parameters() if p.requires_grad and id(p) not in known]
        if names:
            raise ValueError(
                f"The model has parameters that are in no block, such as {names[0]!r}: it was changed after the "
                "optimizer had been created (an embedding resized, a layer added or unfrozen). Change the model before "
                "creating the trainer."
            )
