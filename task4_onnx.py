"""Task 4: what does ONNX buy? Convert a small CNN, prove it equal on the saved files, then measure the speed.

Protocol: train the network (a preset for one epoch more than elsewhere: small takes 10 TFLOP, about a minute on 2 cores
with AMX, medium 54, large 249) or load one, fold BatchNorm into the convolutions, export to ONNX, quantise to int8 with
training images only. Every engine runs in a process of its own, with equally many threads. First all classify the whole
test set: an exact engine must give torch's logits, one that rounds (bf16, int8) may lose little accuracy, and whoever
fails is not timed. Then they are timed in rounds, in random order, so that whatever else the machine does hits all
alike; and all processes are started anew several times, because a process keeps the memory layout that it got.

Timed is a call of a loaded engine, from a batch of test images in memory (in the order that it likes) to logits in
memory; torch_cuda and onnx_cuda include copies to and from the GPU, the other CUDA engines have both there. torch_fp32
is the checkpoint as loaded, the tuned one is folded and channels_last, the compiled one is that through Inductor.
Latencies are geometric means, over starts and rounds, of each round's percentiles; speed-ups are quotients of p50, with
95 % intervals over the starts. Load, first call and added memory (by loading and running, after imports) are medians.

Found (JPEG copy of CIFAR-10, one thread of a Xeon with AMX, 5 starts): the same label on 10,000 of 10,000 images; one
image takes ONNX 0.21 ms, tuned torch 3.5 times as long [2.8, 4.4], eager torch 6.1; int8 0.085 ms, at no loss.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import itertools
import logging
import os
import pkgutil
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import common  # isort: skip (before torch: it says how torch's threads wait)
import numpy as np
import torch
from torch import Tensor, nn

from common import Row, UserError, first_line

# pandas, scipy and onnxruntime are imported where they are needed: every engine's process imports this file.
MORE_EPOCHS = 1  # than a preset has
BATCH_SIZES, MAX_CALL_FLOP = (1, 8, 64, 256), 1e10  # what takes more (some 0.3 s on one core) is not timed
TIMING = 3, 0.3  # calls and seconds, at least, per engine, batch size and round
LOGIT_TOLERANCE, MIN_AGREEMENT = 1e-3, 0.999  # of exact engines: of the largest logit (rounding gives 1e-6), of labels
ENDS = "", "_ci_low", "_ci_high"  # of a key: a value, and its 95 % interval
PATIENCE = 1800  # seconds that an engine has for an answer
PACE, FILES_SECONDS, START_SECONDS = 4000, 50, 30  # for the progress bar: images a second; files and checks; a start
# For networks of the user's own: settings that train almost anything.
FOREIGN = common.Recipe(optimizer="AdamW", lr=2e-3, weight_decay=0.05, label_smoothing=0.1, batch_size=128, epochs=5)
RIVALS = {"speedup_over_tuned": "torch_tuned_fp32", "speedup": "torch_fp32", "speedup_over_compiled": "torch_compiled"}
ENGINES = "torch_fp32 torch_tuned_fp32 torch_bf16 torch_compiled torch_compiled_bf16 onnx_fp32 onnx_int8 torch_cuda "
ENGINES += "torch_cuda_resident torch_cuda_bf16 torch_cuda_compiled onnx_cuda onnx_cuda_resident"
COLOURS = "#000000 #8C8C8C #CC79A7 #E69F00 #009E73 #0072B2 #D55E00 #56B4E9 #332288 #AA4499 #999933 #F0E442 #44AA99"
COLOUR = dict(zip(ENGINES.split(), COLOURS.split(), strict=True))  # one per engine, in every figure
FILES = {name: "model.pth" if "torch" in name else "model.onnx" for name in COLOUR} | {"onnx_int8": "model_int8.onnx"}
IMPORTS = {"onnx": "onnxruntime", "torch": "torch.fx.experimental.optimization", "compiled": "torch._inductor.package"}
NOTICE = {  # captions
    "latency": "One engine a row. Notice how far p99 lies from p50, and whether the rounds agree.",
    "throughput": "Notice which lines cross: what is fastest for one image need not be for many.",
    "pareto": "Up and to the left is better. Notice what int8 costs, in points of accuracy.",
    "disagreements": "Green labels are right, red ones wrong. Notice whether int8 spoils more labels than it corrects.",
}
SHORT_NAMES = {"airplane": "plane", "automobile": "car"}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; --quick limits every loop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, number = parser.add_argument, common.number
    add("--checkpoint", type=number(Path), metavar="PTH", help="convert this network, of Task 3 or a state dict")
    add("--onnx", type=number(Path), metavar="FILE", help="judge this ONNX file of the network, made elsewhere")
    add("--threads", type=number(high=1024), default=1, help="of every engine (default: %(default)s)")
    add("--starts", type=number(), default=5, help="of all engines; intervals are over them (default: %(default)s)")
    add("--rounds", type=number(), default=2, help="of timing in every start (default: %(default)s)")
    points: Row = {"type": number(float, 0, 100), "default": 0.5, "metavar": "POINTS"}
    add("--max-int8-drop", **points, help="accuracy points that int8 or bf16 may cost (default: %(default)s)")
    add("--compile", action=argparse.BooleanOptionalAction, help="also time compiled torch (default: unless --quick)")
    common.add_common_args(parser, presets=True, output_dir=Path("results/task4"))
    options = parser.parse_args(argv)
    if options.compile is None:
        options.compile = not options.quick
    if options.quick:
        options.starts, options.rounds, options.images = 1, 1, min(options.images or 4000, 4000)
    return options


@common.script
def main(argv: Sequence[str] | None = None) -> int:
    """Convert, check, measure, report; returns the exit status."""
    options = parse_args(argv)
    data, recipe = open_data(options)
    given = examine(options.onnx, data) if options.onnx else None
    with common.open_run(options, data) as run, tempfile.TemporaryDirectory("", ".engines", run.output) as folder:
        run.stage("loading", PACE * (FILES_SECONDS + options.starts * START_SECONDS))
        model = obtain_model(run, recipe)
        images = make_files(run, model, given)
        how = prepare_engines(run, data, model, given, Path(folder))
        with started(run, how, how.names, classify=True) as ask:
            logits = ask(*how.names)
            results, verdict = judge(run, logits, data.test_labels.numpy())
            verdict += [] if given and given.quantised else explain_int8(run, images, results)
            run.bar.update(PACE * FILES_SECONDS)
            rows, interrupt = measure(run, how, ask, results)
        speeds = compare(run, results, rows)
        summary = summarise(how, results, rows, verdict + speeds_in_words(speeds), bool(interrupt))
        draw_disagreements(run, data, logits)
        draw_speeds(run, summary, speeds)
        run.finish(summary, write_report(run, summary, speeds))
    if interrupt:
        raise interrupt
    return 1 if summary["faults"] else 0


# ================================================================ 1. data and network


def open_data(options: argparse.Namespace) -> tuple[common.Dataset, common.Recipe]:
    """The data (by default the checkpoint's own) and the recipe; raises UserError where network and data do not fit."""
    facts, recipe = Row(), common.recipe_from(options, FOREIGN if options.model else common.PRESETS[options.preset])
    if not (options.model or options.epochs):
        recipe = replace(recipe, epochs=recipe.epochs + MORE_EPOCHS)
    if options.model and (options.width or options.preset != "small"):
        print("NOTE: --preset and --width are ignored: only the lab's own networks have them", file=sys.stderr)
    if options.quick:
        size = min(128, recipe.batch_size)
        recipe = replace(recipe, epochs=min(2, recipe.epochs), batch_size=size, width=options.width or 16)
    if options.checkpoint:
        with contextlib.suppress(*[UserError] * bool(options.model)):  # with --model it may be a plain state dict
            facts = common.load_checkpoint(options.checkpoint, options.model)[1]
            options.dataset = options.dataset or facts["dataset"]
            options.image_size = options.image_size or facts["input"][2]
    data = common.load_data(options)
    has = [*data.train_images.shape[1:]], [*data.classes]
    if not facts:
        common.check_recipe(recipe, data, common.split_dataset(data, options.images, False))
    elif has != (wanted := ([*facts["input"]], [*facts["classes"]])):
        raise UserError(f"{options.checkpoint} is for images and classes {wanted}, but {data.source} has {has}")
    if options.quick:  # test images of all classes, in proportion
        chosen = data.test_labels.argsort(stable=True)[:: max(1, len(data.test_labels) // 2000)]
        data = replace(data, test_images=data.test_images[chosen], test_labels=data.test_labels[chosen])
    return data, recipe


def obtain_model(run: common.Run, recipe: common.Recipe) -> nn.Sequential:
    """Have ``model.pth`` in the run's folder: what was given, that of an earlier run of the same kind, or a new one.

    The kind includes the images, not where they lie, and the code. No images are held out: nothing is selected here.
    """
    options, path = run.options, run.folder / "model.pth"
    split = common.split_dataset(run.data, options.images, False)
    model = common.make_model(recipe, run.data, split, options.seed)
    modules = {"common", type(model[1]).__module__, recipe.model.partition(":")[0]} & {*sys.modules}
    files = [getattr(sys.modules[name], "__file__", None) for name in sorted(modules)]
    code = [Path(file).read_bytes() for file in files if file]
    about = recipe, run.data.fingerprint, len(split.train), options.seed, run.runtime.precision, code
    kind, earlier = hashlib.sha256(repr(about).encode()).hexdigest(), options.checkpoint or run.output / "model.pth"
    with contextlib.suppress(UserError):  # none there, or none of ours
        found, facts = common.load_checkpoint(earlier, options.model)
        if options.checkpoint or facts.get("kind") == kind:
            print(f"the network in {earlier} is used again")
            path.write_bytes(earlier.read_bytes())
            return found
    if options.checkpoint:
        adopt(model, options.checkpoint)
        print(f"NOTE: images are standardised with mean {split.mean}, std {split.std}", file=sys.stderr)
    else:
        run.stage("training", recipe.epochs * len(split.train))
        for row in common.train_epochs(model, run.data, recipe, run.runtime, split.train, seed=options.seed):
            run.bar.update(len(split.train))
            run.stage(f"training: loss {row['train_loss']:.3f} after epoch {row['epoch']} of {recipe.epochs}")
        if not np.isfinite(row["train_loss"]):
            raise UserError("the training diverged; try another --seed or fewer --epochs")
    common.save_checkpoint(path, model, run.data, recipe, kind=kind)
    return model.cpu().eval()


def adopt(model: nn.Sequential, source: Path) -> None:
    """Load a plain state dict, as ``torch.save`` saves it, behind the normalisation; raises UserError."""
    content = common.read_tensors(source)
    for key in ("state_dict", "model"):
        content = content[key] if isinstance(content, dict) and isinstance(content.get(key), dict) else content
    try:
        model[1].load_state_dict({key.removeprefix("module."): value for key, value in content.items()})
    except Exception as error:  # a line for every kind of fault
        faults = " ".join(str(error).split())[:300]
        raise UserError(f"{source} holds no state dict that fits --model: {faults}") from None


@torch.no_grad()
def fuse(model: Any) -> nn.Module:
    """A network in eval mode to deploy: BatchNorm (and SmallCNN's normalisation) folded into the convolutions."""
    with contextlib.suppress(Exception):  # somebody's forward may not be traceable
        from torch.fx.experimental.optimization import fuse as fold

        model = fold(in_sequence(*copy.deepcopy(model)) if isinstance(model[1], common.SmallCNN) else model)
    return model.to(memory_format=torch.channels_last)


def in_sequence(normalise: Any, network: Any) -> nn.Sequential:
    """SmallCNN as a sequence, its normalisation in the stem, every BatchNorm right behind its convolution."""
    stem, layers = network.stem, [network.stem, *network.features]
    stem.weight /= normalise.std
    stem.bias = nn.Parameter(-(stem.weight * normalise.mean).sum((1, 2, 3)))
    for weight in network.head.parameters():
        weight *= network.scale
    for index, layer in enumerate(layers):
        # Max-pooling passes what is monotone (BatchNorm has a positive scale): convolutions then end with their ReLU.
        if isinstance(layer, nn.MaxPool2d) and isinstance(layers[index + 1], nn.BatchNorm2d | nn.ReLU):
            layers[index : index + 2] = layers[index + 1], layer
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), network.head)


# ================================================================ 2. ONNX files

DTYPES = {"tensor(double)": "float64", "tensor(uint8)": "uint8"}  # of inputs that are not float32


class OnnxFile:
    """An ONNX file in a session, fed images of ``shape`` (C, H, W) as it wants them: type, NCHW or NHWC, batch size."""

    def __init__(self, file: Path | bytes, shape: Sequence[int], threads: int = 1, device: str = "cpu") -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 4  # its errors are exceptions
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        provider, settings = "CPUExecutionProvider", Row()
        if device != "cpu":
            ort.preload_dlls()  # CUDA and cuDNN from where pip has put them
            provider, settings = "CUDAExecutionProvider", {"device_id": device[5:] or "0", "use_tf32": "0"}
        self.session = ort.InferenceSession(file, options, [(provider, settings)])
        if provider not in self.session.get_providers():  # ONNX Runtime falls back to the CPU
            raise RuntimeError(f"{provider} does not start here")
        self.input, self.output = self.session.get_inputs()[0], self.session.get_outputs()[0].name
        self.dtype, self.quantised = DTYPES.get(self.input.type, "float32"), False
        self.batch = next((size for size in self.input.shape[:1] if isinstance(size, int)), None)
        self.order = (0, 2, 3, 1) if self.input.shape[3:] == [shape[0]] else (0, 1, 2, 3)

    def prepare(self, images: Tensor) -> np.ndarray:
        """Images uint8 (N, C, H, W) as the file takes them: floats in [0, 1], or uint8; repeated to a fixed batch."""
        array = images.permute(self.order).numpy()
        array = np.resize(array, (self.batch or len(array), *array.shape[1:]))
        return array if self.dtype == "uint8" else array.astype(self.dtype) / np.array(255, self.dtype)

    def run(self, batch: np.ndarray) -> np.ndarray:
        """Logits of a prepared batch."""
        return self.session.run([self.output], {self.input.name: batch})[0]


def examine(path: Path, data: common.Dataset) -> OnnxFile:
    """An ONNX file made elsewhere, tried on an image; raises UserError where it cannot be judged."""
    with common.user_error(f"{path} is no self-contained ONNX file for images {[*data.train_images.shape[1:]]}"):
        content = path.read_bytes()
        file = OnnxFile(content, data.train_images.shape[1:])
        logits = file.run(file.prepare(data.train_images[:1]))
        if logits.shape[1:] != (len(data.classes),) or not np.isfinite(logits).all():
            raise ValueError(f"it gives {logits.shape}, expected are finite logits of {len(data.classes)} classes")
        file.quantised = any(word in content for word in (b"QuantizeLinear", b"QLinearConv", b"ConvInteger"))
    return file


def make_files(run: common.Run, model: Any, given: OnnxFile | None) -> Tensor:
    """Write model.onnx, float32 images (N, C, H, W) in [0, 1] -> logits, and model_int8.onnx; or --onnx and one.

    Returns the images for calibration, uint8 (N, C, H, W).
    """
    fp32, int8 = run.folder / "model.onnx", run.folder / "model_int8.onnx"
    images = run.data.train_images[common.split_dataset(run.data, 200 if run.options.quick else 1000, False).train]
    run.stage("exporting and quantising")
    logging.disable(logging.ERROR)  # neither the exporter's nor the quantiser's advice: their errors are exceptions
    warnings.simplefilter("ignore")
    if given:
        (int8 if given.quantised else fp32).write_bytes(run.options.onnx.read_bytes())
    if not fp32.exists():
        batch = (images[:2].float() / 255,)  # two: of one, the batch dimension would become fixed
        names: Any = {"input_names": ["images"], "output_names": ["logits"], "dynamic_shapes": ({0: "batch"},)}
        with common.user_error("the network cannot be exported to ONNX"):
            program: Any = torch.onnx.export(fuse(model), batch, **names, dynamo=True, verbose=False)
            program.model.metadata_props["classes"] = ", ".join(run.data.classes)
            program.save(fp32, external_data=False)
    if not int8.exists():
        try:
            quantise(images, fp32, int8)
        except Exception as error:  # of somebody's network
            print(f"NOTE: {fp32.name} cannot be quantised: {first_line(error)[:200]}", file=sys.stderr)
    return images


def quantise(images: Tensor, source: Path, target: Path, keep: str = "") -> None:
    """Write the int8 version of an ONNX file: static QDQ, ranges measured on ``images``.

    The first convolution (of SmallCNN whitening filters, which amplify rounding) and nodes of type ``keep`` stay fp32.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    file, has = OnnxFile(source, images.shape[1:]), {key for key, on in torch.cpu.get_capabilities().items() if on}
    batches = ({file.input.name: file.prepare(chunk)} for chunk in images.split(file.batch or 100))
    with common.atomic_path(target) as temporary:
        quant_pre_process(source, temporary, skip_symbolic_shape=True)
        prepared = onnx.load(temporary)
        nodes, quant = prepared.graph.node, {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        # x86 before VNNI adds int8 products in 16 bits: weights must then keep to 7 bits.
        quant["reduce_range"] = "sse2" in has and not has & {"avx512_vnni", "avx_vnni"}
        first = [node.name for node in nodes if node.op_type == "Conv"][:1]
        quant["nodes_to_exclude"] = first + [node.name for node in nodes if node.op_type == keep]
        reader: Any = argparse.Namespace(get_next=lambda: next(batches, None))
        quantize_static(prepared, temporary, reader, per_channel=True, **quant)


# ================================================================ 3. engines


def prepare_engines(run: common.Run, data: common.Dataset, model: Any, given: OnnxFile | None, shared: Path) -> Any:
    """The options, and what else the engines' processes are told; ``names`` are those that can run here."""
    from torch.utils.flop_counter import FlopCounterMode

    few = replace(data, train_images=data.train_images[:0], train_labels=data.train_labels[:0])
    common.write(shared / "images.pt", vars(few))
    # Whoever waits for work, be it OpenMP's threads, sleeps.
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "TORCHINDUCTOR_CACHE_DIR": str(shared / "inductor")}
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no helpers that would outlive an engine
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # of what an engine, which is ended by force, leaves
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(data.train_images[:1].float() / 255)
    flop, options, device = counter.get_total_flops(), run.options, run.runtime.device
    sizes = [size for size in BATCH_SIZES if size == 1 or size * flop <= MAX_CALL_FLOP]
    if len(sizes) < len(BATCH_SIZES):
        print(f"NOTE: of a network of this size, batches of more than {sizes[-1]} are not timed", file=sys.stderr)
    native = common.make_runtime("cpu", "auto", run.runtime.threads).precision == "bf16"
    there = {"cuda": device.startswith("cuda"), "compiled": options.compile, "torch_bf16": native}
    there |= {"compiled_bf16": native, "int8": (run.folder / "model_int8.onnx").exists()}
    names = [name for name in COLOUR if all(there[word] for word in there if word in name)]
    told: Row = {"names": names, "folder": run.folder.resolve(), "shared": shared.resolve(), "device": device}
    told |= {
        "test_images": len(data.test_labels),
        "flop": flop,
        "sizes": [given.batch] if given and given.batch else sizes,
    }
    return argparse.Namespace(**vars(options) | told)


@contextlib.contextmanager
def started(run: common.Run, how: Any, names: Sequence[str], classify: bool = False) -> Iterator[Any]:
    """A process per engine, ended with the block; ``ask(*names)`` gives by name what ``serve`` yields next there."""
    workers, pool = common.Workers(len(names), run.runtime, how.shared / "images.pt"), ThreadPoolExecutor(len(names))
    answers = {name: workers.run(serve, name, how, classify) for name in names}

    def attempt(name: str) -> Any:
        try:
            return next(answers[name], None)
        except common.WorkerDied as error:
            said = how.shared / f"{name}.stderr"
            lines = said.read_text(errors="replace").splitlines() if said.exists() else []
            return UserError([str(error), *filter(str.strip, lines)][-1])  # its last words
        except (RuntimeError, UserError) as error:
            return UserError(first_line(error))

    def ask(*names: str) -> dict[str, Any]:
        with common.user_error(f"an engine has given no answer within {PATIENCE} s", TimeoutError):
            found = dict(zip(names, pool.map(attempt, names, timeout=PATIENCE), strict=True))
        for name, error in found.items():
            if isinstance(error, UserError):
                text = f"{name} cannot run {FILES[name]}: {str(error)[:200]}"
                if name in ("torch_fp32", "onnx_fp32"):  # no task without it
                    raise UserError(text)
                print(f"NOTE: {text}; it is left out", file=sys.stderr)
        return {name: answer for name, answer in found.items() if not isinstance(answer, UserError | None)}

    try:
        run.stage("loading the engines")
        ask(*names)
        for name in names:  # one after the other: loading is timed
            ask(name)
        yield ask
    finally:
        workers.stop()
        pool.shutdown()
        for answer in answers.values():
            with contextlib.suppress(UserError):  # of a process that was stopped
                answer.close()


def serve(data: common.Dataset, _: Any, name: str, how: Any, classify: bool) -> Generator[Any]:
    """What an engine's process does between its answers: import, load, classify the test images, be timed.

    It yields logits float32 (N, num_classes), if to ``classify``; then a row per batch size in turn, for ever.
    """
    os.dup2(os.open(how.shared / f"{name}.stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    for word, module in IMPORTS.items():
        __import__(module if word in name else "torch")
    if how.model:
        pkgutil.resolve_name(how.model)
    clock, images = time.perf_counter, data.test_images
    calls, seconds = (3, 0.03) if how.quick else TIMING
    load, shape = load_onnx if "onnx" in name else load_torch, images.shape[1:]
    resident = "cuda" in name and name not in ("torch_cuda", "onnx_cuda")
    if "compiled" in name and classify:
        load(name, how, resident, shape)  # compiles: the next time it is there
    yield "awake"
    memory, start = private_bytes(), clock()
    prepare, run, fetch = load(name, how, resident, shape)
    loaded, batch = clock(), prepare(images[: how.sizes[0]])
    begin = clock()
    run(batch)
    row = {"load_ms": 1000 * (loaded - start), "first_call_ms": 1000 * (clock() - begin)}
    yield "loaded"
    if classify:
        outputs = [fetch(run(prepare(part)))[: len(part)] for part in images.split(how.sizes[-1])]
        yield np.concatenate(outputs).astype(np.float32)
    several = {size: images[torch.arange(8 * size) % len(images)].split(size) for size in how.sizes}
    batches = {size: itertools.cycle([prepare(part) for part in parts]) for size, parts in several.items()}
    for size in itertools.cycle(how.sizes):
        run(next(batches[size]))  # others have used the caches
        latencies, end = list[float](), clock() + seconds
        while len(latencies) < calls or clock() < end:
            batch, start = next(batches[size]), clock()
            run(batch)
            latencies.append(1000 * (clock() - start))
        p50, p90, p99 = np.percentile(latencies, (50, 90, 99)).tolist()
        row |= {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "mean_ms": float(np.mean(latencies))}
        yield row | {"calls": len(latencies), "added_rss_bytes": private_bytes() - memory}


def private_bytes() -> float:
    """Resident bytes of this process without mapped files; nan where the system does not tell (Linux does)."""
    with contextlib.suppress(OSError, IndexError):
        return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])
    return np.nan


def load_torch(name: str, how: Any, resident: bool, shape: Sequence[int]) -> tuple[Any, Any, Any]:
    """(prepare, run, fetch) of a checkpoint, as loaded, folded, or compiled: images -> batch -> logits -> numpy."""
    device, dtype = how.device if "cuda" in name else "cpu", torch.bfloat16 if "bf16" in name else torch.float32
    common.make_runtime(device, "fp32", how.threads)
    network: Any = common.load_checkpoint(how.folder / FILES[name], how.model)[0]
    order = torch.contiguous_format
    if name != "torch_fp32":
        network, order = fuse(network), torch.channels_last
    network = network.to(device, dtype).to(memory_format=order)
    if name == "torch_cuda_compiled":
        network = torch.compile(network, mode="reduce-overhead", dynamic=False)  # with CUDA graphs
    elif "compiled" in name:
        package = str(how.shared / f"{name}.pt2")
        if not Path(package).exists():
            example, free = torch.rand(2, *shape).to(device, dtype), {0: torch.export.Dim("batch", min=1)}
            with torch.no_grad():
                program = torch.export.export(network, (example.to(memory_format=order),), dynamic_shapes=(free,))
                torch._inductor.aoti_compile_and_package(program, package_path=package)
        network = torch._inductor.aoti_load_package(package)

    def prepare(images: Tensor) -> Tensor:
        batch = (images.float() / 255).contiguous(memory_format=order)
        return batch.to(device, dtype) if resident else batch

    @torch.inference_mode()
    def run(batch: Tensor) -> Any:
        logits = network(batch.to(device, dtype))
        if not resident:
            return logits.float().cpu().numpy()
        torch.cuda.synchronize(device)
        return logits

    return prepare, run, lambda logits: torch.as_tensor(logits).float().cpu().numpy()


def load_onnx(name: str, how: Any, resident: bool, shape: Sequence[int]) -> tuple[Any, Any, Any]:
    """The same of an ONNX file."""
    import onnxruntime as ort

    file = OnnxFile(how.folder / FILES[name], shape, how.threads, how.device if "cuda" in name else "cpu")
    if not resident:
        return file.prepare, file.run, np.asarray
    device = "cuda", int(how.device[5:] or 0)

    def prepare(images: Tensor) -> Any:
        binding = file.session.io_binding()
        binding.bind_ortvalue_input(file.input.name, ort.OrtValue.ortvalue_from_numpy(file.prepare(images), *device))
        binding.bind_output(file.output, *device)
        return binding

    def run(binding: Any) -> Any:
        file.session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return binding

    return prepare, run, lambda binding: binding.copy_outputs_to_cpu()[0]


# ================================================================ 4. quality


def judge(run: common.Run, logits: dict[str, Any], labels: np.ndarray) -> tuple[dict[str, Row], list[str]]:
    """How right every engine is, how far from torch_fp32, why it is ``refused``, if it is; and that in sentences.

    An exact engine must give the same logits; of one that rounds, not the whole interval of ``accuracy_drop`` (points,
    paired over the test images, with McNemar's exact p-value) may lie beyond --max-int8-drop.
    """
    import pandas as pd
    from scipy import stats

    baseline, limit, n = logits["torch_fp32"], run.options.max_int8_drop, len(labels)
    results, words = dict[str, Row](), list[str]()
    before, allowed = baseline.argmax(1) == labels, LOGIT_TOLERANCE * float(np.abs(baseline).max())
    for name, own in logits.items():
        exact, file, refused = "bf16" not in name and "int8" not in name, run.folder / FILES[name], None
        right, same = own.argmax(1) == labels, float((own.argmax(1) == baseline.argmax(1)).mean())
        lost, won, gap = (before & ~right).sum(), (right & ~before).sum(), float(np.abs(own - baseline).max())
        drop, low, high, *_ = common.interval(100.0 * before - 100.0 * right)
        p, size = stats.binomtest(lost, max(1, lost + won)).pvalue, file.stat().st_size
        if lost + won == 0:  # the rule of three: what never happened in n images happens in at most 3 / n of all
            low, high = -300 / n, 300 / n
        # Both written so that a nan is refused.
        if exact and not (gap <= allowed and same >= MIN_AGREEMENT):
            refused = f"{name} ({file.name}) is not the network of model.pth: its logits differ by up to {gap:.2g} "
            refused += f"(allowed: {allowed:.2g}), {100 * same:.2f} % of its labels agree"
        elif not exact and not (np.isfinite(own).all() and low <= limit):
            refused = f"{name} ({file.name}) loses {drop:.2f} points of accuracy [{low:.2f}, {high:.2f}], "
            refused += f"more than the {limit:g} allowed"
        if refused:
            words.append(f"FAILED: {refused}; its speed is not quoted.")
        elif not exact:
            change = f"{0 - drop:+.2f} points [{0 - high:+.2f}, {0 - low:+.2f}], McNemar's p {p:.2g}"
            unsure = f"; UNDECIDED whether it loses more than {limit:g}" if low <= limit < high else ""
            words.append(f"{name} changes the accuracy by {change}; its file has {size / 1e6:.2f} MB{unsure}.")
        elif name == "onnx_fp32":
            words.append(f"{name} gives torch's label on {round(same * n):,} of {n:,} images (max |Δlogit| {gap:.1g}).")
        by_class = [right[labels == label].sum() / max(1, (labels == label).sum()) for label in range(own.shape[1])]
        row: Row = {"accuracy": right.mean(), "class_accuracy": by_class, "agreement": same, "max_abs_logit_diff": gap}
        row |= {"exact": exact, "refused": refused, "undecided": not exact and low <= limit < high}
        row |= {"accuracy_drop": drop, "accuracy_drop_ci_low": low, "accuracy_drop_ci_high": high}
        row |= {"lost_images": lost, "won_images": won, "size_bytes": size, "batch": {}}
        results[name] = row | {"mcnemar_p": p}
    table = pd.DataFrame({name: [*row["class_accuracy"], row["accuracy"]] for name, row in results.items()})
    table.insert(0, "class", [*(SHORT_NAMES.get(name, name) for name in run.data.classes), "all"])
    run.table("accuracy.csv", table)
    return results, words


def explain_int8(run: common.Run, images: Tensor, results: dict[str, Row]) -> list[str]:
    """Where our int8 file lost too much, which node type is to blame: the one that helps most if it stays in fp32."""
    import onnx

    source, trial, kept = run.folder / "model.onnx", run.folder / "trial.onnx", dict[str, float]()
    if not results.get("onnx_int8", Row()).get("refused"):
        return []
    run.stage("looking for what int8 loses")
    exact = OnnxFile(source, images.shape[1:])
    few = images[: exact.batch or 200]
    for kind in ["none", *sorted({node.op_type for node in onnx.load(source).graph.node})]:
        with contextlib.suppress(Exception):  # this is by the way
            quantise(images, source, trial, kind)
            labels = OnnxFile(trial, images.shape[1:]).run(exact.prepare(few)).argmax(1)
            kept[kind] = 100 * (labels == exact.run(exact.prepare(few)).argmax(1)).mean()
        trial.unlink(missing_ok=True)
    best = max(kept, key=kept.__getitem__)
    figures = f"{kept['none']:.0f} % of the training images keep their label, with those in fp32 {kept[best]:.0f} %"
    return [f"First to blame for what onnx_int8 loses are its {best} nodes: {figures}."]


# ================================================================ 5. speed


def measure(run: common.Run, how: Any, ask: Any, results: dict[str, Row]) -> tuple[list[Row], KeyboardInterrupt | None]:
    """A row per engine (not refused), batch size, start and round; and what interrupted it: whole rounds are kept.

    Where model.onnx itself was refused, nobody is timed. ``ask`` is the first start's.
    """
    options, rows, wrong = run.options, list[Row](), results["onnx_fp32"]["refused"]
    timed = [name for name, row in results.items() if not (row["refused"] or wrong)]
    try:
        for start in range(1, options.starts + 1 if timed else 1):
            with contextlib.nullcontext(ask) if start == 1 else started(run, how, timed) as ask:
                for number in range(1, options.rounds + 1):
                    run.stage(f"timing, start {start} of {options.starts}, round {number}")
                    shuffle, found = np.random.default_rng([options.seed, start, number]), []
                    for size in how.sizes:
                        when = {"batch_size": size, "threads": options.threads, "start": start, "round": number}
                        for engine in shuffle.permutation(timed).tolist():
                            found += [{"engine": engine} | when | row for row in ask(engine).values()]
                    rows += found
                    run.bar.update(PACE * START_SECONDS / options.rounds)
    except KeyboardInterrupt as interrupt:
        return rows, interrupt
    return rows, None


def compare(run: common.Run, results: dict[str, Row], rows: list[Row]) -> Any:
    """A table by engine and batch size of latencies, and of speed-ups over the RIVALS; ``results`` get it, too."""
    import pandas as pd
    from scipy import stats

    if not rows:
        return pd.DataFrame()
    frame = pd.DataFrame(rows)
    run.table("latency.csv", frame)
    frame["engine"] = pd.Categorical(frame["engine"], [name for name in results if name in {*frame["engine"]}])
    speeds = frame.groupby(["engine", "batch_size"])[["p50_ms", "p90_ms", "p99_ms", "mean_ms"]].agg(stats.gmean)
    speeds["images_per_second"] = 1000 * speeds.index.get_level_values("batch_size") / speeds["mean_ms"]
    starts = np.log(frame.pivot_table("p50_ms", "start", ["engine", "batch_size"], stats.gmean))
    for key, rival in RIVALS.items():
        if rival in starts:
            logs = [starts[rival, size] - starts[name, size] for name, size in speeds.index]
            speeds[[key + end for end in ENDS]] = np.exp([common.interval(log.dropna())[:3] for log in logs])
    for name, row in frame.groupby("engine")[["load_ms", "first_call_ms", "added_rss_bytes"]].median().iterrows():
        results[name] |= row.to_dict()
    for (name, size), row in speeds.iterrows():
        results[name]["batch"][str(size)] = row.to_dict()
    return speeds


# ================================================================ 6. verdict and report


def summarise(how: Any, results: dict[str, Row], rows: list[Row], verdict: list[str], is_interrupted: bool) -> Row:
    """What summary.json holds; ``faults`` are the refusals of engines that had to be exact."""
    faults = [row["refused"] for row in results.values() if row["refused"] and row["exact"]]
    facts = {"task": "task4", "threads": how.threads, "test_pictures": how.test_images, "flop_per_picture": how.flop}
    facts |= {"interrupted": is_interrupted, "starts": len({row["start"] for row in rows}), "rounds": how.rounds}
    return facts | {"engines": results, "verdict": verdict, "faults": faults}


def speeds_in_words(speeds: Any) -> list[str]:
    """The speed-ups at the smallest and the largest batch; no difference is claimed where the interval includes 1."""
    words, sizes = [], list(dict.fromkeys(size for _, size in speeds.index))
    for size in sizes[:: max(1, len(sizes) - 1)]:
        table = speeds.xs(size, level="batch_size")
        for name, (key, rival) in itertools.product(("onnx_fp32", "onnx_int8"), RIVALS.items()):
            if name in table.index and key in table:
                ratio, low, high = table.loc[name, [key + end for end in ENDS]]
                claim = "faster than" if low > 1 else "SLOWER than" if high < 1 else "not shown to differ from"
                figures = f"{ratio:.2f} times as fast [{low:.2f}, {high:.2f}]".replace("[0.00, inf]", "(of one start)")
                words.append(f"At batch {size} {name} is {claim} {rival}: {figures}.")
        words.append(f"The fastest engine at batch {size} is {table['p50_ms'].idxmin()}.")
    return words


def write_report(run: common.Run, summary: Row, speeds: Any) -> list[str]:
    """Print accuracies and times in the original report's form, tables and verdict; returns report.md's paragraphs."""
    import pandas as pd

    results = summary["engines"]
    for name in (name for name in ("torch_fp32", "onnx_fp32", "onnx_int8") if name in results):
        print(f"\n{name}:")
        for label, accuracy in zip(run.data.classes, results[name]["class_accuracy"], strict=True):
            print(f"Accuracy for class: {SHORT_NAMES.get(label, label)} is {100 * accuracy:.1f} %")
        if results[name]["batch"]:
            print(f"Time, ms:  {next(iter(results[name]['batch'].values()))['p50_ms']}")
    frame = pd.DataFrame.from_dict(results, orient="index")
    frame["file_mb"], frame["added_mb"] = frame["size_bytes"] / 1e6, frame.get("added_rss_bytes", np.nan) / 1e6
    columns = ["accuracy", "agreement", "max_abs_logit_diff", "file_mb", "load_ms", "first_call_ms", "added_mb"]
    tables = {"quality": frame.reindex(columns=columns).map("{:.4g}".format)}
    for key in ("p50_ms", "speedup_over_tuned", "speedup") if len(speeds) else ():
        ends, form = [key + end for end in ENDS], "{:.2f} [{:.2f}, {:.2f}]" if key in RIVALS else "{:.3g}"
        texts = [form.format(*row).removesuffix(" [0.00, inf]") for row in speeds.reindex(columns=ends).to_numpy()]
        title = f"times as fast as {RIVALS[key]} [95 %]" if key in RIVALS else "p50, ms"
        tables[title] = pd.Series(texts, speeds.index).unstack()
    where = f"{run.data.source}, {summary['test_pictures']:,} test images, {summary['threads']} thread(s) per engine"
    verdict = [f"- {sentence}" for sentence in summary["verdict"]]
    paragraphs = ["# Task 4: what does ONNX buy?", where, "\n".join(verdict)]
    for title, table in tables.items():
        print(f"\n{title}\n{table.to_string()}")
        paragraphs += [f"**{title}**", table.to_markdown(disable_numparse=True)]
    print("", *(textwrap.fill(line, 99, subsequent_indent="  ") for line in verdict), sep="\n")
    drawn = [name for name in NOTICE if (run.folder / f"{name}.png").exists()]
    paragraphs += ["## Figures", *(f"![{name}]({name}.png)\n\n*{NOTICE[name]}*" for name in drawn)]
    limits = "One machine, one network: another processor or version of a runtime may rank the engines differently."
    return [*paragraphs, "## Protocol and limits", *str(__doc__).split("\n\n")[1:3], limits]


# ================================================================ 7. figures


def draw_disagreements(run: common.Run, data: common.Dataset, logits: dict[str, np.ndarray]) -> None:
    """Test images whose label int8 changed, or, where there are none, those nearest to a border between labels."""
    import pandas as pd

    name, ordered = "onnx_int8" if "onnx_int8" in logits else "onnx_fp32", np.sort(logits["torch_fp32"], axis=1)
    columns = {"true": data.test_labels.numpy(), "torch": logits["torch_fp32"].argmax(1), name: logits[name].argmax(1)}
    frame = pd.DataFrame(columns | {"margin": ordered[:, -1] - ordered[:, -2]}).rename_axis("test_image")
    changed = frame[frame["torch"] != frame[name]]
    run.table("disagreements.csv", changed.reset_index())
    shown = changed.sample(min(24, len(changed)), random_state=0).sort_index()
    title = f"{name} changes the label of {len(changed):,} of {len(frame):,} test images, {len(shown)} of them here"
    if not len(shown):
        title, shown = title.replace("0 of them here", "nearest to the border are these"), frame.nsmallest(24, "margin")
    rows = -(-len(shown) // 8)
    with run.figure("disagreements.png", f"{title}\n{data.source}", rows, 8, (13, 1.6 + 2.7 * rows)) as (_, axes):
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, (number, row) in zip(axes.flat, shown.iterrows(), strict=False):
            axis.imshow(data.test_images[int(number)].permute(1, 2, 0), cmap="gray", vmin=0, vmax=255)
            for line, who in enumerate(columns):
                colour = "black" if who == "true" else "#007A55" if row[who] == row["true"] else "#C0392B"
                label = data.classes[int(row[who])]
                text = f"{who.removeprefix('onnx_')}: {SHORT_NAMES.get(label, label)[:14]}"
                style: Row = {"color": colour, "fontsize": 11, "va": "top", "parse_math": False}
                axis.text(0, -0.05 - 0.16 * line, text, transform=axis.transAxes, **style)


def draw_speeds(run: common.Run, summary: Row, speeds: Any) -> None:
    """Latencies by engine, images per second by batch size, and accuracy against latency; without speeds, nothing."""
    import pandas as pd
    from matplotlib.ticker import LogLocator

    if not len(speeds):
        return
    frame, rates = pd.read_csv(run.folder / "latency.csv"), speeds["images_per_second"].unstack("engine")
    p50, sizes = speeds["p50_ms"].unstack("engine"), rates.index[:: max(1, len(rates) - 1)]
    where = f"{run.data.source}, {summary['test_pictures']:,} test images, {summary['starts']} start(s)"
    best, most = p50.iloc[0].idxmin(), rates.iloc[-1].idxmax()

    def scale(axis: Any, label: str) -> None:
        axis.set(xscale="log", xlabel=label)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")

    title = f"{best} is fastest at batch {sizes[0]}: {p50.iloc[0].min():.2g} ms a call\n{where}"
    with run.figure("latency.png", title, columns=len(sizes), size=(8 * len(sizes), 6)) as (_, axes):
        for axis, size in zip(axes[0], sizes, strict=True):
            for name in p50.loc[size].sort_values(ascending=False).index:
                own = frame[(frame["engine"] == name) & (frame["batch_size"] == size)]
                axis.plot(own["p50_ms"], [name] * len(own), "o", color=COLOUR[name], alpha=0.7)
                axis.plot(own["p99_ms"], [name] * len(own), "|", color=COLOUR[name], markersize=12)
            scale(axis, f"batch {size}: p50 (dots) and p99 (bars) of every round, ms")
    title = f"{most} has the highest throughput at batch {sizes[-1]}: {rates.iloc[-1].max():,.0f} images/s\n{where}"
    with run.figure("throughput.png", title, size=(10, 6)) as (drawing, axes):
        rates.plot(ax=axes[0][0], color=COLOUR, marker="o", loglog=True, legend=False, ylabel="images per second")
        scale(axes[0][0], "batch size")
        axes[0][0].set_xticks(rates.index)
        drawing.legend(loc="outside right center")
    title = f"{best}: accuracy {0 - summary['engines'][best]['accuracy_drop']:+.2f} points, fastest at batch {sizes[0]}"
    with run.figure("pareto.png", f"{title}\n{where}", size=(10.5, 6)) as (drawing, axes):
        for name, x in p50.iloc[0].items():
            row, fill = summary["engines"][name], (COLOUR[name], 0.35)
            style: Row = {"facecolor": fill, "edgecolor": COLOUR[name], "s": row["size_bytes"] / 4000}
            axes[0][0].scatter(x, 100 * row["accuracy"], label=f"{name}, {row['size_bytes'] / 1e6:.2f} MB", **style)
        scale(axes[0][0], f"latency (p50) at batch {sizes[0]}, ms; a circle's area is the file's size")
        axes[0][0].set(ylabel="test accuracy, %")
        axes[0][0].margins(0.2, 0.4)
        drawing.legend(loc="outside right center", labelspacing=1.3)


if __name__ == "__main__":
    sys.exit(main())
