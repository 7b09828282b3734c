"""Python in a process of its own, with hf_oto or where it cannot be imported."""

import os
import sys
from pathlib import Path

import forking

import hf_oto

# Before a script that must do without: it may be installed where the tests run.
WITHOUT = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_oto":
            raise ImportError(f"No module named {name!r}: blocked")

sys.meta_path.insert(0, Block())
"""


def run_fresh(script: str, *arguments: object, home: Path, with_hf_oto: bool = True, run=forking.run) -> str:
    """What a script prints in a process of its own, with caches and working folder `home`. It must end well."""
    root = str(Path(hf_oto.__file__).resolve().parents[1])
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONWARNINGS")}
    environment |= {"HF_HOME": str(home / "home"), "HF_MODULES_CACHE": str(home / "modules"), "PYTHONSAFEPATH": "1"}
    if with_hf_oto:
        environment["PYTHONPATH"] = root
    done = run(
        [sys.executable, "-c", script if with_hf_oto else WITHOUT + script, *map(str, arguments)],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
