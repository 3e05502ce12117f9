"""What several test files share: real data, a trained network, one way to run a script."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

# Threads that wait sleep: spinning, they make everything many times slower as soon as something runs beside the tests.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import optuna
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import task3_study as studies

ROOT = common.ROOT

# A shell that starts the tests in the background has them ignore Ctrl-C, and the scripts that they start would, too.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def fashion():
    return common.load_dataset("fashion_mnist")


@pytest.fixture(scope="session")
def runtime():
    return common.make_runtime("cpu", "fp32", 2)


@pytest.fixture(scope="session")
def trained(fashion, runtime):
    """(model, validation accuracy) after a short training on 6,000 pictures."""
    recipe = common.Recipe(width=16, epochs=2, batch_size=128)
    model = common.make_model(fashion, recipe, seed=1)
    train, validation = common.split_validation(fashion.train_labels)
    history, _ = common.fit(
        model, fashion, recipe, runtime, train_index=train[::9], validation_index=validation, seed=1
    )
    return model, history[-1]["val_accuracy"]


def run(script: str, *options: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run a script of the lab as its users do."""
    command = [sys.executable, str(ROOT / script), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT)


def wait_until(condition: Callable[[], object], process: subprocess.Popen) -> None:
    """Return as soon as ``condition()`` holds; fails where ``process`` ends before."""
    while not condition():
        assert process.poll() is None
        time.sleep(0.01)


def workers_below(pid: int) -> list[int]:
    """The processes of multiprocessing that ``pid`` and its descendants have started and that still run (Linux).

    Others come and go: some libraries ask a tool something while they are imported.
    """
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # gone in the meantime
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found += [int(child)] * (b"multiprocessing" in Path(f"/proc/{child}/cmdline").read_bytes())
            found += workers_below(int(child))
    return found


def last_json(output: str) -> dict:
    """The compact JSON that every script prints last."""
    return json.loads(output.strip().splitlines()[-1])


@pytest.fixture
def picture_folder(tmp_path):
    """A folder {train,test}/<class>/* of real pictures (Fashion-MNIST), of many sizes and modes."""
    from PIL import Image

    data = common.load_dataset("fashion_mnist")
    modes = ["RGB", "L", "P", "RGBA", "LA", "1", "I;16", "CMYK"]
    folder = tmp_path / "bücher und schuhe"
    for split, images, labels in (
        ("train", data.train_images, data.train_labels),
        ("test", data.test_images, data.test_labels),
    ):
        for label in (0, 1, 9):
            target = folder / split / data.classes[label].replace("/", "-")
            target.mkdir(parents=True)
            for number, index in enumerate((labels == label).nonzero()[:24, 0]):
                mode = modes[number % len(modes)]
                picture = Image.fromarray(images[index, 0].numpy()).resize((20 + 3 * number, 60 - 2 * number))
                if mode == "I;16":
                    wide = torch.from_numpy(__import__("numpy").asarray(picture).copy()).to(torch.int32) * 257
                    Image.fromarray(wide.numpy().astype("uint16")).save(target / f"{number}.png")
                else:
                    suffix = "jpg" if mode in ("RGB", "CMYK") else "png"
                    picture.convert(mode).save(target / f"{number}.{suffix}")
    return folder


# ---------------------------------------------------------------- studies of Task 3, on very few pictures


def load(folder: Path, name: str = "small-cnn") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=studies.open_storage(str(folder / "study.log")))


@pytest.fixture(scope="session")
def tiny(fashion) -> common.Dataset:
    """200 real pictures and no test set: a trial takes a blink."""
    order = torch.cat([(fashion.train_labels == label).nonzero()[:20, 0] for label in range(10)])
    return replace(
        fashion,
        train_images=fashion.train_images[order],
        train_labels=fashion.train_labels[order],
        test_images=fashion.test_images[:0],
        test_labels=fashion.test_labels[:0],
    )


def tiny_plan(folder: Path, **changes: object) -> studies.Plan:
    recipe = common.Recipe(width=16, epochs=3, batch_size=32)
    return replace(
        studies.Plan(str(folder / "study.log"), "small-cnn", "tpe", "median", 0, 15, recipe, None), **changes
    )


def take_part(plan: studies.Plan, dataset: common.Dataset, runtime: common.Runtime) -> optuna.Study:
    """The real worker loop, in this process."""
    study = studies.prepare_study(plan, dataset, fresh=False)
    with common.shared_dataset(dataset) as data:
        studies.work(plan, 0, "run", data, runtime, time.time() + 100)
    return study


def read_trials(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))
