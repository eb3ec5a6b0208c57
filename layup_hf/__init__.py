"""Layer-wise gossip training (LayUp) for Hugging Face Transformers."""

from .config import LayupConfig, LayupOptions
from .trainer.mixin import LayupMixin, LayupTrainer
from .trainer.straggler import StragglerCallback
from .windows.straggler import StragglerConfig

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
