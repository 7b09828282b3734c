"""Runs HSPG on every rank of a process group, and writes what each rank held: started by a test.

`ranks.py MODE,… FOLDER`, MODE one of `ddp`, `ddp4`, `fsdp`, `fsdp_blocks`: families in turn in a bare loop, on the
same global batches, those of `names`; `shrinking`: one family under DDP, with zero groups cut out on the
way; `trainer`: OTOTrainer under accelerate, with gradient accumulation and checkpoints; `unequal`: the same where an
epoch's last batch has more rows on one rank than on the other; or `taught`: a step of it with a teacher, on ranks that
have unequal numbers of labels.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from families import ONE_EACH, OTHERS, family_of, question_batch, squares, tiny_model, training_batch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainingArguments

from hf_oto import OTOTrainer, compress, shrink
from hf_oto.config import OTOConfig
from hf_oto.hspg.optimizer import HSPG
from hf_oto.models.configuration_oto import BLOCK_SPECS
from hf_oto.models.groups import partition

STEPS, GLOBAL_BATCH = 24, 8
CONFIG = OTOConfig(min_neurons=3, round_to=3)
SHORT_CONFIG = OTOConfig(min_neurons=3, round_to=3, pruning_periods=3)


def run(name: str, mode: str, rank: int, world: int) -> dict:
    # Widths that two ranks share unevenly: 33 neurons, 3 heads of 9.
    model = tiny_model(name, **uneven(name))
    groups = partition(model)
    wrapped = model
    if mode.startswith("ddp"):
        # As Trainer has it: ESM brings a head for contacts.
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    elif mode.startswith("fsdp"):
        if mode == "fsdp_blocks":
            for block in model.base_model.get_submodule(BLOCK_SPECS[groups.model_type].blocks):
                fully_shard(block)
        fully_shard(model)
    config, steps = plan(name)
    optimizer = HSPG(torch.optim.AdamW(model.named_parameters(), lr=3e-3), groups, config, steps)
    history = []
    for step in range(steps):
        whole = training_batch(model, step, GLOBAL_BATCH)
        # ESM takes a view of its labels.
        found = wrapped(**{key: value[rank::world].contiguous() for key, value in whole.items()})
        (found.loss if "loss" in found else squares(found)).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(optimizer.param_groups[0]["hspg_status"].clone())
    weights = {
        key: value.full_tensor() if isinstance(value, DTensor) else value.clone()
        for key, value in model.state_dict().items()
    }
    return {
        "status": torch.stack(history),
        "saliency": optimizer.param_groups[0]["hspg_saliency"].clone(),
        "weights": weights,
    }


def run_shrinking(rank: int, world: int, shrinks: bool) -> dict:
    model = tiny_model(ONE_EACH[0]).double()
    wrapped = DistributedDataParallel(model)
    optimizer = HSPG(torch.optim.AdamW(model.named_parameters(), lr=3e-3), partition(model), CONFIG, STEPS)
    cuts = []
    for step in range(STEPS):
        whole = question_batch(model, step, GLOBAL_BATCH)
        wrapped(**{key: value[rank::world] for key, value in whole.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if shrinks and optimizer.shrink_due:
            shrink(model, optimizer)
            wrapped = DistributedDataParallel(model)
            cuts.append(step)
    small = compress(model)
    return {"cuts": cuts, "weights": {key: value.detach().clone() for key, value in small.named_parameters()}}


def trainer_on_questions(folder: Path, count: int, kind: type = OTOTrainer, callbacks=(), **options):
    questions = question_batch(tiny_model(ONE_EACH[0]), size=count)
    common = {"max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 3e-3}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    return kind(
        model=tiny_model(ONE_EACH[0]),
        args=TrainingArguments(str(folder), **common, **quiet, **options),
        train_dataset=[{key: value[row] for key, value in questions.items()} for row in range(count)],
        oto_config=OTOConfig(min_neurons=4, round_to=4),
        callbacks=list(callbacks),
    )


def run_trainer(folder: Path) -> None:
    trainer = trainer_on_questions(folder / "run", 32, gradient_accumulation_steps=2, save_steps=12)
    trainer.train()
    weights = {key: value.detach().clone() for key, value in trainer.model.state_dict().items()}
    found = {"status": trainer.hspg.param_groups[0]["hspg_status"], "weights": weights}
    torch.save(found, folder / f"trainer-{trainer.args.process_index}.pt")


def run_unequal(folder: Path) -> None:
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            kept = trainer.hspg.param_groups[0]
            seen.append((kept["hspg_status"].clone(), kept["hspg_saliency"].clone()))

    class Counted(OTOTrainer):
        rows: list = []

        def training_step(self, model, inputs, num_items_in_batch=None):
            self.rows.append(len(inputs["input_ids"]))
            return super().training_step(model, inputs, num_items_in_batch)

    options = {"accelerator_config": {"even_batches": False}, "save_strategy": "no"}
    trainer = trainer_on_questions(folder / "unequal", 15, Counted, [Look()], **options)
    trainer.train()
    status, saliency = (torch.stack(values) for values in zip(*seen, strict=True))
    found = {"rows": trainer.rows, "status": status, "saliency": saliency}
    torch.save(found, folder / f"unequal-{trainer.args.process_index}.pt")


def taught_rows() -> list[dict]:
    """Texts of one length of which more and more tokens have labels, in the order in which two ranks take turns."""
    batch = training_batch(tiny_model("BertForMaskedLM"), size=16)
    labels = batch["labels"].masked_fill(torch.arange(13) > torch.arange(16)[:, None] % 8 + 1, -100)
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": label}
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], labels, strict=True)
    ]


def run_taught(folder: Path) -> None:
    for average in (True, False):
        options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        trainer = OTOTrainer(
            model=tiny_model("BertForMaskedLM", **options),
            args=TrainingArguments(
                str(folder / "taught"),
                max_steps=1,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                average_tokens_across_devices=average,
                train_sampling_strategy="sequential",
                optim="sgd",
                learning_rate=1.0,
                lr_scheduler_type="constant",
                max_grad_norm=0.0,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=taught_rows(),
            oto_config=OTOConfig(target_sparsity=0.0, pruning_periods=1, distillation_weight=0.5),
            teacher_model=tiny_model("BertForMaskedLM", seed=5),
        )
        trainer.train()
        weights = {key: value.detach().clone() for key, value in trainer.model.state_dict().items()}
        torch.save(weights, folder / f"taught-{average}-{trainer.args.process_index}.pt")


TRAINED = {"trainer": run_trainer, "unequal": run_unequal, "taught": run_taught}


def names(mode: str) -> list[str]:
    """Sharding depends on the family's blocks, which DDP knows nothing of, but for a weight that no loss reaches."""
    return ONE_EACH + {"ddp": ["EsmForTokenClassification"], "fsdp_blocks": OTHERS}.get(mode, [])


def plan(name: str) -> tuple[OTOConfig, int]:
    """The settings and the number of steps; a short run where the blocks are all that is new."""
    return (SHORT_CONFIG, STEPS // 2) if name in OTHERS else (CONFIG, STEPS)


def uneven(name: str) -> dict:
    sizes = {"hidden_size": 27, "num_attention_heads": 3, "intermediate_size": 33}
    family = family_of(name)
    if family == "distilbert":
        return dict(zip(("dim", "n_heads", "hidden_dim"), sizes.values(), strict=True))
    if family in ("esm", "modernbert"):  # a rotary head has an even size
        return sizes | {"hidden_size": 30}
    if family in ("wav2vec2", "hubert"):
        return sizes | {"num_conv_pos_embedding_groups": 3}
    if family in ("llama", "qwen3"):
        return sizes | {"hidden_size": 30, "num_attention_heads": 6, "num_key_value_heads": 3}
    return sizes


def main(modes: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for mode in modes.split(","):
        if mode in TRAINED:
            TRAINED[mode](Path(folder))
        elif mode == "shrinking":
            for shrinks in (False, True):
                torch.save(run_shrinking(rank, world, shrinks), Path(folder) / f"{mode}-{shrinks}-{rank}.pt")
        else:
            for name in names(mode):
                torch.save(run(name, mode, rank, world), Path(folder) / f"{mode}-{name}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
