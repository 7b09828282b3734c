"""Every compression setting, validated, to and from JSON, and the table of latencies that one of them may hold."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .renamed import OLD_SETTINGS, read_old_names, renamed

CONFIG_NAME = "oto_config.json"

TARGET_UNITS = ("params", "macs", "groups", "latency")
STRUCTURES = ("heads", "neurons")
SALIENCIES = ("fisher", "taylor", "magnitude", "random")
if TYPE_CHECKING:
    Names = Sequence[str]  # any; a tuple once it is in the config
    Shares = Sequence[float]
else:
    Names = list[str]  # into which `HfArgumentParser` reads several words
    Shares = list[float]

_COUNTS = ("num_layers", "hidden_size", "head_size", "queries", "dense_heads", "dense_neurons", "total")
_CONDITIONS = ("batch_size", "sequence_length", "threads")
_METHODS = ("clock", "CUDA graph", "device events")
_WORDS = ("model_type", "device", "dtype", "attention", "torch")

_OLD_NAMES = {"length": "sequence_length"}


@renamed(**_OLD_NAMES)
@dataclass(frozen=True)
class LatencyTable:
    """
    Latency of one architecture on one device, as [`~hf_oto.measure_latency`] finds it: `total` for the dense model,
    and less by what the curves say for the heads and neurons that a block has lost. Between two points of a curve the
    time is linear.

    Args:
        model_type (`str`): The dense family.
        num_layers, hidden_size, head_size, queries, dense_heads, dense_neurons (`int`):
            Its sizes, as in [`~hf_oto.models.groups.Partition`].
        total (`int`): Nanoseconds of a forward of the dense model, with all that is never pruned.
        heads, neurons (`tuple[tuple[int, int], ...]`):
            (kept, nanoseconds) from none to all: what one block takes above one that keeps none.
        batch_size, sequence_length (`int`): Sequences of the batch that was timed, and tokens of each.
        threads (`int`): Threads of one operation.
        device, dtype, attention, torch (`str`): Where and how it was timed: the device's name, the weights' dtype, the
            attention implementation and PyTorch's version.
        method (`str`, *optional*, defaults to `"clock"`):
            What was timed: `"clock"`, what passed on the CPU; `"CUDA graph"` or `"device events"`, what an accelerator
            took, without the host's launching.

    Raises:
        `ValueError`, `TypeError`: A number or a curve is none that a measurement can give; the message names it.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    head_size: int
    queries: int
    dense_heads: int
    dense_neurons: int
    total: int
    heads: tuple[tuple[int, int], ...]
    neurons: tuple[tuple[int, int], ...]
    batch_size: int
    sequence_length: int
    threads: int
    device: str
    dtype: str
    attention: str
    torch: str
    method: str = "clock"

    def __post_init__(self) -> None:
        for name in (*_COUNTS, *_CONDITIONS):
            _check_integer(f"latency_table.{name}", getattr(self, name), 1)
        for name in _WORDS:
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"`latency_table.{name}` must be a string, got {getattr(self, name)!r}.")
        if self.method not in _METHODS:
            raise ValueError(f"`latency_table.method` must be one of {', '.join(_METHODS)}, got {self.method!r}.")
        for kind in STRUCTURES:
            curve = _curve(kind, getattr(self, kind), getattr(self, f"dense_{kind}"))
            object.__setattr__(self, kind, curve)
        blocks = self.num_layers * sum(getattr(self, kind)[-1][1] for kind in STRUCTURES)
        if blocks > self.total:
            raise ValueError(
                f"`latency_table.total` must be at least what heads and neurons of all blocks take, {blocks}, got "
                f"{self.total}. Measure it anew."
            )

    @property
    def conditions(self) -> str:
        """Where and how it was timed, in words."""
        how = "" if self.method == "clock" else f" by {self.method}"
        return (
            f"batch {self.batch_size} x {self.sequence_length} tokens, {self.dtype}, {self.attention} attention, "
            f"{self.device}{how}, {self.threads} thread{'s' if self.threads > 1 else ''}, torch {self.torch}"
        )

    def goes_whole(self, kind: str) -> bool:
        """
        Whether a target takes all of a kind of a block or none: on an accelerator, where more than half of what they
        take is the price of launching their kernels, which goes only with the last of them.
        """
        return self.method != "clock" and 2 * _price_of_kernels(curve := getattr(self, kind)) > curve[-1][1]

    def saved(self, kind: str) -> tuple[int, ...]:
        """Nanoseconds that a block saves with its first, second, … group of a kind to go. None is below 1."""
        return _saved(getattr(self, kind))

    def to_dict(self) -> dict[str, Any]:
        """The table as plain JSON values."""
        curves = {kind: [list(point) for point in getattr(self, kind)] for kind in STRUCTURES}
        values = {**dataclasses.asdict(self), **curves}
        if self.method == "clock":  # as tables were before there was another
            del values["method"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LatencyTable:
        """The table of [`~LatencyTable.to_dict`]'s result. Raises `ValueError` on a missing or an unknown name."""
        values = read_old_names(values, _OLD_NAMES)
        names = {field.name for field in dataclasses.fields(cls)}
        if wrong := sorted(names - {"method"} ^ set(values) - {"method"}):
            missing, unknown = sorted(names - {"method"} - set(values)), sorted(set(values) - names)
            listed = [f"lacks {missing}"] * bool(missing) + [f"has {unknown}, which is nothing of it"] * bool(unknown)
            raise ValueError(f"`latency_table` {' and '.join(listed)} ({len(wrong)} names). Measure it anew.")
        return cls(**values)

    def save(self, path: str | os.PathLike) -> None:
        """Write a JSON file, whole or not at all."""
        _write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike) -> LatencyTable:
        """Read a JSON file. Raises `FileNotFoundError` if there is none, `ValueError` if it is no table."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"`latency_table` {path} is no file. Measure one with `hf-oto latency`.")
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:  # no JSON, or no UTF-8
            raise ValueError(f"`latency_table` {path} is not JSON: {error}") from error
        return cls.of(values)

    @classmethod
    def of(cls, value: Any) -> LatencyTable:
        """A table as it is, its dict, or its file's path."""
        if isinstance(value, LatencyTable):
            return value
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        if isinstance(value, str | os.PathLike):
            return cls.load(value)
        raise TypeError(f"`latency_table` must be a LatencyTable, its dict or its file, got {type(value).__name__}.")


def _price_of_kernels(curve: Sequence[tuple[int, int]]) -> float:
    """What a block's first group takes beyond its share in those that come after it."""
    (_, none), (count, first), (every, last) = curve[0], curve[1], curve[-1]
    slope = (last - first) / (every - count) if every > count else (last - none) / every
    return max(0.0, first - none - slope * count)


@cache
def _saved(curve: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    times = [0]
    for (low, start), (high, end) in zip(curve, curve[1:], strict=False):
        times += [start + (end - start) * step // (high - low) for step in range(1, high - low + 1)]
    return tuple(after - before for before, after in zip(times, times[1:], strict=False))[::-1]


def _curve(kind: str, points: Any, dense: int) -> tuple[tuple[int, int], ...]:
    """A curve that can be read by every count from none to all, and on which every group takes time."""
    name = f"latency_table.{kind}"
    if not isinstance(points, Sequence) or not all(isinstance(p, Sequence) and len(p) == 2 for p in points):
        raise TypeError(f"`{name}` must be pairs of a count and nanoseconds, got {str(points)[:100]}.")
    for count, time in points:
        _check_integer(f"{name}: a count", count, 0)
        _check_integer(f"{name}: a time", time, 0)
    curve = tuple((count, time) for count, time in points)
    counts = [count for count, _ in curve]
    if len(counts) < 2 or counts != sorted(set(counts)) or (counts[0], counts[-1]) != (0, dense):
        raise ValueError(f"`{name}` must have counts that rise from 0 to `dense_{kind}`={dense}, got {counts}.")
    if curve[0][1]:
        raise ValueError(f"`{name}` must begin with 0 nanoseconds for none, got {curve[0][1]}.")
    for (low, start), (high, end) in zip(curve, curve[1:], strict=False):
        if end - start < high - low:
            raise ValueError(
                f"`{name}` must rise by a nanosecond or more for each of the {kind}, got {start} for {low} and {end} "
                f"for {high}. Measure it anew."
            )
    return curve


@renamed(**OLD_SETTINGS)
@dataclass(frozen=True)
class OTOConfig:
    r"""
    The settings of one compression run.

    Args:
        target_sparsity (`float`, *optional*, defaults to 0.5):
            Share of the prunable part of the transformer blocks to remove, in [0, 1), measured in `target_unit`. The
            prunable part is what the chosen `structures` own in the dense architecture; embeddings, LayerNorms and
            task heads do not count. `None` runs HSPG as published: `lmbda`, `epsilon` and
            `pruning_start_ratio` decide.
        target_unit (`str`, *optional*, defaults to `"params"`):
            The metric of the target: `"params"` (weights), `"macs"` (multiply-accumulates of one sequence of
            `sequence_length` tokens), `"groups"` (zero-invariant groups, every one counting 1) or `"latency"`
            (time by `latency_table`). The last one's share is of the whole model's time, that of what is never pruned
            included: at 0.5 a forward takes half as long as the dense model's, as the table has it.
        sequence_length (`int`, *optional*, defaults to 384):
            Tokens of the sequence for which MACs are counted.
        latency_table ([`~hf_oto.config.LatencyTable`], *optional*):
            What [`~hf_oto.measure_latency`] found on the device that counts; also its dict, or the path of its JSON
            file. For `target_unit="latency"`, which needs it, and for no other unit.
        structures (`tuple[str, ...]`, *optional*, defaults to `("heads", "neurons")`):
            Which structures may be removed.
        pruning_start_ratio (`float`, *optional*, defaults to 0.15):
            Share of all steps before the first group is made redundant: N_w / N. Saliency is gathered meanwhile. It is
            no learning-rate warm-up. With `target_sparsity=None` it ends the penalised warm-up: N_p / N.
        pruning_end_ratio (`float`, *optional*, defaults to 0.6):
            Share of all steps by which the target is reached: N_p / N. What follows is recovery.
        pruning_periods (`int`, *optional*, defaults to 10):
            Number of selections, P, over which the removed share ramps up.
        milestones (`tuple[float, ...]`, *optional*, defaults to `()`):
            Smaller shares, in the same unit, at which the run stops for a while: it prunes to each in turn, recovers,
            keeps a finished model of that size, and goes on. They rise, and are all below the target. Of M + 1 sizes,
            the target's counted, the first gets two parts in M + 2 of the steps, each of the others one; the ratios
            below are shares of that. The learning rate falls to each size and rises again: [`OTOTrainer`] repeats the
            schedule of its arguments for every one.
        saliency (`str`, *optional*, defaults to `"fisher"`):
            Score of a group, to be divided by its cost: `"fisher"`, the running mean of the squared derivative by the
            group's mask; `"taylor"`, that of its absolute value; `"magnitude"`, the group's squared norm;
            `"random"`, drawn anew at every selection from the run's seed. The last three are there to compare with.
        saliency_decay (`float`, *optional*, defaults to 0.98):
            Decay per optimizer step of the running mean, in [0, 1). Only steps that still count at the next selection
            are looked at: the last 228 before it with 0.98, as all older ones together weigh less than a hundredth.
        saliency_interval (`int`, *optional*, defaults to 1):
            Optimizer steps from one observation of the gradients to the next. The mean reaches back as far whatever
            it is; a larger one makes it noisier, and the optimizer's step cheaper.
        epsilon (`float`, *optional*, defaults to 0.0):
            Half-space parameter ε in [0, 1). A trial iterate with ⟨x̂_g, x_g⟩ < ε‖x_g‖² is projected to zero.
        lmbda (`float`, *optional*, defaults to 0.001):
            Weight λ of the group penalty in HSPG as published. Unused with a target, which sets each group's own.
        min_heads (`int`, *optional*, defaults to 1):
            Heads that every block keeps at least.
        min_neurons (`int`, *optional*, defaults to 8):
            FFN neurons that every block keeps at least.
        round_to (`int`, *optional*, defaults to 8):
            The kept FFN width of every block is a multiple of this; 1 rounds nothing.
        uniform (`bool`, *optional*, defaults to `False`):
            Whether every block keeps equally many groups of a kind. What is saved then is a model of the family's own
            class, which loads without code of its own. Which groups of a block go is still for their saliency to
            decide. Families whose head size is hidden size / heads keep all heads: there it needs
            `structures=("neurons",)`.
        shrink_during_training (`bool`, *optional*, defaults to `False`):
            Cut groups that are zero for good out of the model while training goes on, so that later steps are faster.
            The mathematics stays the same, so results differ by rounding (and where dropout draws other random
            numbers). [`OTOTrainer`] does it at the end of pruning periods; in a loop of your own see
            [`~hf_oto.shrink`]. It needs a target and a base optimizer that moves every weight by itself; what cannot
            be shrunk is trained in full size, and a warning says so.
        keep_dropout (`bool`, *optional*, defaults to `True`):
            Whether [`OTOTrainer`] lets the model go on dropping out once groups are redundant, as its own config has
            it (Srivastava et al., JMLR 2014). Off, short trainings of an epoch or so get further: what is left has to
            learn again what went. Longer ones may learn their data by heart: in three epochs questions lost by it, and
            named entities gained. Warm-up is as the config has it either way, and so are trainings without a target.
        distillation_weight (`float`, *optional*, defaults to 0.9):
            Weight w in [0, 1] of what is learnt from a teacher: the loss is (1 − w)·(own loss) + w·(divergence from
            the teacher's outputs). This one and the next two are unused without a teacher.
        distillation_temperature (`float`, *optional*, defaults to 2.0):
            Temperature T > 0 that softens both models' distributions.
        distillation_hidden_weight (`float`, *optional*, defaults to 0.0):
            Weight of the mean squared difference from the teacher's hidden states, added to the loss.

    Raises:
        `ValueError`, `TypeError`: A setting breaks its rule; the message names the argument, the rule and the value.
    """

    target_sparsity: float | None = 0.5
    target_unit: str = "params"
    sequence_length: int = 384
    latency_table: LatencyTable | None = None
    structures: Names = field(default_factory=lambda: STRUCTURES)
    pruning_start_ratio: float = 0.15
    pruning_end_ratio: float = 0.6
    pruning_periods: int = 10
    milestones: Shares = field(default_factory=tuple)
    saliency: str = "fisher"
    saliency_decay: float = 0.98
    saliency_interval: int = 1
    epsilon: float = 0.0
    lmbda: float = 1e-3
    min_heads: int = 1
    min_neurons: int = 8
    round_to: int = 8
    uniform: bool = False
    shrink_during_training: bool = False
    keep_dropout: bool = True
    distillation_weight: float = 0.9
    distillation_temperature: float = 2.0
    distillation_hidden_weight: float = 0.0

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):  # numpy's numbers and words become Python's
            value = getattr(self, setting.name)
            if type(value).__module__ == "numpy":
                object.__setattr__(self, setting.name, value.tolist())
        if isinstance(self.structures, str) or not isinstance(self.structures, Iterable):
            raise TypeError(f"`structures` must be a list of names, got {self.structures!r}.")
        object.__setattr__(self, "structures", tuple(str(name) for name in self.structures))
        _check_choice("target_unit", self.target_unit, TARGET_UNITS)
        if self.latency_table is not None:
            object.__setattr__(self, "latency_table", LatencyTable.of(self.latency_table))
        if (self.target_unit == "latency") != (self.latency_table is not None):
            raise ValueError(
                f'`target_unit`="latency" and `latency_table` need each other, got {self.target_unit!r} and '
                f"{'a' if self.latency_table else 'no'} table. `hf_oto.measure_latency` makes one."
            )
        _check_choice("saliency", self.saliency, SALIENCIES)
        for structure in self.structures:
            _check_choice("structures", structure, STRUCTURES)
        if not self.structures or len(set(self.structures)) != len(self.structures):
            raise ValueError(f"`structures` must name each structure once and at least one, got {self.structures}.")
        if self.target_sparsity is not None:
            _check_real("target_sparsity", self.target_sparsity, 0.0, 1.0)
        object.__setattr__(self, "milestones", _milestones(self.milestones, self.target_sparsity))
        _check_real("pruning_start_ratio", self.pruning_start_ratio, 0.0, 1.0)
        _check_real("saliency_decay", self.saliency_decay, 0.0, 1.0)
        _check_real("epsilon", self.epsilon, 0.0, 1.0)
        _check_real("pruning_end_ratio", self.pruning_end_ratio, 0.0, 1.0, closed=True)
        _check_real("lmbda", self.lmbda, 0.0, math.inf)
        _check_real("distillation_weight", self.distillation_weight, 0.0, 1.0, closed=True)
        _check_real("distillation_temperature", self.distillation_temperature, 0.0, math.inf)
        if self.distillation_temperature == 0:
            raise ValueError("`distillation_temperature` must be above 0, got 0: it divides the logits.")
        _check_real("distillation_hidden_weight", self.distillation_hidden_weight, 0.0, math.inf)
        if self.target_sparsity is not None and self.pruning_start_ratio >= self.pruning_end_ratio:
            raise ValueError(
                f"`pruning_start_ratio` must be below `pruning_end_ratio`, got {self.pruning_start_ratio} and "
                f"{self.pruning_end_ratio}: pruning happens between the two."
            )
        _check_integer("sequence_length", self.sequence_length, 1)
        _check_integer("pruning_periods", self.pruning_periods, 1)
        _check_integer("saliency_interval", self.saliency_interval, 1)
        _check_integer("min_heads", self.min_heads, 0)
        _check_integer("min_neurons", self.min_neurons, 0)
        _check_integer("round_to", self.round_to, 1)
        for name in ("uniform", "shrink_during_training", "keep_dropout"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        table = None if self.latency_table is None else self.latency_table.to_dict()
        several = {"structures": list(self.structures), "milestones": list(self.milestones)}
        return {**dataclasses.asdict(self), **several, "latency_table": table}

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> OTOConfig:
        """The config of [`~OTOConfig.to_dict`]'s result, or an older version's. Raises `ValueError` on other names."""
        settings = read_old_names(settings, OLD_SETTINGS)
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(settings) - names):
            raise ValueError(f"Unknown settings {unknown}. OTOConfig has: {', '.join(sorted(names))}.")
        return cls(**settings)

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write `oto_config.json` into a folder, which is made if it is missing."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        _write_json(directory / CONFIG_NAME, self.to_dict())

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> OTOConfig:
        """Read the `oto_config.json` of a folder. Raises `FileNotFoundError` if there is none, `ValueError` if bad."""
        path = Path(directory) / CONFIG_NAME
        if not path.is_file():
            raise FileNotFoundError(f"No {CONFIG_NAME} in {directory}.")
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # no JSON, or no UTF-8
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(settings, dict):
            raise ValueError(f"{path} must hold one JSON object, got {type(settings).__name__}.")
        return cls.from_dict(settings)


def _milestones(given: Any, target: float | None) -> tuple[float, ...]:
    """Shares that rise, all between nothing and the target."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"`milestones` must be a list of shares, as in (0.3, 0.5), got {given!r}.")
    shares = [share.tolist() if type(share).__module__ == "numpy" else share for share in given]
    for share in shares:
        _check_real("milestones: a share", share, 0.0, 1.0)
    if shares and target is None:
        raise ValueError(f"`milestones` need a `target_sparsity` to go on to, got {shares} and None.")
    steps = [round(share, 6) for share in (0.0, *shares, target or 0.0)]  # as folders are named
    if shares and any(low >= high for low, high in zip(steps, steps[1:], strict=False)):
        raise ValueError(
            f"`milestones` must rise from above 0 to below `target_sparsity`={target:g}, got {shares}. Sort them, and "
            f"leave the target itself out: it is the last size anyway."
        )
    return tuple(float(share) for share in shares)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")


def _check_real(name: str, value: object, low: float, high: float, closed: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    if not (low <= value < high or (closed and value == high)):  # NaN is in no interval
        raise ValueError(f"`{name}` must be in [{low:g}, {high:g}{']' if closed else ')'}, got {value}.")


def _check_integer(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if value < low:
        raise ValueError(f"`{name}` must be at least {low}, got {value}.")
