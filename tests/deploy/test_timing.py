"""How a call is timed on a GPU: what is asked of CUDA is written down here, where there is none."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from hf_oto.deploy.timing import EVENTS, GRAPH, Timer

CURRENT, OTHER = 0, torch.device("cuda", 1)
WAITS = "called a synchronizing CUDA operation"


class Cuda:
    """Stands for `torch.cuda` with two GPUs, the first of them current, and a model on the second."""

    def __init__(self, fails=False):
        self.fails, self.recording, self.mode, self.index = fails, False, 1, CURRENT
        self.streams = {index: SimpleNamespace(index=index, wait_stream=lambda other: None) for index in (0, 1)}
        self.defaults = dict(self.streams)
        self.events, self.synchronized = [], []
        self.CUDAGraph = lambda: SimpleNamespace(replay=lambda: self.events.append("replay"))
        self.Event = lambda enable_timing: SimpleNamespace(
            record=lambda: self.events.append(self.index), synchronize=lambda: None, elapsed_time=lambda end: 40.0
        )

    @contextmanager
    def device(self, device):
        before, self.index = self.index, device.index
        yield
        self.index = before

    def Stream(self):  # noqa: N802 (as it is called there)
        return SimpleNamespace(index=self.index, wait_stream=lambda other: None)

    def current_stream(self):
        return self.streams[self.index]

    def set_stream(self, stream):
        self.streams[stream.index] = stream

    @contextmanager
    def stream(self, stream):
        before = self.streams[stream.index]
        self.set_stream(stream)
        try:
            yield
        finally:
            self.set_stream(before)

    @contextmanager
    def graph(self, graph, stream):
        before = self.streams[stream.index]
        self.set_stream(stream)
        self.recording = True
        yield
        self.recording = False
        if self.fails:  # as torch does it
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self.set_stream(before)

    def synchronize(self):
        self.synchronized.append(self.index)

    def get_sync_debug_mode(self):
        return self.mode

    def set_sync_debug_mode(self, mode):
        self.mode = mode


def timed(monkeypatch, cuda, waits=False):
    """A timer of a call on the second GPU, and what was so at each of its calls: device, stream, mode, recording."""
    calls = []

    def call():
        calls.append((cuda.index, cuda.current_stream() is cuda.defaults[1], cuda.mode, cuda.recording))
        if waits and cuda.mode == "error":
            raise RuntimeError(WAITS)

    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch, "get_device_module", lambda device: cuda)  # torch keeps what it has found
    timer = Timer(call, OTHER)
    assert cuda.index == CURRENT and cuda.streams == cuda.defaults and cuda.mode == 1  # as it was
    return timer, calls


def test_a_call_is_recorded_and_timed_on_its_own_device(monkeypatch):
    cuda = Cuda()
    timer, calls = timed(monkeypatch, cuda)
    usual, asked, recorded = (1, False, 1, False), (1, False, "error", False), (1, False, 1, True)
    assert calls == [usual] * 3 + [asked, recorded] and timer.method == GRAPH
    assert timer() == 40.0 / 20 and cuda.events == [1, *["replay"] * 20, 1] and cuda.index == CURRENT
    assert len(calls) == 5


def test_what_waits_is_never_recorded(monkeypatch, caplog):
    cuda = Cuda()
    timer, calls = timed(monkeypatch, cuda, waits=True)
    assert timer.method == EVENTS and not any(recorded for *_, recorded in calls)
    assert f"No CUDA graph can be made of the forward, it is timed by events: {WAITS}" in caplog.text
    calls.clear()
    assert timer() == 40.0 / 20 and calls == [(1, True, 1, False)] * 20 and cuda.events == [1, 1]


def test_a_recording_that_fails_leaves_the_stream_as_it_was(monkeypatch, caplog):
    cuda = Cuda(fails=True)
    timer, _ = timed(monkeypatch, cuda)
    assert timer.method == EVENTS and cuda.synchronized == [1] and "during capture" in caplog.text


def test_devices_without_a_choice_of_the_current_one_are_timed(monkeypatch):
    """Apple's have one."""
    cuda = Cuda()
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(Event=cuda.Event))
    timer = Timer(lambda: None, torch.device("mps"))
    assert timer.method == EVENTS and timer() == pytest.approx(2)
