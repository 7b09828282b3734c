"""optimum's ORTModel, with transformers 4."""

import json
import sys
from pathlib import Path

import torch.nn.functional as F
from optimum.onnxruntime import ORTModelForFeatureExtraction, ORTModelForSequenceClassification
from transformers import AutoTokenizer

root, texts = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())["texts"]
where = {"subfolder": "onnx", "file_name": "model.onnx"}
batch = AutoTokenizer.from_pretrained(root / "feature-extraction")(texts, padding=True, return_tensors="pt")
states = ORTModelForFeatureExtraction.from_pretrained(root / "feature-extraction", **where)(**batch).last_hidden_state
mask = batch["attention_mask"].unsqueeze(-1)
embeddings = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
logits = ORTModelForSequenceClassification.from_pretrained(root / "text-classification", **where)(**batch).logits
found = {"feature-extraction": embeddings.flatten().tolist()}
found["text-classification"] = logits.softmax(-1).amax(-1).tolist()
print(json.dumps(found))
