"""Measure what heads and neurons cost on a device: blocks of many sizes, timed in turns inside whole forwards.

Shapes: `M` blocks that are timed, `K` unknowns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import LatencyTable
from ..models.configuration_oto import BLOCK_SPECS, PRUNED_PREFIX
from ..models.empty_models import set_tensor
from ..models.example_inputs import longest_input, unpadded_batch
from ..models.groups import Partition, partition
from ..models.sharding import check_placed, check_whole
from ..models.surgery import keep_groups
from ..renamed import renamed
from .threads import using_threads
from .timing import CLOCK, Timer, device_name

# Of a block's heads and neurons, the shares at which it is timed; none and one unit of neurons come to these.
_SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1)
_UNIT = 8


@renamed(length="sequence_length")
def measure_latency(
    model: PreTrainedModel,
    *,
    batch_size: int = 1,
    sequence_length: int = 128,
    threads: int | None = None,
    repeats: int = 15,
    warmup: int = 2,
    cpu_time: bool = False,
) -> LatencyTable:
    """
    Time the blocks of a model with fewer heads and neurons, for a target in `"latency"`.

    The sizes are put side by side into models of the same architecture, made of the model's own weights, and each
    block is timed in forwards of these: with the caches as they are in use, and all in turns, so that what slows the
    machine down slows all alike. Of every size the median counts. A block's time is taken to be that of its heads plus
    that of its neurons plus a rest, which is found by least squares; what is left of a forward is never pruned.

    On an accelerator every size is a model of its own, all of whose blocks have it, and whole forwards are timed, by
    the device's own time ([`~hf_oto.deploy.timing.Timer`]). Where kernels are the price and not widths, as in small
    batches, the table says so: [`~hf_oto.config.LatencyTable.goes_whole`].

    It takes about `(repeats + warmup)` times 15 to 25 dense blocks, and as much memory as these have weights; on an
    accelerator as many models one after the other.

    Args:
        model ([`PreTrainedModel`]):
            A dense model that reads tokens, on the device and in the dtype that it will be used in. It is left as it
            is.
        batch_size (`int`, *optional*, defaults to 1): Sequences of a batch; none is padded.
        sequence_length (`int`, *optional*, defaults to 128): Tokens of each.
        threads (`int`, *optional*): Threads of one operation on the CPU. By default torch's own number.
        repeats (`int`, *optional*, defaults to 15): Forwards of every model that count.
        warmup (`int`, *optional*, defaults to 2): Forwards before them.
        cpu_time (`bool`, *optional*, defaults to `False`):
            Count the time that the processor worked for this thread, not what passed meanwhile: for a machine that is
            busy with other work. With one thread on the CPU only.

    Returns:
        [`~hf_oto.config.LatencyTable`]

    Raises:
        `ValueError`: The model is not supported, pruned, sharded or without weights, it does not read so many tokens,
            or a number is too small.

    Example:

    ```python
    table = measure_latency(model, batch_size=1, sequence_length=128, threads=1)
    OTOConfig(target_sparsity=0.5, target_unit="latency", latency_table=table)
    ```
    """
    groups = _check(
        model, batch_size=batch_size, sequence_length=sequence_length, repeats=repeats, warmup=warmup, threads=threads
    )
    device = model.device
    with ExitStack() as stack:
        number = stack.enter_context(using_threads(threads))
        if cpu_time and (number > 1 or device.type != "cpu"):
            raise ValueError(
                f"`cpu_time` is for `threads`=1 on the CPU, got {number} threads on {device.type}: only there it is "
                f"the time that would pass."
            )
        sizes, batch = _sizes(groups), unpadded_batch(model, batch_size, sequence_length)
        flat, method = [size for chunk in sizes for size in chunk], CLOCK
        if device.type == "cpu":
            clock = time.thread_time_ns if cpu_time else time.perf_counter_ns
            models = [_of_sizes(model, groups, chunk) for chunk in sizes]
            times, rests = _timed([_Stopwatch(each, groups, clock) for each in models], batch, repeats, warmup)
        else:
            flat, rests = sorted(set(flat)), [0.0]  # what is no block is in the blocks' rest
            times, method = _timed_alone(model, groups, flat, batch, repeats, warmup)
    heads, neurons, rest = _curves(flat, times)
    total = statistics.median(rests) + groups.num_layers * (rest + heads[-1][1] + neurons[-1][1])
    return LatencyTable(
        model_type=groups.model_type,
        num_layers=groups.num_layers,
        hidden_size=groups.hidden_size,
        head_size=groups.head_size,
        queries=groups.queries,
        dense_heads=groups.dense_heads,
        dense_neurons=groups.dense_neurons,
        total=round(total),
        heads=heads,
        neurons=neurons,
        batch_size=batch_size,
        sequence_length=sequence_length,
        threads=number,
        device=device_name(device),
        dtype=str(model.dtype).removeprefix("torch."),
        attention=str(model.config._attn_implementation),
        torch=torch.__version__,
        method=method,
    )


def _check(model: PreTrainedModel, **numbers: int | None) -> Partition:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    groups = partition(model)
    if model.config.model_type.startswith(PRUNED_PREFIX):
        raise ValueError("`model` is pruned already, and the table is that of the dense model: pass that.")
    check_whole(model)
    check_placed(model)
    if not groups.num_layers:
        raise ValueError("`model` has no blocks, so there is nothing to time.")
    longest = longest_input(model)
    assert numbers["sequence_length"] is not None
    if numbers["sequence_length"] > longest:
        raise ValueError(
            f"`sequence_length` must be at most {longest}, what the model reads, got {numbers['sequence_length']}."
        )
    return groups


def _points(dense: int, unit: int) -> list[int]:
    """Counts at which a curve is measured: none, a unit, and shares of all in whole units, where there are so many."""
    shares = {max(unit, round(dense * share / unit) * unit) for share in _SHARES[:-1]}
    return sorted({0, unit, dense} | shares) if dense > unit else [0, dense]


def _sizes(groups: Partition) -> list[list[tuple[int, int]]]:
    """
    (heads, neurons) of the blocks to be timed, model by model: each count beside all of the other kind, and both kinds
    cut by about the same share. Dense blocks fill up the models. Each has sizes of all kinds: in one of small blocks
    alone they would find the caches emptier of others than beside a dense model.
    """
    heads, neurons = _points(groups.dense_heads, 1), _points(groups.dense_neurons, _UNIT)
    every = (groups.dense_heads, groups.dense_neurons)
    sizes = [(count, every[1]) for count in heads[:-1]] + [(every[0], count) for count in neurons[:-1]]
    for index, count in enumerate(neurons[:-1]):
        sizes.append((heads[min(round(index * (len(heads) - 1) / (len(neurons) - 1)), len(heads) - 2)], count))
    layers = groups.num_layers
    sizes += [every] * (2 + -(len(sizes) + 2) % layers)
    models = len(sizes) // layers
    return [sizes[first::models] for first in range(models)]


def _of_sizes(model: PreTrainedModel, groups: Partition, sizes: Sequence[tuple[int, int]]) -> PreTrainedModel:
    counts = [count for size in sizes for count in size]
    kept = [
        torch.arange(array.count, device="cpu") < count for array, count in zip(groups.arrays, counts, strict=True)
    ]
    cut = keep_groups(model, groups, kept).eval()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owned = {name for array in groups.arrays for name, _ in array.members}
    for name in set(dict(cut.named_parameters(remove_duplicate=False))) - owned:  # such as embeddings: no copies
        set_tensor(cut, name, parameters[name])
    return cut


class _Stopwatch:
    """Times the blocks of a model in its forwards: `()` runs one and gives block by block, then the rest."""

    def __init__(self, model: PreTrainedModel, groups: Partition, clock: Callable[[], int]) -> None:
        self.model = model
        self.clock = clock
        self.stamps: list[int] = []
        blocks: Any = model.base_model.get_submodule(BLOCK_SPECS[groups.model_type].blocks)
        for block in blocks:
            block.register_forward_pre_hook(self._stamp)
            block.register_forward_hook(self._stamp)

    def _stamp(self, module: nn.Module, *args: Any) -> None:
        self.stamps.append(self.clock())

    def __call__(self, batch: dict[str, Tensor]) -> list[float]:
        self.stamps = [self.clock()]
        self.model(**batch)
        self.stamps.append(self.clock())
        spans = [end - start for start, end in zip(self.stamps, self.stamps[1:], strict=False)]
        return [*spans[1::2], sum(spans[::2])]


@torch.inference_mode()
def _timed_alone(
    model: PreTrainedModel,
    groups: Partition,
    sizes: Sequence[tuple[int, int]],
    batch: dict[str, Tensor],
    repeats: int,
    warmup: int,
    *,
    graphs: bool = True,
) -> tuple[list[float], str]:
    """Nanoseconds of a block of every size, all else in a forward included, and how they were taken: alike for all."""
    times, methods = [], set()
    for size in sizes:
        cut: Any = _of_sizes(model, groups, [size] * groups.num_layers)
        timer = Timer(partial(cut, **batch), model.device, graphs=graphs)
        found = [timer() for _ in range(warmup + repeats)][warmup:]
        times.append(1e6 * statistics.median(found) / groups.num_layers)
        methods.add(timer.method)
        if len(methods) > 1:
            return _timed_alone(model, groups, sizes, batch, repeats, warmup, graphs=False)
    return times, methods.pop()


@torch.inference_mode()
def _timed(
    stopwatches: Sequence[_Stopwatch], batch: dict[str, Tensor], repeats: int, warmup: int
) -> tuple[list[float], list[float]]:
    """Nanoseconds: the median of every block, model after model, and all that was found for the rest of a forward."""
    found: list[list[list[float]]] = [[] for _ in stopwatches]
    for repeat in range(-warmup, repeats):
        # None finds the caches always as the same one left them.
        for index in range(len(stopwatches)) if repeat % 2 else reversed(range(len(stopwatches))):
            spans = stopwatches[index](batch)
            if repeat >= 0:
                found[index].append(spans)
    medians = [[statistics.median(times) for times in zip(*of_model, strict=True)] for of_model in found]
    return [block for times in medians for block in times[:-1]], [times[-1] for of in found for times in of]


def _curves(
    sizes: Sequence[tuple[int, int]], times: Sequence[float]
) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...], float]:
    """
    The curves of heads and of neurons, and the time of a block without either, from t = rest + T_heads + T_neurons by
    least squares of relative errors.
    """
    points = [sorted({size[kind] for size in sizes}) for kind in (0, 1)]
    unknowns = [len(points[0]) - 1, len(points[1]) - 1]
    time_M = torch.tensor(times, dtype=torch.float64, device="cpu")
    design_MK = torch.zeros(len(sizes), 1 + sum(unknowns), dtype=torch.float64, device="cpu")
    design_MK[:, 0] = 1
    for row, size in enumerate(sizes):
        for kind, offset in ((0, 0), (1, unknowns[0])):
            if place := points[kind].index(size[kind]):
                design_MK[row, offset + place] = 1
    solution_K = torch.linalg.lstsq(design_MK / time_M[:, None], torch.ones_like(time_M)[:, None]).solution[:, 0]
    rest, *found = solution_K.tolist()
    heads = _rising(points[0], [0.0, *found[: unknowns[0]]])
    neurons = _rising(points[1], [0.0, *found[unknowns[0] :]])
    return heads, neurons, max(rest, 0.0)


def _rising(counts: Sequence[int], times: Sequence[float]) -> tuple[tuple[int, int], ...]:
    """Whole nanoseconds that rise with every group, as they do but for noise."""
    curve: list[tuple[int, int]] = []
    for count, found in zip(counts, times, strict=True):
        least = curve[-1][1] + count - curve[-1][0] if curve else 0
        curve.append((count, max(round(found), least)))
    return tuple(curve)
