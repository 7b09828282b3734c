"""sentence-transformers, on Transformers 4, without a flag."""

import json
import sys
from pathlib import Path

from sentence_transformers import SentenceTransformer

folder, texts = Path(sys.argv[1], "feature-extraction"), json.loads(Path(sys.argv[2]).read_text())["texts"]
print(json.dumps({"feature-extraction": SentenceTransformer(str(folder)).encode(texts).flatten().tolist()}))
