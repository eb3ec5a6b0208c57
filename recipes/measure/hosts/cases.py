"""The faults of `faults.py`: what is done to which hosts, and what ends it."""

import signal
from collections.abc import Callable
from dataclasses import dataclass

from .run import HostsRun


@dataclass(frozen=True)
class Case:
    """A fault.

    Attributes:
        title: For people.
        break_: Does it, given the run and the hosts that it is to happen to.
        mend: Ends it, `FAULT_SECONDS` later; None if it does not end.
        victims: How many hosts it happens to.
        lost: Whether these hosts' workers are expected to be gone.
        first: Whether it happens to rank 0; otherwise to others at random.
        returns: Whether these hosts' launches are repeated.
    """

    title: str
    break_: Callable[[HostsRun, list[int]], None]
    mend: Callable[[HostsRun, list[int]], None] | None = None
    victims: int = 1
    lost: bool = False
    first: bool = False
    returns: bool = False


def _kill(run: HostsRun, victims: list[int]) -> None:
    for victim in victims:
        run.signal(run.lab.hosts[victim], signal.SIGKILL)


def _lose_machine(run: HostsRun, victims: list[int]) -> None:
    host = run.lab.hosts[victims[0]]
    host.cut()
    run.end_processes(host)


def _freeze(run: HostsRun, victims: list[int]) -> None:
    run.signal(run.lab.hosts[victims[0]], signal.SIGSTOP)


def _thaw(run: HostsRun, victims: list[int]) -> None:
    run.signal(run.lab.hosts[victims[0]], signal.SIGCONT)


def _cut(run: HostsRun, victims: list[int]) -> None:
    run.lab.hosts[victims[0]].cut()


def _mend(run: HostsRun, victims: list[int]) -> None:
    run.lab.hosts[victims[0]].mend()


def _lose(run: HostsRun, victims: list[int]) -> None:
    for host in run.lab.hosts:
        host.set_loss(2)


def _slow(run: HostsRun, victims: list[int]) -> None:
    run.lab.hosts[victims[0]].set_rate("1mbit")


def _kill_and_restart(run: HostsRun, victims: list[int]) -> None:
    _kill(run, victims)
    run.launchers[victims[0]].wait(60)
    run.restart(run.lab.hosts[victims[0]])


def _nothing(run: HostsRun, victims: list[int]) -> None:
    pass


CASES = {
    "none": Case("nothing", _nothing),
    "kill": Case("SIGKILL of one of 4", _kill, lost=True),
    "kill-two": Case("SIGKILL of two of 4", _kill, victims=2, lost=True),
    "kill-first": Case("SIGKILL of rank 0", _kill, lost=True, first=True),
    "freeze": Case("SIGSTOP for 30 s", _freeze, _thaw),
    "cut": Case("cable pulled for 30 s", _cut, _mend),
    "loss": Case("2 % of all packets lost, to the end", _lose),
    "slow": Case("one link drops to 1 Mbit/s, to the end", _slow),
    "machine": Case("a whole machine lost", _lose_machine, lost=True),
    "rejoin": Case("SIGKILL of one, its launch repeated", _kill_and_restart, returns=True),
}
