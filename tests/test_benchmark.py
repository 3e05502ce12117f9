"""The benchmark, on a few images: its counts and views against references, and that it goes on where it stopped."""

from __future__ import annotations

import json
from dataclasses import replace

import benchmark_search
import benchmark_training
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import InProcess

import common
import task3_optuna

OPTIONS = ["--quick", "--rounds", "1", "--presets", "small", "plain", "--width", "16", "--images", "256", "--dataset"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run with one seed."""
    folder = tmp_path_factory.mktemp("benchmark")
    options = [*OPTIONS, "fashion_mnist", "--output-dir", str(folder), "--seeds", "1"]
    assert benchmark_training.main(options) == 0
    return folder


def test_a_run_writes_everything_and_the_next_one_trains_what_is_missing(finished, capsys):
    written = {path.name for path in finished.iterdir() if path.name[0] != "."}
    files = {"speed.csv", "frontier.csv", "plain.csv", "summary.json", "report.md", "training_frontier.png"}
    assert written == files | {"config.json", "environment.json"}
    first = pd.read_csv(finished / "frontier.csv")
    other = first.assign(accuracy=0.5, seed=1, setup=first.setup.str.replace("256 images", "512 images"))
    pd.concat([first, other]).to_csv(finished / "frontier.csv", index=False)
    options = [*OPTIONS, "fashion_mnist", "--output-dir", str(finished), "--seeds", "2"]
    assert benchmark_training.main(options) == 0
    shown = capsys.readouterr().out
    assert shown.count("seed 0: finished by an earlier run") == 2  # of the preset and of the plain recipe
    assert "seed 1: finished" not in shown  # that was of other images
    rows = pd.read_csv(finished / "frontier.csv")
    assert len(rows) == 3 * len(first)
    pd.testing.assert_frame_equal(rows[: len(first)], first)
    summary = json.loads((finished / "summary.json").read_text())
    small, mine = summary["presets"]["small"], rows[rows.preset == "small"].set_index(["setup", "seed"])
    assert (small["n"], small["width"], small["optimizer"]) == (2, 16, "Muon")
    assert small["accuracy"] == pytest.approx(mine.loc[first.setup[0]].accuracy.mean())
    assert summary["plain"]["n"] == 2
    assert summary["verdict"] in (finished / "report.md").read_text()


def test_counted_arithmetic_is_that_of_the_layers(fashion):
    recipe = common.PRESETS["small"].replace(width=16, epochs=3, batch_size=100)
    model = common.build_model(recipe.network, fashion.shape, len(fashion.classes))
    shapes = {}
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(lambda module, _, out: shapes.update({module: out[0, 0].numel()}))
    model.eval()(fashion.train_images[:1].float())
    stem = model[1].stem
    first = model[1].blocks[0].convolution
    flop = 0
    update = 0
    for module, pixels in shapes.items():
        passes = 3  # forward, and backward for weights and inputs
        if module is stem:  # which is fixed
            passes = 1
        elif module is first:  # whose input, the stem's output, needs no gradient
            passes = 2
        flop += passes * 2 * pixels * module.weight.numel()
        if isinstance(module, torch.nn.Conv2d) and module is not stem:
            rows, columns = module.weight.flatten(1).shape
            update += 3 * (2 * 2 * rows**2 * columns + 2 * rows**3)  # three steps of Newton and Schulz
    total, optimizer = benchmark_training.count_tflop(fashion, recipe, 1050)
    assert optimizer == pytest.approx(30 * update / 1e12)
    assert total == pytest.approx((3000 * flop + 30 * update) / 1e12)


def test_presets_and_the_record_recipe_cost_what_is_said(fashion):
    images = torch.nn.functional.pad(fashion.train_images[:8], (2, 2, 2, 2)).repeat(1, 3, 1, 1)
    as_cifar10 = replace(fashion, train_images=images)
    of = {}
    for name, recipe in benchmark_training.RECIPES.items():
        of[name], _ = benchmark_training.count_tflop(as_cifar10, recipe, 50_000)
    assert of["small"] < 8
    assert of["medium"] < 45
    assert of["large"] < 220
    assert of[benchmark_training.ANCHOR] == pytest.approx(benchmark_training.MEASURED["tflop"], abs=0.1)


def test_the_record_recipe_is_judged_and_the_plain_one_may_be_missing(finished):
    rows = pd.read_csv(finished / "frontier.csv").query("preset != 'plain'")
    record = rows.assign(preset=benchmark_training.ANCHOR, accuracy=0.95, width=64)
    summary = benchmark_training.judge(pd.concat([rows, record]))
    assert list(summary["presets"]) == ["small", benchmark_training.ANCHOR]
    assert summary["to_accuracy"][0]["preset"] == benchmark_training.ANCHOR  # the only one to reach 0.80
    assert "plain" not in {*summary} | {*summary["verdict"].split()}


def test_more_views_are_averaged_for_the_least_certain_images_alone(fashion, runtime):
    model = common.make_model(common.Network(width=16), fashion, common.split_dataset(fashion, 100))
    few = replace(fashion, test_images=fashion.test_images[:400], test_labels=fashion.test_labels[:400])
    found = benchmark_training.accuracies(model, few, runtime)
    assert list(found) == list(benchmark_training.VIEWS)

    def right(logits):
        return (logits.argmax(1) == few.test_labels).float().mean()

    one, mirrored = (common.predict(model, images, runtime) for images in (few.test_images, few.test_images.flip(3)))
    assert found["accuracy"] == pytest.approx(right(one))
    assert found["flip_averaged"] == pytest.approx(right(one + mirrored))
    padded = torch.from_numpy(np.pad(few.test_images.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), "reflect"))
    crops = [few.test_images, padded[:, :, 2:, 2:], padded[:, :, :-2, :-2]]
    six = sum(common.predict(model, view.contiguous(), runtime) for x in crops for view in (x, x.flip(3)))
    assert found["six_views"] == pytest.approx(right(six))
    mixed, order = one.clone(), one.softmax(1).amax(1).argsort()
    mixed[order[:100]] = six[order[:100]]
    assert found["selective_25"] == pytest.approx(right(mixed))


def test_bad_input_is_one_clear_line(tmp_path, capsys, image_folder):
    options = [*OPTIONS, str(image_folder), "--output-dir", str(tmp_path / "out")]
    assert benchmark_training.main(options) == 2
    assert "72 training images, 128 are needed" in capsys.readouterr().err
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "frontier.csv").write_text("preset,seed,setup\nsmall\n")
    options[options.index(str(image_folder))] = "fashion_mnist"
    assert benchmark_training.main(options) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("its trainings are measured again")
    assert (tmp_path / "out" / "frontier.csv").read_text() == "preset,seed,setup\nsmall\n"


# ---------------------------------------------------------------- whole studies


def test_studies_are_judged_as_task_3_does_and_finished_ones_are_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, "Workers", InProcess)
    small = ["--quick", "--images", "320", "--workers", "1", "--dataset", "fashion_mnist"]
    options = [*small, "--width", "16", "--designs", "random"]
    assert benchmark_search.main([*options, "--studies", "1", "--output-dir", str(tmp_path / "searches")]) == 0
    rows = pd.read_csv(tmp_path / "searches" / "studies.csv")
    assert rows["trials"].tolist() == [3, 6]
    assert benchmark_search.main([*options, "--studies", "2", "--output-dir", str(tmp_path / "searches")]) == 0
    assert "random, seed 0: finished by an earlier run" in capsys.readouterr().out
    again = pd.read_csv(tmp_path / "searches" / "studies.csv")
    pd.testing.assert_frame_equal(again[:2], rows)
    summary = json.loads((tmp_path / "searches" / "summary.json").read_text())
    last = again[again["trials"] == 6]
    assert summary["designs"]["random"]["studies"] == 2
    assert summary["designs"]["random"]["median"] == pytest.approx(last["difference"].median(), abs=0.01)
    assert (tmp_path / "searches" / "searches.png").exists()

    own = [*small, "--trials", "6", "--sampler", "random", "--pruner", "none", "--output-dir", str(tmp_path / "task3")]
    assert task3_optuna.main(own) == 0
    found = json.loads((tmp_path / "task3" / "summary.json").read_text())
    row = rows.iloc[-1]
    assert (row["trial"], row["value"]) == (found["best"]["number"], found["best"]["value"])
    assert row["confirmed"] == pytest.approx(found["confirmation"]["mean"])
    assert row["difference"] == pytest.approx(100 * found["retrain"]["difference_to_lab"]["mean"])
