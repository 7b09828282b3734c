"""OTOConfig: every rule with its message, and the way to JSON and back."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
from families import made_table, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from transformers import HfArgumentParser

from hf_oto.config import CONFIG_NAME, SALIENCIES, STRUCTURES, TARGET_UNITS, OTOConfig
from hf_oto.models.groups import partition

NAN = math.nan
share = st.floats(0, 1, exclude_max=True)
# What a valid config may hold; warm-up and pruning end are drawn on either side of 0.5.
TABLE = made_table(partition(tiny_model("BertModel")))
VALID = st.builds(
    lambda target_unit, **settings: OTOConfig(
        target_unit=target_unit, latency_table=TABLE if target_unit == "latency" else None, **settings
    ),
    target_sparsity=st.none() | share,
    target_unit=st.sampled_from(TARGET_UNITS),
    sequence_length=st.integers(1, 10**6),
    structures=st.sampled_from([("heads",), ("neurons",), STRUCTURES, STRUCTURES[::-1]]),
    pruning_start_ratio=st.floats(0, 0.49),
    pruning_end_ratio=st.floats(0.5, 1),
    pruning_periods=st.integers(1, 1000),
    saliency=st.sampled_from(SALIENCIES),
    saliency_decay=share,
    saliency_interval=st.integers(1, 1000),
    epsilon=share,
    lmbda=st.floats(0, allow_infinity=False),
    min_heads=st.integers(0, 64),
    min_neurons=st.integers(0, 4096),
    round_to=st.integers(1, 64),
    shrink_during_training=st.booleans(),
    keep_dropout=st.booleans(),
)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        *[
            (name, value, f"`{name}` must be in [0, 1), got {value}.")
            for name in ("target_sparsity", "pruning_start_ratio", "saliency_decay", "epsilon")
            for value in (-0.1, 1.0, 1.5, NAN, math.inf)
        ],
        *[("pruning_end_ratio", x, f"`pruning_end_ratio` must be in [0, 1], got {x}.") for x in (-0.1, 1.01, NAN)],
        *[("lmbda", x, f"`lmbda` must be in [0, inf), got {x}.") for x in (-1e-3, NAN, math.inf)],
        *[
            ("distillation_hidden_weight", x, f"`distillation_hidden_weight` must be in [0, inf), got {x}.")
            for x in (-1, math.inf)
        ],
        *[("distillation_weight", x, f"`distillation_weight` must be in [0, 1], got {x}.") for x in (-0.1, 1.1)],
        ("distillation_temperature", -1, "`distillation_temperature` must be in [0, inf), got -1."),
        ("distillation_temperature", 0.0, "`distillation_temperature` must be above 0, got 0"),
        ("sequence_length", 0, "`sequence_length` must be at least 1, got 0."),
        ("pruning_periods", 0, "`pruning_periods` must be at least 1, got 0."),
        ("saliency_interval", 0, "`saliency_interval` must be at least 1, got 0."),
        ("round_to", 0, "`round_to` must be at least 1, got 0."),
        ("min_heads", -1, "`min_heads` must be at least 0, got -1."),
        ("min_neurons", -1, "`min_neurons` must be at least 0, got -1."),
        ("target_unit", "flops", "`target_unit` must be one of params, macs, groups, latency, got 'flops'."),
        (
            "target_unit",
            "latency",
            "`target_unit`=\"latency\" and `latency_table` need each other, got 'latency' and no",
        ),
        ("latency_table", TABLE, "`latency_table` need each other, got 'params' and a table."),
        ("saliency", "hessian", "`saliency` must be one of fisher, taylor, magnitude, random, got 'hessian'."),
        ("structures", ["layers"], "`structures` must be one of heads, neurons, got 'layers'."),
        ("structures", [], "`structures` must name each structure once and at least one, got ()."),
        ("structures", ["heads"] * 2, "`structures` must name each structure once and at least one, got ('heads', "),
        ("pruning_start_ratio", 0.6, "`pruning_start_ratio` must be below `pruning_end_ratio`, got 0.6 and 0.6"),
    ],
)
def test_bad_value_is_refused(name, value, rule):
    with pytest.raises(ValueError, match=re.escape(rule)):
        OTOConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        *[
            (name, value, f"`{name}` must be a number, got {value!r}.")
            for name in (
                "target_sparsity",
                "pruning_start_ratio",
                "pruning_end_ratio",
                "saliency_decay",
                "epsilon",
                "lmbda",
            )
            for value in (True, "0.5")
        ],
        *[
            (name, value, f"`{name}` must be an integer, got {value!r}.")
            for name in ("sequence_length", "pruning_periods", "min_heads", "min_neurons", "round_to")
            for value in (True, 8.0, "8", None)
        ],
        ("latency_table", 7, "`latency_table` must be a LatencyTable, its dict or its file, got int."),
        ("structures", "heads", "`structures` must be a list of names, got 'heads'."),
        ("structures", None, "`structures` must be a list of names, got None."),
        *[
            (name, x, f"`{name}` must be True or False, got {x!r}.")
            for name in ("shrink_during_training", "keep_dropout")
            for x in (1, "yes", None)
        ],
    ],
)
def test_wrong_type_is_refused(name, value, rule):
    with pytest.raises(TypeError, match=re.escape(rule)):
        OTOConfig(**{name: value})


@pytest.mark.parametrize(
    ("settings", "error", "rule"),
    [
        (
            {"milestones": (0.5, 0.3)},
            ValueError,
            "must rise from above 0 to below `target_sparsity`=0.7, got [0.5, 0.3]",
        ),
        ({"milestones": (0.3, 0.3)}, ValueError, "must rise"),
        ({"milestones": (0.3, 0.7)}, ValueError, "leave the target itself out"),
        ({"milestones": (0.0, 0.3)}, ValueError, "must rise from above 0"),
        ({"milestones": (0.3, 0.3000001)}, ValueError, "must rise"),  # folders of one name
        ({"milestones": (1e-9,)}, ValueError, "must rise from above 0"),
        ({"milestones": (1.5,)}, ValueError, "`milestones: a share` must be in [0, 1), got 1.5."),
        ({"milestones": (0.3,), "target_sparsity": None}, ValueError, "need a `target_sparsity`"),
        ({"milestones": 0.3}, TypeError, "must be a list of shares, as in (0.3, 0.5), got 0.3."),
        ({"milestones": ("a third",)}, TypeError, "must be a number, got 'a third'."),
    ],
)
def test_milestones_rise_to_the_target(settings, error, rule):
    with pytest.raises(error, match=re.escape(rule)):
        OTOConfig(**{"target_sparsity": 0.7, **settings})


def test_milestones_come_from_lists_numpy_and_words():
    for given_ in ([0.3, 0.5], np.array([0.3, 0.5]), (np.float64(0.3), 0.5)):
        config = OTOConfig(target_sparsity=0.7, milestones=given_)
        assert config.milestones == (0.3, 0.5) and OTOConfig.from_dict(config.to_dict()) == config
    parser = HfArgumentParser(OTOConfig)
    (read,) = parser.parse_args_into_dataclasses(["--target_sparsity", "0.7", "--milestones", "0.3", "0.5"])
    assert read.milestones == (0.3, 0.5)


def test_limits_are_allowed():
    OTOConfig(
        target_sparsity=0, pruning_start_ratio=0.0, pruning_end_ratio=1, epsilon=0, lmbda=0, min_heads=0, min_neurons=0
    )
    # Without a target nothing is pruned between the two ratios, so their order says nothing.
    OTOConfig(target_sparsity=None, pruning_start_ratio=0.9, pruning_end_ratio=0.1)


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        OTOConfig().target_sparsity = 0.9


@given(VALID)
def test_json_round_trip(config):
    assert OTOConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False))) == config


def test_saved_config_is_loaded(tmp_path):
    config = OTOConfig(target_sparsity=0.3, structures=["neurons"], min_neurons=0)
    config.save_pretrained(tmp_path / "new" / "folder")
    assert OTOConfig.from_pretrained(tmp_path / "new" / "folder") == config
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [CONFIG_NAME]


def test_a_save_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "oto_config.json").mkdir()
    with pytest.raises(OSError):
        OTOConfig().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["oto_config.json"]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"Unknown settings \['sparsity', 'targt'\]\. OTOConfig has: .*target_unit"):
        OTOConfig.from_dict({"targt": 0.5, "sparsity": 0.1, "epsilon": 0.0})


@pytest.mark.parametrize(("text", "rule"), [("{", "is not JSON"), ("[1]", "must hold one JSON object, got list")])
def test_bad_file_is_refused(tmp_path, text, rule):
    (tmp_path / CONFIG_NAME).write_text(text)
    with pytest.raises(ValueError, match=rule):
        OTOConfig.from_pretrained(tmp_path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"No {CONFIG_NAME} in"):
        OTOConfig.from_pretrained(tmp_path)


def test_numpys_numbers_are_numbers():
    numbers = {"target_sparsity": np.float32(0.5), "min_heads": np.int64(2), "uniform": np.bool_(True)}
    config = OTOConfig(**numbers, structures=np.array(["neurons"]))
    assert config == OTOConfig(target_sparsity=0.5, min_heads=2, uniform=True, structures=("neurons",))
    assert json.loads(json.dumps(config.to_dict()))["min_heads"] == 2
    with pytest.raises(ValueError, match=r"`target_sparsity` must be in \[0, 1\), got 1.5"):
        OTOConfig(target_sparsity=np.float64(1.5))
    with pytest.raises(TypeError, match="`min_heads` must be an integer, got 1.0"):
        OTOConfig(min_heads=np.float64(1))


def test_transformers_parser_reads_the_settings():
    parser = HfArgumentParser(OTOConfig)
    (config,) = parser.parse_args_into_dataclasses(["--structures", "heads", "neurons", "--target_sparsity", "0.3"])
    assert config == OTOConfig(target_sparsity=0.3)
    (config,) = parser.parse_args_into_dataclasses(["--structures", "neurons", "--shrink_during_training"])
    assert config == OTOConfig(structures=("neurons",), shrink_during_training=True)
    assert parser.parse_args_into_dataclasses([]) == (OTOConfig(),)
