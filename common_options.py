"""What the user of a script chooses, the command line and the recipe: without torch, so that --help answers at once."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Recipe:
    """How to train; the default values are the project's best recipe for CIFAR-10.

    ``schedule`` is "one_cycle" (up for a quarter of the steps, then down to zero) or "constant";
    ``crop_padding`` is the largest shift of a picture in pixels, 0 for no augmentation at all; ``growth`` are the
    channels of the network's stages, in multiples of ``width``.
    """

    optimizer: str = "SGD+nesterov"
    lr: float = 1.0
    weight_decay: float = 5e-4
    label_smoothing: float = 0.2
    dropout: float = 0.0
    width: int = 32
    stem_stride: int = 1
    growth: tuple[int, ...] = (1, 4, 4)
    batch_size: int = 512
    epochs: int = 10
    crop_padding: int = 2
    schedule: str = "one_cycle"


# Points on the line of accuracy against training time, chosen on validation pictures.
PRESETS = {
    "small": Recipe("Muon", 0.05, stem_stride=2, epochs=5, crop_padding=1, label_smoothing=0.1),
    "medium": Recipe("Muon", 0.05, epochs=7),
    "large": Recipe(width=48, epochs=15),
}


class UserError(Exception):
    """Something that the user can put right: shown as one line, exit status 2, no traceback."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def add_common_args(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add the arguments that all scripts have; ``defaults`` are the script's own default values.

    Without one of its own, a script takes epochs, batch size and width from the presets.
    """
    recipe = {
        name: f"(default: {defaults.get(name, 'that of the preset')})" for name in ("epochs", "batch_size", "width")
    }
    group = parser.add_argument_group("common to all scripts")
    add = group.add_argument
    add("--dataset", help="fashion_mnist, cifar10, or a folder {train,test}/<class>/* of your pictures")
    add("--data-dir", type=some_path, default=ROOT / "data", help="where the data sets are (default: ./data)")
    add("--output-dir", type=some_path, help="where the results go (default: ./%(default)s)")
    add("--epochs", type=positive_int, help=f"passes over the training pictures {recipe['epochs']}")
    add("--batch-size", type=positive_int, help=f"pictures per step {recipe['batch_size']}")
    add("--width", type=positive_int, help=f"channels of the first stage, multiple of 16 {recipe['width']}")
    add("--seed", type=natural_int, default=0, help="seed of everything random (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="(default: %(default)s)")
    add(
        "--workers",
        type=positive_int,
        default=os.cpu_count() or 1,
        help="parallel processes (default: all %(default)s cores)",
    )
    add("--quick", action="store_true", help="try everything on a few pictures, in less than a minute")
    parser.set_defaults(**defaults)


def some_path(text: str) -> Path:
    """argparse type: a path. An empty one, as an unset variable of the shell gives it, is not meant as "here"."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def positive_int(text: str, least: int = 1) -> int:
    """argparse type: an integer from ``least`` to below 2**31, as torch and numpy both take it."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if not least <= value < 2**31:
        raise argparse.ArgumentTypeError(
            f"{value} is too {'small' if value < least else 'large'}: at least {least}, below 2**31"
        )
    return value


def natural_int(text: str) -> int:
    """argparse type: as ``positive_int``, but 0 will do."""
    return positive_int(text, least=0)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import torch in this block: Ctrl-C ends the process at once, with one line and status 130.

    As an exception it would leave libraries half imported, and their C++ parts may abort (SIGABRT), then or at exit.
    """

    def leave(*arguments: object) -> None:
        os.write(2, b"interrupted\n")
        os._exit(130)

    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # else Ctrl-C is ignored, or somebody else's business
        signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def run_script(body: Callable[[], int]) -> int:
    """Run ``body`` and turn the user's errors and Ctrl-C into one line and an exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a console that lacks a letter of a name shows its number, as stderr
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return body()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.strerror or error}: {error.filename or ''}".rstrip(": "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
