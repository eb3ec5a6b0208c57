"""What is counted and logged, without a collective between two meetings."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from accelerate.utils import reduce
from torch import Tensor

from ..blocks.bias import GradientBias
from ..progress.clock import ProgressClock


class Logs:
    """Counts and logs for all by what each worker publishes in the ledger. To be mixed into a subclass of `Trainer`."""

    _clock: ProgressClock | None
    _bias: GradientBias | None

    def _track_num_input_tokens(self, inputs: Any) -> None:
        if self._clock is None:
            return super()._track_num_input_tokens(inputs)
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)  # of this worker alone
        self._ledger.tokens[self._ledger.rank] += np.uint64(self.state.num_input_tokens_seen - before)
        self._sum_tokens()
        return None

    def _sum_tokens(self) -> None:
        """Over what all workers have published until now; while they meet, exact."""
        self.state.num_input_tokens_seen = self._initial_num_input_tokens_seen + int(self._ledger.tokens.sum())

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        if self._clock is not None:
            if self.control.should_log and self._steps_done > self._steps_logged:
                start_time = kwargs["start_time"] if "start_time" in kwargs else args[4]
                self._log_without_waiting(tr_loss, grad_norm, start_time, kwargs.get("learning_rate"))
            self._globalstep_last_logged = self.state.global_step  # so that the Trainer does not log, by a collective
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _log_without_waiting(
        self, tr_loss: Tensor, grad_norm: Any, start_time: float, learning_rate: float | None
    ) -> None:
        """What the Trainer logs, without its gather: the loss is the mean of what each worker has published last."""
        self._require_same_parameters()
        total = tr_loss.item()
        tr_loss -= tr_loss
        self._ledger.report_loss(total / (self._steps_done - self._steps_logged))
        self._steps_logged = self._steps_done
        self._total_loss_scalar += total
        logs = {
            "loss": self._ledger.mean_loss(),
            "grad_norm": grad_norm.item() if isinstance(grad_norm, Tensor) else grad_norm,
            "learning_rate": self._get_learning_rate() if learning_rate is None else learning_rate,
            **self._engine.figures(),
            **(self._bias.figures() if self._bias is not None else {}),
        }
        with self._alone():
            self.log(logs, start_time)

    def store_flos(self) -> None:
        """As the Trainer's, also for a worker that has made no step since the last call."""
        self.current_flos = float(self.current_flos)  # the Trainer's 0 is an int: another size in its collective
        super().store_flos()

    def _average_loss(self) -> None:
        """Make the Trainer's mean over its own `global_step`s the mean over the steps of all workers. Collective."""
        mine = torch.tensor(self._total_loss_scalar, device=self.args.device) + self._tr_loss
        steps = self.state.global_step - self._initial_global_step
        self._total_loss_scalar = reduce(mine, "sum").item() * steps / max(1, self._steps_of_all)
        self._tr_loss = torch.zeros_like(self._tr_loss)
