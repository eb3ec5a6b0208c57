"""Workers that come and go: how one era follows another."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from accelerate.utils import broadcast
from transformers import ProgressCallback

from ..fleet import data
from ..fleet.group import is_of_group
from ..fleet.membership import Era, Fenced
from ..trace.events import ERA
from .agreement import Agreement
from .blockwise import BlockwiseModel
from .exchange import Exchange
from .host import Host
from .members import Members
from .state import RunState
from .tracing import Tracing
from .wishes import Wishes
from .work import WorkSharing

logger = logging.getLogger(__name__)

_SHARED_STATE = (
    *("log_history", "epoch", "global_step", "max_steps", "num_train_epochs", "total_flos"),
    *("best_metric", "best_global_step", "best_model_checkpoint", "num_input_tokens_seen"),
)
"""What a worker that joins takes over of the Trainer's state from rank 0."""

_LEAST_STATE = 1 << 20
_MOST_STATES = 16
"""Bytes of an optimizer's state: at most this, and so many times the parameters."""

T = TypeVar("T")


class Eras:
    """Lets training go on when workers die, freeze, return or join.

    Between two meetings a worker that is gone is only done without: nothing is offered to it, what it has not taken
    is taken back. At the next meeting those who are left form a new process group, with a consensus point over them,
    and open new windows: a new era. In it the Trainer's ranks and number of processes are those of its members, so what
    needs all workers (evaluating, saving) is done by those who are there, and rank 0 is the first of them.
    """

    def __init__(
        self,
        host: Host,
        state: RunState,
        members: Members,
        work: WorkSharing,
        model: BlockwiseModel,
        exchange: Exchange,
        agreement: Agreement,
        tracing: Tracing,
    ) -> None:
        self._host, self._state, self._members, self._work = host, state, members, work
        self._model, self._exchange, self._agreement, self._tracing = model, exchange, agreement, tracing
        self._exchanging: tuple[str, ...] = ()  # the members that the ledger is of, in the order of their ranks in it
        self._done_without: set[int] = set()

    def start(self) -> None:
        """The first era has begun, if there are eras."""
        membership = self._members.membership
        era = membership.era if membership is not None else None
        self._begin_exchanging(era.roster if era is not None else ())

    def _begin_exchanging(self, roster: tuple[str, ...]) -> None:
        self._exchanging, self._done_without = roster, set()

    # ---- Between two meetings ----

    def mind_members(self) -> None:
        """After an own step: do without who is gone, and see whether a new era is wanted.

        Raises:
            StoreLost: The store of the job does not answer any more.
        """
        membership = self._members.membership
        if membership is None:
            return
        clock = self._state.present_clock
        membership.check()
        if membership.is_fenced:
            self._come_back()
            clock.called = True
            return
        for rank in membership.gone - self._done_without:
            self._do_without(rank, f"has left: rank {rank} {membership.reason_of(rank)}")
        if (membership.is_broken or (membership.applicants and membership.leads)) and not clock.called:
            clock.call_meeting()
            clock.called = True

    def _do_without(self, rank: int, why: str) -> None:
        self._done_without.add(rank)
        self._exchange.exclude(rank)
        logger.warning(f"LayUp: a worker {why}. The others go on; what it was offered and has not taken is taken back.")

    def enduring(self, action: Callable[[], T]) -> T:
        """Do what needs all workers; if some are gone meanwhile, do it again with those who are left."""
        while True:
            try:
                return action()
            except RuntimeError as error:
                if not self.recover_from(error):
                    raise

    def recover_from(self, error: RuntimeError) -> bool:
        """Form a new era, if this error says that the collectives of the present one have failed. Collective.

        Returns:
            Whether it does.
        """
        if self._members.membership is None or self._state.is_outside or not is_of_group(error):
            return False
        logger.warning(f"LayUp: workers that were together have lost each other ({_first_line(error)}).")
        self.regroup()
        return True

    # ---- The next era ----

    def regroup(self) -> None:
        """Form a new era of all that are left, with who has asked to join. Collective."""
        with self._tracing.span(ERA):
            self._regroup()

    def _regroup(self) -> None:
        while True:
            try:
                era = self._members.present_membership.assemble(admits=self._state.clock is not None)
            except Fenced:
                return self._come_back()
            if self._begins(era):
                return None

    def _come_back(self) -> None:
        """Join again, after the others have done without this worker: what it holds is thrown away."""
        logger.warning(
            "LayUp: the others do without this worker, as it gave no sign of life. It comes back as a new one; what it "
            "learnt and the others had not taken is lost."
        )
        self._exchange.close()
        self._state.is_new = True
        # It wants nothing that others have done meanwhile; but a wish to end stays.
        control = self._host.control
        Wishes(stop_training=control.should_training_stop).put_into(control)
        self.enter()

    def enter(self) -> None:
        """Become a member of the job's next era. The others are to call a meeting for that."""
        if not self._begins(self._members.present_membership.apply()):
            self.regroup()

    def _begins(self, era: Era) -> bool:
        try:
            self.begin(era)
        except RuntimeError as error:
            if not is_of_group(error):
                raise
            logger.warning(f"LayUp: era {era.number} could not begin ({_first_line(error)}).")
            return False
        return True

    def begin(self, era: Era) -> None:
        """Form the group, agree on one model, and open new windows. Collective over the members of the era."""
        exchange, host, state = self._exchange, self._host, self._state
        for rank, member in enumerate(self._exchanging if exchange.engine is not None else ()):
            if member not in era.roster and rank not in self._done_without:
                self._do_without(rank, f"has left: rank {rank} is not in the next era")
        tokens_lost = self._tokens_of_gone()
        self._members.form_group(era)
        self._take_roles()
        if state.clock is None:
            return  # training has ended: there is one model, and nothing to exchange
        host.initial_tokens += tokens_lost
        self._work.name_member()
        if era.joined:
            self._share_run()
        self._agreement.agree()
        exchange.close()
        exchange.open()
        self._begin_exchanging(era.roster)
        state.begins_era = True
        if host.is_first:
            logger.warning(
                f"LayUp: {len(era.roster)} worker(s) go on from step {host.state.global_step}"
                + (f", {len(era.joined)} of them new." if era.joined else ".")
            )

    def _tokens_of_gone(self) -> int:
        """What workers that are gone have counted, as far as this one knows."""
        if self._exchange.engine is None:
            return 0
        return sum(int(self._exchange.ledger.tokens[rank]) for rank in self._done_without)

    def _take_roles(self) -> None:
        """What the Trainer has noted about its rank, or does on rank 0 alone."""
        host, state = self._host, self._host.state
        state.is_world_process_zero, state.is_local_process_zero = host.is_first, host.is_first_here
        host.forget_evaluation_loaders()
        for callback in host.callbacks.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is None and host.is_first:
                callback.on_train_begin(host.args, state, host.control)
                callback.on_step_end(host.args, state, host.control)

    # ---- What a worker that joins is given ----

    def _share_run(self) -> None:
        """Give those who join what they cannot know. Collective."""
        host, state = self._host, self._state
        talk = self._members.talk
        run: dict[str, Any] = {}
        if talk.rank == 0:
            schedule = host.lr_scheduler.state_dict()
            run = {
                "state": {name: getattr(host.state, name) for name in _SHARED_STATE},
                "began_at": (host.initial_global_step, host.initial_tokens),
                "course": state.share(),
                "scheduler": {name: value for name, value in schedule.items() if data.is_data(value)},
            }
        run = talk.gather(run)[0]
        if state.is_new:
            for name, value in run["state"].items():
                setattr(host.state, name, value)
            host.initial_global_step, host.initial_tokens = run["began_at"]
            state.take_over(run["course"])
            host.lr_scheduler.load_state_dict(run["scheduler"])
        exchanged = {id(tensor) for block in self._model.blocks for tensor in block.tensors}
        for tensor in (*host.model.parameters(), *host.model.buffers()):
            if id(tensor) not in exchanged:
                broadcast(tensor.data)
        wants = talk.gather(state.is_outside)
        for newcomer in (rank for rank, is_outside in enumerate(wants) if is_outside):
            self._hand_over_optimizer(newcomer)

    def _hand_over_optimizer(self, newcomer: int) -> None:
        """Rank 0 sends its optimizer's state, block by block: moments that begin at zero make too long steps."""
        rank, talk, optimizer = self._host.rank, self._members.talk, self._model.optimizer
        for block in self._model.blocks:
            if rank == 0:
                states = [optimizer.state_of(parameter) for parameter in block.parameters]
                if not data.is_data(states):
                    logger.warning(
                        f"LayUp: the optimizer's state of block {block.name} is of a kind that cannot be sent: the "
                        "worker that joins begins without it."
                    )
                    states = [{} for _ in states]
                talk.send(states, newcomer)
            elif rank == newcomer:
                most = _LEAST_STATE + _MOST_STATES * sum(parameter.nbytes for parameter in block.parameters)
                for parameter, state in zip(block.parameters, talk.receive(0, most), strict=True):
                    optimizer.set_state_of(parameter, state)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
