"""Real workers carry out a schedule, one operation at a time, over real windows. Writes every worker's final values."""

import torch
from accelerate import PartialState
from fleet import FirstPeers, apply_operation
from reference import random_schedule
from torch import nn
from worker import leave, write_result

from layup_hf.blocks import split_into_blocks
from layup_hf.fleet.talk import Talk
from layup_hf.gossip.consensus import reach_consensus
from layup_hf.gossip.engine import GossipEngine
from layup_hf.windows import SharedWindows

state = PartialState(cpu=True)
rank, world_size = state.process_index, state.num_processes
talk = Talk(bytes(32), b"schedule", torch.distributed.group.WORLD)

torch.manual_seed(rank)
model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(3)))
blocks = split_into_blocks(model)
windows = SharedWindows.open(blocks, rank, talk.gather)
sampler = FirstPeers(rank, world_size)
engine = GossipEngine(blocks, windows, sampler)

for name, worker, block, *rest in random_schedule(world_size, len(blocks), 120, seed=7):
    if worker == rank:
        apply_operation(engine, sampler, blocks[block], name, *rest)
    state.wait_for_everyone()

result = {"rank": rank, "values": [[t.flatten().tolist() for t in block.tensors] for block in blocks]}
result["masses"] = [[int(units) for units in row] for row in windows.ledger.masses()]
state.wait_for_everyone()
consensus = reach_consensus(blocks, windows.ledger, talk)
state.wait_for_everyone()  # until all have settled
result["consensus"] = [[t.flatten().tolist() for t in block.tensors] for block in blocks]
result["distance"] = consensus.distance
result["mass"] = consensus.mass
result["masses_after"] = [[int(units) for units in row] for row in windows.ledger.masses()]
state.wait_for_everyone()
windows.close()
write_result(rank, result)
leave()
