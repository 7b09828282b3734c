"""Runs FSDP2 on every rank of a process group, and writes what each rank held: started by torchrun, by a test.

`fsdp_ranks.py MODE FOLDER`, MODE one of `bare`: HSPG in a loop of its own, in every layout, with checkpoints that it
resumes from; `resumed`: the same run from those checkpoints, on as many ranks as torchrun starts; `gathered`: whole
models out of sharded ones; or `refused`: what raises, and what it says.
"""

import itertools
import resource
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from families import MODELS, ONE_EACH, question_batch, tiny_model
from ranks import GLOBAL_BATCH, STEPS, uneven
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import BertConfig, BertModel

from hf_oto import HSPG, OTOConfig, compress, gather, partition

NAME = ONE_EACH[0]
# 33 neurons and 3 heads of 9, which no two or four ranks share evenly; the first period begins at the first step.
CONFIG = OTOConfig(min_neurons=3, round_to=3)
AT_ONCE = OTOConfig(min_neurons=3, round_to=3, warmup_ratio=0.0, pruning_periods=3)
# Before the first step, in warm-up, at and behind a period's start, before and behind the last one's end.
STOPS = (0, 2, 4, 5, 13, 14, 20)
LAYOUTS = {
    "blocks": {"reshard_after_forward": True},
    "kept": {"reshard_after_forward": False},
    "whole": {},
    "bf16": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
}


def shard(model, layout: str):
    settings = LAYOUTS[layout]
    if layout != "whole":
        for block in model.base_model.encoder.layer:
            fully_shard(block, **settings)
    return fully_shard(model, **settings)


def begin(layout: str, config: OTOConfig, base: str = "AdamW", dtype: torch.dtype = torch.float64):
    model = tiny_model(NAME, **uneven(NAME)).to(dtype)
    groups = partition(model)
    shard(model, layout)
    # Two parameter groups, as Trainer makes them: HSPG's own state is in the first.
    decayed = [named for named in model.named_parameters() if named[1].dim() > 1]
    others = [named for named in model.named_parameters() if named[1].dim() == 1]
    families = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    return model, HSPG(getattr(torch.optim, base)(families, lr=3e-3), groups, config, STEPS)


def go_on(model, optimizer, until: int = STEPS, each=lambda: None) -> torch.Tensor:
    """Train to a step. Gives the status of the groups after every step."""
    rank, world, history = dist.get_rank(), dist.get_world_size(), []
    while optimizer.steps_done < until:
        each()
        whole = question_batch(model, optimizer.steps_done, GLOBAL_BATCH)
        model(**{key: value[rank::world] for key, value in whole.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(optimizer.param_groups[0]["hspg_status"].clone())
    return torch.stack(history)


def held(model, optimizer, history: torch.Tensor) -> dict:
    """What a run comes to: the same on every rank, if all is well."""
    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    moments = {
        f"{name}.{key}": value
        for name, kept in state["state"].items()
        for key, value in kept.items()
        if isinstance(value, torch.Tensor)
    }
    weights = {
        key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in model.state_dict().items()
    }
    found = {"history": history, "saliency": optimizer.param_groups[0]["hspg_saliency"], **weights, **moments}
    return {key: value.detach().clone() for key, value in found.items()}


def save(model, optimizer, folder: Path) -> None:
    """Both kinds of checkpoint."""
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder / "sharded")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    if dist.get_rank() == 0:
        torch.save(full, folder / "full.pt")


def load(model, optimizer, folder: Path, kind: str) -> None:
    options = StateDictOptions()
    if kind == "sharded":
        state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=folder / "sharded")
    else:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.get_world_size() > 1)
        state = {"model": {}, "optimizer": {}}
        if dist.get_rank() == 0:
            state = torch.load(folder / "full.pt", weights_only=True)
    set_model_state_dict(model, state["model"], options=options)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)


def run_bare(folder: Path) -> dict:
    found = {}
    for layout in LAYOUTS:
        run = begin(layout, CONFIG, dtype=torch.float32 if layout == "bf16" else torch.float64)
        found[layout] = held(*run, go_on(*run))

    for base, config in (("AdamW", CONFIG), ("AdamW", AT_ONCE), ("SGD", CONFIG)):
        key = f"{base}-{config.warmup_ratio}"
        model, optimizer = begin("blocks", config, base)
        found[key] = held(model, optimizer, go_on(model, optimizer))

        def stop(model=model, optimizer=optimizer, key=key):
            if optimizer.steps_done in STOPS:
                save(model, optimizer, folder / key / str(optimizer.steps_done))

        model, optimizer = begin("blocks", config, base)
        stop.__defaults__ = model, optimizer, key
        found[f"{key}-saved"] = held(model, optimizer, go_on(model, optimizer, each=stop))
        for kind, step in itertools.product(("sharded", "full"), STOPS):
            run = begin("whole" if step == 5 else "blocks", config, base)  # the layout may be another one
            load(*run, folder / key / str(step), kind)
            assert run[1].steps_done == step, (run[1].steps_done, step)
            found[f"{key}-{kind}-{step}"] = held(*run, go_on(*run))
    return found


def run_resumed(folder: Path) -> dict:
    found = {}
    for kind, step in itertools.product(("sharded", "full"), (2, 5, 20)):
        run = begin("blocks", CONFIG)
        load(*run, folder / f"AdamW-{CONFIG.warmup_ratio}" / str(step), kind)
        found[f"{kind}-{step}"] = held(*run, go_on(*run))
    return found


def main(mode: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    made = {"bare": run_bare, "resumed": run_resumed}[mode](Path(folder))
    torch.save(made, Path(folder) / f"{mode}-{dist.get_world_size()}-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
