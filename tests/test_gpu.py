"""What only a GPU can show: `python -m pytest -q -m gpu` runs these; elsewhere they say that they were skipped."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch

import common

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]
RECIPE = common.Recipe(
    common.Network(model="PlainCNN", width=16), common.Training(optimizer="SGD", lr=0.05, epochs=1, batch_size=64)
)


@pytest.fixture(scope="module")
def gpu():
    runtime = common.resolve_runtime("cuda", "fp32", 1)
    common.apply_runtime(runtime)
    return runtime


@pytest.fixture(scope="module")
def small(fashion):
    """The data set, cut to 1,280 training images."""
    few = torch.arange(1280)
    return replace(fashion, train_images=fashion.train_images[few], train_labels=fashion.train_labels[few])


def test_predictions_and_training_are_those_of_the_cpu(small, runtime, gpu):
    split = common.split_dataset(small)
    losses = {}
    logits = {}
    for where in (runtime, gpu):
        model = common.make_model(RECIPE.network, small, split)
        logits[where.device] = common.predict(model, small.test_images[:200], where)
        epoch = next(common.train_epochs(model, small, RECIPE.training, where, split.train))
        losses[where.device] = epoch.step_losses
        assert {weight.device.type for weight in model.parameters()} == {where.device}
    assert torch.allclose(logits["cpu"], logits["cuda"], atol=1e-4)
    assert losses["cpu"][:5] == pytest.approx(losses["cuda"][:5], rel=1e-3)
    assert all(map(math.isfinite, losses["cuda"]))


@pytest.mark.parametrize("preset", ["PlainCNN", *common.PRESETS])
def test_nothing_waits_for_the_device_within_an_epoch(small, gpu, preset):
    split = common.split_dataset(small)
    recipe = RECIPE if preset == "PlainCNN" else common.PRESETS[preset].replace(epochs=1, batch_size=64)
    waits = {}
    for steps in (4, 12):
        model = common.make_model(recipe.network, small, split)
        epochs = common.train_epochs(model, small, recipe.training, gpu, split.train[: 64 * steps])
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                next(epochs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits[steps] = sum("synchroniz" in str(warning.message) for warning in caught)
    assert waits[4] == waits[12]


def test_fp32_is_not_tf32_and_bf16_is_chosen_where_it_is_native(gpu):
    assert common.resolve_runtime("auto", "auto", 1) == common.Runtime("cuda", "bf16", 1)
    a, b = torch.rand(2, 512, 512, device=gpu.device).unbind()
    assert ((a @ b).double() - a.double() @ b.double()).abs().max() < 1e-3


@pytest.mark.parametrize("script", ["task2_optimizers", "task3_optuna", "task4_onnx"])
def test_quick_runs_go_through_on_the_gpu(script, tmp_path):
    command = [sys.executable, str(common.ROOT / f"{script}.py"), "--quick", "--dataset", "fashion_mnist"]
    result = subprocess.run([*command, "--output-dir", tmp_path], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "cuda" in result.stdout
    assert (tmp_path / "report.md").exists()
