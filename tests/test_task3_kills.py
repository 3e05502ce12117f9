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
from optuna.trial import TrialState
from test_task3 import load

import common
import task3_optuna as task3

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
ROOT, TESTS = common.ROOT, Path(__file__).parent
SMALL = ["--dataset", "fashion_mnist", "--images", "600", "--width", "16", "--batch-size", "64", "--retrain-seeds", "0"]


# ---------------------------------------------------------------- kills

DRIVER = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(TESTS)!r}]
from pathlib import Path
import torch
from test_task3 import take_part, tiny_data

torch.set_num_threads(1)  # a process with threads of OpenMP cannot be forked

data, folder = tiny_data(), Path(sys.argv[1])
for line in sys.stdin:  # every line: one start of the study, in a process of its own
    pid = os.fork()
    if pid == 0:
        take_part(folder, data, "--trials", 40, count=2)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_ten_kills_at_random_moments_lose_nothing(tmp_path):
    chance, pipes = (
        random.Random(0),
        {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL},
    )
    finished, sizes, log = {}, [], tmp_path / "study.log"
    with subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path)], text=True, bufsize=1, **pipes) as driver:
        for number in range(11):
            sizes.append(size(log))
            print("start", file=driver.stdin, flush=True)
            pid = int(driver.stdout.readline())
            if number < 10:
                wait_for(driver, lambda: size(log) > sizes[-1])  # it has begun to write
                time.sleep(chance.uniform(0.02, 0.5))
                os.kill(pid, signal.SIGKILL)
            assert int(driver.stdout.readline()) == (signal.SIGKILL if number < 10 else 0)
            trials = load(tmp_path).trials
            now = {t.number: (t.state, t.value, t.params) for t in trials if t.state.is_finished()}
            assert finished.items() <= now.items()  # what was finished stays as it was
            finished = now
        driver.stdin.close()
    again = task3.retried(trials)
    assert len(again) >= 4  # the kills did hit running trials
    assert all(trials[number].state == TrialState.FAIL for number in again)
    assert sum(trial.state in task3.DONE for trial in trials) == 40
    assert TrialState.RUNNING not in {trial.state for trial in trials}
    for old, new in again.items():  # what was drawn before the kill is tried again
        assert trials[old].params.items() <= trials[new].params.items()


def start(*options: object, code: str = "", **environment: str) -> subprocess.Popen:
    """The script in a process group of its own; with ``code`` run before it."""
    line = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import task3_optuna as t; {code}; "
    line += "sys.exit(t.main(sys.argv[1:]))"
    command = [sys.executable, "-c", line] if code else [sys.executable, "task3_optuna.py"]
    command += [*SMALL, *map(str, options)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, env=os.environ | environment, **pipes)


def workers_below(pid: int) -> list[int]:
    """The worker processes that ``pid`` has started and that still run (Linux)."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found += [int(child)] * (b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes())
    return found


def wait_for(script: subprocess.Popen, condition) -> None:
    end = time.monotonic() + 90
    while not condition():
        assert script.poll() is None, script.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)


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


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for worker processes in Linux's /proc")
def test_a_killed_worker_ctrl_c_and_a_killed_script(tmp_path):
    options = ("--epochs", 12, "--trials", 500, "--workers", 2, "--pruner", "none", "--output-dir", tmp_path)
    script = start(*options)
    wait_for(script, lambda: is_at_work(tmp_path))
    os.kill(workers_below(script.pid)[0], signal.SIGKILL)
    wait_for(script, lambda: trials_of(tmp_path, TrialState.FAIL))
    wait_for(script, lambda: is_at_work(tmp_path))  # it goes on, with a new worker
    os.killpg(script.pid, signal.SIGINT)  # as a terminal does: to all processes
    output, errors = script.communicate(timeout=30)
    assert script.returncode == 130, errors
    assert errors.strip().splitlines()[-1] == "interrupted"
    assert "Traceback" not in errors
    assert "Best trial" in output
    assert json.loads((tmp_path / "summary.json").read_text())["interrupted"] is True
    table = pd.read_csv(tmp_path / "trials.csv")
    reasons = table["reason"][table["state"] == "fail"]
    assert len(reasons) == 3
    assert reasons.str.contains("its worker died; tried again as trial").all()
    complete = table[table["state"] == "complete"]
    assert len(complete)
    assert {path.name for path in tmp_path.glob(".*")} <= {".lock"}  # no copy of the data stays

    script = start(*options)
    wait_for(script, lambda: is_at_work(tmp_path))
    pids = workers_below(script.pid)
    script.kill()
    script.communicate()
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)  # no orphans go on computing
    kept = {trial.number: trial.value for trial in trials_of(tmp_path, TrialState.COMPLETE)}
    assert dict(zip(complete["number"], complete["value"], strict=True)).items() <= kept.items()

    script = start(*options)  # and SIGTERM, before anything new is finished
    wait_for(script, lambda: workers_below(script.pid))
    script.terminate()
    output, errors = script.communicate(timeout=30)
    assert (script.returncode, errors.strip().splitlines()[-1]) == (143, "terminated")
    assert {path.name for path in tmp_path.glob(".*")} <= {".lock"}
    assert not load(tmp_path).get_trials(states=(TrialState.RUNNING,))


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


def test_two_machines_share_a_study_one_dies_and_the_server_is_restarted(postgres, tmp_path):
    url, restart = postgres
    options = ("--workers", 1, "--epochs", 6, "--trials", 999, "--pruner", "none", "--storage", url)
    impatient = "t.HEARTBEAT_SECONDS, t.STALE_SECONDS = 1, 8"
    zones = ({"TZ": "Asia/Tokyo", "PGTZ": "Asia/Tokyo"}, {"TZ": "America/Lima", "PGTZ": "America/Lima"})
    one, two = (start(*options, "--output-dir", tmp_path / zone["TZ"][:4], code=impatient, **zone) for zone in zones)
    storage = task3.open_database(url)

    def trials() -> list:
        with contextlib.suppress(KeyError):  # no study yet
            return optuna.load_study(study_name=task3.STUDY, storage=storage).trials
        return []

    def running(process: subprocess.Popen) -> list[int]:
        mine = [t for t in trials() if t.user_attrs.get("worker", "").endswith(f"process {process.pid}")]
        return [trial.number for trial in mine if trial.state == TrialState.RUNNING and trial.intermediate_values]

    wait_for(one, lambda: running(one) and running(two))
    one.kill()  # its worker notices and ends: nobody tidies up but the other machine
    one.communicate()
    (victim,) = running(one)
    restart()
    wait_for(two, lambda: trials()[task3.retried(trials()).get(victim, victim)].state in task3.DONE)
    again = task3.retried(trials())
    assert list(again) == [victim]  # and no living trial was taken for dead, whatever its clock says
    assert trials()[victim].state == TrialState.FAIL
    assert trials()[again[victim]].params == trials()[victim].params
    os.killpg(two.pid, signal.SIGINT)
    output, errors = two.communicate(timeout=60)
    assert two.returncode == 130, errors
    assert "Traceback" not in errors
    assert "secret" not in output + errors + (tmp_path / "Amer" / "config.json").read_text()
    assert not [trial for trial in trials() if trial.state == TrialState.RUNNING]
