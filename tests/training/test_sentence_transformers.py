"""The trainers of sentence-transformers with HSPG inside: losses, kinds of models, what is saved and resumed."""

import dataclasses
import functools
import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import embedding_runs
import forking
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from embedding_runs import (
    CONFIG,
    CONTEXTS,
    QUESTIONS,
    STEPS,
    classes,
    colbert,
    embedder,
    encoder_folder,
    lists,
    make,
    margins,
    pairs,
    reranker,
    scored,
    splade,
    taught,
)
from hub import TOKEN, Hub
from huggingface_hub import ModelCard
from sentence_transformers import (
    CrossEncoder,
    MultiVectorEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoder,
)
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.cross_encoder import losses as cross_losses
from sentence_transformers.multi_vector_encoder import losses as multi_losses
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, StaticEmbedding
from sentence_transformers.sparse_encoder import losses as sparse_losses
from short_runs import StopAt
from short_runs import make as make_short

from hf_oto import OTOSentenceTransformerTrainer, summarize
from hf_oto.deploy import pooling as onnx_pooling
from hf_oto.deploy.onnx_export import inference_session
from hf_oto.deploy.onnx_folder import export_folder

LOSSES = {
    "ranking": (lambda model: losses.MultipleNegativesRankingLoss(model), pairs),
    "cached ranking": (lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2), pairs),
    "cosent": (lambda model: losses.CoSENTLoss(model), scored),
    "softmax": (lambda model: losses.SoftmaxLoss(model, 16, 3), classes),
    "mse": (lambda model: losses.MSELoss(model), taught),
    "distill": (
        lambda model: losses.EmbedDistillLoss(model, "cosine", projection_dim=24),
        functools.partial(taught, 24),
    ),
    "matryoshka": (lambda model: losses.MatryoshkaLoss(model, losses.CoSENTLoss(model), [16, 8]), scored),
    "adaptive layer": (
        lambda model: losses.AdaptiveLayerLoss(model, losses.MultipleNegativesRankingLoss(model)),
        pairs,
    ),
}
CROSS_LOSSES = {
    "binary": (cross_losses.BinaryCrossEntropyLoss, scored),
    "margin": (cross_losses.MarginMSELoss, margins),
    "list": (cross_losses.ListNetLoss, lists),
}


def kept(model):
    return summarize(model.transformers_model, sequence_length=16).prunable_ratio


def same(model, other):
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_reaches_the_target_and_what_is_saved_embeds_as_what_was_trained(name, tmp_path):
    loss, data = LOSSES[name]
    model = embedder(tmp_path / "encoder")
    trainer = make(tmp_path / "run", model, data(), loss(model))
    trainer.train()
    assert 0.45 <= kept(model) <= 0.55
    assert trainer.hspg.target_reached
    trainer.save_model(str(tmp_path / "small"))
    files = {str(path.relative_to(tmp_path / "small")) for path in (tmp_path / "small").rglob("*")}
    assert {"modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors", "modeling_oto.py"} <= files
    assert "3_Normalize" in {name.partition("/")[0] for name in files}
    small = SentenceTransformer(str(tmp_path / "small"), device="cpu")
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert np.abs(small.encode(QUESTIONS) - model.encode(QUESTIONS)).max() < 1e-5
    assert type(model.transformers_model).__name__ == "BertModel"  # the large one is in its place again


@pytest.mark.parametrize("name", CROSS_LOSSES)
def test_rerankers(name, tmp_path):
    loss, data = CROSS_LOSSES[name]
    model = reranker(tmp_path / "encoder")
    trainer = make(tmp_path / "run", model, data(), loss(model))
    trainer.train()
    assert 0.45 <= kept(model) <= 0.55
    trainer.save_model(str(tmp_path / "small"))
    small = CrossEncoder(str(tmp_path / "small"), device="cpu")
    asked = list(zip(QUESTIONS, CONTEXTS, strict=True))
    assert np.abs(small.predict(asked) - model.predict(asked)).max() < 1e-5
    assert 'model = CrossEncoder("' in (tmp_path / "small" / "README.md").read_text(encoding="utf-8")


def test_sparse_encoders(tmp_path):
    model = splade(tmp_path / "encoder")
    ranking = sparse_losses.SparseMultipleNegativesRankingLoss(model)
    loss = sparse_losses.SpladeLoss(model, ranking, document_regularizer_weight=1e-3)
    trainer = make(tmp_path / "run", model, pairs(), loss)
    trainer.train()
    assert 0.45 <= kept(model) <= 0.55
    trainer.save_model(str(tmp_path / "small"))
    small = SparseEncoder(str(tmp_path / "small"), device="cpu")
    texts = QUESTIONS[:8]
    difference = small.encode(texts).to_dense() - model.encode(texts).to_dense()
    assert float(difference.abs().max()) < 1e-5


def test_multi_vector_encoders(tmp_path):
    model = colbert(tmp_path / "encoder")
    trainer = make(tmp_path / "run", model, pairs(), multi_losses.MultiVectorMultipleNegativesRankingLoss(model))
    trainer.train()
    assert 0.45 <= kept(model) <= 0.55
    trainer.save_model(str(tmp_path / "small"))
    small = MultiVectorEncoder(str(tmp_path / "small"), device="cpu")
    for mine, theirs in zip(small.encode_document(CONTEXTS[:4]), model.encode_document(CONTEXTS[:4]), strict=True):
        assert np.abs(np.asarray(mine) - np.asarray(theirs)).max() < 1e-5


def test_several_data_sets_with_their_losses_prompts_rates_and_precision(tmp_path):
    model = embedder(tmp_path / "encoder")
    data = DatasetDict({"scored": scored(), "pairs": pairs()})
    rate = r"2\.linear"
    trainer = make(
        tmp_path / "run",
        model,
        data,
        {"scored": losses.CoSENTLoss(model), "pairs": losses.MultipleNegativesRankingLoss(model)},
        bf16=True,
        gradient_accumulation_steps=2,
        prompts={"scored": "compare: ", "pairs": {"anchor": "query: "}},
        learning_rate_mapping={rate: 1e-3},
        extra={"eval_dataset": data},
        eval_strategy="steps",
        eval_steps=8,
    )
    trainer.train()
    assert 0.45 <= kept(model) <= 0.55
    peaks = sorted({group["initial_lr"] for group in trainer.optimizer.param_groups})
    assert peaks == [1e-3, 3e-3]
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert {"eval_scored_loss", "eval_pairs_loss", "removed_params"} <= logged


@pytest.mark.slow
@pytest.mark.parametrize("shrinks", [False, True])
def test_a_run_goes_on_to_the_bit_with_what_its_loss_has_learnt(shrinks, tmp_path):
    config = CONFIG.from_dict(CONFIG.to_dict() | {"shrink_during_training": shrinks})
    saves = {"save_strategy": "steps", "save_steps": STEPS}

    def start(folder, **more):
        model = embedder(tmp_path / f"{folder}-encoder")
        torch.manual_seed(1)
        loss = losses.SoftmaxLoss(model, 16, 3)
        return make(tmp_path / folder, model, classes(), loss, config=config, **saves, **more), loss

    whole, loss = start("whole")
    whole.train()
    for step in (7, 12):  # while it prunes, and after it
        stopped, _ = start(f"stopped-{step}", extra={"callbacks": [StopAt(step)]})
        stopped.train()
        resumed, resumed_loss = start(f"stopped-{step}")
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == STEPS
        assert same(resumed.model, whole.model)
        assert same(resumed_loss.classifier, loss.classifier)
    assert (type(whole.model.transformers_model).__name__ == "OTOBertModel") == shrinks


def test_a_checkpoint_of_another_loss_is_refused(tmp_path):
    model = embedder(tmp_path / "encoder")
    saves = {"save_strategy": "steps", "save_steps": 4}
    stop = {"callbacks": [StopAt(4)]}
    make(tmp_path / "run", model, classes(), losses.SoftmaxLoss(model, 16, 3), extra=stop, **saves).train()
    other = make(tmp_path / "run", model, classes(), losses.SoftmaxLoss(model, 16, 5), **saves)
    with pytest.raises(ValueError, match="with the loss that the run began with"):
        other.train(resume_from_checkpoint=True)
    (tmp_path / "run" / "checkpoint-4" / "loss.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks loss.safetensors"):
        other.train(resume_from_checkpoint=True)


def best_of(tmp_path, model, **more):
    rows = scored()
    evaluator = EmbeddingSimilarityEvaluator(rows["first"][:], rows["second"][:], rows["label"][:], write_csv=False)
    return make(
        tmp_path / "run",
        model,
        rows,
        losses.CoSENTLoss(model),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="spearman_cosine",
        extra={"evaluator": evaluator},
        **more,
    )


def test_the_best_model_is_one_at_the_target(tmp_path):
    model = embedder(tmp_path / "encoder")
    trainer = best_of(tmp_path, model)
    trainer.train()
    scores = [(e["step"], e["eval_spearman_cosine"]) for e in trainer.state.log_history if "eval_spearman_cosine" in e]
    reached = trainer.hspg.schedule.boundaries[-1]
    at_target = {step: score for step, score in scores if step >= reached}
    assert trainer.state.best_metric == max(at_target.values())
    assert trainer.state.best_global_step in at_target
    saved = SentenceTransformer(str(tmp_path / "run" / f"checkpoint-{trainer.state.best_global_step}"), device="cpu")
    assert same(saved, model)
    assert 0.45 <= kept(model) <= 0.55


def test_a_milestone_is_the_best_embedding_model_of_its_size(tmp_path):
    config = dataclasses.replace(CONFIG, milestones=(0.25,))
    model = embedder(tmp_path / "encoder")
    trainer = best_of(tmp_path, model, config=config)
    trainer.train()
    log = [
        (e["step"], e["eval_spearman_cosine"]) for e in trainer.state.log_history if e.get("eval_milestone") == 0.25
    ]
    assert log[-1][0] == 11 and log[0][0] == 8  # evaluated every other step, and when its recovery ends
    numbers = json.loads((tmp_path / "run" / "0.25" / "milestone.json").read_text())
    assert (numbers["step"], numbers["scores"]["eval_spearman_cosine"]) == max(log, key=lambda pair: pair[1])
    small = SentenceTransformer(str(tmp_path / "run" / "0.25"), device="cpu")
    assert 0.72 <= kept(small) <= 0.85 and 0.45 <= kept(model) <= 0.55
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| 0.25 " in card and "| 0.50 " in card and card.count("## Every size of this run") == 1


def test_what_goes_wrong_when_the_best_model_is_loaded_is_raised(tmp_path, monkeypatch):
    trainer = best_of(tmp_path, embedder(tmp_path / "encoder"))
    monkeypatch.setattr(type(trainer), "_load_weights", lambda *args: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(OSError, match="gone"):
        trainer.train()


def test_what_cannot_be_pruned_or_taught_is_refused(tmp_path):
    model = embedder(tmp_path / "encoder")
    with pytest.raises(ValueError, match="MSELoss"):
        make(tmp_path / "run", model, scored(), losses.CoSENTLoss(model), extra={"teacher_model": model})
    assert not (tmp_path / "run").exists()
    towers = Router.for_query_document(list(embedder(tmp_path / "a"))[:2], list(embedder(tmp_path / "b"))[:2])
    both = SentenceTransformer(modules=[towers], device="cpu")
    mapping = {"anchor": "query", "positive": "document"}
    with pytest.raises(ValueError, match="2 Transformers models"):
        make(tmp_path / "run", both, pairs(), losses.MultipleNegativesRankingLoss(both), router_mapping=mapping)
    static = SentenceTransformer(modules=[StaticEmbedding(model.tokenizer, embedding_dim=8)], device="cpu")
    with pytest.raises(ValueError, match="`model`"):
        make(tmp_path / "run", static, pairs(), losses.MultipleNegativesRankingLoss(static))


def test_towers_are_pruned_one_after_the_other(tmp_path):
    class Chooses(OTOSentenceTransformerTrainer):
        route = "document"

        def pruned_part(self, model):
            return model[0].sub_modules[self.route][0].model

    class ChoosesOther(Chooses):
        route = "query"

    def start(model, kind, folder):
        arguments = SentenceTransformerTrainingArguments(
            str(tmp_path / folder),
            **{"max_steps": STEPS, "learning_rate": 3e-3, "report_to": [], "use_cpu": True, "disable_tqdm": True},
            **{"save_strategy": "steps", "save_steps": 8},
            router_mapping={"anchor": "query", "positive": "document"},
        )
        loss = losses.MultipleNegativesRankingLoss(model)
        return kind(model=model, args=arguments, oto_config=CONFIG, train_dataset=pairs(), loss=loss)

    def loaded(folder):
        return SentenceTransformer(str(tmp_path / folder), device="cpu")

    towers = [list(embedder(tmp_path / name))[:2] for name in ("a", "b")]
    both = SentenceTransformer(modules=[Router.for_query_document(*towers)], device="cpu")
    start(both, Chooses, "first").train()
    whole = start(loaded("first"), ChoosesOther, "second")
    whole.train()
    # Its checkpoint holds two configs of one family, of other sizes.
    resumed = start(loaded("first"), ChoosesOther, "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "second" / "checkpoint-8"))
    assert same(resumed.model, whole.model)
    small = loaded("second")
    assert {type(modules[0].model).__name__ for modules in small[0].sub_modules.values()} == {"OTOBertModel"}
    for encode in ("encode_query", "encode_document"):
        found, expected = (getattr(each, encode)(QUESTIONS[:8]) for each in (small, whole.model))
        assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize("kind", [embedder, reranker])
def test_embeddings_are_no_outputs_of_a_teacher(kind, tmp_path):
    teacher = kind(tmp_path / "encoder")
    with pytest.raises(
        ValueError, match=rf"`teacher_model`.* {type(teacher).__name__}.*`OTOSentenceTransformerTrainer"
    ):
        make_short(tmp_path / "run", extra={"teacher_model": teacher})
    assert not (tmp_path / "run").exists()


def test_without_the_extra_it_says_how_to_get_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "hf_oto.training.sentence_transformers")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"`pip install 'hf-oto\[embeddings\]'`"):
        importlib.import_module("hf_oto.training.sentence_transformers")


def test_without_a_target_it_trains_as_upstream_does(tmp_path):
    """At a target of 0 and in upstream's own trainer the same weights come out, to the bit."""
    nothing = CONFIG.from_dict(CONFIG.to_dict() | {"target_sparsity": 0.0})
    made = []
    for number, kind in enumerate((None, SentenceTransformerTrainer)):
        model = embedder(tmp_path / f"encoder-{number}")
        make(tmp_path / f"run-{number}", model, scored(), losses.CoSENTLoss(model), config=nothing, kind=kind).train()
        made.append(model)
    assert same(*made)


STRANGER = """
import sys
sys.modules["hf_oto"] = None
import torch
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], trust_remote_code=True, device="cpu")
texts = sys.argv[3:]
torch.save(torch.from_numpy(model.encode(texts)), sys.argv[2])
"""


def run_stranger(folder, out, home, **environment):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    environment["HF_HOME"] = str(home)
    command = [sys.executable, "-c", STRANGER, str(folder), str(out), *QUESTIONS[:8]]
    done = forking.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out, weights_only=True)


def routed(folder):
    """The encoder for documents, which upstream saves in a folder of its own, and a static one for questions."""
    documents = list(embedder(folder))[:2]
    questions = [StaticEmbedding(documents[0].tokenizer, embedding_dim=32)]
    return SentenceTransformer(modules=[Router.for_query_document(questions, documents, "document")], device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [embedder, routed])
def test_it_loads_where_hf_oto_is_not(kind, tmp_path):
    model = kind(tmp_path / "encoder")
    routes = {"router_mapping": {"first": "query", "second": "document"}} if kind is routed else {}
    trainer = make(tmp_path / "run", model, scored(), losses.CoSENTLoss(model), **routes)
    trainer.train()
    trainer.save_model(str(tmp_path / "small"))
    folders = ["small"]
    if kind is routed:  # saved again by itself it has the code in the encoder's folder alone
        SentenceTransformer(str(tmp_path / "small"), device="cpu").save_pretrained(str(tmp_path / "again"))
        for path in (tmp_path / "again").glob("*/*_oto.py"):
            shutil.copyfile(path, tmp_path / "again" / path.name)
        folders.append("again")
    for folder in folders:
        found = run_stranger(tmp_path / folder, tmp_path / "found.pt", tmp_path / "home")
        assert float((found - torch.from_numpy(model.encode(QUESTIONS[:8]))).abs().max()) < 1e-5


def test_the_card_tells_of_the_compression_and_keeps_it_with_the_next_save(tmp_path):
    model = embedder(tmp_path / "encoder")
    trainer = make(tmp_path / "run", model, scored(), losses.CoSENTLoss(model))
    trainer.train()
    small = tmp_path / "small"
    for _ in range(2):
        trainer.save_model(str(small))
    SentenceTransformer(str(small), device="cpu").save_pretrained(str(tmp_path / "again"))
    for folder in (small, tmp_path / "again"):
        card = ModelCard.load(folder / "README.md")
        assert card.text.count("## Compression") == 1
        assert card.text.index("## Compression") < card.text.index("## Training Details")
        assert 'SentenceTransformer("' in card.text.partition("## How to load it")[2]
        assert {"hf-oto", "pruned", "sentence-transformers"} <= set(card.data.tags)


def test_equal_blocks_make_a_model_that_needs_no_code(tmp_path):
    model = embedder(tmp_path / "encoder")
    config = dataclasses.replace(CONFIG, uniform=True, structures=("neurons",))
    trainer = make(tmp_path / "run", model, scored(), losses.CoSENTLoss(model), config)
    trainer.train()
    trainer.save_model(str(tmp_path / "small"))
    assert not list((tmp_path / "small").rglob("*.py"))
    assert 'SentenceTransformer("' in (card := (tmp_path / "small" / "README.md").read_text())
    assert "trust_remote_code" not in card
    small = SentenceTransformer(str(tmp_path / "small"), device="cpu")
    assert type(small.transformers_model).__name__ == "BertModel"
    assert np.abs(small.encode(QUESTIONS[:8]) - model.encode(QUESTIONS[:8])).max() < 1e-5


@pytest.mark.slow
def test_two_processes_make_one_model(tmp_path):
    command = [sys.executable, embedding_runs.__file__, "ranks", tmp_path]
    forking.run_ranks(2, command, env=environment_with_the_package())
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    small = SentenceTransformer(str(tmp_path / "small"), device="cpu")
    large = embedder(tmp_path / "again")
    large.load_state_dict(first)
    assert 0.45 <= kept(small) <= 0.55
    assert np.abs(small.encode(QUESTIONS) - large.encode(QUESTIONS)).max() < 1e-5


def environment_with_the_package(**more):
    return os.environ | {"PYTHONPATH": str(Path(embedding_runs.__file__).parents[2])} | more


@pytest.mark.slow
def test_pushes_are_whole_and_a_stranger_pulls_the_last(tmp_path):
    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    with Hub() as hub:
        environment = environment_with_the_package(HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="1", HF_TOKEN=TOKEN)
        environment |= {"HF_HOME": str(tmp_path / "home")} | dict.fromkeys(offline, "0")
        command = [sys.executable, embedding_runs.__file__, "push", "me/embeds", str(tmp_path)]
        done = forking.run(command, capture_output=True, text=True, timeout=280, env=environment)
        assert done.returncode == 0, done.stderr[-4000:]
        needed = {"modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors", "modeling_oto.py", "README.md"}
        for number, message in enumerate(hub.messages("me/embeds")):
            if message.startswith("Training") or message == "End of training":
                files = hub.files("me/embeds", number)
                assert needed <= set(files), message
                assert b"## Compression" in files["README.md"]
        assert files["README.md"].count(b"## Compression") == 1
        assert b'SentenceTransformer("me/embeds", trust_remote_code=True)' in files["README.md"]
        here = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"} | dict.fromkeys(offline, "0")
        found = run_stranger("me/embeds", tmp_path / "found.pt", tmp_path / "elsewhere", **here)
    expected = torch.load(tmp_path / "embeddings.pt", weights_only=True)
    assert float((found - expected).abs().max()) < 1e-5


def test_an_onnx_file_with_pooling_inside_gives_what_encode_gives(tmp_path):
    pytest.importorskip("onnxruntime")
    body = Transformer(encoder_folder(tmp_path / "encoder"))
    model = SentenceTransformer(modules=[body, Pooling(32, "mean"), Normalize()], device="cpu")
    trainer = make(tmp_path / "run", model, scored(), losses.CoSENTLoss(model))
    trainer.train()
    trainer.save_model(str(tmp_path / "small"))
    small = SentenceTransformer(str(tmp_path / "small"), device="cpu")
    pooling = onnx_pooling.Pooling.from_folder(tmp_path / "small")
    export_folder(small.transformers_model, tmp_path / "onnx", tmp_path / "small", pooling=pooling)
    session = inference_session(tmp_path / "onnx" / "onnx" / "model.onnx")
    tokens = small.tokenizer(QUESTIONS[:8], padding=True, return_tensors="np")
    names = [output.name for output in session.get_outputs()]
    inputs = {value.name: tokens[value.name] for value in session.get_inputs()}
    found = dict(zip(names, session.run(None, inputs), strict=True))["sentence_embedding"]
    assert np.abs(found - model.encode(QUESTIONS[:8])).max() < 1e-5


@pytest.mark.parametrize("uniform", [False, True])
def test_setfit_trains_a_head_on_a_pruned_body(uniform, tmp_path):
    setfit = pytest.importorskip("setfit")
    from setfit.sampler import ContrastiveDataset
    from sklearn.linear_model import LogisticRegression

    labels = [int(text.startswith("Where")) for text in QUESTIONS]
    contrasts = ContrastiveDataset(QUESTIONS, labels, multilabel=False, sampling_strategy="undersampling")
    data = Dataset.from_list([pair for _, pair in zip(range(80), iter(contrasts), strict=False)])
    model = embedder(tmp_path / "encoder")
    config = dataclasses.replace(CONFIG, uniform=True, structures=("neurons",)) if uniform else CONFIG
    trainer = make(tmp_path / "run", model, data, losses.CosineSimilarityLoss(model), config, max_steps=40)
    trainer.train()
    trainer.save_model(str(tmp_path / "body"))
    body = SentenceTransformer(str(tmp_path / "body"), device="cpu")
    classifier = setfit.SetFitModel(model_body=body, model_head=LogisticRegression(), labels=[0, 1])
    classifier.fit(QUESTIONS, labels, num_epochs=1)
    predicted = np.array(classifier.predict(QUESTIONS))
    assert (predicted == np.array(labels)).mean() > 0.9
    classifier.save_pretrained(str(tmp_path / "saved"))
    again = setfit.SetFitModel.from_pretrained(str(tmp_path / "saved"))
    assert kept(again.model_body) == (1.0 if uniform else kept(body))  # what is plain is whole to who loads it
    assert (type(again.model_body.transformers_model).__name__ == "BertModel") == uniform
    assert (np.array(again.predict(QUESTIONS)) == predicted).all()
