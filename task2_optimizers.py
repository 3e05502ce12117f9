"""Task 2: which optimizer converges better, SGD or RMSprop, and are the usual claims about them true?

Found (Fashion-MNIST, AMD EPYC, bf16): while networks learn, RMSprop reaches a lower training loss (0.026 nats [0.021,
0.032], n = 5) and has the wider range of good learning rates (0.39 decades [0.22, 0.55], n = 8), and SGD's step() saves
5.8 % of a training step [5.4, 6.2]. Once they have fitted their images, no difference in test accuracy beyond a point
is shown, nor with 40 % wrong labels.
"""

from __future__ import annotations

import argparse
import enum
import itertools
import math
import multiprocessing.pool
import sys
import textwrap
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))  # where PYTHONSAFEPATH and -P leave it out
import common  # isort: skip (before torch: it sets how long idle threads spin)
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from common import Estimate, Job, Network, Recipe, Run, Score, Training, TrainingResult, UserError

if TYPE_CHECKING:  # every worker process imports this file
    from matplotlib.axes import Axes

GRID = [float(f"{10 ** (power / 3):.3g}") for power in range(-9, 1)]  # 0.001 to 1, three per decade
EXTENSIONS = 4  # of the grid, at each end
SWEEP_IMAGES = 4500
SWEEP_SEEDS = 8
OTHER_SEEDS = 3  # of the sweep on the network that is not tested
SEARCH_SEEDS = 2
VALIDATED = 3000  # images, at most, that short trainings are validated on
JUDGED = 5000  # training images, at most, on which networks are judged
POINTS = (2, 1)  # a good learning rate loses at most this many points; the first is for the primary claim
FITTED = 0.99  # training accuracy
FITTED_IN_SEARCH = 0.995  # a little more, because the final seeds differ
MARGIN = 1.0  # points of accuracy: means of two seeds that differ by less are level
TARGET = 1 / 6  # of the loss of guessing, ln(classes): the training loss whose time is taken
STARTS = 5  # of processes for timing
TURNS = 8  # of each optimizer per process
STEPS = 40  # per turn
CLIFF = 0.1  # of accuracy, between neighbouring learning rates
EDGE_SEEDS = 3  # more, of a best rate next to one that diverged
FEWEST = 3  # repetitions for a verdict

PROTOCOL = f"""\
A textbook network with torch's own initialisation, at two horizons (after DeepOBS, Choi et al. 2019, Wilson et al.
2017):
  short   many images, few epochs: which optimizer gets further in a fixed schedule? Nothing has been fitted yet.
  fitted  few images, many epochs, until at least {100 * FITTED:g} % of them are fitted: which one generalises
          better, and what do wrong labels do to it?

1. Learning rates, short: one grid for every optimizer, one epoch on few images, without and with BatchNorm; the grid is
   extended while a good rate lies on its edge, and the rate midway down a cliff (of {100 * CLIFF:g} points) is added.
   From the best rate, a search continues at the short horizon, where a best rate next to one that diverged gets more
   seeds.
2. Learning rates, fitted: a search at the fitted horizon, without and with BatchNorm (the network that is not tested:
   along every second rate of the grid), then with wrong labels. At the fitted horizon only rates that fit the images
   can win (training accuracy of {100 * FITTED_IN_SEARCH:g} % for both seeds), and of those within {MARGIN:g} point
   of the best the lowest: two seeds cannot tell them apart, and it is the furthest from divergence.
   Every search starts with the best rate so far (with wrong labels: the lowest good one) and its two neighbours and
   follows the grid while the end that it has reached is the best one (for ranges: is within {POINTS[0]} points of the
   best). If a neighbour of the best rate loses more than {POINTS[0]} points to it, the rate midway is tried as well;
   for ranges also the one midway down a cliff. The highest mean validation accuracy by correct labels decides; a run
   that diverged counts as 0.
3. Convergence on fresh seeds. A seed fixes initial weights, batch orders and wrong labels for all optimizers, so that
   differences are paired. Short: tuned and default learning rates. Fitted: tuned; with wrong labels, once at the rate
   tuned for them and once at the rate tuned for correct labels. All rates are peaks of one schedule, one_cycle by
   default: up for a quarter of the steps, then down to zero.
4. The time of a training step, in fresh processes. 5. The test set, read once per run, after everything is chosen.

Five primary claims about the first optimizer, A, and the last, B:
  lower_loss             short   B has the lower training loss at the end, tuned
  lr_robustness          short   B has the wider range of learning rates within {POINTS[0]} points of its best, in
                                 decades, of the mean curves of the sweep of step 1
  cheaper_step           short   A has the cheaper optimizer.step(): the difference in % of A's whole training step
  better_generalisation  fitted  A has the higher test accuracy at the end, tuned
  noise_robustness       fitted  B has the higher test accuracy at the end, with wrong labels, tuned for them
Holm's correction covers these five. Intervals are over seeds and images for accuracies, over seeds for losses, over
seeds by jackknife for ranges, over fresh processes for times. The two claims about the fitted horizon are tested
against effects of up to {MARGIN:g} point, not 0: the choice of learning rates leaves that much open. No claim is judged
if n is below {FEWEST}, a range is cut off by the grid, the best rate is the outermost of those tried, or the networks
do not fit their images. All else is exploratory: intervals, but no verdicts.

Settled after results had been seen: how ranges are measured and images resampled (four runs of an earlier protocol, and
a review of two runs with --seed 100); to judge generalisation and noise at a fitted horizon, its size, its choice of
learning rates and the least effect (some 80 trial trainings, and those two runs, with their test results); the number
of seeds of the sweep and the coarser grid on the network that is not tested (a run with --seed 10). No other --seed
shares a training with those, but all share the images.\
"""
LIMITS = (
    "One data set and one kind of network: others may rank the optimizers differently. Training, validation and test "
    "images are the same in every run. Only learning rates are tuned; momentum (none for SGD) and smoothing constants "
    "are the framework's defaults. The schedule falls to zero, so the learning rate "
    "also decides how far a network fits its images. Intervals do not cover another choice of learning rates: see "
    "the verdicts of other runs, if there are any above."
)
EPILOG = """examples:
  python task2_optimizers.py --batch-norm                               the same with BatchNorm
  python task2_optimizers.py --optimizers SGD SGD+momentum RMSprop      any optimizers of torch.optim
  python task2_optimizers.py --model torchvision.models:resnet18        any network
  python task2_optimizers.py --seed 1 --output-dir results/seed1 --other-runs results/task2
                                                                        verdicts of two runs side by side
  python task2_optimizers.py --quick                                    every step on a few images, in seconds
"""

SHORT = "short"
FIT = "fitted"

NOT_MEASURED = ("output_dir", "data_dir", "other_runs", "workers", "precision")  # options; precision is shown anyway

Facts = Mapping[str, Any]  # what tells a training from the others of its stage: the first columns of the stage's table


class Stage(enum.IntEnum):
    """Stages with seeds of their own (below 10: those of earlier protocols)."""

    SWEEP = 10
    SHORT_SEARCH = 11
    FITTED_SEARCH = 12
    NOISY_SEARCH = 13
    NOISY_SEARCH_LABELS = 14
    FINAL = 15
    LABELS = 16


class Setting(NamedTuple):
    """How the final networks are trained, but for the optimizer."""

    horizon: str
    words: str
    has_wrong_labels: bool = False


SETTINGS = {
    "tuned": Setting(SHORT, "tuned"),
    "default": Setting(SHORT, "default"),
    "fitted": Setting(FIT, "tuned"),
    "noise": Setting(FIT, "tuned for wrong labels", has_wrong_labels=True),
    "noise_fitted": Setting(FIT, "tuned for correct labels", has_wrong_labels=True),
}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=f"{str(__doc__ or '').strip()}\n\n{PROTOCOL}",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    rate = common.real_number(1e-12, 1e6)
    share = common.real_number(0.01, 0.99)
    seeds = common.whole_number(2)
    add("--optimizers", nargs="+", default=["SGD", "RMSprop"], metavar="NAME", help="(default: SGD RMSprop)")
    add("--batch-norm", action="store_true", help="test the claims on the network with BatchNorm")
    add("--seeds", type=seeds, default=5, help="fresh seeds for the final runs (default: %(default)s)")
    add("--lr-grid", nargs="+", type=rate, default=GRID, metavar="LR", help="(default: 0.001 to 1, 3 per decade)")
    add("--noise", type=share, default=0.4, metavar="SHARE", help="of wrong labels in training (default: %(default)s)")
    add("--schedule", choices=tuple(common.SCHEDULES), default="one_cycle", help="(default: %(default)s)")
    add("--fit-images", type=common.whole_number(), default=1000, help="of the fitted horizon (default: %(default)s)")
    add("--fit-epochs", type=common.whole_number(), default=30, help="of the fitted horizon (default: %(default)s)")
    common.add_other_runs(parser, "whose verdicts the report shows")
    common.add_common_args(
        parser,
        dataset="fashion_mnist",
        output_dir=Path("results/task2"),
        images=33_000,
        epochs=2,
        batch_size=32,
        width=16,
    )
    options = parser.parse_args(argv)
    options.lr_grid = sorted(set(options.lr_grid))
    if options.quick:
        options.images = min(options.images, 400)
        options.epochs = min(options.epochs, 2)
        options.fit_images = min(options.fit_images, 100)
        options.fit_epochs = min(options.fit_epochs, 3)
        options.seeds = 2
        options.lr_grid = options.lr_grid[:: max(1, len(options.lr_grid) // 5)]
    return options


@common.script
def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; returns the exit status."""
    options = parse_args(argv)
    data = common.load_data(options)
    plan = make_plan(options, data)
    other_runs = [read_other_run(folder, options, data) for folder in options.other_runs]
    with common.open_run(options, data) as run:
        run.progress.expect(work_of_all(plan, data))
        common.prove_network(
            run, plan.recipe(plan.a, plan.grid[0], plan.sweep), common.split_dataset(data, options.images)
        )
        measured = measure(run, plan, data)
        claims = judge_claims(plan, measured)
        write_tables(run, plan, measured, claims)
        draw_figures(run, plan, measured, claims)
        print_results(plan, measured, claims)
        report = write_report(run, plan, measured, claims, other_runs)
        run.finish(summarise(plan, measured, claims), report, options, common.command_line(__file__, argv))
    return 0


# ================================================================ plan


class Horizon(NamedTuple):
    """How long a network is trained."""

    name: str
    images: int
    epochs: int

    @property
    def work(self) -> int:
        """Images in all epochs."""
        return self.images * self.epochs

    @property
    def words(self) -> str:
        """For sentences."""
        epochs = "1 epoch" if self.epochs == 1 else f"{self.epochs} epochs"
        return f"{epochs} of {self.images:,} images"


@dataclass(frozen=True)
class Plan:
    """What a run does: the command line made concrete, reduced by --quick."""

    optimizers: list[str]
    networks: dict[str, Recipe]  # by name, without optimizer and learning rate; the claims are about the first
    grid: list[float]
    noise: float
    seed: int
    seeds: int
    short: Horizon
    fitted: Horizon
    sweep: Horizon
    chance_loss: float  # ln(classes): the loss of guessing, in nats
    sweep_seeds: int = SWEEP_SEEDS
    extensions: int = EXTENSIONS
    starts: int = STARTS
    turns: int = TURNS
    steps: int = STEPS
    times_in_fresh_processes: bool = True
    most_test_images: int | None = None

    @property
    def a(self) -> str:
        """The first optimizer, of which the claims are."""
        return self.optimizers[0]

    @property
    def b(self) -> str:
        """The last optimizer, of which the claims are."""
        return self.optimizers[-1]

    @property
    def network(self) -> str:
        """The name of the network the claims are about."""
        return next(iter(self.networks))

    @property
    def training(self) -> Training:
        """How that network is trained, but for optimizer, learning rate and epochs."""
        return self.networks[self.network].training

    @property
    def target_loss(self) -> float:
        """The training loss whose time is taken, in nats."""
        return TARGET * self.chance_loss

    def horizon(self, name: str) -> Horizon:
        """The horizon with this name."""
        return self.short if name == SHORT else self.fitted

    def recipe(self, optimizer: str, lr: float, horizon: Horizon, network: str | None = None) -> Recipe:
        """The recipe for a run, on the network that the claims are about or another."""
        base = self.networks[network or self.network]
        return base.replace(optimizer=optimizer, lr=float(lr), epochs=horizon.epochs)

    def sweep_seeds_of(self, network: str) -> int:
        """How many seeds the sweep has on a network."""
        return self.sweep_seeds if network == self.network else min(OTHER_SEEDS, self.sweep_seeds)

    def seeds_of(self, stage: Stage, count: int) -> list[int]:
        """Seeds shared with no other stage and no other --seed."""
        return [common.derive_seed(self.seed, stage, number) for number in range(count)]


def make_plan(options: argparse.Namespace, data: common.Dataset) -> Plan:
    """Check the options before anything is written; the recipe has no tricks that would confound the comparison."""
    if len(set(options.optimizers)) != len(options.optimizers) or len(options.optimizers) < 2:
        raise UserError(f"--optimizers {' '.join(options.optimizers)}: name at least two different optimizers")
    if len(options.lr_grid) < 2:
        raise UserError(f"--lr-grid {options.lr_grid[0]}: give at least two different learning rates")
    if options.model and options.batch_norm:
        raise UserError("--batch-norm is for the lab's own network, not for --model")
    plain = Recipe(
        Network(model="PlainCNN"),
        Training(crop_padding=0, label_smoothing=0, weight_decay=0, schedule=options.schedule),
    )
    base = common.recipe_from(options, plain)
    split = common.split_dataset(data, options.images)
    runtime = common.resolve_runtime(options.device, options.precision)
    common.check_recipe(base.replace(optimizer=options.optimizers[0], lr=None), data, split, runtime)
    for name in options.optimizers[1:]:
        common.check_training(base.replace(optimizer=name, lr=None), data, split, runtime)
    images = len(split.train)
    fit_images = min(options.fit_images, images)
    if round(options.noise * fit_images) < 1:
        raise UserError(f"--noise {options.noise:g}: of {fit_images} images, not one gets a wrong label")
    plan = Plan(
        optimizers=options.optimizers,
        networks=choose_networks(options, base),
        grid=options.lr_grid,
        noise=options.noise,
        seed=options.seed,
        seeds=options.seeds,
        short=Horizon(SHORT, images, base.training.epochs),
        fitted=Horizon(FIT, fit_images, options.fit_epochs),
        sweep=Horizon("sweep", min(SWEEP_IMAGES, images), 1),
        chance_loss=math.log(len(data.classes)),
    )
    if options.quick:
        plan = replace(
            plan,
            sweep=Horizon("sweep", min(200, images), 1),
            sweep_seeds=2,
            extensions=0,
            starts=2,
            turns=2,
            steps=10,
            times_in_fresh_processes=False,
            most_test_images=1000,
        )
    return plan


def choose_networks(options: argparse.Namespace, base: Recipe) -> dict[str, Recipe]:
    """The user's own network, or the lab's without and with BatchNorm, the one to be tested first."""
    if options.model:
        return {options.model: base}
    plain = {"PlainCNN": base.replace(batch_norm=False)}
    normalised = {"PlainCNN with BatchNorm": base.replace(batch_norm=True)}
    return normalised | plain if options.batch_norm else plain | normalised


def default_rate(name: str) -> float:
    """The framework's default learning rate of an optimizer."""
    optimizer = common.make_optimizer(Training(optimizer=name, lr=None), torch.nn.Linear(1, 1))
    return float(optimizer.defaults["lr"])


class OtherRun(NamedTuple):
    """A finished run of this script, to show whether verdicts repeat."""

    words: str  # how its command differs from this run's, precision, processor
    findings: dict[str, str]  # verdict and effect of the primary claims, by their ids


def read_other_run(folder: Path, options: argparse.Namespace, data: common.Dataset) -> OtherRun:
    """What a run with another seed than this one's ``options`` has published in ``folder``; raises UserError."""
    about = f"--other-runs {folder}: not the results of another run of this version"
    with common.user_error(about, OSError, ValueError, LookupError, TypeError):
        published = common.read_published_run(folder, "task2")
        claims = published.summary["claims"]
        findings = {row["id"]: finding_of(row) for row in claims if row["primary"] and row["horizon"]}
        if published.config["seed"] == options.seed:
            raise ValueError(f"--seed {options.seed} is this run's, too")
        return OtherRun(published.words(options, NOT_MEASURED, data), findings)


def finding_of(row: Mapping[str, Any]) -> str:
    """The verdict and the effect of a claim in summary.json, where null stands for infinity."""
    effect, low, high = (math.nan if row[name] is None else row[name] for name in ("effect", "ci_low", "ci_high"))
    return f"{row['verdict']}, {effect_text(Estimate(effect, low, high, math.nan, row['n']), row['unit'])}"


# ================================================================ trainings


class Pair(NamedTuple):
    """What learning rates are tuned for."""

    network: str
    optimizer: str


class Planned(NamedTuple):
    """A training to be done."""

    facts: Facts
    job: Job


@dataclass(frozen=True, eq=False)
class Trained:
    """A finished training."""

    facts: Facts
    job: Job
    result: TrainingResult

    @property
    def diverged(self) -> bool:
        """Whether the loss is not finite at the end, or shot up and ended less than a fifth below the first step's."""
        losses = self.result.step_losses
        end = losses[-max(1, len(losses) // 10) :].mean()
        shot_up = losses.max() > 2 * losses[0] and end > 0.8 * losses[0]
        return bool(shot_up or not np.isfinite(end))

    def row(self) -> dict[str, Any]:
        """Its facts and results, for a table: how it ended."""
        return {**self.facts, **row_of(self.result.epochs[-1]), "diverged": self.diverged}


@dataclass(frozen=True)
class Choice:
    """The learning rate chosen for an optimizer, and what it was chosen from."""

    lr: float
    accuracies: dict[float, float]  # mean validation accuracy by learning rate, rising; 0 for a seed that diverged
    fits: bool = True  # whether it fits the images; only asked at the fitted horizon

    @property
    def is_inside(self) -> bool:
        """Whether lower and higher rates were tried, too."""
        return min(self.accuracies) < self.lr < max(self.accuracies)


Choices = Mapping[str, Mapping[str, Choice]]  # by setting and optimizer


@dataclass(frozen=True, eq=False)
class Tested:
    """A final network on the test images."""

    end: Score
    stopped: Score | None = None  # with the weights of the epoch with the highest validation accuracy


@dataclass(frozen=True, eq=False)
class Measurements:
    """All that a run measures."""

    sweep: pd.DataFrame
    fitted_search: pd.DataFrame
    choices: Choices
    finals: list[Trained]
    times: pd.DataFrame
    tests: dict[Trained, Tested]  # of all final networks


def measure(run: Run, plan: Plan, data: common.Dataset) -> Measurements:
    """Run all stages; ``data`` has the test images."""
    sweep = sweep_learning_rates(run, plan)
    short_search = search_short(run, plan, sweep)
    fitted_search = search_fitted(run, plan, sweep)
    noisy_search = search_noisy(run, plan, fitted_search)
    choices = choose_rates(plan, short_search, fitted_search, noisy_search)
    finals = converge(run, plan, choices)
    times = time_steps(run, plan, choices["tuned"])
    tests = test_once(run, plan, data, finals)
    return Measurements(sweep, fitted_search, choices, finals, times, tests)


def work_of_all(plan: Plan, data: common.Dataset) -> float:
    """Images to train on in all stages, as far as it is known at the start."""
    return (
        work_of_sweep(plan)
        + sum(search.expected_work(plan) for search in (Search.short(plan), Search.fitted(plan), Search.noisy(plan)))
        + work_of_finals(plan)
        + work_of_times(plan)
        + work_of_tests(plan, data)
    )


def row_of(epoch: common.Epoch) -> dict[str, Any]:
    """The scalars of an epoch, for a table; final_loss and final_accuracy are those on training images, at its end."""
    row: dict[str, Any] = {
        "epoch": epoch.number,
        "train_loss": epoch.train_loss,
        "seconds": epoch.seconds,
        "val_loss": epoch.val_loss,
        "val_accuracy": epoch.val_accuracy,
    }
    if epoch.judged is not None:
        row |= {"final_loss": epoch.judged.loss, "final_accuracy": epoch.judged.accuracy}
    return row


def table_of(runs: Sequence[Trained]) -> pd.DataFrame:
    """How trainings ended, one per row."""
    return pd.DataFrame([run.row() for run in runs])


def train_all(run: Run, table: str, planned: Sequence[Planned], earlier: Sequence[Trained] = ()) -> list[Trained]:
    """The ``earlier`` trainings and all of those ``planned``, in their order.

    Finished ones are written as ``table`` even if the training is interrupted.
    """
    finished: dict[int, Trained] = {}
    try:
        for number, result in run.train([each.job for each in planned]):
            finished[number] = Trained(planned[number].facts, planned[number].job, result)
    finally:
        trained = [*earlier, *(finished[number] for number in sorted(finished))]
        if trained:
            run.write_table(table, table_of(trained))
    return trained


# ================================================================ 1. learning rates: the sweep


def work_of_sweep(plan: Plan) -> float:
    """Images to train on, as long as the grid is not extended."""
    trainings = len(plan.grid) * len(plan.optimizers) * sum(map(plan.sweep_seeds_of, plan.networks))
    return trainings * plan.sweep.work


def sweep_learning_rates(run: Run, plan: Plan) -> pd.DataFrame:
    """Validate every learning rate for every optimizer and network, in short runs.

    A network's grid is extended, for all optimizers, while good rates lie on its edge: a range cut off looks narrow.
    Then the rate midway down every cliff at the end of a good range is tried, since interpolation is poor there.
    """
    run.progress.stage("1 learning rates")
    pairs = [Pair(*pair) for pair in itertools.product(plan.networks, plan.optimizers)]
    trained = train_all(run, "sweep.csv", plan_sweep(run.data, plan, dict.fromkeys(pairs, plan.grid)))
    for extension in range(plan.extensions + 1):
        sweep = table_of(trained)
        means = {pair: curve(sweep, *pair).mean(axis=1) for pair in pairs}
        new_rates: dict[Pair, list[float]] = {}
        if extension < plan.extensions:
            for network in plan.networks:
                mine = [pair for pair in pairs if pair.network == network]
                beyond = {rate for pair in mine for rate in rates_beyond(means[pair], plan.grid, max(POINTS) / 100)}
                new_rates |= dict.fromkeys(mine, sorted(beyond))
        is_last = not any(new_rates.values())
        if is_last:
            new_rates = {pair: cliff_rates(means[pair]) for pair in pairs}
        planned = plan_sweep(run.data, plan, new_rates)
        run.progress.expect(len(planned) * plan.sweep.work)
        trained = train_all(run, "sweep.csv", planned, trained)
        if is_last:
            break
    sweep = table_of(trained)
    for name in plan.optimizers:
        mine = sweep[(sweep.optimizer == name) & (sweep.network == plan.network)]
        if mine.groupby("lr").diverged.any().all():
            raise UserError(f"{name} diverged at every learning rate, for some seed: give a lower --lr-grid")
    return sweep


def plan_sweep(data: common.Dataset, plan: Plan, rates: Mapping[Pair, Sequence[float]]) -> list[Planned]:
    """Short runs at these learning rates of every network and optimizer."""
    split = common.split_dataset(data, plan.sweep.images)
    split = split._replace(validation=split.validation[:VALIDATED])
    planned = []
    for pair, pair_rates in rates.items():
        seeds = plan.seeds_of(Stage.SWEEP, plan.sweep_seeds_of(pair.network))
        for rate, (number, seed) in itertools.product(pair_rates, enumerate(seeds)):
            facts = {**pair._asdict(), "lr": rate, "seed": number}
            recipe = plan.recipe(pair.optimizer, rate, plan.sweep, pair.network)
            planned.append(Planned(facts, Job(recipe, seed, split)))
    return planned


def cliff_rates(means: pd.Series) -> list[float]:
    """The learning rate midway to each neighbour of the good range that loses more than 10 points to its end.

    ``means``: accuracy by learning rate, rising.
    """
    rates = set()
    heights = means.to_numpy() - (means.max() - POINTS[0] / 100)
    for step in (-1, 1):
        end = last_good(heights, step)
        if 0 <= end + step < len(means) and means.iloc[end] - means.iloc[end + step] > CLIFF:
            rates.add(rounded(math.sqrt(means.index[end] * means.index[end + step])))
    return sorted(rates - set(means.index))


def rates_beyond(means: pd.Series, grid: Sequence[float], margin: float) -> list[float]:
    """The next learning rate beyond each end of those tried, if that end's accuracy is within ``margin`` of the best.

    ``means``: accuracy by learning rate, rising.
    """
    beyond = set()
    if means.iloc[0] >= means.max() - margin:
        beyond.add(rate_below(means.index[0], grid))
    if means.iloc[-1] >= means.max() - margin:
        beyond.add(rate_above(means.index[-1], grid))
    return sorted(beyond - set(means.index))


def rate_below(rate: float, grid: Sequence[float]) -> float:
    """The next lower learning rate of the grid, which goes on beyond its ends as it ends."""
    lower = [other for other in grid if other < rate]
    if rate <= grid[0]:
        lower.append(rounded(rate * grid[0] / grid[1]))
    if rate > grid[-1]:
        lower.append(rounded(rate * grid[-2] / grid[-1]))
    return max(lower)


def rate_above(rate: float, grid: Sequence[float]) -> float:
    """The next higher learning rate of the grid, which goes on beyond its ends as it ends."""
    higher = [other for other in grid if other > rate]
    if rate >= grid[-1]:
        higher.append(rounded(rate * grid[-1] / grid[-2]))
    if rate < grid[0]:
        higher.append(rounded(rate * grid[1] / grid[0]))
    return min(higher)


def rounded(rate: float) -> float:
    """A learning rate with three digits."""
    return float(f"{rate:.3g}")


def curve(table: pd.DataFrame, network: str, optimizer: str, value: str = "val_accuracy") -> pd.DataFrame:
    """Validation accuracy, or another column, by learning rate (rows, rising) and seed (columns)."""
    mine = table[(table.network == network) & (table.optimizer == optimizer)]
    return mine.pivot(index="lr", columns="seed", values=value)


def mean_accuracies(table: pd.DataFrame, network: str, optimizer: str) -> pd.Series:
    """Mean validation accuracy by learning rate, rising; a seed that diverged counts as 0."""
    counted = table.assign(val_accuracy=table.val_accuracy.where(~table.diverged, 0.0))
    return curve(counted, network, optimizer).mean(axis=1)


class GoodRange(NamedTuple):
    """The learning rates that are good."""

    low: float
    high: float
    is_censored: bool  # the grid cuts it off

    @property
    def decades(self) -> float:
        """Its width."""
        return math.log10(self.high / self.low)


def good_range(accuracies: pd.DataFrame, points: float) -> GoodRange:
    """The learning rates within ``points`` of the best, of a ``curve``.

    Measured on the mean over the seeds, around its best rate, interpolating linearly over log(rate).
    """
    means = accuracies.mean(axis=1)
    log = np.log(means.index.to_numpy(float))
    heights = means.to_numpy() - (means.max() - points / 100)
    ends = []
    is_censored = False
    for step in (-1, 1):
        at = last_good(heights, step)
        if 0 <= at + step < len(log):
            share = heights[at] / (heights[at] - heights[at + step])
            ends.append(math.exp(log[at] + share * (log[at + step] - log[at])))
        else:
            ends.append(math.exp(log[at]))
            is_censored = True
    return GoodRange(ends[0], ends[1], is_censored)


def last_good(heights: np.ndarray, step: int) -> int:
    """The last index, from the highest on downwards (step -1) or upwards (1), up to which no height is negative."""
    at = int(heights.argmax())
    while 0 <= at + step < len(heights) and heights[at + step] >= 0:
        at += step
    return at


def range_difference(first: pd.DataFrame, last: pd.DataFrame, points: float) -> Estimate:
    """How many decades wider the last one's range is, of ``curve``s that share their seeds.

    The interval is a jackknife's over the seeds, since ranges are those of mean curves.
    """

    def difference(seeds: pd.Index) -> float:
        return good_range(last[seeds], points).decades - good_range(first[seeds], points).decades

    seeds = first.columns
    if len(seeds) < 2:
        return common.interval([difference(seeds)])
    return common.jackknife_interval(difference(seeds), [difference(seeds.drop(seed)) for seed in seeds])


def expected_best(accuracies: pd.DataFrame) -> pd.DataFrame:
    """The expected highest accuracy of k different learning rates, drawn at random from a ``curve``.

    Rows: k = 1 to all; columns: seeds. Dodge et al. 2019, without replacement: k draws hold the i-th lowest accuracy
    as their highest with probability C(i - 1, k - 1) / C(n, k).
    """
    n = len(accuracies)
    rising = np.sort(accuracies.to_numpy(), axis=0)
    rows = []
    for k in range(1, n + 1):
        chances = [math.comb(i - 1, k - 1) / math.comb(n, k) for i in range(1, n + 1)]
        rows.append(np.array(chances) @ rising)
    return pd.DataFrame(rows, index=pd.RangeIndex(1, n + 1, name="k"), columns=accuracies.columns)


# ================================================================ 1, 2. learning rates: at the horizon


@dataclass(frozen=True)
class Search:
    """A search for learning rates at the horizon at which they are used."""

    table: str
    horizon: Horizon
    pairs: list[Pair]
    stage: Stage
    margin: float = 0.0  # the grid is followed outwards while an end loses at most this much accuracy
    label_noise: float = 0.0
    usual_rates: int = 5  # of a pair, for the progress bar

    @classmethod
    def short(cls, plan: Plan) -> Search:
        """The search at the short horizon."""
        pairs = [Pair(plan.network, name) for name in plan.optimizers]
        return cls("candidates.csv", plan.short, pairs, Stage.SHORT_SEARCH, usual_rates=4)

    @classmethod
    def fitted(cls, plan: Plan) -> Search:
        """The search at the fitted horizon, which finds ranges as well."""
        pairs = [Pair(*pair) for pair in itertools.product(plan.networks, plan.optimizers)]
        margin = POINTS[0] / 100
        return cls("fitted_rates.csv", plan.fitted, pairs, Stage.FITTED_SEARCH, margin, usual_rates=6)

    @classmethod
    def noisy(cls, plan: Plan) -> Search:
        """The search with wrong labels."""
        pairs = [Pair(plan.network, name) for name in plan.optimizers]
        return cls("noisy_rates.csv", plan.fitted, pairs, Stage.NOISY_SEARCH, label_noise=plan.noise)

    def grid(self, plan: Plan, pair: Pair) -> list[float]:
        """The learning rates for a pair: on the network that is not tested, every other one."""
        is_coarse = pair.network != plan.network and len(plan.grid) > 3
        return plan.grid[::2] if is_coarse else plan.grid

    def expected_work(self, plan: Plan) -> float:
        """Images to train on, as a rule."""
        return len(self.pairs) * self.usual_rates * SEARCH_SEEDS * self.horizon.work


def search_short(run: Run, plan: Plan, sweep: pd.DataFrame) -> pd.DataFrame:
    """Learning rates at the short horizon, from the best of the sweep.

    A best rate next to one that diverged gets more seeds, so that one that diverges now and then does not win.
    """
    run.progress.stage("1 learning rates at the short horizon")
    search = Search.short(plan)
    starts = {pair: best_rate(sweep, pair) for pair in search.pairs}
    trained = search_rates(run, plan, search, starts)
    while True:
        table = table_of(trained)
        edges = {pair: [best_rate(table, pair)] for pair in search.pairs if is_doubtful(table, pair)}
        if not edges:
            return table
        planned = plan_search(run.data, plan, search, edges, range(SEARCH_SEEDS, SEARCH_SEEDS + EDGE_SEEDS))
        run.progress.expect(sum(each.job.work for each in planned))
        trained = train_all(run, search.table, planned, trained)


def search_fitted(run: Run, plan: Plan, sweep: pd.DataFrame) -> pd.DataFrame:
    """Learning rates at the fitted horizon, from the best of the sweep."""
    run.progress.stage("2 learning rates at the fitted horizon")
    search = Search.fitted(plan)
    starts = {pair: best_rate(sweep, pair) for pair in search.pairs}
    return table_of(search_rates(run, plan, search, starts))


def search_noisy(run: Run, plan: Plan, fitted_search: pd.DataFrame) -> pd.DataFrame:
    """Learning rates with wrong labels, from the lowest good one with correct labels, at which little is memorised."""
    run.progress.stage("2 learning rates with wrong labels")
    search = Search.noisy(plan)
    starts = {}
    for pair in search.pairs:
        means = mean_accuracies(fitted_search, *pair)
        starts[pair] = means.index[means >= means.max() - POINTS[0] / 100].min()
    return table_of(search_rates(run, plan, search, starts))


def search_rates(run: Run, plan: Plan, search: Search, starts: Mapping[Pair, float]) -> list[Trained]:
    """All trainings of a search that begins with each pair's start and its neighbours of the grid.

    Then the grid is followed outwards while an end is good, and last, the rate midway between the best and a neighbour
    that loses more than 2 points to it, perhaps by diverging, is tried; for ranges also the one midway down a cliff.
    """
    grids = {pair: search.grid(plan, pair) for pair in search.pairs}
    new_rates = {
        pair: sorted({rate_below(start, grids[pair]), start, rate_above(start, grids[pair])})
        for pair, start in starts.items()
    }
    announced = search.expected_work(plan)
    extensions = 0
    is_last = False
    trained: list[Trained] = []
    while any(new_rates.values()):
        planned = plan_search(run.data, plan, search, new_rates, range(SEARCH_SEEDS))
        work = sum(each.job.work for each in planned)
        run.progress.expect(max(0, work - announced))
        announced = max(0, announced - work)
        trained = train_all(run, search.table, planned, trained)
        if is_last:
            break
        table = table_of(trained)
        means = {pair: mean_accuracies(table, *pair) for pair in search.pairs}
        new_rates = {}
        if extensions < plan.extensions:
            new_rates = {pair: rates_beyond(means[pair], grids[pair], search.margin) for pair in search.pairs}
            extensions += 1
        if not any(new_rates.values()):
            new_rates = {pair: midway_rates(means[pair]) for pair in search.pairs}
            if search.margin:  # ranges are measured, too
                new_rates = {pair: sorted({*new_rates[pair], *cliff_rates(means[pair])}) for pair in search.pairs}
            is_last = True
    run.progress.advance(announced)
    return trained


def plan_search(
    data: common.Dataset, plan: Plan, search: Search, rates: Mapping[Pair, Sequence[float]], numbers: Sequence[int]
) -> list[Planned]:
    """The trainings of a search at these learning rates of each pair, with seeds of these ``numbers``."""
    split = common.split_dataset(data, search.horizon.images)
    if search.horizon.name == FIT:  # few images to train on, but more to choose by
        split = split._replace(validation=common.split_dataset(data, plan.short.images).validation[:VALIDATED])
    most = max(numbers) + 1
    seeds = plan.seeds_of(search.stage, most)
    label_seeds = plan.seeds_of(Stage.NOISY_SEARCH_LABELS, most)
    planned = []
    for number in numbers:
        labels = wrong_labels(data, split, search.label_noise, label_seeds[number]) if search.label_noise else None
        for pair, pair_rates in rates.items():
            for rate in pair_rates:
                recipe = plan.recipe(pair.optimizer, rate, search.horizon, pair.network)
                facts = {**pair._asdict(), "lr": rate, "label_noise": search.label_noise, "seed": number}
                judged = split.train[:JUDGED]
                job = Job(recipe, seeds[number], split, labels, judged=judged, scores_every_epoch=False)
                planned.append(Planned(facts, job))
    return planned


def best_rate(table: pd.DataFrame, pair: Pair) -> float:
    """The learning rate with the highest mean accuracy."""
    return float(mean_accuracies(table, *pair).idxmax())


def is_doubtful(table: pd.DataFrame, pair: Pair) -> bool:
    """Whether a run diverged at a learning rate next to the best one, which does not have the additional seeds yet."""
    by_rate = table[(table.network == pair.network) & (table.optimizer == pair.optimizer)].groupby("lr").diverged
    at = list(by_rate.any().index).index(best_rate(table, pair))
    has_diverged = by_rate.any().iloc[max(0, at - 1) : at + 2].any()
    return bool(has_diverged and by_rate.size().iloc[at] == SEARCH_SEEDS)


def midway_rates(means: pd.Series) -> list[float]:
    """The learning rates midway, in logarithms, between the best one and a neighbour that is not good."""
    best = list(means.index).index(means.idxmax())
    neighbours = [at for at in (best - 1, best + 1) if 0 <= at < len(means)]
    bad = [at for at in neighbours if means.iloc[at] < means.max() - POINTS[0] / 100]
    midway = {rounded(math.sqrt(means.index[best] * means.index[at])) for at in bad}
    return sorted(midway - set(means.index))


def choose_rates(
    plan: Plan, short_search: pd.DataFrame, fitted_search: pd.DataFrame, noisy_search: pd.DataFrame
) -> Choices:
    """The learning rates of every setting."""
    choices: dict[str, dict[str, Choice]] = {setting: {} for setting in SETTINGS}
    for name in plan.optimizers:
        choices["tuned"][name] = choose_rate(mean_accuracies(short_search, plan.network, name))
        choices["default"][name] = Choice(default_rate(name), {})
        fits = curve(fitted_search, plan.network, name, "final_accuracy").min(axis=1) >= FITTED_IN_SEARCH
        choices["fitted"][name] = choose_fitted_rate(mean_accuracies(fitted_search, plan.network, name), fits)
        choices["noise"][name] = choose_rate(mean_accuracies(noisy_search, plan.network, name))
        choices["noise_fitted"][name] = choices["fitted"][name]
    return choices


def choose_rate(means: pd.Series) -> Choice:
    """The learning rate with the highest accuracy; ``means``: accuracy by learning rate, rising."""
    return Choice(float(means.idxmax()), means.to_dict())


def choose_fitted_rate(means: pd.Series, fits: pd.Series) -> Choice:
    """Of the learning rates that fit the images, the lowest that is level with the best; the best if none fits.

    ``means``: accuracy by learning rate, rising; ``fits``: whether it fits.
    """
    if not fits.any():
        return replace(choose_rate(means), fits=False)
    fitting = means[fits]
    level = fitting[fitting >= fitting.max() - MARGIN / 100]
    return Choice(float(level.index[0]), means.to_dict())


# ================================================================ 3. convergence


def work_of_finals(plan: Plan) -> float:
    """Images to train on."""
    works = [plan.horizon(setting.horizon).work for setting in SETTINGS.values()]
    return plan.seeds * len(plan.optimizers) * sum(works)


def converge(run: Run, plan: Plan, choices: Choices) -> list[Trained]:
    """Train on fresh seeds in all settings."""
    run.progress.stage("3 convergence")
    finals = train_all(run, "finals.csv", plan_finals(run.data, plan, choices))
    history = []
    steps = []
    for final in finals:
        agreements = agreement_with_wrong_labels(final, run.data)
        for epoch, agreement in zip(final.result.epochs, agreements, strict=True):
            history.append({**final.facts, **row_of(epoch), "agreement": agreement})
        for step, loss in enumerate(final.result.step_losses, 1):
            steps.append({**final.facts, "train_loss": loss, "step": step})
    run.write_table("history.csv", pd.DataFrame(history))
    run.write_table("step_loss.csv", pd.DataFrame(steps))
    return finals


def plan_finals(data: common.Dataset, plan: Plan, choices: Choices) -> list[Planned]:
    """The final runs, whole seeds first."""
    label_seeds = plan.seeds_of(Stage.LABELS, plan.seeds)
    planned = []
    for number, seed in enumerate(plan.seeds_of(Stage.FINAL, plan.seeds)):
        for name, (key, setting) in itertools.product(plan.optimizers, SETTINGS.items()):
            horizon = plan.horizon(setting.horizon)
            split = common.split_dataset(data, horizon.images)
            labels = wrong_labels(data, split, plan.noise, label_seeds[number]) if setting.has_wrong_labels else None
            lr = choices[key][name].lr
            facts = {
                "optimizer": name,
                "setting": key,
                "horizon": horizon.name,
                "lr": lr,
                "label_noise": plan.noise if setting.has_wrong_labels else 0.0,
                "seed": number,
            }
            job = Job(
                plan.recipe(name, lr, horizon),
                seed,
                split,
                labels,
                judged=split.train[:JUDGED],
                keeps_network=True,
                keeps_best=horizon.name == FIT,
            )
            planned.append(Planned(facts, job))
    return planned


def wrong_labels(data: common.Dataset, split: common.Split, share: float, seed: int) -> Tensor:
    """The labels of all training images, int64 (N,), with a ``share`` of those trained on changed."""
    labels = data.train_labels.clone()
    labels[split.train] = flip_labels(labels[split.train], share, len(data.classes), seed)
    return labels


def flip_labels(labels: Tensor, share: float, num_classes: int, seed: int) -> Tensor:
    """``labels`` (N,) int64 with exactly round(share * N) of them changed to another class at random."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    offset = torch.randint(1, num_classes, (len(wrong),), generator=generator)
    noisy = labels.clone()
    noisy[wrong] = (noisy[wrong] + offset) % num_classes
    return noisy


def agreement_with_wrong_labels(final: Trained, data: common.Dataset) -> list[float]:
    """The share of the wrongly labelled training images that the network gives their wrong label, by epoch.

    What a network memorises; nan if all labels are correct.
    """
    job = final.job
    if job.labels is None or job.judged is None:
        return [math.nan] * len(final.result.epochs)
    is_wrong = (job.labels != data.train_labels)[job.judged].numpy()
    return [float(epoch.judged.right[is_wrong].mean()) for epoch in final.result.epochs if epoch.judged is not None]


def runs_of(finals: Sequence[Trained], optimizer: str, setting: str) -> list[Trained]:
    """The final runs of an optimizer in a setting, by seed."""
    found = [run for run in finals if (run.facts["optimizer"], run.facts["setting"]) == (optimizer, setting)]
    return sorted(found, key=lambda run: run.facts["seed"])


def running_mean(losses: np.ndarray) -> np.ndarray:
    """The mean of every step's loss and those before it, over a fiftieth of all steps."""
    return pd.Series(losses).rolling(max(1, len(losses) // 50), min_periods=1).mean().to_numpy()


def time_to_target(plan: Plan, finals: Sequence[Trained], times: pd.DataFrame) -> pd.DataFrame:
    """When the running mean of the training loss first reaches the target at the short horizon; nan if never.

    Seconds are steps times the median time of a step in ``times``, when nothing else ran.
    """
    step_ms = times.groupby("optimizer").step_ms.median()
    rows = []
    for run in finals:
        if run.facts["horizon"] != SHORT:
            continue
        losses = running_mean(run.result.step_losses)
        below = np.flatnonzero(losses <= plan.target_loss)
        steps = float(below[0] + 1) if len(below) else math.nan
        seconds = steps * step_ms[run.facts["optimizer"]] / 1000
        facts = {name: run.facts[name] for name in ("optimizer", "setting", "lr", "seed")}
        rows.append({**facts, "target_loss": plan.target_loss, "steps": steps, "seconds": seconds})
    return pd.DataFrame(rows)


# ================================================================ 4. time, 5. test


def work_of_start(plan: Plan) -> float:
    """Images to train on in a process for timing, which warms up for a turn."""
    return len(plan.optimizers) * (1 + plan.turns) * plan.steps * plan.training.batch_size


def work_of_times(plan: Plan) -> float:
    """Images to train on."""
    return plan.starts * work_of_start(plan)


class StepTime(NamedTuple):
    """Of a training step, from drawing the batch to the scheduler."""

    step_ms: float
    update_us: float  # of it, in optimizer.step()


def time_steps(run: Run, plan: Plan, choices: Mapping[str, Choice]) -> pd.DataFrame:
    """The time of a training step and of its optimizer.step(), of every optimizer: a row per fresh process.

    Within a single-threaded process the optimizers take turns, and nothing else runs. (--quick uses the workers.)
    """
    run.progress.stage("4 time of a step")
    recipes = [plan.recipe(name, choice.lr, plan.sweep) for name, choice in choices.items()]
    rows = []
    for start in range(plan.starts):
        workers = run.workers
        if plan.times_in_fresh_processes:
            workers = common.Workers(1, run.workers.runtime, run.workers.path)
        try:
            (times,) = workers.run(take_turns, recipes, plan.turns, plan.steps)
        finally:
            if plan.times_in_fresh_processes:
                workers.stop()
        rows += [{"start": start, "optimizer": name, **found._asdict()} for name, found in times.items()]
        run.progress.advance(work_of_start(plan))
    table = pd.DataFrame(rows).sort_values(["start", "optimizer"])
    run.write_table("step_time.csv", table)
    return table


def take_turns(
    data: common.Dataset, runtime: common.Runtime, recipes: Sequence[Recipe], turns: int, steps: int
) -> Generator[dict[str, StepTime], None, None]:
    """In a worker: yields, once, the times of every recipe's optimizer, medians over turns and over all calls."""
    split = common.split_dataset(data, steps * recipes[0].training.batch_size)
    models = [common.make_model(recipe.network, data, split) for recipe in recipes]
    step_times: dict[str, list[float]] = {recipe.training.optimizer: [] for recipe in recipes}
    update_times: dict[str, list[float]] = {recipe.training.optimizer: [] for recipe in recipes}
    for turn in range(1 + turns):
        for recipe, model in zip(recipes, models, strict=True):
            with StepClock(runtime) as clock:
                epoch = next(common.train_epochs(model, data, recipe.training, runtime, split.train))
            if turn > 0:  # the first one warms up
                step_times[recipe.training.optimizer].append(1e3 * epoch.seconds / len(epoch.step_losses))
                update_times[recipe.training.optimizer] += clock.seconds
    yield {
        name: StepTime(float(np.median(step_times[name])), 1e6 * float(np.median(update_times[name])))
        for name in step_times
    }


class StepClock:
    """Measures every call of optimizer.step(), in seconds, while it is entered."""

    def __init__(self, runtime: common.Runtime) -> None:
        self.seconds: list[float] = []
        self._is_cuda = runtime.device.startswith("cuda")
        self._started = 0.0

    def __enter__(self) -> StepClock:
        self._hooks = [register_optimizer_step_pre_hook(self._start), register_optimizer_step_post_hook(self._stop)]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _start(self, *_: object) -> None:
        self._synchronise()
        self._started = time.perf_counter()

    def _stop(self, *_: object) -> None:
        self._synchronise()
        self.seconds.append(time.perf_counter() - self._started)

    def _synchronise(self) -> None:
        if self._is_cuda:
            torch.cuda.synchronize()


def images_to_test(plan: Plan, data: common.Dataset) -> Tensor:
    """Indices of test images of all classes; all of them, unless the plan has a limit."""
    count = len(data.test_labels)
    step = 1 if plan.most_test_images is None else max(1, count // plan.most_test_images)
    return torch.arange(0, count, step)


def work_of_test(plan: Plan, data: common.Dataset) -> float:
    """What testing a final run costs, in images to train on: without a backward pass, a third."""
    return len(images_to_test(plan, data)) / 3


def work_of_tests(plan: Plan, data: common.Dataset) -> float:
    """What testing all final runs costs."""
    return plan.seeds * len(plan.optimizers) * len(SETTINGS) * work_of_test(plan, data)


def test_once(run: Run, plan: Plan, data: common.Dataset, finals: Sequence[Trained]) -> dict[Trained, Tested]:
    """Read the test set, once, for all final networks."""
    run.progress.stage("5 test")
    index = images_to_test(plan, data)
    labels = data.test_labels[index]

    def test(final: Trained) -> Tested:
        scores = []
        for network in filter(None, (final.result.network, final.result.best_network)):
            logits = common.predict(network.rebuild(), data.test_images, run.runtime, index)
            scores.append(common.score(logits, labels))
        return Tested(*scores)

    tests = {}
    with multiprocessing.pool.ThreadPool(run.workers.count) as pool:
        for final, tested in zip(finals, pool.imap(test, finals), strict=True):
            tests[final] = tested
            run.progress.advance(work_of_test(plan, data))
    run.write_table("test.csv", table_of_tests(tests))
    return tests


def table_of_tests(tests: Mapping[Trained, Tested]) -> pd.DataFrame:
    """The test's results, one final run per row; stopped: with the weights of the best epoch."""
    rows = []
    for final, tested in tests.items():
        row = {name: final.facts[name] for name in ("optimizer", "setting", "horizon", "seed")}
        row |= {"test_loss": tested.end.loss, "test_accuracy": tested.end.accuracy}
        if tested.stopped is not None:
            row |= {"stopped_test_loss": tested.stopped.loss, "stopped_test_accuracy": tested.stopped.accuracy}
        rows.append(row)
    return pd.DataFrame(rows)


# ================================================================ verdicts


@dataclass(frozen=True)
class Claim:
    """That one optimizer has an advantage over another; only primary claims get a verdict, by ``correct``."""

    id: str
    horizon: str
    favourite: str  # the optimizer that a positive effect speaks for
    rival: str
    advantage: str  # what the better one has
    when: str  # trained how, on what
    unit: str
    estimate: Estimate
    sample: str = "seeds"  # what n counts
    margin: float = 0.0  # the estimate's p is against effects up to this one
    is_primary: bool = False
    not_judged: str = ""  # why a primary claim has no verdict
    p_holm: float | None = None

    @property
    def quantity(self) -> str:
        """What is compared: the advantage without its comparative."""
        return self.advantage.partition(" ")[2]

    @property
    def nothing_shown(self) -> str:
        """What is found if the effect is not significantly beyond the margin."""
        return f"no difference in {self.quantity} beyond {self.margin:g} {self.unit.rstrip('s')} is shown"

    @property
    def statement(self) -> str:
        """What is claimed."""
        return f"{self.favourite} has the {self.advantage} {self.when}"

    @property
    def verdict(self) -> str | None:
        """What the run says about a primary claim."""
        if not self.is_primary:
            return None
        if self.p_holm is None:
            return "not judged"
        if self.p_holm >= common.SIGNIFICANCE:
            return "cannot be told apart"
        return "supported" if self.estimate.mean > 0 else "contradicted"

    @property
    def effect(self) -> str:
        """The favourite's advantage."""
        return effect_text(self.estimate, self.unit)

    @property
    def sentence(self) -> str:
        """The conclusion about a primary claim: who wins, by how much, and what that says about the claim."""
        when = self.when[0].upper() + self.when[1:]
        estimate = self.estimate
        n = f"n = {estimate.n} {self.sample}"
        if self.verdict == "not judged":
            lead = f"{self.favourite}'s lead is {self.effect}, {n}"
            return f"{when}, {lead}; the claim that it has the {self.advantage} is not judged: {self.not_judged}."
        if self.verdict == "cannot be told apart":
            claim = f"the claim that it has the {self.advantage} is not supported"
            if self.margin:
                lead = f"{self.favourite}'s lead over {self.rival} is {self.effect}, {n}"
                return f"{when}, {self.nothing_shown}: {lead}; {claim}."
            corrected = ""
            if estimate.low * estimate.high > 0:  # the interval is on one side of 0
                corrected = f" (p = {self.p_holm:.2f} when corrected for five claims)"
            return (
                f"{when}, {self.favourite} and {self.rival} cannot be told apart in {self.quantity}: "
                f"{self.favourite}'s lead is {self.effect}{corrected}, {n}; {claim}."
            )
        if estimate.mean > 0:
            winner, claim = self.favourite, "the claim"
        else:
            winner, claim = self.rival, f"the claim that {self.favourite} has it"
            estimate = estimate.times(-1)
        size = estimate.text(self.unit, ".3g")
        return f"{when}, {winner} has the {self.advantage}, by {size}, {n}; {claim} is {self.verdict}."

    def row(self) -> dict[str, Any]:
        """As in claims.csv and summary.json."""
        return {
            "id": self.id,
            "horizon": self.horizon,
            "statement": self.statement,
            "effect": self.estimate.mean,
            "ci_low": self.estimate.low,
            "ci_high": self.estimate.high,
            "n": self.estimate.n,
            "unit": self.unit,
            "primary": self.is_primary,
            "p": self.estimate.p,
            "p_holm": self.p_holm,
            "verdict": self.verdict,
            "not_judged": self.not_judged,
        }


def effect_text(estimate: Estimate, unit: str) -> str:
    """An effect, with its interval if n is large enough for one."""
    if estimate.n < FEWEST:
        estimate = estimate._replace(low=-math.inf, high=math.inf)
    return estimate.text(unit, "+.3g")


def correct(claims: Sequence[Claim]) -> list[Claim]:
    """The claims with p-values corrected for the number of all, but for those that are not judged."""
    corrected = common.holm([1.0 if claim.not_judged else claim.estimate.p for claim in claims])
    return [
        replace(claim, p_holm=None if claim.not_judged else float(p))
        for claim, p in zip(claims, corrected, strict=True)
    ]


def table_of_finals(measured: Measurements) -> pd.DataFrame:
    """How the final runs ended, on training, validation and test images."""
    keys = ["optimizer", "setting", "horizon", "seed"]
    return table_of(measured.finals).merge(table_of_tests(measured.tests), on=keys, how="left")


@dataclass(frozen=True)
class Fit:
    """The training accuracy of an optimizer's final networks at the fitted horizon, with correct labels."""

    mean: float
    min: float
    n: int
    fitted: int  # how many of them have fitted


def fit_of(measured: Measurements, optimizer: str) -> Fit:
    """How well an optimizer's networks have fitted their images."""
    runs = runs_of(measured.finals, optimizer, "fitted")
    accuracies = np.array([run.result.judged.accuracy for run in runs if run.result.judged is not None])
    fitted = int((accuracies >= FITTED).sum())
    return Fit(float(accuracies.mean()), float(accuracies.min()), len(accuracies), fitted)


@dataclass(frozen=True, eq=False)
class Comparison:
    """How the first optimizer, A, and the last, B, differ, paired by seed (times: by process)."""

    plan: Plan
    measured: Measurements

    def losses(self, setting: str, metric: str = "final_loss") -> Estimate:
        """A's loss at the end minus B's, in nats; one that is not finite counts as that of guessing."""
        finals = table_of_finals(self.measured)
        losses = finals[finals.setting == setting].pivot(index="seed", columns="optimizer", values=metric)
        losses = losses.replace(np.inf, np.nan).fillna(self.plan.chance_loss)
        return common.interval((losses[self.plan.a] - losses[self.plan.b]).to_numpy())

    def tested(self, name: str, setting: str, is_stopped: bool = False) -> np.ndarray:
        """Whether an optimizer's networks classify the test images correctly, (seeds, images) in %."""
        rows = []
        for run in runs_of(self.measured.finals, name, setting):
            tested = self.measured.tests[run]
            score = tested.stopped if is_stopped else tested.end
            assert score is not None
            rows.append(score.right)
        return 100.0 * np.stack(rows)

    def test_accuracies(self, setting: str, is_stopped: bool = False, margin: float = 0) -> Estimate:
        """A's test accuracy minus B's, in points, at the end or with early stopping; p is against up to ``margin``."""
        first, last = (self.tested(name, setting, is_stopped) for name in (self.plan.a, self.plan.b))
        estimate = common.crossed_interval(first - last)
        if abs(estimate.mean) <= margin:
            return estimate._replace(p=1.0)
        beyond = common.crossed_interval(first - last - math.copysign(margin, estimate.mean))
        return estimate._replace(p=beyond.p)

    def lost_to_wrong_labels(self, setting: str) -> Estimate:
        """The test accuracy that A loses to wrong labels minus what B loses, in points."""
        lost = [self.tested(name, "fitted") - self.tested(name, setting) for name in (self.plan.a, self.plan.b)]
        return common.crossed_interval(lost[0] - lost[1])

    def ranges(self, table: pd.DataFrame, network: str, points: float) -> Estimate:
        """How many decades wider B's range of good learning rates is."""
        first, last = (curve(table, network, name) for name in (self.plan.a, self.plan.b))
        return range_difference(first, last, points)

    def step_times(self) -> Estimate:
        """How much longer B's training step takes, in %."""
        times = self.measured.times.pivot(index="start", columns="optimizer", values="step_ms")
        return common.interval((100 * (times[self.plan.b] / times[self.plan.a] - 1)).to_numpy())

    def update_times(self) -> Estimate:
        """How much longer B's optimizer.step() takes, in % of A's whole step."""
        times = self.measured.times.pivot(index="start", columns="optimizer")
        updates = times["update_us"]
        longer_ms = (updates[self.plan.b] - updates[self.plan.a]) / 1000
        return common.interval((100 * longer_ms / times["step_ms"][self.plan.a]).to_numpy())

    def at_equal_fit(self, metric: str, factor: float = 1) -> Estimate:
        """A's validation accuracy or loss minus B's, between rates at which both end with the same training loss.

        At the training loss that the less fitted of both reaches at its tuned rate, interpolated over the logarithm of
        the training loss of the search's runs, seed by seed; nan where a search does not reach it.
        """
        loss = equal_loss(self.plan, self.measured)
        search = self.measured.fitted_search
        values = []
        for name in (self.plan.a, self.plan.b):
            ends = curve(search, self.plan.network, name, metric)
            losses = curve(search, self.plan.network, name, "final_loss")
            values.append(np.array([value_at(loss, losses[seed].to_numpy(), ends[seed].to_numpy()) for seed in ends]))
        return common.interval(factor * (values[0] - values[1]))

    def generalisation_gaps(self) -> Estimate:
        """B's gap from training to test accuracy minus A's, tuned, short, in points."""
        gaps = []
        for name in (self.plan.a, self.plan.b):
            runs = runs_of(self.measured.finals, name, "tuned")
            trained = [run.result.judged.accuracy for run in runs if run.result.judged is not None]
            gaps.append(100 * np.array(trained) - self.tested(name, "tuned").mean(axis=1))
        return common.interval(gaps[1] - gaps[0])


def equal_loss(plan: Plan, measured: Measurements) -> float:
    """The training loss for a comparison at equal fit: the median of the less fitted one's final networks."""
    finals = table_of(measured.finals)
    fitted = finals[(finals.setting == "fitted") & finals.optimizer.isin([plan.a, plan.b])]
    return float(fitted.groupby("optimizer").final_loss.median().max())


def value_at(loss: float, losses: np.ndarray, values: np.ndarray) -> float:
    """The value at a training loss, interpolated over log(loss); nan outside the losses that there are.

    ``losses``, ``values``: by learning rate, rising. Rates above the one with the lowest loss, which fit less well
    again, are left out.
    """
    usable = losses > 0
    if not loss > 0 or not usable.any():
        return math.nan
    best = int(np.where(usable, losses, np.inf).argmin())
    usable[best + 1 :] = False
    order = losses[usable].argsort()
    logs = np.log(losses[usable][order])
    return float(np.interp(math.log(loss), logs, values[usable][order], left=math.nan, right=math.nan))


def judge_claims(plan: Plan, measured: Measurements) -> list[Claim]:
    """The five primary claims with Holm-corrected verdicts, then the exploratory comparisons, without."""
    comparison = Comparison(plan, measured)
    primary = [
        lower_loss(plan, comparison),
        lr_robustness(plan, comparison),
        cheaper_step(plan, comparison),
        better_generalisation(plan, comparison),
        noise_robustness(plan, comparison),
    ]
    claims = []
    for claim in primary:
        estimate = claim.estimate
        too_few = f"{estimate.n} {claim.sample} are too few" if estimate.n < FEWEST else ""
        claims.append(replace(claim, is_primary=True, not_judged=too_few or claim.not_judged))
    return [*correct(claims), *explore(plan, comparison)]


def lower_loss(plan: Plan, comparison: Comparison) -> Claim:
    """B gets further."""
    estimate = comparison.losses("tuned")
    claim = make_claim(plan, "lower_loss", SHORT, plan.b, "lower training loss", estimate, "nats")
    return replace(claim, not_judged=why_not_tuned(plan, comparison.measured, "tuned"))


def lr_robustness(plan: Plan, comparison: Comparison) -> Claim:
    """B depends less on its learning rate."""
    advantage = f"wider range of learning rates within {POINTS[0]} points of its best"
    estimate = comparison.ranges(comparison.measured.sweep, plan.network, POINTS[0])
    when = f"after {plan.sweep.words}"
    claim = make_claim(plan, "lr_robustness", SHORT, plan.b, advantage, estimate, "decades", when)
    return replace(claim, not_judged=why_range_is_open(plan, comparison.measured))


def cheaper_step(plan: Plan, comparison: Comparison) -> Claim:
    """A computes less."""
    when = f"for batches of {plan.training.batch_size} images in one thread"
    estimate = comparison.update_times()
    advantage = "cheaper optimizer.step()"
    unit = "% of a training step"
    return make_claim(plan, "cheaper_step", SHORT, plan.a, advantage, estimate, unit, when, "processes")


def better_generalisation(plan: Plan, comparison: Comparison) -> Claim:
    """A classifies images better that it has not seen."""
    estimate = comparison.test_accuracies("fitted", margin=MARGIN)
    claim = make_claim(plan, "better_generalisation", FIT, plan.a, "higher test accuracy", estimate, "points")
    why = why_not_fitted(plan, comparison.measured) or why_not_tuned(plan, comparison.measured, "fitted")
    return replace(claim, margin=MARGIN, not_judged=why)


def noise_robustness(plan: Plan, comparison: Comparison) -> Claim:
    """B is better when labels are wrong."""
    estimate = comparison.test_accuracies("noise", margin=MARGIN).times(-1)
    when = f"after {plan.fitted.words} with {100 * plan.noise:g} % wrong labels, tuned for them"
    claim = make_claim(plan, "noise_robustness", FIT, plan.b, "higher test accuracy", estimate, "points", when)
    why = why_cannot_fit(plan, comparison.measured) or why_not_tuned(plan, comparison.measured, "noise")
    return replace(claim, margin=MARGIN, not_judged=why)


def make_claim(
    plan: Plan,
    name: str,
    horizon: str,
    favourite: str,
    advantage: str,
    estimate: Estimate,
    unit: str,
    when: str = "",
    sample: str = "seeds",
) -> Claim:
    """A claim about A and B; ``when``: after so many epochs, unless it says otherwise."""
    rival = plan.a if favourite == plan.b else plan.b
    tuned = {SHORT: f"after {plan.short.words}, tuned", FIT: f"once fitted ({plan.fitted.words}, tuned)"}
    when = when or tuned[horizon]
    return Claim(name, horizon, favourite, rival, advantage, when, unit, estimate, sample)


def why_range_is_open(plan: Plan, measured: Measurements) -> str:
    """Why ranges of learning rates cannot be compared; empty if they can."""
    for name in (plan.a, plan.b):
        if good_range(curve(measured.sweep, plan.network, name), POINTS[0]).is_censored:
            return f"the range of {name} goes on beyond the grid; give another --lr-grid"
    return ""


def why_not_fitted(plan: Plan, measured: Measurements) -> str:
    """Why the final networks have not fitted their images; empty if they have."""
    for name in (plan.a, plan.b):
        fit = fit_of(measured, name)
        if fit.fitted < fit.n:
            return (
                f"{fit.fitted} of {fit.n} networks trained by {name} have fitted their images (lowest training "
                f"accuracy {100 * fit.min:.1f} %); try more --fit-epochs"
            )
    return ""


def why_not_tuned(plan: Plan, measured: Measurements, setting: str) -> str:
    """Why learning rates are not the best ones; empty if they are."""
    for name in (plan.a, plan.b):
        if not measured.choices[setting][name].is_inside:
            return f"the best learning rate of {name} is the outermost of those tried; give another --lr-grid"
    return ""


def why_cannot_fit(plan: Plan, measured: Measurements) -> str:
    """Why the fitted horizon is none; empty if it is one."""
    for name in (plan.a, plan.b):
        if not measured.choices["fitted"][name].fits:
            return f"{name} does not even fit correct labels; try more --fit-epochs"
    return ""


def explore(plan: Plan, comparison: Comparison) -> list[Claim]:
    """What else is compared."""
    return [
        *explore_short(plan, comparison),
        *explore_fitted(plan, comparison),
        *explore_noise(plan, comparison),
        *explore_ranges(plan, comparison),
    ]


def explore_short(plan: Plan, comparison: Comparison) -> list[Claim]:
    """More about the short horizon."""
    default = "at the default learning rates, as peaks"
    loss = "lower training loss"
    accuracy = "higher test accuracy"
    gap = "smaller gap from training to test accuracy"
    whole = "timed as a whole"
    step = "shorter training step"
    validated = comparison.losses("tuned", "val_loss")
    return [
        make_claim(plan, "lower_loss_validation", SHORT, plan.b, "lower validation loss", validated, "nats"),
        make_claim(plan, "lower_loss_default", SHORT, plan.b, loss, comparison.losses("default"), "nats", default),
        make_claim(plan, "accuracy_short", SHORT, plan.a, accuracy, comparison.test_accuracies("tuned"), "points"),
        make_claim(
            plan, "accuracy_default", SHORT, plan.a, accuracy, comparison.test_accuracies("default"), "points", default
        ),
        make_claim(plan, "gap_short", SHORT, plan.a, gap, comparison.generalisation_gaps(), "points"),
        make_claim(plan, "cheaper_step_whole", SHORT, plan.a, step, comparison.step_times(), "%", whole, "processes"),
    ]


def explore_fitted(plan: Plan, comparison: Comparison) -> list[Claim]:
    """More about generalisation."""
    test_loss = comparison.losses("fitted", "test_loss").times(-1)
    stopped = comparison.test_accuracies("fitted", is_stopped=True)
    early = "higher test accuracy with early stopping"
    loss = equal_loss(plan, comparison.measured)
    equal = f"at learning rates that end with the same training loss, {loss:.2g} nats"
    accuracies = comparison.at_equal_fit("val_accuracy", 100)
    losses = comparison.at_equal_fit("val_loss").times(-1)
    higher = "higher validation accuracy"
    lower = "lower validation loss"
    claims = [
        make_claim(plan, "better_generalisation_loss", FIT, plan.a, "lower test loss", test_loss, "nats"),
        make_claim(plan, "better_generalisation_stopped", FIT, plan.a, early, stopped, "points"),
    ]
    if math.isfinite(accuracies.mean):
        name = "better_generalisation_equal_fit"
        claims.append(make_claim(plan, name, FIT, plan.a, higher, accuracies, "points", equal))
        claims.append(make_claim(plan, f"{name}_loss", FIT, plan.a, lower, losses, "nats", equal))
    return claims


def explore_noise(plan: Plan, comparison: Comparison) -> list[Claim]:
    """More about wrong labels."""
    noisy = f"after {plan.fitted.words} with {100 * plan.noise:g} % wrong labels"
    memorised = f"{noisy}, at the learning rate for correct ones"
    lost = comparison.lost_to_wrong_labels("noise")
    end = comparison.test_accuracies("noise_fitted").times(-1)
    stopped = comparison.test_accuracies("noise_fitted", is_stopped=True).times(-1)
    less = "smaller loss of test accuracy"
    accuracy = "higher test accuracy"
    early = "higher test accuracy with early stopping"
    return [
        make_claim(plan, "noise_robustness_lost", FIT, plan.b, less, lost, "points", noisy),
        make_claim(plan, "noise_robustness_memorised", FIT, plan.b, accuracy, end, "points", memorised),
        make_claim(plan, "noise_robustness_stopped", FIT, plan.b, early, stopped, "points", memorised),
    ]


def explore_ranges(plan: Plan, comparison: Comparison) -> list[Claim]:
    """The widths of the ranges of learning rates on all networks, at both horizons."""
    measured = comparison.measured
    claims = []
    for network, points in itertools.product(plan.networks, POINTS):
        within = "1 point" if points == 1 else f"{points} points"
        advantage = f"wider range of learning rates within {within} of its best"
        if (network, points) != (plan.network, POINTS[0]):
            estimate = comparison.ranges(measured.sweep, network, points)
            name = f"lr_robustness_{points}_{network}"
            when = f"after {plan.sweep.words} ({network})"
            claims.append(make_claim(plan, name, SHORT, plan.b, advantage, estimate, "decades", when))
        estimate = comparison.ranges(measured.fitted_search, network, points)
        name = f"lr_robustness_fitted_{points}_{network}"
        when = f"after {plan.fitted.words} ({network})"
        claims.append(make_claim(plan, name, FIT, plan.b, advantage, estimate, "decades", when))
    return claims


# ================================================================ figures


def draw_figures(run: Run, plan: Plan, measured: Measurements, claims: Sequence[Claim]) -> None:
    """Draw all figures; their titles say what was found."""
    where = f"{run.data.source}, {plan.network}, n = {plan.seeds} seeds"
    titles = {claim.id: f"{headline(claim)}\n{where}" for claim in claims if claim.is_primary}
    for name in plan.optimizers:
        draw_optimizer(run, plan, measured.finals, name, where)
    draw_comparison(run, plan, measured.finals, titles["lower_loss"])
    ranges = next(claim for claim in claims if claim.id == "lr_robustness")
    draw_sensitivity(run, plan, measured, f"{headline(ranges)}\n{run.data.source}")
    draw_budget(run, plan, measured.sweep)
    draw_generalisation(run, plan, measured, titles["better_generalisation"])
    draw_noise(run, plan, measured, titles["noise_robustness"])


def captions_of_figures(plan: Plan) -> dict[str, str]:
    """By file name, in the order of the report."""
    losses = (
        "Lines: training loss (running mean over a fiftieth of the steps; bands: lowest to highest seed). "
        "Dots: validation loss."
    )
    return {
        **{f"loss_plot_{name}.png": f"{name} at both horizons. {losses}" for name in plan.optimizers},
        "comparison.png": f"All optimizers; the title is about the first panel. {losses}",
        "lr_sensitivity.png": (
            "Validation accuracy after training at each learning rate (bands: lowest to highest seed). Bars: the rates "
            f"within {POINTS[0]} points of the best mean accuracy, in decades; stars: the rates chosen (top row: after "
            f"{plan.short.words}); dotted lines: the framework's defaults; crosses: diverged runs."
        ),
        "tuning_budget.png": (
            "The expected best validation accuracy of k learning rates of the grid, drawn at random without "
            f"replacement (after Dodge et al. 2019), after {plan.sweep.words}; bands: lowest to highest seed. It "
            "depends on the grid, which is the same for all."
        ),
        "generalisation.png": (
            f"Circles: where runs of the search end, each at its learning rate ({SEARCH_SEEDS} seeds, validation "
            "images); the line leads from low to high rates, as far as these fit better. Dashed: the final runs, epoch "
            f"by epoch ({plan.seeds} seeds, fewer validation images). Stars: the final networks on the test images. A "
            "learning rate moves a network along its line: compare optimizers at equal training loss."
        ),
        "noise.png": (
            f"Left: the share of the {100 * plan.noise:g} % wrong labels that a network has memorised. Right: "
            "validation accuracy by correct labels, which choose the tuned rates and the epoch of early stopping, too. "
            "Bands: lowest to highest seed."
        ),
    }


def headline(claim: Claim) -> str:
    """What was found about a claim, for the title of a figure."""
    when = claim.when[0].upper() + claim.when[1:]
    if claim.verdict in ("supported", "contradicted"):
        estimate = claim.estimate if claim.estimate.mean > 0 else claim.estimate.times(-1)
        winner = claim.favourite if claim.estimate.mean > 0 else claim.rival
        return f"{when}, {winner} has the {claim.advantage}: by {estimate.text(claim.unit, '.2g')}"
    names = f"{claim.favourite} and {claim.rival}"
    if claim.verdict == "not judged":
        return f"{when}, {claim.quantity} of {names}: not judged"
    if claim.margin:
        return f"{when}, {claim.nothing_shown}"
    return f"{when}, {names} cannot be told apart in {claim.quantity}"


def colour_of(name: str, plan: Plan) -> str:
    """SGD is blue and RMSprop vermilion in every figure; the others take the remaining colours in order."""
    fixed = {"SGD": common.PALETTE[0], "RMSprop": common.PALETTE[1]}
    others = [other for other in plan.optimizers if other not in fixed]
    return fixed.get(name) or common.PALETTE[2 + others.index(name) % 6]


def band(axis: Axes, x: Any, curves: Any, **style: Any) -> None:
    """The mean over the seeds (rows of ``curves``) as a line, their range as a band."""
    values = np.array(curves, dtype=float)
    axis.plot(x, values.mean(0), **style)
    axis.fill_between(x, values.min(0), values.max(0), color=style["color"], alpha=0.18, linewidth=0)


def complete(runs: Sequence[Trained]) -> list[TrainingResult]:
    """The results of the runs with the most epochs: others have ended early, without a loss."""
    most = max(len(run.result.epochs) for run in runs)
    return [run.result for run in runs if len(run.result.epochs) == most]


def draw_losses(axis: Axes, plan: Plan, finals: Sequence[Trained], name: str, setting: str) -> float:
    """Training loss (line) and validation loss (dots) of the runs that finished; returns their learning rate."""
    colour = colour_of(name, plan)
    runs = runs_of(finals, name, setting)
    results = complete(runs)
    epochs = [epoch.number for epoch in results[0].epochs]
    smooth = [running_mean(result.step_losses) for result in results]
    steps = np.arange(1, len(smooth[0]) + 1)
    band(axis, steps * epochs[-1] / len(steps), smooth, color=colour, label=name)
    validation = np.mean([[epoch.val_loss for epoch in result.epochs] for result in results], axis=0)
    axis.plot(epochs, validation, "o", color=colour, markersize=7, markeredgecolor="black")
    return float(runs[0].facts["lr"])


def finish_losses(axes: Sequence[Axes] | np.ndarray) -> None:
    """Give all panels the same logarithmic loss axis with plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low = min(axis.dataLim.minposy for axis in axes)
    high = max(axis.dataLim.y1 for axis in axes)
    subs = (1, 2, 5) if high < 100 * low else (1,)
    for axis in axes:
        axis.set(xlabel="epoch", xlim=(0, None))
        if np.isfinite([low, high]).all():  # not if all losses are nan
            axis.set(yscale="log", ylim=(low / 1.1, min(high * 1.1, 5)))  # the first steps may lie above
            axis.yaxis.set_major_locator(LogLocator(subs=subs))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("cross-entropy, nats (log scale)")


PANELS = {"tuned": "short, tuned", "default": "short, default", "fitted": "fitted, tuned"}


def draw_optimizer(run: Run, plan: Plan, finals: Sequence[Trained], name: str, where: str) -> None:
    """loss_plot_<optimizer>.png: a panel per setting."""
    title = f"{name}: training loss (line) and validation loss (dots)\n{where}"
    with run.figure(f"loss_plot_{name}.png", title, columns=len(PANELS), size=(14, 5.2)) as (_, axes):
        for axis, (setting, label) in zip(axes[0], PANELS.items(), strict=True):
            rate = draw_losses(axis, plan, finals, name, setting)
            axis.set_title(f"{label}: learning rate {rate:.3g}\n{plan.horizon(SETTINGS[setting].horizon).words}")
        finish_losses(axes[0, :2])
        finish_losses(axes[0, 2:])


def draw_comparison(run: Run, plan: Plan, finals: Sequence[Trained], title: str) -> None:
    """comparison.png: all optimizers in every panel."""
    with run.figure("comparison.png", title, columns=len(PANELS), size=(15, 6)) as (drawing, axes):
        for axis, (setting, label) in zip(axes[0], PANELS.items(), strict=True):
            for name in plan.optimizers:
                draw_losses(axis, plan, finals, name, setting)
            axis.set_title(f"{label} learning rates\n{plan.horizon(SETTINGS[setting].horizon).words}")
        finish_losses(axes[0, :2])
        finish_losses(axes[0, 2:])
        drawing.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def draw_sensitivity(run: Run, plan: Plan, measured: Measurements, title: str) -> None:
    """lr_sensitivity.png: a row per horizon, a column per network."""
    tables = [
        (plan.sweep, measured.sweep, "tuned", plan.sweep_seeds_of),
        (plan.fitted, measured.fitted_search, "fitted", lambda _: SEARCH_SEEDS),
    ]
    columns = len(plan.networks)
    size = (7 * columns, 10.5)
    lowest = min(table.lr.min() for _, table, *_ in tables)
    highest = max(table.lr.max() for _, table, *_ in tables)
    with run.figure("lr_sensitivity.png", title, rows=2, columns=columns, size=size) as (drawing, axes):
        for row, (horizon, table, setting, seeds_of) in zip(axes, tables, strict=True):
            for axis, network in zip(row, plan.networks, strict=True):
                for name in plan.optimizers:
                    chosen = measured.choices[setting][name].lr if network == plan.network else None
                    draw_curve(axis, plan, curve(table, network, name), name, chosen)
                    lost = table[(table.network == network) & (table.optimizer == name) & table.diverged]
                    style = {"marker": "x", "s": 80, "linewidths": 2.5, "zorder": 5}
                    axis.scatter(lost.lr, lost.val_accuracy, color=colour_of(name, plan), **style)
                axis.set(xscale="log", title=f"{network}\n{horizon.words}, n = {seeds_of(network)} seeds")
                axis.set(ylim=(-0.07 * len(plan.optimizers) - 0.02, 1), yticks=[0, 0.2, 0.4, 0.6, 0.8, 1])
                axis.set_xlim(lowest / 1.5, 1.5 * highest)
            row[0].set_ylabel("validation accuracy")
        for axis in axes[1]:
            axis.set_xlabel("peak learning rate (log scale)")
        drawing.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def draw_curve(axis: Axes, plan: Plan, accuracies: pd.DataFrame, name: str, chosen: float | None) -> None:
    """An optimizer's accuracy by learning rate, its good range as a bar, its chosen and its default rate."""
    colour = colour_of(name, plan)
    band(axis, accuracies.index, accuracies.T, color=colour, marker="o", label=name)
    if chosen is not None:
        means = accuracies.mean(axis=1)
        height = np.interp(math.log(chosen), np.log(means.index), means)
        axis.scatter(chosen, height, marker="*", s=350, color=colour, edgecolor="black", zorder=6)
    good = good_range(accuracies, POINTS[0])
    height = -0.04 - 0.07 * plan.optimizers.index(name)
    axis.plot([good.low, good.high], [height, height], color=colour, linewidth=9, solid_capstyle="butt")
    width = f">{good.decades:.2f}" if good.is_censored else f"{good.decades:.2f}"
    axis.text(good.high, height, f" {width}", va="center", color=colour, fontsize=12)
    axis.axvline(default_rate(name), color=colour, linestyle=":")


def common_curve(sweep: pd.DataFrame, plan: Plan, network: str, name: str) -> pd.DataFrame:
    """An optimizer's ``curve`` at the learning rates that all optimizers have tried."""
    rates = [set(curve(sweep, network, other).index) for other in plan.optimizers]
    accuracies = curve(sweep, network, name)
    return accuracies.loc[sorted(set.intersection(*rates))]


def draw_budget(run: Run, plan: Plan, sweep: pd.DataFrame) -> None:
    """tuning_budget.png: a panel per network."""
    title = f"Expected best accuracy of k learning rates, tried at random\n{run.data.source}, {plan.sweep.words}"
    columns = len(plan.networks)
    size = (7 * columns, 5.6)
    with run.figure("tuning_budget.png", title, columns=columns, size=size) as (drawing, axes):
        for axis, network in zip(axes[0], plan.networks, strict=True):
            for name in plan.optimizers:
                best = expected_best(common_curve(sweep, plan, network, name))
                band(axis, best.index, best.T, color=colour_of(name, plan), marker="o", label=name)
            axis.set(xlabel="learning rates tried, at random", xticks=best.index)
            axis.set_title(f"{network}, n = {plan.sweep_seeds_of(network)} seeds")
        axes[0, 0].set_ylabel("expected best validation accuracy")
        drawing.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def draw_generalisation(run: Run, plan: Plan, measured: Measurements, title: str) -> None:
    """generalisation.png: accuracy and loss on unseen images against the training loss."""
    from matplotlib.ticker import NullFormatter

    search = measured.fitted_search
    ends = (
        search[(search.network == plan.network) & ~search.diverged].groupby(["optimizer", "lr"]).mean(numeric_only=True)
    )
    with run.figure("generalisation.png", title, columns=2, size=(14, 6.2)) as (drawing, axes):
        for axis, metric in zip(axes[0], ("accuracy", "loss"), strict=True):
            for name in plan.optimizers:
                draw_path(axis, plan, measured, name, metric)
                if name in ends.index:
                    draw_ends(axis, plan, ends.loc[name], name, metric)
            axis.set(xscale="log", xlabel="training loss, nats (log scale): better fitted to the right")
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.invert_xaxis()
            if len(ends):
                axis.set_xlim(left=1.5 * ends.final_loss.max())  # the final runs come from far away
        axes[0, 0].set(ylabel="accuracy")
        if len(ends):
            axes[0, 0].set_ylim(bottom=ends.val_accuracy.min() - 0.02)
        axes[0, 1].set(ylabel="cross-entropy, nats")
        drawing.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def draw_path(axis: Axes, plan: Plan, measured: Measurements, name: str, metric: str) -> None:
    """An optimizer's fitted final runs, epoch by epoch on validation images, and on the test images at the end."""
    colour = colour_of(name, plan)
    results = complete(runs_of(measured.finals, name, "fitted"))
    tables = [pd.DataFrame([row_of(epoch) for epoch in result.epochs]) for result in results]
    path = sum(tables[1:], tables[0]) / len(tables)  # the mean over the seeds
    axis.plot(path.final_loss, path[f"val_{metric}"], color=colour, linewidth=1, linestyle="--")
    tests = table_of_tests(measured.tests)
    tested = tests[(tests.optimizer == name) & (tests.setting == "fitted")][f"test_{metric}"].mean()
    axis.scatter(path.final_loss.iloc[-1], tested, marker="*", s=350, color=colour, edgecolor="black", zorder=6)


def draw_ends(axis: Axes, plan: Plan, ends: pd.DataFrame, name: str, metric: str) -> None:
    """Where an optimizer's runs end at each learning rate, with a line up to the rate that fits best."""
    colour = colour_of(name, plan)
    values = ends[f"val_{metric}"]
    axis.scatter(ends.final_loss, values, s=70, facecolor="white", edgecolor=colour, zorder=4)
    until = ends.final_loss.argmin() + 1
    axis.plot(ends.final_loss.iloc[:until], values.iloc[:until], color=colour, label=name)


def draw_noise(run: Run, plan: Plan, measured: Measurements, title: str) -> None:
    """noise.png: what is memorised and what it costs, by epoch."""
    styles = {"fitted": ":", "noise": "--", "noise_fitted": "-"}
    words = {
        "fitted": "correct labels",
        "noise": "wrong labels, tuned for them",
        "noise_fitted": "wrong labels, as for correct",
    }
    with run.figure("noise.png", title, columns=2, size=(14, 6.6)) as (drawing, axes):
        for name, (setting, line) in itertools.product(plan.optimizers, styles.items()):
            runs = runs_of(measured.finals, name, setting)
            results = complete(runs)
            epochs = [epoch.number for epoch in results[0].epochs]
            label = f"{name}: {words[setting]}, rate {runs[0].facts['lr']:.3g}"
            style = {"color": colour_of(name, plan), "linestyle": line, "label": label}
            accuracies = [[epoch.val_accuracy for epoch in result.epochs] for result in results]
            band(axes[0, 1], epochs, accuracies, **style)
            if SETTINGS[setting].has_wrong_labels:
                shares = [agreement_with_wrong_labels(final, run.data) for final in runs]
                band(axes[0, 0], epochs, [share for share in shares if len(share) == len(epochs)], **style)
        axes[0, 0].set(xlabel="epoch", ylabel="share of wrong labels memorised", ylim=(0, 1))
        axes[0, 1].set(xlabel="epoch", ylabel="validation accuracy")
        drawing.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=11)


# ================================================================ report


class Statistics(NamedTuple):
    """Of a result over the seeds that have it."""

    mean: float
    sd: float
    n: int

    def text(self, factor: float = 1) -> str:
        """The mean ± the standard deviation, both times ``factor``."""
        return f"{factor * self.mean:.4g} ± {factor * self.sd:.2g}"


@dataclass(frozen=True)
class Outcome:
    """What an optimizer reached in a setting."""

    optimizer: str
    setting: str
    lr: float
    epochs: int
    diverged: int
    fitted: int  # networks with a training accuracy of at least FITTED
    runs: int
    statistics: dict[str, Statistics]  # by column of finals.csv or test.csv


METRICS = ["final_loss", "final_accuracy", "val_loss", "val_accuracy", "seconds"]
TESTED = ["test_loss", "test_accuracy", "stopped_test_loss", "stopped_test_accuracy"]


def find_outcomes(measured: Measurements) -> list[Outcome]:
    """Of every optimizer in every setting."""
    outcomes = []
    for (name, setting), group in table_of_finals(measured).groupby(["optimizer", "setting"], sort=False):
        columns = group[METRICS + TESTED].astype(float).agg(["mean", "std", "count"])
        statistics = {metric: Statistics(mean, sd, int(n)) for metric, (mean, sd, n) in columns.items()}
        epochs = int(group.epoch.max())
        diverged = int(group.diverged.sum())
        fitted = int((group.final_accuracy >= FITTED).sum())
        outcomes.append(Outcome(name, setting, group.lr.iloc[0], epochs, diverged, fitted, len(group), statistics))
    return outcomes


def outcome_table(measured: Measurements, horizon: str) -> pd.DataFrame:
    """What was reached at a horizon, for the reader."""
    rows = []
    for outcome in find_outcomes(measured):
        setting = SETTINGS[outcome.setting]
        if setting.horizon == horizon:
            statistics = outcome.statistics
            row = {"optimizer": outcome.optimizer}
            if horizon == FIT:
                row["labels"] = "some wrong" if setting.has_wrong_labels else "correct"
            row |= {
                "learning rate": f"{outcome.lr:.3g}, {setting.words}",
                "training loss": statistics["final_loss"].text(),
                "training, %": statistics["final_accuracy"].text(100),
                "test loss": statistics["test_loss"].text(),
                "test, %": statistics["test_accuracy"].text(100),
            }
            if horizon == FIT:
                row["stopped early, %"] = statistics["stopped_test_accuracy"].text(100)
                row["fitted"] = f"{outcome.fitted} of {outcome.runs}"
            row["diverged"] = f"{outcome.diverged} of {outcome.runs}"
            rows.append(row)
    return pd.DataFrame(rows)


def target_table(plan: Plan, measured: Measurements) -> pd.DataFrame:
    """When the target loss was reached, for the reader: medians over the seeds that have reached it."""
    rows = []
    times = time_to_target(plan, measured.finals, measured.times)
    for (name, setting), mine in times.groupby(["optimizer", "setting"], sort=False):
        row = {
            "optimizer": name,
            "learning rate": f"{mine.lr.iloc[0]:.3g}, {SETTINGS[setting].words}",
            "reached by": f"{mine.steps.count()} of {len(mine)}",
            "steps": f"{mine.steps.median():.0f}",
            "seconds": f"{mine.seconds.median():.1f}",
        }
        rows.append(row)
    return pd.DataFrame(rows).replace("nan", "–")


def choices_in_words(measured: Measurements, setting: str) -> list[str]:
    """Every optimizer's tuned learning rate and those it was chosen from."""
    choices = []
    for name, choice in measured.choices[setting].items():
        tried = ", ".join(f"{lr:.3g} ({100 * accuracy:.1f} %)" for lr, accuracy in choice.accuracies.items())
        notes = "" if choice.is_inside else ", the outermost"
        notes += "" if choice.fits else ", none of which fits the images"
        choices.append(f"{name} {choice.lr:.3g} of {tried}{notes}")
    return choices


CHOICES = {
    "tuned": "short horizon",
    "fitted": "fitted horizon, the lowest of those that fit and are level with the best",
    "noise": "fitted horizon, wrong labels",
}


def fit_in_words(plan: Plan, measured: Measurements) -> str:
    """How well the images have been fitted at the fitted horizon."""
    fits = []
    for name in plan.optimizers:
        fit = fit_of(measured, name)
        fits.append(f"{name} {100 * fit.mean:.2f} % (lowest {100 * fit.min:.2f} %, n = {fit.n})")
    return f"Training accuracy after {plan.fitted.words}: {', '.join(fits)}."


def noise_in_words(run: Run, plan: Plan, measured: Measurements) -> str:
    """What wrong labels cost, and what avoids it."""
    tests = table_of_tests(measured.tests).groupby(["optimizer", "setting"]).mean(numeric_only=True)
    sentences = []
    for name in plan.optimizers:
        runs = runs_of(measured.finals, name, "noise_fitted")
        share = np.mean([agreement_with_wrong_labels(final, run.data)[-1] for final in runs])
        correct, noisy, memorised = (
            100 * tests.loc[(name, setting)] for setting in ("fitted", "noise", "noise_fitted")
        )
        sentences.append(
            f"{name}: at the learning rate for correct labels, {100 * share:.0f} % of the wrong ones are memorised, "
            f"and the test accuracy is {memorised.test_accuracy:.1f} % instead of {correct.test_accuracy:.1f} %; with "
            f"early stopping (by correct labels) {memorised.stopped_test_accuracy:.1f} %, at the rate tuned for wrong "
            f"labels {noisy.test_accuracy:.1f} %."
        )
    return f"What wrong labels cost (means, n = {plan.seeds} seeds). {' '.join(sentences)}"


def fitted_ranges_in_words(plan: Plan, measured: Measurements) -> str:
    """The widths of the ranges of good learning rates at the fitted horizon."""
    widths = []
    for network, name in itertools.product(plan.networks, plan.optimizers):
        good = good_range(curve(measured.fitted_search, network, name), POINTS[0])
        prefix = "more than " if good.is_censored else ""
        widths.append(f"{prefix}{good.decades:.2f} decades for {name} ({network})")
    coarse = "; along a coarser grid on the second network" if len(plan.networks) > 1 else ""
    return (
        f"After {plan.fitted.words}, the ranges of learning rates within {POINTS[0]} points of the best are "
        f"{', '.join(widths)}, n = {SEARCH_SEEDS} seeds{coarse}."
    )


def print_results(plan: Plan, measured: Measurements, claims: Sequence[Claim]) -> None:
    """Print outcomes, chosen learning rates and verdicts."""
    for horizon in (plan.short, plan.fitted):
        print(f"\n{horizon.words}, fresh seeds (mean ± standard deviation, n = {plan.seeds})")
        table = outcome_table(measured, horizon.name).drop(
            columns=["training loss", "test loss", "diverged", "fitted"], errors="ignore"
        )
        print(table.to_string(index=False))
    print("\n" + textwrap.fill(fit_in_words(plan, measured), 96))
    print("\nVerdicts (95 % intervals; Holm-corrected at 5 %)")
    for claim in claims:
        if claim.is_primary:
            print(textwrap.fill(f"- {claim.sentence}", 96, subsequent_indent="  "))


def write_tables(run: Run, plan: Plan, measured: Measurements, claims: Sequence[Claim]) -> None:
    """Write the tables that are computed from others."""
    run.write_table("claims.csv", pd.DataFrame([claim.row() for claim in claims]))
    run.write_table("target.csv", time_to_target(plan, measured.finals, measured.times))
    budgets = []
    for network, name in itertools.product(plan.networks, plan.optimizers):
        best = expected_best(common_curve(measured.sweep, plan, network, name))
        budgets.append(
            best.reset_index().melt("k", value_name="expected_accuracy").assign(network=network, optimizer=name)
        )
    run.write_table("tuning_budget.csv", pd.concat(budgets))


def summarise(plan: Plan, measured: Measurements, claims: Sequence[Claim]) -> dict[str, object]:
    """summary.json, but for what every script writes."""
    optimizers: dict[str, dict[str, Any]] = {}
    for name in plan.optimizers:
        optimizers[name] = {"fit": asdict(fit_of(measured, name))}
    for outcome in find_outcomes(measured):
        facts = {"lr": outcome.lr, "epochs": outcome.epochs, "diverged": outcome.diverged}
        statistics = {metric: found._asdict() for metric, found in outcome.statistics.items() if found.n}
        optimizers[outcome.optimizer][outcome.setting] = {**facts, **statistics}
    for setting in CHOICES:
        for name, choice in measured.choices[setting].items():
            optimizers[name][setting] |= {"lr_is_inside": choice.is_inside, "lr_fits": choice.fits}
    return {
        "task": "task2",
        "optimizers": optimizers,
        "claims": [claim.row() for claim in claims],
        "lr_ranges": list_ranges(plan, measured),
        "images": plan.short.images,
        "fit_images": plan.fitted.images,
        "network": plan.network,
        "seeds": plan.seeds,
    }


def list_ranges(plan: Plan, measured: Measurements) -> list[dict[str, object]]:
    """The good learning rates of every optimizer on every network at both horizons, by the points they may lose."""
    ranges = []
    tables = {SHORT: measured.sweep, FIT: measured.fitted_search}
    for horizon, network, name, points in itertools.product(tables, plan.networks, plan.optimizers, POINTS):
        accuracies = curve(tables[horizon], network, name)
        good = good_range(accuracies, points)
        found = {
            "horizon": horizon,
            "network": network,
            "optimizer": name,
            "points": points,
            "decades": good.decades,
            "n": accuracies.shape[1],
            "censored": good.is_censored,
            "censored_seeds": sum(good_range(accuracies[[seed]], points).is_censored for seed in accuracies),
        }
        ranges.append(found)
    return ranges


def range_table(plan: Plan, measured: Measurements) -> pd.DataFrame:
    """The widths of the ranges within 2 points, in decades, for the reader."""
    rows: dict[tuple[object, object], dict[str, object]] = {}
    for found in list_ranges(plan, measured):
        if found["points"] == POINTS[0]:
            horizon = plan.sweep if found["horizon"] == SHORT else plan.fitted
            first = {"network": found["network"], "after": horizon.words, "n": found["n"]}
            row = rows.setdefault((found["horizon"], found["network"]), first)
            prefix = "more than " if found["censored"] else ""
            row[f"{found['optimizer']}, decades"] = f"{prefix}{found['decades']:.2f}"
    return pd.DataFrame(rows.values())


def write_report(
    run: Run, plan: Plan, measured: Measurements, claims: Sequence[Claim], other_runs: Sequence[OtherRun]
) -> list[str]:
    """The paragraphs of report.md."""
    table = pd.DataFrame([claim.row() for claim in claims])
    table = table.rename(columns={"statement": "claim", "p_holm": "p (Holm)"})
    table["effect [95 %]"] = [claim.effect for claim in claims]
    table["n"] = [f"{claim.estimate.n} {claim.sample}" for claim in claims]
    table["tested against"] = [f"{claim.margin:g}" for claim in claims]
    primary = table[table.primary][["claim", "effect [95 %]", "n", "tested against", "p (Holm)", "verdict"]]
    exploratory = table[~table.primary][["claim", "effect [95 %]", "n"]]
    paragraphs = [
        f"# Task 2: {' or '.join(plan.optimizers)}?",
        f"Data: {run.data.source}. Network: {plan.network}.",
        f"Short horizon: {plan.short.words}, while networks learn. Fitted horizon: {plan.fitted.words}. Tuned: for "
        "validation accuracy. A decade is a factor of ten; a nat is the unit of the cross-entropy. Not supported means "
        "not shown, not equal.",
        "## Answer",
        "\n".join(f"- {claim.sentence}" for claim in claims if claim.is_primary),
        f"Without a verdict:\n\n- {fitted_ranges_in_words(plan, measured)}\n- {noise_in_words(run, plan, measured)}",
        "Intervals (95 % each, not corrected for their number) cover fresh seeds, those of accuracies test images, "
        "too, those of times processes; on this network, data set and machine, at the learning rates chosen.",
        "## The five claims",
        primary.to_markdown(index=False, floatfmt=".2g"),
        *compare_runs(claims, other_runs),
        "## Short horizon",
        f"{plan.short.words}. Mean ± standard deviation, n = {plan.seeds} seeds; training loss and accuracy at the "
        f"end, on {min(JUDGED, plan.short.images):,} of the images; default: the framework's, as the schedule's peak.",
        outcome_table(measured, SHORT).to_markdown(index=False),
        f"Time to a training loss of {plan.target_loss:.3g} nats, 1/{1 / TARGET:g} of that of guessing (medians over "
        "the seeds that reached it; seconds: steps times the time of a step):",
        target_table(plan, measured).to_markdown(index=False),
        "## Fitted horizon",
        f"{plan.fitted.words}; wrong labels: {100 * plan.noise:g} %. Mean ± standard deviation, n = {plan.seeds} "
        "seeds; stopped early: the test accuracy of the epoch with the highest validation accuracy. "
        + fit_in_words(plan, measured),
        outcome_table(measured, FIT).to_markdown(index=False),
        "## Learning rates",
        f"The width of the range of learning rates within {POINTS[0]} points of the best mean validation accuracy:",
        range_table(plan, measured).to_markdown(index=False),
        "The tuned rates and those they were chosen from (mean validation accuracy):",
    ]
    choices = [f"- {words}: {'; '.join(choices_in_words(measured, setting))}." for setting, words in CHOICES.items()]
    paragraphs += ["\n".join(choices), "## Figures"]
    for file, caption in captions_of_figures(plan).items():
        paragraphs += [f"![{file}]({file})", f"*{caption}*"]
    return [
        *paragraphs,
        "## Exploratory, without verdicts",
        "Hypotheses: a negative effect speaks for the opposite. Intervals are not corrected for their number; with two "
        "seeds there is none.",
        exploratory.to_markdown(index=False),
        "## Protocol",
        f"```text\n{PROTOCOL}\n```",
        f"This run: {numbers_in_words(plan, measured)}",
        "## Limits",
        LIMITS,
    ]


def compare_runs(claims: Sequence[Claim], other_runs: Sequence[OtherRun]) -> list[str]:
    """Paragraphs that show whether other runs come to the same verdicts."""
    if not other_runs:
        return []
    primary = [claim for claim in claims if claim.is_primary]
    rows = [{"run": "this one", **{claim.id: f"{claim.verdict}, {claim.effect}" for claim in primary}}]
    rows += [{"run": other.words, **other.findings} for other in other_runs]
    return ["Do the verdicts repeat?", pd.DataFrame(rows).to_markdown(index=False)]


def numbers_in_words(plan: Plan, measured: Measurements) -> str:
    """How much was trained."""
    training = plan.training
    rates = len(common_curve(measured.sweep, plan, plan.network, plan.a))
    return (
        f"batches of {training.batch_size}, schedule {training.schedule}; sweep: {rates} learning rates, "
        f"{plan.sweep.words}, {plan.sweep_seeds} seeds; searches: {SEARCH_SEEDS} seeds; final runs: {plan.seeds} "
        f"seeds; times: {plan.starts} processes, {plan.turns * plan.steps:,} steps of each optimizer in each."
    )


if __name__ == "__main__":
    sys.exit(main())
