"""Task 4 from the options to the files; ``task4_onnx.py`` states the protocol and runs it."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import common
import task4_report as reporting
from common import UserError
from task4_convert import check_onnx, export, quantise
from task4_engine import Engine, EngineError, EngineProcess, engine_processes

Row = dict[str, Any]

BATCH_SIZES = (1, 8, 64, 256)
TIMING = {"calls": 20, "seconds": 0.5}  # at least, per engine, batch size and round
CALIBRATION_PICTURES = 1000
LOGIT_TOLERANCE = 1e-3  # of exact engines, relative to the largest logit: rounding gives about 1e-6
MIN_AGREEMENT = 0.999  # of exact engines' labels with torch's
QUICK_TRAINING, QUICK_TEST = 4000, 2000  # pictures


def convert_and_compare(
    *,
    checkpoint: Path | None,
    onnx: Path | None,
    threads: int,
    rounds: int,
    max_int8_drop: float,
    compile: bool | None,
    dataset: str | None,
    data_dir: Path,
    output_dir: Path,
    epochs: int,
    batch_size: int,
    width: int,
    seed: int,
    device: str,
    precision: str,
    workers: int,
    quick: bool,
) -> int:
    """The experiment, from the options to the files."""
    options, start = dict(locals()), time.perf_counter()
    timing, calibration, limit = TIMING, CALIBRATION_PICTURES, None
    if quick:
        timing, calibration, limit = {"calls": 3, "seconds": 0.05}, 200, QUICK_TRAINING
        rounds, epochs, batch_size = min(rounds, 2), min(epochs, 2), min(batch_size, 128)
    runtime = common.make_runtime(device, precision, workers)
    recipe = common.Recipe(width=width, batch_size=batch_size, epochs=epochs)
    pictures = load_pictures(checkpoint, dataset, data_dir)
    common.make_model(pictures, recipe)  # better refused here than when the results are being written
    if quick:
        recipe, few = replace(recipe, width=16), slice(None, QUICK_TEST)
        pictures = replace(pictures, test_images=pictures.test_images[few], test_labels=pictures.test_labels[few])
    engines = choose_engines(output_dir, threads, runtime, with_compiled(compile, quick))
    if onnx is not None:
        check_onnx(onnx, pictures)
    with common.output_directory(output_dir) as output, tempfile.TemporaryDirectory() as scratch:
        print(f"{pictures.source}; {runtime.device}, {runtime.precision}; engines timed on {threads} thread(s) each")
        if checkpoint is None:
            train_or_reuse(output / "model.pth", pictures, recipe, runtime, seed, limit)
        else:
            place(checkpoint, output / "model.pth")
        test = Path(scratch) / "test_pictures.npy"
        np.save(test, np.ascontiguousarray(pictures.test_images.numpy()))
        rows: list[Row] = []
        interrupted = False
        with engine_processes(engines, test) as processes:  # they import their libraries while the files are made
            if onnx is None:
                export(output / "model.pth", output / "model.onnx", pictures)
            else:
                place(onnx, output / "model.onnx")
            quantise(output / "model.onnx", output / "model_int8.onnx", pictures, calibration, seed)
            processes, results = load_engines(processes, compile_optional=compile is None)
            logits = {process.engine.name: predict(process, Path(scratch)) for process in processes}
            engines = [process.engine for process in processes]
            judge_quality(engines, results, logits, pictures.test_labels.numpy(), len(pictures.classes))
            faults = find_faults(engines, results, max_int8_drop)
            sizes = [size for size in BATCH_SIZES if size <= len(pictures.test_labels)]
            try:
                if not faults:
                    measure(processes, sizes, rounds, timing, seed, rows)
            except KeyboardInterrupt:
                interrupted = True
        summary = {"task": "task4", "dataset": pictures.name, "source": pictures.source, "threads": threads}
        summary |= {"test_pictures": len(pictures.test_labels), "rounds": len({row["round"] for row in rows})}
        summary |= {"engines": results, "faults": faults, "interrupted": interrupted}
        if rows:
            summary |= count_arithmetic(output / "model.pth", pictures, threads)
        reporting.add_speeds(results, rows)
        summary["verdict"] = faults or reporting.conclude(summary)
        common.write_json(output / "config.json", options)
        common.write_json(output / "environment.json", common.environment(runtime))
        reporting.report(output, summary, rows, pictures.short_classes)
        common.finish(output, summary | {"wall_seconds": time.perf_counter() - start})
    if interrupted:
        raise KeyboardInterrupt
    for fault in faults:
        print(f"FAILED: {fault}; no speed is quoted for a wrong model", file=sys.stderr)
    return 1 if faults else 0


# ---------------------------------------------------------------- 1. data and model


def load_pictures(checkpoint: Path | None, dataset: str | None, data_dir: Path) -> common.Dataset:
    """The data set asked for, by default the checkpoint's own; raises UserError where the two do not fit."""
    if checkpoint is None:
        return common.load_dataset_or_fallback(dataset, data_dir)
    _, facts = common.load_checkpoint(checkpoint)
    pictures = common.load_dataset(dataset or facts["dataset"], data_dir)
    if tuple(facts["classes"]) != pictures.classes:
        raise UserError(
            f"{checkpoint} tells {', '.join(facts['classes'])} apart, {pictures.source} {', '.join(pictures.classes)}"
        )
    channels = pictures.train_images.shape[1]
    if facts["model"]["in_channels"] != channels:
        raise UserError(
            f"{checkpoint} takes pictures of {facts['model']['in_channels']} channels, {pictures.source} has {channels}"
        )
    return pictures


def train_or_reuse(
    path: Path, pictures: common.Dataset, recipe: common.Recipe, runtime: common.Runtime, seed: int, limit: int | None
) -> None:
    """Have a network at ``path``: an earlier run's of the same options, else a new one of all training pictures.

    Nothing is selected here, so that validation pictures need not be spared; ``limit`` is for trying things out.
    """
    count = min(limit or len(pictures.train_labels), len(pictures.train_labels))
    facts = {"seed": seed, "precision": runtime.precision, "train_pictures": count}
    wanted = facts | {"recipe": asdict(recipe), "dataset": pictures.name, "source": pictures.source}
    with contextlib.suppress(UserError):  # none there, or none of ours: it is made anew
        _, found = common.load_checkpoint(path)
        if all(found.get(key) == value for key, value in wanted.items()):
            print(f"{path} is from an earlier run with the same options: used again")
            return
    model = common.make_model(pictures, recipe, seed)
    index = torch.randperm(len(pictures.train_labels), generator=torch.Generator().manual_seed(seed))[:count]

    def show(row: Row) -> None:
        print(
            f"epoch {row['epoch']:>2}/{recipe.epochs}  train loss {row['train_loss']:.3f}  {row['seconds']:.1f} s",
            flush=True,
        )

    history, _ = common.fit(model, pictures, recipe, runtime, train_index=index, seed=seed, on_epoch=show)
    if not np.isfinite(history[-1]["train_loss"]):
        raise UserError("the training diverged; try another --seed or fewer --epochs")
    common.save_checkpoint(path, model.cpu(), pictures, recipe, **facts, train_seconds=history[-1]["seconds"])


def place(source: Path, target: Path) -> None:
    """Copy a file to where the results are, so that these belong together."""
    if not (target.exists() and source.samefile(target)):
        with common.atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)


# ---------------------------------------------------------------- 2. engines


def with_compiled(wanted: bool | None, quick: bool) -> bool:
    """Whether torch.compile takes part; raises UserError where it is asked for and cannot."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    if wanted is False or (wanted is None and quick):
        return False
    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        if wanted:
            raise UserError("--compile needs a C++ compiler (g++ or clang++), and none is found") from None
        return False
    return True


def choose_engines(output: Path, threads: int, runtime: common.Runtime, compiled: bool) -> list[Engine]:
    """The rows of the comparison that this machine can run; the first is the baseline.

    The baseline is what loading ``model.pth`` gives; the tuned rows show how much of a gain torch could have
    by folding BatchNorm and by the channels_last order alone.
    """
    import onnxruntime as ort

    weights, fp32, int8 = (output / name for name in ("model.pth", "model.onnx", "model_int8.onnx"))
    native_bf16 = common.make_runtime("cpu", "auto", runtime.threads).precision == "bf16"
    gpu = runtime.device.startswith("cuda")
    rows = [
        (True, Engine("torch_fp32", "torch", weights, threads)),
        (True, Engine("torch_tuned_fp32", "torch", weights, threads, tuned=True)),
        (native_bf16, Engine("torch_bf16", "torch", weights, threads, exact=False, tuned=True, bf16=True)),
        (compiled, Engine("torch_compiled", "torch", weights, threads, tuned=True, compiled=True)),
        (
            compiled and native_bf16,
            Engine("torch_compiled_bf16", "torch", weights, threads, exact=False, tuned=True, bf16=True, compiled=True),
        ),
        (True, Engine("onnx_fp32", "onnx", fp32, threads)),
        (True, Engine("onnx_int8", "onnx", int8, threads, exact=False)),
        (gpu, Engine("torch_cuda", "torch", weights, threads, tuned=True, device=runtime.device)),
        (
            gpu and "CUDAExecutionProvider" in ort.get_available_providers(),
            Engine("onnx_cuda", "onnx", fp32, threads, device=runtime.device),
        ),
    ]
    return [engine for available, engine in rows if available]


def load_engines(
    processes: Sequence[EngineProcess], compile_optional: bool
) -> tuple[list[EngineProcess], dict[str, Row]]:
    """Load every engine's file, one after the other; (the processes that could, what loading told by engine)."""
    able, results = [], {}
    for process in processes:
        engine = process.engine
        try:
            answer = process.ask("load")
        except EngineError as error:
            if not (engine.compiled and compile_optional):
                raise UserError(f"{engine.name} cannot run {engine.file}: {error}") from None
            print(f"NOTE: {engine.name} is left out: {error}", file=sys.stderr)
            continue
        able.append(process)
        results[engine.name] = answer | {"size_bytes": engine.file.stat().st_size}
    return able, results


def predict(process: EngineProcess, scratch: Path) -> np.ndarray:
    """Logits (N, num_classes) of the whole test set, by one engine."""
    file = scratch / f"{process.engine.name}.npy"
    process.ask("predict", batch_size=max(BATCH_SIZES), file=str(file))
    return np.load(file)


# ---------------------------------------------------------------- 3. equality


def judge_quality(
    engines: Sequence[Engine], results: dict[str, Row], logits: dict[str, np.ndarray], labels: np.ndarray, classes: int
) -> None:
    """Add to ``results`` how right every engine is, and how far from the baseline, the first engine.

    ``accuracy_drop`` is in points, with the 95 % interval of the paired difference over the test pictures.
    """
    baseline = logits[engines[0].name]
    before = baseline.argmax(1) == labels
    for name, own in logits.items():
        predicted = own.argmax(1)
        right = predicted == labels
        drop, low, high = common.interval(100 * (before.astype(float) - right))
        results[name] |= {
            "accuracy": float(right.mean()),
            "class_accuracy": common.per_class_accuracy(torch.from_numpy(predicted), torch.from_numpy(labels), classes),
            "agreement": float((predicted == baseline.argmax(1)).mean()),
            "max_abs_logit_diff": float(np.abs(own - baseline).max()),
            "largest_logit": float(np.abs(baseline).max()),
            "accuracy_drop": drop,
            "accuracy_drop_ci_low": low,
            "accuracy_drop_ci_high": high,
        }


def find_faults(engines: Sequence[Engine], results: dict[str, Row], max_int8_drop: float) -> list[str]:
    """What forbids quoting a speed: an exact engine off torch's logits, or an int8 that lost too much."""
    faults = []
    for engine in engines:
        row = results[engine.name]
        allowed = LOGIT_TOLERANCE * row["largest_logit"]
        # Written so that a nan is a fault.
        if engine.exact and not (row["max_abs_logit_diff"] <= allowed and row["agreement"] >= MIN_AGREEMENT):
            faults.append(
                f"{engine.name} ({engine.file.name}) is not the network of model.pth: "
                f"its logits differ by up to {row['max_abs_logit_diff']:.2g} (allowed: {allowed:.2g}), "
                f"{100 * row['agreement']:.2f} % of its labels agree (needed: {100 * MIN_AGREEMENT:g} %)"
            )
        if engine.name == "onnx_int8" and not row["accuracy_drop"] <= max_int8_drop:
            faults.append(
                f"{engine.name} loses {row['accuracy_drop']:.2f} points of accuracy (--max-int8-drop {max_int8_drop:g})"
            )
    return faults


# ---------------------------------------------------------------- 4. speed


def count_arithmetic(checkpoint: Path, pictures: common.Dataset, threads: int) -> Row:
    """Operations that a picture takes (convolutions and matrix products), and how many a second fp32 products reach.

    What a faster engine can still gain without doing less or less exact work lies between the two.
    """
    from torch.utils.flop_counter import FlopCounterMode

    model, _ = common.load_checkpoint(checkpoint)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(pictures.test_images[:1].float() / 255)
    torch.set_num_threads(threads)
    speed = common.matrix_product_speed("cpu", "fp32")
    return {"flop_per_picture": counter.get_total_flops(), "matrix_product_flop_per_second": speed}


def measure(
    processes: Sequence[EngineProcess], sizes: Sequence[int], rounds: int, timing: Row, seed: int, rows: list[Row]
) -> None:
    """Append to ``rows`` one row per engine, batch size and round, with all its latencies (ms), round by round."""
    from tqdm import tqdm

    shuffle = np.random.default_rng(seed)
    with tqdm(total=rounds * len(sizes) * len(processes), desc="timing", unit="run", disable=None) as bar:
        for number in range(rounds):
            finished = []
            for size in sizes:
                for position in shuffle.permutation(len(processes)):
                    process = processes[position]
                    try:
                        answer = process.ask("time", batch_size=size, **timing)
                    except EngineError as error:
                        raise UserError(f"{process.engine.name} at batch {size}: {error}") from None
                    row = {"engine": process.engine.name, "batch_size": size, "threads": process.engine.threads}
                    finished.append(row | {"round": number + 1} | answer)
                    bar.update()
            rows += finished  # whole rounds only: an interrupted one would not be balanced
