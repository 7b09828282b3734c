"""Pushing to the Hub and pulling from it, over HTTP, by a server on loopback."""

import json
import os
import sys
from pathlib import Path

import forking
import hub_client
import pytest
from hub import TOKEN, Hub
from huggingface_hub import ModelCard
from safetensors.torch import load, load_file

CLIENT = Path(hub_client.__file__).resolve()
CODE = {"modeling_oto.py", "configuration_oto.py"}


def client(hub, home, *arguments, token=None, check=True):
    """Run `hub_client.py` with a cache of its own and, unless it needs it, without hf_oto on its path."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("PYTHONPATH", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "HF_TOKEN")
    }
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    if token:
        environment["HF_TOKEN"] = token
    if arguments[0] in ("train", "sizes", "cli"):
        environment["PYTHONPATH"] = str(CLIENT.parents[2])
    command = [sys.executable, str(CLIENT), *map(str, arguments)]
    done = forking.run(command, cwd=home.parent, env=environment, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


def weights(files, prefix=""):
    return sum(tensor.numel() for tensor in load(files[f"{prefix}model.safetensors"]).values())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that pushed at every save, its checkpoints too, and what it has in memory at its end."""
    folder = tmp_path_factory.mktemp("hub")
    with Hub() as hub:
        client(hub, folder / "home", "train", "all_checkpoints", "me/small", folder / "run")
        yield hub, folder, load_file(folder / "run.outputs")


def test_every_push_of_the_model_is_small_and_complete(trained):
    hub, _, _ = trained
    messages = hub.messages("me/small")
    assert [one for one in messages if one.startswith("Training")] == [
        f"Training in progress, step {step}" for step in (8, 16, 24)
    ]
    for index, message in enumerate(messages):
        if message.startswith("Training") or message == "End of training":
            files = hub.files("me/small", index)
            assert CODE | {"config.json", "model.safetensors", "oto_config.json", "tokenizer.json"} <= set(files)
            assert json.loads(files["config.json"])["model_type"] == "oto_bert"
    sizes = [weights(hub.files("me/small", messages.index(f"Training in progress, step {step}"))) for step in (8, 24)]
    assert sizes[0] > sizes[1] == weights(hub.files("me/small"))


def test_checkpoints_are_pushed_full_size_where_the_strategy_asks(trained):
    hub, _, _ = trained
    files = hub.files("me/small")
    for step in (8, 16, 24):
        names = {name.partition("/")[2] for name in files if name.startswith(f"checkpoint-{step}/")}
        assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "oto_config.json"} <= names
        assert weights(files, f"checkpoint-{step}/") > weights(files)


@pytest.mark.parametrize("step", [None, 8])
def test_a_stranger_pulls_it(trained, step, tmp_path):
    """In a fresh process with a fresh cache and without hf_oto: the end bit for bit, and a push on the way."""
    hub, _, expected = trained
    commits = hub.repos["me/small"]["commits"]
    message = "End of training" if step is None else f"Training in progress, step {step}"
    sha = next(commit["sha"] for commit in reversed(commits) if commit["message"] == message)
    done = client(hub, tmp_path / "home", "pull", "me/small", tmp_path / "outputs", sha)
    name, parameters = done.stdout.split()
    assert name == "OTOBertForQuestionAnswering"
    found = load_file(tmp_path / "outputs")
    same = all(bool((found[key] == expected[key]).all()) for key in expected)
    assert same == (step is None)
    index = [commit["sha"] for commit in commits].index(sha)
    assert int(parameters) == weights(hub.files("me/small", index))


def test_the_card_says_what_was_removed_and_how_to_load_it(trained):
    hub, folder, _ = trained
    files = hub.files("me/small")
    text = files["README.md"].decode()
    card = ModelCard(text)
    assert {"hf-oto", "pruned"} <= set(card.data.tags) and card.data.library_name == "transformers"
    assert 'from_pretrained("me/small", trust_remote_code=True)' in text and "AutoModelForQuestionAnswering" in text
    assert "| layer | heads | of | neurons | of |" in " ".join(text.split()) and "| 2 " in text
    assert "| eval_loss | 1.25 |" in text
    (result,) = card.data.eval_results
    assert (result.task_type, result.dataset_type, result.dataset_name) == ("question-answering", "squad", "SQuAD")
    assert result.metric_type == "loss" and f"{result.metric_value:.4g} |" in text
    for name in ("layers", "run"):
        assert f"({name}.png)" in text and files[f"{name}.png"][1:4] == b"PNG" and b"<svg" in files[f"{name}.svg"]
    assert text.index("## Compression") < text.index("## How to load it") < text.index("## Training procedure")


class SharedHub(Hub):
    """After every push, someone pushes the code of a model in the other form."""

    def __init__(self):
        super().__init__()
        self.pushes = []

    def commit(self, name, branch, lines):
        sha = super().commit(name, branch, lines)
        pushed = self.commits(name, branch)[-1]
        self.pushes.append((pushed["message"], dict(pushed["files"])))
        pushed["files"] |= dict.fromkeys(CODE, b"")
        return sha


def test_the_plain_form_is_pushed_without_code_and_takes_away_that_of_a_model_before(tmp_path):
    """On the way, too, when the blocks do not have as many zeros yet."""
    with SharedHub() as hub:
        client(hub, tmp_path / "home", "train", "every_save", "me/small", tmp_path / "run", "uniform")
        steps = [f"Training in progress, step {step}" for step in (8, 16, 24)]
        assert [message for message, _ in hub.pushes if message.startswith("Training")] == steps
        assert hub.pushes[-1][0] == "End of training"
        for message, files in hub.pushes:
            config = json.loads(files["config.json"])
            assert config["model_type"] == "bert" and "auto_map" not in config and not CODE & set(files), message
        card = files["README.md"].decode()
        assert "trust_remote_code" not in card and "of-mine" in ModelCard(card).data.tags
        done = client(hub, tmp_path / "home", "pull", "me/small", tmp_path / "outputs")
    assert done.stdout.split()[0] == "BertForQuestionAnswering"
    found, expected = load_file(tmp_path / "outputs"), load_file(tmp_path / "run.outputs")
    assert all(bool((found[key] == expected[key]).all()) for key in expected)


def test_milestones_are_pushed_to_branches_where_asked_for(tmp_path):
    """And those of an earlier run stay where they are."""
    (tmp_path / "run" / "0.20").mkdir(parents=True)
    (tmp_path / "run" / "0.20" / "milestone.json").write_text("{}")
    with Hub() as hub:
        client(hub, tmp_path / "home", "sizes", "me/sizes", tmp_path / "run", token=TOKEN)
        repo, main = hub.repos["me/sizes"], hub.files("me/sizes")
        assert hub.messages("me/sizes") == ["initial commit", "The last one alone", "All of them"]
        assert not any(name.startswith("0.") for one in repo["commits"] for name in one["files"])
        assert f"| {0.5:.2f} " in main["README.md"].decode() and "milestones.png" in main
        sizes = [weights(main)]
        for name in ("0.50", "0.30"):
            assert [one["message"] for one in repo["branches"][name]][2:] == [f"All of them, {name}"]
            files = repo["branches"][name][-1]["files"]
            assert set(files) >= CODE | {"config.json", "milestone.json"} and "README.md" not in files
            made = {path.name: path.read_bytes() for path in (tmp_path / "run" / name).iterdir()}
            assert {**made, ".gitattributes": b""} == files
            sizes.append(weights(files))
        assert sizes == sorted(set(sizes))


def test_a_push_that_failed_half_way_is_repeated(trained, tmp_path):
    _, folder, expected = trained
    with Hub(failures=1) as hub:
        failed = client(hub, tmp_path / "home", "push", "me/again", folder / "run", check=False)
        assert failed.returncode != 0 and hub.messages("me/again") == ["initial commit"]  # nothing half-way
        client(hub, tmp_path / "home", "push", "me/again", folder / "run")
        assert set(hub.files("me/again")) >= CODE
        client(hub, tmp_path / "home2", "pull", "me/again", tmp_path / "outputs")
    found = load_file(tmp_path / "outputs")
    assert all(bool((found[key] == expected[key]).all()) for key in expected)


def test_a_private_repository_is_for_those_with_a_token(trained, tmp_path):
    _, folder, _ = trained
    with Hub() as hub:
        client(hub, tmp_path / "home", "push", "me/private", folder / "run")
        hub.repos["me/private"]["private"] = True
        refused = client(hub, tmp_path / "home2", "pull", "me/private", tmp_path / "outputs", check=False)
        assert refused.returncode != 0 and "me/private is not a local folder" in refused.stderr
        client(hub, tmp_path / "home2", "pull", "me/private", tmp_path / "outputs", token=TOKEN)


def test_the_command_line_takes_a_name_on_the_hub(trained, tmp_path):
    hub, _, _ = trained
    found = json.loads(client(hub, tmp_path / "home", "cli", "inspect", "me/small", "--json").stdout)
    assert found["class"] == "OTOBertForQuestionAnswering" and found["parameters"] == weights(hub.files("me/small"))
    assert "GET /me/small/resolve/main/model.safetensors" in hub.requests
    assert not list((tmp_path / "home").rglob("model.safetensors"))  # their names alone were read
    refused = client(hub, tmp_path / "home", "cli", "inspect", "me/absent", check=False)
    assert refused.returncode == 1 and refused.stderr.startswith(
        "hf-oto: error: me/absent is no folder, and no model "
    )
    assert refused.stderr.count("\n") == 1 and refused.stdout == ""
