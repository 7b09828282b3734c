"""Context managers that several rooms share."""

import pytest
import torch
from families import EVERY, attentions, batch, family_of, tiny_config, tiny_model
from torch import Tensor

from hf_oto.models.modes import dropping_modules, evaluating
from hf_oto.models.surgery import compress


def test_each_module_is_in_its_own_mode_again():
    """Also one that its user had set to evaluation mode, and after an error."""
    model = tiny_model("BertForQuestionAnswering").train()
    frozen = model.bert.encoder.layer[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not frozen.training and model.training


def same_outputs(model, other, inputs):
    pairs = zip(model(**inputs).values(), other(**inputs).values(), strict=True)
    return all(torch.equal(mine, others) for mine, others in pairs if isinstance(mine, Tensor))


@pytest.mark.parametrize("name", EVERY)
def test_what_drops_out_is_found(name):
    fields = tiny_config(family_of(name)).to_dict()
    rates = {key: 0.5 for key, value in fields.items() if "drop" in key and isinstance(value, float)} | {
        "layerdrop": 0
    }
    for attention in attentions(name):
        model = tiny_model(name, attention=attention, **rates).train()
        for trained in (model, compress(model).train()):
            inputs = batch(trained)
            assert not same_outputs(trained, trained, inputs)
            for module in dropping_modules(trained):
                module.eval()
            assert trained.training and same_outputs(trained, trained, inputs)
            assert same_outputs(trained, tiny_model(name, attention=attention), inputs)
