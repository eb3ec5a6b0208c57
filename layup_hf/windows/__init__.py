"""How a worker reads a peer's live block."""

from .base import PeerWindows
from .shared import SharedWindows

__all__ = ["PeerWindows", "SharedWindows"]
