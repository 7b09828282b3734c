"""The example's scripts, as somebody starts them: by their path, from any folder, with nothing set up."""

import sys
from pathlib import Path

import forking

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [
    *("run_squad.py", "demo/run_demo.py"),
    *(f"benchmarks/{name}.py" for name in ("cost", "frontier", "gpu", "latency", "run_task", "scale", "speed")),
]
# In one process, as importing torch takes longer than all else; what a script finds is put back before the next one.
EACH = """
import contextlib, io, os, runpy, sys

own, known, place = sys.argv[1], set(sys.modules), list(sys.path)
for script in sys.argv[2:]:
    sys.path[:], sys.argv = [os.path.dirname(script), *place], [script, "--help"]
    shown, left = io.StringIO(), None
    with contextlib.redirect_stdout(shown):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as done:
            left = done.code
    print(os.path.relpath(script, own), left, shown.getvalue().startswith("usage: " + os.path.basename(script)))
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(own):
            del sys.modules[name]
"""


def test_every_script_finds_its_own_modules_from_any_folder(tmp_path):
    squad = ROOT / "examples" / "squad"
    listed = {str(path.relative_to(squad)) for path in squad.rglob("*.py") if path.read_bytes().startswith(b"#!")}
    assert listed == set(SCRIPTS)
    command = [sys.executable, "-P", "-c", EACH, str(squad), *(str(squad / script) for script in SCRIPTS)]
    done = forking.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [f"{script} 0 True" for script in SCRIPTS]
