"""Task 3: which hyper-parameters, and which of them matter? An Optuna study, confirmed on fresh seeds, and an ablation.

Found (JPEG copy of CIFAR-10, AMD EPYC with AVX-512): over eight studies of 100 trials, the best configuration has 0.5
points more test accuracy than the lab's settings by the median (-0.1 to 1.3), and in the documented one 10.9 points
[10.0, 11.8] more than the textbook's. Set back one at a time, the schedule costs 11.4 points, the learning rate 5.9,
the optimizer 3.7, augmentation 2.9; label smoothing and the activation show no effect.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import re
import sys
import textwrap
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent))  # where PYTHONSAFEPATH and -P leave it out
import common  # isort: skip (before torch: it sets how long idle threads spin)
import numpy as np
import optuna
import pandas as pd
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState, create_trial

from common import Estimate, Recipe, UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from sqlalchemy import URL
    from torch import Tensor, nn

# ================================================================ 1. protocol and options

STUDY = "small-cnn"  # its name in the storage
TRIAL_IMAGES = 8_000
QUICK_IMAGES = 600
START = 32  # trials that cover the space evenly, whatever their results
AHEAD = 3  # trials drawn before the result of the first of them is used; with more than two workers, one more each
CANDIDATES = 5  # the trials with the highest values are confirmed
CONFIRMATION_SEEDS = 4

PROTOCOL = f"""\
Protocol: trial 0 is the textbook configuration: Adam at 0.001, a constant learning rate, no augmentation, no label
smoothing, no weight decay, no dropout, ReLU. Every trial trains the same fast network for 5 epochs, in batches of 128,
on the same {TRIAL_IMAGES:,} images, with a seed of its own, and is validated on the same images; both sets depend on
--seed. The next {START - 1} trials are points of a Sobol sequence, so that they cover the space evenly, and none of
them is pruned (of a study of fewer than {3 * START} trials, a third). Then Optuna's GPSampler draws, which models
accuracy as a Gaussian process; here it also learns from pruned trials, and accuracies below the median count as the
median. (Weight decay, which not every trial has, is drawn at random.) A trial is pruned if, after three or four epochs,
its highest accuracy is below the median of the first {START} after as many (MedianPruner). The width of the network is
not searched: a wider one is simply better and slower. The study is not given the lab's settings. Results are used in
the order of the trials, so with one or two workers and without --storage, --seed determines the trials of a study that
is not interrupted.

Confirmation: the {CANDIDATES} trials with the highest accuracy are trained again on {CONFIRMATION_SEEDS} common fresh
seeds, and the one with the highest mean is the best configuration; its accuracy in the study does not count. Then the
best, the textbook's and the lab's settings are trained on other fresh seeds, and the best once for each of its
settings, with that one set back to the textbook's (the ablation). The best settings are also used to train the preset's
larger network on all images (best_model.pth). Only then is the test set read, once; differences between configurations
are measured on it. The lab's settings are those of its preset, trained as a trial is. The same command continues an
interrupted study; with --storage, many machines work on one study."""


class Stage(IntEnum):
    """What needs seeds of its own."""

    SPLIT = 1
    SAMPLER = 2
    TRIAL = 3
    CONFIRMATION = 4
    FRESH = 5
    FULL = 6
    AUDIT = 7


DEFAULT_SAMPLER = "GPSampler"  # a subclass of Optuna's, below
# Short names of Optuna's classes.
SAMPLERS = {"gp": "GPSampler", "tpe": "TPESampler", "random": "RandomSampler"}
PRUNERS = {"median": "MedianPruner", "hyperband": "HyperbandPruner", "none": "NopPruner"}
OPTUNA_SETTINGS: dict[str, dict[str, Any]] = {
    "PercentilePruner": {"percentile": 50.0},
    "TPESampler": {"group": True},  # weight decay is not drawn for all trials
}


def class_of(module: Any, aliases: Mapping[str, str]) -> Callable[[str], str]:
    """An argparse type: a sampler or pruner class that needs no arguments beyond OPTUNA_SETTINGS."""

    def convert(text: str) -> str:
        name = aliases.get(text, text)
        try:
            getattr(module, name)(**OPTUNA_SETTINGS.get(name, {}))
        except (AttributeError, TypeError, ImportError) as error:
            known = f"{', '.join(aliases)} or a class of {module.__name__} that needs no arguments"
            raise argparse.ArgumentTypeError(f"{text!r} is not {known}: {common.first_line(error)}") from None
        return name

    return convert


def study_name(text: str) -> str:
    """An argparse type: a name that every database can store."""
    if not text.isprintable() or not 1 <= len(text) <= 255:
        raise argparse.ArgumentTypeError(f"{text!r} is not a name of 1 to 255 printable characters")
    return text


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; --quick limits every loop."""
    description = f"{str(__doc__ or '').strip()}\n\n{PROTOCOL}"
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    natural = common.whole_number(0)
    sampler = class_of(optuna.samplers, SAMPLERS)
    pruner = class_of(optuna.pruners, PRUNERS)
    seconds = common.real_number(0.1)
    add(
        "--trials",
        type=common.whole_number(),
        default=100,
        help="stop when so many are complete or pruned (default: %(default)s)",
    )
    add("--timeout", type=seconds, default=600.0, help="draw no trial after so many seconds (default: %(default)s)")
    add(
        "--sampler",
        type=sampler,
        default=DEFAULT_SAMPLER,
        help="gp, tpe, random or a class of Optuna (default: %(default)s)",
    )
    add("--pruner", type=pruner, default="median", help="median, hyperband, none or a class (default: %(default)s)")
    add("--storage", metavar="URL", help="a database, as postgresql://user@host/name (default: OUTPUT_DIR/study.log)")
    add("--study-name", type=study_name, default=STUDY, metavar="NAME", help="in the storage (default: %(default)s)")
    add("--fresh", action="store_true", help="move OUTPUT_DIR/study.log aside and start over")
    help = "of comparison and ablation; 0: no confirmation either (default: %(default)s)"
    add("--retrain-seeds", type=natural, default=6, metavar="N", help=help)
    add("--audit", type=natural, default=0, metavar="N", help="train N pruned trials to the end (below 20 tell little)")
    common.add_common_args(parser, presets=True, output_dir=Path("results/task3"))
    options = parser.parse_args(argv)
    if options.fresh and options.storage:
        raise UserError("--fresh is for OUTPUT_DIR/study.log: start another study in a database with --study-name")
    if options.quick:
        options.trials = min(options.trials, 8)
        options.timeout = min(options.timeout, 60.0)
        options.retrain_seeds = min(options.retrain_seeds, 2)
        options.audit = min(options.audit, 2)
        options.images = min(options.images or QUICK_IMAGES, QUICK_IMAGES)
        options.epochs = min(options.epochs or 3, 3)
        options.width = options.width or 16
        options.batch_size = options.batch_size or 64
    return options


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide Optuna's log, which bar and report replace, its warnings, and SQLAlchemy's log of lost connections."""
    verbosity = optuna.logging.get_verbosity()
    database_log = logging.getLogger("sqlalchemy")
    level = database_log.level
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    database_log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
            warnings.filterwarnings("ignore", module="optuna")
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
        database_log.setLevel(level)


@common.script
@quiet_libraries()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the study, confirm its best configuration, ask what mattered, report; returns the exit status."""
    options = parse_args(argv)
    dataset = common.load_data(options)
    plan = make_plan(options, dataset)
    # PGTZ would take precedence over the time zone that open_database asks for.
    with common.open_run(options, dataset) as run, without_variable("PGTZ"):
        expect_work(run, plan)
        common.prove_network(run, plan.template.recipe, plan.template.split)
        found = search(run, plan, open_study(run, plan))
        results = Results(plan, run.data.source, found.study, is_interrupted=found.stopped is not None)
        stopped = found.stopped
        write_trials(run, results)
        try:
            if results.complete_trials and stopped is None:
                results = replace(results, audit=run_audit(run, plan, found.study))
                results = replace(results, confirmation=confirm(run, plan, results.complete_trials))
                results = replace(results, final=compare_and_ablate(run, plan, results.best, dataset))
        except (KeyboardInterrupt, Exception) as error:  # what was measured before is reported first
            stopped = error
            results = replace(results, is_interrupted=True)
        if results.complete_trials:
            common.write_json(run.folder / "best_params.json", results.best.settings)
        draw_figures(run, results)
        print_results(results)
        options = options_without_secrets(options)
        run.finish(results.summary(), write_report(run, results), options, command_without_secrets(argv))
    if stopped:
        raise stopped
    if not results.complete_trials:
        raise UserError("no trial was completed: see the reasons in trials.csv, or try a longer --timeout")
    return 0


# ================================================================ 2. configurations

Settings = dict[str, Any]  # a configuration: fields of a Recipe and their values
Space = dict[str, BaseDistribution]  # parameters and their ranges
# Tutorials' learning rates. The search extends further up, because SmallCNN's logits, hence gradients, are scaled down.
USUAL_LR = {"Adam": 1e-3, "Muon": 0.02, "RMSprop": 1e-3, "SGD+nesterov": 0.1}
TEXTBOOK: dict[str, Any] = {  # all parameters, as a study draws them
    "optimizer": "Adam",
    "lr_scale": 1.0,
    "schedule": "constant",
    "weight_decay": 0.0,
    "dropout": 0.0,
    "label_smoothing": 0.0,
    "crop_padding": 0,
    "activation": "ReLU",
}
ACTIVATIONS = ("ELU", "GELU", "Mish", "ReLU", "SiLU")
# About 1 TFLOP. Presets train mostly on the images with the highest loss; a trial trains on all alike (hardest=1).
TRIAL = common.PRESETS["small"].replace(growth=(1, 2, 2), batch_size=128, epochs=5, hardest=1)


def suggest(trial: optuna.Trial | optuna.trial.FixedTrial, recipe: Recipe) -> Settings:
    """Draw all parameters into ``trial``; returns them as settings.

    The learning rate is drawn relative to the optimizer's usual one: each optimizer has its own range, yet there is one
    parameter, so that the sampler learns from all trials. Muon, dropout and the activation are for the lab's own
    network. Muon rescales every kernel in every step, so weight decay has no effect and is not drawn for it.
    """
    is_small_cnn = recipe.network.model == "SmallCNN"
    optimizers = sorted(USUAL_LR) if is_small_cnn else sorted(set(USUAL_LR) - {"Muon"})
    optimizer = trial.suggest_categorical("optimizer", optimizers)
    trial.suggest_float("lr_scale", 0.1, 30.0, log=True)
    trial.suggest_categorical("schedule", sorted(common.SCHEDULES))
    if optimizer != "Muon":
        trial.suggest_float("weight_decay", 0.0, 2e-3)
    trial.suggest_float("dropout", 0.0, 0.5 if is_small_cnn else 0.0)
    trial.suggest_float("label_smoothing", 0.0, 0.3)
    trial.suggest_int("crop_padding", 0, 4)
    trial.suggest_categorical("activation", ACTIVATIONS if is_small_cnn else ["ReLU"])
    return settings_of(trial.params)


def settings_of(params: Mapping[str, Any]) -> Settings:
    """A trial's parameters as a configuration, with the absolute learning rate."""
    settings = {name: params[name] for name in TEXTBOOK if name in params and name != "lr_scale"}
    settings["lr"] = USUAL_LR[params["optimizer"]] * params["lr_scale"]
    if params["optimizer"] == "Muon":
        settings["weight_decay"] = 0.0
    return settings


def fields_of(recipe: Recipe) -> dict[str, Any]:
    """The fields of network and training by name."""
    return asdict(recipe.network) | asdict(recipe.training)


@dataclass(frozen=True)
class Plan:
    """A study: its options, and the training that its trials vary, with the textbook's settings."""

    options: argparse.Namespace
    template: common.Job

    def job(self, settings: Settings, stage: Stage, number: int = 0) -> common.Job:
        """The training of a configuration, as in the study; ``number`` is that of the trial or repetition."""
        seed = common.derive_seed(self.options.seed, stage, number)
        return replace(self.template, recipe=self.template.recipe.replace(**settings), seed=seed)

    @property
    def space(self) -> Space:
        """All parameters and their ranges."""
        trial = optuna.trial.FixedTrial(TEXTBOOK)
        suggest(trial, self.template.recipe)
        return trial.distributions

    def choices(self, name: str) -> list[str]:
        """The values of a parameter without an order."""
        distribution = self.space[name]
        assert isinstance(distribution, CategoricalDistribution)
        return [str(choice) for choice in distribution.choices]

    @property
    def candidate_count(self) -> int:
        """How many trials are confirmed."""
        return 2 if self.options.quick else CANDIDATES

    @property
    def confirmation_seed_count(self) -> int:
        """The number of fresh seeds of every candidate."""
        return 2 if self.options.quick else CONFIRMATION_SEEDS

    @property
    def lab(self) -> Settings | None:
        """The configuration of the lab's recipe; None for a custom network."""
        preset = self.preset
        if self.template.recipe.network.model != preset.network.model:
            return None
        fields = fields_of(preset)
        return {name: fields[name] for name in settings_of(TEXTBOOK)}

    @property
    def preset(self) -> Recipe:
        """The lab's recipe, on all images alike."""
        return common.PRESETS[self.options.preset].replace(hardest=TRIAL.training.hardest)

    @property
    def full(self) -> Recipe:
        """The preset's network and epochs: the recipe of the full training, before the best settings are put in."""
        recipe = common.recipe_from(self.options, self.preset)
        return recipe.replace(batch_size=self.template.recipe.training.batch_size)


def make_plan(options: argparse.Namespace, data: common.Dataset) -> Plan:
    """The plan for the options (--seed also picks the images); UserError for a network that cannot be trained."""
    recipe = common.recipe_from(options, TRIAL).replace(**settings_of(TEXTBOOK))
    seed = common.derive_seed(options.seed, Stage.SPLIT)
    split = common.split_dataset(data, options.images or TRIAL_IMAGES, seed=seed)
    common.check_recipe(recipe, data, split, common.resolve_runtime(options.device, options.precision))
    return Plan(options, common.Job(recipe, seed=0, split=split))


# ================================================================ 3. storage

MAX_RETRIES = 3  # of a trial whose worker died: a configuration that kills workers must not be retried for ever
# A machine silent for STALE seconds loses its trials. A database may be away for PATIENCE, a shorter time: then
# heartbeats are written again before the machine's trials are lost.
HEARTBEAT_SECONDS = 5
RETRY_SECONDS = 1.0
PATIENCE_SECONDS = 45.0
STALE_SECONDS = 60
CONNECT_SECONDS = 10
# Reasons why a trial failed.
AWAY = "the database was away"
INTERRUPTED = "interrupted"
DRIVERS = {"MySQLdb": "mysqlclient", "psycopg": '"psycopg[binary]"', "psycopg2": "psycopg2-binary"}
DONE = (TrialState.COMPLETE, TrialState.PRUNED)
Parameters = ParamSpec("Parameters")
Answer = TypeVar("Answer")


def is_outage(error: BaseException) -> bool:
    """Whether a database is locked, restarts or cannot be reached.

    Optuna may wrap its own errors around that: telling the result of a trial to a database that is away ends in an
    UnboundLocalError (Optuna 5.0).
    """
    from sqlalchemy.exc import InterfaceError, OperationalError

    return any(isinstance(link, OperationalError | InterfaceError) for link in common.chain_of(error))


def is_of_the_storage(error: BaseException) -> bool:
    """Whether a database or the disk is at fault, not the lab."""
    from sqlalchemy.exc import SQLAlchemyError

    kinds = (SQLAlchemyError, StorageInternalError, OSError)
    return is_outage(error) or any(isinstance(link, kinds) for link in common.chain_of(error))


def is_lost_trial(error: BaseException) -> bool:
    """Whether a trial could not be told, because it was told before: this machine slept and was taken for dead."""
    return any(
        isinstance(link, UpdateFinishedTrialError) or (isinstance(link, ValueError) and "Cannot tell" in str(link))
        for link in common.chain_of(error)
    )


class Patience:
    """Waits while a database is away, for at most PATIENCE_SECONDS in a row, or until ``halted`` is set."""

    def __init__(self) -> None:
        self.halted = threading.Event()

    def call(
        self, function: Callable[Parameters, Answer], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Answer:
        """Call a function that may be repeated, until the database answers; raises any other error at once."""
        away_since: float | None = None
        while True:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                now = time.monotonic()
                away_since = away_since or now
                is_hopeless = not is_outage(error) or now > away_since + PATIENCE_SECONDS
                if is_hopeless or self.halted.wait(RETRY_SECONDS):
                    raise


@contextlib.contextmanager
def without_variable(name: str) -> Iterator[None]:
    """Hide an environment variable."""
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value


def parse_url(storage: str) -> URL:
    """SQLAlchemy's URL of a database; raises UserError that does not quote it."""
    from sqlalchemy import make_url

    try:
        url = make_url(storage)
        if "@" in f"{url.host}":
            raise ValueError("part of a password")
    except Exception:  # SQLAlchemy's, of many kinds
        form = "postgresql://user:password@host:5432/name; in a password, write @ : / as %40 %3A %2F"
        raise UserError(f"--storage is not a database URL such as {form}") from None
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")  # SQLAlchemy's default is the older psycopg2
    return url


def shown_url(url: URL) -> str:
    """The URL for messages: without password and query."""
    return url.set(query={}).render_as_string().replace("+psycopg:", ":")


def published_url(text: str) -> str:
    """A database's URL for files: without user, password and query."""
    from sqlalchemy import URL

    try:
        url = parse_url(text)
    except UserError:
        return "***"
    return shown_url(URL.create(url.drivername, host=url.host, port=url.port, database=url.database))


def options_without_secrets(options: argparse.Namespace) -> argparse.Namespace:
    """The options for config.json."""
    storage = published_url(options.storage) if options.storage else None
    return argparse.Namespace(**vars(options) | {"storage": storage})


def command_without_secrets(argv: Sequence[str] | None) -> str:
    """The command for report.md, with every URL as in config.json, be it of an option that a later one overrides."""
    published = []
    for argument in sys.argv[1:] if argv is None else argv:
        option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        published.append(f"{option}{equals}{published_url(value)}" if "://" in value else argument)
    return common.command_line(__file__, published)


def open_storage(options: argparse.Namespace, folder: Path) -> BaseStorage:
    """Connect to --storage, or open the journal in the output folder, which --fresh moves aside."""
    if options.storage:
        return open_database(options.storage)
    journal = folder / "study.log"
    if options.fresh and journal.exists():
        journal.rename(folder / f"study-{time.strftime('%Y%m%d-%H%M%S')}.log")
    return open_journal(journal)


def open_database(storage: str) -> BaseStorage:
    """Connect to a database; raises UserError without the password."""
    from sqlalchemy.exc import IntegrityError, ProgrammingError

    url = parse_url(storage)
    arguments: dict[str, Any] = {}
    if url.get_backend_name() != "sqlite":
        arguments["connect_timeout"] = CONNECT_SECONDS
    if url.get_backend_name() == "postgresql" and "options" not in url.query:
        # Heartbeats are stored without a time zone.
        arguments["options"] = "-c TimeZone=UTC"
    with database_errors(storage, RuntimeError, OSError):  # Optuna's, of tables of another version
        for _ in range(5):
            with contextlib.suppress(IntegrityError, ProgrammingError):  # two machines create the tables at once
                return connect(url, arguments)
            time.sleep(0.5)
        return connect(url, arguments)


def connect(url: URL, arguments: Mapping[str, Any]) -> RDBStorage:
    """Connect to a database with arguments of its driver; creates Optuna's tables if there are none."""
    return RDBStorage(
        url.render_as_string(hide_password=False),
        engine_kwargs={"connect_args": arguments, "pool_pre_ping": True},  # the server may restart
        heartbeat_interval=HEARTBEAT_SECONDS,
        grace_period=STALE_SECONDS,
        heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(MAX_RETRIES),
    )


@contextlib.contextmanager
def database_errors(storage: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn the errors of a database, and those of more kinds, into a UserError without the password."""
    from sqlalchemy.exc import SQLAlchemyError

    shown = shown_url(parse_url(storage))
    expected: tuple[type[Exception], ...] = (SQLAlchemyError, StorageInternalError, *kinds)
    try:
        yield
    except ImportError as error:
        module = getattr(error.__cause__, "name", None) or error.name or str(error)
        raise UserError(f"--storage {shown} needs {module}: pip install {DRIVERS.get(module, module)}") from None
    except expected as error:
        raise UserError(f"--storage {shown} cannot be used: {cause_of(error, storage)}") from None


def cause_of(error: BaseException, storage: str | None) -> str:
    """The first line of the original error, without the password of a database."""
    text = common.first_line(common.chain_of(error)[-1])
    password = parse_url(storage).password if storage else None
    return text.replace(str(password), "***") if password else text


def open_journal(path: Path) -> BaseStorage:
    """Open a journal in a folder locked by this run; truncates a half-written line; UserError for a foreign file."""
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    start = b'{"op_code"'
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    backend = JournalFileBackend(str(path), JournalFileOpenLock(str(path)))
    for left in path.parent.glob(f"{path.name}.lock*"):  # of a killed run: nobody else writes here
        left.unlink()
    advice = "--fresh moves it aside and starts over"
    with common.user_error(f"{path} is not an Optuna journal ({advice})", Exception):  # a file may provoke anything
        whole = len(list(backend.read_logs(0)))  # Optuna skips a half-written line, but would append to it
        if whole < len(lines):
            if lines[0][: len(start)] != start[: len(lines[0])]:  # the first line itself may be cut off
                raise ValueError("its first line is not Optuna's")
            common.note(f"{path} ended in a half-written line, now removed: {lines[-1][:99]!r}")
            os.truncate(path, sum(map(len, lines[:whole])))
        return optuna.storages.JournalStorage(backend)


# ================================================================ 4. the study


class SobolStart(optuna.samplers.BaseSampler):
    """Draws the first ``length`` trials from a Sobol sequence and leaves the others to another sampler.

    They cover the space evenly, whatever they find, so that the other sampler starts from a fair picture of it. A
    trial's number is its place in the sequence, so machines that share a study draw different points.
    """

    def __init__(self, length: int, seed: int, space: Space, later: optuna.samplers.BaseSampler) -> None:
        self.length = length
        self.seed = seed
        self.space = space
        self.later = later

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Space:
        """The parameters that are drawn together."""
        if trial.number < self.length:
            return self.space
        return self.later.infer_relative_search_space(study, trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Space) -> dict[str, Any]:
        """Draw the parameters that are drawn together."""
        if trial.number >= self.length:
            return self.later.sample_relative(study, trial, search_space)
        from scipy.stats.qmc import Sobol

        sequence = Sobol(len(self.space), seed=self.seed)
        if trial.number:
            sequence.fast_forward(trial.number)
        (point,) = sequence.random()
        return {name: value_at(self.space[name], part) for name, part in zip(self.space, point, strict=True)}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Draw any other parameter."""
        return self.later.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Called before a trial is drawn."""
        self.later.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Called when the result of a trial is told."""
        self.later.after_trial(study, trial, state, values)


def value_at(distribution: BaseDistribution, fraction: float) -> Any:
    """The value of a parameter at a fraction, in [0, 1), of its range."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(fraction * len(distribution.choices))]
    if isinstance(distribution, IntDistribution):
        return distribution.low + int(fraction * (distribution.high - distribution.low + 1))
    assert isinstance(distribution, FloatDistribution)
    low, high = distribution.low, distribution.high
    if distribution.log:
        return float(low * (high / low) ** fraction)
    return float(low + fraction * (high - low))


class GPSampler(optuna.samplers.GPSampler):
    """Optuna's GPSampler, which also learns from pruned trials and raises all accuracies to at least their median.

    Optuna's own does not know that a pruned trial was poor, and draws the next one at the same place. And how poor a
    poor trial is says nothing about where the best ones are, but would dominate the model. The method that is
    overridden is private (Optuna 5.0).
    """

    def _sample_relative_impl(
        self,
        study: optuna.Study,
        completed_trials: list[FrozenTrial],
        running_trials: list[FrozenTrial],
        search_space: Space,
    ) -> dict[str, Any]:
        pruned = [
            trial
            for trial in study.get_trials(deepcopy=False, states=(TrialState.PRUNED,))
            if trial.values and search_space.keys() <= trial.params.keys()
        ]
        finished = completed_trials + pruned
        median = float(np.median([trial.values for trial in finished]))
        known = [as_complete(trial, median) for trial in finished]
        return super()._sample_relative_impl(study, known, running_trials, search_space)


def as_complete(trial: FrozenTrial, lowest: float) -> FrozenTrial:
    """A copy of a complete or pruned trial that is complete and has at least this value."""
    value = max(lowest, *trial.values)
    return create_trial(params=trial.params, distributions=trial.distributions, value=value)


class StartPruner(optuna.pruners.BasePruner):
    """MedianPruner or PercentilePruner that compares later trials with those of the start, which it never prunes.

    Those cover the space evenly. Later trials come from where the good ones are: compared with these, half of the good
    ones would be pruned, too. And what is pruned does not depend on which of the later trials happens to end first.
    """

    def __init__(self, length: int, ahead: int, pruner: optuna.pruners.PercentilePruner) -> None:
        self.length = length
        self.ahead = ahead
        self.pruner = pruner

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether to prune a trial that has just reported."""
        if trial.number < self.length + self.ahead - 1:  # some of the start may still be running
            return False
        start = optuna.create_study(direction="maximize")
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        start.add_trials([other for other in finished if other.number < self.length])
        return bool(self.pruner.prune(start, trial))


def open_study(run: common.Run, plan: Plan) -> optuna.Study:
    """Create or join the study, ready to be continued; raises UserError if it cannot be."""
    storage = open_storage(plan.options, run.output)
    if plan.options.storage is None:
        return join_study(run, plan, storage)
    with database_errors(plan.options.storage):
        return Patience().call(join_study, run, plan, storage)


def join_study(run: common.Run, plan: Plan, storage: BaseStorage) -> optuna.Study:
    """The study, checked, lost trials retried, the textbook configuration enqueued; to do so twice changes nothing."""
    options = plan.options
    optuna.create_study(storage=storage, study_name=options.study_name, direction="maximize", load_if_exists=True)
    study = LabStudy(options.study_name, storage, plan.space)
    check_study(study, options)
    settle_definition(study, define_study(run, plan), options.storage)
    add_machinery(study, run, options)
    study.enqueue_trial(TEXTBOOK, skip_if_exists=True)
    start = min(START, options.trials // 3)
    states = [trial.state for trial in study.trials]
    is_young = len(states) <= start and TrialState.PRUNED not in states  # it was made with fewer --trials
    if "start" not in study.user_attrs or is_young:
        study.set_user_attr("start", max(start, study.user_attrs.get("start", 0)))
    if not options.storage:  # this run has locked the folder: any trial running there is dead
        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            try_again(study, trial.number)
            study.tell(trial.number, state=TrialState.FAIL)
    start = study.user_attrs["start"]
    study.sampler = make_sampler(plan, start, len(study.trials))
    study.pruner = make_pruner(plan, start, look_ahead(run))
    return study


# Samplers and pruners that read trials past the study.
BYPASSING = ("BruteForceSampler", "GridSampler", "HyperbandPruner", "WilcoxonPruner")


class LabStudy(optuna.Study):
    """A study in which finished trials that are not the lab's, such as results added by hand, count as failed.

    They may have other parameters, and nobody knows how they were measured. Samplers, pruners and reports see all
    trials through the method that is overridden here, which is private (Optuna 5.0), except for those in BYPASSING.
    """

    def __init__(self, name: str, storage: BaseStorage, space: Space) -> None:
        super().__init__(name, storage)
        self.space = space

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        trials = super()._get_trials(deepcopy, None, use_cache)
        seen = [trial if self.is_the_labs(trial) else as_failed(trial) for trial in trials]
        return [trial for trial in seen if states is None or trial.state in states]

    def is_the_labs(self, trial: FrozenTrial) -> bool:
        """Whether a trial was drawn by this script from the space of the study; of unfinished ones nothing is asked."""
        if trial.state not in DONE:
            return True
        missing = self.space.keys() - trial.params.keys()
        return (
            "worker" in trial.user_attrs
            and trial.distributions.items() <= self.space.items()
            and all(  # values that somebody has enqueued may lie outside
                distribution._contains(distribution.to_internal_repr(trial.params[name]))
                for name, distribution in trial.distributions.items()
            )
            and missing <= ({"weight_decay"} if trial.params.get("optimizer") == "Muon" else set())
        )


def as_failed(trial: FrozenTrial) -> FrozenTrial:
    """What is shown of a trial that is not the lab's."""
    failed = create_trial(
        state=TrialState.FAIL, user_attrs={"reason": "not a trial of this script and its ranges: left out"}
    )
    failed.number = trial.number
    failed.datetime_start, failed.datetime_complete = trial.datetime_start, trial.datetime_complete
    return failed


def check_study(study: LabStudy, options: argparse.Namespace) -> None:
    """Raise UserError for a study that somebody else has made for something else; say what is left out."""
    name = study.study_name
    advice = "use another --study-name" if options.storage else "--fresh moves it aside"
    directions = [direction.name.lower() for direction in study.directions]
    if directions != ["maximize"]:
        made_to = " and ".join(directions)
        raise UserError(f"the stored study {name} was made to {made_to}, but accuracy is to be maximized: {advice}")
    trials = super(LabStudy, study)._get_trials()  # before the definition, which other machines may be about to store
    if trials and "definition" not in study.user_attrs:
        raise UserError(f"the stored study {name} has trials, but not of this script: {advice}")
    if [trial.number for trial in trials] != list(range(len(trials))):
        raise UserError(f"trials have been deleted from the stored study {name}: {advice}")
    others = [str(trial.number) for trial in trials if not study.is_the_labs(trial)]
    if others:
        numbers = ", ".join(others)
        if options.sampler in BYPASSING or options.pruner in BYPASSING:
            raise UserError(
                f"trials {numbers} of the stored study are not of this script, which this sampler or pruner "
                f"would not notice: {advice}"
            )
        common.note(f"trials {numbers} of the stored study are not of this script: left out")


def define_study(run: common.Run, plan: Plan) -> dict[str, Any]:
    """What must not change within a study, as JSON keeps it."""
    ranges = {
        f"range of {name}": optuna.distributions.distribution_to_json(distribution)
        for name, distribution in plan.space.items()
    }
    definition = {
        "dataset": f"checksum {run.data.fingerprint}",
        "images": len(plan.template.split.train),
        "seed": plan.options.seed,
        **fields_of(plan.template.recipe),
        **ranges,
    }
    network = plan.template.recipe.network
    if network.is_custom:  # its name does not say what it computes
        model = common.build_model(network, run.data.shape, len(run.data.classes))
        logits = common.predict(model, common.probe_images(run.data.shape), common.Runtime("cpu", "fp32", 1))
        layers = re.sub(" at 0x[0-9a-f]+", "", str(model[1]))  # addresses of functions differ from run to run
        definition |= {LAYERS: layers, LOGITS: logits.tolist()}
    return json.loads(json.dumps(definition))


# Entries of the definition of a study with a network of the user's.
LAYERS = "layers of the network"
LOGITS = "logits of the new network"


def is_as_before(name: str, before: Any, now: Any) -> bool:
    """Whether an entry of a definition has not changed; logits may differ in the last digits on another machine."""
    if name == LOGITS and before is not None:
        return common.is_same(torch.tensor(now), torch.tensor(before))
    return before == now or (before is None and name in (LOGITS, LAYERS))  # of a study of an earlier version


def settle_definition(study: optuna.Study, definition: Mapping[str, Any], storage: str | None) -> None:
    """Store the definition of a new study; raises UserError if that of an old one differs."""
    before = study.user_attrs.get("definition", definition)
    for name in {**before, **definition}:
        if not is_as_before(name, before.get(name), definition.get(name)):
            change = f"{name}: {before.get(name)}, now {definition.get(name)}"
            if name in (LOGITS, LAYERS):
                change = f"{before['model']} is another network now"
            advice = "--fresh moves it aside, or use another --output-dir"
            if storage:
                advice = "use another --study-name"
            raise UserError(f"the stored study differs ({change}); {advice}")
    study.set_user_attr("definition", definition)


def add_machinery(study: optuna.Study, run: common.Run, options: argparse.Namespace) -> None:
    """Note what may change within a study, and is reported if it does."""
    used = {
        "sampler": options.sampler,
        "pruner": options.pruner,
        "precision": run.runtime.precision,
        "commit": run.environment.git_commit,
    }
    before = study.user_attrs.get("machinery", [])
    if used not in before:
        study.set_user_attr("machinery", [*before, used])


def make_sampler(plan: Plan, start: int, trials: int) -> optuna.samplers.BaseSampler:
    """The sampler for a study with so many trials: each resumption and, with --storage, each machine draws anew.

    The Sobol sequence is the same for all of them. Random search has none: it is what other samplers are measured by.
    """
    options = plan.options
    machine = time.time_ns() % 2**32 if options.storage else 0
    seed = common.derive_seed(options.seed, Stage.SAMPLER, trials, machine) % 2**32
    if options.sampler == "RandomSampler":
        return optuna.samplers.RandomSampler(seed=seed)
    kind = GPSampler if options.sampler == DEFAULT_SAMPLER else getattr(optuna.samplers, options.sampler)
    sampler = kind(seed=seed, **OPTUNA_SETTINGS.get(options.sampler, {}))
    return SobolStart(start, common.derive_seed(options.seed, Stage.SAMPLER) % 2**32, plan.space, sampler)


def make_pruner(plan: Plan, start: int, ahead: int) -> optuna.pruners.BasePruner:
    """The pruner that --pruner names; one that compares with other trials' medians compares with those of the start."""
    kind = getattr(optuna.pruners, plan.options.pruner)
    settings = OPTUNA_SETTINGS.get(plan.options.pruner, {})
    if not issubclass(kind, optuna.pruners.PercentilePruner):
        return kind(**settings)
    # While learning rates are high, accuracies say little about the end: every trial gets three of five epochs.
    warm_up = round(0.6 * plan.template.recipe.training.epochs)
    return StartPruner(start, ahead, kind(**settings, n_startup_trials=1, n_warmup_steps=warm_up))


def look_ahead(run: common.Run) -> int:
    """How many trials are drawn before the result of the first of them is used: one more than workers."""
    return max(AHEAD, run.workers.count + 1)


def retried(trials: Sequence[FrozenTrial]) -> dict[int, int]:
    """{number of a trial whose worker died: number of the trial that retries its parameters}."""
    histories = {trial.number: RetryHeartbeatStaleTrialCallback.retry_history(trial) for trial in trials}
    return {history[-1]: number for number, history in histories.items() if history}


def try_again(study: optuna.Study, number: int) -> None:
    """Enqueue the parameters of a lost trial, unless that was done before."""
    trials = study.trials
    if number not in retried(trials):
        trials[number].user_attrs.clear()  # the new trial gets its own
        RetryHeartbeatStaleTrialCallback(MAX_RETRIES)(study, trials[number])


# ================================================================ 5. running it


class SearchResult(NamedTuple):
    """A copy of the study in memory, and what ended the search early, if anything."""

    study: optuna.Study
    stopped: BaseException | None


def work_of_search(plan: Plan) -> float:
    """In images to train on, if no trial were pruned."""
    return plan.options.trials * plan.template.work


def search(run: common.Run, plan: Plan, study: optuna.Study) -> SearchResult:
    """Run trials until --trials are complete or pruned; none is drawn after --timeout seconds."""
    options = plan.options
    run.progress.stage(f"{options.sampler}, {options.trials} trials or {options.timeout:.0f} s")
    runner = StudyRunner(run, plan, study)
    stopped = runner.run_to_the_end()
    found = optuna.create_study(direction="maximize")
    found.add_trials(runner.trials)
    for name, value in runner.attributes.items():
        found.set_user_attr(name, value)
    return SearchResult(found, stopped)


class Pending(NamedTuple):
    """A trial that was drawn and whose result was not told yet."""

    trial: optuna.Trial
    training: Future[float]


class StudyRunner:
    """Runs the trials that a study lacks.

    One thread draws trials and tells their results, in the order of their numbers: a trial is drawn knowing all results
    but those of the two before it (more with more workers), whichever worker is faster, so --seed determines the
    trials. Each trial has a thread that delegates the training to a worker process and receives the epochs one by one,
    to report them and to ask the pruner. A database may be away for a while: what may be repeated waits for it, the
    rest is tried again.
    """

    def __init__(self, run: common.Run, plan: Plan, study: optuna.Study) -> None:
        self.run = run
        self.plan = plan
        self.study = study
        self.patience = Patience()
        self.ahead = look_ahead(run)
        self.started = time.monotonic()
        self.last_heartbeat = 0.0
        self.pending: deque[Pending] = deque()
        self.trials: list[FrozenTrial] = []  # as they were when last read
        self.attributes: dict[str, Any] = {"machinery": [], "start": 0}  # of the study, likewise
        self.outcomes: list[TrialState] = []  # of this run's own trials
        self.last_error: Exception | None = None  # in a trial
        self.shown = 0.0  # share of the work

    @property
    def missing(self) -> int:
        """The number of trials still to be finished."""
        return self.plan.options.trials - sum(trial.state in DONE for trial in self.trials)

    @property
    def all_fail(self) -> bool:
        """Whether there is no hope for the next trial."""
        return len(self.outcomes) > 5 and set(self.outcomes) == {TrialState.FAIL}

    @property
    def is_over(self) -> bool:
        """Whether no more trials shall be drawn."""
        is_late = time.monotonic() > self.started + self.plan.options.timeout
        is_enough = self.missing <= len(self.pending)
        return is_enough or is_late or self.patience.halted.is_set() or self.all_fail

    def run_to_the_end(self) -> BaseException | None:
        """Run all trials; returns what ended the search early."""
        with ThreadPoolExecutor(1) as background:  # Ctrl-C must not interrupt the writing of the journal
            working = background.submit(self.run_trials)
            try:
                while wait([working], 0.5).not_done:
                    self.show_progress()
                working.result()
            except KeyboardInterrupt as error:
                self.patience.halted.set()
                self.run.workers.stop()
                return error
            except Exception as error:  # not of a trial: of the storage, the system or the sampler
                options = self.plan.options
                if is_of_the_storage(error):
                    return UserError(f"the study ended early: {cause_of(error, options.storage)}")
                if options.sampler != DEFAULT_SAMPLER:  # one of Optuna's that is not made for such a study
                    return UserError(f"--sampler {options.sampler} cannot go on: {common.first_line(error)}")
                return error
        self.run.progress.advance((1 - self.shown) * work_of_search(self.plan))
        return self.last_error if self.all_fail else None

    def show_progress(self) -> None:
        """The share of trials that are finished, or of the time that has passed."""
        options = self.plan.options
        share = max((time.monotonic() - self.started) / options.timeout, 1 - self.missing / options.trials, self.shown)
        share = min(1.0, share)
        self.run.progress.advance((share - self.shown) * work_of_search(self.plan))
        self.shown = share

    def run_trials(self) -> None:
        """Run trials until the search is over; raises the error of a database that stays away."""
        self.read()
        with ThreadPoolExecutor(self.run.workers.count) as threads:
            try:
                while self.pending or not self.is_over:
                    self.say_alive()
                    if len(self.pending) < self.ahead and not self.is_over:
                        self.draw(threads)
                    else:
                        self.finish_oldest()
            except Exception:
                self.patience.halted.set()  # the trainings end, too
                raise

    def read(self) -> None:
        """Read all trials, other machines' included, and what was noted of the study."""
        self.trials = self.patience.call(self.study.get_trials, deepcopy=False)
        self.attributes = self.patience.call(lambda: self.study.user_attrs)

    def draw(self, threads: ThreadPoolExecutor) -> None:
        """Draw the next trial and hand it to the next free thread."""
        if self.plan.options.storage:
            self.patience.call(optuna.storages.fail_stale_trials, self.study)
        trial = self.patience.call(self.study.ask)
        self.patience.call(self.beat, [trial])
        self.patience.call(trial.set_user_attr, "worker", f"{platform.node()}, process {os.getpid()}")
        try:
            # Not to be repeated: values that were stored without an answer would be drawn again.
            settings = suggest(trial, self.plan.template.recipe)
        except Exception as error:
            self.explain_failure(trial, error)
            self.tell(trial, None, TrialState.FAIL)
            if not (is_outage(error) or self.was_enqueued(trial)):
                raise
        else:
            job = self.plan.job(settings, Stage.TRIAL, trial.number)
            self.pending.append(Pending(trial, threads.submit(self.train, trial, job)))

    def was_enqueued(self, trial: optuna.Trial) -> bool:
        """Whether somebody has chosen parameters of the trial, perhaps with values that they cannot have."""
        stored = self.patience.call(self.study._storage.get_trial, trial._trial_id)
        return "fixed_params" in stored.system_attrs

    def finish_oldest(self) -> None:
        """Wait for the result of the trial that was drawn first, and tell it."""
        trial, training = self.pending[0]
        while wait([training], 0.5).not_done:
            self.say_alive()
        accuracy = None
        state = TrialState.COMPLETE
        try:
            accuracy = training.result()
        except optuna.TrialPruned:
            state = TrialState.PRUNED
        except Exception as error:  # explained before
            self.last_error = error
            state = TrialState.FAIL
        self.tell(trial, accuracy, state)
        self.pending.popleft()

    def tell(self, trial: optuna.Trial, accuracy: float | None, state: TrialState) -> None:
        """Store the result of a trial, unless another machine has taken this one for dead; read those of others."""
        try:
            self.patience.call(self.study.tell, trial, accuracy, state, skip_if_finished=True)
        except Exception as error:
            if not is_lost_trial(error):
                raise
        self.outcomes.append(state)
        self.read()

    def say_alive(self) -> None:
        """Tell other machines from time to time that they need not take over the pending trials."""
        if time.monotonic() < self.last_heartbeat + HEARTBEAT_SECONDS:
            return
        try:
            self.beat([pending.trial for pending in self.pending])
            self.last_heartbeat = time.monotonic()
        except Exception as error:
            if not is_outage(error):  # otherwise the next attempt may succeed
                raise

    def beat(self, trials: Sequence[optuna.Trial]) -> None:
        """Record heartbeats in a database. Optuna itself does so for study.optimize alone."""
        if self.plan.options.storage:
            storage: Any = self.study._storage
            for trial in trials:
                storage.record_heartbeat(trial._trial_id)

    def train(self, trial: optuna.Trial, job: common.Job) -> float:
        """Train and judge a configuration; returns its accuracy. Raises TrialPruned, and explains any other error."""
        try:
            if self.patience.halted.is_set():
                raise common.WorkerDied(INTERRUPTED)
            return self.train_epochs(trial, job)
        except optuna.TrialPruned as pruned:
            self.patience.call(trial.set_user_attr, "reason", str(pruned))
            raise
        except Exception as error:
            if not is_lost_trial(error):
                self.explain_failure(trial, error)
            raise

    def train_epochs(self, trial: optuna.Trial, job: common.Job) -> float:
        """Train in a worker process and report every epoch; returns the last accuracy."""
        accuracy = float("nan")
        with contextlib.closing(self.run.workers.run(common.train_job, job)) as epochs:
            for epoch in epochs:
                if self.patience.halted.is_set():
                    raise common.WorkerDied(INTERRUPTED)
                accuracy = epoch.val_accuracy
                self.patience.call(trial.set_user_attr, "seconds", epoch.seconds)
                self.patience.call(trial.report, accuracy, epoch.number)
                if not epoch.is_finite:
                    raise optuna.TrialPruned("diverged: the loss is not finite")
                is_last = epoch.number == job.recipe.training.epochs
                if not is_last and self.patience.call(trial.should_prune):
                    raise optuna.TrialPruned(f"{self.plan.options.pruner}, after epoch {epoch.number}")
        return accuracy

    def explain_failure(self, trial: optuna.Trial, error: Exception) -> None:
        """Store why a trial failed; try it again if that was not its own fault."""
        reason = common.first_line(error)
        if isinstance(error, common.WorkerFailed):
            reason = str(error).strip().splitlines()[-1]  # of the traceback
        if is_outage(error):
            reason = AWAY
        self.patience.call(trial.set_user_attr, "reason", reason[:200])
        if isinstance(error, common.WorkerDied) or is_outage(error):
            self.patience.call(try_again, self.study, trial.number)


# ================================================================ 6. what the study found


class CompleteTrial(NamedTuple):
    """A complete trial."""

    number: int
    value: float  # validation accuracy
    params: dict[str, Any]  # as drawn

    @property
    def settings(self) -> Settings:
        """Its configuration."""
        return settings_of(self.params)


def complete_trials_of(study: optuna.Study) -> list[CompleteTrial]:
    """All complete trials, the most accurate first."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    found = [
        CompleteTrial(trial.number, float(trial.value), trial.params) for trial in trials if trial.value is not None
    ]
    return sorted(found, key=lambda candidate: candidate.value, reverse=True)


@dataclass(frozen=True)
class Results:
    """All that a run has found, as far as it came."""

    plan: Plan
    source: str  # of the data
    study: optuna.Study  # in memory
    audit: Audit | None = None
    confirmation: Confirmation | None = None
    final: FinalTest | None = None
    is_interrupted: bool = False

    @property
    def complete_trials(self) -> list[CompleteTrial]:
        """All complete trials, the most accurate first."""
        return complete_trials_of(self.study)

    @property
    def best(self) -> CompleteTrial:
        """The winner of the confirmation, or the most accurate trial where there was none."""
        return self.confirmation.winner.candidate if self.confirmation else self.complete_trials[0]

    @property
    def counts(self) -> dict[str, int]:
        """The numbers of trials by outcome."""
        states = [trial.state for trial in self.study.get_trials(deepcopy=False)]
        counts = {
            "pruned": states.count(TrialState.PRUNED),
            "complete": states.count(TrialState.COMPLETE),
            "failed": states.count(TrialState.FAIL),
        }
        return {"finished": sum(counts.values())} | counts

    @property
    def machinery(self) -> list[dict[str, Any]]:
        """Samplers, pruners, precisions and commits that the study was made with."""
        return self.study.user_attrs["machinery"]

    @property
    def optimism(self) -> dict[str, float] | None:
        """How much better the best trial looked in the study than it is, in two parts: by its seed, by its images."""
        if self.final is None:
            return None
        value = self.best.value
        validation = float(self.final.validation["best"].mean())
        test = float(self.final.test["best"].mean())
        return {
            "study_value": value,
            "fresh_seeds_validation": validation,
            "fresh_seeds_test": test,
            "winners_curse": value - validation,
            "validation_minus_test": validation - test,
            "optimism": value - test,
            "image_noise": self.final.image_noise,
        }

    def summary(self) -> dict[str, Any]:
        """The content of summary.json."""
        options = self.plan.options
        facts: dict[str, Any] = {
            "task": "task3",
            "sampler": options.sampler,
            "pruner": options.pruner,
            "seed": options.seed,
            "machinery": self.machinery,
            "n_trials": self.counts,
            "best": None,
        }
        if self.complete_trials:
            highest = self.complete_trials[0]
            best = self.best
            facts["highest_value"] = {"number": highest.number, "value": highest.value}
            facts["best"] = {"number": best.number, "value": best.value, "params": best.settings}
        if self.audit:
            facts["audit"] = self.audit._asdict()
        if self.confirmation:
            facts["confirmation"] = self.confirmation.summary()
        if self.final:
            facts["retrain"] = self.final.summary()
            facts["ablation"] = [effect.row() for effect in self.final.effects]
            facts["optimism"] = self.optimism
        return facts | {"interrupted": self.is_interrupted}


def trial_table(study: optuna.Study) -> pd.DataFrame:
    """trials.csv: a row per trial, with both the relative and the absolute learning rate."""
    trials = study.get_trials(deepcopy=False)
    table = study.trials_dataframe(("number", "state", "value", "params", "user_attrs"))
    table.columns = [name.removeprefix("user_attrs_").replace("params_", "param_") for name in table]
    last = ("param_lr", "epochs_run", "seconds", "worker", "reason")
    table = table.reindex(columns=["number", "state", "value", *(f"param_{name}" for name in TEXTBOOK), *last])
    table["state"] = [trial.state.name.lower() for trial in trials]
    table["param_lr"] = [settings_of(trial.params)["lr"] if is_drawn(trial) else None for trial in trials]
    table["epochs_run"] = [len(trial.intermediate_values) for trial in trials]
    again = retried(trials)
    table["reason"] = [reason_of(trial, again.get(trial.number)) for trial in trials]
    return table


def is_drawn(trial: FrozenTrial) -> bool:
    """Whether a trial has all of its parameters: not, if the database was away in the meantime."""
    return set(TEXTBOOK) - {"weight_decay"} <= set(trial.params)


def reason_of(trial: FrozenTrial, retry: int | None) -> str:
    """Why a trial ended early, in words; ``retry`` is the number of the trial that tries it again."""
    reason = trial.user_attrs.get("reason", "")
    if retry is None:
        return reason
    cause = reason if reason in (AWAY, INTERRUPTED) else "its worker died"
    return f"{cause}; tried again as trial {retry}"


def write_trials(run: common.Run, results: Results) -> None:
    """Write trials.csv."""
    run.write_table("trials.csv", trial_table(results.study))


def expect_work(run: common.Run, plan: Plan) -> None:
    """Announce all stages to the progress bar."""
    work = work_of_search(plan) + plan.options.audit * plan.template.work
    if plan.options.retrain_seeds:
        work += work_of_confirmation(plan, plan.candidate_count)
        work += work_of_final_trainings(plan)
        work += plan.full.training.epochs * len(all_images(plan, run.data).train)
    run.progress.expect(work)


# ---------------------------------------------------------------- was the pruner right?


class Audit(NamedTuple):
    """Pruned trials that were trained to the end."""

    finished: int
    pruned: int  # all that did not diverge
    would_have_won: int  # with a higher value than any complete trial
    would_have_been_confirmed: int  # with a higher value than the last candidate
    highest: float  # of the accuracies that they reach
    share_ci_high: float | None  # of the latter; 95 %, one-sided, by Clopper and Pearson


def run_audit(run: common.Run, plan: Plan, study: optuna.Study) -> Audit | None:
    """Train a random sample of pruned trials to the end, each from its own seed: was any of them a good one?"""
    from scipy.stats import binomtest

    if not plan.options.audit:
        return None
    pruned = trial_table(study).query("state == 'pruned' and not reason.str.startswith('diverged')", engine="python")
    seed = common.derive_seed(plan.options.seed, Stage.AUDIT) % 2**32
    frame = pruned.sample(min(plan.options.audit, len(pruned)), random_state=seed).sort_index()
    run.progress.advance((plan.options.audit - len(frame)) * plan.template.work)
    if frame.empty:
        return Audit(0, 0, 0, 0, 0.0, None)
    run.progress.stage(f"audit: finishing {len(frame)} pruned trials")
    numbers = [int(number) for number in frame["number"]]
    jobs = [plan.job(settings_of(study.trials[number].params), Stage.TRIAL, number) for number in numbers]
    finished = dict(run.train(jobs))
    candidates = complete_trials_of(study)[: plan.candidate_count]
    last = candidates[-1].value if len(candidates) == plan.candidate_count else 0.0
    frame = frame[["number", "epochs_run", "value"]].rename(columns={"value": "value_when_pruned"})
    frame["value_finished"] = [finished[number].validation.accuracy for number in range(len(jobs))]
    frame["would_have_won"] = frame["value_finished"] > candidates[0].value
    frame["would_have_been_confirmed"] = frame["value_finished"] > last
    run.write_table("audit.csv", frame)
    good = int(frame["would_have_been_confirmed"].sum())
    bound = binomtest(good, len(jobs), alternative="less").proportion_ci(0.95, "exact").high
    won = int(frame["would_have_won"].sum())
    return Audit(len(jobs), len(pruned), won, good, float(frame["value_finished"].max()), float(bound))


# ================================================================ 7. confirmation


class Confirmed(NamedTuple):
    """A candidate, trained again."""

    candidate: CompleteTrial
    accuracies: np.ndarray  # float64 (seeds,), on the validation images

    @property
    def mean(self) -> float:
        """The mean accuracy."""
        return float(self.accuracies.mean())


class Confirmation(NamedTuple):
    """The trials with the highest values, trained again on common fresh seeds."""

    candidates: list[Confirmed]  # in the order of their values in the study
    seeds: list[int]

    @property
    def winner(self) -> Confirmed:
        """The one with the highest mean."""
        return max(self.candidates, key=lambda confirmed: confirmed.mean)

    def rows(self) -> pd.DataFrame:
        """confirmation.csv: a row per training."""
        rows = [
            {
                "trial": confirmed.candidate.number,
                "study_value": confirmed.candidate.value,
                "seed": seed,
                "validation_accuracy": accuracy,
            }
            for confirmed in self.candidates
            for seed, accuracy in zip(self.seeds, confirmed.accuracies, strict=True)
        ]
        return pd.DataFrame(rows)

    def summary(self) -> dict[str, Any]:
        """Its entry in summary.json."""
        winner = self.winner
        return {
            "trial": winner.candidate.number,
            "value": winner.candidate.value,
            "mean": winner.mean,
            "n": len(winner.accuracies),
            "candidates": [
                {"trial": one.candidate.number, "value": one.candidate.value, "accuracies": one.accuracies.tolist()}
                for one in self.candidates
            ],
        }


def confirm(run: common.Run, plan: Plan, candidates: Sequence[CompleteTrial]) -> Confirmation | None:
    """Train the candidates with the highest values again; writes confirmation.csv."""
    if not plan.options.retrain_seeds:
        return None
    chosen = candidates[: plan.candidate_count]
    run.progress.stage(f"confirmation: the best {len(chosen)} trials on {plan.confirmation_seed_count} fresh seeds")
    run.progress.advance(work_of_confirmation(plan, plan.candidate_count) - work_of_confirmation(plan, len(chosen)))
    confirmation = train_candidates(run, plan, chosen)
    run.write_table("confirmation.csv", confirmation.rows())
    return confirmation


def work_of_confirmation(plan: Plan, candidates: int) -> float:
    """In images to train on."""
    return candidates * plan.confirmation_seed_count * plan.template.work


def train_candidates(run: common.Run, plan: Plan, candidates: Sequence[CompleteTrial]) -> Confirmation:
    """Train candidates as in the study, on common fresh seeds."""
    keys = [(candidate, number) for number in range(plan.confirmation_seed_count) for candidate in candidates]
    jobs = [plan.job(candidate.settings, Stage.CONFIRMATION, number) for candidate, number in keys]
    results = dict(run.train([replace(job, scores_every_epoch=False) for job in jobs]))
    accuracies = [results[place].validation.accuracy for place in range(len(jobs))]
    by_seed = np.reshape(accuracies, (plan.confirmation_seed_count, len(candidates)))
    seeds = [job.seed for job in jobs[:: len(candidates)]]
    return Confirmation([Confirmed(*pair) for pair in zip(candidates, by_seed.T, strict=True)], seeds)


# ================================================================ 8. fresh seeds, ablation, then the test set


class FullTraining(NamedTuple):
    """What is told of the full training: the best settings in the preset's network, on all images, once."""

    seed: int
    test_accuracy: float
    images: int
    epochs: int


class Effect(NamedTuple):
    """What a parameter of the best configuration is worth: the accuracy lost by the textbook's value in its place."""

    setting: str  # its name in TEXTBOOK
    best: Any  # its value in the best configuration
    textbook: Any
    estimate: Estimate  # accuracy, from 0 to 1
    p_holm: float

    @property
    def is_shown(self) -> bool:
        """Whether there is an effect, corrected for the number of settings."""
        return self.p_holm < common.SIGNIFICANCE

    def row(self) -> dict[str, Any]:
        """As in ablation.csv and summary.json; effects in points."""
        return {
            "setting": self.setting,
            "from": self.best,
            "to": self.textbook,
            "effect": 100 * self.estimate.mean,
            "ci_low": 100 * self.estimate.low,
            "ci_high": 100 * self.estimate.high,
            "p_holm": self.p_holm,
            "n": self.estimate.n,
        }


@dataclass(frozen=True)
class FinalTest:
    """The best configuration and what it is compared with, on fresh seeds; accuracies from 0 to 1."""

    # By the name of a configuration; "best but schedule" has the textbook's schedule.
    settings: dict[str, Settings]  # without these
    validation: dict[str, np.ndarray]  # float64 (seeds,)
    test: dict[str, np.ndarray]  # float64 (seeds,)
    seconds: dict[str, float]  # of a training, the mean
    images: tuple[int, int]  # for validation and test
    gains: dict[str, Estimate]  # of the best over the others, on the test images
    effects: list[Effect]  # of the best one's settings, the largest first
    full: FullTraining

    @property
    def image_noise(self) -> float:
        """How far accuracies on two sets of so many images differ by chance in 95 % of cases, in points."""
        accuracy = float(self.test["best"].mean())
        variance = sum(accuracy * (1 - accuracy) / n for n in self.images)
        return 100 * 1.96 * float(np.sqrt(variance))

    def summary(self) -> dict[str, Any]:
        """Its entry in summary.json."""
        keys = {"textbook": "difference", "lab": "difference_to_lab"}
        facts: dict[str, Any] = {"settings": self.settings, "full": self.full._asdict()}
        for name in self.settings:
            facts[name] = {"test_accuracy": describe(self.test[name]), "train_seconds": self.seconds[name]}
        for name, key in keys.items():
            if name in self.gains:
                gain = self.gains[name]
                facts[key] = {"mean": gain.mean, "ci_low": gain.low, "ci_high": gain.high, "n": gain.n}
        return facts


def describe(accuracies: np.ndarray) -> dict[str, Any]:
    """Mean, standard deviation, number and values."""
    sd = float(accuracies.std(ddof=1)) if len(accuracies) > 1 else float("nan")
    return {"mean": float(accuracies.mean()), "sd": sd, "n": len(accuracies), "values": accuracies.tolist()}


def compared(plan: Plan, best: Settings) -> dict[str, Settings]:
    """The configurations to compare: the textbook's, the best and, unless the network is custom, the lab's."""
    settings = {"textbook": settings_of(TEXTBOOK), "best": best}
    if plan.lab:
        settings["lab"] = plan.lab
    return settings


def ablated(params: Mapping[str, Any]) -> dict[str, Settings]:
    """{parameter: the best configuration with the textbook's value in its place}, for parameters that matter.

    The other optimizer gets the same multiple of its usual learning rate; weight decay means nothing to Muon.
    """
    best = settings_of(params)
    changed = {name: settings_of({"weight_decay": 0.0} | dict(params) | {name: TEXTBOOK[name]}) for name in TEXTBOOK}
    return {name: settings for name, settings in changed.items() if settings != best}


def all_images(plan: Plan, data: common.Dataset) -> common.Split:
    """The images of the full training: none are held out for validation."""
    return common.split_dataset(data, plan.options.images, validation=False)


def work_of_final_trainings(plan: Plan) -> float:
    """In images to train on, if every setting differs from the textbook's."""
    configurations = len(compared(plan, settings_of(TEXTBOOK))) + len(TEXTBOOK)
    return plan.options.retrain_seeds * configurations * plan.template.work


class Retrained(NamedTuple):
    """A configuration, trained again as in the study."""

    configuration: str
    job: common.Job
    result: common.TrainingResult

    @property
    def network(self) -> nn.Module:
        """The final network."""
        assert self.result.network
        return self.result.network.rebuild()


class FullModel(NamedTuple):
    """The network of the full training."""

    recipe: Recipe
    seed: int
    split: common.Split
    model: nn.Sequential


def compare_and_ablate(run: common.Run, plan: Plan, best: CompleteTrial, dataset: common.Dataset) -> FinalTest | None:
    """Train all configurations on fresh seeds, the best also in full; then read the test set, once."""
    if not plan.options.retrain_seeds:
        return None
    settings = compared(plan, best.settings)
    ablations = ablated(best.params)
    trained = train_again(run, plan, settings | {f"best but {name}": own for name, own in ablations.items()})
    write_retraining(run, trained)  # the full training may be interrupted
    full = train_in_full(run, plan, best.settings)
    run.progress.stage("test set")
    index = test_index(plan, dataset)
    right = [is_right(run, dataset, index, retrained.network) for retrained in trained]
    tested = save_full_training(run, full, is_right(run, dataset, index, full.model))
    write_retraining(run, trained, [float(own.mean()) for own in right], tested)
    names = [retrained.configuration for retrained in trained]
    validation = [retrained.result.validation.accuracy for retrained in trained]
    seconds = [retrained.result.epochs[-1].seconds for retrained in trained]
    matrices = {name: np.stack(group) for name, group in grouped(names, right).items()}
    effects = judge_effects(best.params, matrices)
    if effects:
        run.write_table("ablation.csv", pd.DataFrame([effect.row() for effect in effects]))
    return FinalTest(
        settings=settings,
        validation={name: np.array(group) for name, group in grouped(names, validation).items()},
        test={name: matrix.mean(1) for name, matrix in matrices.items()},
        seconds={name: float(np.mean(group)) for name, group in grouped(names, seconds).items()},
        images=(len(plan.template.split.validation), len(index)),
        gains={name: advantage(matrices, name) for name in settings if name != "best"},
        effects=effects,
        full=tested,
    )


def train_again(run: common.Run, plan: Plan, settings: Mapping[str, Settings]) -> list[Retrained]:
    """Train all configurations as in the study, on the same fresh seeds.

    A seed fixes initial weights and batches, so differences are paired.
    """
    keys = [(name, number) for number in range(plan.options.retrain_seeds) for name in settings]
    jobs = [plan.job(settings[name], Stage.FRESH, number) for name, number in keys]
    jobs = [replace(job, scores_every_epoch=False, keeps_network=True) for job in jobs]
    run.progress.stage(f"comparison and ablation on fresh seeds, {len(jobs)} trainings")
    run.progress.advance(work_of_final_trainings(plan) - len(jobs) * plan.template.work)  # settings that do not differ
    results = dict(run.train(jobs))
    return [Retrained(name, jobs[place], results[place]) for place, (name, _) in enumerate(keys)]


def train_in_full(run: common.Run, plan: Plan, best: Settings) -> FullModel:
    """Train the best settings in the preset's network on all images."""
    run.progress.stage("the best settings in the preset's network, on all images and cores")
    recipe = plan.full.replace(**best)
    split = all_images(plan, run.data)
    seed = plan.job(best, Stage.FULL).seed
    model = common.make_model(recipe.network, run.data, split, seed)
    left = recipe.training.epochs
    for _ in common.train_epochs(model, run.data, recipe.training, run.runtime, split.train, seed):
        run.progress.advance(len(split.train))
        left -= 1
    run.progress.advance(left * len(split.train))  # of a training that diverged
    return FullModel(recipe, seed, split, model)


def test_index(plan: Plan, dataset: common.Dataset) -> Tensor:
    """The test images to use, sorted by class; for --quick a subset, with all classes in proportion."""
    order = dataset.test_labels.argsort(stable=True)
    return order[:: max(1, len(order) // QUICK_IMAGES)] if plan.options.quick else order


def is_right(run: common.Run, dataset: common.Dataset, index: Tensor, model: nn.Module) -> np.ndarray:
    """Which test images a network labels correctly: float64 (n,) of zeros and ones."""
    logits = common.predict(model, dataset.test_images, run.runtime, index)
    return common.score(logits, dataset.test_labels[index]).right.astype(float)


def save_full_training(run: common.Run, full: FullModel, right: np.ndarray) -> FullTraining:
    """Write best_model.pth; returns what is told of it."""
    accuracy = float(right.mean())
    path = run.folder / "best_model.pth"
    common.save_checkpoint(path, full.model, run.data, full.recipe, seed=full.seed, test_accuracy=accuracy)
    return FullTraining(full.seed, accuracy, len(full.split.train), full.recipe.training.epochs)


def write_retraining(
    run: common.Run,
    trained: Sequence[Retrained],
    accuracies: Sequence[float] | None = None,
    full: FullTraining | None = None,
) -> None:
    """retrain.csv, with test accuracies as soon as they are known."""
    rows: list[dict[str, Any]] = []
    for place, (configuration, job, result) in enumerate(trained):
        row = {"configuration": configuration, "schedule": "study", "seed": job.seed}
        row["validation_accuracy"] = result.validation.accuracy
        row["train_seconds"] = result.epochs[-1].seconds
        if accuracies is not None:
            row["test_accuracy"] = accuracies[place]
        rows.append(row)
    if full is not None:
        row = {"configuration": "best", "schedule": "full", "seed": full.seed, "test_accuracy": full.test_accuracy}
        rows.append(row)
    run.write_table("retrain.csv", pd.DataFrame(rows))


Value = TypeVar("Value")


def grouped(names: Sequence[str], values: Sequence[Value]) -> dict[str, list[Value]]:
    """The values by name, in their order."""
    groups: dict[str, list[Value]] = {name: [] for name in names}
    for name, value in zip(names, values, strict=True):
        groups[name].append(value)
    return groups


def advantage(right: Mapping[str, np.ndarray], other: str) -> Estimate:
    """How much more accurate the best configuration is than another; ``right``: (seeds, images)."""
    return common.crossed_interval(right["best"] - right[other])


def judge_effects(params: Mapping[str, Any], right: Mapping[str, np.ndarray]) -> list[Effect]:
    """What every parameter is worth, the largest effect first; p-values are corrected for their number."""
    estimates = {name: advantage(right, f"best but {name}") for name in TEXTBOOK if f"best but {name}" in right}
    corrected = common.holm([estimate.p for estimate in estimates.values()])
    effects = [
        Effect(name, params[name], TEXTBOOK[name], estimate, float(p))
        for (name, estimate), p in zip(estimates.items(), corrected, strict=True)
    ]
    return sorted(effects, key=lambda effect: effect.estimate.mean, reverse=True)


# ================================================================ 9. figures

# The kinds of trials, in the order in which they are drawn; a kind has the same colour in every figure.
COLOURS = {
    "pruned": "#999999",
    "complete": common.PALETTE[0],
    "textbook": common.PALETTE[6],
    "best": common.PALETTE[1],
    "lab": common.PALETTE[2],
}
CAPTIONS = {
    "ablation": "Accuracy lost when one setting of the best configuration is set back to the textbook's; the other "
    "optimizer gets the same multiple of its usual learning rate. Left of the line: better with the textbook's value. "
    "Intervals are each for itself; grey: no effect shown, corrected for the number of settings (Holm).",
    "optimization_history": "One point per trial; the line is the highest value so far, which flatters. Left of the "
    "dotted line, trials cover the space evenly. Diamonds, right of the last trial: the best configuration "
    "and, also as a line, the lab's settings on fresh seeds and the same images, with 95 % intervals over seeds.",
    "intermediate_values": "One line per trial; a cross marks where a trial was pruned. The first trials are never "
    "pruned, however poor.",
    "coverage": "The trials by optimizer and schedule, and the highest value of the complete ones. Few trials say "
    "little, and the highest of many is higher than the highest of few.",
    "slice": "All trials. The points show where the sampler went, not what a setting is worth: for that, see the "
    "ablation. A pruned trial is shown with its accuracy when it was pruned.",
}
NAMES = {"lr_scale": "learning rate / usual"}


class Shown(NamedTuple):
    """A trial in the figures."""

    kind: str
    trial: FrozenTrial

    @property
    def value(self) -> float:
        """The validation accuracy after its last epoch."""
        return self.trial.intermediate_values[max(self.trial.intermediate_values)]

    @property
    def is_pruned(self) -> bool:
        """Whether it ended early."""
        return self.trial.state == TrialState.PRUNED

    @property
    def colour(self) -> str:
        """Of its kind."""
        return COLOURS[self.kind]

    @property
    def is_special(self) -> bool:
        """Whether it is emphasised."""
        return self.kind in ("textbook", "best")

    @property
    def marker(self) -> dict[str, Any]:
        """How a point is drawn."""
        size = 9 if self.is_special else 4 if self.is_pruned else 5
        return {"marker": "x" if self.is_pruned else "o", "markersize": size, "color": self.colour}


def shown_trials(results: Results) -> list[Shown]:
    """All complete and pruned trials, the most important last."""
    trials = results.study.get_trials(deepcopy=False, states=DONE)
    trials = [trial for trial in trials if trial.intermediate_values]
    textbook = [trial.number for trial in trials if trial.params == TEXTBOOK][:1]
    shown = []
    for trial in trials:
        kind = "complete" if trial.state == TrialState.COMPLETE else "pruned"
        if trial.number in textbook:
            kind = "textbook"
        if trial.number == results.best.number:
            kind = "best"
        shown.append(Shown(kind, trial))
    return sorted(shown, key=lambda one: (list(COLOURS).index(one.kind), one.trial.number))


def draw_figures(run: common.Run, results: Results) -> None:
    """Draw all figures, if any trial is complete."""
    if not results.complete_trials:
        return
    counts = results.counts
    shown = shown_trials(results)
    where = f"{results.source}; {counts['complete']} complete, {counts['pruned']} pruned trials"
    if results.final and results.final.effects:
        draw_ablation(run, results, results.final)
    draw_history(run, results, shown, where)
    draw_epochs(run, shown, where)
    draw_coverage(run, results, where)
    draw_slices(run, results, shown, where)


def add_legend(figure: Figure, shown: Sequence[Shown], marker: str, *more: Any) -> None:
    """A legend below all axes, in the order of the importance of what is shown."""
    from matplotlib.lines import Line2D

    kinds = {one.kind: one.trial.number for one in shown}
    handles = []
    for kind, number in kinds.items():
        label = f"{kind} (trial {number})" if kind in ("textbook", "best") else kind
        if kind == "pruned":
            style: dict[str, Any] = {"marker": "x", "linestyle": "-" if not marker else ""}
        else:
            style = {"marker": marker, "linestyle": "-" if not marker else ""}
        handles.append(Line2D([], [], color=COLOURS[kind], label=label, **style))
    handles += more
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)))


def change_in_words(effect: Effect) -> str:
    """What was changed, such as "schedule linear instead of constant"."""
    values = (effect.best, effect.textbook)
    best, textbook = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in values)
    note = " (at the same multiple of its usual rate)" if effect.setting == "optimizer" else ""
    return f"{name_in_words(effect.setting)} {best} instead of {textbook}{note}"


def name_in_words(setting: str) -> str:
    """The name of a setting in prose."""
    return NAMES.get(setting, setting.replace("_", " "))


def draw_ablation(run: common.Run, results: Results, final: FinalTest) -> None:
    """ablation.png: a forest plot of what every setting of the best configuration is worth."""
    effects = final.effects
    n = effects[0].estimate.n
    question = "What does the best configuration lose when one setting is set back?"
    title = f"{question}\n{results.source}; n = {n} fresh seeds, 95 % intervals"
    with run.figure("ablation.png", title, size=(10, 2.2 + 0.6 * len(effects))) as (_, axes):
        axis = axes[0, 0]
        for place, effect in enumerate(effects):
            estimate = effect.estimate
            colour = COLOURS["best"] if effect.is_shown else COLOURS["pruned"]
            if estimate.is_bounded:
                axis.plot([100 * estimate.low, 100 * estimate.high], [place, place], color=colour, linewidth=2.5)
            axis.plot(100 * estimate.mean, place, "s", color=colour, markersize=8)
            text = f"{100 * estimate.mean:+.1f}"
            axis.annotate(text, (100 * estimate.mean, place), (0, 9), textcoords="offset points", ha="center")
        axis.axvline(0, color="black", linewidth=1)
        axis.set_yticks(range(len(effects)), [change_in_words(effect).replace(" (", "\n(") for effect in effects])
        axis.set_ylim(len(effects) - 0.5, -0.7)
        axis.grid(visible=False, axis="y")
        axis.set(xlabel="points of test accuracy lost")


def draw_epochs(run: common.Run, shown: Sequence[Shown], where: str) -> None:
    """intermediate_values.png: the validation accuracy of every trial, epoch by epoch; crosses: pruned there."""
    title = f"Every trial's validation accuracy, epoch by epoch; a cross: pruned there\n{where}"
    with run.figure("intermediate_values.png", title, size=(9, 5.5)) as (figure, axes):
        axis = axes[0, 0]
        for one in shown:
            epochs, accuracies = zip(*sorted(one.trial.intermediate_values.items()), strict=True)
            width = {"pruned": 0.8, "complete": 0.8}.get(one.kind, 3)
            axis.plot(epochs, accuracies, color=one.colour, linewidth=width, alpha=1 if one.is_special else 0.5)
            if one.is_pruned:
                axis.plot(epochs[-1], accuracies[-1], "x", color=one.colour, markersize=6, markeredgewidth=1.5)
        axis.set(xlabel="epoch", ylabel="validation accuracy")
        axis.locator_params("x", integer=True)
        add_legend(figure, shown, "")


def draw_history(run: common.Run, results: Results, shown: Sequence[Shown], where: str) -> None:
    """optimization_history.png: the value of every trial, the best so far, and what fresh seeds say about it."""
    highest = results.complete_trials[0]
    title = f"The highest value so far (line): {highest.value:.4f}, of trial {highest.number}\n{where}"
    with run.figure("optimization_history.png", title, columns=2, size=(14, 6)) as (figure, axes):
        for axis in axes[0]:
            draw_values(axis, results, shown)
            fresh = draw_fresh_seeds(axis, results, last=max(one.trial.number for one in shown))
            axis.set(xlabel="trial")
            axis.locator_params("x", integer=True)
        everything, top = axes[0]
        everything.set(ylabel="validation accuracy", title="all trials")
        top.set(ylim=(highest.value - 0.04, highest.value + 0.01), title="the upper end")
        add_legend(figure, shown, "o", *fresh)


def draw_values(axis: Axes, results: Results, shown: Sequence[Shown]) -> None:
    """The value of every trial, the highest so far, and where the start ends."""
    complete = sorted((trial.number, trial.value) for trial in results.complete_trials)
    last = max(one.trial.number for one in shown)
    numbers = [number for number, _ in complete] + [last]
    so_far = np.maximum.accumulate([value for _, value in complete]).tolist()
    axis.plot(numbers, [*so_far, so_far[-1]], color=COLOURS["complete"], drawstyle="steps-post", linewidth=1.5)
    for one in shown:
        axis.plot(one.trial.number, one.value, linestyle="", **one.marker)
    start = results.study.user_attrs["start"]
    if 1 < start <= last and results.plan.options.sampler != "RandomSampler":
        axis.axvline(start - 0.5, color="black", linewidth=1, linestyle=":")


def draw_fresh_seeds(axis: Axes, results: Results, last: int) -> list[Any]:
    """What fresh seeds say about the best and the lab's configuration, right of the last trial; handles of a legend."""
    handles: list[Any] = []
    if results.final is None:
        return handles
    names = [name for name in ("best", "lab") if name in results.final.validation]
    for place, name in enumerate(names, 1):
        estimate = common.interval(results.final.validation[name])
        error = [[estimate.mean - estimate.low], [estimate.high - estimate.mean]] if estimate.is_bounded else None
        style: dict[str, Any] = {"color": COLOURS[name], "marker": "D", "markersize": 7, "linestyle": "", "capsize": 4}
        label = f"{name} on fresh seeds, 95 %, n = {estimate.n}"
        handles.append(axis.errorbar(last + place * max(2, last / 25), estimate.mean, error, label=label, **style))
        if name == "lab":
            axis.axhline(estimate.mean, color=COLOURS[name], linewidth=1.2)
    return handles


def draw_coverage(run: common.Run, results: Results, where: str) -> None:
    """coverage.png: how many trials every optimizer had with every schedule, and the best value of these."""
    trials = trial_table(results.study).query("state in ('complete', 'pruned')")
    complete = trials.query("state == 'complete'")
    rows, columns = (results.plan.choices(name) for name in ("optimizer", "schedule"))
    keys = ["param_optimizer", "param_schedule"]

    def count(some: pd.DataFrame) -> pd.DataFrame:
        return some.groupby(keys).size().unstack(fill_value=0).reindex(index=rows, columns=columns, fill_value=0)

    counts = count(trials)
    pruned = counts - count(complete)
    values = complete.groupby(keys)["value"].max().unstack().reindex(index=rows, columns=columns)
    optimizer, schedule = counts.stack().idxmax()
    most = f"{counts.to_numpy().max()} of {len(trials)} trials went to {optimizer} with the schedule {schedule}"
    title = f"Trials by optimizer and schedule: {most}\n{where}"
    with run.figure("coverage.png", title, size=(9, 5)) as (_, axes):
        axis = axes[0, 0]
        axis.imshow(counts, cmap="Blues", vmin=0, vmax=1.6 * counts.to_numpy().max(), aspect="auto")
        for row, name in enumerate(rows):
            for column, other in enumerate(columns):
                text = "not tried"
                if counts.loc[name, other]:
                    text = f"{counts.loc[name, other]} trials, {pruned.loc[name, other]} pruned"
                    text += f"\nhighest {values.loc[name, other]:.3f}" if values.loc[name, other] > 0 else ""
                axis.text(column, row, text, ha="center", va="center")
        axis.set_xticks(range(len(columns)), columns)
        axis.set_yticks(range(len(rows)), rows)
        axis.grid(visible=False)
        axis.set(xlabel="schedule", ylabel="optimizer")


def draw_slices(run: common.Run, results: Results, shown: Sequence[Shown], where: str) -> None:
    """slice.png: the validation accuracy of all trials against each parameter."""
    names = ["optimizer", "schedule", *(name for name in TEXTBOOK if name not in ("optimizer", "schedule"))]
    title = f"Where the sampler went, and what it found there\n{where}"
    with run.figure("slice.png", title, rows=2, columns=4, size=(14, 8)) as (figure, axes):
        for axis, name in zip(axes.flat, names, strict=True):
            draw_slice(axis, name, shown)
            axis.sharey(axes[0, 0])
            axis.tick_params(labelleft=axis in axes[:, 0])
        for axis in axes[:, 0]:
            axis.set(ylabel="validation accuracy")
        add_legend(figure, shown, "o")


def draw_slice(axis: Axes, name: str, shown: Sequence[Shown]) -> None:
    """A panel of slice.png: the whole range of a parameter, ends included."""
    trials = [one for one in shown if name in one.trial.params]
    axis.set(xlabel=name_in_words(name))
    if not trials:
        return
    distribution = trials[0].trial.distributions[name]
    for one in trials:
        value = one.trial.params[name]
        place = distribution.to_internal_repr(value)
        axis.plot(place, one.value, linestyle="", **one.marker)
    if isinstance(distribution, CategoricalDistribution):
        axis.set_xticks(range(len(distribution.choices)), map(str, distribution.choices), rotation=30, ha="right")
        axis.set_xlim(-0.5, len(distribution.choices) - 0.5)
        return
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high = distribution.low, distribution.high
    margin = 0.07 * (high - low) or 1
    if distribution.log:
        axis.set(xscale="log", xlim=(low / 1.4, high * 1.4))
        axis.xaxis.set(major_formatter="{x:g}")
    else:
        axis.set(xlim=(low - margin, high + margin))
        axis.locator_params("x", nbins=4)


# ================================================================ 10. report

LIMITS = """\
Intervals (95 %, each for itself) are for the one configuration that this study found; those of test accuracies cover
seeds and test images, those of validation accuracies seeds. An effect is called one if its p-value, corrected for the
number of settings (Holm), is below 0.05; no effect shown does not mean that there is none. A study is one draw: another
--seed may find another configuration, and how far such draws differ is measured over eight studies in
docs/results/searches. The ablation is about this network (the head of the lab's own was made for Muon); learning rates
are not tuned again; effects do not add up. One data set, short trainings."""


def conclude(results: Results) -> list[str]:
    """The conclusions in plain words."""
    lines = changes_in_words(results.machinery)
    if results.is_interrupted:
        lines.insert(0, "The run was interrupted: this report is incomplete.")
    if not results.complete_trials:
        return [*lines, "No trial was completed."]
    lines.append(study_in_words(results))
    if results.confirmation:
        lines.append(confirmation_in_words(results.confirmation))
    if results.audit:
        lines.append(audit_in_words(results.audit))
    if results.final:
        lines += [gain_in_words(name, gain) for name, gain in results.final.gains.items()]
        lines += [*effects_in_words(results.final.effects), ends_in_words(results)]
        lines.append(time_in_words(results.final))
        lines.append(optimism_in_words(results))
        lines.append(full_in_words(results.plan, results.final.full))
    return lines


def changes_in_words(machinery: Sequence[Mapping[str, Any]]) -> list[str]:
    """What changed during the study."""
    lines = []
    for name in ("sampler", "pruner", "precision", "commit"):
        used = list(dict.fromkeys(str(entry[name]) for entry in machinery))
        if len(used) > 1:
            lines.append(f"The {name} changed during the study: {', then '.join(used)}.")
    return lines


def study_in_words(results: Results) -> str:
    """How many trials there were, and which had the highest value."""
    counts = results.counts
    states = ", ".join(f"{counts[state]} {state}" for state in ("pruned", "complete", "failed"))
    highest = results.complete_trials[0]
    return (
        f"Of {counts['finished']} trials ({states}), trial {highest.number} had the highest validation accuracy, "
        f"{highest.value:.4f}."
    )


def confirmation_in_words(confirmation: Confirmation) -> str:
    """Which candidate is the best, and how the candidates changed since the study."""
    winner = confirmation.winner
    candidates = confirmation.candidates
    changes = [confirmed.mean - confirmed.candidate.value for confirmed in candidates]
    first = candidates[0]
    lines = [
        f"Trained again on {len(winner.accuracies)} fresh seeds, trial {winner.candidate.number} has the highest mean "
        f"of the {len(candidates)} most accurate trials, {winner.mean:.4f} ({winner.candidate.value:.4f} in the "
        f"study), and is called the best configuration from here on."
    ]
    if len(candidates) > 1:
        second = sorted(candidates, key=lambda confirmed: confirmed.mean)[-2]
        lead = common.interval(winner.accuracies - second.accuracies)
        lines.append(f"Its lead over trial {second.candidate.number}, the second, is {points(lead)}.")
    lines.append(
        f"Trial {first.candidate.number}, with the highest value in the study, changed by "
        f"{100 * (first.mean - first.candidate.value):+.2f} points, all {len(candidates)} by "
        f"{100 * np.mean(changes):+.2f} on average: having been chosen for high values, they are expected to lose "
        f"(winner's curse)."
    )
    return " ".join(lines)


def audit_in_words(audit: Audit) -> str:
    """How many pruned trials were good ones."""
    if not audit.finished:
        return "Audit: no pruned trials."
    good = (
        f"{audit.would_have_been_confirmed} would have been among the candidates, {audit.would_have_won} with the "
        f"highest value; the best of them reaches {audit.highest:.4f}"
    )
    if audit.finished == audit.pruned:
        return f"Audit: of all {audit.pruned} pruned trials, trained to the end, {good}."
    return (
        f"Audit: of {audit.finished} of {audit.pruned} pruned trials, trained to the end, {good}; at most "
        f"{audit.share_ci_high:.0%} of the pruned ones would have been candidates (95 %, Clopper-Pearson)."
    )


def gain_in_words(other: str, gain: Estimate) -> str:
    """How the best configuration compares with another; no difference is claimed if the interval includes 0."""
    verdict = "not shown to differ"
    if gain.low > 0:
        verdict = "better"
    elif gain.high < 0:
        verdict = "worse"
    whose = "lab's settings, trained as a trial is" if other == "lab" else f"{other}'s"
    change = f"{points(gain)} of test accuracy, n = {gain.n} seeds, paired"
    return f"The best configuration compared with the {whose}: {change}, {verdict}."


def points(accuracy: Estimate) -> str:
    """A difference of accuracies in points."""
    return accuracy.times(100).text("points", "+.2f")


def effects_in_words(effects: Sequence[Effect]) -> list[str]:
    """What each setting is worth, which had better been left alone, and which show no effect."""
    if not effects:
        return ["The best configuration is the textbook's: there is nothing to set back."]
    lines = []
    n = effects[0].estimate.n
    good = [effect for effect in effects if effect.is_shown and effect.estimate.mean > 0]
    bad = [effect for effect in effects if effect.is_shown and effect.estimate.mean < 0]
    unclear = [effect for effect in effects if not effect.is_shown]
    if good:
        lines.append(
            f"What the best configuration loses in test accuracy, if one setting alone is set back to the textbook's "
            f"and nothing is tuned again (n = {n} seeds, paired): {effects_listed(good)}. Losses overlap: they do not "
            f"add up to the gain over the textbook."
        )
    lines += [
        f"The study was wrong about {change_in_words(effect)}: with the textbook's value the best configuration is "
        f"better, by {points(effect.estimate.times(-1))}, n = {n} seeds, paired."
        for effect in bad
    ]
    if unclear:
        lines.append(f"No effect shown, corrected for {len(effects)} settings: {effects_listed(unclear)}.")
    return lines


def effects_listed(effects: Sequence[Effect]) -> str:
    """Changes and their effects."""
    return "; ".join(f"{change_in_words(effect)}: {points(effect.estimate)}" for effect in effects)


def ends_in_words(results: Results) -> str:
    """Which settings of the best configuration lie at an end of their range, where better ones may lie beyond."""
    ends = []
    for name, value in results.best.params.items():
        distribution = results.plan.space[name]
        if isinstance(distribution, FloatDistribution | IntDistribution) and not distribution.single():
            margin = 0.01 * (distribution.high - distribution.low)
            if value >= distribution.high - margin:
                ends.append(f"{name_in_words(name)} {value:.3g}, the highest")
            elif value <= distribution.low + margin:
                ends.append(f"{name_in_words(name)} {value:.3g}, the lowest")
    return (
        f"At an end of its range: {'; '.join(ends)}." if ends else "No setting of the best lies at an end of its range."
    )


def ranges_in_words(plan: Plan) -> str:
    """What was searched."""
    ranges = []
    for name, distribution in plan.space.items():
        if distribution.single():
            continue
        if isinstance(distribution, CategoricalDistribution):
            ranges.append(f"{name_in_words(name)} {', '.join(map(str, distribution.choices))}")
        elif isinstance(distribution, FloatDistribution | IntDistribution):
            scale = " (logarithmic)" if distribution.log else ""
            ranges.append(f"{name_in_words(name)} {distribution.low:g} to {distribution.high:g}{scale}")
    usual = ", ".join(f"{name} {USUAL_LR[name]:g}" for name in plan.choices("optimizer"))
    return f"Searched: {'; '.join(ranges)} (not with Muon: weight decay). Usual learning rates: {usual}."


def time_in_words(final: FinalTest) -> str:
    """What the best configuration costs."""
    ratio = final.seconds["best"] / final.seconds["textbook"]
    return f"Training the best configuration takes {ratio:.2f} times as long as the textbook's."


def optimism_in_words(results: Results) -> str:
    """How much better the best trial looked in the study than it is, first by its seed, then by its images."""
    optimism = results.optimism
    assert optimism is not None
    assert results.final is not None
    change = common.interval(results.final.validation["best"] - results.best.value)
    doubt = (
        "" if change.low > 0 or change.high < 0 else ", so its seed in the study is not shown to have been a lucky one"
    )
    noise = optimism["image_noise"]
    size = "more" if abs(100 * optimism["validation_minus_test"]) > noise else "no more"
    return (
        f"Optimism: the best configuration had {optimism['study_value']:.4f} in the study and has "
        f"{optimism['fresh_seeds_validation']:.4f} on the same images with fresh seeds ({points(change)}, an interval "
        f"over these seeds{doubt}). On test images it has {optimism['fresh_seeds_test']:.4f}, "
        f"{-100 * optimism['validation_minus_test']:+.2f} points; that is {size} than chance alone gives two such sets "
        f"of images ({noise:.1f} points, 95 %)."
    )


def full_in_words(plan: Plan, full: FullTraining) -> str:
    """The accuracy of best_model.pth."""
    network = "preset's larger network" if plan.lab else "network"
    how = f"trained once on {full.images:,} images for {full.epochs} epochs"
    accuracy = f"{100 * full.test_accuracy:.2f} % of the test images"
    return (
        f"best_model.pth is the {network} with the best settings, {how}: {accuracy}. That cannot be "
        f"compared with the accuracies above, and other settings were not tried on it."
    )


def statistics_in_words(results: Results) -> str:
    """The trials and the one with the highest value, in the form of Optuna's examples."""
    lines = ["Study statistics:"]
    for name, count in results.counts.items():
        if count or name != "failed":
            lines.append(f"    Number of {name} trials:  {count}")
    best = results.best if results.complete_trials else None
    lines += ["Best trial:", f"    Value:  {best.value if best else 'none'}", "    Params:"]
    if best:
        lines += [f"        {name}: {value}" for name, value in best.settings.items()]
        highest = results.complete_trials[0]
        if best.number != highest.number:
            lines.append(f"    (chosen by the confirmation; the highest value is that of trial {highest.number})")
    return "\n".join(lines)


def confirmation_table(confirmation: Confirmation) -> pd.DataFrame:
    """A row per candidate, in per cent."""
    rows = [
        {
            "trial": confirmed.candidate.number,
            "in the study": f"{confirmed.candidate.value:.2%}",
            "on fresh seeds": spread_text(confirmed.accuracies),
            "optimizer": confirmed.candidate.settings["optimizer"],
            "schedule": confirmed.candidate.settings["schedule"],
            "lr": f"{confirmed.candidate.settings['lr']:.3g}",
        }
        for confirmed in confirmation.candidates
    ]
    return pd.DataFrame(rows).set_index("trial")


def spread_text(accuracies: np.ndarray) -> str:
    """Mean ± standard deviation."""
    spread = f" ± {accuracies.std(ddof=1):.2%}" if len(accuracies) > 1 else ""
    return f"{accuracies.mean():.2%}{spread}"


def configuration_table(final: FinalTest) -> pd.DataFrame:
    """A column per configuration, with its test accuracy."""
    table = pd.DataFrame(final.settings).map(lambda value: f"{value:.3g}" if isinstance(value, float) else value)
    table.loc["test accuracy"] = {name: spread_text(final.test[name]) for name in final.settings}
    table.loc["training, s"] = {name: f"{final.seconds[name]:.1f}" for name in final.settings}
    return table


def ablation_table(effects: Sequence[Effect]) -> pd.DataFrame:
    """A row per setting."""
    rows = [
        {
            "best, instead of textbook": change_in_words(effect),
            "accuracy lost": points(effect.estimate),
            "p (Holm)": f"{effect.p_holm:.2g}" if effect.p_holm >= 1e-4 else "< 0.0001",
            "n": effect.estimate.n,
        }
        for effect in effects
    ]
    return pd.DataFrame(rows).set_index("best, instead of textbook")


def tables_of(results: Results) -> dict[str, pd.DataFrame]:
    """The tables of console and report, by their headings."""
    tables = {}
    if results.confirmation:
        seeds = results.plan.confirmation_seed_count
        heading = f"Confirmation on {seeds} fresh seeds, validation accuracy, mean ± sd"
        tables[heading] = confirmation_table(results.confirmation)
    if results.final:
        seeds = results.plan.options.retrain_seeds
        heading = f"Comparison on {seeds} other fresh seed(s), test accuracy, mean ± sd"
        tables[heading] = configuration_table(results.final)
        if results.final.effects:
            heading = "Ablation: one setting at a time set back to the textbook's, the same seeds"
            tables[heading] = ablation_table(results.final.effects)
    return tables


def print_results(results: Results) -> None:
    """Print statistics, tables and conclusions."""
    print(statistics_in_words(results))
    for heading, table in tables_of(results).items():
        print(f"\n{heading}\n{table.to_string()}")
    print()
    for line in conclude(results):
        print(textwrap.fill(line, 98, subsequent_indent="  "))


def write_report(run: common.Run, results: Results) -> list[str]:
    """The paragraphs of report.md."""
    options = results.plan.options
    training = results.plan.template.recipe.training
    images = len(results.plan.template.split.train)
    size = f"{images:,} images, {training.epochs} epochs and batches of {training.batch_size} per trial"
    study = f"{options.sampler}, {options.pruner}, seed {options.seed}"
    paragraphs = [
        f"# Task 3: an Optuna study on {results.source}",
        "Which hyper-parameters, what do they gain, and which of them matter?",
        f"{study}; {size}. Trial 0 is the textbook configuration.",
        ranges_in_words(results.plan),
        "## Conclusion",
        "\n".join(f"- {line}" for line in conclude(results)),
        LIMITS,
        "## The study",
        f"```\n{statistics_in_words(results)}\n```",
    ]
    for heading, table in tables_of(results).items():
        paragraphs += [f"## {heading}", table.to_markdown()]
    paragraphs.append("## Figures")
    for name, caption in CAPTIONS.items():
        if (run.folder / f"{name}.png").exists():
            paragraphs.append(f"![{name}]({name}.png)\n\n*{caption}*")
    return [*paragraphs, "## Protocol of the default command", PROTOCOL]


if __name__ == "__main__":
    sys.exit(main())
