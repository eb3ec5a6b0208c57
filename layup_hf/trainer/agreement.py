"""How the workers come to hold one model."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..gossip.consensus import reach_consensus
from ..gossip.rest import agree_on_rest
from ..trace.events import CONSENSUS, WORKERS
from .blockwise import BlockwiseModel
from .exchange import Exchange
from .host import Host
from .members import Members
from .state import RunState
from .tracing import Tracing

logger = logging.getLogger(__name__)

_COUNTED = "num_batches_tracked"
"""Of BatchNorm, whose statistics are exchanged: a count of a worker's own steps, which nobody need be told of."""


class Agreement:
    """Makes all workers hold the mass-weighted mean, where they have come together for it."""

    def __init__(
        self,
        host: Host,
        state: RunState,
        members: Members,
        model: BlockwiseModel,
        exchange: Exchange,
        tracing: Tracing,
    ) -> None:
        self._host, self._state, self._members, self._model, self._exchange = host, state, members, model, exchange
        self._tracing = tracing
        self._named: set[str] = set()  # what a warning has named

    @property
    def now(self) -> tuple[int, int]:
        """Era, and steps of all workers at the latest meeting: no worker's model has changed between two equal ones."""
        return self._members.era, self._state.steps_of_all

    @property
    def holds(self) -> bool:
        """Whether nobody has made a step since the latest agreement."""
        return self._state.agreed_at == self.now

    def agree(self) -> None:
        """Make all workers hold the mean, and log what was found. Collective."""
        with self._tracing.span(CONSENSUS):
            self._agree()

    def _agree(self) -> None:
        state, exchange = self._state, self._exchange
        self._model.require_same_parameters()
        exchange.pause()
        ledger = exchange.ledger if exchange.engine is not None else None
        with self._tracing.span(WORKERS):
            done = self._members.talk.gather(state.steps_done)
        self._model.snapshots.before_agreement()
        consensus = reach_consensus(self._model.blocks, ledger, self._members.talk, state.is_new)
        self._agree_on_rest()
        state.is_new = False
        state.agreed_at = self.now
        exchange.masses = consensus.mass_by_worker
        state.note(done=tuple(done), consensus_distance=consensus.distance)
        self._host.log(consensus.figures())

    def _agree_on_rest(self) -> None:
        """Buffers and frozen parameters that are saved with the model, if training has changed them. Collective."""
        differing = agree_on_rest(self._rest(), self._members.talk.gather)
        named = {name for name in differing if not name.endswith(_COUNTED)} - self._named
        if named and self._host.is_first:
            names = sorted(named)
            logger.warning(
                f"LayUp: training changes what workers do not exchange: {', '.join(names[:5])}"
                + (f" and {len(names) - 5} more" if len(names) > 5 else "")
                + ". Between consensus points each worker has its own. At one, all take the mean; of what is not "
                "floating-point, rank 0's."
            )
        self._named |= named

    def _rest(self) -> dict[str, Tensor]:
        model, blocks = self._host.model, self._model.blocks
        exchanged = {id(tensor) for block in blocks for tensor in (*block.parameters, *block.buffers)}
        saved = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
        rest = saved - exchanged
        return {
            name: tensor
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
            if id(tensor) in rest and tensor.device.type != "meta" and tensor.layout == torch.strided
        }
