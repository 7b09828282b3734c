"""What holds of a model on any device: groups, cuts, shrinking, HSPG's steps, answers, tables of latencies.

Every test moves a model to the device, and compares with what the same gives on the CPU.
"""

import copy

import pytest
import torch
from families import EVERY, MODELS, ONE_EACH, OTHERS, batch, counts, squares, tiny_model, training_batch, zero_uneven
from squad_data import byte_bpe, make_questions, wordpiece
from waiting import waits

from hf_oto import HSPG, OTOConfig, QuestionAnswerer, compress, measure_latency, partition, shrink, summarize
from hf_oto.config import LatencyTable
from hf_oto.deploy import benchmark, latency_tables, timing
from hf_oto.deploy.benchmark import measure
from hf_oto.deploy.timing import device_name
from hf_oto.models import surgery

STEPS = 9  # warm-up 1, pruning 4, recovery 4
CONFIG = OTOConfig(min_neurons=4, round_to=4, pruning_periods=2)
# By the first, which is the default, groups are chosen in the runs that shrink.
MANNERS = {
    **{kind: {"saliency": kind} for kind in ("taylor", "magnitude", "random")},
    "published": {"target_sparsity": None, "lmbda": 300.0, "epsilon": 0.9},
}
ANSWERING = [names[-1] for names in MODELS.values() if names[-1].endswith("ForQuestionAnswering")]
READING = [name for name in EVERY if name not in ("ViTForImageClassification", "Wav2Vec2ForCTC", "HubertForCTC")]


def to(device, inputs):
    return {name: tensor.to(device) for name, tensor in inputs.items()}


@torch.no_grad()
def outputs(model):
    found = model(**to(model.device, batch(model)))
    return {name: value.cpu() for name, value in found.items() if isinstance(value, torch.Tensor)}


def assert_same_outputs(model, other, tolerance=1e-4, padding=True):
    """
    What a token of padding gives is compared in one precision only: where a window of attention has nothing but
    padding, it is an average over what the kernel at hand does not leave out.
    """
    expected, actual = outputs(other), outputs(model)
    mask = batch(model).get("attention_mask")
    for name, value in expected.items():
        if value.is_floating_point():
            found = actual[name]
            if not padding and mask is not None and value.shape[: mask.dim()] == mask.shape:
                value, found = value[mask.bool()], found[mask.bool()]
            torch.testing.assert_close(found, value, rtol=0, atol=tolerance * float(value.abs().max()))


def gradients(model, seed):
    found = model(**to(model.device, training_batch(model, seed)))
    (found.loss if found.get("loss") is not None else squares(found)).backward()


def trained(model, device, shrinks=False, steps=STEPS, **settings):
    """A model after the first steps of a run, its optimizer, and which groups were zero after every step."""
    config = OTOConfig(**{**CONFIG.to_dict(), **settings})
    model = model.to(device).eval()  # without dropout
    model.zero_grad()
    optimizer = HSPG(torch.optim.AdamW(model.named_parameters(), lr=1e-3), partition(model), config, STEPS)
    masks = []
    for step in range(steps):
        gradients(model, step)
        optimizer.step()
        optimizer.zero_grad()
        masks.append({place: mask.tolist() for place, mask in optimizer.zero_masks().items()})
        if shrinks and optimizer.shrink_due:
            shrink(model, optimizer)
    return model, optimizer, masks


@pytest.mark.parametrize("name", EVERY)
def test_a_cut_model_stays_where_it_was_and_loads_anywhere(name, device, tmp_path):
    model = tiny_model(name)
    kept = zero_uneven(model)
    there = copy.deepcopy(model).to(device)
    assert partition(there) == partition(model) and summarize(there) == summarize(model)
    small = compress(there)
    assert {parameter.device for parameter in small.parameters()} == {device} and counts(small) == kept
    assert {buffer.device for buffer in small.buffers()} <= {device}
    assert_same_outputs(there, model)
    assert_same_outputs(small, model)
    small.save_pretrained(tmp_path)
    loaded = type(small).from_pretrained(tmp_path)
    assert_same_outputs(loaded, small)
    assert_same_outputs(loaded.to(device), small)
    again = compress(small)  # one that is cut already
    assert_same_outputs(again, small)


@pytest.mark.parametrize("name", EVERY)
def test_a_wrong_cut_is_refused(name, device, monkeypatch):
    """By float64, wherever that is."""
    monkeypatch.setattr(
        surgery, "zero_groups", lambda array, parameters: torch.arange(array.count, device=device) == 1
    )
    with pytest.raises(ValueError, match="does not compute what `model` computes"):
        compress(tiny_model(name).to(device))


@pytest.mark.parametrize("name", ONE_EACH + OTHERS)
def test_a_run_that_shrinks_goes_as_on_the_cpu(name, device):
    models = [tiny_model(name, num_hidden_layers=2) for _ in range(2)]
    places = zip(models, ("cpu", device), strict=True)
    (one, here, chosen), (other, there, others) = (trained(*each, shrinks=True, steps=STEPS - 2) for each in places)
    assert others == chosen and any(any(mask) for mask in chosen[2].values())
    assert there.metrics() == here.metrics() and there.target_reached and counts(other) == counts(one)
    assert {value.device for entry in there.state.values() for value in entry.values() if value.dim()} == {device}
    assert_same_outputs(compress(other.eval()), one.eval(), tolerance=0.05)


@pytest.mark.parametrize("manner", MANNERS)
def test_groups_are_chosen_as_on_the_cpu(manner, device):
    for name in ONE_EACH + OTHERS:
        models = [tiny_model(name, num_hidden_layers=2) for _ in range(2)]
        places = zip(models, ("cpu", device), strict=True)
        here, there = (trained(model, place, steps=3, **MANNERS[manner])[1:] for model, place in places)
        assert there[1] == here[1] and there[0].metrics() == here[0].metrics(), name
        assert any(any(mask) for mask in there[1][-1].values()), name  # the first period is over


@pytest.mark.parametrize("name", ANSWERING)
def test_answers_are_those_of_the_cpu(name, device):
    tokenizer = byte_bpe(trim_offsets=False) if "oberta" in name else wordpiece()
    model = tiny_model(name, vocab_size=len(tokenizer), max_position_embeddings=64, num_hidden_layers=2)
    [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1].weight.data *= 10
    made = make_questions(3, seed=5)
    asked = [question["question"] for _, question in made], [context for context, _ in made]
    options = {"max_seq_length": 40, "doc_stride": 12, "max_answer_length": 6}
    expected = QuestionAnswerer(model, tokenizer, **options).answer(*asked, handle_impossible_answer=True)
    found = QuestionAnswerer(copy.deepcopy(model).to(device), tokenizer, **options).answer(
        *asked, handle_impossible_answer=True
    )
    for (one,), (other,) in zip(found, expected, strict=True):
        assert (one.start, one.end) == (other.start, other.end) and one.score == pytest.approx(other.score, rel=1e-3)


METHODS = {"cpu": "clock", "cuda": "CUDA graph"}


@pytest.fixture
def waited(monkeypatch):
    """What the host waits for inside of what is timed, its end apart: meanwhile it has to get ahead of the device."""
    found = []

    class Watched(timing.Timer):
        def __call__(self):
            with waits(self._device) as noted:
                taken = super().__call__()
            found.extend(one for one in noted if one != "synchronize")
            return taken

    for module in (benchmark, latency_tables):
        monkeypatch.setattr(module, "Timer", Watched)
    monkeypatch.setattr(timing, "_IN_A_ROW", 2)
    return found


@pytest.mark.parametrize("name", EVERY[:1])
def test_two_models_are_timed_where_they_are(name, device, waited):
    models = [tiny_model(name, intermediate_size=width).to(device) for width in (24, 8)]
    (found,) = measure(*models, sequence_lengths=(8,), repeats=2, warmup=1)
    assert found.method == METHODS.get(device.type, "device events") and found.device == device_name(device)
    assert found.dense.median > 0 and found.pruned.median > 0 and found.macs_ratio > 1 and waited == []
    if device.type != "cpu":
        with pytest.raises(ValueError, match="of ONNX are timed on the CPU, got models on"):
            measure(*models, backends=("onnx",), sequence_lengths=(8,))


@pytest.mark.parametrize("name", READING)
def test_latencies_are_measured_where_the_model_is(name, device, waited):
    model = tiny_model(name, num_hidden_layers=1).to(device)
    table = measure_latency(model, sequence_length=8, repeats=1, warmup=1)
    assert table.device == device_name(device) and table.total > table.num_layers * table.neurons[-1][1] > 0
    with waits(device) as own, torch.no_grad():
        model(torch.ones(1, 8, dtype=torch.int64, device=device))
    # Some releases of Transformers make MPNet's positions on the CPU, in every forward.
    waits_itself = name.startswith("MPNet") and own != []
    assert table.method == ("device events" if waits_itself else METHODS.get(device.type, "device events"))
    assert waited == [] or waits_itself
    assert LatencyTable.from_dict(table.to_dict()) == table
