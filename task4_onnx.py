"""Task 4: what does ONNX buy? Convert a small CNN, verify the saved files on the test set, then measure the speed.

Found (JPEG copy of CIFAR-10, one thread of a Xeon with AMX, 5 starts): the same label on 10,000 of 10,000 images; one
image takes ONNX 0.15 ms, tuned torch 4.4 times as long [4.1, 4.7], eager torch 7.8 times; int8 0.076 ms, no loss shown.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib
import importlib.util
import itertools
import json
import logging
import os
import shutil
import sys
import textwrap
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import common  # isort: skip (before torch: it sets how long idle threads spin)
import numpy as np
import torch
from torch import Tensor, nn

from common import Estimate, Recipe, UserError, first_line, note

if TYPE_CHECKING:  # imported where they are needed, because every engine's process imports this file
    import pandas as pd
    from matplotlib.axes import Axes
    from onnx import ModelProto
    from onnxruntime import IOBinding
    from onnxruntime.quantization import CalibrationDataReader

PROTOCOL = """\
Protocol: train the network (a preset plus one epoch: small takes 8 TFLOP, about a minute on 2 cores with AMX, medium
54, large 249) or load one, fold BatchNorm into the convolutions, export to ONNX, quantise to int8 using training images
only. Every engine runs in its own process with the same number of threads. First, all engines classify the whole test
set: an exact engine must reproduce torch's logits, an approximate one (bf16, int8) may lose a little accuracy; engines
that fail are not timed. Then they are timed in rounds, in random order, so that disturbances affect all. All processes
are restarted several times, because a process keeps its memory layout, and with it its speed.

A timed call goes from a batch of test images in memory, in the engine's preferred layout, to logits in memory;
torch_cuda and onnx_cuda include copies to and from the GPU, the other CUDA engines do not. torch_fp32 is the network
in torch's default layout; torch_tuned is folded and channels_last, torch_compiled that through Inductor. Latencies are
geometric means, over starts and rounds, of each round's percentiles; speed-ups are ratios of p50, with 95 % intervals
over the starts. Load time, first call and the memory that both add (after imports) are medians."""
LIMITS = "One machine, one network: another processor or library version may rank the engines differently."
CAPTIONS = {
    "latency": "One engine per row. Notice how far p99 lies from p50, and whether the rounds agree.",
    "throughput": "Notice which lines cross: the fastest engine for one image need not be the fastest for many.",
    "pareto": "Up and to the left is better. Notice whether the lines of int8 and bf16 include the others' accuracy.",
    "disagreements": "Green labels are right, red ones wrong. Notice whether int8 breaks more labels than it corrects.",
}

MORE_EPOCHS = 1  # more than the preset has
# For custom networks: settings that train almost anything.
CUSTOM = Recipe(
    training=common.Training(
        optimizer="AdamW", lr=2e-3, weight_decay=0.05, label_smoothing=0.1, batch_size=128, epochs=5
    )
)
CALIBRATION_IMAGES = 1000
BATCH_SIZES = (1, 8, 64, 256)
MAX_CALL_FLOP = 1e10  # larger calls (about 0.3 s on one core) are not timed
MIN_CALLS = 3  # timed per engine, batch size and round
MIN_SECONDS = 0.3
LOGIT_TOLERANCE = 1e-3  # of exact engines: of the largest logit
MIN_AGREEMENT = 0.999  # of exact engines: of labels
PATIENCE = 1800  # seconds to wait for an engine's answer
SPEEDUPS = {  # key in summary.json, and the engine compared with
    "speedup_over_tuned": "torch_tuned_fp32",
    "speedup": "torch_fp32",
    "speedup_over_compiled": "torch_compiled",
}
# The progress bar counts images trained on. Other work is its estimated seconds times PACE.
PACE = 4000  # images trained on in a second
WORK_OF_FILES = 20 * PACE
WORK_OF_CHECKS = 30 * PACE  # of the files: starting all engines and classifying the test images
WORK_OF_START = 30 * PACE  # starting all engines and timing them
SHORT_NAMES = {"airplane": "plane", "automobile": "car"}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; --quick limits every loop."""
    description = f"{str(__doc__ or '').strip()}\n\n{PROTOCOL}"
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    count = common.whole_number()
    add("--checkpoint", type=common.path_name, metavar="PTH", help="convert this network, from Task 3 or a state dict")
    add("--onnx", type=common.path_name, metavar="FILE", help="judge this ONNX file of the same network")
    add("--threads", type=common.whole_number(1, 1024), default=1, help="per engine (default: %(default)s)")
    add("--starts", type=count, default=5, help="of each engine; intervals are over them (default: %(default)s)")
    add("--rounds", type=count, default=2, help="of timing per start (default: %(default)s)")
    add(
        "--max-int8-drop",
        type=common.real_number(0, 100),
        default=0.5,
        metavar="POINTS",
        help="of accuracy (%%) that int8 or bf16 may lose (default: %(default)s)",
    )
    common.add_common_args(parser, presets=True, output_dir=Path("results/task4"))
    options = parser.parse_args(argv)
    if options.quick:
        options.starts = 1
        options.rounds = 1
        options.images = min(options.images or 4000, 4000)
    return options


@common.script
def main(argv: Sequence[str] | None = None) -> int:
    """Convert, check, measure, report; returns the exit status."""
    options = parse_args(argv)
    require_libraries()
    refuse_files_to_be_cleared(options)
    checkpoint = open_checkpoint(options)  # None for a plain state dict, too
    data = open_data(options, checkpoint)
    recipe = choose_recipe(options, data, checkpoint)
    given = examine(options.onnx, data) if options.onnx else None
    with common.open_run(options, data) as run, scratch_folder(run.output) as scratch:  # run.data: no test images
        run.progress.expect(work_of_training(options, run.data, recipe) + WORK_OF_FILES)
        run.progress.expect(WORK_OF_CHECKS + work_of_timing(options))
        model = obtain_model(run, options, recipe, checkpoint)
        calibration = make_files(run, options, model, given)
        setup = set_up(run, options, data, model, given, scratch)
        with EnginePool(run, setup, available_engines(run, options)) as pool:
            logits = classify(run, pool)
            qualities = judge(run, options, logits, data)
            cause = explain_int8(run, calibration, qualities, given)
            timings = time_engines(run, options, pool, qualities)
        results = Results(options, data, setup, qualities, cause, timings, find_speeds(timings))
        draw_disagreements(run, data, logits)
        draw_speeds(run, results)
        print_results(results)
        run.finish(summarise(results), write_report(run, results), options, common.command_line(__file__, argv))
        if not options.checkpoint:
            print(f"\n--checkpoint {run.output / 'model.pth'} measures this network again, without training it.")
    if timings.interruption:
        raise timings.interruption
    return 1 if results.faults else 0


# ================================================================ 1. data and network


def require_libraries() -> None:
    """Say at once what would be missing after the training."""
    for name in ("onnx", "onnxruntime", "onnxscript"):
        if not importlib.util.find_spec(name):
            raise UserError(f"{name} is not installed: pip install -r requirements.txt")


def refuse_files_to_be_cleared(options: argparse.Namespace) -> None:
    """Refuse inputs in output_dir/unfinished_run, which this run empties when it starts."""
    unfinished = (options.output_dir / "unfinished_run").resolve()
    for path in filter(None, (options.checkpoint, options.onnx)):
        if path.resolve().is_relative_to(unfinished):
            raise UserError(f"{path} lies in a folder that this run clears: move it elsewhere first")


def open_checkpoint(options: argparse.Namespace) -> common.Checkpoint | None:
    """The lab's own --checkpoint; None without one, or if it is a plain state dict for --model."""
    if options.checkpoint is None:
        return None
    if options.model and not common.is_checkpoint(options.checkpoint):
        return None
    checkpoint = common.load_checkpoint(options.checkpoint, options.model)
    network = checkpoint.recipe.network
    if options.model and not network.is_custom:
        raise UserError(f"{options.checkpoint} holds the lab's own {network.model}: leave --model out")
    return checkpoint


def open_data(options: argparse.Namespace, checkpoint: common.Checkpoint | None) -> common.Dataset:
    """The data, by default those of the checkpoint; raises UserError if it is for other shapes or classes."""
    if checkpoint:
        options.dataset = options.dataset or checkpoint.dataset
        options.image_size = options.image_size or checkpoint.shape[2]
    data = common.load_data(options)
    if checkpoint and (data.shape, data.classes) != (checkpoint.shape, checkpoint.classes):
        wanted = f"{list(checkpoint.shape)}, {list(checkpoint.classes)}"
        has = f"{list(data.shape)}, {list(data.classes)}"
        raise UserError(f"{options.checkpoint} is for images and classes {wanted}, {data.source} has {has}")
    if checkpoint and data.fingerprint != checkpoint.fingerprint:
        note(f"{options.checkpoint} was trained on other images than those of {data.source}")
    if options.quick:  # test images of all classes, in proportion
        chosen = data.test_labels.argsort(stable=True)[:: max(1, len(data.test_labels) // 2000)]
        data = replace(data, test_images=data.test_images[chosen], test_labels=data.test_labels[chosen])
    return data


def choose_recipe(options: argparse.Namespace, data: common.Dataset, checkpoint: common.Checkpoint | None) -> Recipe:
    """The checkpoint's recipe, or that of the options; raises UserError for a network that cannot be trained."""
    if checkpoint:
        return checkpoint.recipe
    recipe = common.recipe_from(options, CUSTOM if options.model else common.PRESETS[options.preset])
    if options.model and (options.width or options.preset != "small"):
        note("--preset and --width are ignored: they are for the lab's own networks")
    if not (options.model or options.epochs):
        recipe = recipe.replace(epochs=recipe.training.epochs + MORE_EPOCHS)
    if options.quick:
        training = recipe.training
        recipe = recipe.replace(
            epochs=min(2, training.epochs), batch_size=min(128, training.batch_size), width=options.width or 16
        )
    common.check_recipe(recipe, data, images_to_train_on(options, data))
    return recipe


def images_to_train_on(options: argparse.Namespace, data: common.Dataset) -> common.Split:
    """No images are held out for validation: nothing is selected."""
    return common.split_dataset(data, options.images, validation=False)


def work_of_training(options: argparse.Namespace, data: common.Dataset, recipe: Recipe) -> float:
    """Images to train on, in all epochs."""
    return 0 if options.checkpoint else recipe.training.epochs * len(images_to_train_on(options, data).train)


def obtain_model(
    run: common.Run, options: argparse.Namespace, recipe: Recipe, checkpoint: common.Checkpoint | None
) -> nn.Sequential:
    """The network of --checkpoint or a newly trained one, in eval mode; writes model.pth."""
    path = run.folder / "model.pth"
    if checkpoint:
        shutil.copyfile(options.checkpoint, path)
        return checkpoint.model
    split = images_to_train_on(options, run.data)
    model = common.make_model(recipe.network, run.data, split, options.seed)
    if options.checkpoint:  # a plain state dict, see open_checkpoint
        adopt(model, options.checkpoint)
        note(f"images are normalised with mean {split.mean}, std {split.std}")
    else:
        train(run, options, model, recipe.training, split)
    common.save_checkpoint(path, model, run.data, recipe, seed=options.seed)
    return model.cpu().eval()


def train(
    run: common.Run, options: argparse.Namespace, model: nn.Module, training: common.Training, split: common.Split
) -> None:
    """Train on all cores; raises UserError if a loss is not finite."""
    run.progress.stage("training")
    for epoch in common.train_epochs(model, run.data, training, run.runtime, split.train, options.seed):
        run.progress.advance(len(split.train))
        place = f"after epoch {epoch.number} of {training.epochs}"
        run.progress.stage(f"training: loss {epoch.train_loss:.3f} {place}")
        if not epoch.is_finite:
            raise UserError("the training diverged; try another --seed or fewer --epochs")


def adopt(model: nn.Sequential, source: Path) -> None:
    """Load a plain state dict saved by ``torch.save`` into the network behind the normalisation; raises UserError."""
    content = common.read_tensors(source)
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise UserError(f"{source} does not hold a state dict for --model, but a {type(content).__name__}")
    state = {str(key).removeprefix("module."): value for key, value in content.items()}
    try:
        model[1].load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        faults = " ".join(str(error).split())[:300]  # in one line
        raise UserError(f"{source} does not hold a state dict for --model: {faults}") from error


# ================================================================ 2. ONNX files


def fold(model: nn.Sequential) -> nn.Module:
    """A copy in eval mode with BatchNorm folded into convolutions; ``model`` itself if it is not traceable."""
    normalise, network = model
    if isinstance(normalise, common.Normalise) and isinstance(network, common.SmallCNN):
        return fold_small_cnn(normalise, network)
    from torch.fx.experimental.optimization import fuse

    with contextlib.suppress(Exception):  # tracing runs the user's code in ways that it was not written for
        return fuse(model)
    return model


@torch.no_grad()
def fold_small_cnn(normalise: common.Normalise, network: common.SmallCNN) -> nn.Sequential:
    """SmallCNN as convolutions, activations and pooling; normalisation goes into the stem, which has no padding."""
    network = copy.deepcopy(network).eval()
    stem = network.stem
    stem.weight /= normalise.std
    stem.bias = nn.Parameter(-(stem.weight * normalise.mean).sum((1, 2, 3)))
    for weight in network.head.parameters():
        weight.mul_(network.scale)
    layers: list[nn.Module] = [stem, network.activation]
    for block in network.blocks:
        assert isinstance(block, common.Block)
        layers += fold_block(block)
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), network.head)


def fold_block(block: common.Block) -> list[nn.Module]:
    """The layers of a block, BatchNorm folded: its scale is positive, so it commutes with the pooling before it."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    convolution = fuse_conv_bn_eval(block.convolution, block.norm)
    if isinstance(block.pool, nn.Identity):
        return [convolution, block.activation]
    if isinstance(block.activation, nn.ReLU):  # which commutes with pooling, too, and can be fused with the convolution
        return [convolution, block.activation, block.pool]
    return [convolution, block.pool, block.activation]


class InputFormat(NamedTuple):
    """How a file wants its images; they are given as uint8 (N, C, H, W)."""

    dtype: str  # of numpy: floats are in [0, 1]
    batch: int | None  # the only batch size it takes
    channels_last: bool

    @classmethod
    def of(cls, dtype: str, sizes: Sequence[int | str | None], shape: common.Shape) -> InputFormat:
        """From the type and the sizes of a file's input, some of which are free (no int), for images of ``shape``."""
        batch = sizes[0] if sizes and isinstance(sizes[0], int) else None
        channels = shape[0]
        is_nhwc = len(sizes) == 4 and sizes[3] == channels
        return cls(dtype, batch, channels_last=is_nhwc)

    def prepare(self, images: Tensor) -> np.ndarray:
        """Convert images, repeated to a fixed batch."""
        array = images.permute(0, 2, 3, 1).numpy() if self.channels_last else images.numpy()
        array = np.resize(array, (self.batch or len(array), *array.shape[1:]))
        return array if self.dtype == "uint8" else array.astype(self.dtype) / np.array(255, self.dtype)


class OnnxFile:
    """A session of ONNX Runtime for an ONNX file, on the CPU or, as ``device`` cuda or cuda:1, on a GPU."""

    def __init__(self, file: Path | bytes, shape: common.Shape, threads: int = 1, device: str = "cpu") -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # errors are raised anyway
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        provider = "CPUExecutionProvider"
        settings: dict[str, str] = {}
        if device != "cpu":
            ort.preload_dlls()  # CUDA and cuDNN as installed by pip
            provider = "CUDAExecutionProvider"
            settings = {"device_id": str(device_number(device)), "use_tf32": "0"}
        self.session = ort.InferenceSession(file, options, [(provider, settings)])
        if provider not in self.session.get_providers():  # it silently falls back to the CPU
            raise RuntimeError(f"{provider} is not available here")
        wanted = self.session.get_inputs()[0]
        self.input = wanted.name
        self.output = self.session.get_outputs()[0].name
        dtype = {"tensor(double)": "float64", "tensor(uint8)": "uint8"}.get(wanted.type, "float32")
        self.format = InputFormat.of(dtype, wanted.shape, shape)

    def run(self, batch: np.ndarray) -> np.ndarray:
        """Logits of a batch in the file's format."""
        return self.session.run([self.output], {self.input: batch})[0]

    def classify(self, images: Tensor) -> np.ndarray:
        """Logits (N, num_classes) of images, uint8 (N, C, H, W)."""
        parts = images.split(self.format.batch or len(images))
        return np.concatenate([self.run(self.format.prepare(part))[: len(part)] for part in parts])


def device_number(device: str) -> int:
    """The number of a GPU: 1 of cuda:1, 0 of cuda."""
    return torch.device(device).index or 0


class GivenFile(NamedTuple):
    """An ONNX file made elsewhere."""

    path: Path
    batch: int | None  # the only batch size it takes
    is_quantised: bool

    @property
    def name(self) -> str:
        """The file of this run whose place it takes."""
        return "model_int8.onnx" if self.is_quantised else "model.onnx"


def examine(path: Path, data: common.Dataset) -> GivenFile:
    """Try an ONNX file made elsewhere on one image; raises UserError if it cannot be judged."""
    import onnx

    wanted = f"a self-contained ONNX file for images {list(data.shape)}"
    with common.user_error(f"{path} is not {wanted}", Exception):  # the file may provoke anything
        content = path.read_bytes()
        file = OnnxFile(content, data.shape)
        logits = file.classify(data.train_images[:1])
        if logits.shape[1:] != (len(data.classes),) or not np.isfinite(logits).all():
            raise ValueError(f"outputs {logits.shape}, expected finite logits of {len(data.classes)} classes")
        kinds = {node.op_type for node in onnx.load_from_string(content).graph.node}
    is_quantised = not kinds.isdisjoint({"QuantizeLinear", "QLinearConv", "ConvInteger"})
    return GivenFile(path, file.format.batch, is_quantised)


def make_files(run: common.Run, options: argparse.Namespace, model: nn.Sequential, given: GivenFile | None) -> Tensor:
    """Write model.onnx and model_int8.onnx, one of which may be ``given``.

    Returns the calibration images, uint8 (N, C, H, W).
    """
    run.progress.stage("exporting and quantising")
    count = 200 if options.quick else CALIBRATION_IMAGES
    images = run.data.train_images[common.split_dataset(run.data, count, validation=False).train]
    fp32 = run.folder / "model.onnx"
    int8 = run.folder / "model_int8.onnx"
    if given:
        shutil.copyfile(given.path, run.folder / given.name)
    with advice_hidden():
        if not fp32.exists():
            export(model, images, run.data.classes, fp32, is_custom=bool(options.model))
        if not int8.exists():
            quantise_if_possible(images, fp32, int8, may_fail=bool(given or options.model))
    run.progress.advance(WORK_OF_FILES)
    return images


def quantise_if_possible(images: Tensor, source: Path, target: Path, may_fail: bool) -> None:
    """Quantise; networks that are not the lab's (``may_fail``) may have what the quantiser does not know."""
    try:
        quantise(images, source, target)
    except UserError:  # the disk is full
        raise
    except Exception as error:
        if not may_fail:
            raise
        note(f"{source.name} cannot be quantised: {first_line(error)[:200]}")


@contextlib.contextmanager
def advice_hidden() -> Iterator[None]:
    """Hide the advice of exporter and quantiser; their errors are raised anyway."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def export(model: nn.Sequential, images: Tensor, classes: Sequence[str], target: Path, is_custom: bool) -> None:
    """Write the network, folded: float32 images (N, C, H, W) in [0, 1] -> logits, N free.

    Raises UserError if the exporter does not know what a network of the user's (``is_custom``) does.
    """
    import onnx

    example = images[:2].float() / 255  # two images: with one, the batch dimension would become fixed
    folded = fold(model)
    blame = common.user_error("the network cannot be exported to ONNX", Exception)
    with blame if is_custom else contextlib.nullcontext():
        program = torch.onnx.export(
            folded,
            (example,),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch"},),
            dynamo=True,
            verbose=False,
        )
        assert program is not None  # only the deprecated exporter returns nothing
    proto = program.model_proto
    describe(proto, classes, shape_of(images))
    onnx.checker.check_model(proto, full_check=True)
    with common.atomic_path(target) as temporary:
        onnx.save(proto, temporary)


def shape_of(images: Tensor) -> common.Shape:
    """(C, H, W) of images (N, C, H, W)."""
    _, channels, height, width = images.shape
    return channels, height, width


def describe(proto: ModelProto, classes: Sequence[str], shape: common.Shape) -> None:
    """Write into an ONNX file what its reader needs to know, instead of the exporter's stack traces."""
    from onnx import helper

    channels, height, width = shape
    colours = "RGB" if channels == 3 else "grey"
    about = {
        "classes": json.dumps(list(classes), ensure_ascii=False),
        "input_layout": f"NCHW: N x {channels} ({colours}) x {height} x {width}",
        "input_range": "0 (black) to 1 (white), not normalised: the network does that",
        "output": "logits, N x classes",
    }
    helper.set_model_props(proto, about)
    for node in proto.graph.node:
        del node.metadata_props[:]


def quantise(images: Tensor, source: Path, target: Path, keep: str | None = None) -> None:
    """Write the int8 version of an ONNX file: static QDQ, ranges calibrated on ``images``.

    The first convolution (in SmallCNN whitening filters, which amplify rounding) and nodes of type ``keep`` stay fp32.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with common.atomic_path(target) as temporary:
        quant_pre_process(source, temporary, skip_symbolic_shape=True)
        prepared = onnx.load(temporary)
        nodes = prepared.graph.node
        for number, node in enumerate(nodes):
            node.name = node.name or f"node_{number}"  # nodes are excluded by name
        first = [node.name for node in nodes if node.op_type == "Conv"][:1]
        kept = [node.name for node in nodes if node.op_type == keep]
        quantize_static(
            prepared,
            temporary,
            calibration_reader(source, images),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            reduce_range=int8_overflows(),
            nodes_to_exclude=first + kept,
        )
        quantised = onnx.load(temporary)
        properties = {entry.key: entry.value for entry in onnx.load(source).metadata_props}
        onnx.helper.set_model_props(quantised, properties)
        onnx.checker.check_model(quantised, full_check=True)
        onnx.save(quantised, temporary)


def int8_overflows() -> bool:
    """Whether weights must be limited to 7 bits: without VNNI, x86 accumulates int8 products in 16 bits."""
    capabilities = torch.cpu.get_capabilities()
    is_x86 = bool(capabilities.get("sse2"))
    return is_x86 and not (capabilities.get("avx512_vnni") or capabilities.get("avx_vnni"))


def calibration_reader(source: Path, images: Tensor) -> CalibrationDataReader:
    """Feeds ``images`` to ONNX Runtime's calibration, in batches."""
    from onnxruntime.quantization import CalibrationDataReader

    class ImageReader(CalibrationDataReader):
        def __init__(self) -> None:
            self.file = OnnxFile(source, shape_of(images))
            self.parts = iter(images.split(self.file.format.batch or 100))

        def get_next(self) -> dict[str, np.ndarray] | None:
            part = next(self.parts, None)
            return None if part is None else {self.file.input: self.file.format.prepare(part)}

    return ImageReader()


# ================================================================ 3. engines

# An Engine is an entry of the table ENGINES. Its Classifier, loaded in a process of its own (EngineProcess), runs the
# network; an EnginePool is all of these processes in one start. Another engine is another entry and, if no Classifier
# has its runtime, a class.


@dataclass(frozen=True)
class EngineSetup:
    """What the engines' processes need to know of a run."""

    folder: Path  # of the network's files
    scratch: Path  # of what the engines share: the test images, compiled networks, what they write to stderr
    shape: common.Shape  # of an image
    device: str  # of the run: cpu, cuda:1, ...
    threads: int
    model: str | None  # --model, whose checkpoint needs it
    flop: int  # of an image
    batch_sizes: tuple[int, ...]
    min_calls: int
    min_seconds: float

    def device_of(self, engine: Engine) -> str:
        """The device as torch names it."""
        return self.device if engine.device == "cuda" else "cpu"


class Machine(NamedTuple):
    """What decides which engines can be tried."""

    files: frozenset[str]  # that were made
    devices: frozenset[str]  # cpu, cuda
    bf16_devices: frozenset[str]  # those that compute in bf16
    is_quick: bool


@dataclass(frozen=True)
class Engine:
    """A way to run the network."""

    name: str
    classifier: type[Classifier]
    file: str  # of the run's folder
    colour: str  # in every figure
    device: str = "cpu"  # or cuda
    dtype: str = "fp32"  # or bf16, int8
    is_folded: bool = False  # torch's network: BatchNorm is folded into convolutions, in channels_last
    is_resident: bool = False  # images and logits stay on the device

    @property
    def is_exact(self) -> bool:
        """Whether it must reproduce the logits of torch in fp32."""
        return self.dtype == "fp32"

    def is_available(self, machine: Machine) -> bool:
        """Whether it can be tried on this machine."""
        return (
            self.file in machine.files
            and self.device in machine.devices
            and (self.dtype != "bf16" or self.device in machine.bf16_devices)
            and not (self.classifier.is_compiled and machine.is_quick)
            and all(importlib.util.find_spec(name.partition(".")[0]) for name in self.classifier.libraries)
        )


Batch = Any  # whatever a runtime takes
Output = Any  # whatever it gives


class Classifier(ABC):
    """A network loaded by some runtime, in an engine's process: images -> batch -> output -> logits."""

    libraries: ClassVar[Sequence[str]]  # modules to import before the clock starts
    is_compiled = False  # which takes too long for --quick
    warm_up_calls = 1  # before each timing: other engines have used the caches

    @classmethod
    def build(cls, engine: Engine, setup: EngineSetup) -> None:
        """Make files that every start uses, unless they exist. Most have none."""
        return

    @abstractmethod
    def __init__(self, engine: Engine, setup: EngineSetup) -> None:
        """Load the engine's file."""

    @abstractmethod
    def prepare(self, images: Tensor) -> Batch:
        """Convert images, uint8 (N, C, H, W), to a batch as the runtime prefers it; not timed."""

    @abstractmethod
    def run(self, batch: Batch) -> Output:
        """The output of a batch; returns when it is computed."""

    @abstractmethod
    def logits(self, output: Output) -> np.ndarray:
        """An output as float32 (N, num_classes); not timed."""


class Placement(NamedTuple):
    """Where torch keeps a network and its images, and how."""

    device: str
    dtype: torch.dtype
    layout: torch.memory_format

    @classmethod
    def of(cls, engine: Engine, setup: EngineSetup) -> Placement:
        """That of an engine."""
        dtype = torch.bfloat16 if engine.dtype == "bf16" else torch.float32
        layout = torch.channels_last if engine.is_folded else torch.contiguous_format
        return cls(setup.device_of(engine), dtype, layout)


def load_network(engine: Engine, setup: EngineSetup) -> nn.Module:
    """The network of a checkpoint, as the engine has it."""
    place = Placement.of(engine, setup)
    model = common.load_checkpoint(setup.folder / engine.file, setup.model).model
    network = fold(model) if engine.is_folded else model
    return network.to(place.device, place.dtype).to(memory_format=place.layout)


class Torch(Classifier):
    """torch, eager, on the CPU or a GPU."""

    libraries: ClassVar[Sequence[str]] = ("torch.fx.experimental.optimization",)

    def __init__(self, engine: Engine, setup: EngineSetup) -> None:
        self.place = Placement.of(engine, setup)
        self.is_resident = engine.is_resident
        self.network = self.load(engine, setup)

    def load(self, engine: Engine, setup: EngineSetup) -> Callable[[Tensor], Tensor]:
        """What maps images to logits."""
        return load_network(engine, setup)

    def prepare(self, images: Tensor) -> Tensor:
        """On the device only if the engine's images are resident there."""
        batch = (images.float() / 255).contiguous(memory_format=self.place.layout)
        return batch.to(self.place.device, self.place.dtype) if self.is_resident else batch

    @torch.inference_mode()
    def run(self, batch: Tensor) -> Tensor | np.ndarray:
        """Logits in memory or, of resident images, on the device."""
        logits = self.network(batch.to(self.place.device, self.place.dtype))
        if not self.is_resident:
            return logits.float().cpu().numpy()
        torch.cuda.synchronize(self.place.device)
        return logits

    def logits(self, output: Tensor | np.ndarray) -> np.ndarray:
        """On the CPU."""
        return torch.as_tensor(output).float().cpu().numpy()


class CompiledTorch(Torch):
    """torch's Inductor, ahead of time."""

    libraries = ("torch.fx.experimental.optimization", "torch._inductor.package")
    is_compiled = True

    @staticmethod
    def package(engine: Engine, setup: EngineSetup) -> Path:
        """Where the compiled network is."""
        return setup.scratch / f"{engine.name}.pt2"

    @classmethod
    def build(cls, engine: Engine, setup: EngineSetup) -> None:
        """Compile, unless an earlier start did."""
        package = cls.package(engine, setup)
        if package.exists():
            return
        place = Placement.of(engine, setup)
        example = torch.rand(2, *setup.shape).to(place.device, place.dtype).to(memory_format=place.layout)
        free = {0: torch.export.Dim("batch", min=1)}
        with torch.no_grad():
            program = torch.export.export(load_network(engine, setup), (example,), dynamic_shapes=(free,))
            torch._inductor.aoti_compile_and_package(program, package_path=str(package))

    def load(self, engine: Engine, setup: EngineSetup) -> Callable[[Tensor], Tensor]:
        """The compiled network."""
        return torch._inductor.aoti_load_package(str(self.package(engine, setup)))


class GraphTorch(Torch):
    """torch's Inductor with CUDA graphs: it compiles and records in its first calls."""

    is_compiled = True
    warm_up_calls = 3

    def load(self, engine: Engine, setup: EngineSetup) -> Callable[[Tensor], Tensor]:
        """A network that is still to be compiled."""
        return torch.compile(load_network(engine, setup), mode="reduce-overhead", dynamic=False)


class OnnxRuntime(Classifier):
    """ONNX Runtime, on the CPU or a GPU."""

    libraries = ("onnxruntime",)

    def __init__(self, engine: Engine, setup: EngineSetup) -> None:
        self.file = OnnxFile(setup.folder / engine.file, setup.shape, setup.threads, setup.device_of(engine))

    def prepare(self, images: Tensor) -> np.ndarray:
        """In the file's own format."""
        return self.file.format.prepare(images)

    def run(self, batch: np.ndarray) -> np.ndarray:
        """Logits in memory."""
        return self.file.run(batch)

    def logits(self, output: np.ndarray) -> np.ndarray:
        """They are logits already."""
        return output.astype(np.float32)


class ResidentOnnxRuntime(OnnxRuntime):
    """ONNX Runtime whose images and logits stay on a GPU."""

    def __init__(self, engine: Engine, setup: EngineSetup) -> None:
        super().__init__(engine, setup)
        self.place = ("cuda", device_number(setup.device))

    def prepare(self, images: Tensor) -> IOBinding:
        """Images and logits on the device."""
        from onnxruntime import OrtValue

        binding = self.file.session.io_binding()
        array = self.file.format.prepare(images)
        binding.bind_ortvalue_input(self.file.input, OrtValue.ortvalue_from_numpy(array, *self.place))
        binding.bind_output(self.file.output, *self.place)
        return binding

    def run(self, batch: IOBinding) -> IOBinding:
        """The binding, which holds the logits."""
        self.file.session.run_with_iobinding(batch)
        batch.synchronize_outputs()
        return batch

    def logits(self, output: IOBinding) -> np.ndarray:
        """On the CPU."""
        return output.copy_outputs_to_cpu()[0].astype(np.float32)


class OpenVino(Classifier):
    """Intel's OpenVINO, which reads the same files, on the CPU."""

    libraries = ("openvino",)

    def __init__(self, engine: Engine, setup: EngineSetup) -> None:
        import openvino

        core = openvino.Core()
        model = core.read_model(setup.folder / engine.file)
        settings = {
            "INFERENCE_NUM_THREADS": setup.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",  # its default is bf16 where the processor has it
        }
        self.network = core.compile_model(model, "CPU", settings)
        wanted = model.inputs[0]
        sizes = [size.get_length() if size.is_static else None for size in wanted.partial_shape]
        self.format = InputFormat.of(wanted.element_type.to_dtype().name, sizes, setup.shape)

    def prepare(self, images: Tensor) -> np.ndarray:
        """In the file's own format."""
        return self.format.prepare(images)

    def run(self, batch: np.ndarray) -> np.ndarray:
        """Logits in memory."""
        return self.network(batch)[0]

    def logits(self, output: np.ndarray) -> np.ndarray:
        """They are logits already."""
        return output.astype(np.float32)


BASELINE = Engine("torch_fp32", Torch, "model.pth", "#000000")
CONVERTED = Engine("onnx_fp32", OnnxRuntime, "model.onnx", "#0072B2")
QUANTISED = Engine("onnx_int8", OnnxRuntime, "model_int8.onnx", "#D55E00", dtype="int8")
ENGINES = (
    BASELINE,
    Engine("torch_tuned_fp32", Torch, "model.pth", "#8C8C8C", is_folded=True),
    Engine("torch_bf16", Torch, "model.pth", "#CC79A7", dtype="bf16", is_folded=True),
    Engine("torch_compiled", CompiledTorch, "model.pth", "#E69F00", is_folded=True),
    Engine("torch_compiled_bf16", CompiledTorch, "model.pth", "#009E73", dtype="bf16", is_folded=True),
    CONVERTED,
    QUANTISED,
    Engine("openvino_fp32", OpenVino, "model.onnx", "#882255"),
    Engine("openvino_int8", OpenVino, "model_int8.onnx", "#C9B037", dtype="int8"),
    Engine("torch_cuda", Torch, "model.pth", "#56B4E9", "cuda", is_folded=True),
    Engine("torch_cuda_resident", Torch, "model.pth", "#332288", "cuda", is_folded=True, is_resident=True),
    Engine("torch_cuda_bf16", Torch, "model.pth", "#AA4499", "cuda", "bf16", is_folded=True, is_resident=True),
    Engine("torch_cuda_compiled", GraphTorch, "model.pth", "#999933", "cuda", is_folded=True, is_resident=True),
    Engine("onnx_cuda", OnnxRuntime, "model.onnx", "#F0E442", "cuda"),
    Engine("onnx_cuda_resident", ResidentOnnxRuntime, "model.onnx", "#44AA99", "cuda", is_resident=True),
)


def available_engines(run: common.Run, options: argparse.Namespace) -> list[Engine]:
    """The engines of the table that can be tried here."""
    device = run.runtime.device
    devices = {"cpu": "cpu"} | ({"cuda": device} if device.startswith("cuda") else {})
    machine = Machine(
        files=frozenset(path.name for path in run.folder.iterdir()),
        devices=frozenset(devices),
        bf16_devices=frozenset(kind for kind, name in devices.items() if common.has_native_bf16(name)),
        is_quick=options.quick,
    )
    return [engine for engine in ENGINES if engine.is_available(machine)]


@contextlib.contextmanager
def scratch_folder(output: Path) -> Iterator[Path]:
    """A folder beside the results that is removed in the end or, if this run is killed, by the next one."""
    folder = output.resolve() / ".engines"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def set_up(
    run: common.Run,
    options: argparse.Namespace,
    data: common.Dataset,
    model: nn.Sequential,
    given: GivenFile | None,
    scratch: Path,
) -> EngineSetup:
    """Decide what is timed, and share the test images with the engines."""
    only_test = replace(data, train_images=data.train_images[:0].clone(), train_labels=data.train_labels[:0].clone())
    common.share_dataset(scratch / "images.pt", only_test)
    flop = count_flop(model, data.test_images[:1])
    sizes = tuple(size for size in BATCH_SIZES if size == 1 or size * flop <= MAX_CALL_FLOP)
    if given and given.batch:
        sizes = (given.batch,)
    elif len(sizes) < len(BATCH_SIZES):
        note(f"for a network of this size, batches above {sizes[-1]} are not timed")
    return EngineSetup(
        folder=run.folder.resolve(),
        scratch=scratch,
        shape=data.shape,
        device=run.runtime.device,
        threads=options.threads,
        model=options.model,
        flop=flop,
        batch_sizes=sizes,
        min_calls=MIN_CALLS,
        min_seconds=MIN_SECONDS / 10 if options.quick else MIN_SECONDS,
    )


def count_flop(model: nn.Module, image: Tensor) -> int:
    """Floating-point operations of convolutions and matrix products for one image, uint8 (1, C, H, W)."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(image.float() / 255)
    return counter.get_total_flops()


# What the parent asks an engine's process, and what it answers.
class Load(NamedTuple):
    """Load the network and run it once; the answer is ``Loaded``."""


class Loaded(NamedTuple):
    """Milliseconds of loading and of the first call; private bytes that both have added (nan if unknown)."""

    load_ms: float
    first_call_ms: float
    added_rss_bytes: float


class Classify(NamedTuple):
    """Classify the test images; the answer is float32 logits (N, num_classes)."""


class Time(NamedTuple):
    """Time calls of this batch size; the answer is a ``Timing``."""

    batch_size: int


class Timing(NamedTuple):
    """Latency of calls, in milliseconds: percentiles and mean; number of calls."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    calls: int


Request = Load | Classify | Time
Reply = Loaded | np.ndarray | Timing


def serve(data: common.Dataset, _: common.Runtime, engine: Engine, setup: EngineSetup) -> common.Conversation:
    """An engine's process: import, build what later starts use, too, then answer requests for ever."""
    redirect_stderr(setup.scratch / f"{engine.name}.stderr")
    process = EngineProcess(engine, setup, data.test_images)
    with process.blame():
        for name in engine.classifier.libraries:
            importlib.import_module(name)
        if setup.model:
            importlib.import_module(setup.model.partition(":")[0])
        if engine.device == "cuda":
            torch.zeros(1, device=setup.device)  # its start is not the engine's
        engine.classifier.build(engine, setup)
    request = yield  # ready for the first one
    while True:
        request = yield process.answer(request)


def redirect_stderr(path: Path) -> None:
    """What this process and its libraries write to stderr goes to a file from now on."""
    with path.open("w") as file:
        os.dup2(file.fileno(), 2)


class EngineProcess:
    """What an engine's process does when it is asked."""

    def __init__(self, engine: Engine, setup: EngineSetup, images: Tensor) -> None:
        self.engine = engine
        self.setup = setup
        self.images = images  # uint8 (N, C, H, W)
        self.batches: dict[int, Iterator[Batch]] = {}  # by size: prepared, in an endless cycle

    def blame(self) -> contextlib.AbstractContextManager[None]:
        """Errors in the block are the engine's: it cannot be used here. A runtime may raise anything."""
        return common.user_error(f"{self.engine.name} cannot run {self.engine.file}", Exception)

    def answer(self, request: Request) -> Reply:
        """Do what is asked."""
        match request:
            case Load():
                return self.load()
            case Classify():
                return self.classify()
            case Time(batch_size):
                return self.time(batch_size)

    def load(self) -> Loaded:
        """Load the network; the smallest batch is the first call."""
        few = self.images[: self.setup.batch_sizes[0]]
        memory = private_bytes()
        with self.blame():
            start = time.perf_counter()
            self.classifier = self.engine.classifier(self.engine, self.setup)
            loaded = time.perf_counter()
            batch = self.classifier.prepare(few)
            called = time.perf_counter()
            self.classifier.run(batch)
            end = time.perf_counter()
        return Loaded(1000 * (loaded - start), 1000 * (end - called), private_bytes() - memory)

    def classify(self) -> np.ndarray:
        """Logits of all test images, in batches of the largest size."""
        outputs = []
        for part in self.images.split(self.setup.batch_sizes[-1]):
            with self.blame():
                output = self.classifier.logits(self.classifier.run(self.classifier.prepare(part)))
            outputs.append(output[: len(part)])  # to a fixed batch size, images are repeated
        return np.concatenate(outputs)

    def time(self, batch_size: int) -> Timing:
        """Time calls: at least so many, and for at least so many seconds, as the setup says."""
        batches = self.prepared(batch_size)
        latencies: list[float] = []
        with self.blame():
            for _ in range(self.classifier.warm_up_calls):
                self.classifier.run(next(batches))
            end = time.perf_counter() + self.setup.min_seconds
            while len(latencies) < self.setup.min_calls or time.perf_counter() < end:
                batch = next(batches)
                start = time.perf_counter()
                self.classifier.run(batch)
                latencies.append(1000 * (time.perf_counter() - start))
        p50, p90, p99 = np.percentile(latencies, (50, 90, 99)).tolist()
        return Timing(p50, p90, p99, float(np.mean(latencies)), len(latencies))

    def prepared(self, batch_size: int) -> Iterator[Batch]:
        """Eight batches of test images, over and over."""
        if batch_size not in self.batches:
            index = torch.arange(8 * batch_size) % len(self.images)
            parts = self.images[index].split(batch_size)
            with self.blame():
                self.batches[batch_size] = itertools.cycle([self.classifier.prepare(part) for part in parts])
        return self.batches[batch_size]


def private_bytes() -> float:
    """Resident bytes of this process without mapped files; nan on systems other than Linux."""
    with contextlib.suppress(OSError, IndexError):
        return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])
    return np.nan


class EnginePool:
    """One process per engine, started and loaded on entering.

    An engine that fails is reported and left out; without torch and ONNX Runtime there is nothing to compare.
    """

    def __init__(self, run: common.Run, setup: EngineSetup, engines: Sequence[Engine]) -> None:
        self.run = run
        self.setup = setup
        self.engines = list(engines)
        self.loaded: dict[Engine, Loaded] = {}
        # Device and dtype are the engine's own; "fp32" leaves the allocator as it is in any other program.
        runtime = common.Runtime("cpu", "fp32", setup.threads)
        images = setup.scratch / "images.pt"
        self.workers = {engine: common.Workers(1, runtime, images) for engine in engines}
        self.threads = ThreadPoolExecutor(len(engines))
        # One endless conversation with ``serve`` in each process: next() spawns the process and returns when serve is
        # ready, at its first yield; send(request) returns the reply, which serve yields.
        self.conversations = {engine: self.workers[engine].run(serve, engine, setup) for engine in engines}

    def __enter__(self) -> EnginePool:
        try:
            with environment_of_engines(self.setup.scratch):
                self.run.progress.stage("loading the engines")
                self._start_all()
                for engine in list(self.engines):  # one at a time, because loading is timed
                    self.loaded |= self.ask(Load(), [engine])
        except BaseException:
            self.close()
            raise
        return self

    def _start_all(self) -> None:
        """Start all processes; returns when they have imported and built what they need."""
        self._at_once({engine: functools.partial(next, self.conversations[engine]) for engine in self.engines})

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes. May be called twice."""
        # In this order: killing frees the threads that wait for a reply; a generator in which a thread waits cannot be
        # closed.
        for workers in self.workers.values():
            workers.stop()
        self.threads.shutdown()
        for conversation in self.conversations.values():
            with contextlib.suppress(common.WorkerDied):  # a killed process cannot be told to stop
                conversation.close()

    def ask(self, request: Request, engines: Sequence[Engine] | None = None) -> dict[Engine, Any]:
        """The replies of these engines (default: of all that have not failed), which work at the same time."""
        asked = [engine for engine in self.engines if engines is None or engine in engines]
        return self._at_once({engine: functools.partial(self.conversations[engine].send, request) for engine in asked})

    def _at_once(self, calls: Mapping[Engine, Callable[[], Any]]) -> dict[Engine, Any]:
        """What the calls return, by engine; those that fail or take too long are left out."""
        futures = {engine: self.threads.submit(call) for engine, call in calls.items()}
        wait(futures.values(), timeout=PATIENCE)
        replies = {}
        for engine, future in futures.items():
            try:
                if not future.done():
                    self.workers[engine].stop()
                    raise UserError(f"{engine.name} did not answer within {PATIENCE} s")
                replies[engine] = future.result()
            except UserError as error:
                self._leave_out(engine, error)
        return replies

    def _leave_out(self, engine: Engine, error: UserError) -> None:
        reason = first_line(error)
        if isinstance(error, common.WorkerDied):
            reason = f"{reason}{self._last_words(engine)}"
        if engine.name not in reason:  # blame() and timeouts name it already
            reason = f"{engine.name} cannot run {engine.file}: {reason}"
        if engine in (BASELINE, CONVERTED):
            raise UserError(reason) from error
        self.engines.remove(engine)
        note(f"{reason}; it is left out")

    def _last_words(self, engine: Engine) -> str:
        """The last line that a dead process wrote to stderr, if any."""
        with contextlib.suppress(OSError):
            text = (self.setup.scratch / f"{engine.name}.stderr").read_text(errors="replace")
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            return f"; its last words: {lines[-1]}" if lines else ""
        return ""


@contextlib.contextmanager
def environment_of_engines(scratch: Path) -> Iterator[None]:
    """Environment variables for the processes that are started in the block."""
    wanted = {
        "OMP_WAIT_POLICY": "PASSIVE",  # whoever waits sleeps, as in ONNX Runtime
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TMPDIR": str(scratch),  # killed engines leave unpacked networks there
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no helper processes that outlive an engine
        # Killed engines leave semaphores, about which the tracker would warn.
        "PYTHONWARNINGS": ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker"])),
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# ================================================================ 4. quality


@dataclass(frozen=True)
class Quality:
    """How an engine classifies the test images, compared with torch in fp32; and the verdict on that."""

    accuracy: float
    class_accuracy: tuple[float, ...]  # nan: no test image of that class
    agreement: float  # share of images with the same label
    max_abs_logit_diff: float
    drop: Estimate  # of accuracy, in points, paired over the images
    lost_images: int  # right before, wrong now
    won_images: int
    mcnemar_p: float  # exact, of lost against won
    size_bytes: int  # of the engine's file
    verdict: str = "accepted"  # or refused, or undecided: whether it loses more than is allowed
    reason: str = ""  # of a refusal


def classify(run: common.Run, pool: EnginePool) -> dict[Engine, np.ndarray]:
    """The logits of all engines for the test images; raises UserError if those of torch are not finite."""
    run.progress.stage("classifying the test images")
    logits = pool.ask(Classify())
    if not np.isfinite(logits[BASELINE]).all():
        raise UserError("the network itself gives logits that are not finite for some test images")
    run.progress.advance(WORK_OF_CHECKS)
    return logits


def judge(
    run: common.Run, options: argparse.Namespace, logits: Mapping[Engine, np.ndarray], data: common.Dataset
) -> dict[Engine, Quality]:
    """Measure and judge all engines; writes accuracy.csv."""
    labels = data.test_labels.numpy()
    qualities = {}
    for engine, own in logits.items():
        size = (run.folder / engine.file).stat().st_size
        quality = measure_quality(own, logits[BASELINE], labels, len(data.classes), size)
        if engine.is_exact:
            qualities[engine] = judge_exact(engine, quality, float(np.abs(logits[BASELINE]).max()))
        else:
            qualities[engine] = judge_approximate(engine, quality, options.max_int8_drop)
    run.write_table("accuracy.csv", accuracy_table(qualities, data.classes))
    return qualities


def measure_quality(
    logits: np.ndarray, baseline: np.ndarray, labels: np.ndarray, num_classes: int, size_bytes: int
) -> Quality:
    """Compare ``logits`` (N, num_classes) with those of torch in fp32 and with the true ``labels`` (N,)."""
    from scipy import stats

    right = logits.argmax(1) == labels
    before = baseline.argmax(1) == labels
    lost = int((before & ~right).sum())
    won = int((right & ~before).sum())
    drop = common.interval(100.0 * before - 100.0 * right)
    if lost + won == 0:  # the rule of three: an event not seen in n images has a rate of at most 3 / n
        drop = drop._replace(low=-300 / len(labels), high=300 / len(labels))
    by_class = [right[labels == label] for label in range(num_classes)]
    return Quality(
        accuracy=float(right.mean()),
        class_accuracy=tuple(float(mine.mean()) if len(mine) else np.nan for mine in by_class),
        agreement=float((logits.argmax(1) == baseline.argmax(1)).mean()),
        max_abs_logit_diff=float(np.abs(logits - baseline).max()),
        drop=drop,
        lost_images=lost,
        won_images=won,
        mcnemar_p=float(stats.binomtest(lost, max(1, lost + won)).pvalue),
        size_bytes=size_bytes,
    )


def judge_exact(engine: Engine, quality: Quality, largest_logit: float) -> Quality:
    """Refuse an engine that does not reproduce the logits."""
    allowed = LOGIT_TOLERANCE * largest_logit
    difference = quality.max_abs_logit_diff  # or nan
    if difference <= allowed and quality.agreement >= MIN_AGREEMENT:
        return quality
    reason = (
        f"{engine.name} ({engine.file}) is not the network of model.pth: its logits differ by up to {difference:.2g} "
        f"(allowed: {allowed:.2g}), {100 * quality.agreement:.2f} % of its labels agree"
    )
    return replace(quality, verdict="refused", reason=reason)


def judge_approximate(engine: Engine, quality: Quality, limit: float) -> Quality:
    """Refuse an engine if its whole interval lies beyond the ``limit`` (points of accuracy)."""
    drop = quality.drop
    if not np.isfinite(quality.max_abs_logit_diff):
        reason = f"{engine.name} ({engine.file}) gives logits that are not finite"
        return replace(quality, verdict="refused", reason=reason)
    if drop.low > limit:
        loss = f"{drop.mean:.2f} points of accuracy [{drop.low:.2f}, {drop.high:.2f}]"
        reason = f"{engine.name} ({engine.file}) loses {loss}, more than the {limit:g} allowed"
        return replace(quality, verdict="refused", reason=reason)
    return replace(quality, verdict="undecided" if drop.high > limit else "accepted")


def accuracy_table(qualities: Mapping[Engine, Quality], classes: Sequence[str]) -> pd.DataFrame:
    """accuracy.csv: a row per class and one for all, a column per engine."""
    import pandas as pd

    names = [SHORT_NAMES.get(name, name) for name in classes]
    columns = {engine.name: [*quality.class_accuracy, quality.accuracy] for engine, quality in qualities.items()}
    return pd.DataFrame({"class": [*names, "all"], **columns})


def explain_int8(
    run: common.Run, images: Tensor, qualities: Mapping[Engine, Quality], given: GivenFile | None
) -> str | None:
    """If our int8 file was refused, name the node type to blame: the one that helps most when kept in fp32."""
    import onnx

    was_refused = QUANTISED in qualities and qualities[QUANTISED].verdict == "refused"
    if not was_refused or (given and given.is_quantised):
        return None
    run.progress.stage("finding the cause of the int8 loss")
    few = images[:200]
    source = run.folder / "model.onnx"
    trial = run.folder / "trial.onnx"
    labels = OnnxFile(source, run.data.shape).classify(few).argmax(1)
    unchanged = {}  # percent of labels that int8 does not change, by node type left in fp32; None: no type is left
    for kind in [None, *sorted({node.op_type for node in onnx.load(source).graph.node})]:
        with contextlib.suppress(Exception), advice_hidden():  # only a hint
            quantise(few, source, trial, kind)
            unchanged[kind] = 100 * (OnnxFile(trial, run.data.shape).classify(few).argmax(1) == labels).mean()
        trial.unlink(missing_ok=True)
    if None not in unchanged:
        return None
    plain = unchanged.pop(None)
    best = max(unchanged, key=unchanged.__getitem__, default=None)
    if best is None or unchanged[best] - plain <= (100 - plain) / 2:  # it restores at most half of the labels
        return f"No type of nodes explains most of the accuracy loss of {QUANTISED.name}."
    figures = (
        f"{plain:.0f} % of {len(few)} training images keep their label, {unchanged[best]:.0f} % with these in fp32"
    )
    return f"The accuracy loss of {QUANTISED.name} is mainly due to its {best} nodes: {figures}."


# ================================================================ 5. speed


@dataclass(frozen=True)
class Measurement:
    """One engine's timing in one round: a row of latency.csv."""

    engine: Engine
    batch_size: int
    threads: int
    start: int
    round: int
    loaded: Loaded
    timing: Timing

    def row(self) -> dict[str, object]:
        """Its values by column."""
        return {
            "engine": self.engine.name,
            "batch_size": self.batch_size,
            "threads": self.threads,
            "start": self.start,
            "round": self.round,
            **self.loaded._asdict(),
            **self.timing._asdict(),
        }


class Timings(NamedTuple):
    """All measurements of complete rounds, and what ended them early."""

    measurements: list[Measurement]
    interruption: KeyboardInterrupt | UserError | None

    def table(self) -> pd.DataFrame:
        """latency.csv."""
        import pandas as pd

        return pd.DataFrame([measurement.row() for measurement in self.measurements])


def work_of_timing(options: argparse.Namespace) -> float:
    """In the progress bar's unit."""
    return options.starts * WORK_OF_START


def time_engines(
    run: common.Run, options: argparse.Namespace, pool: EnginePool, qualities: Mapping[Engine, Quality]
) -> Timings:
    """Time all engines that were not refused, in several starts of all processes; ``pool`` is the first.

    Writes latency.csv after every round.
    If model.onnx itself was refused, nothing is timed.
    """
    accepted = [engine for engine, quality in qualities.items() if quality.verdict != "refused"]
    measurements: list[Measurement] = []
    if CONVERTED not in accepted:
        return Timings(measurements, None)
    try:
        with contextlib.closing(pools_of_starts(run, pool, accepted, options.starts)) as pools:
            for start, running in enumerate(pools, 1):
                for number in range(1, options.rounds + 1):
                    run.progress.stage(f"timing, start {start} of {options.starts}, round {number}")
                    shuffler = np.random.default_rng([options.seed, start, number])
                    measurements += time_round(running, accepted, shuffler, start, number)
                    run.write_table("latency.csv", Timings(measurements, None).table())
                    run.progress.advance(WORK_OF_START / options.rounds)
    except KeyboardInterrupt as error:
        return Timings(measurements, error)
    except UserError as error:
        if not measurements:
            raise
        return Timings(measurements, error)
    return Timings(measurements, None)


def pools_of_starts(run: common.Run, first: EnginePool, engines: Sequence[Engine], count: int) -> Generator[EnginePool]:
    """``first``, then new processes for every further start; only one pool runs at a time."""
    yield first
    first.close()
    for _ in range(count - 1):
        with EnginePool(run, first.setup, engines) as pool:
            yield pool


def time_round(
    pool: EnginePool, engines: Sequence[Engine], shuffler: np.random.Generator, start: int, number: int
) -> list[Measurement]:
    """Time each engine once at every batch size, in random order."""
    found = []
    for size in pool.setup.batch_sizes:
        for position in shuffler.permutation(len(engines)).tolist():
            for engine, timing in pool.ask(Time(size), [engines[position]]).items():
                loaded = pool.loaded[engine]
                found.append(Measurement(engine, size, pool.setup.threads, start, number, loaded, timing))
    return found


@dataclass(frozen=True)
class Speed:
    """Latency of one engine at one batch size: geometric means over starts and rounds of percentiles and means."""

    engine: Engine
    batch_size: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    speedups: dict[str, Estimate]  # times as fast as the engines of SPEEDUPS, by key; intervals are over the starts

    @property
    def images_per_second(self) -> float:
        """The throughput of calls one after another."""
        return 1000 * self.batch_size / self.mean_ms


def find_speeds(timings: Timings) -> list[Speed]:
    """The speeds of all engines that took part in every round.

    Averages on the logarithmic scale, over the rounds of a start, then over the starts.
    """
    if not timings.measurements:
        return []
    frame = timings.table()
    rows = frame["engine"].value_counts()
    frame = frame[frame["engine"].map(rows) == rows.max()]  # no engine that died in between
    metrics = ["p50_ms", "p90_ms", "p99_ms", "mean_ms"]
    logs = np.log(frame.set_index(["engine", "batch_size", "start"])[metrics])
    by_start = logs.groupby(level=["engine", "batch_size", "start"]).mean()
    means = np.exp(by_start.groupby(level=["engine", "batch_size"]).mean())
    log_p50 = by_start["p50_ms"].unstack("start")  # rows: engine and batch size; columns: starts
    speeds = []
    for engine in ENGINES:
        for size in sorted(frame.loc[frame["engine"] == engine.name, "batch_size"].unique()):
            own = log_p50.loc[(engine.name, size)]
            speedups = {}
            for key, rival in SPEEDUPS.items():
                if (rival, size) in log_p50.index:
                    speedups[key] = ratio_of(log_p50.loc[(rival, size)] - own)
            latencies = means.loc[(engine.name, size)].to_dict()
            speeds.append(Speed(engine, int(size), **latencies, speedups=speedups))
    return speeds


def ratio_of(logs: pd.Series) -> Estimate:
    """The geometric mean of ratios given by their logarithms, with its interval."""
    found = common.interval(logs.to_numpy())
    if not found.is_bounded:  # summary.json would show exp(-inf) as a lower bound of 0
        return found._replace(mean=np.exp(found.mean))
    return found._replace(mean=np.exp(found.mean), low=np.exp(found.low), high=np.exp(found.high))


# ================================================================ 6. results, in words and in numbers


@dataclass(frozen=True)
class Results:
    """All that a run has found."""

    options: argparse.Namespace
    data: common.Dataset
    setup: EngineSetup
    qualities: dict[Engine, Quality]
    int8_cause: str | None  # why int8 was refused
    timings: Timings
    speeds: list[Speed]

    @property
    def faults(self) -> list[str]:
        """Why exact engines were refused: something is wrong."""
        exact = [quality for engine, quality in self.qualities.items() if engine.is_exact]
        return [quality.reason for quality in exact if quality.verdict == "refused"]

    @property
    def completed_starts(self) -> int:
        """Those of which at least one round was timed."""
        return len({measurement.start for measurement in self.timings.measurements})

    @property
    def end_sizes(self) -> list[int]:
        """The smallest and the largest batch size that were timed."""
        sizes = {speed.batch_size for speed in self.speeds}
        return sorted({min(sizes), max(sizes)}) if sizes else []

    @property
    def where(self) -> str:
        """Data, numbers and whether the run is complete, for titles."""
        images = f"{self.data.source}, {len(self.data.test_labels):,} test images"
        interrupted = ", INTERRUPTED" if self.timings.interruption else ""
        return f"{images}, {self.completed_starts} start(s){interrupted}"

    def speeds_at(self, batch_size: int) -> dict[Engine, Speed]:
        """All engines' speeds at a batch size."""
        return {speed.engine: speed for speed in self.speeds if speed.batch_size == batch_size}

    def findings(self) -> list[str]:
        """What was found, in sentences."""
        words = [quality_in_words(*item, self.options.max_int8_drop) for item in self.qualities.items()]
        cause = [self.int8_cause] if self.int8_cause else []
        return [*filter(None, words), *cause, *speeds_in_words(self)]


def quality_in_words(engine: Engine, quality: Quality, limit: float) -> str | None:
    """What to say of an engine's quality; nothing of exact engines that torch itself runs."""
    if quality.verdict == "refused":
        return f"FAILED: {quality.reason}; its speed is not quoted."
    if not engine.is_exact:
        drop = quality.drop
        gain = Estimate(0 - drop.mean, 0 - drop.high, 0 - drop.low, drop.p, drop.n)  # no negative zero
        unsure = f"; UNDECIDED whether it loses more than {limit:g}" if quality.verdict == "undecided" else ""
        change = f"{gain.text('points', '+.2f')}, McNemar's p {quality.mcnemar_p:.2g}"
        size = f"its file has {quality.size_bytes / 1e6:.2f} MB"
        return f"{engine.name} changes the accuracy by {change}; {size}{unsure}."
    if engine.file != BASELINE.file:
        images = quality.drop.n
        same = round(quality.agreement * images)
        difference = f"max |Δlogit| {quality.max_abs_logit_diff:.1g}"
        return f"{engine.name} gives the same label as torch on {same:,} of {images:,} images ({difference})."
    return None


def speeds_in_words(results: Results) -> list[str]:
    """The speed-ups at the smallest and largest batch."""
    words = []
    for size in results.end_sizes:
        speeds = results.speeds_at(size)
        for engine in (CONVERTED, QUANTISED):
            if engine in speeds:
                words += [speedup_in_words(speeds[engine], key) for key in speeds[engine].speedups]
        fastest = min(speeds.values(), key=lambda speed: speed.p50_ms)
        words.append(f"The fastest engine at batch {size} is {fastest.engine.name}.")
    return words


def speedup_in_words(speed: Speed, key: str) -> str:
    """One speed-up; no difference is claimed if its interval includes 1."""
    ratio = speed.speedups[key]
    claim = "not shown to differ from"
    if ratio.low > 1:
        claim = "faster than"
    elif ratio.high < 1:
        claim = "SLOWER than"
    times = ratio.text("times as fast") if ratio.is_bounded else f"{ratio.mean:.2f} times as fast (of one start)"
    return f"At batch {speed.batch_size} {speed.engine.name} is {claim} {SPEEDUPS[key]}: {times}."


def summarise(results: Results) -> dict[str, object]:
    """The content of summary.json."""
    return {
        "task": "task4",
        "threads": results.options.threads,
        "test_pictures": len(results.data.test_labels),
        "flop_per_picture": results.setup.flop,
        "interrupted": results.timings.interruption is not None,
        "starts": results.completed_starts,
        "rounds": results.options.rounds,
        "engines": {engine.name: summarise_engine(results, engine) for engine in results.qualities},
        "verdict": results.findings(),
        "faults": results.faults,
    }


def summarise_engine(results: Results, engine: Engine) -> dict[str, object]:
    """One engine's entry in summary.json."""
    quality = results.qualities[engine]
    facts: dict[str, object] = {
        "accuracy": quality.accuracy,
        "class_accuracy": quality.class_accuracy,
        "agreement": quality.agreement,
        "max_abs_logit_diff": quality.max_abs_logit_diff,
        "exact": engine.is_exact,
        "refused": quality.reason or None,
        "undecided": quality.verdict == "undecided",
        "accuracy_drop": quality.drop.mean,
        "accuracy_drop_ci_low": quality.drop.low,
        "accuracy_drop_ci_high": quality.drop.high,
        "lost_images": quality.lost_images,
        "won_images": quality.won_images,
        "mcnemar_p": quality.mcnemar_p,
        "size_bytes": quality.size_bytes,
        "batch": {},
    }
    mine = [speed for speed in results.speeds if speed.engine == engine]
    if mine:
        facts |= median_loaded(results.timings, engine)._asdict()
        facts["batch"] = {str(speed.batch_size): summarise_speed(speed) for speed in mine}
    return facts


def median_loaded(timings: Timings, engine: Engine) -> Loaded:
    """The medians over the starts."""
    loads = {
        measurement.start: measurement.loaded for measurement in timings.measurements if measurement.engine == engine
    }
    return Loaded(*np.median(list(loads.values()), axis=0).tolist())


def summarise_speed(speed: Speed) -> dict[str, float]:
    """One batch size of an engine's entry."""
    facts = {
        "p50_ms": speed.p50_ms,
        "p90_ms": speed.p90_ms,
        "p99_ms": speed.p99_ms,
        "mean_ms": speed.mean_ms,
        "images_per_second": speed.images_per_second,
    }
    for key, ratio in speed.speedups.items():
        facts |= {key: ratio.mean, f"{key}_ci_low": ratio.low, f"{key}_ci_high": ratio.high}
    return facts


def quality_table(results: Results) -> pd.DataFrame:
    """Accuracy, agreement, size and cost of loading: a row per engine."""
    import pandas as pd

    rows = {}
    for engine, quality in results.qualities.items():
        timed = any(speed.engine == engine for speed in results.speeds)
        loaded = median_loaded(results.timings, engine) if timed else Loaded(np.nan, np.nan, np.nan)
        rows[engine.name] = {
            "accuracy": quality.accuracy,
            "agreement": quality.agreement,
            "max_abs_logit_diff": quality.max_abs_logit_diff,
            "file_mb": quality.size_bytes / 1e6,
            "load_ms": loaded.load_ms,
            "first_call_ms": loaded.first_call_ms,
            "added_mb": loaded.added_rss_bytes / 1e6,
        }
    return pd.DataFrame.from_dict(rows, orient="index").map("{:.4g}".format)


def speed_tables(results: Results) -> dict[str, pd.DataFrame]:
    """Latency and speed-ups by title: a row per engine, a column per batch size."""
    import pandas as pd

    def table(text: Mapping[tuple[str, int], str]) -> pd.DataFrame:
        cells = pd.Series(text, pd.MultiIndex.from_tuples(text, names=["engine", "batch_size"]))
        return cells.unstack(sort=False)

    if not results.speeds:
        return {}
    tables = {"p50, ms": table({(s.engine.name, s.batch_size): f"{s.p50_ms:.3g}" for s in results.speeds})}
    for key in ("speedup_over_tuned", "speedup"):
        ratios = {(s.engine.name, s.batch_size): s.speedups[key] for s in results.speeds if key in s.speedups}
        if ratios:
            texts = {
                place: ratio.text() if ratio.is_bounded else f"{ratio.mean:.2f}" for place, ratio in ratios.items()
            }
            tables[f"times as fast as {SPEEDUPS[key]} [95 %]"] = table(texts)
    return tables


def print_results(results: Results) -> None:
    """Print accuracies and times in the form of the course's original report, then tables and findings."""
    for engine in (BASELINE, CONVERTED, QUANTISED):
        if engine in results.qualities:
            print_classes(results, engine)
    for title, table in {"quality": quality_table(results), **speed_tables(results)}.items():
        print(f"\n{title}\n{table.to_string()}")
    print()
    for sentence in results.findings():
        print(textwrap.fill(f"- {sentence}", 99, subsequent_indent="  "))


def print_classes(results: Results, engine: Engine) -> None:
    """Accuracy by class, then the time of a call."""
    print(f"\n{engine.name}:")
    for name, accuracy in zip(results.data.classes, results.qualities[engine].class_accuracy, strict=True):
        print(f"Accuracy for class: {SHORT_NAMES.get(name, name)} is {100 * accuracy:.1f} %")
    if results.speeds:
        speeds = results.speeds_at(results.end_sizes[0])
        if engine in speeds:
            print(f"Time, ms:  {speeds[engine].p50_ms:.4g}")


def write_report(run: common.Run, results: Results) -> list[str]:
    """The paragraphs of report.md."""
    rounds = f"{results.options.rounds} round(s) per start"
    setting = f"{results.where}, {rounds}, {results.options.threads} thread(s) per engine"
    verdict = "\n".join(f"- {sentence}" for sentence in results.findings())
    paragraphs = ["# Task 4: what does ONNX buy?", setting, verdict]
    for title, table in {"quality": quality_table(results), **speed_tables(results)}.items():
        paragraphs += [f"**{title}**", table.to_markdown(disable_numparse=True)]
    paragraphs.append("## Figures")
    for name, caption in CAPTIONS.items():
        if (run.folder / f"{name}.png").exists():
            paragraphs.append(f"![{name}]({name}.png)\n\n*{caption}*")
    return [*paragraphs, "## Protocol and limits", PROTOCOL, LIMITS]


# ================================================================ 7. figures


def draw_disagreements(run: common.Run, data: common.Dataset, logits: Mapping[Engine, np.ndarray]) -> None:
    """Show test images whose label int8 changes or, if there are none, those nearest to a decision boundary."""
    import pandas as pd

    engine = QUANTISED if QUANTISED in logits else CONVERTED
    ordered = np.sort(logits[BASELINE], axis=1)
    labels = {
        "true": data.test_labels.numpy(),
        "torch": logits[BASELINE].argmax(1),
        engine.name: logits[engine].argmax(1),
    }
    table = pd.DataFrame(labels | {"margin": ordered[:, -1] - ordered[:, -2]}).rename_axis("test_image")
    changed = table[table["torch"] != table[engine.name]]
    run.write_table("disagreements.csv", changed.reset_index())
    if len(changed):
        shown = changed.sample(min(24, len(changed)), random_state=0).sort_index()
        which = f"{len(shown)} of them here"
    else:
        shown = table.nsmallest(24, "margin")
        which = "these are the closest calls"
    title = f"{engine.name} changes the label of {len(changed):,} of {len(table):,} test images, {which}"
    rows = -(-len(shown) // 8)
    with run.figure("disagreements.png", f"{title}\n{data.source}", rows, 8, (13, 1.6 + 2.7 * rows)) as (_, axes):
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, (number, row) in zip(axes.flat, shown.iterrows(), strict=False):
            axis.imshow(data.test_images[int(number)].permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)
            for line, who in enumerate(labels):
                draw_label(axis, line, who, data.classes[int(row[who])], who != "true", row[who] == row["true"])


def draw_label(axis: Axes, line: int, who: str, label: str, is_judged: bool, is_right: bool) -> None:
    """A line of text below an image: who gives it which label, green if right and red if wrong."""
    colour = "black"
    if is_judged:
        colour = "#007A55" if is_right else "#C0392B"
    axis.text(
        0,
        -0.05 - 0.16 * line,
        f"{who.removeprefix('onnx_')}: {SHORT_NAMES.get(label, label)[:14]}",
        transform=axis.transAxes,
        color=colour,
        fontsize=11,
        va="top",
        parse_math=False,
    )


def draw_speeds(run: common.Run, results: Results) -> None:
    """The three figures of speed, if anything was timed."""
    if results.speeds:
        draw_latency(run, results)
        draw_throughput(run, results)
        draw_pareto(run, results)


def scale_logarithmically(axis: Axes, label: str) -> None:
    """A logarithmic x axis with plain numbers."""
    from matplotlib.ticker import LogLocator

    axis.set(xscale="log", xlabel=label)
    axis.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter="")


def draw_latency(run: common.Run, results: Results) -> None:
    """latency.png: p50 and p99 of every round, engine by engine, at the smallest and largest batch."""
    sizes = results.end_sizes
    fastest = min(results.speeds_at(sizes[0]).values(), key=lambda speed: speed.p50_ms)
    title = f"{fastest.engine.name} is fastest at batch {sizes[0]}: {fastest.p50_ms:.2g} ms a call\n{results.where}"
    with run.figure("latency.png", title, columns=len(sizes), size=(8 * len(sizes), 6)) as (_, axes):
        for axis, size in zip(axes[0], sizes, strict=True):
            slowest_first = sorted(results.speeds_at(size).values(), key=lambda speed: -speed.p50_ms)
            for speed in slowest_first:
                draw_rounds(axis, speed, results.timings)
            scale_logarithmically(axis, f"batch {size}: p50 (dots) and p99 (bars) of every round, ms")


def draw_rounds(axis: Axes, speed: Speed, timings: Timings) -> None:
    """One engine's row of latency.png."""
    engine = speed.engine
    mine = [m.timing for m in timings.measurements if (m.engine, m.batch_size) == (engine, speed.batch_size)]
    row = [engine.name] * len(mine)
    axis.plot([timing.p50_ms for timing in mine], row, "o", color=engine.colour, alpha=0.7)
    axis.plot([timing.p99_ms for timing in mine], row, "|", color=engine.colour, markersize=12)


def draw_throughput(run: common.Run, results: Results) -> None:
    """throughput.png: images per second by batch size."""
    largest = results.end_sizes[-1]
    best = max(results.speeds_at(largest).values(), key=lambda speed: speed.images_per_second)
    rate = f"{best.images_per_second:,.0f} images/s"
    title = f"{best.engine.name} has the highest throughput at batch {largest}: {rate}\n{results.where}"
    with run.figure("throughput.png", title, size=(10, 6)) as (drawing, axes):
        axis = axes[0][0]
        for engine in results.speeds_at(largest):
            mine = [speed for speed in results.speeds if speed.engine == engine]
            sizes = [speed.batch_size for speed in mine]
            rates = [speed.images_per_second for speed in mine]
            axis.plot(sizes, rates, color=engine.colour, marker="o", label=engine.name)
        scale_logarithmically(axis, "batch size")
        axis.set(yscale="log", ylabel="images per second", xticks=results.setup.batch_sizes)
        drawing.legend(loc="outside right center")


def draw_pareto(run: common.Run, results: Results) -> None:
    """pareto.png: accuracy against latency at the smallest batch; the area of a circle is the size of the file."""
    size = results.end_sizes[0]
    speeds = results.speeds_at(size)
    fastest = min(speeds, key=lambda engine: speeds[engine].p50_ms)
    change = 0 - results.qualities[fastest].drop.mean
    title = f"{fastest.name}: accuracy {change:+.2f} points, fastest at batch {size}\n{results.where}"
    with run.figure("pareto.png", title, size=(10.5, 6)) as (drawing, axes):
        axis = axes[0][0]
        largest = max(quality.size_bytes for quality in results.qualities.values())
        before = 100 * results.qualities[BASELINE].accuracy
        for engine, speed in speeds.items():
            quality = results.qualities[engine]
            axis.vlines(speed.p50_ms, before - quality.drop.high, before - quality.drop.low, color=engine.colour)
            axis.scatter(
                speed.p50_ms,
                100 * quality.accuracy,
                label=f"{engine.name}, {quality.size_bytes / 1e6:.2f} MB",
                facecolor=(engine.colour, 0.35),
                edgecolor=engine.colour,
                s=600 * quality.size_bytes / largest,
            )
        scale_logarithmically(axis, f"latency (p50) at batch {size}, ms; circle area: file size")
        axis.set(ylabel="test accuracy, % (lines: 95 % interval of its change)")
        axis.margins(0.2, 0.4)
        drawing.legend(loc="outside right center", labelspacing=1.3)


if __name__ == "__main__":
    sys.exit(main())
