"""Runs HSPG on every rank of a process group, and writes what each rank held: started by torchrun, by a test.

`ranks.py MODE FOLDER`, MODE one of `single`, `ddp`, `ddp4`, `fsdp`, `fsdp_blocks`: every family in turn in a bare
loop, on the same global batches; `shrinking`: one family under DDP, with zero groups cut out on the way; or `trainer`:
OTOTrainer under accelerate, with gradient accumulation and checkpoints.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from families import ONE_EACH, question_batch, tiny_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from hf_oto import OTOTrainer, compress, shrink
from hf_oto.architectures import BLOCK_SPECS
from hf_oto.config import OTOConfig
from hf_oto.groups import partition
from hf_oto.hspg import HSPG

STEPS, GLOBAL_BATCH = 24, 8
CONFIG = OTOConfig(min_neurons=3, round_to=3)


def run(name: str, mode: str, rank: int, world: int) -> dict:
    # Widths that two ranks share unevenly: 33 neurons, 3 heads of 9.
    model = tiny_model(name, **uneven(name))
    groups = partition(model)
    wrapped = model
    if mode.startswith("ddp"):
        wrapped = DistributedDataParallel(model)
    elif mode.startswith("fsdp"):
        if mode == "fsdp_blocks":
            for block in model.base_model.get_submodule(BLOCK_SPECS[groups.model_type].blocks):
                fully_shard(block)
        fully_shard(model)
    optimizer = HSPG(torch.optim.AdamW(model.named_parameters(), lr=3e-3), groups, CONFIG, STEPS)
    history = []
    for step in range(STEPS):
        whole = question_batch(model, step, GLOBAL_BATCH)
        wrapped(**{key: value[rank::world] for key, value in whole.items()}).loss.backward()
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


def run_trainer(folder: Path) -> None:
    questions = question_batch(tiny_model(ONE_EACH[0]), size=32)
    trainer = OTOTrainer(
        model=tiny_model(ONE_EACH[0]),
        args=TrainingArguments(
            str(folder / "run"),
            max_steps=STEPS,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            save_steps=12,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=[{key: value[row] for key, value in questions.items()} for row in range(32)],
        oto_config=OTOConfig(min_neurons=4, round_to=4, shrink_during_training=True),  # not under DDP, as it will say
    )
    trainer.train()
    weights = {key: value.detach().clone() for key, value in trainer.model.state_dict().items()}
    found = {"status": trainer.hspg.param_groups[0]["hspg_status"], "weights": weights}
    torch.save(found, folder / f"trainer-{trainer.args.process_index}.pt")


def uneven(name: str) -> dict:
    if "Distil" in name:
        return {"dim": 27, "n_heads": 3, "hidden_dim": 33}
    return {"hidden_size": 27, "num_attention_heads": 3, "intermediate_size": 33}


def main(mode: str, folder: str) -> None:
    torch.set_num_threads(1)
    if mode == "trainer":
        run_trainer(Path(folder))
        return
    rank, world = 0, 1
    if mode != "single":
        dist.init_process_group("gloo")
        rank, world = dist.get_rank(), dist.get_world_size()
    if mode == "shrinking":
        for shrinks in (False, True):
            torch.save(run_shrinking(rank, world, shrinks), Path(folder) / f"{mode}-{shrinks}-{rank}.pt")
        dist.destroy_process_group()
        return
    for name in ONE_EACH:
        torch.save(run(name, mode, rank, world), Path(folder) / f"{mode}-{name}-{rank}.pt")
    if mode != "single":
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
