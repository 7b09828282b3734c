"""A [`Trainer`] that keeps a finished model of every size which its run passes on the way to the target."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from ..models.sharding import is_sharded, reshard
from ..report.milestones import Size, evaluations, folder_name, logged_name, sizes_picture
from ..report.summary import summarize
from .attaching import check_begins
from .checkpoints import CheckpointingTrainer, name_of, resumed_from
from .pruning import PruningTrainer
from .refusals import check_writable
from .saving import check_places, replacing

logger = logging.get_logger(__name__)

# In the log of every evaluation: the size that it is of, `None` while groups go. A name that Trainer's cards can show.
_SIZE = "eval_milestone"


class MilestonesTrainer(PruningTrainer, CheckpointingTrainer):
    """
    [`Trainer`] that writes the small model of a milestone into `output_dir` when its recovery ends, evaluated where
    there is something to evaluate on. What else it knows of them it reads from the log and from their folders.
    """

    _kept_milestone: float | None = None  # of the last step that one was kept after
    _began_in: Path | None = None  # where the checkpoint lay that the run goes on from
    _weights_of: int | None = None  # the step whose weights the model has, if that is not the run's last one
    _trains: bool = False

    def _save_small(self, folder: str) -> None:
        raise NotImplementedError

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.hspg is not None and self.model_init is None and not resumed_from(args, kwargs):
            check_begins(self.hspg)  # before anything of the earlier run is forgotten
        self._kept_milestone, self._began_in, self._weights_of = None, None, None
        self._shrunk_checkpoint = None  # of a call that came to nothing
        if self.oto_config.milestones and self.args.should_save and self.hp_search_backend is None:
            check_writable(self._output_dir)
            self._check_places(Path(self._output_dir), self.oto_config.milestones)
        self._trains = True
        try:
            return super().train(*args, **kwargs)
        finally:
            self._trains = False

    # On the way.

    def _maybe_log_save_evaluate(
        self,
        tr_loss: Tensor,
        grad_norm: Any,
        model: nn.Module,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: list[str] | None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        due = self.hspg.milestone_due if self.hspg is not None and self.oto_config.milestones else None
        if self.oto_config.milestones and self.state.global_step >= self.state.max_steps:
            due = self.oto_config.target_sparsity  # under fp16 the optimizer may lack steps that Trainer has counted
        if due is not None and due != self._kept_milestone:
            self._kept_milestone = due
            if self._evaluates and due == self.oto_config.target_sparsity:
                # With `"epoch"` Trainer evaluates at the end anyway.
                self.control.should_evaluate |= self.args.eval_strategy != IntervalStrategy.EPOCH
            elif due != self.oto_config.target_sparsity and not self.state.is_hyper_param_search:
                self._keep_milestone(due, trial, ignore_keys_for_eval)
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, *args, **kwargs
        )

    def _keep_milestone(self, share: float, trial: Any, ignore_keys: list[str] | None) -> None:
        """Before a checkpoint of this step: whoever goes on from that finds the milestone's model."""
        if self._evaluates:
            logs = self.control.should_log  # which an evaluation takes for done
            metrics = self._evaluate(trial, ignore_keys)
            if self.args.eval_strategy != IntervalStrategy.NO:
                self._check_metric(metrics)
            self.control.should_log, self.control.should_evaluate = logs, False
        with self._best_weights(share):
            self._save_small(str(self._milestone_folder(share)))
        self.accelerator.wait_for_everyone()

    @property
    def _evaluates(self) -> bool:
        """Whether there is something to evaluate on."""
        return self.eval_dataset is not None or self.args.eval_strategy != IntervalStrategy.NO

    def _milestone_folder(self, share: float) -> Path:
        return Path(self._output_dir, folder_name(share))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        # Of the run's own: afterwards it may be of other data, or of weights that are not the last ones.
        if self._trains and self.oto_config.milestones and evaluations([logs]):
            reached = None if self.hspg is None else self.hspg.milestone_reached
            self.state.log_history[-1][_SIZE] = cast(Any, reached)

    # The best model of each size.

    def _best_step(self, share: float, places: Sequence[Path] | None = None) -> int | None:
        """
        The step whose evaluation is the best of this size so far, if that is to be kept; with `places` of those whose
        weights are there, in one of these or now.
        """
        metric = self.args.metric_for_best_model
        if metric is None:
            return None
        log = self.state.log_history
        if places is not None:
            there = {path.name for place in places for path in place.glob("checkpoint-*")}
            there.add(name_of(self.state.global_step))
            log = [entry for entry in log if name_of(int(entry["step"])) in there]
        return best_step(log, share, logged_name(metric), greater=bool(self.args.greater_is_better))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        if self.args.eval_strategy == IntervalStrategy.NO and self.oto_config.milestones:  # but for those of sizes
            return False
        reached = None if self.hspg is None else self.hspg.milestone_reached
        if self._at_target or reached is None:
            return super()._determine_best_metric(metrics, trial)
        self._check_metric(metrics)
        return self._best_step(reached) == self.state.global_step  # `state` knows one best model: the target's

    def _best_checkpoint(self, run: Path) -> str | None:
        reached = None if self.hspg is None else self.hspg.milestone_reached
        if self._at_target or reached is None or not self.args.load_best_model_at_end:
            return super()._best_checkpoint(run)
        best = run / name_of(self._best_step(reached, [run]))
        return str(best) if best.is_dir() else None

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best = Path(cast(str, self.state.best_model_checkpoint))
        if best.is_dir():  # otherwise upstream has said that it goes on with the last weights
            self._weights_of = int(best.name.rpartition("-")[2])

    @contextmanager
    def _best_weights(self, share: float) -> Iterator[None]:
        """The model with the best weights of this size, where they are asked for; then again with the present ones."""
        places = [Path(self._output_dir), *([self._began_in] if self._began_in is not None else [])]
        best = self._best_step(share, places) if self.args.load_best_model_at_end else None
        if best is not None and best != (wanted := self._best_step(share)):
            logger.warning(
                f"The best model of {folder_name(share)} was that of step {wanted}, whose checkpoint is not in "
                f"{self._output_dir}: that of step {best} is kept."
            )
        if best is None or best == self.state.global_step:
            yield
            return
        found = [place / name_of(best) for place in places if (place / name_of(best)).is_dir()]
        reshard(self._whole_model())
        held = {
            tensor: tensor.detach().clone()
            for module in self._trained_modules()
            for tensor in (*module.parameters(), *module.buffers())
        }
        self._load_weights(str(found[0]), self.model_wrapped if self.is_fsdp_enabled else None)
        self._weights_of = best
        try:
            yield
        finally:
            self._weights_of = None
            with torch.no_grad():
                for tensor, value in held.items():
                    tensor.copy_(value)

    # What there is.

    def _finished(self) -> list[float]:
        """The milestones that the run has passed."""
        if self.hspg is None:
            return []
        return [leg.share for leg in self.hspg.schedule.legs[:-1] if leg.end <= self.hspg.steps_done]

    def _kept(self, share: float, folder: Path | None = None) -> Size | None:
        """What the folder of a milestone says of its model, if that is one of this run."""
        size = Size.load((folder or Path(self._output_dir)) / folder_name(share))
        if size is None or size.share != share or size.step > self.state.global_step:
            return None
        logged = [entry for entry in self.state.log_history if entry["step"] == size.step]
        scores = {(name, str(value)) for entry in logged for name, value in entry.items()}
        return size if scores.issuperset((name, str(value)) for name, value in size.scores.items()) else None

    def _sizes(self, small: PreTrainedModel | None = None) -> list[Size]:
        """All sizes that the run has finished, and the one of the model as it is, if it is of a size."""
        if not self.oto_config.milestones or self.hspg is None:
            return []
        reached = self.hspg.milestone_reached
        passed = [self._kept(share) for share in self._finished() if share != reached]
        return [size for size in (*passed, self._present_size(small)) if size is not None]

    def _present_size(self, small: PreTrainedModel | None = None) -> Size | None:
        share = None if self.hspg is None or not self.oto_config.milestones else self.hspg.milestone_reached
        model = small or self._part()
        if share is None or is_sharded(model):
            return None
        step = self.state.global_step if self._weights_of is None else self._weights_of
        config = self.oto_config
        summary = summarize(model, sequence_length=config.sequence_length, latency_table=config.latency_table)
        found = [entry for entry in self.state.log_history if entry.get(_SIZE) == share and entry["step"] == step]
        scores = {name: value for entry in found for name, value in entry.items()}
        return Size.of(share, step, summary, scores)

    def _pictures(self, small: PreTrainedModel | None = None) -> dict[str, Any]:
        return super()._pictures(small) | sizes_picture(self._sizes(small), self.args.metric_for_best_model)

    # Keeping them.

    def _check_places(self, folder: Path, shares: Sequence[float] | None = None) -> None:
        """Refuse a folder in which the models of milestones, of those that are passed, have no place."""
        if self.args.should_save:
            check_places(folder, map(folder_name, self._finished() if shares is None else shares))

    def _copy_milestones(self, target: Path) -> None:
        """Put the models of the milestones that are passed beside another model, each whole or not at all."""
        source = Path(self._output_dir)
        if not self.args.should_save or source.resolve() == target.resolve():
            return
        for share in self._finished():
            if not self._copied(share, source, target):
                logger.warning(
                    f"The model of milestone {share:g} of this run is not in {source} any more: {target} goes without."
                )

    def _copied(self, share: float, source: Path, target: Path) -> bool:
        """Whether a milestone's model was there to be put into another folder."""
        name = folder_name(share)
        if self._kept(share, source) is None:
            return False
        with replacing(target / name) as unfinished:
            shutil.copytree(source / name, unfinished, dirs_exist_ok=True)
        return True

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._began_in = None if checkpoint is None else Path(checkpoint).parent
        if self._began_in is None or not self.oto_config.milestones or not self.args.should_save:
            return
        source, target = self._began_in, Path(self._output_dir)
        for share in self._finished():
            copied = source.resolve() != target.resolve() and self._copied(share, source, target)
            if not copied and self._kept(share) is None:
                logger.warning(
                    f"The model of milestone {share:g} is neither in {target} nor beside {checkpoint}: it was "
                    f"finished before, and this run does not make it again."
                )


def best_step(log_history: Sequence[Mapping[str, Any]], share: float, metric: str, *, greater: bool) -> int | None:
    """
    The step of the best evaluation of a size, the first one of equals; `None` if none has the metric.

    Args:
        log_history (`Sequence[Mapping[str, Any]]`): What the run has logged.
        share (`float`): The size, by what was removed.
        metric (`str`): As it is in the log.
        greater (`bool`): Whether more of it is better.
    """
    best: tuple[float, int] | None = None
    for entry in log_history:
        if entry.get(_SIZE) == share and metric in entry:
            value = entry[metric] if greater else -entry[metric]
            if value == value and (best is None or value > best[0]):  # not NaN
                best = value, entry["step"]
    return None if best is None else best[1]
