"""A real UCX client that nobody has asked for, and somebody whom it talks to. Input begins with an order in JSON.

`listen`: has an agent as a worker has one, its gate opened to the addresses that the order names, and prints where it
listens and where some memory is that it has told nobody of; prints what is in there when a line comes.
`write`: knows the host, its port and that place alone, and writes there.
`send`: connects to an agent whose address it has learnt, under a name of its choice, and sends messages.
"""

import json
import os
import sys
import time

import torch

from layup_hf.windows.transport import Transport
from recipes.measure.hosts.outsider import write_to

CPU = torch.device("cpu")
SIZE = 64


def say(**what):
    print(json.dumps(what), flush=True)


def until(condition, transport, seconds):
    """Whether it comes true within so many seconds, while the transport is moved forward."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        transport.receive()
        time.sleep(0.001)
    return condition()


def listen(admits):
    transport = Transport("worker", CPU)
    transport.admit(admits)
    private = torch.zeros(SIZE, dtype=torch.uint8)
    say(port=transport.ports[0], place=private.data_ptr())
    os.set_blocking(0, False)
    until(lambda: sys.stdin.readline() or None, transport, 280)
    say(private=int(private.sum()))


def write(to, port, place):
    transport = Transport("stranger", CPU)
    say(begins=True)
    say(written=until(write_to(transport, to, port, place), transport, 20))


def send(address, name, messages, times):
    transport = Transport(name, CPU)
    peer = transport.connect(bytes.fromhex(address))
    for number in range(times):
        transport.send(peer, bytes.fromhex(messages[number % len(messages)]))
        transport.receive()
    until(lambda: False, transport, 1)
    say(sent=times)


if __name__ == "__main__":
    order = json.loads(sys.stdin.readline())
    {"listen": listen, "write": write, "send": send}[order.pop("do")](**order)
    sys.stdout.flush()
    os._exit(0)
