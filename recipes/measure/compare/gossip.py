"""Gossip of whole models, as variations of LayUp's own engine: what differs is written here, and nothing else.

The whole model is one block, so a worker steps, offers and merges it as one; see `WholeModelRun`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from layup_hf import LayupTrainer
from layup_hf.blocks import Block
from layup_hf.gossip.engine import GossipEngine, Offer
from layup_hf.gossip.topology import PeerSampler
from layup_hf.trainer.blockwise import BlockwiseModel
from layup_hf.trainer.exchange import Exchange
from layup_hf.trainer.run import LayupRun
from layup_hf.windows import PeerWindows


class WholeModelEngine(GossipEngine):
    """Merges once per step, before its forward."""

    _has_stepped = True

    @contextlib.contextmanager
    def merging(self, block: Block) -> Iterator[list[Offer]]:
        """Take what is offered, unless this step's forward has begun: its gradient is to fit its weights."""
        has_stepped, self._has_stepped = self._has_stepped, False
        if not has_stepped:
            yield []
            return
        with super().merging(block) as offers:
            yield offers

    def offer(self, block: Block) -> None:
        super().offer(block)
        self._has_stepped = True


class SnapshotEngine(WholeModelEngine):
    """Offers the model as it is when it is offered: what a peer reads is a copy made then.

    Args:
        blocks, windows, sampler, options: As of `WholeModelEngine`; the windows show the peers' copies.
        copies: This worker's, which its peers see.
    """

    def __init__(self, blocks: Sequence[Block], *args: Any, copies: Sequence[Block], **options: Any) -> None:
        super().__init__(blocks, *args, **options)
        self._copies = [block.tensors for block in copies]

    def weight(self, units: int, own: int, untaken: int) -> float:
        return units / (own + units)  # what was sent is no longer the sender's

    def offer(self, block: Block) -> None:
        if self.ledger.eligible(block.index):
            torch._foreach_copy_(self._copies[block.index], self.mine[block.index])
        super().offer(block)


class EqualEngine(WholeModelEngine):
    """Merges by half, and offers one unit of mass, the least there is: all workers keep the same mass but for a part in
    2**40.
    """

    def weight(self, units: int, own: int, untaken: int) -> float:
        return 0.5

    def units(self, own: int, receivers: int) -> int:
        return 1


class WholeModel(BlockwiseModel):
    """The whole model as one block."""

    def split(self, model: nn.Module, held: Sequence[torch.Tensor]) -> list[Block]:
        return [one_block(super().split(model, held), model)]


class WholeModelRun(LayupRun):
    """LayUp with the whole model as one block. To be used with `clip="exact"`, so that the model steps when backward
    has ended, and with `peers_per_step=1`.

    Evaluated as LayUp is: at consensus points, on the mean of all workers by mass, which all then go on from.
    """

    model_class = WholeModel


class SnapshotExchange(Exchange):
    """Peers see copies of the blocks."""

    def shown(self, blocks: Sequence[Block]) -> Sequence[Block]:
        self.copies = [copy_of(block) for block in blocks]
        return self.copies

    def make_engine(self, blocks: Sequence[Block], windows: PeerWindows, sampler: PeerSampler) -> GossipEngine:
        return SnapshotEngine(blocks, windows, sampler, copies=self.copies)


class EqualExchange(Exchange):
    """Peers see the blocks themselves, and merge by half."""

    def make_engine(self, blocks: Sequence[Block], windows: PeerWindows, sampler: PeerSampler) -> GossipEngine:
        return EqualEngine(blocks, windows, sampler)


class GoSgdRun(WholeModelRun):
    exchange_class = SnapshotExchange


class AdPsgdRun(WholeModelRun):
    exchange_class = EqualExchange


class GoSgdTrainer(LayupTrainer):
    """GoSGD (Blot et al., arXiv 1611.09726): after a step a worker sends its model as it is, with half of its weight,
    to a random peer; the peer merges it by the two weights before its next step.

    Not as there: the optimizer is AdamW; a worker sends after every step, unless the peer has not yet taken the last
    model; there is one copy per worker instead of a queue of messages, so what is taken may be a later copy than the
    one that was offered, or with three workers or more one that is being overwritten; and at a consensus point what is
    on the way counts with its sender's present model.
    """

    run_class = GoSgdRun


class AdPsgdTrainer(LayupTrainer):
    """AD-PSGD (Lian et al., arXiv 1710.06952): in every step a worker averages its model with that of a random peer.

    Not as there: the optimizer is AdamW; averaging is not one atomic act of both, which needs locks and a graph without
    deadlocks, but each of the two moves halfway to the other's live model when it comes to its next step, if the other
    has chosen it; and the gradient is taken after averaging, not at the weights before.
    """

    run_class = AdPsgdRun


def one_block(blocks: Sequence[Block], model: nn.Module) -> Block:
    """All blocks of a model as one."""
    return Block(
        index=0,
        name="model",
        parameter_names=tuple(chain.from_iterable(block.parameter_names for block in blocks)),
        parameters=tuple(chain.from_iterable(block.parameters for block in blocks)),
        buffers=tuple(chain.from_iterable(block.buffers for block in blocks)),
        modules=(model,),
        completes_late=any(block.completes_late for block in blocks),
    )


def copy_of(block: Block) -> Block:
    """A block of the same name and shapes with memory of its own."""
    return replace(
        block,
        parameters=tuple(nn.Parameter(p.detach().clone()) for p in block.parameters),
        buffers=tuple(buffer.detach().clone() for buffer in block.buffers),
    )
