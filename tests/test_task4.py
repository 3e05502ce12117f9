"""Task 4: the files are torch's network, the figures are what was measured, wrong files get no speed, bad input."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pandas as pd
import pytest
import torch
from conftest import ROOT, wait_until, workers_below
from onnx import TensorProto, helper
from scipy import stats
from torch import nn

import common
import task4_onnx as task4

SCRIPT = "task4_onnx.py"
QUICK = ("--dataset", "fashion_mnist", "--quick")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def classify(file: Path, images: torch.Tensor) -> np.ndarray:
    """Logits by a plain ONNX Runtime session, as any other program would get them."""
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images.float().div(255).contiguous().numpy()})[0]


@pytest.fixture
def lab(fashion, runtime, tmp_path):
    """What a step of the experiment needs of a run."""
    (tmp_path / "results" / "unfinished_run").mkdir(parents=True)
    facts = {"seed": 0, "images": 300, "model": None, "quick": True, "checkpoint": None, "threads": 1, "onnx": None}
    options, output = argparse.Namespace(**facts, max_int8_drop=0.5), tmp_path / "results"
    facts = {"data": fashion, "runtime": runtime, "options": options, "output": output}
    facts["folder"] = output / "unfinished_run"
    quiet = {"bar": SimpleNamespace(update=lambda _: None), "stage": lambda *_: None, "table": lambda *_: None}
    return SimpleNamespace(**facts, **quiet)


# ---------------------------------------------------------------- one whole run, asked many questions


@pytest.fixture(scope="module")
def result(tmp_path_factory, request):
    """(what was printed, folder, summary) of a run in this process: imports would take seconds more."""
    folder, capture = tmp_path_factory.mktemp("task4"), request.config.pluginmanager.getplugin("capturemanager")
    capture.read_global_capture()
    status = task4.main([*QUICK, "--output-dir", str(folder)])
    printed = SimpleNamespace(**dict(zip(("stdout", "stderr"), capture.read_global_capture(), strict=True)))
    assert status == 0, printed.stderr
    return printed, folder, json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def tested(fashion):
    """The test images of --quick: of all classes, in proportion."""
    few = fashion.test_labels.argsort(stable=True)[::5]
    return fashion.test_images[few], fashion.test_labels[few]


def test_all_files_are_written_and_the_console_is_quiet(result):
    process, folder, summary = result
    expected = "model.pth model.onnx model_int8.onnx accuracy.csv latency.csv summary.json"
    expected += " disagreements.csv config.json environment.json report.md"
    figures = {f"{name}.png" for name in ("latency", "throughput", "pareto", "disagreements")}
    assert set(digests(folder)) - {".lock"} == set(expected.split()) | figures
    assert all(f"({name})" in (folder / "report.md").read_text() for name in figures)
    assert process.stderr == ""  # neither the exporter's nor the quantiser's nor the runtime's chatter
    assert not list(folder.glob(".engines*"))
    assert (summary["dataset"], summary["threads"], summary["interrupted"]) == ("fashion_mnist", 1, False)


def test_every_engine_takes_part(result):
    _, _, summary = result
    engines = {"torch_fp32", "torch_tuned_fp32", "onnx_fp32", "onnx_int8"}
    assert engines <= set(summary["engines"])
    for row in summary["engines"].values():
        assert set(row["batch"]) == {"1", "8", "64", "256"}
        for entry in row["batch"].values():
            assert entry["p50_ms"] > 0
            assert entry["p90_ms"] <= entry["p99_ms"]
        assert min(row["load_ms"], row["first_call_ms"], row["added_rss_bytes"]) > 0


def test_the_console_has_the_original_form_for_torch_and_then_for_onnx(result):
    process, folder, summary = result
    form = r"\n(\w+):\n((?:Accuracy for class: .+ is \d+\.\d %\n){10})Time, ms:  (\d+\.\d+)\n"
    blocks = re.findall(form, process.stdout)
    assert [name for name, _, _ in blocks] == ["torch_fp32", "onnx_fp32", "onnx_int8"]
    table = pd.read_csv(folder / "accuracy.csv")
    for name, lines, milliseconds in blocks:
        assert float(milliseconds) == pytest.approx(summary["engines"][name]["batch"]["1"]["p50_ms"], rel=1e-3)
        pairs = zip(table["class"][:-1], table[name][:-1], strict=True)
        assert lines.splitlines() == [f"Accuracy for class: {label} is {100 * share:.1f} %" for label, share in pairs]


def test_the_accuracies_are_those_of_the_saved_files(result, tested):
    _, folder, summary = result
    images, labels = tested
    table = pd.read_csv(folder / "accuracy.csv")
    for name, file in (("onnx_fp32", "model.onnx"), ("onnx_int8", "model_int8.onnx")):
        right = classify(folder / file, images).argmax(1) == labels.numpy()
        assert summary["engines"][name]["accuracy"] == pytest.approx(right.mean())
        by_class = [right[labels.numpy() == c].mean() for c in range(10)]
        assert table[name].tolist() == pytest.approx([*by_class, right.mean()])
        assert summary["engines"][name]["size_bytes"] == (folder / file).stat().st_size
    assert summary["engines"]["torch_fp32"]["accuracy"] > 0.75
    assert summary["engines"]["onnx_int8"]["size_bytes"] < 0.35 * summary["engines"]["onnx_fp32"]["size_bytes"]


def test_the_images_that_changed_are_those_of_the_files(result, tested):
    _, folder, _ = result
    labels = [classify(folder / name, tested[0]).argmax(1) for name in ("model.onnx", "model_int8.onnx")]
    table = pd.read_csv(folder / "disagreements.csv")
    assert table["test_image"].tolist() == np.flatnonzero(labels[0] != labels[1]).tolist()
    assert table["onnx_int8"].tolist() == labels[1][labels[0] != labels[1]].tolist()


def test_dividing_two_cells_of_the_table_gives_the_ratio(result):
    _, folder, summary = result
    table = pd.read_csv(folder / "latency.csv")
    for name, size in (("onnx_fp32", 1), ("onnx_int8", 256)):
        p50 = {n: table[(table["engine"] == n) & (table["batch_size"] == size)]["p50_ms"] for n in ("torch_fp32", name)}
        entries = {n: summary["engines"][n]["batch"][str(size)] for n in p50}
        for n, values in p50.items():
            assert entries[n]["p50_ms"] == pytest.approx(stats.gmean(values))
        assert entries[name]["speedup"] == pytest.approx(entries["torch_fp32"]["p50_ms"] / entries[name]["p50_ms"])


def test_the_exported_file_is_the_network_at_any_batch_size_and_explains_itself(result, fashion):
    _, folder, summary = result
    model, _ = common.load_checkpoint(folder / "model.pth")
    for count in (1, 7):
        images = fashion.test_images[100 : 100 + count]
        expected = model(images.float() / 255).detach().numpy()
        np.testing.assert_allclose(classify(folder / "model.onnx", images), expected, atol=1e-4)
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    about = {entry.key: entry.value for entry in proto.metadata_props}
    assert about["classes"].split(", ") == list(fashion.classes)
    assert not any(tensor.data_location for tensor in proto.graph.initializer)  # one self-contained file
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}
    assert summary["flop_per_picture"] > 1e6


# ---------------------------------------------------------------- no speed for a wrong model


def damage(source: Path, target: Path, change: float) -> None:
    """Copy an ONNX file with one weight changed."""
    proto = onnx.load(source)
    weights = next(tensor for tensor in proto.graph.initializer if len(tensor.dims) == 4)
    values = onnx.numpy_helper.to_array(weights).copy()
    values.flat[0] += change
    weights.CopyFrom(onnx.numpy_helper.from_array(values, weights.name))
    onnx.save(proto, target)


def test_a_broken_file_is_found_and_no_speed_is_quoted(result, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(task4, "COLOUR", {"torch_fp32": "black", "onnx_fp32": "blue"})  # seconds less
    _, folder, _ = result
    damage(folder / "model.onnx", tmp_path / "broken.onnx", 0.5)
    options = ["--checkpoint", str(folder / "model.pth"), "--onnx", str(tmp_path / "broken.onnx"), "--quick"]
    assert task4.main([*options, "--output-dir", str(tmp_path / "results")]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "onnx_fp32 (model.onnx) is not the network of model.pth" in out
    assert "Time, ms" not in out
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())
    assert summary["faults"]
    assert all(row["batch"] == {} for row in summary["engines"].values())
    assert not (tmp_path / "results" / "latency.csv").exists()


@pytest.fixture
def judged(lab):
    """What ``judge`` says of an engine that loses and wins so many images against torch_fp32."""
    for name in ("model.pth", "model.onnx", "model_int8.onnx"):
        (lab.folder / name).write_text("weights")

    def judge(change: str, lost: int, won: int = 0, count: int = 1000, shift: float = 0.0) -> dict:
        labels = np.zeros(count, np.int64)
        before = np.tile([1.0, 0.0], (count, 1))
        before[500 : 500 + won] = [0.0, 1.0]
        after = np.tile([1.0 + shift, 0.0], (count, 1))
        after[:lost] = [0.0, 1.0]
        lab.data = replace(lab.data, classes=("a", "b"))
        return task4.judge(lab, {"torch_fp32": before, change: after}, labels)[0][change]

    return judge


def test_who_is_refused(judged):
    assert not judged("onnx_fp32", 0)["refused"]
    assert judged("onnx_fp32", 2)["refused"]
    assert judged("onnx_fp32", 0, shift=0.01)["refused"]
    assert judged("onnx_fp32", 0, shift=float("nan"))["refused"]
    assert not judged("onnx_int8", 0, shift=0.3)["refused"]
    assert judged("onnx_int8", 0, shift=float("nan"))["refused"]
    lossy, close = judged("onnx_int8", 30), judged("onnx_int8", 6, 2)
    assert "3.00 points" in lossy["refused"]
    assert (close["refused"], close["undecided"]) == (None, True)
    assert (judged("onnx_int8", 0)["undecided"], judged("onnx_int8", 0)["accuracy_drop_ci_high"]) == (False, 0.3)


def test_the_drop_is_paired_over_the_images(judged):
    row = judged("onnx_int8", 6, 2)
    assert row["accuracy_drop"] == pytest.approx(0.4)
    differences = [100] * 6 + [-100] * 2 + [0] * 992
    half = stats.t.ppf(0.975, 999) * stats.sem(differences)
    assert row["accuracy_drop_ci_high"] == pytest.approx(0.4 + half)
    assert row["mcnemar_p"] == pytest.approx(stats.binomtest(6, 8).pvalue)


def test_calibration_sees_training_images_only(result, fashion, lab):
    _, folder, _ = result
    model, _ = common.load_checkpoint(folder / "model.pth")
    lab.options.onnx = folder / "model.onnx"

    def digest(data: common.Dataset) -> str:
        (lab.folder / "model_int8.onnx").unlink(missing_ok=True)
        lab.data = data
        task4.make_files(lab, model, task4.examine(lab.options.onnx, data))
        return digests(lab.folder)["model_int8.onnx"]

    original = digest(fashion)
    assert digest(replace(fashion, test_images=255 - fashion.test_images)) == original
    assert digest(replace(fashion, train_images=255 - fashion.train_images)) != original


def test_the_node_type_that_int8_loses_by_is_named(result, lab, monkeypatch):
    _, folder, _ = result
    (lab.folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes())
    results = {"onnx_int8": {"refused": "it loses"}}

    def loses_by_gemm(images, source, target, keep):
        damage(source, target, 0 if keep == "Gemm" else 1e3)

    with monkeypatch.context() as patch:
        patch.setattr(task4, "quantise", loses_by_gemm)
        (sentence,) = task4.explain_int8(lab, lab.data.train_images[:100], results)
    words = r"mainly due to its Gemm nodes: \d\d? % of 100 training images keep their label, 100 % with these"
    assert re.search(words, sentence)
    assert task4.explain_int8(lab, lab.data.train_images[:100], {"onnx_int8": {"refused": None}}) == []
    monkeypatch.setattr(task4, "quantise", lambda images, source, target, keep: target.write_bytes(source.read_bytes()))
    (sentence,) = task4.explain_int8(lab, lab.data.train_images[:100], results)
    assert sentence.startswith("No type of nodes explains")


def test_nodes_without_names_are_quantised_too(result, lab, tmp_path):
    proto = onnx.load(result[1] / "model.onnx")
    for node in proto.graph.node:
        node.name = ""
    onnx.save(proto, tmp_path / "unnamed.onnx")
    task4.quantise(lab.data.train_images[:20], tmp_path / "unnamed.onnx", tmp_path / "int8.onnx")
    types = [node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node]
    assert types.count("DequantizeLinear") >= 2 * (types.count("Conv") - 1)  # all but the first


# ---------------------------------------------------------------- statistics and words


def test_a_speed_up_is_a_ratio_within_rounds_and_its_interval_is_over_starts(lab):
    speeds = (2.0, 2.2, 1.8)
    about = {"batch_size": 1, "load_ms": 1.0, "first_call_ms": 1.0, "added_rss_bytes": 1.0}
    rows = [
        {"engine": name, "start": start, "round": number, **about}
        | dict.fromkeys(("p50_ms", "p90_ms", "p99_ms", "mean_ms"), factor * load)
        for start, speed in enumerate(speeds)
        for number, load in enumerate((1.0, 10.0))  # a machine that gets slower: the ratio does not
        for name, factor in (("torch_fp32", speed), ("onnx_fp32", 1.0))
    ]
    results: dict[str, dict] = {name: {"batch": {}} for name in ("torch_fp32", "onnx_fp32")}
    task4.compare(lab, results, rows)
    entry, logs = results["onnx_fp32"]["batch"]["1"], np.log(speeds)
    low, high = stats.t.interval(0.95, 2, logs.mean(), stats.sem(logs))
    found = [entry[key] for key in ("speedup", "speedup_ci_low", "speedup_ci_high")]
    assert found == pytest.approx(np.exp([logs.mean(), low, high]).tolist())
    died = [row for row in rows if row["engine"] == "torch_fp32" or row["start"] == 0]  # in the second start
    results["onnx_fp32"]["batch"] = {}
    assert list(task4.compare(lab, results, died).index) == [("torch_fp32", 1)]


def test_no_difference_is_claimed_where_the_interval_includes_1():
    def words(low: float, mean: float, high: float) -> str:
        index = pd.MultiIndex.from_tuples([("onnx_fp32", 64)], names=["engine", "batch_size"])
        entry = {"p50_ms": [1.0], "speedup": [mean], "speedup_ci_low": [low], "speedup_ci_high": [high]}
        return task4.speeds_in_words(pd.DataFrame(entry, index))[0]

    assert "not shown to differ" in words(0.9, 1.05, 1.2)
    assert "is faster than" in words(1.01, 1.05, 1.2)
    assert "is SLOWER than" in words(0.7, 0.8, 0.9)
    assert "not shown to differ from torch_fp32: 2.00 times as fast (of one start)" in words(0, 2, np.inf)


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.SiLU])
def test_folding_changes_nothing_whatever_the_activation(fashion, activation):
    torch.manual_seed(0)
    split = common.split_dataset(fashion, 300, False)
    model = common.make_model(common.Recipe(width=16), fashion, split)
    for index, layer in enumerate(model[1].features):
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            layer.bias.data.normal_()
        elif isinstance(layer, nn.ReLU):
            model[1].features[index] = activation()
    images = fashion.test_images[:16].float() / 255
    fused = task4.fuse(model.eval())
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in fused.modules())
    torch.testing.assert_close(fused(images), model(images), atol=1e-4, rtol=1e-4)


class Small(nn.Module):
    """A network of the user's own."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.fc = nn.Linear(4, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(images).flatten(1))


@pytest.mark.parametrize("form", ["plain", "module.", "state_dict", "model"])
def test_a_plain_state_dict_becomes_a_checkpoint(lab, tmp_path, form, fashion):
    network = Small(10)
    state = {"module." * (form == "module.") + key: value for key, value in network.state_dict().items()}
    torch.save({form: state} if form in ("state_dict", "model") else state, tmp_path / "net.pth")
    lab.options.checkpoint, lab.options.model = tmp_path / "net.pth", "test_task4:Small"
    model = task4.obtain_model(lab, replace(task4.FOREIGN, model="test_task4:Small"))
    common.load_checkpoint(lab.folder / "model.pth", "test_task4:Small")
    images = fashion.test_images[:4].float() / 255
    torch.testing.assert_close(model[1](model[0](images)), network.eval()(model[0](images)))
    fused = task4.fuse(model)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in fused.modules())


def test_an_adopted_network_is_not_taken_for_a_trained_one(lab, tmp_path, capsys):
    torch.save(Small(10).state_dict(), tmp_path / "net.pth")
    lab.options.model, recipe = "test_task4:Small", replace(task4.FOREIGN, model="test_task4:Small", epochs=1)
    lab.options.checkpoint = tmp_path / "net.pth"
    task4.obtain_model(lab, recipe)
    (lab.folder / "model.pth").replace(lab.output / "model.pth")
    lab.options.checkpoint = None
    task4.obtain_model(lab, recipe)
    assert "reusing" not in capsys.readouterr().out


def test_a_state_dict_that_does_not_fit_is_refused_in_one_line(lab, tmp_path):
    state = Small(3).state_dict()
    del state["body.0.bias"]
    torch.save(state | {"more": torch.zeros(1)}, tmp_path / "net.pth")
    lab.options.checkpoint = tmp_path / "net.pth"
    with pytest.raises(common.UserError, match=r"Missing.*body.0.bias.*Unexpected.*more.*fc.weight: copying"):
        task4.obtain_model(lab, replace(task4.FOREIGN, model="test_task4:Small"))


def test_a_model_is_used_again_only_for_the_same_options_and_images(fashion, lab, capsys):
    recipe = common.Recipe(width=16, epochs=1, batch_size=64)
    earlier, path = lab.output / "model.pth", lab.folder / "model.pth"
    earlier.write_bytes(b"damaged")  # made anew
    exchanged = replace(fashion, classes=fashion.classes[::-1])  # the same path, the classes' folders exchanged
    steps = [(recipe, 0, fashion), (recipe, 0, fashion), (recipe, 1, fashion), (replace(recipe, lr=0.1), 1, fashion)]
    made = []
    for how, seed, data in [*steps, (replace(recipe, lr=0.1), 1, exchanged)]:
        lab.options.seed, lab.data = seed, data
        task4.obtain_model(lab, how)
        path.replace(earlier)
        made.append("reusing the network" not in capsys.readouterr().out)
    assert made == [True, False, True, True, True]


# ---------------------------------------------------------------- ONNX files made elsewhere


def foreign_onnx(path: Path, shape: list, dtype: int = TensorProto.FLOAT, outputs: int = 10) -> Path:
    """A file of another tool: other names; an average over positions and channels, times 0 to 9."""
    nodes = [helper.make_node("Cast", ["pixels"], ["f"], to=TensorProto.FLOAT)]
    nodes += [
        helper.make_node("ReduceMean", ["f", "axes"], ["m"], keepdims=0),
        helper.make_node("Unsqueeze", ["m", "one"], ["u"]),
    ]
    nodes += [helper.make_node("MatMul", ["u", "w"], ["scores"])]
    weights = [
        helper.make_tensor("axes", TensorProto.INT64, [3], [1, 2, 3]),
        helper.make_tensor("one", TensorProto.INT64, [1], [1]),
    ]
    weights.append(helper.make_tensor("w", TensorProto.FLOAT, [1, outputs], np.arange(outputs).tolist()))
    images = helper.make_tensor_value_info("pixels", dtype, shape)
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, [shape[0], outputs])
    graph = helper.make_graph(nodes, "g", [images], [scores], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


@pytest.mark.parametrize(
    ("shape", "dtype", "batch"),
    [
        (["n", 1, 28, 28], TensorProto.FLOAT, None),
        (["n", 28, 28, 1], TensorProto.UINT8, None),
        ([8, 1, 28, 28], TensorProto.DOUBLE, 8),
        (["n", "c", "h", "w"], TensorProto.FLOAT, None),
    ],
)
def test_a_file_made_elsewhere_is_fed_as_it_wants(fashion, tmp_path, shape, dtype, batch):
    path = foreign_onnx(tmp_path / "foreign.onnx", shape, dtype)
    file = task4.examine(path, fashion)
    assert (file.batch, file.quantised) == (batch, False)
    how = SimpleNamespace(folder=tmp_path, shared=tmp_path, threads=1, device="cpu")
    path.rename(tmp_path / "model.onnx")
    prepare, run, fetch = task4.load_onnx("onnx_fp32", how, False, (1, 28, 28))
    logits = np.concatenate([fetch(run(prepare(part)))[: len(part)] for part in fashion.test_images[:30].split(8)])
    mean = fashion.test_images[:30].double().mean((1, 2, 3)).numpy() / (1 if dtype == TensorProto.UINT8 else 255)
    np.testing.assert_allclose(logits, mean[:, None] * np.arange(10), rtol=1e-4)


def test_weights_in_another_file_are_refused(fashion, result, tmp_path):
    proto = onnx.load(result[1] / "model.onnx")
    onnx.save(proto, tmp_path / "two.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    with pytest.raises(common.UserError, match="not a self-contained ONNX file"):
        task4.examine(tmp_path / "two.onnx", fashion)


# ---------------------------------------------------------------- engines


def test_an_engine_tells_why_it_cannot(result, fashion, lab, tmp_path, capsys):
    (lab.folder / "model_int8.onnx").write_text("nothing")
    (lab.folder / "model.pth").write_bytes((result[1] / "model.pth").read_bytes())
    model, _ = common.load_checkpoint(lab.folder / "model.pth")
    how = task4.prepare_engines(lab, fashion, model, None, tmp_path)
    capsys.readouterr()
    with task4.started(lab, how, ["torch_fp32", "onnx_int8"]) as ask:
        assert "NOTE: onnx_int8 cannot run model_int8.onnx" in capsys.readouterr().err  # no reason to stop
        row = ask("torch_fp32", "onnx_int8")
        assert list(row) == ["torch_fp32"]
        assert row["torch_fp32"]["p50_ms"] > 0
        (tmp_path / "torch_fp32.stderr").write_text("chatter\nthe last words\n")
        for pid in workers_below(os.getpid()):
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(common.UserError, match=r"torch_fp32 cannot run model\.pth: the last words"):
            ask("torch_fp32")
    assert workers_below(os.getpid()) == []


def test_no_question_waits_for_ever(result, fashion, lab, tmp_path, monkeypatch):
    (lab.folder / "model.pth").write_bytes((result[1] / "model.pth").read_bytes())
    model, _ = common.load_checkpoint(lab.folder / "model.pth")
    how = task4.prepare_engines(lab, fashion, model, None, tmp_path)
    monkeypatch.setattr(task4, "PATIENCE", 0.05)
    with pytest.raises(common.UserError, match=r"did not answer within 0\.05 s"):
        task4.started(lab, how, ["torch_fp32"]).__enter__()
    assert workers_below(os.getpid()) == []


def test_ctrl_c_ends_the_engines_and_the_status_is_130(result, tmp_path):
    _, folder, _ = result
    output = tmp_path / "results"
    options = ["--checkpoint", folder / "model.pth", "--onnx", folder / "model.onnx", "--quick", "--output-dir", output]
    process = subprocess.Popen(
        [sys.executable, ROOT / SCRIPT, *options],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    wait_until(lambda: list(output.glob(".engines*/images.pt")), process)
    time.sleep(0.5)  # engines are importing, loading or classifying
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the engines get it, too
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert b"Traceback" not in err
    assert not list(output.glob(".engines*"))


# ---------------------------------------------------------------- bad input


@pytest.fixture
def bad(result, tmp_path):
    """Files of many kinds of wrong, by name."""
    _, folder, _ = result
    good = torch.load(folder / "model.pth", weights_only=True)
    (tmp_path / "text.pth").write_text("no checkpoint")
    torch.save(good | {"state": good["state"] | {"1.head.bias": torch.zeros(3)}}, tmp_path / "shape.pth")
    torch.save(good | {"classes": [*good["classes"][:-1], "hat"]}, tmp_path / "classes.pth")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pth")
    torch.save(good, tmp_path / "good.pth")
    (tmp_path / "text.onnx").write_text("no network")
    foreign_onnx(tmp_path / "channels.onnx", ["n", 3, 28, 28])
    foreign_onnx(tmp_path / "int64.onnx", ["n", 1, 28, 28], TensorProto.INT64)
    foreign_onnx(tmp_path / "classes.onnx", ["n", 1, 28, 28], outputs=7)
    damage(folder / "model.onnx", tmp_path / "nan.onnx", float("nan"))
    (tmp_path / "file").write_text("a file")
    return tmp_path


def known(data: common.Dataset) -> tuple:
    """What ``load_fashion_mnist`` gives."""
    pairs = (data.train_images, data.train_labels), (data.test_images, data.test_labels)
    return data.source, data.classes, *pairs


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--checkpoint", "{bad}/missing.pth"], "no checkpoint"),
        (["--checkpoint", "{bad}/text.pth"], "not a checkpoint"),
        (["--checkpoint", "{bad}/foreign.pth"], "not a checkpoint"),
        (["--checkpoint", "{bad}/shape.pth"], "damaged"),
        (["--checkpoint", "{bad}/good.pth", "--model", "torchvision.models:resnet18"], "leave --model out"),
        (["--checkpoint", "{bad}/classes.pth"], "hat"),
        (["--onnx", "{bad}/missing.onnx"], "No such file"),
        (["--onnx", "{bad}/text.onnx"], "not a self-contained ONNX file"),
        (["--onnx", "{bad}/channels.onnx"], r"for images \[1, 28, 28\]: .* invalid dimensions for input"),
        (["--onnx", "{bad}/int64.onnx"], r"expected: \(tensor\(int64\)\)"),
        (["--onnx", "{bad}/classes.onnx"], r"outputs \(1, 7\), expected finite logits of 10 classes"),
        (["--onnx", "{bad}/nan.onnx"], "expected finite logits"),
        (["--output-dir", "{bad}/file/results"], "file/results"),
        (["--threads", "0"], "whole number from 1"),
        (["--max-int8-drop", "-1"], "from 0 to 100"),
        (["--width", "20"], "multiple of 16"),
        (["--device", "gpu7"], "--device"),
        (["--model", "nowhere:Net"], "nowhere"),
    ],
)
def test_bad_input_gets_one_clear_line_and_harms_nothing(result, bad, fashion, capsys, monkeypatch, options, words):
    monkeypatch.setattr(common, "load_fashion_mnist", lambda _: known(fashion))  # 0.4 s, twenty times
    _, folder, _ = result
    before = digests(folder)
    options = [option.format(bad=bad) for option in options]
    try:
        status = task4.main([*QUICK, "--output-dir", str(folder), *options])
    except SystemExit as end:  # argparse
        status = end.code
    err = capsys.readouterr().err
    assert status == 2, err
    assert re.search(words, err.strip().splitlines()[-1]), err
    assert "Traceback" not in err
    assert digests(folder) == before
