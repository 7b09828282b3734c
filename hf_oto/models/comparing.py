"""Whether two models compute the same: a cut one, and the one that it was cut out of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from .modes import evaluating

# Implementations of attention that compute in any precision, the faster first.
_ANY_PRECISION = ("sdpa", "eager")


def compare(model: PreTrainedModel, cut: PreTrainedModel, inputs: Mapping[str, Any], atol: float) -> None:
    """Raise `ValueError` unless both models give the same floating-point outputs."""
    inputs = {**inputs, "return_dict": True}
    # The user may have allowed TF32 or less for products in float32. float64 has no such mode and gives the verdict;
    # on the CPU, as some accelerators have none, and no room for it.
    for precision, device in ((torch.float32, model.device), (torch.float64, torch.device("cpu"))):
        expected, actual = (plain_outputs(each, inputs, precision, device) for each in (model, cut))
        if not expected or set(expected) != set(actual):
            raise ValueError(f"The model has the outputs {sorted(expected)}, the cut model {sorted(actual)}.")
        scales = {name: float(output.abs().max()) for name, output in expected.items()}
        errors = {name: float((actual[name] - output).abs().max()) for name, output in expected.items()}
        wrong = [name for name, error in errors.items() if not error <= atol * scales[name]]  # NaN is wrong too
        if not wrong:
            return
    listed = ", ".join(f"`{name}` by {errors[name]:.3g} of {scales[name]:.3g}" for name in wrong)
    raise ValueError(
        f"The cut model does not compute what `model` computes: it is off in {listed}, and `atol` allows {atol:g} of "
        f"the largest magnitude. No model is returned, `model` is as it was."
    )


@torch.no_grad()
def plain_outputs(
    model: PreTrainedModel, inputs: Mapping[str, Any], precision: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """
    Floating-point outputs in evaluation mode, computed in `precision` on `device` even where the weights are not.
    Hidden states and attention weights are tuples and left out: a cut model has fewer attention weights by design.
    """

    def raised(value: Any, least: torch.dtype = precision) -> Any:
        if not isinstance(value, Tensor):
            return value
        dtype = torch.promote_types(value.dtype, least) if value.is_floating_point() else value.dtype
        return value.to(device, dtype)

    tensors = {name: raised(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    inputs = {name: raised(value, torch.promote_types(precision, model.dtype)) for name, value in inputs.items()}
    with plain_forward(model), torch.autocast(device.type, enabled=False):
        outputs = functional_call(model, tensors, (), inputs)
    return {name: value for name, value in outputs.items() if isinstance(value, Tensor) and value.is_floating_point()}


@contextmanager
def plain_forward(model: PreTrainedModel) -> Iterator[None]:
    """
    The model's own function of its weights, in any precision, in evaluation mode: not the forward that accelerate has
    put in place of it, which computes under autocast, not a compiled one, and no kernel for half precision only.
    Afterwards all is as it was.
    """
    state = vars(model)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        if "_original_forward" in state:
            stack.enter_context(_replaced(state, "forward", state["_original_forward"]))
        for module in model.modules():
            if vars(module).get("_compiled_call_impl") is not None:
                stack.enter_context(_replaced(vars(module), "_compiled_call_impl", None))
        usable = _ANY_PRECISION if model._supports_sdpa else _ANY_PRECISION[1:]
        configs = {id(config): config for module in model.modules() if (config := vars(module).get("config"))}
        for config in configs.values():
            if config._attn_implementation not in _ANY_PRECISION:
                stack.enter_context(_replaced(vars(config), "_attn_implementation_internal", usable[0]))
        yield


@contextmanager
def _replaced(state: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    missing = object()
    before = state.get(name, missing)
    state[name] = value
    try:
        yield
    finally:
        if before is missing:
            del state[name]
        else:
            state[name] = before
