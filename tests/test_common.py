"""The shared modules against references: slow loops, torch itself, published constants."""

from __future__ import annotations

import importlib
import itertools
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, wait_until

import common
from common import UserError

# ---------------------------------------------------------------- batches


def test_batched_crop_and_flip_equals_a_slow_loop(fashion):
    images = fashion.train_images[:40].expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    images[:, 2] = 255 - images[:, 2]
    index, flip = torch.tensor([5, 0, 39, 7, 7]), torch.tensor([True, False, True, False, True])
    batch = common.draw_batch(images, index, 3, torch.Generator().manual_seed(4), flip)
    shift = torch.randint(-3, 4, (2, 5, 1), generator=torch.Generator().manual_seed(4))[..., 0]
    for position, picture in enumerate(index):
        slow = images[picture].float()
        slow = F.pad(slow, (3, 3, 3, 3), mode="reflect")
        top, left = 3 + int(shift[0, position]), 3 + int(shift[1, position])
        slow = slow[:, top : top + 28, left : left + 28]
        assert torch.equal(batch[position].float(), slow.flip(2) if flip[position] else slow)


def test_without_padding_and_flip_a_batch_is_the_pictures(fashion):
    images = fashion.train_images[:9].expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    index = torch.tensor([3, 1, 2])
    batch = common.draw_batch(images, index, 0, torch.Generator())
    assert torch.equal(batch, images[index])
    assert batch.is_contiguous(memory_format=torch.channels_last)
    nowhere = torch.zeros(3, dtype=torch.bool)  # the same by the general way
    assert torch.equal(batch, common.draw_batch(images, index, 0, torch.Generator(), nowhere))


def test_training_shuffles_on_the_cpu_and_sees_every_picture_once(fashion, runtime, monkeypatch):
    seen = []
    draw = common.draw_batch
    monkeypatch.setattr(
        common, "draw_batch", lambda images, index, *rest: seen.append(index) or draw(images, index, *rest)
    )
    recipe, index = common.Recipe(width=16, epochs=2, batch_size=64), torch.arange(1000, 1256)
    common.fit(common.make_model(fashion, recipe), fashion, recipe, runtime, train_index=index)
    first, second = torch.cat(seen[:4]), torch.cat(seen[4:])
    assert torch.equal(first.sort().values, index)
    assert torch.equal(second.sort().values, index)
    assert not torch.equal(first, index)
    assert not torch.equal(first, second)


# ---------------------------------------------------------------- network


@pytest.mark.parametrize("stride", [1, 2])
def test_stem_whitens_patches(fashion, stride):
    model = common.make_model(fashion, common.Recipe(width=16, stem_stride=stride))
    pixels = (fashion.train_images[::31].float() / 255 - model.mean) / model.std
    filters = model.stem(pixels).transpose(0, 1).flatten(1)[: model.stem.out_channels // 2].detach()
    covariance = filters @ filters.T / filters.shape[1]
    assert torch.allclose(covariance, torch.eye(len(covariance)), atol=0.08)


@pytest.mark.parametrize(("stride", "growth"), [(1, (1, 4, 4)), (2, (2, 4))])
def test_fused_network_is_the_same_function(fashion, runtime, stride, growth, tmp_path):
    recipe = common.Recipe(width=16, stem_stride=stride, growth=growth, epochs=1, batch_size=64)
    common.fit(model := common.make_model(fashion, recipe), fashion, recipe, runtime, train_index=torch.arange(640))
    common.save_checkpoint(tmp_path / "m.pth", model, fashion, recipe)
    model, _ = common.load_checkpoint(tmp_path / "m.pth")
    images = fashion.test_images[:200]
    whole, fused = common.predict(model, images, runtime), common.predict(common.fuse(model), images, runtime)
    assert (whole - fused).abs().max() < 1e-4 * whole.abs().max()
    assert not [m for m in common.fuse(model).modules() if isinstance(m, torch.nn.BatchNorm2d)]
    channels = [m.out_channels for m in model.features if isinstance(m, torch.nn.Conv2d)]
    assert channels == [16 * factor for factor in growth for _ in range(2)]


def test_bf16_agrees_with_fp32_within_its_precision(trained, fashion, runtime):
    model, _ = trained
    exact = common.predict(model, fashion.test_images[:500], runtime)
    rounded = common.predict(model, fashion.test_images[:500], replace(runtime, precision="bf16"))
    assert (exact - rounded).abs().max() < 0.05 * exact.abs().max()
    assert (exact.argmax(1) == rounded.argmax(1)).float().mean() > 0.98


def test_normalisation_is_inside_the_model(trained, fashion):
    model, _ = trained
    assert model.state_dict()["mean"].item() == pytest.approx(fashion.mean[0])


@pytest.mark.parametrize("width", [0, 8, 20])
def test_width_must_be_a_multiple_of_16(width):
    with pytest.raises(UserError, match="multiple of 16"):
        common.SmallCNN(3, 10, width)


# ---------------------------------------------------------------- training


def test_overfits_one_batch(fashion, runtime):
    recipe = common.Recipe(width=16, epochs=60, batch_size=64, lr=0.3, crop_padding=0, label_smoothing=0.0)
    model = common.make_model(fashion, recipe)
    history, _ = common.fit(model, fashion, recipe, runtime, train_index=torch.arange(64))
    assert history[-1]["train_loss"] < 0.02
    assert common.evaluate(model, fashion.train_images[:64], fashion.train_labels[:64], runtime)[1] == 1.0


def test_learns_real_pictures(trained):
    assert trained[1] > 0.78  # chance is 0.1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_same_seed_same_history(fashion, runtime, precision):
    def train(seed):
        recipe = common.Recipe(width=16, epochs=2, batch_size=64)
        model = common.make_model(fashion, recipe, seed)
        sets = {"train_index": torch.arange(128), "validation_index": torch.arange(128, 200)}
        history, losses = common.fit(model, fashion, recipe, replace(runtime, precision=precision), **sets, seed=seed)
        return [{k: v for k, v in row.items() if k != "seconds"} for row in history], losses

    assert train(3) == train(3)
    assert train(3) != train(4)


def test_one_step_of_sgd_is_torchs_own(fashion, runtime):
    """The loop against autograd by hand: one batch, constant rate, no tricks."""
    model, twin = (common.make_model(fashion, common.Recipe(width=16), seed=5) for _ in range(2))
    recipe = common.Recipe(
        optimizer="SGD", lr=0.05, weight_decay=0.0, label_smoothing=0.0, width=16, batch_size=32, epochs=1
    )
    recipe = replace(recipe, crop_padding=0, schedule="constant")
    common.fit(model, fashion, recipe, runtime, train_index=torch.arange(32))
    twin.train()
    loss = F.cross_entropy(twin(fashion.train_images[:32].float() / 255), fashion.train_labels[:32])
    loss.backward()
    expected = twin.head.weight - 0.05 * twin.head.weight.grad
    assert torch.allclose(model.head.weight, expected, atol=1e-5)


def test_divergence_ends_the_training(fashion, runtime):
    recipe = common.Recipe(optimizer="SGD", width=16, epochs=4, batch_size=64, lr=1e30, schedule="constant")
    history, _ = common.fit(common.make_model(fashion, recipe), fashion, recipe, runtime, train_index=torch.arange(512))
    assert len(history) < 4
    assert not math.isfinite(history[-1]["train_loss"])


# ---------------------------------------------------------------- evaluation and checkpoints


@pytest.mark.parametrize("count", [1, 2, 6])
def test_views_equal_a_slow_loop(count):
    batch = torch.rand(2, 3, 5, 4)

    def pixel(picture, channel, row, column):
        row, column = (abs(place) if place < size else 2 * size - 2 - place for place, size in ((row, 5), (column, 4)))
        return batch[picture, channel, row, column]

    views = common.views_of(batch, count)
    assert len(views) == count
    for number, view in enumerate(views):
        shift, flipped = (0, 1, -1)[number // 2], number % 2
        for where in itertools.product(range(2), range(3), range(5), range(4)):
            picture, channel, row, column = where
            source = 3 - column if flipped else column
            assert view[where] == pixel(picture, channel, row + shift, source + shift)


def test_predictions_of_several_views_are_their_mean(trained, fashion, runtime):
    model, _ = trained
    images = fashion.test_images[:20]
    views = common.views_of(images.float() / 255, 6)
    slow = torch.stack([common.predict(model, (255 * view).round().byte(), runtime) for view in views])
    assert torch.allclose(common.predict(model, images, runtime, views=6), slow.mean(0), atol=1e-5)


def test_per_class_accuracy_equals_a_loop():
    labels, predicted = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 2, 0, 2])
    result = common.per_class_accuracy(predicted, labels, 4)
    for c in range(3):
        hits = [int(p == t) for p, t in zip(predicted, labels, strict=True) if t == c]
        assert result[c] == pytest.approx(sum(hits) / len(hits))
    assert math.isnan(result[3])


def test_evaluate_equals_torch_on_one_batch(trained, fashion, runtime):
    model, _ = trained
    loss, accuracy = common.evaluate(model, fashion.test_images, fashion.test_labels, runtime, torch.arange(700))
    with torch.no_grad():
        logits = model(fashion.test_images[:700].float() / 255)
    assert loss == pytest.approx(F.cross_entropy(logits, fashion.test_labels[:700]).item(), rel=1e-4)
    assert accuracy == pytest.approx((logits.argmax(1) == fashion.test_labels[:700]).float().mean().item())


def test_checkpoint_round_trip(trained, fashion, runtime, tmp_path):
    model, _ = trained
    common.save_checkpoint(tmp_path / "m.pth", model, fashion, common.Recipe(width=16), seed=1)
    loaded, facts = common.load_checkpoint(tmp_path / "m.pth")
    assert torch.equal(
        common.predict(model, fashion.test_images[:50], runtime),
        common.predict(loaded, fashion.test_images[:50], runtime),
    )
    assert facts["classes"] == list(fashion.classes)
    assert facts["seed"] == 1


def test_foreign_and_damaged_checkpoints_are_refused(trained, fashion, tmp_path):
    model, _ = trained
    path = tmp_path / "m.pth"
    common.save_checkpoint(path, model, fashion, common.Recipe(width=16))
    content = path.read_bytes()
    foreign = {"model": model.config, "format": "SmallCNN-1", "state": {}}
    torch.save(foreign, tmp_path / "empty_state.pth")
    torch.save(foreign | {"state": model.state_dict()}, tmp_path / "no_classes.pth")
    torch.save(model, tmp_path / "whole_model.pth")
    (tmp_path / "half.pth").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.pth").write_text("no checkpoint")
    (tmp_path / "nothing.pth").write_bytes(b"")
    for name in ("empty_state", "no_classes", "whole_model", "half", "text", "nothing", "missing"):
        with pytest.raises(UserError, match=name) as caught:
            common.load_checkpoint(tmp_path / f"{name}.pth")
        assert "PyTorch" not in str(caught.value)  # its advice is to switch the safety off


# ---------------------------------------------------------------- runs and results


def test_importing_does_nothing(tmp_path):
    code = (
        "import sys, common; print(sorted({'torchvision', 'matplotlib', 'optuna', 'onnx', 'scipy'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert result.stdout.strip() == "[]"
    assert result.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_interval_is_students_t():
    mean, low, high = common.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)  # t(0.975, 4), from any table
    assert (mean, low, high) == pytest.approx((3, 3 - half, 3 + half), abs=1e-5)
    assert common.interval([2.0])[1:] == (-math.inf, math.inf)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    common.write_text(tmp_path / "a.txt", "old")

    def fail_half_way():
        with common.atomic_path(tmp_path / "a.txt") as temporary:
            temporary.write_text("half of the n")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def draw(path):
    with common.figure(path, "a title"):
        pass


WRITERS = {
    "tensors": lambda path: common.save_tensors(path, {"weights": torch.zeros(10_000)}),
    "text": lambda path: common.write_text(path, "x" * 10_000),
    "csv": lambda path: common.write_csv(path, [{"step": step} for step in range(10_000)]),
    "figure": draw,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_one_clear_line_and_the_old_file_stays(writer, tmp_path, capsys):
    resource = pytest.importorskip("resource")
    path = tmp_path / "result.png"
    path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # to write on fails, as on a full disk
    try:
        status = common.run_script(lambda: WRITERS[writer](path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = capsys.readouterr().err
    assert status == 2
    assert message.startswith("error: ")
    assert message.endswith("result.png\n")
    assert message.count("\n") == 1
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["result.png"]


def test_two_runs_do_not_share_a_directory(tmp_path):
    def enter(path):
        with common.output_directory(path):
            return True

    with common.output_directory(tmp_path / "out"), pytest.raises(UserError, match="another run"):
        enter(tmp_path / "out")
    assert enter(tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        enter(tmp_path / "file" / "out")


def test_json_has_no_nan(tmp_path):
    common.write_json(tmp_path / "a.json", {"a": math.nan, "b": [math.inf, 1.5]})
    assert (tmp_path / "a.json").read_text().split() == ["{", '"a":', "null,", '"b":', "[", "null,", "1.5", "]", "}"]


def test_device_that_is_not_there():
    with pytest.raises(UserError, match="--device"):
        common.make_runtime("cuda:7", "auto", 1)
    with pytest.raises(UserError, match="--device"):
        common.make_runtime("gpu", "auto", 1)
    with pytest.raises(UserError, match="neither"):
        common.make_runtime("meta", "auto", 1)


def test_a_console_without_a_letter_shows_its_number():
    code = "import common_options as c; c.run_script(lambda: print('b\\u00fccher') or 0)"
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=ascii_only)
    assert result.stdout == "b\\xfccher\n", result.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_gpu_gives_what_the_cpu_gives(trained, fashion, runtime):
    model, _ = trained
    cpu = common.predict(model, fashion.test_images[:100], runtime)
    gpu = common.predict(model, fashion.test_images[:100], common.make_runtime("cuda", "fp32", 1))
    model.cpu()
    assert torch.allclose(cpu, gpu, atol=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_training_on_a_gpu_starts_like_on_the_cpu(fashion, runtime):
    recipe, index, losses = common.Recipe(width=16, epochs=1, batch_size=64), torch.arange(640), {}
    for where in (runtime, common.make_runtime("cuda", "fp32", 1)):
        model = common.make_model(fashion, recipe)
        history, losses[where.device] = common.fit(
            model, fashion, recipe, where, train_index=index, validation_index=torch.arange(640, 700)
        )
        assert math.isfinite(history[-1]["val_loss"])
        assert {weight.device.type for weight in model.parameters()} == {where.device}
    assert losses["cpu"][:3] == pytest.approx(losses["cuda"][:3], rel=1e-2)


def test_markdown_tables_have_a_dash_in_every_rule():
    rule = common.table([["SGD", 5]], ["optimizer", "n"], markdown=True).splitlines()[1]
    assert [set(cell.strip()) for cell in rule.strip("|").split("|")] == [{"-"}, {"-", ":"}]


# ---------------------------------------------------------------- start


@pytest.mark.parametrize("script", ["task2_optimizers", "task3_optuna", "task4_onnx"])
def test_the_command_line_needs_no_torch(script):
    code = f"import sys, {script}; {script}.parse_args([]); assert not {{'torch', 'optuna', 'onnx'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("script", ["task2_optimizers", "task3_optuna", "task4_onnx", "benchmark_training"])
def test_help_names_the_defaults(script, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script).main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "(default: " in shown
    assert "None" not in shown


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("delay", [0.0, 0.2, 0.4])
def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path, delay):
    command = [sys.executable, ROOT / "task2_optimizers.py", "--output-dir", tmp_path / "results"]
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(command, stderr=errors)
    wait_until(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text(), process)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert (tmp_path / "errors").read_text() == "interrupted\n"


def test_ctrl_c_raises_nothing_inside_an_import(tmp_path):
    # Torch's C++ parts abort at an exception now and then; this one does always.
    module = (
        "import os, time\nopen('{0}', 'w').close()\ntry:\n    time.sleep(20)\nexcept KeyboardInterrupt:\n    os.abort()"
    )
    (tmp_path / "torch.py").write_text(module.format(tmp_path / "imported"))
    command = [sys.executable, ROOT / "task4_onnx.py", "--output-dir", tmp_path / "results"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    wait_until((tmp_path / "imported").exists, process)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "interrupted\n"
    assert process.returncode == 130
