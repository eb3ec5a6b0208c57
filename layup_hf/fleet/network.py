"""Which network interface the workers use."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import psutil

_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "UCX_NET_DEVICES")


@dataclass(frozen=True)
class Network:
    """Where this worker is reached.

    Attributes:
        interface: Name of the one network interface that is used, such as "eth0".
        address: Its IP address.
    """

    interface: str
    address: str

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
        return cls(interface, addresses[interface][0])

    def use(self) -> None:
        """Let what is started from here on use this interface alone, unless the environment says something else."""
        for variable in _INTERFACE_VARIABLES:
            os.environ.setdefault(variable, self.interface)


def _address_towards(host: str) -> str:
    """This machine's address from which packets to `host` are sent. Sends nothing."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return probe.getsockname()[0]
    except OSError as error:
        raise ValueError(
            f"The host {host!r} (MASTER_ADDR, `--main_process_ip` of the launcher) cannot be reached: {error}."
        ) from error
