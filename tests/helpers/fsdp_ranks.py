"""Runs FSDP2 on every rank of a process group, and writes what each rank held: started by a test.

`fsdp_ranks.py MODES FOLDER`, MODES some of `bare`: HSPG in a loop of its own, in every layout, with checkpoints that
it resumes from; `resumed`: the same run from those checkpoints, on as many ranks as there are, and then on one;
`gathered`: whole models out of sharded ones; `trainer`: OTOTrainer; `refused`: what raises, and what it says.
"""

import os
import resource
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from families import ONE_EACH, question_batch, tiny_model
from ranks import GLOBAL_BATCH, uneven
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
from transformers import AutoModelForQuestionAnswering, BertConfig, BertModel, TrainerCallback, TrainingArguments
from transformers.distributed import DistributedConfig

from hf_oto import HSPG, OTOConfig, OTOTrainer, compress, gather, partition, summarize

NAME, STEPS = ONE_EACH[0], 14
# 33 neurons and 3 heads of 9, which no two or four ranks share evenly. Warm-up is 2 steps, a period too.
SIZES = uneven(NAME) | {"num_hidden_layers": 2}
CONFIG = OTOConfig(min_neurons=3, round_to=3, pruning_periods=3)
AT_ONCE = OTOConfig(min_neurons=3, round_to=3, pruning_periods=3, pruning_start_ratio=0.0)
MILESTONE = OTOConfig(min_neurons=3, round_to=3, pruning_periods=2, milestones=(0.25,))  # its leg: steps 1 … 9
UNIFORM = OTOConfig(min_neurons=3, round_to=3, pruning_periods=3, uniform=True, structures=("neurons",))
# What is stopped before which step, and goes on from which kind of checkpoint. Not before the first: torch makes
# Adam's state to save it, by a step that Adam counts. SGD has none, so torch takes such a step at every save.
STOPS = {
    ("AdamW", CONFIG): {"sharded": (1, 2, 3, 8), "full": (7, 11)},
    ("AdamW", AT_ONCE): {"sharded": (1,), "full": (1,)},
    ("SGD", CONFIG): {"sharded": (0, 5)},
}
RESUMED = (("sharded", 3, 1), ("full", 11, 1), ("full", 7, 2))  # on other ranks: kind, step, replicas of the shards
LAYOUTS = {
    "blocks": {"reshard_after_forward": True},
    "kept": {"reshard_after_forward": False},
    "whole": {},
    "bf16": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
}


def shard(model, layout: str, replicas: int = 1):
    settings = dict(LAYOUTS[layout])
    if replicas > 1:
        sizes = (replicas, dist.get_world_size() // replicas)
        settings["mesh"] = init_device_mesh("cpu", sizes, mesh_dim_names=("replicas", "shards"))
    if layout != "whole":
        for block in model.base_model.encoder.layer:
            fully_shard(block, **settings)
    return fully_shard(model, **settings)


def run_name(base: str, config: OTOConfig) -> str:
    return f"{base}-{config.pruning_start_ratio}"


def begin(layout: str, config: OTOConfig, base: str = "AdamW", dtype: torch.dtype = torch.float64, replicas: int = 1):
    model = tiny_model(NAME, **SIZES).to(dtype)
    groups = partition(model)
    shard(model, layout, replicas)
    # Two parameter groups, as Trainer makes them: HSPG's own state is in the first.
    decayed = [named for named in model.named_parameters() if named[1].dim() > 1]
    others = [named for named in model.named_parameters() if named[1].dim() == 1]
    families = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    return model, HSPG(getattr(torch.optim, base)(families, lr=3e-3), groups, config, STEPS)


def go_on(model, optimizer, until: int = STEPS, each=lambda *run: None) -> torch.Tensor:
    """Train to a step. Gives the status of the groups after every step."""
    rank, world, history = dist.get_rank(), dist.get_world_size(), []
    while optimizer.steps_done < until:
        each(model, optimizer)
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


def save(model, optimizer, folder: Path, kind: str) -> None:
    if kind == "sharded":
        state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.save(state, checkpoint_id=folder / "sharded")
        return
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, folder / "full.pt")


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

    for (base, config), stops in STOPS.items():
        key = run_name(base, config)
        run = begin("blocks", config, base)
        found[key] = found["blocks"] if (base, config) == ("AdamW", CONFIG) else held(*run, go_on(*run))

        def stop(model, optimizer, key=key, stops=stops):
            for kind, steps in stops.items():
                if optimizer.steps_done in steps:
                    save(model, optimizer, folder / key / str(optimizer.steps_done), kind)

        run = begin("blocks", config, base)
        found[f"{key}-saved"] = held(*run, go_on(*run, each=stop))
        for kind, steps in stops.items():
            for step in steps:
                run = begin("whole" if step == 3 else "blocks", config, base)  # the layout may be another one
                load(*run, folder / key / str(step), kind)
                assert run[1].steps_done == step
                found[f"{key}-{kind}-{step}"] = held(*run, go_on(*run))
    return found


def run_resumed(folder: Path) -> dict:
    found = {}
    for kind, step, replicas in RESUMED:
        if replicas <= dist.get_world_size():
            run = begin("blocks", CONFIG, replicas=replicas)
            load(*run, folder / run_name("AdamW", CONFIG) / str(step), kind)
            found[f"{kind}-{replicas}-{step}"] = held(*run, go_on(*run))
    return found


def run_gathered(folder: Path) -> dict:
    """Whole models, and how much more memory gathering, cutting and writing one took at its peak, in bytes."""
    found = {}
    for name in (*ONE_EACH, "BertForMaskedLM", "BertForSequenceClassification"):
        model = tiny_model(name, **uneven(name)).bfloat16().train()
        model.base_model.embeddings.word_embeddings.weight.requires_grad_(False)
        expected = {key: value.clone() for key, value in (*model.state_dict().items(), *model.named_buffers())}
        fully_shard(model)
        whole = gather(model)
        if dist.get_rank() > 0:
            assert whole is None
            continue
        tensors = dict((*whole.state_dict().items(), *whole.named_buffers()))
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], value) for key, value in expected.items())
        assert type(whole).__name__ == name and whole.training and whole.dtype == torch.bfloat16
        frozen = [key for key, parameter in whole.named_parameters() if not parameter.requires_grad]
        assert frozen == [key for key, parameter in model.named_parameters() if not parameter.requires_grad] != []
        if name == "BertForMaskedLM":
            assert whole.cls.predictions.decoder.weight is whole.bert.embeddings.word_embeddings.weight
        assert type(compress(whole)).__name__ == f"OTO{name}"

    model, optimizer = begin("blocks", CONFIG)
    go_on(model, optimizer)
    with torch.no_grad():  # leaves weights gathered, outside the blocks
        model.eval()(**question_batch(model, 0, 2))
    whole = gather(model)
    found["weights"] = held(model, optimizer, torch.zeros(0))
    if whole is not None:
        compress(whole.float()).save_pretrained(folder / "small")

    with torch.device("meta"):  # no rank ever holds all of it, but for what gathers it
        large = BertModel(BertConfig(vocab_size=100, hidden_size=512, num_hidden_layers=8, num_attention_heads=8))
    fully_shard(large).to_empty(device="cpu")
    for parameter in large.parameters():
        torch.nn.init.ones_(parameter)
    found["bytes"] = sum(parameter.numel() * parameter.element_size() for parameter in large.parameters())
    before = peak()
    whole = gather(large)
    if whole is not None:
        whole.save_pretrained(folder / "large")
    found["more"] = peak() - before
    return found


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_refused(folder: Path) -> dict:
    found = {}

    def refused(key, made) -> None:
        try:
            made()
        except ValueError as error:
            found[key] = str(error)

    def hspg(model, groups=None) -> HSPG:
        groups = groups or partition(model)
        return HSPG(torch.optim.AdamW(model.named_parameters(), lr=3e-3), groups, CONFIG, STEPS)

    def tensor_parallel(model, mesh):
        plan = {}
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "intermediate.dense"):
            plan[name] = ColwiseParallel()
        plan |= {"attention.output.dense": RowwiseParallel(), "output.dense": RowwiseParallel()}
        for block in model.bert.encoder.layer:
            parallelize_module(block, mesh, plan)
        return model

    model = tensor_parallel(tiny_model(NAME), init_device_mesh("cpu", (2,)))
    refused("tensor parallel", lambda: hspg(model))

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    both = fully_shard(tensor_parallel(tiny_model(NAME), mesh["tp"]), mesh=mesh["dp"])
    refused("tensor parallel and FSDP2", lambda: hspg(both))

    part = tiny_model(NAME)
    fully_shard(part.bert.encoder.layer[0])
    refused("one block", lambda: hspg(part))

    late = tiny_model(NAME)
    optimizer = hspg(late)
    before = {key: value.clone() for key, value in late.state_dict().items()}
    fully_shard(late.bert.encoder.layer[0])
    named = dict(late.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [named[name] for name in group["param_names"]]
    late(**question_batch(late)).loss.backward()
    refused("one block, later", optimizer.step)
    for key, value in late.state_dict().items():
        assert torch.equal(value.full_tensor() if isinstance(value, DTensor) else value, before[key])

    def refused_by_trainer(key, environment=None, model=None, **settings) -> None:
        os.environ.update(environment or {})
        refused(key, lambda: trainer_of(arguments(folder / "never", **settings), model))
        for name in environment or {}:
            del os.environ[name]

    full, launched = sharded_by_accelerate("FULL_STATE_DICT"), {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}
    refused_by_trainer("fsdp on the CPU", accelerator=False, **full)
    refused_by_trainer("fsdp on the CPU, by the launcher", launched, accelerator=False)
    refused_by_trainer("FSDP1", **sharded_by_accelerate("FULL_STATE_DICT", fsdp_version=1))
    refused_by_trainer("activation", **sharded_by_accelerate("FULL_STATE_DICT", activation_checkpointing=True))
    refused_by_trainer("XLA", **sharded_by_accelerate("FULL_STATE_DICT", xla=True))
    refused_by_trainer("a push", push_to_hub=True, **full)
    refused_by_trainer("tensor parallel Trainer", parallelism_config=ParallelismConfig(tp_size=2))
    refused_by_trainer("context parallel Trainer", parallelism_config=ParallelismConfig(cp_size=2))
    refused_by_trainer("tensor parallel model", model=tensor_parallel(tiny_model(NAME), mesh["tp"]))
    refused_by_trainer("FSDP1, by the launcher", launched)
    dist.barrier()
    assert not (folder / "never").exists()

    whole = tiny_model(NAME)
    refused("gather a whole one", lambda: gather(whole))
    sharded = fully_shard(tiny_model(NAME))
    refused("compress a sharded one", lambda: compress(sharded))
    refused("sum up a sharded one", lambda: summarize(sharded))
    return found


def arguments(folder: Path, accelerator: bool = True, **settings) -> TrainingArguments:
    """
    Trainer's arguments. accelerate shards nothing on the CPU, so by default it is told that this is an accelerator:
    all that follows is what it does on one, but over gloo.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True, backend="gloo")
    if accelerator:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "accelerator_config": {"use_configured_state": True},
    }
    return TrainingArguments(str(folder), **defaults | settings)


def sharded_by_accelerate(state_dict_type: str, **settings) -> dict:
    config = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"], "state_dict_type": state_dict_type}
    return {"fsdp": True, "fsdp_config": config | settings}


def trainer_of(args: TrainingArguments, model=None, config: OTOConfig = CONFIG) -> OTOTrainer:
    model = model or tiny_model(NAME, **SIZES)
    questions = question_batch(model, size=32)
    rows = [{key: value[row] for key, value in questions.items()} for row in range(32)]
    return OTOTrainer(model=model, args=args, oto_config=config, train_dataset=rows, eval_dataset=rows)


def trained(trainer: OTOTrainer, checkpoint: Path | None = None) -> dict:
    history = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            history.append(trainer.hspg.param_groups[0]["hspg_status"].clone())

    trainer.add_callback(Watch())
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    parameters = [parameter for group in trainer.hspg.param_groups for parameter in group["params"]]
    assert all(isinstance(parameter, DTensor) for parameter in parameters)
    return held(trainer.model, trainer.hspg, torch.stack(history))


def passed_milestone(trainer: OTOTrainer) -> dict:
    """The model after every step of a run that keeps the best one of a milestone, and when it has kept it."""
    seen = {}

    class Look(TrainerCallback):
        def note(self, name):
            seen[name] = {key: value.full_tensor() for key, value in trainer.model.named_parameters()}

        def on_step_end(self, args, state, control, **kwargs):
            self.note(state.global_step)

        def on_save(self, args, state, control, **kwargs):
            self.note(f"saved {state.global_step}")

    trainer.add_callback(Look())
    trainer.train()
    return seen


class WriteOnOneRank(TrainerCallback):
    """Moves the weights of the second rank's shards in the recovery, as an average of weights that is copied in."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == STEPS - 2 and dist.get_rank() == 1:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.to_local().add_(1e-3)


def run_trainer(folder: Path) -> dict:
    found = {}
    if dist.get_rank() == 0:
        tiny_model(NAME, **SIZES).save_pretrained(folder / "dense")
    dist.barrier()
    model = AutoModelForQuestionAnswering.from_pretrained(
        folder / "dense", distributed_config=DistributedConfig(fsdp_size=2)
    )
    trainer = trainer_of(arguments(folder / "loaded", accelerator=False, save_strategy="no"), model)
    found["loaded"] = trained(trainer)
    trainer.save_model(folder / "loaded")
    whole = gather(model)
    assert whole is None or getattr(whole.config, "distributed_config", None) is None  # it is distributed no more

    ways = {
        "full": {"metric_for_best_model": "loss", "eval_strategy": "steps", "load_best_model_at_end": True}
        | sharded_by_accelerate("FULL_STATE_DICT"),
        "sharded": {"bf16": True} | sharded_by_accelerate("SHARDED_STATE_DICT", reshard_after_forward=False),
    }
    for way, settings in ways.items():
        settings = settings | {"save_steps": 5, "eval_steps": 5}
        found[way] = trained(trainer_of(arguments(folder / way, **settings)))
        again = trainer_of(arguments(folder / f"{way}-resumed", **settings))
        found[f"{way}-resumed"] = trained(again, folder / way / "checkpoint-5")
    sharded = sharded_by_accelerate("FULL_STATE_DICT")
    most = {"metric_for_best_model": "loss", "greater_is_better": True, "load_best_model_at_end": True}
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    found["milestone"] = passed_milestone(
        trainer_of(arguments(folder / "milestone", **sharded, **most, **every), config=MILESTONE)
    )
    found["uniform"] = trained(trainer_of(arguments(folder / "uniform", **sharded), config=UNIFORM))
    written = trainer_of(arguments(folder / "written", **sharded))
    written.add_callback(WriteOnOneRank())
    try:
        written.train()
    except ValueError as error:
        found["written"] = str(error)
    return found


RUNS = {
    "bare": run_bare,
    "resumed": run_resumed,
    "gathered": run_gathered,
    "trainer": run_trainer,
    "refused": run_refused,
}


def main(modes: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for mode in modes.split(","):
        run(mode, Path(folder))
    rank = dist.get_rank()
    dist.destroy_process_group()
    if modes == "resumed" and rank == 0:  # on one rank as well
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        run(modes, Path(folder))
        dist.destroy_process_group()


def run(mode: str, folder: Path) -> None:
    torch.save(RUNS[mode](folder), folder / f"{mode}-{dist.get_world_size()}-{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
