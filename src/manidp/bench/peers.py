"""Other runtimes: each opens a model at a batch size and a number of threads, and then maps a batch to logits.

A runtime that knows nothing of gates computes every channel of a gated model and multiplies by the gate ("masked").
Every peer is an optional dependency; all of them come with the extra ``bench``.
"""

from __future__ import annotations

import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from numpy.typing import NDArray

from manidp.errors import MissingExtraError, UnsupportedError
from manidp.formats.checkpoint import Checkpoint

Batch = NDArray[np.float32]
Run = Callable[[Batch], Batch]  # normalised images (B, C, H, W) -> logits (B, classes)


@dataclass(frozen=True)
class Opened:
    """A model ready to run, and the precision it is computed in."""

    run: Run
    precision: str = "float32"


@dataclass(frozen=True)
class Peer:
    """``open(checkpoint, batch, threads, calibration)`` opens a model for batches of that size.

    calibration: normalised images (N, C, H, W), with which those that compute in int8 choose their scales. ``package``
    is where the peer is from.
    """

    name: str
    open: Callable[[Checkpoint, int, int, Batch], Opened]
    package: str


@contextmanager
def _extra(name: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(f"{name} is not installed: pip install 'manidp[bench]'") from error


def _onnx(checkpoint: Checkpoint, batch: int | None = None) -> bytes:
    """The model as ONNX; with a fixed batch size if one is given."""
    with _extra("onnx"):
        from manidp.onnx import onnx_model
    model = onnx_model(checkpoint)
    return model.SerializeToString() if batch is None else _of_batch(model, batch)


def _of_batch(model: Any, batch: int) -> bytes:
    """The model with a fixed batch size."""
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    data: bytes = model.SerializeToString()
    return data


def _int8(checkpoint: Checkpoint, batch: int, calibration: Batch) -> bytes:
    """The model as ONNX Runtime quantises it: int8 weights, one scale a channel, and int8 maps, one scale each (QDQ).

    Where the CPU lacks VNNI, weights have 7 bits, as ONNX Runtime advises: the sums of its kernels would overflow.
    """
    with _extra("onnxruntime"):
        from onnx import load_model_from_string
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.parts = iter(np.array_split(calibration, -(-len(calibration) // 20)))

        def get_next(self) -> dict[str, Batch] | None:
            part = next(self.parts, None)
            return None if part is None else {"image": part}

    features = llvm.get_host_cpu_features()
    narrow = not any(features.get(name, False) for name in ("avx512vnni", "avxvnni"))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source, folded, made = (str(Path(folder, f"{name}.onnx")) for name in ("source", "folded", "made"))
        Path(source).write_bytes(_onnx(checkpoint))
        quant_pre_process(source, folded, skip_symbolic_shape=True)  # batch norms go into convolutions
        quantize_static(
            folded, made, Reader(), quant_format=QuantFormat.QDQ, activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8, per_channel=True, reduce_range=narrow,
        )  # fmt: skip
        model = load_model_from_string(Path(made).read_bytes())
    return _of_batch(model, batch)


def _onnxruntime(
    checkpoint: Checkpoint, batch: int, threads: int, calibration: Batch, precision: str = "float32"
) -> Opened:
    """``precision``: float32 or int8."""
    with _extra("onnxruntime"):
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    model = _int8(checkpoint, batch, calibration) if precision == "int8" else _onnx(checkpoint, batch)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return Opened(lambda images: np.asarray(session.run(["logits"], {"image": images})[0]), precision)


def _openvino(
    checkpoint: Checkpoint, batch: int, threads: int, calibration: Batch, precision: str | None = None
) -> Opened:
    """``precision``: f32, int8, or None for what OpenVINO chooses itself. In int8 the model is ONNX Runtime's."""
    with _extra("openvino"):
        import openvino
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
                                "ENABLE_CPU_PINNING": False}  # fmt: skip
    if precision is not None:
        settings["INFERENCE_PRECISION_HINT"] = "f32"  # of what is not in int8
    model = _int8(checkpoint, batch, calibration) if precision == "int8" else _onnx(checkpoint, batch)
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model), "CPU", settings)
    request = compiled.create_infer_request()

    def run(images: Batch) -> Batch:
        request.infer([images], share_inputs=True)
        return np.array(request.get_output_tensor(0).data)

    hint = compiled.get_property("INFERENCE_PRECISION_HINT").to_string().replace("f32", "float32")
    return Opened(run, "int8" if precision == "int8" else hint)


def _ncnn(checkpoint: Checkpoint, batch: int, threads: int, calibration: Batch) -> Opened:
    """Takes one image at a time; of a batch, each thread takes its own, which is faster than all on each image."""
    if checkpoint.graph.gates:
        raise UnsupportedError("its converter does not know all operations of a gate")
    with _extra("ncnn"):
        import ncnn
        import pnnx
    net = ncnn.Net()
    net.opt.num_threads = threads if batch == 1 else 1
    for option in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
        setattr(net.opt, option, False)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "model.onnx")
        source.write_bytes(_onnx(checkpoint, 1))
        converted = subprocess.run([pnnx.EXEC_PATH, source, "fp16=0"], cwd=folder, capture_output=True, check=False)
        parts = [Path(folder, f"model.ncnn.{part}") for part in ("param", "bin")]
        if converted.returncode or not all(part.exists() for part in parts):
            raise UnsupportedError(f"its converter failed with exit code {converted.returncode}")
        if net.load_param(str(parts[0])) or net.load_model(str(parts[1])):
            raise UnsupportedError("it does not know an operation that its converter wrote")

    def one_after_the_other(images: Batch) -> Batch:
        logits = []
        for image in images:
            extractor = net.create_extractor()
            extractor.input("in0", ncnn.Mat(image))
            logits.append(np.array(extractor.extract("out0")[1]))
        return np.stack(logits)

    if batch == 1 or threads == 1:
        return Opened(one_after_the_other)
    pool, shares = ThreadPoolExecutor(threads), min(threads, batch)
    return Opened(lambda images: np.concatenate([*pool.map(one_after_the_other, np.array_split(images, shares))]))


def _torch(checkpoint: Checkpoint, batch: int, threads: int, calibration: Batch) -> Opened:
    with _extra("torch"):
        from manidp.torch.inference import compiled
    return Opened(compiled(checkpoint, threads))


PEERS = (
    Peer("ONNX Runtime", _onnxruntime, "onnxruntime"),
    Peer("OpenVINO float32", partial(_openvino, precision="f32"), "openvino"),
    Peer("ncnn", _ncnn, "ncnn"),
    Peer("torch.compile", _torch, "torch"),
    Peer("OpenVINO, its default", _openvino, "openvino"),
    Peer("ONNX Runtime, quantised", partial(_onnxruntime, precision="int8"), "onnxruntime"),
    Peer("OpenVINO, quantised", partial(_openvino, precision="int8"), "openvino"),
)
