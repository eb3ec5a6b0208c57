"""The Trainer: builds everything, starts it and stops it."""

from __future__ import annotations

import contextlib
import functools
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast, gather_object
from accelerate.utils.memory import should_reduce_batch_size
from torch.distributed import DistError
from tqdm.auto import tqdm
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from ..fleet.group import end_group_at_exit
from ..fleet.membership import STORE_LOST, StoreLost
from ..gossip.consensus import reach_consensus
from ..progress.clock import ProgressClock, WorkerFailure
from . import report
from .checkpoint import Checkpoints
from .checks import check_data, check_model, check_options, check_runtime
from .eras import Eras
from .exchange import Exchange
from .hub import HubPushes
from .logs import Logs
from .loop import ClockedLoop
from .meetings import BatchTooLarge
from .preemption import PreemptionCallback
from .steps import BlockSteps
from .straggler import StragglerCallback
from .work import WorkSharing

logger = logging.get_logger(__name__)

T = TypeVar("T")


class LayupMixin(Checkpoints, HubPushes, BlockSteps, Exchange, Logs, WorkSharing, ClockedLoop, Eras):
    """Turns a subclass of `Trainer` into one that trains by layer-wise gossip instead of DDP:

        class LayupSeq2SeqTrainer(LayupMixin, Seq2SeqTrainer): ...

    What differs from the Trainer:

    - The model is not wrapped in DDP. In backward, as soon as a block's gradients are complete, the block is merged
      with what peers offered, stepped, offered to peers, and its gradients are freed.
    - A slow worker slows nobody down. `global_step` counts the steps of all workers, divided by their number, and the
      learning rate, logging, evaluation, saving and the end of training follow it (see `ClockedLoop`). Workers draw
      their batches from one order of each epoch, so a slow one makes fewer steps (see `WorkSharing`).
    - Saving, evaluation during training and the end of training are consensus points: all workers adopt the
      mass-weighted mean. Callbacks of any worker may ask for them through `control`.
    - On SIGTERM the workers save a consensus checkpoint and end with exit code 143 (see `PreemptionCallback`).
    - Rank 0 pushes to the Hub, and no failure of the Hub ends training (see `HubPushes`).
    - Each worker normalises the loss by its own tokens (`average_tokens_across_devices` has no effect).
    - With `max_grad_norm`, each block is clipped by an estimate of the global norm (see `BlockClipper`), and
      `on_pre_optimizer_step` callbacks see no gradients: they have been used and freed. With `clip="exact"` both are as
      in the Trainer, and blocks step when backward has ended.
    - `torch_compile` compiles layer by layer (see `CompiledLayers`).
    - In a step, in its callbacks and in `log`, accelerate's `gather`, `gather_for_metrics`, `reduce`, `broadcast`,
      `wait_for_everyone` and the like act on this worker alone: metrics of training are each worker's own.

    With one process it is plain training, and the optimizer still steps in backward.

    Raises:
        ValueError: An option cannot work together with LayUp; at construction, naming both and the remedy.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The place of the arguments among others differs between the Trainers.
        arguments = next((a for a in (*args, *kwargs.values()) if isinstance(a, TrainingArguments)), None)
        if arguments is not None:
            check_options(arguments)
        self._blocks = []
        self._agreed_at: tuple[int, int] | None = None  # era and steps of all workers at the latest consensus point
        self._preemption = PreemptionCallback(ends_process=not getattr(arguments, "enable_jit_checkpoint", False))
        with self._preemption.instead_of_transformers(arguments):
            super().__init__(*args, **kwargs)
        end_group_at_exit()
        check_runtime(self)
        check_model(self.model, self.args)
        check_data(self.train_dataset, self.args)
        self.args.average_tokens_across_devices = False
        if self._minds_preemption:
            self.add_callback(self._preemption)
        if getattr(self.args, "straggler", None):
            self.add_callback(StragglerCallback(self.args.straggler))
        logger.info(f"LayUp sees {self.args.world_size} worker(s); this is rank {self.args.process_index}.")

    @property
    def _minds_preemption(self) -> bool:
        """With one worker, as in the Trainer, only if asked to."""
        return self.args.world_size > 1 or self.args.enable_jit_checkpoint

    # ---- Building ----

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        self._stop_gossip()
        self._require_same_parameters()
        self._check_block_steps()
        self._facts = report.RunFacts(self._workers, len(self._blocks))
        if self._goes_by_clock:
            self._start_gossip()
        self._start_block_steps()
        self._say_what_is_resumed()
        return prepared

    def _start_gossip(self) -> None:
        """Begin to exchange, or get ready to when this worker joins. Collective, but for who joins later."""
        connect = self._start_fleet()
        store = connect()
        sets_clock = self.args.process_index == 0 and not self._is_outside
        clock = ProgressClock(store, start=self.state.global_step * self._workers if sets_clock else None)
        if not self._is_outside:
            self._open_exchange()
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                broadcast(tensor.data)  # all workers start from rank 0's weights, as DDP would make them
        PartialState().wait_for_everyone()  # nobody draws before the clock has been set
        self._share_work(store)
        self._draw_ahead(clock, connect)
        self._start_loop(clock)

    def _stop_gossip(self) -> None:
        self._stop_loop()
        self._stop_block_steps()
        self._close_exchange()

    # ---- Training ----

    def _inner_training_loop(self, batch_size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        if self._plan_workers() is not None:
            kwargs["resume_from_checkpoint"] = None  # it takes over where the others are
        self._resume(kwargs.get("resume_from_checkpoint"), kwargs.get("trial"))
        if self._minds_preemption:
            self._preemption.install()
        try:
            output = super()._inner_training_loop(batch_size, *args, **kwargs)
        except BatchTooLarge:
            raise
        except BaseException as error:
            reason = self._reason_of(error)
            self._tell_others(reason)
            if reason is not error:
                raise reason from error
            raise
        finally:
            self._stop_gossip()
            self._preemption.remove()
        if self._ends_early and self._preemption.ends_process:
            raise SystemExit(128 + signal.SIGTERM)
        return output

    def _reason_of(self, error: BaseException) -> BaseException:
        """What to end with: another worker's failure, where this error comes from that, or what says what to do."""
        if self._clock is None or not isinstance(error, RuntimeError) or isinstance(error, WorkerFailure):
            return error
        if self._membership is not None:
            return StoreLost(STORE_LOST) if isinstance(error, DistError) else error
        with contextlib.suppress(RuntimeError):  # the store may be gone, too
            if (failure := self._clock.failure()) is not None:
                return WorkerFailure(failure)
        if self.args.world_size > 1 and self.args.auto_find_batch_size and should_reduce_batch_size(error):
            return RuntimeError(
                f"Rank {self.args.process_index} ran out of memory outside of a training step. Lower "
                "`per_device_eval_batch_size`: `auto_find_batch_size` lowers that of training alone."
            )
        return error

    def _tell_others(self, error: BaseException) -> None:
        """Leave the reason of this worker's failure with the clock, where the others find it at their next step."""
        message = f"{type(error).__name__}: {error}"
        if self._membership is not None:
            self._membership.leave(f"failed: {message}")
        elif self._clock is not None and not isinstance(error, WorkerFailure):
            with contextlib.suppress(RuntimeError):
                self._clock.report_failure(f"Training ends, as rank {self.args.process_index} failed: {message}")

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._enduring(self._conclude)
        self._stop_gossip()
        return super()._finalize_training(*args, **kwargs)

    def _conclude(self) -> None:
        """All that needs the other workers at the end of training. Collective."""
        self._reach_consensus("the end of training")
        self._ends_early = self._preemption.has_stopped
        if self._engine is None:
            return
        self._ends_early = any(gather_object([self._ends_early]))  # the signal may have come to one worker
        staleness = sum(gather_object([self._engine.staleness]), Counter())
        if self.is_world_process_zero():
            tqdm.write(report.summary(self._ledger.done, staleness, self._masses))
        self._average_loss()
        self.store_flos()

    # ---- Consensus points ----

    def _reach_consensus(self, purpose: str) -> None:
        """During training, make all workers hold the mass-weighted mean, and log what was found. Collective.

        Args:
            purpose: What it is for; the same on all workers.

        Raises:
            RuntimeError: It was asked for in the middle of a step, where the workers are not together, or for
                different purposes.
        """
        if self._engine is None:
            return
        if self._is_alone:
            raise RuntimeError(
                "Evaluating, predicting or saving during a step or a log, from `on_step_end` say, needs all workers at "
                "once, and they are not at the same step. In a callback, set `control.should_evaluate` or "
                "`control.should_save`, on any worker: all will do it together after their steps."
            )
        if not self._is_acting:
            self._meet(has_ended=True, purpose=purpose)
        self._sum_tokens()
        if self._agreed_at == self._now():
            return  # an evaluation and a save after the same step share one consensus point
        self._agree_on_model()

    def _now(self) -> tuple[int, int]:
        return self._membership.era.number if self._membership is not None else 0, self._steps_of_all

    def _agree_on_model(self) -> None:
        """Make all workers hold the mass-weighted mean, and log what was found. Collective."""
        self._require_same_parameters()
        self._pause_exchange()
        ledger = self._ledger if self._engine is not None else None
        done = gather_object([self._steps_done])
        consensus = reach_consensus(self._blocks, ledger, self._is_new)
        self._is_new = False
        self._agreed_at = self._now()
        self._masses = consensus.mass_by_worker
        self._facts = replace(self._facts, done=tuple(done), consensus_distance=consensus.distance)
        self.log(consensus.figures())

    def _with_all(self, purpose: str, action: Callable[[], T]) -> T:
        """Do what needs all workers, on the consensus model; with those who are left, if some go meanwhile."""

        def act() -> T:
            self._reach_consensus(purpose)
            return action()

        with self._together():
            return act() if self._is_acting else self._enduring(act)  # a meeting begins again itself

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's, on the consensus model; during training a consensus point, so call it on every rank."""
        if self._is_outside:
            return {}  # `eval_on_start`: the others are in the middle of training
        return self._with_all("evaluate()", lambda: super(LayupMixin, self).evaluate(*args, **kwargs))

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, on the consensus model; during training a consensus point, so call it on every rank."""
        return self._with_all("predict()", lambda: super(LayupMixin, self).predict(*args, **kwargs))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        def save() -> None:
            if self._engine is not None:
                self._keep_position()
            super(LayupMixin, self)._save_checkpoint(*args, **kwargs)

        self._with_all("a checkpoint", save)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Write the consensus model on rank 0; during training a consensus point, so call it on every rank."""
        self._with_all("save_model()", lambda: super(LayupMixin, self).save_model(*args, **kwargs))

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, with one process.

        Raises:
            ValueError: There are several workers.
        """
        if self.args.world_size > 1:
            raise ValueError(
                "hyperparameter_search() and LayUp with several workers exclude each other: a trial that one worker "
                "prunes would leave the others waiting. Search with one process, or start a run for each trial."
            )
        return super().hyperparameter_search(*args, **kwargs)


class LayupTrainer(LayupMixin, Trainer):
    """`transformers.Trainer` that trains by layer-wise gossip between workers; see `LayupMixin` for what differs.

    Takes the arguments of `Trainer`. `args` is a `LayupConfig`, or a plain `TrainingArguments` for LayUp's defaults.
    """

    @functools.wraps(Trainer.__init__)  # scripts look into its signature for what a version of transformers accepts
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
