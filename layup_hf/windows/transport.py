"""What the exchange across hosts needs of NIXL, and nothing else. Used by one thread alone once windows are open."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..fleet.gate import Gate, addresses
from .layout import Pieces


class Transport:
    """One NIXL agent: memory that peers may write to, connections, writes, messages.

    Blocks are written by who has them, not read by who wants them. Over TCP, a read is an emulation in which the
    passive side answers; if the reader has died by then, UCX ends the *answering* process ("Fatal: unexpected error",
    in `ucp_request.inl`). A write fails on the side that started it, with an exception.

    Args:
        name: Unique among all agents of the job.
        device: Of the memory.

    Attributes:
        name: The same.
        sends_from: Addresses that this machine may send from. It lets in nobody else until others are admitted.

    Raises:
        ValueError: NIXL is not installed.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        # Both would write to the terminal about every connection that fails; the courier logs that once.
        os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")
        os.environ.setdefault("UCX_LOG_LEVEL", "FATAL")
        try:
            from nixl._api import nixl_agent, nixl_agent_config
        except ImportError as error:
            raise ValueError(
                "Workers on several hosts exchange blocks through NIXL, which is not installed on "
                f"{os.uname().nodename} ({error}): pip install 'layup_hf[nixl]'."
            ) from error
        with Gate.around() as self._gate:
            self._agent: Any = nixl_agent(name, nixl_agent_config(enable_prog_thread=False))  # its thread spins a core
        self.sends_from = addresses(os.environ.get("UCX_NET_DEVICES"))
        self.admit([])
        self._kind = "VRAM" if device.type == "cuda" else "DRAM"
        self.device_number = (device.index or 0) if device.type == "cuda" else 0
        self._registrations: dict[int, Any] = {}

    def admit(self, senders: Iterable[str]) -> None:
        """Let in who sends from these addresses, and this machine, as UCX connects to itself; nobody else."""
        self._gate.admit({*self.sends_from, *senders})

    @property
    def ports(self) -> list[int]:
        """Where this agent listens."""
        return self._gate.ports

    def register(self, tensors: Sequence[Tensor]) -> None:
        """Let these contiguous tensors be written from, and to by whoever has their key."""
        for tensor in tensors:
            if tensor.nbytes:
                piece = [(tensor.data_ptr(), tensor.nbytes, self.device_number, "")]
                self._registrations[tensor.data_ptr()] = self._agent.register_memory(piece, self._kind)

    def forget(self, tensor: Tensor) -> None:
        """Undo `register` for one tensor."""
        self._agent.deregister_memory(self._registrations.pop(tensor.data_ptr()))

    def address(self) -> bytes:
        """What peers need to connect to this worker."""
        nothing = self._agent.get_reg_descs([(0, 1, self.device_number, "")], self._kind)
        nothing.clear()
        return self._agent.get_partial_agent_metadata(nothing, inc_conn_info=True, backends=["UCX"])

    def key(self, tensor: Tensor) -> bytes:
        """What connected peers need to write to a registered tensor."""
        registration = self._registrations[tensor.data_ptr()]
        return self._agent.get_partial_agent_metadata(registration, inc_conn_info=False, backends=["UCX"])

    def connect(self, address: bytes) -> str:
        """Connect to the worker with this address; gives the name of its agent."""
        name = self._agent.add_remote_agent(address)
        return name.decode() if isinstance(name, bytes) else name

    def accept_key(self, key: bytes, name: str) -> None:
        """Be able to write where this key allows it."""
        owner = self._agent.add_remote_agent(key)
        if (owner.decode() if isinstance(owner, bytes) else owner) != name:
            raise ValueError("The key is of another worker.")

    def disconnect(self, name: str) -> None:
        """Drop the connection. What the peer is writing here may still come."""
        self._agent.remove_remote_agent(name)

    def write(self, name: str, source: Pieces, target: Pieces, device: int) -> Any:
        """Start to write into a peer's memory; gives a handle for `is_written`. Raises if the peer has gone."""
        local = self._agent.get_xfer_descs([(*piece, self.device_number) for piece in source], mem_type=self._kind)
        remote = self._agent.get_xfer_descs([(*piece, device) for piece in target], mem_type=self._kind)
        handle = self._agent.initialize_xfer("WRITE", local, remote, name, b"")
        self._require(self._agent.transfer(handle))
        return handle

    def is_written(self, handle: Any) -> bool:
        """Whether a write has ended. Raises if it has failed."""
        return self._require(self._agent.check_xfer_state(handle)) == "DONE"

    @staticmethod
    def _require(state: str) -> str:
        if state == "ERR":
            raise ConnectionError("The transfer failed.")
        return state

    def release(self, handle: Any) -> None:
        """Forget a handle."""
        handle.release()

    def send(self, name: str, message: bytes) -> None:
        """Send a message. Raises if the peer has gone, but not necessarily the first time."""
        self._agent.send_notif(name, message)

    def receive(self) -> list[tuple[str, bytes]]:
        """Messages that have come, with the names that their senders give themselves. Moves everything forward."""
        return [(name, message) for name, messages in self._agent.get_new_notifs().items() for message in messages]

    def close(self) -> None:
        """End all connections: nothing can be written to this worker's memory afterwards. Does not wait."""
        if self._agent is None:
            return
        for registration in self._registrations.values():
            self._agent.deregister_memory(registration)
        self._registrations.clear()
        self._agent = None
