"""The one interface that is used, and proofs that who speaks belongs to the job."""

import hashlib
import os

import psutil
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from layup_hf.fleet.network import Network, is_signed, job_token, sign

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "UCX_NET_DEVICES")


@pytest.fixture(autouse=True)
def no_choice(monkeypatch):
    """The environment says nothing."""
    for name in (*VARIABLES, "LAYUP_TOKEN"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)


# ---- The interface ----


def loopback():
    return next(
        name for name, found in psutil.net_if_addrs().items() if "127.0.0.1" in [address.address for address in found]
    )


def test_the_interface_is_the_one_that_leads_to_the_host():
    assert Network.find(None, "127.0.0.1") == Network(loopback(), "127.0.0.1")
    assert Network.find(None, "localhost") == Network(loopback(), "127.0.0.1")


def test_a_named_interface_is_used_wherever_the_host_is():
    assert Network.find(loopback(), "host.invalid") == Network(loopback(), "127.0.0.1")


def test_another_interface_leads_elsewhere(monkeypatch):
    """As the operating system says, not as the name of the interface sorts."""
    address = type("Address", (), {})

    def found(family, text):
        item = address()
        item.family, item.address = family, text
        return item

    inet = psutil.net_if_addrs()[loopback()][0].family
    monkeypatch.setattr(
        psutil, "net_if_addrs", lambda: {"a0": [found(inet, "10.0.0.1")], "b0": [found(inet, "127.0.0.1")]}
    )
    assert Network.find(None, "127.0.0.1").interface == "b0"
    assert Network.find("a0", "127.0.0.1") == Network("a0", "10.0.0.1")
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"a0": [found(inet, "10.0.0.1")]})
    with pytest.raises(ValueError, match=r"No network interface has the address 127\.0\.0\.1.*`network_interface`: a0"):
        Network.find(None, "127.0.0.1")


def test_an_unknown_interface_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match=rf"network_interface='eth99' is no interface.*There are: .*\b{loopback()}\b"):
        Network.find("eth99", "127.0.0.1")


def test_a_host_that_is_not_reached_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'::1' \(MASTER_ADDR, `--main_process_ip`.*cannot be reached"):
        Network.find(None, "::1")  # not by IPv4


def test_what_is_started_later_uses_the_interface():
    Network("eth7", "10.0.0.7").use()
    assert [os.environ[name] for name in VARIABLES] == ["eth7"] * 3


def test_what_the_environment_says_stays(monkeypatch):
    monkeypatch.setenv("UCX_NET_DEVICES", "mlx5_0:1")
    Network("eth7", "10.0.0.7").use()
    assert os.environ["UCX_NET_DEVICES"] == "mlx5_0:1"
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"


# ---- The secret ----


def test_the_secret_is_that_of_the_environment(monkeypatch):
    monkeypatch.setenv("LAYUP_TOKEN", "Größe")
    assert job_token() == job_token() == hashlib.sha256("Größe".encode()).digest()


@pytest.mark.parametrize("is_empty", [False, True])
def test_without_one_it_is_random(monkeypatch, is_empty):
    if is_empty:
        monkeypatch.setenv("LAYUP_TOKEN", "")
    first, second = job_token(), job_token()
    assert first != second
    assert len(first) == len(second) == 32


# ---- Proofs ----

tokens = st.binary(min_size=32, max_size=32)
messages = st.lists(st.binary(max_size=20), max_size=4)


@given(tokens, messages)
def test_a_proof_holds_for_what_was_meant(token, parts):
    proof = sign(token, *parts)
    assert is_signed(token, proof, *parts)
    assert len(proof) == 16


@given(tokens, tokens, messages)
def test_another_secret_is_noticed(token, other, parts):
    assume(token != other)
    assert not is_signed(other, sign(token, *parts), *parts)


@given(tokens, messages, messages)
def test_other_parts_are_noticed(token, parts, others):
    assume(parts != others)
    assert not is_signed(token, sign(token, *parts), *others)


@given(tokens, st.binary(min_size=1, max_size=40), st.data())
def test_bytes_that_are_moved_between_parts_are_noticed(token, message, data):
    """One text, cut at two different places."""
    first, second = (data.draw(st.integers(0, len(message))) for _ in range(2))
    assume(first != second)
    proof = sign(token, message[:first], message[first:])
    assert not is_signed(token, proof, message[:second], message[second:])
    assert not is_signed(token, proof, message)
    assert not is_signed(token, proof, message[:first], message[first:], b"")


@given(tokens, messages, st.data())
def test_a_changed_bit_of_anything_is_noticed(token, parts, data):
    def flipped(original):
        place = data.draw(st.integers(0, len(original) * 8 - 1))
        changed = bytearray(original)
        changed[place // 8] ^= 1 << place % 8
        return bytes(changed)

    proof = sign(token, *parts)
    assert not is_signed(token, flipped(proof), *parts)
    assert not is_signed(flipped(token), proof, *parts)
    for k, part in enumerate(parts):
        if part:
            assert not is_signed(token, proof, *parts[:k], flipped(part), *parts[k + 1 :])


@pytest.mark.parametrize("proof", [b"", b"short", bytes(17)])
def test_what_is_no_proof_is_none(proof):
    assert not is_signed(bytes(32), proof, b"part")
