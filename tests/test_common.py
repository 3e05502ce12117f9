"""common.py against references: slow loops, torch itself, published constants; and against bad input and ends."""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import math
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FORK, MODES, ROOT, make_run, result_of, wait_until, workers_below
from PIL import Image
from scipy import stats

import common
from common import Moves, Recipe, Stem, UserError

PLAIN = Recipe(
    common.Network(model="PlainCNN", width=16),
    common.Training(
        optimizer="SGD",
        lr=0.05,
        weight_decay=0.0,
        label_smoothing=0.0,
        crop_padding=0,
        schedule="constant",
        batch_size=32,
        epochs=1,
    ),
)


def parse(*options, **defaults):
    parser = argparse.ArgumentParser()
    common.add_common_args(parser, **{"output_dir": Path("results/x"), "dataset": "fashion_mnist"} | defaults)
    return parser.parse_args(options)


def train(data, recipe, runtime, index, seed=0, **more):
    model = common.make_model(recipe.network, data, common.Split(index, index[:0], (0.3,), (0.3,)), seed)
    return model, list(common.train_epochs(model, data, recipe.training, runtime, index, seed=seed, **more))


def dataset(labels, classes, size=8, channels=1):
    """A data set of noise, for what does not depend on the images."""
    labels = torch.tensor(labels)
    images = torch.randint(0, 256, (len(labels), channels, size, size), dtype=torch.uint8)
    names = tuple(f"class {number}" for number in range(classes))
    return common.Dataset("noise", "noise", names, images, labels, images, labels)


# ---------------------------------------------------------------- data sets and splits


def test_fashion_mnist_and_its_statistics_are_the_published_ones(fashion):
    assert fashion.train_images.shape == (60000, 1, 28, 28)
    assert fashion.test_images.shape == (10000, 1, 28, 28)
    assert torch.bincount(fashion.train_labels).tolist() == [6000] * 10
    split = common.split_dataset(fashion, validation=False)
    assert len(split.train) == 60000
    assert split.mean == pytest.approx((0.2860,), abs=5e-5)
    assert split.std == pytest.approx((0.3530,), abs=5e-5)


def test_statistics_are_those_of_all_pixels_of_the_images_trained_on(fashion):
    images = fashion.train_images[:3000].repeat(1, 3, 1, 1)
    images[:, 1] //= 2
    data = replace(fashion, train_images=images, train_labels=fashion.train_labels[:3000])
    split = common.split_dataset(data, 1500)
    pixels = images[split.train].double().div(255).transpose(0, 1).flatten(1)
    assert split.mean == pytest.approx(pixels.mean(1).tolist(), abs=1e-9)
    assert split.std == pytest.approx(pixels.std(1, correction=0).tolist(), abs=1e-9)


def test_the_split_is_disjoint_stratified_and_always_the_same(fashion):
    torch.manual_seed(1)
    split = common.split_dataset(fashion)
    common.split_dataset.cache_clear()
    torch.manual_seed(2)
    again = common.split_dataset(fashion)
    assert torch.equal(split.train, again.train)
    assert torch.equal(split.validation, again.validation)
    assert sorted([*split.train.tolist(), *split.validation.tolist()]) == list(range(60000))
    assert torch.bincount(fashion.train_labels[split.validation]).tolist() == [600] * 10
    few = common.split_dataset(fashion, 1000)
    assert torch.bincount(fashion.train_labels[few.train]).tolist() == [100] * 10
    assert torch.bincount(fashion.train_labels[few.validation]).tolist() == [100] * 10


@pytest.mark.parametrize("counts", [[2] * 100, [2] * 10, [1000, 2], [40, 3, 5]])
def test_every_class_is_in_every_part(counts):
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    split = common.split_dataset(dataset(labels, len(counts)), len(counts))
    assert sorted(torch.tensor(labels)[split.train].tolist()) == list(range(len(counts)))
    assert set(torch.tensor(labels)[split.validation].tolist()) == set(range(len(counts)))
    with pytest.raises(UserError, match="class 2 needs at least two"):
        common.split_dataset(dataset([0, 0, 1, 1, 2], 3))


@pytest.mark.parametrize("content", [b"rubbish", gzip.compress(bytes(16 + 784))])
def test_other_files_under_fashion_mnists_names_are_refused(tmp_path, content):
    shutil.copytree(ROOT / "data" / "FashionMNIST", tmp_path / "FashionMNIST")
    (tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz is .*not the published file"):
        common.load_dataset("fashion_mnist", tmp_path)


def test_cifar10_that_cannot_be_had_is_one_line_and_only_by_default_replaced(tmp_path, monkeypatch, capsys):
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, '"http://127.0.0.1:9"')  # quotes and all
    with pytest.raises(UserError, match="no CIFAR-10: "):
        common.load_data(parse("--dataset", "cifar10", "--data-dir", str(tmp_path)))
    assert socket.getdefaulttimeout() is None  # it was set for the download alone
    data = common.load_data(parse("--data-dir", str(tmp_path), dataset=None))
    assert data.source == "Fashion-MNIST, embedded"
    notes = capsys.readouterr().err.splitlines()
    assert notes[0].startswith("NOTE: no CIFAR-10")
    assert notes[-1] == "NOTE: running on the embedded Fashion-MNIST instead of CIFAR-10."
    archive = tmp_path / "cifar-10-python.tar.gz"

    def cut_off(*_, **__):
        archive.write_bytes(bytes(5))
        raise TimeoutError("the network is gone")

    monkeypatch.setattr("torchvision.datasets.CIFAR10.__init__", cut_off)
    with pytest.raises(UserError, match="the network is gone"):
        common.load_dataset("cifar10", tmp_path)
    assert not archive.exists()  # it would be in the way of the next download
    monkeypatch.setattr("torchvision.datasets.utils.check_integrity", lambda *_: True)
    with pytest.raises(UserError, match="the network is gone"):  # after a whole archive, in the middle of unpacking
        common.load_dataset("cifar10", tmp_path)
    assert archive.stat().st_size == 5
    (tmp_path / "file").touch()
    assert common.load_data(parse("--data-dir", str(tmp_path / "file"), dataset=None)).name == "fashion_mnist"
    monkeypatch.undo()
    archive.write_bytes(bytes(9999))
    with pytest.raises(UserError, match=r"9,999 bytes\) is incomplete or damaged"):
        common.load_dataset("cifar10", tmp_path)
    assert archive.stat().st_size == 9999


def test_cifar10_from_an_image_folder_and_other_sizes(image_folder, tmp_path):
    image_folder.rename(tmp_path / "cifar10")
    data = common.load_dataset("cifar10", tmp_path, 16)
    assert data.source == "CIFAR-10, image folder"
    assert data.train_images.shape == (72, 3, 16, 16)
    assert common.load_dataset("fashion_mnist", image_size=8).test_images.shape == (10000, 1, 8, 8)


# ---------------------------------------------------------------- folders of images


def test_images_of_any_size_and_mode_beside_what_people_have(image_folder, capsys):
    trousers = image_folder / "train" / "Trouser"
    (trousers / "0.jpg").rename(trousers / "0.jfif")
    for name in ("._0.png", "Thumbs.db", "desktop.ini", "a.heic", ".thumbnails/0.png"):
        (trousers / name).parent.mkdir(exist_ok=True)
        (trousers / name).write_bytes(b"no image")
    (image_folder / "train" / ".ipynb_checkpoints").mkdir()
    data = common.load_dataset(str(image_folder))
    note = capsys.readouterr().err.splitlines()[0]
    assert note.startswith("NOTE: skipped files in")
    assert sorted(note.split(": ")[-1].split(", ")) == ["1 .db", "1 .heic", "1 .ini", "2 hidden"]
    assert data.train_images.shape == (72, 3, 32, 32)
    assert data.classes == ("Ankle boot", "T-shirt-top", "Trouser")
    brightness = data.test_images.float().mean((1, 2, 3)).view(3, 3, len(MODES)).mean((0, 1))
    assert brightness.min() > 0.5 * brightness.max(), "a mode was decoded as black or white"


def test_odd_images(image_folder, fashion):
    trousers, pixels = image_folder / "train" / "Trouser", fashion.train_images[0, 0].numpy()
    grey = Image.fromarray(pixels)
    for number, exif in enumerate([b"Exif\0\0", b"Exif\0\0II*\0", b"Exif\0\0" + bytes(range(50, 90)), b"rubbish"]):
        grey.save(trousers / f"exif{number}.jpg", exif=exif)
    for number, size in enumerate([(1, 1), (5000, 20)]):
        grey.resize(size).save(trousers / f"size{number}.png")
    grey.save(trousers / "moving.gif", save_all=True, append_images=[grey.rotate(90)])
    clear = grey.convert("P")
    clear.info["transparency"] = 0
    clear.save(trousers / "clear.png")
    assert common.load_dataset(str(image_folder)).train_images.shape[0] == 80
    white = decode(trousers / "clear.png")
    assert white[0, :, pixels == 0].min() == 255  # laid on white
    turned = Image.Exif()
    turned[0x0112] = 6
    grey.save(trousers / "turned.png", exif=turned)
    assert torch.equal(decode(trousers / "turned.png")[0, 0], torch.tensor(np.rot90(pixels, -1).copy()))


def decode(*paths, test=()):
    """Images of 28 x 28 pixels, uint8 (N, 3, 28, 28); those of ``test`` are decoded beside and left out."""
    return common.decode_images([str(path) for path in paths], [str(path) for path in test], 28)[0]


def test_12_bit_values_in_16_bit_files_are_as_bright_as_8_bits(tmp_path, fashion):
    pixels = fashion.train_images[:2, 0].numpy()
    for bits in (12, 16):
        for number, image in enumerate(pixels):
            deep = (image.astype(float) * (2**bits - 1) / 255).round().astype("uint16")
            Image.fromarray(deep).save(tmp_path / f"{bits}-{number}.png")
        decoded = decode(*(tmp_path / f"{bits}-{number}.png" for number in range(2)))
        assert torch.equal(decoded[:, 0], torch.from_numpy(pixels))
    Image.fromarray((pixels[0] / 255).astype("float32")).save(tmp_path / "float.tiff")  # in [0, 1]
    assert torch.equal(decode(tmp_path / "float.tiff")[0, 0], torch.from_numpy(pixels[0]))


def test_the_white_of_deep_images_is_that_of_the_training_images(tmp_path, fashion):
    pixels = fashion.train_images[0, 0].numpy()
    for name, factor in (("train", 16), ("test", 257)):  # 12 bits, and one image of 16 bits
        Image.fromarray(pixels.astype("uint16") * factor).save(tmp_path / f"{name}.png")
    alone = decode(tmp_path / "train.png")
    assert torch.equal(decode(tmp_path / "train.png", test=[tmp_path / "test.png"]), alone)
    assert alone.max() > 250
    _, only_test, _ = common.decode_images([], [str(tmp_path / "test.png")], 28)
    assert torch.equal(only_test[0, 0], torch.from_numpy(pixels))


@pytest.mark.parametrize("name", ["a b $c$ 100%", "книги 書", os.fsdecode(b"n\xfcmen \xe4\xb8\xad")])
def test_odd_names_can_be_used_written_and_drawn(image_folder, tmp_path, name, monkeypatch):
    folder = tmp_path / name
    image_folder.rename(folder)
    (folder / "train" / "Trouser").rename(folder / "train" / "cafe\u0301 $_b")  # two Unicode forms of one name
    (folder / "test" / "Trouser").rename(folder / "test" / "caf\u00e9 $_b")
    monkeypatch.chdir(folder)
    data = common.load_dataset(".")
    assert data.classes[-1] == "caf\u00e9 $_b"
    run = make_run(tmp_path / "out", data)
    monkeypatch.setenv("MPLBACKEND", "module://not_installed.backend")
    with run.figure("a.png", data.source + ", a long title" * 9) as (_, axes):
        axes[0, 0].set_title("x", parse_math=False)
    common.write_json(tmp_path / "a.json", {"folder": folder, "classes": data.classes})
    assert (run.folder / "a.png").stat().st_size > 1000
    assert json.loads((tmp_path / "a.json").read_text())["classes"] == list(data.classes)


def test_faults_of_a_folder_are_named(image_folder, tmp_path):
    def fault(pattern):
        with pytest.raises((UserError, OSError), match=pattern):
            common.load_dataset(str(image_folder))

    for wrong in (tmp_path / "nowhere", image_folder / "train"):
        with pytest.raises(UserError, match="neither fashion_mnist, cifar10 nor a folder"):
            common.load_dataset(str(wrong))
    train_trousers, bad = image_folder / "train" / "Trouser", image_folder / "train" / "Trouser" / "bad.png"
    for content in (b"\xff\xd8 no image", (train_trousers / "1.png").read_bytes()[:-60]):
        bad.write_bytes(content)
        fault(r"unreadable image .*bad\.png")
    bad.unlink()
    void = train_trousers / "void.tif"
    Image.fromarray(np.full((9, 9), np.nan, np.float32)).save(void)  # it would be black
    fault(r"unreadable image .*void\.tif.*finite")
    void.unlink()
    bad.symlink_to(tmp_path / "nowhere.png")
    fault(r"bad\.png")
    bad.unlink()
    (image_folder / "train" / "Zebra").mkdir()
    fault("Zebra")
    shutil.copy(train_trousers / "1.png", image_folder / "train" / "Zebra")
    fault("need the same two or more classes")
    shutil.copytree(image_folder / "train" / "Zebra", image_folder / "test" / "Zebra")
    with pytest.raises(UserError, match="Zebra needs at least two training images"):
        common.split_dataset(common.load_dataset(str(image_folder)))


def test_decoded_images_are_cached_and_the_cache_is_renewed(image_folder, monkeypatch, tmp_path, capsys):
    def decoded():
        calls = []
        with monkeypatch.context() as patch:
            decode = common.decode_images
            patch.setattr(common, "decode_images", lambda *arguments: calls.append(1) or decode(*arguments))
            data = common.load_dataset(str(image_folder))
        return len(calls), data

    assert decoded()[0] == 1
    count, data = decoded()
    assert count == 0
    before = data.fingerprint
    next((image_folder / "train" / "Trouser").iterdir()).unlink()
    count, data = decoded()
    assert (count, len(data.train_images)) == (1, 71)
    assert data.fingerprint != before
    caches = (Path(os.environ["XDG_CACHE_HOME"]) / "small-cv-lab").glob("b*")  # of all tests' folders of that name
    cache = max(caches, key=lambda path: path.stat().st_mtime_ns)
    cache.write_bytes(cache.read_bytes()[:1000])
    assert decoded()[0] == 1
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert decoded()[0] == 1
    assert "are not cached" in capsys.readouterr().err


# ---------------------------------------------------------------- batches and training


def test_batched_shift_and_flip_equals_a_slow_loop(fashion):
    images = fashion.train_images[:40].repeat(1, 3, 1, 1).contiguous(memory_format=torch.channels_last)
    images[:, 2] = 255 - images[:, 2]
    index, flip = torch.tensor([5, 0, 39, 7, 7]), torch.tensor([True, False, True, False, True])
    shift = torch.tensor([[3, -3], [0, 2], [-1, 0], [0, 0], [2, 3]])
    batch = common.draw_batch(images, index, Moves(shift, flip))
    for position, chosen in enumerate(index):
        slow = F.pad(images[chosen].float(), (3, 3, 3, 3), mode="reflect")
        top, left = 3 + int(shift[position, 0]), 3 + int(shift[position, 1])
        slow = slow[:, top : top + 28, left : left + 28]
        assert torch.equal(batch[position].float(), slow.flip(2) if flip[position] else slow)
    assert torch.equal(common.draw_batch(images, index), images[index])
    assert common.draw_batch(images, index).is_contiguous(memory_format=torch.channels_last)


def test_training_shuffles_on_the_cpu_and_sees_every_image_once(fashion, runtime, monkeypatch):
    seen, draw = [], common.draw_batch
    monkeypatch.setattr(common, "draw_batch", lambda images, index, moves: seen.append(index) or draw(images, index))
    index = torch.arange(1000, 1256)
    train(fashion, PLAIN.replace(epochs=2, batch_size=64), runtime, index)
    first, second = torch.cat(seen[:4]), torch.cat(seen[4:])
    assert torch.equal(first.sort().values, index)
    assert torch.equal(second.sort().values, index)
    assert not torch.equal(first, index)
    assert not torch.equal(first, second)


def test_one_step_of_sgd_is_torchs_own(fashion, runtime):
    index = torch.arange(32)
    model, (epoch,) = train(fashion, PLAIN, runtime, index)
    twin = common.make_model(PLAIN.network, fashion, common.Split(index, index[:0], (0.3,), (0.3,)))
    logits = twin[1]((fashion.train_images[:32].float() / 255 - 0.3) / 0.3)
    loss = F.cross_entropy(logits, fashion.train_labels[:32])
    loss.backward()
    assert epoch.step_losses == (pytest.approx(loss.item(), rel=1e-5),)
    assert epoch.train_loss == epoch.step_losses[0]
    for ours, weight in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours, weight - 0.05 * weight.grad, atol=1e-5)  # sums in another order


def test_the_learning_rate_follows_the_schedule(fashion, runtime, monkeypatch):
    rates, make = [], common.make_optimizer

    def watched(*arguments):
        optimizer = make(*arguments)
        optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
        return optimizer

    monkeypatch.setattr(common, "make_optimizer", watched)
    recipe = PLAIN.replace(lr=1e-3, epochs=4, batch_size=4, schedule="one_cycle")
    train(fashion, recipe, runtime, torch.arange(100))
    assert max(rates) == rates[25] == pytest.approx(1e-3)
    assert rates[:26] == sorted(rates[:26])
    assert rates[25:] == sorted(rates[25:], reverse=True)
    assert rates[-1] < 2e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_same_seed_same_history(fashion, runtime, precision):
    def history(seed):
        recipe = Recipe().replace(width=16, epochs=2, batch_size=16)
        epochs = train(fashion, recipe, runtime._replace(precision=precision), torch.arange(32), seed)[1]
        return [epoch.step_losses for epoch in epochs]

    assert history(3) == history(3)
    assert history(3) != history(4)


def test_overfits_one_batch_and_divergence_ends_the_training(fashion, runtime):
    recipe = Recipe().replace(width=16, epochs=60, batch_size=64, lr=0.3, crop_padding=0, label_smoothing=0)
    index = torch.arange(64)
    model, epochs = train(fashion, recipe, runtime, index)
    assert epochs[-1].train_loss < 0.02
    found = common.score(common.predict(model, fashion.train_images, runtime, index), fashion.train_labels[:64])
    assert found.accuracy == 1
    assert found.loss < 0.1
    _, epochs = train(fashion, PLAIN.replace(lr=1e30, epochs=4), runtime, torch.arange(512))
    assert len(epochs) < 4
    assert not epochs[-1].is_finite


def test_a_trained_network_and_bf16(trained, fashion, runtime):
    model, _, accuracy = trained
    assert accuracy > 0.78  # chance is 0.1
    exact = common.predict(model, fashion.test_images[:200], runtime)
    rounded = common.predict(model, fashion.test_images[:200], runtime._replace(precision="bf16"))
    assert (exact - rounded).abs().max() < 0.05 * exact.abs().max()
    assert (exact.argmax(1) == rounded.argmax(1)).float().mean() > 0.98


@pytest.mark.parametrize("stem", [Stem(1, 2, 24), Stem(2, 4, 16), Stem(1, 3, 18)], ids=str)
def test_the_stem_whitens_patches(fashion, stem):
    split = common.split_dataset(fashion, 3000)
    model = common.make_model(common.Network(width=16, stem=stem), fashion, split)
    stem = model[1].stem
    filters = stem(model[0](fashion.train_images[split.train].float() / 255)).transpose(0, 1).flatten(1)
    filters = filters[: stem.out_channels // 2].detach()
    assert torch.allclose(filters @ filters.T / filters.shape[1], torch.eye(len(filters)), atol=0.1)


def test_optimizer_names(fashion):
    model = common.build_model(PLAIN.network, fashion.shape, 10)

    def make(name, **changes):
        return common.make_optimizer(replace(PLAIN.training, optimizer=name, **changes), model)

    assert make("SGD+nesterov").defaults["nesterov"]
    assert make("RMSprop", lr=None).defaults["lr"] == 0.01
    assert make("AdamW", weight_decay=0).defaults["weight_decay"] == 0
    make("Rprop", weight_decay=5e-4)  # which has none
    for name in ("Optimizer", "SGDD", "SGD+", "SGD+magic", "lr_scheduler"):
        with pytest.raises(UserError, match="unknown optimizer"):
            make(name)
    with pytest.raises(UserError, match="cannot train"):
        make("Adam+momentum")


def test_muon_turns_kernels_towards_the_gradients_polar_factor_and_steps_the_rest_as_sgd(fashion):
    recipe = common.PRESETS["small"]
    model = common.make_model(recipe.network, fashion, common.split_dataset(fashion, 2000), 3)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = common.make_optimizer(recipe.training, model)
    shifts, heads, kernels = ([w for w in weights if w.ndim == ndim] for ndim in (1, 2, 4))
    assert len(shifts + heads + kernels) == len(weights)
    before = [kernel.detach().clone() for kernel in kernels]
    references = []
    size = recipe.training.batch_size
    for rate, mine in ((0.053, shifts), (0.67, heads)):  # of a loss summed over the batch (airbench94_muon)
        twins = [torch.nn.Parameter(weight.detach().clone()) for weight in mine]
        settings = {"momentum": 0.85, "nesterov": True, "weight_decay": 2e-6 * size / rate}
        references.append((mine, twins, torch.optim.SGD(twins, rate, **settings)))
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(fashion.train_images[:64].float() / 255), fashion.train_labels[:64]).backward()
        gradients = [kernel.grad.clone() for kernel in kernels]
        for mine, twins, reference in references:
            for weight, twin in zip(mine, twins, strict=True):
                twin.grad = size * weight.grad
            reference.step()
        optimizer.step()
        if before:  # the first step: its averaged gradient is the gradient
            for kernel, old, gradient in zip(kernels, before, gradients, strict=True):
                left, values, right = torch.linalg.svd(gradient.flatten(1).double(), full_matrices=False)
                values /= values.norm()
                for _ in range(3):  # towards 1, the polar factor's (Jordan et al. 2024)
                    values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
                unchanged = old.flatten(1).double() * len(old) ** 0.5 / old.norm()
                expected = unchanged - 0.12 * left @ torch.diag(values) @ right
                assert torch.allclose(kernel.flatten(1).double(), expected, atol=1e-4)
            before = []
    for mine, twins, _ in references:
        for weight, twin in zip(mine, twins, strict=True):
            assert torch.allclose(weight, twin, rtol=1e-4, atol=1e-6)
    with pytest.raises(common.UserError, match="SmallCNN only"):
        common.make_optimizer(recipe.training, common.build_model(PLAIN.network, fashion.shape, 10))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_convolution_of_small_maps_is_torchs(size):
    generator = torch.Generator().manual_seed(size)
    images = torch.randn(6, 5, size, size, generator=generator).to(memory_format=torch.channels_last).requires_grad_()
    kernels = torch.randn(4, 5, 3, 3, generator=generator).requires_grad_()
    gradient = torch.randn(6, 4, size, size, generator=generator)
    found = []
    for convolve in (lambda *x: F.conv2d(*x, padding=1), common.SmallMapConvolution.apply):
        logits = convolve(images, kernels)
        found.append([logits, *torch.autograd.grad(logits, (images, kernels), gradient)])
    for reference, ours in zip(*found, strict=True):
        assert torch.allclose(reference, ours, rtol=1e-5, atol=1e-5)


def test_presets_train_in_bf16_as_without_the_faster_convolution(fashion, runtime, monkeypatch):
    cropped = fashion.train_images[:, :, 4:24, 4:24].contiguous(memory_format=torch.channels_last)  # seconds less
    data = replace(fashion, train_images=cropped)
    split, bf16, calls = common.split_dataset(data, 50), runtime._replace(precision="bf16"), []
    ways = {"ours": common.SmallMapConvolution.apply, "torch": lambda *tensors: F.conv2d(*tensors, padding=1)}
    for name, preset in common.PRESETS.items():
        recipe, losses = preset.replace(width=32, epochs=1, batch_size=25), []
        for way in ways.values():
            spy = lambda *tensors, way=way, name=name: calls.append(name) or way(*tensors)  # noqa: E731
            monkeypatch.setattr(common.SmallMapConvolution, "apply", spy)
            model = common.make_model(recipe.network, data, split)
            epoch = next(common.train_epochs(model, data, recipe.training, bf16, split.train))
            losses.append(epoch.step_losses)
        assert np.allclose(*losses, rtol=0.02), name
    assert {*calls} == {*common.PRESETS}  # it was used in all of them


def test_after_the_first_epoch_the_hardest_images_are_trained_on(fashion, runtime, monkeypatch):
    recipe = PLAIN.replace(hardest=0.6, batch_norm=False, batch_size=50, epochs=3, crop_padding=0, lr=1e-12)
    split = common.split_dataset(fashion, 500)
    model = common.make_model(recipe.network, fashion, split)
    logits = common.predict(model, fashion.train_images, runtime, split.train)
    losses = F.cross_entropy(logits, fashion.train_labels[split.train], reduction="none")
    hardest = split.train[losses.argsort(descending=True)[:300]].sort().values
    drawn, draw = [], common.draw_batch
    monkeypatch.setattr(common, "draw_batch", lambda images, index, moves: drawn.append(index) or draw(images, index))
    for _ in common.train_epochs(model, fashion, recipe.training, runtime, split.train):
        pass
    first, *later = torch.cat(drawn).split(500)
    assert first.sort().values.equal(split.train.sort().values)
    for order in later:  # all of the hardest 300 once, then 200 of them again
        assert order[:300].sort().values.equal(hardest)
        assert len(order[300:].unique()) == 200
        assert {*order[300:].tolist()} <= {*hardest.tolist()}
    assert not later[0].equal(later[1])


def test_images_that_the_first_epoch_left_out_are_not_left_out_for_ever(fashion, runtime, monkeypatch):
    recipe = PLAIN.replace(hardest=0.6, batch_size=50, epochs=2)
    split = common.split_dataset(fashion, 130)
    drawn, draw = [], common.draw_batch
    monkeypatch.setattr(common, "draw_batch", lambda images, index, moves: drawn.append(index) or draw(images, index))
    train(fashion, recipe, runtime, split.train)
    first, second = torch.cat(drawn).split(100)
    left_out = {*split.train.tolist()} - {*first.tolist()}
    assert len(left_out) == 30
    assert left_out <= {*second.tolist()}


# ---------------------------------------------------------------- networks and checkpoints

NETWORKS = """
import torch
class Good(torch.nn.Linear):
    more = 0
    def __init__(self, num_classes):
        super().__init__(3 * 64, num_classes + self.more)
    def forward(self, images):
        return super().forward(images.flatten(1))
class Odd(Good):
    more = 1
class Pair(Good):
    def forward(self, images):
        return super().forward(images), images
class Small(Good):
    def forward(self, images):
        return super().forward(images[..., 1:])
"""


def test_networks_of_the_users_own(tmp_path, monkeypatch, runtime):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_nets.py").write_text(NETWORKS)
    data = dataset([0, 0, 1, 1], 2)
    split = common.split_dataset(data)
    faults = {"no_such_module:Net": "No module", "my_nets:Nothing": "Nothing", "builtins:dict": "dict"}
    faults["my_nets.Good"] = "not MODULE:CALLABLE"
    faults |= {"my_nets:Odd": "shape", "my_nets:Pair": "tuple", "my_nets:Small": "cannot be trained"}
    for name, text in faults.items():
        with pytest.raises(UserError, match=rf"^[^\n]*{text}[^\n]*$"):
            common.check_recipe(PLAIN.replace(model=name), data, split, runtime)
    recipe = PLAIN.replace(model="my_nets:Good")
    common.check_recipe(recipe, data, split, runtime)  # grey images are repeated to three channels
    common.check_recipe(PLAIN, data, split, runtime)  # 8 x 8 pixels
    with pytest.raises(UserError, match="multiple of 16"):
        common.build_model(replace(PLAIN.network, width=24), data.shape, 2)
    common.save_checkpoint(tmp_path / "m.pth", common.make_model(recipe.network, data, split), data, recipe, 0)
    with pytest.raises(UserError, match="name it with --model"):
        common.load_checkpoint(tmp_path / "m.pth")
    loaded = common.load_checkpoint(tmp_path / "m.pth", recipe.network.model)
    assert type(loaded.model[1]).__name__ == "Good"
    (tmp_path / "evil.py").write_text("raise SystemExit('a checkpoint ran code')")
    saved = torch.load(tmp_path / "m.pth")
    saved["recipe"]["network"]["model"] = "evil:Net"
    torch.save(saved, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="name it with --model"):
        common.load_checkpoint(tmp_path / "evil.pth")


def test_checkpoint_round_trip_and_what_is_none(trained, fashion, runtime, tmp_path):
    model, recipe, _ = trained
    common.save_checkpoint(tmp_path / "m.pth", model, fashion, recipe, seed=0, of="a test")
    found = common.load_checkpoint(tmp_path / "m.pth")
    assert torch.equal(
        *(common.predict(network, fashion.test_images[:50], runtime) for network in (model, found.model))
    )
    assert (found.recipe, found.facts, found.classes) == (recipe, {"of": "a test"}, fashion.classes)
    assert (found.shape, found.dataset, found.fingerprint) == ((1, 28, 28), "fashion_mnist", fashion.fingerprint)
    content, saved = (tmp_path / "m.pth").read_bytes(), torch.load(tmp_path / "m.pth")
    torch.save(model, tmp_path / "whole_model")
    torch.save(saved | {"state": {}}, tmp_path / "no_state")
    torch.save(saved | {"recipe": saved["recipe"] | {"training": {"of_tomorrow": 1}}}, tmp_path / "other_recipe")
    torch.save({"format": saved["format"]}, tmp_path / "no_recipe")
    torch.save(saved | {"format": "small-cv-lab 3"}, tmp_path / "earlier_version")
    for name, start in {"half": content[: len(content) // 2], "text": b"no checkpoint", "nothing": b""}.items():
        (tmp_path / name).write_bytes(start)
    names = "whole_model no_state other_recipe no_recipe earlier_version half text nothing missing"
    for name in names.split():
        with pytest.raises(UserError, match=rf"^[^\n]*{name}[^\n]*$") as caught:
            common.load_checkpoint(tmp_path / name)
        assert "PyTorch" not in str(caught.value)  # its advice is to switch the safety off


# ---------------------------------------------------------------- statistics and results


def test_interval_is_students_t():
    mean, low, high, p, n = common.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)  # t(0.975, 4), from any table
    assert (mean, low, high, n) == pytest.approx((3, 3 - half, 3 + half, 5), abs=1e-5)
    assert p == pytest.approx(0.01324, abs=1e-5)  # of t = 4.2426 with 4 degrees of freedom
    for certain in ([2.0], [2.0, 2.0, 2.0], [0.1, 0.1, 0.1]):
        assert common.interval(certain)[1:4] == (-math.inf, math.inf, 1.0)


def test_a_jackknife_has_the_error_of_the_mean_of_the_pseudo_values():
    values = np.random.default_rng(0).lognormal(size=6)
    for statistic in (np.std, np.mean):
        whole = statistic(values)
        without = [statistic([*values[:out], *values[out + 1 :]]) for out in range(6)]
        error = stats.sem([6 * whole - 5 * other for other in without])  # Tukey's pseudo-values
        found = common.jackknife_interval(whole, without)
        assert (found.mean, found.n) == (whole, 6)
        assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 5, whole, error))
        assert found.p == pytest.approx(2 * stats.t.sf(whole / error, 5))
    assert found == pytest.approx(common.interval(values))  # of a mean


def test_holm_s_correction_is_that_of_its_paper_s_steps():
    p_values = [0.04, 0.001, 0.03, 0.5]
    # Sorted 0.001, 0.03, 0.04, 0.5; times 4, 3, 2, 1; none is smaller than the one before it.
    assert common.holm(p_values) == pytest.approx([0.09, 0.004, 0.09, 0.5])
    assert common.holm([0.6, 0.7]) == pytest.approx([1, 1])
    assert common.holm([]).shape == (0,)


def test_an_estimate_in_another_unit_keeps_its_order():
    estimate = common.Estimate(0.02, -0.01, 0.05, 0.3, 5)
    assert estimate.times(-100) == pytest.approx(common.Estimate(-2.0, -5.0, 1.0, 0.3, 5))


@pytest.mark.parametrize("without", [[2.0], [2.0, 2.0, 2.0], [0.3, 0.1 + 0.2, 0.3]])
def test_a_jackknife_of_equal_values_has_no_interval(without):
    assert common.jackknife_interval(2.0, without)[1:] == (-math.inf, math.inf, 1.0, len(without))


def test_an_estimate_writes_its_own_text():
    found = common.Estimate(1.234, -0.5, 2.96, 0.1, 5)
    assert found.text("points", "+.2f") == "+1.23 points [-0.50, +2.96]"
    assert found.text(digits=".1f") == "1.2 [-0.5, 3.0]"
    assert common.interval([2.0]).text("ms") == "2.00 ms (no interval)"


def test_crossed_interval_equals_a_slow_loop():
    generator = np.random.default_rng(0)
    table = generator.normal(0, 0.05, (4, 1)) + generator.normal(0, 0.3, (1, 50)) + generator.normal(0, 0.3, (4, 50))
    mean, squares = table.mean(), {"seeds": 0.0, "images": 0.0, "rest": 0.0}
    for row in table:  # analysis of variance, two ways, one observation a cell
        squares["seeds"] += 50 * (row.mean() - mean) ** 2 / 3
        for value, column in zip(row, table.T, strict=True):
            squares["images"] += (column.mean() - mean) ** 2 / 49
            squares["rest"] += (value - row.mean() - column.mean() + mean) ** 2 / (3 * 49)
    error = (squares["seeds"] + squares["images"] - squares["rest"]) / (4 * 50)
    freedom = 3 * (error / (squares["seeds"] / (4 * 50))) ** 2
    found = common.crossed_interval(table)
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, freedom, mean, error**0.5))
    assert found.p == pytest.approx(2 * stats.t.sf(abs(mean) / error**0.5, freedom))
    assert found.n == 4


@pytest.mark.parametrize(
    ("n", "seeds", "images", "low"),
    [(5, 0.0, 0.3, 0.92), (5, 0.01, 0.3, 0.92), (5, 0.03, 0.1, 0.92), (5, 0.0, 0.0, 0.92), (2, 0.03, 0.1, 0.82)],
)
def test_crossed_intervals_cover_as_often_as_they_say(n, seeds, images, low):
    generator = np.random.default_rng(0)
    drawn = generator.normal(0, seeds, (500, n, 1)) + generator.normal(0, images, (500, 1, 300))
    drawn += generator.normal(0, 0.3, (500, n, 300))
    covered = np.mean([found.low < 0 < found.high for found in map(common.crossed_interval, drawn)])
    assert low < covered < low + 0.06


def test_equal_differences_have_no_interval():
    found = common.crossed_interval(np.zeros((5, 100)))
    assert (found.mean, found.low, found.high, found.p) == (0, -math.inf, math.inf, 1)
    assert common.crossed_interval(np.ones((1, 100))).low == -math.inf


def test_json_has_no_nan(tmp_path):
    common.write_json(tmp_path / "a.json", {"a": math.nan, "b": [math.inf, np.float32(1.5)], "c": np.int64(2)})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": None, "b": [None, 1.5], "c": 2}


@pytest.mark.parametrize("content", ["x" * 10_000, {"weights": torch.zeros(10_000)}])
def test_a_full_disk_is_one_clear_line_and_the_old_file_stays(content, tmp_path, capsys):
    path, limits = tmp_path / "a.txt", resource.getrlimit(resource.RLIMIT_FSIZE)
    write = common.write_text if isinstance(content, str) else common.write_tensors
    path.write_text("old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # to write on fails, as on a full disk
    try:
        assert common.script(lambda _: write(path, content))(None) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = capsys.readouterr().err
    assert message.startswith(f"error: {path} cannot be written")
    assert message.count("\n") == 1
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_reports_name_what_lies_in_the_lab_without_its_folder(tmp_path):
    assert common.within_lab(ROOT / "tests" / ".." / "data") == Path("data")
    assert common.within_lab(tmp_path / "data") == tmp_path / "data"


def test_a_folder_holds_one_run(tmp_path, capsys, monkeypatch):
    data, options, out = dataset([0, 0, 1, 1], 2), parse(output_dir=tmp_path / "out"), tmp_path / "out"
    monkeypatch.setenv("PATH", "")  # no git program
    monkeypatch.setattr(sys, "argv", ["pytest", "--its-own-option"])  # not those of the script
    command = common.command_line(str(ROOT / "task9.py"), ["--dataset", "my images"])
    out.mkdir()
    for mine in ("notes.txt", "report.md", "config.json"):  # somebody's own, in a folder that was none of ours
        (out / mine).write_text("mine")
    for name in ("first.txt", "second.txt", "third.txt"):
        with common.open_run(options, data) as run:
            assert len(run.data.test_images) == 0
            shared = torch.load(out / ".dataset.pt")  # nor are they in the file, behind a view
            assert shared["test_images"].untyped_storage().nbytes() == 0
            with pytest.raises(UserError, match="another run"), common.open_run(options, data):
                pass
            common.write_text(run.folder / name, "x")
            run.progress.stage("a stage")
            run.finish({"n": math.nan}, ["# Report", "text"], options, command)
        (out / "study.log").write_text("x")  # of a script, for its next run
    always = {"config.json", "environment.json", "summary.json", "report.md"}
    others = {".lock", "notes.txt", "study.log", "previous", "yours"}
    assert {path.name for path in out.iterdir()} == always | {"third.txt"} | others
    assert {path.name for path in (out / "previous").iterdir()} == always | {"second.txt"}
    assert {path.name: path.read_text() for path in (out / "yours").iterdir()} == {
        "report.md": "mine",
        "config.json": "mine",
    }
    assert (out / "notes.txt").read_text() == "mine"
    assert "report.md: it is now" in capsys.readouterr().err
    assert json.loads((out / "environment.json").read_text())["git_commit"] is None
    assert "    python task9.py --dataset 'my images'\n" in (out / "report.md").read_text()
    config = json.loads((out / "config.json").read_text())
    assert (config["data_dir"], config["workers"], config["epochs"]) == ("data", common.usable_cores(), None)
    for content in ("{", "[]", '{"files": 3}', '{"files": ["../notes.txt", 3]}'):  # somebody else's
        (tmp_path / "summary.json").write_text(content)
        assert common._files_of_run(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used"), common.open_run(parse(output_dir=tmp_path / "file/x"), data):
        pass


# ---------------------------------------------------------------- machines, worker processes


def test_options_devices_and_cores(capsys):
    for device in ("cuda:7", "gpu", "meta"):
        with pytest.raises(UserError, match="--device"):
            common.resolve_runtime(device)
    threads = torch.get_num_threads()
    assert common.resolve_runtime("cpu", "bf16", threads + 1) == ("cpu", "bf16", threads + 1)
    assert torch.get_num_threads() == threads  # resolving changes nothing
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    assert common.usable_cores() == 1
    os.sched_setaffinity(0, cores)
    for wrong in (["--epochs", "0"], ["--width", "x"], ["--data-dir", ""], ["--image-size", "7"]):
        with pytest.raises(SystemExit):
            parse(*wrong)
        assert "is not a" in capsys.readouterr().err
    assert common.recipe_from(parse("--epochs", "3"), PLAIN) == PLAIN.replace(epochs=3)


def test_importing_does_nothing(tmp_path):
    code = "import os; before = dict(os.environ); import sys, common; assert before == dict(os.environ)\n"
    code += "print({'torchvision', 'matplotlib', 'optuna', 'onnx', 'scipy'} & {*sys.modules})"
    call = {"capture_output": True, "text": True, "cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    result = subprocess.run([sys.executable, "-c", code], **call)
    assert (result.stdout, result.stderr, list(tmp_path.iterdir())) == ("set()\n", "", [])


def count_to(data, runtime, top):
    """A job that yields 0, 1, ... and returns where it ran."""
    if top < 0:
        raise ValueError(f"{top} is negative")
    yield from range(top)
    return os.getpid(), runtime.threads, len(data.train_labels)


def echo(data, runtime):
    """A job that yields the answers it gets, until it gets an error, which it raises."""
    answer = None
    while not isinstance(answer, Exception):
        answer = yield answer
    raise answer


@pytest.fixture(scope="module")
def few(fashion):
    """The first 400 training images."""
    return replace(fashion, train_images=fashion.train_images[:400], train_labels=fashion.train_labels[:400])


@pytest.fixture(scope="module")
def worker(few, tmp_path_factory):
    """One worker process."""
    path = tmp_path_factory.mktemp("worker") / "data.pt"
    common.share_dataset(path, few)
    workers = common.Workers(1, common.Runtime("cpu", "fp32", 1), path)
    yield workers
    workers.stop()


def test_trainings_in_workers_are_those_of_this_process(tmp_path, few, runtime, worker):
    run = make_run(tmp_path, few, worker)
    split = common.split_dataset(few, 200)
    labels = (few.train_labels + 1) % 10
    jobs = [
        common.Job(PLAIN.replace(epochs=2, lr=lr), seed, split, labels, judged=split.train[:50], keeps_network=True)
        for seed, lr in ((1, 0.05), (2, 0.05), (3, 1e30))
    ]
    done = dict(run.train(jobs))
    common.apply_runtime(runtime)  # sums of two threads differ from those of one
    for number, job in enumerate(jobs):
        result = result_of(common.train_job(few, runtime, job))
        np.testing.assert_array_equal(done[number].step_losses, result.step_losses)
        assert str(done[number].epochs[-1].val_accuracy) == str(result.epochs[-1].val_accuracy)
        assert done[number].validation.accuracy == result.epochs[-1].val_accuracy
        for key, weight in done[number].network.state.items():
            np.testing.assert_array_equal(weight, result.network.state[key])
    model = done[0].network.rebuild()
    found = common.score(common.predict(model, few.train_images, runtime, split.train[:50]), labels[split.train[:50]])
    assert (done[0].judged.loss, done[0].judged.accuracy) == (pytest.approx(found.loss), found.accuracy)
    assert len(done[2].epochs) == 1
    assert run.progress.done == 3 * 2 * 200  # the bar ends at its end, also for a training that diverged


def test_the_best_weights_are_those_of_the_first_epoch_with_the_highest_validation_accuracy(few, runtime):
    split = common.split_dataset(few, 200)
    best_epochs = []
    usual = PLAIN.replace(epochs=5, lr=0.2)
    for seed, recipe in ((2, usual), (3, usual), (1, usual.replace(lr=1e-6, batch_norm=False))):
        job = common.Job(recipe, seed, split, keeps_network=True, keeps_best=True)
        result = result_of(common.train_job(few, runtime, job))
        model = common.make_model(recipe.network, few, split, seed)
        weights, accuracies = [], []
        for _ in common.train_epochs(model, few, recipe.training, runtime, split.train, seed):
            logits = common.predict(model, few.train_images, runtime, split.validation)
            accuracies.append(common.score(logits, few.train_labels[split.validation]).accuracy)
            weights.append(copy.deepcopy(model.state_dict()))
        assert [epoch.val_accuracy for epoch in result.epochs] == accuracies
        best_epochs.append(accuracies.index(max(accuracies)))
        for key in weights[0]:
            assert torch.equal(result.best_network.state[key], weights[best_epochs[-1]][key])
            assert torch.equal(result.network.state[key], weights[-1][key])
    assert any(0 < best < 4 for best in best_epochs[:2])
    assert len(set(accuracies)) == 1  # all epochs of the last training are equal, but not their weights
    assert not all(torch.equal(weights[0][key], weights[-1][key]) for key in weights[0])


@pytest.mark.parametrize(("lr", "epochs"), [(0.05, 3), (1e30, 1)])
def test_the_last_epoch_has_its_scores_also_where_no_other_has_and_the_training_diverges(few, runtime, lr, epochs):
    split = common.split_dataset(few, 200)
    job = common.Job(PLAIN.replace(epochs=3, lr=lr), 1, split, judged=split.train[:50])
    every = result_of(common.train_job(few, runtime, job))
    only_last = result_of(common.train_job(few, runtime, replace(job, scores_every_epoch=False)))
    assert len(every.epochs) == len(only_last.epochs) == epochs
    for epoch in every.epochs:
        assert (len(epoch.validation.right), len(epoch.judged.right)) == (len(split.validation), 50)
    for epoch in only_last.epochs[:-1]:
        assert (epoch.validation, epoch.judged) == (None, None)
        assert str((epoch.val_loss, epoch.val_accuracy)) == "(nan, nan)"
    for found, expected in ((only_last.validation, every.validation), (only_last.judged, every.judged)):
        np.testing.assert_equal(found, expected)


def test_worker_processes(worker):
    rows = worker.run(count_to, 10**9)
    assert [next(rows), next(rows)] == [0, 1]
    rows.close()  # ends the job; the worker is used again
    pid, threads, size = result_of(worker.run(count_to, 3))
    assert (pid, threads, size) == (worker.processes[0].pid, 1, 400)
    answers = worker.run(echo)
    assert [next(answers), answers.send("a"), answers.send(torch.ones(2)).sum()] == [None, "a", 2]
    with pytest.raises(UserError, match="of the user's making"):
        answers.send(UserError("of the user's making"))
    rows = worker.run(count_to, 10**9)
    next(rows)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(common.WorkerDied, match="ended with status -9"):
        result_of(rows)
    assert result_of(worker.run(count_to, 3))[0] != pid


def test_a_bug_in_a_worker_is_a_traceback_with_its_place_and_what_the_user_can_mend_is_one_line(worker, capsys):
    with pytest.raises(
        common.WorkerFailed, match=r'File ".*test_common\.py", line \d+, in count_to\n(.*\n)+ValueError: -1'
    ):
        next(worker.run(count_to, -1))
    answers = worker.run(echo)
    next(answers)
    assert common.script(lambda _: answers.send(PermissionError("no entry")))() == 2
    assert capsys.readouterr().err == "error: a worker failed with PermissionError: no entry\n"
    with pytest.raises(common.WorkerFailed, match=r"cannot pickle|Can't pickle|Can't get local"):
        next(worker.run(unpicklable))
    with pytest.raises(common.WorkerFailed, match="no_such_module"):
        next(worker.run(Missing()))
    assert worker.run(echo).send(None) is None  # it is used again
    assert common.script(lambda _: raise_(MemoryError()))() == 2
    assert capsys.readouterr().err == "error: MemoryError\n"
    with pytest.raises(TypeError, match="of the lab"):
        common.script(lambda _: dict(raise_(TypeError("of the lab"))))()


def raise_(error):
    raise error


def unpicklable(data, runtime):
    yield lambda: None


class Missing:
    """A job of a module that the worker does not find."""

    def __reduce__(self):
        return __import__, ("no_such_module",)


def test_only_the_kinds_that_are_named_become_the_users_errors():
    with pytest.raises(UserError, match=r"^the file: first$") as caught, common.user_error("the file", ValueError):
        raise ValueError("first\nsecond")
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(KeyError), common.user_error("the file", ValueError, TypeError):
        raise KeyError("x")


def test_a_bug_in_the_training_is_none_of_the_users_network(monkeypatch, fashion, runtime):
    split = common.split_dataset(fashion, 100)
    monkeypatch.setitem(common.SCHEDULES, "constant", None)
    common.check_recipe(PLAIN, fashion, split, runtime)
    job = common.Job(PLAIN, 0, split)
    with pytest.raises(AttributeError):
        result_of(common.train_job(fashion, runtime, job))


def test_signals_and_the_console_are_as_before_when_a_script_has_ended():
    before = signal.getsignal(signal.SIGTERM), getattr(sys.stdout, "errors", None)

    @common.script
    def main(_):
        assert signal.getsignal(signal.SIGTERM) != before[0]
        return 0

    assert main() == 0
    assert (signal.getsignal(signal.SIGTERM), getattr(sys.stdout, "errors", None)) == before


def sleep(data, runtime, job):
    Path(data.name, "seen").touch()
    yield time.sleep(300)  # in the middle of a long epoch


@common.script
def sleeping_script(output):
    parser = argparse.ArgumentParser()
    common.add_common_args(parser, output_dir=output, workers=1)
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 0, 1, 1])
    data = common.Dataset(str(output), "few", ("a", "b"), *images, *images)
    with common.open_run(parser.parse_args([]), data) as run:
        common.write_text(run.folder / "finished.txt", "x")
        list(run.train([common.Job(Recipe(), 0, common.split_dataset(data))]))


def run_sleeping_script(output):
    os.setsid()
    for number in (1, 2):
        with output.with_suffix(f".{number}").open("w") as stream:
            os.dup2(stream.fileno(), number)
    common.train_job = sleep
    sys.exit(sleeping_script(output))


def test_ends_of_a_run_leave_no_worker_and_no_temporary_data(tmp_path):
    ends = {signal.SIGINT: ("interrupted", 130), signal.SIGTERM: ("terminated", 143), signal.SIGKILL: ("", -9)}
    ends[signal.SIGHUP] = ("hung up", 129)
    started = {}
    for sent in ends:
        output = tmp_path / f"out{sent}"
        output.mkdir()
        (output / "summary.json").write_text("an earlier result")
        started[sent] = output, FORK.Process(target=run_sleeping_script, args=(output,))
        started[sent][1].start()
    for sent, (output, process) in started.items():
        wait_until((output / "seen").exists, process)
        (worker,) = workers_below(process.pid)
        (os.killpg if sent == signal.SIGINT else os.kill)(process.pid, sent)
        process.join(30)
        word, status = ends[sent]
        assert process.exitcode == status
        if word:
            errors = output.with_suffix(".2").read_text()
            assert errors == f"partial results are in {output / 'unfinished_run'}\n{word}\n"
            assert {path.name for path in output.iterdir()} == {".lock", "unfinished_run", "seen", "summary.json"}
            assert (output / "summary.json").read_text() == "an earlier result"
        end = time.time() + 20
        while Path(f"/proc/{worker}").exists() and time.time() < end:
            time.sleep(0.05)
        assert not Path(f"/proc/{worker}").exists()
