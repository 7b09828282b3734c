#!/usr/bin/env python
"""How much each way of making a model small keeps, at each size: every method, target and seed in one command.

Every run is one `run_squad.py` of the same steps, in a process of its own; its numbers become a line of `runs.jsonl`.
A command that was stopped goes on where it was. Options that are not listed here go to `run_squad.py`: the model, the
files, the learning rate. Without `--train_file` or `--dataset_name` it runs on the made-up questions of the demo. With
`--task` it runs `run_task.py`, to which those options go then.
"""

import argparse
import json
import shutil
import statistics
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the example's own modules

import torch
from arguments import parse_arguments
from demo.run_demo import common_options, make_inputs, step_options
from precision import choose_bf16
from processes import SCRIPT, console, run_squad
from rich.table import Table
from run_squad import load_model
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks import run_task
from benchmarks.tasks import TASKS
from hf_oto import HSPG, OTOConfig, compress, partition
from hf_oto.models.configuration_oto import BLOCK_SPECS

OUTPUT_DIR = Path(__file__).resolve().parents[3] / "build" / "frontier"
RUNS = "runs.jsonl"
TARGETS = (0.3, 0.5, 0.7, 0.85, 0.95)
DENSE = "dense"
# What each method is. Those of the second group can learn from the dense model of the same seed.
METHODS = {
    DENSE: "plain fine-tuning",
    "hspg": "HSPG with a target",
    "magnitude": "groups of the least norm, at the same steps",
    "random": "random groups, at the same steps",
    "published": "HSPG as published: the penalty decides",
    "one-shot": "groups of the least norm, cut after training",
    "layers": "the first blocks only, fine-tuned",
}
DISTILLED = {f"{name}+teacher": f"{METHODS[name]}, with a teacher" for name in ("hspg", "magnitude", "layers")}

# What won in long runs at every size (docs/experiments.md): the teacher is as wide as the student, and may be learnt
# from by its hidden states; and the learning rate stays at its peak until the target is reached.
TAUGHT_OPTIONS = ["--distillation_hidden_weight", "10", "--lr_scheduler_type", "warmup_stable_decay"]


@dataclass(frozen=True)
class Task:
    """What the runs train: the script, the Auto class of its models, what makes the one to start from, and the name of
    the score in the script's numbers and in tables."""

    script: Path
    auto: Any
    start: Callable[[list[str]], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
    score: str
    label: str


def start_squad(options: list[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_model(parse_arguments(options)[0])


SQUAD = "squad"
RUN_BY = {SQUAD: Task(SCRIPT, AutoModelForQuestionAnswering, start_squad, "eval_f1", "F1")}
RUN_BY |= {
    name: Task(Path(run_task.__file__), task.auto, run_task.start, "eval_score", task.label)
    for name, task in TASKS.items()
}


@dataclass(frozen=True)
class Run:
    """One training, or one cut. The dense run has no target."""

    method: str
    seed: int
    target: float | None = None

    def __str__(self) -> str:
        return "-".join(str(part) for part in (self.method, self.target, self.seed) if part is not None)


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    known = [*METHODS, *DISTILLED]
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="methods:\n" + "\n".join(f"  {name:18} {text}" for name, text in {**METHODS, **DISTILLED}.items()),
        allow_abbrev=False,
    )
    parser.add_argument("--task", choices=RUN_BY, default=SQUAD, help="What is learnt.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs side by side, each with a log of its own in `logs`.")
    parser.add_argument("--output_dir", type=Path, default=OUTPUT_DIR, help="Lines, pictures and dense models.")
    parser.add_argument("--methods", nargs="+", default=known, choices=known, metavar="METHOD", help="All, or some.")
    parser.add_argument("--targets", nargs="+", type=float, default=list(TARGETS), help="Shares to be removed.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Of the trainings.")
    parser.add_argument("--steps", type=int, default=1200, help="Of each training on made-up questions.")
    parser.add_argument("--eval_paragraphs", type=int, default=250, help="Of the made-up questions.")
    parser.add_argument("--keep_models", action="store_true", help="Keep the pruned models as well.")
    return parser.parse_known_args(arguments)


def plan(methods: Iterable[str], targets: Iterable[float], seeds: Iterable[int]) -> list[Run]:
    """The runs, seed by seed, the dense one first: it is the measure, the teacher, and what is cut in one shot."""
    runs = []
    for seed in seeds:
        runs.append(Run(DENSE, seed))
        runs += [Run(method, seed, target) for target in targets for method in methods if method != DENSE]
    return runs


class Frontier:
    """
    Runs what is missing in a folder.

    Args:
        folder (`Path`): Where the lines are, and the dense model of every seed.
        options (`list[str]`): Of `run_squad.py`, the same for every run of a seed.
        seed_options (`dict[int, list[str]]`): Those that differ from seed to seed.
        task (`Task`): What is learnt.
        jobs (`int`, *optional*, defaults to 1): Runs that other threads ask for meanwhile, this one counted in.

    Raises:
        `ValueError`: The folder holds lines of other options.
    """

    def __init__(
        self, folder: Path, options: list[str], seed_options: dict[int, list[str]], task: Task, jobs: int = 1
    ) -> None:
        self.task, self.jobs, self.lock = task, jobs, threading.Lock()
        self.folder = folder
        self.options = options
        self.seed_options = seed_options
        for line in read_lines(folder):
            if line["options"] != options:
                raise ValueError(
                    f"`output_dir` {folder} holds runs of other options ({line['options']}). Choose another folder."
                )

    def run(self, run: Run) -> dict[str, Any]:
        """One line of numbers: that of the folder, or else a new one, which is added to it."""
        for line in read_lines(self.folder):
            if line["run"] == str(run):
                return line
        results = self._one_shot(run) if run.method == "one-shot" else self._train(run)
        line = {"run": str(run), **asdict(run), **self._numbers(run, results), "options": self.options}
        with self.lock, open(self.folder / RUNS, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return line

    def _numbers(self, run: Run, results: dict[str, Any]) -> dict[str, Any]:
        """What a line says of a run. Its price is that of all that it needs: of the dense run, too, where that teaches
        or is what is cut."""
        found = numbers(results, self.task)
        if run.method == "one-shot" or "+" in run.method:
            dense = next(line for line in read_lines(self.folder) if line["run"] == str(Run(DENSE, run.seed)))
            for name in ("steps", "price"):
                found[name] += dense[name]
        return found

    def _call(self, run: Run, options: list[str]) -> dict[str, Any]:
        """The script's numbers, run with these options."""
        log = None
        if self.jobs > 1:
            log = self.folder / "logs" / f"{run}.log"
            log.parent.mkdir(exist_ok=True)
        options = [*options, "--overwrite_output_dir"]
        return run_squad(self.folder / str(run), *options, script=self.task.script, log=log, jobs=self.jobs)

    def _train(self, run: Run) -> dict[str, Any]:
        method, _, taught = run.method.partition("+")
        options = [
            "--logging_steps",
            "0.1",
            *self.options,
            *self.seed_options[run.seed],
            "--seed",
            str(run.seed),
            "--do_train",
            "--do_eval",
        ]
        if method in ("hspg", "magnitude", "random"):
            options += ["--compress", "--target_sparsity", str(run.target), "--shrink_during_training", "true"]
            options += ["--saliency", method] if method != "hspg" else []
            if taught:  # it goes on from what it would have to learn again, with its groups' saliency known at once
                options += ["--model_name_or_path", str(self._dense(run.seed)), "--pruning_start_ratio", "0.05"]
        elif method == "published":
            options += ["--compress", "--target_sparsity", "none", "--lmbda", str(self._lmbda(run, options))]
        elif method == "layers":
            options += ["--model_name_or_path", str(self._with_first_blocks(run, options))]
            options += ["--compress", "--target_sparsity", "0"] if taught else []
        if taught:
            options += ["--teacher_model_name_or_path", str(self._dense(run.seed)), *TAUGHT_OPTIONS]
        return self._call(run, options)

    def _dense(self, seed: int) -> Path:
        return self.folder / str(Run(DENSE, seed))

    def _one_shot(self, run: Run) -> dict[str, Any]:
        """Cut the dense model, and score it as it is."""
        target = self.folder / f"{run}-cut"
        model = self.task.auto.from_pretrained(self._dense(run.seed))
        cut(model, OTOConfig(target_sparsity=run.target, saliency="magnitude")).save_pretrained(target)
        AutoTokenizer.from_pretrained(self._dense(run.seed)).save_pretrained(target)
        options = [*self.options, *self.seed_options[run.seed], "--model_name_or_path", str(target), "--do_eval"]
        try:
            return self._call(run, options)
        finally:
            shutil.rmtree(target)

    def _start(self, options: list[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """What the runs start from."""
        return self.task.start([*options, "--output_dir", str(self.folder)])

    def _with_first_blocks(self, run: Run, options: list[str]) -> Path:
        """The model to start from, without its last blocks (Sajjad et al., 2020, arXiv:2004.03844), as many as fit."""
        model, tokenizer = self._start(options)
        blocks = model.base_model.get_submodule(BLOCK_SPECS[model.config.model_type].blocks)
        del blocks[max(1, round(len(blocks) * (1 - (run.target or 0.0)))) :]
        model.config.num_hidden_layers = len(blocks)
        folder = self.folder / f"{run}-start"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    def _lmbda(self, run: Run, options: list[str]) -> float:
        """
        The λ that would zero the target's share of weights if the penalty were all that moved them.

        Every step takes αλ from a group's norm, so λ = ‖x_g‖ / Σα for the largest group that has to go. The gradient
        pulls as well, so that another share comes out, which is the method's weakness: the line says which.
        """
        state = json.loads((self._dense(run.seed) / "trainer_state.json").read_text(encoding="utf-8"))
        rates = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
        norm_G, cost_G = norms_and_costs(self._start(options)[0])
        order_G = norm_G.argsort()
        goes_G = cost_G[order_G].cumsum(0) <= (run.target or 0.0) * cost_G.sum()
        return float(norm_G[order_G][goes_G][-1]) / (statistics.mean(rates) * state["global_step"])


def norms_and_costs(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """‖x_g‖ of all groups of a model, and the number of weights in each. Shapes: [G], [G]."""
    parameters = dict(model.named_parameters())
    norms, costs = [], []
    for array in partition(model).arrays:
        parts = [  # in each of the projections that lie in one matrix
            parameters[owned.name].detach().movedim(owned.dim, 0).unflatten(0, (-1, array.count, owned.width))
            for owned in array.owned
        ]
        weights = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], dim=1)
        norms.append(weights.norm(dim=1))
        costs.append(torch.full((array.count,), weights.shape[1]))
    return torch.cat(norms), torch.cat(costs)


def cut(model: PreTrainedModel, config: OTOConfig) -> PreTrainedModel:
    """The model without the groups that a config selects at once: one step of HSPG that moves nothing else."""
    config = replace(config, pruning_start_ratio=0, pruning_end_ratio=1, pruning_periods=1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    HSPG(torch.optim.SGD(model.named_parameters(), lr=0.0), partition(model), config, total_steps=1).step()
    return compress(model)


def numbers(results: dict[str, Any], task: Task) -> dict[str, Any]:
    """Score, size and price: steps, and multiply-accumulates of the training, shrinking counted."""
    names = ("eval_exact_match", "encoder_parameters", "macs", "parameters", "train_runtime")
    found = {name.removeprefix("eval_"): results.get(name) for name in names}
    price = {"steps": results.get("train_steps", 0), "price": results.get("train_macs", 0)}
    return {"score": results[task.score], **found, **price}


def read_lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / RUNS
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def retained(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every pruned run's score, size, MACs and price as shares of the dense run's of its seed."""
    dense = {line["seed"]: line for line in lines if line["method"] == DENSE}
    shares = {"retained": "score", "kept": "encoder_parameters", "macs_kept": "macs", "share_of_price": "price"}
    return [
        {**line, **{share: line[name] / dense[line["seed"]][name] for share, name in shares.items()}}
        for line in lines
        if line["method"] != DENSE and line["seed"] in dense
    ]


def by_method(lines: list[dict[str, Any]]) -> dict[str, dict[float, list[dict[str, Any]]]]:
    """The lines of each method, target by target."""
    found: dict[str, dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for line in sorted(lines, key=lambda line: line["target"]):
        found[line["method"]][line["target"]].append(line)
    return {name: found[name] for name in [*METHODS, *DISTILLED] if name in found}


def mean(lines: list[dict[str, Any]], name: str) -> float:
    return statistics.mean(line[name] for line in lines)


def spread(lines: list[dict[str, Any]]) -> float:
    """Half the distance between the best and the worst seed."""
    values = [line["retained"] for line in lines]
    return (max(values) - min(values)) / 2


def result_table(lines: list[dict[str, Any]], label: str = "F1") -> Table:
    table = Table(
        title=f"{label} kept of the dense run's, mean and half the range over seeds; price of the dense run's"
    )
    for column in ("method", "target", "seeds", "weights", "MACs", "steps", "price", label, "kept"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for method, targets in by_method(retained(lines)).items():
        for target, found in targets.items():
            table.add_row(
                method,
                f"{target:.0%}",
                str(len(found)),
                f"{mean(found, 'kept'):.1%}",
                f"{mean(found, 'macs_kept'):.1%}",
                f"{mean(found, 'steps'):,.0f}",
                f"{mean(found, 'share_of_price'):.2f}",
                f"{mean(found, 'score'):.2f}",
                f"{mean(found, 'retained'):.1%} ± {spread(found):.1%}",
            )
    return table


def plot(lines: list[dict[str, Any]], path: Path, label: str = "F1") -> None:
    """The score kept against kept encoder weights, and against MACs; bars reach from the worst seed to the best."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for panel, (name, size) in zip(
        panels, {"kept": "encoder weights kept", "macs_kept": "MACs kept"}.items(), strict=True
    ):
        panel.axhline(1, color="0.6", linewidth=1, linestyle=":")
        for number, (method, targets) in enumerate(by_method(retained(lines)).items()):
            groups = list(targets.values())
            panel.errorbar(
                [mean(found, name) for found in groups],
                [mean(found, "retained") for found in groups],
                yerr=[spread(found) for found in groups],
                label=method,
                color=f"C{list(METHODS).index(method.partition('+')[0])}",
                linestyle="--" if "+" in method else "-",
                marker="osD^vPX*<>"[number],
                capsize=2,
            )
        panel.set_xlabel(size)
        panel.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"{label} kept")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(METHODS), fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def made_up(folder: Path, options: argparse.Namespace) -> tuple[list[str], dict[int, list[str]]]:
    """Questions and a model for every seed, and how to train on them."""
    seed_options = {}
    for seed in options.seeds:
        data = folder / f"questions-{seed}"
        if not (data / "model" / "model.safetensors").is_file():  # written last
            data.mkdir(parents=True, exist_ok=True)
            make_inputs(data, argparse.Namespace(**{**vars(options), "seed": seed}))
        names = {"model_name_or_path": "model", "train_file": "train.json", "validation_file": "dev.json"}
        seed_options[seed] = [part for name, path in names.items() for part in (f"--{name}", str(data / path))]
    return [*step_options(options.steps), *common_options(choose_bf16())], seed_options


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Run what is missing, and return all lines of the folder."""
    options, passed_on = parse(arguments)
    folder, task = options.output_dir.resolve(), RUN_BY[options.task]
    seed_options: dict[int, list[str]] = {seed: [] for seed in options.seeds}
    if options.task != SQUAD:
        passed_on = ["--task", options.task, *passed_on]
    elif not any(part.startswith(("--train_file", "--dataset_name")) for part in passed_on):
        common, seed_options = made_up(folder, options)
        passed_on = [*common, *passed_on]
    frontier = Frontier(folder, passed_on, seed_options, task, options.jobs)
    folder.mkdir(parents=True, exist_ok=True)

    def finish(run: Run) -> None:
        frontier.run(run)
        if run.method != DENSE and not options.keep_models:
            for path in (folder / str(run), folder / f"{run}-start"):
                shutil.rmtree(path, ignore_errors=True)

    runs = plan(options.methods, options.targets, options.seeds)
    with ThreadPoolExecutor(options.jobs) as pool:  # the dense runs first: others start from them
        for wave in ([run for run in runs if run.method == DENSE], [run for run in runs if run.method != DENSE]):
            list(pool.map(finish, wave))
    lines = read_lines(folder)
    if retained(lines):
        plot(lines, folder / "frontier.png", task.label)
        console.print(result_table(lines, task.label))
    return lines


if __name__ == "__main__":
    main()
