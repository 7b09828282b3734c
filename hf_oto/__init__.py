"""Train a Transformers model once and get a smaller, faster one out of it."""

from .answering import QuestionAnswerer
from .config import OTOConfig
from .groups import partition
from .hspg import HSPG
from .measuring import measure_latency
from .report import plot_run, summarize
from .surgery import compress, gather, shrink
from .trainer import OTOTrainer

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
