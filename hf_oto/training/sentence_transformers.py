"""The trainers of sentence-transformers, with HSPG inside. No other room knows that package."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from ..report.card import CAPTIONS, TRUSTING, card_section
from ..report.milestones import evaluations, sizes_picture
from ..report.pictures import training_entries
from ..report.summary import summarize
from .checkpoints import name_of
from .saving import share_code
from .trainer import OTOTrainer

try:
    from sentence_transformers import (
        CrossEncoderTrainer,
        MultiVectorEncoderTrainer,
        SentenceTransformerTrainer,
        SparseEncoderTrainer,
    )
except ImportError as error:
    raise ImportError(
        "The trainers for embedding models and rerankers need sentence-transformers 6.2 or later: "
        "`pip install 'hf-oto[embeddings]'`."
    ) from error

# What a checkpoint holds of the losses: upstream keeps the model alone, with which such a run would go on otherwise.
_LOSS = "loss.safetensors"

# And of whole models in them, such as a guide, which as a rule stay as they are: then all checkpoints share one file.
_LOSS_MODELS = "loss_models.safetensors"

# Before what the compression stands in upstream's cards.
_TRAINING = "## Training Details"


class _PruningTrainer(OTOTrainer):
    """What the trainers of sentence-transformers do otherwise than Transformers' own."""

    loss: Any  # a module, or one for every data set
    evaluator: Any
    loading_class = ""
    model_class: Any  # upstream's: what it trains
    _metric_remedy = "let an `evaluator` return it; 'eval_loss' takes an `eval_dataset` that is no dict of them"

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *others: Any,
        teacher_model: PreTrainedModel | str | None = None,
        **kwargs: Any,
    ) -> None:
        if teacher_model is not None:
            raise ValueError(
                "`teacher_model` is not supported for models of sentence-transformers, which learn from embeddings or "
                "scores and not from logits. Give them as the data set's `label`, as `teacher.encode(texts)` returns "
                "them, with `MSELoss` or `EmbedDistillLoss`; a cross-encoder's scores with its own `MSELoss` or "
                "`MarginMSELoss`."
            )
        self._loading_error: Exception | None = None
        if isinstance(model, nn.Module) and not isinstance(model, self.model_class):
            raise TypeError(
                f"`model` must be a {self.loading_class} for {type(self).__name__}, got {type(model).__name__}. Use "
                f"the Trainer of its kind; from a Transformers model make `{self.loading_class}(folder)`."
            )
        super().__init__(model, args, *others, **kwargs)

    @property
    def _evaluates(self) -> bool:
        return super()._evaluates or self.evaluator is not None

    # Resuming.

    def _losses(self) -> dict[str, nn.Module]:
        return self.loss if isinstance(self.loss, dict) else {"": self.loss}

    def _trained_modules(self) -> list[nn.Module]:
        return [*super()._trained_modules(), *self._losses().values()]

    def _loss_tensors(self) -> dict[str, Tensor]:
        """What the losses hold that is no part of the model, by a name that no weight of a model has."""
        whole = self._whole_model()
        seen = {*whole.parameters(), *whole.buffers()}
        found: dict[str, Tensor] = {}
        for key, loss in self._losses().items():
            for name, tensor in loss.state_dict(keep_vars=True).items():
                if isinstance(tensor, Tensor) and tensor not in seen:  # several data sets may have one loss
                    seen.add(tensor)
                    found[f"loss.{key}.{name}"] = tensor
        return found

    def _attach(self, optimizer: Optimizer, total_steps: int) -> None:
        # The optimizer is made over the losses: what they hold is trained, and not what is pruned.
        mine = set(self._part().parameters())
        for key, loss in self._losses().items():
            held = [type(module).__name__ for module in loss.modules() if isinstance(module, self.model_class)]
            if held and mine.isdisjoint(loss.parameters()):
                named = f" of {key!r}" if key else ""
                raise ValueError(
                    f"`loss`{named} ({type(loss).__name__}) was made over another {held[0]} than `model`, which it "
                    f"would leave as it is. Make the loss over `model`."
                )
        trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        if mine.isdisjoint(trained) and any(parameter.requires_grad for parameter in mine):
            raise ValueError(
                f"`loss` ({', '.join(type(loss).__name__ for loss in self._losses().values())}) does not have `model` "
                f"among its modules, over whose weights the optimizer is made: nothing of the model would be trained. "
                f"Keep it in the loss, as `self.model = model` does."
            )
        super()._attach(optimizer, total_steps)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except Exception as error:
            self._loading_error = error
            raise

    def _load_weights(self, checkpoint: str, model: nn.Module | None) -> None:
        super()._load_weights(checkpoint, model)
        mine, paths = self._loss_tensors(), [Path(checkpoint, name) for name in (_LOSS, _LOSS_MODELS)]
        if not mine:
            return
        remedy = "Resume with the loss that the run began with."
        saved = {name: tensor for path in paths if path.is_file() for name, tensor in load_file(path).items()}
        if not saved:
            raise ValueError(
                f"{checkpoint} lacks {_LOSS}, and `loss` has weights of its own ({next(iter(mine))!r}, …). {remedy}"
            )
        for name in (*mine, *saved):
            here, there = (list(held[name].shape) if name in held else "missing" for held in (mine, saved))
            if here != there:
                raise ValueError(
                    f"{checkpoint} is of another loss: {name!r} is {there} there and {here} in `loss`. {remedy}"
                )
        for name, tensor in mine.items():
            tensor.data.copy_(saved[name])

    def _load_best_model(self) -> None:
        # Upstream logs an exception and goes on with the last weights, as if they were the best.
        self._loading_error = None
        super()._load_best_model()
        if self._loading_error is not None:
            raise self._loading_error

    # Saving.

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self._output_dir)
        share_code(folder)
        if self._checkpoints_folder is None:
            self._complete_card(folder)
        else:
            self._save_losses(folder)

    def _save_losses(self, folder: Path) -> None:
        """Save what the losses hold beside the model into a checkpoint."""
        models = [
            module
            for loss in self._losses().values()
            for module in loss.modules()
            if isinstance(module, (self.model_class, PreTrainedModel))
        ]
        of_models = {tensor for model in models for tensor in model.state_dict(keep_vars=True).values()}
        files: dict[str, dict[str, Tensor]] = {_LOSS: {}, _LOSS_MODELS: {}}
        for name, tensor in self._loss_tensors().items():
            files[_LOSS_MODELS if tensor in of_models else _LOSS][name] = tensor.detach().contiguous()
        earlier = folder.parents[1] / name_of(self._newest_checkpoint) / _LOSS_MODELS
        if _holds(earlier, files[_LOSS_MODELS]):
            with suppress(OSError):  # not every file system has links
                os.link(earlier, folder / _LOSS_MODELS)
                del files[_LOSS_MODELS]
        for name, tensors in files.items():
            if tensors:
                save_file(tensors, folder / name)

    def create_model_card(self, *args: Any, dense_metrics: Mapping[str, float] | None = None, **kwargs: Any) -> None:
        """As upstream's, with what was removed, what every layer kept and how to load the model."""
        super(OTOTrainer, self).create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            self._complete_card(Path(self._output_dir), dense_metrics)

    def _complete_card(self, folder: Path, dense_scores: Mapping[str, float] | None = None) -> None:
        """Add the compression to the card that upstream writes with every save."""
        path, config = folder / "README.md", self.oto_config
        if not path.is_file():  # upstream logs why
            return
        logged = evaluations(self.state.log_history)
        drawn = list(CAPTIONS)[: 2 if training_entries(self.state.log_history) else 1]
        sizes = self._sizes() if self._at_a_size else []
        drawn += list(sizes_picture(sizes, self.args.metric_for_best_model))
        card = ModelCard.load(path)
        # Upstream's own line loads a plain model only. It has the model's name, or a stand-in for it, which upstream
        # replaces in the whole card when the model is pushed.
        line = re.compile(rf'model = {self.loading_class}\("(.*)"\)')
        upstreams = line.search(card.text)
        repo_id = self.hub_model_id or (upstreams[1] if upstreams else self._output_dir)
        loading = f'model = {self.loading_class}("{repo_id}"{"" if config.uniform else TRUSTING})'
        card.text = line.sub(lambda _: loading, card.text)
        section = card_section(
            summarize(self._part(), sequence_length=config.sequence_length, latency_table=config.latency_table),
            repo_id=repo_id,
            loading=f"from sentence_transformers import {self.loading_class}\n\n{loading}",
            plain=config.uniform,
            pictures=drawn if importlib.util.find_spec("matplotlib") else (),
            scores=logged[-1] if logged and dense_scores else None,  # upstream tells them all
            dense_scores=dense_scores,
            sizes=sizes,
        )
        before, heading, rest = card.text.partition(_TRAINING)
        card.text = before + section + heading + rest
        card.data.tags = sorted({*(card.data.tags or []), "hf-oto", "pruned"})
        card.save(path)


def _holds(path: Path, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file holds these tensors and no others."""
    if not path.is_file():
        return False
    saved = load_file(path)
    if {name: tensor.dtype for name, tensor in saved.items()} != {name: t.dtype for name, t in tensors.items()}:
        return False
    return all(torch.equal(saved[name], tensor.cpu()) for name, tensor in tensors.items())


class OTOSentenceTransformerTrainer(_PruningTrainer, SentenceTransformerTrainer):
    r"""
    [`SentenceTransformerTrainer`], with one more argument, as in [`OTOTrainer`]: it makes an embedding model small
    while it trains it.

    Pruned is the Transformers model inside; pooling, projections and normalization stay as they are. `save_model`
    writes the small model as sentence-transformers does, with `modules.json` and a folder for every module. What a
    loss trains for itself (a classifier, a projection) is in the checkpoints.

    Args:
        oto_config ([`OTOConfig`], *optional*):
            The settings of the compression; all defaults if `None`. Everything else is as in
            [`SentenceTransformerTrainer`].

    Raises:
        `ValueError`: There is no one Transformers model of a supported family inside, a `teacher_model` or `fsdp` is
            given, or what [`OTOTrainer`] refuses.

    Example:

    ```python
    trainer = OTOSentenceTransformerTrainer(
        model=model, args=args, oto_config=OTOConfig(target_sparsity=0.5), train_dataset=train, loss=loss
    )
    trainer.train()
    trainer.save_model("small")
    SentenceTransformer("small", trust_remote_code=True)
    ```
    """

    loading_class = "SentenceTransformer"


class OTOCrossEncoderTrainer(_PruningTrainer, CrossEncoderTrainer):
    """[`CrossEncoderTrainer`], as [`OTOSentenceTransformerTrainer`] is: for rerankers."""

    loading_class = "CrossEncoder"


class OTOSparseEncoderTrainer(_PruningTrainer, SparseEncoderTrainer):
    """[`SparseEncoderTrainer`], as [`OTOSentenceTransformerTrainer`] is: for SPLADE and its kind."""

    loading_class = "SparseEncoder"


class OTOMultiVectorEncoderTrainer(_PruningTrainer, MultiVectorEncoderTrainer):
    """[`MultiVectorEncoderTrainer`], as [`OTOSentenceTransformerTrainer`] is: for ColBERT and its kind."""

    loading_class = "MultiVectorEncoder"
