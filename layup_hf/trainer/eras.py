"""Workers that come and go: how one era follows another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from transformers import ProgressCallback
from transformers.utils import logging

from ..fleet.group import is_of_group
from ..fleet.launch import has_joined
from ..fleet.membership import Era, Fenced
from ..progress.clock import ProgressClock
from .founding import Founding

logger = logging.get_logger(__name__)

_SHARED_STATE = (
    *("log_history", "epoch", "global_step", "max_steps", "num_train_epochs", "total_flos"),
    *("best_metric", "best_global_step", "best_model_checkpoint", "num_input_tokens_seen"),
)
_SHARED_PLACES = (
    *("_initial_global_step", "_initial_epoch", "_initial_num_input_tokens_seen"),
    *("_updates_per_epoch", "_ends_with_data", "_data_has_ended", "_last_cut_epoch"),
)
"""What a worker that joins takes over from rank 0: of the Trainer's state, and of where the run is."""

T = TypeVar("T")


class Eras(Founding):
    """Lets training go on when workers die, freeze, return or join. To be mixed into a subclass of `Trainer`.

    Between two meetings a worker that is gone is only done without: nothing is offered to it, what it has not taken
    is taken back. At the next meeting those who are left form a new process group, with a consensus point over them,
    and open new windows: a new era. In it the Trainer's ranks and number of processes are those of its members, so what
    needs all workers (evaluating, saving) is done by those who are there, and rank 0 is the first of them.
    """

    _clock: ProgressClock | None

    # ---- Joining ----

    def _take_part(self, epoch: int) -> None:
        """At the beginning of an epoch: a worker that joins does so now; the others say where they are."""
        if self._is_outside:
            self._enter()
            self._is_outside = False
            has_joined(self.args)
            self._meet()  # the others are in a meeting, for this worker's sake
        elif self._membership is not None and self._membership.leads:
            self._store.set("epoch", str(epoch))

    # ---- Between two meetings ----

    def _mind_members(self) -> None:
        """After an own step: do without who is gone, and see whether a new era is wanted.

        Raises:
            StoreLost: The store of the job does not answer any more.
        """
        membership = self._membership
        if membership is None:
            return
        membership.check()
        if membership.is_fenced:
            self._come_back()
            self._clock.called = True
            return
        for rank in membership.gone - self._done_without:
            self._do_without(rank, f"has left: rank {rank} {membership.reason_of(rank)}")
        if (membership.is_broken or (membership.applicants and membership.leads)) and not self._clock.called:
            self._clock.call_meeting()
            self._clock.called = True

    def _do_without(self, rank: int, why: str) -> None:
        self._done_without.add(rank)
        self._exclude(rank)
        logger.warning(f"LayUp: a worker {why}. The others go on; what it was offered and has not taken is taken back.")

    def _enduring(self, action: Callable[[], T]) -> T:
        """Do what needs all workers; if some are gone meanwhile, do it again with those who are left."""
        while True:
            try:
                return action()
            except RuntimeError as error:
                if not self._recovers_from(error):
                    raise

    def _recovers_from(self, error: RuntimeError) -> bool:
        """Form a new era, if this error says that the collectives of the present one have failed. Collective."""
        if self._membership is None or self._is_outside or not is_of_group(error):
            return False
        logger.warning(f"LayUp: workers that were together have lost each other ({_first_line(error)}).")
        self._regroup()
        return True

    # ---- The next era ----

    def _regroup(self) -> None:
        """Form a new era of all that are left, with who has asked to join. Collective."""
        while True:
            try:
                era = self._membership.assemble(admits=self._clock is not None)
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
        self._close_exchange()
        self._is_new = True
        self._forget_wishes()
        self._enter()

    def _enter(self) -> None:
        """Become a member of the job's next era. The others are to call a meeting for that."""
        if not self._begins(self._membership.apply()):
            self._regroup()

    def _begins(self, era: Era) -> bool:
        try:
            self._begin_era(era)
        except RuntimeError as error:
            if not is_of_group(error):
                raise
            logger.warning(f"LayUp: era {era.number} could not begin ({_first_line(error)}).")
            return False
        return True

    def _begin_era(self, era: Era) -> None:
        """Form the group, agree on one model, and open new windows. Collective over the members of the era."""
        for rank, member in enumerate(self._exchanging if self._engine is not None else ()):
            if member not in era.roster and rank not in self._done_without:
                self._do_without(rank, f"has left: rank {rank} is not in the next era")
        tokens_lost = self._tokens_of_gone()
        self._form_group(era)
        self._take_roles()
        if self._clock is None:
            return  # training has ended: there is one model, and nothing to exchange
        self._initial_num_input_tokens_seen += tokens_lost
        if self._shared_loader is not None:
            self._shared_loader.cursor.name = self._membership.member
        if era.joined:
            self._share_run()
        self._agree_on_model()
        self._close_exchange()
        self._open_exchange()
        self._exchanging, self._done_without, self._begins_era = era.roster, set[int](), True
        if self.is_world_process_zero():
            logger.warning(
                f"LayUp: {len(era.roster)} worker(s) go on from step {self.state.global_step}"
                + (f", {len(era.joined)} of them new." if era.joined else ".")
            )

    def _tokens_of_gone(self) -> int:
        """What workers that are gone have counted, as far as this one knows."""
        return sum(int(self._ledger.tokens[rank]) for rank in self._done_without) if self._engine is not None else 0

    def _take_roles(self) -> None:
        """What the Trainer has noted about its rank, or does on rank 0 alone."""
        self.state.is_world_process_zero = self.is_world_process_zero()
        self.state.is_local_process_zero = self.is_local_process_zero()
        if hasattr(self, "_eval_dataloaders"):
            self._eval_dataloaders = {}  # they yield the shard of another rank
        for callback in self.callback_handler.callbacks:
            lacks_bar = isinstance(callback, ProgressCallback) and callback.training_bar is None
            if lacks_bar and self.is_world_process_zero():
                callback.on_train_begin(self.args, self.state, self.control)
                callback.on_step_end(self.args, self.state, self.control)

    def _share_run(self) -> None:
        """Give those who join what they cannot know. Collective."""
        run = [
            {
                "state": {name: getattr(self.state, name) for name in _SHARED_STATE},
                "places": {name: getattr(self, name) for name in _SHARED_PLACES},
                "scheduler": self.lr_scheduler.state_dict(),
            }
        ]
        broadcast_object_list(run, from_process=0)
        if self._is_new:
            for name, value in run[0]["state"].items():
                setattr(self.state, name, value)
            vars(self).update(run[0]["places"])
            self.lr_scheduler.load_state_dict(run[0]["scheduler"])
        exchanged = {id(tensor) for block in self._blocks for tensor in block.tensors}
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if id(tensor) not in exchanged:
                broadcast(tensor.data)
        newcomers = [rank for rank, wants in enumerate(gather_object([self._is_outside])) if wants]
        for newcomer in newcomers:
            self._hand_over_optimizer(newcomer)

    def _hand_over_optimizer(self, newcomer: int) -> None:
        """Rank 0 sends its optimizer's state, block by block: moments that begin at zero make too long steps."""
        rank, optimizer = self.args.process_index, self._block_optimizer
        for block in self._blocks:
            if rank == 0:
                states = [optimizer.state_of(parameter) for parameter in block.parameters]
                torch.distributed.send_object_list([states], dst=newcomer, device=self.args.device)
            elif rank == newcomer:
                received: list[Any] = [None]
                torch.distributed.recv_object_list(received, src=0, device=self.args.device)
                for parameter, state in zip(block.parameters, received[0], strict=True):
                    optimizer.set_state_of(parameter, state)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
