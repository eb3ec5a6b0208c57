"""The run: one object that owns what LayUp adds to a Trainer, from its parts to its end."""

from __future__ import annotations

import contextlib
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from accelerate.utils import broadcast
from accelerate.utils.memory import should_reduce_batch_size
from torch.distributed import DistError
from tqdm.auto import tqdm
from transformers import TrainingArguments

from ..fleet.membership import STORE_LOST, StoreLost
from ..progress.clock import ProgressClock, WorkerFailure
from . import report
from .agreement import Agreement
from .blockwise import BlockwiseModel
from .checkpoint import Checkpoints
from .collectives import Collectives
from .eras import Eras
from .evaluations import Evaluations
from .exchange import Exchange
from .following import ClockFollower
from .host import Host
from .hub import HubPushes
from .logs import Logs
from .loop import TrainingLoop
from .meetings import BatchTooLarge, Meetings
from .members import Members
from .points import ConsensusPoints
from .preemption import PreemptionCallback
from .restoring import Restoring
from .state import RunState
from .steps import BlockSteps
from .tracing import StepTracer, Tracing
from .work import WorkSharing


class LayupRun:
    """Builds the parts, starts them when training begins, and stops them whatever happens.

    The parts stand below in the order in which they are built: each knows those above it, by its constructor, and none
    below. What several of them change is `state`; what they want of the Trainer is `host`. To train by another method,
    name another class for a part in a subclass, and that in `LayupMixin.run_class`.

    Args:
        host: The Trainer.
        args: Its arguments, as far as it has been given any.
    """

    model_class: type[BlockwiseModel] = BlockwiseModel
    exchange_class: type[Exchange] = Exchange
    work_class: type[WorkSharing] = WorkSharing
    steps_class: type[BlockSteps] = BlockSteps

    def __init__(self, host: Host, args: TrainingArguments | None) -> None:
        self.host = host
        self.state = state = RunState()
        self.preemption = PreemptionCallback(ends_process=not getattr(args, "enable_jit_checkpoint", False))
        self.tracing = tracing = Tracing(host)
        self.step_tracer = StepTracer(tracing)
        self.members = members = Members(host, state)
        self.collectives = collectives = Collectives(host, state, members, tracing)
        self.hub = HubPushes(host, state)
        self.restoring = Restoring(host, state, collectives)
        self.work = self.work_class(host, state, members)
        self.model = model = self.model_class(host)
        self.checkpoints = Checkpoints(host, state, collectives, self.hub, model)
        self.exchange = exchange = self.exchange_class(host, state, members, model, tracing)
        self.steps = self.steps_class(host, state, members, self.work, model, exchange, tracing)
        self.logs = Logs(host, state, collectives, model, exchange, self.steps)
        self.agreement = agreement = Agreement(host, state, members, model, exchange, tracing)
        self.eras = eras = Eras(host, state, members, self.work, model, exchange, agreement, tracing)
        self.follower = follower = ClockFollower(host, state, collectives, members)
        self.evaluations = evaluations = Evaluations(host, state, collectives, self.checkpoints, tracing)
        self.meetings = meetings = Meetings(
            host, state, collectives, members, exchange, agreement, eras, follower, evaluations, tracing
        )
        self.points = ConsensusPoints(
            host, state, collectives, exchange, self.logs, agreement, eras, meetings, evaluations, tracing
        )
        self.loop = TrainingLoop(
            host, state, collectives, members, self.work, exchange, eras, follower, meetings, tracing
        )

    @property
    def minds_preemption(self) -> bool:
        """Whether SIGTERM ends training well: with one worker, as in the Trainer, only if asked to."""
        return self.host.world_size > 1 or self.host.args.enable_jit_checkpoint

    # ---- Beginning ----

    def prepare(self) -> None:
        """Start all parts, once the Trainer has its model, optimizer and scheduler. Collective."""
        self.stop()
        self.model.require_same_parameters()
        self.steps.check()
        self.host.initial_global_step = self.host.state.global_step  # older Trainers do not note it
        self.state.facts = report.RunFacts(self.members.workers, len(self.model.blocks))
        self.tracing.start()
        if self.work.goes_by_clock:
            self.start_gossip()
        self.steps.start()
        self.restoring.say_what_is_resumed()

    def start_gossip(self) -> None:
        """Begin to exchange, or get ready to when this worker joins. Collective, but for who joins later."""
        host, state, members = self.host, self.state, self.members
        connect = members.start()
        self.eras.start()
        store = connect()
        sets_clock = host.rank == 0 and not state.is_outside
        clock = ProgressClock(store, start=host.state.global_step * members.workers if sets_clock else None)
        if not state.is_outside:
            self.tracing.require_all(members.talk)
            self.exchange.open()
            for tensor in (*host.model.parameters(), *host.model.buffers()):
                broadcast(tensor.data)  # all workers start from rank 0's weights, as DDP would make them
        members.talk.wait()  # nobody draws before the clock has been set
        self.work.start(store)
        if members.membership is not None:  # the store is somewhere in a network
            connection, make_ahead = members.drawing_ahead(connect)
            clock.draw_ahead(connection, make_ahead)
            self.work.draw_ahead(connection, make_ahead)
        self.loop.start(clock)

    # ---- While training ----

    @contextlib.contextmanager
    def training(self, checkpoint: str | None, trial: Any) -> Iterator[str | None]:
        """Around the Trainer's `_inner_training_loop`. Gives the checkpoint that it is to resume from.

        Raises:
            WorkerFailure: Another worker has failed.
            StoreLost: The store of the job does not answer any more.
            SystemExit: All has been saved after SIGTERM.
        """
        if self.members.plan() is not None:
            checkpoint = None  # it takes over where the others are
        self.restoring.resume(checkpoint, trial)
        if self.minds_preemption:
            self.preemption.install()
        try:
            yield checkpoint
        except BatchTooLarge:
            raise
        except BaseException as error:
            reason = self._reason_of(error)
            self._tell_others(reason)
            self.tracing.write_aside()
            if reason is not error:
                raise reason from error
            raise
        finally:
            self.stop()
            try:
                self.checkpoints.end()
            finally:
                self.preemption.remove()
        if self.state.ends_early and self.preemption.ends_process:
            raise SystemExit(128 + signal.SIGTERM)

    def _reason_of(self, error: BaseException) -> BaseException:
        """What to end with: another worker's failure, where this error comes from that, or what says what to do."""
        host, clock = self.host, self.state.clock
        if clock is None or not isinstance(error, RuntimeError) or isinstance(error, WorkerFailure):
            return error
        if self.members.membership is not None:
            return StoreLost(STORE_LOST) if isinstance(error, DistError) else error
        with contextlib.suppress(RuntimeError):  # the store may be gone, too
            if (failure := clock.failure()) is not None:
                return WorkerFailure(failure)
        if host.world_size > 1 and host.args.auto_find_batch_size and should_reduce_batch_size(error):
            return RuntimeError(
                f"Rank {host.rank} ran out of memory outside of a training step. Lower "
                "`per_device_eval_batch_size`: `auto_find_batch_size` lowers that of training alone."
            )
        return error

    def _tell_others(self, error: BaseException) -> None:
        """Leave the reason of this worker's failure with the clock, where the others find it at their next step."""
        message, clock = f"{type(error).__name__}: {error}", self.state.clock
        if self.members.membership is not None:
            self.members.membership.leave(f"failed: {message}")
        elif clock is not None and not isinstance(error, WorkerFailure):
            with contextlib.suppress(RuntimeError):
                clock.report_failure(f"Training ends, as rank {self.host.rank} failed: {message}")

    def save_checkpoint(self, output_dir: Callable[[], str], stock: Callable[[], None]) -> None:
        """Write a checkpoint of the consensus model, with where in the data all workers are. Collective.

        Args:
            output_dir: Where checkpoints go.
            stock: The Trainer's own `_save_checkpoint`.
        """

        def save() -> None:
            if self.exchange.engine is not None:
                self.work.keep_position()
            self.checkpoints.save(output_dir(), stock)

        self.points.with_all("a checkpoint", save)

    # ---- Ending ----

    def finalize(self, trial: Any, stock: Callable[[], Any]) -> Any:
        """As the Trainer's `_finalize_training`, with the consensus model and after the exchange has been closed."""
        self.eras.enduring(self.conclude)
        self.tracing.write_aside()  # of a worker that exchanges nothing
        self.stop()
        self.checkpoints.keep_best_alone(trial)
        output = stock()  # waits for the push in progress
        self.hub.bring_missing()
        return output

    def conclude(self) -> None:
        """All that needs the other workers at the end of training. Collective."""
        self.points.reach("the end of training")
        self.checkpoints.finish()
        self.state.ends_early = self.preemption.has_stopped
        engine = self.exchange.engine
        if engine is None:
            return
        gather = self.members.talk.gather
        self.state.ends_early = any(gather(self.state.ends_early))  # the signal may have come to one worker
        staleness = sum((Counter(counts) for counts in gather(dict(engine.staleness))), Counter[int]())
        if self.host.is_first:
            tqdm.write(report.summary(self.exchange.ledger.done, staleness, self.exchange.masses))
            if waited := self.meetings.waits.summary():
                tqdm.write(waited)
        self.logs.average_loss()
        self.host.store_flos()
        self.tracing.finish(self.members.talk)

    def stop(self) -> None:
        """Stop all parts, and leave the Trainer, its model and its optimizer as they were. Idempotent."""
        self.loop.stop()
        self.steps.stop()
        self.exchange.close()
        self.tracing.stop()
