"""Layer-wise gossip training (LayUp) for Hugging Face Transformers."""

from .trainer.seams import check_seams

check_seams()  # before anything imports what an unknown version may lack

from .config import LayupConfig, LayupOptions  # noqa: E402
from .progress.clock import WorkerFailure  # noqa: E402
from .trainer.mixin import LayupMixin, LayupTrainer  # noqa: E402
from .trainer.straggler import StragglerCallback  # noqa: E402
from .windows.straggler import StragglerConfig  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "LayupConfig",
    "LayupMixin",
    "LayupOptions",
    "LayupTrainer",
    "StragglerCallback",
    "StragglerConfig",
    "WorkerFailure",
    "__version__",
]
