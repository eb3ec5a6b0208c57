"""The options of LayUp, with their defaults."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints


@dataclass
class Options:
    """The fields that `LayupOptions` adds to a configuration, without what it does when one is made."""

    peers_per_step: int | None = field(
        default=None,
        metadata={
            "help": "Offers per block and step. Unset: one to every neighbour, up to 7 (all peers on this host, over "
            "a network those 1, 2, 4, 8, ... ranks on); on GPUs, as many of these as a fiftieth of a step allows."
        },
    )
    windows: Literal["auto", "shared", "nixl"] = field(
        default="auto",
        metadata={
            "help": "How peers read each other's blocks: `shared` (workers of one host), `nixl` (over a network), or "
            "`auto`: shared for peers on the same host, NIXL for the others."
        },
    )
    wire_dtype: Literal["fp32", "bf16", "int8", "int4"] = field(
        default="fp32",
        metadata={
            "help": "What a block in fp32 is sent as over a network: `fp32`, as it is; `bf16`, rounded: half of the "
            "bytes; `int8` or `int4`: 8 or 4 bits of each number, a quarter or an eighth of the bytes, by which the "
            "receiver finds it near its own one."
        },
    )
    merge_at: Literal["boundary", "backward", "arrival"] = field(
        default="boundary",
        metadata={
            "help": "When a worker merges what peers offer: `boundary`: where a block's gradients are complete and "
            "before its forward, so that gradients are exact; `backward`: where they are complete only, for models "
            "that use weights before their modules run; `arrival`: at any moment, from a thread."
        },
    )
    bias_every: int = field(
        default=0,
        metadata={
            "help": "Measure in every so many own steps by how much merges between forward and backward have changed "
            "the gradient, by a second forward and backward; 0: never."
        },
    )
    offer_every: int = field(
        default=1,
        metadata={"help": "A worker offers a block after every so many of its own steps."},
    )
    lease_seconds: float | None = field(
        default=None,
        metadata={
            "help": "A worker that gives no sign of life for so long is done without, until it comes back. Unset: 15 "
            "where workers are started by several launches, more for one that is late; no lease under a single one, "
            "which ends all workers when one ends."
        },
    )
    network_interface: str | None = field(
        default=None,
        metadata={"help": "The one network interface to use, such as `eth0`. Unset: the one that leads to rank 0."},
    )
    join: str | None = field(
        default=None,
        metadata={"help": "Join a running job as one more worker: HOST:PORT of its store, as its log says."},
    )
    shared_batches: bool = field(
        default=True,
        metadata={
            "help": "Workers draw their batches from one order of each epoch, so a slow one takes fewer. Off: each "
            "keeps the shard that the Trainer gives it."
        },
    )
    clip: Literal["auto", "estimate", "exact"] = field(
        default="auto",
        metadata={
            "help": "How `max_grad_norm` is kept: `estimate` clips each block in backward by an estimate of the global "
            "norm; `exact` waits for the whole gradient, and blocks step when backward has ended; `auto`: `estimate`, "
            "unless a callback, the optimizer or the trainer's `training_step` needs the whole gradient."
        },
    )
    second_moment: Literal["auto", "mean", "own"] = field(
        default="auto",
        metadata={
            "help": "What AdamW's second moment is of: `mean`: the mean gradient of the workers on this host, as with "
            "DDP, estimated without adding them up; `own`: this worker's gradient; `auto`: `mean` where the optimizer "
            "is torch's AdamW and peers share this host's memory."
        },
    )
    nesterov: Literal["auto", "on", "off"] = field(
        default="auto",
        metadata={
            "help": "Whether AdamW steps by Nesterov's momentum, which makes up for gradients that come late: `on`, "
            "`off`, or `auto`: with several workers, where the optimizer is torch's AdamW."
        },
    )
    checkpoints: Literal["wait", "background"] = field(
        default="wait",
        metadata={
            "help": "How a checkpoint is written: `wait`: while all workers stand still; `background`: while they "
            "train on, from a snapshot in the host's memory. In both cases it has its name when it is complete."
        },
    )
    evaluations: Literal["wait", "background"] = field(
        default="wait",
        metadata={
            "help": "How the model is evaluated during training: `wait`: by all workers, which stand still; "
            "`background`: by rank 0 alone while the others train on. In both cases all of it is done by one model."
        },
    )
    trace: str | None = field(
        default=None,
        metadata={
            "help": "Write what each worker did and waited for into this file (.json), which Perfetto opens. Unset: "
            "nothing is recorded."
        },
    )
    straggler: str | None = field(
        default=None,
        metadata={"help": "Delays to inject, such as 'rank=3,compute=0.4' (seconds per step); see StragglerConfig."},
    )


_KINDS = {option.name: str(option.type) for option in fields(Options)}
"""The annotation of each option, as written here: `HfArgumentParser` puts types in their place."""

CHOICES: dict[str, tuple[str, ...]] = {
    name: get_args(kind) for name, kind in get_type_hints(Options).items() if get_origin(kind) is Literal
}
"""What the options may be that are one of several words; the default is the first."""

_TRUE, _FALSE, _NONE = ("true", "yes", "on", "1"), ("false", "no", "off", "0"), ("none", "null", "~", "")


def settle_types(options: Options) -> None:
    """Turn what YAML or a command line makes of a value into what it means, where that is not in doubt.

    Raises:
        ValueError: A value is of another type than its option.
    """
    for name, value in _settled(options).items():
        setattr(options, name, value)


def require_types(options: Options) -> None:
    """Make sure that no option has been set to a value of another type since `settle_types`.

    Raises:
        ValueError: One has.
    """
    for name, value in _settled(options).items():
        if value is not getattr(options, name) and value != getattr(options, name):
            raise ValueError(
                f"{name}={getattr(options, name)!r} is of another type than this option. Set it to {value!r}."
            )


def _settled(options: Options) -> dict[str, Any]:
    """Every option with its value in its own type."""
    return {name: _settle(name, kind, getattr(options, name)) for name, kind in _KINDS.items()}


def _settle(name: str, kind: str, value: Any) -> Any:
    """One value. Args: `kind` is the annotation of the field."""
    wanted, _, none = ("str" if kind.startswith("Literal") else kind).partition(" | ")
    if none and (value is None or (wanted != "str" and isinstance(value, str) and value.lower() in _NONE)):
        return None
    read = {"bool": _as_bool, "int": _as_int, "float": _as_float, "str": _as_str}[wanted]
    settled = read(name, value)
    if settled is None:
        what = {"bool": "True or False", "int": "a whole number", "float": "a number", "str": "text"}[wanted]
        raise ValueError(f"{name}={value!r} is not of its type: use {what}{', or None' if none else ''}.")
    return settled


def _as_bool(name: str, value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    if isinstance(value, str | int) and str(value).lower() in _TRUE + _FALSE:
        return str(value).lower() in _TRUE
    return None


def _as_int(name: str, value: Any) -> int | None:
    number = _as_float(name, value)
    return int(number) if number is not None and math.isfinite(number) and number == int(number) else None


def _as_float(name: str, value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _as_str(name: str, value: Any) -> str | None:
    if name == "nesterov" and isinstance(value, bool):  # YAML reads `on` and `off` as these
        return "on" if value else "off"
    return value if isinstance(value, str) else None


_DEFAULTS = Options()
_NAMES = tuple(_KINDS)


def options_of(args: Any) -> Options:
    """The options among the arguments of a Trainer: the defaults for what a plain `TrainingArguments` has not."""
    if isinstance(args, Options):
        return args
    given = {name: getattr(args, name) for name in _NAMES if hasattr(args, name)}
    return replace(_DEFAULTS, **given) if given else _DEFAULTS
