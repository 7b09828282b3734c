"""Questions of SQuAD's layout that are read for scoring."""

import json

import pytest

from hf_oto.deploy.squad_scoring import read_questions


@pytest.mark.parametrize("odd", ["question", "context", "text"])
def test_what_is_no_text_is_refused_when_it_is_read(odd, tmp_path):
    texts = {"question": "Who?", "context": "Ada.", "text": "Ada"} | {odd: None}
    asked = {"question": texts["question"], "answers": [{"text": texts["text"]}]}
    paragraph = {"context": texts["context"], "qas": [asked]}
    (tmp_path / "dev.json").write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    with pytest.raises(ValueError, match="SQuAD's layout.*expected a text, got None"):
        read_questions(tmp_path / "dev.json")
