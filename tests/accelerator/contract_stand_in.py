"""What the stand-in has to do as an accelerator does, so that the other contracts can fail on it."""

import os

import pytest
import torch

if not os.environ.get("HF_OTO_TEST_DEVICE", "").startswith("standin"):
    pytest.skip("of the stand-in alone", allow_module_level=True)

from accelerator import StandIn, waits

HERE = torch.arange(4.0)


def test_tensors_of_two_devices_do_not_mix(device):
    there = HERE.to(device)
    assert isinstance(there, StandIn) and there.device == device and torch.equal(there.cpu(), HERE)
    index = torch.tensor([0, 2])
    for mixed in (
        lambda: there + HERE,
        lambda: HERE + there,
        lambda: torch.cat([there, HERE]),
        lambda: there.index_select(0, index),
        lambda: there.clone().index_fill_(0, index, 0),
        lambda: HERE[index.to(device)],
    ):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device, .* standin:0 and cpu"):
            mixed()
    assert (there + torch.tensor(1.0)).tolist() == [1, 2, 3, 4]  # numbers are taken
    assert there[index].tolist() == [0, 2]
    with pytest.raises(TypeError, match="Use Tensor.cpu"):
        there.numpy()


def test_there_is_no_float64(device):
    for wide in (
        lambda: HERE.double().to(device),
        lambda: HERE.to(device).double(),
        lambda: torch.zeros(2, device=device, dtype=torch.float64),
        lambda: HERE.to(device).sum(dtype=torch.float64),
    ):
        with pytest.raises(TypeError, match="standin has no torch.float64"):
            wide()
    doubled = HERE.to(device) * torch.tensor(2.0, dtype=torch.float64)  # by a number from the CPU
    assert doubled.dtype == torch.float32 and doubled.tolist() == [0, 2, 4, 6]


def test_what_the_host_waits_for_is_noted(device):
    there = HERE.to(device)
    with waits() as none:
        torch.zeros(3, device=device).add_(1).mul(there[:3]).sum()
        torch.where(there > 1, there, 0.0)
        there.add_(torch.tensor(0.0)).copy_(HERE, non_blocking=True)
        torch.tensor([], device=device)
    assert none == []
    for waiting in (
        lambda: there.sum().item(),
        lambda: bool((there > 1).any()),
        lambda: there.nonzero(),
        lambda: there[there > 1],
        lambda: there.cpu(),
        lambda: there.tolist(),
        lambda: HERE.clone().copy_(there),
        lambda: HERE.to(device),
        lambda: there.clone().copy_(HERE),
        lambda: there[torch.tensor([0, 2])],
        lambda: there[[0, 2]],
        lambda: torch.tensor([0, 2], device=device),
    ):
        with waits() as noted:
            waiting()
        assert len(noted) == 1


def test_a_moved_parameter_stays_the_same_object(device):
    layer = torch.nn.Linear(4, 2)
    weight = layer.weight
    assert layer.to(device).weight is weight and weight.device == device and isinstance(weight, torch.nn.Parameter)
    layer(HERE.to(device)).sum().backward()
    assert weight.grad.device == device
