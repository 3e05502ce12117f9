"""Task 2: which optimizer converges better, SGD or RMSprop, and are the usual claims about them true?

Protocol (after DeepOBS, Choi et al. 2019, Wilson et al. 2017): one grid of learning rates for every
optimizer, chosen on validation pictures; the chosen rate is run again on fresh seeds; a seed fixes the
initial weights and the order of the batches, so optimizers are compared in pairs. One schedule for all: the
learning rate rises for a quarter of the steps to the one that is named and falls to zero, so that few epochs
suffice and no run ends by luck (``--schedule constant`` shows what that changes). No weight decay, label
smoothing or augmentation: tricks would blur the comparison. The test set is read once, after everything is
chosen.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common_options import add_common_args, importing, positive_int, run_script
from common_parallel import worker_context

EPILOG = """examples:
  python task2_optimizers.py                                    SGD against RMSprop, 8 minutes on 2 cores (bf16)
  python task2_optimizers.py --optimizers SGD+momentum AdamW    any two or more of torch.optim
  python task2_optimizers.py --schedule constant --epochs 5     do the verdicts survive other rates?
  python task2_optimizers.py --dataset path/to/pictures         your own {train,test}/<class>/* folder
  python task2_optimizers.py --quick                            everything on a few pictures, in less than a minute

The claims are read as "the second optimizer against the first".
"""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=form)
    add = parser.add_argument
    grid = [float(f"{10 ** (power / 3):.3g}") for power in range(-9, 4)]
    add("--optimizers", nargs="+", default=["SGD", "RMSprop"], metavar="NAME", help="(default: SGD RMSprop)")
    add("--seeds", type=positive_int, default=5, help="fresh seeds of each final run (default: %(default)s)")
    add("--sweep-epochs", type=positive_int, default=1, help="epochs of a sweep run (default: %(default)s)")
    ends = f"{grid[0]:g} to {grid[-1]:g}, 3 per decade"
    add("--lr-grid", nargs="+", type=float, default=grid, metavar="LR", help=f"(default: {ends})")
    add("--noise", nargs="+", type=float, default=[0.4], help="shares of wrong training labels (default: 0.4)")
    add("--schedule", choices=("one_cycle", "constant"), default="one_cycle", help="(default: %(default)s)")
    own = {"dataset": "fashion_mnist", "output_dir": Path("results/task2"), "epochs": 3, "batch_size": 128, "width": 16}
    add_common_args(parser, **own)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; returns the exit status."""

    def body() -> int:
        options = vars(parse_args(argv))
        worker_context()  # gets ready while this process imports torch
        with importing():  # late: --help and a mistyped option need no torch
            from task2_experiment import compare_optimizers

        return compare_optimizers(**options)

    return run_script(body)


if __name__ == "__main__":
    sys.exit(main())
