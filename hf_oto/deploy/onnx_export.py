"""A model as an ONNX file, checked against PyTorch.

Shapes: batch, choices (multiple choice only), length.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..models.example_inputs import example_batch, longest_input
from ..models.folders import folder_beside
from ..models.modes import evaluating
from .pooling import PooledModel, Pooling

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# A protobuf holds 2 GB at most; weights beyond that lie beside it.
LARGEST_FILE = 1_900_000_000


@dataclass(frozen=True)
class Export:
    """
    What was written, and how far it is from PyTorch.

    Args:
        path (`str`): The ONNX file. Weights of more than 1.9 GB lie beside it, in `<path>.data`.
        bytes (`int`): Size of the file, and of the one beside it.
        inputs (`tuple[str, ...]`): Names of the inputs, int64 `[batch, length]` each.
        outputs (`tuple[str, ...]`): Names of the outputs.
        error (`float`): Largest difference of any output from PyTorch's, as a share of that output's largest value.
        int8_error, int8_mean_error (`float`, *optional*):
            The same of the quantized model: the largest difference, and the mean one.
        scores, int8_scores (`dict[str, float]`, *optional*): What `score` gave of the float32 and of the int8 model.
    """

    path: str
    bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    error: float
    int8_error: float | None = None
    int8_mean_error: float | None = None
    scores: dict[str, float] | None = None
    int8_scores: dict[str, float] | None = None


def check_packages() -> None:
    """Raise `ImportError` if a package that the export needs is not installed, or torch too old for it."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ImportError(f"ONNX needs {', '.join(missing)}: `pip install 'hf-oto[onnx]'`.")
    by = f"ONNX export by transformers {transformers.__version__}"
    try:
        from transformers.exporters.exporter_onnx import OnnxExporter
    except ImportError as error:  # as where torch does not have what it imports
        raise ImportError(f"{by} does not import with torch {torch.__version__}: {error}. Upgrade torch.") from error
    least = getattr(OnnxExporter, "min_versions", {}).get("torch", "0")
    if Version(torch.__version__) < Version(least):
        raise ImportError(f"{by} needs torch {least} or later, got {torch.__version__}. Upgrade torch.")


def export_onnx(
    model: PreTrainedModel,
    path: str | os.PathLike,
    *,
    int8: bool = False,
    score: Callable[[Any], dict[str, float]] | None = None,
    pooling: Pooling | None = None,
    atol: float = 1e-4,
    seed: int = 0,
) -> Export:
    """
    Write a model as ONNX, of any batch size and length, if ONNX Runtime computes with it what PyTorch does.

    The check runs on padded batches of other sizes than the one that was traced, of random tokens. What a decoder
    keeps of earlier tokens is left out: it reads whole sequences.

    Args:
        model ([`PreTrainedModel`]): On the CPU, in float32.
        path (`str` or `os.PathLike`):
            The file. Neither it nor `<path>.data` may exist. It appears whole or not at all.
        int8 (`bool`, *optional*, defaults to `False`):
            Quantize the weights to int8, every output channel on its own, and activations as they come.
        score (`Callable`, *optional*):
            Called with ONNX Runtime's session of the model, of the float32 one and then of the int8 one.
        pooling ([`~hf_oto.deploy.pooling.Pooling`], *optional*):
            Pool inside the graph: it gives `last_hidden_state` and `sentence_embedding`. For a base model.
        atol (`float`, *optional*, defaults to 1e-4):
            How far an output may be off before any quantization, as a share of its largest magnitude.
        seed (`int`, *optional*, defaults to 0): Of the random batches.

    Returns:
        [`Export`]

    Raises:
        `ImportError`: `onnx`, `onnxscript` or `onnxruntime` is not installed, or torch too old for the exporter.
        `FileExistsError`: There is a file at `path`, or at `<path>.data`.
        `ValueError`: The model reads no tokens, is not on the CPU in float32, or ONNX Runtime computes something else.
    """
    path = Path(path)
    files = (None, path) if int8 else (path, None)
    return export_precisions(model, *files, score=score, pooling=pooling, atol=atol, seed=seed)[0]


def export_precisions(
    model: PreTrainedModel,
    path: Path | None,
    int8_path: Path | None,
    *,
    score: Callable[[Any], dict[str, float]] | None = None,
    pooling: Pooling | None = None,
    atol: float = 1e-4,
    seed: int = 0,
) -> list[Export]:
    """
    [`export_onnx`] in float32, in int8, or in both: what takes longest, the trace, is done once.

    Args:
        path, int8_path (`Path`, *optional*): The files; one may be `None`. Neither is there before both are done.
        model, score, pooling, atol, seed: As in [`export_onnx`].

    Returns:
        `list[Export]`: Of the files asked for, float32 first. It raises what [`export_onnx`] does.
    """
    check_packages()
    # Where a link leads, which may be another disk.
    place, int8_place = (None if file is None else Path(file).resolve() for file in (path, int8_path))
    targets = [file for file in (place, int8_place) if file is not None]
    for file in (file for target in targets for file in (target, _beside(target))):
        if file.exists():
            raise FileExistsError(f"{file} exists already. Choose another file, or remove it.")
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise ValueError(
            f"`model` must be on the CPU in float32, got {model.dtype} on {model.device}. Pass it as "
            f"`model.to('cpu', torch.float32)`, which moves it, or a copy of it."
        )
    computed = model if pooling is None else PooledModel(model, pooling)
    longest = longest_input(model)
    sizes = ((1, 5), (3, min(longest, 96)), (5, min(longest, 24)))
    batches = [example_batch(model, size, length, seed=seed + size) for size, length in sizes]
    exports = []
    with folder_beside(targets[0]) as folder:
        plain = folder / targets[0].name
        with _quiet():
            _write(_traced(model, computed, example_batch(model, 2, min(longest, 16), seed=seed)), plain)
            session = inference_session(plain)
            error, _ = _errors(computed, session, batches)
        names = tuple(value.name for value in session.get_inputs()), tuple(v.name for v in session.get_outputs())
        if not error <= atol:  # NaN is wrong too
            raise ValueError(
                f"ONNX Runtime does not compute what PyTorch does: an output is off by {error:.3g} of its largest "
                f"value, and `atol` allows {atol:g}. Nothing is written."
            )
        float32 = Export(str(path), 0, *names, error, scores=None if score is None else score(session))
        made = [] if place is None else [(plain, place, float32)]
        if int8_place is not None:
            (folder / "int8").mkdir()
            small = _quantized(plain, folder / "int8" / int8_place.name)
            with _quiet():
                session = inference_session(small)
                int8_error, int8_mean = _errors(computed, session, batches)
            if int8_error != int8_error:
                raise ValueError("The int8 model computes NaN on random tokens. Nothing is written; do without int8.")
            int8 = replace(float32, path=str(int8_path), int8_error=int8_error, int8_mean_error=int8_mean)
            made.append((small, int8_place, replace(int8, int8_scores=None if score is None else score(session))))
        for source, target, export in made:
            files = [file for file in (_beside(source), source) if file.exists()]  # with the graph all is there
            size = sum(file.stat().st_size for file in files)
            for file in files:
                file.replace(target.with_name(file.name))
            exports.append(replace(export, bytes=size))
    return exports


def inference_session(path: Path, threads: int | None = None) -> Any:
    """The file in ONNX Runtime, on the CPU with so many threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = threads or torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _traced(model: PreTrainedModel, computed: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    """What is computed, the model or something around it, as an `onnx_ir.Model`."""
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    # Eager attention: plain matrix products and a softmax, as fast in ONNX Runtime as what becomes of sdpa.
    config: Any = model.config
    attention = config._attn_implementation
    model.set_attn_implementation("eager")
    # The outputs by their names, without those of single layers; and of a decoder it reads whole sequences.
    plain = {"return_dict": True, "output_hidden_states": False, "output_attentions": False, "use_cache": False}
    before = {name: getattr(config, name) for name in plain if hasattr(config, name)}
    for name in before:
        setattr(config, name, plain[name])
    try:
        with evaluating(computed):
            exported: Any = OnnxExporter().export(cast(Any, computed), dict(batch), config=OnnxConfig(dynamic=True))
    finally:
        for name, value in before.items():  # first: attentions are given in eager alone
            setattr(config, name, value)
        model.set_attn_implementation(attention)
    # Transformers 5.14 gives torch's `ONNXProgram`, later releases their own `ExportedModel`.
    program = exported.program if hasattr(exported, "program") else exported.model
    _name_sizes(program.graph, batch)
    return program


def _name_sizes(graph: Any, batch: Mapping[str, Tensor]) -> None:
    """Give the sizes of inputs and outputs names that say what they are, in place of the tracer's symbols."""
    names: dict[str, str] = {}
    for value in (*graph.inputs, *graph.outputs):
        if value.name in batch:
            sizes = ("batch", "choices", "length") if batch[value.name].dim() == 3 else ("batch", "length")
            names |= {str(size): name for size, name in zip(value.shape, sizes, strict=True)}
        for dim, size in enumerate(value.shape or ()):
            value.shape[dim] = names.get(str(size), size)


def _beside(path: Path) -> Path:
    """Where the weights of a large model are."""
    return path.with_name(f"{path.name}.data")


def _write(program: Any, path: Path) -> None:
    import onnx_ir

    tensors = [value.const_value for value in program.graph.initializers.values()]
    weights = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    onnx_ir.save(program, path, external_data=_beside(path).name if weights > LARGEST_FILE else None)


def _quantized(source: Path, target: Path) -> Path:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(
            source,
            target,
            weight_type=QuantType.QInt8,
            per_channel=True,
            use_external_data_format=_beside(source).exists(),
        )
    return target


@torch.no_grad()
def _errors(model: nn.Module, session: Any, batches: list[dict[str, Tensor]]) -> tuple[float, float]:
    """
    The largest and the mean difference of an output, as a share of its largest magnitude; NaN if one is. Of outputs
    for every token those of padding are nothing: with a local window they see no token at all, and each
    implementation of attention makes something else of that.
    """
    worst = mean = torch.zeros((), dtype=torch.float32, device="cpu")
    for batch in batches:
        with evaluating(model):
            expected = model(**batch, return_dict=True)
        values = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
        for output, value in zip(session.get_outputs(), values, strict=True):
            tensor, found = expected[output.name], torch.from_numpy(value)
            if "length" in output.shape:
                tokens = batch["attention_mask"].bool()
                tensor, found = tensor[tokens], found[tokens]
            share = (found - tensor).abs() / tensor.abs().max()
            worst, mean = torch.maximum(worst, share.max()), torch.maximum(mean, share.mean())
    return float(worst), float(mean)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' progress on standard output, and their warnings of what they are not used for."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
