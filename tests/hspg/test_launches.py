"""What a step launches on an accelerator, where time goes by launches: counted on any machine, by a dispatch mode."""

import pytest
import torch
from families import CONFIGS
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForQuestionAnswering

from hf_oto import HSPG, OTOConfig, partition
from hf_oto.hspg import acted_weights, devices

STEPS = 40  # warm-up 6, pruning 18, recovery 16
BARS = {"first": 500, "warmup": 60, "ordinary": 150, "selection": 500, "end": 500, "recovery": 6}
ASIDE = ("profiler::",)  # marks for a profiler, which launch nothing
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::is_nonzero")


class Launches(TorchDispatchMode):
    """Dispatched operations that are no views, and those among them that the host has to wait for."""

    def __init__(self):
        super().__init__()
        self.count = self.waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function._schema.name, kwargs or {}
        if not function.is_view and not name.startswith(ASIDE):
            self.count += 1
            by_mask = name in ("aten::index", "aten::index_put_") and any(
                index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
            )
            # Here all tensors are on the CPU: what would be a copy to it is a copy to where they are.
            moved = name == "aten::_to_copy" and "device" in kwargs and kwargs["device"] is not None
            self.waits += name in WAITS or by_mask or moved
        return function(*args, **kwargs)


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.setattr(devices, "gathers", lambda tensor: False)


def bert(hidden_size=48):
    """BERT-base's blocks and heads."""
    sizes = {"hidden_size": hidden_size, "intermediate_size": 4 * hidden_size}
    return BertForQuestionAnswering(
        BertConfig(**CONFIGS["bert"] | sizes | {"num_hidden_layers": 12, "num_attention_heads": 12})
    )


def kind_of(optimizer):
    schedule, step = optimizer.schedule, optimizer.steps_done
    if step == 0:
        return "first"
    if schedule.starts_period(step):
        return "selection"
    if step == schedule.boundaries[-1]:
        return "end"  # what has become zero is looked at once more
    if optimizer.stage == "pruning":
        return "end" if schedule.steps_left(step) == 1 else "ordinary"
    return optimizer.stage


@pytest.mark.parametrize("periods", [2, 6])
def test_a_step_launches_no_more_than_its_bar(periods, accelerator):
    torch.manual_seed(0)
    model = bert()
    twin = torch.optim.AdamW([torch.nn.Parameter(p.detach().clone()) for p in model.parameters()], fused=True)
    optimizer = HSPG(
        torch.optim.AdamW(model.named_parameters(), fused=True),
        partition(model),
        OTOConfig(pruning_periods=periods, round_to=1),
        STEPS,
    )
    most, waits = dict.fromkeys(BARS, 0), dict.fromkeys(BARS, 0)
    while optimizer.steps_done < STEPS:
        for mine, other in zip(model.parameters(), twin.param_groups[0]["params"], strict=True):
            mine.grad = torch.randn_like(mine) * 0.01 * (mine != 0)  # as those of what the model computes
            other.grad = mine.grad
        kind = kind_of(optimizer)
        with Launches() as launches:
            optimizer.observe()
            optimizer.step()
        if kind == "first":  # AdamW makes its state, three tensors of each parameter
            with Launches() as base:
                twin.step()
            launches.count -= base.count
        most[kind], waits[kind] = max(most[kind], launches.count), max(waits[kind], launches.waits)
    assert optimizer.target_reached and all(most.values())
    assert {kind: count for kind, count in most.items() if count > BARS[kind]} == {}
    assert {kind: waits[kind] for kind in ("warmup", "ordinary", "recovery")} == {
        "warmup": 0,
        "ordinary": 0,
        "recovery": 0,
    }


def test_what_a_period_acts_on_is_laid_out_once(accelerator, monkeypatch):
    """Which copies the groups' numbers to the device, so that the host waits."""
    laid_out, find = [], acted_weights.ActedWeights._find
    monkeypatch.setattr(acted_weights.ActedWeights, "_find", lambda acted: laid_out.append(acted) or find(acted))
    model = bert()
    config = OTOConfig(pruning_periods=2, round_to=1)
    optimizer = HSPG(torch.optim.SGD(model.named_parameters(), lr=0.1), partition(model), config, STEPS)
    while optimizer.stage != "recovery":
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) * 0.01 * (parameter != 0)
        optimizer.step()
    assert len(laid_out) == 2


def test_the_counts_see_what_waits(accelerator):
    values = torch.arange(4.0)
    for waiting in (values.sum().item, values.nonzero, lambda: values[values > 1], lambda: bool((values > 1).all())):
        with Launches() as launches:
            waiting()
        assert launches.waits
    with Launches() as launches:
        values.view(2, 2).t().add_(1)
    assert (launches.count, launches.waits) == (1, 0)
