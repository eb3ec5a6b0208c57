"""What a step costs on GPUs: bytes, passes over memory and launches, and what they make of the speed. A prediction.

    python -m recipes.measure.cost              the table of docs/gpus.md
    python -m recipes.measure.cost --parts      one model, device and link, part by part

Nothing here was measured on a GPU. What a part moves is counted: the tests count what the same operations read and
write. How long that takes follows from the devices' data sheets and two assumptions: 80 % of the rates of memory and
links are reached, and training computes at 40 % of the tensor cores' rate.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from layup_hf.gossip.budget import LEAST, SHARE
from layup_hf.gossip.topology import AUTO_PEERS

REACHED = 0.8
"""Of the nominal rate of memory and links."""

USED = 0.4
"""Of the nominal rate of the tensor cores: what well-tuned training of dense transformers reaches."""

LAUNCH = 5e-6
"""Seconds of the processor for one kernel in eager PyTorch."""

BACKWARD = 2 / 3
"""Of the time of forward and backward, in which DDP's all-reduce runs beside."""


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        name: Of the product.
        flops: Dense bf16 with fp32 accumulation, per second.
        memory: Bytes per second.
        source: Where the figures are from.
    """

    name: str
    flops: float
    memory: float
    source: str


@dataclass(frozen=True)
class Link:
    """What is between two workers.

    Attributes:
        name: For people.
        rate: Bytes per second in one direction. A ring of DDP crosses it once, however many share it.
        workers: Workers that share it, each for the peers that it reads: those of a host share its network.
    """

    name: str
    rate: float
    workers: int = 1


@dataclass(frozen=True)
class Model:
    """What is trained.

    Attributes:
        name: For people.
        parameters: How many.
        blocks: In how many blocks.
        tensors: Parameters of a block, each a tensor.
        tokens: In a worker's step.
        item: Bytes of a parameter, and of its gradient and moments.
    """

    name: str
    parameters: float
    blocks: int
    tensors: int
    tokens: int
    item: int = 4

    @property
    def num_bytes(self) -> float:
        """Of the parameters."""
        return self.parameters * self.item


H100 = Device("H100 SXM", 989e12, 3.35e12, "NVIDIA H100 data sheet, 2430615")
A100 = Device("A100 80GB SXM", 312e12, 2.039e12, "NVIDIA A100 data sheet, 1758950")
RTX_4090 = Device("RTX 4090", 165e12, 1.008e12, "NVIDIA Ada GPU architecture white paper 2.1, appendix A")
DEVICES = (H100, A100, RTX_4090)

NVLINK_4 = Link("NVLink 4", 450e9)
NVLINK_3 = Link("NVLink 3", 300e9)
PCIE_4 = Link("PCIe 4 x16", 32e9)
ETHERNET_100 = Link("100 Gbit/s Ethernet a host", 12.5e9, 8)
INFINIBAND_400 = Link("400 Gbit/s InfiniBand a GPU", 8 * 50e9, 8)

GPT2 = Model("GPT-2 124M", 124e6, 14, 12, 8192)
GPT2_XL = Model("GPT-2 1.5B", 1.56e9, 50, 12, 8192)
GPT2_XL_LONG = Model("GPT-2 1.5B", 1.56e9, 50, 12, 32768)
LLAMA = Model("Llama 8B, bf16", 8.03e9, 34, 9, 8192, 2)
MODELS = (GPT2, GPT2_XL, GPT2_XL_LONG, LLAMA)


@dataclass(frozen=True)
class Passes:
    """How often something goes over as many bytes as the parameters have, and kernels that it queues for a block.

    Attributes:
        computing: Passes in the queue that computes, where training waits for them.
        copying: Passes beside it.
        launches: For each block.
    """

    computing: float
    copying: float = 0
    launches: int = 1


NORM = Passes(1, launches=3)
"""Reads the gradient."""
CLIP = Passes(2)
"""Reads and writes the gradient."""
ADAMW = Passes(7)
"""Fused: reads parameter, gradient and two moments, writes all but the gradient."""
AHEAD = Passes(3)
"""Nesterov's momentum by AdamW with another beta1: reads first moment and gradient, writes the first moment."""
MERGE = Passes(3)
"""One peer: reads two blocks, writes one; in bf16 by one kernel, as in fp32."""
COPY = Passes(0, copying=2)
"""Of a peer's block into a slot: it is read on the peer, and written here."""


@dataclass(frozen=True)
class Cost:
    """Of one step of one worker, in seconds.

    Attributes:
        compute: Forward and backward.
        stock: The optimizer's step of the Trainer.
        ours: Of LayUp.
        peers: Peers that the budget and the link allow to read per block and step.
        merge: Of these.
        link: Seconds in which the link is busy with them, beside the computation.
        all_reduce: DDP's, of which what is not hidden by backward holds training up.
        host: Of the processor, to queue what the exchange and the optimizer do.
    """

    compute: float
    stock: float
    ours: float
    peers: float
    merge: float
    link: float
    all_reduce: float
    host: float

    @property
    def layup(self) -> float:
        """Speed, in parts of that of no communication."""
        return (self.compute + self.stock) / (self.compute + self.ours + self.merge)

    @property
    def ddp(self) -> float:
        """Speed, in parts of that of no communication."""
        exposed = max(0.0, self.all_reduce - BACKWARD * self.compute)
        return (self.compute + self.stock) / (self.compute + self.stock + exposed)


def cost(model: Model, device: Device, link: Link, workers: int, one_pass: bool = False) -> Cost:
    """Predict a step.

    Args:
        model: What is trained.
        device: On what.
        link: Between the workers; the slowest, of several kinds.
        workers: How many.
        one_pass: Whether clipping and looking ahead are part of the optimizer's one pass.
    """
    passes = model.num_bytes / (REACHED * device.memory)
    compute = 6 * model.parameters * model.tokens / (USED * device.flops)
    stock = passes * (NORM.computing + CLIP.computing + ADAMW.computing)
    parts = [NORM, ADAMW] if one_pass else [NORM, CLIP, ADAMW, AHEAD]
    ours = passes * sum(part.computing for part in parts)
    if workers == 1:
        return Cost(compute, stock, stock, 0, 0, 0, 0, 0)
    merge = passes * MERGE.computing
    step = compute + ours
    most = min(AUTO_PEERS, workers - 1)
    allowed = min(most, max(LEAST, SHARE * step / merge))
    on_the_way = model.num_bytes * link.workers / (REACHED * link.rate)
    peers = min(allowed, step / on_the_way)
    launches = sum(part.launches for part in parts) + MERGE.launches * peers + 1
    return Cost(
        compute=compute,
        stock=stock,
        ours=ours,
        peers=peers,
        merge=peers * merge,
        link=peers * on_the_way,
        all_reduce=2 * (workers - 1) / workers * model.num_bytes / (REACHED * link.rate),
        host=launches * model.blocks * LAUNCH,
    )


CASES = (
    (H100, 1, NVLINK_4),
    (H100, 8, NVLINK_4),
    (H100, 64, INFINIBAND_400),
    (A100, 8, NVLINK_3),
    (A100, 8, PCIE_4),
    (A100, 64, ETHERNET_100),
    (RTX_4090, 8, PCIE_4),
)
"""Of the table."""


def table() -> str:
    """Markdown."""
    rows = [
        "| model, tokens a step | GPUs, link | peers read | LayUp | in one pass | DDP |",
        "| -- | -- | --: | --: | --: | --: |",
    ]
    for model in MODELS:
        for device, workers, link in CASES:
            now, then = cost(model, device, link, workers), cost(model, device, link, workers, one_pass=True)
            rows.append(
                f"| {model.name}, {model.tokens // 1024}k | {workers} {device.name}"
                f"{f', {link.name}' if workers > 1 else ''} | {now.peers:.2f} | "
                f"{now.layup:.2f} | {then.layup:.2f} | {now.ddp:.2f} |"
            )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser("recipes.measure.cost", description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", action="store_true", help="each case part by part, in milliseconds")
    options = parser.parse_args()
    if not options.parts:
        print(table())
        return
    for model in MODELS:
        for device, workers, link in CASES:
            found = cost(model, device, link, workers)
            parts = {name: round(1000 * value, 2) for name, value in vars(found).items() if name != "peers"}
            print(f"{model.name}, {model.tokens} tokens, {workers} {device.name}, {link.name}: {parts}")


if __name__ == "__main__":
    main()
