"""Worker processes: results, ends, Ctrl-C."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, wait_until, workers_below

import common
from common import UserError


def test_parallel_results_arrive_with_their_number(runtime):
    results = dict(common.run_parallel(math.factorial, [(n,) for n in (3, 1, 5)], 2, runtime))
    assert results == {0: 6, 1: 1, 2: 120}


@pytest.mark.skipif(sys.platform != "linux", reason="the fork server is for Linux")
def test_workers_are_forked_from_a_server_or_spawned_as_asked(runtime):
    def parent(**options):
        return dict(common.run_parallel(os.getppid, [()], 1, runtime, **options))[0]

    assert parent() == parent() != os.getpid()  # one server for all
    assert parent(spawned=True) == os.getpid()


@pytest.mark.skipif(sys.platform != "linux", reason="the fork server is for Linux")
def test_workers_are_spawned_where_no_server_can_listen(monkeypatch):
    def ensure_running():
        raise OSError("AF_UNIX path too long")

    assert common.worker_context().get_start_method() == "forkserver"
    monkeypatch.setattr("multiprocessing.forkserver.ensure_running", ensure_running)
    assert common.worker_context().get_start_method() == "spawn"


def test_killed_worker_is_one_clear_error(runtime):
    with pytest.raises(UserError, match="killed"):
        list(common.run_parallel(os._exit, [(9,)], 1, runtime))


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill is another thing there")
@pytest.mark.parametrize("threads", [0, 1])  # the system may hand a signal to any thread that does not block it
def test_ctrl_c_while_processes_are_started_comes_afterwards(threads):
    for _ in range(threads):
        threading.Thread(target=time.sleep, args=(0.5,)).start()
    ended = []

    def start_processes():
        with common.interrupts_held():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        start_processes()
    assert ended


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("started", [2, 4])  # multiprocessing's resource tracker and the fork server; two workers
def test_ctrl_c_while_workers_start_or_work_is_one_line(started, tmp_path):
    body = "common.run_script(lambda: len(list(common.run_parallel(time.sleep, [(99,)] * 2, 2, runtime))))"
    code = f"import sys, time, common; runtime = common.Runtime('cpu', 'fp32', 1); sys.exit({body})"
    with (tmp_path / "errors").open("w") as errors:  # no pipe: the server may still import torch for a while
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=errors, start_new_session=True)
    wait_until(lambda: len(workers_below(process.pid)) >= started, process)
    processes = workers_below(process.pid)
    states = [Path(f"/proc/{child}/status").read_text() for child in processes]
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130  # a loaded machine takes seconds to import torch
    for state in states:  # ignored or blocked from the first moment, so that no child says anything
        masks = re.findall(r"Sig(?:Ign|Blk):\s+(\w+)", state)
        assert any(int(mask, 16) & 1 << (signal.SIGINT - 1) for mask in masks)
    end = time.time() + 30
    while any(Path(f"/proc/{child}").exists() for child in processes) and time.time() < end:
        time.sleep(0.1)  # whoever wants to say something has said it
    assert (tmp_path / "errors").read_text() == "interrupted\n"
