"""Task 3: which hyper-parameters? An Optuna study that survives anything, and then the truth about its winner.

Protocol: every trial trains a fast network (its stem has stride 2) for a few epochs and is judged on the same
fixed validation pictures; the median pruner stops the poor ones early. Worker processes share one study, kept
in a journal file or in a database for many machines. When the study is over, its best configuration and the
default one are trained again on fresh seeds, with the study's schedule and with the full one, and only then is
the test set read, once.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from common_options import Recipe, add_common_args, importing, natural_int, positive_int, run_script
from common_parallel import worker_context

EPILOG = """examples:
  python task3_optuna.py                          the study, then retraining: about 25 minutes on 2 cores
  python task3_optuna.py --trials 200             the same study again: goes on where it stopped
  python task3_optuna.py --storage postgresql://user@host/db --output-dir results/here
                                                  the same line on every machine: all work on one study
  python task3_optuna.py --quick                  everything on a few pictures, in less than a minute
"""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    count, natural = positive_int, natural_int
    add("--trials", type=count, default=100, help="finished trials that the study shall reach (default: %(default)s)")
    add("--timeout", type=seconds, default=600.0, help="start no trial after so many s (default: %(default)g)")
    add("--sampler", choices=("tpe", "random"), default="tpe", help="(default: %(default)s)")
    add("--pruner", choices=("median", "hyperband", "none"), default="median", help="(default: %(default)s)")
    add("--storage", metavar="URL", help="a database, as postgresql://user@host/name (default: OUTPUT_DIR/study.log)")
    add("--fresh", action="store_true", help="move an existing study aside and start anew")
    add("--retrain-seeds", type=natural, default=3, help="0: leave the test set alone (default: %(default)s)")
    add("--control", action="store_true", help="also run random search at equal cost")
    add("--audit", type=natural, default=0, metavar="N", help="finish N pruned trials: was the pruner right?")
    add_common_args(
        parser, output_dir=Path("results/task3"), epochs=6, batch_size=Recipe.batch_size, width=Recipe.width
    )
    return parser.parse_args(argv)


def seconds(text: str) -> float:
    """argparse type: a positive number of seconds."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is no time: give a positive number of seconds")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study, retrain its winner, report; returns the exit status."""

    def body() -> int:
        options = vars(parse_args(argv))
        worker_context()  # gets ready while this process imports torch
        with importing():  # late: --help and a mistyped option need no torch
            from task3_experiment import tune

        return tune(**options)

    return run_script(body)


if __name__ == "__main__":
    sys.exit(main())
