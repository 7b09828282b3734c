"""Ordinary things that people do with a Trainer, each to its outcome.

That outcome is always the same: the target is reached, what is reported was measured, and the saved model is small,
loads by `from_pretrained` and says what the one in training says.
"""

import copy
import math

import pytest
import torch
import transformers
from families import batch, largest_difference, randomize, tiny_model, training_batch
from short_runs import DATA
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from hf_oto import OTOConfig, OTOTrainer, summarize

pytestmark = pytest.mark.usefixtures("without_pictures")

NAME = "BertForQuestionAnswering"
CONFIG = OTOConfig(min_neurons=4, round_to=4, pruning_periods=2)
STEPS = 8  # warm-up 1, pruning 4, recovery 3


def run(folder, callbacks=(), model=None, data=DATA, kind=OTOTrainer, extra=None, **options):
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    trainer = kind(
        model=tiny_model(NAME) if model is None else model,
        args=TrainingArguments(str(folder), **defaults | options),
        train_dataset=data,
        eval_dataset=data[:8],
        oto_config=CONFIG,
        callbacks=list(callbacks),
        **(extra or {}),
    )
    trainer.start = copy.deepcopy(trainer.model)
    trainer.train()
    trainer.save_model(str(folder / "small"))
    return trainer


@torch.no_grad()
def says(model):
    inputs = in_vocabulary(batch(model), model)
    return {
        key: value
        for key, value in model(**inputs).items()
        if torch.is_tensor(value) and value.dtype.is_floating_point
    }


def in_vocabulary(inputs, model):
    return {key: value % model.config.vocab_size if key == "input_ids" else value for key, value in inputs.items()}


def check(trainer, folder, tolerance=1e-5):
    """The outcome, measured on what is in the folder."""
    full = copy.deepcopy(trainer.start).eval()  # whose forward accelerate has not wrapped in autocast
    full.load_state_dict(trainer.model.state_dict())
    head = "For" + type(full).__name__.partition("For")[2]
    small = getattr(transformers, f"AutoModel{head}").from_pretrained(folder, dtype=torch.float32).eval()
    assert largest_difference(says(small), says(full)) <= tolerance
    dense, left = (sum(one.numel() for one in model.parameters()) for model in (trainer.start, small))
    summary, reported = summarize(small), trainer.hspg.metrics()
    prunable = summary.dense_prunable_parameters
    assert reported["removed_params"] == pytest.approx((dense - left) / prunable)
    assert summary.prunable_ratio == pytest.approx(1 - reported["removed_params"])
    assert trainer.hspg.target_reached and 0.4 < reported["removed_params"] <= 0.5
    finite = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(math.isfinite(loss) for loss in finite)
    return small


ARGUMENTS = {
    "as they are": {},
    "num_train_epochs": {"max_steps": -1, "num_train_epochs": 2},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 3},
    "per_device_train_batch_size": {"per_device_train_batch_size": 1},
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "learning_rate": {"learning_rate": 5e-5},
    "weight_decay": {"weight_decay": 0.1},
    "max_grad_norm": {"max_grad_norm": 0.1},
    "no max_grad_norm": {"max_grad_norm": 0.0},
    "adam_beta": {"adam_beta1": 0.8, "adam_beta2": 0.98, "adam_epsilon": 1e-6},
    "warmup_steps": {"warmup_steps": 3},
    "warmup_steps as a share": {"warmup_steps": 0.25},
    "cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 2},
    "cosine_with_restarts": {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}},
    "constant_with_warmup": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2},
    "polynomial": {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}},
    "inverse_sqrt": {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 2},
    "warmup_stable_decay": {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 1},
    "adamw_torch_fused": {"optim": "adamw_torch_fused"},
    "adafactor": {"optim": "adafactor"},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "rmsprop": {"optim": "rmsprop"},
    "adagrad": {"optim": "adagrad"},
    "bf16": {"bf16": True},
    "bf16_full_eval": {"bf16_full_eval": True, "eval_strategy": "steps", "eval_steps": 4},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "neftune_noise_alpha": {"neftune_noise_alpha": 5.0},
    "seed": {"seed": 7, "data_seed": 11},
    "dataloader_drop_last": {"dataloader_drop_last": True, "max_steps": -1, "num_train_epochs": 1},
    "dataloader_num_workers": {"dataloader_num_workers": 1},
    "group_by_length": {"train_sampling_strategy": "group_by_length"},
    "remove_unused_columns": {"remove_unused_columns": False},
    "label_names": {"label_names": ["start_positions", "end_positions"]},
    "label_smoothing_factor": {"label_smoothing_factor": 0.1},
    "logging_steps": {"logging_steps": 1, "logging_first_step": True, "logging_nan_inf_filter": False},
    "logging_strategy": {"logging_strategy": "epoch"},
    "disable_tqdm": {"disable_tqdm": False},
    "include_num_input_tokens_seen": {"include_num_input_tokens_seen": True},
    "skip_memory_metrics": {"skip_memory_metrics": False},
    "eval_strategy": {"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True, "eval_accumulation_steps": 1},
    "eval_strategy epoch": {"eval_strategy": "epoch", "eval_delay": 0.5, "prediction_loss_only": True},
    "batch_eval_metrics": {"eval_strategy": "steps", "eval_steps": 4, "eval_do_concat_batches": False},
    "save_strategy": {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 1},
    "save_strategy epoch": {"save_strategy": "epoch"},
    "save_only_model": {"save_strategy": "steps", "save_steps": 4, "save_only_model": True},
    "load_best_model_at_end": {
        **{"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2},
        **{"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_total_limit": 2},
    },
    "accelerator_config": {"accelerator_config": {"split_batches": True, "even_batches": True}},
    "torch_empty_cache_steps": {"torch_empty_cache_steps": 2},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_of_the_trainer(name, tmp_path):
    options = ARGUMENTS[name]
    trainer = run(tmp_path, **options)
    check(trainer, tmp_path / "small")
    assert trainer.state.global_step == trainer.state.max_steps == trainer.hspg.steps_done
    if options.get("save_strategy", "no") != "no":
        check(trainer, tmp_path)  # the end of training has saved it as well
        assert [path for path in tmp_path.iterdir() if path.name.startswith("checkpoint-")]
    if options.get("eval_strategy", "no") != "no":
        assert any("eval_loss" in entry for entry in trainer.state.log_history)


class Logging(TrainerCallback):
    """Keeps what is logged, as every tracker does."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_a_callback_that_logs_sees_the_run_shrink(tmp_path):
    logging = Logging()
    trainer = run(tmp_path, [logging], logging_steps=1)
    check(trainer, tmp_path / "small")
    steps = [logs for logs in logging.seen if "loss" in logs]
    assert len(steps) == STEPS and all(isinstance(value, int | float) for logs in steps for value in logs.values())
    removed = [logs["removed_params"] for logs in steps]
    assert removed[0] == 0 and removed == sorted(removed)
    assert removed[-1] == trainer.hspg.metrics()["removed_params"]


def test_early_stopping_waits_for_the_target(tmp_path):
    """Patience counts evaluations at the target only: none before it is taken for the best."""
    stopping = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=1e9)
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 12}
    trainer = run(
        tmp_path, [stopping], load_best_model_at_end=True, metric_for_best_model="loss", save_total_limit=2, **options
    )
    check(trainer, tmp_path / "small")
    assert trainer.hspg.schedule.boundaries[-1] < trainer.state.global_step < 12  # it has stopped


class Averaging(TrainerCallback):
    """An exponential average of the weights, which is what evaluations see and what is kept in a file of its own."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        weights = {key: value.detach().clone() for key, value in model.state_dict().items()}
        before = getattr(self, "average", weights)
        self.average = {
            key: before[key].lerp(value, 0.1) if value.is_floating_point() else value for key, value in weights.items()
        }

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        now = copy.deepcopy(model.state_dict())
        model.load_state_dict(self.average)
        model.load_state_dict(now)


def test_an_average_that_is_put_in_and_out_again_changes_nothing(tmp_path):
    averaging = Averaging()
    trainer = run(tmp_path / "one", [averaging], eval_strategy="steps", eval_steps=2)
    check(trainer, tmp_path / "one" / "small")
    plain = run(tmp_path / "two", eval_strategy="steps", eval_steps=2)
    for one, two in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, two)


# The published configs' own special ids, vocabularies, dropouts and tied weights; small in all other sizes.

_SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 24, "num_hidden_layers": 2}
_ROBERTA = _SIZES | {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "max_position_embeddings": 514}
_GROUPED = {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
_GROUPED |= {"intermediate_size": 24, "num_hidden_layers": 2, "tie_word_embeddings": True}
_SPEECH = _SIZES | {"vocab_size": 32, "conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 4)}
_SPEECH |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "ctc_loss_reduction": "mean"}
PUBLISHED = {
    "BertForMaskedLM": _SIZES | {"vocab_size": 30522, "pad_token_id": 0},
    "RobertaForMaskedLM": _ROBERTA | {"vocab_size": 50265, "type_vocab_size": 1},
    "XLMRobertaForMaskedLM": _ROBERTA | {"vocab_size": 250002, "type_vocab_size": 1},
    "ElectraForMaskedLM": _SIZES | {"vocab_size": 30522, "embedding_size": 16, "pad_token_id": 0},
    "DistilBertForMaskedLM": {"vocab_size": 30522, "dim": 32, "n_heads": 4, "hidden_dim": 24, "n_layers": 2},
    "CamembertForMaskedLM": _ROBERTA | {"vocab_size": 32005, "bos_token_id": 5, "eos_token_id": 6},
    "MPNetForMaskedLM": _ROBERTA | {"vocab_size": 30527},
    "EsmForMaskedLM": _SIZES
    | {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32, "max_position_embeddings": 1026}
    | {"position_embedding_type": "rotary", "token_dropout": True, "emb_layer_norm_before": False},
    "ModernBertForMaskedLM": _SIZES
    | {"vocab_size": 50368, "pad_token_id": 50283, "cls_token_id": 50281, "sep_token_id": 50282}
    | {"bos_token_id": 50281, "eos_token_id": 50282, "local_attention": 128, "global_attn_every_n_layers": 3},
    "DebertaV2ForMaskedLM": _SIZES
    | {"vocab_size": 128100, "type_vocab_size": 0, "relative_attention": True, "position_buckets": 256}
    | {"share_att_key": True, "norm_rel_ebd": "layer_norm", "pos_att_type": ["p2c", "c2p"]}
    | {"position_biased_input": False, "max_relative_positions": -1, "layer_norm_eps": 1e-7},
    "ViTForImageClassification": _SIZES | {"image_size": 16, "patch_size": 4, "num_labels": 10},
    "Wav2Vec2ForCTC": _SPEECH | {"mask_time_prob": 0.05, "layerdrop": 0.1},
    "HubertForCTC": _SPEECH | {"mask_time_prob": 0.05, "layerdrop": 0.1},
    "LlamaForCausalLM": _GROUPED | {"vocab_size": 128256, "bos_token_id": 128000, "eos_token_id": 128001},
    "Qwen3ForCausalLM": _GROUPED | {"vocab_size": 151936, "bos_token_id": 151643, "eos_token_id": 151645},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_from_training_to_loading(name, tmp_path):
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**PUBLISHED[name])).eval()
    randomize(model)
    rows = in_vocabulary(training_batch(model, size=8), model)
    data = [{key: value[row] for key, value in rows.items()} for row in range(8)]
    trainer = run(tmp_path, model=model, data=data, learning_rate=1e-4)
    small = check(trainer, tmp_path / "small")
    for field in ("pad_token_id", "bos_token_id", "eos_token_id", "vocab_size", "tie_word_embeddings"):
        assert getattr(small.config, field, None) == getattr(model.config, field, None)
    if getattr(model.config, "tie_word_embeddings", False) and small.get_output_embeddings() is not None:
        assert small.get_output_embeddings().weight is small.get_input_embeddings().weight


# What writes weights beside the optimizer cannot be cut: it is said, and nothing is written.


class Averaged(Averaging):
    """The average is what is kept, in the end."""

    def on_train_end(self, args, state, control, model=None, **kwargs):
        model.load_state_dict(self.average)


class Restoring(TrainerCallback):
    """Goes back to the weights of an earlier step in the end."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            self.kept = copy.deepcopy(model.state_dict())

    def on_train_end(self, args, state, control, model=None, **kwargs):
        model.load_state_dict(self.kept)


@pytest.mark.parametrize(
    "options",
    [{"callbacks": [Averaged()]}, {"callbacks": [Restoring()]}],
    ids=["average", "earlier weights"],
)
def test_zeros_that_are_overwritten_are_not_taken_for_a_small_model(options, tmp_path):
    with pytest.raises(ValueError, match="left, where .* were not pruned"):
        run(tmp_path, save_strategy="epoch", **options)
    assert not [*tmp_path.glob("*.safetensors"), *tmp_path.glob("small/*")]
