"""Workers speak to each other; then one of them does so as somebody else would."""

from typing import NamedTuple

import torch
from accelerate import PartialState
from worker import leave, write_result

from layup_hf.fleet.data import travels
from layup_hf.fleet.secret import sign
from layup_hf.fleet.talk import MOST_BYTES, Talk, Unproven


@travels
class Said(NamedTuple):
    rank: int
    content: bytes


state = PartialState(cpu=True)
rank, size = state.process_index, state.num_processes
token, group = bytes(32), torch.distributed.group.WORLD
result = {"rank": rank}


def outcome(action):
    try:
        return action()
    except (Unproven, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


talk = Talk(token, b"group", group)
talk.prove()
result["short"] = talk.gather([rank, "ä"])
result["long"] = [(said.rank, len(said.content)) for said in talk.gather(Said(rank, bytes(5000 * rank)))]
result["edges"] = [len(talk.gather(bytes(length))[0]) for length in range(940, 1060)]  # around what travels at first
result["none"] = talk.gather(None)
if rank == 0:
    talk.send({"moments": torch.arange(5.0), "step": 3}, 2)
elif rank == 2:
    received = talk.receive(0, 10_000)
    result["received"] = [received["moments"].tolist(), received["step"]]
talk.wait()
if rank == 0:
    result["too much"] = outcome(lambda: talk.gather(bytes(MOST_BYTES + 1)))
    result["no data"] = outcome(lambda: talk.gather(object()))
result["after refusals"] = talk.gather(rank)

# Rank 1 has another secret, is of another group, or has fallen behind.
for name, other in {
    "secret": Talk(b"x" * 32, b"group", group),
    "group": Talk(token, b"another", group),
}.items():
    mine = other if rank == 1 else Talk(token, b"group", group)
    result[f"another {name}"] = outcome(lambda mine=mine: mine.gather(rank))
    mine = other if rank == 1 else Talk(token, b"group", group)
    result[f"proof of another {name}"] = outcome(mine.prove)
mine = Talk(token, b"group", group)
mine._count = int(rank == 1)
result["replayed"] = outcome(lambda: mine.gather(rank))

# Rank 1 says what it has heard of rank 0, as its own.
heard = [None]
mine = Talk(token, b"group", group)
if rank == 1:
    mine._signed = lambda content, *place: sign(token, *mine._place(0), content) + content
result["as another"] = outcome(lambda: mine.gather("me"))

# Rank 1 sends one worker more than it may.
mine = Talk(token, b"group", group)
if rank == 1:
    torch.distributed.send(torch.tensor([2**40]), 2)
elif rank == 2:
    result["too long"] = outcome(lambda: mine.receive(1, 1000))
write_result(rank, result)
leave()
