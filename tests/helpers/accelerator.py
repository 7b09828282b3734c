"""A stand-in for an accelerator, where there is none: a device of torch whose tensors keep their data on the CPU.

Its tensors say that they live on `standin:0`. Like CUDA's they refuse to be mixed with tensors of the CPU (numbers in
0-dim tensors and the indices of `x[i]` excepted), have no numpy view, and what the host waits for is noted
([`waits`]). Like Apple's and some of Intel's devices it has no float64. Everything that would reach for a storage gets
that of the data, so that files can be written.

To import it registers the device with torch, for good: in a process of its own. `ACCELERATE_TORCH_DEVICE=standin:0`
puts Trainer on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
import transformers.training_args
from torch import Tensor
from torch.optim.optimizer import _foreach_supported_types
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "standin"

aten = torch.ops.aten

_noted: list[list[str]] = []  # one list for each `waits` that is open

# `x[i]` and `x[i] = y` take indices from the CPU.
_INDEXING = {aten.index, aten._unsafe_index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# Between devices.
_COPIES = {aten.copy_, aten._to_copy, aten._copy_from, aten.copy}
# Of these even a 0-dim tensor has to be on the device.
_STRICT = ("index_", "scatter", "gather", "cat", "stack", "embedding", "_foreach", "_fused", "_amp", "bucketize")
# Their result's size, or what they return, is known to the device alone.
_WAITING = {
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten.bincount),
    *(aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.repeat_interleave, aten.multinomial),
}
# Under autocast, as on CUDA.
_IN_HALF = (
    *(aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default),
    *(aten.baddbmm.default, aten.conv1d.default, aten.conv2d.default, aten.scaled_dot_product_attention.default),
)
_IN_SINGLE = (
    *(aten.layer_norm.default, aten.softmax.int, aten.log_softmax.int, aten.nll_loss.default),
    *(aten.cross_entropy_loss.default, aten.mse_loss.default, aten.kl_div.default, aten.binary_cross_entropy.default),
)


class StandIn(Tensor):
    """A tensor of the stand-in accelerator around one of the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> StandIn:
        if inner.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"{NAME} has no {inner.dtype}.")
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device(NAME, 0),
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_inference_mode_enabled() and func._can_decompose():
            return func.decompose(*args, **(kwargs or {}))  # as autograd does outside of it
        return _run(func, args, kwargs or {})

    # What torch does in C++ with the memory of a tensor.

    def tolist(self) -> Any:
        _note("tolist")
        return self.inner.tolist()

    def numpy(self, **options: Any) -> Any:
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def __repr__(self, **options: Any) -> str:
        _note("repr")
        return f"StandIn({self.inner!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:  # a file holds no device that another process may not have
        _note("pickle")
        return self.inner.detach().requires_grad_(self.requires_grad).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            made: Any = StandIn(self.inner.clone())
            made = torch.nn.Parameter(made, self.requires_grad) if isinstance(self, torch.nn.Parameter) else made
            made.grad = None if self.grad is None else self.grad.detach().clone()
            memo[id(self)] = made
        return memo[id(self)]


@contextmanager
def waits() -> Iterator[list[str]]:
    """What the host waits for meanwhile: the names of the operations."""
    noted: list[str] = []
    _noted.append(noted)
    try:
        yield noted
    finally:
        _noted[:] = [other for other in _noted if other is not noted]


def _note(name: str) -> None:
    for noted in _noted:
        noted.append(name)


@cache
def _kind(func: Any) -> SimpleNamespace:
    """What is known of an operation whatever it is given."""
    operation = func.overloadpacket
    return SimpleNamespace(
        operation=operation,
        copies=operation in _COPIES,
        indexes=operation in _INDEXING,
        waits=operation in _WAITING,
        strict=str(operation).removeprefix("aten.").startswith(_STRICT),
        changes=func._schema.is_mutable,
        views=func.is_view,
    )


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    kind = _kind(func)
    given: list[Tensor] = []
    plain_args = _unwrapped(args, given)
    plain_kwargs = {name: _unwrapped(value, given) for name, value in kwargs.items() if name != "pin_memory"}
    if not kind.copies:
        _refuse_mixed(func, kind, args, kwargs, given)
    target = kwargs.get("device")
    away = target is not None and torch.device(target).type != NAME
    if target is not None and not away:
        plain_kwargs["device"] = "cpu"
    if _noted and _waits(kind, args, kwargs, away):
        _note(str(func))
    wrappers = {id(leaf.inner): leaf for leaf in given if isinstance(leaf, StandIn)}
    result = func(*plain_args, **plain_kwargs)
    if kind.changes:
        for leaf in wrappers.values():
            if leaf.size() != leaf.inner.size() or leaf.stride() != leaf.inner.stride():
                raise NotImplementedError(f"{func} changed the size of a tensor in place, which {NAME} cannot follow.")
    if away:  # a copy elsewhere, or a new tensor there
        return result
    if kind.copies and args and isinstance(args[0], Tensor) and not isinstance(args[0], StandIn):
        return result  # into a tensor of the CPU
    # In inference mode a view of a tensor that was made outside is none of inference's.
    if kind.views and torch.is_inference_mode_enabled() and not args[0].is_inference():
        with torch.inference_mode(False):
            return _wrapped(result, wrappers)
    return _wrapped(result, wrappers)


def _unwrapped(value: Any, found: list[Tensor]) -> Any:
    """What an operation takes, as the CPU takes it: one thing, or lists of them. Notes the tensors as they are."""
    if isinstance(value, Tensor):
        found.append(value)
        return value.inner if isinstance(value, StandIn) else value
    if isinstance(value, (list, tuple)):
        return type(value)([_unwrapped(one, found) for one in value])
    return value


def _wrapped(value: Any, wrappers: dict[int, StandIn]) -> Any:
    """What an operation returns, on the device: tensors that it was given, as they were given."""
    if isinstance(value, Tensor):
        if value.is_meta:
            return value
        return wrappers[id(value)] if id(value) in wrappers else StandIn(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_wrapped(one, wrappers) for one in value])
    return value


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """Lists of things, or one, with every one changed."""
    if isinstance(value, (list, tuple)):
        return type(value)([_each(one, change) for one in value])
    return change(value)


def _refuse_mixed(func: Any, kind: Any, args: Any, kwargs: dict[str, Any], given: list[Tensor]) -> None:
    if all(isinstance(leaf, StandIn) for leaf in given):
        return
    if kind.indexes:  # the indices may be on the CPU, what they are of may not
        given = []
        _unwrapped((args[0], *args[2:], *kwargs.values()), given)
    others = {str(leaf.device) for leaf in given if not isinstance(leaf, StandIn) and (leaf.dim() or kind.strict)}
    if kind.indexes and not isinstance(args[0], StandIn):
        others.add(str(args[0].device))
    if others:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 and "
            f"{', '.join(sorted(others))}! (in {func})"
        )


def _waits(kind: Any, args: Any, kwargs: dict[str, Any], away: bool) -> bool:
    if kind.copies:
        into = kind.operation is aten.copy_
        source = args[1 if into else 0]
        target = isinstance(args[0], StandIn) if into else not away
        if not source.numel():  # nothing goes anywhere
            return False
        if isinstance(source, StandIn):
            return not target
        # Memory that is not pinned is copied while the host waits; a number goes along with a launch.
        return target and source.dim() > 0 and not kwargs.get("non_blocking") and True not in args[2:]
    if kind.indexes:
        return any(_waits_for(index) for index in args[1])
    return kind.waits and kwargs.get("output_size") is None


def _waits_for(index: Any) -> bool:
    """Whether an index says how many only when it is known, or has to be copied to the device."""
    if not isinstance(index, Tensor):
        return False
    return index.dtype in (torch.bool, torch.uint8) if isinstance(index, StandIn) else index.dim() > 0


def _factory(func: Any) -> Any:
    def make(*args: Any, **kwargs: Any) -> Tensor:
        kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
        return StandIn(func(*args, **{**kwargs, "device": "cpu"}))

    return make


def _factories() -> Iterator[tuple[str, Any]]:
    """Operations that make tensors of nothing: no argument leads them to `__torch_dispatch__`."""
    for full in torch._C._dispatch_get_all_op_names():
        name, _, overload = full.removeprefix("aten::").partition(".")
        if not full.startswith("aten::") or not hasattr(getattr(aten, name), overload or "default"):
            continue
        func = getattr(getattr(aten, name), overload or "default")
        names = [argument.name for argument in func._schema.arguments]
        tensors = any("Tensor" in str(argument.type) for argument in func._schema.arguments)
        if "device" in names and not tensors and "sparse" not in name and len(func._schema.returns) == 1:
            yield full, func


class _Event:
    """A mark in the device's time, which is the processor's."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        _note("synchronize")

    def elapsed_time(self, end: _Event) -> float:
        return 1000 * (end.at - self.at)


def _module() -> Any:
    """`torch.standin`, as far as torch, accelerate and transformers ask it."""
    return SimpleNamespace(
        is_initialized=lambda: True,
        is_available=lambda: True,
        _is_in_bad_fork=lambda: False,
        current_device=lambda: 0,
        set_device=lambda device: None,
        device_count=lambda: 1,
        synchronize=lambda device=None: _note("synchronize"),
        empty_cache=lambda: None,
        Event=_Event,
        manual_seed=lambda seed: None,  # its random numbers are the CPU's
        manual_seed_all=lambda seed: None,
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda new_state, device=None: None,
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
        is_bf16_supported=lambda: True,
    )


def _cast(func: Any, dtype: torch.dtype | None) -> Any:
    """An operation under autocast: in a dtype, or in that of autocast."""

    def run(*args: Any, **kwargs: Any) -> Any:
        to = dtype or torch.get_autocast_dtype(NAME)

        def cast(leaf: Any) -> Any:
            known = isinstance(leaf, StandIn) and leaf.is_floating_point() and leaf.dtype != torch.float64
            return leaf.to(to) if known else leaf

        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
            return func(*_each(args, cast), **{name: _each(value, cast) for name, value in kwargs.items()})

    return run


def _register() -> list[torch.library.Library]:
    _setup_privateuseone_for_python_backend(NAME, backend_module=_module())
    library, every = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    for full, func in _factories():
        library.impl(full, _factory(func), "PrivateUse1")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for functions, dtype in ((_IN_HALF, None), (_IN_SINGLE, torch.float32)):
        for function in functions:
            library.impl(function.name(), _cast(function, dtype), "AutocastPrivateUse1")
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(…, device=)` makes it on the CPU and copies it
    torch.__future__.set_swap_module_params_on_conversion(True)  # as on CUDA a moved parameter is the same object
    _foreach_supported_types.append(StandIn)
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True  # by a list of devices that it knows
    return [library, every]


_libraries = _register()  # what they register lasts as long as they do
