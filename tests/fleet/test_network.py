"""The one interface that is used, and proofs that who speaks belongs to the job."""

import os

import psutil
import pytest

from layup_hf.fleet import network
from layup_hf.fleet.network import Network

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "UCX_NET_DEVICES")


@pytest.fixture(autouse=True)
def no_choice(monkeypatch):
    """The environment says nothing."""
    for name in (*VARIABLES, "LAYUP_TOKEN"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)


# ---- The interface ----


@pytest.fixture
def devices(monkeypatch, tmp_path):
    """RDMA as the kernel shows it: `eth0` is a port of `mlx5_1`; `mlx5_0` is InfiniBand, with one port up."""
    states = {("mlx5_0", "1"): "4: ACTIVE\n", ("mlx5_0", "2"): "1: DOWN\n", ("mlx5_1", "1"): "4: ACTIVE\n"}
    for (device, port), state in states.items():
        folder = tmp_path / "infiniband" / device / "ports" / port
        folder.mkdir(parents=True)
        (folder / "state").write_text(state)
    (tmp_path / "net" / "eth0" / "device" / "infiniband" / "mlx5_1").mkdir(parents=True)
    (tmp_path / "net" / "eth1" / "device").mkdir(parents=True)
    monkeypatch.setattr(network, "_SYS", tmp_path)


@pytest.mark.parametrize(
    ("interface", "is_named", "allowed"),
    [
        ("eth0", True, "mlx5_1:1,eth0"),
        ("eth0", False, "mlx5_1:1,eth0"),
        ("eth1", False, "mlx5_0:1,mlx5_1:1,eth1"),
        ("eth1", True, "eth1"),
        ("lo", True, "lo"),
    ],
)
def test_rdma_may_be_used_where_there_is_some(devices, interface, is_named, allowed):
    Network(interface, "10.0.0.1", is_named).use()
    assert os.environ["UCX_NET_DEVICES"] == allowed
    assert os.environ["NCCL_SOCKET_IFNAME"] == os.environ["GLOO_SOCKET_IFNAME"] == interface


def test_rdma_devices(monkeypatch, tmp_path):
    monkeypatch.setattr(network, "_SYS", tmp_path)
    assert network.rdma_devices() == []
    (tmp_path / "infiniband").mkdir()
    (tmp_path / "infiniband" / "mlx5_0").touch()
    assert network.rdma_devices() == ["mlx5_0"]


def test_without_rdma_the_interface_is_all(monkeypatch, tmp_path):
    monkeypatch.setattr(network, "_SYS", tmp_path)
    Network("eth1", "10.0.0.1").use()
    assert os.environ["UCX_NET_DEVICES"] == "eth1"


@pytest.mark.parametrize(
    ("module", "allowed", "said", "reached"),
    [
        ("nvidia_peermem", "mlx5_1:1,eth0", None, True),
        ("nv_peer_mem", None, None, True),  # all may be used
        ("nvidia_peermem", "eth0", None, False),
        ("", "mlx5_1:1,eth0", None, False),
        ("", "eth0", "1", True),
        ("nvidia_peermem", "mlx5_1:1,eth0", "0", False),
    ],
)
def test_what_reaches_the_memory_of_gpus(devices, monkeypatch, tmp_path, module, allowed, said, reached):
    (tmp_path / "module" / module).mkdir(parents=True)
    monkeypatch.setattr(network, "_MODULES", tmp_path / "module")
    for name, value in (("UCX_NET_DEVICES", allowed), ("LAYUP_GPUDIRECT", said)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert network.reaches_gpus() == reached


def test_what_is_said_of_the_memory_of_gpus_is_understood(monkeypatch):
    monkeypatch.setenv("LAYUP_GPUDIRECT", "yes")
    with pytest.raises(ValueError, match="LAYUP_GPUDIRECT='yes': it is 1, 0, or not set"):
        network.reaches_gpus()


def loopback():
    return next(
        name for name, found in psutil.net_if_addrs().items() if "127.0.0.1" in [address.address for address in found]
    )


def test_the_interface_is_the_one_that_leads_to_the_host():
    assert Network.find(None, "127.0.0.1") == Network(loopback(), "127.0.0.1")
    assert Network.find(None, "localhost") == Network(loopback(), "127.0.0.1")


def test_a_named_interface_is_used_wherever_the_host_is():
    assert Network.find(loopback(), "host.invalid") == Network(loopback(), "127.0.0.1", is_named=True)


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
    assert Network.find("a0", "127.0.0.1") == Network("a0", "10.0.0.1", is_named=True)
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"a0": [found(inet, "10.0.0.1")]})
    with pytest.raises(ValueError, match=r"No network interface has the address 127\.0\.0\.1.*`network_interface`: a0"):
        Network.find(None, "127.0.0.1")


def test_an_unknown_interface_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match=rf"network_interface='eth99' is no interface.*There are: .*\b{loopback()}\b"):
        Network.find("eth99", "127.0.0.1")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("host", ["::1", "no-such-host.invalid", "two words", "a" * 300, "ä" * 80])
def test_a_host_that_is_not_reached_is_refused_by_name(host):
    with pytest.raises(ValueError, match=rf"'{host}' \(MASTER_ADDR, `--main_process_ip`.*cannot be reached"):
        Network.find(None, host)  # by IPv4


def test_what_is_started_later_uses_the_interface():
    Network("eth7", "10.0.0.7").use()
    assert [os.environ[name] for name in VARIABLES] == ["eth7"] * 3


def test_what_the_environment_says_stays(monkeypatch):
    monkeypatch.setenv("UCX_NET_DEVICES", "mlx5_0:1")
    Network("eth7", "10.0.0.7").use()
    assert os.environ["UCX_NET_DEVICES"] == "mlx5_0:1"
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
