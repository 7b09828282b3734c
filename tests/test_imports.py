"""Reads the imports of hf_oto, without running them, and fails on any against the design's direction."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_oto"

# A wing imports from wings of a higher number only, and inside a wing a room from rooms that come later in its list.
WINGS = {"": 0, "cli": 1, "training": 2, "deploy": 2, "report": 3, "hspg": 4, "models": 5, "config": 6, "renamed": 7}
ROOMS = {
    "cli": ["app", "inspect", "compress", "bench", "latency", "export", "answer", "loading", "printing"],
    "training": [
        *(
            "sentence_transformers",
            "trainer",
            "milestones",
            "pruning",
            "attaching",
            "learning_rate",
            "data_parallel",
            "checkpoints",
            "hub",
            "saving",
            "search",
        ),
        *("showing", "pruned_part", "refusals", "teaching", "distillation", "zeros"),
    ],
    "deploy": [
        *("benchmark", "latency_tables", "squad_scoring", "answering", "onnx_folder", "onnx_export"),
        *("pooling", "model_files", "threads", "timing"),
    ],
    "report": ["card", "milestones", "summary", "pictures", "tables"],
    "hspg": [
        *("optimizer", "acted_weights", "half_space", "progress", "shrinking", "selection", "budget", "saved_state"),
        *("base_optimizers", "saliency", "schedule", "stacked_weights", "group_weights", "sharding", "devices"),
    ],
    "models": [
        *("surgery", "comparing", "sharding", "empty_models", "modeling_oto", "registration", "groups", "modes"),
        *("example_inputs", "saved_names", "folders"),
        "configuration_oto",
    ],
    "config": ["config"],
    "renamed": ["renamed"],
}
TORCH_ONLY = {"hspg", "config", "renamed", "models.groups", "models.configuration_oto"}
TRAVELLING = {"models.modeling_oto", "models.configuration_oto"}  # copied beside the weights, where no other room is
UNPICKLERS = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PUBLIC = {"OTOConfig", "OTOTrainer", "HSPG", "QuestionAnswerer", "partition", "compress", "gather"}
PUBLIC |= {"measure_latency", "shrink", "summarize", "plot_run"}


def room_of(path: Path) -> str:
    """`models.groups`, `config`; nothing for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(room: str, tree: ast.AST) -> tuple[set[str], set[str]]:
    """Rooms of hf_oto and top-level outside modules imported anywhere in the file; the package itself is room ""."""
    package = ["hf_oto", *room.split(".")[:-1]]
    dotted = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            dotted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            # `from . import groups` imports a room, `from . import partition` the package.
            names = {f"{module}.{alias.name}" for alias in node.names}
            dotted |= names if module == "hf_oto" or module.removeprefix("hf_oto.") in WINGS else {module}
    inside = {name.removeprefix("hf_oto").lstrip(".") for name in dotted if name.split(".")[0] == "hf_oto"}
    return {known(name) for name in inside}, {name.split(".")[0] for name in dotted} - {"hf_oto"}


def known(name: str) -> str:
    """The room that a dotted name is in: `models.groups.partition` and `models.groups` are in `models.groups`."""
    wing, _, rest = name.partition(".")
    room = rest.partition(".")[0]
    return f"{wing}.{room}" if room in ROOMS.get(wing, ()) else wing if wing in WINGS else ""


def place(room: str) -> tuple[int, int]:
    wing, _, name = room.partition(".")
    return WINGS[wing], ROOMS[wing].index(name) if name else -1


def violations(room: str, source: str) -> list[str]:
    tree = ast.parse(source)
    rooms, outside = imports(room, tree)
    found = [f"{room} -> {other or 'hf_oto'}" for other in rooms if against(room, other)]
    if room in TRAVELLING:
        found += [f"{room} -> {other}: does not travel" for other in rooms - TRAVELLING]
    outside -= sys.stdlib_module_names - UNPICKLERS
    if room in TORCH_ONLY or room.split(".")[0] in TORCH_ONLY:
        found += [f"{room} -> {other}: torch only" for other in outside - {"torch"}]
    if room in TRAVELLING:
        found += [f"{room} -> {other}: torch and transformers only" for other in outside - {"torch", "transformers"}]
    if room.startswith("hspg."):
        allowed = {"models.groups", "config", "renamed"}
        found += [f"{room} -> {other}" for other in rooms if not other.startswith("hspg") and other not in allowed]
    found += [f"{room} -> {other}: unpickles" for other in outside & UNPICKLERS]
    found += [f"{room} -> {other}" for other in outside & {"examples", "tests"}]
    found += [
        f"{room}: torch.load"
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load")
        or (isinstance(node, ast.ImportFrom) and node.module == "torch" and "load" in {a.name for a in node.names})
    ]
    return found


def against(room: str, other: str) -> bool:
    (mine, own), (wing, theirs) = place(room), place(other)
    return (
        (wing, theirs) <= (mine, own) if wing == mine and room.split(".")[0] == other.split(".")[0] else wing <= mine
    )


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("**/*.py")), ids=lambda path: room_of(path) or "hf_oto")
def test_imports_follow_the_design(path):
    room = room_of(path)
    if path.stem == "__init__":
        if room:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            assert ast.get_docstring(tree) and len(tree.body) == 1, f"{path}: a wing's paragraph, and nothing else"
        return
    wing, _, name = room.partition(".")
    assert (name or wing) in ROOMS.get(wing, ()), f"{path} has no place in the design; give it one."
    assert violations(room, path.read_text(encoding="utf-8")) == []


def test_the_listing_shows_the_wings():
    assert {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.name != "__pycache__"} == {
        *("__init__", "py.typed"),
        *(WINGS.keys() - {""}),
    }


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("models.groups", "from ..hspg.optimizer import HSPG"),
        ("models.groups", "from .surgery import compress"),
        ("hspg.optimizer", "from ..models import surgery"),
        ("hspg.optimizer", "from ..report.summary import summarize"),
        ("report.summary", "def late():\n    import hf_oto.training.trainer"),
        ("training.trainer", "from ..deploy.answering import QuestionAnswerer"),
        ("deploy.answering", "from ..training.trainer import OTOTrainer"),
        ("models.surgery", "from hf_oto import partition"),
        ("models.surgery", "from .. import partition"),
        ("hspg.schedule", "from .saliency import update_saliency"),
        ("hspg.optimizer", "import transformers"),
        ("config", "from .models.groups import partition"),
        ("config", "import numpy as np"),
        ("models.modeling_oto", "from .groups import partition"),
        ("models.modeling_oto", "import safetensors"),
        ("models.configuration_oto", "from ..config import OTOConfig"),
        ("training.trainer", "import pickle"),
        ("training.trainer", "import torch\ntorch.load('x')"),
        ("training.trainer", "from torch import load"),
        ("training.trainer", "import examples.squad"),
    ],
)
def test_the_check_sees_what_is_wrong(room, source):
    assert violations(room, source)


def test_public_names_exist():
    import hf_oto

    assert set(hf_oto.__all__) >= PUBLIC
    assert [name for name in {*hf_oto.__all__, *hf_oto._ROOMS} if not hasattr(hf_oto, name)] == []
