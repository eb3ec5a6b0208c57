"""What is set beside each other: LayUp, the stock Trainer with DDP, and no communication at all."""

from transformers import Trainer

from layup_hf import LayupTrainer


class AloneTrainer(LayupTrainer):
    """Every worker for itself, with the Trainer's loop: what LayUp would be if communication cost nothing."""

    _shares_batches = False

    def _start_gossip(self) -> None:
        pass


class CountingTrainer(LayupTrainer):
    """Keeps what the engine has counted: `counts` and `staleness`, as of `GossipEngine`."""

    def _conclude(self) -> None:
        self.counts, self.staleness = self._engine.counts.copy(), self._engine.staleness.copy()
        super()._conclude()


METHODS = {"layup": LayupTrainer, "ddp": Trainer, "alone": AloneTrainer}
