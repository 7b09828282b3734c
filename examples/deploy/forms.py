#!/usr/bin/env python
"""What equal widths are worth in time: BERT-base cut to the same multiply-accumulates in both forms, side by side.

The per-layer form keeps heads and neurons as a training does, most in the first blocks; the plain one all heads and
equally many neurons in every block. Weights are random. One thread, runs taking turns, medians of the process's own
time, in which what else the machine does takes no part.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, PreTrainedModel

from hf_oto import compress, partition, summarize
from hf_oto.deploy.onnx_export import export_onnx, inference_session

PER_LAYER = (
    (11, 11, 11, 10, 10, 10, 9, 9, 8, 8, 8, 7),
    (2048, 1792, 1664, 1408, 1280, 1152, 1024, 896, 800, 560, 432, 256),
)
PLAIN = ((12,) * 12, (736,) * 12)


@torch.no_grad()
def cut(kept: tuple[tuple[int, ...], tuple[int, ...]], plain: bool) -> PreTrainedModel:
    """BERT-base with so many heads and neurons in its blocks, chosen by chance."""
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=1000)).eval()
    parameters = dict(model.named_parameters())
    for array in partition(model).arrays:
        gone = torch.randperm(array.count)[kept[array.kind == "neurons"][array.layer] :]
        for owned in array.owned:
            parameters[owned.name].index_fill_(owned.dim, owned.positions(array.count, gone), 0)
    return compress(model, plain=plain).eval()


def in_onnxruntime(model: PreTrainedModel, folder: Path) -> Callable[[torch.Tensor], object]:
    export_onnx(model, folder / f"{type(model).__name__}.onnx")
    session = inference_session(folder / f"{type(model).__name__}.onnx", threads=1)

    def run(ids: torch.Tensor) -> object:
        own = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        return session.run(None, {value.name: own[value.name].numpy() for value in session.get_inputs()})

    return run


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=8, help="Runs of each, beside one that does not count.")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    models = {"per-layer": cut(PER_LAYER, plain=False), "plain": cut(PLAIN, plain=True)}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        engines: dict[str, dict[str, Callable]] = {"PyTorch": dict(models)}
        engines["ONNX Runtime"] = {name: in_onnxruntime(model, Path(folder)) for name, model in models.items()}
        for engine, runs in engines.items():
            for batch, length in ((1, 128), (8, 128), (1, 384)):
                ids = torch.randint(5, 900, (batch, length))
                times: dict[str, list[float]] = {name: [] for name in runs}
                for _ in range(options.repeats + 1):
                    for name, run in runs.items():
                        start = time.process_time()
                        run(ids)
                        times[name].append(1000 * (time.process_time() - start))
                per_layer, plain = (statistics.median(found[1:]) for found in times.values())
                macs = [summarize(model, sequence_length=length).macs for model in models.values()]
                print(
                    f"{engine}, {batch} x {length}: per-layer {per_layer:.0f} ms, plain {plain:.0f} ms, "
                    f"{plain / per_layer:.2f} of it; MACs {macs[1] / macs[0]:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
