"""OpenVINO: reads the ONNX file; the pooling is inside it."""

import json
import sys
from pathlib import Path

import numpy as np
import openvino
from tokenizers import Tokenizer

folder, texts = Path(sys.argv[1], "feature-extraction"), json.loads(Path(sys.argv[2]).read_text())["texts"]
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.enable_padding()
encoded = tokenizer.encode_batch(texts)
inputs = {
    "input_ids": np.array([one.ids for one in encoded]),
    "attention_mask": np.array([one.attention_mask for one in encoded]),
    "token_type_ids": np.array([one.type_ids for one in encoded]),
}
# By default it computes in bf16 where the processor can.
precise = {"INFERENCE_PRECISION_HINT": "f32"}
model = openvino.Core().compile_model(folder / "onnx" / "model.onnx", "CPU", precise)
print(json.dumps({"feature-extraction": model(inputs)["sentence_embedding"].flatten().tolist()}))
