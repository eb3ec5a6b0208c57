"""Consensus points: for a moment, all workers hold one model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import reduce
from torch import Tensor

from ..blocks import Block
from ..fleet.data import travels
from ..fleet.talk import Talk
from ..ledger import Account, Ledger, effective_masses
from ..ledger.mixing import UNIT

PIECE = 2**25
"""Numbers that are reduced at a time. 128 MiB in fp32: enough for a link, and five times as much beside the model."""

travels(Account)


@dataclass(frozen=True)
class Consensus:
    """What a consensus point found.

    Attributes:
        distance: Consensus distance before it: `sqrt(mean_i |x_i - mean|^2) / |mean|` over all parameters.
        mass: Mass of all workers together, in units of one worker's share: exactly the number of workers, less what
            workers took with them that are gone.
        mass_min: Smallest effective mass of a worker on a block.
        mass_max: Largest effective mass of a worker on a block.
        mass_by_worker: Mean over blocks of each worker's effective mass, in the order of ranks.
    """

    distance: float
    mass: float
    mass_min: float
    mass_max: float
    mass_by_worker: tuple[float, ...]

    def figures(self) -> dict[str, float]:
        """For the logs."""
        return {
            "layup/consensus_distance": self.distance,
            "layup/mass": self.mass,
            "layup/mass_min": self.mass_min,
            "layup/mass_max": self.mass_max,
        }


@torch.no_grad()
def reach_consensus(blocks: Sequence[Block], ledger: Ledger | None, talk: Talk, is_new: bool = False) -> Consensus:
    """Replace every worker's model by the mass-weighted mean of all, block by block. Collective.

    The mean counts each worker with its effective mass, so offers that were not yet taken are not lost; they are
    settled and every worker starts again with one `UNIT`. Needs memory for a few copies of `PIECE` numbers, not of a
    block or the model.

    Args:
        blocks: The model's blocks.
        ledger: What this worker has written down; None if it has just agreed with others and exchanged nothing since.
            All workers that are not here must have been excluded from it.
        talk: With all workers that are here.
        is_new: This worker has just joined: it has no mass yet, and takes over the mean of the others.

    Raises:
        RuntimeError: Mass was not conserved.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # merges may still be queued that read what a peer is about to change
    talk.wait()  # nobody gossips from here on
    mine = (-1, None) if ledger is None else (ledger.rank, ledger.account())
    reports: list[tuple[int, Account | None] | None] = talk.gather(None if is_new else mine)
    accounts = {report[0]: report[1] for report in reports if report is not None and report[1] is not None}
    masses = _masses(reports, accounts, len(blocks))
    totals = masses.sum(dim=0)

    squares = torch.zeros(2, dtype=torch.float64)  # |x - mean|^2 and |mean|^2
    for block in blocks:
        share = int(masses[talk.rank, block.index]) / int(totals[block.index])
        for tensors in _pieces(block.tensors):
            own = _flatten(tensors)
            mean = reduce(own * share, "sum")
            squares += torch.stack([(own - mean).square().sum(), mean.square().sum()]).double().cpu()
            _assign(tensors, mean)
    deviations = sum(talk.gather(squares[0].item()))
    if ledger is not None:
        ledger.settle(accounts)  # after the last collective: who has to begin again, as a worker is gone, can
    distance = (deviations / len(masses) / max(squares[1].item(), torch.finfo(torch.float64).tiny)) ** 0.5
    return Consensus(
        distance=distance,
        mass=int(totals.max()) / UNIT,
        mass_min=int(masses.min()) / UNIT,
        mass_max=int(masses.max()) / UNIT,
        mass_by_worker=tuple((masses.double().mean(dim=1) / UNIT).tolist()),
    )


def _masses(reports: list[tuple[int, Account | None] | None], accounts: dict[int, Account], num_blocks: int) -> Tensor:
    """Effective mass of every worker on every block, int64 of shape (workers, blocks); it must be accounted for.

    Raises:
        RuntimeError: It is not.
    """
    agreed = {report[1].settled if report[1] is not None else None for report in reports if report is not None}
    if len(agreed) > 1 or None in agreed:
        # Somebody died during the last consensus point: for some it has ended, the others have all of its means.
        return torch.tensor([[0 if report is None else UNIT] * num_blocks for report in reports])
    ranks = sorted(accounts)
    held = effective_masses({rank: accounts[rank] for rank in ranks})
    lost = sum((account.lost for account in accounts.values()), np.zeros(num_blocks, dtype=np.uint64))
    expected = len(accounts) * UNIT
    if not bool((held.sum(axis=1) + lost == expected).all()):
        raise RuntimeError(
            f"Mass is not conserved: {held.sum(axis=1).tolist()} units by block and {lost.tolist()} lost with workers "
            f"that are gone, instead of {expected}. The ledger was written by somebody else, or a worker gossiped "
            "during a consensus point. Please report this."
        )
    columns = dict(zip(ranks, held.T.tolist(), strict=True))
    return torch.tensor([[0] * num_blocks if report is None else columns[report[0]] for report in reports])


def _pieces(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The same memory, of at most `PIECE` numbers at a time but for tensors that are not contiguous; small ones go
    together, as each piece is a collective.
    """
    group: list[Tensor] = []
    room = PIECE
    for tensor in map(_as_real, tensors):
        for part in tensor.view(-1).split(PIECE) if tensor.is_contiguous() and tensor.numel() else [tensor]:
            if group and part.numel() > room:
                yield group
                group, room = [], PIECE
            group.append(part)
            room -= part.numel()
    if group:
        yield group


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    """One vector of a block, in fp32 or better: a mean in bf16 would lose what workers learnt since the last one."""
    parts = [_as_real(tensor) for tensor in tensors]
    precision = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
    return torch.cat([part.reshape(-1).to(precision) for part in parts])


def _assign(tensors: Sequence[Tensor], flat: Tensor) -> None:
    parts = [_as_real(tensor) for tensor in tensors]
    for part, mean in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
        part.copy_(mean.view(part.shape))


def _as_real(tensor: Tensor) -> Tensor:
    """The same memory; of complex numbers both parts."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
