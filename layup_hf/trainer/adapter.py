"""A Trainer of transformers as the parts of a run see it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.utils.hub import PushInProgress

from .compat import steps_averaged
from .options import Options, options_of
from .seams import OF_GENERATING


class TrainerHost:
    """See `Host` for what each member is. Private members of the Trainer are read here alone; `seams` lists them.

    The Trainer owns the run, so nothing of it may keep the Trainer alive: it is referred to weakly.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._reference = weakref.ref(trainer)

    @property
    def _trainer(self) -> Any:
        trainer = self._reference()
        if trainer is None:
            raise ReferenceError("The trainer of this run is gone.")
        return trainer

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the trainer, or what is unpickled, has a host of its own."""
        return type(self), (self._trainer,)

    # ---- What it is given and keeps ----

    @property
    def kind(self) -> type:
        return type(self._trainer)

    @property
    def name(self) -> str:
        return self.kind.__name__

    @property
    def args(self) -> TrainingArguments:
        return self._trainer.args

    @property
    def options(self) -> Options:
        return options_of(self._trainer.args)

    @property
    def folder(self) -> str:
        return self._trainer.args.output_dir

    @property
    def saved_states(self) -> dict[str, Any]:
        return self._trainer.state.stateful_callbacks

    @property
    def rank(self) -> int:
        return self._trainer.args.process_index

    @property
    def world_size(self) -> int:
        return self._trainer.args.world_size

    @property
    def is_first(self) -> bool:
        return self._trainer.is_world_process_zero()

    @property
    def is_first_here(self) -> bool:
        return self._trainer.is_local_process_zero()

    @property
    def accelerator(self) -> Accelerator:
        return self._trainer.accelerator

    @property
    def model(self) -> nn.Module:
        return self._trainer.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._trainer.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self._trainer.optimizer = optimizer

    @property
    def lr_scheduler(self) -> Any:
        return self._trainer.lr_scheduler

    @property
    def callbacks(self) -> CallbackHandler:
        return self._trainer.callback_handler

    @property
    def state(self) -> TrainerState:
        return self._trainer.state

    @state.setter
    def state(self, state: TrainerState) -> None:
        self._trainer.state = state

    @property
    def control(self) -> TrainerControl:
        return self._trainer.control

    @control.setter
    def control(self, control: TrainerControl) -> None:
        self._trainer.control = control

    @property
    def train_batch_size(self) -> int:
        return self._trainer._train_batch_size

    @property
    def generates(self) -> bool:
        return all(hasattr(self._trainer, member) for member in OF_GENERATING)

    @property
    def losses(self) -> list[Callable[..., Any]]:
        own = getattr(self._trainer, "loss", None)  # of sentence-transformers' trainers: one, or one for each data set
        found = [getattr(self._trainer, "compute_loss_func", None), *(own.values() if isinstance(own, dict) else [own])]
        return [loss for loss in found if callable(loss)]

    @property
    def rollout(self) -> Any:
        return getattr(self._trainer, "_buffered_inputs", None)

    # ---- What it counts ----

    @property
    def total_loss(self) -> Tensor:
        return self._trainer._tr_loss

    @total_loss.setter
    def total_loss(self, loss: Tensor) -> None:
        self._trainer._tr_loss = loss

    @property
    def loss_logged(self) -> float:
        return self._trainer._total_loss_scalar

    @loss_logged.setter
    def loss_logged(self, loss: float) -> None:
        self._trainer._total_loss_scalar = loss

    @property
    def initial_global_step(self) -> int:
        return self._trainer._initial_global_step

    @initial_global_step.setter
    def initial_global_step(self, step: int) -> None:
        self._trainer._initial_global_step = step

    @property
    def steps_averaged(self) -> int:
        return steps_averaged(self._trainer.state.global_step, self.initial_global_step)

    @property
    def initial_tokens(self) -> int:
        return self._trainer._initial_num_input_tokens_seen

    @initial_tokens.setter
    def initial_tokens(self, tokens: int) -> None:
        self._trainer._initial_num_input_tokens_seen = tokens

    @property
    def last_logged_step(self) -> int:
        return self._trainer._globalstep_last_logged

    @last_logged_step.setter
    def last_logged_step(self, step: int) -> None:
        self._trainer._globalstep_last_logged = step

    @property
    def learning_rate(self) -> float:
        return self._trainer._get_learning_rate()

    @property
    def current_flos(self) -> float:
        return self._trainer.current_flos

    @current_flos.setter
    def current_flos(self, flos: float) -> None:
        self._trainer.current_flos = flos

    @property
    def accumulation(self) -> int:
        return self._trainer.current_gradient_accumulation_steps

    @accumulation.setter
    def accumulation(self, batches: int) -> None:
        self._trainer.current_gradient_accumulation_steps = batches

    @property
    def hub_model_id(self) -> str | None:
        return getattr(self._trainer, "hub_model_id", None)  # set by the first `init_hf_repo`

    @hub_model_id.setter
    def hub_model_id(self, name: str | None) -> None:
        self._trainer.hub_model_id = name

    @property
    def push_in_progress(self) -> PushInProgress | None:
        return getattr(self._trainer, "push_in_progress", None)

    @push_in_progress.setter
    def push_in_progress(self, push: PushInProgress | None) -> None:
        self._trainer.push_in_progress = push

    # ---- A step ----

    def batches_of(self, update: Iterable[Any]) -> tuple[list[Any], Any]:
        args = self.args
        return self._trainer.get_batch_samples(update, args.gradient_accumulation_steps, args.device)

    def training_step(self, model: nn.Module, inputs: Any, num_items: Any) -> Tensor:
        return self._trainer.training_step(model, inputs, num_items)

    def loss_context(self) -> contextlib.AbstractContextManager[Any]:
        return self._trainer.compute_loss_context_manager()

    def loss(self, model: nn.Module, inputs: Any, num_items: Any) -> Tensor:
        trainer = self._trainer
        return trainer.compute_loss(model, trainer._prepare_inputs(inputs), num_items_in_batch=num_items)

    def clip_grad_norm(self, model: nn.Module) -> Any:
        return self._trainer._clip_grad_norm(model)

    def grad_norm(self, model: nn.Module, grad_norm: Any) -> Any:
        return self._trainer._get_grad_norm(model, grad_norm=grad_norm)

    def floating_point_ops(self, inputs: Any) -> float:
        return float(self._trainer.floating_point_ops(inputs))

    def count_tokens(self, inputs: Any) -> None:
        self._trainer._track_num_input_tokens(inputs)

    def forget_rollout(self) -> None:
        if self.generates:
            self._trainer._step, self._trainer._buffered_inputs = 0, None

    # ---- Between steps ----

    def emit(self, event: str) -> None:
        trainer = self._trainer
        trainer.control = getattr(trainer.callback_handler, event)(trainer.args, trainer.state, trainer.control)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._trainer.log(logs) if start_time is None else self._trainer.log(logs, start_time)

    def log_evaluate_save(self, call: Any, grad_norm: Any, learning_rate: float | None) -> None:
        trainer = self._trainer
        trainer._maybe_log_save_evaluate(
            trainer._tr_loss,
            grad_norm,
            call["model"],
            call["trial"],
            call["epoch"],
            call["ignore_keys_for_eval"],
            call["start_time"],
            learning_rate=learning_rate,
        )

    def evaluate(self, ignored: Any) -> dict[str, float]:
        return self._trainer._evaluate(None, ignored, skip_scheduler=True)

    def is_best(self, metrics: dict[str, float]) -> bool:
        return self._trainer._determine_best_metric(metrics=metrics, trial=None)

    def load_rng_state(self, checkpoint: str) -> None:
        self._trainer._load_rng_state(checkpoint)

    def store_flos(self) -> None:
        self._trainer.store_flos()

    def output_dir(self, trial: Any) -> str:
        return self._trainer._get_output_dir(trial)

    def forget_evaluation_loaders(self) -> None:
        if hasattr(self._trainer, "_eval_dataloaders"):
            self._trainer._eval_dataloaders = {}

    def let_arguments_see(self, place: dict[str, int] | None) -> None:
        args, usual = self._trainer.args, PartialState()
        if place is not None:
            seen = object.__new__(PartialState)  # one of its own: all that are made share what they say
            vars(seen).update(vars(usual) | place)
        args.distributed_state = usual if place is None else seen

    def keepalive(self) -> object:
        return self._trainer

    def wait_for_pushes(self) -> None:
        self._trainer._finish_current_push()
