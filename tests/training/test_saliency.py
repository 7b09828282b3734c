"""What remainders do to the saliency: an epoch that ends on fewer micro-batches, a last batch of few rows."""

import pytest
import torch
from families import ONE_EACH, question_batch, tiny_model
from short_runs import arguments

from hf_oto import OTOConfig, OTOTrainer
from hf_oto.hspg import saliency

ROWS = [
    {key: value[0] for key, value in question_batch(tiny_model(ONE_EACH[0]), seed, size=1).items()}
    for seed in range(200)
]


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (8 * 4 * 3 + 4, {"gradient_accumulation_steps": 8, "per_device_train_batch_size": 4}),  # one of eight
        (16 * 6 + 1, {"per_device_train_batch_size": 16}),  # a last batch of one row
        (
            4 * 4 * 6 + 1,
            {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 4},
        ),  # one of one row
    ],
)
def test_an_epochs_last_step_counts_as_the_others_do(rows, options, tmp_path, monkeypatch):
    said = []

    def update(saliency_G, observed_G, decay):
        said.append(float(observed_G.double().mean()))
        real(saliency_G, observed_G, decay)

    real = saliency.update_saliency
    monkeypatch.setattr("hf_oto.hspg.optimizer.update_saliency", update)
    model = tiny_model(ONE_EACH[0], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    size = options.get("gradient_accumulation_steps", 1) * options["per_device_train_batch_size"]
    epoch = -(-rows // size)
    trainer = OTOTrainer(
        model=model,
        args=arguments(tmp_path, num_train_epochs=8, max_steps=-1, learning_rate=0.0, save_strategy="no", **options),
        oto_config=OTOConfig(
            min_neurons=4, round_to=4, pruning_start_ratio=0.9, pruning_end_ratio=0.98, pruning_periods=1
        ),
        train_dataset=ROWS[:rows],
    )
    trainer.train()
    last = [value for step, value in enumerate(said) if (step + 1) % epoch == 0]
    others = [value for step, value in enumerate(said) if (step + 1) % epoch]
    assert len(last) >= 6 and len(others) >= 18
    ratio = torch.tensor(last).mean() / torch.tensor(others).mean()
    assert 0.2 < float(ratio) < 3, (last, others)
