"""Runs `run_squad.py`, or a script of its kind, in a process of its own, as a user would."""

import json
import os
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

SCRIPT = Path(__file__).resolve().parent / "run_squad.py"

console = Console()


def environment(cache: Path | None = None, jobs: int = 1) -> dict[str, str]:
    """
    That of a training: memory that goes back and forth less often, and threads that sleep while they wait.

    Args:
        cache (`Path`, *optional*): Where the libraries keep what they make. With it, no network is used.
        jobs (`int`, *optional*, defaults to 1): Trainings side by side, which share the threads.
    """
    found = {
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs)),
        "OMP_WAIT_POLICY": "PASSIVE",  # a thread that spins while it waits makes a busy machine many times slower
        "MALLOC_TRIM_THRESHOLD_": "4000000000",
        "MALLOC_MMAP_THRESHOLD_": "33554432",
        **os.environ,
        "TOKENIZERS_PARALLELISM": "false",
    }
    if cache is not None:
        found |= {
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HF_EVALUATE_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
    return found


def run_squad(
    output: Path,
    *options: str,
    folder: Path | None = None,
    cache: Path | None = None,
    script: Path = SCRIPT,
    log: Path | None = None,
    jobs: int = 1,
) -> dict[str, Any]:
    """
    Run `run_squad.py`, and return its numbers.

    Args:
        output (`Path`): What becomes its `--output_dir`.
        options (`str`): All its other arguments.
        folder (`Path`, *optional*): Where it runs: what `output` and the options' paths are relative to.
        cache (`Path`, *optional*), jobs (`int`, *optional*, defaults to 1): As of [`environment`].
        script (`Path`, *optional*): Another script that writes `all_results.json`.
        log (`Path`, *optional*): Where goes what it prints, if not here.

    Raises:
        `CalledProcessError`: It fails.
    """
    command = [sys.executable, str(script), "--output_dir", str(output), *options]
    console.print(f"$ {shlex.join(command)}", style="bold", highlight=False, soft_wrap=True)
    with open(log, "w", encoding="utf-8") if log else nullcontext() as file:
        to_file: dict[str, Any] = {"stdout": file, "stderr": subprocess.STDOUT} if file else {}
        subprocess.run(command, cwd=folder, env=environment(cache, jobs), check=True, **to_file)
    results = Path(folder or ".", output, "all_results.json")
    return json.loads(results.read_text(encoding="utf-8"))
