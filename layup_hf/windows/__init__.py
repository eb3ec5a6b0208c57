"""How a worker reads a peer's live block."""

from .base import PeerWindows
from .mixed import MixedWindows, open_windows
from .nixl import NixlWindows
from .shared import SharedWindows

__all__ = ["MixedWindows", "NixlWindows", "PeerWindows", "SharedWindows", "open_windows"]
