"""Task 4: what does ONNX buy? Convert a small CNN, verify the saved files on the test set, then measure the speed.

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
over the starts. Load time, first call and the memory that both add (after imports) are medians.

Found (JPEG copy of CIFAR-10, one thread of a Xeon with AMX, 5 starts): the same label on 10,000 of 10,000 images; one
image takes ONNX 0.15 ms, tuned torch 4.4 times as long [4.1, 4.7], eager torch 7.8 times; int8 0.076 ms, no loss shown.
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

import common  # isort: skip (before torch: it sets how long idle threads spin)
import numpy as np
import torch
from torch import Tensor, nn

from common import Row, UserError, first_line

# pandas, scipy and onnxruntime are imported where needed, because every engine's process imports this file.
MORE_EPOCHS = 1  # than the preset
BATCH_SIZES, MAX_CALL_FLOP = (1, 8, 64, 256), 1e10  # larger calls (about 0.3 s on one core) are not timed
TIMING = 3, 0.3  # minimum calls and seconds per engine, batch size and round
LOGIT_TOLERANCE, MIN_AGREEMENT = 1e-3, 0.999  # of exact engines: of the largest logit; of labels
ENDS = "", "_ci_low", "_ci_high"  # suffixes of a value and of its 95 % interval
PATIENCE = 1800  # seconds to wait for an engine's answer
PACE, FILES_SECONDS, START_SECONDS = 4000, 50, 30  # for the progress bar: images per second; files and checks; a start
# For custom networks: settings that train almost anything.
FOREIGN = common.Recipe(optimizer="AdamW", lr=2e-3, weight_decay=0.05, label_smoothing=0.1, batch_size=128, epochs=5)
RIVALS = {"speedup_over_tuned": "torch_tuned_fp32", "speedup": "torch_fp32", "speedup_over_compiled": "torch_compiled"}
ENGINES = "torch_fp32 torch_tuned_fp32 torch_bf16 torch_compiled torch_compiled_bf16 onnx_fp32 onnx_int8 torch_cuda "
ENGINES += "torch_cuda_resident torch_cuda_bf16 torch_cuda_compiled onnx_cuda onnx_cuda_resident"
COLOURS = "#000000 #8C8C8C #CC79A7 #E69F00 #009E73 #0072B2 #D55E00 #56B4E9 #332288 #AA4499 #999933 #F0E442 #44AA99"
COLOUR = dict(zip(ENGINES.split(), COLOURS.split(), strict=True))  # one per engine, in every figure
FILES = {name: "model.pth" if "torch" in name else "model.onnx" for name in COLOUR} | {"onnx_int8": "model_int8.onnx"}
# Imported before the clock starts: load times do not include imports.
IMPORTS = {"onnx": "onnxruntime", "torch": "torch.fx.experimental.optimization", "compiled": "torch._inductor.package"}
NOTICE = {  # captions
    "latency": "One engine per row. Notice how far p99 lies from p50, and whether the rounds agree.",
    "throughput": "Notice which lines cross: the fastest engine for one image need not be the fastest for many.",
    "pareto": "Up and to the left is better. Notice whether the lines of int8 and bf16 include the others' accuracy.",
    "disagreements": "Green labels are right, red ones wrong. Notice whether int8 breaks more labels than it corrects.",
}
SHORT_NAMES = {"airplane": "plane", "automobile": "car"}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; --quick limits every loop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, number = parser.add_argument, common.number
    add("--checkpoint", type=number(Path), metavar="PTH", help="convert this network, from Task 3 or a state dict")
    add("--onnx", type=number(Path), metavar="FILE", help="judge this ONNX file of the same network")
    add("--threads", type=number(high=1024), default=1, help="per engine (default: %(default)s)")
    add("--starts", type=number(), default=5, help="of each engine; intervals are over them (default: %(default)s)")
    add("--rounds", type=number(), default=2, help="of timing per start (default: %(default)s)")
    points: Row = {"type": number(float, 0, 100), "default": 0.5, "metavar": "POINTS"}
    add("--max-int8-drop", **points, help="of accuracy (%%) that int8 or bf16 may lose (default: %(default)s)")
    common.add_common_args(parser, presets=True, output_dir=Path("results/task4"))
    options = parser.parse_args(argv)
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
    """The data (by default those of the checkpoint) and the recipe; raises UserError if network and data do not fit."""
    facts, recipe = Row(), common.recipe_from(options, FOREIGN if options.model else common.PRESETS[options.preset])
    if not (options.model or options.epochs):
        recipe = replace(recipe, epochs=recipe.epochs + MORE_EPOCHS)
    if options.model and (options.width or options.preset != "small"):
        print("NOTE: --preset and --width are ignored: they are for the lab's own networks", file=sys.stderr)
    if options.quick:
        size = min(128, recipe.batch_size)
        recipe = replace(recipe, epochs=min(2, recipe.epochs), batch_size=size, width=options.width or 16)
    if options.checkpoint:
        with contextlib.suppress(*[UserError] * bool(options.model)):  # with --model it may be a plain state dict
            facts = common.load_checkpoint(options.checkpoint, options.model)[1]
            options.dataset = options.dataset or facts["dataset"]
            options.image_size = options.image_size or facts["input"][2]
        if options.model and facts and facts["recipe"].model != options.model:
            raise UserError(f"{options.checkpoint} holds the lab's own {facts['recipe'].model}: leave --model out")
    data = common.load_data(options)
    has = [*data.train_images.shape[1:]], [*data.classes]
    if not facts:
        common.check_recipe(recipe, data, common.split_dataset(data, options.images, False))
    elif has != (wanted := ([*facts["input"]], [*facts["classes"]])):
        raise UserError(f"{options.checkpoint} is for images and classes {wanted}, {data.source} has {has}")
    if options.quick:  # test images of all classes, in proportion
        chosen = data.test_labels.argsort(stable=True)[:: max(1, len(data.test_labels) // 2000)]
        data = replace(data, test_images=data.test_images[chosen], test_labels=data.test_labels[chosen])
    return data, recipe


def obtain_model(run: common.Run, recipe: common.Recipe) -> nn.Sequential:
    """Provide ``model.pth`` in the run's folder: the given one, that of an earlier equivalent run, or a new one.

    Equivalent means the same images (not paths), recipe, seed and code. No images are held out: nothing is selected.
    """
    options, path = run.options, run.folder / "model.pth"
    split = common.split_dataset(run.data, options.images, False)
    model = common.make_model(recipe, run.data, split, options.seed)
    modules = {type(part).__module__ for part in model.modules()} | {recipe.model.partition(":")[0]}
    files = [getattr(sys.modules.get(name), "__file__", None) for name in sorted(modules)]
    code = [Path(file).read_bytes() for file in files if file]
    about = recipe, run.data.fingerprint, len(split.train), options.seed, run.runtime.precision, code
    kind = hashlib.sha256(repr((*about, options.checkpoint)).encode()).hexdigest()
    earlier = options.checkpoint or run.output / "model.pth"
    with contextlib.suppress(UserError):  # missing, or not one of ours
        found, facts = common.load_checkpoint(earlier, options.model)
        if options.checkpoint or facts.get("kind") == kind:
            print(f"reusing the network in {earlier}")
            path.write_bytes(earlier.read_bytes())
            return found
    if options.checkpoint:
        adopt(model, options.checkpoint)
        print(f"NOTE: images are normalised with mean {split.mean}, std {split.std}", file=sys.stderr)
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
    """Load a plain state dict saved by ``torch.save`` into the network behind the normalisation; raises UserError."""
    content = common.read_tensors(source)
    for key in ("state_dict", "model"):
        content = content[key] if isinstance(content, dict) and isinstance(content.get(key), dict) else content
    try:
        model[1].load_state_dict({key.removeprefix("module."): value for key, value in content.items()})
    except Exception as error:  # one line for any fault
        faults = " ".join(str(error).split())[:300]
        raise UserError(f"{source} does not hold a state dict for --model: {faults}") from None


@torch.no_grad()
def fuse(model: Any) -> nn.Module:
    """A copy with BatchNorm (and SmallCNN's normalisation) folded into convolutions; ``model`` if not traceable."""
    with contextlib.suppress(Exception):  # a custom forward may not be traceable
        from torch.fx.experimental.optimization import fuse as fold

        model = fold(in_sequence(*copy.deepcopy(model)) if isinstance(model[1], common.SmallCNN) else model)
    return model


def in_sequence(normalise: Any, network: Any) -> nn.Sequential:
    """SmallCNN as a Sequential, its normalisation folded into the stem, each BatchNorm right after its convolution."""
    stem, layers = network.stem, [network.stem, *network.features]
    stem.weight /= normalise.std
    stem.bias = nn.Parameter(-(stem.weight * normalise.mean).sum((1, 2, 3)))
    for weight in network.head.parameters():
        weight *= network.scale
    for index, layer in enumerate(layers):
        # Max-pooling commutes with monotone functions, such as BatchNorm with a positive scale.
        if isinstance(layer, nn.MaxPool2d) and isinstance(layers[index + 1], nn.BatchNorm2d | nn.ReLU):
            layers[index : index + 2] = layers[index + 1], layer
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), network.head)


# ================================================================ 2. ONNX files


class OnnxFile:
    """A session for an ONNX file; feeds images of ``shape`` (C, H, W) in the dtype, layout and batch size it wants."""

    def __init__(self, file: Path | bytes, shape: Sequence[int], threads: int = 1, device: str = "cpu") -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 4  # errors are raised anyway
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        provider, settings = "CPUExecutionProvider", Row()
        if device != "cpu":
            ort.preload_dlls()  # CUDA and cuDNN as installed by pip
            provider, settings = "CUDAExecutionProvider", {"device_id": device[5:] or "0", "use_tf32": "0"}
        self.session = ort.InferenceSession(file, options, [(provider, settings)])
        if provider not in self.session.get_providers():  # it silently falls back to the CPU
            raise RuntimeError(f"{provider} is not available here")
        self.input, self.output = self.session.get_inputs()[0], self.session.get_outputs()[0].name
        self.dtype = {"tensor(double)": "float64", "tensor(uint8)": "uint8"}.get(self.input.type, "float32")
        self.quantised = False
        self.batch = next((size for size in self.input.shape[:1] if isinstance(size, int)), None)
        self.order = (0, 2, 3, 1) if self.input.shape[3:] == [shape[0]] else (0, 1, 2, 3)

    def prepare(self, images: Tensor) -> np.ndarray:
        """Convert images, uint8 (N, C, H, W), to the input: floats in [0, 1] or uint8, repeated to a fixed batch."""
        array = images.permute(self.order).numpy()
        array = np.resize(array, (self.batch or len(array), *array.shape[1:]))
        return array if self.dtype == "uint8" else array.astype(self.dtype) / np.array(255, self.dtype)

    def run(self, batch: np.ndarray) -> np.ndarray:
        """Logits of a prepared batch."""
        return self.session.run([self.output], {self.input.name: batch})[0]


def examine(path: Path, data: common.Dataset) -> OnnxFile:
    """Load an ONNX file made elsewhere and try it on one image; raises UserError if it cannot be judged."""
    with common.user_error(f"{path} is not a self-contained ONNX file for images {[*data.train_images.shape[1:]]}"):
        content = path.read_bytes()
        file = OnnxFile(content, data.train_images.shape[1:])
        logits = file.run(file.prepare(data.train_images[:1]))
        if logits.shape[1:] != (len(data.classes),) or not np.isfinite(logits).all():
            raise ValueError(f"outputs {logits.shape}, expected finite logits of {len(data.classes)} classes")
        file.quantised = any(word in content for word in (b"QuantizeLinear", b"QLinearConv", b"ConvInteger"))
    return file


def make_files(run: common.Run, model: Any, given: OnnxFile | None) -> Tensor:
    """Write model.onnx, from float32 images (N, C, H, W) in [0, 1] to logits, and model_int8.onnx; --onnx replaces one.

    Returns the calibration images, uint8 (N, C, H, W).
    """
    fp32, int8 = run.folder / "model.onnx", run.folder / "model_int8.onnx"
    images = run.data.train_images[common.split_dataset(run.data, 200 if run.options.quick else 1000, False).train]
    run.stage("exporting and quantising")
    logging.disable(logging.ERROR)  # hide advice of exporter and quantiser; errors are raised anyway
    warnings.simplefilter("ignore")
    if given:
        (int8 if given.quantised else fp32).write_bytes(run.options.onnx.read_bytes())
    if not fp32.exists():
        batch = (images[:2].float() / 255,)  # two images: with one, the batch dimension would become fixed
        names: Any = {"input_names": ["images"], "output_names": ["logits"], "dynamic_shapes": ({0: "batch"},)}
        with common.user_error("the network cannot be exported to ONNX"):
            program: Any = torch.onnx.export(fuse(model), batch, **names, dynamo=True, verbose=False)
            program.model.metadata_props["classes"] = ", ".join(run.data.classes)
            program.save(fp32, external_data=False)
    if not int8.exists():
        try:
            quantise(images, fp32, int8)
        except Exception as error:  # with a custom network
            print(f"NOTE: {fp32.name} cannot be quantised: {first_line(error)[:200]}", file=sys.stderr)
    return images


def quantise(images: Tensor, source: Path, target: Path, keep: str = "") -> None:
    """Write the int8 version of an ONNX file: static QDQ, ranges calibrated on ``images``.

    The first convolution (in SmallCNN whitening filters, which amplify rounding) and nodes of type ``keep`` stay fp32.
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
        for number, node in enumerate(nodes):
            node.name = node.name or f"node_{number}"  # nodes are excluded by name
        # Without VNNI, x86 accumulates int8 products in 16 bits: weights must then be limited to 7 bits.
        quant["reduce_range"] = "sse2" in has and not has & {"avx512_vnni", "avx_vnni"}
        first = [node.name for node in nodes if node.op_type == "Conv"][:1]
        quant["nodes_to_exclude"] = first + [node.name for node in nodes if node.op_type == keep]
        reader: Any = argparse.Namespace(get_next=lambda: next(batches, None))
        quantize_static(prepared, temporary, reader, per_channel=True, **quant)


# ================================================================ 3. engines


def prepare_engines(run: common.Run, data: common.Dataset, model: Any, given: OnnxFile | None, shared: Path) -> Any:
    """Collect what the engines' processes need: the options and more; ``names`` are the engines available here."""
    from torch.utils.flop_counter import FlopCounterMode

    few = replace(data, train_images=data.train_images[:0].clone(), train_labels=data.train_labels[:0].clone())
    common.write(shared / "images.pt", vars(few))
    os.environ.pop("GOMP_SPINCOUNT", None)  # it would win over the policy: whoever waits sleeps, as in ONNX Runtime
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "TORCHINDUCTOR_CACHE_DIR": str(shared / "inductor")}
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no helper processes that outlive an engine
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # engines are killed
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(data.train_images[:1].float() / 255)
    flop, options, device = counter.get_total_flops(), run.options, run.runtime.device
    sizes = [size for size in BATCH_SIZES if size == 1 or size * flop <= MAX_CALL_FLOP]
    if given and given.batch:
        sizes = [given.batch]
    elif len(sizes) < len(BATCH_SIZES):
        print(f"NOTE: for a network of this size, batches above {sizes[-1]} are not timed", file=sys.stderr)
    native = common.make_runtime("cpu", "auto", run.runtime.threads).precision == "bf16"
    there = {"cuda": device.startswith("cuda"), "compiled": not options.quick, "torch_bf16": native}
    there |= {"compiled_bf16": native, "int8": (run.folder / "model_int8.onnx").exists()}
    names = [name for name in COLOUR if all(there[word] for word in there if word in name)]
    told: Row = {"names": names, "folder": run.folder.resolve(), "shared": shared.resolve(), "device": device}
    told |= {"test_images": len(data.test_labels), "flop": flop, "sizes": sizes}
    return argparse.Namespace(**vars(options) | told)


@contextlib.contextmanager
def started(run: common.Run, how: Any, names: Sequence[str], classify: bool = False) -> Iterator[Any]:
    """Start a process per engine; ``ask(*names)`` returns what ``serve`` yields next in each, by name."""
    runtime, pool = run.runtime._replace(device="cpu"), ThreadPoolExecutor(len(names))  # load_torch sets the device
    workers = common.Workers(len(names), runtime, how.shared / "images.pt")
    answers = {name: workers.run(serve, name, how, classify) for name in names}

    def attempt(name: str) -> Any:
        try:
            return next(answers[name], None)
        except UserError as error:
            said, why = how.shared / f"{name}.stderr", str(error).partition(" (out of memory")[0]
            told = isinstance(error, common.WorkerDied) and said.exists()
            lines = said.read_text(errors="replace").splitlines() if told else []
            return UserError([why, *(f"{line} ({why})" for line in lines if line.strip())][-1])  # its last words

    def ask(*names: str) -> dict[str, Any]:
        with common.user_error(f"an engine did not answer within {PATIENCE} s", TimeoutError):
            found = dict(zip(names, pool.map(attempt, names, timeout=PATIENCE), strict=True))
        for name, error in found.items():
            if isinstance(error, UserError):
                text = f"{name} cannot run {FILES[name]}: {first_line(error)[:200]}"
                if name in ("torch_fp32", "onnx_fp32"):  # indispensable
                    raise UserError(text)
                print(f"NOTE: {text}; it is not timed", file=sys.stderr)
        return {name: answer for name, answer in found.items() if not isinstance(answer, UserError | None)}

    try:
        run.stage("loading the engines")
        ask(*names)
        for name in names:  # one at a time, because loading is timed
            ask(name)
        yield ask
    finally:
        workers.stop()
        pool.shutdown()
        for answer in answers.values():
            with contextlib.suppress(UserError):  # from a killed process
                answer.close()


def serve(data: common.Dataset, _: Any, name: str, how: Any, classify: bool) -> Generator[Any]:
    """An engine's process, step by step: import, load, classify the test images, time calls.

    Yields float32 logits (N, num_classes), if ``classify``; then a row of timings per batch size in turn, endlessly.
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
    if "cuda" in name:
        torch.zeros(1, device=how.device)  # its start is not the engine's
    is_lazy = name == "torch_cuda_compiled"  # it compiles, and records CUDA graphs, in its first calls
    if "compiled" in name and classify and not is_lazy:
        load(name, how, resident, shape)  # compile now: later loads use the result
    yield "awake"
    memory, start = private_bytes(), clock()
    prepare, run, fetch = load(name, how, resident, shape)
    loaded, batch = clock(), prepare(images[: how.sizes[0]])
    begin = clock()
    run(batch)
    row = {"load_ms": 1000 * (loaded - start), "first_call_ms": 1000 * (clock() - begin)}
    row["added_rss_bytes"] = private_bytes() - memory
    yield "loaded"
    if classify:
        outputs = [fetch(run(prepare(part)))[: len(part)] for part in images.split(how.sizes[-1])]
        yield np.concatenate(outputs).astype(np.float32)
    several = {size: images[torch.arange(8 * size) % len(images)].split(size) for size in how.sizes}
    batches = {size: itertools.cycle([prepare(part) for part in parts]) for size, parts in several.items()}
    for size in itertools.cycle(how.sizes):
        for _ in range(3 if is_lazy else 1):
            run(next(batches[size]))  # other engines have used the caches
        latencies, end = list[float](), clock() + seconds
        while len(latencies) < calls or clock() < end:
            batch, start = next(batches[size]), clock()
            run(batch)
            latencies.append(1000 * (clock() - start))
        p50, p90, p99 = np.percentile(latencies, (50, 90, 99)).tolist()
        row |= {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "mean_ms": float(np.mean(latencies))}
        yield row | {"calls": len(latencies)}


def private_bytes() -> float:
    """Resident bytes of this process without mapped files; nan on systems other than Linux."""
    with contextlib.suppress(OSError, IndexError):
        return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])
    return np.nan


def load_torch(name: str, how: Any, resident: bool, shape: Sequence[int]) -> tuple[Any, Any, Any]:
    """(prepare, run, fetch) for a checkpoint as loaded, folded or compiled: images -> batch -> logits -> numpy."""
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
    """The same for an ONNX file."""
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
    """Each engine's accuracy, its distance from torch_fp32 and, if it is ``refused``, why; also in sentences.

    An exact engine must reproduce the logits. An approximate one is refused if the whole interval of ``accuracy_drop``
    (points, paired over the test images, with McNemar's exact p-value) lies beyond --max-int8-drop.
    """
    import pandas as pd
    from scipy import stats

    baseline, limit, n = logits["torch_fp32"], run.options.max_int8_drop, len(labels)
    results, words = dict[str, Row](), list[str]()
    before, allowed = baseline.argmax(1) == labels, LOGIT_TOLERANCE * float(np.abs(baseline).max())
    is_right = pd.DataFrame({name: own.argmax(1) == labels for name, own in logits.items()})
    by_class = is_right.groupby(labels).mean().reindex(range(len(run.data.classes)))  # nan: no test image
    for name, own in logits.items():
        exact, file, refused = "bf16" not in name and "int8" not in name, run.folder / FILES[name], None
        right, same = is_right[name].to_numpy(), float((own.argmax(1) == baseline.argmax(1)).mean())
        lost, won, gap = (before & ~right).sum(), (right & ~before).sum(), float(np.abs(own - baseline).max())
        drop, low, high, *_ = common.interval(100.0 * before - 100.0 * right)
        p, size = stats.binomtest(lost, max(1, lost + won)).pvalue, file.stat().st_size
        if lost + won == 0:  # the rule of three: an event not seen in n images has a rate of at most 3 / n
            low, high = -300 / n, 300 / n
        if exact and not (gap <= allowed and same >= MIN_AGREEMENT):  # or nan
            refused = f"{name} ({file.name}) is not the network of model.pth: its logits differ by up to {gap:.2g} "
            refused += f"(allowed: {allowed:.2g}), {100 * same:.2f} % of its labels agree"
        elif not np.isfinite(own).all():
            refused = f"{name} ({file.name}) gives logits that are not finite"
        elif not exact and low > limit:
            refused = f"{name} ({file.name}) loses {drop:.2f} points of accuracy [{low:.2f}, {high:.2f}], "
            refused += f"more than the {limit:g} allowed"
        if refused:
            words.append(f"FAILED: {refused}; its speed is not quoted.")
        elif not exact:
            change = f"{0 - drop:+.2f} points [{0 - high:+.2f}, {0 - low:+.2f}], McNemar's p {p:.2g}"
            unsure = f"; UNDECIDED whether it loses more than {limit:g}" if low <= limit < high else ""
            words.append(f"{name} changes the accuracy by {change}; its file has {size / 1e6:.2f} MB{unsure}.")
        elif name == "onnx_fp32":
            count = f"{round(same * n):,} of {n:,} images"
            words.append(f"{name} gives the same label as torch on {count} (max |Δlogit| {gap:.1g}).")
        row: Row = {"accuracy": right.mean(), "class_accuracy": by_class[name].tolist(), "agreement": same}
        row |= {"max_abs_logit_diff": gap, "exact": exact, "refused": refused}
        row |= {"undecided": not exact and low <= limit < high, "accuracy_drop": drop}
        row |= {"accuracy_drop_ci_low": low, "accuracy_drop_ci_high": high}
        row |= {"lost_images": lost, "won_images": won, "mcnemar_p": p, "size_bytes": size, "batch": {}}
        results[name] = row
    table = pd.concat([by_class, is_right.mean().to_frame().T])
    table.insert(0, "class", [*(SHORT_NAMES.get(name, name) for name in run.data.classes), "all"])
    run.table("accuracy.csv", table)
    return results, words


def explain_int8(run: common.Run, images: Tensor, results: dict[str, Row]) -> list[str]:
    """If our int8 file was refused, find the node type to blame: the one that helps most when kept in fp32."""
    import onnx

    source, trial, kept = run.folder / "model.onnx", run.folder / "trial.onnx", dict[str, float]()
    if not results.get("onnx_int8", Row()).get("refused"):
        return []
    run.stage("finding the cause of the int8 loss")

    few = images[:200]

    def labels(path: Path) -> np.ndarray:
        file = OnnxFile(path, few.shape[1:])
        parts = few.split(file.batch or len(few))
        return np.concatenate([file.run(file.prepare(part)) for part in parts])[: len(few)].argmax(1)

    for kind in ["none", *sorted({node.op_type for node in onnx.load(source).graph.node})]:
        with contextlib.suppress(Exception):  # only a hint
            quantise(few, source, trial, kind)
            kept[kind] = 100 * (labels(trial) == labels(source)).mean()
        trial.unlink(missing_ok=True)
    before, best = kept.get("none", 100), max(kept, key=kept.__getitem__, default="none")
    if kept.get(best, 0) - before <= (100 - before) / 2:
        return ["No type of nodes explains most of the accuracy loss of onnx_int8."]
    figures = f"{before:.0f} % of {len(few)} training images keep their label, {kept[best]:.0f} % with these in fp32"
    return [f"The accuracy loss of onnx_int8 is mainly due to its {best} nodes: {figures}."]


# ================================================================ 5. speed


def measure(run: common.Run, how: Any, ask: Any, results: dict[str, Row]) -> tuple[list[Row], BaseException | None]:
    """Time all engines that were not refused: a row per engine, batch size, start and round; and what ended it early.

    Complete rounds are kept. If model.onnx itself was refused, nothing is timed. ``ask`` is for the first start.
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
    except (KeyboardInterrupt, UserError) as error:
        if isinstance(error, UserError) and not rows:
            raise
        return rows, error
    return rows, None


def compare(run: common.Run, results: dict[str, Row], rows: list[Row]) -> Any:
    """A table of latencies and of speed-ups over RIVALS, by engine and batch size; also added to ``results``."""
    import pandas as pd
    from scipy import stats

    if not rows:
        return pd.DataFrame()
    frame = pd.DataFrame(rows)
    run.table("latency.csv", frame)
    rounds = frame["engine"].value_counts()
    frame = frame[frame["engine"].map(rounds) == rounds.max()]  # no engine that died in between
    frame["engine"] = pd.Categorical(frame["engine"], [name for name in results if name in {*frame["engine"]}])
    metrics = ["p50_ms", "p90_ms", "p99_ms", "mean_ms"]
    by_start = frame.groupby(["engine", "batch_size", "start"], observed=True)[metrics].agg(stats.gmean)
    speeds = by_start.groupby(["engine", "batch_size"], observed=True).agg(stats.gmean)
    speeds["images_per_second"] = 1000 * speeds.index.get_level_values("batch_size") / speeds["mean_ms"]
    starts = np.log(by_start["p50_ms"].unstack(["engine", "batch_size"]))
    for key, rival in RIVALS.items():
        if rival in starts:
            logs = [starts[rival, size] - starts[name, size] for name, size in speeds.index]
            speeds[[key + end for end in ENDS]] = np.exp([common.interval(log)[:3] for log in logs])
    for name, row in frame.groupby("engine")[["load_ms", "first_call_ms", "added_rss_bytes"]].median().iterrows():
        results[name] |= row.to_dict()
    for (name, size), row in speeds.iterrows():
        results[name]["batch"][str(size)] = row.to_dict()
    return speeds


# ================================================================ 6. verdict and report


def summarise(how: Any, results: dict[str, Row], rows: list[Row], verdict: list[str], is_interrupted: bool) -> Row:
    """The content of summary.json; ``faults`` are the refusals of exact engines."""
    faults = [row["refused"] for row in results.values() if row["refused"] and row["exact"]]
    facts = {"task": "task4", "threads": how.threads, "test_pictures": how.test_images, "flop_per_picture": how.flop}
    facts |= {"interrupted": is_interrupted, "starts": len({row["start"] for row in rows}), "rounds": how.rounds}
    return facts | {"engines": results, "verdict": verdict, "faults": faults}


def speeds_in_words(speeds: Any) -> list[str]:
    """The speed-ups at the smallest and largest batch; no difference is claimed if the interval includes 1."""
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
    """Print accuracies and times as in the original report, tables and verdict; returns the paragraphs of report.md."""
    import pandas as pd

    results = summary["engines"]
    for name in (name for name in ("torch_fp32", "onnx_fp32", "onnx_int8") if name in results):
        print(f"\n{name}:")
        for label, accuracy in zip(run.data.classes, results[name]["class_accuracy"], strict=True):
            print(f"Accuracy for class: {SHORT_NAMES.get(label, label)} is {100 * accuracy:.1f} %")
        if results[name]["batch"]:
            print(f"Time, ms:  {next(iter(results[name]['batch'].values()))['p50_ms']:.4g}")
    frame = pd.DataFrame.from_dict(results, orient="index")
    frame["file_mb"], frame["added_mb"] = frame["size_bytes"] / 1e6, frame.get("added_rss_bytes", np.nan) / 1e6
    columns = ["accuracy", "agreement", "max_abs_logit_diff", "file_mb", "load_ms", "first_call_ms", "added_mb"]
    tables = {"quality": frame.reindex(columns=columns).map("{:.4g}".format)}
    for key in filter(speeds.columns.__contains__, ("p50_ms", "speedup_over_tuned", "speedup")):
        ends, form = [key + end for end in ENDS], "{:.2f} [{:.2f}, {:.2f}]" if key in RIVALS else "{:.3g}"
        texts = [form.format(*row).removesuffix(" [0.00, inf]") for row in speeds.reindex(columns=ends).to_numpy()]
        title = f"times as fast as {RIVALS[key]} [95 %]" if key in RIVALS else "p50, ms"
        tables[title] = pd.Series(texts, speeds.index).unstack()
    where = f"{run.data.source}, {summary['test_pictures']:,} test images, {summary['threads']} thread(s) per engine, "
    where += f"{summary['starts']} start(s) of {summary['rounds']} round(s){', INTERRUPTED' * summary['interrupted']}"
    verdict = [f"- {sentence}" for sentence in summary["verdict"]]
    paragraphs = ["# Task 4: what does ONNX buy?", where, "\n".join(verdict)]
    for title, table in tables.items():
        print(f"\n{title}\n{table.to_string()}")
        paragraphs += [f"**{title}**", table.to_markdown(disable_numparse=True)]
    print("", *(textwrap.fill(line, 99, subsequent_indent="  ") for line in verdict), sep="\n")
    drawn = [name for name in NOTICE if (run.folder / f"{name}.png").exists()]
    paragraphs += ["## Figures", *(f"![{name}]({name}.png)\n\n*{NOTICE[name]}*" for name in drawn)]
    limits = "One machine, one network: another processor or library version may rank the engines differently."
    return [*paragraphs, "## Protocol and limits", *str(__doc__).split("\n\n")[1:3], limits]


# ================================================================ 7. figures


def draw_disagreements(run: common.Run, data: common.Dataset, logits: dict[str, np.ndarray]) -> None:
    """Show test images whose label int8 changes or, if there are none, those nearest to a decision boundary."""
    import pandas as pd

    name, ordered = "onnx_int8" if "onnx_int8" in logits else "onnx_fp32", np.sort(logits["torch_fp32"], axis=1)
    columns = {"true": data.test_labels.numpy(), "torch": logits["torch_fp32"].argmax(1), name: logits[name].argmax(1)}
    frame = pd.DataFrame(columns | {"margin": ordered[:, -1] - ordered[:, -2]}).rename_axis("test_image")
    changed = frame[frame["torch"] != frame[name]]
    run.table("disagreements.csv", changed.reset_index())
    shown = changed.sample(min(24, len(changed)), random_state=0).sort_index()
    title = f"{name} changes the label of {len(changed):,} of {len(frame):,} test images, {len(shown)} of them here"
    if not len(shown):
        title, shown = title.replace("0 of them here", "these are the closest calls"), frame.nsmallest(24, "margin")
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
    """Latency by engine, images per second by batch size, and accuracy against latency, if anything was timed."""
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
        axis.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter="")

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
        for name in rates:
            axes[0][0].plot(rates.index, rates[name], color=COLOUR[name], marker="o", label=name)
        scale(axes[0][0], "batch size")
        axes[0][0].set(yscale="log", ylabel="images per second", xticks=rates.index)
        drawing.legend(loc="outside right center")
    title = f"{best}: accuracy {0 - summary['engines'][best]['accuracy_drop']:+.2f} points, fastest at batch {sizes[0]}"
    with run.figure("pareto.png", f"{title}\n{where}", size=(10.5, 6)) as (drawing, axes):
        largest = max(row["size_bytes"] for row in summary["engines"].values())
        before = 100 * summary["engines"]["torch_fp32"]["accuracy"]
        for name, x in p50.iloc[0].items():
            row, fill = summary["engines"][name], (COLOUR[name], 0.35)
            style: Row = {"facecolor": fill, "edgecolor": COLOUR[name], "s": 600 * row["size_bytes"] / largest}
            axes[0][0].vlines(x, *(before - row["accuracy_drop" + end] for end in ENDS[1:]), color=COLOUR[name])
            axes[0][0].scatter(x, 100 * row["accuracy"], label=f"{name}, {row['size_bytes'] / 1e6:.2f} MB", **style)
        scale(axes[0][0], f"latency (p50) at batch {sizes[0]}, ms; circle area: file size")
        axes[0][0].set(ylabel="test accuracy, % (lines: 95 % interval of its change)")
        axes[0][0].margins(0.2, 0.4)
        drawing.legend(loc="outside right center", labelspacing=1.3)


if __name__ == "__main__":
    sys.exit(main())
