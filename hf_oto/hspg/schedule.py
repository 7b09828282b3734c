"""Step -> stage, period and share to reach: pure functions of the settings and the number of steps."""

from __future__ import annotations

from dataclasses import dataclass
from operator import index

from ..config import OTOConfig

_FORGOTTEN = 0.01  # what older steps together weigh in a running mean that is not worth gathering any more


@dataclass(frozen=True)
class Leg:
    """
    The part of a run that leads to one size: groups go, then what is left recovers.

    Args:
        share (`float`): What is removed of the dense model at its end, and `before` what was at its start.
        start (`int`): Its first step.
        boundaries (`tuple[int, ...]`):
            First step of every pruning period, then the first step of recovery: b_0 < b_1 < … < b_P. In the mode
            without a target it is `(N_p,)`.
        end (`int`): The first step after it.
    """

    before: float
    share: float
    start: int
    boundaries: tuple[int, ...]
    end: int

    @property
    def periods(self) -> int:
        return len(self.boundaries) - 1


def leg_ends(total_steps: int, sizes: int) -> list[int]:
    """
    Where the legs of a run end, one for each of its sizes: of M sizes the first gets two parts of M + 1, each of the
    others one. The first leg is where the task is learnt; those after it go on from a model that knows it.
    """
    return [round(total_steps * (size + 2) / (sizes + 1)) for size in range(sizes)]


@dataclass(frozen=True)
class Schedule:
    """
    The stages of one run, in optimizer steps counted from 0.

    Args:
        total_steps (`int`): Steps of the run, N.
        legs (`tuple[Leg, ...]`): One for every milestone, and the last one for the target.
    """

    total_steps: int
    legs: tuple[Leg, ...]

    @classmethod
    def from_config(cls, config: OTOConfig, total_steps: int) -> Schedule:
        """
        Lay out the stages. A leg with fewer steps of pruning than periods has as many periods as that.

        Of a leg, groups go from `pruning_start_ratio` to `pruning_end_ratio` of its steps. Those after the first leg
        have no warm-up, which is left out of both their shares: pruning and recovery keep their proportion.

        Raises:
            `TypeError`: `total_steps` is no integer, not even one of numpy's.
            `ValueError`: There is no step of pruning in the run, or in one of its legs.
        """
        total_steps = _counted(total_steps)
        if total_steps < 1:
            raise ValueError(
                f"`total_steps` must be at least 1, got {total_steps}: nothing would be trained. Train longer."
            )
        first = config.pruning_start_ratio
        if config.target_sparsity is None:
            return cls(total_steps, (Leg(0.0, 0.0, 0, (round(first * total_steps),), total_steps),))
        shares = (*config.milestones, config.target_sparsity)
        legs: list[Leg] = []
        start, before = 0, 0.0
        for share, end in zip(shares, leg_ends(total_steps, len(shares)), strict=True):
            warmup, pruned = first, config.pruning_end_ratio
            if legs:
                warmup, pruned = 0.0, (pruned - first) / (1 - first)
            begins, ends = (start + round(part * (end - start)) for part in (warmup, pruned))
            periods = min(config.pruning_periods, ends - begins)
            if periods < 1:
                raise ValueError(_too_short(config, total_steps, share, end - start))
            boundaries = tuple(begins + (ends - begins) * period // periods for period in range(periods + 1))
            legs.append(Leg(before, share, start, boundaries, end))
            start, before = end, share
        return cls(total_steps, tuple(legs))

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Those of all legs, one after the other."""
        return tuple(boundary for leg in self.legs for boundary in leg.boundaries)

    @property
    def periods(self) -> int:
        """Pruning periods of the leg that has the fewest."""
        return min(leg.periods for leg in self.legs)

    def leg(self, step: int) -> Leg:
        """The leg that a step belongs to; after the run the last one."""
        return next((leg for leg in self.legs if step < leg.end), self.legs[-1])

    def stage(self, step: int) -> str:
        """`"warmup"`, `"pruning"` or `"recovery"`; without a target `"warmup"` or `"half-space"`."""
        leg = self.leg(step)
        if step < leg.boundaries[0]:
            return "warmup"
        if not leg.periods:
            return "half-space"
        return "pruning" if step < leg.boundaries[-1] else "recovery"

    def period(self, step: int) -> int:
        """The period j in 1 … P of its leg that a step of the pruning stage belongs to."""
        return sum(step >= boundary for boundary in self.leg(step).boundaries)

    def starts_period(self, step: int) -> bool:
        """Whether groups are selected at this step."""
        return step in self.leg(step).boundaries[:-1]

    def period_end(self, steps_done: int) -> Leg | None:
        """The leg one of whose periods has ended after so many steps."""
        return next((leg for leg in self.legs if steps_done in leg.boundaries[1:]), None)

    def observed(self, step: int, interval: int, decay: float) -> bool:
        """
        Whether saliency is gathered at a step: at every selection, and every `interval` steps before it, back to
        where a running mean of this `decay` has forgotten all but a hundredth.
        """
        selections = (selection for leg in self.legs for selection in leg.boundaries[:-1])
        ahead = next((selection - step for selection in selections if selection >= step), None)
        return ahead is not None and ahead % interval == 0 and decay**ahead >= _FORGOTTEN

    def steps_left(self, step: int) -> int:
        """Steps until the period ends, this one included: 1 at the step after which redundant groups are zero."""
        return self.leg(step).boundaries[self.period(step)] - step

    def share(self, step: int) -> float:
        """
        Share to be removed by the end of the step's period: a cubic ramp within its leg, from the share r that was
        removed before to its own s, s_j = r + (s − r)·(1 − (1 − j/P)³).
        """
        leg, period = self.leg(step), self.period(step)
        if period == leg.periods:
            return leg.share  # to the bit
        return leg.before + (leg.share - leg.before) * (1 - (1 - period / leg.periods) ** 3)

    def reached(self, steps_done: int) -> float | None:
        """The share that is removed exactly after so many steps: in a recovery, up to the leg's end. Else `None`."""
        legs = [leg for leg in self.legs if leg.periods and leg.boundaries[-1] <= steps_done]
        return legs[-1].share if legs and (steps_done <= legs[-1].end or legs[-1] is self.legs[-1]) else None

    def finished(self, steps_done: int) -> float | None:
        """The share whose leg ends after so many steps."""
        return next((leg.share for leg in self.legs if leg.periods and steps_done == leg.end), None)

    def too_late(self, steps_done: int, total_steps: int) -> str:
        """Why a run of which so many steps are done cannot be laid out anew."""
        return (
            f"`total_steps`={total_steps} comes too late: {steps_done} of {self.total_steps} steps are taken, in "
            f"stage {self.stage(steps_done)!r}. Make the model and its optimizer anew, or go on with "
            f"`total_steps`={self.total_steps}."
        )


def _counted(total_steps: int) -> int:
    if isinstance(total_steps, bool) or not hasattr(total_steps, "__index__"):
        raise TypeError(
            f"`total_steps` must be an integer, got {total_steps!r}. Give the number of optimizer steps that the run "
            f"has, such as `len(loader) * epochs` where each batch is one, rounded up."
        )
    return index(total_steps)


def _too_short(config: OTOConfig, total_steps: int, share: float, steps: int) -> str:
    part = f", of which {steps} lead to {share:g}," if config.milestones else ""
    remedy = ", name fewer `milestones`" if config.milestones else ""
    return (
        f"Pruning needs at least 1 step, but a run of {total_steps} steps{part} has none between "
        f"`pruning_start_ratio`={config.pruning_start_ratio} and `pruning_end_ratio`={config.pruning_end_ratio}. "
        f"Train longer{remedy}, or move the two apart."
    )
