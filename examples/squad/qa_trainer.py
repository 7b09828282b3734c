"""Trainer for question answering: scores answers, not logits, wherever Trainer evaluates."""

from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset
from price import PriceMixin
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

# (windows with all their columns, logits of start and end, prefix of the metrics) -> metrics
PostProcess = Callable[[Dataset, tuple[np.ndarray, np.ndarray], str], dict[str, Any]]


class QuestionAnsweringMixin:
    """
    Mixes with any [`Trainer`]: evaluation and prediction turn logits into answers and add their scores to the metrics,
    during training as after it.

    Args:
        post_process (`PostProcess`, *optional*):
            Called after every pass over a data set. Without it, the class it is mixed with is left as it is.
    """

    def __init__(self, *args: Any, post_process: PostProcess | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.post_process = post_process
        self._windows: Any = None

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        # The loop sees a dataloader whose columns are those of the model's forward only.
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        self._windows = self.eval_dataset[chosen] if isinstance(chosen, str) else chosen
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        self._windows = test_dataset
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def _get_eval_sampler(self, eval_dataset: Any) -> None:
        """In the data set's order, whose windows the logits are of: never grouped by length, as training may be."""

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        scored = self.post_process is not None and not self.args.prediction_loss_only
        if scored:
            prediction_loss_only = False  # Trainer drops the logits where it has no `compute_metrics`
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if scored:
            scores = self.post_process(self._windows, output.predictions[:2], metric_key_prefix)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in scores.items()})
        return output


class QuestionAnsweringTrainer(QuestionAnsweringMixin, PriceMixin, Trainer):
    """Plain [`Trainer`] that scores answers, and counts what it costs."""
