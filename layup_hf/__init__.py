"""Layer-wise gossip training (LayUp) for Hugging Face Transformers."""

from .config import LayupConfig, LayupOptions
from .straggler import StragglerCallback, StragglerConfig
from .trainer import LayupMixin, LayupTrainer

__version__ = "0.1.0"
__all__ = [
    "LayupConfig",
    "LayupMixin",
    "LayupOptions",
    "LayupTrainer",
    "StragglerCallback",
    "StragglerConfig",
    "__version__",
]
