"""How the workers come to hold one model."""

from __future__ import annotations

from accelerate.utils import gather_object

from ..gossip.consensus import reach_consensus
from .blockwise import BlockwiseModel
from .exchange import Exchange
from .host import Host
from .members import Members
from .state import RunState


class Agreement:
    """Makes all workers hold the mass-weighted mean, where they have come together for it."""

    def __init__(
        self, host: Host, state: RunState, members: Members, model: BlockwiseModel, exchange: Exchange
    ) -> None:
        self._host, self._state, self._members, self._model, self._exchange = host, state, members, model, exchange

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
        state, exchange = self._state, self._exchange
        self._model.require_same_parameters()
        exchange.pause()
        ledger = exchange.ledger if exchange.engine is not None else None
        done = gather_object([state.steps_done])
        consensus = reach_consensus(self._model.blocks, ledger, state.is_new)
        state.is_new = False
        state.agreed_at = self.now
        exchange.masses = consensus.mass_by_worker
        state.note(done=tuple(done), consensus_distance=consensus.distance)
        self._host.log(consensus.figures())
