"""The study of Task 3: search space and objective, storage, worker processes.

Whatever is killed, finished trials stay: every step of a trial is in the journal or the database at once, a
half-written last line is cut off at the next start, and trials whose worker died are tried again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import sys
import time
import uuid
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import torch
from filelock import FileLock
from optuna.distributions import distribution_to_json
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

import common
from common import UserError

Row = dict[str, Any]
# The usual learning rate of each optimizer here; the search space reaches from a tenth to four times as much.
REFERENCE_LR = {"Adam": 0.005, "RMSprop": 0.005, common.Recipe.optimizer: common.Recipe.lr}
CONTROL = "-random"  # added to the name of a study, for its control
MAX_RETRIES = 3  # of a trial whose worker died: a configuration that kills its worker must not go on for ever
HEARTBEAT_SECONDS, STALE_SECONDS = 5, 20  # of databases: a worker silent for longer counts as dead
CONNECT_SECONDS = 10


# ---------------------------------------------------------------- 1. search space and objective


@dataclass(frozen=True)
class Plan:
    """One study: all that a worker process needs to know of it."""

    storage: str  # path of a journal, or URL of a database
    study_name: str
    sampler: str
    pruner: str
    seed: int
    trials: int  # finished ones, when the study is done
    recipe: common.Recipe  # of every trial, apart from what the search space varies
    pictures: int | None  # at most so many training and so many validation pictures, always the same ones


def suggest(trial: optuna.Trial | optuna.trial.FixedTrial) -> dict[str, Any]:
    """The search space: draws one configuration.

    The learning rate is drawn relative to the usual one of its optimizer: a range of its own for each, yet
    one parameter, so that sampler and importances learn from all trials. Width is left out: wider is better
    and slower, which is a matter of budget.
    """
    return {
        "optimizer": trial.suggest_categorical("optimizer", sorted(REFERENCE_LR)),
        "lr_scale": trial.suggest_float("lr_scale", 0.1, 4.0, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-5, 1e-2, log=True),
        "dropout": trial.suggest_float("dropout", 0.0, 0.5),
        "label_smoothing": trial.suggest_float("label_smoothing", 0.0, 0.3),
        "crop_padding": trial.suggest_int("crop_padding", 0, 4),
    }


def settings_of(params: dict[str, Any]) -> dict[str, Any]:
    """A trial's parameters as fields of a Recipe: the relative learning rate made absolute."""
    rate = REFERENCE_LR[params["optimizer"]] * params["lr_scale"]
    return {
        ("lr" if name == "lr_scale" else name): (rate if name == "lr_scale" else value)
        for name, value in params.items()
    }


def default_params() -> dict[str, Any]:
    """The project's default recipe as a point of the search space."""
    recipe = asdict(common.Recipe())
    scale = recipe["lr"] / REFERENCE_LR[recipe["optimizer"]]
    names = ("optimizer", "weight_decay", "dropout", "label_smoothing", "crop_padding")
    return {"lr_scale": scale} | {name: recipe[name] for name in names}


def split(dataset: common.Dataset, pictures: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(train_index, validation_index), the same for every trial, worker and machine."""
    train_index, validation_index = common.split_validation(dataset.train_labels)
    return common.subset(train_index, pictures), common.subset(validation_index, pictures)


@dataclass(frozen=True)
class Objective:
    """Validation accuracy of a trial's configuration after its last epoch, on always the same pictures."""

    dataset: common.Dataset
    train_index: torch.Tensor
    validation_index: torch.Tensor
    plan: Plan
    runtime: common.Runtime
    owner: dict[str, str]  # user attributes by which an orphaned trial is recognised

    def __call__(self, trial: optuna.Trial) -> float:
        """Train and report every epoch; why a trial ended early is kept in its user attribute ``reason``."""
        for name, value in self.owner.items():
            trial.set_user_attr(name, value)
        recipe = replace(self.plan.recipe, **settings_of(suggest(trial)))

        def report(row: dict[str, Any]) -> None:
            trial.report(row["val_accuracy"], row["epoch"])
            if not math.isfinite(row["train_loss"]):
                raise optuna.TrialPruned("diverged: the loss is not finite")
            if row["epoch"] < recipe.epochs and trial.should_prune():
                raise optuna.TrialPruned(f"{self.plan.pruner} pruner, after epoch {row['epoch']}")

        seed = self.plan.seed + trial.number
        model = common.make_model(self.dataset, recipe, seed)
        torch.manual_seed(seed)  # dropout draws from torch's global generator
        where = {"train_index": self.train_index, "validation_index": self.validation_index}
        try:
            history, _ = common.fit(model, self.dataset, recipe, self.runtime, seed=seed, on_epoch=report, **where)
        except Exception as error:
            trial.set_user_attr("reason", common.first_line(error)[:200])
            raise
        return history[-1]["val_accuracy"]


# ---------------------------------------------------------------- 2. storage


class SystemLock(JournalFileOpenLock):
    """A lock on a file that the system releases when its holder is killed (Optuna's own stays for 30 s)."""

    def __init__(self, path: Path) -> None:
        self._lock = FileLock(path.with_name(f".{path.name}.lock"), poll_interval=0.01)

    def acquire(self) -> bool:
        """Wait for the lock."""
        self._lock.acquire()
        return True

    def release(self) -> None:
        """Give it back."""
        self._lock.release()


def is_database(storage: str) -> bool:
    """Whether ``storage`` is a URL, not the path of a journal."""
    return "://" in storage


def without_password(storage: str) -> str:
    """``storage`` as it may be printed and written."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    if not is_database(storage):
        return storage
    try:
        return make_url(storage).render_as_string(hide_password=True)
    except ArgumentError:
        return storage.partition("://")[0] + "://..."


def repair_journal(path: Path) -> None:
    """Cut off a half-written last line, as a kill may leave it (kept in ``<name>.damaged``).

    Raises UserError for a file that is no journal, which is left as it is.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            whole = line.endswith(b"\n") and "op_code" in json.loads(line)
        except (ValueError, TypeError):
            whole = False
        if whole:
            continue
        start = b'{"op_code":'
        if number < len(lines) or (number == 1 and line[: len(start)] != start[: len(line)]):
            raise UserError(f"{path} is no Optuna journal (line {number}); --fresh moves it aside and starts anew")
        print(f"NOTE: {path} ended in a half-written line, now in {path.name}.damaged", file=sys.stderr)
        with path.with_name(f"{path.name}.damaged").open("ab") as stream:
            stream.write(line + b"\n")
        os.truncate(path, path.stat().st_size - len(line))


def open_storage(storage: str) -> optuna.storages.BaseStorage:
    """Open a journal or connect to a database; raises UserError, in one line and without the password."""
    if not is_database(storage):
        journal = JournalFileBackend(storage, lock_obj=SystemLock(Path(storage)))
        try:
            return optuna.storages.JournalStorage(journal)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{storage} is no Optuna journal, or damaged: {common.first_line(error)}") from None
    import sqlalchemy
    from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, ProgrammingError, SQLAlchemyError

    shown = without_password(storage)
    try:
        url = sqlalchemy.make_url(storage)
        if url.drivername == "postgresql":
            url = url.set(drivername="postgresql+psycopg")  # SQLAlchemy's default is the older psycopg2
        timeout = {} if url.get_backend_name() == "sqlite" else {"connect_timeout": CONNECT_SECONDS}
        for attempt in range(5):
            try:
                return optuna.storages.RDBStorage(
                    url.render_as_string(hide_password=False),
                    engine_kwargs={"connect_args": timeout},
                    heartbeat_interval=HEARTBEAT_SECONDS,
                    grace_period=STALE_SECONDS,
                    heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(MAX_RETRIES),
                )
            except (IntegrityError, ProgrammingError):  # two machines make the tables at the same time
                if attempt == 4:
                    raise
                time.sleep(0.5)
    except ImportError as error:
        raise UserError(f'--storage {shown} needs a driver: pip install "psycopg[binary]" ({error})') from None
    except (ArgumentError, NoSuchModuleError) as error:
        raise UserError(f"--storage {shown} is no database URL: {common.first_line(error)}") from None
    except (SQLAlchemyError, OSError) as error:
        raise UserError(f"--storage {shown} cannot be reached: {common.first_line(error)}") from None
    raise AssertionError("unreachable")


def open_study(plan: Plan, sampler_seed: int | None = None) -> optuna.Study:
    """Join the study, or create it."""
    samplers = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    pruners = {
        "median": optuna.pruners.MedianPruner(),
        "hyperband": optuna.pruners.HyperbandPruner(min_resource=1, max_resource=plan.recipe.epochs),
        "none": optuna.pruners.NopPruner(),
    }
    return optuna.create_study(
        storage=open_storage(plan.storage),
        study_name=plan.study_name,
        direction="maximize",
        sampler=samplers[plan.sampler](seed=sampler_seed),
        pruner=pruners[plan.pruner],
        load_if_exists=True,
    )


def move_aside(plan: Plan) -> None:
    """Keep the present study under another name, so that a new one can start."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    if is_database(plan.storage):
        storage = open_storage(plan.storage)
        for name in {plan.study_name, plan.study_name + CONTROL} & set(optuna.get_all_study_names(storage)):
            to = f"{name}-{stamp}"
            optuna.copy_study(from_study_name=name, from_storage=storage, to_storage=storage, to_study_name=to)
            optuna.delete_study(study_name=name, storage=storage)
    elif Path(plan.storage).exists():
        path = Path(plan.storage)
        path.rename(path.with_name(f"{path.stem}-{stamp}{path.suffix}"))


def describe(dataset: common.Dataset, plan: Plan) -> dict[str, Any]:
    """What must not change within one study: the pictures, the search space, the recipe of a trial."""
    space = optuna.trial.FixedTrial(default_params())
    suggest(space)
    pixels: Any = dataset.train_images.permute(0, 2, 3, 1).contiguous().numpy()
    return {
        "dataset": f"{dataset.source} (crc32 {zlib.crc32(pixels):08x})",
        "pictures": plan.pictures,
        **asdict(plan.recipe),
        **{f"range of {name}": distribution_to_json(space) for name, space in space.distributions.items()},
    }


def prepare_study(plan: Plan, dataset: common.Dataset, fresh: bool) -> optuna.Study:
    """Open the study for this run: healed, checked, orphans retried, the default configuration enqueued."""
    if fresh:
        move_aside(plan)
    if not is_database(plan.storage):
        repair_journal(Path(plan.storage))
    study = open_study(plan)
    now = json.loads(json.dumps(describe(dataset, plan)))
    before = study.user_attrs.get("description")
    if before is None:
        study.set_user_attr("description", now)
    elif before != now:
        key = next(key for key in {**before, **now} if before.get(key) != now.get(key))
        raise UserError(
            f"the stored study is another one ({key}: {before.get(key)}, now {now.get(key)}); "
            "--fresh moves it aside, or choose another --output-dir or --storage"
        )
    study.enqueue_trial(default_params(), skip_if_exists=True)
    if not is_database(plan.storage):  # this run holds the folder: whatever was running there is dead
        reap(study, lambda trial: True)
    return study


def reap(study: optuna.Study, is_orphan: Callable[[FrozenTrial], bool]) -> None:
    """Mark orphaned running trials as failed and enqueue their parameters again."""
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        if is_orphan(trial):
            try:
                study.tell(trial.number, state=TrialState.FAIL)
            except ValueError:  # finished in the meantime, or reaped by another machine
                continue
            trial.user_attrs.clear()  # the new trial has no owner yet
            RetryHeartbeatStaleTrialCallback(MAX_RETRIES)(study, trial)


def retried(trials: Sequence[FrozenTrial]) -> dict[int, int]:
    """{number of a trial whose worker died: number of the trial that took its parameters over}."""
    return {
        trial.system_attrs["retry_history"][-1]: trial.number
        for trial in trials
        if "retry_history" in trial.system_attrs
    }


def count_finished(trials: Sequence[FrozenTrial]) -> int:
    """Finished trials, without those that are tried again."""
    again = retried(trials)
    return sum(trial.state.is_finished() and trial.number not in again for trial in trials)


# ---------------------------------------------------------------- 3. worker processes


def quiet_optuna() -> None:
    """Leave the console to this script: its progress bar and tables say what Optuna's log would."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)


def wait_for_turn(study: optuna.Study, trials: int, deadline: float) -> bool:
    """Whether to start another trial; waits where the running ones, if they succeed, are enough."""
    while time.time() < deadline:
        optuna.storages.fail_stale_trials(study)
        everything = study.get_trials(deepcopy=False)
        finished = count_finished(everything)
        if finished >= trials:
            return False
        if finished + sum(trial.state == TrialState.RUNNING for trial in everything) < trials:
            return True
        time.sleep(0.2)
    return False


def work(plan: Plan, number: int, run: str, data: Path, runtime: common.Runtime, deadline: float) -> None:
    """One worker process: takes trial after trial until the study is done or the time is up."""
    common.end_with_parent()
    quiet_optuna()
    common.make_runtime(runtime.device, runtime.precision, 1)
    try:
        study = open_study(plan)
        # Every worker, every resumption and every machine draws other random numbers than the ones before.
        offset = zlib.crc32(run.encode()) if is_database(plan.storage) else 1000 * count_finished(study.trials)
        study = open_study(plan, (plan.seed + number + offset) % 2**32)
        dataset = common.open_shared(data)
        # "run" comes last: a trial that has it has the other, too, whenever another process looks.
        owner = {"worker": f"{number} ({platform.node()}, process {os.getpid()})", "run": run}
        objective = Objective(dataset, *split(dataset, plan.pictures), plan, runtime, owner)
        while wait_for_turn(study, plan.trials, deadline):
            # ValueError, UpdateFinishedTrialError: this worker was taken for dead and its trial is over. Go on.
            with contextlib.suppress(ValueError, optuna.exceptions.UpdateFinishedTrialError):
                study.optimize(objective, n_trials=1, catch=Exception)
    except Exception as error:
        print(f"worker {number}: {type(error).__name__}: {common.first_line(error)}", file=sys.stderr)
        sys.exit(1)


def search(study: optuna.Study, plan: Plan, data: Path, runtime: common.Runtime, workers: int, timeout: float) -> None:
    """Run the study in ``workers`` processes; on Ctrl-C stops them, and their trials will be tried again."""
    run, deadline = uuid.uuid4().hex, time.time() + timeout
    missing = plan.trials - count_finished(study.trials)
    if missing <= 0:
        return
    context = common.worker_context()
    processes = {
        f"{number}": context.Process(target=work, args=(plan, number, run, data, runtime, deadline), daemon=True)
        for number in range(min(workers, missing))
    }
    gone: set[str] = set()

    def is_orphan(trial: FrozenTrial) -> bool:
        owner = trial.user_attrs
        if "run" not in owner:  # killed between being created and being claimed, or about to be claimed
            started = trial.datetime_start
            return bool(gone) and started is not None and time.time() - started.timestamp() > 5
        return owner["run"] == run and owner["worker"].split()[0] in gone

    try:
        with common.interrupts_held():
            for process in processes.values():
                process.start()
        with tqdm(total=plan.trials, desc=plan.sampler, unit="trial", disable=None) as bar:
            while len(gone) < len(processes):
                time.sleep(0.2)
                for number, process in processes.items():
                    if number not in gone and not process.is_alive():
                        gone.add(number)
                        if process.exitcode:
                            bar.write(f"NOTE: worker {number} ended early (exit code {process.exitcode})", sys.stderr)
                reap(study, is_orphan)
                bar.n = count_finished(study.get_trials(deepcopy=False))
                with contextlib.suppress(ValueError):  # no complete trial yet
                    bar.set_postfix(best=f"{study.best_value:.4f}", refresh=False)
                bar.refresh()
    finally:
        for process in processes.values():
            if process.is_alive():
                process.terminate()
        for process in processes.values():
            if process.pid is not None:
                process.join()
        gone.update(processes)
        reap(study, is_orphan)
