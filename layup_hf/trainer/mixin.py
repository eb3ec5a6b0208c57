"""The Trainer: its methods, handed on to the run."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from ..fleet.group import end_group_at_exit
from ..trace.events import DATA
from .adapter import TrainerHost
from .alone import why_alone
from .checks import check_options
from .muon import optimizer_of
from .overrides import gather_for_overrides
from .rollouts import check_generating_trainer, check_generation
from .run import LayupRun
from .straggler import StragglerCallback
from .suitability import check_data, check_model, check_runtime, check_search

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


def _like(method: Callable[P, R]) -> Callable[[Callable[..., Any]], Callable[P, R]]:
    """Give a method the signature of another one: for people, for type checkers, and for `inspect`."""
    return functools.wraps(method)


if TYPE_CHECKING:
    _Base = Trainer  # what `super()` is in every class that this is mixed into
else:
    _Base = object


class LayupMixin(_Base):
    """Turns a subclass of `Trainer` into one that trains by layer-wise gossip instead of DDP:

        class LayupSeq2SeqTrainer(LayupMixin, Seq2SeqTrainer): ...

    What differs from the Trainer:

    - The model is not wrapped in DDP. In backward, as soon as a block's gradients are complete, the block is merged
      with what peers offered, stepped, offered to peers, and its gradients are freed.
    - A slow worker slows nobody down. `global_step` counts the steps of all workers, divided by their number, and the
      learning rate, logging, evaluation, saving and the end of training follow it (see `TrainingLoop`). Workers draw
      their batches from one order of each epoch, so a slow one makes fewer steps (see `WorkSharing`).
    - Saving, evaluation during training and the end of training are consensus points: all workers adopt the
      mass-weighted mean. Callbacks of any worker may ask for them through `control`.
    - On SIGTERM the workers save a consensus checkpoint and end with exit code 143 (see `PreemptionCallback`).
    - Rank 0 pushes to the Hub, and no failure of the Hub ends training (see `HubPushes`).
    - Each worker normalises the loss by its own tokens (`average_tokens_across_devices` has no effect).
    - With `max_grad_norm`, each block is clipped by an estimate of the global norm (see `BlockClipper`), and
      `on_pre_optimizer_step` callbacks see no gradients: they have been used and freed. With `clip="exact"` both are as
      in the Trainer, and blocks step when backward has ended.
    - A trainer that generates what it learns from, such as TRL's `GRPOTrainer`, generates whole groups on each worker,
      by the weights that then learn from them (see `rollouts.py`).
    - `torch_compile` compiles layer by layer (see `CompiledLayers`).
    - In a step, in its callbacks and in `log`, accelerate's `gather`, `gather_for_metrics`, `reduce`, `broadcast`,
      `wait_for_everyone` and the like act on this worker alone: metrics of training are each worker's own.

    With one process it is plain training, and the optimizer still steps in backward.

    Every method here overrides one of `Trainer` and hands it on to `LayupRun`, with the Trainer's own where that is
    still needed.

    Raises:
        ValueError: An option cannot work together with LayUp; at construction, naming both and the remedy.
    """

    run_class: type[LayupRun] = LayupRun
    """Owns what is added to the Trainer. Another one trains by another method, see `LayupRun`."""

    push_in_progress = None  # the Trainer sets it with the first repository

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        gather_for_overrides(cls, LayupMixin)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The place of the arguments among others differs between the Trainers.
        arguments = next((a for a in (*args, *kwargs.values()) if isinstance(a, TrainingArguments)), None)
        if arguments is not None:
            check_options(arguments)
            check_generation(arguments)
        self._layup = self.run_class(TrainerHost(self), arguments)
        with self._layup.preemption.instead_of_transformers(arguments):
            super().__init__(*args, **kwargs)
        end_group_at_exit()
        check_runtime(self)
        check_generating_trainer(self)
        check_model(self._layup.host.model, self.args)
        check_data(self.train_dataset, self.args)
        if self._layup.minds_preemption:
            self.add_callback(self._layup.preemption)
        if straggler := self._layup.host.options.straggler:
            self.add_callback(StragglerCallback(straggler, self._layup.tracing))
        if self._layup.host.options.trace is not None:
            self.add_callback(self._layup.step_tracer)
        if (why := why_alone(self.args)) is not None:
            logger.warning(f"LayUp: this process trains alone, but {why}.")
        logger.info(f"LayUp sees {self.args.world_size} worker(s); this is rank {self.args.process_index}.")

    @property
    def layup(self) -> LayupRun:
        """The run, for who wants to see or measure what it does."""
        return self._layup

    # ---- Beginning and ending ----

    @_like(Trainer.train)
    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, once all workers have found the same checkpoint, or none.

        Raises:
            ValueError: Some have not, or a file of it cannot be read.
            RuntimeError: Another worker's cannot.
        """
        return super().train(self._layup.restoring.find(resume_from_checkpoint), *args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        with self._layup.model.wrapped_once():
            prepared = super()._prepare_for_training(*args, **kwargs)
        self._layup.model.require_no_ddp(prepared[0])
        self._layup.prepare()
        return prepared

    def get_optimizer_cls_and_kwargs(  # type: ignore[override] # the Trainer's knows no trainer
        self, args: Any, model: Any = None
    ) -> tuple[Any, Any]:
        """As the Trainer's, and for `optim="muon"`, too."""
        return optimizer_of(super().get_optimizer_cls_and_kwargs, args, self.model if model is None else model)

    def _inner_training_loop(self, batch_size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        with self._layup.training(kwargs.get("resume_from_checkpoint"), kwargs.get("trial")) as checkpoint:
            if "resume_from_checkpoint" in kwargs:
                kwargs["resume_from_checkpoint"] = checkpoint
            return super()._inner_training_loop(batch_size, *args, **kwargs)

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        return self._layup.finalize(trial, functools.partial(super()._finalize_training, trial, *args, **kwargs))

    # ---- Steps ----

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        wrap = super()._wrap_model
        return self._layup.model.wrap(lambda inner: wrap(inner, training, dataloader), model, training)

    def _run_epoch(self, **call: Any) -> None:  # type: ignore[override] # it is always called by name
        if self._layup.state.clock is None:
            super()._run_epoch(**call)
        else:
            self._layup.loop.run_epoch(call)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As the Trainer's; now and then with a measurement of the gradient's bias."""
        self._layup.checkpoints.attend()
        stock = functools.partial(super().training_step, model, inputs, num_items_in_batch)
        with self._layup.logs.counting(), self._layup.tracing.in_step():
            return self._layup.steps.training_step(model, inputs, num_items_in_batch, stock)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; in evaluation, too, normalised by this worker's own tokens."""
        with self._layup.collectives.own_tokens(), self._layup.tracing.loss():
            return super().compute_loss(*args, **kwargs)

    def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        return self._layup.tracing.inputs(functools.partial(super()._prepare_inputs, *args, **kwargs))

    def _get_num_items_in_batch(self, *args: Any, **kwargs: Any) -> Any:
        with self._layup.collectives.own_tokens():
            return super()._get_num_items_in_batch(*args, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return self._layup.steps.clip_grad_norm(model, functools.partial(super()._clip_grad_norm, model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return self._layup.steps.grad_norm(grad_norm, functools.partial(super()._get_grad_norm, model))

    # ---- Data ----

    @_like(Trainer.get_batch_samples)
    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; how long they take to come is recorded."""
        with self._layup.tracing.span(DATA):
            return super().get_batch_samples(*args, **kwargs)

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Any = None,
        is_training: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        call = (dataset, description, batch_size, sampler_fn, is_training, *args)
        stock = functools.partial(super()._get_dataloader, *call, **kwargs)
        return (self._layup.work.training_loader if is_training else self._layup.work.evaluation_loader)(stock)

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple:
        """As the Trainer's, with epochs and steps of all workers together."""
        stock = functools.partial(super().set_initial_training_values, args, dataloader)
        return self._layup.work.plan(args, dataloader, stock)

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: float, num_train_epochs: int, *args: Any
    ) -> tuple[int, int]:
        values = (max_steps, num_update_steps_per_epoch, num_train_epochs, *args)
        stock = functools.partial(super()._init_training_state, *values)
        return self._layup.work.place_to_begin(max_steps, num_train_epochs, stock)

    # ---- Logs ----

    def _track_num_input_tokens(self, inputs: Any) -> None:
        self._layup.logs.count_tokens(functools.partial(super()._track_num_input_tokens, inputs))

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        start_time = kwargs.get("start_time", args[4] if len(args) > 4 else None)
        self._layup.logs.log_if_due(tr_loss, grad_norm, start_time, kwargs.get("learning_rate"))
        self._layup.points.reach_if_wanted()
        self._layup.evaluations.put_off(kwargs.get("ignore_keys_for_eval", args[3] if len(args) > 3 else None))
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def store_flos(self) -> None:
        """As the Trainer's, also for a worker that has made no step since the last call."""
        host = self._layup.host
        host.current_flos = float(host.current_flos)  # the Trainer's 0 is an int: another size in its collective
        super().store_flos()

    # ---- Consensus points ----

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's, on the consensus model; during training a consensus point, so call it on every rank."""
        if self._layup.state.is_outside:
            return {}  # `eval_on_start`: the others are in the middle of training
        return self._layup.points.with_all("evaluate()", functools.partial(super().evaluate, *args, **kwargs))

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, on the consensus model; during training a consensus point, so call it on every rank."""
        return self._layup.points.with_all("predict()", functools.partial(super().predict, *args, **kwargs))

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, on the consensus model; during training a consensus point, so call it on every rank."""
        return self._layup.points.with_all(
            "evaluation_loop()", functools.partial(super().evaluation_loop, *args, **kwargs)
        )

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Write the consensus model on rank 0; during training a consensus point, so call it on every rank."""
        self._layup.points.with_all("save_model()", functools.partial(super().save_model, *args, **kwargs))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._layup.save_checkpoint(
            functools.partial(super()._get_output_dir, trial), functools.partial(super()._save_checkpoint, model, trial)
        )

    # ---- Checkpoints ----

    def _get_output_dir(self, trial: Any) -> str:
        return self._layup.checkpoints.output_dir(functools.partial(super()._get_output_dir, trial))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self._layup.checkpoints.save_optimizer(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        stock = functools.partial(super()._load_optimizer_and_scheduler, checkpoint)
        self._layup.restoring.load_optimizer(checkpoint, stock)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        stock = functools.partial(super()._load_from_checkpoint, resume_from_checkpoint, *args, **kwargs)
        self._layup.restoring.load_model(resume_from_checkpoint, stock)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        self._layup.restoring.load_random_state(checkpoint, functools.partial(super()._load_rng_state, checkpoint))

    # ---- The Hub ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository, or say that it could not be created: every push tries again.

        Raises:
            HFValidationError: No repository can have this name.
        """
        self._layup.hub.find_repo(token, private)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, and with what earlier pushes did not bring.

        Raises:
            Exception: Whatever kept the model from the Hub, with `blocking=True`. It is saved in `output_dir` then.
        """
        return self._layup.hub.push_model(functools.partial(super().push_to_hub, *args, **kwargs))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._layup.checkpoints.push(checkpoint_folder, super()._push_from_checkpoint)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, with a section about the workers if there has been training."""
        super().create_model_card(*args, **kwargs)
        self._layup.hub.add_to_card()

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, with one process.

        Raises:
            ValueError: There are several workers.
        """
        check_search(self.args)
        return super().hyperparameter_search(*args, **kwargs)


class LayupTrainer(LayupMixin, Trainer):
    """`transformers.Trainer` that trains by layer-wise gossip between workers; see `LayupMixin` for what differs.

    Takes the arguments of `Trainer`. `args` is a `LayupConfig`, or a plain `TrainingArguments` for LayUp's defaults.
    """

    @_like(Trainer.__init__)  # scripts look into its signature for what a version of transformers accepts
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
