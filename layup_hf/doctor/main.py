"""Looks at everything, in order, and says what it has found."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ..fleet.started import launches
from . import machine
from .attempt import NoAnswer, look, message_of, within
from .finding import Finding
from .libraries import check_alike, check_libraries
from .report import has_failed, report

if TYPE_CHECKING:
    import torch

    from .meeting import Meeting
    from .together import Card

Checks = Callable[[], list[Finding]]

_SECONDS = 60.0
_OPEN_PORTS = "all TCP ports must be open between the machines: look for a firewall, and at `--network_interface`"
_OF_GPUS = "on GPUs, all workers of a machine must see all of its GPUs, as one user, in one container"


def run(check_seams: Callable[[], None], working: Mapping[str, str]) -> NoReturn:
    """Examine, report, and end this process: with 0, or with 1 if training would not work.

    Args:
        check_seams: Raises an `ImportError` with the remedy if a library lacks something that is used.
        working: The versions that work, by library.
    """
    options = _options(sys.argv[1:])
    faulthandler.dump_traceback_later(60 + 10 * options.timeout, exit=True)  # whatever hangs, even in C
    code = Examination(options, check_seams, working).run()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what has been left behind is not waited for


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m layup_hf",
        description="Look at the place where a run is to be: with one process, or with all workers, as in "
        "`accelerate launch --multi_gpu --num_processes 4 -m layup_hf`.",
    )
    parser.add_argument("--output_dir", type=Path, default=Path(), help="where the run is to write (default: here)")
    parser.add_argument("--network_interface", help="the one network interface to use, as in LayupConfig")
    parser.add_argument("--timeout", type=float, default=_SECONDS, help="seconds that a worker has for an answer")
    return parser.parse_args(arguments)


class Examination:
    """One worker's part in a look.

    Args:
        options: Of the command line.
        check_seams: Raises an `ImportError` with the remedy if a library lacks something that is used.
        working: The versions that work, by library.
    """

    def __init__(
        self, options: argparse.Namespace, check_seams: Callable[[], None], working: Mapping[str, str]
    ) -> None:
        self._options, self._check_seams, self._working = options, check_seams, working
        self._seconds: float = options.timeout
        self._rank, self._world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self._local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self._local_size = int(os.environ.get("LOCAL_WORLD_SIZE", self._world_size))
        self._is_ended = threading.Event()
        self._findings: list[Finding] = []
        self._meeting: Meeting | None = None
        self._cards: list[Card] = []

    def run(self) -> int:
        """The exit code."""
        if self._world_size > 1:
            # A launcher that ends its workers, as one has died, still gets a report.
            signal.signal(signal.SIGTERM, lambda *_: self._is_ended.set())
            self._look("store", self._meet, 2 * self._seconds, remedy=_OPEN_PORTS)
        self._look("versions", lambda: check_libraries(self._check_seams, self._working))
        if self._cards:
            self._findings += check_alike([card.versions for card in self._cards])
        self._look_at_the_machine()
        self._look_at_the_network()
        return self._conclude()

    def _look(self, name: str, check: Checks, seconds: float | None = None, remedy: str = "") -> None:
        self._findings += look(name, check, seconds or self._seconds / 2, remedy)

    # ---- One after the other ----

    def _meet(self) -> list[Finding]:
        """Find the other workers."""
        from .meeting import Meeting, connect
        from .together import Card, check_store

        meeting = self._meeting = Meeting(connect(), self._rank, self._world_size, self._seconds, self._is_ended)
        findings = check_store(connect())
        with contextlib.suppress(NoAnswer):  # said at the end
            self._cards = meeting.gathering("cards")(Card.mine())
        return findings

    def _look_at_the_machine(self) -> None:
        hosts = [card.host for card in self._cards]
        here = hosts.count(hosts[self._rank]) if hosts else self._local_size
        options = self._options
        self._look("devices", lambda: _devices(here, self._world_size == 1))
        self._look("memory", lambda: machine.check_memory(here))
        self._look("shm", machine.check_shared_memory_folder)
        self._look("files", lambda: machine.check_files(self._world_size))
        remedy = "look at this file system, which does not answer, or choose another `output_dir`"
        self._look("disk", lambda: machine.check_disk(options.output_dir), remedy=remedy)

    def _look_at_the_network(self) -> None:
        self._look("interface", self._interface)
        self._look("nixl", self._nixl, remedy="look at the installation of NIXL, and at UCX_TLS and UCX_NET_DEVICES")
        if self._meeting is None or not self._cards:
            return
        self._look("secret", self._secret)
        limit = 2 * self._seconds
        if len({card.host for card in self._cards}) > 1:
            self._look("network", self._links, limit, remedy=_OPEN_PORTS)
            self._look("disk", self._shared_disk, limit)
        self._look("group", self._collective, limit, remedy=_OPEN_PORTS)
        self._look("exchange", self._exchange, limit, remedy=_OF_GPUS if self._has_gpu() else "")

    def _interface(self) -> list[Finding]:
        from .together import check_interface

        return check_interface(self._options.network_interface, self._cards)

    def _nixl(self) -> list[Finding]:
        from .together import Card, check_nixl

        return check_nixl(self._cards or [Card.mine()], self._device())

    def _secret(self) -> list[Finding]:
        from .together import check_secret

        return check_secret(self._cards)

    def _links(self) -> list[Finding]:
        from .together import check_links

        gather, interface = self._present.gathering("network"), self._options.network_interface
        return check_links(gather, self._cards, self._rank, interface, self._token(), self._seconds / 2)

    def _shared_disk(self) -> list[Finding]:
        from .together import check_shared_disk

        return check_shared_disk(self._present.gathering("disk"), self._rank, self._options.output_dir)

    def _collective(self) -> list[Finding]:
        from .exchange import try_collective
        from .meeting import connect

        gather = self._present.gathering("group")
        return try_collective(gather, connect, self._rank, self._device(), self._seconds / 2)

    def _exchange(self) -> list[Finding]:
        from .exchange import try_exchange

        gather = self._present.gathering("exchange")
        return try_exchange(gather, self._rank, self._device(), self._token(), self._seconds / 2)

    @property
    def _present(self) -> Meeting:
        assert self._meeting is not None
        return self._meeting

    def _token(self) -> bytes:
        from .together import token_of

        return token_of(self._cards)

    def _device(self) -> torch.device:
        from .devices import device_of

        return device_of(self._local_rank)

    def _has_gpu(self) -> bool:
        try:
            return self._device().type != "cpu"
        except ImportError:
            return False

    # ---- The end ----

    def _conclude(self) -> int:
        """Report, or let another worker do so; the exit code."""
        meeting = self._meeting
        if meeting is None:
            return self._print({self._rank: self._findings})
        try:
            outcome = within(4 * self._seconds, lambda: meeting.conclude(self._findings))
        except Exception as error:  # the store has gone: everybody reports alone
            text = f"the store of the launch does not answer any more: {message_of(error)}"
            remedy = "has another worker died, or rank 0's machine? Look at its log"
            alone = Finding("workers", f"rank {self._rank} reports alone, as {text}", "error", remedy)
            return self._print({self._rank: [alone, *self._findings]})
        if not outcome.is_mine:
            return int(outcome.has_failed)
        findings = dict(outcome.findings)
        findings.setdefault(self._rank, self._findings)
        absences = [self._absence(rank) for rank in range(self._world_size) if rank not in findings]
        if outcome.late:
            text = f"{meeting.missed()}: what takes all workers has not been looked at"
            absences.append(Finding("workers", text, "error", "give it more time: a larger `--timeout`"))
        findings = {rank: [*absences, *theirs] for rank, theirs in findings.items()}
        code = self._print(findings)
        try:
            within(self._seconds, lambda: meeting.tell(code != 0, len(findings) - 1))
        except Exception:
            return 1  # nobody is left to be told
        return code

    def _absence(self, rank: int) -> Finding:
        """What can be said of a worker that has not answered."""
        text, remedy = f"rank {rank} does not answer", "look at its log; `py-spy dump --pid` says where it hangs"
        if self._cards:
            card, mine = self._cards[rank], self._cards[self._rank]
            text += f" (process {card.process} on {card.node})"
            state = _state_of(card.process) if card.host == mine.host else None
            if state == "gone":
                text, remedy = f"{text}: it has died", "look at its log, and for the out-of-memory killer (`dmesg`)"
            elif state == "stopped":
                text, remedy = f"{text}: it is stopped", f"`kill -CONT {card.process}`"
        return Finding("workers", text, "error", remedy)

    def _print(self, findings: Mapping[int, Sequence[Finding]]) -> int:
        print(report(self._headline(), findings, self._world_size), flush=True)
        return int(has_failed(findings))

    def _headline(self) -> str:
        if self._world_size == 1:
            return (
                "LayUp, looked at by one process (for several, `accelerate launch --multi_gpu --num_processes N "
                "-m layup_hf`):"
            )
        hosts = len({card.host for card in self._cards})
        places = f" on {hosts} host(s)" if hosts else ""
        return f"LayUp, looked at by {self._world_size} workers{places}, started by {launches()} launch(es):"


def _devices(workers: int, is_alone: bool) -> list[Finding]:
    from .devices import check_devices

    return check_devices(workers, is_alone)


def _state_of(process: int) -> str | None:
    """Whether a process of this machine is "gone" or "stopped"."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return "gone"
    state = stat.rpartition(")")[2].split()[0]
    return {"T": "stopped", "t": "stopped", "Z": "gone", "X": "gone"}.get(state)
