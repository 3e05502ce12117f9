"""What every run of the lab needs besides learning: devices, result files, figures."""

from __future__ import annotations

import contextlib
import csv
import ctypes
import errno
import json
import os
import platform
import subprocess
import textwrap
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common_options import ROOT, UserError, first_line

# ---------------------------------------------------------------- 1. run setup


@dataclass(frozen=True)
class Runtime:
    """Where and how a run computes. ``precision`` is "fp32" or "bf16"; ``threads`` per process."""

    device: str
    precision: str
    threads: int


def make_runtime(device: str, precision: str, threads: int) -> Runtime:
    """Choose device and precision by capability and set this process's threads.

    bf16 is chosen only where the hardware multiplies it natively (AVX512-BF16, AMX, Arm BF16, GPU):
    elsewhere it is emulated and slower than fp32. Raises UserError for a device that is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.empty(1, device=device).device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("neither a cpu, cuda nor mps device")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {device} cannot be used here: {first_line(error).split('. ')[0]}") from None
    if precision == "auto":
        if device.startswith("cuda"):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            capabilities = torch.cpu.get_capabilities() if device == "cpu" else {}
            native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        precision = "bf16" if native else "fp32"
    torch.set_num_threads(threads)
    keep_freed_memory()
    return Runtime(device, precision, threads)


def matrix_product_speed(device: str, precision: str, size: int = 2048, repeats: int = 5) -> float:
    """The most floating-point operations per second that square matrix products reach with the threads set."""
    left, right = torch.rand(2, size, size, device=device).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        (left @ right)[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def keep_freed_memory() -> None:
    """Have glibc reuse freed activations instead of returning them to the system at every step.

    Page faults of fresh memory slow the training of a wide network down. Constants: mallopt(3), M_MMAP_MAX and
    M_TRIM_THRESHOLD. Does nothing where the C library is another.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)
        libc.mallopt(-1, 2**31 - 1)


def environment(runtime: Runtime) -> dict[str, Any]:
    """Everything about software and hardware that a figure may depend on."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in ("torch", "torchvision", "numpy", "optuna", "onnx", "onnxscript", "onnxruntime"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    commit = (
        subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
        if (ROOT / ".git").exists()
        else None
    )
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(runtime.device) if runtime.device.startswith("cuda") else None,
        **asdict(runtime),
        "packages": versions,
        "git_commit": commit.stdout.strip() if commit and commit.returncode == 0 else None,
    }


def cpu_name() -> str:
    """The processor's model name, as the system knows it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


# ---------------------------------------------------------------- 2. results


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that replaces it only when the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # that of a full disk names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def output_directory(path: Path) -> Iterator[Path]:
    """Make the results directory and hold it, so that two runs do not write into one another's files."""
    from filelock import FileLock, Timeout

    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise UserError(f"another run is writing to {path}; wait for it or choose another --output-dir") from None
    except OSError as error:
        raise UserError(f"--output-dir {path} cannot be written: {error.strerror}") from None
    try:
        yield path
    finally:
        lock.release()


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """``torch.save``, all of it or nothing; raises OSError where torch has an error of its own for a full disk."""
    with atomic_path(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError:
            raise OSError(errno.EIO, "cannot be written (is the disk full?)", str(path)) from None


def write_text(path: Path, text: str) -> None:
    """Write ``text``, all of it or nothing."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # a path need not be valid text


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON, all of it or nothing; nan and infinity become null."""
    write_text(path, json.dumps(finite(content), indent=2, ensure_ascii=False) + "\n")


def finite(content: Any) -> Any:
    """``content`` with what JSON cannot hold made plain: nan becomes None, paths text."""
    if isinstance(content, dict):
        return {str(key): finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    if isinstance(content, float):
        return content if np.isfinite(content) else None
    return str(content) if isinstance(content, Path) else content


def write_csv(path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Write dictionaries as CSV, all or nothing; ``columns`` default to the first row's keys."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns or list(rows[0]), extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(rows)


def table(rows: Sequence[Sequence[Any]], header: Sequence[str], markdown: bool = False) -> str:
    """Rows of cells as an aligned text table, the first column to the left and the others to the right."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    least = 2 if markdown else 1  # a rule of ":" alone would be no table
    widths = [max(least, *(len(line[column]) for line in lines)) for column in range(len(header))]
    padded = [
        [cell.ljust(w) if c == 0 else cell.rjust(w) for c, (cell, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    if markdown:
        rule = [["-" * w if c == 0 else "-" * (w - 1) + ":" for c, w in enumerate(widths)]]
        return "\n".join("| " + " | ".join(line) + " |" for line in padded[:1] + rule + padded[1:])
    return "\n".join("  ".join(line).rstrip() for line in padded)


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high) of Student's t interval of the mean; infinite bounds where n < 2."""
    from scipy.special import stdtrit  # scipy.stats takes a second longer to import

    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, float("-inf"), float("inf")
    half = float(stdtrit(len(values) - 1, (1 + confidence) / 2) * np.std(values, ddof=1) / len(values) ** 0.5)
    return mean, mean - half, mean + half


# Okabe and Ito's palette, told apart by the colour-blind; one thing has one colour in every figure.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")


@contextlib.contextmanager
def figure(
    path: Path, title: str, rows: int = 1, columns: int = 1, size: tuple[float, float] = (8, 5)
) -> Iterator[Any]:
    """A figure of ``rows`` x ``columns`` axes, saved to ``path`` when the block ends; yields (figure, axes)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: dict[Any, Any] = {
        "font.size": 13,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.linewidth": 2.2,
        "legend.frameon": False,
    }
    with plt.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # of a class's name, drawn as a box
        drawing, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
        try:
            yield drawing, axes
            lines = [textwrap.fill(line, int(8.7 * size[0])) for line in title.splitlines()]  # so many letters an inch
            drawing.suptitle("\n".join(lines), fontsize=15, parse_math=False)  # a folder's name may hold dollars
            with atomic_path(path) as temporary:
                drawing.savefig(temporary, dpi=110)
        finally:
            plt.close(drawing)


def plain_numbers(axis: Any) -> None:
    """Ticks of a log axis as plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def finish(output: Path, summary: dict[str, Any]) -> None:
    """Write summary.json, print the paths written and, as the last line, the summary as compact JSON."""
    write_json(output / "summary.json", summary)
    print("\nWritten to", output)
    for path in sorted(output.iterdir()):
        if not path.name.startswith("."):
            print("   ", path)
    print(json.dumps(finite(summary), separators=(",", ":"), ensure_ascii=False))
