"""Task 3: which hyper-parameters? What tuning gains over a textbook configuration, and how close it gets to an expert.

Protocol: trial 0 is the textbook configuration: Adam at 0.001, a constant learning rate, no augmentation, no label
smoothing, no weight decay, no dropout. Every trial trains a fast network for 5 epochs, in batches of 128, on the same
8,000 images and is validated on the same images; both sets depend on --seed. TPE draws the first 25 trials at random;
MedianPruner stops poor ones early. The network is not searched: a wider one is simply better and slower. The study is
not given the lab's recipe. Afterwards the textbook, best and lab configurations are trained again as in the study, on
the same fresh seeds, and the best also with the full schedule (best_model.pth); then the test set is read, once. The
same command continues an interrupted study; with --storage, many machines work on one study.

Found (JPEG copy of CIFAR-10, Xeon with AMX, n = 5 seeds): 100 trials, the best 0.687 on validation; tuning gains
12.4 points of test accuracy [10.7, 14.0] over the textbook and stays 2.9 points below the lab's own recipe.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import os
import platform
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import optuna
import pandas as pd
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

import common
from common import Row, UserError

# ================================================================ 1. options

STUDY = "small-cnn"  # its name in the storage
SAMPLERS = {"tpe": "TPESampler", "random": "RandomSampler"}  # short names
PRUNERS = {"median": "MedianPruner", "hyperband": "HyperbandPruner", "none": "NopPruner"}
# With warm-up schedules the accuracy after one epoch says little: every trial gets two.
SETTINGS: dict[str, Row] = {"MedianPruner": {"n_warmup_steps": 2}, "PercentilePruner": {"percentile": 50.0}}
SETTINGS["TPESampler"] = {"n_startup_trials": 25}  # with Optuna's ten, one study settled on a poor schedule
# A trial takes 1 TFLOP, an estimated 20 s on one AVX2 core. It trains on all images alike, unlike the presets.
TRIAL, TRIAL_IMAGES = replace(common.PRESETS["small"], growth=(1, 2, 2), batch_size=128, epochs=5, hardest=1), 8_000
QUICK_IMAGES = 600
TRIALS, RETRAINING, FULL, AUDIT = range(4)  # stages with seeds of their own


def class_of(module: Any, aliases: dict[str, str]) -> Callable[[str], str]:
    """An argparse type: a sampler or pruner class that needs no arguments beyond SETTINGS."""

    def convert(text: str) -> str:
        name = aliases.get(text, text)
        try:
            getattr(module, name)(**SETTINGS.get(name, {}))
        except (AttributeError, TypeError, ImportError) as error:
            known = f"{', '.join(aliases)} or a class of {module.__name__} that needs no arguments"
            raise argparse.ArgumentTypeError(f"{text!r} is not {known}: {common.first_line(error)}") from None
        return name

    return convert


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; --quick limits every loop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, natural = parser.add_argument, common.number(low=0)
    sampler, pruner = class_of(optuna.samplers, SAMPLERS), class_of(optuna.pruners, PRUNERS)
    add("--trials", type=common.number(), default=100, help="complete or pruned trials to reach (default: %(default)s)")
    add("--timeout", type=common.number(float, 0.1), default=600.0, help="s for starting trials (default: %(default)s)")
    add("--sampler", type=sampler, default="tpe", help="tpe, random or Optuna's class (default: %(default)s)")
    add("--pruner", type=pruner, default="median", help="median, hyperband, none or a class (default: %(default)s)")
    add("--storage", metavar="URL", help="a database, as postgresql://user@host/name (default: OUTPUT_DIR/study.log)")
    add("--fresh", action="store_true", help="move an existing study aside and start over")
    add("--retrain-seeds", type=natural, default=5, metavar="N", help="0: no comparison (default: %(default)s)")
    add("--audit", type=natural, default=0, metavar="N", help="finish N pruned trials (below 20 tell little)")
    common.add_common_args(parser, presets=True, output_dir=Path("results/task3"))
    options = parser.parse_args(argv)
    if options.quick:
        for name, limit in {"trials": 8, "retrain_seeds": 2, "audit": 2, "timeout": 60.0}.items():
            setattr(options, name, min(getattr(options, name), limit))
        options.images, options.epochs = min(options.images or QUICK_IMAGES, QUICK_IMAGES), min(options.epochs or 3, 3)
        options.width, options.batch_size = options.width or 16, options.batch_size or 64
    return options


class Plan(NamedTuple):
    """A study: its options, and the training of a trial, whose recipe the search space varies."""

    options: argparse.Namespace
    trial: common.Job
    images: int  # seen in all epochs of a complete trial

    def job(self, settings: Row, *stage: int) -> common.Job:
        """The training of a configuration, as in the study."""
        recipe = replace(self.trial.recipe, **settings)
        return replace(self.trial, recipe=recipe, seed=common.derive_seed(self.options.seed, *stage))


def make_plan(options: argparse.Namespace, dataset: common.Dataset) -> Plan:
    """The plan for the options (--seed also picks the images); UserError for a network that cannot be trained."""
    recipe = replace(common.recipe_from(options, TRIAL), **settings_of(TEXTBOOK))
    trial = common.Job(recipe, 0, options.images or TRIAL_IMAGES, split_seed=common.derive_seed(options.seed, TRIALS))
    common.check_recipe(recipe, dataset, trial.split(dataset))
    images = len(trial.split(dataset).train)
    return Plan(options, replace(trial, images=images), images * recipe.epochs)


@common.script
def main(argv: Sequence[str] | None = None) -> int:
    """Run the study, retrain its best configuration, report; returns the exit status."""
    options = parse_args(argv)
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)  # the progress bar and the report replace its log
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", module="optuna")
    dataset = common.load_data(options)
    plan = make_plan(options, dataset)
    with common.open_run(options, dataset) as run:
        shared = open_study(run, plan)
        study, stopped = search(run, plan, shared)
        results = {"machinery": study.user_attrs["machinery"]} | describe_trials(run, study)
        try:
            if results["best"] and stopped is None:
                results |= run_audit(run, plan, study) if options.audit else {}
                results |= retrain(run, plan, study, dataset) if options.retrain_seeds else {}
        except (KeyboardInterrupt, Exception) as error:
            stopped = error
        write_report(run, plan, results | {"interrupted": stopped is not None})
    if stopped is None and results["best"] is None:
        stopped = UserError("no trial was completed: see the reasons in trials.csv, or try a longer --timeout")
    if stopped:
        raise stopped
    return 0


# ================================================================ 2. search space

# Tutorials' learning rates. The search extends further up, because SmallCNN divides logits, hence gradients, by nine.
USUAL_LR = {"Adam": 1e-3, "Muon": 0.02, "RMSprop": 1e-3, "SGD+nesterov": 0.1}
TEXTBOOK: Row = {"optimizer": "Adam", "lr_scale": 1.0, "schedule": "constant"}
TEXTBOOK |= {"weight_decay": 0.0, "dropout": 0.0, "label_smoothing": 0.0, "crop_padding": 0}


def suggest(trial: optuna.Trial | optuna.trial.FixedTrial, recipe: common.Recipe) -> Row:
    """Draw a configuration, as fields of a Recipe.

    The learning rate is drawn relative to the optimizer's usual one: each optimizer has its own range, yet there is one
    parameter, so that sampler and importances learn from all trials. Muon and dropout are for the lab's own network.
    """
    is_own = recipe.model == "SmallCNN"
    trial.suggest_categorical("optimizer", sorted(set(USUAL_LR) - ({"Muon"} if not is_own else set())))
    trial.suggest_float("lr_scale", 0.1, 30.0, log=True)
    trial.suggest_categorical("schedule", sorted(common.SCHEDULES))
    trial.suggest_float("weight_decay", 0.0, 2e-3)
    trial.suggest_float("dropout", 0.0, 0.5 if is_own else 0.0)
    trial.suggest_float("label_smoothing", 0.0, 0.3)
    trial.suggest_int("crop_padding", 0, 4)
    return settings_of(trial.params)


def settings_of(params: Row) -> Row:
    """A trial's parameters as fields of a Recipe, with the absolute learning rate; Muon has its own weight decay."""
    settings = {name: value for name, value in params.items() if name != "lr_scale"}
    settings["lr"] = USUAL_LR[params["optimizer"]] * params["lr_scale"]
    return settings | ({"weight_decay": 0.0} if params["optimizer"] == "Muon" else {})


# ================================================================ 3. storage

MAX_RETRIES = 3  # of a trial whose worker died: a configuration that kills workers must not be retried for ever
# A machine silent for STALE seconds loses its trials. A database may be unreachable for PATIENCE, a shorter time.
HEARTBEAT_SECONDS, RETRY_SECONDS, PATIENCE_SECONDS, STALE_SECONDS, CONNECT_SECONDS = 5, 1, 45, 60, 10
DRIVERS = {"MySQLdb": "mysqlclient", "psycopg": '"psycopg[binary]"', "psycopg2": "psycopg2-binary"}
DONE = (TrialState.COMPLETE, TrialState.PRUNED)


class PatientStorage(optuna.storages.RDBStorage):
    """A database that may be locked or restarted during a study: failed calls are retried for a while."""

    away_since = 0.0

    def __getattribute__(self, name: str) -> Any:
        from sqlalchemy.exc import InterfaceError, OperationalError

        method = super().__getattribute__(name)

        def wait_out(*args: Any, **kwargs: Any) -> Any:
            while True:
                try:
                    answer = method(*args, **kwargs)
                    self.away_since = 0.0
                    return answer
                except StorageInternalError as error:
                    self.away_since = self.away_since or time.monotonic()
                    is_away = isinstance(error.__cause__, OperationalError | InterfaceError)
                    if name == "record_heartbeat" and is_away:
                        return None  # the next one will succeed
                    if not is_away or time.monotonic() > self.away_since + PATIENCE_SECONDS:
                        raise
                    time.sleep(RETRY_SECONDS)

        return wait_out if inspect.ismethod(method) else method


def parse_url(storage: str) -> tuple[Any, str]:
    """(SQLAlchemy's URL of a database, its printable form); raises UserError that does not quote it."""
    from sqlalchemy import make_url

    try:
        url = make_url(storage)
        if "@" in f"{url.host}":
            raise ValueError("part of a password")
    except Exception:
        form = "postgresql://user:password@host:5432/name; in a password, write @ : / as %40 %3A %2F"
        raise UserError(f"--storage is not a database URL such as {form}") from None
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")  # SQLAlchemy's default is the older psycopg2
    return url, url.set(query={}).render_as_string().replace("+psycopg:", ":")


def open_database(storage: str, attempts: int = 5) -> BaseStorage:
    """Connect to a database; raises UserError without the password."""
    from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError

    url, shown = parse_url(storage)
    arguments: Row = {} if url.get_backend_name() == "sqlite" else {"connect_timeout": CONNECT_SECONDS}
    if url.get_backend_name() == "postgresql" and "options" not in url.query:
        arguments["options"] = "-c TimeZone=UTC"  # heartbeats are stored without a time zone
        os.environ.pop("PGTZ", None)  # it would take precedence
    try:
        return PatientStorage(
            url.render_as_string(hide_password=False),
            engine_kwargs={"connect_args": arguments, "pool_pre_ping": True},  # the server may restart
            heartbeat_interval=HEARTBEAT_SECONDS,
            grace_period=STALE_SECONDS,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(MAX_RETRIES),
        )
    except ImportError as error:
        module = getattr(error.__cause__, "name", None) or error.name or str(error)
        raise UserError(f"--storage {shown} needs {module}: pip install {DRIVERS.get(module, module)}") from None
    except (SQLAlchemyError, StorageInternalError, RuntimeError, OSError) as error:
        if attempts and isinstance(error, IntegrityError | ProgrammingError):  # two machines create the tables at once
            time.sleep(0.5)
            return open_database(storage, attempts - 1)
        text = common.first_line(root_of(error))
        raise UserError(f"--storage {shown} cannot be used: {text.replace(url.password or chr(0), '***')}") from None


def open_journal(path: Path) -> BaseStorage:
    """Open a journal in a folder locked by this run; truncates a half-written line; UserError for a foreign file."""
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    backend = JournalFileBackend(str(path), JournalFileOpenLock(str(path)))
    for left in path.parent.glob(f"{path.name}.lock*"):  # of a killed run: nobody else writes here
        left.unlink()
    with common.user_error(f"{path} is not an Optuna journal (--fresh moves it aside and starts over)"):
        whole = len(list(backend.read_logs(0)))  # Optuna skips a half-written line, but would append to it
        if whole < len(lines):
            if lines[0][:10] != b'{"op_code"'[: len(lines[0])]:
                raise ValueError("its first line is not Optuna's")
            print(f"NOTE: {path} ended in a half-written line, now removed: {lines[-1][:99]!r}", file=sys.stderr)
            os.truncate(path, sum(map(len, lines[:whole])))
        return optuna.storages.JournalStorage(backend)


def move_aside(storage: BaseStorage, to: str) -> None:
    """Rename the study in a database; raises UserError while other machines are working on it."""
    study = optuna.load_study(study_name=STUDY, storage=storage)
    optuna.storages.fail_stale_trials(study)
    limit, running = time.time() - STALE_SECONDS, study.get_trials(states=(TrialState.RUNNING,))
    # One without attributes after that time was killed before its first heartbeat and would count as running for ever.
    if running := [t for t in running if t.user_attrs or t.datetime_start.timestamp() > limit]:  # type: ignore
        raise UserError(f"--fresh: {len(running)} trials of {STUDY} are running; stop them, wait {STALE_SECONDS} s")
    optuna.copy_study(from_study_name=STUDY, from_storage=storage, to_storage=storage, to_study_name=to)
    optuna.delete_study(study_name=STUDY, storage=storage)


def open_study(run: common.Run, plan: Plan) -> optuna.Study:
    """Create or join the study: repaired, checked, lost trials retried, the textbook configuration enqueued."""
    options, journal, stamp = plan.options, run.output / "study.log", time.strftime("%Y%m%d-%H%M%S")
    if options.storage:
        storage = open_database(options.storage)
        if options.fresh and STUDY in optuna.get_all_study_names(storage):
            move_aside(storage, f"{STUDY}-{stamp}")
    else:
        if options.fresh and journal.exists():
            journal.rename(journal.with_name(f"study-{stamp}.log"))
        storage = open_journal(journal)
    study = optuna.create_study(storage=storage, study_name=STUDY, direction="maximize", load_if_exists=True)
    study.pruner = getattr(optuna.pruners, options.pruner)(**SETTINGS.get(options.pruner, {}))
    space = optuna.trial.FixedTrial(TEXTBOOK)
    suggest(space, plan.trial.recipe)
    now: Row = {"dataset": f"checksum {run.data.fingerprint}", "images": plan.trial.images}
    now |= {"seed": options.seed} | asdict(plan.trial.recipe)  # must not change within a study
    now |= {f"range of {key}": optuna.distributions.distribution_to_json(d) for key, d in space.distributions.items()}
    now, before = json.loads(json.dumps(now)), study.user_attrs.get("definition")
    if before not in (None, now):
        key = next(key for key in {**before, **now} if before.get(key) != now.get(key))
        change = f"{key}: {before.get(key)}, now {now.get(key)}"
        raise UserError(f"the stored study differs ({change}); --fresh moves it aside, or use another --output-dir")
    study.set_user_attr("definition", now)
    used = {"sampler": options.sampler, "pruner": options.pruner, "precision": run.runtime.precision}
    used["commit"] = run.environment["git_commit"]  # these may change: the report mentions it
    if used not in (machinery := study.user_attrs.get("machinery", [])):
        study.set_user_attr("machinery", [*machinery, used])
    study.enqueue_trial(TEXTBOOK, skip_if_exists=True)
    if not options.storage:  # this run has locked the folder: any trial running there is dead
        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            try_again(study, trial)
            study.tell(trial.number, state=TrialState.FAIL)
    machine = time.time_ns() % 2**32 if options.storage else 0  # each machine, as each resumption, draws anew
    seed = common.derive_seed(options.seed, TRIALS, len(study.trials), machine) % 2**32
    study.sampler = getattr(optuna.samplers, options.sampler)(seed=seed, **SETTINGS.get(options.sampler, {}))
    return study


def retried(trials: Sequence[FrozenTrial]) -> dict[int, int]:
    """{number of a trial whose worker died: number of the trial that retries its parameters}."""
    return {t.system_attrs["retry_history"][-1]: t.number for t in trials if "retry_history" in t.system_attrs}


def root_of(error: BaseException) -> BaseException:
    """The original error in a chain, such as a database's own message."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return error


def try_again(study: optuna.Study, trial: FrozenTrial) -> None:
    """Enqueue the parameters of a lost trial, unless that was done before."""
    if trial.number not in retried(study.get_trials(deepcopy=False)):
        trial.user_attrs.clear()  # the new trial gets its own
        RetryHeartbeatStaleTrialCallback(MAX_RETRIES)(study, trial)


# ================================================================ 4. the study and its audit


def search(run: common.Run, plan: Plan, study: optuna.Study) -> tuple[optuna.Study, BaseException | None]:
    """Run trials until --trials are complete or pruned; none starts after --timeout seconds.

    Optuna runs them in threads, each of which delegates its training to a worker process and receives the epochs one by
    one, so reports and pruning happen here. Returns a copy of the study in memory and what ended it early, if anything.
    """
    trials, seconds = plan.options.trials, plan.options.timeout
    halt, deadline, ended = threading.Event(), time.monotonic() + seconds, list[TrialState]()
    known, total, before = study.get_trials(deepcopy=False), trials * plan.images, run.bar.n
    machinery = study.user_attrs["machinery"]
    stopped: BaseException | None = None

    def objective(trial: optuna.Trial) -> float:
        trial.set_user_attr("worker", f"{platform.node()}, process {os.getpid()}")
        job = plan.job(suggest(trial, plan.trial.recipe), TRIALS, trial.number)
        try:
            with contextlib.closing(run.workers.run(common.train_job, job)) as epochs:
                for row in epochs:
                    if halt.is_set():
                        raise common.WorkerDied("interrupted")
                    trial.set_user_attr("seconds", row["seconds"])
                    trial.report(row["val_accuracy"], row["epoch"])
                    if not np.isfinite(row["train_loss"]):
                        raise optuna.TrialPruned("diverged: the loss is not finite")
                    if row["epoch"] < job.recipe.epochs and trial.should_prune():
                        raise optuna.TrialPruned(f"{plan.options.pruner}, after epoch {row['epoch']}")
        except Exception as error:
            trial.set_user_attr("reason", common.first_line(error)[:200])
            if isinstance(error, common.WorkerDied):
                try_again(study, study.trials[trial.number])
            raise
        return row["val_accuracy"]

    def is_over() -> bool:  # Optuna's timeout depends on the system clock; also stop if all trials fail
        return halt.is_set() or time.monotonic() > deadline or (len(ended) > 5 and set(ended) == {TrialState.FAIL})

    def after_trial(study: optuna.Study, trial: FrozenTrial) -> None:
        ended.append(trial.state)
        known[:] = study.get_trials(deepcopy=False)
        if is_over():
            study.stop()

    def work() -> None:
        callbacks: list[Any] = [after_trial, optuna.study.MaxTrialsCallback(trials, DONE)]
        while (missing := trials - sum(trial.state in DONE for trial in known)) > 0 and not is_over():
            try:
                study.optimize(objective, missing, None, min(missing, run.workers.count), (Exception,), callbacks)
            except (ValueError, UpdateFinishedTrialError) as error:
                if "Cannot tell" not in str(error) and not isinstance(error, UpdateFinishedTrialError):
                    raise  # otherwise this machine slept, was taken for dead, and lost its trial
            known[:] = study.get_trials(deepcopy=False)

    run.stage(f"{type(study.sampler).__name__}, {trials} trials or {seconds:.0f} s", total)
    with ThreadPoolExecutor(1) as background:  # Optuna waits for its threads even on Ctrl-C
        working = background.submit(work)
        try:
            while wait([working], 0.5).not_done:
                spent = 1 - (deadline - time.monotonic()) / seconds
                done = max(spent, sum(trial.state in DONE for trial in known) / trials)
                run.bar.update(before + min(1, done) * total - run.bar.n)
            working.result()
        except KeyboardInterrupt as error:
            stopped = error
            halt.set()
            run.workers.stop()
        except Exception as error:  # errors in trials are caught: this is the storage or the sampler
            stopped = UserError(f"the study ended early: {common.first_line(root_of(error))}")
    with contextlib.suppress(Exception):  # the database may be unreachable
        known, machinery = study.get_trials(deepcopy=False), study.user_attrs["machinery"]
    run.bar.update(before + total - run.bar.n)
    copy = optuna.create_study(direction="maximize")
    copy.add_trials(known)
    copy.set_user_attr("machinery", machinery)
    return copy, stopped


def trial_table(study: optuna.Study) -> pd.DataFrame:
    """trials.csv: a row per trial, with both the relative and the absolute learning rate."""
    trials = study.get_trials(deepcopy=False)
    table = study.trials_dataframe(("number", "state", "value", "params", "user_attrs"))
    table.columns = [name.removeprefix("user_attrs_").replace("params_", "param_") for name in table]
    last = ("param_lr", "epochs_run", "seconds", "worker", "reason")
    table = table.reindex(columns=["number", "state", "value", *(f"param_{name}" for name in TEXTBOOK), *last])
    table["state"] = table["state"].str.lower()
    table["param_lr"] = [settings_of(t.params)["lr"] if len(t.params) == len(TEXTBOOK) else None for t in trials]
    table["epochs_run"] = [len(trial.intermediate_values) for trial in trials]
    again = {old: f"its worker died; tried again as trial {new}" for old, new in retried(trials).items()}
    table["reason"] = [again.get(t.number, t.user_attrs.get("reason", "")) for t in trials]
    return table


def describe_trials(run: common.Run, study: optuna.Study) -> Row:
    """Write trials.csv, best_params.json and the figures of the study; returns its key facts."""
    table = trial_table(study)
    run.table("trials.csv", table)
    states = {"pruned": "pruned", "complete": "complete", "failed": "fail"}
    counts = {name: int((table["state"] == state).sum()) for name, state in states.items()}
    facts: Row = {"n_trials": {"finished": sum(counts.values())} | counts, "best": None, "importances": {}}
    if counts["complete"]:
        best = study.best_trial
        facts["best"] = {"number": best.number, "value": best.value, "params": settings_of(best.params)}
        facts["importances"] = optuna.importance.get_param_importances(study) if counts["complete"] >= 10 else {}
        common.write(run.folder / "best_params.json", facts["best"]["params"])
        draw_study(run, study, facts)
    return facts


def run_audit(run: common.Run, plan: Plan, study: optuna.Study) -> Row:
    """Train a random sample of pruned trials to the end, each from its own seed: how many would have won?"""
    from scipy.stats import binomtest

    pruned = trial_table(study).query("state == 'pruned' and not reason.str.startswith('diverged')", engine="python")
    seed = common.derive_seed(plan.options.seed, AUDIT) % 2**32
    frame = pruned.sample(min(plan.options.audit, len(pruned)), random_state=seed).sort_index()
    if frame.empty:
        return {"audit": {"finished": 0, "would_have_won": 0, "share_ci_high": None}}
    jobs = [plan.job(settings_of(study.trials[n].params), TRIALS, n) for n in frame["number"]]
    run.stage(f"audit: finishing {len(jobs)} pruned trials", len(jobs) * plan.images)
    finished = {number: result["history"][-1]["val_accuracy"] for number, result in run.train(jobs)}
    frame = frame[["number", "epochs_run", "value"]].rename(columns={"value": "value_when_pruned"})
    frame = frame.assign(value_finished=[finished[n] for n in range(len(jobs))], best_value=study.best_value)
    frame["would_have_won"] = frame["value_finished"] > study.best_value
    run.table("audit.csv", frame)
    won = int(frame["would_have_won"].sum())
    bound = binomtest(won, len(jobs), alternative="less").proportion_ci(0.95, "exact").high  # Clopper and Pearson
    return {"audit": {"finished": len(jobs), "would_have_won": won, "share_ci_high": float(bound)}}


# ================================================================ 5. fresh seeds, then the test set


def retrain(run: common.Run, plan: Plan, study: optuna.Study, dataset: common.Dataset) -> Row:
    """Train textbook, best and lab configurations as in the study, on the same fresh seeds; the best also in full.

    A seed fixes initial weights and batches, so differences are paired. Then reads the test set, once.
    """
    preset, best = replace(common.PRESETS[plan.options.preset], hardest=TRIAL.hardest), settings_of(study.best_params)
    configurations = {"textbook": settings_of(TEXTBOOK), "best": best}
    if plan.trial.recipe.model == preset.model:  # the lab has no recipe for a custom network
        configurations["lab"] = {name: getattr(preset, name) for name in best}
    keys = [(name, number) for number in range(plan.options.retrain_seeds) for name in configurations]
    jobs = [replace(plan.job(configurations[name], RETRAINING, number), keep=True) for name, number in keys]
    full = replace(common.recipe_from(plan.options, preset), batch_size=plan.trial.recipe.batch_size, **best)
    split, seed = common.split_dataset(run.data, plan.options.images, False), plan.job(best, FULL).seed
    run.stage(f"textbook, best and lab configurations, {len(jobs)} trainings", len(jobs) * plan.images)
    trained, rows = dict(run.train(jobs)), list[Row]()
    for number, job in enumerate(jobs):
        row = {"configuration": keys[number][0], "schedule": "study", "seed": job.seed}
        rows.append(row | {"validation_accuracy": trained[number]["history"][-1]["val_accuracy"]})
    run.table("retrain.csv", pd.DataFrame(rows))  # the full training may be interrupted
    run.stage("the best configuration with the full schedule, on all cores", len(split.train) * full.epochs)
    model = common.make_model(full, run.data, split, seed)
    for _ in common.train_epochs(model, run.data, full, run.runtime, split.train, seed=seed):
        run.bar.update(len(split.train))
    run.stage("test set")
    order = dataset.test_labels.argsort(stable=True)  # a strided subset has all classes in proportion
    index = order[:: max(1, len(order) // QUICK_IMAGES)] if plan.options.quick else order

    def test(network: Any) -> np.ndarray:
        logits = common.predict(network, dataset.test_images, run.runtime, index)
        return common.score(logits, dataset.test_labels[index])[1].astype(float)

    right = {name: list[np.ndarray]() for name in configurations}
    for number, (row, job) in enumerate(zip(rows, jobs, strict=True)):
        right[keys[number][0]].append(own := test(job.restore(run.data, trained[number]["state"])))
        row["test_accuracy"] = own.mean()
    facts = {"seed": seed, "test_accuracy": float(test(model).mean())}
    common.save_checkpoint(run.folder / "best_model.pth", model, run.data, full, **facts)
    run.table("retrain.csv", pd.DataFrame([*rows, {"configuration": "best", "schedule": "full"} | facts]))

    groups = pd.DataFrame(rows).groupby("configuration")
    tested = groups["test_accuracy"].agg(mean="mean", sd="std", n="count", values=list).to_dict("index")
    truth: Row = {"settings": configurations, "full": facts | {"images": len(split.train), "epochs": full.epochs}}
    truth |= {name: {"test_accuracy": entry} for name, entry in tested.items()}
    for key, other in (("difference", "textbook"), ("difference_to_lab", "lab")):
        if other in configurations:
            gain = common.crossed_interval(np.stack(right["best"]) - np.stack(right[other]))
            truth[key] = {"mean": gain.mean, "ci_low": gain.low, "ci_high": gain.high, "n": gain.n}
    value, fresh = study.best_value, tested["best"]["mean"]
    return {"retrain": truth, "optimism": {"study_value": value, "fresh_seeds_test": fresh, "optimism": value - fresh}}


# ================================================================ 6. figures

NOTICE = {  # captions
    "intermediate_values": "One line per trial. Notice how early poor ones are pruned, which start low and end high.",
    "optimization_history": "One point per complete trial. Notice when the line stops rising.",
    "parallel_coordinate": "One line per trial. Where the dark lines converge, the value matters.",
    "param_importances": "What distinguishes the best tenth of trials (PED-ANOVA). lr_scale: learning rate / usual.",
    "slice": "One point per complete trial. If the best lie at the end of a range, the range is too narrow.",
}
FIGURES = {  # of optuna.visualization.matplotlib: title, columns, inches
    "optimization_history": ("The best so far (line): {value:.4f}, of trial {number}", 1, (9, 5.5)),
    "intermediate_values": ("Every trial's validation accuracy, epoch by epoch: pruned ones end early", 1, (9, 5.5)),
    "param_importances": ("{mattered}", 1, (9, 5)),
    "parallel_coordinate": ("The settings of every complete trial, the good ones dark", 1, (12, 6)),
    "slice": ("Where the good values are (darker points are later trials)", 4, (14, 5)),
}


def draw_study(run: common.Run, study: optuna.Study, facts: Row) -> None:
    """Draw Optuna's own plots of the study, with the lab's figures, style and titles in place of Optuna's."""
    counts, mattered = facts["n_trials"], what_mattered(facts["importances"])
    where = f"{run.data.source}; {counts['complete']} complete, {counts['pruned']} pruned trials"
    target: Row = {"target_name": "validation accuracy"}
    few = target | {"params": list(facts["importances"] or TEXTBOOK)[:4]}  # more are illegible
    arguments = {"optimization_history": target, "parallel_coordinate": few, "slice": few}
    for name, (title, columns, size) in FIGURES.items():
        title = f"{title.format(**facts['best'], mattered=mattered)}\n{where}"
        with run.figure(f"{name}.png", title, columns=columns, size=size) as (drawing, grid):
            ours = {"subplots": mock.Mock(return_value=(drawing, np.squeeze(grid)[()])), "style": mock.Mock()}
            ours["gca"] = mock.Mock(return_value=grid[0, 0])
            with mock.patch.multiple("matplotlib.pyplot", **ours), mock.patch("matplotlib.axes.Axes.set_title"):
                getattr(optuna.visualization.matplotlib, f"plot_{name}")(study, **arguments.get(name, {}))
            for axes in drawing.axes:
                if axes.get_legend():  # may list a hundred trials
                    axes.get_legend().remove()
                if name == "slice":
                    axes.tick_params("x", which="both", rotation=30)
                if name == "intermediate_values":
                    axes.set(xlabel="epoch", ylabel="validation accuracy")
                    axes.locator_params("x", integer=True)


# ================================================================ 7. report


def what_mattered(importances: Row) -> str:
    """The most important parameter, in words, unless trials are too few or PED-ANOVA finds all equal."""
    if not importances:
        return "Too few complete trials to tell which parameter matters most"
    if max(importances.values()) - min(importances.values()) < 1e-6:
        return "These trials show no difference in importance between the parameters"
    return f"{next(iter(importances))} matters most for reaching the best tenth of the trials"


def conclude(plan: Plan, results: Row) -> list[str]:
    """The conclusions in plain words, from ``results`` alone."""
    best, counts = results["best"], results["n_trials"]
    lines = ["The run was interrupted: this report is incomplete."] * results["interrupted"]
    for key in ("sampler", "pruner", "precision", "commit"):
        used = list(dict.fromkeys(str(entry[key]) for entry in results["machinery"]))
        if len(used) > 1:
            lines.append(f"The {key} changed during the study: {', then '.join(used)}.")
    if best is None:
        return [*lines, "No trial was completed."]
    states = ", ".join(f"{counts[state]} {state}" for state in ("pruned", "complete", "failed"))
    winner = f"trial {best['number']} was the best, with a validation accuracy of {best['value']:.4f}"
    lines.append(f"Of {counts['finished']} trials ({states}), {winner}. {what_mattered(results['importances'])}.")
    if audit := results.get("audit"):
        won, bound = audit["would_have_won"], audit["share_ci_high"]
        text = f"{won} would have beaten the best: at most {bound or 1:.0%} of all pruned ones (95 %, Clopper-Pearson)"
        text = f"of {audit['finished']} pruned trials trained to the end, {text}"
        lines.append(f"Audit: {text if audit['finished'] else 'no pruned trials'}.")
    if truth := results.get("retrain"):
        full, versus = truth["full"], {"difference": "the textbook's", "difference_to_lab": "the lab's"}
        for key in filter(truth.get, versus):
            gain, low, high = (100 * truth[key][part] for part in ("mean", "ci_low", "ci_high"))
            verdict = "better" if low > 0 else "worse" if high < 0 else "not shown to differ"
            doubt = f"95 % interval over seeds and images {low:+.2f} to {high:+.2f}" if low > -1e9 else "no interval"
            change = f"{gain:+.2f} points of test accuracy ({doubt}, n = {truth[key]['n']} pairs of seeds)"
            lines.append(f"The best configuration compared with {versus[key]}: {change}, {verdict}.")
        lines.append(f"Optimism, study value minus test accuracy: {100 * results['optimism']['optimism']:+.2f} points.")
        how = f"on {full['images']:,} images for {full['epochs']} epochs"
        lines.append(f"best_model.pth, trained {how}, reaches {100 * full['test_accuracy']:.2f} % on the test images.")
    return lines


def write_report(run: common.Run, plan: Plan, results: Row) -> None:
    """Print and write the tables and conclusions, publish the files."""
    recipe, options = plan.trial.recipe, plan.options
    best, counts = results["best"] or {"value": "none", "params": {}}, results["n_trials"]
    trials = [f"    Number of {name} trials:  {n}" for name, n in counts.items() if n or name != "failed"]
    params = [f"        {name}: {value}" for name, value in best["params"].items()]  # as Optuna's examples print it
    lines = ["Study statistics:", *trials, "Best trial:", f"    Value:  {best['value']}", "    Params:", *params]
    print(block := "\n".join(lines))
    how = f"{plan.trial.images:,} images, {recipe.epochs} epochs and batches of {recipe.batch_size} per trial"
    how = f"{options.sampler}, {options.pruner}, seed {options.seed}; {how}. Trial 0 is the textbook configuration."
    text = [f"# Task 3: an Optuna study on {run.data.source}", "What does tuning gain?", how, f"```\n{block}\n```"]
    if results["importances"]:
        text.append(pd.Series(results["importances"], name="importance (PED-ANOVA)").to_markdown(floatfmt=".3f"))
    if truth := results.get("retrain"):
        table = pd.DataFrame(truth["settings"]).map(lambda value: f"{value:.3g}" if isinstance(value, float) else value)
        accuracy = {name: "{mean:.2%} ± {sd:.2%}".format(**truth[name]["test_accuracy"]) for name in table}
        table.loc["test accuracy"] = {name: shown.replace(" ± nan%", "") for name, shown in accuracy.items()}
        heading = f"Trained again on {options.retrain_seeds} fresh seed(s), mean ± sd"
        print(f"\n{heading}\n{table.to_string()}")
        text += [f"## {heading}", table.to_markdown()]
    conclusion = conclude(plan, results)
    print("", *(textwrap.fill(line, 98, subsequent_indent="  ") for line in conclusion), sep="\n")
    drawn = [name for name in NOTICE if (run.folder / f"{name}.png").exists()]
    text += ["## Conclusion", *conclusion, "## Figures", *(f"![{n}]({n}.png)\n\n*{NOTICE[n]}*" for n in drawn)]
    text += ["## Protocol of the default command, and limits", str(__doc__).split("\n\n")[1]]
    text += ["One network, one data set, short trainings, one study: another seed may find another configuration."]
    options.storage = options.storage and parse_url(options.storage)[1]  # config.json holds the options
    facts = {"task": "task3", "sampler": options.sampler, "pruner": options.pruner, "seed": options.seed}
    run.finish(facts | results, text, keep=[path.name for path in run.output.glob("study*")])


if __name__ == "__main__":
    sys.exit(main())
