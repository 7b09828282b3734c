"""Train a Transformers model once and get a smaller, faster one out of it."""

from .config import OTOConfig
from .deploy.answering import QuestionAnswerer
from .deploy.latency_tables import measure_latency
from .hspg.optimizer import HSPG
from .models.groups import partition
from .models.surgery import compress, gather, shrink
from .report.pictures import plot_run
from .report.summary import summarize
from .training.trainer import OTOTrainer

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
