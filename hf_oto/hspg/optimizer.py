r"""HSPG, the half-space stochastic projected gradient method, around any `torch.optim.Optimizer`.

Symbols of OTO (Chen et al., NeurIPS 2021, arXiv:2107.07467), section 3.2, and where they are here:

| symbol | meaning | here |
| --- | --- | --- |
| x_k | weights before the step | `before` of [`half_space_step`] |
| x̂ | trial iterate: the base optimizer's step, less the penalty | [`penalized`] |
| α_k | step size | `lr` of the parameter group |
| λ | weight of the penalty | `OTOConfig.lmbda`; with a target each group's own λ_g |
| ε | half-space parameter | `OTOConfig.epsilon` |
| N_p | first half-space step | `OTOConfig.pruning_start_ratio`, in steps |

Shapes: `G` all groups of the chosen structures, `A` the groups acted on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..config import OTOConfig
from ..models.groups import GroupArray, Partition
from . import budget, devices, progress, selection, shrinking
from .acted_weights import ActedWeights, ZeroWeights
from .base_optimizers import (
    add_group,
    check_kind,
    check_names,
    check_state,
    check_trained,
    makes_state,
    named_parameters,
)
from .group_weights import Places, squared_norms
from .saliency import Observations, gathered_derivatives, update_saliency
from .saved_state import KEPT, REDUNDANT, SALIENCY, SETTINGS, STATUS, STEP, ZERO, begin, bring, check_saved, settings
from .schedule import Schedule
from .sharding import check_sharding


class HSPG(Optimizer):
    r"""
    Drives whole zero-invariant groups to zero while a base optimizer trains the model.

    The base optimizer takes its step as always, with its own betas, schedule and weight decay; HSPG then acts on the
    redundant groups only. It shares `param_groups` and `state` with the base optimizer, and what it keeps itself
    travels in the first parameter group, so that a `state_dict` resumes exactly.

    With `config.target_sparsity`, groups of the lowest saliency per cost become redundant at the start of every
    pruning period and are exactly zero, with their optimizer state, at its end. With `None` it is HSPG as published.

    Args:
        base_optimizer (`torch.optim.Optimizer`):
            Built from named parameters, so that its parameter groups carry `param_names`. All that the groups own must
            be in it.
        partition ([`~hf_oto.models.groups.Partition`]):
            The groups, from [`partition`].
        config ([`OTOConfig`]):
            The settings.
        total_steps (`int`):
            Optimizer steps of the run, N.

    Raises:
        `ValueError`, `TypeError`: Parameters without names, groups whose weights are not in the optimizer or sharded
            in another way than by FSDP2's `fully_shard`, an optimizer that cannot be wrapped or is of another run, a
            target that cannot be reached, or a schedule that does not fit in the run.

    Example:

    ```python
    optimizer = HSPG(torch.optim.AdamW(model.named_parameters(), lr=3e-5), partition(model), OTOConfig(), 1000)
    ```
    """

    def __init__(self, base_optimizer: Optimizer, partition: Partition, config: OTOConfig, total_steps: int) -> None:
        check_kind(base_optimizer, HSPG)
        self.base_optimizer = base_optimizer
        self.partition = partition
        self.config = config
        self.schedule = Schedule.from_config(config, total_steps)
        budget.check_target(partition, config)
        budget.check_milestones(partition, config)
        self._arrays = self._present(partition)
        if not self._arrays:
            raise ValueError(f"`partition` has no groups of the kinds in `structures`={config.structures} left.")
        check_names(base_optimizer, self._arrays)
        super().__init__(base_optimizer.param_groups, base_optimizer.defaults)
        self._share()
        check_sharding(self._owned())
        begin(self.param_groups, settings(config, partition, self.schedule.total_steps), self._num_groups)

    def __repr__(self) -> str:
        return f"HSPG({type(self.base_optimizer).__name__}, step {self.steps_done}, {self.stage}, {self.metrics()})"

    def __getstate__(self) -> dict[str, Any]:
        """All of it, for copies: torch's own keeps what every optimizer has."""
        mine = ("base_optimizer", "partition", "config", "schedule", "_arrays")
        return {**super().__getstate__(), **{name: vars(self)[name] for name in mine}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """Use the base optimizer's own lists, and forget what was made from the old ones."""
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state
        self._observations = Observations(self.config.saliency)
        self._acting: ActedWeights | bool | None = None  # what the penalty acts on; False where it is nothing
        self._zero: ZeroWeights | None = None  # what is zero for good
        self._settled: bool | None = None  # whether it stays zero by itself, once that was asked
        self._checked = False  # whether the parameters are sharded in a way that is supported

    # The step.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take the base optimizer's step, then HSPG's on the groups it acts on. Returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        owned, step = self._owned(), self.steps_done
        if bring(self._kept, devices.shared(owned)):  # the user has moved the weights, and the state that he knows of
            self._share()
        if not self._checked:  # accelerate shards them after the construction
            check_sharding(owned)
            self._checked = True
        if STATUS not in self._kept:
            self._begin()
        if makes_state(self, owned):
            self.base_optimizer.step()
            return loss
        self._remember()
        if self.config.target_sparsity and self.schedule.starts_period(step):
            self._select(step)
        acting = self._acted_on(step)
        if acting is not None:
            acting.look()
        self.base_optimizer.step()
        if step == 0:
            check_state(self.base_optimizer, owned)
        if self._ends_period(step):
            status_G = self._kept[STATUS]
            status_G.masked_fill_(status_G == REDUNDANT, ZERO)
            self._acting, self._zero, self._settled = None, None, None
        self._keep_zero(step)
        if acting is not None:
            self._half_space_step(acting, step)
        self._kept[STEP] = step + 1
        return loss

    def _begin(self) -> None:
        """Find the groups that are zero whole. Now the weights are where they will be, on their rank and device."""
        if self.config.target_sparsity is None:  # every group is acted on from now on
            check_trained(self._owned(), self.steps_done)
        zero_G = squared_norms(self._arrays, self._places()) == 0
        self._kept[SALIENCY] = torch.zeros(len(zero_G), dtype=torch.float32, device=zero_G.device)
        self._kept[STATUS] = zero_G.to(torch.uint8) * ZERO

    def _remember(self) -> None:
        """Move the running mean of the saliency by what was observed since the last step."""
        if not self._observations:
            self.observe()
        if self._observations:
            decay = self.config.saliency_decay**self.config.saliency_interval
            update_saliency(self._kept[SALIENCY], self._observations.mean(), decay)
        self._observations.clear()

    def _select(self, step: int) -> None:
        """Make the groups of the lowest saliency per cost redundant, for what the period has to remove."""
        check_trained(self._owned(), step)
        status_G = self._kept[STATUS]
        share, gathered_G, alive_G = self.schedule.share(step), self._kept[SALIENCY], status_G.cpu() == KEPT
        saliency_G = selection.saliency(self.partition, self._arrays, self.config, gathered_G, self._places(), step)
        chosen_G = selection.choose(self.partition, self._arrays, self.config, saliency_G, alive_G, share)
        status_G.masked_fill_(chosen_G.to(status_G.device), REDUNDANT)
        self._acting = None

    def _acted_on(self, step: int) -> ActedWeights | None:
        """What this step's penalty and test act on: redundant groups, or every group without a target."""
        published = self.config.target_sparsity is None
        if not published and (self.stage != "pruning" or self._ends_period(step)):
            return None
        if self._acting is None:
            status_G = self._kept[STATUS]
            groups = selection.indices(status_G >= 0 if published else status_G == REDUNDANT, self._arrays)
            some = any(len(each) for each in groups)
            self._acting = some and ActedWeights(self._arrays, groups, self._places(), keeps=not published)
        return self._acting if isinstance(self._acting, ActedWeights) else None

    def _half_space_step(self, acting: ActedWeights, step: int) -> None:
        if self.config.target_sparsity is not None:
            acting.step(epsilon=self.config.epsilon, steps_left=self.schedule.steps_left(step), lmbda=0.0)
            return
        epsilon = None if self.stage == "warmup" else self.config.epsilon
        zero_A = acting.step(epsilon=epsilon, steps_left=None, lmbda=self.config.lmbda)
        status_G = self._kept[STATUS]
        groups_A = acting.groups_A
        status_G.index_copy_(0, groups_A, status_G[groups_A].masked_fill_(zero_A, ZERO))

    def _ends_period(self, step: int) -> bool:
        """Whether redundant groups are zero for good after this step."""
        return self.stage == "pruning" and self.schedule.steps_left(step) == 1

    def _keep_zero(self, step: int) -> None:
        """
        What is zero stays zero. Without a target the projection itself sees to it.

        Its gradients are zero. Once its optimizer state is zero too, a base optimizer that moves every weight by these
        alone leaves it where it is. After any other, and where a penalty or noise moves it, it is cleared each step.
        Which it is, is asked once after every period: the answer waits for the device.
        """
        if self.config.target_sparsity is None or self._settled:
            return
        if self._zero is None:
            self._zero = ZeroWeights(self._arrays, self._kept[STATUS] == ZERO, self._places())
        if self._settled is None and not self._ends_period(step):
            self._settled = shrinking.moves_each_by_itself(self.base_optimizer) and not self._zero.moved()
        if self._settled:
            self._zero = None
        else:
            self._zero.clear(self.state)

    @torch.no_grad()
    def observe(
        self, *, loss_scale: float | Tensor = 1.0, accumulated: bool = False, weight: float | Tensor = 1.0
    ) -> None:
        """
        Gather saliency from the gradients that `backward` just left, raw: before clipping.

        Call it after every micro-step. Without a call, [`~HSPG.step`] does it with the gradients that it finds. It
        does nothing in the steps between two observations, after the last selection and without a target.

        Args:
            loss_scale (`float` or `Tensor`, *optional*, defaults to 1.0):
                What the loss was multiplied by: `GradScaler.get_scale()`, or without a wait for the device
                `GradScaler.scale(torch.ones_like(loss))`.
            accumulated (`bool`, *optional*, defaults to `False`):
                Whether the gradients were added to those of the last call. A derivative is linear in them, so the
                micro-step's own is the difference.
            weight (`float` or `Tensor`, *optional*, defaults to 1.0):
                How much it counts: in proportion to the rows that its loss is the mean of. On every rank the same.
        """
        if self.observes:
            gathered_G = gathered_derivatives(self._arrays, self._places()) / loss_scale
            self._observations.add(gathered_G, accumulated=accumulated, weight=weight)

    @property
    def observes(self) -> bool:
        """Whether [`~HSPG.observe`] looks at the step's gradients."""
        if not self.config.target_sparsity or self.config.saliency in ("magnitude", "random"):
            return False
        return self.schedule.observed(self.steps_done, self.config.saliency_interval, self.config.saliency_decay)

    # Where the run stands.

    @property
    def steps_done(self) -> int:
        """Optimizer steps taken."""
        return self._kept[STEP]

    @property
    def stage(self) -> str:
        """Stage of the next step: `"warmup"`, `"pruning"`, `"recovery"`, or `"half-space"` without a target."""
        return self.schedule.stage(self.steps_done)

    @property
    def target_reached(self) -> bool:
        """Whether all that was to be removed is exactly zero. Never without a target."""
        target = self.config.target_sparsity
        return target is not None and (target == 0 or self.steps_done >= self.schedule.boundaries[-1])

    @property
    def milestone_reached(self) -> float | None:
        """The milestone, or the target, that is removed exactly now; `None` while groups go and before any do."""
        return self.schedule.reached(self.steps_done)

    @property
    def milestone_due(self) -> float | None:
        """The milestone, or the target at the end of the run, whose model is finished now; `None` at other steps."""
        return self.schedule.finished(self.steps_done)

    def zero_masks(self, *, measured: bool = False) -> dict[tuple[int, str], Tensor]:
        """
        Which of the groups that the model has now are zero for good: (layer, kind) -> bool `[G]`, on the CPU. Empty
        before the first step. If `measured`, less those that were written to since: sharded, every rank has to ask.
        """
        if STATUS not in self._kept:
            return {}
        held_G = (squared_norms(self._arrays, self._places()) == 0).cpu() if measured else True
        return selection.masks((self._kept[STATUS] == ZERO).cpu() & held_G, self._arrays)

    def metrics(self) -> dict[str, float]:
        """
        `group_sparsity`, `removed_params` and `removed_macs` are shares in [0, 1] of the chosen structures of the
        dense architecture, `heads` and `neurons` count what the whole model has left; in the unit `"latency"` also
        `removed_latency`, of the whole model's time by the table; with milestones `milestone`, what the run goes for.
        """
        aim = self.schedule.leg(self.steps_done).share
        return progress.metrics(self.partition, self.config, self.zero_masks(), aim)

    # Shrinking.

    @property
    def unshrinkable(self) -> str | None:
        """Why zero groups cannot be cut out while training goes on, `None` if they can."""
        return shrinking.unshrinkable(self.base_optimizer, self.config)

    @property
    def shrink_due(self) -> bool:
        """
        Whether it pays to cut the zero groups out now, before the next step ([`~hf_oto.shrink`]): a pruning period
        has just ended, and a tenth or more of the multiply-accumulates that the blocks have left are of zero groups;
        where a milestone or the target is reached any that are. Never without a target.
        """
        leg = self.schedule.period_end(self.steps_done)
        if leg is None or self.unshrinkable is not None:
            return False
        masks = ((kind, mask) for (_, kind), mask in self.zero_masks().items())
        return shrinking.pays(self.partition, self.config, masks, last=self.steps_done == leg.boundaries[-1])

    def shrink(self, partition: Partition, kept: Sequence[Tensor], cuts: shrinking.Cuts) -> None:
        """
        Go on with the parameters that a cut has left. [`~hf_oto.shrink`] cuts the model and calls this.

        Args:
            partition ([`~hf_oto.models.groups.Partition`]):
                The groups of the cut model.
            kept (`Sequence[Tensor]`):
                For every array of the groups so far, which were kept: bool `[G]`.
            cuts (`Mapping[Tensor, tuple[Tensor | None, int, Tensor]]`):
                For every parameter that was cut: its successor (`None` where nothing is left), the dim along which it
                was cut, and the indices kept.
        """
        shrinking.cut_parameters(self.param_groups, self.state, cuts)
        present = zip(self.partition.arrays, kept, strict=True)
        keep_G = torch.cat([keep for array, keep in present if array in self._arrays])
        for name in (SALIENCY, STATUS):
            if name in self._kept:
                values_G = self._kept[name]
                self._kept[name] = values_G[keep_G.to(values_G.device)]
        self.partition, self._arrays = partition, self._present(partition)
        self._share()

    # What is kept in the first parameter group, and what is the base optimizer's.

    @property
    def _kept(self) -> dict[str, Any]:
        return self.param_groups[0]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add to the base optimizer, whose parameter groups these are."""
        if hasattr(self, "_observations"):
            add_group(self.base_optimizer, param_group, self._arrays)
        else:  # torch's own constructor hands over the groups that are there
            super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Go on where the saved run was.

        Raises:
            `ValueError`: The state is not of an HSPG run with the same settings, parameters, groups and number of
                steps, or of a version of hf_oto that wrote it in another format.
        """
        check_saved(state_dict["param_groups"], self.param_groups, self._num_groups)
        self.base_optimizer.load_state_dict(state_dict)
        self._share()

    def reschedule(self, total_steps: int) -> None:
        """
        Lay the stages out anew, for a run of another number of steps N that has not begun: what was gathered or found
        before its first step is forgotten.

        Raises:
            `ValueError`: A step was taken already, or the schedule does not fit in so many. Nothing is changed then.
        """
        if self.steps_done:
            raise ValueError(self.schedule.too_late(self.steps_done, total_steps))
        self.schedule = Schedule.from_config(self.config, total_steps)
        for name in (SALIENCY, STATUS):
            self._kept.pop(name, None)
        self._kept[SETTINGS] = settings(self.config, self.partition, self.schedule.total_steps)
        self._share()

    def train(self) -> None:
        """Go to training mode, where the base optimizer has one (Defazio et al., arXiv:2405.15682)."""
        if hasattr(self.base_optimizer, "train"):
            self.base_optimizer.train()

    def eval(self) -> None:
        """Go to evaluation mode, where the base optimizer has one: weights are then those to evaluate and save."""
        if hasattr(self.base_optimizer, "eval"):
            self.base_optimizer.eval()

    # Groups -> the parameters as they are now.

    def _present(self, partition: Partition) -> list[GroupArray]:
        return [array for array in partition.arrays if array.kind in self.config.structures and array.count]

    @property
    def _num_groups(self) -> int:
        return sum(array.count for array in self._arrays)

    def _places(self) -> Places:
        return {name: (parameter, group) for name, parameter, group in named_parameters(self.param_groups)}

    def _owned(self) -> dict[str, Tensor]:
        """The parameters that groups own a part of, by name."""
        places = self._places()
        return {name: places[name][0] for array in self._arrays for name, _ in array.members}
