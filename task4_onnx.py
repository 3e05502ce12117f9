"""Task 4: what does ONNX buy? Convert a small CNN, verify the saved files on the test set, then measure the speed.

Found (JPEG copy of CIFAR-10, one thread of a Xeon with AVX-512, 5 starts): the same label on 10,000 of 10,000 images;
one image takes ONNX 0.11 ms, compiled torch 2.7 times as long [2.6, 2.9], tuned torch 3.4 times, eager torch 6.9 times;
int8 0.057 ms, no loss shown. With 256 images compiled torch needs 8 % less time than ONNX, int8 less than half of it.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import copy
import functools
import hashlib
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parent))  # where PYTHONSAFEPATH and -P leave it out
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
    from torch.autograd.profiler_util import FunctionEvent

PROTOCOL = """\
Protocol: train the network (a preset plus one epoch: small takes 8 TFLOP, about a minute on 2 cores with AVX-512) or
load one, fold BatchNorm into the convolutions, export to ONNX, quantise to int8 using training images only. Every
engine runs in its own process with the same number of threads. First, all engines classify the whole test set (500
images in the smallest batches that are timed, the others in the largest): an exact engine must reproduce torch's
logits, an approximate one (bf16, int8) may lose a little accuracy; engines that fail are not timed. Then they are
timed in rounds, in random order, so that disturbances affect all. All processes are restarted several times, because
a process keeps its memory layout, and with it its speed.

A timed call goes from a batch of test images in memory, in the engine's preferred layout, to logits in memory;
torch_cuda and onnx_cuda include copies to and from the GPU, the other CUDA engines do not. Latencies are geometric
means, over starts and rounds, of each round's median; p99 is that of all calls together. Speed-ups are ratios of
these medians. 95 % intervals are over the starts of one session: another day or machine may lie outside. "Not told
apart" means that such an interval includes 1. Load time, first call and the memory that both add (after imports) are
medians.

Operators are profiled by the runtimes themselves, in the first three starts, after the timing of each. A profiler
adds some microseconds to every operator. They are subtracted: for ONNX Runtime the same from each, so that its
operators and an idle network, of as many operators that compute next to nothing, take as long as a call without a
profiler; for torch what profiled calls take longer, divided by the number of events. Framework overhead (Python,
dispatching and, for large batches, getting memory) is therefore the latency of that idle network for ONNX Runtime,
what remains of a call for torch.

A cold start is a program that imports only what it needs (for torch: torch and the lab's common.py), with its files
in the system's cache; its memory is all that is resident. Times from files include reading, decoding and, if
necessary, resizing (Pillow); images of an archive are written as PNG files first. Idle threads wait as their library
does by default; ONNX Runtime's telemetry is off. Processes and threads are compared in at most three starts."""
GLOSSARY = """\
torch_fp32 is eager torch in its default layout. torch_tuned_fp32 is channels_last, with BatchNorm folded, where the
network allows it (and, for the lab's own networks, activations in place); torch_bf16 is that in bf16; torch_compiled is
torch_tuned_fp32 compiled ahead of time by Inductor. onnx_fp32 and onnx_int8 are ONNX Runtime. p50 is the median latency
of a call; a batch is the number of images in it."""
LIMITS = "Speeds are of one machine and one network: other processors or library versions may rank engines differently."
# The report answers these questions, in this order.
SAME = "Is it still the same network?"
FASTER = "Is it faster?"
WHY = "Why?"
DEPLOYED = "What does it save where it is deployed?"
CAPTIONS = {  # of the figures, by question
    SAME: {
        "disagreements": "Green labels are right, red ones wrong. Notice whether int8 breaks more than it corrects."
    },
    FASTER: {
        "latency": "One engine per row. Notice how far slow calls lie from p50, and whether the rounds agree. p99 is "
        "that of all calls together; of fewer than 1,000, the largest is shown.",
        "throughput": "Notice which lines cross: the fastest engine for one image need not be the fastest for many.",
        "pareto": "Up and to the left is better. Notice whether the lines of int8 and bf16 reach the others' accuracy.",
    },
    WHY: {
        "profile": "Notice which part shrinks from torch to ONNX Runtime, and whether it does so at both batch sizes. "
        "ONNX Runtime computes most activations within its convolutions."
    },
    DEPLOYED: {},
}
NOT_MEASURED = ("output_dir", "data_dir", "other_runs", "workers", "precision")  # options

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
IN_SMALL_BATCHES = 500  # test images that are classified in the smallest batches
MIN_CALLS = 3  # timed per engine, batch size and round
MIN_SECONDS = 0.3
MIN_AGREEMENT = 0.999  # of exact engines: of labels
PATIENCE = 1800  # seconds to wait for an engine's answer
CLEARLY_ABOVE_CHANCE = 0.2  # of the way from chance to 100 %
SHARE_OF_CAUSE = 0.1  # of a difference in time: smaller parts of it are not mentioned
CALLS_FOR_P99 = 1000  # with fewer, less than ten calls lie beyond it
FEW_STARTS = 3  # suffice for profiles and for processes against threads
# The progress bar counts images trained on. Other work is its estimated seconds times PACE.
PACE = 4000  # images trained on in a second
WORK_OF_FILES = 20 * PACE
WORK_OF_CHECKS = 30 * PACE  # of the files: starting all engines and classifying the test images
WORK_OF_START = 40 * PACE  # starting all engines, timing and profiling them
WORK_OF_COLD_START = 3 * PACE
WORK_OF_SERVING = 15 * PACE  # in one start
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
    add(
        "--normalise",
        choices=NORMALISATIONS,
        help="of images for a plain state dict in --checkpoint (default: what classifies training images best)",
    )
    common.add_other_runs(parser, "of other networks or on other machines, that the report compares with this one")
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
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime reads it once; 1.29 and later would report usage
    require_libraries()
    check_paths(options)
    checkpoint = open_checkpoint(options)  # None for a plain state dict, too
    data = open_data(options, checkpoint)
    recipe = choose_recipe(options, data, checkpoint)
    given = examine(options.onnx, data) if options.onnx else None
    other_runs = [read_other_run(folder, options, data) for folder in options.other_runs]
    with (
        common.open_run(options, data) as run,  # run.data: no test images
        scratch_folder(run.output) as scratch,
        environment_of_engines(scratch),
    ):
        run.progress.expect(work_of_training(options, run.data, recipe) + WORK_OF_FILES)
        run.progress.expect(WORK_OF_CHECKS + work_of_measuring(options))
        model = obtain_model(run, options, recipe, checkpoint)
        given = given and normalise_inputs(given, model, run.data)
        tuning = find_tuning(model, run.data)
        calibration = make_files(run, options, model, given, tuning)
        setup = set_up(run, options, data, model, given, scratch, tuning)
        with EnginePool(run, setup, available_engines(run, options)) as pool:
            logits = classify(run, pool)
            qualities = judge(run, options, logits, data, given)
            cause = explain_int8(run, calibration, qualities, given)
            measured = measure(run, options, pool, qualities)
        results = Results(
            options=options,
            data=data,
            setup=setup,
            network=checksum(model),
            parameters=sum(weight.numel() for weight in model.parameters()),
            qualities=qualities,
            int8_cause=cause,
            measured=measured,
            speeds=find_speeds(measured.timings),
            other_runs=other_runs,
        )
        draw_disagreements(run, data, logits)
        draw_speeds(run, results)
        print_results(results)
        run.finish(summarise(results), write_report(run, results), options, common.command_line(__file__, argv))
        if not options.checkpoint:
            network = f"--model {options.model} " if options.model else ""
            print(
                f"\n{network}--checkpoint {run.output / 'model.pth'} measures this network again, without training it."
            )
    if measured.interruption:
        raise measured.interruption
    return 1 if results.faults else 0


# ================================================================ 1. data and network


def require_libraries() -> None:
    """Say at once what would be missing after the training."""
    for name in ("onnx", "onnxruntime", "onnxscript", "pandas", "scipy", "tabulate"):
        if not importlib.util.find_spec(name):
            raise UserError(f"{name} is not installed: pip install -r requirements.txt")


def check_paths(options: argparse.Namespace) -> None:
    """Refuse folders that libraries cannot open, and inputs in unfinished_run, which this run empties at its start."""
    unfinished = (options.output_dir / "unfinished_run").resolve()
    with common.user_error("--output-dir: onnxruntime opens only paths that are UTF-8", UnicodeDecodeError):
        os.fsencode(unfinished).decode()
    for path in filter(None, (options.checkpoint, options.onnx)):
        if path.resolve().is_relative_to(unfinished):
            raise UserError(f"{path} lies in a folder that this run clears: move it elsewhere first")


def open_checkpoint(options: argparse.Namespace) -> common.Checkpoint | None:
    """The lab's own --checkpoint; None without one, or if it is a plain state dict for --model."""
    if options.checkpoint is None:
        if options.normalise:
            raise UserError("--normalise is for the plain state dict of --checkpoint")
        return None
    if options.model and not is_of_the_lab(read_foreign(options.checkpoint)):
        return None
    if options.normalise:
        raise UserError(f"--normalise is for a plain state dict: {options.checkpoint} knows its normalisation")
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
        files = tuple(data.test_files[number] for number in chosen.tolist()) if data.test_files else ()
        data = replace(
            data, test_images=data.test_images[chosen], test_labels=data.test_labels[chosen], test_files=files
        )
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
    if not options.checkpoint:
        runtime = common.resolve_runtime(options.device, options.precision)
        common.check_recipe(recipe, data, images_to_train_on(options, data), runtime)
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
    if options.checkpoint:  # of another program, see open_checkpoint
        adopt(model, options.checkpoint)
        check_adopted(model, run.data)
        choose_normalisation(run, options, model, split)
        common.save_checkpoint(path, model, run.data, recipe, options.seed, adopted_from=options.checkpoint.name)
    else:
        if options.model:
            try_export(run, common.make_model(recipe.network, run.data, split, options.seed))
            common.prove_network(run, recipe, split)
        train(run, options, model, recipe.training, split)
        common.save_checkpoint(path, model, run.data, recipe, options.seed)
    return common.load_checkpoint(path, options.model).model  # the engines' network, proved to be the one trained


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


def checksum(model: nn.Module) -> str:
    """It tells networks apart by their weights."""
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(key.encode() + value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- checkpoints of other programs

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module"})  # DataParallel, DDP, EMA; compile; FSDP
COUNTERS = frozenset({"n_averaged", "total_ops", "total_params"})  # of AveragedModel and of thop: no weights
OPTIONAL = "num_batches_tracked"  # older checkpoints lack it, and networks in eval mode do not use it
AVERAGED = frozenset({"ema", "swa", "average", "averaged", "avg"})  # words in the names of averaged weights
DEPTH = 3  # to which state dicts are looked for


class Opaque:
    """Stands for an object of numpy's."""

    def __init__(self, *_: object) -> None:
        return

    def __setstate__(self, _: object) -> None:
        return


def placeholder(name: str) -> type:
    """A class that stands for a foreign one, whose loading would execute code: it makes marked OrderedDicts.

    torch's loader sets their attributes and fills them, so that subclasses of dict keep what they hold.
    """
    if name.startswith("numpy."):
        return type(name, (Opaque,), {})

    def create(_: type, *__: object, **___: object) -> OrderedDict[Any, Any]:
        content: OrderedDict[Any, Any] = OrderedDict()
        content.__dict__["stands_for"] = name
        return content

    return type(name, (), {"__new__": create})


def read_foreign(path: Path) -> object:
    """What another program saved by ``torch.save``: tensors and containers, placeholders for everything else."""
    if path.suffix == ".safetensors":
        save = f"torch.save(safetensors.torch.load_file({path.name!r}), 'weights.pth')"
        raise UserError(f"{path} is no file of torch's: {save}")
    names: list[str] = []
    with contextlib.suppress(Exception):  # read_tensors says what is wrong with the file
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    classes: list[Any] = [(placeholder(name), name) for name in names]
    with torch.serialization.safe_globals(classes):
        try:
            return common.read_tensors(path)
        except UserError as error:
            if "TorchScript" not in str(error.__cause__):
                raise
            save = f"torch.save(torch.jit.load({path.name!r}).state_dict(), 'weights.pth')"
            raise UserError(f"{path} is a TorchScript program; save its weights: {save}") from error


def is_of_the_lab(content: object) -> bool:
    """Whether ``common.save_checkpoint`` wrote it."""
    return isinstance(content, dict) and content.get("format") == common.CHECKPOINT


class FoundWeights(NamedTuple):
    """A state dict for the network, found in a checkpoint."""

    place: str  # in the checkpoint: ['model_ema'], or nothing
    prefix: str  # that its keys had
    state: dict[str, Tensor]

    @property
    def is_averaged(self) -> bool:
        """Whether these are averages over the training, by their name."""
        return not AVERAGED.isdisjoint(re.split("[^a-z]+", f"{self.place}{self.prefix}".lower()))

    @property
    def words(self) -> str:
        """Where they were found."""
        keys = f"keys without {self.prefix!r}" if self.prefix else ""
        return ", ".join(filter(None, [self.place, keys])) or "the whole file"


def adopt(model: nn.Sequential, source: Path) -> None:
    """Load weights that another program saved into the network behind the normalisation; raises UserError.

    They may lie in a container, their keys may have a prefix. Averaged weights are preferred, as they are by timm.
    """
    content = read_foreign(source)
    network = model[1]
    if not isinstance(content, dict):
        raise UserError(f"{source} does not hold a state dict for --model, but a {type(content).__name__}")
    places = list(state_dicts(content))
    found = [weights for place, state in places for weights in matches(network, place, state)]
    found.sort(key=lambda weights: not weights.is_averaged)  # otherwise in the file's order
    if found:
        network.load_state_dict(found[0].state, strict=False)  # may lack what is optional
        tell_what_was_taken(source, found)
        return
    refuse_module(content, source)
    _, state = max(places, key=lambda item: len(item[1]), default=("", {}))
    try:  # torch says what is missing
        network.load_state_dict({without_wrappers(key): value for key, value in state.items()})
    except (RuntimeError, TypeError, AttributeError) as error:
        faults = " ".join(str(error).split())[:300]  # in one line
        raise UserError(f"{source} does not hold a state dict for --model: {faults}") from error


def check_adopted(model: nn.Sequential, data: common.Dataset) -> None:
    """Raise UserError unless the network gives the same logits for the data's images each time."""
    with common.user_error("the network of --model cannot be used", Exception):
        runtime = common.Runtime("cpu", "fp32", 1)
        common.check_evaluation(model, data.train_images[:2], runtime, len(data.classes))


def tell_what_was_taken(source: Path, found: Sequence[FoundWeights]) -> None:
    """Say it if there was something to choose or to convert."""
    kinds = {str(value.dtype).removeprefix("torch.") for value in found[0].state.values() if value.is_floating_point()}
    others = [weights.words for weights in found[1:]]
    if found[0].words == "the whole file" and kinds <= {"float32"} and not others:
        return
    average = "averaged weights, " if found[0].is_averaged else ""
    precision = f", saved as {in_list(sorted(kinds))}" if kinds - {"float32"} else ""
    rest = f"; not taken: {in_list(others)}" if others else ""
    note(f"weights of {source}: {average}{found[0].words}{precision}{rest}")


def refuse_module(content: Mapping[object, object], source: Path) -> None:
    """Raise UserError, with the line that helps, if a checkpoint holds a pickled module instead of its weights."""
    for place, value in (("", content), *((f"[{key!r}]", value) for key, value in content.items())):
        attributes = getattr(value, "__dict__", {})
        if "stands_for" in attributes and "_modules" in attributes:
            load = f"torch.load({source.name!r}, weights_only=False, map_location='cpu'){place}"
            raise UserError(
                f"{source} holds a pickled {attributes['stands_for']}, which is not loaded, because that would execute "
                f"code; where its class is defined, save its weights: torch.save({load}.state_dict(), 'weights.pth')"
            )


def state_dicts(
    content: Mapping[Any, object], place: str = "", depth: int = 0
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """All dictionaries with tensors under names in a checkpoint, and where they are."""
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        yield place, tensors
    for key, value in content.items():
        if depth < DEPTH and isinstance(key, str) and isinstance(value, dict):
            yield from state_dicts(value, f"{place}[{key!r}]", depth + 1)


def without_wrappers(key: str) -> str:
    """A key of a state dict without the names of modules that only wrap others."""
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def matches(network: nn.Module, place: str, state: Mapping[str, Tensor]) -> Iterator[FoundWeights]:
    """The parts of a state dict that have all of the network's keys behind one prefix, and no others there."""
    network_state = network.state_dict()
    wanted = {without_wrappers(key): key for key, value in network_state.items() if isinstance(value, Tensor)}
    needed = {key for key in wanted if not key.endswith(OPTIONAL)}
    given = {without_wrappers(key): value for key, value in state.items()}
    first = next(iter(wanted), "")
    for prefix in sorted({key.removesuffix(first) for key in given if f".{key}".endswith(f".{first}")}):
        behind = {key.removeprefix(prefix): value for key, value in given.items() if key.startswith(prefix)}
        weights = {key: value for key, value in behind.items() if key.rpartition(".")[2] not in COUNTERS}
        found = {wanted[key]: value for key, value in weights.items() if key in wanted}
        same_shapes = all(value.shape == network_state[key].shape for key, value in found.items())
        if needed <= weights.keys() <= wanted.keys() and same_shapes:
            yield FoundWeights(place, prefix, found)


# What checkpoints do not say: (mean, std) of each channel that the network expects, as most programs have them.
NORMALISATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]] | None] = {
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "dataset": None,  # the training images' own
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # of torchvision's pretrained networks
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
IMAGES_FOR_CHOICE = 500


def normalise_layer(name: str, split: common.Split) -> common.Normalise:
    """One of NORMALISATIONS, for the three channels that networks of the user's get."""
    mean, std = NORMALISATIONS[name] or (split.mean, split.std)
    copies = 3 // len(mean)
    return common.Normalise([*mean] * copies, [*std] * copies)


def choose_normalisation(
    run: common.Run, options: argparse.Namespace, model: nn.Sequential, split: common.Split
) -> None:
    """Put --normalise in front of the network or, without it, what classifies some training images best."""
    index = common.split_dataset(run.data, IMAGES_FOR_CHOICE, validation=False).train
    images, labels = run.data.train_images[index], run.data.train_labels[index]
    runtime = common.Runtime("cpu", "fp32", common.usable_cores())
    logits = {}
    for name in NORMALISATIONS:
        candidate = nn.Sequential(normalise_layer(name, split), model[1])
        logits[name] = common.predict(candidate, images, runtime)
    scores = {name: common.score(values, labels) for name, values in logits.items()}
    best = max(scores, key=lambda name: (scores[name].accuracy, -scores[name].loss))
    taken = options.normalise or best
    model[0] = normalise_layer(taken, split)
    if not options.normalise:
        accuracies = ", ".join(f"{name} {100 * score.accuracy:.1f} %" for name, score in scores.items())
        note(
            f"{options.checkpoint} does not say how images are to be normalised; accuracy on {len(index)} training "
            f"images: {accuracies}. Taken: {taken} (--normalise decides otherwise)"
        )
    warn_of_chance(logits, labels, scores[taken].accuracy)


def warn_of_chance(logits: Mapping[str, Tensor], labels: Tensor, accuracy: float) -> None:
    """Say what may be wrong if the accuracy is hardly above chance: classes in another order, for example."""
    chance = float(labels.bincount().max()) / len(labels)
    clearly_above = chance + CLEARLY_ABOVE_CHANCE * (1 - chance)
    if accuracy > clearly_above:
        return
    reordered = {name: reordered_accuracy(values, labels) for name, values in logits.items()}
    best = max(reordered, key=reordered.__getitem__)
    reason = "the images may be of another kind, or the weights untrained"
    if reordered[best] > clearly_above:
        in_words = f"{100 * reordered[best]:.1f} % with the classes in another order and --normalise {best}"
        reason = f"it would be {in_words}"
    note(f"an accuracy of {100 * accuracy:.1f} % is not clearly above chance ({100 * chance:.0f} %): {reason}")


def reordered_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Accuracy with the classes in the order that suits one half of the images best, on the other half."""
    from scipy.optimize import linear_sum_assignment

    guesses = logits.argmax(1)
    half = len(labels) // 2
    confusion = np.zeros((logits.shape[1], logits.shape[1]))
    np.add.at(confusion, (guesses[:half].numpy(), labels[:half].numpy()), 1)
    _, order = linear_sum_assignment(confusion, maximize=True)
    return float((torch.from_numpy(order)[guesses[half:]] == labels[half:]).float().mean())


# ================================================================ 2. ONNX files


def fold(model: nn.Sequential, for_export: bool = False) -> nn.Module:
    """A copy in eval mode with BatchNorm folded into convolutions; ``model`` itself if it is not traceable.

    Of SmallCNN there are two: ``for_export`` activations follow their convolution, so that a runtime can fuse the two;
    torch, which computes one after the other, does better to pool first and to activate in place.
    """
    normalise, network = model
    if isinstance(normalise, common.Normalise) and isinstance(network, common.SmallCNN):
        return fold_small_cnn(normalise, network, for_export)
    from torch.fx.experimental.optimization import fuse

    with contextlib.suppress(Exception):  # tracing runs the user's code in ways that it was not written for
        return fuse(model)
    return model


class Tuning(NamedTuple):
    """What may be done to a network without changing its logits."""

    folds: bool = True  # BatchNorm into convolutions, see ``fold``
    layout: torch.memory_format = torch.channels_last

    def apply(self, model: nn.Sequential) -> nn.Module:
        """The tuned network, a copy if it is folded."""
        return common.set_layout(fold(model) if self.folds else model, self.layout)


def find_tuning(model: nn.Sequential, data: common.Dataset) -> Tuning:
    """The most that keeps the logits; for a network of the user's that may be nothing, which is said."""
    if isinstance(model[1], common.SmallCNN):
        return Tuning()
    images = data.train_images[:4].float() / 255
    with torch.no_grad():
        logits = model(images)
    for tuning in (Tuning(), Tuning(layout=torch.contiguous_format), Tuning(folds=False)):
        # torch.fx prints a traceback of what it cannot run.
        with torch.no_grad(), contextlib.suppress(Exception), contextlib.redirect_stderr(io.StringIO()):
            if common.is_same(tuning.apply(model)(images.contiguous(memory_format=tuning.layout)), logits):
                break
    else:
        tuning = Tuning(folds=False, layout=torch.contiguous_format)
    has_batch_norm = any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.modules())
    if has_batch_norm and not tuning.folds:
        note("BatchNorm is not folded into the convolutions: that would change what this network computes")
    return tuning


@torch.no_grad()
def fold_small_cnn(normalise: common.Normalise, network: common.SmallCNN, for_export: bool) -> nn.Sequential:
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
        layers += fold_block(block, for_export)
    for layer in layers:
        if hasattr(layer, "inplace"):
            setattr(layer, "inplace", not for_export)  # noqa: B010 (nn.Module has no such attribute)
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), network.head)


def fold_block(block: common.Block, for_export: bool) -> list[nn.Module]:
    """The layers of a block, BatchNorm folded: its scale is positive, so it commutes with the pooling before it."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    convolution = fuse_conv_bn_eval(block.convolution, block.norm)
    if isinstance(block.pool, nn.Identity):
        return [convolution, block.activation]
    if for_export and isinstance(block.activation, nn.ReLU):  # which commutes with pooling, too
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
        if self.batch and self.batch != len(array):
            array = np.resize(array, (self.batch, *array.shape[1:]))
        array = np.ascontiguousarray(array)  # or the runtime copies it in every call
        return array if self.dtype == "uint8" else array.astype(self.dtype) / np.array(255, self.dtype)


INPUT_TYPES = {"tensor(double)": "float64", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}


class OnnxFile:
    """A session of ONNX Runtime for an ONNX file, on the CPU or, as ``device`` cuda or cuda:1, on a GPU."""

    def __init__(
        self,
        file: Path | bytes,
        shape: common.Shape,
        threads: int = 1,
        device: str = "cpu",
        profile: Path | None = None,
    ) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        if profile:  # how the name of a file begins that end_profiling() writes
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # errors are raised anyway
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
        dtype = INPUT_TYPES.get(wanted.type, "float32")
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

    content: bytes  # with the weights, which may have been in a file beside it
    batch: int | None  # the only batch size it takes
    is_quantised: bool
    is_half: bool  # its weights have 16 bits

    @property
    def name(self) -> str:
        """The file of this run whose place it takes."""
        return "model_int8.onnx" if self.is_quantised else "model.onnx"


def examine(path: Path, data: common.Dataset) -> GivenFile:
    """Try an ONNX file made elsewhere on some images; raises UserError if it cannot be judged."""
    import onnx

    wanted = f"an ONNX file for images {list(data.shape)}"
    with common.user_error(f"{path} is not {wanted}", Exception):  # the file may provoke anything
        proto = onnx.load(path)
        keep_logits(proto, path, data)
        content = proto.SerializeToString()
        file = OnnxFile(content, data.shape)
        outputs = file.classify(data.train_images[:2])
        if outputs.shape[1:] != (len(data.classes),) or not np.isfinite(outputs).all():
            raise ValueError(f"outputs {outputs.shape}, expected finite logits of {len(data.classes)} classes")
    operators = {node.op_type for node in proto.graph.node}
    given = GivenFile(
        content=content,
        batch=file.format.batch,
        is_quantised=any(re.search("Quant|QLinear|QGemm|QAttention|Integer|NBits", name) for name in operators),
        is_half=has_half_weights(proto),
    )
    if given.is_half:
        note(f"the weights of {path} have 16 bits: it is judged by its accuracy, not by equal logits")
    return given


def normalise_inputs(given: GivenFile, model: nn.Sequential, data: common.Dataset) -> GivenFile:
    """Put the network's normalisation in front of a file that expects normalised images, as most are exported."""
    import onnx
    from onnx import helper, numpy_helper

    normalise = model[0]
    assert isinstance(normalise, common.Normalise)
    file = OnnxFile(given.content, data.shape)
    images = data.train_images[: given.batch or 8]
    with torch.no_grad():
        logits = model(images.float() / 255).numpy()
        normalised = normalise(images.float() / 255)
    if not file.format.dtype.startswith("float") or normalised.shape != images.shape:  # grey ones, repeated
        return given
    inputs = normalised.permute(0, 2, 3, 1) if file.format.channels_last else normalised
    as_they_are, as_normalised = (
        file.run(batch).astype(np.float32)
        for batch in (file.format.prepare(images), np.ascontiguousarray(inputs.numpy().astype(file.format.dtype)))
    )
    distances = [np.abs(found - as_ends(found, logits)[0]).mean() for found in (as_they_are, as_normalised)]
    if not distances[1] < distances[0] / 4:
        return given
    note("the ONNX file expects normalised images: the network's normalisation is put in front of it")
    proto = onnx.load_from_string(given.content)
    graph = proto.graph
    names = [f"{file.input} {step}" for step in ("mean", "std", "centred", "normalised")]
    for node in graph.node:
        node.input[:] = [names[3] if name == file.input else name for name in node.input]
    for name, values in zip(names, (normalise.mean, normalise.std), strict=False):
        array = values.flatten().numpy().astype(file.format.dtype)
        array = array if file.format.channels_last else array[:, None, None]
        graph.initializer.append(numpy_helper.from_array(array, name))
    graph.node.insert(0, helper.make_node("Sub", [file.input, names[0]], [names[2]]))
    graph.node.insert(1, helper.make_node("Div", [names[2], names[1]], [names[3]]))
    return given._replace(content=proto.SerializeToString())


def keep_logits(proto: ModelProto, path: Path, data: common.Dataset) -> None:
    """Keep the first output that has a value for every class; others are features, for example."""
    outputs = list(proto.graph.output)
    if len(outputs) > 1:
        file = OnnxFile(proto.SerializeToString(), data.shape)
        found = file.session.run(None, {file.input: file.format.prepare(data.train_images[: file.format.batch or 2])})
        fitting = [
            output for output, value in zip(outputs, found, strict=True) if value.shape[1:] == (len(data.classes),)
        ]
        del proto.graph.output[:]
        proto.graph.output.extend(fitting[:1] or outputs[:1])
        names = in_list([output.name for output in outputs])
        note(f"{path} has several outputs, {names}: {proto.graph.output[0].name} is judged")


def has_half_weights(proto: ModelProto) -> bool:
    """Whether most weights have 16 bits, be they initialisers or constants."""
    from onnx import TensorProto

    constants = (entry.t for node in proto.graph.node if node.op_type == "Constant" for entry in node.attribute)
    sizes = {True: 0, False: 0}
    for tensor in (*proto.graph.initializer, *constants):
        if tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16):
            sizes[tensor.data_type != TensorProto.FLOAT] += int(np.prod(tensor.dims))
    return sizes[True] > sizes[False]


def make_files(
    run: common.Run, options: argparse.Namespace, model: nn.Sequential, given: GivenFile | None, tuning: Tuning
) -> Tensor:
    """Write model.onnx and model_int8.onnx, one of which may be ``given``.

    Returns the calibration images, uint8 (N, C, H, W).
    """
    run.progress.stage("exporting and quantising")
    count = 200 if options.quick else CALIBRATION_IMAGES
    images = run.data.train_images[common.split_dataset(run.data, count, validation=False).train]
    fp32 = run.folder / "model.onnx"
    int8 = run.folder / "model_int8.onnx"
    if given:
        (run.folder / given.name).write_bytes(given.content)
    with advice_hidden():
        if not fp32.exists():
            network = fold(model, for_export=True) if tuning.folds else model
            export(network, images, run.data.classes, fp32, is_custom=bool(options.model))
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


def try_export(run: common.Run, model: nn.Sequential) -> None:
    """Export a network of the user's before it is trained; raises UserError if that does not give its logits."""
    run.progress.stage("trying the export")
    images = run.data.train_images[:3]
    path = run.folder / "trial.onnx"
    with torch.no_grad():
        model.train()(run.data.train_images[:32].float() / 255)  # gives BatchNorm its statistics
    model.eval()
    try:
        with advice_hidden():
            export(model, images, run.data.classes, path, is_custom=True)
        with common.user_error("ONNX Runtime cannot run the exported network", Exception):
            file = OnnxFile(path, run.data.shape)
            found = [torch.from_numpy(file.classify(batch)) for batch in images.split([1, 2])]
    finally:
        path.unlink(missing_ok=True)
    with torch.no_grad():
        wanted = [model(batch.float() / 255) for batch in images.split([1, 2])]
    if wanted[1].isfinite().all() and not all(map(common.is_same, found, wanted)):
        raise UserError("the network cannot be exported to ONNX: the exported one has other logits")


def export(network: nn.Module, images: Tensor, classes: Sequence[str], target: Path, is_custom: bool) -> None:
    """Write a network: float32 images (N, C, H, W) in [0, 1] -> logits, N free.

    Raises UserError if the exporter does not know what a network of the user's (``is_custom``) does.
    """
    import onnx

    example = images[:2].float() / 255  # two images: with one, the batch dimension would become fixed
    try:
        program = torch.onnx.export(
            network,
            (example,),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch"},),
            dynamo=True,
            verbose=False,
        )
    except Exception as error:
        if not is_custom:
            raise
        cause = first_line(common.chain_of(error)[-1])[:200]  # the exporter's own message is about its steps
        raise UserError(f"the network cannot be exported to ONNX: {cause}") from error
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
    files: tuple[str, ...]  # of some test images
    model: str | None  # --model, whose checkpoint needs it
    tuning: Tuning  # of torch's network
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
    bf16_devices: frozenset[str]  # those that compute in bf16; where it is emulated, it is slow
    is_quick: bool


@dataclass(frozen=True)
class Engine:
    """A way to run the network."""

    name: str
    classifier: type[Classifier]
    file: str  # of the run's folder
    colour: str  # in every figure
    device: str = "cpu"  # or cuda
    dtype: str = "fp32"  # or bf16, fp16, int8
    is_folded: bool = False  # torch's network: BatchNorm is folded into convolutions, in channels_last
    is_resident: bool = False  # images and logits stay on the device

    @property
    def is_exact(self) -> bool:
        """Whether it must reproduce the logits of torch in fp32."""
        return self.dtype == "fp32"

    @property
    def is_torch(self) -> bool:
        """Whether torch runs it."""
        return issubclass(self.classifier, Torch)

    def is_available(self, machine: Machine) -> bool:
        """Whether it can be tried on this machine."""
        return (
            self.file in machine.files
            and self.device in machine.devices
            and (self.dtype != "bf16" or self.device in machine.bf16_devices)
            and (self.dtype != "fp16" or self.device not in machine.bf16_devices)
            and not (self.classifier.is_compiled and machine.is_quick)
            and all(map(is_installed, self.classifier.libraries))
        )


def is_installed(module: str) -> bool:
    """Whether a library is there; a mere folder of its name is none."""
    spec = importlib.util.find_spec(module.partition(".")[0])
    return bool(spec and spec.origin)


Batch = Any  # whatever a runtime takes
Output = Any  # whatever it gives


def latencies_ms(
    run: Callable[[Batch], object], batches: Iterator[Batch], calls: int, seconds: float = 0.0
) -> np.ndarray:
    """How long each call takes: of so many calls or, if they take less than so many seconds, of more."""
    latencies: list[float] = []
    end = time.perf_counter() + seconds
    while len(latencies) < calls or time.perf_counter() < end:
        batch = next(batches)
        start = time.perf_counter()
        run(batch)
        latencies.append(1000 * (time.perf_counter() - start))
    return np.array(latencies)


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

    def profile(self, batches: Iterator[Batch], calls: int) -> ProfiledCalls:
        """Run so many calls under the runtime's own profiler."""
        raise NotImplementedError


class Placement(NamedTuple):
    """Where torch keeps a network and its images, and how."""

    device: str
    dtype: torch.dtype
    layout: torch.memory_format

    @classmethod
    def of(cls, engine: Engine, setup: EngineSetup) -> Placement:
        """That of an engine."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(engine.dtype, torch.float32)
        layout = setup.tuning.layout if engine.is_folded else torch.contiguous_format
        return cls(setup.device_of(engine), dtype, layout)


def load_network(engine: Engine, setup: EngineSetup) -> nn.Module:
    """The network of a checkpoint, as the engine has it."""
    place = Placement.of(engine, setup)
    model = common.load_checkpoint(setup.folder / engine.file, setup.model, check=False).model
    network = fold(model) if engine.is_folded and setup.tuning.folds else model
    return common.set_layout(network.to(place.device, place.dtype), place.layout)


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

    def profile(self, batches: Iterator[Tensor], calls: int) -> ProfiledCalls:
        """Under torch's profiler: the own time of every operator that computes, without what it calls."""
        from torch.profiler import ProfilerActivity, profile, record_function

        def run(batch: Tensor) -> None:
            with record_function(CALL):
                self.run(batch)

        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            latencies = latencies_ms(run, batches, calls)
        events = profiler.events()
        starts = sorted(event.time_range.start for event in events if event.name == CALL)
        operators = [
            Operator(bisect.bisect(starts, event.time_range.start), event.name, event.self_cpu_time_total / 1000)
            for event in events
            if computes(event)
        ]
        return ProfiledCalls(latencies, operators, len(events) / calls, idle_ms=None)


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
        # Weights packed in advance (TORCHINDUCTOR_FREEZING=1 turns that on) made 256 images 6 % faster, but one image
        # take twice as long (Xeon with AVX-512, one thread).
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
        self.engine = engine
        self.setup = setup
        self.file = self.load()

    def load(self, profile: Path | None = None) -> OnnxFile:
        """A session, see OnnxFile."""
        path = self.setup.folder / self.engine.file
        device = self.setup.device_of(self.engine)
        return OnnxFile(path, self.setup.shape, self.setup.threads, device, profile)

    def prepare(self, images: Tensor) -> np.ndarray:
        """In the file's own format."""
        return self.file.format.prepare(images)

    def run(self, batch: np.ndarray) -> np.ndarray:
        """Logits in memory."""
        return self.file.run(batch)

    def logits(self, output: np.ndarray) -> np.ndarray:
        """They are logits already."""
        return output.astype(np.float32)

    def profile(self, batches: Iterator[np.ndarray], calls: int) -> ProfiledCalls:
        """In a second session, whose profile has the time of every operator."""
        place = self.setup.scratch / f"{self.engine.name}-profile"
        file = self.load(place)
        file.run(next(batches))  # to warm up
        latencies = latencies_ms(file.run, batches, calls)
        written = Path(file.session.end_profiling())
        events = json.loads(written.read_text(encoding="utf-8"))
        written.unlink()
        starts = sorted(event["ts"] for event in events if event["name"] == "model_run")[1:]  # without the warm-up
        nodes = [event for event in events if event["cat"] == "Node" and event["ts"] >= starts[0]]
        nodes = [node for node in nodes if node["args"]["op_name"] not in ("If", "Loop", "Scan")]  # made of others
        operators = [
            Operator(bisect.bisect(starts, node["ts"]), node["args"]["op_name"], node["dur"] / 1000) for node in nodes
        ]
        count = len(nodes) // calls
        return ProfiledCalls(latencies, operators, count, self.idle_ms(count, batches, calls))

    def idle_ms(self, operators: int, batches: Iterator[np.ndarray], calls: int) -> float:
        """The median latency of a network of so many operators that compute next to nothing."""
        from onnx import TensorProto, helper

        dtype = helper.np_dtype_to_tensor_dtype(np.dtype(self.file.format.dtype))
        images = helper.make_tensor_value_info(self.file.input, dtype, [None] * 4)
        names = [
            *(f"{self.file.input} and {self.file.output} {number}" for number in range(operators)),
            self.file.output,
        ]
        nodes = [helper.make_node("Shape", [self.file.input], names[:1])]
        for number, (source, target) in enumerate(itertools.pairwise(names)):
            nodes.append(helper.make_node("Neg" if number % 2 else "Abs", [source], [target]))
        sizes = helper.make_tensor_value_info(self.file.output, TensorProto.INT64, [4])
        graph = helper.make_graph(nodes, "idle", [images], [sizes])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        file = OnnxFile(model.SerializeToString(), self.setup.shape, self.setup.threads)
        return float(np.median(latencies_ms(file.run, batches, calls)))


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
TUNED = Engine("torch_tuned_fp32", Torch, "model.pth", "#8C8C8C", is_folded=True)
COMPILED = Engine("torch_compiled", CompiledTorch, "model.pth", "#E69F00", is_folded=True)
CONVERTED = Engine("onnx_fp32", OnnxRuntime, "model.onnx", "#0072B2")
QUANTISED = Engine("onnx_int8", OnnxRuntime, "model_int8.onnx", "#D55E00", dtype="int8")
ENGINES = (
    BASELINE,
    TUNED,
    Engine("torch_bf16", Torch, "model.pth", "#CC79A7", dtype="bf16", is_folded=True),
    COMPILED,
    Engine("torch_compiled_bf16", CompiledTorch, "model.pth", "#009E73", dtype="bf16", is_folded=True),
    CONVERTED,
    QUANTISED,
    Engine("openvino_fp32", OpenVino, "model.onnx", "#882255"),
    Engine("openvino_int8", OpenVino, "model_int8.onnx", "#C9B037", dtype="int8"),
    Engine("torch_cuda", Torch, "model.pth", "#56B4E9", "cuda", is_folded=True),
    Engine("torch_cuda_resident", Torch, "model.pth", "#332288", "cuda", is_folded=True, is_resident=True),
    Engine("torch_cuda_bf16", Torch, "model.pth", "#AA4499", "cuda", "bf16", is_folded=True, is_resident=True),
    Engine("torch_cuda_fp16", Torch, "model.pth", "#661100", "cuda", "fp16", is_folded=True, is_resident=True),
    Engine("torch_cuda_compiled", GraphTorch, "model.pth", "#999933", "cuda", is_folded=True, is_resident=True),
    Engine("onnx_cuda", OnnxRuntime, "model.onnx", "#F0E442", "cuda"),
    Engine("onnx_cuda_resident", ResidentOnnxRuntime, "model.onnx", "#44AA99", "cuda", is_resident=True),
)


SPEEDUPS = {"speedup_over_tuned": TUNED, "speedup": BASELINE, "speedup_over_compiled": COMPILED}  # in summary.json


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


SCRATCH = "small-cv-lab-"  # how the names of temporary folders begin


@contextlib.contextmanager
def scratch_folder(output: Path) -> Iterator[Path]:
    """A folder beside the results that is removed in the end or, if this run is killed, by the next one.

    Inductor's compiler commands fail in folders with spaces; for these it is a link to a temporary folder.
    """
    folder = output.resolve() / ".engines"
    remove_scratch(folder)
    if " " in str(folder):
        place = "/tmp" if " " in tempfile.gettempdir() else None
        with contextlib.suppress(OSError):  # Windows asks for a privilege
            folder.symlink_to(tempfile.mkdtemp(prefix=SCRATCH, dir=place))
    folder.mkdir(exist_ok=True)
    try:
        yield folder.resolve()
    finally:
        remove_scratch(folder)


def remove_scratch(folder: Path) -> None:
    """Remove the folder or, if it is a link to a temporary one, that and the link."""
    if not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)
        return
    target = folder.resolve()
    if target.name.startswith(SCRATCH):
        shutil.rmtree(target, ignore_errors=True)
    folder.unlink()


def set_up(
    run: common.Run,
    options: argparse.Namespace,
    data: common.Dataset,
    model: nn.Sequential,
    given: GivenFile | None,
    scratch: Path,
    tuning: Tuning,
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
        files=image_files(data, scratch),
        model=options.model,
        tuning=tuning,
        flop=flop,
        batch_sizes=sizes,
        min_calls=MIN_CALLS,
        min_seconds=MIN_SECONDS / 10 if options.quick else MIN_SECONDS,
    )


def end_sizes(batch_sizes: Collection[int]) -> list[int]:
    """The smallest and the largest."""
    return sorted({min(batch_sizes), max(batch_sizes)}) if batch_sizes else []


def read_images(files: Sequence[str], shape: common.Shape) -> Tensor:
    """Images from files, uint8 (N, C, H, W), as a short program would read them."""
    from PIL import Image

    channels, height, width = shape
    arrays = []
    for file in files:
        image = Image.open(file).convert("RGB" if channels == 3 else "L")
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        arrays.append(np.asarray(image))
    return torch.from_numpy(np.stack(arrays).reshape(-1, height, width, channels)).permute(0, 3, 1, 2)


def image_files(data: common.Dataset, scratch: Path, count: int = 64) -> tuple[str, ...]:
    """Files of test images of all classes: the data set's own or, if it has none, PNG files made of its images."""
    from PIL import Image

    ordered = data.test_labels.argsort(stable=True)
    chosen = ordered[torch.linspace(0, len(ordered) - 1, min(count, len(ordered))).long()].tolist()
    if data.test_files:
        files = tuple(data.test_files[number] for number in chosen)
        try:
            read_images(files, data.shape)
        except Exception as error:  # Pillow's; the lab's own reader understands more
            note(f"timed from PNG files, because a plain program does not read these images: {first_line(error)}")
        else:
            return files
    paths = []
    for number in chosen:
        path = scratch / f"{number}.png"
        Image.fromarray(data.test_images[number].permute(1, 2, 0).numpy().squeeze()).save(path)
        paths.append(str(path))
    return tuple(paths)


def count_flop(model: nn.Module, image: Tensor) -> int:
    """Floating-point operations of convolutions and matrix products for one image, uint8 (1, C, H, W)."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:  # with gradients: without, attention is a kernel it does not know
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
    """Latency of each call, in milliseconds: float64 (calls,)."""

    latencies_ms: np.ndarray


class ClassifyFiles(NamedTuple):
    """Classify images from files, as many at a time as the smallest batch holds; the answer is a ``FileTiming``."""


class FileTiming(NamedTuple):
    """Milliseconds of an image (medians) from its file to its logits: in all, and in parts."""

    total_ms: float
    decode_ms: float  # reading, decoding and resizing
    convert_ms: float  # to the runtime's format
    run_ms: float


class Profile(NamedTuple):
    """Profile calls of this batch size; the answer is a ``Profiled``."""

    batch_size: int


class Profiled(NamedTuple):
    """The median latency without the profiler, in milliseconds, and calls under it."""

    latency_ms: float
    calls: ProfiledCalls


class Serve(NamedTuple):
    """Classify batches of this size without a pause; the answer is a ``Served``."""

    batch_size: int


class Served(NamedTuple):
    """What a process has done, and what it took."""

    images: int
    seconds: float
    cpu_seconds: float  # of all threads


Request = Load | Classify | Time | ClassifyFiles | Profile | Serve
Reply = Loaded | np.ndarray | Timing | FileTiming | Profiled | Served


def run_engine(data: common.Dataset, _: common.Runtime, engine: Engine, setup: EngineSetup) -> common.Conversation:
    """An engine's process: import, build what later starts use, too, then answer requests for ever."""
    redirect_stderr(setup.scratch / f"{engine.name}.stderr")
    process = EngineProcess(engine, setup, data.test_images)
    with process.blame():
        for name in engine.classifier.libraries:
            importlib.import_module(name)
        if setup.model:
            common.import_callable(setup.model)
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
            case ClassifyFiles():
                return self.classify_files()
            case Profile(batch_size):
                return self.profile(batch_size)
            case Serve(batch_size):
                return self.serve(batch_size)

    def load(self) -> Loaded:
        """Load the network; the smallest batch is the first call."""
        few = self.images[: self.setup.batch_sizes[0]]
        memory = status_bytes("RssAnon")
        with self.blame():
            start = time.perf_counter()
            self.classifier = self.engine.classifier(self.engine, self.setup)
            loaded = time.perf_counter()
            batch = self.classifier.prepare(few)
            called = time.perf_counter()
            self.classifier.run(batch)
            end = time.perf_counter()
        found = Loaded(1000 * (loaded - start), 1000 * (end - called), status_bytes("RssAnon") - memory)
        if self.setup.model and self.engine.is_torch:  # its code may have been edited, or depend on the process
            common.load_checkpoint(self.setup.folder / BASELINE.file, self.setup.model)
        return found

    def classify(self) -> np.ndarray:
        """Logits of all test images: of the first ones in the smallest batches, of the rest in the largest.

        A runtime may compute small and large batches in different ways.
        """
        smallest, largest = self.setup.batch_sizes[0], self.setup.batch_sizes[-1]
        parts = [*self.images[:IN_SMALL_BATCHES].split(smallest), *self.images[IN_SMALL_BATCHES:].split(largest)]
        outputs = []
        for part in filter(len, parts):
            with self.blame():
                output = self.classifier.logits(self.classifier.run(self.classifier.prepare(part)))
            outputs.append(output[: len(part)])  # to a fixed batch size, images are repeated
        return np.concatenate(outputs)

    def time(self, batch_size: int) -> Timing:
        """Time calls: at least so many, and for at least so many seconds, as the setup says."""
        batches = self.prepared(batch_size)
        with self.blame():
            for _ in range(self.classifier.warm_up_calls):
                self.classifier.run(next(batches))
            return Timing(latencies_ms(self.classifier.run, batches, self.setup.min_calls, self.setup.min_seconds))

    def classify_files(self) -> FileTiming:
        """Read, decode, convert, run: all files once to warm up, then for at least as long as the setup says."""
        size = self.setup.batch_sizes[0]
        files = list(itertools.islice(itertools.cycle(self.setup.files), size * max(1, len(self.setup.files) // size)))
        parts = [files[first : first + size] for first in range(0, len(files), size)]
        for part in parts:
            self.classify_batch_of_files(part)
        seconds: list[list[float]] = []  # of a call: decoding, converting, running
        end = time.perf_counter() + self.setup.min_seconds
        for part in itertools.cycle(parts):
            seconds.append(self.classify_batch_of_files(part))
            if len(seconds) >= self.setup.min_calls and time.perf_counter() > end:
                break
        per_image = 1000 * np.array(seconds) / size
        return FileTiming(float(np.median(per_image.sum(1))), *np.median(per_image, axis=0).tolist())

    def classify_batch_of_files(self, files: Sequence[str]) -> list[float]:
        """Seconds of decoding, converting, running."""
        start = time.perf_counter()
        with common.user_error("image files cannot be read any more", Exception):
            images = read_images(files, self.setup.shape)
        decoded = time.perf_counter()
        with self.blame():
            batch = self.classifier.prepare(images)
            converted = time.perf_counter()
            self.classifier.run(batch)
        return [decoded - start, converted - decoded, time.perf_counter() - converted]

    def profile(self, batch_size: int) -> Profiled:
        """Calls without the runtime's profiler, then under it."""
        latencies = self.time(batch_size).latencies_ms
        with self.blame():
            calls = self.classifier.profile(self.prepared(batch_size), min(len(latencies), PROFILED_CALLS))
        return Profiled(float(np.median(latencies)), calls)

    def serve(self, batch_size: int) -> Served:
        """Classify for at least twice as long as a timing lasts."""
        batches = self.prepared(batch_size)
        with self.blame():
            for _ in range(self.classifier.warm_up_calls):
                self.classifier.run(next(batches))
            cpu = time.process_time()
            start = time.perf_counter()
            seconds = 2 * self.setup.min_seconds
            calls = len(latencies_ms(self.classifier.run, batches, self.setup.min_calls, seconds))
            return Served(calls * batch_size, time.perf_counter() - start, time.process_time() - cpu)

    def prepared(self, batch_size: int) -> Iterator[Batch]:
        """Eight batches of test images, over and over."""
        if batch_size not in self.batches:
            index = torch.arange(8 * batch_size) % len(self.images)
            parts = self.images[index].split(batch_size)
            with self.blame():
                self.batches[batch_size] = itertools.cycle([self.classifier.prepare(part) for part in parts])
        return self.batches[batch_size]


def status_bytes(entry: str, process: int | str = "self") -> float:
    """Memory of a process: VmRSS is all that is resident, RssAnon without mapped files; nan where not Linux runs."""
    with contextlib.suppress(OSError, IndexError):
        return 1024 * int(Path(f"/proc/{process}/status").read_text().split(f"{entry}:")[1].split()[0])
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
        # One endless conversation with ``run_engine`` in each process: next() spawns the process and returns when it is
        # ready, at its first yield; send(request) returns the reply, which ``run_engine`` yields.
        self.conversations = {engine: self.workers[engine].run(run_engine, engine, setup) for engine in engines}

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
            reason = f"{reason}{last_words(self.setup.scratch / f'{engine.name}.stderr')}"
        if engine.name not in reason:  # blame() and timeouts name it already
            reason = f"{engine.name} cannot run {engine.file}: {reason}"
        self.engines.remove(engine)  # its conversation is over
        if engine in (BASELINE, CONVERTED):
            raise UserError(reason) from error
        note(f"{reason}; it is left out")


def last_words(path: Path) -> str:
    """The last line that a dead process wrote to the file of its stderr, if any."""
    with contextlib.suppress(OSError):
        lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
        return f"; its last words: {lines[-1]}" if lines else ""
    return ""


@contextlib.contextmanager
def environment_of_engines(scratch: Path) -> Iterator[None]:
    """Environment variables for the processes that are started in the block, and for the export."""
    wanted = {
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TMPDIR": str(scratch),  # killed engines leave unpacked networks there
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no helper processes that outlive an engine
        # Killed engines leave semaphores, about which the tracker would warn.
        "PYTHONWARNINGS": ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker"])),
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    tempfile.tempdir = None  # forget where it was
    try:
        yield
    finally:
        tempfile.tempdir = None
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
    at_once = [list(pool.engines)]
    if pool.setup.threads > 1:  # threads of several processes would wait for each other
        at_once = [[engine] for engine in pool.engines]
    logits: dict[Engine, np.ndarray] = {}
    for engines in at_once:
        logits |= pool.ask(Classify(), engines)
    if not np.isfinite(logits[BASELINE]).all():
        raise UserError("the network itself gives logits that are not finite for some test images")
    run.progress.advance(WORK_OF_CHECKS)
    return logits


def judge(
    run: common.Run,
    options: argparse.Namespace,
    logits: Mapping[Engine, np.ndarray],
    data: common.Dataset,
    given: GivenFile | None = None,
) -> dict[Engine, Quality]:
    """Measure and judge all engines; writes accuracy.csv."""
    labels = data.test_labels.numpy()
    qualities = {}
    for engine, own in logits.items():
        size = (run.folder / engine.file).stat().st_size
        expected, kind = as_ends(own, logits[BASELINE])
        if kind != "logits":
            note(f"{engine.name} gives {kind}, not logits: it is compared with the {kind} of torch")
        quality = measure_quality(own, expected, labels, len(data.classes), size)
        is_half = given and given.is_half and engine.file == given.name
        if engine.is_exact and not is_half:
            qualities[engine] = judge_exact(engine, quality, float(np.abs(expected).max()))
        else:
            qualities[engine] = judge_approximate(engine, quality, options.max_int8_drop)
    run.write_table("accuracy.csv", accuracy_table(qualities, data.classes))
    return qualities


def as_ends(outputs: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, str]:
    """Logits as a file's own outputs are, all of shape (N, num_classes), and what that is; see common.OUTPUTS.

    Files made elsewhere often end with a softmax.
    """
    kind = common.kind_of(torch.from_numpy(outputs))
    if common.kind_of(torch.from_numpy(logits)) != "logits":  # the network itself ends with one
        return logits, "logits"
    return common.OUTPUTS[kind](torch.from_numpy(logits)).numpy(), kind


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
    allowed = common.LOGIT_TOLERANCE * largest_logit
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

    columns = {engine.name: [*quality.class_accuracy, quality.accuracy] for engine, quality in qualities.items()}
    everything = "(all)" if "all" in classes else "all"
    return pd.DataFrame({"class": [*shortened(classes), everything], **columns})


def shortened(classes: Sequence[str]) -> list[str]:
    """Names for tables and figures, which still tell the classes apart."""
    names = [SHORT_NAMES.get(name, name) for name in classes]
    return names if len(set(names)) == len(set(classes)) else list(classes)


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

    @property
    def p50_ms(self) -> float:
        """The median latency."""
        return float(np.median(self.timing.latencies_ms))

    def row(self) -> dict[str, object]:
        """Its values by column."""
        latencies = self.timing.latencies_ms
        return {
            "engine": self.engine.name,
            "batch_size": self.batch_size,
            "threads": self.threads,
            "start": self.start,
            "round": self.round,
            **self.loaded._asdict(),
            "p50_ms": self.p50_ms,
            "mean_ms": float(latencies.mean()),
            "largest_ms": float(latencies.max()),
            "calls": len(latencies),
        }


class FromFiles(NamedTuple):
    """One engine's way from files to logits in one start: a row of end_to_end.csv."""

    engine: Engine
    start: int
    timing: FileTiming

    def row(self) -> dict[str, object]:
        """Its values by column."""
        return {"engine": self.engine.name, "start": self.start, **self.timing._asdict()}


@dataclass
class Measured:
    """All that was measured, stage by stage; what is missing was not reached, or failed."""

    timings: list[Measurement] = field(default_factory=list)  # of complete rounds
    from_files: list[FromFiles] = field(default_factory=list)
    profiles: list[EngineProfile] = field(default_factory=list)
    cold_starts: list[ColdStart] = field(default_factory=list)
    served: list[ServedBy] = field(default_factory=list)
    interruption: KeyboardInterrupt | Exception | None = None  # what ended it early


def work_of_measuring(options: argparse.Namespace) -> float:
    """In the progress bar's unit."""
    return options.starts * (WORK_OF_START + WORK_OF_COLD_START) + serving_starts(options) * WORK_OF_SERVING


def measure(
    run: common.Run, options: argparse.Namespace, pool: EnginePool, qualities: Mapping[Engine, Quality]
) -> Measured:
    """Measure all engines that were not refused; ``pool`` is their first start.

    If model.onnx itself was refused, nothing is measured.
    """
    accepted = [engine for engine, quality in qualities.items() if quality.verdict != "refused"]
    measured = Measured()
    if CONVERTED not in accepted:
        return measured
    try:
        time_engines(run, options, pool, accepted, measured)
        with left_out("cold starts"):
            start_cold(run, options, pool.setup, accepted, measured)
        with left_out("processes against threads"):
            serve_images(run, options, pool.setup, accepted, measured)
    except KeyboardInterrupt as error:
        measured.interruption = error
    except Exception as error:  # whatever it is: what was measured is reported first
        if not measured.timings:
            raise
        measured.interruption = error
    return measured


@contextlib.contextmanager
def left_out(stage: str) -> Iterator[None]:
    """What fails in the block is told and left out: the main measurements are there."""
    try:
        yield
    except UserError as error:
        note(f"{stage}: {first_line(error)}; left out")


def time_engines(
    run: common.Run, options: argparse.Namespace, pool: EnginePool, accepted: Sequence[Engine], measured: Measured
) -> None:
    """Time calls, profile, and time the way from files, in several starts of all processes; ``pool`` is the first.

    Writes latency.csv after every round.
    """
    with contextlib.closing(pools_of_starts(run, pool, accepted, options.starts)) as pools:
        for start, running in enumerate(pools, 1):
            for number in range(1, options.rounds + 1):
                run.progress.stage(f"timing, start {start} of {options.starts}, round {number}")
                shuffler = np.random.default_rng([options.seed, start, number])
                measured.timings += time_round(running, accepted, shuffler, start, number)
                run.write_table("latency.csv", table_of(measured.timings))
                run.progress.advance(WORK_OF_START / options.rounds)
            if start <= FEW_STARTS:
                with left_out("where the time goes"):
                    profile_engines(run, running, start, measured)
            with left_out("the way from files"):
                time_from_files(run, running, np.random.default_rng([options.seed, start]), start, measured)


def time_from_files(
    run: common.Run, pool: EnginePool, shuffler: np.random.Generator, start: int, measured: Measured
) -> None:
    """Time the way from image files to logits, in random order; writes end_to_end.csv."""
    run.progress.stage(f"timing from files, start {start}")
    engines = list(pool.engines)
    for position in shuffler.permutation(len(engines)).tolist():
        for timing in pool.ask(ClassifyFiles(), [engines[position]]).values():
            measured.from_files.append(FromFiles(engines[position], start, timing))
    run.write_table("end_to_end.csv", table_of(measured.from_files))


class Row(Protocol):
    """What knows its values by column."""

    def row(self) -> dict[str, object]:
        """Its values by column."""


def table_of(records: Sequence[Row]) -> pd.DataFrame:
    """A row for each record."""
    import pandas as pd

    return pd.DataFrame([record.row() for record in records])


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


class SlowCalls(NamedTuple):
    """How long slow calls take: p99 of all calls or, of fewer than ``CALLS_FOR_P99``, the largest latency."""

    ms: float
    calls: int

    @classmethod
    def of(cls, latencies_ms: np.ndarray) -> SlowCalls:
        """Of all calls of an engine at a batch size, in all starts and rounds."""
        calls = len(latencies_ms)
        return cls(float(np.percentile(latencies_ms, 99 if calls >= CALLS_FOR_P99 else 100)), calls)

    @property
    def is_p99(self) -> bool:
        """Whether there are enough calls for a percentile: ten lie beyond it."""
        return self.calls >= CALLS_FOR_P99

    @property
    def text(self) -> str:
        """The latency in ms, and what it is."""
        return f"{self.ms:.3g}" if self.is_p99 else f"{self.ms:.3g} (largest of {self.calls})"


@dataclass(frozen=True, eq=False)
class Speed:
    """Latency of one engine at one batch size: geometric means, over starts and rounds, of each round's values."""

    engine: Engine
    batch_size: int
    p50_ms: float
    mean_ms: float
    slow: SlowCalls
    log_p50: np.ndarray  # natural logarithm of p50 in ms, averaged over the rounds of each start: (starts,)

    @property
    def images_per_second(self) -> float:
        """The throughput of calls one after another."""
        return 1000 * self.batch_size / self.mean_ms

    def times_as_fast_as(self, rival: Speed) -> Estimate:
        """The ratio of both p50; its interval is over the starts."""
        return ratio_of(rival.log_p50 - self.log_p50)


def find_speeds(timings: Sequence[Measurement]) -> list[Speed]:
    """The speeds of all engines that took part in every round.

    Averages on the logarithmic scale, over the rounds of a start, then over the starts.
    """
    if not timings:
        return []
    frame = table_of(timings)
    rows = frame["engine"].value_counts()
    frame = frame[frame["engine"].map(rows) == rows.max()]  # no engine that died in between
    logs = np.log(frame.set_index(["engine", "batch_size", "start"])[["p50_ms", "mean_ms"]])
    by_start = logs.groupby(level=["engine", "batch_size", "start"]).mean()
    speeds = []
    for engine in ENGINES:
        for size in sorted(frame.loc[frame["engine"] == engine.name, "batch_size"].unique()):
            mine = by_start.loc[(engine.name, size)]
            p50, mean = np.exp(mine.mean())
            latencies = [m.timing.latencies_ms for m in timings if (m.engine, m.batch_size) == (engine, size)]
            slow = SlowCalls.of(np.concatenate(latencies))
            speeds.append(Speed(engine, int(size), float(p50), float(mean), slow, mine["p50_ms"].to_numpy()))
    return speeds


def ratio_of(logs: np.ndarray) -> Estimate:
    """The geometric mean of ratios given by their logarithms, with its interval."""
    found = common.interval(logs)
    if not found.is_bounded:  # summary.json would show exp(-inf) as a lower bound of 0
        return found._replace(mean=np.exp(found.mean))
    return found._replace(mean=np.exp(found.mean), low=np.exp(found.low), high=np.exp(found.high))


def leaders(speeds: Collection[Speed]) -> list[Speed]:
    """The fastest engine at a batch size, then those that the starts do not tell apart from it."""
    fastest, *others = sorted(speeds, key=lambda speed: speed.p50_ms)
    return [fastest, *(other for other in others if not fastest.times_as_fast_as(other).low > 1)]


# ================================================================ 6. why: where the time goes

CALL = "call of the lab"  # marks a call in torch's profile
PROFILED_CALLS = 50  # in each, at most
PROFILED_ENGINES = (BASELINE, TUNED, CONVERTED, QUANTISED)
OVERHEAD = "framework overhead"
OTHER = "other operators"
KINDS = {  # of operators, and their names in ONNX Runtime and, without "aten::" and a final underscore, in torch
    "convolution": """Conv FusedConv NhwcFusedConv QLinearConv ConvInteger ConvTranspose mkldnn_convolution
        _slow_conv2d_forward slow_conv_dilated2d slow_conv_transpose2d _conv_depthwise2d
        _nnpack_spatial_convolution""",
    "matrix product": """Gemm MatMul FusedGemm FusedMatMul QGemm QLinearMatMul MatMulInteger MatMulIntegerToFloat
        DynamicQuantizeMatMul MatMulNBits mm addmm bmm baddbmm _addmm_activation mkldnn_linear
        _scaled_dot_product_flash_attention_for_cpu Attention MultiHeadAttention""",
    "normalisation": """BatchNormalization InstanceNormalization GroupNorm LayerNormalization SkipLayerNormalization
        native_batch_norm native_group_norm native_layer_norm""",
    "activation": """Relu LeakyRelu PRelu Clip Elu Selu Gelu FastGelu QuickGelu BiasGelu HardSwish HardSigmoid Sigmoid
        Tanh Erf Softplus Mish Softmax QLinearSigmoid QLinearLeakyRelu QLinearSoftmax clamp clamp_min leaky_relu
        hardtanh elu gelu silu mish hardswish hardsigmoid sigmoid tanh softplus _softmax""",
    "pooling, reduction": """MaxPool AveragePool GlobalAveragePool GlobalMaxPool NhwcMaxPool QLinearAveragePool
        QLinearGlobalAveragePool ReduceMax ReduceMean ReduceSum max_pool2d_with_indices avg_pool2d adaptive_max_pool2d
        _adaptive_avg_pool2d amax sum""",
    "elementwise": """Add Sub Mul Div Sqrt Pow QLinearAdd QLinearMul Concat QLinearConcat add sub mul div cat""",
    "quantising": "QuantizeLinear DequantizeLinear DynamicQuantizeLinear",
    "layout, copies": "ReorderInput ReorderOutput Transpose copy",
}
KIND_COLOURS = {
    "convolution": "#332288",
    "matrix product": "#88CCEE",
    "normalisation": "#44AA99",
    "activation": "#117733",
    "pooling, reduction": "#999933",
    "elementwise": "#DDCC77",
    "quantising": "#CC6677",
    "layout, copies": "#AA4499",
    OTHER: "#882255",
    OVERHEAD: "#BBBBBB",
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}
# What torch's operators do besides computing: it is part of the overhead.
BOOKKEEPING = """empty empty_like empty_strided resize as_strided view _unsafe_view reshape _reshape_alias t transpose
    permute detach alias expand slice select squeeze unsqueeze narrow split chunk unbind flatten to _to_copy
    resolve_conj resolve_neg _nnpack_available item _local_scalar_dense is_nonzero lift_fresh set result_type dropout
    feature_dropout numpy_T"""


class Operator(NamedTuple):
    """One operator in one call."""

    call: int
    name: str  # the runtime's
    ms: float


class ProfiledCalls(NamedTuple):
    """What a runtime's profiler says of some calls."""

    latencies_ms: np.ndarray  # under the profiler
    operators: list[Operator]
    events: float  # that the profiler has recorded in a call
    idle_ms: float | None  # latency of a network that does nothing, if the runtime has such


def torch_name(event: str) -> str:
    """A torch operator's name without namespace; in-place operators (with a final underscore) like the others."""
    return event.removeprefix("aten::").removesuffix("_")


def computes(event: FunctionEvent) -> bool:
    """Whether an event of torch's profiler computes, in contrast to what dispatches, allocates or makes views."""
    name = torch_name(event.name)
    if name in KIND_OF:
        return True
    is_unknown = event.name.startswith("aten::") and name not in BOOKKEEPING.split()
    return is_unknown and not any(computes(called) for called in descendants(event))


def descendants(event: FunctionEvent) -> Iterator[FunctionEvent]:
    """What an event has called, directly or not."""
    for child in event.cpu_children:
        yield child
        yield from descendants(child)


def profile_of(engine: Engine, batch_size: int, start: int, profiled: Profiled) -> EngineProfile:
    """Means over the middle half of the calls, without what the profiler adds to every operator.

    For ONNX Runtime that is what makes the operators, and a network of as many operators that do nothing, take no
    longer than a call that is not profiled; for torch an event's share in what profiled calls take longer.
    """
    import pandas as pd

    latency_ms, calls = profiled
    low, high = np.percentile(calls.latencies_ms, (25, 75))
    middle = 1 + np.flatnonzero((calls.latencies_ms >= low) & (calls.latencies_ms <= high))
    operators = pd.DataFrame(calls.operators, columns=Operator._fields)
    by_name = operators[operators["call"].isin(middle)].groupby("name")["ms"]
    counts = by_name.count() / len(middle)
    means = by_name.mean()
    if calls.idle_ms is None:
        added_ms = max(0.0, (float(np.median(calls.latencies_ms)) - latency_ms) / calls.events)
    else:
        added_ms = find_added(means.to_numpy(), counts.to_numpy(), latency_ms - calls.idle_ms)
    times = (counts * (means - added_ms).clip(lower=0)).sort_values(ascending=False)
    found = [
        OperatorTime(KIND_OF.get(torch_name(name), OTHER), name, float(counts[name]), float(time_ms))
        for name, time_ms in times.items()
    ]
    return EngineProfile(engine, batch_size, start, latency_ms, found)


def find_added(means_ms: np.ndarray, counts: np.ndarray, limit_ms: float) -> float:
    """What is to be subtracted from each operator, so that those that remain above 0 take ``limit_ms`` together."""
    from scipy.optimize import brentq

    def excess(added_ms: float) -> float:
        return float((counts * (means_ms - added_ms).clip(0)).sum()) - limit_ms

    largest = float(means_ms.max(initial=0))
    if limit_ms <= 0:
        return largest
    return 0.0 if excess(0) <= 0 else float(brentq(excess, 0, largest))


@dataclass(frozen=True)
class OperatorTime:
    """The time of all operators of one name in a call."""

    kind: str  # of KINDS, or OTHER
    name: str
    count: float
    ms: float


@dataclass(frozen=True)
class EngineProfile:
    """Where the time of one engine's call goes, in one start."""

    engine: Engine
    batch_size: int
    start: int
    latency_ms: float  # without the profiler
    operators: list[OperatorTime]

    @property
    def parts(self) -> dict[str, float]:
        """Milliseconds by kind of operator; the overhead is what remains of the latency."""
        parts = dict.fromkeys((*KINDS, OTHER), 0.0)
        for operator in self.operators:
            parts[operator.kind] += operator.ms
        return parts | {OVERHEAD: max(0.0, self.latency_ms - sum(parts.values()))}

    def rows(self) -> list[dict[str, object]]:
        """Rows of profile.csv."""
        about = {
            "engine": self.engine.name,
            "batch_size": self.batch_size,
            "start": self.start,
            "latency_ms": self.latency_ms,
        }
        rows = [{**about, **asdict(operator)} for operator in self.operators]
        return [*rows, {**about, "kind": OVERHEAD, "name": "", "count": 1, "ms": self.parts[OVERHEAD]}]


def profile_engines(run: common.Run, pool: EnginePool, start: int, measured: Measured) -> None:
    """Profile torch and ONNX Runtime at the smallest and the largest batch; writes profile.csv."""
    import pandas as pd

    run.progress.stage(f"profiling, start {start}")
    for engine in PROFILED_ENGINES:
        for size in reversed(end_sizes(pool.setup.batch_sizes)):  # the largest was timed last: memory is as it was then
            for profiled in pool.ask(Profile(size), [engine]).values():
                measured.profiles.append(profile_of(engine, size, start, profiled))
    rows = [row for profile in measured.profiles for row in profile.rows()]
    run.write_table("profile.csv", pd.DataFrame(rows))


class MeanProfile(NamedTuple):
    """Where the time of one engine's call goes: means over the starts, in milliseconds."""

    engine: Engine
    batch_size: int
    latency_ms: float
    parts: dict[str, float]
    overhead: Estimate  # in percent of the latency

    @classmethod
    def of(cls, profiles: Sequence[EngineProfile]) -> MeanProfile:
        """Of one engine at one batch size."""
        return cls(
            engine=profiles[0].engine,
            batch_size=profiles[0].batch_size,
            latency_ms=float(np.mean([profile.latency_ms for profile in profiles])),
            parts={kind: float(np.mean([p.parts[kind] for p in profiles])) for kind in (*KINDS, OTHER, OVERHEAD)},
            overhead=common.interval([100 * p.parts[OVERHEAD] / p.latency_ms for p in profiles]),
        )


def mean_profiles(profiles: Sequence[EngineProfile]) -> list[MeanProfile]:
    """One for each engine and batch size."""
    groups: dict[tuple[int, Engine], list[EngineProfile]] = {}
    for profile in profiles:
        groups.setdefault((profile.batch_size, profile.engine), []).append(profile)
    return [MeanProfile.of(groups[place]) for place in sorted(groups, key=lambda place: place[0])]


# ================================================================ 7. where it is deployed: cold start, server


def first_label_by_torch(model_file: str, image_file: str, threads: str, model: str) -> int:
    """The label of an image (.npy) by a checkpoint of the lab; ``model``: MODULE:CALLABLE, or nothing."""
    from pathlib import Path

    import numpy as np
    import torch

    import common

    torch.set_num_threads(int(threads))
    network = common.load_checkpoint(Path(model_file), model or None, check=False).model
    with torch.inference_mode():
        return int(network(torch.from_numpy(np.load(image_file))).argmax(1)[0])


def first_label_by_onnx_runtime(model_file: str, image_file: str, threads: str, _: str) -> int:
    """The label of an image (.npy) by an ONNX file."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(threads)
    session = onnxruntime.InferenceSession(model_file, options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: np.load(image_file)})
    return int(logits[0].argmax())


def first_label_by_openvino(model_file: str, image_file: str, threads: str, _: str) -> int:
    """The label of an image (.npy) by an ONNX file."""
    import numpy as np
    import openvino

    settings = {"INFERENCE_NUM_THREADS": int(threads), "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    network = openvino.Core().compile_model(model_file, "CPU", settings)
    return int(network(np.load(image_file))[0][0].argmax())


FIRST_LABEL = "label of the first image:"  # begins a program's answer
PROGRAMS: dict[type[Classifier], Callable[..., int]] = {  # each is the whole of what its process imports and does
    Torch: first_label_by_torch,
    OnnxRuntime: first_label_by_onnx_runtime,
    OpenVino: first_label_by_openvino,
}


class ColdStart(NamedTuple):
    """One engine's cold start: a row of cold_start.csv."""

    engine: Engine
    start: int
    label: int  # of the first of EngineSetup.files
    seconds: float  # from the start of a process to that label
    resident_bytes: float  # of the process at that moment (nan if unknown)

    def row(self) -> dict[str, object]:
        """Its values by column."""
        return {**self._asdict(), "engine": self.engine.name}


def start_cold(
    run: common.Run, options: argparse.Namespace, setup: EngineSetup, accepted: Sequence[Engine], measured: Measured
) -> None:
    """Start programs that import only what an engine needs and give one label, in turn; writes cold_start.csv."""
    engines = [e for e in accepted if e.classifier in PROGRAMS and e.device == "cpu" and not e.is_folded]
    for engine in engines:
        np.save(first_batch(engine, setup), prepared_for(engine, setup))
        if not options.quick:
            run_program(engine, setup, 0)  # brings the files into memory
    for start in range(1, options.starts + 1):
        run.progress.stage(f"cold start {start} of {options.starts}")
        for engine in engines:
            measured.cold_starts.append(run_program(engine, setup, start))
        run.write_table("cold_start.csv", table_of(measured.cold_starts))
        run.progress.advance(WORK_OF_COLD_START)


def first_batch(engine: Engine, setup: EngineSetup) -> Path:
    """Where the smallest batch of images is, as an engine's program wants it."""
    return setup.scratch / f"{engine.name}.npy"


def prepared_for(engine: Engine, setup: EngineSetup) -> np.ndarray:
    """The smallest batch of images, from files, in an engine's format."""
    images = read_images(setup.files[: setup.batch_sizes[0]], setup.shape)
    if engine.is_torch:
        return (images.contiguous().float() / 255).numpy()
    return OnnxFile(setup.folder / engine.file, setup.shape).format.prepare(images)


def run_program(engine: Engine, setup: EngineSetup, start: int) -> ColdStart:
    """Time one process from its start to its label; raises UserError if it gives none."""
    program = PROGRAMS[engine.classifier]
    arguments = (setup.folder / engine.file, first_batch(engine, setup), setup.threads, setup.model or "")
    call = f"{program.__name__}(*{tuple(map(str, arguments))!r})"
    code = f"{inspect.getsource(program)}\nprint('\\n' + {FIRST_LABEL!r}, {call}, flush=True)\ninput()"
    path = os.pathsep.join([str(common.ROOT), *filter(None, sys.path)])
    errors = setup.scratch / f"{engine.name}.cold.stderr"
    began = time.perf_counter()
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**os.environ, "PYTHONPATH": path},
        ) as process,
    ):
        watchdog = threading.Timer(PATIENCE, process.kill)
        watchdog.start()
        try:
            assert process.stdout  # it is a pipe
            # A module of the user's may print, too.
            answer = next((line for line in process.stdout if line.startswith(FIRST_LABEL.encode())), b"")
            seconds = time.perf_counter() - began
            resident = status_bytes("VmRSS", process.pid)
        finally:
            watchdog.cancel()
            process.kill()
    if not answer:
        reason = f"{engine.name} gives no label in a program of its own"
        raise UserError(f"{reason}{last_words(errors)}")
    return ColdStart(engine, start, int(answer.split()[-1]), seconds, resident)


SERVING_ENGINES = (TUNED, CONVERTED, QUANTISED)


class Arrangement(NamedTuple):
    """How two cores are used."""

    processes: int
    threads: int  # of each process

    @property
    def words(self) -> str:
        """In words."""
        return "2 processes of 1 thread" if self.processes == 2 else "1 process of 2 threads"


PROCESSES = Arrangement(processes=2, threads=1)
THREADS = Arrangement(processes=1, threads=2)


class ServedBy(NamedTuple):
    """What one engine has served in one start: a row of serving.csv."""

    engine: Engine
    batch_size: int
    arrangement: Arrangement
    start: int
    images_per_second: float  # of all processes
    cpu_seconds_per_1000: float  # images, of all threads

    def row(self) -> dict[str, object]:
        """Its values by column."""
        values = self._asdict()
        return {**values, "engine": self.engine.name, "arrangement": self.arrangement.words}


def serving_starts(options: argparse.Namespace) -> int:
    """How often servers are started: not at all on a single core."""
    return min(options.starts, FEW_STARTS) if common.usable_cores() > 1 else 0


def serve_images(
    run: common.Run, options: argparse.Namespace, setup: EngineSetup, accepted: Sequence[Engine], measured: Measured
) -> None:
    """Compare two processes of one thread with one of two threads, new ones in each start; writes serving.csv."""
    engines = [engine for engine in SERVING_ENGINES if engine in accepted]
    if options.quick:
        engines = [CONVERTED]
    for start in range(1, serving_starts(options) + 1):
        for arrangement in (PROCESSES, THREADS) if start % 2 else (THREADS, PROCESSES):
            run.progress.stage(f"serving by {arrangement.words}, start {start} of {serving_starts(options)}")
            with contextlib.ExitStack() as stack:
                threads = replace(setup, threads=arrangement.threads)
                pools = [stack.enter_context(EnginePool(run, threads, engines)) for _ in range(arrangement.processes)]
                for engine in engines:
                    for size in end_sizes(setup.batch_sizes):
                        measured.served += serve_at_once(pools, engine, size, arrangement, start)
            run.write_table("serving.csv", table_of(measured.served))
            run.progress.advance(WORK_OF_SERVING / 2)


def serve_at_once(
    pools: Sequence[EnginePool], engine: Engine, batch_size: int, arrangement: Arrangement, start: int
) -> list[ServedBy]:
    """What the engine's processes in all pools serve at the same time; nothing if one of them has failed."""
    with ThreadPoolExecutor(len(pools)) as threads:
        asked = [threads.submit(pool.ask, Serve(batch_size), [engine]) for pool in pools]
        replies = [reply for future in asked for reply in future.result().values()]
    if len(replies) < len(pools):
        return []
    rate = sum(reply.images / reply.seconds for reply in replies)
    cpu = 1000 * sum(reply.cpu_seconds for reply in replies) / sum(reply.images for reply in replies)
    return [ServedBy(engine, batch_size, arrangement, start, rate, cpu)]


# ================================================================ 8. results, in words and in numbers


@dataclass(frozen=True)
class Results:
    """All that a run has found."""

    options: argparse.Namespace
    data: common.Dataset
    setup: EngineSetup
    network: str  # a checksum of its weights
    parameters: int
    qualities: dict[Engine, Quality]
    int8_cause: str | None  # why int8 was refused
    measured: Measured
    speeds: list[Speed]
    other_runs: list[OtherRun]

    @property
    def faults(self) -> list[str]:
        """Why exact engines were refused: something is wrong."""
        exact = [quality for engine, quality in self.qualities.items() if engine.is_exact]
        return [quality.reason for quality in exact if quality.verdict == "refused"]

    @property
    def completed_starts(self) -> int:
        """Those of which at least one round was timed."""
        return len({measurement.start for measurement in self.measured.timings})

    @property
    def end_sizes(self) -> list[int]:
        """The smallest and the largest batch size that were timed."""
        return end_sizes({speed.batch_size for speed in self.speeds})

    @property
    def where(self) -> str:
        """Data, numbers and whether the run is complete, for titles."""
        return self.where_in(self.completed_starts)

    def where_in(self, starts: int) -> str:
        """The same for what was measured in so many starts."""
        images = f"{self.data.source}, {len(self.data.test_labels):,} test images"
        interrupted = ", INTERRUPTED" if self.measured.interruption else ""
        return f"{images}, {starts} start(s){interrupted}"

    def speeds_at(self, batch_size: int) -> dict[Engine, Speed]:
        """All engines' speeds at a batch size."""
        return {speed.engine: speed for speed in self.speeds if speed.batch_size == batch_size}

    def best_torch(self, rival_of: Engine, batch_size: int) -> Speed | None:
        """The fastest of torch's engines that compute, and keep images, where the given engine does."""
        place = (rival_of.device, rival_of.is_resident)
        speeds = self.speeds_at(batch_size)
        rivals = [speeds[e] for e in speeds if e.is_torch and (e.device, e.is_resident) == place]
        return min(rivals, key=lambda speed: speed.p50_ms, default=None)

    @functools.cached_property
    def profiles(self) -> list[MeanProfile]:
        """Where the time goes, by engine and batch size."""
        return mean_profiles(self.measured.profiles)

    @functools.cached_property
    def findings(self) -> dict[str, list[str]]:
        """What was found, in sentences, by question."""
        words = [quality_in_words(*item, self.options.max_int8_drop) for item in self.qualities.items()]
        cause = [self.int8_cause] if self.int8_cause else []
        found = {
            SAME: [*filter(None, words), *cause, *networks_in_words(self)],
            FASTER: speeds_in_words(self),
            WHY: profiles_in_words(self),
            DEPLOYED: [
                *cold_starts_in_words(self.measured.cold_starts),
                *files_in_words(self),
                *serving_in_words(self.measured.served),
            ],
        }
        return {question: sentences for question, sentences in found.items() if sentences}


def in_list(words: Sequence[str]) -> str:
    """A, B and C."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def ratio_text(ratio: Estimate, unit: str = "") -> str:
    """A ratio, with its interval if more than one start gives one."""
    return ratio.text(unit) if ratio.is_bounded else f"{ratio.mean:.2f} {unit}".strip()


def quality_in_words(engine: Engine, quality: Quality, limit: float) -> str | None:
    """What to say of an engine's quality; nothing of exact engines that torch itself runs."""
    if quality.verdict == "refused":
        return f"FAILED: {quality.reason}; its speed is not quoted."
    if not engine.is_exact:
        drop = quality.drop
        gain = Estimate(0 - drop.mean, 0 - drop.high, 0 - drop.low, drop.p, drop.n)  # no negative zero
        loss = f"it loses at most {drop.high:.2f} points on images like these"
        if drop.high <= 0:
            loss = "it loses nothing on images like these"
        if quality.verdict == "undecided":
            loss = f"it is UNDECIDED whether it loses more than {limit:g}"
        changed = round((1 - quality.agreement) * drop.n)
        labels = f"{changed:,} of {drop.n:,} labels: it corrects {quality.won_images}, breaks {quality.lost_images}"
        size = "" if engine.file == BASELINE.file else f" Its file is {quality.size_bytes / 1e6:.2f} MB."
        accuracy = f"Its accuracy changes by {gain.text('points', '+.2f')}, so {loss} (95 %)."
        return f"{engine.name} changes {labels}. {accuracy}{size}"
    if engine.file != BASELINE.file:
        images = quality.drop.n
        same = round(quality.agreement * images)
        difference = f"max |Δlogit| {quality.max_abs_logit_diff:.1g}"
        return f"{engine.name} gives the same label as torch on {same:,} of {images:,} images ({difference})."
    return None


class OtherRun(NamedTuple):
    """A finished run of this script: another network, or the same one on another machine."""

    words: str  # how its command differs from this run's, and its processor
    is_on_same_images: bool
    network: str  # the checksum of its weights
    engines: Mapping[str, Any]  # of its summary.json

    @property
    def int8_drop(self) -> float | None:
        """Points of accuracy that its network loses by int8, if that was measured."""
        entry = self.engines.get(QUANTISED.name)
        return entry["accuracy_drop"] if entry else None


def read_other_run(folder: Path, options: argparse.Namespace, data: common.Dataset) -> OtherRun:
    """What a run has published in ``folder``; raises UserError."""
    about = f"--other-runs {folder}: not the results of a run of this version"
    with common.user_error(about, OSError, ValueError, LookupError, TypeError, AttributeError):
        published = common.read_published_run(folder, "task4")
        words = published.words(options, NOT_MEASURED, data)
        other = OtherRun(words, published.is_on(data), published.summary["network"], published.summary["engines"])
        row_of_run(words, other.engines)  # has all that the table shows
    return other


def other_runs_table(results: Results) -> pd.DataFrame:
    """This run and others: accuracy, and what ONNX buys for the smallest batch."""
    import pandas as pd

    this_run = {engine.name: summarise_engine(results, engine) for engine in results.qualities}
    rows = [row_of_run("this one", this_run)]
    rows += [row_of_run(other.words, other.engines) for other in results.other_runs]
    return pd.DataFrame(rows).fillna("–")


def row_of_run(words: str, engines: Mapping[str, Any]) -> dict[str, str]:
    """A run's row, from its entries in summary.json, where null stands for infinity."""
    row = {"run": words, "accuracy": f"{100 * engines[BASELINE.name]['accuracy']:.2f} %"}
    if QUANTISED.name in engines:
        row["int8, points"] = f"{0 - engines[QUANTISED.name]['accuracy_drop']:+.2f}"
    for short, engine in (("fp32", CONVERTED), ("int8", QUANTISED)):
        batches = engines.get(engine.name, {}).get("batch", {})
        for entry in list(batches.values())[:1]:  # the smallest
            row[f"{short} / fastest torch"] = f"{entry['speedup_over_best_torch']:.1f} ({entry['best_torch']})"
            for rival, key in (("tuned", "speedup_over_tuned"), ("eager", "speedup")):
                if key in entry:
                    row[f"{short} / {rival}"] = f"{entry[key]:.1f}"
    return row


def networks_in_words(results: Results) -> list[str]:
    """The change of accuracy by int8 over several networks for the same images, if other runs' are known."""
    others = [other for other in results.other_runs if other.is_on_same_images]
    drops = {other.network: other.int8_drop for other in others if other.int8_drop is not None}
    if QUANTISED in results.qualities:
        drops[results.network] = results.qualities[QUANTISED].drop.mean
    if len(drops) < 2:
        return []
    change = common.interval([0 - drop for drop in drops.values()])
    return [
        f"Over {len(drops)} networks {QUANTISED.name} changes the accuracy by {change.text('points', '+.2f')}, in the "
        f"worst case by {0 - max(drops.values()):+.2f} points."
    ]


def speeds_in_words(results: Results) -> list[str]:
    """The speed-ups at the smallest and largest batch, and who is fastest."""
    words = []
    for size in results.end_sizes:
        speeds = results.speeds_at(size)
        for engine, speed in speeds.items():
            if issubclass(engine.classifier, OnnxRuntime):
                words.append(headline(results, speed))
        words.append(leaders_in_words(leaders(speeds.values())))
    return [*filter(None, words)]


def headline(results: Results, speed: Speed) -> str:
    """An engine against the best of torch, then against others."""
    engine = speed.engine
    best = results.best_torch(engine, speed.batch_size)
    if best is None:
        return ""
    rivals = [TUNED, BASELINE, *([CONVERTED] if engine == QUANTISED else [])]
    speeds = results.speeds_at(speed.batch_size)
    ratio = speed.times_as_fast_as(best)
    others = {
        rival: speed.times_as_fast_as(speeds[rival])
        for rival in rivals
        if rival in speeds and rival != best.engine and rival.device == engine.device
    }
    place = f"At batch {speed.batch_size}"
    if not ratio.is_bounded:
        factors = [f"{other.mean:.2f} times as {rival.name}" for rival, other in others.items()]
        first = f"{ratio.mean:.2f} times as fast as the fastest torch engine, {best.engine.name}"
        return f"{place}, in one start, {engine.name} was {in_list([first, *factors])}."
    against = [f"; {other.text('times as fast')} as {rival.name}" for rival, other in others.items()]
    return (
        f"{place} {engine.name} is {claim_of(ratio)} the fastest torch engine, {best.engine.name}: "
        f"{ratio.text('times as fast')}{''.join(against)}."
    )


def claim_of(ratio: Estimate) -> str:
    """No difference is claimed if the interval includes 1."""
    if ratio.low > 1:
        return "faster than"
    return "slower than" if ratio.high < 1 else "not shown to differ from"


def leaders_in_words(ranked: Sequence[Speed]) -> str:
    """Who is fastest, as far as the starts tell engines apart."""
    size = ranked[0].batch_size
    names = [speed.engine.name for speed in ranked]
    if len(ranked[0].log_p50) == 1:
        return f"In the one start that was timed, {names[0]} was the fastest at batch {size}."
    if len(names) == 1:
        return f"The fastest engine at batch {size} is {names[0]}."
    return f"The fastest engines at batch {size} are {in_list(names)}, not told apart."


def profiles_in_words(results: Results) -> list[str]:
    """How much of a call is overhead, and which kinds of operators make the difference between engines."""
    words = []
    for size in sorted({profile.batch_size for profile in results.profiles}):
        mine = {profile.engine: profile for profile in results.profiles if profile.batch_size == size}
        speeds = results.speeds_at(size)
        shares = [
            f"{percent_in_words(profile.overhead)} of {engine.name}'s {profile.latency_ms:.3g} ms"
            for engine, profile in mine.items()
        ]
        words.append(f"At batch {size} framework overhead is {in_list(shares)}.")
        words += fallback_in_words(results.measured.profiles, size)
        for engine, rival in ((CONVERTED, TUNED), (QUANTISED, CONVERTED)):
            if {engine, rival} <= mine.keys() & speeds.keys():
                ratio = speeds[engine].times_as_fast_as(speeds[rival])
                if ratio.low > 1 or ratio.high < 1 or not ratio.is_bounded:  # otherwise there is nothing to explain
                    words.append(difference_in_words(mine[engine], mine[rival]))
    return words


def percent_in_words(share: Estimate) -> str:
    """A share with its interval, if more than one start gives one."""
    if not share.is_bounded:
        return f"{share.mean:.0f} %"
    return share._replace(low=max(0, share.low), high=min(100, share.high)).text("%", ".0f")


def fallback_in_words(profiles: Sequence[EngineProfile], batch_size: int) -> list[str]:
    """How many convolutions torch leaves to its simplest kernel."""
    mine = [profile for profile in profiles if (profile.engine, profile.batch_size) == (TUNED, batch_size)]
    convolutions = [
        operator for profile in mine[:1] for operator in profile.operators if operator.kind == "convolution"
    ]
    slow = sum(operator.count for operator in convolutions if torch_name(operator.name) == "_slow_conv2d_forward")
    if not slow:
        return []
    total = sum(operator.count for operator in convolutions)
    return [
        f"At batch {batch_size} torch computes {slow:.0f} of {total:.0f} convolutions by its fallback kernel, as it "
        "does with few and small images in fp32: larger ones may gain less from ONNX Runtime."
    ]


def difference_in_words(profile: MeanProfile, rival: MeanProfile) -> str:
    """Which kinds of operators make most of the difference between two engines."""
    total = profile.latency_ms - rival.latency_ms
    direction = 1 if total > 0 else -1
    differences = {kind: direction * ms for kind, ms in differences_by_kind(profile, rival).items()}
    notable = {kind: ms for kind, ms in differences.items() if abs(ms) > SHARE_OF_CAUSE * abs(total)}
    largest_first = sorted(notable.items(), key=lambda item: -item[1])
    causes = [f"{ms:.2g} ms in {kind}" for kind, ms in largest_first if ms > 0][:3]
    against = [f"{-ms:.2g} ms in {kind}" for kind, ms in reversed(largest_first) if ms < 0][:3]
    more, less = ("more", "less") if total > 0 else ("less", "more")
    words = (
        f"At batch {profile.batch_size} {profile.engine.name} takes {abs(total):.2g} ms {more} than {rival.engine.name}"
    )
    if causes:
        words += f": {in_list(causes)}"
    if against:
        words += f"; but {less} by {in_list(against)}"
    return f"{words}."


def differences_by_kind(profile: MeanProfile, rival: MeanProfile) -> dict[str, float]:
    """Milliseconds that an engine takes more than its rival; ONNX Runtime activates within convolutions."""
    differences = {kind: ms - rival.parts[kind] for kind, ms in profile.parts.items()}
    both = differences.pop("convolution") + differences.pop("activation")
    return {"convolution and activation": both, **differences}


def paired_ratio(numerators: Mapping[int, float], denominators: Mapping[int, float]) -> Estimate:
    """The ratio of two quantities, given by start; over the starts that have both."""
    starts = sorted(numerators.keys() & denominators.keys())
    return ratio_of(np.array([np.log(numerators[start] / denominators[start]) for start in starts]))


def cold_start_ratio(cold_starts: Sequence[ColdStart], engine: Engine, rival: Engine) -> Estimate:
    """How many times as fast an engine gives its first label as its rival."""
    seconds, rival_seconds = (
        {found.start: found.seconds for found in cold_starts if found.engine == each} for each in (engine, rival)
    )
    return paired_ratio(rival_seconds, seconds)


def cold_starts_in_words(cold_starts: Sequence[ColdStart]) -> list[str]:
    """Time and memory of ONNX Runtime's and of torch's first label."""
    if not {BASELINE, CONVERTED} <= {found.engine for found in cold_starts}:
        return []
    ratio = cold_start_ratio(cold_starts, CONVERTED, BASELINE)
    costs = []
    for engine in (CONVERTED, BASELINE):
        median = median_cold_start(cold_starts, engine)
        memory = f" and {median.resident_bytes / 1e6:.0f} MB" if np.isfinite(median.resident_bytes) else ""
        costs.append(f"{engine.name} takes {median.seconds:.2g} s{memory}")
    return [
        f"From the start of its process to the label of its first (decoded) image {costs[0]}, {costs[1]}: "
        f"{CONVERTED.name} is {ratio_text(ratio, 'times as fast')}. Each program imports only what it needs."
    ]


def median_cold_start(cold_starts: Sequence[ColdStart], engine: Engine) -> ColdStart:
    """Medians over the starts."""
    mine = [found for found in cold_starts if found.engine == engine]
    seconds, resident = np.median([(found.seconds, found.resident_bytes) for found in mine], axis=0).tolist()
    return mine[0]._replace(seconds=seconds, resident_bytes=resident)


def file_ratio(results: Results, engine: Engine, rival: Engine) -> Estimate:
    """How many times as fast an engine goes from a file to logits as its rival."""
    total_ms, rival_ms = (
        {found.start: found.timing.total_ms for found in results.measured.from_files if found.engine == each}
        for each in (engine, rival)
    )
    return paired_ratio(rival_ms, total_ms)


def mean_file_timing(results: Results, engine: Engine) -> FileTiming | None:
    """Geometric means over the starts."""
    mine = [found.timing for found in results.measured.from_files if found.engine == engine]
    return FileTiming(*np.exp(np.log(mine).mean(0)).tolist()) if mine else None


def files_in_words(results: Results) -> list[str]:
    """What remains of the speed-up if the images must be read and decoded."""
    words = []
    for size in results.end_sizes[:1]:
        speeds = results.speeds_at(size)
        for engine in (CONVERTED, QUANTISED):
            timing = mean_file_timing(results, engine)
            best = results.best_torch(engine, size)
            if engine not in speeds or best is None or timing is None or not mean_file_timing(results, best.engine):
                continue
            kind = Path(results.setup.files[0]).suffix
            remains = ratio_text(file_ratio(results, engine, best.engine), "times as fast")
            bare = speeds[engine].times_as_fast_as(best).mean
            words.append(
                f"From a {kind} file to logits {engine.name} takes {timing.total_ms:.2g} ms an image "
                f"({timing.decode_ms:.2g} decoding, {timing.convert_ms:.2g} converting, {timing.run_ms:.2g} running): "
                f"it is {remains} as {best.engine.name}, with images in memory {bare:.2f} times."
            )
    return words


Rates = dict[int, float]  # images per second by start


def serving_rates(served: Sequence[ServedBy], engine: Engine, batch_size: int, arrangement: Arrangement) -> Rates:
    """Those of one engine, batch size and arrangement."""
    place = (engine, batch_size, arrangement)
    return {s.start: s.images_per_second for s in served if (s.engine, s.batch_size, s.arrangement) == place}


def serving_ratio(served: Sequence[ServedBy], engine: Engine, batch_size: int) -> Estimate:
    """Images per second of two processes, divided by those of two threads."""
    processes, threads = (serving_rates(served, engine, batch_size, each) for each in (PROCESSES, THREADS))
    return paired_ratio(processes, threads)


def served_engines(served: Sequence[ServedBy], batch_size: int) -> list[Engine]:
    """Those that were measured in both arrangements in the same start."""
    engines = dict.fromkeys(found.engine for found in served)
    both = (PROCESSES, THREADS)
    starts = {e: [set(serving_rates(served, e, batch_size, arrangement)) for arrangement in both] for e in engines}
    return [engine for engine in engines if set.intersection(*starts[engine])]


def serving_in_words(served: Sequence[ServedBy]) -> list[str]:
    """ONNX Runtime against torch in two processes of one thread, and these against one process of two threads."""
    words = []
    for size in sorted({found.batch_size for found in served}):
        engines = served_engines(served, size)
        images = f"At batch {size}, images per second by two processes of one thread, relative to"
        rates = {engine: serving_rates(served, engine, size, PROCESSES) for engine in engines}
        to_torch = [
            f"{engine.name} {ratio_text(paired_ratio(rates[engine], rates[TUNED]))}"
            for engine in engines
            if TUNED in engines and engine != TUNED
        ]
        if to_torch:
            words.append(f"{images} {TUNED.name}: {in_list(to_torch)}.")
        to_threads = [f"{engine.name} {ratio_text(serving_ratio(served, engine, size))}" for engine in engines]
        if to_threads:
            words.append(f"{images} one process of two threads: {in_list(to_threads)}.")
    return words


def summarise(results: Results) -> dict[str, object]:
    """The content of summary.json."""
    return {
        "task": "task4",
        "network": results.network,
        "threads": results.options.threads,
        "parameters": results.parameters,
        "test_images": len(results.data.test_labels),
        "flop_per_image": results.setup.flop,
        "interrupted": results.measured.interruption is not None,
        "starts": results.completed_starts,
        "rounds": results.options.rounds,
        "engines": {engine.name: summarise_engine(results, engine) for engine in results.qualities},
        "serving": [summarise_serving(results.measured.served, *place) for place in served_places(results)],
        "verdict": [sentence for sentences in results.findings.values() for sentence in sentences],
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
        facts |= median_loaded(results.measured.timings, engine)._asdict()
        facts["batch"] = {str(speed.batch_size): summarise_speed(results, speed) for speed in mine}
    cold_starts = results.measured.cold_starts
    if any(found.engine == engine for found in cold_starts):
        median = median_cold_start(cold_starts, engine)
        ratio = cold_start_ratio(cold_starts, engine, BASELINE)
        facts["cold_start"] = {
            "seconds": median.seconds,
            "resident_bytes": median.resident_bytes,
            **ratio_facts("speedup", ratio),
        }
    timing = mean_file_timing(results, engine)
    best = results.best_torch(engine, results.end_sizes[0]) if results.end_sizes else None
    if timing and best and mean_file_timing(results, best.engine):
        ratio = file_ratio(results, engine, best.engine)
        facts["from_files"] = {**timing._asdict(), **ratio_facts("speedup_over_best_torch", ratio)}
    profiles = [profile for profile in results.profiles if profile.engine == engine]
    if profiles:
        facts["profile"] = {
            str(profile.batch_size): {
                "latency_ms": profile.latency_ms,
                "parts_ms": profile.parts,
                **ratio_facts("overhead_percent", profile.overhead),
            }
            for profile in profiles
        }
    return facts


def ratio_facts(key: str, ratio: Estimate) -> dict[str, object]:
    """A ratio and its interval."""
    return {key: ratio.mean, f"{key}_ci_low": ratio.low, f"{key}_ci_high": ratio.high}


def median_loaded(timings: Sequence[Measurement], engine: Engine) -> Loaded:
    """The medians over the starts."""
    loads = {measurement.start: measurement.loaded for measurement in timings if measurement.engine == engine}
    return Loaded(*np.median(list(loads.values()), axis=0).tolist())


def summarise_speed(results: Results, speed: Speed) -> dict[str, object]:
    """One batch size of an engine's entry."""
    facts: dict[str, object] = {
        "p50_ms": speed.p50_ms,
        "mean_ms": speed.mean_ms,
        "p99_ms" if speed.slow.is_p99 else "largest_ms": speed.slow.ms,
        "calls": speed.slow.calls,
        "images_per_second": speed.images_per_second,
    }
    speeds = results.speeds_at(speed.batch_size)
    for key, rival in SPEEDUPS.items():
        if rival in speeds:
            facts |= ratio_facts(key, speed.times_as_fast_as(speeds[rival]))
    best = results.best_torch(speed.engine, speed.batch_size)
    if best:
        facts["best_torch"] = best.engine.name
        facts |= ratio_facts("speedup_over_best_torch", speed.times_as_fast_as(best))
    return facts


def served_places(results: Results) -> list[tuple[Engine, int]]:
    """Engines and batch sizes that were served in both ways."""
    served = results.measured.served
    sizes = sorted({found.batch_size for found in served})
    return [(engine, size) for size in sizes for engine in served_engines(served, size)]


def summarise_serving(served: Sequence[ServedBy], engine: Engine, batch_size: int) -> dict[str, object]:
    """Both arrangements of one engine and batch size; rates are geometric means over the starts."""
    facts: dict[str, object] = {"engine": engine.name, "batch_size": batch_size}
    for name, arrangement in (("processes", PROCESSES), ("threads", THREADS)):
        rates = serving_rates(served, engine, batch_size, arrangement)
        facts[f"images_per_second_{name}"] = float(np.exp(np.mean(np.log(list(rates.values())))))
        place = (engine, batch_size, arrangement)
        seconds = [s.cpu_seconds_per_1000 for s in served if (s.engine, s.batch_size, s.arrangement) == place]
        facts[f"cpu_seconds_per_1000_{name}"] = float(np.mean(seconds))
    return {**facts, **ratio_facts("processes_over_threads", serving_ratio(served, engine, batch_size))}


def quality_table(results: Results) -> pd.DataFrame:
    """Accuracy, agreement, size and cost of loading: a row per engine."""
    import pandas as pd

    cold_starts = results.measured.cold_starts
    rows = {}
    for engine, quality in results.qualities.items():
        timed = any(speed.engine == engine for speed in results.speeds)
        loaded = median_loaded(results.measured.timings, engine) if timed else Loaded(np.nan, np.nan, np.nan)
        is_cold = any(found.engine == engine for found in cold_starts)
        cold = median_cold_start(cold_starts, engine) if is_cold else None
        rows[engine.name] = {
            "accuracy": quality.accuracy,
            "agreement": quality.agreement,
            "max_abs_logit_diff": quality.max_abs_logit_diff,
            "file_mb": quality.size_bytes / 1e6,
            "load_ms": loaded.load_ms,
            "first_call_ms": loaded.first_call_ms,
            "added_mb": loaded.added_rss_bytes / 1e6,
            "cold_start_s": cold.seconds if cold else np.nan,
            "cold_start_mb": cold.resident_bytes / 1e6 if cold else np.nan,
        }
    table = pd.DataFrame.from_dict(rows, orient="index").map("{:.4g}".format)
    return table.replace("nan", "–")


def cells(texts: Mapping[tuple[str, int], str]) -> pd.DataFrame:
    """A row per engine, a column per batch size."""
    import pandas as pd

    series = pd.Series(texts, pd.MultiIndex.from_tuples(texts, names=["engine", "batch_size"]))
    return series.unstack(sort=False)


def speed_tables(results: Results) -> dict[str, pd.DataFrame]:
    """Latency and speed-ups by title."""
    speeds = {(speed.engine.name, speed.batch_size): speed for speed in results.speeds}
    if not speeds:
        return {}
    tables = {"p50, ms": cells({place: f"{speed.p50_ms:.3g}" for place, speed in speeds.items()})}
    for rival in (TUNED, COMPILED):
        texts = {
            (speed.engine.name, speed.batch_size): ratio_text(speed.times_as_fast_as(results.speeds_at(size)[rival]))
            for size in results.setup.batch_sizes
            for speed in results.speeds_at(size).values()
            if rival in results.speeds_at(size)
        }
        if texts:
            tables[f"times as fast as {rival.name} [95 %]"] = cells(texts)
    tables["p99, ms, of all calls (of fewer than 1,000: the largest)"] = cells(
        {place: speed.slow.text for place, speed in speeds.items()}
    )
    return tables


def profile_table(profiles: Sequence[MeanProfile]) -> pd.DataFrame:
    """Milliseconds by kind of operator: a row per engine and batch size."""
    import pandas as pd

    def text(ms: float) -> str:
        return "0" if ms == 0 else "< 0.001" if ms < 5e-4 else f"{ms:.2g}"

    rows = []
    for profile in profiles:
        about = {"engine": profile.engine.name, "batch_size": profile.batch_size}
        rows.append({**about, **profile.parts, "latency": profile.latency_ms})
    frame = pd.DataFrame(rows).set_index(["engine", "batch_size"])
    return frame.loc[:, (frame > 0).any()].map(text).reset_index()


def file_table(results: Results) -> pd.DataFrame:
    """Milliseconds of an image from its file to its logits: a row per engine."""
    import pandas as pd

    engines = sorted({found.engine for found in results.measured.from_files}, key=ENGINES.index)
    timings = {engine.name: mean_file_timing(results, engine) for engine in engines}
    frame = pd.DataFrame.from_dict(
        {name: timing._asdict() for name, timing in timings.items() if timing}, orient="index"
    )
    return frame.map("{:.3g}".format).rename_axis("engine").reset_index()


def serving_table(results: Results) -> pd.DataFrame:
    """Images per second and CPU time by arrangement: a row per engine and batch size."""
    import pandas as pd

    rows = []
    for place in served_places(results):
        facts = summarise_serving(results.measured.served, *place)
        ratio = serving_ratio(results.measured.served, *place)
        rows.append(
            {
                "engine": facts["engine"],
                "batch_size": facts["batch_size"],
                "2 processes, images/s": f"{facts['images_per_second_processes']:,.0f}",
                "2 threads, images/s": f"{facts['images_per_second_threads']:,.0f}",
                "ratio [95 %]": ratio_text(ratio),
                "2 processes, CPU s per 1,000": f"{facts['cpu_seconds_per_1000_processes']:.3g}",
                "2 threads, CPU s per 1,000": f"{facts['cpu_seconds_per_1000_threads']:.3g}",
            }
        )
    return pd.DataFrame(rows)


def print_results(results: Results) -> None:
    """Print accuracies and times in the form of the course's original report, then tables and findings."""
    for engine in (BASELINE, CONVERTED, QUANTISED):
        if engine in results.qualities:
            print_classes(results, engine)
    for title, table in {"quality": quality_table(results), **speed_tables(results)}.items():
        print(f"\n{title}\n{table.to_string()}")
    for question, sentences in results.findings.items():
        print(f"\n{question}")
        for sentence in sentences:
            print(textwrap.fill(f"- {sentence}", 99, subsequent_indent="  "))


def print_classes(results: Results, engine: Engine) -> None:
    """Accuracy by class, then the time of a call."""
    print(f"\n{engine.name}:")
    names = shortened(results.data.classes)
    for name, accuracy in zip(names, results.qualities[engine].class_accuracy, strict=True):
        print(f"Accuracy for class: {name} is {100 * accuracy:.1f} %")
    if results.speeds:
        speeds = results.speeds_at(results.end_sizes[0])
        if engine in speeds:
            print(f"Time, ms:  {speeds[engine].p50_ms:.4g}")


def report_tables(results: Results, question: str) -> dict[str, pd.DataFrame]:
    """The tables that belong to a question, by title."""
    measured = results.measured
    tables: dict[str, pd.DataFrame] = {}
    if question == SAME:
        tables["quality and cost"] = named_rows(quality_table(results))
        if results.other_runs:
            tables["this run and others, the smallest batch"] = other_runs_table(results)
    if question == FASTER:
        tables |= {title: named_rows(table) for title, table in speed_tables(results).items()}
    if question == WHY and results.profiles:
        tables["ms of a call by kind of operator; latency: without the profiler"] = profile_table(results.profiles)
    if question == DEPLOYED and measured.from_files:
        tables["ms of an image, from its file to its logits"] = file_table(results)
    if question == DEPLOYED and served_places(results):
        tables["two processes of one thread, or one process of two threads"] = serving_table(results)
    return tables


def named_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Engines, which name the rows, as a column."""
    return table.rename_axis("engine").reset_index()


def write_report(run: common.Run, results: Results) -> list[str]:
    """The paragraphs of report.md: by question the findings, then tables and figures."""
    rounds = f"{results.options.rounds} round(s) per start"
    engines = f"{rounds}, {results.options.threads} thread(s) per engine, {run.environment.cpu}"
    network = f"{results.parameters:,} parameters, {results.setup.flop / 1e6:.3g} MFLOP an image"
    setting = f"{results.where}, {engines}. The network has {network}."
    paragraphs = ["# Task 4: what does ONNX buy?", setting, GLOSSARY]
    findings = results.findings
    for question, captions in CAPTIONS.items():
        if question not in findings:
            continue
        paragraphs += [f"## {question}", "\n".join(f"- {sentence}" for sentence in findings[question])]
        for title, table in report_tables(results, question).items():
            paragraphs += [f"**{title}**", table.to_markdown(index=False, disable_numparse=True)]
        for name, caption in captions.items():
            if (run.folder / f"{name}.png").exists():
                paragraphs.append(f"![{name}]({name}.png)\n\n*{caption}*")
    return [*paragraphs, "## Protocol and limits", PROTOCOL, LIMITS]


# ================================================================ 9. figures


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
    names = shortened(data.classes)
    with run.figure("disagreements.png", f"{title}\n{data.source}", rows, 8, (13, 1.6 + 2.7 * rows)) as (_, axes):
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, (number, row) in zip(axes.flat, shown.iterrows(), strict=False):
            axis.imshow(data.test_images[int(number)].permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)
            for line, who in enumerate(labels):
                draw_label(axis, line, who, names[int(row[who])], who != "true", row[who] == row["true"])


def draw_label(axis: Axes, line: int, who: str, label: str, is_judged: bool, is_right: bool) -> None:
    """A line of text below an image: who gives it which label, green if right and red if wrong."""
    colour = "black"
    if len(label) > 14:  # long names often differ at their ends
        label = f"{label[:8]}…{label[-5:]}"
    if is_judged:
        colour = "#007A55" if is_right else "#C0392B"
    axis.text(
        0,
        -0.05 - 0.16 * line,
        f"{who.removeprefix('onnx_')}: {label}",
        transform=axis.transAxes,
        color=colour,
        fontsize=11,
        va="top",
        parse_math=False,
    )


def draw_speeds(run: common.Run, results: Results) -> None:
    """The figures of speed, as far as it was measured."""
    if results.speeds:
        draw_latency(run, results)
        draw_throughput(run, results)
        draw_pareto(run, results)
    if results.measured.profiles:
        draw_profile(run, results)


def scale_logarithmically(axis: Axes, label: str) -> None:
    """A logarithmic x axis with plain numbers."""
    from matplotlib.ticker import LogLocator

    axis.set(xscale="log", xlabel=label)
    axis.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter="")


def draw_latency(run: common.Run, results: Results) -> None:
    """latency.png: p50 of every round and slow calls, engine by engine, at the smallest and largest batch."""
    sizes = results.end_sizes
    title = f"{leaders_in_words(leaders(results.speeds_at(sizes[0]).values()))}\n{results.where}"
    with run.figure("latency.png", title, columns=len(sizes), size=(8 * len(sizes), 6)) as (_, axes):
        for axis, size in zip(axes[0], sizes, strict=True):
            slowest_first = sorted(results.speeds_at(size).values(), key=lambda speed: -speed.p50_ms)
            for speed in slowest_first:
                draw_rounds(axis, speed, results.measured.timings)
            marks = {"p99 (bar)" if speed.slow.is_p99 else "largest (cross)" for speed in slowest_first}
            slow = " or ".join(sorted(marks, reverse=True))
            scale_logarithmically(axis, f"batch {size}, ms a call: p50 by round (dots), {slow}")


def draw_rounds(axis: Axes, speed: Speed, timings: Sequence[Measurement]) -> None:
    """One engine's row of latency.png."""
    engine = speed.engine
    mine = [m for m in timings if (m.engine, m.batch_size) == (engine, speed.batch_size)]
    axis.plot([m.p50_ms for m in mine], [engine.name] * len(mine), "o", color=engine.colour, alpha=0.7)
    mark = "|" if speed.slow.is_p99 else "x"
    axis.plot(speed.slow.ms, engine.name, mark, color=engine.colour, markersize=14, markeredgewidth=2)


def draw_throughput(run: common.Run, results: Results) -> None:
    """throughput.png: images per second by batch size."""
    from matplotlib.ticker import LogLocator

    largest = results.end_sizes[-1]
    rate = max(speed.images_per_second for speed in results.speeds_at(largest).values())
    fastest = leaders_in_words(leaders(results.speeds_at(largest).values()))
    title = f"{fastest.removesuffix('.')}: up to {rate:,.0f} images/s\n{results.where}"
    with run.figure("throughput.png", title, size=(10, 6)) as (drawing, axes):
        axis = axes[0][0]
        for engine in results.speeds_at(largest):
            mine = [speed for speed in results.speeds if speed.engine == engine]
            sizes = [speed.batch_size for speed in mine]
            rates = [speed.images_per_second for speed in mine]
            axis.plot(sizes, rates, color=engine.colour, marker="o", label=engine.name)
        scale_logarithmically(axis, "batch size")
        axis.set(yscale="log", ylabel="images per second", xticks=results.setup.batch_sizes)
        axis.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:,.0f}", minor_formatter="")
        drawing.legend(loc="outside right center")


def draw_pareto(run: common.Run, results: Results) -> None:
    """pareto.png: accuracy against latency at the smallest batch; the area of a circle is the size of the file."""
    size = results.end_sizes[0]
    speeds = results.speeds_at(size)
    fastest = leaders(speeds.values())[0].engine
    change = 0 - results.qualities[fastest].drop.mean
    title = f"{fastest.name}, lowest latency at batch {size}: accuracy {change:+.2f} points\n{results.where}"
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


def draw_profile(run: common.Run, results: Results) -> None:
    """profile.png: where the time of a call goes, engine by engine, at the smallest and largest batch."""
    profiles = results.profiles
    sizes = sorted({profile.batch_size for profile in profiles})
    starts = len({profile.start for profile in results.measured.profiles})
    title = f"Where the time of a call goes: {shares_of_overhead(profiles)}\n{results.where_in(starts)}"
    kinds = [kind for kind in KIND_COLOURS if any(profile.parts[kind] > 0 for profile in profiles)]
    with run.figure("profile.png", title, columns=len(sizes), size=(8 * len(sizes), 5.5)) as (drawing, axes):
        for axis, size in zip(axes[0], sizes, strict=True):
            mine = [profile for profile in profiles if profile.batch_size == size][::-1]  # the first one on top
            names = [profile.engine.name for profile in mine]
            left = np.zeros(len(mine))
            for kind in kinds:
                widths = [profile.parts[kind] for profile in mine]
                axis.barh(names, widths, left=left, color=KIND_COLOURS[kind], label=kind)
                left += widths
            for profile, end in zip(mine, left, strict=True):
                axis.annotate(f" {profile.latency_ms:.3g} ms", (end, profile.engine.name), va="center")
            axis.set(xlabel=f"batch {size}: ms of a call")
            axis.margins(x=0.15)
        handles, labels = axes[0][0].get_legend_handles_labels()
        drawing.legend(handles, labels, loc="outside lower center", ncols=5)


def shares_of_overhead(profiles: Sequence[MeanProfile]) -> str:
    """The largest and the smallest share of the overhead in a call of the smallest batch."""
    size = min(profile.batch_size for profile in profiles)
    shares = {p.engine.name: p.overhead.mean for p in profiles if p.batch_size == size}
    most = max(shares, key=shares.__getitem__)
    least = min(shares, key=shares.__getitem__)
    return f"at batch {size} {shares[most]:.0f} % of {most} and {shares[least]:.0f} % of {least} are overhead"


if __name__ == "__main__":
    sys.exit(main())
