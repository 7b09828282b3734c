"""Reads the imports of hf_oto, without running them, and fails on any against the design's direction."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_oto"

# A room imports from rooms of a higher number only.
LEVELS = {
    "cli": 0,
    **dict.fromkeys(("trainer", "benchmark", "measuring", "scoring"), 1),
    "checks": 2,
    **dict.fromkeys(("report", "distillation", "surgery", "hspg", "answering", "exporting"), 3),
    **dict.fromkeys(("modeling", "saliency", "budget", "schedule", "parts", "contexts"), 4),
    "groups": 5,
    "architectures": 6,
    **dict.fromkeys(("config", "inputs", "pictures"), 7),
    "latency": 8,
}
TORCH_ONLY = {"hspg", "saliency", "budget", "schedule", "parts", "groups", "architectures", "config"}
TORCH_ONLY |= {"latency"}
TRAVELLING = {"modeling", "architectures"}  # copied beside the weights, where no other room is
UNPICKLERS = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PUBLIC = {"OTOConfig", "OTOTrainer", "HSPG", "QuestionAnswerer", "partition", "compress", "gather"}
PUBLIC |= {"measure_latency", "shrink", "summarize"}


def imports(tree: ast.AST) -> tuple[set[str], set[str]]:
    """Rooms of hf_oto and top-level outside modules imported anywhere in the file; the package itself is room ""."""
    dotted = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            dotted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ("hf_oto" if node.level else "", node.module)))
            # `from . import groups` imports a room, `from . import partition` the package.
            dotted |= {f"{module}.{alias.name}" for alias in node.names} if module == "hf_oto" else {module}
    paths = [name.split(".") for name in dotted]
    rooms = {path[1] if path[1:] and path[1] in LEVELS else "" for path in paths if path[0] == "hf_oto"}
    return rooms, {path[0] for path in paths} - {"hf_oto"}


def violations(room: str, source: str) -> list[str]:
    tree = ast.parse(source)
    rooms, outside = imports(tree)
    found = [f"{room} -> {other or 'hf_oto'}" for other in rooms if LEVELS.get(other, 0) <= LEVELS[room]]
    if room in TRAVELLING:
        found += [f"{room} -> {other}: does not travel" for other in rooms - TRAVELLING]
    outside -= sys.stdlib_module_names - UNPICKLERS
    if room in TORCH_ONLY:
        found += [f"{room} -> {other}: torch only" for other in outside - {"torch"}]
    if room == "modeling":
        found += [f"{room} -> {other}: torch and transformers only" for other in outside - {"torch", "transformers"}]
    found += [f"{room} -> {other}: unpickles" for other in outside & UNPICKLERS]
    found += [f"{room} -> {other}" for other in outside & {"examples", "tests"}]
    found += [
        f"{room}: torch.load"
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load")
        or (isinstance(node, ast.ImportFrom) and node.module == "torch" and "load" in {a.name for a in node.names})
    ]
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_imports_follow_the_design(path):
    if path.stem != "__init__":
        assert path.stem in LEVELS, f"{path.name} has no place in the design; give it a level."
        assert violations(path.stem, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("groups", "from .hspg import HSPG"),
        ("hspg", "from . import surgery"),
        ("report", "def late():\n    import hf_oto.trainer"),
        ("surgery", "from hf_oto import partition"),
        ("budget", "from .saliency import update_saliency"),
        ("hspg", "import transformers"),
        ("config", "import numpy as np"),
        ("modeling", "from .groups import partition"),
        ("modeling", "import safetensors"),
        ("architectures", "from .config import OTOConfig"),
        ("trainer", "import pickle"),
        ("trainer", "import torch\ntorch.load('x')"),
        ("trainer", "from torch import load"),
        ("trainer", "import examples.squad"),
    ],
)
def test_the_check_sees_what_is_wrong(room, source):
    assert violations(room, source)


def test_public_names_exist():
    import hf_oto

    assert set(hf_oto.__all__) >= PUBLIC
    assert [name for name in hf_oto.__all__ if not hasattr(hf_oto, name)] == []
