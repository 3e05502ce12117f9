"""Task 3: which hyper-parameters? What tuning gains over a textbook configuration, and how close it gets to an expert.

Found (JPEG copy of CIFAR-10, Xeon with AMX, n = 5 seeds): 100 trials, the best 0.687 on validation; tuning gains
12.4 points of test accuracy [10.7, 14.0] over the textbook and stays 2.9 points below the lab's own recipe.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import common  # isort: skip (before torch: it sets how long idle threads spin)
import numpy as np
import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

from common import Recipe, UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from sqlalchemy import URL
    from torch import Tensor, nn

PROTOCOL = """\
Protocol: trial 0 is the textbook configuration: Adam at 0.001, a constant learning rate, no augmentation, no label
smoothing, no weight decay, no dropout. Every trial trains a fast network for 5 epochs, in batches of 128, on the same
8,000 images and is validated on the same images; both sets depend on --seed. TPE draws the first 25 trials at random;
MedianPruner stops poor ones early. The network is not searched: a wider one is simply better and slower. The study is
not given the lab's recipe. Afterwards the textbook, best and lab configurations are trained again as in the study, on
the same fresh seeds, and the best also with the full schedule (best_model.pth); then the test set is read, once. The
same command continues an interrupted study; with --storage, many machines work on one study."""
LIMITS = "One network, one data set, short trainings, one study: another seed may find another configuration."
CAPTIONS = {
    "intermediate_values": "One line per trial. Notice how early poor ones are pruned, which start low and end high.",
    "optimization_history": "One point per trial. Notice when the line stops rising.",
    "parallel_coordinate": "One line per complete trial. Where the dark lines converge, the value matters.",
    "param_importances": "What distinguishes the best tenth of trials (PED-ANOVA). lr_scale: learning rate / usual.",
    "slice": "One point per complete trial. If the best lie at the end of a range, the range is too narrow.",
}

# ================================================================ 1. options

# Short names of Optuna's classes.
SAMPLERS = {"tpe": "TPESampler", "random": "RandomSampler"}
PRUNERS = {"median": "MedianPruner", "hyperband": "HyperbandPruner", "none": "NopPruner"}
OPTUNA_SETTINGS: dict[str, dict[str, Any]] = {
    # With warm-up schedules the accuracy after one epoch says little: every trial gets two.
    "MedianPruner": {"n_warmup_steps": 2},
    "PercentilePruner": {"percentile": 50.0},
    # With Optuna's ten, one study settled on a poor schedule.
    "TPESampler": {"n_startup_trials": 25},
}
STUDY = "small-cnn"  # its name in the storage
MIN_TRIALS_FOR_IMPORTANCES = 10  # complete ones
TRIAL_IMAGES = 8_000
QUICK_IMAGES = 600
# Stages with seeds of their own.
TRIALS = 0
RETRAINING = 1
FULL = 2
AUDIT = 3


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
    add("--trials", type=common.whole_number(), default=100, help="complete or pruned, to reach (default: %(default)s)")
    add("--timeout", type=seconds, default=600.0, help="s for starting trials (default: %(default)s)")
    add("--sampler", type=sampler, default="tpe", help="tpe, random or Optuna's class (default: %(default)s)")
    add("--pruner", type=pruner, default="median", help="median, hyperband, none or a class (default: %(default)s)")
    add("--storage", metavar="URL", help="a database, as postgresql://user@host/name (default: OUTPUT_DIR/study.log)")
    add("--study-name", type=study_name, default=STUDY, metavar="NAME", help="in the storage (default: %(default)s)")
    add("--fresh", action="store_true", help="move OUTPUT_DIR/study.log aside and start over")
    add("--retrain-seeds", type=natural, default=5, metavar="N", help="0: no comparison (default: %(default)s)")
    add("--audit", type=natural, default=0, metavar="N", help="finish N pruned trials (below 20 tell little)")
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
    """Run the study, retrain its best configuration, report; returns the exit status."""
    options = parse_args(argv)
    dataset = common.load_data(options)
    plan = make_plan(options, dataset)
    # PGTZ would take precedence over the time zone that open_database asks for.
    with common.open_run(options, dataset) as run, without_variable("PGTZ"):
        run.progress.expect(work_of_search(plan) + work_of_audit(plan) + work_of_retraining(plan, run.data))
        found = search(run, plan, open_study(run, plan))
        study = found.study
        stopped = found.stopped
        results = describe_trials(run, plan, study)
        best = results.best
        try:
            if best and stopped is None:
                results = replace(results, audit=run_audit(run, plan, study))
                results = replace(results, retraining=retrain(run, plan, best, dataset))
        except (KeyboardInterrupt, Exception) as error:  # what was measured before is reported first
            stopped = error
        if stopped:
            results = replace(results, is_interrupted=True)
        print_results(results)
        options = options_without_secrets(options)
        run.finish(results.summary(), write_report(run, results), options, command_without_secrets(argv))
    if stopped:
        raise stopped
    if best is None:
        raise UserError("no trial was completed: see the reasons in trials.csv, or try a longer --timeout")
    return 0


# ================================================================ 2. configurations

Settings = dict[str, Any]  # a configuration: fields of a Recipe and their values
# Tutorials' learning rates. The search extends further up, because SmallCNN divides logits, hence gradients, by nine.
USUAL_LR = {"Adam": 1e-3, "Muon": 0.02, "RMSprop": 1e-3, "SGD+nesterov": 0.1}
TEXTBOOK: dict[str, Any] = {  # parameters, as a study draws them
    "optimizer": "Adam",
    "lr_scale": 1.0,
    "schedule": "constant",
    "weight_decay": 0.0,
    "dropout": 0.0,
    "label_smoothing": 0.0,
    "crop_padding": 0,
}
# A trial takes 1 TFLOP, an estimated 20 s on one AVX2 core. It trains on all images alike, unlike the presets.
TRIAL = common.PRESETS["small"].replace(growth=(1, 2, 2), batch_size=128, epochs=5, hardest=1)


def suggest(trial: optuna.Trial | optuna.trial.FixedTrial, recipe: Recipe) -> Settings:
    """Draw a configuration.

    The learning rate is drawn relative to the optimizer's usual one: each optimizer has its own range, yet there is one
    parameter, so that sampler and importances learn from all trials. Muon and dropout are for the lab's own network.
    """
    is_own = recipe.network.model == "SmallCNN"
    optimizers = sorted(USUAL_LR) if is_own else sorted(set(USUAL_LR) - {"Muon"})
    trial.suggest_categorical("optimizer", optimizers)
    trial.suggest_float("lr_scale", 0.1, 30.0, log=True)
    trial.suggest_categorical("schedule", sorted(common.SCHEDULES))
    trial.suggest_float("weight_decay", 0.0, 2e-3)
    trial.suggest_float("dropout", 0.0, 0.5 if is_own else 0.0)
    trial.suggest_float("label_smoothing", 0.0, 0.3)
    trial.suggest_int("crop_padding", 0, 4)
    return settings_of(trial.params)


def settings_of(params: Mapping[str, Any]) -> Settings:
    """A trial's parameters as a configuration, with the absolute learning rate; Muon has its own weight decay."""
    settings = {name: value for name, value in params.items() if name != "lr_scale"}
    settings["lr"] = USUAL_LR[params["optimizer"]] * params["lr_scale"]
    if params["optimizer"] == "Muon":
        settings["weight_decay"] = 0.0
    return settings


def configure(recipe: Recipe, settings: Settings) -> Recipe:
    """``recipe`` with a configuration; the head is the one that the optimizer's learning rates are meant for."""
    head = "unit" if settings["optimizer"] == "Muon" else "biased"
    return recipe.replace(**settings, head=head)


def fields_of(recipe: Recipe) -> dict[str, Any]:
    """The fields of network and training by name."""
    return asdict(recipe.network) | asdict(recipe.training)


@dataclass(frozen=True)
class Plan:
    """A study: its options, and the training of a trial, whose recipe the search space varies."""

    options: argparse.Namespace
    trial: common.Job

    def job(self, settings: Settings, *stage: int) -> common.Job:
        """The training of a configuration, as in the study."""
        seed = common.derive_seed(self.options.seed, *stage)
        return replace(self.trial, recipe=configure(self.trial.recipe, settings), seed=seed)

    @property
    def preset(self) -> Recipe:
        """The lab's recipe, on all images alike."""
        return common.PRESETS[self.options.preset].replace(hardest=TRIAL.training.hardest)


def make_plan(options: argparse.Namespace, data: common.Dataset) -> Plan:
    """The plan for the options (--seed also picks the images); UserError for a network that cannot be trained."""
    recipe = configure(common.recipe_from(options, TRIAL), settings_of(TEXTBOOK))
    seed = common.derive_seed(options.seed, TRIALS)
    split = common.split_dataset(data, options.images or TRIAL_IMAGES, seed=seed)
    common.check_recipe(recipe, data, split)
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
AWAY = "the database was away"  # the reason why a trial failed
DRIVERS = {"MySQLdb": "mysqlclient", "psycopg": '"psycopg[binary]"', "psycopg2": "psycopg2-binary"}
DONE = (TrialState.COMPLETE, TrialState.PRUNED)
Parameters = ParamSpec("Parameters")
Answer = TypeVar("Answer")


def chain_of(error: BaseException) -> list[BaseException]:
    """An error and what led to it, back to the first, such as a database's own message."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    return chain


def is_outage(error: BaseException) -> bool:
    """Whether a database is locked, restarts or cannot be reached.

    Optuna may wrap its own errors around that: telling the result of a trial to a database that is away ends in an
    UnboundLocalError (Optuna 5.0).
    """
    from sqlalchemy.exc import InterfaceError, OperationalError

    return any(isinstance(link, OperationalError | InterfaceError) for link in chain_of(error))


def is_lost_trial(error: BaseException) -> bool:
    """Whether a trial could not be told, because it was told before: this machine slept and was taken for dead."""
    return any(
        isinstance(link, UpdateFinishedTrialError) or (isinstance(link, ValueError) and "Cannot tell" in str(link))
        for link in chain_of(error)
    )


class Patience:
    """Waits while a database is away, for at most PATIENCE_SECONDS in a row, or until ``halted`` is set."""

    def __init__(self) -> None:
        self.away_since: float | None = None
        self.halted = threading.Event()

    def call(
        self, function: Callable[Parameters, Answer], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Answer:
        """Call a function that may be repeated, until the database answers."""
        while True:
            try:
                answer = function(*args, **kwargs)
            except Exception as error:
                self.wait(error)
            else:
                self.away_since = None
                return answer

    def wait(self, error: Exception) -> None:
        """Wait before the next attempt; raises ``error`` if it is no outage, or one that has lasted too long."""
        now = time.monotonic()
        since = now if self.away_since is None else self.away_since
        self.away_since = since
        is_hopeless = not is_outage(error) or now > since + PATIENCE_SECONDS
        if is_hopeless or self.halted.wait(RETRY_SECONDS):
            raise error


class Database(optuna.storages.RDBStorage):
    """A database in which a heartbeat that cannot be written is left out, instead of ending Optuna's heartbeat thread.

    The next one may succeed; if none does, other machines take over the trial.
    """

    def record_heartbeat(self, trial_id: int) -> None:
        """Say that a trial is running."""
        try:
            super().record_heartbeat(trial_id)
        except Exception as error:
            if not is_outage(error):
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


def connect(url: URL, arguments: Mapping[str, Any]) -> Database:
    """Connect to a database with arguments of its driver; creates Optuna's tables if there are none."""
    return Database(
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
    text = common.first_line(chain_of(error)[-1])
    password = parse_url(storage).password if storage else None
    return text.replace(str(password), "***") if password else text


def open_journal(path: Path) -> BaseStorage:
    """Open a journal in a folder locked by this run; truncates a half-written line; UserError for a foreign file."""
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    backend = JournalFileBackend(str(path), JournalFileOpenLock(str(path)))
    for left in path.parent.glob(f"{path.name}.lock*"):  # of a killed run: nobody else writes here
        left.unlink()
    advice = "--fresh moves it aside and starts over"
    with common.user_error(f"{path} is not an Optuna journal ({advice})", Exception):  # a file may provoke anything
        whole = len(list(backend.read_logs(0)))  # Optuna skips a half-written line, but would append to it
        if whole < len(lines):
            if lines[0][:10] != b'{"op_code"'[: len(lines[0])]:
                raise ValueError("its first line is not Optuna's")
            common.note(f"{path} ended in a half-written line, now removed: {lines[-1][:99]!r}")
            os.truncate(path, sum(map(len, lines[:whole])))
        return optuna.storages.JournalStorage(backend)


# ================================================================ 4. the study


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
    pruner = getattr(optuna.pruners, options.pruner)(**OPTUNA_SETTINGS.get(options.pruner, {}))
    study = optuna.create_study(
        storage=storage, study_name=options.study_name, direction="maximize", pruner=pruner, load_if_exists=True
    )
    settle_definition(study, define_study(run, plan), options.storage)
    add_machinery(study, run, options)
    study.enqueue_trial(TEXTBOOK, skip_if_exists=True)
    if not options.storage:  # this run has locked the folder: any trial running there is dead
        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            try_again(study, trial.number)
            study.tell(trial.number, state=TrialState.FAIL)
    study.sampler = make_sampler(options, len(study.trials))
    return study


def define_study(run: common.Run, plan: Plan) -> dict[str, Any]:
    """What must not change within a study, as JSON keeps it."""
    space = optuna.trial.FixedTrial(TEXTBOOK)
    suggest(space, plan.trial.recipe)
    ranges = {
        f"range of {name}": optuna.distributions.distribution_to_json(distribution)
        for name, distribution in space.distributions.items()
    }
    definition = {
        "dataset": f"checksum {run.data.fingerprint}",
        "images": len(plan.trial.split.train),
        "seed": plan.options.seed,
        **fields_of(plan.trial.recipe),
        **ranges,
    }
    return json.loads(json.dumps(definition))


def settle_definition(study: optuna.Study, definition: Mapping[str, Any], storage: str | None) -> None:
    """Store the definition of a new study; raises UserError if that of an old one differs."""
    before = study.user_attrs.get("definition", definition)
    for name in {**before, **definition}:
        if before.get(name) != definition.get(name):
            change = f"{name}: {before.get(name)}, now {definition.get(name)}"
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


def make_sampler(options: argparse.Namespace, trials: int) -> optuna.samplers.BaseSampler:
    """The sampler for a study with so many trials: each resumption and, with --storage, each machine draws anew."""
    machine = time.time_ns() % 2**32 if options.storage else 0
    seed = common.derive_seed(options.seed, TRIALS, trials, machine) % 2**32
    return getattr(optuna.samplers, options.sampler)(seed=seed, **OPTUNA_SETTINGS.get(options.sampler, {}))


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


class SearchResult(NamedTuple):
    """A copy of the study in memory, and what ended the search early, if anything."""

    study: optuna.Study
    stopped: BaseException | None


def work_of_search(plan: Plan) -> float:
    """In images to train on, if no trial were pruned."""
    return plan.options.trials * plan.trial.work


def search(run: common.Run, plan: Plan, study: optuna.Study) -> SearchResult:
    """Run trials until --trials are complete or pruned; none starts after --timeout seconds."""
    sampler = type(study.sampler).__name__
    run.progress.stage(f"{sampler}, {plan.options.trials} trials or {plan.options.timeout:.0f} s")
    runner = StudyRunner(run, plan, study)
    stopped = runner.run_to_the_end()
    copy = optuna.create_study(direction="maximize")
    copy.add_trials(runner.trials)
    copy.set_user_attr("machinery", runner.machinery)
    return SearchResult(copy, stopped)


class StudyRunner:
    """Runs the trials that a study lacks.

    Optuna runs them in threads, each of which delegates its training to a worker process and receives the epochs one by
    one, so reports and pruning happen here. A database may be away for a while: what only repeats itself waits for it;
    a trial that fails for it is tried again; one whose result was not told becomes stale, and Optuna tries it again.
    """

    def __init__(self, run: common.Run, plan: Plan, study: optuna.Study) -> None:
        self.run = run
        self.plan = plan
        self.study = study
        self.patience = Patience()
        self.started = time.monotonic()
        self.trials: list[FrozenTrial] = []  # as they were when last read
        self.machinery: list[dict[str, Any]] = []
        self.outcomes: list[TrialState] = []  # of this run's own trials
        self.fault: common.WorkerFailed | None = None
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
        """Whether no more trials shall start (Optuna's own timeout depends on the system clock)."""
        is_late = time.monotonic() > self.started + self.plan.options.timeout
        return self.missing <= 0 or is_late or self.patience.halted.is_set() or self.all_fail

    def run_to_the_end(self) -> BaseException | None:
        """Run all trials; returns what ended the search early."""
        with ThreadPoolExecutor(1) as background:  # Optuna waits for its threads even on Ctrl-C
            working = background.submit(self.run_trials)
            try:
                while wait([working], 0.5).not_done:
                    self.show_progress()
                working.result()
            except KeyboardInterrupt as error:
                self.patience.halted.set()
                self.run.workers.stop()
                return error
            except Exception as error:  # errors in trials are caught: this is the storage or the sampler
                return UserError(f"the study ended early: {cause_of(error, self.plan.options.storage)}")
        self.run.progress.advance((1 - self.shown) * work_of_search(self.plan))
        return self.fault if self.all_fail else None

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
        while not self.is_over:
            jobs = min(self.missing, self.run.workers.count)
            try:
                self.study.optimize(
                    self.train, self.missing, n_jobs=jobs, catch=(Exception,), callbacks=[self.after_trial]
                )
            except Exception as error:
                if not is_lost_trial(error):
                    self.patience.wait(error)
            self.read()

    def read(self) -> None:
        """Read all trials, other machines' included, and what these used."""
        self.trials = self.patience.call(self.study.get_trials, deepcopy=False)
        self.machinery = self.patience.call(lambda: self.study.user_attrs["machinery"])

    def after_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Note the outcome of a trial; stop the others if the search is over."""
        self.outcomes.append(trial.state)
        self.read()
        if self.is_over:
            study.stop()

    def train(self, trial: optuna.Trial) -> float:
        """Train and judge a configuration: the objective of the study."""
        try:
            self.patience.call(trial.set_user_attr, "worker", f"{platform.node()}, process {os.getpid()}")
            # Not to be repeated: values that were stored without an answer would be drawn again.
            settings = suggest(trial, self.plan.trial.recipe)
            return self.train_epochs(trial, self.plan.job(settings, TRIALS, trial.number))
        except optuna.TrialPruned as pruned:
            self.patience.call(trial.set_user_attr, "reason", str(pruned))
            raise
        except Exception as error:
            self.explain_failure(trial, error)
            raise

    def train_epochs(self, trial: optuna.Trial, job: common.Job) -> float:
        """Train in a worker process and report every epoch; returns the last accuracy."""
        accuracy = float("nan")
        with contextlib.closing(self.run.workers.run(common.train_job, job)) as epochs:
            for epoch in epochs:
                if self.patience.halted.is_set():
                    raise common.WorkerDied("interrupted")
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
            self.fault = error
            reason = str(error).strip().splitlines()[-1]  # of the traceback
        if is_outage(error):
            reason = AWAY
        self.patience.call(trial.set_user_attr, "reason", reason[:200])
        if isinstance(error, common.WorkerDied) or is_outage(error):
            self.patience.call(try_again, self.study, trial.number)


# ================================================================ 5. what the study found


class Best(NamedTuple):
    """The best trial."""

    number: int
    value: float
    params: Settings


class Audit(NamedTuple):
    """How many pruned trials were trained to the end, how many of them beat the best, and at most what share of all."""

    finished: int
    would_have_won: int
    share_ci_high: float | None  # 95 %, one-sided, by Clopper and Pearson


class FullTraining(NamedTuple):
    """The best configuration, trained with the full schedule."""

    seed: int
    test_accuracy: float
    images: int
    epochs: int


@dataclass(frozen=True)
class Retraining:
    """The configurations, trained again on fresh seeds, on the test set."""

    settings: dict[str, Settings]  # by the name of a configuration, as all that follows
    accuracies: dict[str, dict[str, Any]]  # mean, sd, n, values
    gains: dict[str, common.Estimate]  # of the best over the others
    full: FullTraining

    def summary(self) -> dict[str, Any]:
        """Its entry in summary.json."""
        keys = {"textbook": "difference", "lab": "difference_to_lab"}
        gains = {
            keys[name]: {"mean": gain.mean, "ci_low": gain.low, "ci_high": gain.high, "n": gain.n}
            for name, gain in self.gains.items()
        }
        accuracies = {name: {"test_accuracy": facts} for name, facts in self.accuracies.items()}
        return {"settings": self.settings, "full": self.full._asdict(), **accuracies, **gains}


@dataclass(frozen=True)
class Results:
    """All that a run has found, as far as it came."""

    plan: Plan
    source: str  # of the data
    machinery: list[dict[str, Any]]  # samplers, pruners, precisions and commits that the study was made with
    counts: dict[str, int]  # of trials: finished, pruned, complete, failed
    best: Best | None
    importances: dict[str, float]  # by parameter, the most important first; empty if trials are too few
    audit: Audit | None = None
    retraining: Retraining | None = None
    is_interrupted: bool = False

    @property
    def optimism(self) -> dict[str, float] | None:
        """How much better the best trial looks than it is on fresh seeds and the test set."""
        if self.best is None or self.retraining is None:
            return None
        fresh = self.retraining.accuracies["best"]["mean"]
        return {"study_value": self.best.value, "fresh_seeds_test": fresh, "optimism": self.best.value - fresh}

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
            "best": self.best._asdict() if self.best else None,
            "importances": self.importances,
        }
        if self.audit:
            facts["audit"] = self.audit._asdict()
        if self.retraining:
            facts |= {"retrain": self.retraining.summary(), "optimism": self.optimism}
        return facts | {"interrupted": self.is_interrupted}


def trial_table(study: optuna.Study) -> pd.DataFrame:
    """trials.csv: a row per trial, with both the relative and the absolute learning rate."""
    trials = study.get_trials(deepcopy=False)
    table = study.trials_dataframe(("number", "state", "value", "params", "user_attrs"))
    table.columns = [name.removeprefix("user_attrs_").replace("params_", "param_") for name in table]
    last = ("param_lr", "epochs_run", "seconds", "worker", "reason")
    table = table.reindex(columns=["number", "state", "value", *(f"param_{name}" for name in TEXTBOOK), *last])
    table["state"] = [trial.state.name.lower() for trial in trials]
    is_drawn = [len(trial.params) == len(TEXTBOOK) for trial in trials]  # completely
    rates = [settings_of(t.params)["lr"] if drawn else None for t, drawn in zip(trials, is_drawn, strict=True)]
    table["param_lr"] = rates
    table["epochs_run"] = [len(trial.intermediate_values) for trial in trials]
    again = retried(trials)
    table["reason"] = [reason_of(trial, again.get(trial.number)) for trial in trials]
    return table


def reason_of(trial: FrozenTrial, retry: int | None) -> str:
    """Why a trial ended early, in words; ``retry`` is the number of the trial that tries it again."""
    reason = trial.user_attrs.get("reason", "")
    if retry is None:
        return reason
    cause = AWAY if reason == AWAY else "its worker died"
    return f"{cause}; tried again as trial {retry}"


def describe_trials(run: common.Run, plan: Plan, study: optuna.Study) -> Results:
    """Write trials.csv, best_params.json and the figures of the study."""
    table = trial_table(study)
    run.write_table("trials.csv", table)
    states = {"pruned": "pruned", "complete": "complete", "failed": "fail"}
    counts = {name: int((table["state"] == state).sum()) for name, state in states.items()}
    best = None
    importances = {}
    if counts["complete"]:
        trial = study.best_trial
        best = Best(trial.number, study.best_value, settings_of(trial.params))
        common.write_json(run.folder / "best_params.json", best.params)
    if counts["complete"] >= MIN_TRIALS_FOR_IMPORTANCES:
        importances = optuna.importance.get_param_importances(study)
    counts = {"finished": sum(counts.values())} | counts
    results = Results(plan, run.data.source, study.user_attrs["machinery"], counts, best, importances)
    draw_study(run, study, results)
    return results


def work_of_audit(plan: Plan) -> float:
    """In images to train on, if enough trials are pruned."""
    return plan.options.audit * plan.trial.work


def run_audit(run: common.Run, plan: Plan, study: optuna.Study) -> Audit | None:
    """Train a random sample of pruned trials to the end, each from its own seed: how many would have won?"""
    from scipy.stats import binomtest

    if not plan.options.audit:
        return None
    pruned = trial_table(study).query("state == 'pruned' and not reason.str.startswith('diverged')", engine="python")
    seed = common.derive_seed(plan.options.seed, AUDIT) % 2**32
    frame = pruned.sample(min(plan.options.audit, len(pruned)), random_state=seed).sort_index()
    run.progress.advance((plan.options.audit - len(frame)) * plan.trial.work)
    if frame.empty:
        return Audit(0, 0, None)
    run.progress.stage(f"audit: finishing {len(frame)} pruned trials")
    jobs = [plan.job(settings_of(study.trials[number].params), TRIALS, number) for number in frame["number"]]
    finished = dict(run.train(jobs))
    frame = frame[["number", "epochs_run", "value"]].rename(columns={"value": "value_when_pruned"})
    frame["value_finished"] = [finished[number].validation.accuracy for number in range(len(jobs))]
    frame["best_value"] = study.best_value
    frame["would_have_won"] = frame["value_finished"] > study.best_value
    run.write_table("audit.csv", frame)
    won = int(frame["would_have_won"].sum())
    bound = binomtest(won, len(jobs), alternative="less").proportion_ci(0.95, "exact").high
    return Audit(len(jobs), won, float(bound))


# ================================================================ 6. fresh seeds, then the test set


class Retrained(NamedTuple):
    """A configuration, trained again as in the study."""

    configuration: str
    job: common.Job
    result: common.TrainingResult


class Full(NamedTuple):
    """The best configuration, trained with the full schedule."""

    recipe: Recipe
    seed: int
    split: common.Split
    model: nn.Sequential


def has_lab(plan: Plan) -> bool:
    """Whether the lab has a recipe: not for a custom network."""
    return plan.trial.recipe.network.model == plan.preset.network.model


def configurations(plan: Plan, best: Settings) -> dict[str, Settings]:
    """The configurations to compare."""
    chosen = {"textbook": settings_of(TEXTBOOK), "best": best}
    if has_lab(plan):
        preset = fields_of(plan.preset)
        chosen["lab"] = {name: preset[name] for name in best}
    return chosen


def full_schedule(plan: Plan) -> Recipe:
    """The recipe of the full training, but for the configuration."""
    recipe = common.recipe_from(plan.options, plan.preset)
    return recipe.replace(batch_size=plan.trial.recipe.training.batch_size)


def all_images(plan: Plan, data: common.Dataset) -> common.Split:
    """The images of the full training: none are held out for validation."""
    return common.split_dataset(data, plan.options.images, validation=False)


def work_of_retraining(plan: Plan, data: common.Dataset) -> float:
    """In images to train on."""
    if not plan.options.retrain_seeds:
        return 0
    trainings = plan.options.retrain_seeds * (3 if has_lab(plan) else 2)
    full = full_schedule(plan).training.epochs * len(all_images(plan, data).train)
    return trainings * plan.trial.work + full


def retrain(run: common.Run, plan: Plan, best: Best, dataset: common.Dataset) -> Retraining | None:
    """Train textbook, best and lab configurations again, the best also in full; then read the test set, once."""
    if not plan.options.retrain_seeds:
        return None
    settings = configurations(plan, best.params)
    trained = train_again(run, plan, settings)
    write_retraining(run, trained)  # the full training may be interrupted
    full = train_in_full(run, plan, best.params)
    return test_once(run, plan, dataset, settings, trained, full)


def train_again(run: common.Run, plan: Plan, settings: Mapping[str, Settings]) -> list[Retrained]:
    """Train all configurations as in the study, on the same fresh seeds.

    A seed fixes initial weights and batches, so differences are paired.
    """
    keys = [(name, number) for number in range(plan.options.retrain_seeds) for name in settings]
    jobs = [replace(plan.job(settings[name], RETRAINING, number), keep_weights=True) for name, number in keys]
    run.progress.stage(f"textbook, best and lab configurations, {len(jobs)} trainings")
    results = dict(run.train(jobs))
    return [Retrained(name, jobs[place], results[place]) for place, (name, _) in enumerate(keys)]


def train_in_full(run: common.Run, plan: Plan, best: Settings) -> Full:
    """Train the best configuration with the full schedule."""
    run.progress.stage("the best configuration with the full schedule, on all cores")
    recipe = configure(full_schedule(plan), best)
    split = all_images(plan, run.data)
    seed = plan.job(best, FULL).seed
    model = common.make_model(recipe.network, run.data, split, seed)
    left = recipe.training.epochs
    for _ in common.train_epochs(model, run.data, recipe.training, run.runtime, split.train, seed):
        run.progress.advance(len(split.train))
        left -= 1
    run.progress.advance(left * len(split.train))  # of a training that diverged
    return Full(recipe, seed, split, model)


def test_once(
    run: common.Run,
    plan: Plan,
    dataset: common.Dataset,
    settings: dict[str, Settings],
    trained: Sequence[Retrained],
    full: Full,
) -> Retraining:
    """Measure all networks on the test images; writes retrain.csv and best_model.pth."""
    run.progress.stage("test set")
    index = test_index(plan, dataset)

    def is_right(model: nn.Module) -> np.ndarray:
        logits = common.predict(model, dataset.test_images, run.runtime, index)
        return common.score(logits, dataset.test_labels[index]).right

    right = []
    for configuration in trained:
        weights = configuration.result.weights
        assert weights is not None
        right.append(is_right(common.restore_model(configuration.job.recipe.network, run.data, weights)))
    accuracy = float(is_right(full.model).mean())
    tested = FullTraining(full.seed, accuracy, len(full.split.train), full.recipe.training.epochs)
    path = run.folder / "best_model.pth"
    common.save_checkpoint(path, full.model, run.data, full.recipe, seed=full.seed, test_accuracy=accuracy)
    accuracies = [float(own.mean()) for own in right]
    write_retraining(run, trained, accuracies, tested)
    names = [configuration.configuration for configuration in trained]
    return Retraining(settings, summarise_accuracies(names, accuracies), compare(names, right), tested)


def test_index(plan: Plan, dataset: common.Dataset) -> Tensor:
    """The test images to use, sorted by class; for --quick a subset, with all classes in proportion."""
    order = dataset.test_labels.argsort(stable=True)
    return order[:: max(1, len(order) // QUICK_IMAGES)] if plan.options.quick else order


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
        if accuracies is not None:
            row["test_accuracy"] = accuracies[place]
        rows.append(row)
    if full is not None:
        row = {"configuration": "best", "schedule": "full", "seed": full.seed, "test_accuracy": full.test_accuracy}
        rows.append(row)
    run.write_table("retrain.csv", pd.DataFrame(rows))


def summarise_accuracies(names: Sequence[str], accuracies: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Mean, sd, n and values of each configuration."""
    groups = pd.Series(accuracies).groupby(pd.Series(names, name="configuration"))
    return groups.agg(mean="mean", sd="std", n="count", values=list).to_dict("index")


def compare(names: Sequence[str], right: Sequence[np.ndarray]) -> dict[str, common.Estimate]:
    """How much more accurate the best configuration is than the others; ``right``: bool (n,) of every training."""

    def matrix(name: str) -> np.ndarray:  # (seeds, images)
        return np.stack([own for other, own in zip(names, right, strict=True) if other == name]).astype(float)

    others = [name for name in dict.fromkeys(names) if name != "best"]
    return {name: common.crossed_interval(matrix("best") - matrix(name)) for name in others}


# ================================================================ 7. figures

# The kinds of trials, in the order in which they are drawn; a kind has the same colour in every figure.
COLOURS = {"pruned": "#999999", "complete": common.PALETTE[0], "textbook": common.PALETTE[6], "best": common.PALETTE[1]}


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


def shown_trials(study: optuna.Study) -> list[Shown]:
    """All complete and pruned trials, the most important last."""
    trials = [trial for trial in study.get_trials(deepcopy=False, states=DONE) if trial.intermediate_values]
    textbook = [trial.number for trial in trials if trial.params == TEXTBOOK][:1]
    best = study.best_trial.number
    shown = []
    for trial in trials:
        kind = "complete" if trial.state == TrialState.COMPLETE else "pruned"
        if trial.number in textbook:
            kind = "textbook"
        if trial.number == best:
            kind = "best"
        shown.append(Shown(kind, trial))
    return sorted(shown, key=lambda one: (list(COLOURS).index(one.kind), one.trial.number))


def complete_trials(study: optuna.Study) -> list[Shown]:
    """All complete trials, the most important last."""
    return [shown for shown in shown_trials(study) if not shown.is_pruned]


def draw_study(run: common.Run, study: optuna.Study, results: Results) -> None:
    """Draw the figures of the study, if any trial is complete."""
    if results.best is None:
        return
    counts = results.counts
    where = f"{results.source}; {counts['complete']} complete, {counts['pruned']} pruned trials"
    few = list(results.importances or TEXTBOOK)[:4]  # more are illegible
    draw_history(run, study, results.best, where)
    draw_epochs(run, study, where)
    draw_importances(run, results.importances, where)
    draw_parallel(run, study, few, where)
    draw_slices(run, study, few, where)


def add_legend(figure: Figure, shown: Sequence[Shown], marker: str) -> None:
    """Name the kinds of trials below a figure, once; pruned ones always have a cross."""
    from matplotlib.lines import Line2D

    kinds = {one.kind: one.trial.number for one in shown}
    labels = {"pruned": "pruned", "complete": "complete"}
    labels |= {kind: f"{kind} (trial {kinds[kind]})" for kind in ("textbook", "best") if kind in kinds}
    handles = []
    for kind in kinds:
        style: dict[str, Any] = {"marker": "x"} if kind == "pruned" else {"marker": marker}
        if not marker:
            style["linestyle"] = "-"
        handles.append(Line2D([], [], color=COLOURS[kind], label=labels[kind], **{"linestyle": "", **style}))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def draw_epochs(run: common.Run, study: optuna.Study, where: str) -> None:
    """intermediate_values.png: the validation accuracy of every trial, epoch by epoch; crosses: pruned there."""
    title = f"Every trial's validation accuracy, epoch by epoch: pruned ones end early\n{where}"
    shown = shown_trials(study)
    with run.figure("intermediate_values.png", title, size=(9, 5.5)) as (figure, axes):
        axis = axes[0, 0]
        for one in shown:
            epochs, accuracies = zip(*sorted(one.trial.intermediate_values.items()), strict=True)
            width = {"pruned": 0.8, "complete": 1.2}.get(one.kind, 3)
            axis.plot(epochs, accuracies, color=one.colour, linewidth=width)
            if one.is_pruned:
                axis.plot(epochs[-1], accuracies[-1], "x", color=one.colour, markersize=5, markeredgewidth=1.2)
        axis.set(xlabel="epoch", ylabel="validation accuracy")
        axis.locator_params("x", integer=True)
        add_legend(figure, shown, "")


def draw_history(run: common.Run, study: optuna.Study, best: Best, where: str) -> None:
    """optimization_history.png: the value of every trial, and the best so far."""
    title = f"The best so far (line): {best.value:.4f}, of trial {best.number}\n{where}"
    shown = shown_trials(study)
    complete = sorted((one.trial.number, one.value) for one in complete_trials(study))
    numbers = [number for number, _ in complete] + [len(study.trials) - 1]
    so_far = np.maximum.accumulate([value for _, value in complete]).tolist()
    with run.figure("optimization_history.png", title, size=(9, 5.5)) as (figure, axes):
        axis = axes[0, 0]
        axis.plot(numbers, [*so_far, so_far[-1]], color=COLOURS["best"], drawstyle="steps-post", linewidth=1.5)
        for one in shown:
            marker = "x" if one.is_pruned else "o"
            size = 9 if one.is_special else 5
            axis.plot(one.trial.number, one.value, marker, color=one.colour, markersize=size)
        axis.set(xlabel="trial", ylabel="validation accuracy")
        axis.locator_params("x", integer=True)
        add_legend(figure, shown, "o")


def draw_importances(run: common.Run, importances: Mapping[str, float], where: str) -> None:
    """param_importances.png: a bar per parameter."""
    with run.figure("param_importances.png", f"{what_mattered(importances)}\n{where}", size=(9, 5)) as (_, axes):
        axis = axes[0, 0]
        if not importances:
            axis.set_axis_off()
            text = f"{MIN_TRIALS_FOR_IMPORTANCES} complete trials are needed"
            axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes)
            return
        bars = axis.barh(list(importances), list(importances.values()), color=COLOURS["complete"])
        axis.bar_label(bars, fmt="{:.3f}", padding=4)
        axis.invert_yaxis()
        axis.grid(visible=False, axis="y")
        axis.margins(x=0.12)
        axis.set(xlabel="importance (PED-ANOVA)")


class Scale(NamedTuple):
    """The range of a parameter: numbers from ``low`` to ``high``, those of the ``choices`` if it has any."""

    low: float
    high: float
    is_log: bool = False
    choices: tuple[Any, ...] = ()

    @classmethod
    def of(cls, distribution: BaseDistribution) -> Scale:
        """As the study draws from it."""
        if isinstance(distribution, CategoricalDistribution):
            return cls(0, len(distribution.choices) - 1, choices=distribution.choices)
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        return cls(distribution.low, distribution.high, distribution.log)

    def number(self, value: Any) -> float:
        """A value as a number."""
        return self.choices.index(value) if self.choices else value

    def place(self, number: float) -> float:
        """Where a number lies in the range, from 0 to 1."""
        low, high = self.low, self.high
        if self.is_log:
            low, high, number = np.log([low, high, number])
        return float((number - low) / (high - low)) if high > low else 0.5


def draw_parallel(run: common.Run, study: optuna.Study, names: Sequence[str], where: str) -> None:
    """parallel_coordinate.png: a line per complete trial, from parameter to parameter and to its value."""
    from matplotlib.colors import LinearSegmentedColormap

    title = f"The settings of every complete trial, the good ones dark\n{where}"
    shown = sorted(complete_trials(study), key=lambda one: (one.is_special, one.value))
    scales = {name: Scale.of(shown[0].trial.distributions[name]) for name in names}
    accuracy = Scale(min(one.value for one in shown), max(one.value for one in shown))
    shades = LinearSegmentedColormap.from_list("shades", ["#DDE7EF", COLOURS["complete"], "#00263D"])
    with run.figure("parallel_coordinate.png", title, size=(12, 6)) as (figure, axes):
        axis = axes[0, 0]
        for one in shown:
            places = [scale.place(scale.number(one.trial.params[name])) for name, scale in scales.items()]
            places.append(accuracy.place(one.value))
            colour = one.colour if one.is_special else shades(places[-1])
            axis.plot(range(len(places)), places, color=colour, linewidth=3 if one.is_special else 1.5)
        for position, scale in enumerate([*scales.values(), accuracy]):
            draw_scale(axis, position, scale)
        axis.set_xticks(range(len(scales) + 1), [*scales, "validation accuracy"])
        axis.set(xlim=(-0.6, len(scales) + 0.4), ylim=(-0.1, 1.1), yticks=[])
        axis.grid(visible=False)
        axis.spines[["left", "bottom"]].set_visible(False)
        axis.tick_params("x", length=0)
        add_legend(figure, [one for one in shown if one.is_special], "")


def draw_scale(axis: Axes, position: int, scale: Scale) -> None:
    """A vertical scale, with its ends above and below or all choices on its left."""
    axis.vlines(position, 0, 1, color="black", linewidth=1)
    if not scale.choices:
        axis.text(position, 1.02, f"{scale.high:.3g}", ha="center", va="bottom")
        axis.text(position, -0.02, f"{scale.low:.3g}", ha="center", va="top")
    for number, choice in enumerate(scale.choices):
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1}
        axis.text(position - 0.03, scale.place(number), choice, ha="right", va="center", bbox=box, zorder=3)


def draw_slices(run: common.Run, study: optuna.Study, names: Sequence[str], where: str) -> None:
    """slice.png: the validation accuracy of all complete trials against each parameter."""
    shown = complete_trials(study)
    title = f"Where the good values are\n{where}"
    with run.figure("slice.png", title, columns=len(names), size=(14, 5)) as (figure, axes):
        for axis, name in zip(axes[0], names, strict=True):
            draw_slice(axis, name, shown)
            axis.sharey(axes[0, 0])
            axis.label_outer()
        axes[0, 0].set(ylabel="validation accuracy")
        add_legend(figure, shown, "o")


def draw_slice(axis: Axes, name: str, shown: Sequence[Shown]) -> None:
    """A panel of slice.png: the whole range of a parameter, ends included."""
    scale = Scale.of(shown[0].trial.distributions[name])
    for one in shown:
        number = scale.number(one.trial.params[name])
        axis.plot(number, one.value, "o", color=one.colour, markersize=9 if one.is_special else 5)
    axis.set(xlabel=name)
    margin = 0.07 * (scale.high - scale.low) or 1
    if scale.is_log:
        axis.set(xscale="log", xlim=(scale.low / 1.4, scale.high * 1.4))
        axis.xaxis.set(major_formatter="{x:g}")
    else:
        axis.set(xlim=(scale.low - margin, scale.high + margin))
        axis.locator_params("x", nbins=4)
    if scale.choices:
        axis.set_xticks(range(len(scale.choices)), scale.choices, rotation=30, ha="right")


# ================================================================ 8. report


def what_mattered(importances: Mapping[str, float]) -> str:
    """The most important parameter, in words, unless trials are too few or PED-ANOVA finds all equal."""
    if not importances:
        return "Too few complete trials to tell which parameter matters most"
    if max(importances.values()) - min(importances.values()) < 1e-6:
        return "These trials show no difference in importance between the parameters"
    return f"{next(iter(importances))} matters most for reaching the best tenth of the trials"


def conclude(results: Results) -> list[str]:
    """The conclusions in plain words."""
    lines = changes_in_words(results.machinery)
    if results.is_interrupted:
        lines.insert(0, "The run was interrupted: this report is incomplete.")
    best = results.best
    if best is None:
        return [*lines, "No trial was completed."]
    counts = results.counts
    states = ", ".join(f"{counts[state]} {state}" for state in ("pruned", "complete", "failed"))
    winner = f"trial {best.number} was the best, with a validation accuracy of {best.value:.4f}"
    lines.append(f"Of {counts['finished']} trials ({states}), {winner}. {what_mattered(results.importances)}.")
    if results.audit:
        lines.append(audit_in_words(results.audit))
    if results.retraining:
        lines += retraining_in_words(results.retraining)
    if results.optimism:
        optimism = 100 * results.optimism["optimism"]
        lines.insert(-1, f"Optimism, study value minus test accuracy: {optimism:+.2f} points.")
    return lines


def changes_in_words(machinery: Sequence[Mapping[str, Any]]) -> list[str]:
    """What changed during the study."""
    lines = []
    for name in ("sampler", "pruner", "precision", "commit"):
        used = list(dict.fromkeys(str(entry[name]) for entry in machinery))
        if len(used) > 1:
            lines.append(f"The {name} changed during the study: {', then '.join(used)}.")
    return lines


def audit_in_words(audit: Audit) -> str:
    """How many pruned trials would have won."""
    if not audit.finished:
        return "Audit: no pruned trials."
    bound = f"{audit.share_ci_high or 1:.0%} of all pruned ones (95 %, Clopper-Pearson)"
    won = f"{audit.would_have_won} would have beaten the best: at most {bound}"
    return f"Audit: of {audit.finished} pruned trials trained to the end, {won}."


def retraining_in_words(retraining: Retraining) -> list[str]:
    """How the best configuration compares with the others, and the accuracy of best_model.pth."""
    lines = [gain_in_words(name, gain) for name, gain in retraining.gains.items()]
    full = retraining.full
    how = f"on {full.images:,} images for {full.epochs} epochs"
    return [*lines, f"best_model.pth, trained {how}, reaches {100 * full.test_accuracy:.2f} % on the test images."]


def gain_in_words(other: str, gain: common.Estimate) -> str:
    """How the best configuration compares with another; no difference is claimed if the interval includes 0."""
    verdict = "not shown to differ"
    if gain.low > 0:
        verdict = "better"
    elif gain.high < 0:
        verdict = "worse"
    doubt = "no interval"
    if gain.is_bounded:
        doubt = f"95 % interval over seeds and images {100 * gain.low:+.2f} to {100 * gain.high:+.2f}"
    change = f"{100 * gain.mean:+.2f} points of test accuracy ({doubt}, n = {gain.n} pairs of seeds)"
    return f"The best configuration compared with the {other}'s: {change}, {verdict}."


def statistics_in_words(results: Results) -> str:
    """Trials and best configuration, in the form of Optuna's examples."""
    lines = ["Study statistics:"]
    for name, count in results.counts.items():
        if count or name != "failed":
            lines.append(f"    Number of {name} trials:  {count}")
    lines += ["Best trial:", f"    Value:  {results.best.value if results.best else 'none'}", "    Params:"]
    if results.best:
        lines += [f"        {name}: {value}" for name, value in results.best.params.items()]
    return "\n".join(lines)


def configuration_table(retraining: Retraining) -> pd.DataFrame:
    """A column per configuration, with its test accuracy."""
    table = pd.DataFrame(retraining.settings).map(lambda value: f"{value:.3g}" if isinstance(value, float) else value)
    shown = {}
    for name, accuracy in retraining.accuracies.items():
        spread = f" ± {accuracy['sd']:.2%}" if accuracy["n"] > 1 else ""
        shown[name] = f"{accuracy['mean']:.2%}{spread}"
    table.loc["test accuracy"] = shown
    return table


def retraining_heading(results: Results) -> str:
    """What the table of configurations shows."""
    return f"Trained again on {results.plan.options.retrain_seeds} fresh seed(s), mean ± sd"


def print_results(results: Results) -> None:
    """Print statistics, table and conclusions."""
    print(statistics_in_words(results))
    if results.retraining:
        print(f"\n{retraining_heading(results)}\n{configuration_table(results.retraining).to_string()}")
    print()
    for line in conclude(results):
        print(textwrap.fill(line, 98, subsequent_indent="  "))


def write_report(run: common.Run, results: Results) -> list[str]:
    """The paragraphs of report.md."""
    options = results.plan.options
    training = results.plan.trial.recipe.training
    images = len(results.plan.trial.split.train)
    size = f"{images:,} images, {training.epochs} epochs and batches of {training.batch_size} per trial"
    study = f"{options.sampler}, {options.pruner}, seed {options.seed}"
    paragraphs = [
        f"# Task 3: an Optuna study on {results.source}",
        "What does tuning gain?",
        f"{study}; {size}. Trial 0 is the textbook configuration.",
        f"```\n{statistics_in_words(results)}\n```",
    ]
    if results.importances:
        importances = pd.Series(results.importances, name="importance (PED-ANOVA)")
        paragraphs.append(importances.to_markdown(floatfmt=".3f"))
    if results.retraining:
        table = configuration_table(results.retraining).to_markdown()
        paragraphs += [f"## {retraining_heading(results)}", table]
    paragraphs += ["## Conclusion", *conclude(results), "## Figures"]
    for name, caption in CAPTIONS.items():
        if (run.folder / f"{name}.png").exists():
            paragraphs.append(f"![{name}]({name}.png)\n\n*{caption}*")
    return [*paragraphs, "## Protocol of the default command, and limits", PROTOCOL, LIMITS]


if __name__ == "__main__":
    sys.exit(main())
