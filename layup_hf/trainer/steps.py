"""How the Trainer's optimizer comes to step block by block, inside backward."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import Block
from ..blocks.bias import GradientBias
from ..blocks.hooks import BlockHooks
from ..blocks.uses import UseWatch, explain, is_compiled
from ..device import StepsAhead, queues_of
from ..gossip.engine import GossipEngine
from ..optim.adam import is_plain_adam
from ..optim.clipping import BlockClipper
from ..optim.direction import Direction
from ..optim.onepass import OnePass, make_kernel
from ..trace.clocks import now
from ..trace.events import BLOCK_STEP, DEVICE, OPTIMIZER
from .blockwise import BlockwiseModel
from .exchange import Exchange
from .gradients import reasons_for_all, reasons_of_users
from .host import Host
from .members import Members
from .state import RunState
from .suitability import check_optimizer
from .tracing import Tracing
from .work import WorkSharing

logger = logging.getLogger(__name__)


class BlockSteps:
    """Steps each block at its boundary.

    A block's boundary is where its gradients are complete in backward; with `clip="exact"`, where the Trainer steps the
    optimizer, all gradients being there. At it the block is merged with what peers offered, clipped, stepped, offered.

    Attributes:
        clipper: Clips each block, while training.
        direction: What AdamW steps by, while training; None where that is as AdamW has it, or the optimizer is another.
        one_pass: Steps blocks in one pass, while training; None where torch's own operations do.
        bias: Measures the gradient's bias, while training; None where that is not asked for.
    """

    def __init__(
        self,
        host: Host,
        state: RunState,
        members: Members,
        work: WorkSharing,
        model: BlockwiseModel,
        exchange: Exchange,
        tracing: Tracing,
    ) -> None:
        self._host, self._state, self._members, self._work = host, state, members, work
        self._model, self._exchange, self._tracing = model, exchange, tracing
        self._hooks: BlockHooks | None = None
        self._clips_exactly = False
        self._watch: UseWatch | None = None  # of the first step
        self._ahead: StepsAhead | None = None
        self.clipper: BlockClipper | None = None
        self.direction: Direction | None = None
        self.one_pass: OnePass | None = None
        self.bias: GradientBias | None = None

    def check(self) -> None:
        """Find out whether blocks may step in backward. Refuse what they cannot be stepped by: on every worker, before
        any of them waits for another.

        Raises:
            ValueError: With the remedy.
        """
        host, optimizer, clip = self._host, self._model.optimizer, self._host.options.clip
        scaler = host.accelerator.scaler
        check_optimizer(optimizer.inner, host.args, scaler)
        needs = list(reasons_for_all(optimizer, scaler))
        if needs and clip == "estimate":
            raise ValueError(
                f"`clip='estimate'` and this training exclude each other: {needs[0]}, and blocks would step in "
                "backward, one by one. Set `clip='exact'`, or leave it at 'auto'."
            )
        wants = list(reasons_of_users(host.callbacks.callbacks, host.kind, host.losses))
        self._clips_exactly = clip == "exact" or (clip == "auto" and bool(needs or wants))
        if clip == "auto" and self._clips_exactly and host.is_first:
            logger.warning(
                f"LayUp: blocks step when backward has ended (`clip='exact'`), as {(needs or wants)[0]}. "
                "That takes the memory of all gradients. Where none are needed after all, set `clip='estimate'`."
            )
        elif clip == "estimate" and wants:
            logger.warning(
                f"LayUp: with `clip='estimate'` blocks step in backward, and gradients are gone after it, but "
                f"{wants[0]}. If that is in vain, set `clip='exact'`, or leave it at 'auto'."
            )

    # ---- Taking a block ----

    def start(self) -> None:
        """Begin to step blocks in backward."""
        host, blocks, optimizer = self._host, self._model.blocks, self._model.optimizer
        scaler, device = host.accelerator.scaler, host.args.device
        clips = not self._clips_exactly  # else the Trainer unscales and clips all of them before they step
        optimizer.scaler, optimizer.keeps_gradients = (scaler, False) if clips else (None, True)
        # Where others write blocks at any moment, it is not seen what a step has changed.
        optimizer.parts_for_certain |= host.options.merge_at == "arrival"
        if optimizer.scaler is not None:
            scaler.scale(torch.zeros((), device=device))  # gives it a scale
            scaler.update(scaler.get_scale())  # and lets it forget a step that memory ran out in
        max_norm = host.args.max_grad_norm or 0.0
        self.clipper = BlockClipper(blocks, max_norm, device, skips_overflow=scaler is not None)
        self.direction = self._choose_direction()
        self.one_pass = self.choose_pass(self.direction)
        looks_ahead = self.direction is not None and self.direction.looks_ahead
        self._state.note(looks_ahead=looks_ahead)
        bias_every = host.options.bias_every
        self.bias = GradientBias(host.model, bias_every) if bias_every else None
        self._ahead = StepsAhead(queues_of(device))
        take_block = self._recorded(self._taking(self.clipper if clips else None))
        accelerator, has_compiled_code = host.accelerator, is_compiled(host.model)
        self._hooks = BlockHooks(
            blocks,
            on_block_ready=self._completing(take_block if clips else None),
            before_forward=self._before_forward(),
            is_synchronizing=lambda: accelerator.sync_gradients,
            steps_in_backward=clips,
            stays_outside=has_compiled_code,
        )
        optimizer.before_step, optimizer.take_block = self._hooks.finish_backward, take_block
        optimizer.take_whole = self._take_whole
        optimizer.around_step = self._directing(self.direction) if self.direction is not None else None
        self._model.install(self._hooks)
        if not (self._model.layers or has_compiled_code):
            self._watch = UseWatch(host.model, blocks, self._hooks)

    @property
    def _engine(self) -> GossipEngine | None:
        """What may merge and offer now: nothing with one worker, nor after a freeze, before it is known whether the
        others do without this worker. Which engine it is changes with the workers.
        """
        return self._exchange.engine if self._members.may_exchange() else None

    def _merge(self, block: Block) -> None:
        if (engine := self._engine) is not None:
            engine.merge(block)

    def _taking(self, clipper: BlockClipper | None) -> Callable[[Block], None]:
        """What is done with a block at its boundary."""
        optimizer, exchange, one_pass = self._model.optimizer, self._exchange, self.one_pass
        snapshots = self._model.snapshots

        def step_in_parts(block: Block) -> None:
            self._merge(block)
            if clipper is not None:
                optimizer.unscale_block(block)
                clipper.clip_block(block)
            with exchange.holding(block):
                snapshots.before_step(block.index)
                optimizer.step_block(block)
                self._offer(block)

        def step_in_one_pass(block: Block, one_pass: OnePass) -> None:
            engine, moments = self._engine, exchange.moments
            factor = clipper.factor_of(block) if clipper is not None else None
            with exchange.holding(block):
                snapshots.before_step(block.index)
                with (
                    engine.merging(block) if engine is not None else contextlib.nullcontext(()) as offers,
                    moments.noting(block) if moments is not None else contextlib.nullcontext() as rows,
                ):
                    merges = [(offer.theirs, offer.weight) for offer in offers]
                    optimizer.step_block(block, lambda: one_pass.step(block, merges, factor, rows))
                self._offer(block)

        def take_block(block: Block) -> None:
            if one_pass is not None and one_pass.fits(block):
                step_in_one_pass(block, one_pass)
            else:
                step_in_parts(block)

        return take_block

    def _recorded(self, take_block: Callable[[Block], None]) -> Callable[[Block], None]:
        """The same, with an event in the trace, if there is one."""
        trace, track = self._tracing.trace, self._tracing.track
        if trace is None or track is None:
            return take_block
        trace.blocks = [block.name for block in self._model.blocks]

        def recorded(block: Block) -> None:
            start = now()
            take_block(block)
            track.add(BLOCK_STEP, start, block.index)

        return recorded

    def _offer(self, block: Block) -> None:
        if (engine := self._engine) is not None:  # asked anew: the step may have taken long
            engine.offer(block)

    def _take_whole(self, step: Callable[[], None]) -> None:
        """What is done with all blocks where they step at once, when backward has ended."""
        exchange, blocks = self._exchange, list(reversed(self._model.blocks))
        for block in blocks:
            self._merge(block)
        with contextlib.ExitStack() as held:
            for block in blocks:
                held.enter_context(exchange.holding(block))
                self._model.snapshots.before_step(block.index)
            with self._tracing.span(OPTIMIZER):
                step()
            for block in blocks:
                if (engine := self._engine) is not None:
                    engine.offer(block)

    def _completing(self, take_block: Callable[[Block], None] | None) -> Callable[[Block], None]:
        """What is done with a block whose gradients are complete."""
        bias = self.bias

        def on_block_ready(block: Block) -> None:
            if bias is not None:
                bias.note_gradient(block)
            if take_block is not None:
                take_block(block)

        return on_block_ready

    def _before_forward(self) -> Callable[[Block], None]:
        """What is done with a block that is about to be used."""
        bias, merges = self.bias, self._host.options.merge_at != "backward"

        def before_forward(block: Block) -> None:
            if merges and self._hooks is not None and not self._hooks.is_learning:
                self._merge(block)
            if bias is not None:
                bias.note_forward(block)

        return before_forward

    def _choose_direction(self) -> Direction | None:
        optimizer, wanted = self._model.optimizer.inner, self._host.options.nesterov
        if not is_plain_adam(optimizer):
            return None
        looks_ahead = wanted == "on" or (wanted == "auto" and self._work.goes_by_clock)
        if looks_ahead:
            logger.info("The optimizer steps by Nesterov's momentum.")
        if not looks_ahead and not self._work.goes_by_clock:
            return None
        return Direction(self._model.blocks, optimizer, looks_ahead=looks_ahead)

    def choose_pass(self, direction: Direction | None) -> OnePass | None:
        """With several workers, what steps blocks in one pass, if there is something that can."""
        host, model = self._host, self._model
        if direction is None or not self._work.goes_by_clock:
            return None
        scales = host.accelerator.scaler is not None
        kernel = "the loss is scaled" if scales else make_kernel(host.args.device, model.optimizer.inner)
        if isinstance(kernel, str):
            logger.info(f"A block's step is made by torch's own operations, one after the other: {kernel}.")
            return None
        model.optimizer.parts_for_certain = True  # AdamW is known to step each parameter by itself
        logger.info(f"A block's step is made in one pass, {kernel.name}.")
        return OnePass(model.blocks, model.optimizer.inner, direction, kernel)

    def _directing(self, direction: Direction) -> Callable[[Block], contextlib.AbstractContextManager[None]]:
        """What belongs around the optimizer's step of a block."""
        exchange = self._exchange

        def directing(block: Block) -> contextlib.AbstractContextManager[None]:
            lengths = exchange.moments.lengths(block) if exchange.moments is not None else None
            return direction.stepping(block, lengths)

        return directing

    def stop(self) -> None:
        """Leave the optimizer and the model as they were. Idempotent."""
        self._model.uninstall()
        if self.one_pass is not None:
            self.one_pass.close()
        self._hooks = self._watch = self._ahead = self.one_pass = None

    # ---- What the Trainer asks for in a step ----

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items: Any, stock: Callable[[], Tensor]
    ) -> Tensor:
        """As the Trainer's; now and then with a measurement of the gradient's bias.

        Raises:
            RuntimeError: Backward needs what a merge or a step has changed; with the block and the remedy.
        """
        bias, hooks, host = self.bias, self._hooks, self._host
        if hooks is None:
            return stock()
        if self._ahead is not None:
            with self._tracing.span(DEVICE) if host.args.device.type == "cuda" else contextlib.nullcontext():
                self._ahead.begin_step()
        hooks.begin_backward()
        if host.generates:
            hooks.begin_use()  # so that completions are drawn from the weights that learn from them
        if bias is None or not bias.is_due():
            return self._run(stock)
        with bias.recording():
            loss = self._run(stock)
            hooks.finish_backward()

        def loss_of(other: nn.Module) -> Tensor:
            with hooks.muted(), host.loss_context():
                return host.loss(other, inputs, num_items)

        bias.measure(loss_of)
        return loss

    def _run(self, stock: Callable[[], Tensor]) -> Tensor:
        """Forward and backward; the first time, with an eye on how the model uses its blocks."""
        watch, self._watch = self._watch, None
        try:
            with watch.watching() if watch is not None else contextlib.nullcontext():
                return stock()
        except RuntimeError as error:
            if (explained := explain(error, self._model.blocks)) is not None:
                raise explained from error
            raise

    def clip_grad_norm(self, model: nn.Module, stock: Callable[[], Any]) -> Any:
        """Blocks are clipped in backward; with `clip="exact"` here, as the Trainer does."""
        return stock() if self._clips_exactly else self._host.grad_norm(model, None)

    def grad_norm(self, grad_norm: Any, stock: Callable[[], Any]) -> Any:
        """The norm of the whole gradient before clipping; the Trainer asks for it when backward has ended."""
        if self._hooks is not None:
            self._hooks.finish_backward()
        if grad_norm is not None:
            return grad_norm  # of `clip_grad_norm`, a moment ago
        return stock() if self._clips_exactly or self.clipper is None else self.clipper.total_norm()
