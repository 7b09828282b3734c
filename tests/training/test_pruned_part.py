"""Models of one's own around an encoder: what is trained, what is pruned, what is saved and how it loads again."""

import os
import sys

import forking
import pytest
import torch
from families import ONE_EACH, counts, tiny_model
from safetensors.torch import load_file
from short_runs import CONFIG, DATA, StopAt, make, same_weights
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    BertConfig,
    BertModel,
    BertPreTrainedModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_oto import OTOConfig, OTOTrainer
from hf_oto.training.pruned_part import find_part

SAVING = {"save_strategy": "steps", "save_steps": 6}
DENSE = [(4, 24)] * 3


def bert():
    return tiny_model(ONE_EACH[0]).bert


class Spans(nn.Module):
    """A module of one's own: an encoder, and a head that the table of families does not know."""

    def __init__(self, encoder):
        super().__init__()
        self.body = nn.ModuleDict({"encoder": encoder})
        self.head = nn.Linear(32, 2)

    def forward(self, input_ids, attention_mask, start_positions=None, end_positions=None):
        states = self.body["encoder"](input_ids, attention_mask).last_hidden_state
        starts, ends = self.head(states).unbind(-1)
        output = {"start_logits": starts, "end_logits": ends}
        if start_positions is None:
            return output
        loss = nn.functional.cross_entropy(starts, start_positions) + nn.functional.cross_entropy(ends, end_positions)
        return {"loss": loss, **output}


class Derived(BertPreTrainedModel):
    """As a model of one's own is most often written: the config is the encoder's."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(self, input_ids, attention_mask, start_positions=None, end_positions=None):
        return Spans.forward(self, input_ids, attention_mask, start_positions, end_positions)

    @property
    def body(self):
        return {"encoder": self.bert}


class OwnConfig(PreTrainedConfig):
    model_type = "spans-of-my-own"
    sub_configs = {"encoder_config": BertConfig}

    def __init__(self, encoder_config=None, **kwargs):
        if isinstance(encoder_config, dict):
            from transformers import AutoConfig

            encoder_config = AutoConfig.for_model(**encoder_config)
        self.encoder_config = encoder_config
        super().__init__(**kwargs)


class Own(PreTrainedModel):
    """With a config of its own, from which the encoder is built by the Auto class."""

    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.encoder = AutoModel.from_config(config.encoder_config, add_pooling_layer=False)
        self.head = nn.Linear(config.encoder_config.hidden_size, 2)
        self.post_init()

    def forward(self, input_ids, attention_mask, start_positions=None, end_positions=None):
        return Spans.forward(self, input_ids, attention_mask, start_positions, end_positions)

    @property
    def body(self):
        return {"encoder": self.encoder}


def made(kind):
    torch.manual_seed(0)
    config = tiny_model(ONE_EACH[0]).config
    return Spans(bert()) if kind is Spans else kind(config) if kind is Derived else Own(OwnConfig(config))


@torch.no_grad()
def answers(model):
    batch = {name: torch.stack([row[name] for row in DATA[:6]]) for name in ("input_ids", "attention_mask")}
    return torch.stack([model.eval()(**batch)[name] for name in ("start_logits", "end_logits")])


PATHS = {Spans: "body.encoder", Derived: "bert", Own: "encoder"}


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("shrinks", [False, True])
def test_a_model_around_an_encoder(kind, shrinks, tmp_path):
    config = OTOConfig(min_neurons=4, round_to=4, shrink_during_training=shrinks)
    trainer = make(tmp_path / "run", model=made(kind), config=config, **SAVING)
    head = trainer.model.head.weight.detach().clone()
    trainer.train()
    encoder = trainer.pruned_part(trainer.model)
    assert trainer.hspg.target_reached and (counts(encoder) == DENSE) != shrinks
    assert not torch.equal(head, trainer.model.head.weight)
    expected = answers(trainer.model)
    assert trainer.pruned_part(trainer.model) is encoder  # the large one is back

    small = AutoModel.from_pretrained(tmp_path / "run" / PATHS[kind], add_pooling_layer=False)
    assert 0.44 < 1 - sum(h * 1048 + n * 65 for h, n in counts(small)) / (3 * 5752) <= 0.5
    model = made(kind)
    # The two lines.
    model.set_submodule(PATHS[kind], small)
    model.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))
    assert (answers(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    if kind is Own:  # its config knows the small encoder
        assert (answers(Own.from_pretrained(tmp_path / "run")) - expected).abs().max() <= 1e-5 * expected.abs().max()

    for stop in (6, 18):  # of a checkpoint before and after the model got smaller
        resumed = make(tmp_path / f"resumed-{stop}", model=made(kind), config=config, save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{stop}"))
        assert same_weights(resumed.model, trainer.model)


STRANGER = """
import sys
sys.modules["hf_oto"] = None
import torch
code, out = sys.argv[1:]
exec(code)
ids = torch.arange(5, 13)[None]
torch.save(part.eval()(ids).last_hidden_state.detach(), out)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", PATHS)
def test_a_card_tells_to_load_the_encoder_from_beside_the_model_around_it(kind, tmp_path):
    trainer = make(tmp_path / "run", model=made(kind), **SAVING)
    trainer.train()
    trainer.create_model_card()  # which a module without a config has to get as well
    encoder = trainer.pruned_part(trainer.model)
    assert hasattr(trainer.model, "config") == (kind is not Spans)
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    code = card.partition("## How to load it")[2].split("```")[1].removeprefix("python\n")
    assert f"`{PATHS[kind]}` in a {kind.__name__}, all of whose weights" in code
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_HOME"] = str(tmp_path / "home")
    command = [sys.executable, "-c", STRANGER, code, str(tmp_path / "states.pt")]
    done = forking.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    with torch.no_grad():
        expected = encoder.eval()(torch.arange(5, 13)[None]).last_hidden_state
    found = torch.load(tmp_path / "states.pt", weights_only=True)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.question, self.paragraph = bert(), bert()


def test_several_encoders_are_refused_by_name_and_one_may_be_chosen(tmp_path):
    with pytest.raises(
        ValueError, match=r"2 Transformers models .*: 'question' \(BertModel\), 'paragraph' \(BertModel\)"
    ):
        make(tmp_path / "run", model=Towers())
    assert list(tmp_path.iterdir()) == []

    class Chooses(OTOTrainer):
        def pruned_part(self, model):
            return model.paragraph

    class Both(Towers):
        def forward(self, input_ids, attention_mask, start_positions=None, end_positions=None):
            question, paragraph = (
                encoder(input_ids, attention_mask).last_hidden_state[:, 0]
                for encoder in (self.question, self.paragraph)
            )
            return {"loss": (question - paragraph).square().mean()}

    trainer = make(tmp_path, model=Both(), kind=Chooses, **SAVING)
    trainer.train()
    assert AutoModel.from_pretrained(tmp_path / "paragraph").config.model_type == "oto_bert"
    assert trainer.hspg.target_reached and not (tmp_path / "question").exists()


def test_one_encoder_in_two_places_is_one():
    towers = Towers()
    towers.paragraph = towers.question
    assert find_part(towers) is towers.question


def test_what_is_no_part_to_prune_is_refused(tmp_path):
    model = tiny_model(ONE_EACH[0])
    with pytest.raises(ValueError, match="got one that `torch.compile` returned. Pass the model itself"):
        make(tmp_path / "run", model=torch.compile(model, backend="eager"))
    with pytest.raises(ValueError, match="`model` must be a Transformers model that is not wrapped, got Linear"):
        make(tmp_path / "run", model=nn.Linear(2, 2))
    model.peft_config = {"default": object()}
    with pytest.raises(ValueError, match="`model` has adapters of peft"):
        make(tmp_path / "run", model=model)
    assert list(tmp_path.iterdir()) == []


def test_a_head_of_transformers_own_is_pruned_as_a_whole(tmp_path):
    trainer = make(tmp_path, extra={"callbacks": [StopAt(1)]}, config=CONFIG)
    assert trainer.pruned_part(trainer.model) is trainer.model
    assert trainer.put_back(trainer.model, other := tiny_model(ONE_EACH[0])) is other
    assert isinstance(trainer.model, AutoModelForQuestionAnswering._model_mapping[BertConfig])


class Mirrored(Spans):
    """Reads the encoder's first layer of neurons back: one weight in two places."""

    def __init__(self, encoder):
        super().__init__(encoder)
        self.back = nn.Linear(32, 24)
        self.back.weight = encoder.encoder.layer[0].intermediate.dense.weight


def test_a_weight_that_is_used_outside_of_the_part_as_well_stays_one(tmp_path, caplog):
    config = OTOConfig(min_neurons=4, round_to=4, shrink_during_training=True)
    trainer = make(tmp_path, model=Mirrored(bert()), config=config)
    trainer.train()
    assert "'back.weight' shares its weights" in caplog.text
    encoder = trainer.pruned_part(trainer.model)
    assert counts(encoder) == DENSE and trainer.hspg.target_reached
    assert trainer.model.back.weight is encoder.encoder.layer[0].intermediate.dense.weight
