r"""HSPG, the half-space stochastic projected gradient method, around any `torch.optim.Optimizer`.

Symbols of OTO (Chen et al., NeurIPS 2021, arXiv:2107.07467), section 3.2, and where they are here:

| symbol | meaning | here |
| --- | --- | --- |
| x_k | weights before the step | `before` of a part |
| x̂ | trial iterate: the base optimizer's step, less the penalty | `trial` |
| α_k | step size | `lr` of the parameter group |
| λ | weight of the penalty | `OTOConfig.lmbda`; with a target each group's own λ_g |
| ε | half-space parameter | `OTOConfig.epsilon` |
| N_p | first half-space step | `OTOConfig.warmup_ratio`, in steps |

Shapes: `G` all groups of the chosen structures, `A` the groups acted on, `P` positions along a parameter's dim.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..config import OTOConfig
from ..models.groups import GroupArray, Partition
from . import budget
from .parts import (
    Part,
    Reading,
    can_clear,
    check_sharding,
    from_first_rank,
    local,
    marks_of,
    parts_of,
    sum_over_shards,
)
from .saliency import mask_derivatives, saliency_of, update_saliency
from .schedule import Schedule

KEPT, REDUNDANT, ZERO = 0, 1, 2

# These move every weight by its own gradient and state alone, so they do the same where the zeros are gone. Others,
# such as Adafactor, average over rows and columns. A subclass may do anything.
_ELEMENTWISE = (
    *(torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam, torch.optim.SGD),
    *(torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.ASGD, torch.optim.RMSprop, torch.optim.Rprop),
)

# Copying what is left costs about a step; under torch.compile every new shape is compiled, and torch gives up after 8.
_SHRINK_SHARE = 0.1

# Entries that are acted on at once: beside what redundant groups weigh, a step holds a copy of so many. On a CPU they
# stay in its cache; elsewhere every piece is some more kernels to launch.
_PIECE, _PIECE_ON_CPU = 2**22, 2**17

# What settings were before there was a choice: states written then do not name them.
_OLDER_SETTINGS = {
    "format": 1,
    "shrink_during_training": False,
    "saliency_interval": 1,
    "keep_dropout": True,
    "latency_table": None,
}

# What HSPG keeps in the first parameter group, from where `state_dict` and distributed checkpoints take it.
_STEP, _SETTINGS, _SALIENCY, _STATUS = "hspg_step", "hspg_settings", "hspg_saliency", "hspg_status"

# What these mean, and how a run goes on from them. A version that reads an older one as it was meant counts up and
# lists both; one that cannot refuses it.
_FORMAT = 1


def _cut(value: object) -> str:
    """A setting in words, a whole table by its beginning."""
    text = str(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def penalized(step: Tensor, before: Tensor, factor: Tensor | float) -> Tensor:
    """The trial iterate x̂_g = x⁺_g − c_g·x_g, in place of x⁺, the base optimizer's step.

    As published c_g = αλ/‖x_g‖ (OTO, arXiv:2107.07467, section 3.2). With a target λ_g = ‖x_g‖/(α·r), so c_g = 1/r:
    with r steps left the penalty takes the r-th part of the group away, and all that is left at the last step.

    Shapes: all alike, or a factor that broadcasts.
    """
    return step.sub_(before * factor) if isinstance(factor, Tensor) else step.sub_(before, alpha=factor)


def outside_half_space(dot_A: Tensor, sq_norm_A: Tensor, epsilon: float) -> Tensor:
    """Which groups' trial iterates left the half-space: ⟨x̂_g, x_g⟩ < ε‖x_g‖². A group that is zero has none: outside.

    Shapes: [A], [A] -> bool [A]. OTO (arXiv:2107.07467), half-space step.
    """
    return (dot_A < epsilon * sq_norm_A) | (sq_norm_A == 0)


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
        `ValueError`: Parameters without names, groups whose weights are not in the optimizer or sharded in another way
            than by FSDP2's `fully_shard`, a target that cannot be reached, or a schedule that does not fit in the run.

    Example:

    ```python
    optimizer = HSPG(torch.optim.AdamW(model.named_parameters(), lr=3e-5), partition(model), OTOConfig(), 1000)
    ```
    """

    def __init__(self, base_optimizer: Optimizer, partition: Partition, config: OTOConfig, total_steps: int) -> None:
        self.base_optimizer = base_optimizer
        self.partition = partition
        self.config = config
        self.schedule = Schedule.from_config(config, total_steps)
        budget.check_target(partition, config)
        self._arrays = self._present(partition)
        self._check_names()
        super().__init__(base_optimizer.param_groups, base_optimizer.defaults)
        self._share()
        check_sharding(self._owned())
        self._first_group.setdefault(_STEP, 0)
        self._first_group.setdefault(_SETTINGS, json.dumps(self._settings(), sort_keys=True))

    def __repr__(self) -> str:
        return f"HSPG({type(self.base_optimizer).__name__}, step {self.steps_done}, {self.stage}, {self.metrics()})"

    # What is shared, and what is kept.

    def _share(self) -> None:
        """Use the base optimizer's own lists, and forget what was made from the old ones."""
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state
        self._observed: Tensor | None = None  # sum over this step's micro-steps
        self._micro_steps = 0
        self._gathered: Tensor | None = None  # derivatives of the gradients gathered so far in this step
        self._acting: list[Part] | None = None  # parts of the groups that the penalty acts on
        self._reading: Reading | None = None  # what they were left with by the last step
        self._frozen: list[Part] | None = None  # parts of the groups that are zero
        self._settled = False  # whether they stay zero by themselves
        self._checked = False  # whether the parameters are sharded in a way that is supported

    def _present(self, partition: Partition) -> list[GroupArray]:
        return [array for array in partition.arrays if array.kind in self.config.structures and array.count]

    @property
    def _first_group(self) -> dict[str, Any]:
        return self.param_groups[0]

    def _settings(self) -> dict[str, Any]:
        counts = [array.count for array in self.partition.arrays]
        return {
            **self.config.to_dict(),
            "format": _FORMAT,
            "total_steps": self.schedule.total_steps,
            "groups": counts,
        }

    def _check_names(self) -> None:
        if not self._arrays:
            raise ValueError(f"`partition` has no groups of the kinds in `structures`={self.config.structures} left.")
        groups = self.base_optimizer.param_groups
        if any("param_names" not in group for group in groups):
            raise ValueError(
                "`base_optimizer` must be built from named parameters, such as AdamW(model.named_parameters()): HSPG "
                "finds the groups' weights by name."
            )
        trained = {
            name
            for group in groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
            if parameter.requires_grad
        }
        if missing := [name for array in self._arrays for name, _ in array.members if name not in trained]:
            raise ValueError(
                f"`base_optimizer` lacks {len(missing)} parameters of zero-invariant groups ({missing[0]!r}, …): they "
                f"are frozen or left out. Train them, or leave their kind out of `structures`."
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add to the base optimizer, whose parameter groups these are."""
        if hasattr(self, "_observed"):
            self.base_optimizer.add_param_group(param_group)
        else:  # torch's own constructor hands over the groups that are there
            super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Go on where the saved run was.

        Raises:
            `ValueError`: The state is not of an HSPG run with the same settings, parameters, groups and number of
                steps, or of a version of hf_oto that wrote it in another format.
        """
        saved = state_dict["param_groups"][0] if state_dict["param_groups"] else {}
        if _SETTINGS not in saved:
            raise ValueError(
                "`state_dict` holds no HSPG state, so it is of a run without compression. Start a new run from its "
                "weights instead of resuming it."
            )
        mine, others = json.loads(self._first_group[_SETTINGS]), json.loads(saved[_SETTINGS])
        others = _OLDER_SETTINGS | others
        if others["format"] != _FORMAT:
            raise ValueError(
                f"`state_dict` is of format {others['format']}, written by another version of hf_oto; this one reads "
                f"format {_FORMAT}. Resume with the version that the run began with."
            )
        if changed := sorted(name for name in mine.keys() | others.keys() if mine.get(name) != others.get(name)):
            listed = ", ".join(
                f"{name}: {_cut(others.get(name))} saved, {_cut(mine.get(name))} now" for name in changed
            )
            raise ValueError(
                f"`state_dict` is of a run with other settings ({listed}). Resume with those it began with."
            )
        if _STATUS in saved and saved[_STATUS].numel() != self._num_groups:
            raise ValueError(
                f"`state_dict` is of a model with {saved[_STATUS].numel()} groups left, this one has "
                f"{self._num_groups}. Call `shrink` with `like`, the config saved with that model, before loading."
            )
        self._check_names_of(state_dict["param_groups"])
        self.base_optimizer.load_state_dict(state_dict)
        self._share()
        device = next(local(parameter).device for group in self.param_groups for parameter in group["params"])
        for name in (_SALIENCY, _STATUS):
            if name in self._first_group:
                self._first_group[name] = self._first_group[name].to(device)

    def _check_names_of(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """torch goes by position: it would give one parameter the state of another."""
        for theirs, mine in zip(saved, self.param_groups, strict=False):  # torch itself counts the groups
            names = theirs.get("param_names", mine["param_names"])
            for name, own in zip_longest(names, mine["param_names"], fillvalue="none"):
                if name != own:
                    raise ValueError(
                        f"`state_dict` is of a model with other parameters, or of an optimizer with other groups of "
                        f"them: {name!r} saved, {own!r} now. Resume with those the run began with."
                    )

    def reschedule(self, total_steps: int) -> None:
        """
        Lay the stages out anew, for a run of another number of steps that has not begun: what was gathered or found
        before its first step is forgotten.

        Args:
            total_steps (`int`):
                Optimizer steps of the run, N.

        Raises:
            `ValueError`: A step was taken already, or the schedule does not fit in so many. Nothing is changed then.
        """
        if self.steps_done:
            raise ValueError(
                f"`total_steps`={total_steps} comes too late: {self.steps_done} of {self.schedule.total_steps} steps "
                f"are taken, in stage {self.stage!r}. Make the model and its optimizer anew, or go on with "
                f"`total_steps`={self.schedule.total_steps}."
            )
        self.schedule = Schedule.from_config(self.config, total_steps)
        for name in (_SALIENCY, _STATUS):
            self._first_group.pop(name, None)
        self._first_group[_SETTINGS] = json.dumps(self._settings(), sort_keys=True)
        self._share()

    # Where the run stands.

    @property
    def steps_done(self) -> int:
        """Optimizer steps taken."""
        return self._first_group[_STEP]

    @property
    def stage(self) -> str:
        """Stage of the next step: `"warmup"`, `"pruning"`, `"recovery"`, or `"half-space"` without a target."""
        return self.schedule.stage(self.steps_done)

    @property
    def target_reached(self) -> bool:
        """Whether all that was to be removed is exactly zero. Never without a target."""
        return self.config.target_sparsity is not None and (
            self.steps_done >= self.schedule.boundaries[-1] or self.config.target_sparsity == 0
        )

    def zero_masks(self) -> dict[tuple[int, str], Tensor]:
        """
        Which of the groups that the model has now are zero for good: (layer, kind) -> bool `[G]`, on the CPU. Empty
        before the first step.
        """
        if _STATUS not in self._first_group:
            return {}
        zero = (self._first_group[_STATUS] == ZERO).cpu().split([array.count for array in self._arrays])
        return {(array.layer, array.kind): mask for array, mask in zip(self._arrays, zero, strict=True)}

    def metrics(self) -> dict[str, float]:
        """
        Progress of the compression.

        Returns:
            `dict[str, float]`: `group_sparsity`, `removed_params` and `removed_macs` are shares in [0, 1] of the
            chosen structures of the dense architecture; `heads` and `neurons` count what the whole model has left.
            With the unit `"latency"` also `removed_latency`, the share of the whole model's time by the table.
        """
        left = {kind: sum(self.partition.counts(kind)) for kind in ("heads", "neurons")}
        for (_, kind), mask in self.zero_masks().items():
            left[kind] -= int(mask.sum())
        metrics: dict[str, float] = {}
        for name, unit in (("group_sparsity", "groups"), ("removed_params", "params"), ("removed_macs", "macs")):
            kept = sum(left[kind] * self._cost(kind, unit) for kind in self.config.structures)
            metrics[name] = 1 - kept / budget.dense_cost(self.partition, self.config, unit)
        if self.config.target_unit == "latency":
            alive_G = self._first_group[_STATUS].cpu() != ZERO if _STATUS in self._first_group else None
            metrics["removed_latency"] = self._removed(alive_G) / budget.dense_cost(self.partition, self.config)
        return {**metrics, **left}

    def _removed(self, alive_G: Tensor | None = None) -> int:
        """Cost, in the target's unit, of what has been cut out and of those that are there and not alive."""
        removed = budget.reach(self.partition, self.config).removed
        if alive_G is not None:
            costs = budget.costs_of(self.partition, self._arrays, self.config)
            for cost_g, alive_g in zip(costs, alive_G.split([array.count for array in self._arrays]), strict=True):
                removed += int(cost_g[: int((~alive_g).sum())].sum())
        return removed

    def _cost(self, kind: str, unit: str) -> int:
        return budget.group_cost(self.partition, kind, unit, self.config.macs_sequence_length)

    # Shrinking.

    @property
    def unshrinkable(self) -> str | None:
        """Why zero groups cannot be cut out while training goes on, `None` if they can."""
        base = type(self.base_optimizer)
        if base not in _ELEMENTWISE:
            return f"a step of {base.__name__} may depend on how many weights a matrix has, zeros included"
        if any(isinstance(parameter, DTensor) for group in self.param_groups for parameter in group["params"]):
            return "its parameters are sharded"
        if self.config.saliency == "random":
            return "random groups would be drawn from those that are left"
        return None

    @property
    def shrink_due(self) -> bool:
        """
        Whether it pays to cut the zero groups out now, before the next step ([`~hf_oto.shrink`]): a pruning period
        has just ended, and a tenth or more of the multiply-accumulates that the blocks have left are of zero groups;
        at the end of the last period any that are. Never without a target.
        """
        ends = self.schedule.boundaries[1:]
        if self.steps_done not in ends or self.unshrinkable is not None:
            return False
        total = sum(array.count * self._cost(array.kind, "macs") for array in self.partition.arrays)
        gone = sum(int(mask.sum()) * self._cost(kind, "macs") for (_, kind), mask in self.zero_masks().items())
        return gone >= _SHRINK_SHARE * total if self.steps_done < ends[-1] else gone > 0

    def shrink(
        self,
        partition: Partition,
        kept: Sequence[Tensor],
        cuts: Mapping[Tensor, tuple[Tensor | None, int, Tensor]],
    ) -> None:
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
        for group in self.param_groups:
            left = []
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                successor, dim, kept_P = cuts.get(parameter, (parameter, 0, None))
                if kept_P is not None and (state := self.state.pop(parameter, None)) and successor is not None:
                    self.state[successor] = {
                        key: value.index_select(dim, kept_P)
                        if isinstance(value, Tensor) and value.shape == parameter.shape
                        else value
                        for key, value in state.items()
                    }
                if successor is not None:
                    left.append((name, successor))
            group["param_names"] = [name for name, _ in left]
            group["params"] = [parameter for _, parameter in left]
        present = zip(self.partition.arrays, kept, strict=True)
        keep_G = torch.cat([keep for array, keep in present if array in self._arrays])
        for name in (_SALIENCY, _STATUS):
            if name in self._first_group:
                values_G = self._first_group[name]
                self._first_group[name] = values_G[keep_G.to(values_G.device)]
        self.partition, self._arrays = partition, self._present(partition)
        self._share()

    # Saliency.

    @torch.no_grad()
    def observe(self, *, loss_scale: float = 1.0, accumulated: bool = False) -> None:
        """
        Gather saliency from the gradients that `backward` just left, raw: before clipping.

        Call it after every micro-step. Without a call, [`~HSPG.step`] does it with the gradients that it finds. It
        does nothing in the steps between two observations, after the last selection and without a target.

        Args:
            loss_scale (`float`, *optional*, defaults to 1.0):
                What the loss was multiplied by (`GradScaler.get_scale()`).
            accumulated (`bool`, *optional*, defaults to `False`):
                Whether the gradients were added to those of the last call. A derivative is linear in them, so the
                micro-step's own is the difference.
        """
        if not self._observes:
            return
        places = self._places()
        derivatives = []
        for array in self._arrays:
            parameter, _ = places[array.columns]
            columns = local(parameter)
            if parameter.grad is None:
                derivatives.append(torch.zeros(array.count, device=columns.device))
                continue
            derivatives.append(mask_derivatives(columns, local(parameter.grad), array.width))
        gathered_G = torch.cat(derivatives) / loss_scale
        sum_over_shards(gathered_G, [places[array.columns][0] for array in self._arrays])
        if not accumulated:
            self._observed, self._micro_steps, self._gathered = None, 0, None
        own_G = gathered_G if self._gathered is None else gathered_G - self._gathered
        observed_G = saliency_of(own_G, self.config.saliency)
        self._observed = observed_G if self._observed is None else self._observed + observed_G
        self._micro_steps += 1
        self._gathered = gathered_G

    @property
    def _observes(self) -> bool:
        """Whether the step's gradients are looked at."""
        if not self.config.target_sparsity or self.config.saliency in ("magnitude", "random"):
            return False
        return self.schedule.observed(self.steps_done, self.config.saliency_interval, self.config.saliency_decay)

    def _saliency(self, step: int, cost_G: Tensor) -> Tensor:
        """Every group's score, not yet divided by its cost, of which `cost_G` is the mean in its array."""
        gathered_G = self._first_group[_SALIENCY]
        if self.config.saliency == "magnitude":
            return self._squared_norms()
        if self.config.saliency == "random":  # per cost it is the same draw for heads and neurons
            generator = torch.Generator().manual_seed(torch.initial_seed() + step)
            drawn_G = from_first_rank(torch.rand(cost_G.numel(), generator=generator).to(gathered_G.device))
            return drawn_G * cost_G.to(drawn_G.device)
        return gathered_G

    def _remember(self) -> None:
        """Move the running mean by what was observed since the last step."""
        if self._observed is None:
            self.observe()
        if self._observed is not None:
            decay = self.config.saliency_decay**self.config.saliency_interval
            update_saliency(self._first_group[_SALIENCY], self._observed / self._micro_steps, decay)
        self._observed, self._micro_steps, self._gathered = None, 0, None

    # The step.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take the base optimizer's step, then HSPG's on the groups it acts on. Returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._checked:  # accelerate shards them after the construction
            check_sharding(self._owned())
            self._checked = True
        if _STATUS not in self._first_group:
            self._begin()
        if self._makes_state():
            self.base_optimizer.step()
            return loss
        self._remember()
        step = self.steps_done
        if self.config.target_sparsity and self.schedule.starts_period(step):
            self._select(step)
        acting = self._acting_parts()
        read = self._read(acting) if acting else None
        self.base_optimizer.step()
        if step == 0:
            self._check_state()
        if read:
            self._project(acting, read, step)
        self._keep_zero()
        if self._reading:
            self._reading.marks = marks_of(acting)
        self._first_group[_STEP] = step + 1
        return loss

    def _begin(self) -> None:
        """Find the groups that are zero already. Now the weights are where they will be, on their rank and device."""
        parts = self._parts(self._all_groups())
        device = parts[0][1].positions_P.device
        columns = {array.columns for array in self._arrays}
        silencers = parts_of(self._arrays, self._all_groups(), self._places(), silencers=True)
        sums_2G = torch.zeros(2, self._num_groups, device=device)  # of |x|: the silencing rows, the columns
        for sums_G, summed in zip(sums_2G, (silencers, [each for each in parts if each[0] in columns]), strict=True):
            for _, part in summed:
                part.add_sums(sums_G, part.read().abs_())
        sum_over_shards(sums_2G, [part.parameter for _, part in parts])
        self._first_group[_SALIENCY] = torch.zeros(self._num_groups, device=device)
        self._first_group[_STATUS] = (sums_2G == 0).any(dim=0).to(torch.uint8) * ZERO

    def _makes_state(self) -> bool:
        """
        Whether a step is none of the run: `torch.distributed.checkpoint` takes one with zero step sizes and gradients,
        so that the base optimizer makes the state which is then saved or filled. No weight may move in it. Made with
        zero step sizes, an optimizer takes such steps on purpose.
        """
        if self.state or not self.defaults.get("lr") or any(group.get("lr") != 0 for group in self.param_groups):
            return False
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        if not gradients:
            return False
        found = torch.stack([gradient.count_nonzero() for gradient in gradients]).sum()
        sum_over_shards(found, self._owned().values())
        return not bool(found)

    def _check_state(self) -> None:
        """Refuse, at the first step and not in the middle of the run, a state of which no part can be set to zero."""
        for name, (parameter, _) in self._places().items():
            for value in self.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and not can_clear(value):
                    raise TypeError(
                        f"`base_optimizer` {type(self.base_optimizer).__name__} keeps a {type(value).__name__} for "
                        f"{name!r}, of which no part can be set to zero in place, as HSPG does with what is kept for "
                        f"zero groups. Use another optimizer, such as AdamW."
                    )

    @property
    def _num_groups(self) -> int:
        return sum(array.count for array in self._arrays)

    def _select(self, step: int) -> None:
        """Make the groups of the lowest saliency per cost redundant, for what the period has to remove."""
        status_G = self._first_group[_STATUS]
        counts = torch.tensor([array.count for array in self._arrays])
        costs = budget.costs_of(self.partition, self._arrays, self.config)
        limits = torch.tensor([budget.floor_and_multiple(array.kind, self.config) for array in self._arrays])
        cost_G, alive_G = torch.cat(costs), status_G.cpu() == KEPT
        usual_G = torch.cat([cost_g.double().mean().float().expand(len(cost_g)) for cost_g in costs])
        saliency_G = self._saliency(step, usual_G)
        if not bool(saliency_G.isfinite().all()):
            raise FloatingPointError(
                f"The saliency is not finite at step {step}: gradients or weights are NaN or infinite. Lower the "
                f"learning rate and go on from the last checkpoint."
            )
        total = budget.dense_cost(self.partition, self.config)
        removed = self._removed(alive_G)
        chosen_G = budget.select_groups(
            saliency_G.cpu(),
            cost_G,
            torch.arange(counts.numel()).repeat_interleave(counts),
            alive_G,
            budget.allowance(self.schedule.share(step, self.config.target_sparsity or 0.0), total) - removed,
            limits[:, 0],
            limits[:, 1],
        )
        status_G[chosen_G.to(status_G.device)] = REDUNDANT
        self._acting = None

    def _squared_norms(self) -> Tensor:
        """‖x_g‖² of every group, float32 `[G]`."""
        parts = [part for _, part in self._parts(self._all_groups())]
        sums_G = torch.zeros(self._num_groups, device=parts[0].positions_P.device)
        for part in parts:
            part.add_sums(sums_G, part.read().float().square())
        sum_over_shards(sums_G, [part.parameter for part in parts])
        return sums_G

    def _acting_parts(self) -> list[Part]:
        """What this step's penalty and projection act on: redundant groups, or every group without a target."""
        if self.config.target_sparsity is not None and self.stage != "pruning":
            return []
        if self._acting is None:
            published = self.config.target_sparsity is None
            groups = self._all_groups() if published else self._with_status(REDUNDANT)
            parts = [part for _, part in self._parts(groups)]
            entries = _PIECE_ON_CPU if parts and parts[0].positions_P.is_cpu else _PIECE
            self._acting = [piece for part in parts for piece in part.split(entries)]
        return self._acting

    def _keep_zero(self) -> None:
        """
        What is zero stays zero. Without a target the projection itself sees to it.

        The gradients of a zero group are zero. Once its optimizer state is zero too, a base optimizer that moves every
        weight by these alone leaves it where it is; after any other it is set to zero at every step.
        """
        if self.config.target_sparsity is None or self._settled:
            return
        if self._frozen is None:
            self._frozen = [part for _, part in self._parts(self._with_status(ZERO))]
        for part in self._frozen:
            part.clear()
            part.clear(self.state)
        if type(self.base_optimizer) in _ELEMENTWISE:
            self._settled, self._frozen = True, None

    def _read(self, parts: list[Part]) -> Reading:
        """What the parts hold, if need be read anew, and summed up part by part while it is cached."""
        kept, self._reading = self._reading, None
        if kept and kept.marks == marks_of(parts):
            return kept
        count = self._num_groups if self.config.target_sparsity is None else self._count(REDUNDANT)
        reading = Reading([], torch.zeros(count, device=self._first_group[_STATUS].device))
        for part in parts:
            reading.add(part, part.read())
        sum_over_shards(reading.sq_norm_A, [part.parameter for part in parts])
        return reading

    def _project(self, parts: list[Part], before: Reading, step: int) -> None:
        """
        Penalty, half-space test and projection, after the base optimizer's step.

        The trial iterate is written where it will stay, before it is known which groups are projected: beside the
        weights there is one copy of those acted on, `before`, which this uses up part by part. With a target, on a
        CPU, what is written takes its place: to read columns again takes longest of all there.
        """
        dot_A = torch.zeros_like(before.sq_norm_A)  # ⟨x̂_g, x_g⟩
        published = self.config.target_sparsity is None
        period_ends = not published and self.schedule.steps_left(step) == 1
        whole_on_cpu = all(part.parameter.is_cpu and not isinstance(part.parameter, DTensor) for part in parts)
        keeps = whole_on_cpu and not published and not period_ends
        after = Reading([], torch.zeros_like(before.sq_norm_A))
        if published:
            inverse_norm_A = before.sq_norm_A.sqrt().reciprocal().nan_to_num(posinf=0.0)
        for part in parts:
            x = before.values.pop(0)
            factor: Tensor | float
            if published:
                factor = part.along(inverse_norm_A).to(x.dtype) * (part.group["lr"] * self.config.lmbda)
            else:
                factor = 1 / self.schedule.steps_left(step)
            trial = penalized(part.read(), x, factor)
            part.write(trial)
            part.add_sums(dot_A, x.mul_(trial) if x.dtype == torch.float32 else trial.float() * x.float())
            del x
            if keeps:
                after.add(part, trial)
            del trial
        sum_over_shards(dot_A, [part.parameter for part in parts])

        zero_A = outside_half_space(dot_A, before.sq_norm_A, self.config.epsilon)
        if published and self.stage == "warmup":
            zero_A = before.sq_norm_A == 0
        if period_ends:
            for part in parts:
                part.clear()
        elif bool(zero_A.any()):
            for index, part in enumerate(parts):
                trial = after.values[index] if keeps else part.read()
                part.write(trial.masked_fill_(part.along(zero_A), 0))
            after.sq_norm_A.masked_fill_(zero_A, 0)
        if keeps:
            self._reading = after
        if published:
            self._first_group[_STATUS].masked_fill_(zero_A, ZERO)
        elif period_ends:
            status_G = self._first_group[_STATUS]
            status_G[status_G == REDUNDANT] = ZERO
            self._acting = self._frozen = None
            self._settled = False

    # Groups -> parts of the parameters as they are now.

    def _places(self) -> dict[str, tuple[Tensor, dict[str, Any]]]:
        """Parameter and parameter group by name, resolved now: accelerate swaps the parameters under FSDP2."""
        return {
            name: (parameter, group)
            for group in self.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        }

    def _owned(self) -> dict[str, Tensor]:
        """The parameters that groups own a part of, by name."""
        places = self._places()
        return {name: places[name][0] for array in self._arrays for name, _ in array.members}

    def _all_groups(self) -> list[Tensor]:
        return [torch.arange(array.count) for array in self._arrays]

    def _with_status(self, status: int) -> list[Tensor]:
        """The groups of a status, array by array."""
        found_G = (self._first_group[_STATUS] == status).cpu()
        return [mask.nonzero().flatten() for mask in found_G.split([array.count for array in self._arrays])]

    def _count(self, status: int) -> int:
        return sum(part.numel() for part in self._with_status(status))

    def _parts(self, groups: Sequence[Tensor]) -> list[tuple[str, Part]]:
        """Everything that groups, given array by array, own: the parameter's name and the part of it."""
        return parts_of(self._arrays, groups, self._places())
