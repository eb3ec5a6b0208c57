"""One block's part of an optimizer's parameter group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class Share:
    """One block's part of one parameter group.

    Some optimizers count their steps among the options of a group. Each block then counts for itself: `own` has the
    options that a step changes. It is None before the first step, which shows which these are.
    """

    group: int
    params: list[Tensor]
    own: dict[str, Any] | None = None

    def view(self, group: dict[str, Any]) -> dict[str, Any]:
        """The group as the optimizer is to see it when it steps this block."""
        if self.own is None:  # a tensor may be counted up in place
            group = {key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items()}
        return {**group, **(self.own or {}), "params": self.params}

    def keep(self, group: dict[str, Any], view: dict[str, Any], optimizer: str) -> None:
        """Keep what the step has changed in `view`.

        Raises:
            ValueError: It is not a number or the like, but the state of parameters.
        """
        if self.own is None:
            before, after = _snapshot(group), _snapshot(view)
            self.own = {key: None for key in after if key not in before or after[key] != before[key]}
        self.own = {key: view[key] for key in self.own}
        if any(not isinstance(value, bool | int | float | str | Tensor | None) for value in self.own.values()):
            raise ValueError(
                f"{optimizer} keeps the state of its parameters in its parameter groups ({', '.join(self.own)}), which "
                "cannot be stepped block by block. Choose another `optim`, such as adamw_torch."
            )


def _snapshot(group: dict[str, Any]) -> dict[str, Any]:
    """The options of a group, comparable; tensors as numbers, since they may be changed in place."""
    options = {key: value for key, value in group.items() if key != "params"}
    return {key: value.tolist() if isinstance(value, Tensor) else value for key, value in options.items()}
