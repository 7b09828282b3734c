"""[`OTOTrainer`]: a Trainer that makes the model small while it trains it, and saves the small one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import logging

from ..hspg.optimizer import HSPG
from ..models.saved_names import own_names
from ..models.sharding import gather, is_sharded
from ..models.surgery import compress, compress_evenly
from ..report.card import save_figures
from ..report.milestones import folder_name, folders_in
from . import checkpoints, showing
from .hub import push_sizes, start_push
from .milestones import MilestonesTrainer
from .pruned_part import save_beside
from .saving import explaining, finish, replacing, share_code
from .zeros import check_size

logger = logging.get_logger(__name__)


class OTOTrainer(MilestonesTrainer):
    r"""
    [`Trainer`], with one more argument: it drives attention heads and FFN neurons to zero while it trains, and saves a
    model without them.

    The optimizer of [`TrainingArguments`] keeps its meaning; [`HSPG`] wraps it. So does the learning rate's schedule;
    `lr_scheduler_type="warmup_stable_decay"` may go without its `num_decay_steps`: the rate then stays at its peak
    until the target is reached, or for `num_stable_steps`, and decays over the rest, linearly if nothing else is said.
    One that goes by evaluations does so from the target on.

    What is trained may be a module of one's own around a Transformers model: `pruned_part` finds the
    part that is pruned. Mix it with another Trainer as `class Mine(OTOTrainer, TheirTrainer)`.

    `checkpoint-N` folders hold the model in training and all that resuming needs; it is full-size, unless
    `shrink_during_training` has cut it since. [`~OTOTrainer.save_model`], a push to the Hub and the end of training
    write the small model, which `from_pretrained` loads. `load_best_model_at_end` considers only evaluations at the
    target: before it, a model scores better because it is larger. `EarlyStoppingCallback` counts from there on, for
    the same reason. With `milestones` in the settings, the model of each is kept in a folder of its name in
    `output_dir` (`0.30`) when its recovery ends, whatever `save_strategy` is, evaluated where there is something to
    evaluate on; with `load_best_model_at_end` it is the best one of that size. The schedule of `lr_scheduler_type` is
    run once for every size; a scheduler of your own is left as it is. A run that stops before its target ends with a
    checkpoint to resume from, and without a small model of that size.

    Args:
        oto_config ([`OTOConfig`], *optional*):
            The settings of the compression; all defaults if `None`.
        teacher_model ([`PreTrainedModel`], `str` or `os.PathLike`, *optional*):
            A model of the same task, or its folder or Hub id, that the one in training learns from beside the labels:
            the dense model of an ordinary fine-tuning, or a larger one. It is set to evaluation mode and moved to the
            device of the training; it is no part of the model and saved nowhere. Columns of the data that it reads are
            kept for it. With it, the loss of a step is the mean over all of the step's labels, however many
            micro-steps they come in, also of heads that leave that to Trainer. Everything else is as in [`Trainer`].

    Raises:
        `ValueError`: The model or the teacher is not supported, the target cannot be reached, or another setting rules
            compression out. What concerns a run (its length, a target that the model has reached already) raises when
            training starts, before its first step.

    Example:

    ```python
    trainer = OTOTrainer(model=model, args=args, oto_config=OTOConfig(target_sparsity=0.5), train_dataset=train)
    trainer.train()
    trainer.save_model("small")
    ```
    """

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """
        As [`Trainer.train`]. Unless nothing is to be saved, the small model is in `output_dir` at the end; or, if the
        run stopped before it reached its target, a checkpoint to resume from.
        """
        saves = self.args.save_strategy != SaveStrategy.NO
        if saves and self.args.should_save:
            finish(Path(self._output_dir))
        output = super().train(*args, **kwargs)
        if self.state.is_hyper_param_search:
            return output
        if not self._at_target:
            self._keep_for_later()
        elif saves:
            self._save_small(self._output_dir)
        return output

    def _keep_for_later(self) -> None:
        """At the end of a run that stopped before its target: a checkpoint, and no model that looks finished."""
        hspg = cast(HSPG, self.hspg)
        passed = ", ".join(folder_name(share) for share in self._finished())
        finished = f" The sizes {passed} are finished, each in its folder." if passed else ""
        kept = "Nothing is saved, as `save_strategy` or `save_only_model` asks for"
        if self.args.save_strategy != SaveStrategy.NO and not self.args.save_only_model:
            if self._newest_checkpoint != self.state.global_step:
                self._save_checkpoint(cast(nn.Module, self.model), trial=None)
            kept = (
                f"The run is kept in {Path(self._output_dir, checkpoints.name_of(self.state.global_step))}, "
                f"from where `train(resume_from_checkpoint=True)` goes on"
            )
        logger.warning(
            f"Training stopped at step {hspg.steps_done} of {hspg.schedule.total_steps}, in stage {hspg.stage!r}. "
            f"`target_sparsity`={self.oto_config.target_sparsity} is not reached: no small model is written. {kept}."
            f"{finished}"
        )

    # Saving.

    def compressed_model(self) -> PreTrainedModel | None:
        """
        The small model: a new one, cut out of the one in training and checked against it. Where that is sharded, every
        rank has to call it, and only the first one gets the small model, on the CPU; the others get `None`. With
        `uniform=True` it is of the family's own class at every step: on the way to a size, what is zero and more than
        other blocks can spare stays in it.

        Raises:
            `ValueError`: The cut model does not compute what the one in training computes.
        """
        if self.hspg is not None and not self._at_a_size:
            logger.warning(
                f"The target is not reached at step {self.hspg.steps_done} (stage {self.hspg.stage!r}): the model is "
                f"larger than `target_sparsity`={self.oto_config.target_sparsity} asks for."
            )
        part = self._part()
        model = gather(part) if is_sharded(part) else part
        if model is None:
            return None
        show_progress = not self.args.disable_tqdm and self.is_world_process_zero()
        return (compress_evenly if self.oto_config.uniform else compress)(model, show_progress=show_progress)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the small model, so that `from_pretrained` loads it, with pictures of it and of the run if there is
        matplotlib. A model around it is saved as Trainer saves it, with the small part in it, and the part beside it
        in a folder of its own. A training checkpoint is saved full-size.

        The folder gets all of its files or none. What else is in it stays. Milestones that the run has passed are in
        folders of their names in it (`0.30`), each a model that `from_pretrained` loads.

        Raises:
            `ValueError`: The cut model does not compute what the one in training computes, or has more left than what
                was pruned: groups that were zero no longer are. Or the folder holds a checkpoint to resume from, whose
                weights would be lost.
        """
        if _internal_call and output_dir is not None:  # upstream names the folder for a checkpoint alone
            self._save_full(output_dir)
            return
        target = Path(output_dir or self._output_dir)
        self._check_places(target)
        self._save_small(str(target))
        self._copy_milestones(target)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_full(self, folder: str) -> None:
        """The model as it is in training, under its own names: Trainer resumes by `load_state_dict`."""
        whole, part = self._whole_model(), self._part()
        with own_names(whole), own_names(part):
            super().save_model(folder, _internal_call=True)
        if self.args.should_save and whole is not part:
            save_beside(Path(folder), whole, part, weights=False)

    def _save_small(self, folder: str) -> None:
        writes, small = self.args.should_save, None
        if is_sharded(self._part()):  # all ranks gather it, before the one that writes may fail
            small = self.compressed_model()
            writes = small is not None
        if not writes:
            return
        self._finish_current_push()  # which may still read the files that are about to change
        with replacing(Path(folder)) as unfinished:
            small = small or cast(PreTrainedModel, self.compressed_model())
            check_size(small, self.hspg)
            pictures, size = self._pictures(small if is_sharded(self._part()) else None), self._present_size(small)
            with self._holding(small) as model, explaining(Path(folder)):
                self._save(str(unfinished))
                save_beside(unfinished, model, small, weights=True)
                share_code(unfinished)
            save_figures(pictures, unfinished)
            if size is not None:
                size.save(unfinished)

    @contextmanager
    def _holding(self, small: PreTrainedModel) -> Iterator[nn.Module]:
        """The model with its small part in place of the large one."""
        full, whole, part = self.model, self._whole_model(), self._part()
        self.model = cast(Any, self.put_back(whole, small))
        try:
            yield cast(nn.Module, self.model)
        finally:
            if whole is not part:
                self.put_back(whole, part)
            self.model = full

    @contextmanager
    def _finished_model(self) -> Iterator[nn.Module | None]:
        """
        The model as it is saved, for whoever keeps it at the end; none before the target or on another rank, and none
        for a model around the part: of that, its weights alone would be kept, and nothing would say what fits them.
        """
        part = self._part()
        small = self.compressed_model() if self._at_target and part is self._whole_model() else None
        if small is None:
            yield None
            return
        check_size(small, self.hspg)
        with self._holding(small) as model:
            yield model

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        with showing.handing_over(self.callback_handler.callbacks, self._finished_model):
            return super()._finalize_training(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.oto_config.save_pretrained(output_dir or self._output_dir)

    # The Hub.

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the small model of this step with its code, and the checkpoint where the strategy asks for it."""
        if Path(checkpoint_folder).parent.name == checkpoints.UNFINISHED:  # it has no place yet
            return
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if not (self.args.hub_always_push or self.push_in_progress is None or self.push_in_progress.is_done()):
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._save_small(self._output_dir)
        repo_id, step = cast(str, self.hub_model_id), self.state.global_step
        takes_along = self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
        self._pushed_checkpoint = checkpoint_folder if takes_along else None
        beside = [folder_name(share) for share in self.oto_config.milestones]
        self.push_in_progress = cast(Any, start_push(self.args, repo_id, step, checkpoint_folder, beside))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        milestones: bool = False,
        **kwargs: Any,
    ) -> Any:
        """
        As [`Trainer.push_to_hub`]. Of a run with milestones the last model is pushed.

        Args:
            milestones (`bool`, *optional*, defaults to `False`):
                Whether each milestone's model is pushed as well, to a branch of its name:
                `from_pretrained(repo_id, revision="0.30")` loads it.
        """
        if milestones and not self.oto_config.milestones:
            raise ValueError("`milestones`=True, and the run has none. Leave it out.")
        config = self.oto_config
        if not (config.milestones or config.uniform or folders_in(self._output_dir)):  # such as those of earlier runs
            return super().push_to_hub(commit_message, blocking, token, revision, private, **kwargs)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        repo_id = cast(str, self.hub_model_id)
        if own := getattr(self.model, "model_tags", None):  # as upstream: it asks the model for them here alone
            given = kwargs.get("tags") or []
            kwargs["tags"] = sorted({*([given] if isinstance(given, str) else given), *own})
        self.create_model_card(**{"model_name": repo_id.rpartition("/")[2], **kwargs})
        self._finish_current_push()
        return push_sizes(
            self.args,
            repo_id,
            {folder_name(share): self._milestone_folder(share) for share in self._finished() if self._kept(share)},
            branches=milestones,
            message=commit_message or "End of training",
            token=token,
            revision=revision,
            blocking=blocking,
        )

    def create_model_card(self, *args: Any, dense_metrics: Mapping[str, float] | None = None, **kwargs: Any) -> None:
        """
        As [`Trainer.create_model_card`], with what was removed, what every layer kept and how to load the model. Where
        the data set is known, or its id is given as `dataset_tags`, the last evaluation is in the leaderboards' form.

        Args:
            dense_metrics (`Mapping[str, float]`, *optional*):
                Metrics of the dense model, to be put beside those of the last evaluation that have the same names
                (`{"eval_f1": 88.5}`). [`~Trainer.push_to_hub`] passes it on.
        """
        whole, part = self._whole_model(), self._part()
        with showing.configured(whole, part):
            super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            showing.complete_card(
                Path(self._output_dir, "README.md"),
                whole,
                part,
                self.oto_config,
                self.state.log_history,
                repo_id=self.hub_model_id or self._output_dir,
                plain=self.oto_config.uniform,
                said=inspect.signature(super().create_model_card).bind(*args, **kwargs).arguments,
                dense_scores=dense_metrics,
                sizes=self._sizes() if self._at_a_size else (),
                chosen=self.args.metric_for_best_model,
            )
