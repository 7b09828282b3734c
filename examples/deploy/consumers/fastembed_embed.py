"""fastembed: text embeddings with ONNX Runtime, without PyTorch and Transformers."""

import json
import sys
from pathlib import Path

from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType

folder, texts = Path(sys.argv[1], "feature-extraction"), json.loads(Path(sys.argv[2]).read_text())["texts"]
TextEmbedding.add_custom_model(
    model="pruned",
    pooling=PoolingType.MEAN,
    normalization=True,
    sources=ModelSource(hf="pruned"),
    dim=json.loads((folder / "config.json").read_text())["hidden_size"],
    model_file="onnx/model.onnx",
)
model = TextEmbedding("pruned", specific_model_path=str(folder))
print(json.dumps({"feature-extraction": [float(x) for row in model.embed(texts) for x in row]}))
