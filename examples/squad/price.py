"""What a training costs in multiply-accumulates: those of heads and neurons, as many as there are in each step."""

from typing import Any

from transformers import PreTrainedModel

from hf_oto import partition
from hf_oto.report.summary import summarize_kept

BACKWARD = 2  # multiply-accumulates of a backward pass, for each of the forward's


def block_macs(model: PreTrainedModel, length: int) -> int:
    """Multiply-accumulates of a forward of one sequence, in all heads and neurons that the model has, zeros too."""
    groups = partition(model)
    return summarize_kept(groups, [array.count for array in groups.arrays], sequence_length=length).macs


class PriceMixin:
    """
    Mixes with any [`Trainer`]: its count of operations, which it logs and saves as `total_flos`, is that of heads and
    neurons as they are in each step, with the padding, and of a teacher's. Without it Trainer multiplies tokens by
    weights, whatever the length.
    """

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        batch, length = inputs["input_ids"].shape
        try:
            macs = (1 + BACKWARD) * block_macs(self.model, length)
            if getattr(self, "teacher_model", None) is not None:
                macs += block_macs(self.teacher_model, length)
        except ValueError:  # a dense run of a model that cannot be pruned
            return super().floating_point_ops(inputs)
        return 2 * batch * macs  # an addition and a multiplication

    @property
    def price(self) -> dict[str, int]:
        """Steps of the training that is done, and its multiply-accumulates."""
        return {"train_steps": self.state.global_step, "train_macs": int(self.state.total_flos) // 2}
