"""What it takes one core to write and to read a tensor in few bits, beside rounding it to bf16.

    python -m recipes.measure.coding

Prints nanoseconds of processor time for each number, the least of seven times.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from layup_hf.windows.coders import TorchCoder, make_coder
from layup_hf.windows.coding import Coded, Plan, factors, reach
from layup_hf.windows.layout import BITS

from .common.command import command_line


def main() -> None:
    parser = command_line("recipes.measure.coding", __doc__)
    parser.add_argument("--numel", type=int, default=2**21, help="numbers of the tensor")
    numel = parser.parse_args().numel
    torch.set_num_threads(1)
    device, theirs = torch.device("cpu"), torch.randn(numel)
    mine, into, table = theirs + 1e-3, torch.empty(numel), factors(1)

    def nanoseconds(action: Callable[[], Any]) -> float:
        times = []
        for _ in range(7):
            begin = time.thread_time()
            action()
            times.append(time.thread_time() - begin)
        return 1e9 * min(times) / numel

    print(f"to bf16: {nanoseconds(lambda: theirs.bfloat16()):.2f} ns")
    for (name, bits), coder in itertools.product(BITS.items(), (make_coder(device, 1), TorchCoder(device, 1))):
        plan = Plan.of(numel, bits, 16)
        steps = np.full(plan.parts, 2e-3 / reach(bits), dtype=np.float32)
        coded = Coded(torch.empty(plan.pieces, dtype=torch.int64), torch.empty(plan.word_bytes, dtype=torch.uint8))
        there = nanoseconds(lambda: coder.encode(plan, theirs, steps, table, coded))  # noqa: B023
        back = nanoseconds(lambda: coder.decode(plan, coded, steps, table, mine, into))  # noqa: B023
        print(f"{name}, {type(coder).__name__}: written in {there:.2f} ns, read in {back:.2f} ns")


if __name__ == "__main__":
    main()
