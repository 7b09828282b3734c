"""DistributedDataParallel around a model whose parameters have been replaced."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

# What it was made with, and keeps under these names.
_KEPT = {
    *("device_ids", "output_device", "dim", "broadcast_buffers", "forward_sync_buffers", "find_unused_parameters"),
    *("gradient_as_bucket_view", "static_graph", "skip_all_reduce_unused_params", "batched_grad_copy"),
}


def unwatchable(model: nn.Module) -> str | None:
    """Why a wrapped model cannot be given other parameters, `None` if it can or is not wrapped."""
    if not isinstance(model, DistributedDataParallel):
        return None
    if getattr(model, "_comm_hooks", None):
        return "a communication hook keeps what it has learnt of the gradients' shapes"
    return "DistributedDataParallel casts them" if getattr(model, "mixed_precision", None) is not None else None


def watch_anew(model: DistributedDataParallel) -> None:
    """
    Let a wrapper reduce the gradients of the parameters that its model has now, with the options that it was made
    with. It is made once more on the same object, as a training loop holds on to that; what reduced the old
    parameters goes, and its hooks with it. Every rank has to call it, between a step and the next forward.
    """
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    options: dict[str, Any] = {name: vars(model)[name] for name in _KEPT & known.keys() & vars(model).keys()}
    if "forward_sync_buffers" in options:  # which replaces it
        options.pop("broadcast_buffers", None)
    default = getattr(model, "bucket_bytes_cap_default", False)
    options["bucket_cap_mb"] = None if default else model.bucket_bytes_cap / 2**20
    mesh = getattr(model, "device_mesh", None)
    options |= {"process_group": model.process_group} if mesh is None else {"device_mesh": mesh}
    training = model.training
    DistributedDataParallel.__init__(model, model.module, **options)
    model.train(training)
