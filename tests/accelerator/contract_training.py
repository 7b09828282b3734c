"""What holds of a training with OTOTrainer on any device, in the precision that `HF_OTO_TEST_PRECISION` names.

Every family trains, shrinks, learns from a teacher, saves, resumes, loads and gets its card.
"""

import copy
import json
import os

import pytest
import torch
from contract_models import assert_same_outputs
from families import ONE_EACH, OTHERS, counts, squares, tiny_model, training_batch
from transformers import TrainingArguments

from hf_oto import OTOConfig, OTOTrainer
from hf_oto.training import showing

PRECISION = os.environ.get("HF_OTO_TEST_PRECISION", "float32")
COMPILED = os.environ.get("HF_OTO_TEST_COMPILE") == "1"
STEPS = 24 if PRECISION == "float16" else 9  # a scaler leaves out the first steps, until it has found its scale
CONFIG = OTOConfig(min_neurons=4, round_to=4, pruning_periods=2, keep_dropout=False)
TRAINED = ONE_EACH + OTHERS
NO_LOGITS = "BertGenerationEncoder"  # which a teacher could teach


def make(folder, name, device, teacher=None, saves=True, **settings):
    model = tiny_model(name, num_hidden_layers=2)
    rows = training_batch(model, size=16)
    half = {"bfloat16": {"bf16": True}, "float16": {"fp16": True}}.get(PRECISION, {})
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=3,
        save_strategy="steps" if saves else "no",
        save_steps=STEPS // 2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        torch_compile=COMPILED,
        **half,
    )
    trainer = OTOTrainer(
        model=model,
        args=arguments,
        train_dataset=[{key: value[row] for key, value in rows.items()} for row in range(16)],
        compute_loss_func=None if {"labels", "start_positions"} & rows.keys() else squares,
        oto_config=OTOConfig(**{**CONFIG.to_dict(), **settings}),
        teacher_model=teacher,
    )
    assert trainer.args.device.type == device.type
    return trainer


def assert_same_weights(model, other, device):
    """To the bit where nothing is added up in another order from one run to the next, as on a GPU."""
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        if device.type == "cuda":
            torch.testing.assert_close(one, two, rtol=0, atol=1e-2 * float(two.abs().max()))
        else:
            assert torch.equal(one, two)


@pytest.mark.parametrize("shrinks", [False, True], ids=["full", "shrunk"])
@pytest.mark.parametrize("name", TRAINED)
def test_a_run_saves_what_it_trained_and_resumes(name, shrinks, device, tmp_path, monkeypatch):
    teacher = tiny_model(name, seed=5, num_hidden_layers=2) if shrinks and name != NO_LOGITS else None
    trainer = make(tmp_path / "run", name, device, copy.deepcopy(teacher), shrink_during_training=shrinks)
    pictured = shrinks and name in (ONE_EACH[0], ONE_EACH[-1])
    if not pictured:  # drawing takes longer than training, and is of numbers alone
        monkeypatch.setattr(showing, "figures", lambda *_: {})
    computed = set()
    if teacher is not None:
        heads = [module for module in trainer.teacher_model.modules() if isinstance(module, torch.nn.Linear)]
        heads[-1].register_forward_hook(lambda module, inputs, output: computed.add(output.dtype))
    trainer.train()
    assert computed == (set() if teacher is None else {getattr(torch, PRECISION)})  # as the model in training
    model, hspg = trainer.model, trainer.hspg
    assert {parameter.device for parameter in model.parameters()} == {device} and hspg.target_reached
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert (trainer.teacher_model is None) == (teacher is None)

    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["model_type"].startswith("oto_")
    small = trainer.compressed_model().eval()
    # Under half precision accelerate computes in it for good, and what is cut out is float32 again. Where it compiles,
    # Trainer lets a GPU multiply in TF32.
    precise = PRECISION == "float32"
    tolerance = (5e-3 if COMPILED else 1e-4) if precise else 0.05
    assert_same_outputs(small, model.eval(), tolerance, padding=precise)
    loaded = type(small).from_pretrained(tmp_path / "run")
    assert_same_outputs(loaded, small)
    assert counts(loaded) == counts(small)

    if shrinks:
        trainer.create_model_card()
        assert "from_pretrained" in (tmp_path / "run" / "README.md").read_text()
        pictures = {path.name for path in (tmp_path / "run").glob("*.png")}
        assert pictures == ({"layers.png", "run.png"} if pictured else set())

    if PRECISION == "float16":  # where a scaler begins anew, it leaves out other steps
        return
    checkpoint = tmp_path / "run" / f"checkpoint-{STEPS // 2}"
    again = make(tmp_path / "again", name, device, teacher, shrink_during_training=shrinks, saves=False)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert counts(again.model) == counts(model)
    assert_same_weights(again.model, model, device)
