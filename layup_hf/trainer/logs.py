"""What is counted and logged, without a collective between two meetings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils import reduce
from torch import Tensor

from .blockwise import BlockwiseModel
from .collectives import Collectives
from .exchange import Exchange
from .host import Host
from .state import RunState
from .steps import BlockSteps


class Logs:
    """Counts and logs for all by what each worker publishes in the ledger."""

    def __init__(
        self,
        host: Host,
        state: RunState,
        collectives: Collectives,
        model: BlockwiseModel,
        exchange: Exchange,
        steps: BlockSteps,
    ) -> None:
        self._host, self._state, self._collectives = host, state, collectives
        self._model, self._exchange, self._steps = model, exchange, steps

    def count_tokens(self, stock: Callable[[], None]) -> None:
        """As the Trainer's `_track_num_input_tokens`, over what all workers have published.

        Args:
            stock: The Trainer's own, which adds those of this worker.
        """
        with self.counting():
            stock()

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Around what adds tokens of this worker to the Trainer's state: a trainer that generates does in its step."""
        before = self._host.state.num_input_tokens_seen
        yield
        if self._state.clock is None:
            return
        ledger = self._exchange.ledger
        ledger.tokens[ledger.rank] += np.uint64(self._host.state.num_input_tokens_seen - before)
        self.sum_tokens()

    def sum_tokens(self) -> None:
        """Over what all workers have published until now; while they meet, exact."""
        seen = int(self._exchange.ledger.tokens.sum())
        self._host.state.num_input_tokens_seen = self._host.initial_tokens + seen

    def log_if_due(
        self, total_loss: Tensor, grad_norm: Any, start_time: float | None, learning_rate: float | None
    ) -> None:
        """Before the Trainer logs, evaluates and saves: log in its place, as it would by a collective.

        Args:
            total_loss: Sum of the losses since the latest log; is set to zero.
            grad_norm: For the logs.
            start_time: When training began.
            learning_rate: For the logs; None for the present one.
        """
        state, host = self._state, self._host
        if state.clock is None:
            return
        if host.control.should_log and state.steps_done > state.steps_logged:
            self._log(total_loss, grad_norm, start_time, learning_rate)
        host.last_logged_step = host.state.global_step  # so that the Trainer does not log

    def _log(self, total_loss: Tensor, grad_norm: Any, start_time: float | None, learning_rate: float | None) -> None:
        """What the Trainer logs, without its gather: the loss is the mean of what each worker has published last."""
        state, host, ledger, engine = self._state, self._host, self._exchange.ledger, self._exchange.engine
        self._model.require_same_parameters()
        total = total_loss.item()
        total_loss -= total_loss
        ledger.report_loss(total / (state.steps_done - state.steps_logged))
        state.steps_logged = state.steps_done
        host.loss_logged += total
        logs = {
            "loss": ledger.mean_loss(),
            "grad_norm": grad_norm.item() if isinstance(grad_norm, Tensor) else grad_norm,
            "learning_rate": host.learning_rate if learning_rate is None else learning_rate,
            **(engine.figures() if engine is not None else {}),
            **(self._steps.bias.figures() if self._steps.bias is not None else {}),
        }
        with self._collectives.alone():
            host.log(logs, start_time)

    def average_loss(self) -> None:
        """Make the Trainer's mean over its own `global_step`s the mean over the steps of all workers. Collective."""
        host = self._host
        mine = torch.tensor(host.loss_logged, device=host.args.device) + host.total_loss
        host.loss_logged = reduce(mine, "sum").item() * host.steps_averaged / max(1, self._state.steps_of_all)
        host.total_loss = torch.zeros_like(host.total_loss)
