"""What the lab's scripts share: options, data, networks, training, evaluation, checkpoints, workers, results.

A script loads a data set (``load_data``), opens a run (``open_run``), hands training jobs to its worker processes
(``Run.train``) and gives it tables, figures and a summary to write. Importing this module only defines names.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gzip
import hashlib
import importlib.metadata
import inspect
import json
import multiprocessing.pool
import multiprocessing.resource_tracker
import os
import pkgutil
import platform
import queue
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

if "OMP_WAIT_POLICY" not in os.environ:  # idle OpenMP threads soon sleep: spinning ones slow other programs down
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

ROOT = Path(__file__).resolve().parent
Row = dict[str, Any]

# ================================================================ 1. options and errors


class UserError(Exception):
    """An error that the user can fix: reported in one line with exit status 2, without a traceback."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def user_error(text: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of these kinds (default: any) into a UserError: ``text`` and the first line of the message."""
    try:
        yield
    except UserError:
        raise
    except kinds or Exception as error:  # noqa: B030
        raise UserError(f"{text}: {first_line(error)[:200]}") from None


def script(main: Callable[..., int]) -> Callable[..., int]:
    """Decorate a script's ``main``: user errors, Ctrl-C and SIGTERM become one line and an exit status."""

    def terminate(*_: object) -> None:
        raise KeyboardInterrupt("terminated")  # how schedulers and containers stop a program

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> int:
        signal.signal(signal.SIGTERM, terminate)
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")  # for consoles without Unicode
        try:
            return main(argv)
        except (UserError, OSError) as error:
            text, status = f"error: {error}", 2
        except KeyboardInterrupt as error:
            text, status = ("terminated", 143) if error.args else ("interrupted", 130)
        print(text, file=sys.stderr)
        return status

    return guarded


@dataclass(frozen=True)
class Recipe:
    """A network (SmallCNN, PlainCNN or MODULE:CALLABLE) and how to train it."""

    model: str = "SmallCNN"
    width: int = 32
    growth: tuple[float, ...] = (1, 4, 4)  # channels of SmallCNN's stages, in multiples of width
    stem: tuple[int, int, int] = (1, 2, 24)  # stride, patch size, channels
    activation: str = "ReLU"  # a class of torch.nn
    batch_norm: bool = True  # PlainCNN's
    dropout: float = 0.0
    optimizer: str = "SGD+nesterov"
    lr: float | None = 1.0  # None: the framework's default
    weight_decay: float = 5e-4
    label_smoothing: float = 0.2
    crop_padding: int = 2  # the largest random shift, in pixels; 0 turns augmentation off, flips included
    batch_size: int = 512
    epochs: int = 10
    schedule: str = "one_cycle"
    hardest: float = 1.0  # after the first epoch, train on this share of the images: those with the highest loss


# Points on the accuracy-compute frontier, chosen on validation images (see tests/benchmark_training.py).
MUON = Recipe(optimizer="Muon", lr=0.12, weight_decay=0, batch_size=500, schedule="linear")
PRESETS = {
    "small": replace(MUON, growth=(1, 3.5, 3.5), stem=(2, 4, 24), epochs=4, hardest=0.6),
    "medium": replace(MUON, stem=(1, 3, 18), activation="SiLU", epochs=5, hardest=0.6),  # large: it does not help
    "large": replace(MUON, width=64, growth=(1, 3.75, 3.75), stem=(1, 3, 20), activation="GELU", epochs=7),
}


def number(kind: type = int, low: float = 1, high: float = 2**31 - 1) -> Callable[[str], Any]:
    """An argparse type: a number from ``low`` to ``high``, or, if ``kind`` is Path, a non-empty path."""

    def convert(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if text and (kind is Path or low <= kind(text) <= high):
                return kind(text)
        what = "a path" if kind is Path else f"a{' whole' * (kind is int)} number from {low:,} to {high:,}"
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")

    return convert


def add_common_args(parser: argparse.ArgumentParser, presets: bool = False, **defaults: Any) -> None:
    """Add the options shared by all scripts, with a script's own ``defaults``; ``presets`` adds --preset."""
    add = parser.add_argument_group("common to all scripts").add_argument
    shown = "(default: the recipe's)" if presets else "(default: %(default)s)"
    default = defaults.get("dataset", "cifar10 if available, else fashion_mnist")
    add("--dataset", help=f"fashion_mnist, cifar10 or an image folder {{train,test}}/<class>/* (default: {default})")
    add("--data-dir", type=number(Path), default=ROOT / "data", help="where data sets are (default: the lab's data)")
    add("--output-dir", type=number(Path), help="where the results go (default: ./%(default)s)")
    add("--model", metavar="MODULE:CALLABLE", help="a network of your own, such as torchvision.models:resnet18")
    add(
        "--images",
        type=number(),
        metavar="N",
        help=f"train on N images of all classes (default: {defaults.get('images', 'all, unless stated above')})",
    )
    add("--image-size", type=number(low=8, high=1024), metavar="PIXELS", help="resize images (folders: 32)")
    if presets:
        add("--preset", choices=tuple(PRESETS), default="small", help="network and recipe (default: %(default)s)")
    add("--epochs", type=number(), help=f"passes over the training images {shown}")
    add("--batch-size", type=number(), help=f"images per step {shown}")
    add("--width", type=number(low=16), help=f"channels of the first stage, a multiple of 16 {shown}")
    add("--seed", type=number(low=0), default=0, help="seed of everything random (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="(default: %(default)s)")
    add("--workers", type=number(high=1024), help="parallel processes (default: usable cores; on a GPU at most 4)")
    add("--quick", action="store_true", help="run every step on a few images, in seconds")
    parser.set_defaults(**defaults)


def recipe_from(options: argparse.Namespace, base: Recipe) -> Recipe:
    """``base`` with the model, width, epochs and batch size of the command line, where given."""
    given = {name: getattr(options, name) for name in ("model", "width", "epochs", "batch_size")}
    return replace(base, **{name: value for name, value in given.items() if value is not None})


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


def make_runtime(device: str = "auto", precision: str = "auto", threads: int = 1) -> Runtime:
    """Resolve "auto" (bf16 only where the hardware has it) and set the number of threads of this process."""
    device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    with user_error(f"--device {device} cannot be used here"):
        if torch.empty(1, device=device).device.type not in ("cpu", "cuda", "mps"):
            raise ValueError("neither a cpu, cuda nor mps device")
    if precision == "auto":
        found = torch.cpu.get_capabilities() if device == "cpu" else {}
        native = any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        native |= device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if native else "fp32"
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    with contextlib.suppress(OSError, AttributeError):  # make glibc keep freed activations: page faults are slow
        for parameter, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD: see mallopt(3)
            ctypes.CDLL("libc.so.6").mallopt(parameter, value)
    return Runtime(device, precision, threads)


def derive_seed(seed: int, *stage: int) -> int:
    """A distinct seed for each stage and repetition of a run; runs with different --seed share none."""
    return int(np.random.SeedSequence([seed, *stage]).generate_state(1, np.uint64)[0] >> 1)


# ================================================================ 2. data

VALIDATION_FRACTION, SPLIT_SEED = 0.1, 2024
DECODER = 5  # increase it when decoding changes: it invalidates the caches
MORE_SUFFIXES = (".jfif", ".jpe", ".gif", ".avif", ".jp2", ".tga", ".dib", ".pbm", ".pnm")  # besides torchvision's
CLOTHES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
FASHION_FILES = {  # with the published MD5 (importing torchvision for them takes 1 s and 170 MB)
    "train-images-idx3": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1": "bb300cfdad3c16e7a12a480ee83cd310",
}


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

    @functools.cached_property
    def fingerprint(self) -> str:
        """A checksum of classes, training images and labels: it changes if the data at a path do."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        digest.update(self.train_images.permute(0, 2, 3, 1).contiguous().numpy().data)
        digest.update(self.train_labels.numpy().data)
        return digest.hexdigest()[:16]


def load_data(options: argparse.Namespace) -> Dataset:
    """Load --dataset; by default CIFAR-10 where available, otherwise the embedded Fashion-MNIST."""
    name = "cifar10" if options.dataset is None else options.dataset
    try:
        return load_dataset(name, options.data_dir, options.image_size)
    except UserError as error:
        if options.dataset is not None:
            raise
        print(f"NOTE: {error}\nNOTE: running on the embedded Fashion-MNIST instead of CIFAR-10.", file=sys.stderr)
        return load_dataset("fashion_mnist", image_size=options.image_size)


def load_dataset(name: str, data_dir: Path = ROOT / "data", image_size: int | None = None) -> Dataset:
    """Load ``fashion_mnist``, ``cifar10`` or an image folder; raises UserError."""
    if name == "fashion_mnist":
        source, classes, *pairs = load_fashion_mnist(data_dir)
    elif name == "cifar10":
        source, classes, *pairs = load_cifar10(data_dir, image_size or 32)
    else:
        source, classes, *pairs = load_folder(Path(name), image_size or 32)
    tensors = []
    for images, labels in pairs:
        if image_size not in (None, images.shape[-1]):
            parts = [F.interpolate(part, image_size, mode="bilinear", antialias=True) for part in images.split(1000)]
            images = torch.cat(parts)
        tensors += [images.contiguous(memory_format=torch.channels_last), labels.long()]
    return Dataset(name, source, tuple(classes), *tensors)


def load_fashion_mnist(data_dir: Path) -> tuple[Any, ...]:
    """(source, classes, train pair, test pair) from the published .gz files, MD5 checked; pair: (images, labels)."""
    folders = [parent / "FashionMNIST" / "raw" for parent in (data_dir, ROOT / "data")]
    folder, parts = next(filter(Path.is_dir, folders), folders[1]), []
    for name, md5 in FASHION_FILES.items():
        path = folder / f"{name}-ubyte.gz"
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
            raise UserError(f"{path} is missing or not the published file; `git checkout data` restores the lab's own")
        values = torch.frombuffer(bytearray(gzip.decompress(content)), dtype=torch.uint8)
        parts.append(values[16:].view(-1, 1, 28, 28) if "images" in name else values[8:])
    return f"Fashion-MNIST{', embedded' * (folder.resolve() == folders[1].resolve())}", CLOTHES, parts[:2], parts[2:]


def load_cifar10(data_dir: Path, size: int) -> tuple[Any, ...]:
    """The same from torchvision's archive or folder in ``data_dir``, the image folder ``cifar10`` or a download."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    archive, folder, images = (data_dir / name for name in (CIFAR10.filename, CIFAR10.base_folder, "cifar10"))
    if archive.exists() and not check_integrity(str(archive), CIFAR10.tgz_md5):
        raise UserError(f"{archive} ({archive.stat().st_size:,} bytes) is incomplete or damaged: delete it")
    if images.is_dir() and not archive.exists() and not folder.is_dir():
        return "CIFAR-10, image folder", *load_folder(images, size)[1:]
    download = archive.exists() or not folder.is_dir()  # an existing archive is only unpacked

    def remove_partial() -> None:  # of an interrupted download
        with contextlib.suppress(OSError):
            if not check_integrity(str(archive), CIFAR10.tgz_md5):
                archive.unlink()

    fault = f"no CIFAR-10: {archive.name}, {folder.name} or an image folder cifar10 in {data_dir}, nor a download"
    with contextlib.ExitStack() as stack:
        stack.callback(remove_partial)
        stack.callback(socket.setdefaulttimeout, socket.getdefaulttimeout())
        socket.setdefaulttimeout(10)  # a firewalled network never answers
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        stack.enter_context(user_error(fault if download else f"{folder} is damaged: delete it"))
        splits = [CIFAR10(str(data_dir), train, download=download) for train in (True, False)]
    pairs = [(torch.from_numpy(split.data).permute(0, 3, 1, 2), torch.tensor(split.targets)) for split in splits]
    return "CIFAR-10", splits[0].classes, *pairs


def readable(name: str) -> str:
    """A file name as text, whatever the locale, in one Unicode normal form."""
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "replace"))


def load_folder(folder: Path, size: int) -> tuple[Any, ...]:
    """The same from ``folder/{train,test}/<class>/*`` as square RGB images; they are decoded once and cached."""
    from platformdirs import user_cache_path
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    folder, passed_over = folder.resolve(), Counter[str]()

    def is_image(path: str) -> bool:
        hidden = any(part.startswith(".") for part in Path(path).relative_to(folder).parts)
        suffix = "hidden" if hidden else Path(path).suffix.lower() or "without suffix"
        known = suffix in (*IMG_EXTENSIONS, *MORE_SUFFIXES)
        passed_over.update([] if known else [suffix])
        return known

    classes, found = [], []
    for split in (folder / "train", folder / "test"):
        if not split.is_dir():
            raise UserError(f"{folder} is neither fashion_mnist, cifar10 nor a folder with {split.name}/<class>/")
        names = [entry.name for entry in os.scandir(split) if entry.is_dir() and entry.name[0] != "."]
        classes.append(sorted({readable(name) for name in names}))
        with user_error(str(split), FileNotFoundError, ValueError):  # no classes, or an empty one
            labels = {name: classes[-1].index(readable(name)) for name in names}
            found.append(make_dataset(str(split), labels, is_valid_file=is_image))
    if classes[0] != classes[1] or len(classes[0]) < 2:
        raise UserError(f"{folder}: train/ and test/ need the same two or more classes, not {classes[0]}, {classes[1]}")
    if passed_over:
        kinds = ", ".join(f"{count} {kind}" for kind, count in passed_over.most_common())
        print(f"NOTE: skipped files in {folder} that are not images: {kinds}", file=sys.stderr)
    paths = [path for items in found for path, _ in items]
    facts = [(path, stat.st_size, stat.st_mtime_ns) for path in paths for stat in [Path(path).stat()]]
    key = hashlib.sha256(ascii((DECODER, size, facts)).encode()).hexdigest()
    name = f"{folder.name[:40]}-{size}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]}.pt"
    cache, content = user_cache_path("small-cv-lab", appauthor=False) / name, Row()
    with contextlib.suppress(Exception):  # missing or damaged: decode again
        content = torch.load(cache, weights_only=True)
    if content.get("key") != key:
        content = {"key": key, "images": decode_images(paths, size)}
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            write(cache, content)
        except (OSError, UserError) as error:
            print(f"NOTE: the decoded images are not cached: {error}", file=sys.stderr)
    images = [part.clone() for part in content["images"].split([len(items) for items in found])]
    pairs = [(part, torch.tensor([y for _, y in items])) for part, items in zip(images, found, strict=True)]
    return f"{readable(folder.name)}, image folder", classes[0], *pairs


def decode_images(paths: Sequence[str], size: int) -> Tensor:
    """Decode image files of any size and mode to uint8 (N, 3, size, size), EXIF rotation applied, on white.

    Images of more than 8 bits are scaled by the number of bits actually used: 16-bit files often hold 12-bit values.
    """
    from PIL import Image, ImageOps
    from tqdm import tqdm

    def decode(path: str) -> np.ndarray:
        with user_error(f"unreadable image {ascii(path)[1:-1]}"), Image.open(path) as file:
            file.load()
            image: Any = file
            with contextlib.suppress(Exception):  # a damaged EXIF block in an intact image
                image = ImageOps.exif_transpose(file)
            deep = image.mode.startswith(("I", "F"))  # more than 8 bits
            if image.has_transparency_data and not deep:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            image = image.convert("F" if deep else "RGB")
            if deep and not np.isfinite(image).all():
                raise ValueError("not all of its values are finite")
            return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))  # which never overshoots

    with warnings.catch_warnings(), multiprocessing.pool.ThreadPool(usable_cores()) as pool:
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        images = list(tqdm(pool.imap(decode, paths), "decoding images", len(paths), unit="image", disable=None))
    highest = max((image.max() for image in images if image.ndim == 2), default=0)
    white = 2 ** max(8, int(highest).bit_length()) - 1 if highest >= 2 else 1  # floats often are in [0, 1]
    for position, image in enumerate(images):
        if image.ndim == 2:
            scaled = (image * (255 / white)).clip(0, 255).round().astype(np.uint8)
            images[position] = np.stack([scaled] * 3, 2)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


class Split(NamedTuple):
    """Indices (int64) of images to train on and to validate on; per-channel mean and std of the former."""

    train: Tensor
    validation: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]


@functools.lru_cache(maxsize=16)
def split_dataset(data: Dataset, images: int | None = None, validation: bool = True, seed: int = SPLIT_SEED) -> Split:
    """A fixed stratified split: at most ``images`` to train on, and as many to validate on, or none.

    Every prefix of both holds the classes in proportion. The std is over all pixels, not the mean of per-image ones,
    which is where the widely copied 0.2023, 0.1994, 0.2010 for CIFAR-10 come from.
    """
    shuffled = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(seed))
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for label, name in enumerate(data.classes):
        members = shuffled[data.train_labels[shuffled] == label]
        if len(members) < 2:
            raise UserError(f"class {name} needs at least two training images, one of them for validation")
        held = max(1, round(VALIDATION_FRACTION * len(members))) if validation else 0
        parts[0].append(members[held:])
        parts[1].append(members[:held])
    places = [torch.cat([torch.arange(len(own)) / max(1, len(own)) for own in part]) for part in parts]
    train, held_out = (
        torch.cat(part)[place.argsort(stable=True)][:images] for part, place in zip(parts, places, strict=True)
    )
    sums = torch.zeros(2, data.train_images.shape[1], dtype=torch.float64)
    for part in train.split(1000):
        pixels = data.train_images[part].double() / 255
        sums += torch.stack([pixels.mean((2, 3)).sum(0), pixels.square().mean((2, 3)).sum(0)])
    mean, square = sums / len(train)
    std = (square - mean**2).clamp_min(0).sqrt().clamp_min(1 / 255)  # of images of a single colour
    return Split(train, held_out, tuple(mean.tolist()), tuple(std.tolist()))


# ================================================================ 3. networks

LOGIT_SCALE = 1 / 9  # keeps the initial logits and the first steps of the head small (Jordan 2024)


class Normalise(nn.Module):
    """Standardise float32 images (N, C, H, W) in [0, 1]; greyscale ones broadcast to as many channels as ``mean``."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean, self.std = (nn.Buffer(torch.tensor(values)[:, None, None]) for values in (mean, std))

    def forward(self, images: Tensor) -> Tensor:
        """(images - mean) / std."""
        return (images - self.mean) / self.std


class PlainCNN(nn.Sequential):
    """The textbook network: convolution, pooling, (BatchNorm,) ReLU, twice, then one linear layer.

    Pooling comes before ReLU: without BatchNorm this is the same function, and faster.
    Input float32 (N, C, H, W), output logits (N, num_classes). torch's own initialisation, every weight trained.
    """

    def __init__(self, channels: int, num_classes: int, image_size: int, recipe: Recipe) -> None:
        layers: list[nn.Module] = []
        for out in (recipe.width, 2 * recipe.width):
            norm = [nn.BatchNorm2d(out)] if recipe.batch_norm else []
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.MaxPool2d(2), *norm, nn.ReLU()]
            channels = out
        super().__init__(*layers, nn.Flatten(), nn.Linear(channels * (image_size // 4) ** 2, num_classes))


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
        of_kernels = gradient.permute(0, 2, 3, 1).flatten(0, 2).T @ windows.flatten(3).flatten(0, 2)
        of_kernels = of_kernels.view(-1, 3, 3, images.shape[1]).permute(0, 3, 1, 2)
        return conv2d_input(images.shape, kernels, gradient, padding=1), of_kernels


class SmallCNN(nn.Module):
    """The fast network: input float32 (N, C, H, W), standardised; output logits (N, num_classes).

    A fixed stem whitens patches (as in Page's and Jordan's CIFAR-10 speed runs) and needs no backward pass. Stages of
    two 3x3 convolutions follow, then global max-pooling, so larger images fit. Pooling comes *before* BatchNorm and the
    activation, which then see a quarter of the pixels. BatchNorm learns a shift but no scale, so its scale stays
    positive, commutes with max-pooling and can be folded. Muon's learning rates expect head weights of unit standard
    deviation and logits divided by the number of channels.
    """

    def __init__(self, channels: int, num_classes: int, recipe: Recipe) -> None:
        super().__init__()
        (stride, size, directions), activation = recipe.stem, getattr(nn, recipe.activation)
        directions = min(directions, 2 * channels * size**2)  # all of them, with both signs
        self.stem = nn.Conv2d(channels, directions, size, stride, bias=False).requires_grad_(False)
        layers: list[nn.Module] = [activation()]
        channels, unit_head = directions, recipe.optimizer == "Muon"
        for out in (round(recipe.width * factor) for factor in recipe.growth):
            for pool in ([nn.MaxPool2d(2)], []):
                convolution = nn.Conv2d(channels, out, 3, padding=1, bias=False)
                nn.init.dirac_(convolution.weight[: min(channels, out)].data)
                norm = nn.BatchNorm2d(out, momentum=0.4)  # short trainings have few steps to average over
                norm.weight.requires_grad_(False)
                layers += [convolution, *pool, norm, activation()]
                channels = out
        self.features, self.dropout = nn.Sequential(*layers), nn.Dropout(recipe.dropout)
        self.head = nn.Linear(channels, num_classes, bias=not unit_head)
        self.scale = 1 / channels if unit_head else LOGIT_SCALE
        self.head.weight.data /= self.head.weight.std().item() if unit_head else 1

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes)."""
        images = self.stem(images)
        for layer in self.features:
            small = images.shape[1] >= 64 and images.shape[-1] <= 7 and images.dtype == torch.bfloat16 and images.is_cpu
            if small and self.training and isinstance(layer, nn.Conv2d):
                images = SmallMapConvolution.apply(images, layer.weight.to(images.dtype))
            else:
                images = layer(images)
        return self.scale * self.head(self.dropout(images.amax((2, 3))))

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


def make_model(recipe: Recipe, data: Dataset, split: Split | None = None, seed: int = 0) -> nn.Sequential:
    """``Normalise`` and the network of ``recipe``, channels_last; random weights depend on ``seed`` alone.

    Without ``split`` the constants of ``Normalise`` are placeholders until weights are loaded.
    """
    (channels, _, size), classes = data.train_images.shape[1:], len(data.classes)
    mean, std = (split.mean, split.std) if split else ((0.0,) * channels, (1.0,) * channels)
    if ":" not in recipe.model and recipe.width % 16:
        raise UserError(f"--width {recipe.width} is not a multiple of 16")
    with torch.random.fork_rng(devices=[]), user_error(f"--model {recipe.model} cannot be made"):
        torch.manual_seed(seed)
        if recipe.model == "PlainCNN":
            network: Any = PlainCNN(channels, classes, size, recipe)
        elif recipe.model == "SmallCNN":
            network = SmallCNN(channels, classes, recipe)
        else:
            if ":" not in recipe.model:
                raise ValueError("it is not MODULE:CALLABLE")
            sys.path[:0] = {str(Path.cwd())} - {*sys.path}
            network = pkgutil.resolve_name(recipe.model)(num_classes=classes)
            mean, std = mean * (3 // channels), std * (3 // channels)
        model = nn.Sequential(Normalise(mean, std), network)  # raises for anything but a Module
    if isinstance(network, SmallCNN) and split:
        few = split.train[:: max(1, len(split.train) // 2000)]
        network.whiten_stem(model[0](data.train_images[few].float() / 255))
    return model.to(memory_format=torch.channels_last)


def check_recipe(recipe: Recipe, data: Dataset, split: Split) -> None:
    """Try one training step, so that an unsuitable network fails here (UserError), not in the middle of a run."""
    few, here = split.train[: min(2, recipe.batch_size)], Runtime("cpu", "fp32", 1)
    model = make_model(recipe, data, split)
    size = "x".join(map(str, data.train_images.shape[1:]))
    with user_error(f"{recipe.model} cannot be trained with {recipe.optimizer} on {len(few)} images of {size}"):
        next(train_epochs(model, data, recipe, here, few))
        shape = tuple(predict(model, data.train_images, here, few).shape)
        if shape != (len(few), len(data.classes)):
            raise ValueError(f"outputs of shape {shape} for {len(data.classes)} classes")


# ================================================================ 4. training

# A schedule: the learning rate's factor at fractions of all steps, with linear interpolation.
SCHEDULES: Any = {"one_cycle": ([0, 0.25, 1], [0.02, 1, 0]), "linear": ([0, 1], [1, 0]), "constant": ([0, 1], [1, 1])}
MUON_MOMENTUM, SGD_MOMENTUM = 0.6, 0.85  # of airbench94_muon (Jordan 2024), as are the next
SHIFT_RATE, HEAD_RATE, DECAY = 0.053, 0.67, 2e-6  # three, which are for a loss summed over the batch


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer: Muon or a class of torch.optim; +momentum and +nesterov set its momentum to 0.9."""
    base, plus, variant = recipe.optimizer.partition("+")
    extra: Any = {"": {}, "+momentum": {"momentum": 0.9}, "+nesterov": {"momentum": 0.9, "nesterov": True}}
    kind = Muon if base == "Muon" else getattr(torch.optim, base, None)
    if not isinstance(kind, type) or base in ("Optimizer", "LBFGS", "SparseAdam") or plus + variant not in extra:
        raise UserError(f"unknown optimizer {recipe.optimizer!r}: Muon or one of torch.optim, SGD also SGD+nesterov")
    given = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    known = {name for name in inspect.signature(kind).parameters if given.get(name) is not None}
    settings = {name: given[name] for name in known} | extra[plus + variant]
    if kind is Muon:
        if recipe.model != "SmallCNN":
            raise UserError("optimizer Muon is for the lab's SmallCNN only")
        settings["batch_size"] = recipe.batch_size
    with user_error(f"optimizer {recipe.optimizer} cannot train this model"):
        return kind([weight for weight in model.parameters() if weight.requires_grad], **settings)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for SmallCNN's kernels, SGD with Nesterov momentum for BatchNorm shifts and the head.

    A kernel (O, I, H, W) is treated as a matrix (O, I * H * W), rescaled to norm sqrt(O) (BatchNorm makes its scale
    irrelevant) and moved by lr times the orthogonal matrix nearest to its averaged gradient. torch.optim.Muon accepts
    only matrices and computes in bf16, which many processors merely emulate.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, batch_size: int) -> None:
        weights, rates = list(params), {4: lr, 1: SHIFT_RATE * batch_size, 2: HEAD_RATE * batch_size}
        groups = [{"params": [w for w in weights if w.ndim == ndim], "lr": rate} for ndim, rate in rates.items()]
        super().__init__(groups, {})
        for group in self.param_groups[1:]:
            group["decay"] = DECAY * batch_size / group["lr"]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all weights; each needs a gradient."""
        kernels = self.param_groups[0]
        for group in self.param_groups:
            momentum = MUON_MOMENTUM if group is kernels else SGD_MOMENTUM
            for weight in group["params"]:
                gradient = weight.grad if group is kernels else weight.grad + group["decay"] * weight
                average = self.state[weight].setdefault("average", torch.zeros_like(weight))
                average.mul_(momentum).add_(gradient)
                direction = gradient + momentum * average  # Nesterov
                if group is kernels:
                    weight *= len(weight) ** 0.5 / weight.norm()
                    direction = orthogonalise(direction.flatten(1)).view_as(weight)
                weight -= group["lr"] * direction


def orthogonalise(matrix: Tensor, steps: int = 3) -> Tensor:
    """``matrix`` (R, C) with all of its singular values moved close to 1, its singular vectors unchanged.

    Newton-Schulz iteration with the quintic polynomial of Jordan et al. 2024, which does not converge to 1 exactly.
    """
    matrix = matrix / matrix.norm().clamp_min(1e-7)
    for _ in range(steps):
        gram = matrix @ matrix.T
        matrix = 3.4445 * matrix + (-4.7750 * gram + 2.0315 * gram @ gram) @ matrix
    return matrix


def draw_batch(images: Tensor, index: Tensor, shift: Tensor | None = None, flip: Tensor | None = None) -> Tensor:
    """Images ``index`` (B,), cropped ``shift`` (B, 2) pixels further down and right, mirrored where ``flip`` (B,).

    Returns uint8 (B, C, H, W), channels_last, reflected at the borders. A single gather of whole pixels.
    """
    stored = images.permute(0, 2, 3, 1)  # a view: images are stored as NHWC
    if shift is None or flip is None:
        return stored.index_select(0, index).permute(0, 3, 1, 2)
    height, width, channels = stored.shape[1:]
    rows, columns = (torch.arange(size, device=images.device) for size in (height, width))
    rows = rows + shift[:, :1]
    columns = torch.where(flip[:, None], width - 1 - columns, columns) + shift[:, 1:]
    rows = height - 1 - (height - 1 - rows.abs()).abs()  # reflects without repeating the border
    columns = width - 1 - (width - 1 - columns.abs()).abs()
    pixel = (index[:, None, None] * height + rows[:, :, None]) * width + columns[:, None, :]
    batch = stored.reshape(-1, channels).index_select(0, pixel.flatten())
    return batch.view(len(index), height, width, channels).permute(0, 3, 1, 2)


def train_epochs(
    model: nn.Module, data: Dataset, recipe: Recipe, runtime: Runtime, index: Tensor, seed: int = 0, labels: Any = None
) -> Iterator[Row]:
    """Train ``model`` in place on the training images ``index``; yields a row per epoch; stops if a loss is not finite.

    A row has epoch, train_loss (the mean over the steps, with augmentation and label smoothing), seconds (since the
    start) and losses (one per step). ``labels`` (N,) replaces the training labels. If ``recipe.hardest`` is below 1,
    later epochs repeat the images whose last loss was highest (online batch selection, Loshchilov and Hutter 2015).
    """
    device, bf16, seconds = torch.device(runtime.device), runtime.precision == "bf16", 0.0
    model.to(device)
    images = data.train_images.to(device)
    targets = (data.train_labels if labels is None else labels).to(device)
    size, shift = min(recipe.batch_size, len(index)), recipe.crop_padding
    steps = len(index) // size  # of an epoch
    hardness = torch.zeros(len(images), device=device)  # the loss of each image when it was last trained on
    optimizer = make_optimizer(replace(recipe, batch_size=size), model)
    factors = np.interp(np.linspace(0, 1, recipe.epochs * steps + 1), *SCHEDULES[recipe.schedule])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors.__getitem__)
    torch.manual_seed(seed)  # for dropout
    generator = torch.Generator().manual_seed(seed)
    first_flip = torch.rand(len(images), generator=generator) < 0.5
    for epoch in range(recipe.epochs):
        start, losses = time.perf_counter(), []
        model.train()
        pool = index
        if epoch and recipe.hardest < 1:
            ranks = hardness.cpu()[index].argsort(descending=True)
            pool = index[ranks[: round(recipe.hardest * len(index))]]
        passes = [pool[torch.randperm(len(pool), generator=generator)] for _ in range(-(-len(index) // len(pool)))]
        order = torch.cat(passes)[: steps * size]
        shifts = torch.randint(-shift, shift + 1, (len(order), 2), generator=generator)
        turn = epoch + torch.arange(len(order)) // len(pool)
        flips = first_flip[order] ^ (turn % 2 > 0)  # alternating flip (Jordan 2024)
        parts = (tensor.to(device).split(size) for tensor in (order, shifts, flips))
        for chosen, *moves in zip(*parts, strict=True):
            batch = draw_batch(images, chosen, *(moves if shift else [])).float().div_(255)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = model(batch)
            loss = F.cross_entropy(logits.float(), targets[chosen], label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            if recipe.hardest < 1:
                hardness[chosen] = F.cross_entropy(logits.detach().float(), targets[chosen], reduction="none")
        values = torch.stack(losses).tolist()  # synchronises, once an epoch
        seconds += time.perf_counter() - start
        yield {"epoch": epoch + 1, "train_loss": float(np.mean(values)), "seconds": seconds, "losses": values}
        if not np.isfinite(values).all():
            return


@dataclass(frozen=True, eq=False)
class Job:
    """A training for a worker process (``train_job``); images and split_seed as in ``split_dataset``."""

    recipe: Recipe
    seed: int
    images: int | None = None
    split_seed: int = SPLIT_SEED
    labels: Tensor | None = None  # (N,) int64, replaces the training labels
    judged: int = 0  # measure the final loss on this many of the images trained on, too
    keep: bool = False  # return the weights

    def split(self, data: Dataset) -> Split:
        """The images to train on and to validate on."""
        return split_dataset(data, self.images, seed=self.split_seed)

    def restore(self, data: Dataset, state: dict[str, np.ndarray]) -> nn.Sequential:
        """The network trained by ``train_job``, in eval mode."""
        model = make_model(self.recipe, data)
        model.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
        return model.eval()


def train_job(data: Dataset, runtime: Runtime, job: Job) -> Generator[Row, None, Row]:
    """Train one network in a worker; yields the row of each epoch, with val_loss and val_accuracy.

    Returns history (the rows), losses (one per step), val_right (bool (n,), at the end), with ``keep`` state (the
    weights, as numpy arrays) and, on the ``judged`` images, final_loss and final_accuracy.
    """
    split, labels = job.split(data), data.train_labels if job.labels is None else job.labels
    model = make_model(job.recipe, data, split, job.seed)
    result: Row = {"history": [], "losses": []}
    for row in train_epochs(model, data, job.recipe, runtime, split.train, job.seed, labels):
        result["losses"] += row.pop("losses")
        logits = predict(model, data.train_images, runtime, split.validation)
        row["val_loss"], result["val_right"] = score(logits, data.train_labels[split.validation])  # the true labels
        row["val_accuracy"] = float(result["val_right"].mean())
        result["history"].append(row)
        yield row
    if job.judged:
        few = split.train[: job.judged]
        result["final_loss"], right = score(predict(model, data.train_images, runtime, few), labels[few])
        result["final_accuracy"] = float(right.mean())
    if job.keep:
        result["state"] = {key: value.cpu().numpy() for key, value in model.state_dict().items()}
    return result


# ================================================================ 5. evaluation


@torch.no_grad()  # in inference_mode, weights moved to a GPU here could not be trained afterwards
def predict(model: nn.Module, images: Tensor, runtime: Runtime, index: Tensor | None = None) -> Tensor:
    """Logits, float32 (N, num_classes) on the CPU, of uint8 images (N, C, H, W), all or at ``index``; in eval mode."""
    device, outputs = torch.device(runtime.device), []
    model.to(device).eval()
    for chunk in (torch.arange(len(images)) if index is None else index).split(500):
        with torch.autocast(device.type, torch.bfloat16, enabled=runtime.precision == "bf16"):
            outputs.append(model(images[chunk].to(device).float().div_(255)).float())
    return torch.cat(outputs).cpu()


def score(logits: Tensor, labels: Tensor) -> tuple[float, np.ndarray]:
    """(mean cross-entropy in nats, correctness of each image: bool (N,)) of logits (N, num_classes)."""
    return float(F.cross_entropy(logits, labels)), (logits.argmax(1) == labels).numpy()


class Estimate(NamedTuple):
    """A mean with its 95 % interval, two-sided p-value against 0, and number of repetitions."""

    mean: float
    low: float
    high: float
    p: float
    n: int


def interval(values: Any, error: float | None = None, freedom: float | None = None) -> Estimate:
    """Student's t interval of the mean of ``values`` (n,); unbounded if there are too few, or all are equal.

    If the values are not independent, pass the standard error of their mean and its degrees of freedom.
    """
    from scipy import stats

    n, mean = len(values), float(np.mean(values))
    error = float(stats.sem(values)) if error is None and n > 1 else error or 0.0
    if n < 2 or error <= 1e-12 * max(1, abs(mean)):  # rounding errors of equal values
        return Estimate(mean, -np.inf, np.inf, 1.0, n)
    freedom = freedom or n - 1
    low, high = stats.t.interval(0.95, freedom, mean, error)
    return Estimate(mean, float(low), float(high), float(2 * stats.t.sf(abs(mean) / error, freedom)), n)


def crossed_interval(differences: np.ndarray) -> Estimate:
    """Interval of the mean of ``differences`` (seeds, images), where both seeds *and* images are random samples.

    Variance components (Cornfield and Tukey 1956): that of the images is the mean covariance between seeds. Degrees of
    freedom by Satterthwaite (1946). In simulations the interval covers the truth in 94 to 96 % of cases with five seeds
    and in 86 to 93 % with two.
    """
    seeds, images = differences.shape
    if seeds < 2 or images < 2:
        return interval(differences.mean(1))
    covariance = np.cov(differences)
    of_images = max(0.0, (covariance.sum() - covariance.trace()) / (seeds * (seeds - 1))) / images
    of_seeds = max(differences.mean(1).var(ddof=1) / seeds, 1e-3 * of_images)  # nonzero: it is a divisor
    both = of_seeds + of_images
    return interval(differences.mean(1), both**0.5, (seeds - 1) * (both / of_seeds) ** 2 if both else None)


# ================================================================ 6. checkpoints

CHECKPOINT = "small-cv-lab 3"


def save_checkpoint(path: Path, model: nn.Module, data: Dataset, recipe: Recipe, **facts: Any) -> None:
    """Save the weights and all that is needed to rebuild the network, with ``facts`` such as seed and accuracy."""
    about = {"format": CHECKPOINT, "recipe": asdict(recipe), "input": list(data.train_images.shape[1:])}
    about |= {"dataset": data.name, "source": data.source, "fingerprint": data.fingerprint, "classes": data.classes}
    write(path, about | facts | {"state": {key: value.cpu() for key, value in model.state_dict().items()}})


def read_tensors(path: Path) -> Any:
    """Load what ``torch.save`` wrote to ``path`` without executing code from it; raises UserError."""
    if not path.is_file():
        raise UserError(f"no checkpoint {path}")
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception:  # torch.load may raise anything, with advice to execute the file's code
        raise UserError(f"{path} is damaged, or not a checkpoint of tensors saved by torch") from None


def load_checkpoint(path: Path, model: str | None = None) -> tuple[nn.Sequential, Row]:
    """(network in eval mode, the facts saved with it) as saved by ``save_checkpoint``; raises UserError.

    A checkpoint imports nothing by itself: one of a custom network is loaded only if ``model`` names that network.
    """
    content = read_tensors(path)
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT:
        raise UserError(f"{path} is not a checkpoint of this version of the lab: train it again")
    with user_error(f"{path} is damaged"):
        recipe, images = Recipe(**content["recipe"]), torch.zeros(1, *content["input"], dtype=torch.uint8)
        if ":" in recipe.model and recipe.model != model:
            raise UserError(f"{path} holds a network of {recipe.model}: name it with --model")
        about = content["dataset"], content["source"], content["classes"]
        loaded = make_model(recipe, Dataset(*about, images, torch.zeros(1), images, torch.zeros(1)))
        loaded.load_state_dict(content.pop("state"))
    return loaded.eval(), content | {"recipe": recipe}


# ================================================================ 7. worker processes


class WorkerDied(UserError):
    """A worker process died in the middle of a job."""


def _work(connection: Any, path: Path, runtime: Runtime) -> None:
    """A worker's main loop: run one generator after another, sending what it yields, until the parent is gone."""

    def end_with_parent() -> None:  # in the middle of an epoch, too
        parent = multiprocessing.parent_process()
        if parent:
            parent.join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    threading.Thread(target=end_with_parent, daemon=True).start()
    make_runtime(*runtime)
    data = Dataset(**torch.load(path, mmap=True, weights_only=True))
    with contextlib.suppress(EOFError, OSError):
        while True:
            function, arguments = connection.recv()
            job = function(data, runtime, *arguments)
            try:
                connection.send(("row", next(job)))
                while connection.recv():  # the parent wants more
                    connection.send(("row", next(job)))
                job.close()
            except StopIteration as end:
                connection.send(("result", end.value))
            except Exception as error:
                text = f"a worker failed with {type(error).__name__}: {first_line(error)}"
                connection.send(("error", error if isinstance(error, UserError) else UserError(text)))


class Workers:
    """Up to ``count`` processes that share the data set at ``path``, started on demand."""

    def __init__(self, count: int, runtime: Runtime, path: Path) -> None:
        self.count, self.path, self.runtime = count, path, runtime._replace(threads=1)
        self.processes: list[Any] = []
        self.free: queue.SimpleQueue[Any] = queue.SimpleQueue()  # (process, connection), or None: not started yet
        for _ in range(count):
            self.free.put(None)

    def _start(self) -> tuple[Any, Any]:
        context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads in any state
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self.path, self.runtime), daemon=True)
        with contextlib.ExitStack() as stack:  # no Ctrl-C while the worker starts, either
            if hasattr(signal, "pthread_sigmask"):  # not on Windows
                multiprocessing.resource_tracker.ensure_running()  # now, because starting it unblocks Ctrl-C
                before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, before)
            process.start()
        theirs.close()
        self.processes.append(process)
        return process, ours

    def run(self, function: Callable[..., Generator[Any, Any, Any]], *arguments: Any) -> Generator[Any, None, Any]:
        """Run the generator ``function(data, runtime, *arguments)`` in a free worker; yields and returns what it does.

        Closing this generator ends the job, too. Raises WorkerDied if the worker dies, UserError for any error in it.
        """
        worker = self.free.get()
        try:
            worker = worker if worker and worker[0].is_alive() else None
            worker = process, connection = worker or self._start()
            connection.send((function, arguments))
            while True:
                kind, content = connection.recv()
                if kind == "error":
                    raise content
                if kind == "result":
                    return content
                try:
                    yield content
                except GeneratorExit:
                    connection.send(False)
                    raise
                connection.send(True)
        except (EOFError, OSError):
            if worker is None:  # it could not be started
                raise
            process.join(1)
            text = f"a worker process ended with status {process.exitcode} (out of memory? try fewer --workers)"
            raise WorkerDied(text) from None
        finally:
            self.free.put(worker)

    def stop(self) -> None:
        """Kill all processes, whatever they are doing."""
        for process in self.processes:
            process.kill()
            process.join()


# ================================================================ 8. results and figures

# The colour-blind-safe palette of Okabe and Ito; a thing has the same colour in every figure.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
STYLE: Any = {"font.size": 13, "lines.linewidth": 2.2, "legend.frameon": False, "axes.grid": True, "grid.alpha": 0.3}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path that replaces ``path`` if the block succeeds; failing to write is a UserError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        with user_error(f"{path} cannot be written", OSError, RuntimeError):  # of torch, if the disk is full
            yield temporary
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, content: Any) -> None:
    """Write ``content`` atomically, by suffix: a DataFrame (.csv), JSON, tensors (.pt, .pth) or text.

    In JSON, nan and infinity become null, NumPy scalars numbers, and paths strings.
    """
    with atomic_path(path) as temporary:
        if path.suffix == ".csv":
            content.to_csv(temporary, index=False)
        elif path.suffix in (".pt", ".pth"):
            torch.save(content, temporary)
        else:
            if path.suffix == ".json":
                text = json.dumps(content, default=lambda x: x.item() if isinstance(x, np.generic) else str(x))
                plain = json.loads(text, parse_constant=lambda _: None)
                content = json.dumps(plain, indent=2, ensure_ascii=False) + "\n"
            temporary.write_text(content, encoding="utf-8", errors="backslashreplace")  # paths may hold any bytes


def within_lab(path: Path) -> Path:
    """``path``, relative to the lab's folder if it lies inside."""
    return path.resolve().relative_to(ROOT) if path.resolve().is_relative_to(ROOT) else path


def environment(runtime: Runtime) -> Row:
    """The software and hardware that results may depend on."""
    commit, cpu = None, platform.processor()
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # no git, or no repository
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10).stdout.strip() or None
    with contextlib.suppress(OSError, IndexError):
        cpu = re.findall("model name\t: (.*)", Path("/proc/cpuinfo").read_text())[0]
    facts: Row = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    facts |= {"cpu": cpu, "cores": usable_cores(), "git_commit": commit, "gpu": None}
    facts["cpu_capabilities"] = [name for name, there in torch.cpu.get_capabilities().items() if there is True]
    if runtime.device.startswith("cuda"):
        facts["gpu"] = torch.cuda.get_device_name(runtime.device)
    wanted = ("torch", "torchvision", "numpy", "pandas", "scipy", "pillow", "optuna", "onnx", "onnxruntime")
    found = {d.name.lower(): d.version for d in importlib.metadata.distributions() if d.name}
    facts["packages"] = {name: found[name] for name in wanted if name in found}
    return facts | runtime._asdict()


@dataclass(eq=False)
class Run:
    """A run of a script; its data lack the test images. ``finish`` moves the files in ``folder`` to ``output``."""

    options: argparse.Namespace
    data: Dataset
    runtime: Runtime
    workers: Workers
    bar: Any
    output: Path
    folder: Path
    environment: Row
    started: float = field(default_factory=time.perf_counter)

    def stage(self, title: str, images: float = 0) -> None:
        """Announce the next stage and add its ``images``, those to train on, to the progress bar's total."""
        self.bar.total += images
        self.bar.set_description(title)
        if self.bar.disable:  # no terminal
            print(f"[{time.perf_counter() - self.started:4.0f} s] {title}", flush=True)

    def train(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Row]]:
        """Run ``train_job`` for all jobs in the workers; yields (index of the job, result) in order of completion."""

        def finish(number: int) -> tuple[int, Row]:
            rows, images = self.workers.run(train_job, jobs[number]), len(jobs[number].split(self.data).train)
            left = jobs[number].recipe.epochs
            while True:
                try:
                    next(rows)
                except StopIteration as end:
                    self.bar.update(images * left)  # for epochs of a training that ended early
                    return number, end.value
                self.bar.update(images)
                left -= 1

        try:
            with multiprocessing.pool.ThreadPool(self.workers.count) as pool:
                yield from pool.imap_unordered(finish, range(len(jobs)))
        except BaseException:  # the remaining jobs are not wanted any more
            self.workers.stop()
            raise

    def table(self, name: str, frame: Any) -> None:
        """Write a DataFrame as CSV."""
        write(self.folder / name, frame)

    @contextlib.contextmanager
    def figure(self, name: str, title: str, rows: int = 1, columns: int = 1, size: Any = (8, 5)) -> Iterator[Any]:
        """(figure, array of axes), saved when the block ends; a figure that fails is a NOTE, not an error."""
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure  # without pyplot: its backend may not be installed

        try:
            with rc_context(STYLE), warnings.catch_warnings(), atomic_path(self.folder / name) as temporary:
                warnings.filterwarnings("ignore", "Glyph .* missing from")  # in class names: drawn as boxes
                drawing = FigureCanvasAgg(Figure(figsize=size, layout="constrained")).figure
                yield drawing, drawing.subplots(rows, columns, squeeze=False)
                lines = [textwrap.fill(line, int(8.7 * size[0])) for line in title.splitlines()]  # letters per inch
                drawing.suptitle("\n".join(lines), fontsize=15, parse_math=False)  # names may hold dollar signs
                drawing.savefig(temporary, dpi=110)
        except Exception as error:
            print(f"NOTE: {name} could not be drawn: {type(error).__name__}: {first_line(error)}", file=sys.stderr)

    def finish(self, summary: Row, report: Sequence[str], keep: Sequence[str] = ()) -> None:
        """Write summary and report (paragraphs), publish all files; an earlier run's, but ``keep``, go to previous/."""
        facts = {"dataset": self.data.name, "source": self.data.source, "fingerprint": self.data.fingerprint}
        actual = {"workers": self.workers.count, "data_dir": within_lab(self.options.data_dir)}
        here, seconds = self.environment, time.perf_counter() - self.started
        # Of URLs neither user, password nor query.
        arguments = [re.sub(r"(://)(?:.*@)?([^?]*).*", r"\1\2", argument) for argument in sys.argv[1:]]
        command = shlex.join([str(within_lab(Path(sys.argv[0]))), *arguments])
        how = f"    python {command}\n\n{seconds / 60:.1f} minutes, commit {here['git_commit'] or 'unknown'}; "
        how += f"{here['gpu'] or here['cpu']}, {here['cores']} cores, {here['precision']}; Python {here['python']}; "
        how += ", ".join(f"{name} {version}" for name, version in here["packages"].items())
        write(self.folder / "config.json", vars(self.options) | actual)
        write(self.folder / "environment.json", here)
        write(self.folder / "summary.json", facts | summary | {"wall_seconds": seconds})
        write(self.folder / "report.md", "\n\n".join([*report, "## Command and environment", how]) + "\n")
        self.bar.close()
        previous, new = self.output / "previous", {path.name for path in self.folder.iterdir()}
        files = [path for path in self.output.iterdir() if path.is_file() and path.name[0] != "."]
        is_ours = {"config.json", "environment.json", "summary.json"} <= {path.name for path in files}
        if is_ours:
            shutil.rmtree(previous, ignore_errors=True)
        for path in files:  # all files of an earlier run; in any other folder only those to be overwritten
            if path.name not in keep and (is_ours or path.name in new):
                previous.mkdir(exist_ok=True)
                path.replace(previous / path.name)
        for path in self.folder.iterdir():
            path.replace(self.output / path.name)
        names = sorted(path.name for path in self.output.iterdir() if path.is_file() and path.name[0] != ".")
        names.sort(key=lambda name: name != "report.md")
        print(f"\nWritten to {self.output}:\n{textwrap.indent(textwrap.fill(', '.join(names), 96), '  ')}")


@contextlib.contextmanager
def open_run(options: argparse.Namespace, data: Dataset) -> Iterator[Run]:
    """Lock the output folder for one run and share ``data``, without the test images, with worker processes."""
    from filelock import FileLock
    from tqdm import tqdm

    output, folder, shared = (options.output_dir / name for name in ("", "unfinished_run", ".dataset.pt"))
    runtime = make_runtime(options.device, options.precision, usable_cores())
    count = min(usable_cores(), 4) if runtime.device.startswith("cuda") else usable_cores()
    workers = Workers(options.workers or count, runtime, shared)
    unseen = replace(data, test_images=data.test_images[:0].clone(), test_labels=data.test_labels[:0].clone())
    lock = FileLock(output / ".lock", timeout=0)
    with user_error(f"--output-dir {output} cannot be used, or another run is writing to it", OSError):
        output.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    try:
        write(shared, vars(unseen))
        size = f"{len(data.train_labels):,} training images"
        print(f"{data.source}: {size}; {runtime.device}, {runtime.precision}, {workers.count} worker process(es)")
        form = "{desc} |{bar}| {percentage:3.0f} % [{elapsed}, {remaining} left]"
        with tqdm(total=0, disable=None, bar_format=form, smoothing=0.05) as bar:
            yield Run(options, unseen, runtime, workers, bar, output, folder, environment(runtime))
    finally:
        workers.stop()
        with contextlib.suppress(OSError):  # on Windows, while somebody else's worker has it open
            shared.unlink(missing_ok=True)
        if any(folder.iterdir()):
            print(f"partial results are in {folder}", file=sys.stderr)
        else:
            folder.rmdir()
        lock.release()
