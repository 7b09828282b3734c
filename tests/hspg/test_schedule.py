"""Schedule: every step has one stage, and the share ramps up to the target."""

import json
import math
import re

import numpy as np
import pytest
import torch
from families import tiny_model
from hypothesis import given
from hypothesis import strategies as st

from hf_oto import HSPG, OTOConfig, partition
from hf_oto.hspg.schedule import Schedule


def test_the_default_run():
    schedule = Schedule.from_config(OTOConfig(), 1000)
    assert schedule.boundaries == tuple(150 + 45 * period for period in range(11))
    assert [schedule.stage(step) for step in (0, 149, 150, 599, 600, 999, 5000)] == [
        *["warmup"] * 2,
        *["pruning"] * 2,
        *["recovery"] * 3,
    ]
    assert [schedule.starts_period(step) for step in (149, 150, 151, 195, 555, 600)] == [False, True, False, True] + [
        True,
        False,
    ]
    assert [schedule.steps_left(step) for step in (150, 151, 194, 195, 599)] == [45, 44, 1, 45, 1]


def test_saliency_is_observed_up_to_the_last_selection():
    schedule = Schedule.from_config(OTOConfig(pruning_periods=2, pruning_start_ratio=0.1, pruning_end_ratio=0.5), 100)
    assert schedule.boundaries == (10, 30, 50)
    assert [step for step in range(100) if schedule.observed(step, 4, 0.98)] == [2, 6, *range(10, 31, 4)]
    assert [step for step in range(100) if schedule.observed(step, 1, 0.98)] == list(range(31))
    without_target = Schedule.from_config(OTOConfig(target_sparsity=None), 100)
    assert not any(without_target.observed(step, 1, 0.98) for step in range(100))


def test_what_a_selection_has_forgotten_is_not_observed():
    """Steps that together weigh less than a hundredth of the running mean: 0.98^228 < 0.01 ≤ 0.98^227."""
    schedule = Schedule.from_config(
        OTOConfig(pruning_periods=2, pruning_start_ratio=0.1, pruning_end_ratio=0.5), 10_000
    )
    observed = [step for step in range(10_000) if schedule.observed(step, 1, 0.98)]
    assert observed == [*range(1000 - 227, 1001), *range(3000 - 227, 3001)]
    assert [step for step in range(10_000) if schedule.observed(step, 1, 0.0)] == [1000, 3000]
    assert [step for step in range(10_000) if schedule.observed(step, 100, 0.98)] == [
        *(800, 900, 1000),
        *(2800, 2900, 3000),
    ]
    assert [step for step in range(10_000) if schedule.observed(step, 1, 0.9999)] == list(range(3001))


def test_the_share_is_a_cubic_ramp():
    schedule = Schedule.from_config(OTOConfig(target_sparsity=0.8, pruning_periods=4), 100)
    # s·(1 − (1 − j/4)³) with s = 0.8: 1 − 27/64, 1 − 8/64, 1 − 1/64, 1 of it
    shares = [schedule.share(boundary) for boundary in schedule.boundaries[:-1]]
    assert shares == pytest.approx([0.8 * 37 / 64, 0.8 * 56 / 64, 0.8 * 63 / 64, 0.8], rel=1e-12)
    assert shares[-1] == 0.8  # to the bit: the target itself


def test_without_a_target_there_are_two_stages():
    schedule = Schedule.from_config(OTOConfig(target_sparsity=None, pruning_start_ratio=0.25), 40)
    assert [schedule.stage(step) for step in (0, 9, 10, 39)] == ["warmup", "warmup", "half-space", "half-space"]
    assert schedule.periods == 0


@pytest.mark.parametrize("total", [0, -3])
def test_a_run_has_steps(total):
    with pytest.raises(ValueError, match=f"`total_steps` must be at least 1, got {total}"):
        Schedule.from_config(OTOConfig(), total)


@pytest.mark.parametrize("total", [60.0, 24.5, math.inf, "24", None, True])
def test_the_steps_of_a_run_are_counted(total):
    with pytest.raises(TypeError, match=re.escape(f"`total_steps` must be an integer, got {total!r}. Give")):
        Schedule.from_config(OTOConfig(), total)


def test_an_integer_of_numpy_counts():
    optimizer = of(tiny_model("BertModel"), np.int64(24))
    assert json.loads(optimizer.param_groups[0]["hspg_settings"])["total_steps"] == 24
    optimizer.reschedule(np.int32(30))
    assert optimizer.state_dict()["param_groups"] == of(tiny_model("BertModel"), 30).state_dict()["param_groups"]


def of(model, total_steps):
    base = torch.optim.AdamW(model.named_parameters())
    return HSPG(base, partition(model), OTOConfig(min_neurons=4, round_to=4), total_steps)


def test_a_short_run_has_as_many_periods_as_steps_of_pruning():
    assert Schedule.from_config(OTOConfig(), 22).periods == 10  # 3 … 13: ten periods of one step
    assert Schedule.from_config(OTOConfig(), 20).boundaries == tuple(range(3, 13))
    assert [Schedule.from_config(OTOConfig(), total).boundaries for total in (5, 1)] == [(1, 2, 3), (0, 1)]
    with pytest.raises(
        ValueError, match="a run of 3 steps has none between `pruning_start_ratio`=0.5 and `pruning_end_r"
    ):
        Schedule.from_config(OTOConfig(pruning_start_ratio=0.5), 3)


@given(
    st.integers(1, 3000), st.floats(0, 0.9), st.floats(0.01, 1), st.integers(1, 40), st.floats(0, 1, exclude_max=True)
)
def test_every_period_has_a_step_and_an_end(total, warmup, length, periods, target):
    end = min(warmup + length, 1.0)
    config = OTOConfig(
        target_sparsity=target, pruning_start_ratio=warmup, pruning_end_ratio=end, pruning_periods=periods
    )
    try:
        schedule = Schedule.from_config(config, total)
    except ValueError:
        assert round(end * total) - round(warmup * total) < 1
        return
    first, last = schedule.boundaries[0], schedule.boundaries[-1]
    assert (first, last) == (round(warmup * total), round(end * total))
    starts = [step for step in range(total) if schedule.starts_period(step)]
    assert len(starts) == schedule.periods == min(periods, last - first)
    shares = [schedule.share(step) for step in range(first, last)]
    assert shares == sorted(shares) and shares[-1] == target
    left = [schedule.steps_left(step) for step in range(first, last)]
    assert left.count(1) == schedule.periods and min(left) == 1
    # It counts down to 1, and a period starts anew.
    for step, (now, then) in enumerate(zip(left, left[1:], strict=False), start=first):
        assert then == now - 1 if now > 1 else schedule.starts_period(step + 1)


def test_a_leg_for_every_size():
    """Of 3 sizes the first gets two of four parts; the later ones have no warm-up, and 45 : 40 of pruning stays."""
    config = OTOConfig(target_sparsity=0.7, milestones=(0.3, 0.5), pruning_periods=2)
    schedule = Schedule.from_config(config, 400)
    assert [(leg.before, leg.share, leg.start, leg.boundaries, leg.end) for leg in schedule.legs] == [
        (0.0, 0.3, 0, (30, 75, 120), 200),
        (0.3, 0.5, 200, (200, 226, 253), 300),
        (0.5, 0.7, 300, (300, 326, 353), 400),
    ]
    stages = [schedule.stage(step) for step in (29, 30, 119, 120, 199, 200, 252, 253, 299, 300, 353, 400)]
    assert stages == ["warmup", *["pruning", "pruning", "recovery", "recovery"] * 2, "pruning", "recovery", "recovery"]
    assert [schedule.share(step) for step in (30, 75, 200, 226, 300, 352)] == [
        *(pytest.approx(0.3 * 7 / 8), 0.3, pytest.approx(0.3 + 0.2 * 7 / 8), 0.5),
        *(pytest.approx(0.5 + 0.2 * 7 / 8), 0.7),
    ]
    reached = {step: schedule.reached(step) for step in (119, 120, 200, 201, 252, 253, 300, 352, 353, 400, 500)}
    assert reached == {
        **{119: None, 120: 0.3, 200: 0.3, 201: None, 252: None, 253: 0.5, 300: 0.5, 352: None},
        **{353: 0.7, 400: 0.7, 500: 0.7},
    }
    assert {step: schedule.finished(step) for step in range(401) if schedule.finished(step)} == {
        **{200: 0.3, 300: 0.5, 400: 0.7},
    }
    assert [step for step in range(121, 401) if schedule.observed(step, 1, 0.5)] == [
        step for selection in (200, 226, 300, 326) for step in range(selection - 6, selection + 1)
    ]
    assert [step for step in range(401) if schedule.period_end(step)] == [75, 120, 226, 253, 326, 353]


def test_a_leg_without_a_step_of_pruning_is_refused():
    config = OTOConfig(target_sparsity=0.7, milestones=(0.3, 0.5))
    with pytest.raises(ValueError, match="a run of 3 steps, of which 0 lead to 0.5, has none .* fewer `milestones`"):
        Schedule.from_config(config, 3)
    assert Schedule.from_config(config, 8).periods == 1
