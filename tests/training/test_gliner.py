"""GLiNER finds entities of types that are named at inference; its encoder is pruned while it is fine-tuned."""

import sys

import forking
import pytest
import torch
from embedding_runs import SIZES
from families import counts
from squad_data import CITIES, NAMES, wordpiece
from transformers import BertConfig, BertModel

from hf_oto import OTOConfig, OTOTrainer

gliner = pytest.importorskip("gliner")
from gliner import training  # noqa: E402

LABELS = ["person", "city"]
TEXTS = [f"{name.split()[0]} lives in {city.split()[-1]} .".split() for name in NAMES for city in CITIES]
ROWS = [{"tokenized_text": words, "ner": [[0, 0, "person"], [3, 3, "city"]]} for words in TEXTS]


class Pruning(OTOTrainer, training.Trainer):
    """GLiNER's trainer, with its loss and rates, and the small encoder's config in GLiNER's own."""

    def put_back(self, model, part):
        model.config.encoder_config = part.config
        return super().put_back(model, part)


def model_in(folder):
    """A tiny BERT of random weights under GLiNER's layers."""
    tokenizer = wordpiece(model_max_length=48)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=48, **SIZES)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = gliner.GLiNERConfig(model_name=str(folder), hidden_size=32, max_width=3, max_len=32, fine_tune=True)
    return gliner.GLiNER.from_config(config, backbone_from_pretrained=True)


def run(folder, model, **settings):
    args = training.TrainingArguments(
        str(folder),
        max_steps=60,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        others_lr=3e-3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Pruning(
        model=model,
        args=args,
        oto_config=OTOConfig(target_sparsity=0.5, min_neurons=4, round_to=4, pruning_periods=4, **settings),
        train_dataset=ROWS,
        data_collator=model._create_data_collator(),
        processing_class=model.data_processor.transformer_tokenizer,
    )
    trainer.train()
    trainer.save_model(str(folder / "small"))
    return trainer


def entities(model):
    found = model.inference([" ".join(words) for words in TEXTS[::7]], LABELS, threshold=0.3)
    return [[(one["text"], one["label"], round(one["score"], 4)) for one in row] for row in found]


@pytest.mark.parametrize("uniform", [False, True])
def test_gliner_is_pruned_while_it_is_fine_tuned(uniform, tmp_path):
    model = model_in(tmp_path / "encoder")
    settings = {"uniform": True, "structures": ("neurons",)} if uniform else {}
    trainer = run(tmp_path / "run", model, **settings)
    expected = entities(model.eval())
    assert any(expected)
    small = gliner.GLiNER.from_pretrained(str(tmp_path / "run" / "small"))
    assert entities(small) == expected
    encoder = trainer.pruned_part(small)
    assert counts(encoder) != counts(trainer.pruned_part(model)) == [(4, 24)] * 3
    assert type(encoder).__name__ == ("BertModel" if uniform else "OTOBertModel")
    if uniform:  # GLiNER reads it as any other
        assert counts(encoder) == [(4, 12)] * 3
        code = f"""if True:
            import sys
            sys.modules["hf_oto"] = None
            from gliner import GLiNER
            GLiNER.from_pretrained({str(tmp_path / "run" / "small")!r})
        """
        forking.run([sys.executable, "-c", code], check=True)
