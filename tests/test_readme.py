"""The READMEs' numbers are those of the documented runs in docs/results, to the last digit that is shown."""

from __future__ import annotations

import json
import re

import pytest

import common

RESULTS = common.ROOT / "docs" / "results"
# Of the original report, of the assignment, of versions and of other people's work: not measured here.
GIVEN = {"0.5453", "0.405", "0.431", "0.001", "3.11", "3.12", "3.13", "2.14"}


def measured() -> set[str]:
    """Every measured number that the READMEs show, as they show it."""
    tasks = {path.parent.name: json.loads(path.read_text()) for path in RESULTS.glob("*/summary.json")}
    shown = [f"{summary['wall_seconds'] / 60:.1f}" for summary in tasks.values()]

    def percent(entry: dict) -> str:
        return f"{100 * entry['mean']:.2f} ± {100 * entry['sd']:.2f}"

    def ratio(value: float, low: float, high: float, digits: int) -> str:
        return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    two = tasks["task2"]
    for name in ("SGD", "RMSprop"):
        settings = ("tuned", "fitted", "noise", "noise_fitted")
        shown += [percent(two["optimizers"][name][setting]["test_accuracy"]) for setting in settings]
    digits = {"lower_loss": 3, "lr_robustness": 2, "noise_robustness": 2, "cheaper_step": 1, "better_generalisation": 2}
    for claim in two["claims"]:
        if claim["primary"]:
            shown.append(ratio(claim["effect"], claim["ci_low"], claim["ci_high"], digits[claim["id"]]))
    shown += [f"{entry['decades']:.2f}" for entry in two["lr_ranges"] if entry["points"] == 2]
    three = tasks["task3"]
    shown += [f"{three['highest_value']['value']:.4f}", f"{three['confirmation']['mean']:.4f}"]
    for name in ("textbook", "best", "lab"):
        shown.append(percent(three["retrain"][name]["test_accuracy"]))
    for name in ("difference", "difference_to_lab"):
        entry = three["retrain"][name]
        shown.append(ratio(100 * entry["mean"], 100 * entry["ci_low"], 100 * entry["ci_high"], 2))
    shown += [ratio(entry["effect"], entry["ci_low"], entry["ci_high"], 1) for entry in three["ablation"]]
    for design in tasks["searches"]["designs"].values():
        shown += [f"{abs(design[name]):.1f}" for name in ("median", "worst", "best")]
    ratios = ("speedup", "speedup_over_tuned", "speedup_over_compiled", "speedup_over_best_torch")
    for engines in (tasks["task4"]["engines"], tasks["task4_amx"]["engines"]):  # two processors
        for name in ("torch_fp32", "torch_tuned_fp32", "torch_compiled", "onnx_fp32", "onnx_int8"):
            shown += [f"{100 * engines[name]['accuracy']:.2f}", f"{engines[name]['batch']['1']['p50_ms']:.3f}"]
            for size, digits in (("1", 1), ("256", 2)):
                entry = engines[name]["batch"][size]
                for key in ratios:
                    if entry.get(f"{key}_ci_high"):
                        shown.append(ratio(entry[key], entry[f"{key}_ci_low"], entry[f"{key}_ci_high"], digits))
            if "cold_start" in engines[name]:
                shown.append(f"{engines[name]['cold_start']['seconds']:.2g}")
    large = {name: engine["batch"]["256"]["p50_ms"] for name, engine in tasks["task4_amx"]["engines"].items()}
    best = min(ms for name, ms in large.items() if name.startswith("torch"))
    shown += [f"{best / large[name]:.2f}" for name in ("onnx_fp32", "onnx_int8")]
    (over_networks,) = re.findall(r"Over 3 networks .* by (\S+) points (\[.*?\])", " ".join(tasks["task4"]["verdict"]))
    shown.append(" ".join(over_networks))
    bench = tasks["benchmark"]
    for name in ("small", "medium"):
        preset = bench["presets"][name]
        shown += [percent({"mean": preset["accuracy"], "sd": preset["accuracy_sd"]}), f"{preset['tflop']:.1f}"]
    if bench["plain"]["seconds"]:  # to 0.80
        shown += ["0.80", f"{bench['plain']['seconds'] / bench['presets']['small']['train_seconds']:.1f}"]
    return set(shown)


@pytest.mark.parametrize("name", ["README.md", "README.ru.md"])
def test_numbers_are_those_of_the_documented_runs(name):
    text = (common.ROOT / name).read_text(encoding="utf-8")
    text = re.sub(r"\]\([^)]*\)|```.*?```|`[^`]*`", "", text, flags=re.S)  # neither links nor code
    text = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    for number in sorted(measured() | GIVEN, key=len, reverse=True):
        text = re.sub(rf"(?<![\d.]){re.escape(number)}(?![\d])", "", text)
    assert re.findall(r"\d+\.\d+", text) == []


@pytest.mark.parametrize(("name", "megabytes"), [("README.md", "MB"), ("README.ru.md", "МБ")])
def test_whole_numbers_of_task_4_are_those_of_its_run(name, megabytes):
    text = (common.ROOT / name).read_text(encoding="utf-8")
    engines = json.loads((RESULTS / "task4" / "summary.json").read_text())["engines"]
    for engine in ("torch_fp32", "onnx_fp32"):
        memory = engines[engine]["cold_start"]["resident_bytes"] / 1e6
        assert re.findall(rf"\b{memory:.0f} {megabytes}", text), engine
        overhead = engines[engine]["profile"]["1"]["overhead_percent"]
        (line,) = (line for line in text.splitlines() if "`profile.png`" in line)
        assert re.findall(rf"\b{overhead:.0f} %", line), engine


def test_every_link_of_the_readmes_leads_somewhere():
    for name in ("README.md", "README.ru.md"):
        text = (common.ROOT / name).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert link.startswith("http") or (common.ROOT / link).exists(), link


def test_documented_runs_are_complete_and_small():
    for task in ("task2", "task3", "task4", "task4_amx", "benchmark", "searches"):
        for name in ("report.md", "summary.json", "config.json", "environment.json"):
            assert (RESULTS / task / name).exists(), name
    assert sum(path.stat().st_size for path in RESULTS.rglob("*") if path.is_file()) < 4_000_000


def test_the_documented_profile_adds_up_to_the_measured_latency():
    summary = json.loads((RESULTS / "task4" / "summary.json").read_text())
    profiled = {name: engine for name, engine in summary["engines"].items() if "profile" in engine}
    assert len(profiled) == 4
    for engine in profiled.values():
        for size, entry in engine["profile"].items():
            assert min(entry["parts_ms"].values()) >= 0
            assert sum(entry["parts_ms"].values()) == pytest.approx(engine["batch"][size]["p50_ms"], rel=0.1)
