"""Transformers 4, which knows no sizes by layer: a plain checkpoint is a model of its family like any other."""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)

root, texts = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())["texts"]
batch = AutoTokenizer.from_pretrained(root / "feature-extraction")(texts, padding=True, return_tensors="pt")
with torch.no_grad():
    states = AutoModel.from_pretrained(root / "feature-extraction")(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    embeddings = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    classes = AutoModelForSequenceClassification.from_pretrained(root / "text-classification")(**batch).logits
    tags = AutoModelForTokenClassification.from_pretrained(root / "token-classification")(**batch).logits
# By default it joins the scores of tokens to those of words, which other engines do not.
ask = pipeline("question-answering", str(root / "question-answering"))
answer = ask(question=texts[0], context=texts[1], max_answer_len=30, align_to_words=False)
found = {
    "feature-extraction": embeddings.flatten().tolist(),
    "text-classification": classes.softmax(-1).amax(-1).tolist(),
    "token-classification": tags.softmax(-1)[0, batch["attention_mask"][0].bool()][1:-1].amax(-1).tolist(),
    "question-answering": [float(answer["start"]), float(answer["end"])],
}
print(json.dumps(found))
