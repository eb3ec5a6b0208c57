"""Which network interface the workers use."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")

GPUDIRECT_VARIABLE = "LAYUP_GPUDIRECT"
"""Whether the network reaches the memory of GPUs, where it cannot be seen."""

_SYS, _MODULES = Path("/sys/class"), Path("/sys/module")
_PEER_MODULES = ("nvidia_peermem", "nv_peer_mem")


@dataclass(frozen=True)
class Network:
    """Where this worker is reached.

    Attributes:
        interface: Name of the one network interface that is used, such as "eth0".
        address: Its IP address.
        is_named: The user has named it.
    """

    interface: str
    address: str
    is_named: bool = False

    @classmethod
    def find(cls, interface: str | None, towards: str) -> Network:
        """The named interface; unset, the one through which the host `towards` is reached.

        Raises:
            ValueError: There is no such interface, or it has no IPv4 address, with those that there are.
        """
        addresses = {
            name: [item.address for item in items if item.family == socket.AF_INET]
            for name, items in psutil.net_if_addrs().items()
        }
        if interface is None:
            mine = _address_towards(towards)
            interface = next((name for name, found in addresses.items() if mine in found), None)
            if interface is None:
                raise ValueError(
                    f"No network interface has the address {mine}, from which {towards} is reached. Name one with "
                    f"`network_interface`: {', '.join(addresses)}."
                )
            return cls(interface, mine)
        if not addresses.get(interface):
            usable = ", ".join(name for name, found in addresses.items() if found)
            raise ValueError(
                f"network_interface={interface!r} is no interface with an IPv4 address on {os.uname().nodename}. "
                f"There are: {usable}."
            )
        return cls(interface, addresses[interface][0], is_named=True)

    def use(self) -> None:
        """Let what is started from here on use this interface alone, unless the environment says something else.

        NCCL takes it for meeting and finds RDMA by itself. To UCX it is a list of all that may be used, in which RDMA
        has names of its own.
        """
        for variable in _INTERFACE_VARIABLES:
            os.environ.setdefault(variable, self.interface)
        os.environ.setdefault("UCX_NET_DEVICES", self.ucx_devices())

    def ucx_devices(self) -> str:
        """What UCX may use, as `UCX_NET_DEVICES` names it."""
        return ",".join([*self.rdma_ports(), self.interface])

    def rdma_ports(self) -> list[str]:
        """Ports of RDMA devices that go with the interface, such as "mlx5_0:1": its own, or if it has none and nobody
        has named it, all that are up. Those of a cluster often lie beside the Ethernet that names lead to.
        """
        own = _SYS / "net" / self.interface / "device" / "infiniband"
        devices = _names_in(own)
        if not devices and not self.is_named:
            devices = rdma_devices()
        ports = [(device, port) for device in devices for port in _names_in(_SYS / "infiniband" / device / "ports")]
        return [f"{device}:{port}" for device, port in ports if _is_up(device, port)]


def reaches_gpus() -> bool:
    """Whether the network's devices read and write the memory of GPUs by themselves: UCX may use one with RDMA, and
    NVIDIA's module for that is loaded. What has no such module may still be able to (dmabuf), which cannot be seen from
    here: `LAYUP_GPUDIRECT` says it, 1 or 0.

    Raises:
        ValueError: It says something else.
    """
    said = os.environ.get(GPUDIRECT_VARIABLE, "")
    if said not in ("", "0", "1"):
        raise ValueError(f"{GPUDIRECT_VARIABLE}={said!r}: it is 1, 0, or not set.")
    if said:
        return said == "1"
    return bool(allowed_rdma_devices()) and any((_MODULES / name).exists() for name in _PEER_MODULES)


def rdma_devices() -> list[str]:
    """Names of the RDMA devices that this process can see."""
    return _names_in(_SYS / "infiniband")


def allowed_rdma_devices() -> list[str]:
    """Those that UCX may use."""
    named = [name.split(":")[0] for name in os.environ.get("UCX_NET_DEVICES", "all").split(",")]
    return [device for device in rdma_devices() if "all" in named or device in named]


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:
        return []


def _is_up(device: str, port: str) -> bool:
    try:
        return "ACTIVE" in (_SYS / "infiniband" / device / "ports" / port / "state").read_text()
    except OSError:
        return False


def _address_towards(host: str) -> str:
    """This machine's address from which packets to `host` are sent. Sends nothing."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return probe.getsockname()[0]
    except (OSError, TypeError, UnicodeError) as error:  # the last two: it cannot be a name
        raise ValueError(
            f"The host {host!r} (MASTER_ADDR, `--main_process_ip` of the launcher) cannot be reached: {error}."
        ) from error
