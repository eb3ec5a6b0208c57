"""What is set beside each other: LayUp, the stock Trainer with DDP, and no communication at all."""

from transformers import Trainer

from layup_hf import LayupTrainer, MuonMixin
from layup_hf.optim.direction import Direction
from layup_hf.optim.onepass import OnePass
from layup_hf.trainer.run import LayupRun
from layup_hf.trainer.steps import BlockSteps
from layup_hf.trainer.work import WorkSharing


class OwnShards(WorkSharing):
    """Every worker keeps the shard that the Trainer gives it."""

    shares_batches = False


class AloneRun(LayupRun):
    """Exchanges nothing, and goes by no clock."""

    work_class = OwnShards

    def start_gossip(self) -> None:
        pass


class AloneTrainer(LayupTrainer):
    """Every worker for itself, with the Trainer's loop: what LayUp would be if communication cost nothing."""

    run_class = AloneRun


class StepsInParts(BlockSteps):
    """A block's step is made by torch's own operations, one after the other."""

    def choose_pass(self, direction: Direction | None) -> OnePass | None:
        return None


class PartsRun(LayupRun):
    steps_class = StepsInParts


class PartsTrainer(LayupTrainer):
    """LayUp as it is where no kernel can make the one pass."""

    run_class = PartsRun


class CountingRun(LayupRun):
    """Keeps what the engine has counted: `counts` and `staleness`, as of `GossipEngine`."""

    def conclude(self) -> None:
        self.counts, self.staleness = self.exchange.engine.counts.copy(), self.exchange.engine.staleness.copy()
        super().conclude()


class CountingTrainer(LayupTrainer):
    """LayUp; what has been counted is in its `layup`: see `CountingRun`."""

    run_class = CountingRun


class StockTrainer(MuonMixin, Trainer):
    """The stock Trainer, that knows Muon."""


METHODS = {"layup": LayupTrainer, "ddp": StockTrainer, "alone": AloneTrainer, "parts": PartsTrainer}
