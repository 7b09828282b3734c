"""Train a Transformers model once and get a smaller, faster one out of it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .models.registration import register_types

if TYPE_CHECKING:
    from .config import OTOConfig
    from .deploy.answering import QuestionAnswerer
    from .deploy.latency_tables import measure_latency
    from .hspg.optimizer import HSPG
    from .models.groups import partition
    from .models.sharding import gather
    from .models.surgery import compress, shrink
    from .report.pictures import plot_run
    from .report.summary import summarize
    from .training.sentence_transformers import OTOCrossEncoderTrainer as OTOCrossEncoderTrainer
    from .training.sentence_transformers import OTOMultiVectorEncoderTrainer as OTOMultiVectorEncoderTrainer
    from .training.sentence_transformers import OTOSentenceTransformerTrainer as OTOSentenceTransformerTrainer
    from .training.sentence_transformers import OTOSparseEncoderTrainer as OTOSparseEncoderTrainer
    from .training.trainer import OTOTrainer

# Without those that need the package of an extra: `from hf_oto import *` works where it is not installed.
__all__ = [
    "HSPG",
    "OTOConfig",
    "OTOTrainer",
    "QuestionAnswerer",
    "compress",
    "gather",
    "measure_latency",
    "partition",
    "plot_run",
    "shrink",
    "summarize",
]
__version__ = "0.1.0"

# Where each name is: its room is imported when the name is first asked for, and with it only what that room needs.
_ROOMS = {
    "HSPG": "hspg.optimizer",
    "OTOConfig": "config",
    "OTOTrainer": "training.trainer",
    "QuestionAnswerer": "deploy.answering",
    "compress": "models.surgery",
    "gather": "models.sharding",
    "measure_latency": "deploy.latency_tables",
    "partition": "models.groups",
    "plot_run": "report.pictures",
    "shrink": "models.surgery",
    "summarize": "report.summary",
    "OTOCrossEncoderTrainer": "training.sentence_transformers",
    "OTOMultiVectorEncoderTrainer": "training.sentence_transformers",
    "OTOSentenceTransformerTrainer": "training.sentence_transformers",
    "OTOSparseEncoderTrainer": "training.sentence_transformers",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_ROOMS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})


register_types()
