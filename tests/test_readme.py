"""What README and docs show, as a reader would run it: every block in turn, in one process, in one folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from arguments import parse_arguments
from families import tiny_model
from hub import TOKEN, Hub
from run_blocks import blocks, commands
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from squad_data import make_questions, squad, wordpiece, write

from hf_oto import compress

ROOT = Path(__file__).resolve().parents[1]
NAV = re.findall(r"^  - .+: (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
PAGES = [ROOT / "README.md", *(ROOT / "docs" / name for name in NAV)]
OTHER_PAGES = [ROOT / "examples" / "squad" / "README.md", ROOT / "CONTRIBUTING.md"]


def somebodys_files(folder):
    """What a reader would have: models that somebody trained, a text, and questions with answers."""
    tokenizer = wordpiece()
    dense = tiny_model("BertForQuestionAnswering", vocab_size=len(tokenizer), max_position_embeddings=512)
    for name, model in (("bert-base-uncased", dense), ("dense", dense), ("bert-squad-oto", compress(dense))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    body = folder / "body"
    tiny_model("BertModel", vocab_size=len(tokenizer)).save_pretrained(body)
    tokenizer.save_pretrained(body)
    minilm = folder / "sentence-transformers" / "all-MiniLM-L6-v2"
    SentenceTransformer(modules=[Transformer(str(body)), Pooling(32)], device="cpu").save_pretrained(str(minilm))
    (folder / "page.txt").write_text("It was written by Ada Lovelace in 1843.", encoding="utf-8")
    write(folder / "dev.json", squad(*make_questions(6, seed=1)))


@pytest.mark.slow
def test_every_block_runs_and_says_what_it_should(tmp_path):
    somebodys_files(tmp_path)
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    with Hub() as hub:
        command = [sys.executable, "-W", "error:::hf_oto", ROOT / "tests" / "helpers" / "run_blocks.py", *PAGES]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment | {"HF_ENDPOINT": hub.url, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
        card = hub.files("me/small-oto")["README.md"].decode()
    accuracies = [float(found) for found in re.findall(r"^(0\.\d+|1\.0)$", done.stdout, re.MULTILINE)]
    assert len(accuracies) == 2 and min(accuracies) > 0.97
    assert re.search(r"\| prunable parameters +\| +4\d,\d{3} \| +99,200 \| +\d\d\.\d% \|", done.stdout)
    assert "![Heads and neurons that every layer kept](layers.png)" in card
    assert "![Loss and removed share over the steps of the training, with its stages](run.png)" in card
    assert re.search(r"^int8 answers 6 questions of dev.json with exact match \d", done.stdout, re.MULTILINE)


def test_every_page_is_in_the_navigation():
    assert {path.name for path in (ROOT / "docs").glob("*.md")} == set(NAV) and len(set(NAV)) == len(NAV) > 5


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES], ids=lambda page: f"{page.parent.name}/{page.name}")
def test_blocks_are_of_kinds_that_can_be_checked(page):
    """What does not run here is at least a command that the repository has, with arguments that it takes."""
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for _, language, text in blocks(page):
        assert language in ("python", "bash")
        for first, *rest in commands(text) if language == "bash" else []:
            if first == "make":
                assert rest[0] in targets
            elif first == "python":
                assert (ROOT / rest[0]).is_file()
                if rest[0].endswith("run_squad.py"):
                    parse_arguments(rest[1:])
            else:
                assert first in ("hf-oto", "pip")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
