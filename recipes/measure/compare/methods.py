"""The methods that are set side by side.

Every method trains with the Trainer's own AdamW (or with Muon, where its name says so), schedule and clipping, on the
same batches per worker and step.
"""

from collections.abc import Callable

from layup_hf import LayupTrainer

from .ddp import ddp, ddp_bf16, ddp_muon, ddp_nesterov, ddp_powersgd, single
from .decent import decent
from .gossip import AdPsgdTrainer, GoSgdTrainer
from .local import co2, diloco, localsgd, localsgd_muon
from .method import Method, Setup

PLAIN = {"second_moment": "own", "nesterov": "off"}  # AdamW as the Trainer makes it


def gosgd(setup: Setup) -> Method:
    """See `GoSgdTrainer`."""
    return Method(GoSgdTrainer, {"clip": "exact", "peers_per_step": 1, **PLAIN})


def adpsgd(setup: Setup) -> Method:
    """See `AdPsgdTrainer`."""
    return Method(AdPsgdTrainer, {"clip": "exact", "peers_per_step": 1, **PLAIN})


def layup(setup: Setup) -> Method:
    """LayUp as it is without any option: layer by layer, merging at a block's boundary and before its forward."""
    return Method(LayupTrainer)


def layup_arrival(setup: Setup) -> Method:
    """LayUp that merges whenever something arrives, as its paper does (arXiv 2410.05985)."""
    return Method(LayupTrainer, {"merge_at": "arrival"})


def layup_straight(setup: Setup) -> Method:
    """LayUp without Nesterov's momentum."""
    return Method(LayupTrainer, {"nesterov": "off"})


def layup_own(setup: Setup) -> Method:
    """LayUp with second moments of each worker's own, as it is where every worker has a host to itself."""
    return Method(LayupTrainer, {"second_moment": "own"})


def layup_plain(setup: Setup) -> Method:
    """LayUp with plain AdamWs, which know nothing of each other's gradients."""
    return Method(LayupTrainer, PLAIN)


def layup_muon(setup: Setup) -> Method:
    """LayUp with Muon on the matrices of layers; AdamW, on all else, is as LayUp has it by default."""
    return Method(LayupTrainer, {"optim": "muon"})


METHODS: dict[str, Callable[[Setup], Method]] = {
    "single": single,
    "ddp": ddp,
    "ddp-nesterov": ddp_nesterov,
    "ddp-muon": ddp_muon,
    "ddp-bf16": ddp_bf16,
    "ddp-powersgd": ddp_powersgd,
    "localsgd": localsgd,
    "localsgd-muon": localsgd_muon,
    "diloco": diloco,
    "co2": co2,
    "decent-dp": decent,
    "gosgd": gosgd,
    "adpsgd": adpsgd,
    "layup": layup,
    "layup-muon": layup_muon,
    "layup-arrival": layup_arrival,
    "layup-straight": layup_straight,
    "layup-own": layup_own,
    "layup-plain": layup_plain,
}


def ring_bytes(reduced: float, workers: int) -> float:
    """Bytes that one worker sends and receives when `reduced` bytes are all-reduced among `workers` in a ring.

    It sends `(M - 1) / M` of them to sum them up and as many to spread the sum, and receives the same (Patarasuk and
    Yuan, 2009); that is what gloo and NCCL do with large buffers, and least of what any all-reduce needs.
    """
    return 4 * (workers - 1) / workers * reduced
