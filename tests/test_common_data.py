"""The data sets: published facts, splits, CIFAR-10 by its three ways, folders of pictures, sharing."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import common_data
from common import UserError


def test_statistics_are_the_published_ones(fashion):
    assert fashion.mean == pytest.approx((0.2860,), abs=5e-5)
    assert fashion.std == pytest.approx((0.3530,), abs=5e-5)


def test_statistics_equal_those_of_all_pixels_not_the_mean_over_pictures(fashion):
    images = fashion.train_images[:500].expand(-1, 3, -1, -1).clone()
    images[:, 1] //= 2
    mean, std = common_data.channel_statistics(images)
    pixels = images.double().div(255)
    assert mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-9)
    assert std == pytest.approx(pixels.transpose(0, 1).flatten(1).std(1, correction=0).tolist(), abs=1e-9)
    assert std[0] != pytest.approx(pixels.std((2, 3)).mean(0)[0].item(), abs=1e-3)


def test_fashion_mnist_is_what_was_published(fashion):
    assert fashion.train_images.shape == (60000, 1, 28, 28)
    assert fashion.test_images.shape == (10000, 1, 28, 28)
    assert fashion.train_images.dtype == torch.uint8
    assert torch.bincount(fashion.train_labels).tolist() == [6000] * 10
    assert fashion.classes[0] == "T-shirt/top"


def test_validation_is_disjoint_stratified_and_the_same_whatever_the_seed(fashion):
    torch.manual_seed(1)
    train, validation = common.split_validation(fashion.train_labels)
    torch.manual_seed(2)
    again = common.split_validation(fashion.train_labels)
    assert torch.equal(validation, again[1])
    assert not set(train.tolist()) & set(validation.tolist())
    assert len(train) + len(validation) == 60000
    assert torch.bincount(fashion.train_labels[validation]).tolist() == [600] * 10


@pytest.mark.parametrize("count", [1, 7, 500, 999, 1000, 2000])
def test_a_subset_is_spread_over_all_of_the_index(count):
    chosen = common.subset(torch.arange(1000), count)
    assert len(chosen) == len(chosen.unique()) == min(count, 1000)
    assert chosen.diff().max().item() - chosen.diff().min().item() <= 1 if count > 1 else chosen.tolist() == [0]


def hand_made_cifar(folder):
    """cifar-10-batches-py with the published layout and twenty pictures a batch."""
    batches = folder / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number, name in enumerate(["data_batch_1", "data_batch_2", "test_batch"]):
        data = generator.integers(0, 256, (20, 3072), dtype=np.uint8)
        data[:, 0] = number
        content = {"data": data, "labels": [i % 10 for i in range(20)], "batch_label": name}
        (batches / name).write_bytes(pickle.dumps(content, protocol=2))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, protocol=2))
    return batches


def test_cifar10_from_batches(tmp_path):
    hand_made_cifar(tmp_path)
    data = common.load_dataset("cifar10", tmp_path)
    assert data.train_images.shape == (40, 3, 32, 32)
    assert data.test_images[:, 0, 0, 0].tolist() == [2] * 20
    assert data.train_images[:, 0, 0, 0].tolist() == [0] * 20 + [1] * 20
    assert data.short_classes[:2] == ("plane", "car")
    assert "differ from the published" in data.source


def test_cifar10_batches_that_would_run_code_are_refused(tmp_path):
    batches = hand_made_cifar(tmp_path)

    class Attack:
        def __reduce__(self):
            return os.system, ("touch " + str(tmp_path / "owned"),)

    (batches / "data_batch_1").write_bytes(pickle.dumps({"data": Attack(), "labels": []}))
    with pytest.raises(UserError, match="data_batch_1"):
        common.load_dataset("cifar10", tmp_path)
    assert not (tmp_path / "owned").exists()


def test_cifar10_truncated_batch_is_named(tmp_path):
    batches = hand_made_cifar(tmp_path)
    content = (batches / "test_batch").read_bytes()
    (batches / "test_batch").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="test_batch"):
        common.load_dataset("cifar10", tmp_path)


def test_cifar10_without_network_fails_in_seconds_and_falls_back_only_by_default(tmp_path, monkeypatch, capsys):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    start = time.perf_counter()
    with pytest.raises(UserError, match="download failed"):
        common.load_dataset_or_fallback("cifar10", tmp_path / "wrong")
    assert time.perf_counter() - start < 15
    assert not (tmp_path / "wrong").exists()
    data = common.load_dataset_or_fallback(None, tmp_path)
    assert data.source == "Fashion-MNIST, embedded"
    assert "NOTE: running on the embedded Fashion-MNIST" in capsys.readouterr().err


def test_cifar10_from_an_image_folder(picture_folder, tmp_path):
    picture_folder.rename(tmp_path / "cifar10")
    data = common.load_dataset("cifar10", tmp_path)
    assert data.source == "CIFAR-10, image folder"
    assert data.train_images.shape == (72, 3, 32, 32)


def test_image_folder_of_any_size_and_mode(picture_folder):
    data = common.load_dataset(str(picture_folder))
    assert data.train_images.shape == (72, 3, 32, 32)
    assert data.classes == ("Ankle boot", "T-shirt-top", "Trouser")
    assert torch.bincount(data.test_labels).tolist() == [24] * 3
    brightness = data.train_images.float().mean((1, 2, 3)).view(3, 3, 8).mean((0, 1))  # by mode
    assert brightness.min() > 0.5 * brightness.max(), "a mode was decoded as black or white"


def test_names_that_are_no_utf8_can_be_printed_written_and_drawn(picture_folder, tmp_path, recwarn):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/n\xfcmen $_a$ \xe4\xb8\xad"))
    try:
        picture_folder.rename(folder)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    for split in ("train", "test"):
        (folder / split / "Trouser").rename(folder / split / os.fsdecode(b"caf\xe9 $_b$"))
    data = common.load_dataset(str(folder))
    assert data.source == "n\ufffdmen $_a$ \u4e2d, image folder"
    assert data.classes[-1] == "caf\ufffd $_b$"
    common.write_json(tmp_path / "a.json", {"folder": folder, "classes": data.classes})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["folder"] == str(folder)
    with common.figure(tmp_path / "a.png", data.source):
        pass
    assert (tmp_path / "a.png").stat().st_size > 100
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_pictures_are_found_in_subfolders_and_in_the_order_of_their_paths(tmp_path):
    names = ["b.png", "a/z.JPG", "a-/y.png", "a/b/x.webp", "a.png", "a/notes.txt", ".png", "B.gif", "a/.hidden.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"picture")
    expected = sorted(path for path in tmp_path.rglob("*") if path.suffix.lower() in {".png", ".jpg", ".webp", ".gif"})
    found = common_data.picture_files(str(tmp_path))
    assert [Path(path) for path, _ in found] == expected
    assert {facts.st_size for _, facts in found} == {7}


def test_image_folder_cache_is_used_and_renewed(picture_folder, monkeypatch):
    first = common.load_dataset(str(picture_folder))
    decode = common_data._decode
    monkeypatch.setattr(common_data, "_decode", lambda paths: pytest.fail("decoded again"))
    second = common.load_dataset(str(picture_folder))
    assert torch.equal(first.train_images, second.train_images)
    monkeypatch.setattr(common_data, "_decode", decode)
    removed = next((picture_folder / "train" / "Trouser").iterdir())
    removed.unlink()
    assert len(common.load_dataset(str(picture_folder)).train_images) == 71
    cache = next(picture_folder.parent.glob(".*.cache.pt"))
    cache.write_bytes(cache.read_bytes()[:1000])
    assert len(common.load_dataset(str(picture_folder)).train_images) == 71


def test_image_folder_faults_are_named(picture_folder, tmp_path):
    with pytest.raises(UserError, match="neither"):
        common.load_dataset(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no image folder"):
        common.load_dataset(str(picture_folder / "train"))
    broken = picture_folder / "train" / "Trouser" / "broken.jpg"
    broken.write_bytes(b"\xff\xd8 no picture")
    with pytest.raises(UserError, match=r"broken\.jpg"):
        common.load_dataset(str(picture_folder))
    broken.unlink()
    (picture_folder / "train" / "Zebra").mkdir()
    with pytest.raises(UserError, match=r"Zebra.* holds no pictures"):
        common.load_dataset(str(picture_folder))
    shutil.copy(next((picture_folder / "train" / "Trouser").iterdir()), picture_folder / "train" / "Zebra")
    with pytest.raises(UserError, match=r"Zebra.* holds one picture"):
        common.load_dataset(str(picture_folder))


def test_picture_bomb_is_refused(picture_folder):
    from PIL import Image

    bomb = picture_folder / "test" / "Trouser" / "bomb.png"
    Image.new("1", (12000, 12000)).save(bomb)
    with pytest.raises(UserError, match=r"bomb\.png"):
        common.load_dataset(str(picture_folder))


def test_broken_link_is_no_silently_missing_picture(picture_folder):
    (picture_folder / "train" / "Trouser" / "gone.png").symlink_to(picture_folder / "nowhere.png")
    with pytest.raises(OSError, match=r"gone\.png"):
        common.load_dataset(str(picture_folder))


def test_shared_dataset_is_the_same(fashion):
    small = replace(fashion, train_images=fashion.train_images[:9], train_labels=fashion.train_labels[:9])
    with common.shared_dataset(small) as path:
        shared = common.open_shared(path)
        assert torch.equal(shared.train_images, small.train_images)
        assert shared.mean == small.mean
        assert shared.classes == small.classes
