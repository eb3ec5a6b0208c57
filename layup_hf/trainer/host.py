"""All that LayUp wants of a Trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.utils.hub import PushInProgress

from .options import Options


class Host(Protocol):
    """A Trainer, as the parts of a run see it: this page, and nothing else of it. `TrainerHost` is the real one.

    Attributes:
        kind: The Trainer's class.
        name: Its name, for messages.
        args, model, state, control, accelerator, optimizer, lr_scheduler, callbacks: The Trainer's own. `optimizer` is
            there when training begins, and may be wrapped by accelerate.
        options: Those of LayUp among `args`.
        folder: The output directory.
        saved_states: What is saved with `state` for callbacks, by name; to be read and changed.
        rank, world_size: This worker's number, and how many there are now.
        is_first: Whether this worker is rank 0, which logs, saves and pushes.
        is_first_here: Whether it is the first on its machine.
        train_batch_size: Samples of one batch of this worker.
        total_loss: Sum of the losses since the latest log, on the device; to be changed in place or replaced.
        loss_logged: Sum of those that have been logged.
        initial_global_step, initial_tokens: `global_step` and tokens seen when this call of `train()` began.
        steps_averaged: By what the Trainer divides the sum of all losses at the end of training.
        last_logged_step: The `global_step` of the latest log.
        learning_rate: The present one, for the logs.
        current_flos: Floating-point operations since they were last stored.
        accumulation: Batches of the present step, by which the Trainer divides the loss.
        generates: Whether it generates what it learns from, within its steps.
        losses: Functions and modules of the user that compute the loss from what the model gives.
        rollout: What it has generated last, and learns from.
        hub_model_id: The repository, once it is known.
        push_in_progress: What is being uploaded.
    """

    @property
    def kind(self) -> type: ...
    @property
    def name(self) -> str: ...
    @property
    def args(self) -> TrainingArguments: ...
    @property
    def options(self) -> Options: ...
    @property
    def folder(self) -> str: ...
    @property
    def saved_states(self) -> dict[str, Any]: ...
    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def is_first(self) -> bool: ...
    @property
    def is_first_here(self) -> bool: ...
    @property
    def accelerator(self) -> Accelerator: ...
    @property
    def model(self) -> nn.Module: ...
    @property
    def callbacks(self) -> CallbackHandler: ...
    @property
    def lr_scheduler(self) -> Any: ...
    @property
    def train_batch_size(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def steps_averaged(self) -> int: ...
    @property
    def generates(self) -> bool: ...
    @property
    def losses(self) -> list[Callable[..., Any]]: ...
    @property
    def rollout(self) -> Any: ...

    optimizer: torch.optim.Optimizer
    state: TrainerState
    control: TrainerControl
    total_loss: Tensor
    loss_logged: float
    initial_global_step: int
    initial_tokens: int
    last_logged_step: int
    current_flos: float
    accumulation: int
    hub_model_id: str | None
    push_in_progress: PushInProgress | None

    # ---- A step ----

    def batches_of(self, update: Iterable[Any]) -> tuple[list[Any], Any]:
        """The batches of one optimizer step, and how many items (tokens) count in them."""

    def training_step(self, model: nn.Module, inputs: Any, num_items: Any) -> Tensor:
        """Forward and backward of one batch; its loss."""

    def loss_context(self) -> contextlib.AbstractContextManager[Any]:
        """What forward runs under: autocast."""

    def loss(self, model: nn.Module, inputs: Any, num_items: Any) -> Tensor:
        """The loss of one batch of the loader, with any model of this kind."""

    def clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip the gradient to `max_grad_norm`; its norm before."""

    def grad_norm(self, model: nn.Module, grad_norm: Any) -> Any:
        """The norm of the gradient, for the logs."""

    def floating_point_ops(self, inputs: Any) -> float:
        """What one batch has cost."""

    def count_tokens(self, inputs: Any) -> None:
        """Add a batch to the state's `num_input_tokens_seen`."""

    def forget_rollout(self) -> None:
        """Let the next step generate anew, where the Trainer `generates`: what there is was not used to its end."""

    # ---- Between steps ----

    def emit(self, event: str) -> None:
        """Let the callbacks know, and take over what they want through `control`. Args: such as `on_step_end`."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, through the callbacks."""

    def log_evaluate_save(self, call: Any, grad_norm: Any, learning_rate: float | None) -> None:
        """Do what `control` asks for. Args: `call` is what the Trainer gave `_run_epoch`."""

    def evaluate(self, ignored: Any) -> dict[str, float]:
        """As during training, through whatever a subclass overrides. Args: `ignored` outputs of the model, or None."""

    def is_best(self, metrics: dict[str, float]) -> bool:
        """Whether these are the best so far, by `metric_for_best_model`; noted in `state`."""

    def load_rng_state(self, checkpoint: str) -> None:
        """Restore this worker's random states."""

    def store_flos(self) -> None:
        """Add up the floating-point operations of all workers. Collective."""

    def output_dir(self, trial: Any) -> str:
        """Where checkpoints go."""

    def forget_evaluation_loaders(self) -> None:
        """Let evaluations make their loaders anew: they yield the shard of another rank."""

    def let_arguments_see(self, place: dict[str, int] | None) -> None:
        """Let `args` tell of other workers than accelerate does. Args: `process_index` and `num_processes`, or None."""

    def keepalive(self) -> object:
        """What keeps the Trainer alive as long as it is referred to: a host does not."""

    def wait_for_pushes(self) -> None:
        """Wait until what is being uploaded has been."""
