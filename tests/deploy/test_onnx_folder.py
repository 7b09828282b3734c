"""Folders with an ONNX file that engines read which know no pruned type: config, tokenizer, pooling."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import ONE_EACH, batch, family_of, tiny_model, zero_uneven
from squad_data import wordpiece
from transformers import AutoConfig, AutoTokenizer

from hf_oto import compress, summarize
from hf_oto.deploy import onnx_export, onnx_folder
from hf_oto.deploy.onnx_folder import dense_config, export_folder
from hf_oto.deploy.pooling import PooledModel, Pooling
from hf_oto.report.card import as_onnx, card_section

MODULES = ["Transformer", "Pooling", "Normalize"]


def small_folder(folder, name="BertModel", modules=None, pooling=None, layers=1):
    model = tiny_model(name, vocab_size=200, num_hidden_layers=layers)
    zero_uneven(model)
    small = compress(model).eval()
    small.save_pretrained(folder)
    wordpiece().save_pretrained(folder)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    if modules is not None:
        paths = ["", "1_Pooling", "2_Normalize"]
        listed = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (kind, path) in enumerate(zip(modules, paths, strict=False))
        ]
        (folder / "modules.json").write_text(json.dumps(listed))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return small


def run(path, inputs):
    session = onnx_export.inference_session(path)
    given = {
        value.name: inputs.get(value.name, torch.zeros_like(inputs["input_ids"])) for value in session.get_inputs()
    }
    values = session.run(None, {name: value.numpy() for name, value in given.items()})
    return dict(zip((output.name for output in session.get_outputs()), map(torch.from_numpy, values), strict=True))


def test_the_folder_is_the_familys_own(tmp_path, monkeypatch):
    small = small_folder(tmp_path / "small", "BertForQuestionAnswering", layers=2)
    traces, traced = [], onnx_export._traced
    monkeypatch.setattr(onnx_export, "_traced", lambda *args: traces.append(args) or traced(*args))
    done = export_folder(small, tmp_path / "out", tmp_path / "small", int8=True)
    files = ["config.json", "onnx/model.onnx", "onnx/model_int8.onnx"]
    files += ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    found = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert list(done.files) == found == sorted(files)
    assert len(traces) == 1  # of both graphs
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.model_type, config.architectures) == ("bert", ["BertForQuestionAnswering"])
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"per_layer_config", "auto_map", "head_dim", "refused_as_dense", "_name_or_path"} & set(saved)
    assert saved["num_attention_heads"] == 4 and saved["intermediate_size"] == 24
    inputs = batch(small)
    with torch.no_grad():
        expected = small(**inputs)
    for name, value in run(tmp_path / "out" / "onnx" / "model.onnx", inputs).items():
        assert torch.allclose(value, expected[name], atol=1e-4 * float(expected[name].abs().max()))
    assert [one.path for one in done.exports] == [str(tmp_path / "out" / file) for file in files[1:3]]
    special = json.loads((tmp_path / "out" / "special_tokens_map.json").read_text())
    assert special["cls_token"] == "[CLS]" and special["pad_token"] == "[PAD]"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Ada lives")["input_ids"]


def test_what_an_output_says_of_padding_is_nothing(tmp_path):
    """With a window of 8 tokens those far in the padding see none, of which every implementation makes its own."""
    windows = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
    model = tiny_model("ModernBertForTokenClassification", **windows)
    done = onnx_export.export_onnx(model, tmp_path / "model.onnx")
    assert done.error <= 1e-5
    inputs = batch(model, length=40)
    with torch.no_grad():
        expected = model(**inputs).logits
    found, tokens = run(tmp_path / "model.onnx", inputs)["logits"], inputs["attention_mask"].bool()
    assert torch.allclose(found[tokens], expected[tokens], atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(found, expected, atol=0.1)  # why it is left out of the comparison


@pytest.mark.parametrize("name", ONE_EACH)
def test_every_familys_config_is_read_as_its_own(name, tmp_path):
    small = compress(tiny_model(name))
    (tmp_path / "config.json").write_text(json.dumps(dense_config(small.config)))
    config = AutoConfig.from_pretrained(tmp_path)
    dense = tiny_model(name).config
    assert type(config) is type(dense) and config.model_type == dense.model_type
    changed = {"architectures", "transformers_version", "_name_or_path", "dtype"}
    pairs = dense.to_dict().items()
    assert {key: value for key, value in pairs if config.to_dict()[key] != value}.keys() <= changed, family_of(name)


def reference(states, mask, mode, normalize):
    """By the text, row by row, as the words say it."""
    rows = []
    for state, kept in zip(states, mask.bool(), strict=True):
        own = state[kept]
        pooled = {
            "cls": state[0],
            "mean": own.mean(0),
            "max": own.amax(0),
            "mean_sqrt_len_tokens": own.sum(0) / len(own) ** 0.5,
        }[mode]
        rows.append(F.normalize(pooled, dim=0) if normalize else pooled)
    return torch.stack(rows)


@pytest.mark.parametrize("mode", ["cls", "mean", "max", "mean_sqrt_len_tokens"])
@pytest.mark.parametrize("normalize", [True, False])
def test_pooling_reads_no_padding(mode, normalize):
    states, mask = torch.randn(3, 5, 4), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    pooled = Pooling((mode,), normalize)(states, mask)
    assert torch.allclose(pooled, reference(states, mask, mode, normalize), atol=1e-6)
    both = Pooling((mode, "cls"), False)(states, mask)
    assert torch.equal(both[:, 4:], states[:, 0])


def test_pooling_inside_the_graph(tmp_path):
    newer = {"pooling_mode": "mean", "embedding_dimension": 32}
    older = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    small = small_folder(tmp_path / "small", modules=MODULES, pooling=newer)
    small_folder(tmp_path / "older", modules=MODULES, pooling=older)
    pooling = Pooling.from_folder(tmp_path / "small")
    assert pooling == Pooling.from_folder(tmp_path / "older") == Pooling(("mean",), True)
    export_folder(small, tmp_path / "out", tmp_path / "small", pooling=pooling)
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()
    inputs = batch(small)
    with torch.no_grad():
        states = small(**inputs).last_hidden_state
    found = run(tmp_path / "out" / "onnx" / "model.onnx", inputs)
    assert set(found) == {"last_hidden_state", "sentence_embedding"}
    expected = reference(states, inputs["attention_mask"], "mean", True)
    assert np.allclose(found["sentence_embedding"], expected, atol=1e-5)


def test_flags_are_put_together_in_the_order_of_sentence_transformers(tmp_path):
    """Whose own file lists them in another one."""
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    flags = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    settings = {"word_embedding_dimension": 32} | {f"pooling_mode_{flag}": True for flag in flags}
    small_folder(tmp_path / "small", modules=MODULES, pooling=settings)
    theirs = modules.Pooling.load(str(tmp_path / "small" / "1_Pooling"))
    states, mask = torch.randn(3, 5, 32), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    expected = theirs({"token_embeddings": states, "attention_mask": mask})["sentence_embedding"]
    found = dataclasses.replace(Pooling.from_folder(tmp_path / "small"), normalize=False)(states, mask)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "settings", [{"output_hidden_states": True}, {"output_attentions": True}, {"return_dict": False}], ids=str
)
def test_what_a_config_adds_to_the_outputs_is_left_out_of_the_graph(settings, tmp_path):
    model = tiny_model("BertForQuestionAnswering", attention="eager", num_hidden_layers=1, **settings)
    before = model.config.to_dict()
    done = onnx_export.export_onnx(model, tmp_path / "model.onnx")
    assert done.outputs == ("start_logits", "end_logits")
    assert model.config.to_dict() == before and model.config._attn_implementation == "eager"


def test_pooling_reads_named_outputs_whatever_the_config_says():
    model = tiny_model("BertModel", return_dict=False)
    pooled = PooledModel(model, Pooling(("cls",), False))(**batch(model))
    assert torch.equal(pooled["sentence_embedding"], pooled["last_hidden_state"][:, 0])


def test_what_cannot_be_pooled_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no modules.json"):
        Pooling.from_folder(tmp_path)
    for number, (modules, settings, message) in enumerate(
        [
            (["Transformer", "Pooling", "Dense"], {"pooling_mode": "mean"}, "Transformer, Pooling, Dense"),
            (MODULES, {"pooling_mode_weightedmean_tokens": True}, "pooling_mode_weightedmean_tokens"),
            (MODULES, {"pooling_mode_mean_tokens": False}, "nothing"),
            (MODULES, {"pooling_mode": "mean", "include_prompt": False}, "without the tokens of a prompt"),
        ]
    ):
        folder = tmp_path / str(number)
        small_folder(folder, modules=modules, pooling=settings)
        with pytest.raises(ValueError, match=message):
            Pooling.from_folder(folder)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    """Transformers makes one that knows no word."""
    small = tiny_model("BertModel", vocab_size=200)
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="small has no tokenizer. Save the one"):
        export_folder(small, tmp_path / "out", tmp_path / "small")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_the_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    small = small_folder(tmp_path / "small")
    calls = []

    def fails(*args, **kwargs):
        calls.append(args)
        raise OSError("no space")

    monkeypatch.setattr(onnx_folder, "export_precisions", fails)
    with pytest.raises(OSError, match="no space"):
        export_folder(small, tmp_path / "out", tmp_path / "small")
    assert calls and [path.name for path in tmp_path.iterdir()] == ["small"]
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="Choose another folder"):
        export_folder(small, tmp_path / "out", tmp_path / "small")


def test_where_links_lead_is_where_files_go(tmp_path):
    small = small_folder(tmp_path / "small")
    for link, target in (("linked", "made"), ("model.onnx", "other.onnx"), ("small.onnx", "int8.onnx")):
        (tmp_path / link).symlink_to(target)
    done = export_folder(small, tmp_path / "linked", tmp_path / "small")
    assert done.path == str(tmp_path / "linked") and (tmp_path / "made" / "onnx" / "model.onnx").is_file()
    files = tmp_path / "model.onnx", tmp_path / "small.onnx"
    exports = onnx_export.export_precisions(small, *files)
    assert [export.path for export in exports] == [str(file) for file in files]
    assert (tmp_path / "other.onnx").stat().st_size > (tmp_path / "int8.onnx").stat().st_size
    assert all(path.is_symlink() for path in (tmp_path / "linked", *files))


def test_the_card_beside_it_tells_to_load_the_graph(tmp_path):
    small = small_folder(tmp_path / "small", "BertForQuestionAnswering")
    own = b"# Mine \xff\r\n\n"
    lines = 'SentenceTransformer("me/it", trust_remote_code=True)\nCrossEncoder("me/it")\n'
    lines += 'MultiVectorEncoder("me/it")\n'
    section = card_section(summarize(small), repo_id="me/it")
    (tmp_path / "small" / "README.md").write_bytes(own + (section + "## Rest\n\n" + lines).encode())
    export_folder(small, tmp_path / "out", tmp_path / "small")
    card = (tmp_path / "out" / "README.md").read_bytes()
    assert card.startswith(own + section.partition("## How to load it")[0].encode())
    told = card.removeprefix(own).decode().partition("## How to load it")[2]
    assert 'InferenceSession("onnx/model.onnx")' in told and "from_pretrained" not in told and "trust" not in told
    kinds = ("SentenceTransformer", "CrossEncoder", "MultiVectorEncoder")
    assert told.endswith("## Rest\n\n" + "".join(f'{kind}("me/it", backend="onnx")\n' for kind in kinds))
    pooled = as_onnx(section + "## Rest\n\n" + lines, pooled=True)
    assert pooled.endswith("## Rest\n\n" + lines) and 'InferenceSession("onnx/model.onnx")' in pooled
