"""Conversion in Task 4: from a checkpoint to an ONNX file, and from that to its int8 version."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import common
from common import UserError


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's and the quantiser's advice; their errors are exceptions."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def export(checkpoint: Path, path: Path, pictures: common.Dataset) -> None:
    """Convert a checkpoint to one self-contained ONNX file: images (batch, C, H, W) in [0, 1] -> logits."""
    import onnx

    model, facts = common.load_checkpoint(checkpoint)
    example = torch.rand(2, *pictures.train_images.shape[1:])  # two: of one, the batch dimension would become fixed
    with quiet():
        program = torch.onnx.export(
            common.fuse(model),
            (example,),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch"},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    versions = common.environment(common.Runtime("cpu", "fp32", 1))["packages"]
    about = {
        "input": "float32 in [0, 1]; the normalisation is part of the network",
        "classes": json.dumps(facts["classes"]),
        "mean": json.dumps(model.mean.flatten().tolist()),
        "std": json.dumps(model.std.flatten().tolist()),
        "source": facts["source"],
        "versions": json.dumps(versions),
    }
    onnx.helper.set_model_props(proto, about)
    onnx.checker.check_model(proto, full_check=True)
    with common.atomic_path(path) as temporary:
        onnx.save(proto, temporary)


def check_onnx(path: Path, pictures: common.Dataset) -> None:
    """Refuse a file that is no valid, self-contained ONNX network of the form that ``export`` writes."""
    import onnx

    if not path.is_file():
        raise UserError(f"no ONNX file {path}")
    try:
        proto = onnx.load(path, load_external_data=False)
        if any(tensor.data_location for tensor in proto.graph.initializer):
            raise ValueError("its weights are in another file")
        onnx.checker.check_model(proto, full_check=True)
        weights = [onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer]
        if not all(np.isfinite(values).all() for values in weights if values.dtype.kind == "f"):
            raise ValueError("its weights are not finite")
    except Exception as error:  # protobuf, the checker and shape inference raise types of their own
        raise UserError(f"{path} is no valid, self-contained ONNX file: {common.first_line(error)[:99]}") from None
    names = [value.name for value in (*proto.graph.input, *proto.graph.output)]
    if names != ["images", "logits"]:
        raise UserError(f"{path} maps {', '.join(names)}: expected are one input, images, and one output, logits")
    shape = [dimension.dim_value for dimension in proto.graph.input[0].type.tensor_type.shape.dim]
    wanted = [0, *pictures.train_images.shape[1:]]
    if shape != wanted:
        raise UserError(f"{path} takes pictures of shape {shape}, expected is {wanted} (0: any number)")


def quantise(source: Path, target: Path, pictures: common.Dataset, count: int, seed: int) -> None:
    """Write the int8 version of an ONNX file: static QDQ, ranges measured on ``count`` training pictures."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    order = torch.randperm(len(pictures.train_labels), generator=torch.Generator().manual_seed(seed))
    chunks = pictures.train_images[order[:count]].split(100)

    class TrainingPictures(CalibrationDataReader):
        batches = ({"images": chunk.float().div(255).contiguous().numpy()} for chunk in chunks)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    try:
        with quiet(), common.atomic_path(target) as temporary, tempfile.TemporaryDirectory() as scratch:
            prepared = Path(scratch) / "prepared.onnx"
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            first = next(node.name for node in onnx.load(prepared).graph.node if node.op_type == "Conv")
            quantize_static(
                prepared,
                temporary,
                TrainingPictures(),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
                reduce_range=saturates(),
                # The first convolution stays in fp32: its whitening filters amplify rounding.
                nodes_to_exclude=[first],
            )
            onnx.checker.check_model(onnx.load(temporary), full_check=True)
    except Exception as error:  # of a file converted elsewhere
        raise UserError(f"{source} cannot be quantised: {common.first_line(error)[:99]}") from None


def saturates() -> bool:
    """Whether this CPU adds int8 products in 16 bits (x86 before VNNI): weights must then keep to 7 bits."""
    has = torch.cpu.get_capabilities()
    return has.get("architecture") == "x86_64" and not (has.get("avx512_vnni") or has.get("avx_vnni"))
