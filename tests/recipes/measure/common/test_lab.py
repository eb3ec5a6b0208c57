"""The lab's links have the rate that they say, break, mend and lose packets; and nothing is left of a lab."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT

from recipes.measure.common import lab as lab_module
from recipes.measure.common.lab import Lab, LabError, bits_per_second

needs_lab = pytest.mark.skipif(lab_module.missing() is not None, reason=str(lab_module.missing()))

RECEIVE = """
import socket
listening = socket.create_server(("0.0.0.0", 5000))
print("ready", flush=True)
connection, _ = listening.accept()
while connection.recv(1 << 20):
    pass
"""
SEND = """
import socket, sys
connection = socket.create_connection((sys.argv[1], 5000))
while True:
    connection.sendall(bytes(1 << 16))
"""
COUNT = """
import socket
receiving = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
receiving.bind(("0.0.0.0", 5001))
print("ready", flush=True)
receiving.settimeout(1)
count = 0
try:
    while True:
        receiving.recv(100)
        count += 1
except TimeoutError:
    print(count)
"""
COUNTED = """
import socket, sys, time
sending = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for number in range(2000):
    sending.sendto(b"x", (sys.argv[1], 5001))
    if number % 50 == 0:
        time.sleep(0.005)
"""


def start(host, script, *arguments):
    return host.popen([sys.executable, "-S", "-c", script, *arguments], stdout=subprocess.PIPE, text=True)


def listen(host, script):
    process = start(host, script)
    assert process.stdout.readline() == "ready\n"
    return process


def megabits_per_second(host, seconds):
    before, begin = host.bytes_received(), time.monotonic()
    time.sleep(seconds)
    return (host.bytes_received() - before) * 8 / (time.monotonic() - begin) / 1e6


def namespaces():
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


@needs_lab
def test_link_has_the_rate_that_it_is_given_and_carries_nothing_while_it_is_cut():
    with Lab(hosts=2, rate="100mbit") as lab:
        sender, receiver = lab.hosts
        processes = [listen(receiver, RECEIVE), start(sender, SEND, receiver.address)]
        time.sleep(0.5)
        assert 85 < megabits_per_second(receiver, 1) < 105
        lab.set_rate("20mbit")
        time.sleep(0.5)
        assert 17 < megabits_per_second(receiver, 1) < 21
        receiver.cut()
        assert megabits_per_second(receiver, 0.5) == 0
        receiver.mend()
        time.sleep(1)  # until TCP has tried again
        assert megabits_per_second(receiver, 1) > 10
        assert receiver.bytes_received() == pytest.approx(sender.bytes_sent(), rel=0.1)
        assert set(receiver.pids()) == {processes[0].pid}
        name = lab.name
        assert name in namespaces()
    assert [process.wait(1) for process in processes] == [-signal.SIGKILL] * 2
    assert name not in namespaces()
    assert not list(Path("/etc/netns").glob(f"{name}*"))


@needs_lab
@pytest.mark.skipif(lab_module.shutil.which("nft") is None, reason="needs nft: apt-get install nftables")
def test_packets_are_lost_at_the_given_rate_until_that_ends():
    with Lab(hosts=2) as lab:
        sender, receiver = lab.hosts
        counts = []
        for percent in (10, 0):
            receiver.set_loss(percent)
            counting = listen(receiver, COUNT)
            start(sender, COUNTED, receiver.address)
            counts.append(int(counting.communicate(timeout=60)[0]))
        assert 1700 < counts[0] < 1900
        assert counts[1] == 2000


@needs_lab
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("until_there", [0.0, 0.5], ids=["being started", "started"])
def test_nothing_is_left_when_the_maker_of_a_lab_is_killed(end, until_there, tmp_path):
    """A process that is being started has found its host and is slow to enter it."""
    slow = tmp_path / "ip"
    enters = 'exec 9<"/run/netns/$3"; sleep 0.2; shift 3; exec nsenter --net=/proc/self/fd/9 "$@"'
    slow.write_text(f'#!/bin/sh\nif [ "$2" = exec ]; then {enters}; fi\nexec {shutil.which("ip")} "$@"\n')
    slow.chmod(0o700)
    script = f"""
import time
from recipes.measure.common.lab import Lab
with Lab(hosts=1) as lab:
    sleeping = lab.hosts[0].popen(["sleep", "1000"])
    time.sleep({until_there})
    print(lab.name, sleeping.pid, flush=True)
    sleeping.wait()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    maker = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    name, sleeping = maker.stdout.readline().split()
    assert name in namespaces()
    maker.send_signal(end)
    maker.wait(60)
    ends = time.monotonic() + 30
    while (name in namespaces() or Path("/proc", sleeping).exists()) and time.monotonic() < ends:
        time.sleep(0.05)
    assert name not in namespaces()
    assert not Path("/proc", sleeping).exists()


@needs_lab
def test_two_labs_are_apart():
    with Lab(hosts=2) as one, Lab(hosts=2) as other:
        listen(one.hosts[1], RECEIVE)
        assert start(other.hosts[0], SEND, one.hosts[1].address).wait(60) != 0
        assert one.name != other.name


@needs_lab
def test_an_error_in_a_lab_ends_it_and_is_seen():
    with pytest.raises(LabError, match="failed"), Lab(hosts=1) as lab:
        lab_module.run("ip", "-n", lab.hosts[0].name, "link", "show", "no-such-interface")
    assert lab.name not in namespaces()


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(LabError, match="run this as root"):
        Lab(hosts=2).__enter__()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(lab_module.shutil, "which", lambda command: None)
    with pytest.raises(LabError, match="apt-get install iproute2"):
        Lab(hosts=2).__enter__()
    with pytest.raises(ValueError, match="100mbit"):
        bits_per_second("100 MB/s")
