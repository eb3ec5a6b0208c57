"""Whom accelerate's collectives reach: all workers, or this one alone."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import do_nothing

from ..progress.clock import WorkerFailure
from ..trace.events import WORKERS
from .host import Host
from .members import Members
from .state import RunState
from .tracing import Tracing

_CHOOSING: dict[type, dict[str, Any]] = {
    PartialState: {
        name: vars(PartialState)[name]
        for name in ("use_distributed", "is_main_process", "is_last_process", "on_process")
    },
    Accelerator: {"is_last_process": vars(Accelerator)["is_last_process"]},
}
"""By what accelerate chooses one worker: from the numbers that it has. (The place on this machine stays as it is.)"""


@functools.lru_cache(maxsize=1)
def _choosing_of_all(process: int, workers: int) -> dict[type, dict[str, Any]]:
    """The same by this worker's place among all."""

    def on_process(self: PartialState, function: Any = None, process_index: int | None = None) -> Callable[..., Any]:
        if function is None:
            return functools.partial(self.on_process, process_index=process_index)
        return function if process_index == process else do_nothing

    is_last = property(lambda self: process == workers - 1)
    of_state = {
        "use_distributed": property(lambda self: True),
        "is_main_process": property(lambda self: process == 0),
        "is_last_process": is_last,
        "on_process": on_process,
    }
    return {PartialState: of_state, Accelerator: {"is_last_process": is_last}}


def _place_in_group() -> tuple[int, int]:
    """This worker's number, and how many there are."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


class Collectives:
    """What a subclass or a callback gathers or reduces through accelerate is of this worker alone, or of all.

    In its own step, in the callbacks that go with steps or begin and end an epoch, and in logging a worker is alone:
    the others are elsewhere, and would not join in. Then `process_index` and `num_processes` of accelerate say 0 of 1,
    too, so that what a step reads at its own place in what it has gathered is its own. What chooses one worker among
    all (`is_main_process`, `is_last_process`, `on_main_process`, `on_process`, `print` and the like) still does, and
    the Trainer's arguments tell of all workers as always.

    Attributes:
        is_alone: This worker is in the middle of something that the others do not do at the same time.
    """

    def __init__(self, host: Host, state: RunState, members: Members, tracing: Tracing) -> None:
        self._host, self._state, self._members, self._tracing = host, state, members, tracing
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
        before = PartialState().distributed_type, self.is_alone
        self._tell_accelerate(kind)
        self.is_alone = is_alone
        try:
            yield
        finally:
            self._tell_accelerate(before[0])
            self.is_alone = before[1]

    def _tell_accelerate(self, kind: DistributedType) -> None:
        """Let it say who is there now, consistently. What chooses one worker for something goes on choosing of all."""
        process, workers = _place_in_group()
        is_alone = kind == DistributedType.NO and workers > 1
        # accelerate copies the first into the second now and then
        for state in (PartialState(), self._host.accelerator.state):
            state.distributed_type = kind
            state.process_index, state.num_processes = (0, 1) if is_alone else (process, workers)
        for owner, members in (_choosing_of_all(process, workers) if is_alone else _CHOOSING).items():
            for name, member in members.items():
                setattr(owner, name, member)
        self._host.let_arguments_see({"process_index": process, "num_processes": workers} if is_alone else None)

    @contextlib.contextmanager
    def own_tokens(self) -> Iterator[None]:
        """Let the Trainer normalise by the tokens of this worker, whatever `average_tokens_across_devices` is."""
        args = self._host.args
        before, args.average_tokens_across_devices = args.average_tokens_across_devices, False
        try:
            yield
        finally:
            args.average_tokens_across_devices = before

    def gather(self, item: Any) -> list[Any]:
        """One object of every worker, in the order of ranks. Collective.

        Raises:
            WorkerFailure: A worker has ended meanwhile, and nothing is left to go on with.
        """
        clock = self._state.clock
        try:
            with self._tracing.span(WORKERS) if self._host.world_size > 1 else contextlib.nullcontext():
                return self._members.talk.gather(item)
        except RuntimeError as error:
            if self._members.membership is not None or clock is None:
                raise
            message = clock.failure() or (
                "A worker has ended without a word: was it killed, or out of memory? Or it has not come to a meeting "
                "within `ddp_timeout`."
            )
            raise WorkerFailure(message) from error
