"""Task 4: the files are torch's network, the figures are what was measured, wrong files get no speed, bad input."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import ROOT, last_json, run, wait_until
from scipy import stats

import common
import task4_experiment
import task4_onnx
import task4_report
from task4_convert import quantise
from task4_engine import Engine, EngineError, EngineProcess, engine_processes

SCRIPT = "task4_onnx.py"
QUICK = ("--dataset", "fashion_mnist", "--quick")
TESTED = task4_experiment.QUICK_TEST


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def classify(file: Path, images: torch.Tensor) -> np.ndarray:
    """Logits by a plain ONNX Runtime session, as any other program would get them."""
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images.float().div(255).contiguous().numpy()})[0]


# ---------------------------------------------------------------- one whole run, asked many questions


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task4")
    process = run(SCRIPT, *QUICK, "--output-dir", folder)
    assert process.returncode == 0, process.stderr
    return process, folder, json.loads((folder / "summary.json").read_text())


def test_the_last_line_is_the_summary(result):
    process, _, summary = result
    assert last_json(process.stdout) == summary
    assert (summary["dataset"], summary["threads"], summary["interrupted"]) == ("fashion_mnist", 1, False)
    assert summary["verdict"]


def test_all_files_are_written_and_nothing_else_is_on_the_console(result):
    process, folder, _ = result
    expected = "model.pth model.onnx model_int8.onnx accuracy.csv latency.csv latency_distribution.csv summary.json"
    expected += " config.json environment.json report.md"
    figures = {"per_class_accuracy.png", "latency.png", "throughput.png", "pareto.png"}
    assert set(digests(folder)) - {".lock"} == set(expected.split()) | figures
    assert all(f"({name})" in (folder / "report.md").read_text() for name in figures)
    assert process.stderr == ""  # neither the exporter's nor the quantiser's nor the runtime's chatter


def test_every_engine_takes_part(result):
    _, _, summary = result
    engines = {"torch_fp32", "torch_tuned_fp32", "onnx_fp32", "onnx_int8"}
    assert engines <= set(summary["engines"]) <= engines | {"torch_bf16", "torch_cuda", "onnx_cuda"}
    for row in summary["engines"].values():
        assert set(row["batch"]) == {"1", "8", "64", "256"}
        for entry in row["batch"].values():
            assert 0 < entry["p50_ms"] <= entry["p90_ms"] <= entry["p99_ms"]
            assert entry["speedup_ci_low"] <= entry["speedup"] <= entry["speedup_ci_high"]
        assert min(row["load_ms"], row["first_call_ms"], row["peak_rss_bytes"]) > 0


def test_the_console_has_the_original_form_for_torch_and_then_for_onnx(result):
    process, folder, summary = result
    form = r"\n(\w+):\n((?:Accuracy for class: .+ is \d+\.\d %\n){10})Time, ms:  (\d+\.\d+)\n"
    blocks = re.findall(form, process.stdout)
    assert [name for name, _, _ in blocks] == ["torch_fp32", "onnx_fp32", "onnx_int8"]
    rows = read_csv(folder / "accuracy.csv")
    for name, lines, milliseconds in blocks:
        assert float(milliseconds) == summary["engines"][name]["batch"]["1"]["p50_ms"]
        expected = [f"Accuracy for class: {row['class']} is {100 * float(row[name]):.1f} %" for row in rows[:-1]]
        assert lines.splitlines() == expected


def test_the_accuracies_are_those_of_the_saved_files(result, fashion):
    _, folder, summary = result
    labels = fashion.test_labels[:TESTED].numpy()
    rows = read_csv(folder / "accuracy.csv")
    for name, file in (("onnx_fp32", "model.onnx"), ("onnx_int8", "model_int8.onnx")):
        right = classify(folder / file, fashion.test_images[:TESTED]).argmax(1) == labels
        assert summary["engines"][name]["accuracy"] == pytest.approx(right.mean())
        assert float(rows[-1][name]) == pytest.approx(right.mean())
        assert [float(row[name]) for row in rows[:-1]] == pytest.approx([right[labels == c].mean() for c in range(10)])
        assert summary["engines"][name]["size_bytes"] == (folder / file).stat().st_size
    assert summary["engines"]["torch_fp32"]["accuracy"] > 0.75
    assert summary["engines"]["onnx_int8"]["size_bytes"] < 0.3 * summary["engines"]["onnx_fp32"]["size_bytes"]


def test_the_speed_ups_follow_from_latency_csv(result):
    _, folder, summary = result
    rows = read_csv(folder / "latency.csv")
    assert len(rows) == len(summary["engines"]) * 4 * summary["rounds"]
    p50 = {(row["engine"], row["batch_size"], row["round"]): float(row["p50_ms"]) for row in rows}
    rounds = [str(number + 1) for number in range(summary["rounds"])]
    for name, size in (("onnx_fp32", "1"), ("onnx_int8", "256")):
        logs = np.log([p50["torch_fp32", size, r] / p50[name, size, r] for r in rounds])
        low, high = stats.t.interval(0.95, len(logs) - 1, logs.mean(), stats.sem(logs))
        entry = summary["engines"][name]["batch"][size]
        found = [entry["speedup"], entry["speedup_ci_low"], entry["speedup_ci_high"]]
        assert found == pytest.approx(np.exp([logs.mean(), low, high]).tolist())


def test_the_arithmetic_of_a_picture_is_counted(result):
    _, folder, summary = result
    model, _ = common.load_checkpoint(folder / "model.pth")
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)]
    products = []
    for layer in layers:  # each weight is used once per position of the output
        layer.register_forward_hook(
            lambda m, _, out: products.append(m.weight.numel() * out[0].numel() // out.shape[1])
        )
    model(torch.rand(1, 1, 28, 28))
    assert summary["flop_per_picture"] == 2 * sum(products)
    speed = summary["matrix_product_flop_per_second"]
    eager = summary["engines"]["torch_fp32"]["batch"]["256"]["p50_ms"]
    assert f"{eager / 256e3 * speed / summary['flop_per_picture']:.2f} at batch 256" in summary["verdict"][-1]


@pytest.mark.parametrize("count", [1, 7])
def test_the_exported_file_is_the_network_at_any_batch_size(result, fashion, count):
    _, folder, _ = result
    model, _ = common.load_checkpoint(folder / "model.pth")
    images = fashion.test_images[100 : 100 + count]
    with torch.inference_mode():
        expected = model(images.float() / 255).numpy()
    np.testing.assert_allclose(classify(folder / "model.onnx", images), expected, atol=1e-4)


def test_the_onnx_file_explains_itself(result, fashion):
    _, folder, _ = result
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    about = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(about["classes"]) == list(fashion.classes)
    assert json.loads(about["mean"]) == pytest.approx(fashion.mean)
    assert about["source"] == fashion.source
    assert json.loads(about["versions"])["torch"]
    assert not any(tensor.data_location for tensor in proto.graph.initializer)  # one self-contained file
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}


# ---------------------------------------------------------------- no speed for a wrong model


def damage(source: Path, target: Path, change: float) -> None:
    """Copy an ONNX file with one weight changed."""
    proto = onnx.load(source)
    weights = next(tensor for tensor in proto.graph.initializer if len(tensor.dims) == 4)
    values = onnx.numpy_helper.to_array(weights).copy()
    values.flat[0] += change
    weights.CopyFrom(onnx.numpy_helper.from_array(values, weights.name))
    onnx.save(proto, target)


def test_a_broken_file_is_found_and_no_speed_is_quoted(result, tmp_path, capsys):
    _, folder, _ = result
    output = tmp_path / "results"
    shutil.copytree(folder, output, ignore=shutil.ignore_patterns(".lock"))  # an earlier run's speeds are there
    damage(folder / "model.onnx", tmp_path / "broken.onnx", 0.5)
    options = ["--checkpoint", str(folder / "model.pth"), "--onnx", str(tmp_path / "broken.onnx"), "--quick"]
    assert task4_onnx.main([*options, "--output-dir", str(output)]) == 1
    out, err = capsys.readouterr()
    assert "onnx_fp32 (model.onnx) is not the network of model.pth" in err
    assert "Time, ms" not in out
    summary = last_json(out)
    assert summary["faults"]
    assert all(row["batch"] == {} for row in summary["engines"].values())
    assert not [name for name in task4_report.SPEED_FILES if (output / name).exists()]


def test_what_is_a_fault():
    engines = [Engine("torch_fp32", "torch", Path("a"), 1), Engine("onnx_fp32", "onnx", Path("b"), 1)]
    engines.append(Engine("onnx_int8", "onnx", Path("c"), 1, exact=False))
    good = {"max_abs_logit_diff": 1e-5, "largest_logit": 10.0, "agreement": 1.0, "accuracy_drop": 0.0}

    def faults(name: str, **changes: float) -> int:
        rows = {engine.name: dict(good) for engine in engines}
        rows[name] |= changes
        return len(task4_experiment.find_faults(engines, rows, 1.0))

    assert faults("onnx_fp32") == 0
    assert faults("onnx_fp32", max_abs_logit_diff=0.02) == 1
    assert faults("onnx_fp32", agreement=0.998) == 1
    assert faults("onnx_fp32", max_abs_logit_diff=float("nan")) == 1
    assert faults("onnx_int8", max_abs_logit_diff=0.5, agreement=0.98, accuracy_drop=0.9) == 0
    assert faults("onnx_int8", accuracy_drop=1.1) == 1


def test_the_drop_is_paired_over_the_pictures():
    labels = np.zeros(100, np.int64)
    logits = {"torch_fp32": np.tile([1.0, 0.0], (100, 1)), "onnx_int8": np.tile([1.0, 0.0], (100, 1))}
    logits["onnx_int8"][:4] = [0.0, 1.0]
    results: dict[str, dict] = {name: {} for name in logits}
    engines = [Engine(name, "onnx", Path("x"), 1) for name in logits]
    task4_experiment.judge_quality(engines, results, logits, labels, 2)
    int8 = results["onnx_int8"]
    assert (int8["accuracy"], int8["agreement"], int8["max_abs_logit_diff"]) == (0.96, 0.96, 1.0)
    assert int8["accuracy_drop"] == pytest.approx(4)
    half = stats.t.ppf(0.975, 99) * np.std([100] * 4 + [0] * 96, ddof=1) / 10
    assert int8["accuracy_drop_ci_high"] == pytest.approx(4 + half)


def test_calibration_sees_training_pictures_only(result, fashion, tmp_path):
    _, folder, _ = result

    def digest(pictures: common.Dataset) -> str:
        quantise(folder / "model.onnx", tmp_path / "int8.onnx", pictures, 64, 0)
        return hashlib.sha256((tmp_path / "int8.onnx").read_bytes()).hexdigest()

    original = digest(fashion)
    assert digest(replace(fashion, test_images=255 - fashion.test_images)) == original
    assert digest(replace(fashion, train_images=255 - fashion.train_images)) != original


# ---------------------------------------------------------------- statistics and words


def test_a_speed_up_is_a_ratio_within_rounds():
    rows = [
        {"engine": name, "batch_size": 1, "latencies_ms": [factor * load] * 5, "peak_rss_bytes": 1}
        for load in (1.0, 3.0, 10.0)  # a machine that gets slower: the ratio does not
        for name, factor in (("torch_fp32", 4.0), ("onnx_fp32", 2.0))
    ]
    results: dict[str, dict] = {"torch_fp32": {}, "onnx_fp32": {}}
    task4_report.add_speeds(results, rows)
    entry = results["onnx_fp32"]["batch"]["1"]
    assert [entry[key] for key in ("speedup", "speedup_ci_low", "speedup_ci_high")] == pytest.approx([2, 2, 2])


def test_no_difference_is_claimed_where_the_interval_includes_1():
    def words(low: float, mean: float, high: float) -> str:
        entry = {"speedup": mean, "speedup_ci_low": low, "speedup_ci_high": high}
        return task4_report.in_words(entry, "speedup", "onnx_fp32", "torch_fp32", "64")

    assert "no difference" in words(0.9, 1.05, 1.2)
    assert "is faster than" in words(1.01, 1.05, 1.2)
    assert "is SLOWER than" in words(0.7, 0.8, 0.9)


def test_the_slow_tail_is_kept():
    row = task4_report.describe([1.0] * 98 + [101.0] * 2, batch_size=8)
    assert (row["p50_ms"], row["mean_ms"]) == pytest.approx((1, 3))
    assert row["p99_ms"] > 100
    assert row["images_per_second"] == pytest.approx(8 / 3e-3)


# ---------------------------------------------------------------- engines and models


@pytest.fixture
def pictures_file(fashion, tmp_path):
    np.save(tmp_path / "pictures.npy", fashion.test_images[:300].contiguous().numpy())
    return tmp_path / "pictures.npy"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks into /proc")
def test_an_onnx_engine_has_no_torch_in_it_and_ends_with_the_script(result, pictures_file):
    _, folder, summary = result
    process = EngineProcess(Engine("onnx_fp32", "onnx", folder / "model.onnx", 1), pictures_file)
    answer = process.ask("load")
    assert answer["load_ms"] > 0
    maps = Path(f"/proc/{process.process.pid}/maps").read_text()
    assert "onnxruntime" in maps
    assert "libtorch" not in maps
    assert len(process.ask("time", batch_size=1, calls=30, seconds=0.0)["latencies_ms"]) == 30
    process.process.stdin.close()  # what the child sees when the script dies, however it dies
    assert process.process.wait(timeout=20) == 0
    peaks = {name: row["peak_rss_bytes"] for name, row in summary["engines"].items()}
    assert peaks["onnx_fp32"] < peaks["torch_fp32"]


def test_an_engine_tells_why_it_cannot(tmp_path, pictures_file):
    (tmp_path / "model.onnx").write_text("nothing")
    engines = [Engine("onnx_fp32", "onnx", tmp_path / "model.onnx", 1)]
    with engine_processes(engines, pictures_file) as (process,):
        with pytest.raises(EngineError, match=r"model\.onnx"):
            process.ask("load")
        process.process.kill()
        with pytest.raises(EngineError, match="ended with status"):
            process.ask("load")


def test_a_model_is_used_again_only_for_the_same_options(fashion, runtime, tmp_path, capsys):
    path, recipe = tmp_path / "model.pth", common.Recipe(width=16, epochs=1, batch_size=64)
    path.write_bytes(b"damaged")  # made anew
    made = []
    for options in ((recipe, 0), (recipe, 0), (recipe, 1), (replace(recipe, lr=0.1), 1)):
        task4_experiment.train_or_reuse(path, fashion, options[0], runtime, options[1], 256)
        made.append("used again" not in capsys.readouterr().out)
    assert made == [True, False, True, True]


def test_ctrl_c_ends_the_engines_and_the_status_is_130(result, tmp_path):
    _, folder, _ = result
    output = tmp_path / "results"
    options = ["--checkpoint", folder / "model.pth", "--onnx", folder / "model.onnx", "--quick", "--output-dir", output]
    command = [sys.executable, ROOT / SCRIPT, *options]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_until((output / "model_int8.onnx").exists, process)
    time.sleep(3)  # engines are loading, classifying or being timed
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the engines get it, too
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    with pytest.raises(ProcessLookupError):  # nobody of the process group is left
        os.killpg(process.pid, 0)


# ---------------------------------------------------------------- bad input


@pytest.fixture
def bad(result, fashion, tmp_path):
    """Files of many kinds of wrong, by name."""
    _, folder, _ = result
    good = torch.load(folder / "model.pth", weights_only=True)
    (tmp_path / "text.pth").write_text("no checkpoint")
    shape = good | {"state": good["state"] | {"head.bias": torch.zeros(3)}}
    torch.save(shape, tmp_path / "shape.pth")
    torch.save(good | {"classes": [*good["classes"][:-1], "hat"]}, tmp_path / "classes.pth")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pth")
    (tmp_path / "text.onnx").write_text("no network")
    proto = onnx.load(folder / "model.onnx")
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 3
    onnx.save(proto, tmp_path / "channels.onnx")
    damage(folder / "model.onnx", tmp_path / "nan.onnx", float("nan"))
    (tmp_path / "file").write_text("a file")
    return tmp_path


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--checkpoint", "{bad}/missing.pth"], "no checkpoint"),
        (["--checkpoint", "{bad}/text.pth"], "no checkpoint of this lab's SmallCNN"),
        (["--checkpoint", "{bad}/foreign.pth"], "no checkpoint of this lab's SmallCNN"),
        (["--checkpoint", "{bad}/shape.pth"], "size mismatch|state_dict"),
        (["--checkpoint", "{bad}/classes.pth"], "hat"),
        (["--checkpoint", "{bad}"], "no checkpoint"),
        (["--onnx", "{bad}/missing.onnx"], "no ONNX file"),
        (["--onnx", "{bad}/text.onnx"], "no valid, self-contained ONNX file"),
        (["--onnx", "{bad}/channels.onnx"], "no valid|takes pictures of shape"),
        (["--onnx", "{bad}/nan.onnx"], "not finite"),
        (["--output-dir", "{bad}/file/results"], "cannot be written"),
        (["--output-dir", "/proc/results"], "cannot be written"),
        (["--threads", "0"], "too small"),
        (["--rounds", "some"], "no whole number"),
        (["--max-int8-drop", "-1"], "outside 0 to 100"),
        (["--width", "20"], "multiple of 16"),
        (["--device", "gpu7"], "--device"),
        (["--dataset", "nowhere"], "nowhere"),
        (["--checkpoint", ""], "the path is empty"),
    ],
)
def test_bad_input_gets_one_clear_line_and_harms_nothing(result, bad, capsys, options, words):
    _, folder, _ = result
    before = digests(folder)
    options = [option.format(bad=bad) for option in options]
    try:
        status = task4_onnx.main([*QUICK, "--output-dir", str(folder), *options])
    except SystemExit as end:  # argparse
        status = end.code
    err = capsys.readouterr().err
    assert status == 2, err
    assert re.search(words, err.strip().splitlines()[-1]), err
    assert "Traceback" not in err
    assert digests(folder) == before
