"""Task 4: what does ONNX buy? Convert the small CNN, prove it equal on the saved files, then measure the speed.

Protocol: train the network (or load a checkpoint), fold normalisation and BatchNorm into the convolutions,
export to ONNX, quantise to int8 with training pictures only. Every engine then runs in a process of its own, with
equally many threads. First all of them classify the whole test set: no speed is quoted for a file that disagrees
with torch. Then they are timed in rounds, in random order within a round, so that whatever else the machine does
hits all of them alike; speed-ups are ratios within a round, with a 95 % interval over the rounds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common_options import Recipe, add_common_args, importing, positive_int, run_script, some_path

EPILOG = """examples:
  python task4_onnx.py                                            train, convert, check, measure: about 7 minutes
  python task4_onnx.py --checkpoint results/task3/best_model.pth  the same for another task's network
  python task4_onnx.py --onnx broken.onnx                         judge a file converted elsewhere, or damaged
  python task4_onnx.py --quick                                    everything on a few pictures, in less than a minute
"""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, count = parser.add_argument, positive_int
    add("--checkpoint", type=some_path, metavar="PTH", help="the network to convert (default: train one, or reuse)")
    add("--onnx", type=some_path, metavar="FILE", help="judge this ONNX file of the network instead of converting")
    add("--threads", type=count, default=1, help="of every engine (default: %(default)s)")
    add("--rounds", type=count, default=8, help="of timing; the interval is over them (default: %(default)s)")
    add("--max-int8-drop", type=points, default=1.0, help="accuracy points int8 may lose (default: %(default)s)")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="also time torch.compile (default: where a C++ compiler is found, not with --quick)",
    )
    best = Recipe()  # takes below three minutes on 2 cores with AMX
    own = {"epochs": best.epochs, "batch_size": best.batch_size, "width": best.width}
    add_common_args(parser, output_dir=Path("results/task4"), **own)
    return parser.parse_args(argv)


def points(text: str) -> float:
    """argparse type: percentage points, 0 to 100."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{value:g} lies outside 0 to 100 points")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Convert, check, measure, report; returns the exit status."""

    def body() -> int:
        options = vars(parse_args(argv))
        with importing():  # late: --help and a mistyped option need no torch
            from task4_experiment import convert_and_compare

        return convert_and_compare(**options)

    return run_script(body)


if __name__ == "__main__":
    sys.exit(main())
