"""What several test files share: real data, runs, a trained network, a folder of images, processes to wait for."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin slow down whatever runs beside the tests

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()  # no test touches the user's cache
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
ROOT = common.ROOT
PRELOAD = "pytest torch._dynamo scipy.stats alembic.command onnxruntime test_task3_kills"
# Processes that are to be killed fork from the server of all tests (below). The tests' own process cannot be forked:
# torch's threads do not survive it. Windows has no such server.
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
FORK = multiprocessing.get_context(METHOD)
MODES = ("RGB", "L", "P", "RGBA", "LA", "1", "I;16", "CMYK")

# A shell that starts the tests in the background has them ignore Ctrl-C, nohup a closing terminal, and the scripts that
# they start would, too.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def _server():
    """Workers fork from a server that has imported everything, and start in a blink, instead of in seconds.

    Scripts that run as processes of their own start their workers as users' do.
    """
    if METHOD == "forkserver":
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests"))))
            multiprocessing.set_forkserver_preload(PRELOAD.split())
            importlib.import_module("multiprocessing.forkserver").ensure_running()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Workers, "start_method", METHOD)
        yield


@pytest.fixture(scope="session", autouse=True)
def _embedded():
    """The embedded data set is read and checked once, not once per test; data of other folders always."""
    load, embedded = common.load_fashion_mnist, ROOT / "data"
    once = functools.cache(lambda: load(embedded))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "load_fashion_mnist", lambda folder: once() if folder == embedded else load(folder))
        yield


class InProcess(common.Workers):
    """Workers that are this process: a training takes a blink. They have the data of ``path``, or ``data``."""

    def __init__(
        self, count: int, runtime: common.Runtime, path: Path | None = None, data: common.Dataset | None = None
    ) -> None:
        super().__init__(count, runtime, path or Path())
        torch.set_num_threads(1)  # threads of threads wait for each other
        if data is not None:
            self.data = data

    @functools.cached_property
    def data(self) -> common.Dataset:
        return common.Dataset(**torch.load(self.path, weights_only=True))

    def run(self, function: Callable[..., common.Conversation], *arguments: object) -> common.Conversation:
        return (yield from function(self.data, self.runtime, *arguments))


def make_run(folder: Path, data: common.Dataset, workers: common.Workers | None = None) -> common.Run:
    """A real run on one CPU thread in fp32, in ``folder``, whose workers are this process."""
    runtime = common.Runtime("cpu", "fp32", 1)
    unfinished = folder / "unfinished_run"
    unfinished.mkdir(parents=True, exist_ok=True)
    workers = workers or InProcess(1, runtime, data=data)
    progress = common.Progress()
    return common.Run(data, runtime, workers, progress, folder, unfinished, common.find_environment(runtime))


@pytest.fixture(scope="session")
def fashion():
    return common.load_dataset("fashion_mnist")


@pytest.fixture(scope="session")
def runtime():
    runtime = common.Runtime("cpu", "fp32", 1)  # two threads wait for each other on a busy machine
    common.apply_runtime(runtime)
    return runtime


@pytest.fixture(scope="session")
def trained(fashion, runtime):
    """(model, its recipe, validation accuracy) after a short training on 4,000 images."""
    recipe = common.Recipe().replace(width=16, epochs=2, batch_size=128)
    split = common.split_dataset(fashion, 4000)
    model = common.make_model(recipe.network, fashion, split, seed=1)
    for _ in common.train_epochs(model, fashion, recipe.training, runtime, split.train, seed=1):
        pass
    logits = common.predict(model, fashion.train_images, runtime, split.validation)
    return model, recipe, common.score(logits, fashion.train_labels[split.validation]).accuracy


@pytest.fixture
def image_folder(tmp_path, fashion):
    """A folder {train,test}/<class>/* of real images (Fashion-MNIST), three classes of 24, of many sizes and modes."""
    from PIL import Image

    folder = tmp_path / "bücher und schuhe"
    parts = (("train", fashion.train_images, fashion.train_labels), ("test", fashion.test_images, fashion.test_labels))
    for split, images, labels in parts:
        for label in (0, 1, 9):
            target = folder / split / fashion.classes[label].replace("/", "-")
            target.mkdir(parents=True)
            for number, index in enumerate((labels == label).nonzero()[:24, 0]):
                mode = MODES[number % len(MODES)]
                image = Image.fromarray(images[index, 0].numpy()).resize((20 + 3 * number, 60 - 2 * number))
                if mode == "I;16":
                    image = Image.fromarray(np.asarray(image).astype("uint16") * 257)
                else:
                    image = image.convert(mode)
                image.save(target / f"{number}.{'jpg' if mode in ('RGB', 'CMYK') else 'png'}")
    return folder


def result_of(job: common.Conversation) -> Any:
    """What a job returns in the end."""
    while True:
        try:
            next(job)
        except StopIteration as end:
            return end.value


def wait_until(condition: Callable[[], object], process: Any) -> None:
    """Return as soon as ``condition()`` holds; fails where ``process`` ends before, or after 90 seconds."""
    end = time.monotonic() + 90
    while not condition():
        status = process.poll() if isinstance(process, subprocess.Popen) else process.exitcode
        assert status is None, process.output() if hasattr(process, "output") else status
        assert time.monotonic() < end
        time.sleep(0.05)


def workers_below(pid: int) -> list[int]:
    """The worker processes that ``pid`` has started, itself or by its server, and that still run (Linux)."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # gone in the meantime
        for children in Path(f"/proc/{pid}/task").glob("*/children"):  # every thread has its own
            for child in map(int, children.read_text().split()):
                if b"spawn_main" in (command := command_of(child)):
                    found.append(child)
                elif b"forkserver" in command:
                    found += [child] if b"forkserver" in command_of(pid) else workers_below(child)
    return found


def command_of(pid: int) -> bytes:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""
