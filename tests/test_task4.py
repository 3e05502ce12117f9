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
from collections import defaultdict
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
        return task4.set_up(self.run, self.options, self.data, model, None, scratch, task4.Tuning())


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
    expected += " profile.csv cold_start.csv end_to_end.csv serving.csv"
    figures = {f"{name}.png" for name in ("latency", "throughput", "pareto", "disagreements", "profile")}
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
            assert 0 < entry["p50_ms"] <= entry["largest_ms"]  # too few calls for a p99
            assert entry["best_torch"] in summary["engines"]
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
    assert summary["flop_per_image"] > 1e6


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
        task4.make_files(lab.run, lab.options, model, given, task4.Tuning())
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


def timed(latencies: dict[tuple[task4.Engine, int], float], start: int = 1, calls: int = 9) -> list[task4.Measurement]:
    """Measurements of one round in which every call of an engine at a batch size took so many milliseconds."""
    return [
        task4.Measurement(engine, size, 1, start, 1, Loaded(1, 1, 1), Timing(np.full(calls, ms)))
        for (engine, size), ms in latencies.items()
    ]


def test_a_speed_up_is_a_ratio_within_rounds_and_its_interval_is_over_starts():
    factors = (2.0, 2.2, 1.8)  # of torch's time, in three starts
    measurements = [
        replace(measurement, round=number)
        for start, slower in enumerate(factors)
        for number, load in enumerate((1.0, 10.0))  # a machine that gets slower: the ratio does not
        for measurement in timed({(BASELINE, 1): slower * load, (CONVERTED, 1): load}, start)
    ]
    baseline, speed = task4.find_speeds(measurements)
    logs = np.log(factors)
    low, high = stats.t.interval(0.95, 2, logs.mean(), stats.sem(logs))
    ratio = speed.times_as_fast_as(baseline)
    assert (speed.engine, speed.batch_size) == (CONVERTED, 1)
    assert [ratio.mean, ratio.low, ratio.high] == pytest.approx(np.exp([logs.mean(), low, high]).tolist())
    assert speed.p50_ms == pytest.approx(10**0.5)
    died = [m for m in measurements if m.engine == BASELINE or m.start == 0]  # in the second start
    (speed,) = task4.find_speeds(died)
    assert speed.engine == BASELINE


@pytest.mark.parametrize(
    ("low", "high", "claim"),
    [(0.9, 1.2, "not shown to differ from"), (1.01, 1.2, "faster than"), (0.7, 0.9, "slower than")],
)
def test_no_difference_is_claimed_where_the_interval_includes_1(low, high, claim):
    assert task4.claim_of(common.Estimate(1, low, high, 0.5, 5)) == claim


@pytest.fixture
def results_of(lab, tmp_path):
    """The Results of given speeds, all else as it is without measurements."""

    def make(measurements: list[task4.Measurement], **changes: object) -> task4.Results:
        setup = lab.setup(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), tmp_path)
        measured = task4.Measured(timings=measurements)
        speeds = task4.find_speeds(measurements)
        facts = {"qualities": {}, "int8_cause": None, "measured": measured, "speeds": speeds, "other_runs": []}
        return task4.Results(lab.options, lab.data, setup, "this network", 7850, **(facts | changes))

    return make


def in_starts(*rounds: dict[tuple[task4.Engine, int], float]) -> list[task4.Measurement]:
    """Measurements of several starts, whose latencies waver by a thousandth, at random."""
    random = np.random.default_rng(0)
    return [
        measurement
        for start, times in enumerate(rounds)
        for measurement in timed({place: ms * random.uniform(0.999, 1.001) for place, ms in times.items()}, start)
    ]


def test_the_headline_is_against_the_best_of_torch_and_names_it(results_of):
    times = {(BASELINE, 1): 8.0, (task4.TUNED, 1): 4.0, (task4.COMPILED, 1): 3.0, (CONVERTED, 1): 1.0}
    slower = {place: 1.1 * ms for place, ms in times.items()}
    results = results_of(in_starts(times, slower, times))
    words = " ".join(task4.speeds_in_words(results))
    assert words.startswith("At batch 1 onnx_fp32 is faster than the fastest torch engine, torch_compiled: 3.00 times")
    assert re.search(
        r"; 4\.0\d times as fast \[.*\] as torch_tuned_fp32; 8\.0\d times as fast \[.*\] as torch_fp32", words
    )
    words = task4.speeds_in_words(results_of(in_starts(times)))[0]
    assert words.startswith("At batch 1, in one start, onnx_fp32 was 3.0")
    assert re.search(
        r"times as fast as the fastest torch engine, torch_compiled, [34]\.\d\d times as torch_tuned", words
    )
    times[task4.COMPILED, 1] = 5.0  # now tuned torch is the best
    assert "engine, torch_tuned_fp32: 4.00" in task4.speeds_in_words(results_of(in_starts(times, times, times)))[0]


def test_the_fastest_is_named_only_if_the_starts_tell_it_apart(results_of):
    def fastest(*rounds: dict[tuple[task4.Engine, int], float]) -> str:
        return task4.speeds_in_words(results_of(in_starts(*rounds)))[-1]

    clear = {(BASELINE, 1): 8.0, (CONVERTED, 1): 2.0, (QUANTISED, 1): 1.0}
    assert fastest(clear, clear, clear) == "The fastest engine at batch 1 is onnx_int8."
    close = {**clear, (CONVERTED, 1): 1.1}
    reverse = {**clear, (CONVERTED, 1): 0.95}
    words = "The fastest engines at batch 1 are onnx_int8 and onnx_fp32, not told apart."
    assert fastest(close, reverse, close) == words
    assert fastest(clear) == "In the one start that was timed, onnx_int8 was the fastest at batch 1."


def test_p99_needs_a_thousand_calls_of_all_starts_and_rounds():
    def slow(calls: int) -> task4.SlowCalls:
        measurements = timed({(BASELINE, 1): 1.0}, 0, calls - 20) + timed({(BASELINE, 1): 5.0}, 1, 20)
        (speed,) = task4.find_speeds(measurements)
        return speed.slow

    assert slow(1000).is_p99
    assert slow(1000).text == "5"
    assert slow(4000) == (1.0, 4000)  # of 4,000, 20 do not matter
    assert not slow(999).is_p99
    assert slow(999).text == "5 (largest of 999)"


def test_int8_is_not_inferior_in_words(judged):
    words = task4.quality_in_words(QUANTISED, judged(QUANTISED, 1, 1), 0.5)
    assert words.startswith(
        "onnx_int8 changes 2 of 1,000 labels: it corrects 1, breaks 1. Its accuracy changes by +0.00"
    )
    assert "+0.00 points [-0.28, +0.28], so it loses at most 0.28 points on images like these (95 %)." in words
    words = task4.quality_in_words(QUANTISED, judged(QUANTISED, 6, 2), 0.5)
    assert "so it is UNDECIDED whether it loses more than 0.5 (95 %)." in words
    assert "it loses nothing" in task4.quality_in_words(QUANTISED, judged(QUANTISED, 0, 30), 0.5)


def test_the_change_by_int8_is_told_over_networks(results_of, judged):
    def others(*drops: tuple[str, float], on_same_images: bool = True) -> list[task4.OtherRun]:
        return [
            task4.OtherRun("", on_same_images, network, {"onnx_int8": {"accuracy_drop": drop}})
            for network, drop in drops
        ]

    def words(other_runs: list[task4.OtherRun]) -> list[str]:
        return task4.networks_in_words(results_of([], qualities={QUANTISED: quality}, other_runs=other_runs))

    quality = judged(QUANTISED, 2)  # 0.2 points
    (sentence,) = words(others(("b", 0.1), ("c", -0.6), ("b", 0.1)))  # b on two machines
    low, high = stats.t.interval(0.95, 2, 0.1, stats.sem([0.2, 0.1, -0.6]))
    assert f"Over 3 networks onnx_int8 changes the accuracy by +0.10 points [{low:.2f}, +{high:.2f}]" in sentence
    assert sentence.endswith("in the worst case by -0.20 points.")
    assert words(others(("this network", 0.2))) == []  # on another machine: no second network
    assert words(others(("b", 0.1), on_same_images=False)) == []


def test_other_runs_stand_beside_this_one(result, results_of, judged, lab, tmp_path):
    _, folder, summary = result
    other = task4.read_other_run(folder, lab.options, lab.data)
    assert other.network == summary["network"]
    assert other.words.startswith("--images 4000, ")
    times = {(BASELINE, 1): 8.0, (task4.TUNED, 1): 4.0, (CONVERTED, 1): 1.0, (QUANTISED, 1): 0.5}
    qualities = {engine: judged(engine, 0) for engine in (CONVERTED, QUANTISED)}
    qualities[BASELINE] = qualities[CONVERTED]
    results = results_of(in_starts(times, times, times), qualities=qualities, other_runs=[other])
    table = task4.other_runs_table(results).set_index("run")
    assert table.loc["this one", "int8 / fastest torch"] == "8.0 (torch_tuned_fp32)"
    accuracy = 100 * summary["engines"]["torch_fp32"]["accuracy"]
    assert table.loc[other.words, "accuracy"] == f"{accuracy:.2f} %"
    for name in common.PublishedRun._fields:
        content = json.loads((folder / f"{name}.json").read_text())
        content.pop("network", None)  # as of an earlier version
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(common.UserError, match="not the results of a run of this version: 'network'"):
        task4.read_other_run(tmp_path, lab.options, lab.data)


# ---------------------------------------------------------------- where the time goes


def test_the_profile_of_a_run_counts_what_the_network_has_and_adds_up(result):
    _, folder, summary = result
    table = pd.read_csv(folder / "profile.csv").fillna("")
    model = common.load_checkpoint(folder / "model.pth").model
    convolutions = sum(isinstance(layer, nn.Conv2d) for layer in model.modules())
    assert set(table["engine"]) == {"torch_fp32", "torch_tuned_fp32", "onnx_fp32", "onnx_int8"}
    for (name, size), rows in table.groupby(["engine", "batch_size"]):
        assert rows.loc[rows["kind"] == "convolution", "count"].sum() == convolutions, name
        assert (rows["ms"] >= 0).all()
        latency = rows["latency_ms"].iloc[0]
        assert latency <= 1.0001 * rows["ms"].sum() <= 1.5 * latency  # of few calls; documented ones: test_readme.py
        entry = summary["engines"][name]["profile"][str(size)]
        assert sum(entry["parts_ms"].values()) == pytest.approx(rows["ms"].sum())
    activations = table[(table["engine"] == "torch_fp32") & (table["kind"] == "activation")]
    assert set(activations["name"]) == {"aten::clamp_min"}  # ReLU's kernel, and not what dispatches it, too
    assert {"DequantizeLinear", "QuantizeLinear"} <= set(table[table["kind"] == "quantising"]["name"])


def test_the_calls_of_a_profile_are_the_profiled_ones(result, lab, tmp_path):
    (lab.folder / "model.onnx").write_bytes((result[1] / "model.onnx").read_bytes())
    (lab.folder / "model.pth").write_bytes((result[1] / "model.pth").read_bytes())
    setup = lab.setup(common.load_checkpoint(lab.folder / "model.pth").model, tmp_path)
    for engine in (BASELINE, CONVERTED):
        process = task4.EngineProcess(engine, setup, lab.data.test_images[:64])
        process.answer(task4.Load())
        calls = process.classifier.profile(process.prepared(8), 3)
        assert len(calls.latencies_ms) == 3
        by_call = pd.DataFrame(calls.operators).groupby("call")["name"].apply(sorted)
        assert by_call.index.tolist() == [1, 2, 3]  # and no warm-up
        assert by_call[1] == by_call[2] == by_call[3]


def test_what_the_profiler_adds_is_subtracted():
    operators = [
        task4.Operator(call, name, ms)
        for call in (1, 2, 3)
        for name, ms in (("Conv", 0.104), ("Conv", 0.054), ("Relu", 0.003), ("Foo", 0.024))
    ]
    operators += [task4.Operator(4, "Conv", 99.0)]  # a disturbed call
    calls = task4.ProfiledCalls(np.array([0.3, 0.3, 0.3, 99.4]), operators, events=4, idle_ms=0.010)
    profile = task4.profile_of(CONVERTED, 1, 1, task4.Profiled(0.180, calls))
    # 0.17 ms are left for the operators: 0.004 less for each of three, and nothing for the fourth
    assert profile.parts["convolution"] == pytest.approx(0.150)
    assert profile.parts["activation"] == 0
    assert profile.parts["other operators"] == pytest.approx(0.020)
    assert profile.parts["framework overhead"] == pytest.approx(0.010)
    torch_calls = calls._replace(idle_ms=None, events=30)
    profile = task4.profile_of(BASELINE, 1, 1, task4.Profiled(0.240, torch_calls))  # 0.002 ms for each event
    assert profile.parts["convolution"] == pytest.approx(0.154)
    assert profile.parts["framework overhead"] == pytest.approx(0.240 - 0.154 - 0.001 - 0.022)
    profile = task4.profile_of(CONVERTED, 1, 1, task4.Profiled(0.005, calls))  # faster than an idle network
    assert profile.parts["framework overhead"] == pytest.approx(0.005)


def test_what_computes_in_torch_and_what_only_dispatches(runtime):
    from torch.profiler import ProfilerActivity, profile

    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Hardswish(), nn.ReLU(), nn.Dropout(), nn.AvgPool2d(2), nn.Flatten()
    ).eval()
    images = torch.rand(1, 3, 8, 8)
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        network(images).add_(1).cumsum(1)
    found = [task4.torch_name(event.name) for event in profiler.events() if task4.computes(event)]
    kinds = [task4.KIND_OF.get(name, "other operators") for name in found if name != "copy"]
    expected = ["convolution", "normalisation", "activation", "activation", "pooling, reduction", "elementwise"]
    assert kinds == [*expected, "other operators"]


def profiled(engine: task4.Engine, start: int = 1, **parts: float) -> task4.EngineProfile:
    operators = [task4.OperatorTime(kind, kind, 1, ms) for kind, ms in parts.items() if kind != "overhead"]
    return task4.EngineProfile(engine, 1, start, sum(parts.values()), operators)


def test_the_sentence_says_what_makes_an_engine_faster_or_slower(results_of):
    profiles = [
        profiled(task4.TUNED, convolution=0.3, activation=0.1, overhead=0.4),
        profiled(CONVERTED, convolution=0.3, overhead=0.01),
        profiled(QUANTISED, convolution=0.1, quantising=0.5, overhead=0.01),
    ]
    tuned, fp32, int8 = task4.mean_profiles(profiles)
    assert task4.difference_in_words(fp32, tuned) == (
        "At batch 1 onnx_fp32 takes 0.49 ms less than torch_tuned_fp32: 0.39 ms in framework overhead and 0.1 ms in "
        "convolution and activation."
    )
    assert task4.difference_in_words(int8, fp32) == (
        "At batch 1 onnx_int8 takes 0.3 ms more than onnx_fp32: 0.5 ms in quantising; but less by 0.2 ms in "
        "convolution and activation."
    )
    even = task4.MeanProfile.of([profiled(CONVERTED, overhead=0.8)])
    assert task4.difference_in_words(even, even).endswith("takes 0 ms less than onnx_fp32.")  # and no error
    times = {(task4.TUNED, 1): 0.8, (CONVERTED, 1): 0.3, (QUANTISED, 1): 0.3}
    results = results_of(in_starts(times, times, times))
    results.measured.profiles += profiles
    words = task4.profiles_in_words(results)
    assert words[0].startswith("At batch 1 framework overhead is 50 % of torch_tuned_fp32's 0.8 ms, 3 % of onnx_fp32's")
    assert len(words) == 2  # int8 is not told apart from fp32: there is nothing to explain


def test_convolutions_by_the_fallback_kernel_are_told():
    names = {"aten::_slow_conv2d_forward": 6.0, "aten::mkldnn_convolution": 1.0}
    operators = [task4.OperatorTime("convolution", name, count, 0.1) for name, count in names.items()]
    (words,) = task4.fallback_in_words([task4.EngineProfile(task4.TUNED, 1, 1, 0.5, operators)], 1)
    assert "torch computes 6 of 7 convolutions by its fallback kernel" in words
    assert task4.fallback_in_words([task4.EngineProfile(task4.TUNED, 1, 1, 0.5, operators[1:])], 1) == []


# ---------------------------------------------------------------- where it is deployed


def test_cold_starts_give_the_labels_of_the_files(result, tested, fashion, tmp_path):
    _, folder, summary = result
    data = replace(fashion, test_images=tested[0], test_labels=tested[1])
    image = task4.read_images(task4.image_files(data, tmp_path)[:1], fashion.shape)
    table = pd.read_csv(folder / "cold_start.csv").set_index("engine")
    for name, file in (("torch_fp32", "model.onnx"), ("onnx_fp32", "model.onnx"), ("onnx_int8", "model_int8.onnx")):
        assert table.loc[name, "label"] == classify(folder / file, image).argmax()
        assert table.loc[name, "seconds"] == summary["engines"][name]["cold_start"]["seconds"]
    assert table.loc["torch_fp32", "seconds"] > 2 * table.loc["onnx_fp32", "seconds"]
    assert table.loc["torch_fp32", "resident_bytes"] > 2 * table.loc["onnx_fp32", "resident_bytes"]
    assert summary["engines"]["onnx_fp32"]["cold_start"]["speedup"] == pytest.approx(
        table.loc["torch_fp32", "seconds"] / table.loc["onnx_fp32", "seconds"]
    )


def test_the_program_for_onnx_runtime_imports_neither_torch_nor_the_lab(result, fashion, tmp_path):
    import inspect

    np.save(tmp_path / "image.npy", (fashion.test_images[:1].float() / 255).contiguous().numpy())
    program = task4.first_label_by_onnx_runtime
    arguments = (str(result[1] / "model.onnx"), str(tmp_path / "image.npy"), "1", "")
    code = f"{inspect.getsource(program)}\n{program.__name__}(*{arguments})\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    modules = {name.partition(".")[0] for name in done.stdout.split()}
    assert "onnxruntime" in modules
    assert modules & {"torch", "common", "task4_onnx", "pandas", "onnx"} == set()


def test_a_program_that_gives_no_label_is_told(lab, tmp_path):
    setup = lab.setup(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), tmp_path)
    with pytest.raises(common.UserError, match=r"onnx_fp32 gives no label in a program of its own.*model\.onnx"):
        task4.run_program(CONVERTED, setup, 1)


def test_images_from_files_are_those_of_the_data_set(lab, tmp_path, image_folder):
    files = task4.image_files(lab.data, tmp_path)
    assert len(files) == 64
    images = task4.read_images(files, lab.data.shape)
    numbers = [int(Path(file).stem) for file in files]
    assert torch.equal(images, lab.data.test_images[numbers])
    assert len(lab.data.test_labels[numbers].unique()) == 10
    data = common.load_dataset(str(image_folder), image_size=16)
    files = task4.image_files(data, tmp_path)
    assert all(Path(file).is_relative_to(image_folder / "test") for file in files)
    assert task4.read_images(files, data.shape).shape == (len(files), 3, 16, 16)
    Path(files[0]).write_text("damaged in the meantime")
    assert all(Path(file).parent == tmp_path for file in task4.image_files(data, tmp_path))


def test_the_way_from_a_file_has_three_parts(result):
    _, folder, summary = result
    table = pd.read_csv(folder / "end_to_end.csv").set_index("engine")
    assert {"torch_fp32", "onnx_fp32", "onnx_int8"} <= set(table.index)
    parts = table[["decode_ms", "convert_ms", "run_ms"]]
    assert (parts > 0).all(axis=None)
    assert table["total_ms"].to_numpy() == pytest.approx(parts.sum(axis=1).to_numpy(), rel=0.2)  # medians
    verdict = " ".join(summary["verdict"])
    assert re.search(r"From a \.png file to logits onnx_fp32 takes [\d.]+ ms an image \(", verdict)


def test_what_remains_of_the_speed_up_if_images_come_from_files(results_of):
    def from_file(engine: task4.Engine, start: int, decode: float, run: float) -> task4.FromFiles:
        return task4.FromFiles(engine, start, task4.FileTiming(decode + 0.1 + run, decode, 0.1, run))

    times = {(BASELINE, 1): 5.0, (CONVERTED, 1): 1.0}
    results = results_of(in_starts(times, times, times))
    for start, decode in enumerate((0.9, 0.8)):
        results.measured.from_files += [from_file(BASELINE, start, decode, 5.0), from_file(CONVERTED, start, decode, 1)]
    (words,) = task4.files_in_words(results)
    assert (
        "onnx_fp32 takes 1.9 ms an image (0.85 decoding, 0.1 converting, 1 running): it is 3.05 times as fast ["
        in words
    )
    assert words.endswith("] as torch_fp32, with images in memory 5.00 times.")


def served(*rates: tuple[task4.Engine, task4.Arrangement, int, float]) -> list[task4.ServedBy]:
    return [task4.ServedBy(engine, 1, arrangement, start, rate, 0.5) for engine, arrangement, start, rate in rates]


def test_serving_is_compared_start_by_start_and_an_interrupted_one_is_no_error():
    both = (task4.PROCESSES, 3.0), (task4.THREADS, 1.5)
    pairs = served(*[(CONVERTED, arrangement, start, start * rate) for arrangement, rate in both for start in (1, 3)])
    tuned = served(
        *[(task4.TUNED, arrangement, start, start * rate / 2) for arrangement, rate in both for start in (1, 2)]
    )
    ratio = task4.serving_ratio([*pairs, *served((CONVERTED, task4.THREADS, 2, 99.0))], CONVERTED, 1)
    assert (ratio.mean, ratio.n) == (pytest.approx(2.0), 2)
    images = "At batch 1, images per second by two processes of one thread, relative to"
    assert task4.serving_in_words(pairs + tuned) == [
        f"{images} torch_tuned_fp32: onnx_fp32 2.00.",  # of one start
        f"{images} one process of two threads: onnx_fp32 2.00 and torch_tuned_fp32 2.00.",  # equal ratios: no interval
    ]
    assert task4.serving_in_words(served((CONVERTED, task4.PROCESSES, 1, 3.0))) == []


def test_a_batch_for_onnx_runtime_is_contiguous_whatever_the_data_set_is():
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    for dtype in ("float32", "uint8"):
        for channels_last in (False, True):
            for batch in (None, 6):
                array = task4.InputFormat(dtype, batch, channels_last).prepare(images)
                assert array.flags["C_CONTIGUOUS"]


@pytest.mark.skipif(common.usable_cores() == 1, reason="one core")
def test_both_arrangements_of_a_server_are_measured(result):
    _, folder, summary = result
    table = pd.read_csv(folder / "serving.csv")
    assert len(summary["serving"]) == 2  # batch sizes
    for entry in summary["serving"]:
        rows = table[(table["engine"] == entry["engine"]) & (table["batch_size"] == entry["batch_size"])]
        rates = rows.set_index("arrangement")["images_per_second"]
        ratio = rates["2 processes of 1 thread"] / rates["1 process of 2 threads"]
        assert entry["processes_over_threads"] == pytest.approx(ratio)
        assert entry["cpu_seconds_per_1000_threads"] > 0
    assert {entry["engine"] for entry in summary["serving"]} == {"onnx_fp32"}  # all that --quick compares


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


def prefixed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in state.items()}


def as_saved(form: str, network: nn.Module) -> object:
    """What a training program saves of a network: its own weights and what else it has."""
    state = network.state_dict()
    other = {key: torch.zeros_like(value) for key, value in state.items()}
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.rand(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    network.load_state_dict(state)
    averaged = torch.optim.swa_utils.AveragedModel(network)
    forms = {
        "plain": state,
        "DataParallel": prefixed(state, "module."),
        "compiled": torch.compile(network).state_dict(),
        "compiled in DDP": prefixed(state, "module._orig_mod."),
        "tutorial": {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": optimizer.state_dict()},
        "torchvision": {"model": other, "model_ema": averaged.state_dict(), "args": argparse.Namespace(lr=0.1)},
        "timm": {"state_dict": other, "state_dict_ema": state, "arch": "small", "metric": np.float64(0.9)},
        "Lightning": {
            "pytorch-lightning_version": "2.5",
            "state_dict": prefixed(state, "model.") | {"loss.weight": torch.ones(10)},
            "callbacks": {"ModelCheckpoint{}": {"best_model_score": torch.tensor(0.9), "dirpath": Path("x")}},
            "history": defaultdict(list, loss=[1.0, 0.5]),
        },
        "Ignite": {"net": state, "trainer": {"iteration": 7}},
        "mmengine": {"meta": {"epoch": 1}, "state_dict": prefixed(state, "backbone.")},
        "SWA": {"swa_model": averaged.state_dict()},
        "thop": state | {"total_ops": torch.zeros(1), "body.total_params": torch.zeros(1)},
        "half": {key: value.half() if value.is_floating_point() else value for key, value in state.items()},
        "double": {key: value.double() if value.is_floating_point() else value for key, value in state.items()},
        "old": {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")},
        "distilled": {"teacher": nn.Linear(3, 4).state_dict(), "semantic_student": state},
        "wider average": {"ema": Small(7).state_dict(), "state": state},
        "parameters": {
            key: nn.Parameter(value) if value.is_floating_point() else value for key, value in state.items()
        },
    }
    return forms[form]


@pytest.mark.parametrize(
    ("form", "taken"),
    [
        ("plain", ""),
        ("DataParallel", ""),
        ("compiled", ""),
        ("compiled in DDP", ""),
        ("tutorial", "['model_state_dict']"),
        ("torchvision", "averaged weights, ['model_ema']; not taken: ['model']"),
        ("timm", "averaged weights, ['state_dict_ema']; not taken: ['state_dict']"),
        ("Lightning", "['state_dict'], keys without 'model.'"),
        ("Ignite", "['net']"),
        ("mmengine", "['state_dict'], keys without 'backbone.'"),
        ("SWA", "averaged weights, ['swa_model']"),
        ("thop", ""),
        ("half", "the whole file, saved as float16"),
        ("double", "the whole file, saved as float64"),
        ("parameters", ""),
        ("old", ""),
        ("distilled", "['semantic_student']"),
        ("wider average", "['state']"),
    ],
)
def test_weights_as_people_save_them_become_a_checkpoint(lab, tmp_path, capsys, fashion, form, taken):
    network = Small(10)
    torch.save(as_saved(form, network), tmp_path / "net.pth")
    model = obtain_own(lab, tmp_path / "net.pth", "--normalise", "half")
    common.load_checkpoint(lab.folder / "model.pth", "test_task4:Small")
    images = fashion.test_images[:4].float() / 255
    expected = network.eval()(2 * images.repeat(1, 3, 1, 1) - 1)
    torch.testing.assert_close(model(images), expected, atol=2e-3, rtol=1e-4)
    folded = task4.fold(model)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    told = re.findall(r"NOTE: weights of .*net\.pth: (.*)", capsys.readouterr().err)
    assert told == ([taken] if taken else [])


def obtain_own(lab: Lab, path: Path, *options: str, model: str = "test_task4:Small") -> nn.Sequential:
    """The network that the options ``--model ... --checkpoint path`` give."""
    argv = [*QUICK, "--model", model, "--checkpoint", str(path), *options]
    options = task4.parse_args([*argv, "--output-dir", str(lab.run.output)])
    assert task4.open_checkpoint(options) is None
    recipe = task4.choose_recipe(options, lab.data, None)
    return task4.obtain_model(lab.run, options, recipe, None)


def test_a_state_dict_that_does_not_fit_is_refused_in_one_line(lab, tmp_path):
    state = Small(3).state_dict()
    del state["body.0.bias"]
    torch.save({"model": state | {"more": torch.zeros(1)}}, tmp_path / "net.pth")
    with pytest.raises(common.UserError, match=r"Missing.*body.0.bias.*Unexpected.*more.*fc.weight: copying"):
        obtain_own(lab, tmp_path / "net.pth")
    torch.save(Small(10).state_dict() | {"another.layer": torch.zeros(3)}, tmp_path / "net.pth")
    with pytest.raises(common.UserError, match=r"Unexpected key\(s\) in state_dict: \"another\.layer\""):
        obtain_own(lab, tmp_path / "net.pth")
    (tmp_path / "net.safetensors").write_bytes(b"")
    with pytest.raises(common.UserError, match=r"torch\.save\(safetensors\.torch\.load_file\('net\.safetensors'\)"):
        obtain_own(lab, tmp_path / "net.safetensors")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(common.UserError, match="does not hold a state dict for --model, but a Tensor"):
        obtain_own(lab, tmp_path / "tensor.pth")


class Auxiliary(Small):
    """Like many networks, it gives more than logits while it is trained."""

    def forward(self, images):
        logits = super().forward(images)
        return (logits, logits) if self.training else logits


class Grey(Small):
    """It takes images of one channel."""

    def forward(self, images):
        return super().forward(images.view(-1, 1, 28, 28).expand(-1, 3, -1, -1)[: len(images) // 2])


def test_a_network_need_only_be_able_to_classify_to_be_converted(lab, tmp_path):
    torch.save(Small(10).state_dict(), tmp_path / "net.pth")
    model = obtain_own(lab, tmp_path / "net.pth", "--normalise", "none", model="test_task4:Auxiliary")
    assert model(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    words = r"cannot be used: its outputs for 1 image\(s\) have the shape \(0, 10\), expected \(1, 10\)"
    with pytest.raises(common.UserError, match=words):
        obtain_own(lab, tmp_path / "net.pth", model="test_task4:Grey")


class Trap:
    """An object whose loading executes code."""

    def __reduce__(self):
        return exec, ("open('trapped', 'w')",)


@pytest.mark.parametrize(
    ("form", "load"),
    [("alone", "torch.load('net.pth', weights_only=False, map_location='cpu')"), ("in a container", "['model']")],
)
def test_a_pickled_module_is_refused_with_the_line_that_saves_its_weights(lab, tmp_path, form, load):
    network = Small(10)
    content = (
        network if form == "alone" else {"best": torch.tensor(0.9), "args": argparse.Namespace(), "model": network}
    )
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(common.UserError, match=r"holds a pickled test_task4\.Small") as caught:
        obtain_own(lab, tmp_path / "net.pth")
    assert load in str(caught.value)
    line = re.search(r"torch\.save\(.*\)", str(caught.value))[0]
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        exec(line)  # what the user is told to do
    finally:
        os.chdir(here)
    obtain_own(lab, tmp_path / "weights.pth", "--normalise", "none")


def test_nothing_of_a_checkpoint_is_executed(lab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Small(10).state_dict(), "hyper_parameters": Trap()}, tmp_path / "net.pth")
    obtain_own(lab, tmp_path / "net.pth", "--normalise", "none")
    assert not (tmp_path / "trapped").exists()


class Linear(nn.Module):
    """A linear classifier of small grey images, given three channels."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(196, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(nn.functional.avg_pool2d(images.mean(1), 2).flatten(1))


def fit_linear(data: common.Dataset, normalise: nn.Module, labels: torch.Tensor) -> Linear:
    """Least squares on normalised images."""
    network = Linear(10)
    images = normalise(data.train_images.float().repeat(1, 3, 1, 1) / 255)
    features = nn.functional.avg_pool2d(images.mean(1), 2).flatten(1)
    ones = torch.ones(len(features), 1)
    weights = torch.linalg.lstsq(torch.cat([features, ones], 1), nn.functional.one_hot(labels, 10).float()).solution
    network.fc.weight.data = weights[:-1].T.contiguous()
    network.fc.bias.data = weights[-1]
    return network


@pytest.mark.parametrize("name", task4.NORMALISATIONS)
def test_the_normalisation_that_the_network_was_trained_with_is_found(lab, tmp_path, capsys, name):
    few = lab.data.train_images[:4000], lab.data.train_labels[:4000]
    data = replace(lab.data, train_images=few[0], train_labels=few[1])
    split = task4.images_to_train_on(lab.options, data)
    trained_with = task4.normalise_layer(name, split)
    torch.save(fit_linear(data, trained_with, data.train_labels).state_dict(), tmp_path / "net.pth")
    lab.run.data = data
    model = obtain_own(Lab(lab.run, lab.options, data), tmp_path / "net.pth", model="test_task4:Linear")
    told = capsys.readouterr().err
    accuracies = dict(re.findall(r"(none|dataset|imagenet|half) ([\d.]+) %", told))
    assert list(accuracies) == ["none", "dataset", "imagenet", "half"]
    best = max(accuracies.values(), key=float)
    assert float(accuracies[name]) == float(best) > 75
    assert f"500 training images: none {accuracies['none']} %" in told
    if name in ("none", "half"):  # the other two may suit as well
        assert f"Taken: {name} (" in told
        torch.testing.assert_close(model[0].mean, trained_with.mean)
    assert "chance" not in told


def test_classes_in_another_order_are_told(lab, tmp_path, capsys):
    split = task4.images_to_train_on(lab.options, lab.data)
    network = fit_linear(lab.data, task4.normalise_layer("none", split), (lab.data.train_labels + 1) % 10)
    torch.save(network.state_dict(), tmp_path / "net.pth")
    obtain_own(lab, tmp_path / "net.pth", model="test_task4:Linear")
    told = capsys.readouterr().err
    words = (
        r"is not clearly above chance \((\d+) %\): it would be ([\d.]+) % with the classes in another order and --norm"
    )
    found = re.search(words, told)
    assert 10 <= int(found[1]) <= 12
    assert float(found[2]) > 75
    torch.save(Linear(10).state_dict(), tmp_path / "untrained.pth")
    obtain_own(lab, tmp_path / "untrained.pth", "--normalise", "half", model="test_task4:Linear")
    assert "the images may be of another kind, or the weights untrained" in capsys.readouterr().err


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


def test_weights_in_another_file_are_read_and_missed(fashion, result, tmp_path):
    proto = onnx.load(result[1] / "model.onnx")
    onnx.save(proto, tmp_path / "two.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    alone = task4.OnnxFile(task4.examine(tmp_path / "two.onnx", fashion).content, fashion.shape)
    images = fashion.test_images[:20]
    original = task4.OnnxFile(result[1] / "model.onnx", fashion.shape)
    np.testing.assert_array_equal(alone.classify(images), original.classify(images))
    (tmp_path / "weights").unlink()
    with pytest.raises(common.UserError, match=r"two\.onnx is not an ONNX file .*weights"):
        task4.examine(tmp_path / "two.onnx", fashion)


# ---------------------------------------------------------------- engines


def test_scratch_of_a_folder_with_spaces_is_elsewhere_and_nothing_of_it_is_left(tmp_path):
    output, other = tmp_path / "my results", tmp_path / "of somebody else"
    output.mkdir()
    other.mkdir()
    for _ in range(2):
        with task4.scratch_folder(output) as scratch:
            assert " " not in str(scratch)
            (scratch / "file").touch()
        assert not scratch.exists()
        assert [*output.iterdir()] == []
        (output / ".engines").symlink_to(other)  # no run has made it
    assert other.is_dir()
    with task4.scratch_folder(other.rename(tmp_path / "results")) as scratch:
        assert scratch == tmp_path / "results" / ".engines"


def test_an_engine_tells_why_it_cannot(result, lab, tmp_path, capsys):
    (lab.folder / "model_int8.onnx").write_text("nothing")
    (lab.folder / "model.pth").write_bytes((result[1] / "model.pth").read_bytes())
    setup = lab.setup(common.load_checkpoint(lab.folder / "model.pth").model, tmp_path)
    capsys.readouterr()
    with task4.EnginePool(lab.run, setup, [BASELINE, QUANTISED]) as pool:
        assert "NOTE: onnx_int8 cannot run model_int8.onnx" in capsys.readouterr().err  # no reason to stop
        replies = pool.ask(task4.Time(8))
        assert list(replies) == [BASELINE]
        assert replies[BASELINE].latencies_ms.min() > 0
        (tmp_path / "torch_fp32.stderr").write_text("chatter\nthe last words\n")
        for pid in workers_below(os.getpid()):
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(common.UserError, match=r"torch_fp32 cannot run model\.pth: .*status -9.*the last words"):
            pool.ask(task4.Classify())
        assert pool.ask(task4.Time(8)) == {}  # it is not asked again
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
    assert len(timing.latencies_ms) == 20
    assert timing.latencies_ms.min() >= 2
    before = process.classifier.calls
    served = process.answer(task4.Serve(64))
    assert served.images == 64 * (process.classifier.calls - before - 1)
    assert served.images / served.seconds < 64 / 0.002
    timing = process.answer(task4.ClassifyFiles())
    assert 2 <= timing.run_ms < timing.total_ms
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
    assert process.answer(task4.Time(64)).latencies_ms.min() > 0


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
    assert "torch_cuda_fp16" in names(old_gpu)
    new_gpu = old_gpu._replace(bf16_devices=frozenset({"cuda"}))
    assert names(new_gpu) ^ names(old_gpu) == {"torch_cuda_bf16", "torch_cuda_fp16"}
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
        (["--checkpoint", "{bad}/shape.pth"], r"shape\.pth: .*cannot be made again from its weights"),
        (["--checkpoint", "{bad}/good.pth", "--model", "torchvision.models:resnet18"], "leave --model out"),
        (["--checkpoint", "{bad}/classes.pth"], "hat"),
        (["--onnx", "{bad}/missing.onnx"], "No such file"),
        (["--onnx", "{bad}/text.onnx"], "is not an ONNX file"),
        (["--onnx", "{bad}/channels.onnx"], r"for images \[1, 28, 28\]: .* invalid dimensions for input"),
        (["--onnx", "{bad}/int64.onnx"], r"expected: \(tensor\(int64\)\)"),
        (["--onnx", "{bad}/classes.onnx"], r"outputs \(2, 7\), expected finite logits of 10 classes"),
        (["--onnx", "{bad}/nan.onnx"], "expected finite logits"),
        (["--output-dir", "{bad}/file/results"], "file/results"),
        (["--threads", "0"], "whole number from 1"),
        (["--max-int8-drop", "-1"], "from 0 to 100"),
        (["--width", "20"], "multiple of 16"),
        (["--device", "gpu7"], "--device"),
        (["--model", "nowhere:Net"], "nowhere"),
        (["--normalise", "half"], "--normalise is for the plain state dict of --checkpoint"),
        (["--normalise", "half", "--checkpoint", "{bad}/good.pth"], "good.pth knows its normalisation"),
        (["--normalise", "mine"], "invalid choice: 'mine'"),
        (["--model", "test_task4:Small", "--checkpoint", "{bad}/text.pth"], "not a checkpoint"),
        (["--other-runs", "{bad}"], "not the results of a run of this version"),
        (["--other-runs", "docs/results/task2"], "those of another script"),
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
