"""How often the courier looks."""

import pytest

from layup_hf.windows.pace import Pace


class Machine:
    """Time passes as the pace says, and every round takes some of the processor, while the worker uses `cores`."""

    def __init__(self, budget, cost, cores=1.0):
        self.now = self.used = 0.0
        self.cost = cost
        self.pace = Pace(budget, lambda: self.now, lambda: self.used, lambda: cores * self.now)

    def round(self, moved=True, expects=True):
        self.now += self.cost
        self.used += self.cost
        delay = self.pace.delay(moved, expects)
        self.now += delay
        return delay


@pytest.mark.parametrize("cores", [0.5, 1, 8])
@pytest.mark.parametrize("cost", [2e-5, 2e-4, 5e-3])
def test_the_budget_is_kept_whatever_a_round_costs(cost, cores):
    machine = Machine(0.03, cost * cores, cores)
    while machine.now < 60:
        machine.round()
    assert machine.used / machine.now < 0.033 * cores


def test_where_training_waits_there_is_time_for_the_exchange():
    machine = Machine(0.03, 1e-3, cores=0.0)
    while machine.now < 60:
        machine.round()
    assert machine.used / machine.now == pytest.approx(0.03 / 2, rel=0.1)


def test_without_a_budget_it_looks_every_millisecond_while_things_move():
    machine = Machine(None, 5e-3)
    assert [machine.round() for _ in range(50)] == [0.001] * 50
    assert machine.pace.may_start


def test_it_looks_less_often_when_nothing_is():
    machine = Machine(0.03, 1e-5)
    delays = [machine.round(moved=False) for _ in range(20)]
    assert delays[0] == pytest.approx(0.0011)
    assert delays == sorted(delays)
    assert delays[-1] == 0.005
    assert [machine.round(moved=False, expects=False) for _ in range(20)][-1] == 0.01
    assert machine.round(moved=True) == 0.001


def test_the_more_a_look_has_taken_the_longer_is_the_sleep():
    for cost in (1e-4, 1e-3, 5e-3):
        machine = Machine(0.03, cost)
        assert machine.round() == pytest.approx(cost * (1 / 0.03 - 1))


def test_looking_in_vain_leaves_time_for_starting_something():
    machine = Machine(0.03, 5e-5)
    for _ in range(5000):
        machine.round(moved=False)
    assert machine.pace.may_start


def test_time_that_passes_before_the_next_look_counts():
    machine = Machine(0.03, 0.1)
    machine.round()
    machine.now += 10
    assert machine.pace.may_start


def test_what_is_overdrawn_is_made_up_for_before_more_is_started():
    machine = Machine(0.03, 0.1)
    machine.round()
    machine.round()
    assert not machine.pace.may_start
    assert machine.round() == 0.25  # at the most
    machine.cost = 0
    while not machine.pace.may_start:
        machine.round()
    assert machine.now == pytest.approx(0.3 / 0.03, rel=0.1)


def test_what_is_used_for_a_lost_peer_is_not_taken_from_the_others():
    machine = Machine(0.03, 1e-5)
    for _ in range(20):
        with machine.pace.uncounted():
            machine.now += 0.2
            machine.used += 0.2
        machine.round()
        assert machine.pace.may_start
