"""Task 3 survives: kills at any moment, a killed worker, Ctrl-C, SIGTERM, and a database that machines share."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import optuna
import pandas as pd
import pytest
import torch
from conftest import FORK, InProcess, wait_until, workers_below
from optuna.trial import TrialState
from test_task3 import load, take_part, tiny_data

import common
import task3_optuna as task3

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
SMALL = ["--images", "600", "--width", "16", "--batch-size", "64", "--retrain-seeds", "0"]


# ---------------------------------------------------------------- kills


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """200 and 1,000 real images."""
    paths = [tmp_path_factory.mktemp("data") / f"{each}.pt" for each in (20, 100)]
    for path in paths:
        common.share_dataset(path, tiny_data(int(path.stem)))
    return paths


def read(path: Path) -> common.Dataset:
    return common.Dataset(**torch.load(path, weights_only=True))


def take_part_in(folder: Path, data: Path) -> None:
    take_part(folder, read(data), "--trials", 30, count=2)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_ten_kills_at_random_moments_lose_nothing(files, tmp_path):
    chance, finished, log = random.Random(0), {}, tmp_path / "study.log"
    for number in range(11):
        before = size(log)
        process = FORK.Process(target=take_part_in, args=(tmp_path, files[0]))
        process.start()
        if number < 10:
            written = chance.uniform(100, 8_000)  # bytes: within the first three trials or so, on a fast machine, too
            while size(log) < before + written:
                assert process.exitcode is None
                time.sleep(chance.uniform(0, 0.02))
            process.kill()
        process.join()
        assert process.exitcode == (-signal.SIGKILL if number < 10 else 0)
        trials = load(tmp_path).trials
        now = {t.number: (t.state, t.value, t.params) for t in trials if t.state.is_finished()}
        assert finished.items() <= now.items()  # what was finished stays as it was
        finished = now
    again = task3.retried(trials)
    assert len(again) >= 4  # the kills did hit running trials
    assert all(trials[number].state == TrialState.FAIL for number in again)
    assert sum(trial.state in task3.DONE for trial in trials) == 30
    assert TrialState.RUNNING not in {trial.state for trial in trials}
    for old, new in again.items():  # what was drawn before the kill is tried again
        assert trials[old].params.items() <= trials[new].params.items()


class Script:
    """The script in a process group of its own, drawing no figures.

    ``here``: it trains in its own process, with many heartbeats.
    """

    def __init__(self, data: Path, *options: object, folder: Path, here: bool = False, **environment: str):
        arguments = [*SMALL, *map(str, options), "--output-dir", str(folder)]
        self.files = [folder.with_suffix(suffix) for suffix in (".stdout", ".stderr")]
        self.process = FORK.Process(target=run_script, args=(data, arguments, self.files, here, environment))
        self.process.start()
        self.pid = self.process.pid

    @property
    def exitcode(self) -> int | None:
        return self.process.exitcode

    def output(self) -> list[str]:
        return [path.read_text() if path.exists() else "" for path in self.files]

    def end(self, number: int) -> tuple[int | None, str, str]:
        """Send a signal, Ctrl-C to the whole group, as a terminal does: (exit status, stdout, stderr)."""
        (os.killpg if number == signal.SIGINT else os.kill)(self.pid, number)
        self.process.join(30)
        return self.exitcode, *self.output()


def run_script(data: Path, arguments: list[str], files: list[Path], here: bool, environment: dict[str, str]) -> None:
    os.setsid()
    os.environ.update(environment)
    time.tzset()
    for number, path in enumerate(files, 1):
        with path.open("w") as stream:
            os.dup2(stream.fileno(), number)
    common.load_data = lambda _: read(data)
    task3.draw_figures = lambda *_: None
    if here:
        common.Workers = InProcess
        task3.HEARTBEAT_SECONDS = 1
    sys.exit(task3.main(arguments))


def trials_of(folder: Path, *states: TrialState) -> list:
    """Read beside the script that writes: nothing is repaired."""
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "study.log")))
    return optuna.load_study(study_name=task3.STUDY, storage=storage).get_trials(states=states)


def is_at_work(folder: Path) -> bool:
    """Whether a trial is complete and two are in the middle of their epochs."""
    with contextlib.suppress(KeyError, OSError):
        running = [t for t in trials_of(folder, TrialState.RUNNING) if t.intermediate_values]
        return len(running) == 2 and bool(trials_of(folder, TrialState.COMPLETE))
    return False


def hidden_files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob(".*")} - {".lock"}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for worker processes in Linux's /proc")
def test_a_killed_worker_a_killed_script_ctrl_c_and_sigterm(files, tmp_path):
    folder = tmp_path / "study"
    options = ("--epochs", 6, "--trials", 500, "--workers", 2, "--pruner", "none")
    script = Script(files[1], *options, folder=folder)
    wait_until(lambda: workers_below(script.pid), script)
    os.kill(workers_below(script.pid)[0], signal.SIGKILL)
    wait_until(lambda: task3.retried(trials_of(folder, *task3.DONE)), script)  # it goes on, with a new worker
    wait_until(lambda: is_at_work(folder), script)
    pids = workers_below(script.pid)
    assert len(pids) == 2
    os.kill(pids[0], signal.SIGKILL)  # in the middle of an epoch
    wait_until(lambda: len(trials_of(folder, TrialState.FAIL)) == 2, script)
    wait_until(lambda: is_at_work(folder), script)
    pids = set(pids) | set(workers_below(script.pid))
    script.end(signal.SIGKILL)
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)  # no orphans go on computing
    complete = {trial.number: trial.value for trial in trials_of(folder, TrialState.COMPLETE)}
    assert complete

    for sent, status, word in ((signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")):
        script = Script(files[1], *options, folder=folder)  # the same study goes on
        wait_until(lambda script=script: len(workers_below(script.pid)) == 2, script)
        wait_until(lambda: len(trials_of(folder, TrialState.RUNNING)) == task3.AHEAD, script)
        exitcode, output, errors = script.end(sent)
        assert (exitcode, errors.strip().splitlines()[-1]) == (status, word)
        assert "Traceback" not in errors
        assert "Best trial" in output
        assert json.loads((folder / "summary.json").read_text())["interrupted"] is True
        assert {path.name for path in folder.glob(".*")} <= {".lock"}  # no copy of the data stays
        table = pd.read_csv(folder / "trials.csv").set_index("number")
        assert complete.items() <= table["value"][table["state"] == "complete"].to_dict().items()
        lost = table["reason"][table["state"] == "fail"]
        again = "(?:its worker died|interrupted); tried again as trial"
        assert lost.str.contains(f"^{again}|^a worker process ended|^interrupted").all()  # some of them the fourth time
    # With a worker; with the script, Ctrl-C and SIGTERM, those in the workers and those that waited for one.
    assert 2 + 3 * 2 <= len(lost) <= 2 + 3 * task3.AHEAD
    assert not load(folder).get_trials(states=(TrialState.RUNNING,))


# ---------------------------------------------------------------- many machines


@pytest.fixture
def postgres():
    """(URL, a function that restarts it) of a PostgreSQL server that was started for this test."""
    pytest.importorskip("psycopg", reason='no psycopg: pip install "psycopg[binary]"')
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not binaries and not (found := shutil.which("pg_ctl")):
        pytest.skip("no PostgreSQL server on this machine: apt-get install postgresql")
    binary = binaries[-1] if binaries else Path(found).resolve().parent
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # a short path: that of a socket is limited to 107 bytes
    user: dict = {}
    if os.geteuid() == 0:  # the server refuses to run as root
        import pwd

        entry = pwd.getpwnam("postgres" if "postgres" in {e.pw_name for e in pwd.getpwall()} else "nobody")
        os.chown(folder, entry.pw_uid, entry.pw_gid)
        user = {"user": entry.pw_uid, "group": entry.pw_gid, "cwd": folder}

    def call(*command: str) -> None:
        done = subprocess.run([str(binary / command[0]), *command[1:]], capture_output=True, text=True, **user)
        assert done.returncode == 0, done.stdout + done.stderr

    base, port = str(folder / "data"), 40_000 + os.getpid() % 20_000
    call("initdb", "-D", base, "-U", "lab", "--auth=trust", "--no-sync")
    settings = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    call("pg_ctl", "-D", base, "-w", "-l", str(folder / "log"), "-o", settings, "start")
    try:
        restart = ("pg_ctl", "-D", base, "-w", "-l", str(folder / "log"), "-m", "fast", "restart")
        yield f"postgresql://lab:secret@127.0.0.1:{port}/postgres", lambda: call(*restart)
    finally:
        call("pg_ctl", "-D", base, "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


def test_two_machines_share_a_study_one_dies_and_the_server_is_restarted(postgres, files, tmp_path):
    import psycopg

    url, restart = postgres
    options = ("--workers", 1, "--epochs", 6, "--trials", 999, "--pruner", "none", "--storage", url)
    zones = ({"TZ": "Asia/Tokyo", "PGTZ": "Asia/Tokyo"}, {"TZ": "America/Lima", "PGTZ": "America/Lima"})
    one, two = (Script(files[1], *options, folder=tmp_path / zone["TZ"][:4], here=True, **zone) for zone in zones)
    storage = task3.open_database(url)

    def trials() -> list:
        with contextlib.suppress(KeyError):  # no study yet
            return optuna.load_study(study_name=task3.STUDY, storage=storage).trials
        return []

    def running(script: Script) -> list[int]:
        mine = [t for t in trials() if t.user_attrs.get("worker", "").endswith(f"process {script.pid}")]
        return [trial.number for trial in mine if trial.state == TrialState.RUNNING]

    def is_training(script: Script) -> bool:
        return any(trials()[number].intermediate_values for number in running(script))

    def caught_at_work(script: Script) -> bool:
        os.kill(script.pid, signal.SIGSTOP)
        if not (found := is_training(script)):
            os.kill(script.pid, signal.SIGCONT)
        return bool(found)

    wait_until(lambda: is_training(two) and caught_at_work(one), one)
    one.end(signal.SIGKILL)  # nobody tidies up but the other machine
    victims = running(one)
    restart()
    with psycopg.connect(url, autocommit=True) as connection:  # time passes
        ids = ", ".join(str(trials()[victim]._trial_id) for victim in victims)
        long_ago = f"heartbeat - interval '{task3.STALE_SECONDS + 1} seconds' WHERE trial_id IN ({ids})"
        aged = connection.execute(f"UPDATE trial_heartbeats SET heartbeat = {long_ago}").rowcount
        assert aged == len(victims) >= 2  # from the moment on when it was drawn

    def is_made_up_for() -> bool:
        now = trials()
        again = task3.retried(now)
        return all(now[again.get(victim, victim)].state in task3.DONE for victim in victims)

    wait_until(is_made_up_for, two)
    again = task3.retried(trials())
    assert sorted(again) == victims  # and no living trial was taken for dead, whatever its clock says
    for victim in victims:
        assert trials()[victim].state == TrialState.FAIL
        assert trials()[victim].params.items() <= trials()[again[victim]].params.items()
    status, output, errors = two.end(signal.SIGINT)
    assert status == 130, errors
    assert "Traceback" not in errors
    published = [(tmp_path / "Amer" / name).read_text() for name in ("config.json", "report.md")]
    assert "secret" not in output + errors + "".join(published)
    assert all("postgresql://127.0.0.1" in text for text in published)
    assert not [trial for trial in trials() if trial.state == TrialState.RUNNING]
