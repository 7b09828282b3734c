"""What holds of the trainers of sentence-transformers on any device: what is around the pruned part follows it."""

import copy
import dataclasses

import pytest
import torch

pytest.importorskip("sentence_transformers")

from embedding_runs import CONFIG, classes, embedder, make, pairs, reranker, scored, splade
from families import counts
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss, SoftmaxLoss
from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss


def of_classes(model):
    """With weights of its own, which are in the checkpoints."""
    return SoftmaxLoss(model, 16, num_labels=3)


def guided(model):
    """By another model, which is in the checkpoints, too, as it may be trained."""
    return GISTEmbedLoss(model, copy.deepcopy(model))


def sparse(model):
    ranking = SparseMultipleNegativesRankingLoss(model)
    return SpladeLoss(model, ranking, document_regularizer_weight=1e-3, query_regularizer_weight=1e-3)


RUNS = {
    "embedder": (embedder, classes, of_classes),
    "guided": (embedder, pairs, guided),
    "reranker": (reranker, scored, BinaryCrossEntropyLoss),
    "sparse": (splade, pairs, sparse),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_saves_what_it_trained_and_resumes(name, device, tmp_path):
    make_model, make_data, make_loss = RUNS[name]
    found = []
    for folder in ("run", "again"):
        model = make_model(tmp_path / f"encoder-{folder}")
        trainer = make(
            tmp_path / folder,
            model,
            make_data(),
            make_loss(model),
            dataclasses.replace(CONFIG, shrink_during_training=True, pruning_periods=2),
            max_steps=8,
            save_strategy="steps",
            save_steps=4,
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=device.type == "cuda",
        )
        assert trainer.args.device == device
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4") if found else None)
        assert trainer.hspg.target_reached
        held = [*model.parameters(), *trainer.loss.parameters()]
        assert {parameter.device for parameter in held} == {device}
        found.append((counts(trainer.pruned_part(model)), [parameter.detach().cpu() for parameter in held]))
    (sizes, first), (other_sizes, second) = found
    assert sizes == other_sizes
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(
            two, one, rtol=0, atol=0 if device.type != "cuda" else 1e-2 * float(one.abs().max())
        )
    small = type(model)(str(tmp_path / "run"), trust_remote_code=True, device=str(device))
    texts = ["What is told?", "Who told it?"]
    encode = small.predict if name == "reranker" else small.encode
    given = [texts] if name == "reranker" else texts
    expected = (model.predict if name == "reranker" else model.encode)(given, convert_to_tensor=True)
    torch.testing.assert_close(encode(given, convert_to_tensor=True).cpu(), expected.cpu(), rtol=1e-4, atol=1e-4)
