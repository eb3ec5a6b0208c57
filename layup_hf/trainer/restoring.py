"""What training goes on from: found, looked at, and loaded by all workers."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import get_last_checkpoint

from ..windows.opening import together
from .collectives import Collectives
from .compat import on_plain_cpu
from .fitting import fitting_optimizer, require_model
from .folders import clear
from .host import Host
from .reading import readable
from .resumed import Resumed
from .state import RunState

logger = logging.getLogger(__name__)

_OF_MODEL = ("*.safetensors", "pytorch_model*.bin", "*.index.json", "adapter_*", "*/adapter_*")


class Restoring:
    """Loads a checkpoint, each worker its own optimizer and random states, and says what cannot be read."""

    def __init__(self, host: Host, state: RunState, collectives: Collectives) -> None:
        self._host, self._state, self._collectives = host, state, collectives

    def find(self, wanted: str | bool | None) -> str | None:
        """The checkpoint that all workers are to go on from, as the Trainer's `train` is asked for it. Collective.

        Args:
            wanted: A folder; True for the latest in the output directory.

        Raises:
            ValueError: There is none; or workers would go on from different steps, or some from none.
            RuntimeError: So it is for another worker; with its rank.
        """

        def look() -> tuple[str | None, Resumed | None]:
            folder = get_last_checkpoint(self._host.folder) if wanted is True else wanted or None
            if wanted is True and folder is None:
                raise ValueError(f"No valid checkpoint found in output directory ({self._host.folder})")
            return folder, Resumed.read(folder)

        folder, resumed = together(look, self._collectives.gather, "find its checkpoint")
        steps = self._collectives.gather(_place(folder, resumed))
        if len(set(steps)) > 1:
            places = ", ".join(f"rank {rank} from {step}" for rank, step in enumerate(steps))
            raise ValueError(
                f"Workers would not go on from the same: {places}. Give all of them the same checkpoint as "
                "`resume_from_checkpoint`, in a folder that all can read or in copies of it."
            )
        return folder

    def resume(self, checkpoint: str | None, trial: Any) -> None:
        """Find out what training goes on from, and clear away what a killed run has left. Before all workers meet."""
        self._state.resumed = Resumed.read(checkpoint)
        if self._host.args.should_save and not self._state.is_outside:  # the others may be writing just now
            clear(Path(self._host.output_dir(trial)))

    def load_optimizer(self, checkpoint: str | None, stock: Callable[[], None]) -> None:
        """As the Trainer's `_load_optimizer_and_scheduler`, with this worker's own optimizer state. Collective.

        Raises:
            ValueError: A file cannot be read, has numbers that are not finite, or is of another optimizer or model.
            RuntimeError: So it is for another worker; with its rank.
        """
        if checkpoint is None:
            return
        resumed, optimizer = self._state.resumed, self._host.optimizer
        file = resumed.optimizer_file(self._host.rank) if resumed is not None else None

        def load() -> None:
            with readable(checkpoint, [OPTIMIZER_NAME, SCHEDULER_NAME, *([file.name] if file is not None else [])]):
                with fitting_optimizer(Path(checkpoint, OPTIMIZER_NAME), optimizer), on_plain_cpu(self._host.args):
                    stock()
                if file is not None:
                    states = torch.load(file, map_location="cpu", weights_only=True)
                    with fitting_optimizer(file, optimizer):
                        optimizer.load_state_dict(states)
            _require_finite(optimizer, file or Path(checkpoint, OPTIMIZER_NAME))

        together(load, self._collectives.gather, "read its checkpoint")

    def load_model(self, checkpoint: str, stock: Callable[[], None]) -> None:
        """As the Trainer's `_load_from_checkpoint`. Collective.

        Raises:
            ValueError: A file cannot be read, or is of another model.
            RuntimeError: So it is for another worker; with its rank.
        """

        def load() -> None:
            with readable(checkpoint, _OF_MODEL):
                require_model(Path(checkpoint), self._host.model)
                stock()

        together(load, self._collectives.gather, "read its checkpoint")

    def load_random_state(self, checkpoint: str | None, stock: Callable[[], None]) -> None:
        """As the Trainer's `_load_rng_state`.

        Raises:
            ValueError: The file cannot be read.
        """
        name = f"rng_state_{self._host.rank}.pth" if self._host.world_size > 1 else "rng_state.pth"
        with readable(checkpoint, [name]):
            stock()

    def say_what_is_resumed(self) -> None:
        """Tell what another number of workers than in the checkpoint means."""
        resumed, workers = self._state.resumed, self._host.world_size
        if resumed is None or resumed.workers == workers or not self._host.is_first:
            return
        unused = ", ".join(map(str, range(workers, resumed.workers)))
        states = f"those of rank {unused} are not used" if unused else "new workers begin with those of the old in turn"
        logger.warning(
            f"{workers} worker(s) go on from step {resumed.global_step} (epoch {resumed.epoch:.4g}) of "
            f"{resumed.workers}. Optimizer states: {states}. Training ends at step {self._host.state.max_steps}, and "
            "the learning rate's schedule fits that; what of the epoch has been used is not used again."
        )


def _place(folder: str | None, resumed: Resumed | None) -> str:
    """What a worker goes on from, for people."""
    if folder is None:
        return "no checkpoint"
    if resumed is not None:
        return f"step {resumed.global_step}"
    return f"{folder}, which {'has no state of a Trainer' if os.path.isdir(folder) else 'is not there'}"


def _require_finite(optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Refuse moments that would make a worker's weights NaN in its first step, and by the exchange those of all.

    Raises:
        ValueError: Some numbers are not finite.
    """
    for number, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            is_real = isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
            if is_real and not bool(torch.isfinite(value).all()):
                raise ValueError(
                    f"{file} has numbers that are not finite (NaN or infinity) in {name!r} of parameter {number}: the "
                    "weights would become so, too. Resume from another checkpoint; or remove the file, to go on with "
                    "rank 0's optimizer state, or without that, with a new one."
                )
