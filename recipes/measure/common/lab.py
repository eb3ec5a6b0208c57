"""Several hosts on one machine: what training across machines is tested and measured on.

    with Lab(hosts=2, rate="1gbit") as lab:
        process = lab.hosts[0].popen(["python", "script.py"])

A host is a network namespace with one interface, `e0`, that a cable (a veth pair) joins to a switch (a bridge in a
namespace of its own). Both directions of every cable are limited by a token bucket. So what the hosts send each other
crosses a kernel's network stack and a link with the given rate, and `Host.bytes_received` says how much did. Hosts
share the machine's cores, memory and files, and its clock; a link has no delay but that of its queue.

Needs root, and `ip` and `tc` (iproute2); losing packets needs `nft` (nftables), too. Several labs can exist at once:
nothing in the machine's own network is touched. Whatever ends the process that made a lab, SIGKILL included, ends the
lab and every process in its hosts: that is done by a process of its own, which waits for its maker's end.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .launching import launcher, path_to_recipes

SUBNET = "10.199.0"  # the same in every lab: the hosts of different labs cannot see each other
INTERFACE = "e0"
COUNTERS = Path("/sys/class/net", INTERFACE, "statistics")  # of the present host; what `ip -s link` shows
UNITS = {"bit": 1, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
QUEUE_SECONDS = 0.1  # what waits longer for the link is dropped, as by a switch with a small buffer

# Waits until nobody has the pipe open: the lab's process has closed it, or has died, and what it was starting is in its
# host. Then ends what runs in the namespaces, and them.
WARDEN = """
cat >/dev/null
for name in "$@"; do
    for attempt in 1 2 3 4 5 6 7 8 9 10; do
        pids=$(ip netns pids "$name" 2>/dev/null)
        [ -z "$pids" ] && break
        kill -9 $pids 2>/dev/null
        sleep 0.1
    done
    ip netns del "$name" 2>/dev/null
    rm -rf "/etc/netns/$name"
done
"""

# Names the host, and lets go of the warden's pipe: from here on the process is seen in its namespace.
ENTER = 'echo "$0" >/proc/sys/kernel/hostname; pipe=$1; shift; exec {pipe}>&-; exec "$@"'


class LabError(RuntimeError):
    """The machine cannot have a lab, or a command of the lab failed."""


def missing() -> str | None:
    """Why there can be no lab here, and what to do; None if there can."""
    if os.geteuid() != 0:
        return "A lab needs root, for network namespaces: run this as root (in a container: --cap-add ALL)."
    for command, package in {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "bash": "bash"}.items():
        if shutil.which(command) is None:
            return f"A lab needs the command `{command}`: apt-get install {package}"
    probe = subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True, text=True, check=False)
    return f"This machine allows no network namespaces: {probe.stderr.strip()}" if probe.returncode else None


def bits_per_second(rate: str) -> float:
    """The number in a rate such as "100mbit".

    Raises:
        ValueError: It is not of this form.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(bit|kbit|mbit|gbit)", rate)
    if match is None:
        raise ValueError(f"{rate!r} is no rate: write it like '100mbit' ({', '.join(UNITS)}).")
    return float(match[1]) * UNITS[match[2]]


def run(*command: str, stdin: str | None = None) -> str:
    """What the command prints.

    Raises:
        LabError: It failed; with what it said.
    """
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


class Host:
    """One machine of a lab.

    Attributes:
        index: Its number, from 0.
        name: Of its network namespace.
        address: Its IPv4 address on `e0`.
    """

    def __init__(self, lab: Lab, index: int) -> None:
        self.lab, self.index = lab, index
        self.name, self.address = f"{lab.name}-{index}", f"{SUBNET}.{index + 1}"
        self._port = f"p{index}"  # its end of the cable in the switch
        self._loses = False

    def _connect(self) -> None:
        cable = ["link", "add", self._port, "type", "veth", "peer", "name", INTERFACE, "netns", self.name]
        run("ip", "-n", self.lab.switch, *cable)
        run("ip", "-n", self.lab.switch, "link", "set", self._port, "master", "bridge0", "up")
        run("ip", "-n", self.name, "addr", "add", f"{self.address}/24", "dev", INTERFACE)
        for interface in ("lo", INTERFACE):
            run("ip", "-n", self.name, "link", "set", interface, "up")

    def popen(self, command: Sequence[str], env: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen:
        """Start a process in this host, in a session of its own; it ends with the lab.

        Args:
            command: Program and arguments.
            env: Added to this process's environment, and to what keeps libraries on the link: `e0` for gloo and UCX,
                and TCP for UCX, which would find that all hosts have one kernel and go round the link through memory;
                LAB_ADDRESS is the host's.
            options: As of `subprocess.Popen`.
        """
        environment = {
            **os.environ,
            **path_to_recipes(),
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "UCX_NET_DEVICES": INTERFACE,
            "UCX_TLS": "tcp",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",  # there is no way out of the lab
            "LAB_ADDRESS": self.address,
            **(env or {}),
        }
        pipe = self.lab._warden.stdin.fileno()
        entering = ["unshare", "--uts", "bash", "-c", ENTER, self.name, str(pipe)]
        full = ["ip", "netns", "exec", self.name, *entering, *command]
        return subprocess.Popen(full, env=environment, start_new_session=True, pass_fds=[pipe], **options)

    def pids(self) -> list[int]:
        """Every process in this host."""
        return [int(pid) for pid in run("ip", "netns", "pids", self.name).split()]

    def end_processes(self, but: int | None = None) -> None:
        """Kill every process in this host, but one, until there is none."""
        while others := [pid for pid in self.pids() if pid != but]:
            for pid in others:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def cut(self) -> None:
        """Pull the cable: nothing comes in or out, and nobody is told."""
        run("ip", "-n", self.lab.switch, "link", "set", self._port, "down")

    def mend(self) -> None:
        """Put the cable back in."""
        run("ip", "-n", self.lab.switch, "link", "set", self._port, "up")

    def set_rate(self, rate: str) -> None:
        """Limit both directions of this host's cable, to "1mbit" say."""
        bits = bits_per_second(rate)
        # A bucket of a millisecond, and of the largest packet (64 kB) that the kernel hands on whole: to cut that up
        # here would take the processor long; on a machine the network card does it.
        burst = int(max(68 * 1024, bits / 8 / 1000))
        limit = int(burst + bits / 8 * QUEUE_SECONDS)
        shape = ["root", "tbf", "rate", f"{bits:.0f}bit", "burst", f"{burst}b", "limit", f"{limit}b"]
        for namespace, device in ((self.name, INTERFACE), (self.lab.switch, self._port)):
            run("tc", "-n", namespace, "qdisc", "replace", "dev", device, *shape)

    def set_loss(self, percent: float) -> None:
        """Drop this share of the packets that this host receives, at random; 0 ends it."""
        if not percent and not self._loses:
            return
        if shutil.which("nft") is None:
            raise LabError("Losing packets needs the command `nft`: apt-get install nftables")
        # Packets as on a wire: a loss of the 64 kB that the kernel hands on in one piece would be another thing.
        for host in self.lab.hosts:
            run("ip", "-n", host.name, "link", "set", INTERFACE, "gso_max_segs", "1" if percent else "65535")
        rules = "table ip lab\ndelete table ip lab\n"
        if percent:
            rules += (
                "add table ip lab\n"
                "add chain ip lab input { type filter hook input priority 0; }\n"
                f"add rule ip lab input iifname {INTERFACE} numgen random mod 10000 < {round(percent * 100)} drop\n"
            )
        run("ip", "netns", "exec", self.name, "nft", "-f", "-", stdin=rules)
        self._loses = bool(percent)

    def bytes_received(self) -> int:
        """Bytes that have come in through the cable since the lab began, headers included."""
        return self._statistics()["rx"]["bytes"]

    def bytes_sent(self) -> int:
        """Bytes that have gone out through the cable since the lab began, headers included."""
        return self._statistics()["tx"]["bytes"]

    def _statistics(self) -> dict[str, Any]:
        return json.loads(run("ip", "-n", self.name, "-s", "-j", "link", "show", INTERFACE))[0]["stats64"]


class Lab:
    """Hosts joined by a switch, from `__enter__` to `__exit__`.

    Args:
        hosts: How many.
        rate: Of every cable, in each direction; None for as fast as it goes.
        outsiders: Further machines on the same switch, which take no part in what is launched.

    Attributes:
        name: Random; the namespaces' names begin with it.
        hosts: The hosts.
        outsiders: The others.

    Raises:
        LabError: On entering, if there can be no lab here; says what to do.
    """

    def __init__(self, hosts: int, rate: str | None = None, outsiders: int = 0) -> None:
        self.name = f"lab{secrets.token_hex(3)}"
        self.switch = f"{self.name}-sw"
        self.hosts = [Host(self, index) for index in range(hosts)]
        self.outsiders = [Host(self, index) for index in range(hosts, hosts + outsiders)]
        self._rate = rate

    def __enter__(self) -> Lab:
        reason = missing()
        if reason:
            raise LabError(reason)
        names = [*(host.name for host in (*self.hosts, *self.outsiders)), self.switch]
        # Its standard output is nobody's, so that a pipe at the lab's own is not held open by it.
        self._warden = subprocess.Popen(
            ["sh", "-c", WARDEN, "sh", *names],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            for name in names:
                run("ip", "netns", "add", name)
            self._name_hosts()
            run("ip", "-n", self.switch, "link", "add", "name", "bridge0", "type", "bridge", "stp_state", "0")
            run("ip", "-n", self.switch, "link", "set", "bridge0", "up")
            for host in (*self.hosts, *self.outsiders):
                host._connect()
            if self._rate:
                self.set_rate(self._rate)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process in the hosts, and the hosts."""
        self._warden.stdin.close()
        self._warden.wait()

    def set_rate(self, rate: str) -> None:
        """Limit both directions of all cables."""
        for host in (*self.hosts, *self.outsiders):
            host.set_rate(rate)

    def _name_hosts(self) -> None:
        """Let hosts find each other by name: `ip netns exec` puts these files in the place of /etc/hosts."""
        everybody = (*self.hosts, *self.outsiders)
        lines = ["127.0.0.1 localhost", *(f"{host.address} {host.name}" for host in everybody)]
        for host in everybody:
            folder = f"/etc/netns/{host.name}"
            os.makedirs(folder)
            with open(f"{folder}/hosts", "w") as file:
                file.write("\n".join(lines) + "\n")

    def launch(
        self,
        program: str,
        arguments: Sequence[str],
        hosts: Sequence[Host] | None = None,
        port: int = 29500,
        **options: Any,
    ) -> list[subprocess.Popen]:
        """Start one worker on each host, as is done on machines: one `accelerate launch` on each.

        Args:
            program: Module to launch, by its full name.
            arguments: For it. "{host}" in them becomes the host's number.
            hosts: Where; all by default. The others are expected to be started by themselves.
            port: Of rank 0's store.
            options: As of `Host.popen`.
        """
        count, started = len(self.hosts), []
        for host in self.hosts if hosts is None else hosts:
            # Without a GPU `--multi_gpu` still means several processes; with `--cpu` accelerate would want MPI.
            of_all = ["--multi_gpu", "--same_network", f"--num_machines={count}", f"--num_processes={count}"]
            store = [f"--main_process_ip={self.hosts[0].address}", f"--main_process_port={port}"]
            command = launcher(program, *of_all, f"--machine_rank={host.index}", *store)
            command += [argument.replace("{host}", str(host.index)) for argument in arguments]
            started.append(host.popen(command, **options))
        return started
