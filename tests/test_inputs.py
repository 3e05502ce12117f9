"""What people really have: networks with a life of their own, modules that are programs, images that decode oddly."""

from __future__ import annotations

import itertools
import os
import random
import signal
import struct
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT, make_run, result_of
from PIL import Image
from torch import nn

import common
import task4_onnx as task4
from common import Job, Recipe, Runtime, UserError

NUMBERS = itertools.count()
TRAINING = common.Training(optimizer="AdamW", lr=1e-3, label_smoothing=0, crop_padding=0, batch_size=32, epochs=1)
BF16 = Runtime("cpu", "bf16", 1)


@pytest.fixture(scope="module")
def few(fashion):
    """The first 600 training and 200 test images."""
    return replace(
        fashion,
        train_images=fashion.train_images[:600],
        train_labels=fashion.train_labels[:600],
        test_images=fashion.test_images[:200],
        test_labels=fashion.test_labels[:200],
    )


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A function that makes a network of a module in the working directory: its recipe."""
    monkeypatch.chdir(tmp_path)

    def recipe(code, name="Net", folder=tmp_path):
        module = f"users_net_{next(NUMBERS)}"
        (folder / f"{module}.py").write_text(f"import torch\nfrom torch import nn\n{textwrap.dedent(code)}")
        return Recipe(common.Network(model=f"{module}:{name}"), TRAINING)

    return recipe


def check(recipe, data, runtime):
    common.check_recipe(recipe, data, common.split_dataset(data), runtime)


LAYERS = """
class Layers(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(3 * 28 * 28, num_classes)
    def forward(self, images):
        return self.head(images.flatten(1))
"""
WIRED = """
class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.order = {draw}
        self.head = nn.Linear(3 * 28 * 28, num_classes)
    def forward(self, images):
        return self.head(images.flatten(1)[:, self.order])
"""


# ---------------------------------------------------------------- a network rebuilt is the network trained


@pytest.mark.parametrize(
    "draw",
    [
        "torch.randperm(2352)",
        "torch.from_numpy(__import__('numpy').random.permutation(2352))",
        "torch.tensor(__import__('random').sample(range(2352), 2352))",
    ],
)
def test_a_network_with_random_wiring_is_rebuilt_with_its_seed(own, few, runtime, tmp_path, draw):
    recipe = own(WIRED.format(draw=draw))
    check(recipe, few, runtime)
    split = common.split_dataset(few)
    job = common.train_job(few, runtime, Job(recipe, 7, split, keeps_network=True, keeps_best=True))
    trained = result_of(job)
    model = trained.network.rebuild()
    logits = common.predict(model, few.train_images, runtime, split.validation)
    found = common.score(logits, few.train_labels[split.validation])
    assert found.accuracy == trained.validation.accuracy > 0.4
    assert trained.best_network.rebuild()
    common.save_checkpoint(tmp_path / "net.pth", model, few, recipe, seed=7)
    loaded = common.load_checkpoint(tmp_path / "net.pth", recipe.network.model)
    assert torch.equal(common.predict(loaded.model, few.train_images, runtime, split.validation), logits)
    content = torch.load(tmp_path / "net.pth")
    torch.save(content | {"seed": 8}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="is not the network that was trained: its logits differ"):
        common.load_checkpoint(tmp_path / "other.pth", recipe.network.model)
    state = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    trained.network.rebuild()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state  # noqa: NPY002


def test_in_every_process_a_module_draws_the_same_and_all_cores_are_used(own, few, tmp_path):
    recipe = own("ORDER = torch.randperm(2352)\n" + WIRED.format(draw="ORDER"))
    model = common.build_model(recipe.network, few.shape, 10, seed=3)
    code = f"""
        import common, torch
        torch.rand(5)
        model = common.build_model(common.Network(model={recipe.network.model!r}), (1, 28, 28), 10, seed=4)
        print(common.usable_cores(), model[1].order.tolist())
    """
    call = [sys.executable, "-c", textwrap.dedent(code)]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_PROC_BIND": "true"}  # as on clusters
    printed = subprocess.run(call, env=variables, capture_output=True, text=True, cwd=tmp_path)
    assert printed.stdout.strip() == f"{common.usable_cores()} {model[1].order.tolist()}", printed.stderr


def test_what_a_network_learns_outside_its_state_dict_is_refused_at_the_start(own, few, runtime):
    averaging = """
    class Net(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.mean = 0.0
            self.head = nn.Linear(2352, num_classes)
        def forward(self, images):
            x = images.flatten(1)
            if self.training:
                self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
            return self.head(x - self.mean)
    """
    with pytest.raises(UserError, match="must be a parameter or a buffer"):
        check(own(averaging), few, runtime)


def test_extra_state_is_kept_if_it_can_be_loaded_without_executing_code(own, few, runtime):
    extra = """
    class Thing:
        pass
    class Net(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.scale = {"by": 1.0}
            self.head = nn.Linear(2352, num_classes)
        def get_extra_state(self):
            return STATE
        def set_extra_state(self, state):
            self.scale = state
        def forward(self, images):
            if self.training:
                self.scale = {"by": self.scale["by"] + 1}
            return self.scale["by"] * self.head(images.flatten(1))
    """
    check(own(extra.replace("STATE", "self.scale")), few, runtime)
    with pytest.raises(UserError, match=r"^[^\n]*cannot be used[^\n]*$"):
        check(own(extra.replace("STATE", "Thing()")), few, runtime)


def test_networks_that_share_weights_are_refused_and_those_that_ignore_the_seed_are_told(own, few, runtime, capsys):
    once = LAYERS + "ONLY = Layers(10)\ndef Net(num_classes):\n    return ONLY"
    with pytest.raises(UserError, match="gives the same weights to be trained each time"):
        check(own(once), few, runtime)
    part = LAYERS.replace(
        "def __init__(self, num_classes", "def __init__(self, num_classes, first=nn.Linear(2352, 2352)"
    )
    part = part.replace("self.head =", "self.first = first; self.head =")
    with pytest.raises(UserError, match="gives the same weights to be trained each time"):
        check(own(part, "Layers"), few, runtime)
    table = LAYERS.replace("self.head =", "self.register_buffer('mean', MEAN); self.head =")
    check(own(f"MEAN = torch.zeros(3)\n{table}", "Layers"), few, runtime)
    assert capsys.readouterr().err == ""
    check(own(LAYERS.replace("super()", "torch.manual_seed(42); super()"), "Layers"), few, runtime)
    assert "starts with the same weights whatever the seed" in capsys.readouterr().err


def test_a_network_that_depends_on_the_process_is_refused_before_the_trainings(own, few, tmp_path):
    recipe = own(WIRED.format(draw="torch.roll(torch.arange(2352), hash('a string') % 2000)"))
    path = tmp_path / "data.pt"
    common.share_dataset(path, few)
    workers = common.Workers(1, Runtime("cpu", "fp32", 1), path)
    workers.start_method = "spawn"  # a fork would have this process's hashes
    run = make_run(tmp_path / "out", few, workers)
    try:
        with pytest.raises(UserError, match="is not the network that was trained"):
            common.prove_network(run, recipe, common.split_dataset(few))
    finally:
        workers.stop()


# ---------------------------------------------------------------- the check before a run does what the run does


def test_networks_that_would_fail_later_are_refused_before_the_training(own, few, runtime):
    product = """
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x.mm(w.t())
        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            return g.mm(w), g.t().mm(x)
    class Net(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.first, self.weight = nn.Linear(2352, 16), nn.Parameter(torch.randn(num_classes, 16))
        def forward(self, images):
            return Product.apply(self.first(images.flatten(1)), self.weight)
    """
    recipe = own(product)
    check(recipe, few, runtime)
    with pytest.raises(UserError, match=r"cannot be trained on 2 images of 1x28x28 in bf16: .*dtype"):
        check(recipe, few, BF16)
    squeezed = LAYERS.replace("self.head(images.flatten(1))", "self.head(images.flatten(1)).squeeze()")
    with pytest.raises(UserError, match=r"for 1 image\(s\) have the shape \(10,\), expected \(1, 10\)"):
        check(own(squeezed, "Layers"), few, runtime)
    noisy = LAYERS.replace("images.flatten(1)", "nn.functional.dropout(images, 0.3).flatten(1)")
    with pytest.raises(UserError, match="change from call to call: is dropout or noise always active"):
        check(own(noisy, "Layers"), few, runtime)
    infinite = LAYERS.replace("self.head(images.flatten(1))", "self.head(images.flatten(1)) / 0")
    with pytest.raises(UserError, match="its outputs are not finite"):
        check(own(infinite, "Layers"), few, runtime)


def test_what_is_odd_but_no_error_is_said(own, few, runtime, capsys):
    check(own(LAYERS.replace("flatten(1))", "flatten(1)).softmax(1)"), "Layers"), few, runtime)
    assert "better leave its softmax out" in capsys.readouterr().err
    of_batch = "x = images.flatten(1)\n        return self.head(x - x.mean(0))"
    check(own(LAYERS.replace("return self.head(images.flatten(1))", of_batch), "Layers"), few, runtime)
    assert "depend on the other images of the batch" in capsys.readouterr().err
    check(own(LAYERS, "Layers"), few, BF16)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("layer", ["nn.Conv2d(3, 4, 3)", "nn.LazyConv2d(4, 3)", "Deep()"])
def test_layers_without_sizes_and_of_five_dimensions(own, few, runtime, layer):
    layers = f"""
    class Deep(nn.Conv3d):
        def __init__(self):
            super().__init__(1, 4, (3, 3, 3))
        def forward(self, images):
            return super().forward(images[:, None])[:, :, 0]
    def Net(num_classes):
        return nn.Sequential({layer}, nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(num_classes))
    """
    recipe = own(layers)
    check(recipe, few, runtime)
    one, other = (common.build_model(recipe.network, few.shape, 10, seed=5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert one.training


# ---------------------------------------------------------------- import of other people's code


def test_a_module_that_is_a_program_is_imported_as_one(own, few, runtime, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["task4_onnx.py", "--quick"])
    program = """
    import argparse, multiprocessing, os, random, signal, sys
    import numpy as np
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float)
    parser.parse_args()
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.set_num_threads(3)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.autograd.set_detect_anomaly(True)
    multiprocessing.set_start_method("spawn")
    np.seterr(all="raise")
    sys.path.insert(0, "/somewhere")
    """
    before = Path.cwd(), torch.get_num_threads(), signal.getsignal(signal.SIGTERM), sys.path[:5]
    check(own(textwrap.dedent(program) + LAYERS, "Layers"), few, runtime)
    assert (Path.cwd(), torch.get_num_threads(), signal.getsignal(signal.SIGTERM), sys.path[:5]) == before
    assert "/somewhere" in sys.path
    assert (torch.get_default_dtype(), torch.is_grad_enabled()) == (torch.float32, True)
    assert (torch.is_anomaly_enabled(), np.geterr()["over"]) == (False, "warn")
    assert sys.argv == ["task4_onnx.py", "--quick"]
    for end in (
        "raise SystemExit('usage: train.py')",
        "sys.exit(2)",
        "parser = argparse.ArgumentParser().parse_args(['x'])",
    ):
        recipe = own(f"import argparse, sys\n{end}\n{LAYERS}", "Layers")
        with pytest.raises(UserError, match=r"^--model: [^\n]* ends the program[^\n]*__main__"):
            check(recipe, few, runtime)
    assert "usage" in capsys.readouterr().err  # of the other program


def test_a_module_may_have_a_common_of_its_own_and_no_other_file_is_executed(own, few, runtime, tmp_path, monkeypatch):
    for name in ("sitecustomize", "queue", "onnxruntime", "scipy"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('nobody asked for this file')")
    (tmp_path / "common.py").write_text("from torch import nn\ndef head(k):\n    return nn.Linear(2352, k)\n")
    code = """
        from common import head
        def Net(num_classes):
            import common
            return nn.Sequential(nn.Flatten(), common.head(num_classes))
    """
    recipe = own(code)
    check(recipe, few, runtime)
    check(recipe, few, runtime)
    assert sys.modules["common"] is common
    (tmp_path / "scipy.py").unlink()
    (tmp_path / "torchvision.py").write_text("Nothing = 1")
    with pytest.raises(UserError, match=r"modules of the same name as .*torchvision\.py"):
        common.import_callable("torchvision:Nothing")


# ---------------------------------------------------------------- folding and ONNX files

RECURRENT = """
class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, num_classes)
    def forward(self, images):
        x = self.stem(images)
        for _ in range(3):
            x = x + self.norm(self.conv(x)).relu()
        return self.head(x.mean((2, 3)))
"""


def make_lab(data, folder, *options):
    """A run of Task 4 and its options."""
    options = task4.parse_args(["--quick", "--images", "300", "--output-dir", str(folder), *options])
    return make_run(folder, data), options


def test_maps_that_are_viewed_are_kept_contiguous(own, few, runtime, tmp_path):
    viewed = """
    class Net(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.head = nn.Linear(6272, num_classes)
        def forward(self, images):
            x = self.norm(self.conv(images)).relu()
            return self.head(x.view(x.size(0), -1))
    """
    recipe = own(viewed)
    check(recipe, few, runtime)
    check(recipe, few, BF16)
    colours = few.train_images.repeat(1, 3, 1, 1).contiguous(memory_format=torch.channels_last)
    three = replace(few, train_images=colours)
    model = common.make_model(recipe.network, three, common.split_dataset(three)).eval()
    assert task4.find_tuning(model, three) == task4.Tuning(layout=torch.contiguous_format)
    run, _ = make_lab(three, tmp_path / "out", "--model", recipe.network.model)
    task4.try_export(run, model)
    flat = own(viewed.replace("x.view(x.size(0), -1)", "x.flatten(1)"))
    assert task4.find_tuning(common.make_model(flat.network, few, common.split_dataset(few)), few) == task4.Tuning()


def test_batch_norm_is_folded_only_where_that_changes_nothing(own, few, tmp_path, capsys):
    recipe = own(RECURRENT)
    model = common.make_model(recipe.network, few, common.split_dataset(few)).train()
    for _ in range(5):
        model(few.train_images[:50].float() / 255)
    model.eval()
    images = few.test_images[:20]
    assert not common.is_same(task4.fold(model)(images.float() / 255), model(images.float() / 255))
    tuning = task4.find_tuning(model, few)
    assert tuning == task4.Tuning(folds=False)
    assert "BatchNorm is not folded" in capsys.readouterr().err
    run, options = make_lab(few, tmp_path / "out", "--model", recipe.network.model)
    task4.make_files(run, options, model, None, tuning)
    logits = task4.OnnxFile(run.folder / "model.onnx", few.shape).classify(images)
    assert common.is_same(torch.from_numpy(logits), model(images.float() / 255))


def test_a_network_that_cannot_be_exported_is_refused_before_the_training(own, few, tmp_path):
    branch = LAYERS.replace(
        "return self.head", "images = images / 2 if images.mean() > 9 else images\n        return self.head"
    )
    recipe = own(branch, "Layers")
    run, options = make_lab(few, tmp_path / "out", "--model", recipe.network.model)
    with pytest.raises(
        UserError, match=r"^the network cannot be exported to ONNX: [^\n\x1b]*data-dependent[^\n\x1b]*$"
    ):
        task4.obtain_model(run, options, recipe, None)
    assert [*run.folder.iterdir()] == []
    task4.try_export(run, common.make_model(own(LAYERS, "Layers").network, few, common.split_dataset(few)).eval())
    assert [*run.folder.iterdir()] == []


class Pair(nn.Module):
    """It gives features, too, and first."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return images.mean((2, 3)), self.model(images)


def test_onnx_files_as_other_programs_write_them(own, few, tmp_path, capsys):
    network = """
        def Net(num_classes):
            return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(1568, num_classes))
    """
    recipe = own(network)
    model = common.make_model(recipe.network, few, common.split_dataset(few)).eval()
    run, options = make_lab(few, tmp_path / "out", "--model", recipe.network.model)
    images = few.test_images
    three = replace(few, train_images=few.train_images.repeat(1, 3, 1, 1), test_images=images.repeat(1, 3, 1, 1))
    logits = model(images.float() / 255).detach().numpy()
    run.folder.joinpath("model.pth").touch()
    for ending in (nn.Softmax(1), nn.LogSoftmax(1)):
        (run.folder / "model.onnx").unlink(missing_ok=True)
        with task4.advice_hidden():
            task4.export(nn.Sequential(model, ending), images[:2], few.classes, tmp_path / "end.onnx", is_custom=True)
        given = task4.examine(tmp_path / "end.onnx", few)
        task4.make_files(run, options, model, given, task4.Tuning())
        own_outputs = task4.OnnxFile(given.content, few.shape).classify(images)
        judged = task4.judge(run, options, {task4.BASELINE: logits, task4.CONVERTED: own_outputs}, few, given)
        assert judged[task4.CONVERTED].verdict == "accepted"
        assert "probabilities, not logits" in capsys.readouterr().err
        wrong = {task4.BASELINE: logits, task4.CONVERTED: np.roll(own_outputs, 1, 1)}
        assert task4.judge(run, options, wrong, few, given)[task4.CONVERTED].verdict == "refused"
    with task4.advice_hidden():
        two = torch.onnx.export(Pair(model), (images[:2].float() / 255,), dynamic_shapes=({0: "n"},), verbose=False)
    onnx.save(two.model_proto, tmp_path / "two.onnx")
    given = task4.examine(tmp_path / "two.onnx", few)
    assert common.is_same(
        torch.from_numpy(task4.OnnxFile(given.content, few.shape).classify(images)), torch.tensor(logits)
    )
    assert "is judged" in capsys.readouterr().err
    with task4.advice_hidden():
        bare = torch.onnx.export(
            model[1], (model[0](images[:2].float() / 255),), dynamic_shapes=({0: "n"},), verbose=False
        )
    onnx.save(bare.model_proto, tmp_path / "bare.onnx")
    given = task4.normalise_inputs(task4.examine(tmp_path / "bare.onnx", three), model, three)
    assert "expects normalised images" in capsys.readouterr().err
    found = task4.OnnxFile(given.content, three.shape).classify(three.test_images)
    assert common.is_same(torch.from_numpy(found), torch.tensor(logits))
    assert task4.normalise_inputs(given, model, three) == given
    (run.folder / "model.onnx").unlink()
    task4.make_files(run, options, model, None, task4.Tuning())
    whole = task4.examine(run.folder / "model.onnx", few)  # it takes grey images and repeats them
    assert task4.normalise_inputs(whole, model, few) == whole
    half = common.make_model(recipe.network, few, common.split_dataset(few)).eval().half()
    program = torch.onnx.export(half, (images[:2].half() / 255,), dynamic_shapes=({0: "n"},), verbose=False)
    onnx.save(program.model_proto, tmp_path / "half.onnx")
    given = task4.examine(tmp_path / "half.onnx", few)
    assert (given.name, given.is_half) == ("model.onnx", True)
    (run.folder / "model.onnx").write_bytes(given.content)
    rounded = task4.OnnxFile(given.content, few.shape).classify(images).astype(np.float32)
    outputs = {task4.BASELINE: logits, task4.CONVERTED: rounded + 0.01 * np.abs(logits).max()}  # no rounding is larger
    assert task4.judge(run, options, outputs, few, None)[task4.CONVERTED].verdict == "refused"
    assert task4.judge(run, options, outputs, few, given)[task4.CONVERTED].verdict != "refused"


# ---------------------------------------------------------------- images


def write_folder(root, images):
    """{train,test}/<class>/ with these images (by class, of any kind that ``save`` takes), the same in both halves."""
    for half, name in itertools.product(("train", "test"), images):
        (root / half / name).mkdir(parents=True)
        for number, image in enumerate(images[name]):
            image.save(root / half / name / f"{number}.png")


def pictures(fashion, *labels, count=4):
    """Images of Fashion-MNIST, by class."""
    found = {}
    for label in labels:
        chosen = fashion.train_images[fashion.train_labels == label][:count, 0].numpy()
        found[f"class {label}"] = [Image.fromarray(pixels) for pixels in chosen]
    return found


def test_classes_keep_their_identity_whatever_their_encoding(tmp_path, fashion):
    write_folder(tmp_path, pictures(fashion, 0, 1, 2))
    for half in ("train", "test"):
        for name, encoded in (("class 0", "狗".encode("gbk")), ("class 1", "鸟".encode("gbk"))):
            (tmp_path / half / name).rename(tmp_path / half / os.fsdecode(encoded))
    data = common.load_dataset(str(tmp_path))
    assert data.classes == ("\\xb9\\xb7", "\\xc4\\xf1", "class 2")
    assert data.train_labels.bincount().tolist() == [4, 4, 4]
    for half in ("train", "test"):
        (tmp_path / half / "class 2").rename(tmp_path / half / "two\nlines")
    assert common.load_dataset(str(tmp_path)).classes[-1] == "two\\nlines"
    assert task4.shortened(["airplane", "automobile"]) == ["plane", "car"]
    assert task4.shortened(["airplane", "plane"]) == ["airplane", "plane"]
    (tmp_path / "train" / "caf\u00e9").mkdir()
    (tmp_path / "train" / "cafe\u0301").mkdir()
    with pytest.raises(UserError, match="two classes are called café"):
        common.load_dataset(str(tmp_path))


@pytest.mark.parametrize(("colours", "laid_on"), [((0,), None), ((255,), "black"), ((0, 255), "grey")])
def test_transparent_images_are_laid_on_what_shows_them(tmp_path, fashion, capsys, colours, laid_on):
    images = pictures(fashion, 0, 1, 2)
    for number, (name, shapes) in enumerate(images.items()):
        colour = colours[number % len(colours)]
        flat = [Image.new("L", shape.size, colour) for shape in shapes]
        images[name] = [Image.merge("LA", (picture, shape)) for picture, shape in zip(flat, shapes, strict=True)]
    write_folder(tmp_path, images)
    data = common.load_dataset(str(tmp_path))
    assert (data.train_images.amax((1, 2, 3)) > data.train_images.amin((1, 2, 3)) + 50).all()
    told = capsys.readouterr().err
    assert ("are laid on" in told) == bool(laid_on)
    assert laid_on is None or f"laid on {laid_on}: on white" in told


def test_blank_and_doubled_images_are_named(tmp_path, fashion, capsys):
    images = pictures(fashion, 0, 1)
    write_folder(tmp_path, images)
    told = capsys.readouterr()
    common.load_dataset(str(tmp_path))
    assert "8 of 8 images in test/ are in train/, too" in capsys.readouterr().err
    images["class 1"][0].save(tmp_path / "train" / "class 0" / "of another class.png")
    images["class 1"][0].save(tmp_path / "train" / "class 1" / "once more.png")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "train" / "class 1" / "red.png")
    common.load_dataset(str(tmp_path))
    told = capsys.readouterr().err
    assert "1 of 11 images in train/ are (nearly) of a single colour (of class class 1 1 of 6)" in told
    assert "in train/ are in another class, too, pixel by pixel" in told
    assert "1 of 11 images in train/ are copies of others in their class" in told


def write_tiff(path, values, sample_format, photometric=1):
    """A TIFF file of grey values. Sample format 1: unsigned, 2: signed, 3: float. Photometric 0: high ones are dark."""
    height, width = values.shape
    content = values.tobytes()
    shorts = {258: 8 * values.itemsize, 259: 1, 262: photometric, 277: 1, 339: sample_format}
    longs = {256: width, 257: height, 273: 8, 278: height, 279: len(content)}
    tags = sorted(
        [(tag, 3, value) for tag, value in shorts.items()] + [(tag, 4, value) for tag, value in longs.items()]
    )
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    head = b"II*\0" + struct.pack("<I", 8 + len(content))
    path.write_bytes(head + content + struct.pack("<H", len(tags)) + entries + bytes(4))


@pytest.mark.parametrize(
    ("dtype", "sample_format", "photometric", "lowest", "highest"),
    [
        ("<i2", 2, 1, -1000, 3000),
        ("<i1", 2, 1, -128, 127),
        ("<i4", 2, 1, -100_000, 100_000),
        ("<u4", 1, 1, 0, 2**32 - 1),
        ("<u2", 1, 1, 0, 65535),
        ("<u2", 1, 0, 65535, 0),
        ("<f4", 3, 1, -1.0, 1.0),
        ("<f4", 3, 1, 0.0, 1.0),
    ],
)
def test_grey_values_of_every_depth_and_sign_keep_their_order(
    tmp_path, dtype, sample_format, photometric, lowest, highest
):
    ramp = np.linspace(lowest, highest, 256).reshape(16, 16).astype(dtype)
    write_tiff(tmp_path / "ramp.tif", ramp, sample_format, photometric)
    decoded, *_ = common.decode_images([str(tmp_path / "ramp.tif")], [], 16)
    grey = decoded[0, 0].flatten().int()
    assert (grey.diff() >= 0).all()
    assert (grey[0], grey[-1]) == (0, 255)
    assert abs(grey[128] - 128) <= 1


def test_images_replaced_with_the_same_size_and_time_are_decoded_anew(tmp_path, fashion):
    def write(invert):
        for name, shapes in pictures(fashion, 0, 1).items():
            for half, (number, shape) in itertools.product(("train", "test"), enumerate(shapes)):
                path = tmp_path / half / name / f"{number}.bmp"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True)
                Image.fromarray(np.asarray(shape) ^ (255 if invert else 0)).save(path)
                os.utime(path, (315532800,) * 2)

    write(invert=False)
    before = common.load_dataset(str(tmp_path), image_size=28).train_images
    write(invert=True)
    assert torch.equal(common.load_dataset(str(tmp_path), image_size=28).train_images, 255 - before)


def test_links_are_followed_once_and_never_from_class_to_class(tmp_path, fashion):
    write_folder(tmp_path, pictures(fashion, 0, 1))
    first = tmp_path / "train" / "class 0"
    (first / "again").symlink_to(first)
    (first / "a copy.png").symlink_to(first / "0.png")
    (tmp_path / "elsewhere").mkdir()
    pictures(fashion, 3)["class 3"][0].save(tmp_path / "elsewhere" / "5.png")
    (first / "more").symlink_to(tmp_path / "elsewhere")
    assert len(common.load_dataset(str(tmp_path)).train_labels) == 9
    (first / "back").symlink_to(tmp_path / "train")
    with pytest.raises(UserError, match="is a file of class class 0, too: links lead from one class to the other"):
        common.load_dataset(str(tmp_path))
    (first / "back").unlink()
    os.mkfifo(first / "pipe.png")
    with pytest.raises(UserError, match=r"pipe\.png is not a regular file"):
        common.load_dataset(str(tmp_path))


def test_large_scans_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (500, 400), "red").save(tmp_path / "scan.png")
    decoded, *_ = common.decode_images([str(tmp_path / "scan.png")], [], 8)
    assert decoded[0, :, 0, 0].tolist() == [255, 0, 0]
    assert Image.MAX_IMAGE_PIXELS == 100


# ---------------------------------------------------------------- hosts, paths, configuration


def test_a_home_folder_is_written_as_a_tilde_in_every_option(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = task4.parse_args(["--output-dir=~/x", "--data-dir", "~/y", "--checkpoint", "~", "--onnx=~/z"])
    paths = options.output_dir, options.data_dir, options.checkpoint, options.onnx
    assert paths == (tmp_path / "x", tmp_path / "y", tmp_path, tmp_path / "z")
    with pytest.raises(UserError, match=rf"{tmp_path}/data is neither"):
        common.load_dataset("~/data")
    with pytest.raises(SystemExit):
        task4.parse_args(["--output-dir=~nobody_of_this_name/x"])
    assert "'~nobody_of_this_name/x'" in capsys.readouterr().err


def test_without_a_home_nothing_is_cached_and_that_is_said(tmp_path, fashion, monkeypatch, capsys):
    def unknown(_):
        raise KeyError("getpwuid(): uid not found: 12345")

    write_folder(tmp_path / "data", pictures(fashion, 0, 1))
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    assert len(common.load_dataset(str(tmp_path / "data")).train_labels) == 8
    assert "the decoded images are not cached" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_figures_do_not_depend_on_the_users_matplotlibrc(tmp_path, few, capsys):
    import matplotlib as mpl

    run = make_run(tmp_path, few)
    contents = []
    for settings in ({}, {"text.usetex": True, "savefig.dpi": 10, "axes.facecolor": "black", "savefig.bbox": "tight"}):
        with mpl.rc_context(settings):
            with run.figure("a.png", "a title") as (_, axes):
                axes[0, 0].plot([1, 2])
            assert mpl.rcParams["text.usetex"] is bool(settings)
        contents.append((run.folder / "a.png").read_bytes())
    assert contents[0] == contents[1]
    assert capsys.readouterr().err == ""


def test_workers_start_where_the_main_module_is_odd(tmp_path, few, monkeypatch):
    monkeypatch.delattr(sys.modules["__main__"], "__spec__")  # as in IPython's second %run
    path = tmp_path / "data.pt"
    common.share_dataset(path, few)
    workers = common.Workers(1, Runtime("cpu", "fp32", 1), path)
    try:
        job = Job(Recipe(common.Network(model="PlainCNN", width=16), TRAINING), 0, common.split_dataset(few, 40))
        assert next(workers.run(common.train_job, job)).number == 1
    finally:
        workers.stop()


def test_a_console_that_goes_away_costs_nothing(monkeypatch):
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", None)  # closed by a scheduler

        @common.script
        def main(_):
            print("one line", flush=True)
            os.close(reading)  # like head
            for number in range(3):
                print(number, flush=True)
            common.note("nobody reads this")
            return 0

        assert main() == 0
        assert sys.stderr.name == os.devnull


def test_scripts_run_without_docstrings_in_safe_mode(tmp_path):
    call = [sys.executable, "-OO", "-P", str(ROOT / "task2_optimizers.py"), "--help"]
    found = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path)
    assert (found.returncode, "Five primary claims" in found.stdout) == (0, True), found.stderr


def test_signals_are_left_alone_in_other_threads_and_by_nohup():
    from concurrent.futures import ThreadPoolExecutor

    @common.script
    def main(_):
        return 0 if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else 1

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main() == 0
        with ThreadPoolExecutor(1) as threads:
            assert threads.submit(main).result() == 0
    finally:
        signal.signal(signal.SIGHUP, before)
