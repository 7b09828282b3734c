"""What a user does with the Hub, in a process of its own: started by a test, with `HF_ENDPOINT` set.

`hub_client.py train STRATEGY REPO FOLDER [uniform]`: OTOTrainer with pushes, in the plain form if asked for;
`sizes REPO FOLDER`: it pushes milestones, too; `push REPO FOLDER`: the trained model's own `push_to_hub`;
`pull REPO FILE [REVISION]`: load what is there, without hf_oto, and save its outputs; `cli …`: `hf-oto` itself.
"""

import sys
from dataclasses import replace

import torch
import transformers
from safetensors.torch import save_file


def train(strategy: str, repo: str, folder: str, form: str = "") -> None:
    from families import outputs
    from short_runs import CONFIG, make
    from squad_data import wordpiece

    tokenizer = wordpiece()
    trainer = make(
        folder,
        config=replace(CONFIG, uniform=True, structures=("neurons",)) if form == "uniform" else CONFIG,
        extra={"processing_class": tokenizer},
        push_to_hub=True,
        hub_model_id=repo,
        hub_strategy=strategy,
        hub_token="hf_writer",
        hub_private_repo="private" in repo,
        hub_always_push=True,
        save_strategy="steps",
        save_steps=8,
        eval_strategy="steps",
        eval_steps=8,
    )
    trainer.model.add_model_tags(["of-mine"])
    trainer.train()
    trainer.push_to_hub(
        dense_metrics={"eval_loss": 1.25}, tasks="question-answering", dataset="SQuAD", dataset_tags="squad"
    )
    save_file(outputs(trainer.compressed_model().eval()), f"{folder}.outputs")


def sizes(repo: str, folder: str) -> None:
    from short_runs import SIZES, make

    trainer = make(folder, config=SIZES, save_strategy="steps", save_steps=8, hub_token="hf_writer", hub_model_id=repo)
    trainer.train()
    trainer.push_to_hub("The last one alone")
    trainer.push_to_hub("All of them", milestones=True)


def push(repo: str, folder: str) -> None:
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder, trust_remote_code=True)
    model.push_to_hub(repo, token="hf_writer")


def pull(repo: str, file: str, revision: str = "main") -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(repo, revision=revision, trust_remote_code=True)
    assert "hf_oto" not in sys.modules
    generator = torch.Generator().manual_seed(1)  # as tests/families.py makes a batch
    ids = torch.randint(2, 61, (3, 13), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    with torch.no_grad():
        found = model.eval()(input_ids=ids, attention_mask=mask)
    save_file({"start_logits": found.start_logits, "end_logits": found.end_logits}, file)
    print(type(model).__name__, sum(parameter.numel() for parameter in model.parameters()))


def cli(*arguments: str) -> None:
    from hf_oto.cli.app import main

    sys.argv[1:] = arguments
    main()


if __name__ == "__main__":
    {"train": train, "sizes": sizes, "push": push, "pull": pull, "cli": cli}[sys.argv[1]](*sys.argv[2:])
