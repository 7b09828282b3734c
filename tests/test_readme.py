"""The README's Python, as a reader would run it: every block in turn, in one process, in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from families import tiny_model
from squad_data import wordpiece

from hf_oto import compress

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.mark.slow
def test_every_block_runs_and_says_what_it_should(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 6
    tokenizer = wordpiece()  # and a model that somebody trained before
    tokenizer.save_pretrained(tmp_path / "bert-squad-oto")
    compress(tiny_model("BertForQuestionAnswering", vocab_size=len(tokenizer))).save_pretrained(
        tmp_path / "bert-squad-oto"
    )
    (tmp_path / "readme.py").write_text("\n".join(blocks), encoding="utf-8")
    command = [sys.executable, "-W", "error:::hf_oto", "readme.py"]
    done = subprocess.run(command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    accuracies = [float(found) for found in re.findall(r"^(0\.\d+|1\.0)$", done.stdout, re.MULTILINE)]
    assert len(accuracies) == 2 and min(accuracies) > 0.97
    assert re.search(r"\| prunable parameters +\| +4\d,\d{3} \| +99,200 \| +\d\d\.\d% \|", done.stdout)
