"""The lab's data: CIFAR-10, Fashion-MNIST and folders of pictures, each as one uint8 tensor per split."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pickle
import socket
import stat
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common_options import ROOT, UserError, first_line
from common_run import save_tensors

VALIDATION_FRACTION = 0.1  # of the training pictures, per class
VALIDATION_SEED = 2024  # fixed: every run of every script selects on the same pictures
IMAGE_SUFFIXES = {"png", "jpg", "jpeg", "bmp", "gif", "webp", "tif", "tiff", "ppm", "pgm"}
ARRAY_PARTS = {"_reconstruct", "ndarray", "dtype", "_frombuffer", "scalar"}  # what a pickled array is made of
CIFAR10_SHORT_NAMES = {"airplane": "plane", "automobile": "car"}


@dataclass(frozen=True)
class Dataset:
    """One data set in memory.

    Images are uint8 (N, C, H, W) in channels_last order (so a crop copies whole pixels), labels are
    int64 (N,). ``source`` is one phrase for consoles and plot titles; ``mean`` and ``std`` are per
    channel, of the training images scaled to [0, 1].
    """

    name: str
    source: str
    classes: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def short_classes(self) -> tuple[str, ...]:
        """Class names for the console (CIFAR-10's plane and car instead of airplane, automobile)."""
        return tuple(CIFAR10_SHORT_NAMES.get(name, name) for name in self.classes)


def make_dataset(
    name: str, source: str, classes: Sequence[str], train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> Dataset:
    """Build a Dataset from (images (N, C, H, W) uint8, labels (N,)) pairs; computes mean and std."""
    images = train[0].contiguous(memory_format=torch.channels_last)
    mean, std = channel_statistics(images)
    test_images = test[0].contiguous(memory_format=torch.channels_last)
    return Dataset(name, source, tuple(classes), images, train[1].long(), test_images, test[1].long(), mean, std)


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 (N, C, H, W), scaled to [0, 1].

    Exact, from 256-bin histograms; over all pixels, not the mean of per-picture deviations (that
    mistake is where CIFAR-10's often-copied 0.2023, 0.1994, 0.2010 comes from).
    """
    value = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in range(images.shape[1]):
        parts = images[:, channel].split(10_000)  # by parts: bincount needs eight bytes a pixel
        weight = torch.stack([torch.bincount(part.reshape(-1), minlength=256).double() for part in parts]).sum(0)
        weight /= weight.sum()
        mu = (weight * value).sum()
        mean.append(float(mu))
        std.append(max(float((weight * (value - mu) ** 2).sum().sqrt()), 1 / 255))
    return tuple(mean), tuple(std)


def load_dataset(name: str, data_dir: Path | str = ROOT / "data") -> Dataset:
    """Load ``fashion_mnist``, ``cifar10`` or a folder of pictures; raises UserError, in one line.

    fashion_mnist is embedded in the repository; torchvision checks its MD5. cifar10 is looked for as
    ``cifar-10-batches-py`` (or its tar.gz), then as the image folder ``cifar10/``, then downloaded.
    """
    data_dir = Path(data_dir)
    if name == "fashion_mnist":
        return _load_fashion_mnist(data_dir)
    if name == "cifar10":
        return _load_cifar10(data_dir)
    if not Path(name).is_dir():
        raise UserError(f"--dataset {name}: neither fashion_mnist, cifar10 nor a folder of pictures")
    return load_image_folder(Path(name))


def load_dataset_or_fallback(name: str | None, data_dir: Path) -> Dataset:
    """As ``load_dataset``; with no ``name``, CIFAR-10 where it can be had, else embedded Fashion-MNIST."""
    if name is not None:
        return load_dataset(name, data_dir)
    try:
        return load_dataset("cifar10", data_dir)
    except UserError as error:
        print(f"NOTE: {error}\nNOTE: running on the embedded Fashion-MNIST instead of CIFAR-10.", file=sys.stderr)
        return load_dataset("fashion_mnist", ROOT / "data")


def _load_fashion_mnist(data_dir: Path) -> Dataset:
    from torchvision.datasets import FashionMNIST

    try:
        with downloading(data_dir):
            splits = [FashionMNIST(str(data_dir), train=train, download=True) for train in (True, False)]
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise UserError(
            f"Fashion-MNIST in {data_dir}/FashionMNIST is missing or damaged ({first_line(error)}); "
            "`git checkout data/` restores it"
        ) from None
    train, test = ((split.data.unsqueeze(1), split.targets) for split in splits)
    return make_dataset("fashion_mnist", "Fashion-MNIST, embedded", splits[0].classes, train, test)


def _load_cifar10(data_dir: Path) -> Dataset:
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    folder = data_dir / CIFAR10.base_folder
    archive = data_dir / CIFAR10.filename
    archived = check_integrity(str(archive), CIFAR10.tgz_md5)
    if not folder.is_dir() and not archived and (data_dir / "cifar10").is_dir():
        pictures = load_image_folder(data_dir / "cifar10")
        return replace(pictures, name="cifar10", source="CIFAR-10, image folder")
    published = all(check_integrity(str(folder / file), md5) for file, md5 in CIFAR10.train_list + CIFAR10.test_list)
    if not folder.is_dir() or (archived and not published):
        try:
            with downloading(data_dir), contextlib.redirect_stdout(sys.stderr):
                CIFAR10(str(data_dir), download=True)
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"no CIFAR-10: neither {folder}, nor {archive.name}, nor the image folder {data_dir / 'cifar10'}, and "
                f"the download failed ({first_line(error)}). Put one of them there, or use --dataset fashion_mnist"
            ) from None
        published = True
    train = _read_cifar10_batches([folder / file for file, _ in CIFAR10.train_list])
    test = _read_cifar10_batches([folder / file for file, _ in CIFAR10.test_list])
    classes = _unpickle_arrays(folder / CIFAR10.meta["filename"])["label_names"]
    source = "CIFAR-10" if published else "CIFAR-10 (files differ from the published ones)"
    return make_dataset("cifar10", source, classes, train, test)


def _read_cifar10_batches(files: list[Path]) -> tuple[Tensor, Tensor]:
    batches = [_unpickle_arrays(file) for file in files if file.exists()]
    if not batches:
        raise UserError(f"{files[0].parent} holds none of CIFAR-10's files ({files[0].name}, ...)")
    try:
        images = torch.from_numpy(np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32))
        return images, torch.tensor([label for batch in batches for label in batch["labels"]])
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{files[0].parent} is no CIFAR-10: {error!r}") from None


def _unpickle_arrays(file: Path) -> dict[str, Any]:
    """Read a pickle that may hold numpy arrays and nothing that runs code."""

    class ArrayUnpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            is_array = module.split(".")[0] == "numpy" and name in ARRAY_PARTS
            if is_array or (module, name) == ("_codecs", "encode"):
                return super().find_class(module, name)
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    try:
        with file.open("rb") as stream:
            content = ArrayUnpickler(stream, encoding="latin1").load()
        if not isinstance(content, dict):
            raise pickle.UnpicklingError("it holds no dictionary")
        return content
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is no CIFAR-10 file: {first_line(error)}") from None


def load_image_folder(folder: Path) -> Dataset:
    """Load ``folder/{train,test}/<class>/*`` as 32x32 RGB; keeps a cache beside the pictures.

    Pictures may have any size and mode: transparent ones are laid on white, 16-bit ones scaled,
    EXIF rotation is applied. Raises UserError for a missing split, an empty class, classes that
    differ between the splits, or an unreadable picture (named).
    """
    files: dict[str, list[tuple[str, int]]] = {}
    names: dict[str, list[str]] = {}
    digest = hashlib.sha256(b"2")  # of the decoding below: raise it when that changes
    for split in ("train", "test"):
        if not (folder / split).is_dir():
            raise UserError(f"{folder} is no image folder: it has no {split}/ with a folder per class")
        names[split] = sorted(
            entry.name for entry in (folder / split).iterdir() if entry.is_dir() and not entry.name.startswith(".")
        )
        files[split] = []
        for label, name in enumerate(names[split]):
            found = picture_files(str(folder / split / name))
            if not found:
                raise UserError(f"class folder {folder / split / name} holds no pictures")
            if split == "train" and len(found) < 2:
                raise UserError(f"class folder {folder / split / name} holds one picture; validation needs another")
            files[split] += [(path, label) for path, _ in found]
            for path, facts in found:
                line = f"{path.removeprefix(f'{folder}{os.sep}')}|{label}|{facts.st_size}|{facts.st_mtime_ns}\n"
                digest.update(line.encode(errors="surrogateescape"))
    if names["train"] != names["test"] or len(names["train"]) < 2:
        raise UserError(
            f"{folder}: train/ and test/ need the same two or more classes, not {names['train']} and {names['test']}"
        )
    cache = folder.parent / f".{folder.name}.cache.pt"
    tensors = _read_cache(cache, digest.hexdigest())
    if tensors is None:
        tensors = {
            split: (_decode([path for path, _ in items]), torch.tensor([label for _, label in items]))
            for split, items in files.items()
        }
        try:
            save_tensors(cache, {"key": digest.hexdigest(), **tensors})
        except OSError as error:
            print(f"NOTE: no cache of the decoded pictures: {error}", file=sys.stderr)
    source, classes = f"{readable(folder.name)}, image folder", [readable(name) for name in names["train"]]
    return make_dataset(str(folder), source, classes, tensors["train"], tensors["test"])


def picture_files(folder: str) -> list[tuple[str, os.stat_result]]:
    """Files below ``folder`` that are pictures by their names, in order; raises OSError for a broken link."""
    found = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            stem, _, suffix = entry.name.rpartition(".")
            if entry.is_dir(follow_symlinks=False):
                found += picture_files(entry.path)
            elif stem and suffix.lower() in IMAGE_SUFFIXES and stat.S_ISREG(entry.stat().st_mode):
                found.append((entry.path, entry.stat()))
    return found


def readable(name: str) -> str:
    """A file's name as UTF-8 text, whatever the locale; what is not valid in it becomes U+FFFD."""
    return os.fsencode(name).decode("utf-8", "replace")


def _read_cache(cache: Path, key: str) -> dict[str, Any] | None:
    try:
        content = torch.load(cache, mmap=True, weights_only=True)
        return content if content["key"] == key else None
    except Exception:  # any damage whatever: the cache is made anew
        return None


def _decode(paths: Sequence[str]) -> Tensor:
    """Decode pictures into uint8 (N, 3, 32, 32), stored as NHWC."""
    from PIL import Image, ImageOps
    from tqdm import tqdm

    pixels = np.empty((len(paths), 32, 32, 3), np.uint8)

    def decode(item: tuple[int, str]) -> None:
        position, path = item
        try:
            with Image.open(path) as file:
                image: Image.Image = ImageOps.exif_transpose(file)
                if image.mode.startswith("I"):
                    image = Image.fromarray((np.asarray(image) / 256).clip(0, 255).astype(np.uint8))
                if image.has_transparency_data:
                    rgba = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
                pixels[position] = np.asarray(
                    image.convert("RGB").resize((32, 32), Image.Resampling.LANCZOS)
                    if image.size != (32, 32)
                    else image.convert("RGB")
                )
        except (
            OSError,
            ValueError,
            SyntaxError,
            Image.DecompressionBombError,
            Image.DecompressionBombWarning,
        ) as error:
            raise UserError(f"unreadable picture {path}: {first_line(error)}") from None

    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        work = pool.map(decode, enumerate(paths), chunksize=256)
        for _ in tqdm(work, total=len(paths), desc="decoding pictures", unit="picture", disable=None):
            pass
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


@contextlib.contextmanager
def downloading(folder: Path) -> Iterator[None]:
    """Let network calls fail after 10 s of silence (a firewalled network answers never), and leave no empty folders."""
    before, is_new = socket.getdefaulttimeout(), not folder.exists()
    socket.setdefaulttimeout(10)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
        for made in (folder / "FashionMNIST" / "raw", folder / "FashionMNIST", folder) if is_new else ():
            with contextlib.suppress(OSError):  # not empty, or never made
                made.rmdir()


def subset(index: Tensor, count: int | None) -> Tensor:
    """At most ``count`` of ``index``, spread evenly, so that every class is still there."""
    return index if count is None or count > len(index) else index[torch.arange(count) * len(index) // count]


def split_validation(labels: Tensor, fraction: float = VALIDATION_FRACTION) -> tuple[Tensor, Tensor]:
    """Cut a fixed stratified validation set from the training labels (N,) int64.

    Returns (train_index, validation_index), disjoint and sorted; the same for every run and seed.
    Raises UserError for a class with fewer than two pictures.
    """
    generator = torch.Generator().manual_seed(VALIDATION_SEED)
    is_validation = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        if len(members) < 2:
            raise UserError(
                f"class number {int(label)} has one training picture; two are needed, one of them for validation"
            )
        count = max(1, round(fraction * len(members)))
        is_validation[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return (~is_validation).nonzero().squeeze(1), is_validation.nonzero().squeeze(1)


@contextlib.contextmanager
def shared_dataset(dataset: Dataset) -> Iterator[Path]:
    """A temporary file that ``open_shared`` maps into any number of processes without copying."""
    with tempfile.TemporaryDirectory(prefix="dataset-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "dataset.pt"
        save_tensors(path, {field: getattr(dataset, field) for field in dataset.__dataclass_fields__})
        yield path


@functools.cache
def open_shared(path: Path) -> Dataset:
    """The data set of ``shared_dataset``; its tensors are read from the file as they are used."""
    return Dataset(**torch.load(path, mmap=True, weights_only=True))
