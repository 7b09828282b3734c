"""Ways in which other people train, by methods, callbacks and loops of their own: each with what comes of it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from families import ONE_EACH, counts, largest_difference, outputs, tiny_model
from short_runs import CONFIG, DATA, STEPS, make
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    TrainerCallback,
    default_data_collator,
    get_polynomial_decay_schedule_with_warmup,
)

from hf_oto import HSPG, OTOTrainer, compress, partition, shrink

SAVING = {"save_strategy": "steps", "save_steps": 8}


def small(folder):
    return AutoModelForQuestionAnswering.from_pretrained(folder)


def check(trainer, folder):
    """The saved model is as small as it was asked for, and says what the one in training says."""
    loaded = small(folder)
    left = sum(heads * 1048 + neurons * 65 for heads, neurons in counts(loaded)) / (3 * 5752)
    assert trainer.hspg.metrics()["removed_params"] == pytest.approx(1 - left) and 0.5 <= left < 0.56
    assert largest_difference(outputs(loaded), outputs(compress(trainer.model).eval())) <= 1e-5
    assert trainer.state.global_step == STEPS


# Optimizers and learning rates.


def layerwise(model, rate=3e-3, decay=0.5):
    """A smaller rate for each block below the last, as in ULMFiT."""
    groups = []
    for name, parameter in model.named_parameters():
        layer = int(name.split(".layer.")[1][0]) if ".layer." in name else (-1 if "embeddings" in name else 3)
        decayed = 0.0 if "bias" in name else 0.01
        groups.append({"params": [parameter], "lr": rate * decay ** (3 - layer), "weight_decay": decayed})
    return groups


class Rates(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, optimizer, **kwargs):
        self.seen.append([group["lr"] for group in optimizer.param_groups])


def test_a_rate_for_each_layer_and_a_schedule_of_ones_own(tmp_path):
    model, rates = tiny_model(ONE_EACH[0]), Rates()
    optimizer = torch.optim.AdamW(layerwise(model))
    schedule = LambdaLR(optimizer, lambda step: 0.9**step)
    extra = {"optimizers": (optimizer, schedule), "callbacks": [rates]}
    trainer = make(tmp_path, model=model, extra=extra, **SAVING)
    trainer.train()
    check(trainer, tmp_path)
    first = [group["lr"] for group in layerwise(model)]
    assert rates.seen == [pytest.approx([rate * 0.9**step for rate in first]) for step in range(STEPS)]


def test_the_class_of_an_optimizer_and_its_arguments(tmp_path):
    extra = {"optimizer_cls_and_kwargs": (torch.optim.NAdam, {"lr": 2e-3, "betas": (0.8, 0.9)})}
    trainer = make(tmp_path, extra=extra, **SAVING)
    trainer.train()
    check(trainer, tmp_path)
    assert type(trainer.hspg.base_optimizer) is torch.optim.NAdam
    assert trainer.hspg.param_groups[0]["betas"] == (0.8, 0.9)


class OwnScheduler(OTOTrainer):
    def create_scheduler(self, num_training_steps, optimizer=None):
        optimizer = optimizer or self.optimizer
        self.lr_scheduler = get_polynomial_decay_schedule_with_warmup(optimizer, 4, num_training_steps, lr_end=1e-4)
        return self.lr_scheduler


def test_an_own_create_scheduler(tmp_path):
    rates = Rates()
    trainer = make(tmp_path, kind=OwnScheduler, extra={"callbacks": [rates]}, **SAVING)
    trainer.train()
    check(trainer, tmp_path)
    peak, end = 3e-3, 1e-4
    falling = [(peak - end) * (1 - step / (STEPS - 4)) + end for step in range(STEPS - 4)]
    assert [rate for rate, *_ in rates.seen] == pytest.approx([peak * step / 4 for step in range(4)] + falling)


# Batches, losses and gradients.


class OwnBatches(OTOTrainer):
    """The rows in their order, in batches of two."""

    def get_train_dataloader(self):
        return self.accelerator.prepare(DataLoader(self.train_dataset, batch_size=2, collate_fn=default_data_collator))

    def compute_loss(self, model, inputs, *args, **kwargs):
        vars(self).setdefault("seen", []).append(inputs["start_positions"].tolist())
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_an_own_dataloader(tmp_path):
    trainer = make(tmp_path, kind=OwnBatches, **SAVING)
    trainer.train()
    check(trainer, tmp_path)
    starts = [int(row["start_positions"]) for row in DATA]
    assert trainer.seen == [starts[2 * step % 40 : 2 * step % 40 + 2] for step in range(STEPS)]


class TwoPasses(OTOTrainer):
    """R-Drop (Liang et al., 2021): two passes with other dropout, which have to agree."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        first, second = model(**inputs), model(**inputs)
        mine, other = (torch.cat([one.start_logits, one.end_logits]).log_softmax(-1) for one in (first, second))
        apart = sum(F.kl_div(*pair, reduction="batchmean", log_target=True) for pair in ((mine, other), (other, mine)))
        vars(self).setdefault("apart", []).append(float(apart.detach()))
        loss = (first.loss + second.loss) / 2 + apart
        return (loss, first) if return_outputs else loss


def test_a_loss_of_two_passes(tmp_path):
    trainer = make(tmp_path, kind=TwoPasses, **SAVING)
    trainer.train()
    check(trainer, tmp_path)
    assert all(apart > 1e-6 for apart in trainer.apart[:4])  # in the warm-up, where there is dropout


class Adversarial(OTOTrainer):
    """FGM (Miyato et al., 2017): the gradients of a second batch, with the embeddings moved against the model."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, dict(inputs), num_items_in_batch)
        table = model.get_input_embeddings().weight
        moved = table.grad / table.grad.norm()
        table.data.add_(moved)
        attacked = super().training_step(model, inputs, num_items_in_batch)
        vars(self).setdefault("harder", []).append(float(attacked - loss))
        table.data.sub_(moved)
        return loss


def test_adversarial_training(tmp_path):
    trainer = make(tmp_path, kind=Adversarial, **SAVING)
    trainer.train()
    check(trainer, tmp_path)
    assert len(trainer.harder) == STEPS and sum(trainer.harder) > 0


class Noisy(OTOTrainer):
    """Noise on the gradients (Neelakantan et al., 2015), also of what is zero."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        generator = torch.Generator().manual_seed(self.state.global_step)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.add_(torch.randn(parameter.shape, generator=generator), alpha=1e-3)
        return loss


def test_noise_on_the_gradients(tmp_path):
    trainer = make(tmp_path, kind=Noisy, **SAVING)
    trainer.train()
    check(trainer, tmp_path)


def focal(outputs, labels, num_items_in_batch=None):
    """Lin et al. (2017): what is sure already counts less."""
    loss = F.cross_entropy(outputs.logits, labels, reduction="none")
    return ((1 - (-loss).exp()) ** 2 * loss).mean()


def test_a_focal_loss(tmp_path):
    model = tiny_model("BertForSequenceClassification", num_labels=3)
    data = [{**row, "labels": int(row["start_positions"]) % 3} for row in DATA]
    kept = ("input_ids", "attention_mask", "labels")
    trainer = make(tmp_path, model=model, extra={"compute_loss_func": focal}, **SAVING)
    trainer.train_dataset = [{name: row[name] for name in kept} for row in data]
    trainer.train()
    assert trainer.hspg.target_reached
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert largest_difference(outputs(loaded), outputs(compress(trainer.model).eval())) <= 1e-5
    assert trainer.state.log_history[0]["loss"] < 1.0  # (1 - 1/3)^2 of what the entropy of three classes is


# Callbacks.


class Swa(TrainerCallback):
    """Stochastic weight averaging (Izmailov et al., 2018) over the end of the run, copied in when it is over."""

    def __init__(self, start):
        self.start, self.seen = start, []

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step > self.start:
            self.seen.append(copy.deepcopy(model.state_dict()))

    def on_train_end(self, args, state, control, model, **kwargs):
        model.load_state_dict({name: sum(one[name] for one in self.seen) / len(self.seen) for name in self.seen[0]})


def test_an_average_over_what_comes_after_the_target_is_as_small(tmp_path):
    swa = Swa(start=14)
    trainer = make(tmp_path, extra={"callbacks": [swa]}, **SAVING)
    trainer.train()
    check(trainer, tmp_path)
    weight = "qa_outputs.weight"
    assert len(swa.seen) == 10
    assert torch.allclose(small(tmp_path).state_dict()[weight], sum(one[weight] for one in swa.seen) / 10)


class Unfreezing(TrainerCallback):
    """The embeddings are frozen for the first half."""

    def on_step_begin(self, args, state, control, model, **kwargs):
        model.get_input_embeddings().requires_grad_(state.global_step >= STEPS // 2)
        if state.global_step == STEPS // 2:
            self.before = model.get_input_embeddings().weight.detach().clone()


def test_embeddings_that_thaw(tmp_path):
    unfreezing = Unfreezing()
    start = tiny_model(ONE_EACH[0]).get_input_embeddings().weight
    trainer = make(tmp_path, extra={"callbacks": [unfreezing]}, weight_decay=0.0, **SAVING)
    trainer.train()
    check(trainer, tmp_path)
    assert torch.equal(unfreezing.before, start)
    assert not torch.equal(small(tmp_path).get_input_embeddings().weight, start)


class Stopping(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


@pytest.mark.parametrize("step", [9, 18])
def test_a_callback_that_stops_the_run(step, tmp_path):
    trainer = make(tmp_path, extra={"callbacks": [Stopping(step)]}, **SAVING)
    trainer.train()
    assert trainer.state.global_step == step
    if step == 9:  # before the target: what is there can be gone on with, and is not taken for a result
        assert not (tmp_path / "model.safetensors").exists()
        trainer = make(tmp_path, **SAVING)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
        check(trainer, tmp_path)
    else:
        assert counts(small(tmp_path)) == counts(compress(trainer.model))
        assert trainer.hspg.target_reached


# A loop of one's own.


@pytest.mark.parametrize("shrinks", [False, True])
def test_a_loop_with_accelerate(shrinks, tmp_path):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = tiny_model(ONE_EACH[0]).train()
    optimizer = HSPG(torch.optim.AdamW(model.named_parameters(), lr=3e-3), partition(model), CONFIG, STEPS)
    loader = DataLoader(DATA, batch_size=2, collate_fn=default_data_collator)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    hspg = optimizer.optimizer
    while hspg.steps_done < STEPS:
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if shrinks and accelerator.sync_gradients and hspg.shrink_due:
                shrink(accelerator.unwrap_model(model), hspg)
            if hspg.steps_done == STEPS:
                break
    trained = accelerator.unwrap_model(model)
    assert hspg.target_reached and schedule.get_last_lr() == [0.0]
    compress(trained).save_pretrained(tmp_path)
    left = sum(heads * 1048 + neurons * 65 for heads, neurons in counts(small(tmp_path))) / (3 * 5752)
    assert hspg.metrics()["removed_params"] == pytest.approx(1 - left) and 0.5 <= left < 0.56
    assert (counts(trained) == counts(small(tmp_path))) == shrinks
