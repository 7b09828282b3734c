"""What surrounds the code names what there is; and what the code itself never does, read as text."""

import ast
import re
from pathlib import Path

import pytest
from torch.utils._device import _device_constructors

ROOT = Path(__file__).resolve().parents[1]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_quick_tests_exist_and_are_of_every_wing():
    listed = [line for line in read("tests/quick.txt").splitlines() if not line.startswith("#")]
    assert len(listed) == len(set(listed)) > 40
    for line in listed:
        path, _, name = line.partition("::")
        assert re.search(rf"^def {name}\(", read(path), re.MULTILINE), line
    wings = {path.name for path in (ROOT / "hf_oto").iterdir() if (path / "__init__.py").is_file()}
    assert wings <= {Path(line).parts[1] for line in listed}


def test_ci_tries_the_oldest_and_the_newest_of_what_is_supported():
    """The oldest Transformers is that of `pyproject.toml`, which the Makefile installs where it is asked to."""
    project, workflow = read("pyproject.toml"), read(".github/workflows/ci.yml")
    oldest = re.search(r'"transformers>=([\d.]+)"', project)[1]
    tried = re.findall(r'python: "([\d.]+)", transformers: "([\d.]*)"', workflow)
    assert {python for python, version in tried if not version} == {"3.10", "3.13"}
    assert [version for _, version in tried if version] == [oldest + ".0" * (oldest.count(".") < 2)]
    assert re.search(r'requires-python = ">=([\d.]+)"', project)[1] == "3.10"
    assert (
        "TRANSFORMERS: ${{ matrix.transformers }}" in workflow
        and "transformers$(addprefix ==,$(TRANSFORMERS))" in read("Makefile")
    )
    assert "- run: .ci/run" in workflow


# What makes tensors of nothing. Without a device and a precision they take those that the user has set for their own:
# `torch.set_default_device`, `torch.set_default_dtype`, or a device as context.
FACTORIES = {made.__name__ for made in _device_constructors()}
# Without a precision these make integers, or what the numbers are that they are given; all others floating-point ones.
INTEGERS = {"arange", "as_tensor", "asarray", "randint", "randperm", "tensor", "tril_indices", "triu_indices"}
FLOATING = FACTORIES - INTEGERS
# Modules are made where, and in what, their model is.
OF_MODULES = {"modeling_oto.py"}


def undecided(source):
    """The lines of a source in which a tensor is made that does not say where, or in which precision."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if ast.unparse(node.func.value) != "torch" or node.func.attr not in FACTORIES:
            continue
        said = {keyword.arg for keyword in node.keywords}
        needed = {"device"} | ({"dtype"} if node.func.attr in FLOATING else set())
        if None not in said and needed - said:  # `**options` may say it
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "hf_oto").glob("**/*.py")), ids=lambda path: path.stem)
def test_no_tensor_is_made_where_the_user_makes_theirs(path):
    if path.name not in OF_MODULES:
        assert undecided(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    ["torch.arange(3)", "torch.zeros(3, device='cpu')", "x = 1\ntorch.tensor([x])", "torch.full(2, 0.5, device=x)"],
)
def test_it_is_seen_where_a_tensor_does_not_say_where(source):
    assert undecided(source) == [source.count("\n") + 1]
    assert undecided("torch.zeros(3, dtype=int, device='cpu'), torch.zeros(3, **there), torch.zeros_like(x)") == []
