"""Somebody else's checkpoints: pruned configs tampered with, and what loading them may do. It imports no hf_oto.

As a script it loads them in an interpreter where hf_oto cannot be imported, through the code that came with each:

    python tests/hostile.py FOLDER_OF_CHECKPOINTS EXAMPLES
"""

import copy
import itertools
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Values that a field may not have, or may: numbers of every kind and size, and what is no number.
NUMBERS = st.sampled_from([-(10**30), -1, 0, 1, 2, 3, 4, 8, 16, 24, 32, 64, 10**4, 2**31, 2**63, 10**30])
NO_NUMBERS = st.one_of(
    st.sampled_from([None, True, False, "", "3", "32", "x", 2.5, 3.0, 32.0, math.nan, math.inf, -math.inf]),
    st.recursive(
        NUMBERS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner), max_leaves=4
    ),
)
VALUES = NUMBERS | st.integers(-5, 70) | NO_NUMBERS
KEYS = st.sampled_from(["-1", "2", "7", "00", "1.0", "x", "", "99999999999", "٣", " 1"])
SIZES = ("vocab_size", "max_position_embeddings", "type_vocab_size", "embedding_size", "num_labels")
OTHERS = ("pad_token_id", "id2label", "dtype")
ALIASES = ("hidden_size", "num_attention_heads", "num_hidden_layers", "n_layers", "intermediate_size")
DISTILBERT = ("dim", "n_heads", "hidden_dim")


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that anything makes. Those on the meta device have none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return made


class Checkpoint:
    """A saved pruned model, and what it computes on a batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        data = load_file(folder / "data.safetensors")
        self.inputs = {key: data.pop(key) for key in ("input_ids", "attention_mask")}
        self.expected = data
        self.head = folder.name.partition("For")[2]
        first = self.config["per_layer_config"]["0"]
        self.heads, self.width = sorted(first, key=lambda name: "head" not in name)

    def fields(self) -> list[str]:
        """The fields that say how large anything is, with other families' names for them."""
        return [name for name in (*ALIASES, *SIZES, *DISTILBERT, "head_dim") if name in self.config]


@st.composite
def tampered(draw: st.DrawFn, checkpoint: Checkpoint, families: list[str]) -> dict[str, Any]:
    """A config that is not the checkpoint's own."""
    config = copy.deepcopy(checkpoint.config)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        layers = config.get("per_layer_config")
        whole = isinstance(layers, dict) and layers and all(isinstance(entry, dict) for entry in layers.values())
        change = draw(st.sampled_from(GLOBAL_CHANGES + LAYER_CHANGES * 2 if whole else GLOBAL_CHANGES))
        change(draw, config, checkpoint, families)
    assume(json.dumps(config) != json.dumps(checkpoint.config))
    return config


def set_field(draw: st.DrawFn, config: dict[str, Any], checkpoint: Checkpoint, families: list[str]) -> None:
    config[draw(st.sampled_from(checkpoint.fields()))] = draw(VALUES)


def set_another(draw: st.DrawFn, config: dict[str, Any], checkpoint: Checkpoint, families: list[str]) -> None:
    """A field that is not there: a second name of one that is, or one that is saved only at times."""
    config[draw(st.sampled_from(ALIASES + SIZES + OTHERS))] = draw(VALUES)


def remove_field(draw: st.DrawFn, config: dict[str, Any], checkpoint: Checkpoint, families: list[str]) -> None:
    config.pop(draw(st.sampled_from([*checkpoint.fields(), "per_layer_config"])), None)


def set_all_layers(draw: st.DrawFn, config: dict[str, Any], checkpoint: Checkpoint, families: list[str]) -> None:
    layers = config.get("per_layer_config")
    as_list = list(layers.values()) if isinstance(layers, dict) else layers
    config["per_layer_config"] = draw(st.sampled_from([{}, as_list, [as_list], {"0": layers}]) | VALUES)


def scale(draw: st.DrawFn, config: dict[str, Any], checkpoint: Checkpoint, families: list[str]) -> None:
    """Another hidden size, and heads that go with it."""
    factor = draw(st.sampled_from([2, 3, 2**20, 2**40]))
    for name in ("hidden_size", "dim", "head_dim"):
        if isinstance(config.get(name), int):
            config[name] *= factor


def another_family(draw: st.DrawFn, config: dict[str, Any], checkpoint: Checkpoint, families: list[str]) -> None:
    config["model_type"] = draw(st.sampled_from(families))


def some_layer(draw: st.DrawFn, config: dict[str, Any]) -> dict[str, Any]:
    layers = config["per_layer_config"]
    return layers[draw(st.sampled_from(sorted(layers)))]


def set_in_layer(draw: st.DrawFn, config: dict[str, Any], checkpoint: Checkpoint, families: list[str]) -> None:
    names = [checkpoint.heads, checkpoint.width, *ALIASES[:3], "head_dim", "skip"]
    some_layer(draw, config)[draw(st.sampled_from(names[:2] * 4 + names))] = draw(st.integers(0, 24) | VALUES)


def remove_in_layer(draw: st.DrawFn, config: dict[str, Any], checkpoint: Checkpoint, families: list[str]) -> None:
    some_layer(draw, config).pop(draw(st.sampled_from([checkpoint.heads, checkpoint.width])), None)


def change_by_one(draw: st.DrawFn, config: dict[str, Any], checkpoint: Checkpoint, families: list[str]) -> None:
    """Off by one, as a hand might be: the weights know better."""
    layer, name = some_layer(draw, config), draw(st.sampled_from([checkpoint.heads, checkpoint.width]))
    if isinstance(layer.get(name), int):
        layer[name] += draw(st.sampled_from([-1, 1]))


def set_layer(draw: st.DrawFn, config: dict[str, Any], checkpoint: Checkpoint, families: list[str]) -> None:
    layers = config["per_layer_config"]
    layers[draw(st.sampled_from(sorted(layers)))] = draw(VALUES)


def move_layer(draw: st.DrawFn, config: dict[str, Any], checkpoint: Checkpoint, families: list[str]) -> None:
    """A layer that is there twice, or has a number that there is not; the count of layers may follow."""
    layers = config["per_layer_config"]
    key, entry = draw(KEYS), copy.deepcopy(some_layer(draw, config))
    if draw(st.booleans()):
        layers.pop(draw(st.sampled_from(sorted(layers))))
    layers[key] = entry
    if draw(st.booleans()):
        config["num_hidden_layers"] = len(layers)


def remove_layer(draw: st.DrawFn, config: dict[str, Any], checkpoint: Checkpoint, families: list[str]) -> None:
    layers = config["per_layer_config"]
    layers.pop(draw(st.sampled_from(sorted(layers))))
    if draw(st.booleans()):
        config.update({name: len(layers) for name in ("num_hidden_layers", "n_layers") if name in config})


def swap_layers(draw: st.DrawFn, config: dict[str, Any], checkpoint: Checkpoint, families: list[str]) -> None:
    layers = config["per_layer_config"]
    one, other = draw(st.sampled_from(sorted(layers))), draw(st.sampled_from(sorted(layers)))
    layers[one], layers[other] = layers[other], layers[one]


GLOBAL_CHANGES = [set_field, set_another, remove_field, set_all_layers, scale, another_family]
LAYER_CHANGES = [set_in_layer, remove_in_layer, change_by_one, set_layer, move_layer, remove_layer, swap_layers]


def outcome(checkpoint: Checkpoint, config: dict[str, Any], load: Callable[[Checkpoint, Path], Any]) -> str:
    """
    Load the checkpoint's weights with a config. The result is `"refused"`, `"do not fit"` or `"the same"`.

    Raises:
        `AssertionError`: It went another way: another error, one that names no field, another model, or more memory
            than the model itself takes.
    """
    folder = checkpoint.folder / "tampered"
    folder.mkdir(exist_ok=True)
    for path in checkpoint.folder.iterdir():
        if path.suffix in (".py", ".safetensors") and not (folder / path.name).exists():
            (folder / path.name).hardlink_to(path)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    limit = (checkpoint.folder / "model.safetensors").stat().st_size
    try:
        with Largest() as largest:
            model = load(checkpoint, folder)
    except (ValueError, TypeError) as error:
        found, message = "refused", str(error)
        if "do not fit its config" in message:
            found = "do not fit"
        else:
            names = {*checkpoint.config, *ALIASES, *SIZES, *OTHERS, *DISTILBERT}
            marks = ("`{}", "'{}'", "config.{} ")
            assert any(mark.format(name) in message for name in names for mark in marks), message
        assert len(message) < 1500, message
    else:
        if config.get("pad_token_id") == checkpoint.config["pad_token_id"]:  # any token may stand for padding
            with torch.no_grad():
                actual = model(**checkpoint.inputs)
            for name, value in checkpoint.expected.items():
                assert float((actual[name] - value).abs().max()) <= 1e-5 * float(value.abs().max()), name
        found = "the same"
    assert largest.bytes <= limit, f"a tensor of {largest.bytes} bytes"
    return found


def fuzz(root: Path, load: Callable[[Checkpoint, Path], Any], examples: int) -> Counter:
    """
    What became of different tampered configs, counted; as many as asked for, at least.

    Args:
        root (`Path`): A folder of checkpoints, each named by its dense class.
        load (`Callable`): Loads a checkpoint's copy with another config from a folder.
        examples (`int`): How many.
    """
    checkpoints = [Checkpoint(folder) for folder in sorted(root.iterdir())]
    families = sorted(checkpoint.config["model_type"] for checkpoint in checkpoints)
    seen: set[str] = set()
    found: Counter = Counter()

    @settings(
        max_examples=examples * 3 // 2,  # some come twice
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(checkpoints).flatmap(lambda one: st.tuples(st.just(one), tampered(one, families))))
    def run(case: tuple[Checkpoint, dict[str, Any]]) -> None:
        checkpoint, config = case
        text = json.dumps(config, sort_keys=True)
        if text in seen:
            return
        seen.add(text)
        try:
            found[outcome(checkpoint, config, load)] += 1
        except BaseException as error:
            changed = {key: value for key, value in config.items() if value != checkpoint.config.get(key)}
            gone = sorted(set(checkpoint.config) - set(config))
            raise AssertionError(f"{checkpoint.folder.name} with {changed}, without {gone}") from error

    run()
    return found


class NoPackage:
    """An import hook: hf_oto is not there."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "hf_oto":
            raise ImportError(f"No module named {name!r}: blocked")


def main() -> None:
    sys.meta_path.insert(0, NoPackage())
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)

    classes: dict[Path, Any] = {}
    turn = itertools.count()

    def load(checkpoint: Checkpoint, folder: Path) -> Any:
        auto = getattr(transformers, f"AutoModelFor{checkpoint.head}")
        if checkpoint.folder not in classes:
            classes[checkpoint.folder] = type(auto.from_pretrained(checkpoint.folder, trust_remote_code=True))
        travelled = classes[checkpoint.folder]
        assert travelled.__module__.startswith("transformers_modules."), travelled.__module__
        if next(turn) % 10:
            return travelled.from_pretrained(folder)
        return auto.from_pretrained(folder, trust_remote_code=True)  # which finds and copies the code anew: slow

    print(json.dumps(fuzz(Path(sys.argv[1]), load, int(sys.argv[2]))))


if __name__ == "__main__":
    main()
