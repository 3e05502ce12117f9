"""What the lab's scripts share: options, data, networks, training, evaluation, checkpoints, workers, results.

A script loads a data set (``load_data``), opens a run (``open_run``), hands training jobs to its worker processes
(``Run.train``) and gives it tables, figures and a summary to write. Importing this module only defines names and, if
it comes before torch, makes idle threads sleep and leaves all cores to all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import functools
import gzip
import hashlib
import http.client
import importlib
import importlib.machinery
import importlib.metadata
import inspect
import io
import json
import logging
import math
import multiprocessing.pool
import multiprocessing.resource_tracker
import os
import pickle
import pkgutil
import platform
import queue
import random
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import traceback
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar

if bindings := {"OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY"} & set(os.environ):
    # Clusters set them for one program with many threads. Here every process would bind its own to the same core.
    for binding in bindings:
        del os.environ[binding]
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
    # Idle OpenMP threads soon sleep: spinning ones slow other programs down, and are slowed by them. Beside two busy
    # programs two threads trained on 6,000 images in 5 to 6 s with this, in 8 to 31 s without; alone there was no
    # difference (AMD EPYC, 2 cores). libgomp reads the variable once, when torch loads it; other programs that this
    # one starts must not inherit it.
    os.environ["GOMP_SPINCOUNT"] = "10000"
    import torch

    del os.environ["GOMP_SPINCOUNT"]

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

if TYPE_CHECKING:  # imported where they are needed, because every worker process imports this module
    from multiprocessing.connection import Connection

    import pandas as pd
    from matplotlib.figure import Figure
    from PIL import Image

ROOT = Path(__file__).resolve().parent

# ================================================================ 1. errors and options


class UserError(Exception):
    """An error that the user can fix: reported in one line with exit status 2, without a traceback."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without colours, or its type if it has none."""
    message = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip() or type(error).__name__
    return message.splitlines()[0]


def chain_of(error: BaseException) -> list[BaseException]:
    """An error and what led to it, back to the first, such as a database's own message."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    return chain


@contextlib.contextmanager
def user_error(text: str, kind: type[Exception], *kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of the given kinds into a UserError: ``text`` and the first line of the message.

    Name ``Exception`` only around code that is not the lab's: whatever it raises, the user can mend it. Any other
    error is a fault of the lab, and shows its traceback.
    """
    try:
        yield
    except UserError:
        raise
    except (kind, *kinds) as error:
        raise UserError(f"{text}: {first_line(error)[:200]}") from error


def is_of_the_system(error: Exception) -> bool:
    """Whether an error is about files, networks or memory, which the user can mend."""
    is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
    return is_memory or isinstance(error, OSError)


def tell(text: str) -> None:
    """Print a line on stderr, if there still is a terminal."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def note(text: str) -> None:
    """Tell the user something on stderr that is no error."""
    tell(f"NOTE: {text}")


ENDS = {"SIGTERM": "terminated", "SIGHUP": "hung up"}  # of schedulers and containers; of a terminal that is closed


def script(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Decorate a script's ``main``: user errors, Ctrl-C and other signals become one line and an exit status."""

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> int:
        _open_closed_streams()
        try:
            with _signals_interrupt(), _patient_consoles():
                return main(argv)
        except KeyboardInterrupt as error:
            sent = signal.Signals(error.args[0] if error.args else signal.SIGINT)
            tell(ENDS.get(sent.name, "interrupted"))
            return 128 + sent
        except Exception as error:
            if not (isinstance(error, UserError) or is_of_the_system(error)):
                raise
            tell(f"error: {str(error) or first_line(error)}")
            return 2

    return guarded


def _open_closed_streams() -> None:
    """What a job's scheduler has closed leads to the null device; otherwise files of ours would get its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("r+", encoding="utf-8"))  # noqa: SIM115


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """The signals in ENDS end the block like Ctrl-C; those that are ignored already, as by nohup, still are."""
    last = -math.inf

    def end(number: int, _: object) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last > before + 5:  # a closing terminal sends several, the first of which is being obeyed
            raise KeyboardInterrupt(number)

    before = {}
    if threading.current_thread() is threading.main_thread():  # no other one may handle signals
        numbers = [getattr(signal, name) for name in ENDS if hasattr(signal, name)]
        before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _patient_consoles() -> Iterator[None]:
    """Letters that the console cannot show are printed as escapes; one that is gone (``| head``) costs no results."""
    before = sys.stdout, sys.stderr
    errors = getattr(sys.stdout, "errors", None)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # as Python has it for stderr
    sys.stdout, sys.stderr = map(_Console, before)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors=errors)


class _Console:
    """A stream whose reader may go away."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write to the stream or, once that has failed, to nowhere."""
        try:
            return self.stream.write(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        try:
            self.stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def whole_number(low: int = 1, high: int = 2**31 - 1) -> Callable[[str], int]:
    """An argparse type: a whole number from ``low`` to ``high``."""

    def convert(text: str) -> int:
        with contextlib.suppress(ValueError):
            if low <= int(text) <= high:
                return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low:,} to {high:,}")

    return convert


def real_number(low: float, high: float = 2**31 - 1) -> Callable[[str], float]:
    """An argparse type: a number from ``low`` to ``high``."""

    def convert(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= float(text) <= high:
                return float(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low:,} to {high:,}")

    return convert


def path_name(text: str) -> Path:
    """An argparse type: a path, in which ~ is the home folder (shells leave it in --option=~/folder)."""
    if not text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a path")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {first_line(error)}") from None


def add_other_runs(parser: argparse.ArgumentParser, use: str) -> None:
    """Add --other-runs; ``use``: what the report makes of them."""
    text = f"results of other runs, {use}"
    parser.add_argument("--other-runs", nargs="+", type=path_name, default=[], metavar="FOLDER", help=text)


def add_common_args(parser: argparse.ArgumentParser, presets: bool = False, **defaults: object) -> None:
    """Add the options shared by all scripts, with a script's own ``defaults``; ``presets`` adds --preset."""
    add = parser.add_argument_group("common to all scripts").add_argument
    shown = "(default: the recipe's)" if presets else "(default: %(default)s)"
    dataset = defaults.get("dataset", "cifar10 if available, else fashion_mnist")
    images = defaults.get("images", "all, unless stated above")
    add("--dataset", help=f"fashion_mnist, cifar10 or an image folder {{train,test}}/<class>/* (default: {dataset})")
    add("--data-dir", type=path_name, default=ROOT / "data", help="where data sets are (default: the lab's data)")
    add("--output-dir", type=path_name, help="where the results go (default: ./%(default)s)")
    add("--model", metavar="MODULE:CALLABLE", help="a network of your own, such as torchvision.models:resnet18")
    add("--images", type=whole_number(), metavar="N", help=f"train on N images of all classes (default: {images})")
    add("--image-size", type=whole_number(8, 1024), metavar="PIXELS", help="resize images (folders: 32)")
    if presets:
        add("--preset", choices=tuple(PRESETS), default="small", help="network and recipe (default: %(default)s)")
    add("--epochs", type=whole_number(), help=f"passes over the training images {shown}")
    add("--batch-size", type=whole_number(), help=f"images per step {shown}")
    add("--width", type=whole_number(16), help=f"channels of the first stage, a multiple of 16 {shown}")
    add("--seed", type=whole_number(0), default=0, help="seed of everything random (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="(default: %(default)s)")
    add("--workers", type=whole_number(1, 1024), help="parallel processes (default: usable cores; on a GPU at most 4)")
    add("--quick", action="store_true", help="run every step on a few images, in seconds")
    parser.set_defaults(**defaults)


# ================================================================ 2. the machine


class Runtime(NamedTuple):
    """Where and how to compute: ``precision`` is fp32 or bf16; ``threads`` is per process."""

    device: str
    precision: str
    threads: int


def usable_cores() -> int:
    """The number of cores this process may use, given its CPU affinity and its container's quota (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # the quota may be "max"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def resolve_runtime(device: str = "auto", precision: str = "auto", threads: int = 1) -> Runtime:
    """Replace "auto" by what this machine has; changes nothing. Raises UserError for a device that it lacks."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with user_error(f"--device {device} cannot be used here", RuntimeError, AssertionError, ImportError):
        kind = torch.empty(1, device=device).device.type
    if kind not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {device} cannot be used here: neither a cpu, cuda nor mps device")
    if precision == "auto":
        precision = "bf16" if has_native_bf16(device) else "fp32"
    return Runtime(device, precision, threads)


def has_native_bf16(device: str) -> bool:
    """Whether the hardware computes in bf16: where it is merely emulated, it is slower than fp32."""
    if device == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)


def apply_runtime(runtime: Runtime) -> None:
    """Set this process's threads and allocator; fp32 then means fp32, not TF32."""
    torch.set_num_threads(runtime.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if runtime.precision == "bf16":
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Make glibc keep freed memory, because to map activations anew in every step costs page faults.

    Steps in bf16 are 7 to 15 % faster with it (Xeon with AMX, torch 2.14); in fp32 it gained nothing (AMD EPYC with
    AVX2: presets' steps of 500 images on one thread took 12 % longer, all others as long).
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold = -1  # of malloc.h; see mallopt(3)
        m_mmap_max = -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


# ================================================================ 3. data

VALIDATION_FRACTION = 0.1
SPLIT_SEED = 2024
DECODER = 7  # increase it when decoding changes: it invalidates the caches
MORE_SUFFIXES = (".jfif", ".jpe", ".gif", ".avif", ".jp2", ".tga", ".dib", ".pbm", ".pnm")  # besides torchvision's
CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
FASHION_FILES = {  # with the published MD5 (importing torchvision for them takes 1 s and 170 MB)
    "train-images-idx3": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1": "bb300cfdad3c16e7a12a480ee83cd310",
}
# What a download, an archive or its pickled content may raise.
CIFAR10_ERRORS = (
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    EOFError,
    TypeError,
    http.client.HTTPException,
    tarfile.TarError,
    pickle.UnpicklingError,
)
PUBLISHED = ("fashion_mnist", "cifar10")  # data sets with a name
Shape = tuple[int, int, int]  # of an image: channels, height, width


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory; ``source`` describes it in consoles and plot titles."""

    name: str
    source: str
    classes: tuple[str, ...]
    train_images: Tensor  # uint8 (N, C, H, W), channels_last, so that a crop copies whole pixels
    train_labels: Tensor  # int64 (N,)
    test_images: Tensor
    test_labels: Tensor
    test_files: tuple[str, ...] = ()  # of the test images, if each is a file

    @property
    def shape(self) -> Shape:
        """(C, H, W) of an image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    @property
    def folder(self) -> Path | None:
        """Where its images lie, if it is the user's own."""
        return None if self.name in PUBLISHED else Path(self.name).expanduser().resolve()

    @functools.cached_property
    def fingerprint(self) -> str:
        """A checksum of classes, training images and labels: it changes if the data at a path do."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        digest.update(self.train_images.permute(0, 2, 3, 1).contiguous().numpy().data)
        digest.update(self.train_labels.numpy().data)
        return digest.hexdigest()[:16]


def load_data(options: argparse.Namespace) -> Dataset:
    """Load --dataset; by default CIFAR-10 where available, otherwise the embedded Fashion-MNIST."""
    if options.dataset is not None:
        return load_dataset(options.dataset, options.data_dir, options.image_size)
    try:
        return load_dataset("cifar10", options.data_dir, options.image_size)
    except UserError as error:
        note(str(error))
        note("running on the embedded Fashion-MNIST instead of CIFAR-10.")
        return load_dataset("fashion_mnist", image_size=options.image_size)


def load_dataset(name: str, data_dir: Path = ROOT / "data", image_size: int | None = None) -> Dataset:
    """Load ``fashion_mnist``, ``cifar10`` or an image folder; raises UserError."""
    is_here = Path(name, "train").is_dir() and Path(name).resolve() != (data_dir / name).resolve()
    if name in PUBLISHED and is_here:
        note(f"--dataset {name} is the published data set; the folder here is ./{name}")
    if name == "fashion_mnist":
        data = load_fashion_mnist(data_dir)
    elif name == "cifar10":
        data = load_cifar10(data_dir, image_size or 32)
    else:
        with user_error(f"--dataset {name}", RuntimeError):  # no such user
            folder = Path(name).expanduser()
        data = load_folder(folder, image_size or 32)
    return replace(
        data,
        name=name,
        train_images=_stored(data.train_images, image_size),
        train_labels=data.train_labels.long(),
        test_images=_stored(data.test_images, image_size),
        test_labels=data.test_labels.long(),
    )


def _stored(images: Tensor, size: int | None) -> Tensor:
    """Images as a Dataset keeps them: of the wanted size, channels_last."""
    if size not in (None, images.shape[-1]):
        parts = [F.interpolate(part, size, mode="bilinear", antialias=True) for part in images.split(1000)]
        images = torch.cat(parts)
    return images.contiguous(memory_format=torch.channels_last)


def load_fashion_mnist(data_dir: Path) -> Dataset:
    """The published .gz files, MD5 checked; those of the lab, unless ``data_dir`` has its own."""
    embedded = ROOT / "data" / "FashionMNIST" / "raw"
    given = data_dir / "FashionMNIST" / "raw"
    folder = given if given.is_dir() else embedded
    parts = []
    for name, md5 in FASHION_FILES.items():
        path = folder / f"{name}-ubyte.gz"
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
            raise UserError(f"{path} is missing or not the published file; `git checkout data` restores the lab's own")
        values = torch.frombuffer(bytearray(gzip.decompress(content)), dtype=torch.uint8)
        header = 16 if "images" in name else 8  # bytes, of the IDX format
        parts.append(values[header:])
    train_images, train_labels, test_images, test_labels = parts
    return Dataset(
        name="fashion_mnist",
        source="Fashion-MNIST, embedded" if folder.resolve() == embedded.resolve() else "Fashion-MNIST",
        classes=CLOTHES,
        train_images=train_images.view(-1, 1, 28, 28),
        train_labels=train_labels,
        test_images=test_images.view(-1, 1, 28, 28),
        test_labels=test_labels,
    )


def load_cifar10(data_dir: Path, size: int) -> Dataset:
    """torchvision's archive or folder in ``data_dir``, the image folder ``cifar10`` there, or a download."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    archive = data_dir / CIFAR10.filename
    unpacked = data_dir / CIFAR10.base_folder
    images = data_dir / "cifar10"
    if archive.exists() and not check_integrity(str(archive), CIFAR10.tgz_md5):
        raise UserError(f"{archive} ({archive.stat().st_size:,} bytes) is incomplete or damaged: delete it")
    if images.is_dir() and not archive.exists() and not unpacked.is_dir():
        return replace(load_folder(images, size), source="CIFAR-10, image folder")
    if unpacked.is_dir() and not archive.exists():
        with user_error(f"{unpacked} is damaged: delete it", *CIFAR10_ERRORS):
            train, test = (CIFAR10(str(data_dir), is_train) for is_train in (True, False))
    else:  # an intact archive, which torchvision unpacks (again), or nothing: download
        names = f"{archive.name}, {unpacked.name} or an image folder {images.name} in {data_dir}"
        try:
            with user_error(f"no CIFAR-10: {names}, nor a download", *CIFAR10_ERRORS), _impatient_download():
                train, test = (CIFAR10(str(data_dir), is_train, download=True) for is_train in (True, False))
        finally:
            with contextlib.suppress(OSError):
                if archive.exists() and not check_integrity(str(archive), CIFAR10.tgz_md5):  # a download was cut short
                    archive.unlink()
    return Dataset(
        name="cifar10",
        source="CIFAR-10",
        classes=tuple(train.classes),
        train_images=torch.from_numpy(train.data).permute(0, 3, 1, 2),
        train_labels=torch.tensor(train.targets),
        test_images=torch.from_numpy(test.data).permute(0, 3, 1, 2),
        test_labels=torch.tensor(test.targets),
    )


@contextlib.contextmanager
def _impatient_download() -> Iterator[None]:
    """Sockets give up after ten seconds: a firewalled network never answers. What is printed goes to stderr."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        socket.setdefaulttimeout(before)


class ImageFiles(NamedTuple):
    """The images of one half, train or test, of an image folder: paths and labels (indices of classes)."""

    paths: list[str]
    labels: list[int]


class ImageFilter:
    """Tells image files from what else lies beside them; ``skipped`` counts the latter by kind."""

    def __init__(self, folder: Path) -> None:
        from torchvision.datasets.folder import IMG_EXTENSIONS

        self.folder = folder
        self.suffixes = (*IMG_EXTENSIONS, *MORE_SUFFIXES)
        self.skipped: Counter[str] = Counter()

    def __call__(self, path: str) -> bool:
        """Whether the file at ``path`` is an image, by its name."""
        parts = Path(path).relative_to(self.folder).parts
        kind = Path(path).suffix.lower() or "without suffix"
        if any(map(_is_hidden, parts)):
            kind = "hidden"
        is_image = kind in self.suffixes
        if not is_image:
            self.skipped[kind] += 1
        return is_image

    def skipped_text(self) -> str:
        """The counts in words."""
        return ", ".join(f"{count} {kind}" for kind, count in self.skipped.most_common())


def load_folder(folder: Path, size: int) -> Dataset:
    """``folder/{train,test}/<class>/*`` as square RGB images; they are decoded once and cached."""
    folder = folder.resolve()
    image_filter = ImageFilter(folder)
    classes, train = _list_images(folder, "train", image_filter)
    test_classes, test = _list_images(folder, "test", image_filter)
    if classes != test_classes or len(classes) < 2:
        only = [sorted({*own} - {*other})[:5] for own, other in ((classes, test_classes), (test_classes, classes))]
        found = f"only in train/ are {only[0]}, only in test/ {only[1]}" if any(only) else f"not {classes}"
        raise UserError(f"{folder}: train/ and test/ need the same two or more classes: {found}")
    if image_filter.skipped:
        note(f"skipped files in {folder} that are not images: {image_filter.skipped_text()}")
    decoded = _decode_once(folder, train.paths, test.paths, size)
    data = Dataset(
        name=str(folder),
        source=f"{_readable(folder.name)}, image folder",
        classes=tuple(classes),
        train_images=decoded.train,
        train_labels=torch.tensor(train.labels),
        test_images=decoded.test,
        test_labels=torch.tensor(test.labels),
        test_files=tuple(test.paths),
    )
    for remark in (*decoded.remarks, *find_oddities(data)):
        note(f"{folder}: {remark}")
    return data


def _is_hidden(name: str) -> bool:
    """Whether a file or folder is a program's own, such as thumbnails of Synology's or metadata of macOS."""
    return name.startswith(".") or name in ("@eaDir", "__MACOSX")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one; links in a circle are not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _readable(name: str) -> str:
    """A file name as text, whatever the locale, in one Unicode normal form; what cannot be printed is escaped."""
    text = unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "backslashreplace"))
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _list_images(folder: Path, half: str, image_filter: ImageFilter) -> tuple[list[str], ImageFiles]:
    """The classes below ``folder/half`` and their images; raises UserError if there are none."""
    split = folder / half
    if not split.is_dir():
        raise UserError(f"{folder} is neither fashion_mnist, cifar10 nor a folder with {half}/<class>/")
    names: dict[str, str] = {}  # of folders, by class
    for entry in os.scandir(split):
        if _is_folder(entry) and not _is_hidden(entry.name):
            name = _readable(entry.name)
            if name in names:
                raise UserError(f"{split}: two classes are called {name}, in two Unicode forms: merge or rename them")
            names[name] = entry.name
    if not names:
        raise UserError(f"{split} has no folder for a class")
    classes = sorted(names)
    images = ImageFiles([], [])
    labels: dict[str, int] = {}  # of real files
    for label, name in enumerate(classes):
        found = 0
        files = _files_below(str(split / names[name]), entered=set())
        for path, real_path in sorted(files, key=lambda file: file[0].rpartition(os.sep)):
            if not image_filter(path):
                continue
            found += 1
            if real_path not in labels:
                images.paths.append(path)
                images.labels.append(label)
            elif labels[real_path] != label:
                other = classes[labels[real_path]]
                raise UserError(f"{path} is a file of class {other}, too: links lead from one class to the other")
            labels[real_path] = label
        if not found:
            skipped = f" (skipped: {image_filter.skipped_text()})" if image_filter.skipped else ""
            raise UserError(f"{split}: class {name} has no images{skipped}")
    return classes, images


def _files_below(folder: str, entered: set[str]) -> Iterator[tuple[str, str]]:
    """(path, path without links) of all files below a folder; links are followed, but none ``entered`` before."""
    real_folder = os.path.realpath(folder)
    if real_folder in entered:
        return
    entered.add(real_folder)
    for entry in os.scandir(folder):
        if _is_folder(entry):
            yield from _files_below(entry.path, entered)
        else:
            is_link = entry.is_symlink()
            yield entry.path, os.path.realpath(entry.path) if is_link else f"{real_folder}{os.sep}{entry.name}"


def find_oddities(data: Dataset) -> list[str]:
    """What people should know of their images, in sentences: blank ones, and the same one in several places."""
    oddities = []
    seen: dict[bytes, set[int]] = {}  # the classes of the training images, by their pixels
    copies = 0
    in_several_classes = 0
    for pixels, label in _pictures(data.train_images, data.train_labels):
        classes = seen.setdefault(pixels, set())
        copies += label in classes
        in_several_classes += bool(classes - {label})
        classes.add(label)
    in_both = sum(pixels in seen for pixels, _ in _pictures(data.test_images, data.test_labels))
    for half, images, labels in (
        ("train", data.train_images, data.train_labels),
        ("test", data.test_images, data.test_labels),
    ):
        blank = labels[_are_blank(images)].bincount(minlength=len(data.classes))
        worst = int(blank.argmax())
        if blank[worst]:
            place = f"of class {data.classes[worst]} {blank[worst]} of {int((labels == worst).sum())}"
            oddities.append(
                f"{blank.sum()} of {len(labels)} images in {half}/ are (nearly) of a single colour ({place})"
            )
    if in_several_classes:
        oddities.append(f"{in_several_classes} images in train/ are in another class, too, pixel by pixel")
    if copies:
        oddities.append(f"{copies} of {len(data.train_labels)} images in train/ are copies of others in their class")
    if in_both:
        oddities.append(f"{in_both} of {len(data.test_labels)} images in test/ are in train/, too, pixel by pixel")
    return oddities


def _pictures(images: Tensor, labels: Tensor) -> Iterator[tuple[bytes, int]]:
    """(checksum of the pixels, label) of each image, uint8 (N, C, H, W), that is not blank."""
    array = images.permute(0, 2, 3, 1).numpy()
    for number in (~_are_blank(images)).nonzero()[:, 0].tolist():
        yield hashlib.blake2b(array[number].tobytes(), digest_size=16).digest(), int(labels[number])


BLANK_RANGE = 8  # of 256 values, which the pixels of a blank image span at most


def _are_blank(images: Tensor) -> Tensor:
    """Which images, uint8 (N, C, H, W), are of (nearly) a single colour: bool (N,)."""
    return (images.amax((2, 3)) - images.amin((2, 3))).amax(1) < BLANK_RANGE


class Decoded(NamedTuple):
    """The images of both halves of a folder, uint8 (N, 3, size, size), and in sentences what was lost or decided."""

    train: Tensor
    test: Tensor
    remarks: list[str]


def _decode_once(folder: Path, train: Sequence[str], test: Sequence[str], size: int) -> Decoded:
    """The decoded images of both halves, from the user's cache if the files have not changed since."""
    facts = []
    for path in (*train, *test):
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} is not a regular file")
        # On Linux and macOS st_ctime_ns changes with every change of a file, even if its times are set back.
        facts.append((path, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    decoder = (DECODER, importlib.metadata.version("pillow"))
    key = hashlib.sha256(ascii((decoder, size, facts)).encode()).hexdigest()
    place = hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]
    name = f"{folder.name[:40]}-{size}-{place}.pt"
    with contextlib.suppress(Exception):  # torch.load raises anything if the file is missing or damaged: decode again
        content = torch.load(_cache_folder() / name, weights_only=True)
        if content["key"] == key:
            return Decoded(*(content[name] for name in Decoded._fields))
    decoded = decode_images(train, test, size)
    try:
        _cache_folder().mkdir(parents=True, exist_ok=True)
        write_tensors(_cache_folder() / name, {"key": key, **decoded._asdict()})
    except (OSError, UserError) as error:
        note(f"the decoded images are not cached: {error}")
    return decoded


def _cache_folder() -> Path:
    """The user's; raises OSError if the user has no home."""
    from platformdirs import user_cache_path

    try:
        return user_cache_path("small-cv-lab", appauthor=False)
    except RuntimeError as error:
        raise OSError(first_line(error)) from error


def decode_images(train: Sequence[str], test: Sequence[str], size: int) -> Decoded:
    """Decode the image files of both halves, of any size and mode.

    What suits the training images decides for all. Grey images of more than 8 bits are scaled by the number of bits
    that are really used, because 16-bit files often hold 12-bit values; with values below 0, the lowest one is black
    and the highest one white. Transparent images are laid on white or, if that hides more of them, on black or grey.
    Raises UserError for a file that cannot be read.
    """
    from tqdm import tqdm

    paths = [*train, *test]
    losses: list[str] = []
    with warnings.catch_warnings(), _of_any_size(), multiprocessing.pool.ThreadPool(usable_cores()) as pool:
        warnings.simplefilter("ignore")
        decoded = pool.imap(functools.partial(_decode_or_fail, size=size, losses=losses), paths)
        found = list(tqdm(decoded, "decoding images", len(paths), unit="image", disable=None))
    images = [image for image in found if isinstance(image, np.ndarray)]
    failures = [failure for failure in found if isinstance(failure, UserError)]
    if failures:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise UserError(f"{failures[0]}{more}")
    deciding = images[: len(train)] or images
    levels = _find_levels(deciding) or _find_levels(images) or Levels(0, 1)
    background, blank_on_white = _find_background(deciding)
    pixels = np.stack([_to_rgb(image, levels, background) for image in images])
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    remarks = [f"{count} of {len(paths)} images have {loss}" for loss, count in Counter(losses).items()]
    if background != BACKGROUNDS[0]:
        name = {0: "black", 127: "grey"}[background]
        remarks.append(f"transparent images are laid on {name}: on white, {blank_on_white} would be blank")
    remarks += _outliers(deciding, levels)
    return Decoded(tensor[: len(train)].clone(), tensor[len(train) :].clone(), remarks)


@contextlib.contextmanager
def _of_any_size() -> Iterator[None]:
    """Pillow refuses very large images, which are attacks on web servers; here they are the user's own."""
    from PIL import Image, PngImagePlugin

    before = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    Image.MAX_IMAGE_PIXELS = None
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**30
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = before


def _decode_or_fail(path: str, size: int, losses: list[str]) -> np.ndarray | UserError:
    """The image, see ``_decode_file``, or why there is none."""
    try:
        return _decode_file(path, size, losses)
    except UserError as error:
        return error


def _decode_file(path: str, size: int, losses: list[str]) -> np.ndarray:
    """An image with its EXIF rotation applied; what is lost of it is added to ``losses``, in words.

    uint8 RGB (size, size, 3); RGBA (size, size, 4) if parts of it are transparent; float32 (size, size) if it is grey
    with more than 8 bits or a sign.
    """
    from PIL import Image, ImageOps

    with user_error(f"unreadable image {ascii(path)[1:-1]}", Exception), Image.open(path) as file:  # Pillow's errors
        samples = str(getattr(file, "tile", ""))  # how Pillow reads them, such as RGB;16B
        file.load()
        with contextlib.suppress(Exception):  # damage behind the first picture
            if getattr(file, "is_animated", False) and file.format != "MPO":  # phones' photographs have a second one
                losses.append("several frames or pages, of which the first is used")
        if re.search(";16[BLN]", samples) and not file.mode.startswith("I"):
            losses.append("colours of 16 bits, of which the upper 8 are used")
        image: Image.Image = file
        with contextlib.suppress(Exception):  # a damaged EXIF block in an intact image
            image = ImageOps.exif_transpose(file)
        values = _deep_values(image, getattr(file, "tag_v2", {}))
        if values is not None:
            if not np.isfinite(values).all():
                raise ValueError("not all of its values are finite")
            image = Image.fromarray(values)
        elif image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
            image = image.convert("RGBA")
            if np.asarray(image)[..., 3].max() < 255:
                losses.append("no opaque pixel: is their fourth channel really opacity?")
        else:
            image = image.convert("RGB")
        # Other filters than bilinear overshoot, beyond black and white.
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def _deep_values(image: Image.Image, tags: Any) -> np.ndarray | None:
    """The values, float32 (H, W), of a grey image of more than 8 bits or with a sign; None for any other.

    ``tags``: of a TIFF file, because Pillow ignores some that say what the values mean.
    """
    bits, sample_format = (tags.get(tag, (default,))[0] for tag, default in ((258, 8), (339, 1)))
    if image.mode == "L" and (bits, sample_format) == (8, 2):
        return np.asarray(image).view(np.int8).astype(np.float32)
    if not image.mode.startswith(("I", "F")):
        return None
    values = np.asarray(image)
    if (bits, sample_format) == (32, 1):
        values = values.view(np.uint32)
    values = values.astype(np.float32)
    is_inverted = tags.get(262) == 0 and sample_format == 1  # photometric interpretation 0: high values are dark
    return 2.0**bits - 1 - values if is_inverted else values


class Levels(NamedTuple):
    """The values of black and white in grey images of more than 8 bits."""

    black: float
    white: float


def _find_levels(images: Sequence[np.ndarray]) -> Levels | None:
    """Those of the images (H, W) of more than 8 bits; None if there are no such images."""
    deep = [image for image in images if image.ndim == 2]
    if not deep:
        return None
    lowest = min(float(image.min()) for image in deep)
    highest = max(float(image.max()) for image in deep)
    if lowest < 0:
        return Levels(lowest, max(highest, lowest + 1e-6))
    if highest < 2:
        return Levels(0, 1)
    bits = min(32, int(highest).bit_length())  # 2**32 - 1 is rounded up in float32
    return Levels(0, 2.0**bits - 1)


def _outliers(images: Sequence[np.ndarray], levels: Levels) -> list[str]:
    """A sentence if one extreme value of the images (H, W) of more than 8 bits leaves the others no room."""
    deep = [image for image in images if image.ndim == 2]
    values = np.stack(deep[:: max(1, len(deep) // 500)]) if deep else np.zeros(1)
    inner = values[(values > values.min()) & (values < values.max())]
    is_most = inner.size > values.size / 20  # otherwise it is a drawing of two values
    low, high = np.percentile(inner, (5, 95)) if is_most else (levels.black, levels.white)
    if (high - low) * 255 / (levels.white - levels.black) > 2 * BLANK_RANGE:
        return []
    return [
        f"most grey values lie between {low:.4g} and {high:.4g}, but black is {levels.black:.4g} and white "
        f"{levels.white:.4g}: does an extreme one stand for missing data?"
    ]


BACKGROUNDS = (255, 0, 127)  # grey values to lay transparent images on


def _find_background(images: Sequence[np.ndarray]) -> tuple[int, int]:
    """The first of BACKGROUNDS on which the fewest of the transparent images (H, W, 4) are blank; how many on white."""
    transparent = [image for image in images if image.ndim == 3 and image.shape[2] == 4]
    counts = {}
    for level in BACKGROUNDS:
        laid = [torch.from_numpy(_lay_on(image, level)).permute(2, 0, 1) for image in transparent]
        counts[level] = int(_are_blank(torch.stack(laid)).sum()) if laid else 0
        if counts[level] == 0:
            break
    return min(counts, key=counts.__getitem__), counts[BACKGROUNDS[0]]


def _lay_on(image: np.ndarray, level: int) -> np.ndarray:
    """A transparent image, uint8 (H, W, 4), on a grey background: uint8 (H, W, 3)."""
    opacity = image[..., 3:].astype(np.float32) / 255
    return (image[..., :3] * opacity + level * (1 - opacity)).round().astype(np.uint8)


def _to_rgb(image: np.ndarray, levels: Levels, background: int) -> np.ndarray:
    """What ``_decode_file`` returns as uint8 (H, W, 3)."""
    if image.ndim == 2:
        grey = (image - levels.black) * (255 / (levels.white - levels.black))
        return np.stack([grey.clip(0, 255).round().astype(np.uint8)] * 3, axis=2)
    return image if image.shape[2] == 3 else _lay_on(image, background)


class Split(NamedTuple):
    """Indices (int64) of images to train on and to validate on; per-channel mean and std of the former."""

    train: Tensor
    validation: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]


@functools.lru_cache(maxsize=16)
def split_dataset(data: Dataset, limit: int | None = None, validation: bool = True, seed: int = SPLIT_SEED) -> Split:
    """A fixed stratified split; both parts are cut at ``limit``, and without ``validation`` none are held out.

    Every prefix of both holds the classes in proportion.
    """
    shuffled = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(seed))
    train, held_out = [], []
    for label, name in enumerate(data.classes):
        members = shuffled[data.train_labels[shuffled] == label]
        if len(members) < 2:
            raise UserError(f"class {name} needs at least two training images, so that one can be for validation")
        held = max(1, round(VALIDATION_FRACTION * len(members))) if validation else 0
        train.append(members[held:])
        held_out.append(members[:held])
    index = _interleave(train)[:limit].clone()  # whoever pickles a view pickles all of its storage
    if len(index) < len(data.classes):
        note(f"{len(index)} training images cannot show all {len(data.classes)} classes")
    mean, std = _pixel_statistics(data.train_images, index)
    return Split(index, _interleave(held_out)[:limit].clone(), mean, std)


def _interleave(groups: Sequence[Tensor]) -> Tensor:
    """All members of the groups, mixed in proportion."""
    places = [torch.arange(len(group)) / max(1, len(group)) for group in groups]
    order = torch.cat(places).argsort(stable=True)
    return torch.cat(list(groups))[order]


def _pixel_statistics(images: Tensor, index: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel (mean, std) of uint8 images (N, C, H, W) at ``index``, in [0, 1].

    The std is over all pixels, not the mean of per-image ones, which is where the widely copied 0.2023, 0.1994, 0.2010
    for CIFAR-10 come from.
    """
    total = torch.zeros(images.shape[1], dtype=torch.float64)
    total_squares = torch.zeros_like(total)
    for part in index.split(1000):
        pixels = images[part].double() / 255
        total += pixels.mean((2, 3)).sum(0)
        total_squares += pixels.square().mean((2, 3)).sum(0)
    mean = total / len(index)
    variance = (total_squares / len(index) - mean**2).clamp_min(0)
    std = variance.sqrt().clamp_min(1 / 255)  # of images of a single colour
    return tuple(mean.tolist()), tuple(std.tolist())


# ================================================================ 4. networks

LOGIT_SCALE = 1 / 9  # keeps the initial logits and the first steps of the head small (Jordan 2024)


@dataclass(frozen=True)
class Stem:
    """SmallCNN's first layer, which whitens patches of ``size`` x ``size`` pixels."""

    stride: int
    size: int
    channels: int


@dataclass(frozen=True)
class Network:
    """An architecture: SmallCNN, PlainCNN or one of the user's own, MODULE:CALLABLE."""

    model: str = "SmallCNN"
    width: int = 32  # channels of the first stage, a multiple of 16
    growth: tuple[float, ...] = (1, 4, 4)  # channels of SmallCNN's stages, in multiples of width
    stem: Stem = Stem(stride=1, size=2, channels=24)
    activation: str = "ReLU"  # SmallCNN's: a class of torch.nn
    head: str = "biased"  # SmallCNN's: biased, logits times LOGIT_SCALE; or unit, as Muon's learning rates expect it
    batch_norm: bool = True  # PlainCNN's
    dropout: float = 0.0  # SmallCNN's, before the head

    @property
    def is_custom(self) -> bool:
        """Whether it is the user's own."""
        return self.model not in ("SmallCNN", "PlainCNN")


class Normalise(nn.Module):
    """Standardise float32 images (N, C, H, W) in [0, 1]; greyscale ones broadcast to as many channels as ``mean``."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.tensor(mean)[:, None, None])
        self.std = nn.Buffer(torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """(images - mean) / std."""
        return (images - self.mean) / self.std


class PlainCNN(nn.Sequential):
    """The textbook network: convolution, pooling, (BatchNorm,) ReLU, twice, then one linear layer.

    Pooling comes before ReLU: without BatchNorm this is the same function, and faster.
    Input float32 (N, C, H, W), output logits (N, num_classes). torch's own initialisation, every weight trained.
    """

    def __init__(self, shape: Shape, num_classes: int, width: int, batch_norm: bool) -> None:
        channels, height, _ = shape
        layers: list[nn.Module] = []
        for out in (width, 2 * width):
            layers.append(nn.Conv2d(channels, out, 3, padding=1))
            layers.append(nn.MaxPool2d(2))
            if batch_norm:
                layers.append(nn.BatchNorm2d(out))
            layers.append(nn.ReLU())
            channels = out
        layers.append(nn.Flatten())
        layers.append(nn.Linear(channels * (height // 4) ** 2, num_classes))
        super().__init__(*layers)


class SmallMapConvolution(torch.autograd.Function):
    """``F.conv2d(images, kernels, padding=1)`` for training with 3x3 kernels, in channels_last.

    The weight gradient is a single matrix product: oneDNN's is slow for bf16 and small maps (torch 2.14, Xeon, AMX).
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, kernels: Tensor) -> Tensor:
        """(N, C, H, W) and (O, C, 3, 3) -> (N, O, H, W)."""
        ctx.save_for_backward(images, kernels)
        return F.conv2d(images, kernels, padding=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of images and kernels."""
        images, kernels = ctx.saved_tensors
        padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        windows = padded.unfold(1, 3, 1).unfold(2, 3, 1).permute(0, 1, 2, 4, 5, 3)  # (N, H, W, 3, 3, C)
        pixels = gradient.permute(0, 2, 3, 1).flatten(0, 2)  # (N * H * W, O)
        of_kernels = pixels.T @ windows.flatten(3).flatten(0, 2)
        of_kernels = of_kernels.view(-1, 3, 3, images.shape[1]).permute(0, 3, 1, 2)
        return conv2d_input(images.shape, kernels, gradient, padding=1), of_kernels


class Convolution(nn.Conv2d):
    """A 3x3 convolution that keeps the size of the map, without bias; faster than torch's in training on small maps."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(channels, out, 3, padding=1, bias=False)
        nn.init.dirac_(self.weight[: min(channels, out)].data)

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, H, W)."""
        if self.training and self.is_slow_in_torch(images):
            return SmallMapConvolution.apply(images, self.weight.to(images.dtype))
        return super().forward(images)

    @staticmethod
    def is_slow_in_torch(images: Tensor) -> bool:
        """Whether torch computes the weight gradient slowly: in bf16 on a CPU, for many channels of small maps."""
        is_small = images.shape[1] >= 64 and images.shape[-1] <= 7
        return is_small and images.is_cpu and images.dtype == torch.bfloat16


class Block(nn.Module):
    """Convolution, max-pooling (if ``pool``), BatchNorm, activation.

    Pooling comes before BatchNorm and activation, which then see a quarter of the pixels. BatchNorm learns a shift but
    no scale, so its scale stays positive, commutes with max-pooling and can be folded.
    """

    def __init__(self, channels: int, out: int, activation: type[nn.Module], pool: bool) -> None:
        super().__init__()
        self.convolution = Convolution(channels, out)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()
        self.norm = nn.BatchNorm2d(out, momentum=0.4)  # short trainings have few steps to average over
        self.norm.weight.requires_grad_(False)
        self.activation = activation()

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, H, W), half as high and wide with pooling."""
        return self.activation(self.norm(self.pool(self.convolution(images))))


class SmallCNN(nn.Module):
    """The fast network: input float32 (N, C, H, W), standardised; output logits (N, num_classes).

    A fixed stem whitens patches (as in Page's and Jordan's CIFAR-10 speed runs) and needs no backward pass. Stages of
    two blocks follow, then global max-pooling, so larger images fit. The unit head has weights of unit standard
    deviation, no bias, and logits divided by the number of channels (airbench94_muon, Jordan 2024).
    """

    def __init__(self, channels: int, num_classes: int, network: Network) -> None:
        super().__init__()
        activation = getattr(nn, network.activation)
        stem = network.stem
        directions = min(stem.channels, 2 * channels * stem.size**2)  # all of them, with both signs
        self.stem = nn.Conv2d(channels, directions, stem.size, stem.stride, bias=False).requires_grad_(False)
        blocks = []
        channels = directions
        for factor in network.growth:
            out = round(network.width * factor)
            blocks.append(Block(channels, out, activation, pool=True))
            blocks.append(Block(out, out, activation, pool=False))
            channels = out
        self.activation = activation()
        self.blocks = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(network.dropout)
        self.head = nn.Linear(channels, num_classes, bias=network.head == "biased")
        self.scale = LOGIT_SCALE
        if network.head == "unit":
            self.scale = 1 / channels
            self.head.weight.data /= self.head.weight.std().item()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes)."""
        maps = self.blocks(self.activation(self.stem(images)))
        return self.scale * self.head(self.dropout(maps.amax((2, 3))))

    @torch.no_grad()
    def whiten_stem(self, images: Tensor) -> None:
        """Set the stem to the leading principal directions of patches of ``images``, scaled to unit variance.

        Each direction is used with both signs, because the ReLU that follows discards one half.
        """
        patches = F.unfold(images, self.stem.kernel_size, stride=self.stem.stride).transpose(1, 2).flatten(0, 1)
        patches = patches.double()
        variance, directions = torch.linalg.eigh(patches.T @ patches / len(patches))  # ascending
        filters = (directions / (variance.clamp_min(0) + 5e-4).sqrt()).T.flip(0)[: self.stem.out_channels // 2]
        self.stem.weight.copy_(torch.cat([filters, -filters]).view_as(self.stem.weight))


# What the import of other people's code may change for this program, but shall not: how to get and how to set it.
SETTINGS_OF_THE_PROCESS: tuple[tuple[Callable[[], Any], Callable[[Any], object]], ...] = (
    (os.getcwd, os.chdir),
    (lambda: sys.argv, lambda argv: setattr(sys, "argv", argv)),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, lambda _: torch.set_default_device(None)),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (np.geterr, lambda errors: np.seterr(**errors)),
    (lambda: logging.root.level, logging.root.setLevel),
    (
        functools.partial(multiprocessing.get_start_method, allow_none=True),
        functools.partial(multiprocessing.set_start_method, force=True),
    ),
    *(
        (functools.partial(signal.getsignal, number), functools.partial(signal.signal, number))
        for number in (getattr(signal, name, None) for name in ("SIGINT", *ENDS))
        if number
    ),
)
_alone = threading.RLock()  # for whoever changes what the whole process has: its folder, its random numbers
OUR_MODULES = ("common", "task2_optimizers", "task3_optuna", "task4_onnx")
_modules_of_users: dict[str, ModuleType] = {}  # that have one of these names, once imported


@contextlib.contextmanager
def _guest(name: str) -> Iterator[None]:
    """Run other people's code as in a program of its own, with ``sys.argv`` [name], and set back what it changes.

    Its modules are found in the working directory, too; those with the names of the lab's hide the lab's from it.
    """
    with _alone, warnings.catch_warnings():
        settings = [get() for get, _ in SETTINGS_OF_THE_PROCESS]
        path = [*sys.path]
        here = str(Path.cwd())
        if here not in sys.path:
            sys.path.append(here)  # last, so that it hides no libraries
        hidden = _hide_our_modules()
        sys.argv = [name]
        multiprocessing.set_start_method(None, force=True)  # it may be set once
        try:
            yield
        except SystemExit as error:
            advice = "what it does as a program belongs below if __name__ == '__main__'"
            raise UserError(f"--model: {name} ends the program when it is imported or called; {advice}") from error
        finally:
            _show_our_modules(hidden)
            sys.path[:] = [*path, *(entry for entry in sys.path if entry not in path)]  # for later imports
            for before, (get, set_it) in zip(settings, SETTINGS_OF_THE_PROCESS, strict=True):
                if get() != before:
                    set_it(before)


def _hide_our_modules() -> dict[str, ModuleType | None]:
    """Put the user's modules with the names of the lab's in their place; returns the latter."""
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    specs = {name: importlib.machinery.PathFinder.find_spec(name, elsewhere) for name in OUR_MODULES}
    hidden = {name: sys.modules.pop(name, None) for name, spec in specs.items() if spec and spec.origin}
    if hidden:
        sys.path[:] = [*elsewhere, str(ROOT)]
        sys.modules.update(_modules_of_users)
    return hidden


def _show_our_modules(hidden: Mapping[str, ModuleType | None]) -> None:
    """Put the lab's modules back in their place."""
    for name, ours in hidden.items():
        theirs = sys.modules.pop(name, None)
        if theirs:
            _modules_of_users[name] = theirs
        if ours:
            sys.modules[name] = ours


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of torch (on the CPU), NumPy and Python depend on ``seed`` alone; afterwards all is as before."""
    with _alone, torch.random.fork_rng(devices=[]):
        of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (other people's code uses it)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)  # noqa: NPY002


def import_callable(name: str) -> Callable[..., object]:
    """The object MODULE:CALLABLE, see ``_guest``; raises UserError. What is drawn at random is the same every time."""
    module_name = name.partition(":")[0]
    with user_error(f"--model {name} cannot be imported", Exception):  # other people's code may raise anything
        if ":" not in name:
            raise ValueError("it is not MODULE:CALLABLE")
        try:
            with _guest(module_name), seeded(0):
                return pkgutil.resolve_name(name)
        except (ImportError, AttributeError) as error:
            raise UserError(f"--model {name} cannot be imported: {first_line(error)}{_hidden_files()}") from error


def _hidden_files() -> str:
    """In words, which modules in the working directory were not imported, because libraries have their names."""
    hidden = []
    for path in sorted(Path.cwd().iterdir()):
        loaded = sys.modules.get(path.stem) if path.suffix in ("", ".py") else None
        origin = Path(getattr(loaded, "__file__", None) or ".").resolve()
        if loaded and path.stem not in OUR_MODULES and not origin.is_relative_to(path.resolve()):
            hidden.append(path.name)
    return f" (libraries have modules of the same name as {', '.join(hidden)} here)" if hidden else ""


def import_network(name: str, shape: Shape, num_classes: int, seed: int) -> nn.Module:
    """The user's own network, MODULE:CALLABLE, for images of ``shape``; raises UserError."""
    make = import_callable(name)
    with user_error(f"--model {name} cannot be made", Exception), _guest(name.partition(":")[0]), seeded(seed):
        network = make(num_classes=num_classes)
        if not isinstance(network, nn.Module):
            raise TypeError(f"it gives a {type(network).__name__}, not a torch.nn.Module")
        if any(map(nn.parameter.is_lazy, (*network.parameters(), *network.buffers()))):
            with torch.no_grad():
                network.eval()(torch.zeros(2, *shape))  # lazy layers get their sizes
            network.train()
    return network


def build_model(
    network: Network,
    shape: Shape,
    num_classes: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> nn.Sequential:
    """``Normalise`` and a network for images of ``shape``, channels_last; random weights depend on ``seed`` alone.

    Without ``mean`` and ``std`` their values are placeholders, until weights are loaded.
    """
    channels = shape[0]
    if not network.is_custom and network.width % 16:
        raise UserError(f"--width {network.width} is not a multiple of 16")
    copies = 3 // channels if network.is_custom else 1  # grey images are repeated for a custom network
    with seeded(seed):
        if network.model == "PlainCNN":
            body: nn.Module = PlainCNN(shape, num_classes, network.width, network.batch_norm)
        elif network.model == "SmallCNN":
            body = SmallCNN(channels, num_classes, network)
        else:
            body = import_network(network.model, (channels * copies, *shape[1:]), num_classes, seed)
    mean = [0.0] * channels if mean is None else mean
    std = [1.0] * channels if std is None else std
    kind = CustomModel if network.is_custom else nn.Sequential
    return kind(Normalise([*mean] * copies, [*std] * copies), set_layout(body, torch.channels_last))


class CustomModel(nn.Sequential):
    """``Normalise`` and a network of the user's, in channels_last unless it cannot be computed so."""

    is_contiguous = False

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes)."""
        normalised, network = self[0](images), self[1]
        if not self.is_contiguous:
            try:
                return network(normalised)
            except RuntimeError as error:
                if "view size is not compatible" not in str(error):  # of tutorials' x.view(len(x), -1)
                    raise
            self.is_contiguous = True
            set_layout(network, torch.contiguous_format)
            torch.clear_autocast_cache()  # of weights in the other layout
        return network(normalised.contiguous())


SomeModule = TypeVar("SomeModule", bound=nn.Module)


def set_layout(model: SomeModule, layout: torch.memory_format) -> SomeModule:
    """Store all tensors of four dimensions in this layout; ``model.to`` fails for networks that have others of five."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 4 and tensor.layout == torch.strided:
            tensor.data = tensor.data.to(memory_format=layout)  # contiguous() would not re-order 1x1 kernels
    return model


def make_model(network: Network, data: Dataset, split: Split, seed: int = 0) -> nn.Sequential:
    """A new model, ready to be trained on ``split``: normalised by its statistics, its stem whitened."""
    model = build_model(network, data.shape, len(data.classes), split.mean, split.std, seed)
    if isinstance(model[1], SmallCNN):
        few = split.train[:: max(1, len(split.train) // 2000)]
        model[1].whiten_stem(model[0](data.train_images[few].float() / 255))
    return model


LOGIT_TOLERANCE = 1e-3  # of the largest logit: how far logits of the same network may differ


@dataclass(frozen=True, eq=False)
class SavedNetwork:
    """A trained network, as processes send it to each other and as checkpoints hold it."""

    network: Network
    shape: Shape
    num_classes: int
    seed: int  # it was made with
    state: Mapping[str, object]  # its state dict, with tensors on the CPU
    logits: Tensor  # of ``probe_images``

    @classmethod
    def of(cls, model: nn.Sequential, network: Network, shape: Shape, num_classes: int, seed: int) -> SavedNetwork:
        """A copy of a model, which later training does not change."""
        state = model.state_dict()  # an OrderedDict with the versions of its modules, which stay
        for key, value in state.items():
            state[key] = value.cpu().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        was_training = model.training
        device = next(model.buffers()).device  # Normalise has some
        logits = predict(model, probe_images(shape), Runtime(str(device), "fp32", 1))
        model.train(was_training)
        return cls(network, shape, num_classes, seed, state, logits)

    def rebuild(self, check: bool = True) -> nn.Sequential:
        """The network in eval mode; raises UserError if it cannot be made or, with ``check``, if its logits differ."""
        model = build_model(self.network, self.shape, self.num_classes, seed=self.seed).eval()
        try:
            model.load_state_dict(self.state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]  # in one line
            raise UserError(f"{self.network.model} cannot be made again from its weights: {reason}") from error
        if not check:
            return model
        found = predict(model, probe_images(self.shape), Runtime("cpu", "fp32", 1))
        # Ten times the tolerance, because the logits may have been computed on a GPU.
        if self.logits.isfinite().all() and not is_same(found, self.logits, 10 * LOGIT_TOLERANCE):
            raise UserError(
                f"{self.network.model}, made again and given its weights, is not the network that was trained: its "
                "logits differ. What it needs must be a parameter or a buffer (register_buffer), or follow from --seed "
                "when it is made"
            )
        return model


def probe_images(shape: Shape) -> Tensor:
    """Four images that tell networks apart, two of noise and two of large spots: uint8 (4, C, H, W)."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2, *shape, generator=generator)
    spots = F.interpolate(torch.rand(2, shape[0], 4, 4, generator=generator), shape[1:], mode="bilinear")
    return (255 * torch.cat([noise, spots])).byte()


# What networks may end with: how to get that from logits (N, num_classes).
OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "logits": lambda logits: logits,
    "probabilities": functools.partial(torch.softmax, dim=1),
    "log-probabilities": functools.partial(torch.log_softmax, dim=1),
}


def kind_of(outputs: Tensor) -> str:
    """Which of OUTPUTS these are, (N, num_classes)."""
    if (outputs >= 0).all() and (outputs.sum(1) - 1).abs().max() < 0.01:
        return "probabilities"
    if (outputs <= 0).all() and outputs.logsumexp(1).abs().max() < 0.01:
        return "log-probabilities"
    return "logits"


def is_same(logits: Tensor, others: Tensor, tolerance: float = LOGIT_TOLERANCE) -> bool:
    """Whether logits (N, num_classes) are equal up to rounding: this share of the largest one."""
    return torch.allclose(logits, others, rtol=0, atol=tolerance * others.abs().max().item())


# ================================================================ 5. optimizers and training


class Schedule(NamedTuple):
    """The learning rate's ``factors`` at fractions (``at``) of all steps, with linear interpolation between them."""

    at: tuple[float, ...]
    factors: tuple[float, ...]


SCHEDULES = {
    "one_cycle": Schedule((0, 0.25, 1), (0.02, 1, 0)),
    "linear": Schedule((0, 1), (1, 0)),
    "constant": Schedule((0, 1), (1, 1)),
}
MOMENTUM: dict[str, dict[str, float]] = {
    "": {},
    "+momentum": {"momentum": 0.9},
    "+nesterov": {"momentum": 0.9, "nesterov": True},
}
# Of airbench94_muon (Jordan 2024).
MUON_MOMENTUM = 0.6
SGD_MOMENTUM = 0.85
# The next two are for a loss summed over the batch; here it is the mean, hence the factor batch_size in Muon.
SHIFT_RATE = 0.053
HEAD_RATE = 0.67
DECAY = 2e-6  # of a weight in a step at the highest rate, per image of the batch


@dataclass(frozen=True)
class Training:
    """How to train a network. Muon takes ``lr`` for kernels alone, and has a weight decay of its own."""

    optimizer: str = "SGD+nesterov"  # Muon or a class of torch.optim; +momentum and +nesterov set its momentum to 0.9
    lr: float | None = 1.0  # the highest of the schedule; None: the framework's default
    weight_decay: float = 5e-4
    label_smoothing: float = 0.2
    crop_padding: int = 2  # the largest random shift, in pixels; 0 turns augmentation off, flips included
    batch_size: int = 512
    epochs: int = 10
    schedule: str = "one_cycle"  # one of SCHEDULES
    hardest: float = 1.0  # after the first epoch, train on this share of the images: those with the highest loss


@dataclass(frozen=True)
class Recipe:
    """A network and how to train it."""

    network: Network = field(default_factory=Network)
    training: Training = field(default_factory=Training)

    def replace(self, **changes: Any) -> Recipe:
        """A copy with other values of fields of the network or of the training (their names differ)."""
        names = {entry.name for entry in fields(Network)}
        of_network = {name: value for name, value in changes.items() if name in names}
        of_training = {name: value for name, value in changes.items() if name not in names}
        return Recipe(replace(self.network, **of_network), replace(self.training, **of_training))


# Points on the accuracy-compute frontier, chosen on validation images (see tests/benchmark_training.py).
MUON = Recipe(
    Network(head="unit"), Training(optimizer="Muon", lr=0.12, weight_decay=0, batch_size=500, schedule="linear")
)
PRESETS = {
    "small": MUON.replace(growth=(1, 3.5, 3.5), stem=Stem(2, 4, 24), epochs=4, hardest=0.6),
    "medium": MUON.replace(stem=Stem(1, 3, 18), activation="SiLU", epochs=5, hardest=0.6),
    "large": MUON.replace(  # training on the hardest images does not help it
        width=64, growth=(1, 3.75, 3.75), stem=Stem(1, 3, 20), activation="GELU", epochs=7
    ),
}


def recipe_from(options: argparse.Namespace, base: Recipe) -> Recipe:
    """``base`` with the model, width, epochs and batch size of the command line, where given."""
    given = {name: getattr(options, name) for name in ("model", "width", "epochs", "batch_size")}
    return base.replace(**{name: value for name, value in given.items() if value is not None})


def check_recipe(recipe: Recipe, data: Dataset, split: Split, runtime: Runtime) -> None:
    """Try all that a run does with the network, so that unsuitable ones fail here (UserError), not after the training.

    It is trained for two steps in the run's precision, evaluated, saved and rebuilt.
    """
    model, images = check_training(recipe, data, split, runtime)
    with user_error(f"{recipe.network.model} cannot be used", *_blamed(recipe.network)):
        check_evaluation(model, images, runtime, len(data.classes))
        if kind_of(predict(model, images, runtime)) == "probabilities":
            note("the network gives probabilities, but is trained as if they were logits: better leave its softmax out")
        saved = SavedNetwork.of(model, recipe.network, data.shape, len(data.classes), seed=0)
        with io.BytesIO() as file:  # as checkpoints do
            torch.save(saved.state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        replace(saved, state=state).rebuild()
    if recipe.network.is_custom:
        check_independence(recipe.network, data)


def _blamed(network: Network) -> tuple[type[Exception], ...]:
    """Errors to blame a network for: other people's code may raise anything, the lab's own fails on tiny images."""
    return (Exception,) if network.is_custom else (RuntimeError, ValueError)


def check_training(recipe: Recipe, data: Dataset, split: Split, runtime: Runtime) -> tuple[nn.Sequential, Tensor]:
    """Train a new network for two steps on one or two images; returns both, raises UserError."""
    apply_runtime(runtime._replace(threads=torch.get_num_threads()))
    few = split.train[: min(2, recipe.training.batch_size)]
    images, labels = data.train_images[few], data.train_labels[few]
    size = "x".join(map(str, data.shape))
    device = torch.device(runtime.device)
    model = make_model(recipe.network, data, split).to(device)
    text = f"{recipe.network.model} cannot be trained on {len(few)} images of {size} in {runtime.precision}"
    with user_error(text, *_blamed(recipe.network)):
        optimizer = make_optimizer(recipe.training, model)
        for step in range(2):
            with torch.autocast(device.type, torch.bfloat16, enabled=runtime.precision == "bf16"):
                logits = model(images.to(device).float() / 255)
            check_logits(logits, (len(few), len(data.classes)))
            if step == 0 and not logits.isfinite().all():
                raise ValueError("its outputs are not finite")
            optimizer.zero_grad()
            F.cross_entropy(logits.float(), labels.to(device)).backward()
            optimizer.step()
    return model, images


def check_independence(network: Network, data: Dataset) -> None:
    """Raise UserError if two networks share weights; say so if those are the same at the start whatever the seed."""
    models = [build_model(network, data.shape, len(data.classes), seed=seed) for seed in (0, 1)]
    weights, others = ([*model.parameters()] for model in models)
    if {weight.data_ptr() for weight in weights} & {weight.data_ptr() for weight in others}:
        raise UserError(f"{network.model} gives the same weights to be trained each time, not those of a new network")
    if all(map(torch.equal, weights, others)):
        note(f"{network.model} starts with the same weights whatever the seed: intervals will not cover initialisation")


def prove_network(run: Run, recipe: Recipe, split: Split) -> None:
    """Train a network of the user's for a few steps in a worker and rebuild it here; raises UserError if they differ.

    Some networks depend on the process: on the order of a set of strings or of files, for example.
    """
    if recipe.network.is_custom:
        few = split._replace(train=split.train[:64], validation=split.train[:1])
        job = Job(recipe.replace(batch_size=min(8, recipe.training.batch_size), epochs=2), 1, few, keeps_network=True)
        run.progress.stage("trying the network in a worker process")
        run.progress.expect(job.work)
        ((_, result),) = run.train([job])
        assert result.network
        result.network.rebuild()


def check_logits(logits: object, shape: tuple[int, int]) -> None:
    """Raise TypeError or ValueError unless these are logits of this ``shape`` (N, num_classes)."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"its output is a {type(logits).__name__}, not a tensor")
    if logits.shape != shape:
        raise ValueError(f"its outputs for {shape[0]} image(s) have the shape {tuple(logits.shape)}, expected {shape}")


def check_evaluation(model: nn.Module, images: Tensor, runtime: Runtime, num_classes: int) -> None:
    """Evaluate a network on images, uint8 (N, C, H, W), together and one at a time; raises whatever is wrong."""
    model.eval()
    with torch.no_grad(), torch.autocast(runtime.device.partition(":")[0], torch.bfloat16, runtime.precision == "bf16"):
        check_logits(model(images[:1].to(runtime.device).float() / 255), (1, num_classes))
    exactly = runtime._replace(precision="fp32")
    together = predict(model, images, exactly)
    check_logits(together, (len(images), num_classes))
    if not together.isfinite().all():
        return  # this training has diverged, others need not
    if not is_same(predict(model, images, exactly), together):
        raise ValueError(
            "in eval mode its logits for the same images change from call to call: is dropout or noise always active?"
        )
    alone = torch.cat([predict(model, image, exactly) for image in images.split(1)])
    if not is_same(alone, together):
        note("in eval mode the network's logits for an image depend on the other images of the batch")


def find_optimizer(name: str) -> Callable[..., torch.optim.Optimizer] | None:
    """Muon or the class of torch.optim with this name, if it can be used for networks."""
    kind = Muon if name == "Muon" else getattr(torch.optim, name, None)
    is_optimizer = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    is_unsuitable = name in ("Optimizer", "LBFGS", "SparseAdam")
    return kind if is_optimizer and not is_unsuitable else None


def make_optimizer(training: Training, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of all weights that are trained, with the learning rate and weight decay that it accepts."""
    base, plus, variant = training.optimizer.partition("+")
    kind = find_optimizer(base)
    if kind is None or plus + variant not in MOMENTUM:
        name = training.optimizer
        raise UserError(f"unknown optimizer {name!r}: Muon or one of torch.optim, SGD also SGD+nesterov")
    settings = dict(MOMENTUM[plus + variant])
    if training.lr is not None:
        settings["lr"] = training.lr
    if "weight_decay" in inspect.signature(kind).parameters:
        settings["weight_decay"] = training.weight_decay
    if base == "Muon":
        if not any(isinstance(part, SmallCNN) for part in model.modules()):
            raise UserError("optimizer Muon is for the lab's SmallCNN only")
        settings["batch_size"] = training.batch_size
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    with user_error(f"optimizer {training.optimizer} cannot train this model", TypeError, ValueError):
        return kind(weights, **settings)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for SmallCNN's kernels, SGD with Nesterov momentum for BatchNorm shifts and the head.

    A kernel (O, I, H, W) is treated as a matrix (O, I * H * W), rescaled to norm sqrt(O) (BatchNorm makes its scale
    irrelevant) and moved by lr times the orthogonal matrix nearest to its averaged gradient. torch.optim.Muon accepts
    only matrices and computes in bf16, which many processors merely emulate.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, batch_size: int) -> None:
        weights = list(params)
        groups = []
        for ndim, rate in ((4, lr), (1, SHIFT_RATE * batch_size), (2, HEAD_RATE * batch_size)):
            group = {
                "params": [weight for weight in weights if weight.ndim == ndim],
                "is_kernel": ndim == 4,
                "lr": rate,
                # A step at the full rate takes DECAY * batch_size of a weight.
                "decay": 0.0 if ndim == 4 else DECAY * batch_size / rate,
            }
            groups.append(group)
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all weights; each needs a gradient."""
        for group in self.param_groups:
            update = self._turn_kernel if group["is_kernel"] else self._step_sgd
            for weight in group["params"]:
                update(weight, weight.grad, group)

    def _turn_kernel(self, weight: Tensor, gradient: Tensor, group: Mapping[str, float]) -> None:
        direction = self._nesterov(weight, gradient, MUON_MOMENTUM)
        weight *= len(weight) ** 0.5 / weight.norm()
        weight -= group["lr"] * orthogonalise(direction.flatten(1)).view_as(weight)

    def _step_sgd(self, weight: Tensor, gradient: Tensor, group: Mapping[str, float]) -> None:
        weight -= group["lr"] * self._nesterov(weight, gradient + group["decay"] * weight, SGD_MOMENTUM)

    def _nesterov(self, weight: Tensor, gradient: Tensor, momentum: float) -> Tensor:
        average = self.state[weight].setdefault("average", torch.zeros_like(weight))
        average.mul_(momentum).add_(gradient)
        return gradient + momentum * average


def orthogonalise(matrix: Tensor, steps: int = 3) -> Tensor:
    """``matrix`` (R, C) with all of its singular values moved close to 1, its singular vectors unchanged.

    Newton-Schulz iteration with the quintic polynomial of Jordan et al. 2024, which does not converge to 1 exactly.
    """
    matrix = matrix / matrix.norm().clamp_min(1e-7)
    for _ in range(steps):
        gram = matrix @ matrix.T
        matrix = 3.4445 * matrix + (-4.7750 * gram + 2.0315 * gram @ gram) @ matrix
    return matrix


class Moves(NamedTuple):
    """Augmentation of a batch: shifts (B, 2) int64, in pixels down and right; flips (B,) bool, mirrored images."""

    shifts: Tensor
    flips: Tensor


def draw_batch(images: Tensor, index: Tensor, moves: Moves | None = None) -> Tensor:
    """Images ``index`` (B,), cropped ``moves.shifts`` further down and right, mirrored where ``moves.flips``.

    Returns uint8 (B, C, H, W), channels_last, reflected at the borders. A single gather of whole pixels.
    """
    stored = images.permute(0, 2, 3, 1)  # a view: images are stored as NHWC
    if moves is None:
        return stored.index_select(0, index).permute(0, 3, 1, 2)
    _, height, width, channels = stored.shape
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    columns = torch.where(moves.flips[:, None], width - 1 - columns, columns)
    rows = _reflect(rows + moves.shifts[:, :1], height)
    columns = _reflect(columns + moves.shifts[:, 1:], width)
    pixel = (index[:, None, None] * height + rows[:, :, None]) * width + columns[:, None, :]
    batch = stored.reshape(-1, channels).index_select(0, pixel.flatten())
    return batch.view(len(index), height, width, channels).permute(0, 3, 1, 2)


def _reflect(positions: Tensor, size: int) -> Tensor:
    """Positions outside [0, size) reflected into it, without repeating the border."""
    return size - 1 - (size - 1 - positions.abs()).abs()


class EpochOrder(NamedTuple):
    """The images of an epoch in the order in which they are trained on, int64 (N,), and how each is augmented."""

    chosen: Tensor
    moves: Moves

    def batches(self, size: int, device: torch.device, augment: bool) -> Iterator[tuple[Tensor, Moves | None]]:
        """(chosen, moves) of every batch, on the device; without ``augment`` nothing is moved."""
        chosen, shifts, flips = (tensor.to(device) for tensor in (self.chosen, *self.moves))
        parts = zip(chosen.split(size), shifts.split(size), flips.split(size), strict=True)
        for batch, *moves in parts:
            yield batch, Moves(*moves) if augment else None


def draw_epoch(
    epoch: int,
    index: Tensor,
    steps: int,
    training: Training,
    hardness: Tensor,
    first_flip: Tensor,
    generator: torch.Generator,
) -> EpochOrder:
    """The order of the epoch with this number, from 0: all images once, shuffled, or the hardest ones several times.

    A last batch that would be incomplete is left out.

    From the second epoch on, if ``training.hardest`` is below 1, only the images of ``index`` with the highest
    ``hardness`` (their latest loss) are trained on, in as many steps as all images take (online batch selection,
    Loshchilov and Hutter 2015). Flips alternate from epoch to epoch, starting with ``first_flip`` (Jordan 2024), and
    within an epoch from one pass over the hardest images to the next. All tensors on the CPU.
    """
    pool = index
    if epoch > 0 and training.hardest < 1:
        ranks = hardness[index].argsort(descending=True)
        pool = index[ranks[: round(training.hardest * len(index))]]
    passes = -(-len(index) // len(pool))  # rounded up
    shuffled = [pool[torch.randperm(len(pool), generator=generator)] for _ in range(passes)]
    order = torch.cat(shuffled)[: steps * training.batch_size]
    largest = training.crop_padding
    shifts = torch.randint(-largest, largest + 1, (len(order), 2), generator=generator)
    turn = epoch + torch.arange(len(order)) // len(pool)  # the pass; each epoch starts the alternation anew
    flips = first_flip[order] ^ (turn % 2 > 0)
    return EpochOrder(order, Moves(shifts, flips))


@dataclass(frozen=True, eq=False)
class Epoch:
    """One pass over the training images; losses are in nats, those of training with augmentation and smoothing."""

    number: int  # from 1
    train_loss: float  # the mean over the steps
    seconds: float  # of training, since its start
    step_losses: tuple[float, ...]
    validation: Score | None = None  # at its end, by the true labels
    judged: Score | None = None  # at its end, on ``Job.judged``, by the labels trained on

    @property
    def val_loss(self) -> float:
        """The validation loss; nan if it was not measured."""
        return math.nan if self.validation is None else self.validation.loss

    @property
    def val_accuracy(self) -> float:
        """The validation accuracy; nan if it was not measured."""
        return math.nan if self.validation is None else self.validation.accuracy

    @property
    def is_finite(self) -> bool:
        """Whether the loss of every step is finite."""
        return bool(np.isfinite(self.step_losses).all())


def train_epochs(
    model: nn.Module,
    data: Dataset,
    training: Training,
    runtime: Runtime,
    index: Tensor,
    seed: int = 0,
    labels: Tensor | None = None,
) -> Iterator[Epoch]:
    """Train ``model`` in place on the training images ``index``, epoch by epoch; ends if a loss is not finite.

    ``labels`` int64 (N,), of all training images, replaces those of the data set.
    """
    device = torch.device(runtime.device)
    model.to(device)
    images = data.train_images.to(device)
    targets = (data.train_labels if labels is None else labels).to(device)
    training = replace(training, batch_size=min(training.batch_size, len(index)))
    steps = len(index) // training.batch_size  # of an epoch
    optimizer = make_optimizer(training, model)
    scheduler = make_scheduler(optimizer, training, steps)
    # The latest loss of each image; infinite until it is first trained on, so that those of the first epoch's last,
    # incomplete batch count as the hardest in the second.
    hardness = torch.full((len(images),), torch.inf, device=device)
    torch.manual_seed(seed)  # for dropout, and the next two for whatever a network of the user's draws
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)
    generator = torch.Generator().manual_seed(seed)
    first_flip = torch.rand(len(images), generator=generator) < 0.5
    seconds = 0.0
    for epoch in range(training.epochs):
        start = time.perf_counter()
        model.train()
        order = draw_epoch(epoch, index, steps, training, hardness.cpu(), first_flip, generator)
        losses = []
        for chosen, moves in order.batches(training.batch_size, device, augment=training.crop_padding > 0):
            inputs = draw_batch(images, chosen, moves).float().div_(255)
            with torch.autocast(device.type, torch.bfloat16, enabled=runtime.precision == "bf16"):
                logits = model(inputs)
            loss = F.cross_entropy(logits.float(), targets[chosen], label_smoothing=training.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.detach())
            if training.hardest < 1:
                hardness[chosen] = F.cross_entropy(logits.detach().float(), targets[chosen], reduction="none")
        step_losses = tuple(torch.stack(losses).tolist())  # synchronises, once an epoch
        seconds += time.perf_counter() - start
        finished = Epoch(epoch + 1, float(np.mean(step_losses)), seconds, step_losses)
        yield finished
        if not finished.is_finite:
            return


def make_scheduler(
    optimizer: torch.optim.Optimizer, training: Training, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning-rate schedule of a training with ``steps`` per epoch."""
    fractions = np.linspace(0, 1, training.epochs * steps + 1)
    schedule = SCHEDULES[training.schedule]
    factors = np.interp(fractions, schedule.at, schedule.factors)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factors.__getitem__)


def derive_seed(seed: int, *stage: int) -> int:
    """A distinct seed for each stage and repetition of a run; runs with different --seed share none.

    Trailing zeros make no difference: derive_seed(s, 1) equals derive_seed(s, 1, 0).
    """
    return int(np.random.SeedSequence([seed, *stage]).generate_state(1, np.uint64)[0] >> 1)


@dataclass(frozen=True, eq=False)
class Job:
    """A training for a worker process (``train_job``)."""

    recipe: Recipe
    seed: int
    split: Split
    labels: Tensor | None = None  # int64 (N,), of all training images, in the place of the data set's
    judged: Tensor | None = None  # int64 (n,): training images on which the network is measured, too
    scores_every_epoch: bool = True  # otherwise after the last one only
    keeps_network: bool = False
    keeps_best: bool = False  # the network after the epoch with the highest validation accuracy, too

    @property
    def work(self) -> int:
        """The number of images in all epochs, repeated ones included."""
        return self.recipe.training.epochs * len(self.split.train)


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """What ``train_job`` found; networks if they were to be kept."""

    epochs: tuple[Epoch, ...]  # the last one always has its scores
    network: SavedNetwork | None = None
    best_network: SavedNetwork | None = None  # of the first epoch with the highest validation accuracy

    @property
    def validation(self) -> Score:
        """Of the final network."""
        found = self.epochs[-1].validation
        assert found is not None
        return found

    @property
    def judged(self) -> Score | None:
        """Of the final network, on ``Job.judged``."""
        return self.epochs[-1].judged

    @property
    def step_losses(self) -> np.ndarray:
        """The training loss of every step of all epochs, float64 (steps,)."""
        return np.concatenate([epoch.step_losses for epoch in self.epochs])


def train_job(data: Dataset, runtime: Runtime, job: Job) -> Generator[Epoch, None, TrainingResult]:
    """Train and validate one network in a worker; yields every epoch."""
    labels = data.train_labels if job.labels is None else job.labels
    training = job.recipe.training
    model = make_model(job.recipe.network, data, job.split, job.seed)
    epochs: list[Epoch] = []
    best_accuracy = -1.0
    best_network = None

    def saved() -> SavedNetwork:
        return SavedNetwork.of(model, job.recipe.network, data.shape, len(data.classes), job.seed)

    for epoch in train_epochs(model, data, training, runtime, job.split.train, job.seed, labels):
        is_last = epoch.number == training.epochs or not epoch.is_finite
        if is_last or job.scores_every_epoch:
            validation = _score_at(model, data, runtime, job.split.validation, data.train_labels)
            judged = None if job.judged is None else _score_at(model, data, runtime, job.judged, labels)
            epoch = replace(epoch, validation=validation, judged=judged)
            if job.keeps_best and validation.accuracy > best_accuracy:
                best_accuracy = validation.accuracy
                best_network = saved()
        epochs.append(epoch)
        yield epoch
    return TrainingResult(tuple(epochs), saved() if job.keeps_network else None, best_network)


def _score_at(model: nn.Module, data: Dataset, runtime: Runtime, index: Tensor, labels: Tensor) -> Score:
    """The network on the training images ``index``, by the ``labels`` of all."""
    return score(predict(model, data.train_images, runtime, index), labels[index])


# ================================================================ 6. evaluation and statistics


@torch.no_grad()  # in inference_mode, weights moved to a GPU here could not be trained afterwards
def predict(model: nn.Module, images: Tensor, runtime: Runtime, index: Tensor | None = None) -> Tensor:
    """Logits, float32 (N, num_classes) on the CPU, of uint8 images (N, C, H, W), all or at ``index``; in eval mode."""
    device = torch.device(runtime.device)
    model.to(device).eval()
    if index is None:
        index = torch.arange(len(images))
    outputs = []
    for chunk in index.split(500):
        inputs = images[chunk].to(device).float().div_(255)
        with torch.autocast(device.type, torch.bfloat16, enabled=runtime.precision == "bf16"):
            outputs.append(model(inputs).float())
    return torch.cat(outputs).cpu()


class Score(NamedTuple):
    """Mean cross-entropy in nats, and whether each image is classified correctly: bool (N,)."""

    loss: float
    right: np.ndarray

    @property
    def accuracy(self) -> float:
        """The share of images classified correctly."""
        return float(self.right.mean())


def score(logits: Tensor, labels: Tensor) -> Score:
    """Compare logits (N, num_classes) with labels (N,)."""
    return Score(float(F.cross_entropy(logits, labels)), (logits.argmax(1) == labels).numpy())


class Estimate(NamedTuple):
    """A mean with its 95 % interval, two-sided p-value against 0, and number of repetitions."""

    mean: float
    low: float
    high: float
    p: float
    n: int

    @property
    def is_bounded(self) -> bool:
        """Whether there is an interval: enough repetitions, which differ."""
        return bool(np.isfinite(self.low) and np.isfinite(self.high))

    def times(self, factor: float) -> Estimate:
        """The same in another unit, or with the other sign."""
        low, high = sorted((factor * self.low, factor * self.high))
        return Estimate(factor * self.mean, low, high, self.p, self.n)

    def text(self, unit: str = "", digits: str = ".2f") -> str:
        """The mean, its unit and its interval, such as "+0.82 points [+0.31, +1.33]"; ``digits`` is a format."""
        value = f"{self.mean:{digits}} {unit}".strip()
        bounds = f"[{self.low:{digits}}, {self.high:{digits}}]" if self.is_bounded else "(no interval)"
        return f"{value} {bounds}"


def interval(values: Sequence[float] | np.ndarray) -> Estimate:
    """Student's t interval of the mean of ``values`` (n,); unbounded if there are too few, or all are equal."""
    from scipy import stats

    error = float(stats.sem(values)) if len(values) > 1 else 0.0
    return _t_interval(float(np.mean(values)), error, len(values) - 1, len(values))


def jackknife_interval(value: float, without: Sequence[float] | np.ndarray) -> Estimate:
    """Interval of a ``value`` computed from n repetitions; ``without`` (n,): the same, leaving out each in turn.

    Tukey 1958, for values that are no means; unbounded if there are too few repetitions, or all are equal.
    """
    n = len(without)
    values = np.asarray(without, dtype=float)
    error = math.sqrt((n - 1) / n * np.square(values - values.mean()).sum())
    return _t_interval(value, error, n - 1, n)


def _t_interval(mean: float, error: float, freedom: float, n: int) -> Estimate:
    """The interval of a mean with this standard error, which has ``freedom`` degrees of freedom."""
    from scipy import stats

    # Values that are equal, up to rounding, say as little about the spread as a single one: nothing is claimed.
    if n < 2 or error <= 1e-12 * max(1, abs(mean)):
        return Estimate(mean, -np.inf, np.inf, 1.0, n)
    low, high = stats.t.interval(0.95, freedom, mean, error)
    p = 2 * stats.t.sf(abs(mean) / error, freedom)
    return Estimate(mean, float(low), float(high), float(p), n)


def crossed_interval(differences: np.ndarray) -> Estimate:
    """Interval of the mean of ``differences`` (seeds, images), where both seeds *and* images are random samples.

    Variance components (Cornfield and Tukey 1956): that of the images is the mean covariance between seeds. Degrees of
    freedom by Satterthwaite (1946), those of the many images taken as infinite. In simulations the interval covers the
    truth in 94 to 96 % of cases with five seeds and in 86 to 93 % with two.
    """
    seeds, images = differences.shape
    by_seed = differences.mean(1)
    if seeds < 2 or images < 2:
        return interval(by_seed)
    covariance = np.cov(differences)
    mean_covariance = (covariance.sum() - covariance.trace()) / (seeds * (seeds - 1))
    of_images = max(0.0, mean_covariance) / images
    # The seeds share the images, whose effect is therefore not in the variance between seeds. The floor is for freedom,
    # which divides by it.
    of_seeds = max(by_seed.var(ddof=1) / seeds, 1e-3 * of_images)
    variance = of_seeds + of_images
    freedom = (seeds - 1) * (variance / of_seeds) ** 2 if variance else seeds - 1
    return _t_interval(float(np.mean(by_seed)), float(variance**0.5), freedom, seeds)


SIGNIFICANCE = 0.05  # of p-values that ``holm`` has corrected


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p-values (n,) corrected for their number, in their order: float64 (n,) (Holm 1979)."""
    order = np.argsort(p_values)
    factors = np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(1, np.maximum.accumulate(factors * np.asarray(p_values, dtype=float)[order]))
    return corrected


# ================================================================ 7. checkpoints

CHECKPOINT = "small-cv-lab 5"  # increase it when the format or the networks' parameters change


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A trained network and what it was trained on."""

    model: nn.Sequential  # in eval mode
    recipe: Recipe
    shape: Shape
    classes: tuple[str, ...]
    dataset: str  # its name or path, see load_dataset
    source: str
    fingerprint: str
    seed: int  # its weights were drawn with
    facts: Mapping[str, object]  # more, such as test_accuracy


def save_checkpoint(
    path: Path, model: nn.Sequential, data: Dataset, recipe: Recipe, seed: int, **facts: object
) -> None:
    """Save the weights and all that is needed to rebuild the network, made with ``seed``, and ``facts`` about it."""
    saved = SavedNetwork.of(model, recipe.network, data.shape, len(data.classes), seed)
    content = {
        "format": CHECKPOINT,
        "recipe": asdict(recipe),
        "shape": data.shape,
        "classes": data.classes,
        "dataset": str(data.folder or data.name),
        "source": data.source,
        "fingerprint": data.fingerprint,
        "seed": seed,
        "facts": facts,
        "state": saved.state,
        "logits": saved.logits,
    }
    write_tensors(path, content)


def read_tensors(path: Path) -> object:
    """Load what ``torch.save`` wrote to ``path`` without executing code from it; raises UserError."""
    if not path.is_file():
        raise UserError(f"no checkpoint {path}")
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch.load may raise anything, with advice to execute the file's code
        if is_of_the_system(error):
            raise
        raise UserError(f"{path} is damaged, or not a checkpoint of tensors saved by torch") from error


def load_checkpoint(path: Path, model: str | None = None, check: bool = True) -> Checkpoint:
    """Load what ``save_checkpoint`` has written; raises UserError, with ``check`` also if its logits are others now.

    A checkpoint imports nothing by itself: one of a custom network is loaded only if ``model`` names that network.
    """
    content = read_tensors(path)
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT:
        raise UserError(f"{path} is not a checkpoint of this version of the lab: train it again")
    with user_error(f"{path} is damaged", LookupError, TypeError, ValueError, AttributeError, RuntimeError):
        architecture = content["recipe"]["network"]
        network = Network(**{**architecture, "stem": Stem(**architecture["stem"])})
        recipe = Recipe(network, Training(**content["recipe"]["training"]))
        if network.is_custom and network.model != model:
            raise UserError(f"{path} holds a network of {network.model}: name it with --model")
        saved = SavedNetwork(
            network=network,
            shape=content["shape"],
            num_classes=len(content["classes"]),
            seed=content["seed"],
            state=content["state"],
            logits=content["logits"],
        )
        try:
            model_of_file = saved.rebuild(check)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        return Checkpoint(
            model=model_of_file,
            recipe=recipe,
            shape=content["shape"],
            classes=content["classes"],
            dataset=content["dataset"],
            source=content["source"],
            fingerprint=content["fingerprint"],
            seed=content["seed"],
            facts=content["facts"],
        )


# ================================================================ 8. worker processes


# What runs in a worker: a generator that yields messages, gets answers and returns a result.
Conversation = Generator[Any, Any, Any]


class WorkerDied(UserError):
    """A worker process died in the middle of a conversation."""


class WorkerFailed(RuntimeError):
    """A fault of the lab in a worker process; the message holds its traceback."""


# What a worker sends.
class Yielded(NamedTuple):
    """What the conversation has yielded; the worker waits for an ``Answer``."""

    value: object


class Returned(NamedTuple):
    """What the conversation has returned, at its end."""

    value: object


class Failed(NamedTuple):
    """The error that ended the conversation: one that the user can mend, or the traceback of any other."""

    error: UserError | None
    traceback: str


# What the parent sends.
class Start(NamedTuple):
    """Run the generator ``function(data, runtime, *arguments)``."""

    function: Callable[..., Conversation]
    arguments: tuple[object, ...]


class Answer(NamedTuple):
    """Go on: ``value`` is what the ``yield`` gives."""

    value: object


class Stop(NamedTuple):
    """End the conversation."""


def _send(connection: Connection, message: NamedTuple) -> None:
    # Plain pickle: multiprocessing's own would move tensors to /dev/shm, which is small in containers.
    connection.send_bytes(pickle.dumps(message))


def _work(connection: Connection, path: Path, runtime: Runtime) -> None:
    """A worker's main loop: hold one conversation after another until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    threading.Thread(target=_end_with_parent, daemon=True).start()
    apply_runtime(runtime)
    with contextlib.chdir(path.parent):  # torch cannot map files below folders whose names are no UTF-8
        data = Dataset(**torch.load(path.name, mmap=True, weights_only=True))
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        while True:
            content = connection.recv_bytes()
            try:
                start = pickle.loads(content)
                _hold(connection, start.function(data, runtime, *start.arguments))
            except (EOFError, OSError):  # of the pipe; those of the function are caught in _advance
                raise
            except Exception:  # a message that cannot be pickled or unpickled
                _send(connection, Failed(None, traceback.format_exc()))


def _end_with_parent() -> None:
    """End this process as soon as its parent has ended, in the middle of an epoch, too."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
    os._exit(1)


def _hold(connection: Connection, conversation: Conversation) -> None:
    """Send what a conversation yields and give it the answers, until it ends or is not wanted any more."""
    message = _advance(conversation, None)
    _send(connection, message)
    while isinstance(message, Yielded):
        answer = connection.recv()
        if isinstance(answer, Stop):
            with contextlib.suppress(Exception):  # nobody waits for an answer any more
                conversation.close()
            return
        message = _advance(conversation, answer.value)
        _send(connection, message)


def _advance(conversation: Conversation, value: object) -> Yielded | Returned | Failed:
    """Run a conversation up to its next ``yield`` or to its end."""
    try:
        return Yielded(conversation.send(value))
    except StopIteration as end:
        return Returned(end.value)
    except UserError as error:
        return Failed(error, "")
    except Exception as error:
        if is_of_the_system(error):
            return Failed(UserError(f"a worker failed with {type(error).__name__}: {first_line(error)}"), "")
        return Failed(None, traceback.format_exc())


class Worker(NamedTuple):
    """A running worker process and the pipe to it."""

    process: multiprocessing.process.BaseProcess
    connection: Connection


class Workers:
    """Up to ``count`` processes that share the data set at ``path``, started on demand, each with ``runtime``."""

    start_method: ClassVar[Literal["spawn", "forkserver"]] = "spawn"  # a fork would copy torch's threads in any state

    def __init__(self, count: int, runtime: Runtime, path: Path) -> None:
        self.count = count
        self.runtime = runtime
        self.path = path
        self.processes: list[multiprocessing.process.BaseProcess] = []
        self.is_stopped = False
        self.free: queue.SimpleQueue[Worker | None] = queue.SimpleQueue()  # None: not started yet
        for _ in range(count):
            self.free.put(None)

    def _start(self) -> Worker:
        vars(sys.modules["__main__"]).setdefault("__spec__", None)  # IPython's second %run lacks it
        context = multiprocessing.get_context(self.start_method)
        ours, theirs = context.Pipe()
        process = context.Process(  # type: ignore[attr-defined]
            target=_work, args=(theirs, self.path, self.runtime), daemon=True
        )
        with _ctrl_c_blocked_in_children():
            process.start()
        theirs.close()
        self.processes.append(process)
        if self.is_stopped:  # while it was started
            process.kill()
        return Worker(process, ours)

    def run(self, function: Callable[..., Conversation], *arguments: object) -> Conversation:
        """Run the generator ``function(data, runtime, *arguments)`` in a free worker, as if it ran here.

        Closing this generator closes the worker's. Raises WorkerDied if the worker dies, a UserError of the function's,
        and WorkerFailed for any other error in it.
        """
        worker = self.free.get()
        try:
            if worker and not worker.process.is_alive():
                worker = None  # it died earlier; None is an empty slot, which "finally" puts back if _start fails
            worker = worker or self._start()
            connection = worker.connection
            _send(connection, Start(function, arguments))
            while isinstance(message := connection.recv(), Yielded):
                try:
                    value = yield message.value
                except BaseException:  # as a rule GeneratorExit
                    _send(connection, Stop())
                    raise
                _send(connection, Answer(value))
            if isinstance(message, Returned):
                return message.value
            if message.error:
                raise message.error
            raise WorkerFailed(f"in a worker process:\n{message.traceback}")
        except (EOFError, OSError) as error:
            if worker is None:  # _start has failed
                raise
            worker.process.join(1)
            status = worker.process.exitcode
            advice = " (out of memory? try fewer --workers)" if status == -signal.SIGKILL else ""
            raise WorkerDied(f"a worker process ended with status {status}{advice}") from error
        finally:
            self.free.put(worker)

    def stop(self) -> None:
        """Kill all processes, whatever they are doing."""
        self.is_stopped = True
        for process in self.processes:
            process.kill()
            process.join()


@contextlib.contextmanager
def _ctrl_c_blocked_in_children() -> Iterator[None]:
    """A process started in the block does not die of a Ctrl-C before ``_work`` ignores it: it inherits the mask."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    multiprocessing.resource_tracker.ensure_running()  # now, because starting it unblocks Ctrl-C
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ================================================================ 9. runs, figures and publishing

# The colour-blind-safe palette of Okabe and Ito; a thing has the same colour in every figure.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
STYLE: dict[Any, float] = {
    "font.size": 13,
    "lines.linewidth": 2.2,
    "legend.frameon": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
FONTS = ("font.family", "font.sans-serif", "font.serif")  # which may have the letters of the classes' names
PACKAGES = ("torch", "torchvision", "numpy", "pandas", "scipy", "pillow", "optuna", "onnx", "onnxruntime", "openvino")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path that replaces ``path`` if the block succeeds; failing to write is a UserError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        with user_error(f"{path} cannot be written", OSError):
            yield temporary
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # paths may hold any bytes


def write_tensors(path: Path, content: Mapping[str, object]) -> None:
    """Write tensors and plain values atomically, for ``torch.load``."""
    with atomic_path(path) as temporary, user_error(f"{path} cannot be written", RuntimeError):  # if the disk is full
        torch.save(content, temporary)


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV atomically, without its index."""
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write JSON atomically; nan and infinity become null, NumPy scalars numbers, and paths strings."""
    text = json.dumps(content, default=lambda value: value.item() if isinstance(value, np.generic) else str(value))
    plain = json.loads(text, parse_constant=lambda _: None)
    write_text(path, json.dumps(plain, indent=2, ensure_ascii=False) + "\n")


def within_lab(path: Path) -> Path:
    """``path``, relative to the lab's folder if it lies inside."""
    return path.resolve().relative_to(ROOT) if path.resolve().is_relative_to(ROOT) else path


def command_line(program: str, argv: Sequence[str] | None) -> str:
    """The shell command of a script, whose ``__file__`` is ``program``; without ``argv``, that of this process."""
    arguments = sys.argv[1:] if argv is None else argv
    return shlex.join(["python", str(within_lab(Path(program))), *arguments])


@dataclass(frozen=True)
class Environment:
    """The software and hardware that results may depend on."""

    python: str
    platform: str
    cpu: str
    cores: int
    git_commit: str | None
    gpu: str | None
    cpu_capabilities: list[str]
    packages: dict[str, str]  # versions
    device: str
    precision: str
    threads: int

    def text(self) -> str:
        """All of it in one paragraph."""
        versions = ", ".join(f"{name} {version}" for name, version in self.packages.items())
        machine = f"{self.gpu or self.cpu}, {self.cores} cores, {self.precision}"
        return f"commit {self.git_commit or 'unknown'}; {machine}; Python {self.python}; {versions}"


def find_environment(runtime: Runtime) -> Environment:
    """Ask the system, git and the installed packages."""
    installed = {found.name.lower(): found.version for found in importlib.metadata.distributions() if found.name}
    return Environment(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        cpu=_cpu_name(),
        cores=usable_cores(),
        git_commit=_git_commit(),
        gpu=torch.cuda.get_device_name(runtime.device) if runtime.device.startswith("cuda") else None,
        cpu_capabilities=[name for name, value in torch.cpu.get_capabilities().items() if value is True],
        packages={name: installed[name] for name in PACKAGES if name in installed},
        **runtime._asdict(),
    )


def _cpu_name() -> str:
    with contextlib.suppress(OSError, IndexError):  # not on Linux
        return re.findall("model name\t: (.*)", Path("/proc/cpuinfo").read_text())[0]
    return platform.processor()


def _git_commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # no git, or no repository
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10).stdout.strip() or None
    return None


class Progress:
    """One bar for the whole script; its unit is an image trained on. Without a terminal, a line per stage."""

    def __init__(self) -> None:
        from tqdm import tqdm

        form = "{desc} |{bar}| {percentage:3.0f} % [{elapsed}, {remaining} left]"
        self.bar = tqdm(total=0, disable=None, bar_format=form, smoothing=0.05)
        self.started = time.perf_counter()
        self.total = 0.0  # images
        self.done = 0.0

    @property
    def seconds(self) -> float:
        """Seconds since the start of the run."""
        return time.perf_counter() - self.started

    def expect(self, images: float) -> None:
        """Announce so much work."""
        self.total += images
        self.bar.total = self.total
        self.bar.refresh()

    def stage(self, title: str) -> None:
        """Say what is being done now."""
        self.bar.set_description(title)
        if self.bar.disable:
            print(f"[{self.seconds:4.0f} s] {title}", flush=True)

    def advance(self, images: float) -> None:
        """So much of the announced work is done, or not needed."""
        self.done += images
        self.bar.update(images)

    def close(self) -> None:
        """Remove the bar."""
        self.bar.close()


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """The style of all figures: STYLE and matplotlib's defaults; of the user's matplotlibrc only the fonts."""
    import matplotlib

    with matplotlib.rc_context():
        fonts = {name: value for name, value in matplotlib.rcParams.items() if name in FONTS}
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(fonts | STYLE)
        yield


@dataclass(eq=False)
class Run:
    """A run of a script; its data lack the test images. ``finish`` moves the files in ``folder`` to ``output``."""

    data: Dataset
    runtime: Runtime
    workers: Workers
    progress: Progress
    output: Path
    folder: Path
    environment: Environment

    def train(self, jobs: Sequence[Job]) -> Iterator[tuple[int, TrainingResult]]:
        """Run ``train_job`` for all jobs in the workers; yields (index of the job, result) in order of completion."""
        try:
            with multiprocessing.pool.ThreadPool(self.workers.count) as pool:
                yield from pool.imap_unordered(self._train_one, enumerate(jobs))
        except BaseException:  # the remaining jobs are not wanted any more
            self.workers.stop()
            raise

    def _train_one(self, numbered: tuple[int, Job]) -> tuple[int, TrainingResult]:
        number, job = numbered
        epochs = self.workers.run(train_job, job)
        images = len(job.split.train)  # of an epoch
        left = job.work
        while True:
            try:
                next(epochs)
            except StopIteration as end:
                self.progress.advance(left)  # the epochs of a training that ended early
                return number, end.value
            self.progress.advance(images)
            left -= images

    def write_table(self, name: str, table: pd.DataFrame) -> None:
        """Write a table as CSV."""
        write_table(self.folder / name, table)

    @contextlib.contextmanager
    def figure(
        self, name: str, title: str, rows: int = 1, columns: int = 1, size: tuple[float, float] = (8, 5)
    ) -> Iterator[tuple[Figure, np.ndarray]]:
        """(figure, array of axes), saved when the block ends; a figure that fails is a NOTE, not an error."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure  # without pyplot: its backend may not be installed

        try:
            with _style(), warnings.catch_warnings(), atomic_path(self.folder / name) as temporary:
                warnings.filterwarnings("ignore", "Glyph .* missing from")  # in class names: drawn as boxes
                drawing = FigureCanvasAgg(Figure(figsize=size, layout="constrained")).figure
                yield drawing, drawing.subplots(rows, columns, squeeze=False)
                letters = int(8.7 * size[0])  # that fit into a line
                lines = [textwrap.fill(line, letters) for line in title.splitlines()]
                drawing.suptitle("\n".join(lines), fontsize=15, parse_math=False)  # names may hold dollar signs
                drawing.savefig(temporary, dpi=110)
        except Exception as error:  # a figure never costs a finished measurement
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            note(f"{name} could not be drawn: {type(error).__name__}: {first_line(error)} ({where})")

    def finish(
        self, summary: Mapping[str, object], report: Sequence[str], options: argparse.Namespace, command: str
    ) -> None:
        """Write what the run found and publish all files; ``report``: paragraphs; ``options``: those that were used."""
        about = {"dataset": self.data.name, "source": self.data.source, "fingerprint": self.data.fingerprint}
        seconds = self.progress.seconds
        config = {
            name: within_lab(value) if isinstance(value, Path) else value for name, value in vars(options).items()
        }
        how = f"    {command}\n\n{seconds / 60:.1f} minutes, {self.environment.text()}"
        write_json(self.folder / "config.json", config | {"workers": self.workers.count})
        write_json(self.folder / "environment.json", asdict(self.environment))
        write_text(self.folder / "report.md", "\n\n".join([*report, "## Command and environment", how]) + "\n")
        files = sorted({"summary.json", *(path.name for path in self.folder.iterdir())})
        summary = {**about, **summary, "wall_seconds": seconds, "files": files}
        write_json(self.folder / "summary.json", summary)
        self.progress.close()
        _publish(self.folder, self.output)
        names = sorted(path.name for path in _visible_files(self.output))
        names.sort(key=lambda name: name != "report.md")
        print(f"\nWritten to {self.output}:\n{textwrap.indent(textwrap.fill(', '.join(names), 96), '  ')}")


class PublishedRun(NamedTuple):
    """What a finished run of a script has published."""

    summary: dict[str, Any]  # of the JSON files
    config: dict[str, Any]
    environment: dict[str, Any]

    def is_on(self, data: Dataset) -> bool:
        """Whether it had the same training images, whatever they were called."""
        return bool(self.summary["fingerprint"] == data.fingerprint)

    def words(self, options: argparse.Namespace, ignored: Collection[str], data: Dataset) -> str:
        """How it differs from a run with ``options`` but for those ``ignored`` on ``data``; precision and processor."""
        changes = [
            option_in_words(name, self.config[name])
            for name, value in vars(options).items()
            if name not in ignored and self.config[name] != (within_lab(value) if isinstance(value, Path) else value)
        ]
        images = None if self.is_on(data) else f"other images ({self.summary['source']})"
        facts = (self.environment[name] for name in ("precision", "gpu", "cpu"))
        return ", ".join(filter(None, [" ".join(changes), images, *facts]))


def read_published_run(folder: Path, task: str) -> PublishedRun:
    """What a run of ``task`` has published in ``folder``; raises OSError, ValueError or LookupError."""
    files = [json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in PublishedRun._fields]
    published = PublishedRun(*files)
    if published.summary["task"] != task:
        raise ValueError("those of another script")
    return published


def option_in_words(name: str, value: object) -> str:
    """An option of the command line, as config.json holds it, as one would type it."""
    flag = f"--{name.replace('_', '-')}"
    if value is True:
        return flag
    if value is None or value is False:
        return f"(without {flag})"
    values = value if isinstance(value, list) else [value]
    return " ".join([flag, *map(str, values)])


def _visible_files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]


def _files_of_run(folder: Path) -> list[str]:
    """The names of the files that the run in ``folder`` has published, if there is one."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # none, or somebody else's summary.json
        names = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["files"]
        return [name for name in names if Path(name).name == name]  # no path that leads elsewhere
    return []


def _publish(folder: Path, output: Path) -> None:
    """Move all files to ``output``; those of an earlier run there go to previous/.

    What no run has written stays or, if it is in the way, goes to yours/.
    """
    previous = output / "previous"
    for name in _files_of_run(previous):
        (previous / name).unlink(missing_ok=True)
    for name in _files_of_run(output):
        if (output / name).is_file():
            previous.mkdir(exist_ok=True)
            (output / name).replace(previous / name)
    for path in folder.iterdir():
        target = output / path.name
        if target.exists():
            _move_aside(target, output / "yours")
        path.replace(target)


def _move_aside(path: Path, folder: Path) -> None:
    """Move a file of the user's to ``folder``, under a new name if that is taken."""
    folder.mkdir(exist_ok=True)
    target = folder / path.name
    number = 1
    while target.exists():
        target = folder / f"{path.stem}-{number}{path.suffix}"
        number += 1
    path.replace(target)
    note(f"no run has written {path}: it is now {target}")


@contextlib.contextmanager
def open_run(options: argparse.Namespace, data: Dataset) -> Iterator[Run]:
    """Lock the output folder for one run and share ``data``, without the test images, with worker processes.

    ``options``: those of ``add_common_args``.
    """
    output = options.output_dir
    if data.folder and any(output.resolve().is_relative_to(data.folder / half) for half in ("train", "test")):
        raise UserError(f"--output-dir {output} lies among the images: figures there would be taken for some of them")
    with user_error("matplotlib cannot be imported", Exception):  # if the user's matplotlibrc is damaged, for example
        importlib.import_module("matplotlib.figure")
    shared = output / ".dataset.pt"
    runtime = resolve_runtime(options.device, options.precision, usable_cores())
    apply_runtime(runtime)
    count = min(usable_cores(), 4) if runtime.device.startswith("cuda") else usable_cores()
    workers = Workers(options.workers or count, runtime._replace(threads=1), shared)
    without_test = replace(
        data, test_images=data.test_images[:0].clone(), test_labels=data.test_labels[:0].clone(), test_files=()
    )
    with _locked_folder(output) as folder:
        try:
            share_dataset(shared, without_test)
            size = f"{len(data.train_labels):,} training images"
            print(f"{data.source}: {size}; {runtime.device}, {runtime.precision}, {workers.count} worker process(es)")
            with contextlib.closing(Progress()) as progress:
                yield Run(without_test, runtime, workers, progress, output, folder, find_environment(runtime))
        finally:
            workers.stop()
            with contextlib.suppress(OSError):  # on Windows, while somebody else's worker has it open
                shared.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked_folder(output: Path) -> Iterator[Path]:
    """An empty folder in ``output`` to write to, while no other run does; says so if something is left there."""
    from filelock import FileLock

    folder = output / "unfinished_run"
    with contextlib.ExitStack() as stack:
        with user_error(f"--output-dir {output} cannot be used, or another run is writing to it", OSError):
            output.mkdir(parents=True, exist_ok=True)
            for taken in (output / "previous", output / "yours"):
                if taken.exists() and not taken.is_dir():
                    raise FileExistsError(f"{taken} is not a folder")
            stack.enter_context(FileLock(output / ".lock", timeout=0))
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        try:
            yield folder
        finally:
            with contextlib.suppress(FileNotFoundError):  # somebody has removed it
                if any(folder.iterdir()):
                    tell(f"partial results are in {folder}")
                else:
                    folder.rmdir()


def share_dataset(path: Path, data: Dataset) -> None:
    """Write a data set for worker processes, which map the file instead of copying it."""
    write_tensors(path, {entry.name: getattr(data, entry.name) for entry in fields(Dataset)})
