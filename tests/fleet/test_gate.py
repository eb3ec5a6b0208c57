"""A socket behind a gate is reached from the addresses that are let in, and from no other."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
from launching import ROOT

from layup_hf.fleet import gate
from layup_hf.fleet.gate import Gate, addresses


def behind_gate(family=socket.AF_INET, place="127.0.0.1"):
    """A listening socket and its gate."""
    with Gate.around() as made:
        listening = socket.create_server((place, 0), family=family)
    return listening, made


def gets_in(listening, sender, seconds=0.4):
    """Whether a packet from this address reaches the other end."""
    try:
        with socket.create_connection(listening.getsockname()[:2], seconds, (sender, 0)) as client:
            client.sendall(b"x")
            listening.settimeout(seconds)
            server, _ = listening.accept()
            with server:
                server.settimeout(seconds)
                return server.recv(1) == b"x"
    except TimeoutError:
        return False


def test_nobody_is_let_in_until_some_are_admitted():
    listening, made = behind_gate()
    with listening:
        assert made.ports == [listening.getsockname()[1]]
        assert not gets_in(listening, "127.0.0.1")
        made.admit(["127.0.0.2", "::1"])
        assert gets_in(listening, "127.0.0.2")
        assert not gets_in(listening, "127.0.0.1")
        made.admit(["127.0.0.1", "127.0.0.3"])
        assert gets_in(listening, "127.0.0.1")
        assert gets_in(listening, "127.0.0.3")
        assert not gets_in(listening, "127.0.0.2")


def test_a_connection_that_was_let_in_stays_with_the_rule_that_let_it_in():
    listening, made = behind_gate()
    made.admit(["127.0.0.1"])
    with listening, socket.create_connection(listening.getsockname()) as client, listening.accept()[0] as server:
        made.admit([])
        client.sendall(b"x")
        assert server.recv(1) == b"x"


def test_as_many_workers_as_there_are_may_be_admitted():
    listening, made = behind_gate()
    many = [f"10.{a}.{b}.1" for a in range(4) for b in range(200)]
    with listening:
        made.admit([*many, "127.0.0.2"])
        assert gets_in(listening, "127.0.0.2")
        assert not gets_in(listening, "127.0.0.1")


@pytest.mark.skipif(not socket.has_ipv6 or not os.path.exists("/proc/net/if_inet6"), reason="no IPv6")
def test_ipv6_addresses():
    try:
        listening, made = behind_gate(socket.AF_INET6, "::1")
    except OSError as error:
        pytest.skip(f"no IPv6 on the loopback: {error}")
    with listening:
        made.admit(["127.0.0.1", "fd00::1"])
        assert not gets_in(listening, "::1")
        made.admit(["fd00::1", "::1"])
        assert gets_in(listening, "::1")


def test_who_has_connected_before_the_gate_was_closed_is_cut_off():
    with Gate.around():
        listening = socket.create_server(("127.0.0.1", 0))
        client = socket.create_connection(listening.getsockname())
        server, _ = listening.accept()
    with listening, client, server:
        client.settimeout(5)
        assert client.recv(1) == b""


def test_sockets_that_were_there_before_stay_open():
    with socket.create_server(("127.0.0.1", 0)) as before:
        listening, made = behind_gate()
        with listening:
            assert made.ports == [listening.getsockname()[1]]
            assert gets_in(before, "127.0.0.1")


def test_a_socket_that_has_been_closed_is_left_alone():
    listening, made = behind_gate()
    listening.close()
    made.admit(["127.0.0.1"])
    assert made.ports == []


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="needs setpriv: util-linux")
def test_a_user_without_privilege_has_a_gate_or_is_told_that_there_is_none():
    """socket(7) asks for no privilege; there are kernels that do."""
    script = (
        "import json, socket, sys, types; sys.modules['fleet'] = types.ModuleType('fleet')\n"
        "for name, source in json.load(sys.stdin).items():\n"
        "    module = sys.modules[f'fleet.{name}'] = types.ModuleType(f'fleet.{name}')\n"
        "    module.__package__ = 'fleet'; exec(source, vars(module))\n"
        "gate = module\n"
        "with gate.Gate.around() as made: one = socket.create_server(('127.0.0.1', 0))\n"
        "made.admit(['127.0.0.9'])\n"
        "try: socket.create_connection(one.getsockname(), 0.4); print('open')\n"
        "except TimeoutError: print('closed')\n"
    )
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    source = json.dumps({name: (ROOT / f"layup_hf/fleet/{name}.py").read_text() for name in ("sockets", "gate")})
    command = [*as_nobody, sys.executable, "-c", script]
    done = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    if "PermissionError" in done.stderr or "ModuleNotFoundError" in done.stderr:
        pytest.skip("another user cannot read this environment")
    assert (done.stdout == "closed\n") != ("does not let a socket be closed to strangers" in done.stderr), done


def test_a_system_without_filters_is_told_once(monkeypatch, caplog):
    monkeypatch.setattr(gate, "_SO_ATTACH_FILTER", 9999)
    listening, made = behind_gate()
    with listening:
        made.admit(["127.0.0.2"])
        assert gets_in(listening, "127.0.0.1")
    assert caplog.text.count("does not let a socket be closed to strangers") == 1


def test_the_loopback_is_among_a_machines_addresses_only_if_it_is_used():
    assert "127.0.0.1" in addresses("lo")
    assert not any(address.startswith("127.") for address in addresses("eth0"))
    assert "::1" not in addresses(None)
