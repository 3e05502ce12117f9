"""Task 4: what does ONNX buy? Convert a small CNN, prove it equal on the saved files, then measure the speed.

Protocol: train the network (or load one), fold normalisation and BatchNorm into the convolutions, export to ONNX,
quantise to int8 with training images only. Every engine runs in a process of its own, with equally many threads. First
all of them classify the whole test set: an exact engine must give torch's logits, one that rounds (bf16, int8) may lose
little accuracy, and whoever fails is not timed. Then they are timed in rounds, in random order, so that whatever else
the machine does hits all alike; and all processes are started anew several times, because a process keeps the memory
layout that it got. A speed-up is a ratio within a round; its 95 % interval is over the starts.

Found (JPEG copy of CIFAR-10, one thread of a Xeon with AMX, 5 starts): the same label on 10,000 of 10,000 images; one
image takes ONNX 0.19 ms, tuned torch 3.3 times as long [2.6, 4.2], eager torch 6.4; int8 0.09 ms, at no loss.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import inspect
import io
import itertools
import json
import logging
import os
import pkgutil
import shutil
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import common  # isort: skip (before torch: it says how torch's threads wait)
import numpy as np
import torch
from torch import Tensor, nn

from common import Row, UserError

if TYPE_CHECKING:
    import pandas as pd  # otherwise imported by the steps that need it: torch's engines import this file at every start

BATCH_SIZES = (1, 8, 64, 256)
TIMING = 3, 0.3  # calls and seconds, at least, per engine, batch size and round
MAX_CALL_SECONDS = 0.7  # batch sizes at which some engine takes longer are left out
LOGIT_TOLERANCE = 1e-3  # of exact engines, relative to the largest logit: rounding gives about 1e-6
MIN_AGREEMENT = 0.999  # of exact engines' labels with torch's
PATIENCE = 1800  # seconds that an engine has for an answer
FILES_SECONDS, START_SECONDS = 60, 25  # for the progress bar: what files and checks take, and every start
# For networks of the user's own: settings that train almost anything.
FOREIGN = common.Recipe(optimizer="AdamW", lr=2e-3, weight_decay=0.05, label_smoothing=0.1, batch_size=128, epochs=5)
RIVALS = {"speedup_over_tuned": "torch_tuned_fp32", "speedup": "torch_fp32", "speedup_over_compiled": "torch_compiled"}
SHORT_NAMES = {"airplane": "plane", "automobile": "car"}
COLOURS = dict(  # one per engine, in every figure
    zip(("onnx_fp32", "onnx_int8", "torch_compiled_bf16", "torch_bf16", "torch_compiled"), common.PALETTE, strict=False)
) | {"torch_fp32": "#000000", "torch_tuned_fp32": "#8C8C8C", "torch_cuda": "#56B4E9", "torch_cuda_resident": "#332288"}
COLOURS |= {"torch_cuda_bf16": "#AA4499", "torch_cuda_compiled": "#999933", "onnx_cuda": "#F0E442"}
COLOURS |= {"onnx_cuda_resident": "#44AA99"}
TIMER = """\
Timed is one call of a loaded engine, from a batch of test images in memory (in the order the engine likes: NCHW for
torch_fp32 and ONNX, channels_last for the others) to its logits in memory. torch_cuda and onnx_cuda include copies to
and from the GPU; the other CUDA engines have images and logits there. torch_fp32 is the checkpoint as it is loaded; the
tuned network has BatchNorm folded in, too; the compiled one is that, through Inductor (AOTInductor; on a GPU
torch.compile with CUDA graphs). Threads that wait do not spin. p50 is the geometric mean, over the starts, of the
rounds' medians: speed-ups are quotients of the table's cells, their 95 % intervals are over the starts (Student's t, of
logarithms). p90 and p99 are of all calls. Load and first call (batch 1) are medians over the starts, without importing
libraries; added MB is what loading and running add to a process that has those imported."""
EPILOG = """examples:
  python task4_onnx.py --checkpoint results/task3/best_model.pth  convert another task's network
  python task4_onnx.py --model torchvision.models:resnet18        convert any network, trained here, or with weights
      --checkpoint resnet18.pth                                   that torch.save(net.state_dict()) has saved
  python task4_onnx.py --onnx broken.onnx                         judge a file converted elsewhere, or damaged

training takes 8 TFLOP with --preset small (50 s on 2 cores with AMX), 45 with medium, 218 with large
"""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; --quick limits every loop."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=form)
    add, number = parser.add_argument, common.number
    add("--checkpoint", type=number(Path), metavar="PTH", help="the network to convert (default: train, or reuse)")
    add("--onnx", type=number(Path), metavar="FILE", help="judge this ONNX file of the network, made elsewhere")
    add("--threads", type=number(high=1024), default=1, help="of every engine (default: %(default)s)")
    add("--starts", type=number(), default=5, help="of all engines; intervals are over them (default: %(default)s)")
    add("--rounds", type=number(), default=2, help="of timing in every start (default: %(default)s)")
    limit = "accuracy points that an engine that rounds (int8, bf16) may lose (default: %(default)s)"
    add("--max-int8-drop", type=number(float, 0, 100), default=0.5, metavar="POINTS", help=limit)
    compiled = "also time compiled torch (default: where g++ or clang++ is found, but not with --quick)"
    add("--compile", action=argparse.BooleanOptionalAction, help=compiled)
    common.add_common_args(parser, presets=True, output_dir=Path("results/task4"))
    options = parser.parse_args(argv)
    if options.quick:
        options.starts, options.rounds = 1, min(options.rounds, 2)
        options.images = min(options.images or 4000, 4000)
    found = any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++")))
    if options.compile and not found:
        raise UserError("--compile needs a C++ compiler (g++ or clang++), and none is found")
    if options.compile is None:
        options.compile = found and not options.quick
    return options


@common.script
def main(argv: Sequence[str] | None = None) -> int:
    """Convert, check, measure, report; returns the exit status."""
    options = parse_args(argv)
    data, recipe = open_data(options)
    given = describe_onnx(options.onnx, data) if options.onnx else None
    with common.open_run(options, data) as run, shared_images(run, data):
        model, pace = obtain_model(run, recipe)
        make_files(run, model, given)
        engines = choose_engines(run, given or Feed())
        with started(run, engines) as processes:
            results, logits = classify(run, processes)
            judge(options.max_int8_drop, engines, results, logits, data.test_labels.numpy())
            explain_int8(run, results, given)
            run.bar.update(pace * FILES_SECONDS)
            rows, interrupt = measure(run, processes, results, pace)
        summary = summarise(run, model, results, rows, logits, interrupt)
        draw(run, data, summary, rows, logits)
        run.finish(summary, write_report(run, summary))
    if interrupt:
        raise interrupt
    return 1 if summary["faults"] else 0


# ================================================================ 1. data and network


def open_data(options: argparse.Namespace) -> tuple[common.Dataset, common.Recipe]:
    """The data (by default the checkpoint's own) and the recipe; raises UserError where network and data do not fit."""
    recipe = common.recipe_from(options, FOREIGN if options.model else common.PRESETS[options.preset])
    if options.model and options.preset != "small":
        print("NOTE: --preset is ignored: only the lab's own networks have presets", file=sys.stderr)
    if options.quick:
        few: Row = {"epochs": min(2, recipe.epochs), "batch_size": min(128, recipe.batch_size)}
        recipe = replace(recipe, **few, width=options.width or 16)
    if options.checkpoint and (not options.model or is_ours(options.checkpoint)):
        _, facts = common.load_checkpoint(options.checkpoint, options.model)
        options.dataset = options.dataset or facts["dataset"]
        options.image_size = options.image_size or facts["input"][2]
        data = common.load_data(options)
        for wanted, has in (
            (list(facts["classes"]), list(data.classes)),
            (list(facts["input"]), list(data.train_images.shape[1:])),
        ):
            if wanted != has:
                raise UserError(f"{options.checkpoint} is for {wanted}, but {data.source} has {has}")
    else:
        data = common.load_data(options)
        common.check_recipe(recipe, data, common.split_dataset(data, options.images, False))
    if options.quick:  # test images of all classes, in proportion
        chosen = data.test_labels.argsort(stable=True)[:: max(1, len(data.test_labels) // 2000)]
        data = replace(data, test_images=data.test_images[chosen], test_labels=data.test_labels[chosen])
    return data, recipe


def is_ours(path: Path) -> bool:
    """Whether a file was written by ``common.save_checkpoint``."""
    content = common.read_tensors(path)
    return isinstance(content, dict) and content.get("format") == common.CHECKPOINT


def obtain_model(run: common.Run, recipe: common.Recipe) -> tuple[nn.Sequential, float]:
    """Have ``model.pth`` in the run's folder; (its network, images per second or 1, for the progress bar)."""
    options, path, pace = run.options, run.folder / "model.pth", 1.0
    if options.checkpoint is None:
        pace = train_or_reuse(run, recipe, path)
    elif is_ours(options.checkpoint):
        shutil.copyfile(options.checkpoint, path)
    else:
        adopt(run, recipe, path)
    run.stage("loading", pace * (FILES_SECONDS + options.starts * START_SECONDS))
    return common.load_checkpoint(path, options.model)[0], pace


def train_or_reuse(run: common.Run, recipe: common.Recipe, path: Path) -> float:
    """Write a network to ``path``: that of an earlier run of the same kind, else a new one; returns images per second.

    Nothing is selected here, so that no images need be held out. The kind includes the images, not where they lie, and
    the code: that of common.py, and of the file of a network of the user's own.
    """
    split, seed, earlier = (
        common.split_dataset(run.data, run.options.images, False),
        run.options.seed,
        run.output / path.name,
    )
    files = [common.__file__]
    if ":" in recipe.model:
        files.append(inspect.getfile(inspect.unwrap(pkgutil.resolve_name(recipe.model))))
    code = hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()
    facts = {"seed": seed, "precision": run.runtime.precision, "train_images": len(split.train), "code": code}
    with contextlib.suppress(UserError):  # none there, or none of ours: it is made anew
        _, found = common.load_checkpoint(earlier, run.options.model)
        if all(found.get(k) == v for k, v in (facts | {"recipe": recipe, "fingerprint": run.data.fingerprint}).items()):
            print(f"{earlier} is from an earlier run with the same options and images: used again")
            shutil.copyfile(earlier, path)
            return 1.0
    model = common.make_model(recipe, run.data, split, seed)
    run.stage("training", recipe.epochs * len(split.train))
    for row in common.train_epochs(model, run.data, recipe, run.runtime, split.train, seed=seed):
        run.bar.update(len(split.train))
        run.stage(f"training: loss {row['train_loss']:.3f} after epoch {row['epoch']} of {recipe.epochs}")
    if not np.isfinite(row["train_loss"]):
        raise UserError("the training diverged; try another --seed or fewer --epochs")
    common.save_checkpoint(path, model, run.data, recipe, **facts, train_seconds=row["seconds"])
    return recipe.epochs * len(split.train) / row["seconds"]


def adopt(run: common.Run, recipe: common.Recipe, path: Path) -> None:
    """Write a plain state dict, as ``torch.save`` saves it, as a checkpoint of the lab; raises UserError."""
    source, split = run.options.checkpoint, common.split_dataset(run.data, run.options.images, False)
    content = common.read_tensors(source)
    for key in ("state_dict", "model"):
        content = content[key] if isinstance(content, dict) and isinstance(content.get(key), dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{source} holds no state dict, neither by itself nor under state_dict or model")
    state = {key.removeprefix("module."): value for key, value in content.items()}  # of DataParallel
    model = common.make_model(recipe, run.data, split, run.options.seed)
    own = model[1].state_dict()
    faults = [f"{k} is missing" for k in own if k not in state and not k.endswith("num_batches_tracked")]
    faults += [f"{k} is unexpected" for k in state if k not in own]
    shapes = {k: (tuple(state[k].shape), tuple(own[k].shape)) for k in own if k in state}
    faults += [f"{k} is {has}, not {wanted}" for k, (has, wanted) in shapes.items() if has != wanted]
    if faults:
        raise UserError(f"{source} does not fit {recipe.model}, {len(faults)} time(s): {'; '.join(faults[:3])}")
    model[1].load_state_dict(state, strict=False)
    mean, std = (", ".join(f"{value:.3f}" for value in values) for values in (split.mean, split.std))
    print(f"NOTE: images are standardised as the training images are: mean {mean}, std {std}", file=sys.stderr)
    common.save_checkpoint(path, model, run.data, recipe)


@torch.no_grad()
def fuse(model: nn.Sequential, example: Tensor) -> nn.Module:
    """The network to deploy: an eval-mode copy with BatchNorm (and SmallCNN's normalisation) folded into convolutions.

    Networks of the user's own are folded by torch.fx. Where that fails, or its result differs on ``example``
    (N, C, H, W) by more than rounding, the copy is as the network was.
    """
    plain: Any = copy.deepcopy(model).eval().requires_grad_(False)
    with contextlib.suppress(Exception):  # somebody's forward may not be traceable
        from torch.fx.experimental.optimization import fuse as fuse_any

        fused: Any = (fuse_small if isinstance(plain[1], common.SmallCNN) else fuse_any)(copy.deepcopy(plain))
        expected = plain(example)
        if (fused(example) - expected).abs().max() <= LOGIT_TOLERANCE / 10 * expected.abs().max():
            plain = fused.eval().requires_grad_(False)
    return plain.to(memory_format=torch.channels_last)


def fuse_small(model: Any) -> nn.Sequential:
    """SmallCNN as a sequence. A positive scale, as it has, lets BatchNorm pass through the max-pooling before it."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    normalise, network = model
    stem, head = network.stem, network.head
    stem.weight /= normalise.std
    bias = 0 if stem.bias is None else stem.bias
    stem.bias = nn.Parameter(bias - (stem.weight * normalise.mean).sum((1, 2, 3)))
    layers: list[Any] = [stem]
    for layer in network.features:
        pooled = isinstance(layers[-1], nn.MaxPool2d)
        if isinstance(layer, nn.BatchNorm2d):
            layers[-1 - pooled] = fuse_conv_bn_eval(layers[-1 - pooled], layer)
        elif isinstance(layer, nn.ReLU) and pooled:
            layers.insert(-1, layer)  # the same result, and runtimes join a convolution with the ReLU behind it
        else:
            layers.append(layer)
    for weight in head.parameters():
        weight *= network.scale
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), head)


# ================================================================ 2. ONNX files

ROUNDING = {"QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "ConvInteger", "MatMulInteger"}


class Feed(NamedTuple):
    """How an ONNX file wants its images: numpy's type, NHWC or NCHW, a fixed batch size or any; is it quantised?"""

    dtype: str = "float32"
    nhwc: bool = False
    batch: int | None = None
    quantised: bool = False


def make_files(run: common.Run, model: nn.Sequential, given: Feed | None) -> None:
    """Write model.onnx and model_int8.onnx; a file made elsewhere takes the place of one of them."""
    fp32, int8 = run.folder / "model.onnx", run.folder / "model_int8.onnx"
    run.stage("exporting and quantising")
    if given:
        shutil.copyfile(run.options.onnx, int8 if given.quantised else fp32)
    if not fp32.exists():
        export(run, model, fp32)
    if not int8.exists():
        try:
            quantise(run, fp32, int8, given or Feed())
        except Exception as error:  # of somebody's network
            print(f"NOTE: {fp32.name} cannot be quantised: {common.first_line(error)[:200]}", file=sys.stderr)


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


def export(run: common.Run, model: Any, path: Path) -> None:
    """Write one self-contained ONNX file: images float32 (batch, C, H, W) in [0, 1] -> logits."""
    import onnx

    example = run.data.train_images[:2].float() / 255  # two: of one, the batch dimension would become fixed
    names: Any = {"input_names": ["images"], "output_names": ["logits"], "dynamic_shapes": ({0: "batch"},)}
    try:
        with quiet():
            program = torch.onnx.export(fuse(model, example), (example,), **names, dynamo=True, verbose=False)
        assert program is not None
        proto = program.model_proto
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # of somebody's network
        raise UserError(f"the network cannot be exported to ONNX: {common.first_line(error)[:200]}") from None
    about = {name: json.dumps(getattr(model[0], name).flatten().tolist()) for name in ("mean", "std")}
    about |= {"input": "float32 in [0, 1]; the normalisation is part of the network", "source": run.data.source}
    about |= {"classes": json.dumps(run.data.classes), "versions": json.dumps({"torch": torch.__version__})}
    onnx.helper.set_model_props(proto, about)
    onnx.save(proto, path)


def describe_onnx(path: Path, data: common.Dataset) -> Feed:
    """How a file made elsewhere wants its images, by position, whatever it calls them.

    Raises UserError for what cannot be judged.
    """
    import onnx

    if not path.is_file():
        raise UserError(f"no ONNX file {path}")
    try:
        graph = onnx.load(path, load_external_data=False).graph
        if any(tensor.data_location for tensor in graph.initializer):
            raise ValueError("its weights are in another file")
        onnx.checker.check_model(path, full_check=True)
        weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        if not all(np.isfinite(values).all() for values in weights.values() if values.dtype.kind == "f"):
            raise ValueError("its weights are not finite")
    except Exception as error:  # protobuf, the checker and shape inference raise types of their own
        raise UserError(f"{path} is no valid, self-contained ONNX file: {common.first_line(error)[:99]}") from None
    inputs = [value for value in graph.input if value.name not in weights]  # old files list weights, too
    if len(inputs) != 1:
        raise UserError(f"{path} has {len(inputs)} inputs, expected is one: the images")
    types = [value.type.tensor_type for value in (inputs[0], graph.output[0])]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(types[0].elem_type).name
    (batch, *shape), *outputs = ([dim.dim_value for dim in kind.shape.dim] or [0] for kind in types)

    def fits(has: Sequence[int], wanted: Sequence[int]) -> bool:
        return len(has) == len(wanted) and all(a in (0, b) for a, b in zip(has, wanted, strict=True))

    channels, height, width = data.train_images.shape[1:]
    nchw, nhwc = fits(shape, (channels, height, width)), fits(shape, (height, width, channels))
    if not (nchw or nhwc) or dtype not in ("float32", "float64", "uint8"):
        wanted = f"float or uint8 images of shape {[0, channels, height, width]} (0: any number) or NHWC"
        raise UserError(f"{path} takes {dtype} images of shape {[batch, *shape]}, expected are {wanted}")
    if outputs[0] != [0] and not fits(outputs[0][1:], (len(data.classes),)):
        raise UserError(f"{path} gives {outputs[0]} first, expected are logits of shape {[batch, len(data.classes)]}")
    if any(values.dtype == np.float16 for values in weights.values()):
        raise UserError(f"{path} computes in float16, which CPUs only emulate: judge its float32 form")
    rounds = any(node.op_type in ROUNDING for node in graph.node)
    return Feed(dtype, nhwc and not nchw, batch or None, rounds)


def quantise(run: common.Run, source: Path, target: Path, feed: Feed, keep: str = "") -> None:
    """Write the int8 version of an ONNX file: static QDQ, ranges measured on training images.

    The first convolution (of SmallCNN whitening filters, which amplify rounding) and nodes of type ``keep`` stay fp32.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    size, has = feed.batch or 100, torch.cpu.get_capabilities()
    chunks = [chunk for chunk in calibration_images(run).split(size) if len(chunk) == size]
    graph = onnx.load(source).graph
    stored = {tensor.name for tensor in graph.initializer}
    name = next(value.name for value in graph.input if value.name not in stored)

    class TrainingImages(quantization.CalibrationDataReader):
        batches = iter({name: prepare(chunk, feed)} for chunk in chunks)

        def get_next(self) -> Any:
            return next(self.batches, None)

    prepared = scratch_of(run) / "prepared.onnx"
    with quiet(), common.atomic_path(target) as temporary:
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        nodes = onnx.load(prepared).graph.node
        first = [node.name for node in nodes if node.op_type == "Conv"][:1]
        quantization.quantize_static(
            prepared,
            temporary,
            TrainingImages(),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            # x86 before VNNI adds int8 products in 16 bits: weights must then keep to 7 bits.
            reduce_range=has.get("architecture") == "x86_64" and not (has.get("avx512_vnni") or has.get("avx_vnni")),
            nodes_to_exclude=first + [node.name for node in nodes if node.op_type == keep],
        )
        onnx.checker.check_model(temporary, full_check=True)


def calibration_images(run: common.Run) -> Tensor:
    """Training images uint8 (N, C, H, W) of all classes, in random order."""
    return run.data.train_images[common.split_dataset(run.data, 200 if run.options.quick else 1000, False).train]


# ================================================================ 3. engines


@dataclass(frozen=True)
class Engine:
    """One row of the comparison: which runtime ("torch" or "onnx") runs which saved file, and how.

    ``exact`` engines must give torch's logits up to rounding. ``tuned``: torch gets the folded network in channels_last
    order, else the checkpoint as it is, in torch's default order. ``resident``: images and logits stay on the GPU.
    """

    name: str
    kind: str
    file: Path
    errors: Path  # what the process says on stderr
    feed: Feed
    threads: int
    model: str | None  # of --model
    exact: bool = True
    tuned: bool = False
    bf16: bool = False
    compiled: bool = False
    device: str = "cpu"
    resident: bool = False


def choose_engines(run: common.Run, given: Feed) -> list[Engine]:
    """The rows of the comparison that this machine can run, the baseline first: what loading ``model.pth`` gives."""
    import onnxruntime as ort

    def add(available: bool, name: str, file: str, **how: Any) -> None:
        if available:
            settings: Row = {"file": run.folder / file, "errors": scratch_of(run) / f"{name}.stderr"}
            settings |= {"threads": run.options.threads, "model": run.options.model, "feed": Feed(batch=given.batch)}
            engines.append(Engine(name, name.split("_")[0], **settings | how))

    engines: list[Engine] = []
    native = common.make_runtime("cpu", "auto", run.runtime.threads).precision == "bf16"
    tuned: Row = {"file": "model.pth", "tuned": True}
    fp32: Row = {"file": "model.onnx"} | ({} if given.quantised else {"feed": given})
    rounded: Row = tuned | {"bf16": True, "exact": False}
    add(True, "torch_fp32", "model.pth")
    add(True, "torch_tuned_fp32", **tuned)
    add(native, "torch_bf16", **rounded)
    add(run.options.compile, "torch_compiled", **tuned, compiled=True)
    add(run.options.compile and native, "torch_compiled_bf16", **rounded, compiled=True)
    add(True, "onnx_fp32", **fp32)
    add((run.folder / "model_int8.onnx").exists(), "onnx_int8", "model_int8.onnx", feed=given, exact=False)
    gpu, device = run.runtime.device.startswith("cuda"), run.runtime.device
    onnx_gpu = gpu and "CUDAExecutionProvider" in ort.get_available_providers()
    add(gpu, "torch_cuda", **tuned, device=device)
    add(gpu, "torch_cuda_resident", **tuned, device=device, resident=True)
    add(gpu, "torch_cuda_bf16", **rounded, device=device, resident=True)
    add(gpu, "torch_cuda_compiled", **tuned, device=device, resident=True, compiled=True)
    add(onnx_gpu, "onnx_cuda", **fp32, device=device)
    add(onnx_gpu, "onnx_cuda_resident", **fp32, device=device, resident=True)
    if gpu and not onnx_gpu:
        print("NOTE: this ONNX Runtime has no CUDA provider: no onnx_cuda rows", file=sys.stderr)
    return engines


class EngineError(Exception):
    """An engine that cannot load its file or run; the text is its one-line reason."""


class EngineProcess:
    """One engine's process: a worker of its own, which is asked to run one of the functions below."""

    def __init__(self, engine: Engine, run: common.Run) -> None:
        self.engine = engine
        self.workers = common.Workers(1, run.runtime, engine.errors.with_name("images.pt"))

    def ask(self, function: Any, *arguments: Any) -> Any:
        """What ``function`` yields there; raises EngineError: its reason, its last words, or that it takes too long."""
        start, alarm = time.perf_counter(), threading.Timer(PATIENCE, self.workers.stop)
        alarm.start()
        try:
            (answer,) = self.workers.run(function, self.engine, *arguments)
        except common.WorkerDied as error:
            words = self.engine.errors.read_text(errors="replace").split("\n") if self.engine.errors.exists() else []
            words = [line for line in words if line.strip()][-1:] or [str(error)]
            late = f"no answer within {PATIENCE} s" if time.perf_counter() - start > PATIENCE else words[0]
            raise EngineError(late[:200]) from None
        except (RuntimeError, UserError) as error:
            raise EngineError(common.first_line(error)[:200]) from None
        finally:
            alarm.cancel()
        return answer


@contextlib.contextmanager
def started(run: common.Run, engines: Sequence[Engine]) -> Iterator[list[EngineProcess]]:
    """A new process per engine, all ended with the block."""
    processes = [EngineProcess(engine, run) for engine in engines]
    try:
        yield processes
    finally:
        for process in processes:
            process.workers.stop()


def ask_all(processes: Sequence[EngineProcess], function: Any, *arguments: Any) -> dict[str, Any]:
    """Answers by engine, all asked at once; who fails is left out with a line, unless there is no task without."""

    def attempt(process: EngineProcess) -> Any:
        try:
            return process.ask(function, *arguments)
        except EngineError as error:
            return error

    answers = {}
    for process, answer in zip(processes, ThreadPoolExecutor(64).map(attempt, processes), strict=True):
        if not isinstance(answer, EngineError):
            answers[process.engine.name] = answer
        elif process.engine.name in ("torch_fp32", "onnx_fp32"):
            raise UserError(f"{process.engine.name} cannot run {process.engine.file.name}: {answer}")
        else:
            print(f"NOTE: {process.engine.name} is left out: {answer}", file=sys.stderr)
    return answers


def scratch_of(run: common.Run) -> Path:
    """The folder of what engines share, hidden beside the results."""
    path: Path = run.output.resolve() / ".engines"
    return path


@contextlib.contextmanager
def shared_images(run: common.Run, data: common.Dataset) -> Iterator[None]:
    """Put the test images where the engines' processes find them; the folder goes with the block."""
    scratch = scratch_of(run)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    # Whoever waits for work, be it OpenMP's threads, sleeps.
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor")}
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no helpers that would outlive an engine
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # of what an engine, which is ended by force, leaves
    try:
        few = replace(data, train_images=data.train_images[:0], train_labels=data.train_labels[:0])
        common.save_tensors(scratch / "images.pt", {f.name: getattr(few, f.name) for f in fields(few)})
        yield
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# What follows runs in the engines' processes. LOADED: to_input (of uint8 images), run, to_numpy (of its result); the
# batches that were prepared, by size; and "memory" before loading.
LOADED: dict[Any, Any] = {}


def wake(data: common.Dataset, _: Any, engine: Engine) -> Iterator[bool]:
    """Import the libraries; at the first start of a compiled engine, compile."""
    os.dup2(os.open(engine.errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    __import__("onnxruntime" if engine.kind == "onnx" else "torch.nn.utils.fusion")
    if engine.kind == "torch" and engine.model:  # whatever somebody's network imports
        __import__("torch.fx.experimental.optimization")
        common.load_checkpoint(engine.file, engine.model)
    if engine.compiled and engine.device == "cpu" and not engine.errors.with_name(f"{engine.name}_2.pt2").exists():
        load_torch(engine, data.train_images.shape[1:])
    yield True


def load(data: common.Dataset, _: Any, engine: Engine) -> Iterator[Row]:
    """Load the file and make the first call."""
    LOADED["memory"], start = private_bytes(), time.perf_counter()
    LOADED["calls"] = (load_torch if engine.kind == "torch" else load_onnx)(engine, data.train_images.shape[1:])
    load_ms, (to_input, run, _) = 1000 * (time.perf_counter() - start), LOADED["calls"]
    batch = to_input(data.test_images[: engine.feed.batch or 1])
    start = time.perf_counter()
    run(batch)
    yield {"load_ms": load_ms, "first_call_ms": 1000 * (time.perf_counter() - start)}


def load_torch(engine: Engine, shape: Sequence[int]) -> tuple[Any, Any, Any]:
    """(to_input, run, to_numpy) of a checkpoint, as it is, folded, or compiled."""
    common.make_runtime(engine.device, "fp32", engine.threads)
    network: Any = common.load_checkpoint(engine.file, engine.model)[0]
    dtype = torch.bfloat16 if engine.bf16 else torch.float32
    order = torch.channels_last if engine.tuned else torch.contiguous_format
    example = torch.rand(2, *shape)
    network = fuse(network, example) if engine.tuned else network
    network = network.to(engine.device, dtype).to(memory_format=order)
    if engine.compiled and engine.device == "cpu":
        network = compile_ahead(network, example.to(dtype).contiguous(memory_format=order), engine)
    elif engine.compiled:
        network = torch.compile(network, mode="reduce-overhead", dynamic=False)  # CUDA graphs

    def to_input(images: Tensor) -> Tensor:
        batch = torch.from_numpy(prepare(images, engine.feed)).contiguous(memory_format=order)
        return batch.to(engine.device, dtype) if engine.resident else batch

    @torch.inference_mode()
    def run(batch: Tensor) -> Any:
        logits = network(batch.to(engine.device, dtype))
        if not engine.resident:
            return logits.float().cpu().numpy()
        torch.cuda.synchronize(engine.device)
        return logits

    return to_input, run, lambda logits: logits.float().cpu().numpy() if engine.resident else logits


def compile_ahead(network: nn.Module, example: Tensor, engine: Engine) -> Any:
    """The network compiled by AOTInductor: at the first start; the others find its packages.

    One image is worth kernels of its own; the second package is for any larger batch.
    """
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    # Without Inductor's freezing: no faster here, and wrong at any batch of grey images (torch 2.14).
    packages = []
    for batch, dynamic in ((example[:1].clone(), None), (example, ({0: torch.export.Dim("batch", min=2)},))):
        packages.append(engine.errors.with_name(f"{engine.name}_{len(batch)}.pt2"))
        if not packages[-1].exists():
            with torch.no_grad():
                program = torch.export.export(network, (batch,), dynamic_shapes=dynamic)
                aoti_compile_and_package(program, package_path=str(packages[-1]))
    one, many = (aoti_load_package(str(package)) for package in packages)
    return lambda batch: (one if len(batch) == 1 else many)(batch)


def load_onnx(engine: Engine, _: Any) -> tuple[Any, Any, Any]:
    """(to_input, run, to_numpy) of an ONNX file."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = engine.threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors only
    kind, _, number = engine.device.partition(":")
    cuda = ("CUDAExecutionProvider", {"device_id": number or "0", "use_tf32": "0"})
    if kind == "cuda":
        ort.preload_dlls()  # CUDA and cuDNN from where pip has put them
    session = ort.InferenceSession(engine.file, options, [cuda] if kind == "cuda" else ["CPUExecutionProvider"])
    if kind == "cuda" and cuda[0] not in session.get_providers():
        raise RuntimeError("ONNX Runtime's CUDA provider does not start here")  # it would fall back to the CPU
    source, target = session.get_inputs()[0].name, session.get_outputs()[0].name
    if not engine.resident:
        return lambda images: prepare(images, engine.feed), lambda x: session.run([target], {source: x})[0], np.asarray
    place, binding = (kind, int(number or 0)), session.io_binding()

    def run(batch: Any) -> Any:
        binding.bind_ortvalue_input(source, batch)
        binding.bind_output(target, *place)
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return binding

    def to_input(images: Tensor) -> Any:
        return ort.OrtValue.ortvalue_from_numpy(prepare(images, engine.feed), *place)

    return to_input, run, lambda bound: bound.copy_outputs_to_cpu()[0]


def prepare(images: Tensor, feed: Feed) -> np.ndarray:
    """Images uint8 (N, C, H, W) as a file takes them: floats in [0, 1], or uint8; repeated to a fixed batch."""
    array = images.permute(0, 2, 3, 1).numpy() if feed.nhwc else images.numpy()
    array = np.resize(array, (feed.batch or len(array), *array.shape[1:]))
    return np.ascontiguousarray(array if feed.dtype == "uint8" else array.astype(feed.dtype) / 255)


def private_bytes() -> int:
    """Resident bytes of this process without mapped files; 0 where the system does not tell (Linux does)."""
    with contextlib.suppress(OSError, IndexError):
        return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])
    return 0


def predict(data: common.Dataset, _: Any, engine: Engine) -> Iterator[tuple[np.ndarray, Row]]:
    """Logits float32 (N, num_classes) of all test images; processor seconds per image, and memory added."""
    to_input, run, to_numpy = LOADED["calls"]
    start, parts = time.process_time(), data.test_images.split(engine.feed.batch or BATCH_SIZES[-1])
    logits = np.concatenate([to_numpy(run(to_input(part)))[: len(part)] for part in parts]).astype(np.float32)
    told: Row = {"seconds_per_image": (time.process_time() - start) / len(logits)}
    yield logits, told | {"added_rss_bytes": private_bytes() - LOADED["memory"] if LOADED["memory"] else None}


def time_calls(data: common.Dataset, _: Any, engine: Engine, size: int, calls: int, seconds: float) -> Iterator[Any]:
    """Latencies in ms, in order, of at least so many calls and seconds, after a warm-up (others used the caches).

    Called on several batches of different images, prepared before the clock starts.
    """
    to_input, run, _ = LOADED["calls"]
    if size not in LOADED:
        LOADED[size] = [to_input(part) for part in data.test_images[: 8 * size].split(size) if len(part) == size]
    endless, latencies, warm = itertools.cycle(LOADED[size]), list[float](), time.perf_counter() + 0.1
    for number in range(3):
        if number == 0 or time.perf_counter() < warm:
            run(next(endless))
    end = time.perf_counter() + seconds
    while len(latencies) < calls or time.perf_counter() < end:
        batch = next(endless)
        start = time.perf_counter()
        run(batch)
        latencies.append(1000 * (time.perf_counter() - start))
    yield latencies


# ================================================================ 4. quality


def load_all(processes: Sequence[EngineProcess]) -> dict[str, Row]:
    """Start the processes, all at once, and have them load their files, one after the other: that is timed."""
    awake = ask_all(processes, wake)
    answers = [ask_all([process], load) for process in processes if process.engine.name in awake]
    return {name: answer for part in answers for name, answer in part.items()}


def classify(run: common.Run, processes: list[EngineProcess]) -> tuple[dict[str, Row], dict[str, np.ndarray]]:
    """Have all engines classify the whole test set: what they tell, and logits (N, num_classes), by engine."""
    run.stage("loading the engines" + ", compiling" * run.options.compile)
    loads = load_all(processes)
    run.stage("classifying the test images")
    answers = ask_all([process for process in processes if process.engine.name in loads], predict)
    sizes = {process.engine.name: {"size_bytes": process.engine.file.stat().st_size} for process in processes}
    results = {name: sizes[name] | told | {"loads": [loads[name]]} for name, (_, told) in answers.items()}
    return results, {name: logits for name, (logits, _) in answers.items()}


def judge(limit: float, engines: list[Engine], results: dict[str, Row], logits: Any, labels: np.ndarray) -> None:
    """Add to ``results`` how right every engine is, how far from torch_fp32, and why it is ``refused``, if it is.

    ``accuracy_drop`` is in points, with the 95 % interval of the paired difference over the test images and the p-value
    of McNemar's exact test. An exact engine must give the same logits; one that rounds is refused where the whole
    interval lies beyond ``limit``, and ``undecided`` where the interval straddles it.
    """
    from scipy import stats

    baseline = logits["torch_fp32"]
    before, allowed = baseline.argmax(1) == labels, LOGIT_TOLERANCE * float(np.abs(baseline).max())
    for engine in (engine for engine in engines if engine.name in results):
        own, row, name = logits[engine.name], results[engine.name], f"{engine.name} ({engine.file.name})"
        right, same = own.argmax(1) == labels, own.argmax(1) == baseline.argmax(1)
        lost, won = int((before & ~right).sum()), int((right & ~before).sum())
        drop, low, high, *_ = common.interval(100.0 * before - 100.0 * right)
        if lost + won == 0:  # the rule of three: what never happened in n images happens in at most 3 / n of all
            low, high = -300 / len(labels), 300 / len(labels)
        row |= {"accuracy": right.mean(), "class_accuracy": [right[labels == c].mean() for c in np.unique(labels)]}
        row |= {"agreement": same.mean(), "max_abs_logit_diff": np.abs(own - baseline).max(), "exact": engine.exact}
        row |= {"accuracy_drop": drop, "accuracy_drop_ci_low": low, "accuracy_drop_ci_high": high, "refused": None}
        row |= {"undecided": not engine.exact and low <= limit < high, "lost_images": lost, "won_images": won}
        row |= {"mcnemar_p": stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0}
        # Both written so that a nan is refused.
        if engine.exact and not (row["max_abs_logit_diff"] <= allowed and row["agreement"] >= MIN_AGREEMENT):
            row["refused"] = (
                f"{name} is not the network of model.pth: its logits differ by up to {row['max_abs_logit_diff']:.2g} "
                f"(allowed: {allowed:.2g}), {100 * row['agreement']:.2f} % of its labels agree"
                + ("; it gives probabilities instead of logits" if np.allclose(own.sum(1), 1, atol=1e-3) else "")
            )
        elif not engine.exact and not (np.isfinite(own).all() and low <= limit):
            lost_points = f"{drop:.2f} points of accuracy [{low:.2f}, {high:.2f}]"
            row["refused"] = f"{name} loses {lost_points}, more than the {limit:g} allowed"


def explain_int8(run: common.Run, results: dict[str, Row], given: Feed | None) -> None:
    """Where int8 lost too much, find the node type that is to blame: the one that helps most if it stays in fp32."""
    import onnx
    import onnxruntime as ort
    from onnxruntime.quantization.registry import QDQRegistry

    row, feed = results.get("onnx_int8"), given or Feed()
    if not row or not row["refused"] or feed.quantised:
        return
    run.stage("looking for what int8 loses")
    images = prepare(calibration_images(run)[: feed.batch or 500], feed)
    fp32, int8, trial = run.folder / "model.onnx", run.folder / "model_int8.onnx", scratch_of(run) / "trial.onnx"

    def labels(file: Path) -> np.ndarray:
        session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
        return session.run(None, {session.get_inputs()[0].name: images})[0].argmax(1)

    agreement = {"none": (labels(int8) == labels(fp32)).mean()}
    for kind in sorted({node.op_type for node in onnx.load(int8).graph.node} & set(QDQRegistry)):
        with contextlib.suppress(Exception):  # this is by the way
            quantise(run, fp32, trial, feed, keep=kind)
            agreement[kind] = (labels(trial) == labels(fp32)).mean()
    best = max(agreement, key=lambda kind: agreement[kind])
    row["agreement_with_fp32_nodes"] = agreement
    row["refused"] += (
        f"; first to blame are its {best} nodes: {100 * agreement['none']:.0f} % of {len(images)} training images "
        f"keep their label, with those nodes in fp32 {100 * agreement[best]:.0f} %"
    )


# ================================================================ 5. speed


def measure(
    run: common.Run, processes: list[EngineProcess], results: dict[str, Row], pace: float
) -> tuple[list[Row], KeyboardInterrupt | None]:
    """One row per engine, batch size, start and round, with all its latencies; and what interrupted it, if anything.

    Whoever was refused is not timed; where that is model.onnx itself, nobody is.
    """
    options, rows, wrong = run.options, list[Row](), results["onnx_fp32"]["refused"]
    timed = [p for p in processes if p.engine.name in results and not (results[p.engine.name]["refused"] or wrong)]
    engines, slowest = [p.engine for p in timed], max(row["seconds_per_image"] for row in results.values())
    sizes = [size for size in BATCH_SIZES if size == 1 or size * slowest <= MAX_CALL_SECONDS]
    if fixed := processes[0].engine.feed.batch:
        sizes = [fixed]
    elif len(sizes) < len(BATCH_SIZES):
        print(f"NOTE: at more than {sizes[-1]} images a call takes longer than {MAX_CALL_SECONDS:g} s: not timed")
    try:
        for start in range(1, options.starts + 1 if engines else 1):
            with contextlib.nullcontext(timed) if start == 1 else started(run, engines) as timed:
                for name, told in load_all(timed if start > 1 else ()).items():
                    results[name]["loads"].append(told)
                for number in range(1, options.rounds + 1):
                    run.stage(f"timing, start {start} of {options.starts}, round {number}")
                    rows += time_round(options, timed, sizes, {"start": start, "round": number})
                    run.bar.update(pace * START_SECONDS / options.rounds)
                for process in timed:
                    process.workers.stop()
    except EngineError as error:
        raise UserError(f"an engine failed while it was timed: {error}") from None
    except KeyboardInterrupt as interrupt:  # whole rounds are kept
        return rows, interrupt
    return rows, None


def time_round(options: argparse.Namespace, processes: list[EngineProcess], sizes: list[int], when: Row) -> list[Row]:
    """A row of every engine at every batch size, in random order."""
    timing = (3, 0.03) if options.quick else TIMING
    shuffle, rows = np.random.default_rng([options.seed, *when.values()]), []
    for size in sizes:
        for position in shuffle.permutation(len(processes)):
            process = processes[position]
            row = {"engine": process.engine.name, "batch_size": size, "threads": options.threads} | when
            rows.append(row | {"latencies_ms": process.ask(time_calls, size, *timing)})
    return rows


def describe(latencies: Any, batch_size: int) -> Row:
    """Percentiles and mean of latencies in ms; images per second from their mean, the slow tail included."""
    p50, p90, p99 = np.percentile(latencies, (50, 90, 99)).tolist()
    mean = float(np.mean(latencies))
    return {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "mean_ms": mean, "images_per_second": 1000 * batch_size / mean}


def add_speeds(results: dict[str, Row], rows: list[Row]) -> None:
    """Add to ``results``, per batch size, latencies and speed-ups over the ``RIVALS``; load times are over all starts.

    p50_ms is the geometric mean over the starts, in each over the rounds, so that a speed-up is the quotient of two.
    """
    import pandas as pd

    for row in results.values():
        row |= {"batch": {}} | pd.DataFrame(row.pop("loads")).median().to_dict()
    if not rows:
        return
    frame = pd.DataFrame(rows)
    frame["log_p50"] = frame["latencies_ms"].map(lambda values: np.log(np.median(values)))
    logs = frame.pivot_table(index=["batch_size", "start"], columns="engine", values="log_p50")  # means over rounds
    for (name, size), group in frame.groupby(["engine", "batch_size"]):
        pooled, own = np.concatenate(group["latencies_ms"].tolist()), logs.loc[size]
        entry = describe(pooled, size) | {"calls": len(pooled), "p50_ms": np.exp(own[name].mean())}
        for key, rival in RIVALS.items():
            if rival in own:
                mean, low, high, *_ = common.interval(own[rival] - own[name])
                values = (1.0, 1.0, 1.0) if rival == name else np.exp([mean, low, high]).tolist()
                entry |= dict(zip((key, f"{key}_ci_low", f"{key}_ci_high"), values, strict=True))
        results[name]["batch"][str(size)] = entry


# ================================================================ 6. verdict, figures, report


def summarise(run: common.Run, model: Any, results: dict[str, Row], rows: list[Row], logits: Any, stop: Any) -> Row:
    """What summary.json holds."""
    from torch.utils.flop_counter import FlopCounterMode

    add_speeds(results, rows)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(run.data.train_images[:1].float() / 255)
    summary = {"task": "task4", "threads": run.options.threads, "test_pictures": len(logits["torch_fp32"])}
    summary |= {"flop_per_picture": counter.get_total_flops(), "interrupted": bool(stop), "engines": results}
    summary |= {"starts": len({row["start"] for row in rows}), "rounds": run.options.rounds}
    faults = [row["refused"] for row in results.values() if row["refused"] and row["exact"]]
    return summary | {"faults": faults, "verdict": conclude(summary, run.options.max_int8_drop)}


def conclude(summary: Row, limit: float) -> list[str]:
    """The verdict in sentences: equality first, then speed."""
    engines, count = summary["engines"], summary["test_pictures"]
    fp32, torch_fp32 = engines["onnx_fp32"], engines["torch_fp32"]
    words = [f"FAILED: {row['refused']}; its speed is not quoted." for row in engines.values() if row["refused"]]
    if not fp32["refused"]:
        words.append(
            f"onnx_fp32 gives torch's label on {round(fp32['agreement'] * count):,} of {count:,} test images (max "
            f"|Δlogit| {fp32['max_abs_logit_diff']:.1g}); accuracy {100 * fp32['accuracy']:.2f} %, "
            f"torch's {100 * torch_fp32['accuracy']:.2f} %."
        )
    if torch_fp32["accuracy"] <= 1.5 / len(torch_fp32["class_accuracy"]):
        words.append("The network is hardly better than chance: that labels agree proves little; train it longer.")
    for name, row in engines.items():
        if not row["exact"] and not row["refused"]:
            drop, low, high = (-row["accuracy_drop" + end] for end in ("", "_ci_high", "_ci_low"))
            size = f", file size {100 * row['size_bytes'] / fp32['size_bytes']:.0f} %" if name == "onnx_int8" else ""
            unsure = f"; UNDECIDED whether it loses more than {limit:g}" if row["undecided"] else ""
            change = f"{drop:+.2f} points [{low:+.2f}, {high:+.2f}], McNemar's p {row['mcnemar_p']:.2g}"
            words.append(f"{name} changes the accuracy by {change}{size}{unsure}.")
    batch = fp32["batch"]
    for size in dict.fromkeys([*list(batch)[:1], *list(batch)[-1:]]):  # the smallest and the largest
        timed = {name: row["batch"][size] for name, row in engines.items() if row["batch"]}
        for name in ("onnx_fp32", "onnx_int8"):
            words += [
                in_words(timed[name], k, name, rival, size) for k, rival in RIVALS.items() if k in timed.get(name, {})
            ]
        words.append(f"The fastest engine at batch {size} is {min(timed, key=lambda name: timed[name]['p50_ms'])}.")
    return words


def in_words(entry: Row, key: str, engine: str, rival: str, size: str) -> str:
    """A speed-up as a sentence, which claims no difference where the interval includes 1."""
    ratio, low, high = (entry[key + end] for end in ("", "_ci_low", "_ci_high"))
    if not np.isfinite(high):
        return f"At batch {size} {engine} is {ratio:.2f} times as fast as {rival} (of one start: no interval)."
    figures = f"{ratio:.2f} times as fast [{low:.2f}, {high:.2f}]"
    if low <= 1 <= high:
        return f"At batch {size} no difference between {engine} and {rival} is shown: {figures}."
    return f"At batch {size} {engine} is {'faster' if ratio > 1 else 'SLOWER'} than {rival}: {figures}."


def tables(results: dict[str, Row]) -> dict[str, pd.DataFrame]:
    """Tables of text by title: quality, then p50 and speed-ups by batch size."""
    import pandas as pd

    frame = pd.DataFrame.from_dict(results, orient="index")
    scale = {"size_bytes": 1e-6, "added_rss_bytes": 1e-6, "accuracy": 100, "agreement": 100}
    columns = {
        "accuracy": ("accuracy %", "{:.2f}"),
        "agreement": ("agreement %", "{:.2f}"),
        "max_abs_logit_diff": ("max |Δlogit|", "{:.1e}"),
        "size_bytes": ("file MB", "{:.2f}"),
        "load_ms": ("load ms", "{:.0f}"),
        "first_call_ms": ("1st call ms", "{:.1f}"),
        "added_rss_bytes": ("added MB", "{:.0f}"),
    }
    cells = {
        title: (frame[key].astype(float) * scale.get(key, 1)).map(form.format) for key, (title, form) in columns.items()
    }
    found = {"quality": pd.DataFrame(cells)}
    timed = {name: row["batch"] for name, row in results.items() if row["batch"]}
    for key in ("p50_ms", *list(RIVALS)[:2]) if timed else ():
        form = "{0:.3g}" if key == "p50_ms" else "{0:.2f} [{1:.2f}, {2:.2f}]"
        ends = [key, f"{key}_ci_low", f"{key}_ci_high"]
        title = "p50, ms" if key == "p50_ms" else f"times as fast as {RIVALS[key]} [95 %]"
        rows = {
            n: {f"batch {s}": form.format(*map(e.get, ends)).removesuffix(" [0.00, inf]") for s, e in b.items()}
            for n, b in timed.items()
        }
        found[title] = pd.DataFrame.from_dict(rows, orient="index")
    return found


def write_report(run: common.Run, summary: Row) -> list[str]:
    """Print accuracies and times in the original report's form, tables and verdict; returns report.md's paragraphs."""
    results = summary["engines"]
    for name in (name for name in ("torch_fp32", "onnx_fp32", "onnx_int8") if name in results):
        print(f"\n{name}:")
        for label, accuracy in zip(run.data.classes, results[name]["class_accuracy"], strict=True):
            print(f"Accuracy for class: {SHORT_NAMES.get(label, label)} is {100 * accuracy:.1f} %")
        if results[name]["batch"]:
            print(f"Time, ms:  {next(iter(results[name]['batch'].values()))['p50_ms']}")
    where = f"{run.data.source}, {summary['test_pictures']:,} test images, {summary['threads']} thread(s) per engine"
    verdict = [f"- {sentence}" for sentence in summary["verdict"]]
    paragraphs = ["# Task 4: what does ONNX buy?", where, "\n".join(verdict)]
    for title, table in tables(results).items():
        print(f"\n{title}\n{table.to_string()}")
        paragraphs += [f"**{title}**", table.to_markdown(disable_numparse=True)]
    print("", *(textwrap.fill(sentence, 99, subsequent_indent="  ") for sentence in verdict), sep="\n")
    return [*paragraphs, TIMER, *(f"![{path.name}]({path.name})" for path in sorted(run.folder.glob("*.png")))]


def draw(run: common.Run, data: common.Dataset, summary: Row, rows: list[Row], logits: dict[str, np.ndarray]) -> None:
    """Write the CSV files and the figures."""
    import pandas as pd

    results, where = summary["engines"], f"{run.data.source}, {summary['test_pictures']:,} test images"
    accuracy = pd.DataFrame({name: [*row["class_accuracy"], row["accuracy"]] for name, row in results.items()})
    accuracy.insert(0, "class", [*(SHORT_NAMES.get(name, name) for name in data.classes), "all"])
    run.table("accuracy.csv", accuracy)
    draw_classes(run, accuracy.iloc[:-1], where)
    draw_disagreements(run, data, logits)
    if not rows:
        return
    frame = pd.DataFrame(rows)
    described = frame.apply(lambda row: describe(row["latencies_ms"], row["batch_size"]), axis=1, result_type="expand")
    run.table("latency.csv", frame.drop(columns="latencies_ms").join(described))
    pooled = frame.groupby(["engine", "batch_size"])["latencies_ms"].agg(lambda lists: np.concatenate(lists.tolist()))
    percentiles = [*range(100), 99.5, 99.9, 100]
    curves = pd.DataFrame({key: np.percentile(values, percentiles) for key, values in pooled.items()}, percentiles).T
    curves = curves.rename_axis(["engine", "batch_size"]).rename_axis("percentile", axis=1).stack().rename("latency_ms")
    run.table("latency_distribution.csv", curves.reset_index())
    where, timed = f"{where}, {summary['starts']} starts", {name: r for name, r in results.items() if r["batch"]}
    draw_latency(run, curves, where)
    draw_throughput(run, timed, where)
    draw_pareto(run, timed, where)


def draw_classes(run: common.Run, accuracy: pd.DataFrame, where: str) -> None:
    """Accuracy per class, and what converting changed of it."""
    shown = [name for name in ("torch_fp32", "onnx_fp32", "torch_bf16", "onnx_int8") if name in accuracy]
    values, position = 100 * accuracy[shown], np.arange(len(accuracy))
    changes = values.sub(values["torch_fp32"], axis=0)
    most = ", ".join(f"{changes[name].abs().max():.1f} ({name})" for name in shown[1:])
    title, size = (
        f"Largest change of a class's accuracy in points: {most}\n{where}",
        (12, max(6, 2 + len(accuracy) / 3)),
    )
    with run.figure("per_class_accuracy.png", title, columns=2, size=size) as (drawing, axes):
        for number, name in enumerate(shown):
            for axis, table in zip(axes[0], (values, changes), strict=True):
                offset = position + 0.17 * (number - (len(shown) - 1) / 2)
                axis.plot(table[name], offset, "os^D"[number], color=COLOURS[name], markersize=7, label=name)
        for axis, label in zip(axes[0], ("accuracy, %", "change against torch_fp32, points"), strict=True):
            axis.set(xlabel=label)
            axis.set_yticks(position, accuracy["class"], parse_math=False)  # names of folders
            axis.invert_yaxis()
        drawing.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(shown))


def draw_disagreements(run: common.Run, data: common.Dataset, logits: dict[str, np.ndarray]) -> None:
    """Test images whose label int8 changed, or, where there are none, those nearest to a border between labels."""
    import pandas as pd

    name, ordered = "onnx_int8" if "onnx_int8" in logits else "onnx_fp32", np.sort(logits["torch_fp32"], axis=1)
    columns = {"true": data.test_labels.numpy(), "torch": logits["torch_fp32"].argmax(1), name: logits[name].argmax(1)}
    frame = pd.DataFrame(columns | {"margin": ordered[:, -1] - ordered[:, -2]}).rename_axis("test_image")
    changed = frame[frame["torch"] != frame[name]]
    run.table("disagreements.csv", changed.reset_index())
    shown = changed if len(changed) else frame.nsmallest(24, "margin")
    shown = shown.iloc[np.unique(np.linspace(0, len(shown) - 1, 24).astype(int))]  # from all over the test set
    title = f"{name} changes the label of {len(changed):,} of {len(frame):,} test images"
    title += f", {len(shown)} of them here" if len(changed) else "; nearest to the border are these"
    rows = -(-len(shown) // 8)
    with run.figure("disagreements.png", f"{title}\n{data.source}", rows, 8, (13, 1.6 + 2.7 * rows)) as (_, axes):
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, (number, row) in zip(axes.flat, shown.iterrows(), strict=False):
            axis.imshow(data.test_images[int(number)].permute(1, 2, 0), cmap="gray", vmin=0, vmax=255)
            for line, who in enumerate(("true", "torch", name)):
                label = data.classes[int(row[who])]
                colour = "black" if who == "true" else "#007A55" if row[who] == row["true"] else "#C0392B"
                text = f"{who.removeprefix('onnx_')}: {SHORT_NAMES.get(label, label)[:14]}"
                style: Row = {"color": colour, "fontsize": 11, "va": "top", "parse_math": False}
                axis.text(0, -0.05 - 0.16 * line, text, transform=axis.transAxes, **style)


def plain_ticks(axis: Any) -> None:
    """Ticks of a log axis as plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def draw_latency(run: common.Run, curves: Any, where: str) -> None:
    """The share of calls that are done after so many ms, per engine, at the smallest and the largest batch."""
    sizes = sorted({size for _, size, _ in curves.index})
    sizes = sorted({sizes[0], sizes[-1]})
    title = f"Batch {sizes[0]}: 99 of 100 calls of onnx_fp32 take at most {curves['onnx_fp32', sizes[0], 99]:.2g} ms, "
    title += f"half of torch_fp32's {curves['torch_fp32', sizes[0], 50]:.2g} ms or more\n{where}"
    with run.figure("latency.png", title, columns=len(sizes), size=(6.5 * len(sizes), 6.5)) as (drawing, axes):
        for axis, size in zip(axes[0], sizes, strict=True):
            for engine, colour in COLOURS.items():
                if (engine, size, 50) in curves.index:
                    curve = curves[engine, size]
                    axis.plot(curve, curve.index, color=colour, label=engine)
            axis.axhline(50, color="black", linewidth=0.8, linestyle=":")
            axis.set(xscale="log", xlabel="latency, ms (log scale)", ylabel="calls done, %", title=f"batch {size}")
            plain_ticks(axis.xaxis)
        drawing.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def draw_throughput(run: common.Run, timed: dict[str, Row], where: str) -> None:
    """Images per second against batch size."""
    sizes = [int(size) for size in timed["torch_fp32"]["batch"]]
    rates = {name: [entry["images_per_second"] for entry in row["batch"].values()] for name, row in timed.items()}
    order = sorted(rates, key=lambda name: -rates[name][-1])
    title = f"{order[0]} has the highest throughput at batch {sizes[-1]}: {rates[order[0]][-1]:,.0f} images/s\n{where}"
    with run.figure("throughput.png", title, size=(10, 6)) as (drawing, axes):
        axis = axes[0][0]
        for name in order:
            axis.plot(sizes, rates[name], color=COLOURS[name], marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="batch size", ylabel="images per second (log scale)")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        plain_ticks(axis.yaxis)
        drawing.legend(*axis.get_legend_handles_labels(), loc="outside right center")


def draw_pareto(run: common.Run, timed: dict[str, Row], where: str) -> None:
    """Accuracy against latency at the smallest batch; a circle's area is the file's size."""
    size, best = next(iter(timed["torch_fp32"]["batch"])), "onnx_int8" if "onnx_int8" in timed else "onnx_fp32"
    gain, drop = timed[best]["batch"][size]["speedup"], timed[best]["accuracy_drop"]
    title = f"{best}: {gain:.1f} times as fast as torch_fp32 at batch {size}, accuracy {-drop:+.2f} points\n{where}"
    largest, base = max(row["size_bytes"] for row in timed.values()), 100 * timed["torch_fp32"]["accuracy"]
    with run.figure("pareto.png", title, size=(10.5, 6)) as (drawing, axes):
        axis = axes[0][0]
        for name, row in timed.items():
            x, label = row["batch"][size]["p50_ms"], f"{name}, {row['size_bytes'] / 1e6:.2f} MB"
            style = {"facecolor": (COLOURS[name], 0.35), "edgecolor": COLOURS[name], "linewidth": 2}
            axis.scatter(x, 100 * row["accuracy"], s=600 * row["size_bytes"] / largest, label=label, **style)
            if name != "torch_fp32":
                ends = [base - row[f"accuracy_drop_ci_{end}"] for end in ("high", "low")]
                axis.vlines(x, *ends, color=COLOURS[name], linewidth=1.5)
        bars = "test accuracy, %\n(bars: 95 % of the difference to torch_fp32)"
        axis.set(xscale="log", xlabel=f"latency (p50) at batch {size}, ms (log scale)", ylabel=bars)
        axis.margins(0.2, 0.4)
        plain_ticks(axis.xaxis)
        drawing.legend(*axis.get_legend_handles_labels(), loc="outside right center", labelspacing=1.3)


if __name__ == "__main__":
    sys.exit(main())
