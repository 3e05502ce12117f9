"""Task 4: the files are torch's network, the figures are what was measured, wrong files get no speed, bad input."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import pandas as pd
import pytest
import torch
from conftest import ROOT, make_run, wait_until, workers_below
from onnx import TensorProto, helper
from scipy import stats
from torch import nn

import common
import task4_onnx as task4
from task4_onnx import BASELINE, CONVERTED, QUANTISED, Loaded, Timing

SCRIPT = "task4_onnx.py"
QUICK = ("--dataset", "fashion_mnist", "--quick")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def classify(file: Path, images: torch.Tensor) -> np.ndarray:
    """Logits by a plain ONNX Runtime session, as any other program would get them."""
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images.float().div(255).contiguous().numpy()})[0]


class Lab(NamedTuple):
    """What a step of the experiment needs."""

    run: common.Run
    options: argparse.Namespace
    data: common.Dataset

    @property
    def folder(self) -> Path:
        return self.run.folder

    def setup(self, model: nn.Sequential, scratch: Path) -> task4.EngineSetup:
        return task4.set_up(self.run, self.options, self.data, model, None, scratch)


@pytest.fixture
def lab(fashion, tmp_path):
    options = task4.parse_args([*QUICK, "--images", "300", "--output-dir", str(tmp_path / "results")])
    return Lab(make_run(tmp_path / "results", fashion), options, fashion)


# ---------------------------------------------------------------- one whole run, asked many questions


def state_of_this_process() -> tuple[object, ...]:
    """What a run of Task 4 changes while it lasts."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "PYTHONWARNINGS", "TORCHINDUCTOR_COMPILE_THREADS")
    variables = {name: os.environ.get(name) for name in names}
    return variables, logging.root.manager.disable, ("ignore", None, Warning, None, 0) in warnings.filters


@pytest.fixture(scope="module")
def result(tmp_path_factory, request):
    """(what was printed, folder, summary) of a run in this process: imports would take seconds more."""
    folder, capture = tmp_path_factory.mktemp("task4"), request.config.pluginmanager.getplugin("capturemanager")
    capture.read_global_capture()
    before = state_of_this_process()
    status = task4.main([*QUICK, "--output-dir", str(folder)])
    assert state_of_this_process() == before
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
    model = common.load_checkpoint(folder / "model.pth").model
    for count in (1, 7):
        images = fashion.test_images[100 : 100 + count]
        expected = model(images.float() / 255).detach().numpy()
        np.testing.assert_allclose(classify(folder / "model.onnx", images), expected, atol=1e-4)
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    about = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(about["classes"]) == list(fashion.classes)
    assert about["input_layout"] == "NCHW: N x 1 (grey) x 28 x 28"
    assert about["input_range"].startswith("0 (black) to 1 (white), not normalised")
    int8 = onnx.load(folder / "model_int8.onnx")
    assert about.items() <= {entry.key: entry.value for entry in int8.metadata_props}.items()
    assert b"site-packages" not in (folder / "model.onnx").read_bytes()  # nor any other place on this machine
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
    monkeypatch.setattr(task4, "ENGINES", (BASELINE, CONVERTED))  # seconds less
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

    def judge(engine: task4.Engine, lost: int, won: int = 0, shift: float = 0.0) -> task4.Quality:
        before = np.tile([1.0, 0.0], (1000, 1))
        before[500 : 500 + won] = [0.0, 1.0]
        after = np.tile([1.0 + shift, 0.0], (1000, 1))
        after[:lost] = [0.0, 1.0]
        data = replace(lab.data, classes=("a", "b"), test_labels=torch.zeros(1000, dtype=torch.int64))
        return task4.judge(lab.run, lab.options, {BASELINE: before, engine: after}, data)[engine]

    return judge


def test_who_is_refused(judged):
    assert judged(CONVERTED, 0).verdict == "accepted"
    assert judged(CONVERTED, 2).verdict == "refused"
    assert judged(CONVERTED, 0, shift=0.01).verdict == "refused"
    assert judged(CONVERTED, 0, shift=float("nan")).verdict == "refused"
    assert judged(QUANTISED, 0, shift=0.3).verdict == "accepted"
    assert judged(QUANTISED, 0, shift=float("nan")).verdict == "refused"
    assert judged(QUANTISED, 30).verdict == "refused"
    assert "3.00 points" in judged(QUANTISED, 30).reason
    assert judged(QUANTISED, 6, 2).verdict == "undecided"
    assert judged(QUANTISED, 0).drop.high == 0.3  # the rule of three


def test_the_drop_is_paired_over_the_images(judged):
    quality = judged(QUANTISED, 6, 2)
    assert quality.drop.mean == pytest.approx(0.4)
    differences = [100] * 6 + [-100] * 2 + [0] * 992
    half = stats.t.ppf(0.975, 999) * stats.sem(differences)
    assert quality.drop.high == pytest.approx(0.4 + half)
    assert quality.mcnemar_p == pytest.approx(stats.binomtest(6, 8).pvalue)
    assert quality.class_accuracy[0] == 0.994
    assert np.isnan(quality.class_accuracy[1])  # it has no test image


def test_calibration_sees_training_images_only(result, fashion, lab):
    _, folder, _ = result
    model = common.load_checkpoint(folder / "model.pth").model
    given = task4.examine(folder / "model.onnx", fashion)

    def digest(data: common.Dataset) -> str:
        (lab.folder / "model_int8.onnx").unlink(missing_ok=True)
        lab.run.data = data
        task4.make_files(lab.run, lab.options, model, given)
        return digests(lab.folder)["model_int8.onnx"]

    original = digest(fashion)
    assert digest(replace(fashion, test_images=255 - fashion.test_images)) == original
    assert digest(replace(fashion, train_images=255 - fashion.train_images)) != original


def test_the_node_type_that_int8_loses_by_is_named(result, lab, monkeypatch):
    _, folder, _ = result
    (lab.folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes())
    images = lab.data.train_images[:100]
    quality = task4.measure_quality(np.eye(10), np.eye(10), np.arange(10), 10, 1)

    def explain(verdict: str) -> str | None:
        return task4.explain_int8(lab.run, images, {QUANTISED: replace(quality, verdict=verdict)}, None)

    def loses_by_gemm(images, source, target, keep):
        damage(source, target, 0 if keep == "Gemm" else 1e3)

    with monkeypatch.context() as patch:
        patch.setattr(task4, "quantise", loses_by_gemm)
        sentence = explain("refused")
    words = r"mainly due to its Gemm nodes: \d\d? % of 100 training images keep their label, 100 % with these"
    assert re.search(words, sentence)
    assert explain("accepted") is None
    monkeypatch.setattr(task4, "quantise", lambda images, source, target, keep: target.write_bytes(source.read_bytes()))
    assert explain("refused").startswith("No type of nodes explains")


def test_nodes_without_names_are_quantised_too(result, lab, tmp_path):
    proto = onnx.load(result[1] / "model.onnx")
    for node in proto.graph.node:
        node.name = ""
    onnx.save(proto, tmp_path / "unnamed.onnx")
    task4.quantise(lab.data.train_images[:20], tmp_path / "unnamed.onnx", tmp_path / "int8.onnx")
    types = [node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node]
    assert types.count("DequantizeLinear") >= 2 * (types.count("Conv") - 1)  # all but the first


# ---------------------------------------------------------------- statistics and words


def test_a_speed_up_is_a_ratio_within_rounds_and_its_interval_is_over_starts():
    factors = (2.0, 2.2, 1.8)  # of torch's time, in three starts
    measurements = [
        task4.Measurement(engine, 1, 1, start, number, Loaded(1, 1, 1), Timing(*[factor * load] * 4, calls=9))
        for start, slower in enumerate(factors)
        for number, load in enumerate((1.0, 10.0))  # a machine that gets slower: the ratio does not
        for engine, factor in ((BASELINE, slower), (CONVERTED, 1.0))
    ]
    _, speed = task4.find_speeds(task4.Timings(measurements, None))
    logs = np.log(factors)
    low, high = stats.t.interval(0.95, 2, logs.mean(), stats.sem(logs))
    ratio = speed.speedups["speedup"]
    assert (speed.engine, speed.batch_size) == (CONVERTED, 1)
    assert [ratio.mean, ratio.low, ratio.high] == pytest.approx(np.exp([logs.mean(), low, high]).tolist())
    assert speed.p50_ms == pytest.approx(10**0.5)
    died = [m for m in measurements if m.engine == BASELINE or m.start == 0]  # in the second start
    (speed,) = task4.find_speeds(task4.Timings(died, None))
    assert speed.engine == BASELINE


def test_no_difference_is_claimed_where_the_interval_includes_1():
    def words(low: float, mean: float, high: float) -> str:
        ratio = common.Estimate(mean, low, high, 0.5, 5)
        return task4.speedup_in_words(task4.Speed(CONVERTED, 64, 1, 1, 1, 1, {"speedup": ratio}), "speedup")

    assert "not shown to differ" in words(0.9, 1.05, 1.2)
    assert "onnx_fp32 is faster than torch_fp32: 1.05 times as fast [1.01, 1.20]" in words(1.01, 1.05, 1.2)
    assert "is SLOWER than" in words(0.7, 0.8, 0.9)
    assert "not shown to differ from torch_fp32: 2.00 times as fast (of one start)" in words(0, 2, np.inf)


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize("activation", ["ReLU", "GELU", "SiLU"])
@pytest.mark.parametrize("head", ["unit", "biased"])
def test_folding_changes_nothing_whatever_the_activation(fashion, activation, head):
    torch.manual_seed(0)
    network = common.Network(width=16, activation=activation, head=head)
    model = common.make_model(network, fashion, common.split_dataset(fashion, 300, False)).eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            layer.bias.data.normal_()
    images = fashion.test_images[:16].float() / 255
    before = model(images)
    folded = task4.fold(model)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    torch.testing.assert_close(folded(images), before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(images), before)  # a copy was folded


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
    model = obtain_own(lab, tmp_path / "net.pth")
    common.load_checkpoint(lab.folder / "model.pth", "test_task4:Small")
    images = fashion.test_images[:4].float() / 255
    torch.testing.assert_close(model[1](model[0](images)), network.eval()(model[0](images)))
    folded = task4.fold(model)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())


def obtain_own(lab, path):
    """The network that the options ``--model test_task4:Small --checkpoint path`` give."""
    lab.options.checkpoint, lab.options.model = path, "test_task4:Small"
    assert task4.open_checkpoint(lab.options) is None
    recipe = task4.choose_recipe(lab.options, lab.data, None)
    return task4.obtain_model(lab.run, lab.options, recipe, None)


def test_a_state_dict_that_does_not_fit_is_refused_in_one_line(lab, tmp_path):
    state = Small(3).state_dict()
    del state["body.0.bias"]
    torch.save(state | {"more": torch.zeros(1)}, tmp_path / "net.pth")
    with pytest.raises(common.UserError, match=r"Missing.*body.0.bias.*Unexpected.*more.*fc.weight: copying"):
        obtain_own(lab, tmp_path / "net.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(common.UserError, match="does not hold a state dict for --model, but a Tensor"):
        obtain_own(lab, tmp_path / "tensor.pth")


def test_the_network_of_a_run_can_be_converted_again_and_the_console_says_how(result, lab):
    process, folder, _ = result
    assert f"--checkpoint {folder / 'model.pth'} measures this network again" in process.stdout
    lab.options.checkpoint = folder / "model.pth"
    checkpoint = task4.open_checkpoint(lab.options)
    recipe = task4.choose_recipe(lab.options, lab.data, checkpoint)
    assert task4.work_of_training(lab.options, lab.data, recipe) == 0
    task4.obtain_model(lab.run, lab.options, recipe, checkpoint)
    assert digests(lab.folder)["model.pth"] == digests(folder)["model.pth"]


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
    given = task4.examine(path, fashion)
    assert (given.batch, given.is_quantised) == (batch, False)
    logits = task4.OnnxFile(path, fashion.shape).classify(fashion.test_images[:30])
    mean = fashion.test_images[:30].double().mean((1, 2, 3)).numpy() / (1 if dtype == TensorProto.UINT8 else 255)
    np.testing.assert_allclose(logits, mean[:, None] * np.arange(10), rtol=1e-4)


def test_weights_in_another_file_are_refused(fashion, result, tmp_path):
    proto = onnx.load(result[1] / "model.onnx")
    onnx.save(proto, tmp_path / "two.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    with pytest.raises(common.UserError, match="not a self-contained ONNX file"):
        task4.examine(tmp_path / "two.onnx", fashion)


# ---------------------------------------------------------------- engines


def test_an_engine_tells_why_it_cannot(result, lab, tmp_path, capsys):
    (lab.folder / "model_int8.onnx").write_text("nothing")
    (lab.folder / "model.pth").write_bytes((result[1] / "model.pth").read_bytes())
    setup = lab.setup(common.load_checkpoint(lab.folder / "model.pth").model, tmp_path)
    capsys.readouterr()
    with task4.EnginePool(lab.run, setup, [BASELINE, QUANTISED]) as pool:
        assert "NOTE: onnx_int8 cannot run model_int8.onnx" in capsys.readouterr().err  # no reason to stop
        replies = pool.ask(task4.Time(8))
        assert list(replies) == [BASELINE]
        assert replies[BASELINE].p50_ms > 0
        (tmp_path / "torch_fp32.stderr").write_text("chatter\nthe last words\n")
        for pid in workers_below(os.getpid()):
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(common.UserError, match=r"torch_fp32 cannot run model\.pth: .*status -9.*the last words"):
            pool.ask(task4.Classify())
    assert workers_below(os.getpid()) == []


def test_no_question_waits_for_ever(result, lab, tmp_path, monkeypatch):
    (lab.folder / "model.pth").write_bytes((result[1] / "model.pth").read_bytes())
    setup = lab.setup(common.load_checkpoint(lab.folder / "model.pth").model, tmp_path)
    monkeypatch.setattr(task4, "PATIENCE", 0.001)
    with pytest.raises(common.UserError, match=r"did not answer within 0\.001 s"):
        task4.EnginePool(lab.run, setup, [BASELINE]).__enter__()
    assert workers_below(os.getpid()) == []


class Slow(task4.Classifier):
    """A runtime of our own: it answers the mean brightness after two milliseconds."""

    libraries = ("numpy",)

    def __init__(self, engine, setup):
        self.calls = 0

    def prepare(self, images):
        return images.float().mean((1, 2, 3)).numpy()

    def run(self, batch):
        self.calls += 1
        time.sleep(0.002)
        return batch

    def logits(self, output):
        return output[:, None].astype(np.float32)


def test_another_runtime_is_one_entry_and_one_class(lab, tmp_path):
    engine = task4.Engine("slow", Slow, "model.pth", "#123456")
    setup = replace(lab.setup(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), tmp_path), min_calls=20, min_seconds=0)
    process = task4.EngineProcess(engine, setup, lab.data.test_images[:600])
    loaded = process.answer(task4.Load())
    assert 2 <= loaded.first_call_ms < 50
    expected = lab.data.test_images[:600].float().mean((1, 2, 3))
    np.testing.assert_allclose(process.answer(task4.Classify())[:, 0], expected, rtol=1e-6)
    before = process.classifier.calls
    timing = process.answer(task4.Time(64))
    assert process.classifier.calls - before == 1 + 20  # one to warm up
    assert timing.calls == 20
    assert 2 <= timing.p50_ms <= timing.p90_ms <= timing.p99_ms
    with pytest.raises(RuntimeError):  # a bug of ours is not the engine's
        process.answer(task4.Time(-1))
    process.classifier.run = lambda batch: {}["a kernel"]
    with pytest.raises(common.UserError, match=r"slow cannot run model\.pth: 'a kernel'"):
        process.answer(task4.Classify())


@pytest.mark.parametrize("name", ["openvino_fp32", "openvino_int8"])
def test_openvino_reads_both_files_and_gives_the_labels_of_onnx_runtime(result, lab, tested, tmp_path, name):
    pytest.importorskip("openvino", reason="no OpenVINO: pip install openvino")
    _, folder, _ = result
    (engine,) = (engine for engine in task4.ENGINES if engine.name == name)
    (lab.folder / engine.file).write_bytes((folder / engine.file).read_bytes())
    model = common.load_checkpoint(folder / "model.pth").model
    process = task4.EngineProcess(engine, lab.setup(model, tmp_path), tested[0])
    process.answer(task4.Load())
    logits = process.answer(task4.Classify())
    expected = classify(folder / engine.file, tested[0])
    tolerance = 1e-4 if engine.is_exact else 0.05 * np.abs(expected).max()  # int8: rounded elsewhere in the graph
    np.testing.assert_allclose(logits, expected, atol=tolerance)
    assert (logits.argmax(1) == expected.argmax(1)).mean() > (0.999 if engine.is_exact else 0.98)
    assert process.answer(task4.Time(64)).p50_ms > 0


def test_which_engines_are_tried_on_which_machine(monkeypatch):
    files = frozenset({"model.pth", "model.onnx", "model_int8.onnx"})
    laptop = task4.Machine(files, frozenset({"cpu"}), frozenset(), is_quick=False)

    def names(machine: task4.Machine) -> set[str]:
        return {engine.name for engine in task4.ENGINES if engine.is_available(machine)}

    everywhere = {"torch_fp32", "torch_tuned_fp32", "torch_compiled", "onnx_fp32", "onnx_int8"}
    assert everywhere <= names(laptop)
    assert not any("cuda" in name or "bf16" in name for name in names(laptop))
    assert names(laptop) - names(laptop._replace(is_quick=True)) == {"torch_compiled"}
    assert "onnx_int8" not in names(laptop._replace(files=files - {"model_int8.onnx"}))
    xeon = laptop._replace(bf16_devices=frozenset({"cpu"}))
    assert names(xeon) - names(laptop) == {"torch_bf16", "torch_compiled_bf16"}
    old_gpu = laptop._replace(devices=frozenset({"cpu", "cuda"}))
    assert {"torch_cuda", "onnx_cuda"} <= names(old_gpu)
    assert "torch_cuda_bf16" not in names(old_gpu)
    assert names(old_gpu._replace(bf16_devices=frozenset({"cuda"}))) - names(old_gpu) == {"torch_cuda_bf16"}
    monkeypatch.setattr(task4.OnnxRuntime, "libraries", ("a_library_that_is_not_installed",))
    assert names(laptop) & {"onnx_fp32", "onnx_int8"} == set()
    for attribute in ("name", "colour"):
        assert len({getattr(engine, attribute) for engine in task4.ENGINES}) == len(task4.ENGINES)


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
    presses = 0
    while process.poll() is None and presses < 5:
        presses += 1  # Python ignores one that falls into a callback of an import: then one presses again
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the engines get it, too
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=3)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert presses > 1 or b"Traceback" not in err
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--checkpoint", "{bad}/missing.pth"], "no checkpoint"),
        (["--checkpoint", "{output}/unfinished_run/model.pth"], "move it elsewhere first"),
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
    monkeypatch.setattr(common, "load_dataset", lambda *_, **__: fashion)  # 0.4 s, twenty times
    _, folder, _ = result
    before = digests(folder)
    options = [option.format(bad=bad, output=folder) for option in options]
    try:
        status = task4.main([*QUICK, "--output-dir", str(folder), *options])
    except SystemExit as end:  # argparse
        status = end.code
    err = capsys.readouterr().err
    assert status == 2, err
    assert re.search(words, err.strip().splitlines()[-1]), err
    assert "Traceback" not in err
    assert digests(folder) == before
