"""What losses of sentence-transformers hold beside the model, and what a trainer says of a wrong model or loss."""

import os
import re

import pytest
import torch
from datasets import DatasetDict
from embedding_runs import (
    CONFIG,
    QUESTIONS,
    STEPS,
    classes,
    colbert,
    embedder,
    encoder_folder,
    make,
    pairs,
    reranker,
    scored,
    splade,
)
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.multi_vector_encoder.losses import MultiVectorMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss
from short_runs import StopAt
from short_runs import make as make_short
from torch import nn
from transformers import BertModel, TrainerCallback

from hf_oto import OTOConfig, OTOSentenceTransformerTrainer
from hf_oto.models.modeling_oto import PrunedModel

SHRINKS = OTOConfig(**(CONFIG.to_dict() | {"shrink_during_training": True}))


class Centred(nn.Module):
    """A loss with a state that is no parameter: running means of the embeddings."""

    def __init__(self, model):
        super().__init__()
        self.model, self.norm = model, nn.BatchNorm1d(16, affine=False)

    def forward(self, features, labels):
        first, second = (self.norm(self.model(feature)["sentence_embedding"]) for feature in features)
        return (nn.functional.cosine_similarity(first, second) - labels.float()).square().mean()


@pytest.mark.parametrize("kind", ["shared", "buffers"])
def test_a_run_goes_on_with_all_that_its_losses_hold(kind, tmp_path):
    def start(**more):
        model = embedder(tmp_path / "encoder")
        torch.manual_seed(1)
        loss = losses.SoftmaxLoss(model, 16, 3) if kind == "shared" else Centred(model)
        data = DatasetDict({"nli": classes(), "snli": classes()}) if kind == "shared" else scored()
        given = dict.fromkeys(("nli", "snli"), loss) if kind == "shared" else loss
        saves = {"save_strategy": "steps", "save_steps": 8}
        return make(tmp_path / "run", model, data, given, **saves, **more), loss

    whole, loss = start()
    whole.train()
    resumed, again = start()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-8"))
    mine, expected = again.state_dict(), loss.state_dict()
    assert all(torch.equal(mine[name], tensor) for name, tensor in expected.items())


def test_a_decoder_that_shares_the_encoders_weights_goes_on_sharing_them(tmp_path, caplog):
    body = Transformer(encoder_folder(tmp_path / "encoder"))
    model = SentenceTransformer(modules=[body, Pooling(32, "cls")], device="cpu")
    loss = losses.DenoisingAutoEncoderLoss(model, tie_encoder_decoder=True)
    data = scored().select_columns(["first", "second"])
    trainer = make(tmp_path / "run", model, data, loss, config=SHRINKS)
    trainer.train()
    assert "decoder.bert.encoder.layer.0." in caplog.text and "does nothing" in caplog.text
    encoder, decoder = model.transformers_model, loss.decoder.bert
    mine, theirs = dict(encoder.named_parameters()), dict(decoder.named_parameters())
    assert all(parameter is theirs[name] for name, parameter in mine.items() if not name.startswith("pooler"))
    assert trainer.hspg.target_reached
    trainer.save_model(str(tmp_path / "small"))
    small = SentenceTransformer(str(tmp_path / "small"), device="cpu")
    assert abs(small.encode(QUESTIONS[:8]) - model.encode(QUESTIONS[:8])).max() < 1e-5


def test_a_guide_of_a_loss_does_not_keep_a_model_from_shrinking(tmp_path):
    model, guide = embedder(tmp_path / "encoder"), embedder(tmp_path / "guide")
    before = guide.encode(QUESTIONS[:4])
    make(tmp_path / "run", model, pairs(), losses.GISTEmbedLoss(model, guide), config=SHRINKS).train()
    assert isinstance(model.transformers_model, PrunedModel)
    assert (guide.encode(QUESTIONS[:4]) == before).all()


def test_checkpoints_share_a_guide_that_stays_as_it_is(tmp_path):
    def start(shift):
        model, guide = embedder(tmp_path / "encoder"), embedder(tmp_path / "guide")
        guide[2].linear.bias.data.add_(shift)
        saves = {"save_strategy": "steps", "save_steps": 4}
        return make(tmp_path / "run", model, pairs(), losses.GISTEmbedLoss(model, guide), **saves)

    whole = start(0.0)
    whole.train()
    guides = [tmp_path / "run" / f"checkpoint-{step}" / "loss_models.safetensors" for step in (4, 8, 12, 16)]
    assert all(guide.samefile(guides[0]) for guide in guides)
    assert not (guides[0].parent / "loss.safetensors").exists()
    # It is the one of the run, whatever the script that resumes has.
    resumed = start(1.0)
    resumed.train(resume_from_checkpoint=str(guides[1].parent))
    mine, expected = resumed.loss.state_dict(), whole.loss.state_dict()
    assert all(torch.equal(mine[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("case", ["changes", "no links"])
def test_a_guide_is_written_anew_where_it_has_to_be(case, tmp_path, monkeypatch):
    if case == "no links":
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("not supported")))
    model, guide = embedder(tmp_path / "encoder"), embedder(tmp_path / "guide")
    values = []

    class Changes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if case == "changes":
                guide[2].linear.bias.data.add_(1.0)
            values.append(guide[2].linear.bias.detach().clone())

    extra = {"callbacks": [Changes()]}
    loss = losses.GISTEmbedLoss(model, guide)
    make(tmp_path / "run", model, pairs(), loss, extra=extra, save_strategy="steps", save_steps=8).train()
    for step in (8, 16):
        saved = load_file(tmp_path / "run" / f"checkpoint-{step}" / "loss_models.safetensors")
        assert torch.equal(saved["loss..guide.2.linear.bias"], values[step - 1])


def test_a_loss_over_another_model_is_refused(tmp_path):
    model, other = embedder(tmp_path / "encoder"), embedder(tmp_path / "other")
    given = {"scored": losses.CoSENTLoss(model), "pairs": losses.MultipleNegativesRankingLoss(other)}
    trainer = make(tmp_path / "run", model, DatasetDict({"scored": scored(), "pairs": pairs()}), given)
    with pytest.raises(ValueError, match=r"`loss` of 'pairs' \(MultipleNegativesRankingLoss\) was made over another"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("own", [False, True])
def test_a_loss_that_has_no_model_is_refused_by_name(own, tmp_path):
    class Hidden(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.models, self.scale = [model], nn.Linear(1, 1) if own else nn.Identity()

        def forward(self, features, labels):
            first, second = (self.models[0](feature)["sentence_embedding"] for feature in features)
            alike = nn.functional.cosine_similarity(first, second)[:, None]
            return (self.scale(alike)[:, 0] - labels.float()).square().mean()

    model = embedder(tmp_path / "encoder")
    trainer = make(tmp_path / "run", model, scored(), Hidden(model))
    with pytest.raises(ValueError, match=r"`loss` \(Hidden\) does not have `model` among its modules"):
        trainer.train()
    assert trainer.state.global_step == 0
    # An optimizer of the user's own may have the model's weights.
    mine = torch.optim.AdamW([*model.parameters(), *trainer.loss.parameters()], lr=1e-3)
    trainer = make(tmp_path / "run", model, scored(), Hidden(model), extra={"optimizers": (mine, None)})
    trainer.train()
    assert trainer.hspg.target_reached


def test_a_loss_that_is_made_when_the_model_is(tmp_path):
    trainer = OTOSentenceTransformerTrainer(
        model_init=lambda: embedder(tmp_path / "encoder"),
        args=SentenceTransformerTrainingArguments(str(tmp_path / "run"), max_steps=STEPS, report_to=[], use_cpu=True),
        oto_config=CONFIG,
        train_dataset=scored(),
        loss=losses.CoSENTLoss,
    )
    trainer.train()
    assert trainer.hspg.target_reached


def test_a_model_of_another_kind_is_refused(tmp_path):
    def give(model):
        args = SentenceTransformerTrainingArguments(str(tmp_path / "run"), report_to=[], use_cpu=True)
        OTOSentenceTransformerTrainer(model=model, args=args, oto_config=CONFIG, train_dataset=scored())

    with pytest.raises(TypeError, match=r"`model` must be a SentenceTransformer for OTOSent.*, got CrossEncoder"):
        give(reranker(tmp_path / "encoder"))
    with pytest.raises(TypeError, match=r"got BertModel.*`SentenceTransformer\(folder\)`"):
        give(BertModel.from_pretrained(tmp_path / "encoder"))
    for named in (give, lambda name: make_short(tmp_path / "run", model=name)):
        with pytest.raises(TypeError, match="`model` must be a model, got str 'some/model'. Load it before"):
            named("some/model")
    with pytest.raises(ValueError, match=r"`model` is a SparseEncoder .* Use OTOSparseEncoderTrainer with SparseEnc"):
        make_short(tmp_path / "run", model=splade(tmp_path / "masked"))
    assert not (tmp_path / "run").exists()


def test_a_metric_that_no_evaluation_has_is_refused_by_the_first_one(tmp_path):
    model, rows = embedder(tmp_path / "encoder"), scored()
    named = EmbeddingSimilarityEvaluator(rows["first"][:], rows["second"][:], rows["label"][:], name="dev")
    evaluates = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "spearman_cosine"}
    given = {"extra": {"evaluator": named}, **evaluates, **best}
    trainer = make(tmp_path / "run", model, rows, losses.CoSENTLoss(model), **given)
    refused = "eval_spearman_cosine.*not among.*eval_dev_spearman_cosine.*let an `evaluator` return it"
    with pytest.raises(KeyError, match=refused):
        trainer.train()
    assert trainer.state.global_step == 2  # long before the target, where it is asked for


KINDS = {
    "SentenceTransformer": (embedder, losses.MultipleNegativesRankingLoss),
    "CrossEncoder": (reranker, BinaryCrossEntropyLoss),
    "SparseEncoder": (splade, lambda model: SpladeLoss(model, SparseMultipleNegativesRankingLoss(model), 1e-3)),
    "MultiVectorEncoder": (colbert, MultiVectorMultipleNegativesRankingLoss),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_line_of_a_card_that_loads_the_model_loads_it(kind, tmp_path):
    made, loss = KINDS[kind]
    model = made(tmp_path / "encoder")
    data = scored() if kind == "CrossEncoder" else pairs()
    trainer = make(tmp_path / "run", model, data, loss(model), extra={"callbacks": [StopAt(STEPS)]})
    trainer.train()
    trainer.save_model(str(tmp_path / "small"))
    card = (tmp_path / "small" / "README.md").read_text(encoding="utf-8")
    lines = re.findall(rf"^model = {kind}\(.*$", card, re.MULTILINE)
    assert len(lines) == 2 and len(set(lines)) == 1 and lines[0].endswith('", trust_remote_code=True)')
    assert str(tmp_path) not in card
    # Whoever pushes it gives it its name.
    small = type(model)(str(tmp_path / "small"), device="cpu")
    small.model_card_data.set_model_id("me/small")
    small.save_pretrained(str(tmp_path / "again"))
    card = (tmp_path / "again" / "README.md").read_text(encoding="utf-8")
    assert card.count(f'model = {kind}("me/small", trust_remote_code=True)') == 2
