"""Whom accelerate's collectives reach: all workers, or this one alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from accelerate import DistributedType, PartialState
from accelerate.utils import gather_object

from ..progress.clock import WorkerFailure
from .host import Host
from .members import Members
from .state import RunState


class Collectives:
    """What a subclass or a callback gathers or reduces through accelerate is of this worker alone, or of all.

    In its own step, in the callbacks that go with steps or begin and end an epoch, and in logging a worker is alone:
    the others are elsewhere, and would not join in.

    Attributes:
        is_alone: This worker is in the middle of something that the others do not do at the same time.
    """

    def __init__(self, host: Host, state: RunState, members: Members) -> None:
        self._host, self._state, self._members = host, state, members
        self.is_alone = False

    def alone(self, may_meet: bool = False) -> contextlib.AbstractContextManager[None]:
        """Let accelerate's collectives act on this worker only.

        Args:
            may_meet: Whether what needs all workers, such as `evaluate()`, may be called: it waits for them itself.
        """
        return self._acting_as(DistributedType.NO, not may_meet)

    def together(self) -> contextlib.AbstractContextManager[None]:
        """Let accelerate's collectives act on all workers again, for what all of them come to."""
        if self._state.clock is None:
            return contextlib.nullcontext()
        return self._acting_as(self._members.launched_as, self.is_alone)

    @contextlib.contextmanager
    def _acting_as(self, kind: DistributedType, is_alone: bool) -> Iterator[None]:
        states = (
            PartialState(),
            self._host.accelerator.state,
        )  # accelerate copies the first into the second now and then
        before = states[0].distributed_type, self.is_alone, PartialState.use_distributed
        # By this one accelerate tells whether `on_main_process` and the like choose among workers: there are several.
        PartialState.use_distributed = property(lambda state: state.num_processes > 1)
        self.is_alone = is_alone
        for state in states:
            state.distributed_type = kind
        try:
            yield
        finally:
            for state in states:
                state.distributed_type = before[0]
            _, self.is_alone, PartialState.use_distributed = before

    def gather(self, item: Any) -> list[Any]:
        """One object of every worker, in the order of ranks. Collective.

        Raises:
            WorkerFailure: A worker has ended meanwhile, and nothing is left to go on with.
        """
        clock = self._state.clock
        try:
            return gather_object([item])
        except RuntimeError as error:
            if self._members.membership is not None or clock is None:
                raise
            message = clock.failure() or (
                "A worker has ended without a word: was it killed, or out of memory? Or it has not come to a meeting "
                "within `ddp_timeout`."
            )
            raise WorkerFailure(message) from error
