"""One ONNX file of a base model in ONNX Runtime and in OpenVINO, on one thread in float32, their runs taking turns.

    build/consumers/environments/openvino-tokenizers/bin/python examples/deploy/consumers/latency.py MODEL.onnx …

`check.py` makes that environment; it needs onnxruntime beside. Medians of the process's own time, in milliseconds:
what else the machine does takes no part in them.
"""

import statistics
import sys
import time

import numpy as np
import onnxruntime
import openvino

BATCH, LENGTH, REPEATS = 8, 128, 15


def engines(path, inputs):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    given = {value.name: inputs[value.name] for value in session.get_inputs()}
    return {"onnxruntime": lambda: session.run(None, given)[0], "openvino": lambda: compiled(given)[0]}


def main(paths):
    ids = np.random.default_rng(0).integers(5, 900, (BATCH, LENGTH))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    runs = {(path, name): run for path in paths for name, run in engines(path, inputs).items()}
    outputs = {key: run() for key, run in runs.items()}
    for path in paths:
        assert np.allclose(outputs[path, "onnxruntime"], outputs[path, "openvino"], atol=1e-4)
    times = {key: [] for key in runs}
    for _ in range(REPEATS):
        for key, run in runs.items():
            start = time.process_time()
            run()
            times[key].append(1000 * (time.process_time() - start))
    for (path, name), values in times.items():
        print(f"{path}: {name} {statistics.median(values):.0f} ms")


if __name__ == "__main__":
    main(sys.argv[1:])
