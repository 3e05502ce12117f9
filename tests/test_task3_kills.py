"""Task 3 survives: kills at any moment, a killed worker, Ctrl-C, and a study that two machines share."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from conftest import ROOT, last_json, load, read_trials, take_part, tiny_plan, workers_below
from optuna.trial import TrialState

import common
import task3_study as studies

pytestmark = [
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
    pytest.mark.filterwarnings("ignore:Fixed parameter"),  # of the test that provokes a divergence
]
SCRIPT = "task3_optuna.py"
OPTIONS = ("--dataset", "fashion_mnist", "--quick", "--workers", "2")


# ---------------------------------------------------------------- kills

DRIVER = """
import os, sys, time
sys.path.insert(0, {root!r})
sys.path.insert(0, {tests!r})
import common, task3_study as studies, torch
from pathlib import Path
from conftest import tiny_plan

data, folder = Path({data!r}), Path({folder!r})
plan = tiny_plan(folder, trials={trials})
dataset, runtime = common.open_shared(data), common.make_runtime("cpu", "fp32", 1)
for line in sys.stdin:  # every line: one start of the study, in a process group of its own
    pid = os.fork()
    if pid == 0:
        os.setsid()
        run = line.strip()
        studies.prepare_study(plan, dataset, fresh=False)
        second = os.fork()
        studies.work(plan, 0 if second else 1, run, data, runtime, time.time() + 100)
        if second:
            os.waitpid(second, 0)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


def test_ten_kills_at_random_moments_lose_nothing(tiny, tmp_path):
    chance = random.Random(0)
    with common.shared_dataset(tiny) as data:
        code = DRIVER.format(root=str(ROOT), tests=str(ROOT / "tests"), data=str(data), folder=str(tmp_path), trials=40)
        driver = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        finished: dict[int, tuple] = {}
        for number in range(11):
            print(f"run{number}", file=driver.stdin, flush=True)
            pid = int(driver.stdout.readline())
            if number < 10:
                time.sleep(chance.uniform(0.1, 0.6))
                os.killpg(pid, signal.SIGKILL)
            status = int(driver.stdout.readline())
            if number < 10:
                assert status == signal.SIGKILL
            studies.repair_journal(tmp_path / "study.log")
            trials = load(tmp_path).trials
            now = {t.number: (t.state, t.value, t.params) for t in trials if t.state.is_finished()}
            assert finished.items() <= now.items()  # what was finished stays as it was
            finished = now
        driver.stdin.close()
        assert driver.wait(10) == 0
    again = studies.retried(trials)
    assert len(again) >= 5  # the kills did hit running trials
    states = [trial.state for trial in trials if trial.number not in again]
    assert all(trials[number].state == TrialState.FAIL for number in again)
    assert TrialState.RUNNING not in states
    assert sum(state.is_finished() for state in states) in (40, 41)  # two workers may start the last one together
    for old, new in again.items():  # what was drawn before the kill is tried again
        assert trials[old].params.items() <= trials[new].params.items()


def test_a_trial_that_names_its_run_names_its_worker_too(tiny, runtime, tmp_path, monkeypatch):
    """Another process may look between the two attributes: the run, by which orphans are told, has to come last."""
    names = []

    class Watched(studies.Objective):
        def __call__(self, trial):
            set_attribute = trial.set_user_attr
            trial.set_user_attr = lambda name, value: (names.append(name), set_attribute(name, value))
            return super().__call__(trial)

    monkeypatch.setattr(studies, "Objective", Watched)
    take_part(tiny_plan(tmp_path, trials=1), tiny, runtime)
    assert names.index("worker") < names.index("run")


def workers_of(process: subprocess.Popen, folder: Path) -> list[int]:
    """The worker processes that have a running trial, once there are two and a trial is finished."""
    end = time.time() + 60
    while time.time() < end:
        time.sleep(0.2)
        log = folder / "study.log"
        if log.exists():
            trials = load(folder).trials
            running = [t for t in trials if t.state == TrialState.RUNNING and "worker" in t.user_attrs]
            pids = [int(re.search(r"process (\d+)", trial.user_attrs["worker"])[1]) for trial in running]
            alive = [pid for pid in pids if pid in workers_below(process.pid)]
            if len(alive) == 2 and any(t.state == TrialState.COMPLETE for t in trials):
                return alive
    raise AssertionError("no two workers at work within 60 s")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for worker processes in Linux's /proc")
def test_a_killed_worker_ctrl_c_and_a_killed_script(picture_folder, tmp_path):
    command = [sys.executable, SCRIPT, "--dataset", str(picture_folder), "--width", "16", "--epochs", "60"]
    command += ["--trials", "500", "--workers", "2", "--output-dir", str(tmp_path)]

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    script = start()
    first, second = workers_of(script, tmp_path)
    os.kill(first, signal.SIGKILL)
    time.sleep(1.5)
    assert script.poll() is None  # the other goes on
    assert second in workers_below(script.pid)
    os.killpg(script.pid, signal.SIGINT)  # as a terminal does: to all processes
    output, errors = script.communicate(timeout=30)
    assert script.returncode == 130, errors
    assert "ended early (exit code -9)" in errors
    assert "Traceback" not in errors
    assert last_json(output)["interrupted"] is True
    reasons = [row["reason"] for row in read_trials(tmp_path) if row["state"] == "fail"]
    assert len(reasons) == 2
    assert all("its worker died; tried again as trial" in reason for reason in reasons)
    finished = [row for row in read_trials(tmp_path) if row["state"] == "complete"]
    assert finished

    script = start()
    pids = workers_of(script, tmp_path)
    script.kill()
    script.communicate()
    end = time.time() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.time() < end:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)  # no orphans go on computing
    plan = replace(tiny_plan(tmp_path), storage=str(tmp_path / "study.log"))
    studies.repair_journal(tmp_path / "study.log")
    study = studies.open_study(plan)
    studies.reap(study, lambda trial: True)
    kept = {(str(trial.number), trial.value) for trial in study.trials if trial.state == TrialState.COMPLETE}
    assert {(row["number"], float(row["value"])) for row in finished} <= kept
    assert not study.get_trials(states=(TrialState.RUNNING,))


# ---------------------------------------------------------------- many machines


@pytest.fixture
def postgres(tmp_path_factory):
    """URL of an empty database of a PostgreSQL server that was started for this test."""
    pytest.importorskip("psycopg", reason='no psycopg: pip install "psycopg[binary]"')
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin")) or [
        Path(found).resolve().parent for found in [shutil.which("pg_ctl")] if found
    ]
    if not binaries:
        pytest.skip("no PostgreSQL server on this machine: apt-get install postgresql")
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="pg"))  # a short path: that of a socket is limited to 107 bytes
    user: dict = {}
    if os.geteuid() == 0:  # the server refuses to run as root
        import pwd

        entry = (
            pwd.getpwnam("postgres") if "postgres" in {e.pw_name for e in pwd.getpwall()} else pwd.getpwnam("nobody")
        )
        os.chown(folder, entry.pw_uid, entry.pw_gid)
        user = {"user": entry.pw_uid, "group": entry.pw_gid, "cwd": folder}

    def call(*command: str) -> None:
        done = subprocess.run([str(binaries[-1] / command[0]), *command[1:]], capture_output=True, text=True, **user)
        assert done.returncode == 0, done.stdout + done.stderr

    base = str(folder / "data")
    call("initdb", "-D", base, "-U", "lab", "--auth=trust", "--no-sync")
    port = 40_000 + os.getpid() % 20_000
    call(
        *("pg_ctl", "-D", base, "-w", "-l", str(folder / "log")),
        *("-o", f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off", "start"),
    )
    try:
        yield f"postgresql://lab:secret@127.0.0.1:{port}/postgres"
    finally:
        call("pg_ctl", "-D", base, "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


def test_separately_started_processes_share_one_postgresql_study_and_one_may_die(postgres, tmp_path):
    command = [sys.executable, SCRIPT, "--dataset", "fashion_mnist", "--quick", "--workers", "1", "--trials", "8"]
    command += ["--retrain-seeds", "0", "--storage", postgres]
    scripts = [
        subprocess.Popen(
            [*command, "--output-dir", str(tmp_path / name)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    storage = studies.open_storage(postgres)
    end = time.time() + 60
    victim = None
    while victim is None and time.time() < end:  # the first script's worker, in the middle of a trial
        time.sleep(0.05)
        for study in optuna.get_all_study_names(storage):
            for trial in optuna.load_study(study_name=study, storage=storage).get_trials(states=(TrialState.RUNNING,)):
                found = re.search(r"process (\d+)", trial.user_attrs.get("worker", ""))
                if found and int(found[1]) in workers_below(scripts[0].pid):
                    victim = trial.number
                    scripts[0].kill()  # its worker notices and ends: nobody tidies up but the other machine
    assert victim is not None
    output, errors = scripts[1].communicate(timeout=60)
    scripts[0].communicate()
    assert scripts[1].returncode == 0, errors
    assert "secret" not in output + errors + (tmp_path / "two" / "config.json").read_text()
    trials = optuna.load_study(study_name="small-cnn", storage=storage).trials
    again = studies.retried(trials)
    assert victim in again
    assert trials[victim].state == TrialState.FAIL
    assert all(trial.state.is_finished() for trial in trials)
    assert studies.count_finished(trials) in (8, 9)
    assert last_json(output)["n_trials"]["finished"] == len(trials)
