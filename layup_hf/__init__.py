"""Layer-wise gossip training (LayUp) for Hugging Face Transformers."""

from .doctor.called import is_called
from .trainer.seams import check_seams

__version__ = "0.1.0"

try:
    check_seams()  # before anything imports what an unknown version may lack

    from .config import LayupConfig, LayupOptions
    from .progress.clock import WorkerFailure
    from .trainer.mixin import LayupMixin, LayupTrainer
    from .trainer.muon import MuonMixin
    from .trainer.straggler import StragglerCallback
    from .windows.straggler import StragglerConfig
except Exception:
    if not is_called():  # `python -m layup_hf` reports it, with all else that it finds
        raise

__all__ = [
    "LayupConfig",
    "LayupMixin",
    "LayupOptions",
    "LayupTrainer",
    "MuonMixin",
    "StragglerCallback",
    "StragglerConfig",
    "WorkerFailure",
    "__version__",
]
