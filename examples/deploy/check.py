"""Load one pruned model with everything that is said to load it, and compare what comes out.

Each consumer runs in an environment of its own, which is made under `build/consumers` from the package registries
(PyPI, npm) when it is missing. Without network only those that are there already run.

    python examples/deploy/check.py MODEL [--only NAME …]

MODEL is a folder with a base model and its tokenizer, such as all-MiniLM-L6-v2's; it is cut by chance, as what is
compared is whether consumers compute the same, not how good it is. It is cut in both forms: the per-layer
one, for an ONNX folder, and the plain one, of the family's own class.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import hf_oto
from hf_oto import QuestionAnswerer, compress, partition
from hf_oto.deploy.model_files import copy_beside_weights
from hf_oto.deploy.onnx_folder import export_folder
from hf_oto.deploy.pooling import Pooling

HERE = Path(__file__).resolve().parent
WORK = HERE.parents[1] / "build" / "consumers"
TEXTS = ["Who wrote the first program?", "Ada Lovelace wrote it in 1843, long before there were computers.", "x"]
TASKS = {
    "feature-extraction": "AutoModel",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
}
TRANSFORMERS_4 = ["torch==2.13.0", "transformers==4.57.*", "sentence-transformers", "optimum-onnx[onnxruntime]"]
# Name: the folders that it reads, what is installed for it, its script, and how far a number may be off.
CONSUMERS = {
    "fastembed": ("pruned/onnx", ["fastembed"], "fastembed_embed.py", 1e-5),
    "openvino": ("pruned/pooled", ["openvino", "tokenizers"], "openvino_embed.py", 1e-5),
    "ortmodel": ("pruned/onnx", TRANSFORMERS_4, "ortmodel_embed.py", 1e-5),
    "sentence-transformers, onnx": ("pruned/onnx", TRANSFORMERS_4, "sentence_transformers_onnx.py", 1e-5),
    "transformers.js": ("pruned/onnx", ["@huggingface/transformers"], "transformers_js.mjs", 1e-4),
    "plain: transformers 4": ("plain/saved", TRANSFORMERS_4, "transformers_plain.py", 1e-4),
    "plain: sentence-transformers": ("plain/saved", TRANSFORMERS_4, "sentence_transformers_plain.py", 1e-5),
    "plain: upstream's export": ("plain/saved", TRANSFORMERS_4, "sentence_transformers_export.py", 1e-5),
    "plain: fastembed": ("plain/onnx", ["fastembed"], "fastembed_embed.py", 1e-5),
    "plain: transformers.js": ("plain/onnx", ["@huggingface/transformers"], "transformers_js.mjs", 1e-4),
}


@torch.no_grad()
def cut_by_chance(model: PreTrainedModel, plain: bool) -> PreTrainedModel:
    """Without half of the neurons, and, if not plain, without some heads: as many in a block as its number says."""
    generator = torch.Generator().manual_seed(0)
    parameters = dict(model.named_parameters())
    for array in partition(model).arrays:
        number = array.count // 2 if array.kind == "neurons" else 0 if plain else array.layer % 4
        chosen = torch.randperm(array.count, generator=generator)[:number]
        for owned in array.owned:
            parameters[owned.name].index_fill_(owned.dim, owned.positions(array.count, chosen), 0)
    return compress(model, plain=plain).eval()


@torch.no_grad()
def reference(task: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pooling: Pooling) -> list[float]:
    """What the model says of the texts, in PyTorch."""
    if task == "question-answering":
        answer = QuestionAnswerer(model, tokenizer)(TEXTS[0], TEXTS[1])[0]
        return [float(answer.start), float(answer.end)]
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    outputs = model(**batch)
    if task == "feature-extraction":
        return pooling(outputs.last_hidden_state, batch["attention_mask"]).flatten().tolist()
    scores = outputs.logits.softmax(-1)
    if task == "text-classification":
        return scores.amax(-1).tolist()
    own = scores[0, batch["attention_mask"][0].bool()][1:-1]  # of the first text, without the special tokens
    return own.amax(-1).tolist()


def prepare(source: Path, form: str) -> None:
    """One folder for each task, and what PyTorch says; the base model pooled inside the graph as well."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    pooling = Pooling.from_folder(source)
    models = WORK / "models" / form
    expected = {}
    for task in TASKS:
        torch.manual_seed(0)
        small = cut_by_chance(getattr(transformers, TASKS[task]).from_pretrained(source).float(), form == "plain")
        saved = models / "saved" / task
        small.save_pretrained(saved)
        copy_beside_weights(source, saved)
        expected[task] = reference(task, small, tokenizer, pooling)
        export_folder(small, models / "onnx" / task, saved)
        if task == "feature-extraction":
            export_folder(small, models / "pooled" / task, saved, pooling=pooling)
    (models / "expected.json").write_text(json.dumps({"texts": TEXTS, "expected": expected}))


def interpreter(packages: list[str], script: Path) -> list[str]:
    """The command that runs a script with these packages, in an environment that is made once."""
    folder = WORK / "environments" / "-".join("".join(filter(str.isalnum, package)) for package in packages)
    if script.suffix == ".mjs":
        if not (folder / "node_modules").is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            # Its install script would fetch a GPU build from elsewhere; the CPU's comes with the package.
            subprocess.run(["npm", "install", "--ignore-scripts", *packages], cwd=folder, check=True)
        shutil.copy(script, folder)  # Node looks for packages beside the script
        return ["node", str(folder / script.name)]
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for package in packages:  # torch first: a CPU build, where pip is offered one
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", package], check=True)
    return [str(python), str(script)]


def run(name: str) -> dict[str, float]:
    """By task the largest difference from PyTorch."""
    read, packages, script, _ = CONSUMERS[name]
    folders = WORK / "models" / read
    given = folders.parent / "expected.json"
    command = [*interpreter(packages, HERE / "consumers" / script), str(folders), str(given)]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.decode()[-2000:]}")
    found = json.loads(done.stdout.decode().strip().splitlines()[-1])
    expected = json.loads(given.read_text())["expected"]
    return {
        task: max(abs(mine - theirs) for mine, theirs in zip(values, expected[task], strict=True))
        for task, values in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(CONSUMERS), default=list(CONSUMERS))
    options = parser.parse_args()
    for form in ("pruned", "plain"):
        if not (WORK / "models" / form / "expected.json").is_file():
            shutil.rmtree(WORK / "models" / form, ignore_errors=True)
            prepare(options.model, form)
    failed = False
    for name in options.only:
        for task, difference in run(name).items():
            right = difference <= CONSUMERS[name][3]
            failed |= not right
            print(f"{name:30} {task:22} off by {difference:.1e}{'' if right else '  WRONG'}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    print(f"hf_oto {hf_oto.__version__}, torch {torch.__version__}")
    main()
