"""What sentence-transformers exports itself, by optimum: it knows the families' own classes."""

import json
import sys
from pathlib import Path

from sentence_transformers import SentenceTransformer

folder, texts = Path(sys.argv[1], "feature-extraction"), json.loads(Path(sys.argv[2]).read_text())["texts"]
options = {"provider": "CPUExecutionProvider", "export": True}
model = SentenceTransformer(str(folder), backend="onnx", model_kwargs=options)
print(json.dumps({"feature-extraction": model.encode(texts).flatten().tolist()}))
