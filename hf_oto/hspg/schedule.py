"""Step -> stage, period and share to reach: pure functions of the settings and the number of steps."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import OTOConfig

_FORGOTTEN = 0.01  # what older steps together weigh in a running mean that is not worth gathering any more


@dataclass(frozen=True)
class Schedule:
    """
    The stages of one run, in optimizer steps counted from 0.

    Args:
        total_steps (`int`): Steps of the run, N.
        boundaries (`tuple[int, ...]`): First step of every pruning period, then the first step of recovery:
            b_0 = N_w < b_1 < … < b_P = N_p. In the mode without a target it is `(N_p,)`.
    """

    total_steps: int
    boundaries: tuple[int, ...]

    @classmethod
    def from_config(cls, config: OTOConfig, total_steps: int) -> Schedule:
        """
        Lay out the stages. A run with fewer steps of pruning than periods has as many periods as that.

        Raises:
            `ValueError`: There is no step of pruning in the run.
        """
        if total_steps < 1:
            raise ValueError(f"`total_steps` must be at least 1, got {total_steps}.")
        start = round(config.pruning_start_ratio * total_steps)
        if config.target_sparsity is None:
            return cls(total_steps, (start,))
        end = round(config.pruning_end_ratio * total_steps)
        periods = min(config.pruning_periods, end - start)
        if periods < 1:
            raise ValueError(
                f"Pruning needs at least 1 step, but a run of {total_steps} steps has none between "
                f"`pruning_start_ratio`={config.pruning_start_ratio} and "
                f"`pruning_end_ratio`={config.pruning_end_ratio}. Train longer, or move the two apart."
            )
        return cls(total_steps, tuple(start + (end - start) * period // periods for period in range(periods + 1)))

    @property
    def periods(self) -> int:
        return len(self.boundaries) - 1

    def stage(self, step: int) -> str:
        """`"warmup"`, `"pruning"` or `"recovery"`; without a target `"warmup"` or `"half-space"`."""
        if step < self.boundaries[0]:
            return "warmup"
        if not self.periods:
            return "half-space"
        return "pruning" if step < self.boundaries[-1] else "recovery"

    def period(self, step: int) -> int:
        """The period j in 1 … P that a step of the pruning stage belongs to."""
        return sum(step >= boundary for boundary in self.boundaries)

    def starts_period(self, step: int) -> bool:
        """Whether groups are selected at this step."""
        return step in self.boundaries[:-1]

    def observed(self, step: int, interval: int, decay: float) -> bool:
        """
        Whether saliency is gathered at a step: at every selection, and every `interval` steps before it, back to
        where a running mean of this `decay` has forgotten all but a hundredth.
        """
        ahead = [boundary - step for boundary in self.boundaries[:-1] if boundary >= step]
        return bool(ahead) and ahead[0] % interval == 0 and decay ** ahead[0] >= _FORGOTTEN

    def steps_left(self, step: int) -> int:
        """Steps until the period ends, this one included: 1 at the step after which redundant groups are zero."""
        return self.boundaries[self.period(step)] - step

    def share(self, step: int, target: float) -> float:
        """Share to be removed by the end of the step's period, s_j = s·(1 − (1 − j/P)³): a cubic ramp up to s."""
        return target * (1 - (1 - self.period(step) / self.periods) ** 3)
