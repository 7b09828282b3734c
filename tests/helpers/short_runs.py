"""Short runs of a tiny question-answering model with OTOTrainer."""

from dataclasses import replace

import torch
from families import ONE_EACH, question_batch, tiny_model
from transformers import TrainerCallback, TrainingArguments

from hf_oto import OTOConfig, OTOTrainer

CONFIG = OTOConfig(min_neurons=4, round_to=4)
SIZES = replace(CONFIG, target_sparsity=0.7, milestones=(0.3, 0.5), pruning_periods=2)
STEPS = 24  # warm-up 4, pruning 10, recovery 10
DATA = [
    {key: value[0] for key, value in question_batch(tiny_model(ONE_EACH[0]), seed, size=1).items()}
    for seed in range(40)
]


def arguments(folder, **options):
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "weight_decay": 0.01,
        "logging_steps": 4,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **defaults | options)


def make(folder, name=ONE_EACH[0], config=CONFIG, model=None, kind=OTOTrainer, extra=None, **options):
    model = tiny_model(name) if model is None else model
    settings = {"oto_config": config} if issubclass(kind, OTOTrainer) else {}
    return kind(
        model=model,
        args=arguments(folder, **options),
        train_dataset=DATA,
        eval_dataset=DATA[:8],
        **settings,
        **(extra or {}),
    )


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def same_weights(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
