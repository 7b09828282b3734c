"""What one call takes on a device: the processor by the clock, an accelerator by its own time.

What the host needs to launch the kernels is no property of the model: it is gone where they are launched at once, as a
CUDA graph, or overlaps with their work.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

CLOCK, EVENTS, GRAPH = "clock", "device events", "CUDA graph"

# Calls between two events: while the device works at the first ones, the host gets ahead.
_IN_A_ROW = 20


class Timer:
    """
    `()` makes a call and gives the milliseconds that it took.

    Args:
        call (`Callable`): Launches its work on the device, and gives what it does not wait for.
        device (`torch.device`): Where.
        graphs (`bool`, *optional*, defaults to `True`): Whether a CUDA graph may be made of it.

    Attributes:
        method (`str`):
            How it is timed: `"clock"` on the CPU, and on devices without events once they are done; `"CUDA graph"`,
            the replay of a recording, where one can be made of the call; `"device events"` around many calls else.
    """

    def __init__(self, call: Callable[[], Any], device: torch.device, *, graphs: bool = True) -> None:
        self._call = call
        self._device = device
        self._calls = 1
        self.method = CLOCK
        if device.type == "cpu":
            return
        self._module: Any = torch.get_device_module(device)
        if hasattr(self._module, "Event"):
            self.method, self._calls = EVENTS, _IN_A_ROW
        with self._there():
            graph = _recorded(call) if graphs and device.type == "cuda" else None
        if graph is not None:
            self.method, self._call = GRAPH, graph.replay

    def _there(self) -> Any:
        """With the device as the current one: streams, events and waits are of that, wherever the tensors are."""
        return self._module.device(self._device) if hasattr(self._module, "device") else nullcontext()

    def __call__(self) -> float:
        if self._device.type == "cpu":
            return self._by_clock(lambda: None)
        with self._there():
            return self._by_clock(self._module.synchronize) if self.method == CLOCK else self._by_events()

    def _by_clock(self, synchronize: Callable[[], Any]) -> float:
        synchronize()
        start = time.perf_counter()
        self._call()
        synchronize()
        return 1000 * (time.perf_counter() - start)

    def _by_events(self) -> float:
        events = [self._module.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        for _ in range(self._calls):
            self._call()
        events[1].record()
        events[1].synchronize()
        return events[0].elapsed_time(events[1]) / self._calls


def _recorded(call: Callable[[], Any]) -> Any:
    """A CUDA graph of a call; `None`, with a warning, where it does what cannot be recorded, such as to wait."""
    before = torch.cuda.current_stream()
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
            # A recording that fails leaves torch's random numbers and its memory in a state that a training after it
            # would stumble over: what waits is found before there is one.
            with _refusing_waits():
                call()
        before.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):  # its own would be of the device that it was first used on
            call()
        return graph
    except RuntimeError as error:
        torch.cuda.set_stream(before)  # which a recording that fails does not give back
        torch.cuda.synchronize()
        logger.warning(
            f"No CUDA graph can be made of the forward, it is timed by events: {str(error).splitlines()[0]}"
        )
        return None


@contextmanager
def _refusing_waits() -> Iterator[None]:
    """What waits for the device raises a `RuntimeError`, as far as torch sees it; then all is as before."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says of itself that it does not see all
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def device_name(device: torch.device) -> str:
    """What a device is called: the model of a GPU, otherwise its type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
