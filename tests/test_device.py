"""The order of what a device does, and how far the processor runs ahead of it."""

import time

import torch
from queues import FakeQueues

from layup_hf.device import HOST, StepsAhead, queues_of


def test_the_processor_is_never_more_than_so_many_steps_ahead():
    queues, left = FakeQueues(), []
    ahead = StepsAhead(queues, most=2)
    for _ in range(6):
        ahead.begin_step()
        queues.compute(lambda: None)
        left.append(queues.left)
    assert left == [1, 2, 3, 3, 3, 3]  # the step that is being queued, and two before it
    assert queues.finished == 0


def test_on_a_cpu_nothing_is_waited_for_and_marks_tell_the_time():
    queues = queues_of(torch.device("cpu"))
    assert queues is HOST
    first = queues.mark()
    time.sleep(0.01)
    second = queues.mark()
    assert first.is_done()
    assert second.seconds_since(first) >= 0.01
    with queues.copying(after=[first]):
        tensor = torch.ones(3)
    assert queues.mark_copies().is_done()
    assert tensor.tolist() == [1, 1, 1]
