"""The Trainer: builds everything, starts it and stops it."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import broadcast, gather_object, reduce
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from .blocks import Block, split_into_blocks
from .clipping import BlockClipper
from .config import check_data, check_options, check_runtime
from .consensus import reach_consensus
from .gossip import GossipEngine
from .hooks import BlockHooks
from .optimizer import BlockOptimizer
from .topology import PeerSampler
from .windows import PeerWindows, SharedWindows

logger = logging.get_logger(__name__)


class LayupMixin:
    """Turns a subclass of `Trainer` into one that trains by layer-wise gossip instead of DDP:

        class LayupSeq2SeqTrainer(LayupMixin, Seq2SeqTrainer): ...

    What differs from the Trainer:

    - The model is not wrapped in DDP. In backward, as soon as a block's gradients are complete, the block is merged
      with what peers offered, stepped, offered to peers, and its gradients are freed.
    - Saving, evaluation during training and the end of training are consensus points: all workers adopt the
      mass-weighted mean.
    - Each worker normalises the loss by its own tokens (`average_tokens_across_devices` has no effect).
    - With `max_grad_norm`, each block is clipped by an estimate of the global norm (see `BlockClipper`).
    - `on_pre_optimizer_step` callbacks see no gradients: they have been used and freed.

    With one process it is plain training, and the optimizer still steps in backward.

    Raises:
        ValueError: An option cannot work together with LayUp; at construction, naming both and the remedy.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        arguments = kwargs.get("args") or (args[1] if len(args) > 1 else None)
        if arguments is not None:
            check_options(arguments)
        self._blocks: list[Block] = []
        self._hooks: BlockHooks | None = None
        self._windows: PeerWindows | None = None
        self._engine: GossipEngine | None = None
        self._agreed_at = -1  # the step of the latest consensus point
        super().__init__(*args, **kwargs)
        check_runtime(self)
        check_data(self.train_dataset, self.args.train_batch_size, self.args.world_size)
        self.args.average_tokens_across_devices = False
        logger.info(f"LayUp sees {self.args.world_size} worker(s); this is rank {self.args.process_index}.")

    # ---- Building ----

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        model = super()._wrap_model(model, training, dataloader)
        if not training:
            return model
        # `evaluation_mode` leaves out the DDP wrapper alone; autocast and device placement stay.
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self._block_optimizer is None:
            self._blocks = split_into_blocks(self.model if model is None else model)
            optimizer = self.optimizer = BlockOptimizer(optimizer, self._blocks)
        return optimizer

    @property
    def _block_optimizer(self) -> BlockOptimizer | None:
        """Ours, also behind accelerate's wrapper."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer if isinstance(optimizer, BlockOptimizer) else None

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        self._stop_gossip()
        self._require_same_parameters()
        if self.args.world_size > 1:
            self._start_gossip()
        self._start_block_steps()
        return prepared

    def _start_gossip(self) -> None:
        self._agreed_at = self.state.global_step
        rank, world_size = self.args.process_index, self.args.world_size
        self._windows = SharedWindows.open(self._blocks, rank, lambda item: gather_object([item]))
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            broadcast(tensor.data)  # all workers start from rank 0's weights, as DDP would make them
        sampler = PeerSampler(rank, world_size, getattr(self.args, "peers_per_step", None), self.args.seed)
        self._engine = GossipEngine(self._blocks, self._windows, sampler)
        logger.info(
            f"Gossip between {world_size} workers over {len(self._blocks)} blocks, {sampler.count} offers a step."
        )

    def _start_block_steps(self) -> None:
        engine, optimizer = self._engine, self._block_optimizer
        self._clipper = clipper = BlockClipper(self._blocks, self.args.max_grad_norm or 0.0, self.args.device)

        def on_block_ready(block: Block) -> None:
            if engine is not None:
                engine.merge(block)
            clipper.clip_block(block)
            optimizer.step_block(block)
            if engine is not None:
                engine.offer(block)

        self._hooks = BlockHooks(
            self._blocks,
            on_block_ready=on_block_ready,
            before_forward=engine.merge if engine is not None else lambda block: None,
            is_synchronizing=lambda: self.accelerator.sync_gradients,
        ).install()
        optimizer.before_step = self._hooks.finish_backward

    def _stop_gossip(self) -> None:
        if self._hooks is not None:
            self._hooks.remove()
        if self._windows is not None:
            self._windows.close()
        self._hooks = self._windows = self._engine = None

    def _require_same_parameters(self) -> None:
        known = {id(parameter) for block in self._blocks for parameter in block.parameters}
        names = [name for name, p in self.model.named_parameters() if p.requires_grad and id(p) not in known]
        if names:
            raise ValueError(
                f"The model has parameters that are in no block, such as {names[0]!r}: it was changed after the "
                "optimizer had been created (an embedding resized, a layer added or unfrozen). Change the model before "
                "creating the trainer."
            )

    # ---- Training ----

    def _inner_training_loop(self, batch_size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._inner_training_loop(batch_size, *args, **kwargs)
        finally:
            self._stop_gossip()

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return self._get_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor:
        """The exact norm of the whole gradient before clipping; the Trainer asks for it when backward has ended."""
        if grad_norm is not None:
            return grad_norm  # of _clip_grad_norm, a moment ago
        self._hooks.finish_backward()
        return self._clipper.total_norm()

    def _maybe_log_save_evaluate(
        self,
        tr_loss: Tensor,
        grad_norm: Any,
        model: Any,
        trial: Any,
        epoch: Any,
        ignore_keys: Any,
        start_time: Any,
        **kwargs: Any,
    ) -> None:
        new_steps = self.state.global_step > self._globalstep_last_logged
        if self._engine is not None and self.control.should_log and new_steps:
            self._log_without_waiting(tr_loss, grad_norm, start_time, **kwargs)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, epoch, ignore_keys, start_time, **kwargs)

    def _log_without_waiting(
        self, tr_loss: Tensor, grad_norm: Any, start_time: float, learning_rate: float | None = None
    ) -> None:
        """What the Trainer logs, without its gather: the loss is the mean of what each worker has published last."""
        self._require_same_parameters()
        total = tr_loss.item()
        tr_loss -= tr_loss
        ledger = self._windows.ledger
        ledger.report_loss(total / (self.state.global_step - self._globalstep_last_logged))
        logs = {
            "loss": ledger.mean_loss(),
            "grad_norm": grad_norm.item() if isinstance(grad_norm, Tensor) else grad_norm,
            "learning_rate": self._get_learning_rate() if learning_rate is None else learning_rate,
            **self._engine.figures(),
        }
        self._total_loss_scalar += total
        self._globalstep_last_logged = self.state.global_step
        self.log(logs, start_time)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._reach_consensus()
        if self._engine is not None:
            self._stop_gossip()
            self._tr_loss, total = reduce(
                [self._tr_loss, torch.tensor(self._total_loss_scalar, device=self.args.device)]
            )
            self._total_loss_scalar = total.item()
        return super()._finalize_training(*args, **kwargs)

    # ---- Consensus points ----

    def _reach_consensus(self) -> None:
        """During training, make all workers hold the mass-weighted mean, and log what was found. Collective."""
        if self._engine is None or self._agreed_at == self.state.global_step:
            return  # an evaluation and a save after the same step share one consensus point
        self._agreed_at = self.state.global_step
        self._require_same_parameters()
        self.log(reach_consensus(self._blocks, self._windows.ledger).figures())

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's, on the consensus model; during training a consensus point, so call it on every rank."""
        self._reach_consensus()
        return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, on the consensus model; during training a consensus point, so call it on every rank."""
        self._reach_consensus()
        return super().predict(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._reach_consensus()
        super()._save_checkpoint(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Write the consensus model on rank 0; during training a consensus point, so call it on every rank."""
        self._reach_consensus()
        super().save_model(*args, **kwargs)


class LayupTrainer(LayupMixin, Trainer):
    """`transformers.Trainer` that trains by layer-wise gossip between workers; see `LayupMixin` for what differs.

    Takes the arguments of `Trainer`. `args` is a `LayupConfig`, or a plain `TrainingArguments` for LayUp's defaults.
    """
