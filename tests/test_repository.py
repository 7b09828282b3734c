"""What surrounds the code names what there is: the quick tests, and the versions that CI tries."""

import re
from pathlib import Path

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
