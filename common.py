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
import json
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import pkgutil
import platform
import queue
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
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

if "OMP_WAIT_POLICY" not in os.environ:  # waiting threads soon sleep: spinning, they take the cores from other programs
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent
Row = dict[str, Any]

# ================================================================ 1. options and errors


class UserError(Exception):
    """Something that the user can put right: shown as one line, exit status 2, no traceback."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, as a queue or a container's end sends it: handled like Ctrl-C, exit status 143."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def script(main: Callable[[Sequence[str] | None], int]) -> Callable[[Sequence[str] | None], int]:
    """Decorate a script's ``main``: errors of the user, Ctrl-C and SIGTERM become one line and an exit status."""

    def terminate(*_: object) -> None:
        raise Terminated

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> int:
        sys.stdout.reconfigure(errors="backslashreplace") if hasattr(sys.stdout, "reconfigure") else None  # odd locales
        before = signal.signal(signal.SIGTERM, terminate)
        try:
            return main(argv)
        except (UserError, OSError) as error:
            text = str(error) if isinstance(error, UserError) else f"{error.strerror or error}: {error.filename or ''}"
            print(f"error: {text.rstrip(': ')}", file=sys.stderr)
            return 2
        except KeyboardInterrupt as error:
            terminated = isinstance(error, Terminated)
            print("terminated" if terminated else "interrupted", file=sys.stderr)
            return 143 if terminated else 130
        finally:
            signal.signal(signal.SIGTERM, before)

    return guarded


@dataclass(frozen=True)
class Recipe:
    """A network (SmallCNN, PlainCNN or MODULE:CALLABLE) and how to train it."""

    model: str = "SmallCNN"
    width: int = 32
    growth: tuple[int, ...] = (1, 4, 4)  # channels of SmallCNN's stages, in multiples of width
    stem_stride: int = 1
    batch_norm: bool = True  # PlainCNN's
    dropout: float = 0.0
    optimizer: str = "SGD+nesterov"
    lr: float | None = 1.0  # None: the framework's default
    weight_decay: float = 5e-4
    label_smoothing: float = 0.2
    crop_padding: int = 2  # the largest shift of an image in pixels; 0: no augmentation, no flips either
    batch_size: int = 512
    epochs: int = 10
    schedule: str = "one_cycle"


# Points on the line of accuracy against arithmetic, chosen on validation images (tests/benchmark_training.py).
PRESETS = {
    "small": Recipe(stem_stride=2, optimizer="Muon", lr=0.05, epochs=5, crop_padding=1, label_smoothing=0.1),
    "medium": Recipe(optimizer="Muon", lr=0.05, epochs=7),
    "large": Recipe(width=48, epochs=15),
}


def number(kind: type = int, low: float = 1, high: float = 2**31 - 1) -> Callable[[str], Any]:
    """An argparse type: a number from ``low`` to ``high``, or with ``kind`` Path a path that is not empty."""

    def convert(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if text and (kind is Path or low <= kind(text) <= high):
                return kind(text)
        what = "a path" if kind is Path else f"a{' whole' * (kind is int)} number from {low:g} to {high:g}"
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")

    return convert


def add_common_args(parser: argparse.ArgumentParser, presets: bool = False, **defaults: Any) -> None:
    """Add the options that all scripts have; ``defaults`` are a script's own. With ``presets`` there is --preset."""
    add = parser.add_argument_group("common to all scripts").add_argument
    shown = "(default: the preset's)" if presets else "(default: %(default)s)"
    add("--dataset", help="fashion_mnist, cifar10, or a folder {train,test}/<class>/* of images")
    add("--data-dir", type=number(Path), default=ROOT / "data", help="where the data sets are (default: ./data)")
    add("--output-dir", type=number(Path), help="where the results go (default: ./%(default)s)")
    add("--model", metavar="MODULE:CALLABLE", help="a network of your own, such as torchvision.models:resnet18")
    add("--images", type=number(), metavar="N", help="train on N images of all classes (default: all)")
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
    add("--quick", action="store_true", help="try everything on a few images, in seconds")
    parser.set_defaults(**defaults)


def recipe_from(options: argparse.Namespace, base: Recipe) -> Recipe:
    """``base`` with what the command line changes of it: model, width, epochs, batch size."""
    given = {name: getattr(options, name) for name in ("model", "width", "epochs", "batch_size")}
    if options.model and options.width not in (None, base.width):
        print("NOTE: --width is ignored: only the lab's own networks have it", file=sys.stderr)
    return replace(base, **{name: value for name, value in given.items() if value is not None})


class Runtime(NamedTuple):
    """Where and how to compute: ``precision`` is fp32 or bf16, ``threads`` are those of one process."""

    device: str
    precision: str
    threads: int


def usable_cores() -> int:
    """The cores that this process may use: its affinity, and a container's share (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # the quota may be "max"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def make_runtime(device: str = "auto", precision: str = "auto", threads: int = 1) -> Runtime:
    """Choose device and precision by capability and set this process's threads; raises UserError for no such device.

    bf16 is chosen only where the hardware multiplies it natively: elsewhere it is emulated and slower than fp32.
    """
    device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.empty(1, device=device).device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("neither a cpu, cuda nor mps device")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {device} cannot be used here: {first_line(error).split('. ')[0]}") from None
    if precision == "auto":
        found = torch.cpu.get_capabilities() if device == "cpu" else {}
        native = any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        native |= device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if native else "fp32"
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    with contextlib.suppress(OSError, AttributeError):  # glibc shall keep freed activations: page faults are slow
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX, see mallopt(3)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    return Runtime(device, precision, threads)


def derive_seed(seed: int, *stage: int) -> int:
    """A seed of its own for every stage and repetition of a run: no two values of --seed share any."""
    return int(np.random.SeedSequence([seed, *stage]).generate_state(1, np.uint64)[0] >> 1)


# ================================================================ 2. data

VALIDATION_FRACTION, VALIDATION_SEED = 0.1, 2024
MORE_SUFFIXES = (".jfif", ".jpe", ".gif", ".avif", ".jp2", ".tga", ".dib", ".pbm", ".pnm")  # beside torchvision's
DECODER = "3"  # raise it when decoding changes: caches are then made anew


@dataclass(frozen=True, eq=False)
class Dataset:
    """One data set in memory; ``source`` is one phrase for consoles and plot titles."""

    name: str
    source: str
    classes: tuple[str, ...]
    train_images: Tensor  # uint8 (N, C, H, W), channels_last: a crop copies whole pixels
    train_labels: Tensor  # int64 (N,)
    test_images: Tensor
    test_labels: Tensor

    @functools.cached_property
    def fingerprint(self) -> str:
        """A checksum of classes, training images and labels: other data at the same path have another one."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for tensor in (self.train_images.permute(0, 2, 3, 1), self.train_labels):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()[:16]


def load_data(options: argparse.Namespace) -> Dataset:
    """The data set of the options; without --dataset CIFAR-10 where it can be had, else embedded Fashion-MNIST."""
    try:
        return load_dataset(options.dataset or "cifar10", options.data_dir, options.image_size)
    except UserError as error:
        if options.dataset:
            raise
        print(f"NOTE: {error}\nNOTE: running on the embedded Fashion-MNIST instead of CIFAR-10.", file=sys.stderr)
        return load_dataset("fashion_mnist", image_size=options.image_size)


def load_dataset(name: str, data_dir: Path = ROOT / "data", image_size: int | None = None) -> Dataset:
    """Load ``fashion_mnist``, ``cifar10`` or a folder of images; raises UserError, in one line."""
    loaders = {"fashion_mnist": load_fashion_mnist, "cifar10": load_cifar10}
    if name not in loaders and not Path(name).is_dir():
        raise UserError(f"--dataset {name}: neither fashion_mnist, cifar10 nor a folder of images")
    source, classes, *pairs = (
        loaders[name](data_dir, image_size) if name in loaders else load_folder(Path(name), image_size)
    )
    tensors = []
    for images, labels in pairs:
        if image_size not in (None, images.shape[-1]):
            parts = [F.interpolate(part, image_size, mode="bilinear", antialias=True) for part in images.split(1000)]
            images = torch.cat(parts)
        tensors += [images.contiguous(memory_format=torch.channels_last), labels.long()]
    return Dataset(name, source, tuple(classes), *tensors)


def load_fashion_mnist(data_dir: Path, _: int | None) -> tuple[Any, ...]:
    """Fashion-MNIST from the four published .gz files of ``data_dir``, or else of the repository; MD5 checked.

    Returns, as the other loaders do, (source, class names, (training images, labels), (test images, labels)).
    """
    from torchvision.datasets import FashionMNIST

    own, parts = data_dir / "FashionMNIST" / "raw", []
    folder = own if own.is_dir() else ROOT / "data" / "FashionMNIST" / "raw"
    for name, md5 in FashionMNIST.resources:  # training images, training labels, test images, test labels
        content = (folder / name).read_bytes() if (folder / name).is_file() else b""
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
            state = "is not the published file (MD5 differs)" if content else "is missing"
            raise UserError(f"Fashion-MNIST: {folder / name} {state}; `git checkout data` restores it")
        values = torch.frombuffer(bytearray(gzip.decompress(content)), dtype=torch.uint8)
        parts.append(values[16:].view(-1, 1, 28, 28) if "images" in name else values[8:])
    source = "Fashion-MNIST, embedded" if folder.is_relative_to(ROOT) else "Fashion-MNIST"
    return source, FashionMNIST.classes, parts[:2], parts[2:]


def load_cifar10(data_dir: Path, image_size: int | None) -> tuple[Any, ...]:
    """CIFAR-10: torchvision's archive or folder in ``data_dir``, the image folder ``cifar10``, or a download."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    archive, folder, images = (data_dir / name for name in (CIFAR10.filename, CIFAR10.base_folder, "cifar10"))
    if archive.exists() and not check_integrity(str(archive), CIFAR10.tgz_md5):
        raise UserError(f"{archive} ({archive.stat().st_size:,} bytes) is damaged or another file: move it away")
    if not archive.exists() and not folder.is_dir() and images.is_dir():
        return "CIFAR-10, image folder", *load_folder(images, image_size)[1:]
    timeout, is_new = socket.getdefaulttimeout(), not data_dir.exists()
    socket.setdefaulttimeout(10)  # a firewalled network never answers
    try:
        with contextlib.redirect_stdout(sys.stderr):  # an archive that is there is only unpacked
            download = archive.exists() or not folder.is_dir()
            splits = [CIFAR10(str(data_dir), train, download=download) for train in (True, False)]
    except Exception as error:  # whatever a proxy, a server or a damaged file leads to
        if folder.is_dir():
            raise UserError(f"{folder} differs from the published files ({first_line(error)}): move it away") from None
        if is_new and data_dir.is_dir() and not any(data_dir.iterdir()):
            data_dir.rmdir()
        there = f"neither {folder.name}, nor {archive.name}, nor the image folder cifar10 in {data_dir}"
        text = f"no CIFAR-10: {there}, and the download failed ({first_line(error)}); or use --dataset fashion_mnist"
        raise UserError(text) from None
    finally:
        socket.setdefaulttimeout(timeout)
    pairs = [(torch.from_numpy(split.data).permute(0, 3, 1, 2), torch.tensor(split.targets)) for split in splits]
    return "CIFAR-10", splits[0].classes, *pairs


def load_folder(folder: Path, image_size: int | None) -> tuple[Any, ...]:
    """``folder/{train,test}/<class>/*`` as square RGB images (32 pixels), decoded once and kept in the user's cache.

    Raises UserError for a missing split, an empty class, classes that differ between the splits, or an unreadable
    image. What is no image by its name is passed over and counted.
    """
    from platformdirs import user_cache_path
    from torchvision.datasets import folder as listing

    folder, size, skipped = folder.resolve(), image_size or 32, Counter[str]()
    suffixes = {*MORE_SUFFIXES, *listing.IMG_EXTENSIONS}

    def is_image(path: str) -> bool:
        hidden = any(part.startswith(".") for part in Path(path).relative_to(folder).parts)
        suffix = "hidden" if hidden else Path(path).suffix.lower() or "without suffix"
        skipped.update([] if suffix in suffixes else [suffix])
        return suffix in suffixes

    def readable(name: str) -> str:  # as UTF-8, whatever the locale; the same for both Unicode forms of a letter
        return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "replace"))

    names: list[dict[str, str]] = []  # of each split: {name of a folder: name of its class}
    for split in (folder / "train", folder / "test"):
        if not split.is_dir():
            raise UserError(f"{folder} is no image folder: it has no {split.name}/ with a folder per class")
        there = [entry.name for entry in os.scandir(split) if entry.is_dir() and entry.name[0] != "."]
        names.append({name: readable(name) for name in there})
    classes, others = (sorted(set(split.values())) for split in names)
    if classes != others or len(classes) < 2:
        raise UserError(f"{folder}: train/ and test/ need the same two or more classes, not {classes} and {others}")
    found: list[list[tuple[str, int]]] = []
    for split_name, shown, least in zip(("train", "test"), names, (2, 1), strict=True):
        labels = {name: classes.index(text) for name, text in shown.items()}
        found.append(listing.make_dataset(str(folder / split_name), labels, is_valid_file=is_image, allow_empty=True))
        counts = Counter(label for _, label in found[-1])
        for label, name in enumerate(classes):
            if counts[label] < least:
                raise UserError(f"class folder {folder / split_name / name}: {counts[label]} images, {least} needed")
    if skipped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in skipped.most_common())
        print(f"NOTE: passed over what is no image in {folder}: {kinds}", file=sys.stderr)
    files = [(path, label, Path(path).stat()) for items in found for path, label in items]
    key = ascii([DECODER, size, classes, *((path, label, s.st_size, s.st_mtime_ns) for path, label, s in files)])
    digest, place = (hashlib.sha256(text.encode()).hexdigest() for text in (key, ascii((str(folder), size))))
    cache, content = user_cache_path("small-cv-lab", appauthor=False) / f"{place[:16]}.pt", Row(key="")
    with contextlib.suppress(Exception):  # none there, or damaged: it is made anew
        content = torch.load(cache, weights_only=True)
    if content["key"] != digest:
        content = {"key": digest, "images": decode_images([path for path, _, _ in files], size)}
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(cache, content)
        except OSError as error:
            print(f"NOTE: the decoded images are not cached: {error}", file=sys.stderr)
    images = content["images"].split([len(items) for items in found])
    pairs = [(part, torch.tensor([y for _, y in items])) for part, items in zip(images, found, strict=True)]
    return f"{readable(folder.name)}, image folder", classes, *pairs


def decode_images(paths: Sequence[str], size: int) -> Tensor:
    """Decode image files of any size and mode into uint8 (N, 3, size, size), stored as NHWC.

    Transparent images are laid on white, EXIF rotation is applied, and images of more than 8 bits are scaled by as many
    bits as all of them together use (12-bit values are often stored in 16 bits).
    """
    from PIL import Image, ImageOps
    from tqdm import tqdm

    pixels, square = np.empty((len(paths), size, size, 3), np.uint8), (size, size)
    deep: dict[int, tuple[float, np.ndarray]] = {}  # (highest value, image) of those of more than 8 bits

    def decode(position: int) -> None:
        try:
            with Image.open(paths[position]) as file:
                file.load()
                image: Any = file
                with contextlib.suppress(Exception):  # a damaged EXIF block: the image decodes all the same
                    image = ImageOps.exif_transpose(file)
                if image.mode.startswith(("I", "F")):
                    values = Image.fromarray(np.asarray(image).astype(np.float32))
                    small = np.asarray(values.resize(square, Image.Resampling.LANCZOS))
                    deep[position] = float(np.max(values)), small
                    return
                if image.has_transparency_data:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                image = image.convert("RGB")
                pixels[position] = image if image.size == square else image.resize(square, Image.Resampling.LANCZOS)
        except Exception as error:  # Pillow's plugins raise almost anything
            raise UserError(f"unreadable image {ascii(paths[position])[1:-1]}: {first_line(error)}") from None

    with warnings.catch_warnings(), ThreadPoolExecutor(usable_cores()) as pool:
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        list(tqdm(pool.map(decode, range(len(paths))), "decoding images", len(paths), unit="image", disable=None))
    bits = int(max([255.0, *(highest for highest, _ in deep.values())])).bit_length()
    for position, (_, values) in deep.items():
        pixels[position] = (values * (255 / (2**bits - 1))).clip(0, 255).round()[..., None]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


class Split(NamedTuple):
    """Training images to train on and to select on (positions, int64), and the former's mean and std per channel."""

    train: Tensor
    validation: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]


@functools.lru_cache(maxsize=16)
def split_dataset(
    data: Dataset, images: int | None = None, validation: bool = True, seed: int = VALIDATION_SEED
) -> Split:
    """A fixed stratified split; at most ``images`` to train on and as many to select on, or none to select on.

    Every class is in every part, in proportion. Raises UserError for a class of fewer than two training images.
    """
    shuffled = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(seed))
    rank = torch.empty(len(shuffled), dtype=torch.float64)  # of every image within its class, in [0, 1)
    parts: list[list[Tensor]] = [[], []]
    for label, name in enumerate(data.classes):
        members = shuffled[data.train_labels[shuffled] == label]
        if len(members) < 2:
            raise UserError(f"class {name} needs two training images, one of them to select on")
        held = max(1, round(VALIDATION_FRACTION * len(members))) if validation else 0
        for part, chosen in zip(parts, (members[held:], members[:held]), strict=True):
            rank[chosen] = torch.arange(len(chosen), dtype=torch.float64) / max(1, len(chosen))
            part.append(chosen)
    whole = [torch.cat(part) for part in parts]
    train, held_out = (part[rank[part].argsort(stable=True)][:images] for part in whole)
    return Split(train, held_out, *channel_statistics(data.train_images, train))


def channel_statistics(images: Tensor, index: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 (N, C, H, W) at ``index``, scaled to [0, 1].

    Over all pixels, not the mean of per-image deviations (whence CIFAR-10's often-copied 0.2023, 0.1994, 0.2010).
    """
    sums = torch.zeros(2, images.shape[1], dtype=torch.float64)
    for part in index.split(1000):
        pixels = images[part].transpose(0, 1).flatten(1).double() / 255
        sums += torch.stack([pixels.sum(1), pixels.square().sum(1)])
    mean, square = sums / (len(index) * images[0, 0].numel())
    return tuple(mean.tolist()), tuple((square - mean**2).clamp_min(0).sqrt().clamp_min(1 / 255).tolist())


# ================================================================ 3. networks

LOGIT_SCALE = 1 / 9  # keeps the first logits and the head's first steps small (Jordan 2024)


class Normalise(nn.Module):
    """Images float32 (N, C, H, W) in [0, 1] -> standardised; grey ones get as many channels as there are constants.

    The constants are buffers: an exported file cannot disagree with training.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean, self.std = (nn.Buffer(torch.tensor(values)[:, None, None]) for values in (mean, std))

    def forward(self, images: Tensor) -> Tensor:
        """(images - mean) / std."""
        return (images - self.mean) / self.std


class PlainCNN(nn.Sequential):
    """The textbook network: convolution, pooling, (BatchNorm,) ReLU, twice, then one linear layer.

    Pooling comes before ReLU: without BatchNorm that is the same function, and a quarter faster.
    Input float32 (N, C, H, W), output logits (N, num_classes). torch's own initialisation, every weight trained.
    """

    def __init__(self, channels: int, num_classes: int, image_size: int, recipe: Recipe) -> None:
        layers: list[nn.Module] = []
        for out in (recipe.width, 2 * recipe.width):
            norm = [nn.BatchNorm2d(out)] if recipe.batch_norm else []
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.MaxPool2d(2), *norm, nn.ReLU()]
            channels = out
        super().__init__(*layers, nn.Flatten(), nn.Linear(channels * (image_size // 4) ** 2, num_classes))


class SmallCNN(nn.Module):
    """The fast network: input float32 (N, C, H, W), standardised; output logits (N, num_classes).

    A fixed stem whitens patches (after Page's and Jordan's CIFAR-10 speed runs; it needs no backward pass): 2x2 pixels
    at every position, or with ``stem_stride`` 2 4x4 pixels at every other one. Then stages of two 3x3 convolutions and
    global max-pooling, so that any image size fits. Pooling *before* BatchNorm and ReLU leaves those a quarter of the
    pixels. BatchNorm learns a shift but no scale: a positive scale commutes with max-pooling and can be folded.
    """

    def __init__(self, channels: int, num_classes: int, recipe: Recipe) -> None:
        super().__init__()
        stride, directions = recipe.stem_stride, 8 * recipe.stem_stride * channels  # the strongest, with both signs
        self.stem = nn.Conv2d(channels, directions, 2 * stride, stride, bias=False).requires_grad_(False)
        layers: list[nn.Module] = [nn.ReLU()]
        channels = directions
        for out in (recipe.width * factor for factor in recipe.growth):
            for pool in ([nn.MaxPool2d(2)], []):
                convolution = nn.Conv2d(channels, out, 3, padding=1, bias=False)
                nn.init.dirac_(convolution.weight[: min(channels, out)].data)
                norm = nn.BatchNorm2d(out, momentum=0.4)  # a short training has few steps to average over
                norm.weight.requires_grad_(False)
                layers += [convolution, *pool, norm, nn.ReLU()]
                channels = out
        self.features, self.dropout = nn.Sequential(*layers), nn.Dropout(recipe.dropout)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes)."""
        return LOGIT_SCALE * self.head(self.dropout(self.features(self.stem(images)).amax((2, 3))))

    @torch.no_grad()
    def whiten_stem(self, images: Tensor) -> None:
        """Set the stem to the first principal directions of patches of ``images``, scaled to unit variance.

        Each direction is used with both signs, because the ReLU that follows keeps one half of each.
        """
        patches = (
            F.unfold(images, self.stem.kernel_size, stride=self.stem.stride).transpose(1, 2).flatten(0, 1).double()
        )
        variance, directions = torch.linalg.eigh(patches.T @ patches / len(patches))  # ascending
        filters = (directions / (variance.clamp_min(0) + 5e-4).sqrt()).T.flip(0)[: self.stem.out_channels // 2]
        self.stem.weight.copy_(torch.cat([filters, -filters]).view_as(self.stem.weight))


def make_model(recipe: Recipe, data: Dataset, split: Split | None = None, seed: int = 0) -> nn.Sequential:
    """``Normalise`` and the network of ``recipe``, its initial weights a function of ``seed`` alone; channels_last.

    Without ``split`` the constants are placeholders, for weights to be loaded. A network of the user's own gets three
    channels (grey images are repeated). Raises UserError where --model or --width name no network.
    """
    (channels, _, size), classes = data.train_images.shape[1:], len(data.classes)
    mean, std = (split.mean, split.std) if split else ((0.0,) * channels, (1.0,) * channels)
    if ":" not in recipe.model and recipe.width % 16:
        raise UserError(f"--width {recipe.width} is no multiple of 16")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if recipe.model == "PlainCNN":
            network: Any = PlainCNN(channels, classes, size, recipe)
        elif recipe.model == "SmallCNN":
            network = SmallCNN(channels, classes, recipe)
        else:
            sys.path[:0] = [] if str(Path.cwd()) in sys.path else [str(Path.cwd())]
            try:
                network = pkgutil.resolve_name(recipe.model)(num_classes=classes)
                mean, std = mean * (3 // channels), std * (3 // channels)
                if not isinstance(network, nn.Module):
                    raise TypeError(f"it gives a {type(network).__name__}, not a torch.nn.Module")
            except Exception as error:  # the user's code may raise anything
                text = f"--model {recipe.model} cannot be made: {type(error).__name__}: {first_line(error)}"
                raise UserError(text) from None
    model = nn.Sequential(Normalise(mean, std), network)
    if isinstance(network, SmallCNN) and split:
        few = split.train[:: max(1, len(split.train) // 2000)]
        network.whiten_stem(model[0](data.train_images[few].float() / 255))
    return model.to(memory_format=torch.channels_last)


def check_recipe(recipe: Recipe, data: Dataset, split: Split) -> None:
    """Let a network take one step, so that it is refused here (UserError) and not in the middle of an experiment."""
    model, few, here = (
        make_model(recipe, data, split),
        split.train[: min(2, recipe.batch_size)],
        Runtime("cpu", "fp32", 1),
    )
    make_optimizer(recipe, model)
    try:
        next(train_epochs(model, data, recipe, here, few))
        shape = tuple(predict(model, data.train_images, here, few).shape)
        if shape != (len(few), len(data.classes)):
            raise ValueError(f"{len(few)} images give outputs of shape {shape} for {len(data.classes)} classes")
    except Exception as error:  # somebody's network may raise anything
        size = "x".join(map(str, data.train_images.shape[1:]))
        what = f"{recipe.model} with {recipe.optimizer} and batches of {len(few)} or more"
        raise UserError(f"{what} cannot be trained on {size} images: {first_line(error)}") from None


# ================================================================ 4. training

# A schedule is the learning rate's factor at shares of all steps, linear between them.
SCHEDULES: Any = {"one_cycle": ([0, 0.25, 1], [0.02, 1, 0]), "linear": ([0, 1], [1, 0]), "constant": ([0, 1], [1, 1])}
MUON_MOMENTUM = 0.9


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer: Muon or a class of torch.optim, +momentum or +nesterov meaning momentum 0.9.

    Raises UserError for an unknown name, or where the optimizer takes neither its arguments nor this model.
    """
    base, plus, variant = recipe.optimizer.partition("+")
    extra: Any = {"": {}, "+momentum": {"momentum": 0.9}, "+nesterov": {"momentum": 0.9, "nesterov": True}}
    kinds = {name: kind for name, kind in vars(torch.optim).items() if isinstance(kind, type)} | {"Muon": Muon}
    for other in ("Optimizer", "LBFGS", "SparseAdam"):  # those ask for another loop or other weights
        kinds.pop(other, None)
    if base not in kinds or plus + variant not in extra:
        known = ", ".join(sorted(kinds))
        raise UserError(f"unknown optimizer {recipe.optimizer!r}: one of {known}; SGD+momentum, SGD+nesterov")
    given = {"lr": recipe.lr, "weight_decay": recipe.weight_decay or None}
    settings = {name: value for name, value in given.items() if value is not None} | extra[plus + variant]
    try:
        return kinds[base]([weight for weight in model.parameters() if weight.requires_grad], **settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"optimizer {recipe.optimizer} cannot train this model: {first_line(error)}") from None


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for convolutions, AdamW for all other parameters, both at one learning rate.

    A kernel (O, I, H, W) is taken as a matrix (O, I * H * W), one row a filter, and moved by lr times the orthogonal
    matrix nearest to its averaged gradient. Afterwards every kernel is scaled to a norm of sqrt(O): BatchNorm makes its
    scale irrelevant, and so the rate alone says how far a step turns it. Weight decay is for the other parameters.
    (torch.optim.Muon takes nothing but matrices and computes in bf16, which processors without it only emulate.)
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        weights = [weight for group in self.param_groups for weight in group["params"]]
        self.kernels = [weight for weight in weights if weight.ndim == 4]
        self.averages = [torch.zeros_like(kernel) for kernel in self.kernels]
        others = [weight for weight in weights if weight.ndim != 4]
        self.adam = torch.optim.AdamW(others, lr, betas=(0.9, 0.95), weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; every kernel needs a gradient."""
        lr = self.param_groups[0]["lr"]
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        for kernel, average in zip(self.kernels, self.averages, strict=True):
            average.lerp_(kernel.grad, 1 - MUON_MOMENTUM)
            direction = kernel.grad.lerp(average, MUON_MOMENTUM)  # Nesterov's
            kernel -= lr * orthogonalise(direction.flatten(1)).view_as(kernel)
            kernel *= len(kernel) ** 0.5 / kernel.norm()


def orthogonalise(matrix: Tensor, steps: int = 3) -> Tensor:
    """A matrix with the singular vectors of ``matrix`` (R, C), its singular values all drawn towards 1.

    Newton and Schulz's iteration with the quintic of Jordan et al. 2024, which ends near 1 rather than at it.
    """
    matrix = matrix / matrix.norm().clamp_min(1e-7)
    for _ in range(steps):
        gram = matrix @ matrix.T
        matrix = 3.4445 * matrix + (-4.7750 * gram + 2.0315 * gram @ gram) @ matrix
    return matrix


def draw_batch(images: Tensor, index: Tensor, shift: Tensor | None = None, flip: Tensor | None = None) -> Tensor:
    """Gather images ``index`` (B,), mirrored where ``flip`` (B,) is true, then shifted: uint8 (B, C, H, W).

    ``shift`` (B, 2) int64 are pixels down and right (borders mirrored). All lie on one device and the result is
    channels_last: one gather of whole pixels, or of whole images where there is nothing to do.
    """
    stored = images.permute(0, 2, 3, 1)  # a view: images are stored as NHWC
    if shift is None or flip is None:
        return stored.index_select(0, index).permute(0, 3, 1, 2)
    height, width, channels = stored.shape[1:]

    def mirror(position: Tensor, size: int) -> Tensor:  # at the borders, without repeating the border pixel
        return size - 1 - (size - 1 - position.abs()).abs()

    rows, columns = (torch.arange(size, device=images.device) for size in (height, width))
    rows = mirror(rows + shift[:, :1], height)
    columns = mirror(torch.where(flip[:, None], width - 1 - columns, columns) + shift[:, 1:], width)
    pixel = (index[:, None, None] * height + rows[:, :, None]) * width + columns[:, None, :]
    batch = stored.reshape(-1, channels).index_select(0, pixel.flatten())
    return batch.view(len(index), height, width, channels).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=2)
def on_device(images: Tensor, device: str) -> Tensor:
    """``images`` on ``device``, put there once per process."""
    return images.to(device)


def train_epochs(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe,
    runtime: Runtime,
    index: Tensor,
    *,
    seed: int = 0,
    labels: Tensor | None = None,
) -> Iterator[Row]:
    """Train ``model`` in place on the training images ``index``; yields a row after every epoch.

    A row has epoch, train_loss (mean over the epoch's steps, as trained on: with augmentation and label smoothing),
    seconds (of training, summed from the start) and losses (of every step). ``labels`` (N,) replaces the training labels.
    Who has seen enough stops asking; a loss that is not finite ends the training. Nothing waits for the device within an
    epoch. Sets torch's global seed, for dropout.
    """
    device, bf16 = torch.device(runtime.device), runtime.precision == "bf16"
    model.to(device)
    images = on_device(data.train_images, runtime.device)
    targets = (data.train_labels if labels is None else labels).to(device)
    optimizer = make_optimizer(recipe, model)
    peaks = [group["lr"] for group in optimizer.param_groups]
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    first_flip = torch.rand(len(images), generator=generator) < 0.5
    size, padding, seconds = min(recipe.batch_size, len(index)), recipe.crop_padding, 0.0
    steps = len(index) // size  # of an epoch; the rest waits for the next shuffle
    for epoch in range(recipe.epochs):
        start = time.perf_counter()
        model.train()
        chosen = index[torch.randperm(len(index), generator=generator)]
        # An image mirrored in one epoch is not in the next (alternating flip, Jordan 2024).
        moves = (
            torch.randint(-padding, padding + 1, (len(chosen), 2), generator=generator),
            first_flip[chosen] ^ epoch % 2 > 0,
        )
        order, *moved = (tensor.to(device) for tensor in (chosen, *moves))
        losses = []
        for step in range(steps):
            part = slice(step * size, (step + 1) * size)
            batch = draw_batch(images, order[part], *(move[part] for move in moved if padding)).float().div_(255)
            factor = float(np.interp((epoch * steps + step) / (recipe.epochs * steps), *SCHEDULES[recipe.schedule]))
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = model(batch)
            loss = F.cross_entropy(logits.float(), targets[order[part]], label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        values = torch.stack(losses).tolist()  # the epoch's only wait for the device
        seconds += time.perf_counter() - start
        yield {"epoch": epoch + 1, "train_loss": float(np.mean(values)), "seconds": seconds, "losses": values}
        if not np.isfinite(values).all():
            return


@dataclass(frozen=True, eq=False)
class Job:
    """One training for a worker process (``train_job``); images, validation and split_seed as in ``split_dataset``."""

    recipe: Recipe
    seed: int
    images: int | None = None
    validation: bool = True
    split_seed: int = VALIDATION_SEED
    labels: Tensor | None = None  # (N,) int64, in the place of the training labels
    judged: int = 0  # on so many of the images trained on, the loss is measured at the end as well

    def split(self, data: Dataset) -> Split:
        """The images to train on and to select on."""
        return split_dataset(data, self.images, self.validation, self.split_seed)

    def restore(self, data: Dataset, state: dict[str, np.ndarray]) -> nn.Sequential:
        """The network that ``train_job`` trained, in eval mode."""
        model = make_model(self.recipe, data)
        model.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
        return model.eval()


def train_job(data: Dataset, runtime: Runtime, job: Job) -> Generator[Row, None, Row]:
    """Train one network in a worker; yields every epoch's row, with val_loss and val_accuracy where there is validation.

    Returns history (the rows), losses (of every step), state (the weights, numpy), val_right (bool (n,), by validation
    image, at the end) and, on the ``judged`` images, final_loss and final_accuracy, in eval mode.
    """
    split, labels = job.split(data), data.train_labels if job.labels is None else job.labels
    model = make_model(job.recipe, data, split, job.seed)
    result: Row = {"history": [], "losses": []}
    for row in train_epochs(model, data, job.recipe, runtime, split.train, seed=job.seed, labels=labels):
        result["losses"] += row.pop("losses")
        if job.validation:  # on the true labels
            truth = data.train_labels[split.validation]
            row["val_loss"], result["val_right"] = score(
                predict(model, data.train_images, runtime, split.validation), truth
            )
            row["val_accuracy"] = float(result["val_right"].mean())
        result["history"].append(row)
        yield row
    if job.judged:
        few = split.train[: job.judged]
        result["final_loss"], right = score(predict(model, data.train_images, runtime, few), labels[few])
        result["final_accuracy"] = float(right.mean())
    return result | {"state": {key: value.cpu().numpy() for key, value in model.state_dict().items()}}


# ================================================================ 5. evaluation


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, runtime: Runtime, index: Tensor | None = None) -> Tensor:
    """Logits float32 (N, num_classes) on the CPU, of uint8 images (N, C, H, W) or those at ``index``; in eval mode."""
    device = torch.device(runtime.device)
    model.to(device).eval()
    outputs = []
    for chunk in (torch.arange(len(images)) if index is None else index).split(500):
        with torch.autocast(device.type, torch.bfloat16, enabled=runtime.precision == "bf16"):
            outputs.append(model(images[chunk].to(device).float().div_(255)).float())
    return torch.cat(outputs).cpu()


def score(logits: Tensor, labels: Tensor) -> tuple[float, np.ndarray]:
    """(mean cross-entropy in nats, which images are right: bool (N,)) of logits (N, num_classes)."""
    return float(F.cross_entropy(logits, labels)), (logits.argmax(1) == labels).numpy()


class Estimate(NamedTuple):
    """A mean with its 95 % interval, p-value (two-sided, against 0) and number of repetitions."""

    mean: float
    low: float
    high: float
    p: float
    n: int


def interval(values: Any, error: float | None = None) -> Estimate:
    """Student's t interval of the mean of ``values`` (n,), whose standard error may be given.

    Unbounded where n < 2, or where all values are equal: neither is certainty.
    """
    from scipy import stats

    n, mean = len(values), float(np.mean(values))
    error = float(stats.sem(values)) if error is None and n > 1 else error or 0.0
    if n < 2 or not error > 0:
        return Estimate(mean, -np.inf, np.inf, 1.0, n)
    half = float(stats.t.ppf(0.975, n - 1)) * error
    return Estimate(mean, mean - half, mean + half, float(2 * stats.t.sf(abs(mean) / error, n - 1)), n)


def crossed_interval(differences: np.ndarray, resamples: int = 2000) -> Estimate:
    """Interval of the mean of ``differences`` (seeds, images), over seeds *and* images.

    The standard error is that of a bootstrap that draws seeds and images with replacement, each by itself (Owen 2007,
    "The pigeonhole bootstrap"), the seeds' part enlarged by n / (n - 1) since few seeds vary too little.
    """
    seeds, images = differences.shape
    if seeds < 2:
        return interval(differences.mean(1))
    generator = np.random.default_rng(0)
    counts = generator.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds - 1 / seeds
    curves = (1 / seeds + counts * (seeds / (seeds - 1)) ** 0.5) @ differences
    means = [curve @ generator.poisson(1.0, images) / images for curve in curves]
    return interval(differences.mean(1), float(np.std(means, ddof=1)))


# ================================================================ 6. checkpoints

CHECKPOINT = "small-cv-lab 2"


def save_checkpoint(path: Path, model: nn.Module, data: Dataset, recipe: Recipe, **facts: Any) -> None:
    """Save weights and all that is needed to rebuild and judge the network (``facts``: seed, accuracy, ...)."""
    about = {
        "dataset": data.name,
        "source": data.source,
        "fingerprint": data.fingerprint,
        "classes": list(data.classes),
    }
    shape = {"format": CHECKPOINT, "recipe": asdict(recipe), "input": list(data.train_images.shape[1:])}
    save_tensors(
        path, shape | about | facts | {"state": {key: value.cpu() for key, value in model.state_dict().items()}}
    )


def read_tensors(path: Path) -> Any:
    """What ``torch.save`` wrote to ``path``, without running code from it; raises UserError for anything else."""
    if not path.is_file():
        raise UserError(f"no checkpoint {path}")
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch.load raises almost anything for a foreign file, and advises to run its code
        reason = (
            first_line(error)[:160] if isinstance(error, RuntimeError) else "not saved by torch.save, or code in it"
        )
        raise UserError(f"{path} is no checkpoint, or damaged: {reason}") from None


def load_checkpoint(path: Path, model: str | None = None) -> tuple[nn.Sequential, Row]:
    """(network in eval mode, everything else saved with it) of ``save_checkpoint``; raises UserError.

    A checkpoint imports nothing by itself: one of a network of the user's own is loaded only where ``model`` names it.
    """
    content = read_tensors(path)
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT:
        raise UserError(f"{path} is no checkpoint of this lab, or of an earlier version of it: train it anew")
    try:
        recipe = Recipe(**content["recipe"] | {"growth": tuple(content["recipe"]["growth"])})
        if ":" in recipe.model and recipe.model != model:
            raise UserError(f"{path} holds a network of {recipe.model}: name it with --model")
        about: list[Any] = [content[name] for name in ("dataset", "source", "classes")]
        images = torch.zeros(1, *content["input"], dtype=torch.uint8)
        loaded = make_model(
            recipe, Dataset(about[0], about[1], tuple(about[2]), images, torch.zeros(1), images, torch.zeros(1))
        )
        loaded.load_state_dict(content.pop("state"))
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())[:160]}") from None
    return loaded.eval(), content | {"recipe": recipe}


# ================================================================ 7. worker processes


class WorkerDied(Exception):
    """A worker process ended in the middle of a job."""


def _work(connection: Any, path: Path, runtime: Runtime) -> None:
    """The worker's end: runs generator after generator, yielding over the pipe, until the parent is gone."""

    def end_with_parent() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    make_runtime(*runtime)
    data = Dataset(**torch.load(path, mmap=True, weights_only=True))
    while True:
        function, arguments = connection.recv()
        job = function(data, runtime, *arguments)
        try:
            while True:
                connection.send(("row", next(job)))
                if not connection.recv():
                    job.close()
        except StopIteration as end:
            connection.send(("result", end.value))
        except Exception as error:
            connection.send(("error", error if isinstance(error, UserError) else RuntimeError(first_line(error))))


class Workers:
    """Up to ``count`` processes that share the data set at ``path``; started as they are needed."""

    def __init__(self, count: int, runtime: Runtime, path: Path) -> None:
        self.count, self.arguments = count, (path, runtime._replace(threads=1))
        self.free: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.processes: list[Any] = []
        for _ in range(count):
            self.free.put(None)

    def _start(self) -> tuple[Any, Any]:
        context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads as they stand
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, *self.arguments), daemon=True)
        if hasattr(signal, "pthread_sigmask"):  # not on Windows; the worker never hears of Ctrl-C: the parent does
            multiprocessing.resource_tracker.ensure_running()  # now: starting it would let Ctrl-C through again
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            if hasattr(signal, "pthread_sigmask"):
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        theirs.close()
        self.processes.append(process)
        return process, ours

    def run(self, function: Callable[..., Generator[Any, Any, Any]], *arguments: Any) -> Generator[Any, None, Any]:
        """Run the generator ``function(data, runtime, *arguments)`` in a free worker: yields and returns what it does.

        Closing it early ends the job there, too. Raises WorkerDied, or what the job raised: UserError or RuntimeError.
        """
        worker, kind, content = self.free.get(), "row", None
        try:
            worker = worker or self._start()
            connection = worker[1]
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
                    connection.recv()
                    raise
                connection.send(True)
        except (EOFError, OSError):
            worker[0].join(1)
            text = f"a worker process ended with status {worker[0].exitcode} (out of memory? try fewer --workers)"
            worker = None
            raise WorkerDied(text) from None
        finally:
            self.free.put(worker)

    def map(self, function: Any, jobs: Sequence[Any], on_row: Any = lambda job, row: None) -> Iterator[tuple[int, Any]]:
        """Run ``function(data, runtime, job)`` for every job; yields (its number, result) as they end.

        ``on_row(job, row)`` sees what the jobs yield meanwhile. A dead worker is a UserError.
        """

        def finish(job: Any) -> Any:
            generator = self.run(function, job)
            while True:
                try:
                    on_row(job, next(generator))
                except StopIteration as end:
                    return end.value

        threads = ThreadPoolExecutor(self.count)
        futures = {threads.submit(finish, job): number for number, job in enumerate(jobs)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except WorkerDied as error:
            raise UserError(str(error)) from None
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            if not all(future.done() for future in futures):  # given up: nobody wants the rest
                self.stop()

    def stop(self) -> None:
        """End all processes, whatever they are doing."""
        for process in self.processes:
            process.kill()
            process.join()


# ================================================================ 8. results and figures

# Okabe and Ito's palette, told apart by the colour-blind; one thing has one colour in every figure.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
STYLE: Any = {
    "font.size": 13,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
STYLE |= {"lines.linewidth": 2.2, "legend.frameon": False}


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that replaces it only when the block ends well; a full disk is an OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # that of a full disk names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path: Path, content: Row) -> None:
    """``torch.save``, all of it or nothing."""
    with atomic_path(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError:  # torch's own for a full disk
            raise OSError(5, "cannot be written (is the disk full?)", str(path)) from None


def write_text(path: Path, text: str) -> None:
    """Write ``text``, all of it or nothing."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # a path need not be valid text


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON, all of it or nothing; nan and infinity become null, numpy's numbers plain, paths text."""
    text = json.dumps(content, default=lambda value: value.item() if isinstance(value, np.generic) else str(value))
    plain = json.loads(text, parse_constant=lambda _: None)
    write_text(path, json.dumps(plain, indent=2, ensure_ascii=False) + "\n")


def environment(runtime: Runtime) -> Row:
    """Everything about software and hardware that a figure may depend on."""
    from importlib.metadata import PackageNotFoundError, version

    packages, commit, processor = {}, "", platform.processor() or platform.machine()
    for name in ("torch", "torchvision", "numpy", "pandas", "scipy", "optuna", "onnx", "onnxscript", "onnxruntime"):
        with contextlib.suppress(PackageNotFoundError):
            packages[name] = version(name)
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # no git program, no repository
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10).stdout.strip()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    found = torch.cpu.get_capabilities()
    wanted = ("avx2", "avx512_f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "bf16")
    gpu = torch.cuda.get_device_name(runtime.device) if runtime.device.startswith("cuda") else None
    machine: Row = {"python": platform.python_version(), "platform": platform.platform(), "cpu": processor}
    machine |= {"cpu_capabilities": [name for name in wanted if found.get(name)], "cores": usable_cores(), "gpu": gpu}
    return machine | runtime._asdict() | {"packages": packages, "git_commit": commit or None}


class Run:
    """One run of a script: its options, data without test images, device, workers, progress bar and result files.

    Files are made in ``folder`` (the output folder's ``unfinished``) and published together by ``finish``.
    """

    def __init__(
        self, options: argparse.Namespace, data: Dataset, runtime: Runtime, workers: Workers, bar: Any
    ) -> None:
        self.options, self.data, self.runtime, self.workers, self.bar = options, data, runtime, workers, bar
        self.output, self.folder = options.output_dir, options.output_dir / "unfinished"
        self.started = time.perf_counter()

    def stage(self, title: str, images: float = 0) -> None:
        """Say what is being done now; ``images`` to be trained on are added to the progress bar's total."""
        self.bar.total += images
        self.bar.set_description(title)
        if self.bar.disable:  # no terminal
            print(f"[{time.perf_counter() - self.started:4.0f} s] {title}", flush=True)

    def train(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Row]]:
        """``train_job`` for every job, in the workers: (number of the job, result) as they end; moves the bar."""
        for number, result in self.workers.map(
            train_job, jobs, lambda job, row: self.bar.update(len(job.split(self.data).train))
        ):
            missing = jobs[number].recipe.epochs - len(result["history"])  # of a training that ended early
            self.bar.update(missing * len(jobs[number].split(self.data).train))
            yield number, result

    def table(self, name: str, frame: Any) -> None:
        """Write a DataFrame as CSV."""
        with atomic_path(self.folder / name) as temporary:
            frame.to_csv(temporary, index=False)

    @contextlib.contextmanager
    def figure(
        self, name: str, title: str, rows: int = 1, columns: int = 1, size: tuple[float, float] = (8, 5)
    ) -> Iterator[Any]:
        """A figure of ``rows`` x ``columns`` axes, saved when the block ends; yields (figure, axes).

        A figure that fails costs one line, not the measurement.
        """
        os.environ["MPLBACKEND"] = "agg"  # what a notebook exports need not be installed
        try:
            import matplotlib.pyplot as plt

            with plt.rc_context(STYLE), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Glyph .* missing from")  # of a class's name, drawn as a box
                drawing, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
                yield drawing, axes
                lines = [textwrap.fill(line, int(8.7 * size[0])) for line in title.splitlines()]  # letters an inch
                drawing.suptitle("\n".join(lines), fontsize=15, parse_math=False)  # a folder's name may hold dollars
                with atomic_path(self.folder / name) as temporary:
                    drawing.savefig(temporary, dpi=110)
                plt.close(drawing)
        except Exception as error:
            print(f"NOTE: {name} could not be drawn: {type(error).__name__}: {first_line(error)}", file=sys.stderr)

    def finish(self, summary: Row, report: Sequence[str], keep: Sequence[str] = ()) -> None:
        """Write the summary and report.md (paragraphs), publish all files, print their names.

        Files of an earlier run move to ``previous/``, but for hidden ones and those of ``keep``.
        """
        facts = {"dataset": self.data.name, "source": self.data.source, "fingerprint": self.data.fingerprint}
        facts |= summary | {"wall_seconds": time.perf_counter() - self.started}
        write_json(self.folder / "config.json", vars(self.options) | {"workers": self.workers.count})
        write_json(self.folder / "environment.json", environment(self.runtime))
        write_json(self.folder / "summary.json", facts)
        write_text(self.folder / "report.md", "\n\n".join(report) + "\n")
        self.bar.close()
        previous, staying = self.output / "previous", {"previous", "unfinished", *keep}
        old = [path for path in self.output.iterdir() if path.name[0] != "." and path.name not in staying]
        if old:
            shutil.rmtree(previous, ignore_errors=True)
            previous.mkdir()
        for path in old:
            path.replace(previous / path.name)
        for path in self.folder.iterdir():
            path.replace(self.output / path.name)
        self.folder.rmdir()
        names = sorted(path.name for path in self.output.iterdir() if path.is_file() and path.name[0] != ".")
        names.sort(key=lambda name: name != "report.md")
        print(f"\nWritten to {self.output}:\n{textwrap.indent(textwrap.fill(', '.join(names), 96), '  ')}")


@contextlib.contextmanager
def open_run(options: argparse.Namespace, data: Dataset) -> Iterator[Run]:
    """Make and hold the output folder, share ``data`` with worker processes; all of that ends with the block.

    The run and its workers get the data set without its test images. Two runs never write into one folder.
    """
    from filelock import FileLock, Timeout
    from tqdm import tqdm

    output, folder, shared = (options.output_dir / name for name in ("", "unfinished", ".dataset.pt"))
    runtime = make_runtime(options.device, options.precision, usable_cores())
    count = options.workers or min(usable_cores(), 4 if runtime.device.startswith("cuda") else 1024)
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise UserError(f"another run is writing to {output}; wait for it or choose another --output-dir") from None
    except OSError as error:
        raise UserError(f"--output-dir {output} cannot be written: {error.strerror}") from None
    unseen = replace(data, test_images=data.test_images[:0], test_labels=data.test_labels[:0])
    workers = Workers(count, runtime, shared)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        save_tensors(shared, {field.name: getattr(unseen, field.name) for field in fields(Dataset)})
        size = f"{len(data.train_labels):,} training images"
        print(f"{data.source}: {size}; {runtime.device}, {runtime.precision}, {count} worker process(es)")
        form = "{desc} |{bar}| {percentage:3.0f} % [{elapsed}, {remaining} left]"
        with tqdm(total=0, disable=None, bar_format=form, smoothing=0.05) as bar:
            yield Run(options, unseen, runtime, workers, bar)
    finally:
        workers.stop()
        shared.unlink(missing_ok=True)
        if folder.is_dir() and any(folder.iterdir()):
            print(f"what was finished is in {folder}", file=sys.stderr)
        elif folder.is_dir():
            folder.rmdir()
        lock.release()
