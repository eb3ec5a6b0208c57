"""The options of LayUp, with their defaults."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any


@dataclass
class Options:
    """The fields that `LayupOptions` adds to a configuration, without what it does when one is made."""

    peers_per_step: int | None = field(
        default=None,
        metadata={
            "help": "Offers per block and step. Unset: one to every neighbour, up to 7: all peers on this host, over "
            "a network those 1, 2, 4, 8, ... ranks on."
        },
    )
    windows: str = field(
        default="auto",
        metadata={
            "help": "How peers read each other's blocks: `shared` (workers of one host), `nixl` (over a network), or "
            "`auto`: shared for peers on the same host, NIXL for the others."
        },
    )
    wire_dtype: str = field(
        default="fp32",
        metadata={
            "help": "What a block is sent as over a network: `fp32`, as it is, or `bf16`: half the bytes of a block "
            "in fp32, rounded."
        },
    )
    merge_at: str = field(
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
            "where workers are started by several launches; no lease under a single one, which ends all workers when "
            "one ends."
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
    clip: str = field(
        default="auto",
        metadata={
            "help": "How `max_grad_norm` is kept: `estimate` clips each block in backward by an estimate of the global "
            "norm; `exact` waits for the whole gradient, and blocks step when backward has ended; `auto`: `estimate`, "
            "unless a callback, the optimizer or the trainer's `training_step` needs the whole gradient."
        },
    )
    second_moment: str = field(
        default="auto",
        metadata={
            "help": "What AdamW's second moment is of: `mean`: the mean gradient of the workers on this host, as with "
            "DDP, estimated without adding them up; `own`: this worker's gradient; `auto`: `mean` where the optimizer "
            "is torch's AdamW and peers share this host's memory."
        },
    )
    nesterov: str = field(
        default="auto",
        metadata={
            "help": "Whether AdamW steps by Nesterov's momentum, which makes up for gradients that come late: `on`, "
            "`off`, or `auto`: with several workers, where the optimizer is torch's AdamW."
        },
    )
    straggler: str | None = field(
        default=None,
        metadata={"help": "Delays to inject, such as 'rank=3,compute=0.4' (seconds per step); see StragglerConfig."},
    )


_DEFAULTS = Options()
_NAMES = tuple(field.name for field in fields(Options))


def options_of(args: Any) -> Options:
    """The options among the arguments of a Trainer: the defaults for what a plain `TrainingArguments` has not."""
    if isinstance(args, Options):
        return args
    given = {name: getattr(args, name) for name in _NAMES if hasattr(args, name)}
    return replace(_DEFAULTS, **given) if given else _DEFAULTS
