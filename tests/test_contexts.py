"""Context managers that several rooms share."""

import pytest
from families import tiny_model

from hf_oto.contexts import evaluating


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
