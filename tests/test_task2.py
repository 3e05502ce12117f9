"""Task 2: the whole script on real pictures, and the parts that carry its conclusions."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, last_json, run, wait_until

import common
import task2_claims
import task2_experiment as task2
import task2_optimizers
import task2_report


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """(finished process, output directory) of one --quick run."""
    output = tmp_path_factory.mktemp("task2") / "out"
    return run("task2_optimizers.py", "--quick", "--output-dir", output), output


def rows_of(path):
    with path.open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_quick_run_writes_everything(quick):
    result, output = quick
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    names = "loss_plot_SGD.png loss_plot_RMSprop.png comparison.png lr_sensitivity.png noise.png history.csv sweep.csv"
    for name in [*names.split(), "summary.json", "config.json", "environment.json", "report.md"]:
        assert (output / name).stat().st_size > 100, name
    assert not list(output.glob(".*.tmp*"))
    assert not (output / "interrupted").exists()


def test_columns_and_keys_are_the_contract(quick):
    _, output = quick
    history, sweep = rows_of(output / "history.csv"), rows_of(output / "sweep.csv")
    columns = "optimizer setting lr label_noise seed epoch train_loss val_loss val_accuracy seconds"
    assert set(history[0]) == set(columns.split())
    assert set(sweep[0]) == {"optimizer", "lr", "seed", "val_loss", "val_accuracy", "diverged"}
    assert {row["setting"] for row in history} == {"default", "tuned", "noise"}
    summary = json.loads((output / "summary.json").read_text())
    assert summary["source"] == "Fashion-MNIST, embedded"
    assert set(summary["optimizers"]) == {"SGD", "RMSprop"}
    assert set(summary["optimizers"]["SGD"]) == {"default", "tuned"}
    assert set(summary["optimizers"]["SGD"]["tuned"]["test_accuracy"]) == {"mean", "sd", "n"}
    wanted = {"lower_loss", "lr_robustness", "noise_robustness", "cheaper_step", "better_generalisation"}
    assert wanted <= {claim["id"] for claim in summary["claims"]}
    for claim in summary["claims"]:
        assert set(claim) == {"id", "statement", "verdict", "effect", "ci_low", "ci_high", "n", "unit"}
        assert claim["verdict"] in ("supported", "not supported", "undecided")


def test_the_loss_of_every_step_is_kept_and_its_mean_is_the_epochs(quick):
    _, output = quick
    steps, history = rows_of(output / "step_loss.csv"), rows_of(output / "history.csv")
    assert set(steps[0]) == {"optimizer", "setting", "label_noise", "seed", "step", "train_loss"}
    for row in history:
        mine = [float(s["train_loss"]) for s in steps if all(s[key] == row[key] for key in task2_report.RUN)]
        each = len(mine) // 2  # of the two epochs of --quick
        last = int(row["epoch"]) * each
        assert float(row["train_loss"]) == pytest.approx(np.mean(mine[last - each : last]), abs=1e-5)


def test_a_step_is_timed_in_processes_of_its_own_and_judged_in_pairs(quick):
    _, output = quick
    rows = rows_of(output / "step_time.csv")
    times = {(row["process"], row["optimizer"]): float(row["step_ms"]) for row in rows}
    assert set(times) == {(process, name) for process in "12" for name in ("SGD", "RMSprop")}
    claims = json.loads((output / "summary.json").read_text())["claims"]
    claim = next(claim for claim in claims if claim["id"] == "cheaper_step")
    assert claim["n"] == 2
    assert claim["effect"] == pytest.approx(
        np.mean([100 * (times[p, "RMSprop"] / times[p, "SGD"] - 1) for p in "12"]), abs=1e-6
    )


def test_last_line_is_the_summary(quick):
    result, output = quick
    assert last_json(result.stdout) == json.loads((output / "summary.json").read_text())


def test_final_runs_use_fresh_seeds_and_are_paired(quick):
    _, output = quick
    history, sweep = rows_of(output / "history.csv"), rows_of(output / "sweep.csv")
    assert not {row["seed"] for row in history} & {row["seed"] for row in sweep}
    by_optimizer = [{row["seed"] for row in history if row["optimizer"] == name} for name in ("SGD", "RMSprop")]
    assert by_optimizer[0] == by_optimizer[1]


def test_the_same_grid_for_every_optimizer_and_the_best_lies_inside(quick):
    _, output = quick
    sweep = rows_of(output / "sweep.csv")
    summary = json.loads((output / "summary.json").read_text())
    grids = {name: {float(row["lr"]) for row in sweep if row["optimizer"] == name} for name in ("SGD", "RMSprop")}
    assert grids["SGD"] == grids["RMSprop"]
    for name, grid in grids.items():
        assert min(grid) < summary["optimizers"][name]["tuned"]["lr"] < max(grid)


def test_training_in_workers_is_reproducible_and_sees_no_test_picture(fashion, runtime):
    unseen = task2.replace(fashion, test_images=fashion.test_images[:0], test_labels=fashion.test_labels[:0])
    recipe = common.Recipe(optimizer="RMSprop", lr=0.001, width=16, epochs=2, batch_size=64, weight_decay=0.0)
    with common.shared_dataset(unseen) as data:
        first, second = (task2.train_run(data, recipe, runtime, 7, 600, 0.4) for _ in range(2))
    assert first["losses"] == second["losses"]
    assert not first["diverged"]
    for a, b in zip(first["history"], second["history"], strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


@pytest.mark.parametrize(
    ("optimizer", "lr", "diverged"), [("SGD", 1e30, True), ("RMSprop", 2.0, True), ("SGD", 1e-4, False)]
)
def test_divergence_is_seen_and_a_rate_too_small_is_none(fashion, runtime, optimizer, lr, diverged):
    recipe = common.Recipe(optimizer=optimizer, lr=lr, width=16, epochs=2, batch_size=64, schedule="constant")
    with common.shared_dataset(fashion) as data:
        assert task2.train_run(data, recipe, runtime, 7, 1500, 0.0)["diverged"] == diverged


def test_flipped_labels_are_exactly_as_many_and_all_wrong():
    labels = torch.arange(1000) % 10
    noisy = task2.flip_labels(labels, 0.4, 10, seed=3)
    assert int((noisy != labels).sum()) == 400
    assert noisy.min() >= 0
    assert noisy.max() <= 9
    assert torch.equal(noisy, task2.flip_labels(labels, 0.4, 10, seed=3))
    assert not torch.equal(noisy, task2.flip_labels(labels, 0.4, 10, seed=4))
    wrong = torch.bincount((noisy - labels)[noisy != labels] % 10, minlength=10)
    assert wrong[0] == 0
    assert wrong[1:].min() > 20  # every other class is met


def test_the_grid_is_extended_while_the_best_lies_on_its_edge():
    """With an accuracy that is known to peak at 3, a grid up to 1 must grow."""

    def train(jobs, title):
        for job in jobs:
            accuracy = 0.9 - abs(math.log10(job["lr"] / 3)) / 10
            yield job, {"history": [{"val_loss": 0.5, "val_accuracy": accuracy}], "diverged": False}

    rows = []
    best = task2.sweep_rates(train, ["SGD", "RMSprop"], [0.1, 0.316, 1.0], common.Recipe(), 0, 2, rows)
    assert best["SGD"] == best["RMSprop"] == pytest.approx(3.16)
    grid = sorted({row["lr"] for row in rows})
    assert len(rows) == len(grid) * 2 * 2
    accuracies = [0.9 - abs(math.log10(rate / 3)) / 10 for rate in grid]
    assert accuracies[-1] < max(accuracies) - 0.05  # the 5 points lie inside, not cut off
    assert task2_claims.good_width(grid, accuracies, 5) == pytest.approx(1 + 2 * math.log10(3.16 / 3), abs=1e-3)


def test_good_rates_without_an_end_are_said_to_have_none(capsys):
    def train(jobs, title):
        for job in jobs:
            yield job, {"history": [{"val_loss": 0.5, "val_accuracy": 0.9}], "diverged": False}

    task2.sweep_rates(train, ["SGD", "RMSprop"], [0.1, 1.0], common.Recipe(), 0, 1, [])
    assert "good rates go on beyond 1e-07 to 1e+06" in capsys.readouterr().err


def test_a_rate_at_which_a_seed_diverged_is_not_chosen():
    rows = [
        {"optimizer": "SGD", "lr": rate, "seed": seed, "val_accuracy": accuracy, "diverged": rate == 1 and seed == 1}
        for rate, accuracy in ((0.1, 0.8), (1, 0.9))
        for seed in (0, 1)
    ]
    assert task2.best_rate(rows, "SGD") == 0.1
    lost = [row | {"diverged": True} for row in rows]
    assert task2.best_rate(lost, "SGD") == 0.1  # the lowest: there the grid grows


def test_an_optimizer_that_diverges_everywhere_is_one_clear_line():
    def train(jobs, title):
        for job in jobs:
            yield job, {"history": [{"val_loss": math.nan, "val_accuracy": 0.1}], "diverged": True}

    with pytest.raises(common.UserError, match="SGD diverged down to"):
        task2.sweep_rates(train, ["SGD", "RMSprop"], [0.1, 1.0], common.Recipe(), 0, 1, [])


def test_width_of_good_rates_against_a_fine_search():
    rates, accuracies = [0.001, 0.01, 0.1, 1.0], [0.5, 0.88, 0.9, 0.86]
    fine = np.linspace(-3, 0, 300_001)
    curve = np.interp(fine, np.log10(rates), accuracies)
    for points in (1, 2, 5):
        good = fine[curve >= 0.9 - points / 100]
        assert task2_claims.good_width(rates, accuracies, points) == pytest.approx(good[-1] - good[0], abs=1e-4)


def made_rows(strong, weak):
    """Rows in which ``strong`` is better than ``weak`` in everything that is claimed of RMSprop."""
    rng = np.random.default_rng(0)
    rows = {"sweep": [], "history": [], "small_batch": [], "step_time": [], "test": []}
    for name, plus in ((strong, 1.0), (weak, 0.0)):
        for seed in range(4):
            jitter = rng.normal(0, 0.001)
            for rate in (0.01, 0.1, 1.0):
                accuracy = 0.9 - (0.02 if plus else 0.3) * abs(math.log10(rate / 0.1)) + jitter
                rows["sweep"].append({"optimizer": name, "lr": rate, "seed": seed, "val_accuracy": accuracy})
            for setting, loss in (("default", 0.4), ("tuned", 0.3), ("noise", 0.6)):
                accuracy = 0.9 + jitter - (0.3 - 0.2 * plus) * (setting == "noise")
                run = {"optimizer": name, "setting": setting, "label_noise": 0.4 * (setting == "noise"), "seed": seed}
                losses = {"train_loss": loss - 0.1 * plus + jitter, "val_loss": loss, "val_accuracy": accuracy}
                rows["history"].append(run | {"epoch": 1} | losses)
            for size in (16, 128):
                batch = {"optimizer": name, "batch_size": size, "seed": seed, "val_accuracy": 0.8 + jitter}
                rows["small_batch"].append(batch)
            accuracy = {"train_accuracy": 0.95, "test_accuracy": 0.9 - 0.02 * plus + jitter}
            rows["test"].append({"optimizer": name, "setting": "tuned", "seed": seed} | accuracy)
            rows["step_time"].append({"optimizer": name, "step_ms": 10 + 2 * plus + jitter})
    return rows


def test_swapping_the_names_swaps_the_verdicts():
    rows = made_rows("RMSprop", "SGD")
    straight = {c["id"]: c for c in task2_claims.judge_claims(["SGD", "RMSprop"], rows, math.log(10))}
    swapped = {c["id"]: c for c in task2_claims.judge_claims(["RMSprop", "SGD"], rows, math.log(10))}
    for claim in ("lower_loss", "lr_robustness", "noise_robustness", "cheaper_step", "better_generalisation"):
        assert straight[claim]["verdict"] == "supported", claim
        assert swapped[claim]["verdict"] == "not supported", claim
        assert straight[claim]["n"] == 4
    assert straight["lower_loss"]["effect"] == pytest.approx(-swapped["lower_loss"]["effect"])


def test_what_wrong_labels_cost_is_paired_over_the_seeds_that_had_them():
    history = made_rows("RMSprop", "SGD")["history"]
    assert task2_report.cost_of_noise(history, "SGD", 0.4) == pytest.approx(30)
    unpaired = [row | {"val_accuracy": 0.0} if row["seed"] == 3 else row for row in history]
    unpaired = [row for row in unpaired if not (row["seed"] == 3 and row["setting"] == "noise")]
    assert task2_report.cost_of_noise(unpaired, "RMSprop", 0.4) == pytest.approx(10)


def test_the_conclusion_names_the_winner_with_a_positive_lead():
    rows = made_rows("RMSprop", "SGD")
    accuracy = {"test_accuracy": {"mean": 0.9}}
    summary = {name: {"tuned": accuracy, "default": accuracy} for name in ("SGD", "RMSprop")}
    for pair in (["SGD", "RMSprop"], ["RMSprop", "SGD"]):
        sentences = task2_report.conclude(pair, summary, task2_claims.judge_claims(pair, rows, math.log(10)))
        loss = next(text for text in sentences if "training loss" in text)
        assert loss.startswith("RMSprop ends lower in training loss (+")
        assert next(text for text in sentences if "new pictures" in text).startswith("SGD is better on new pictures (+")


def test_equal_optimizers_stay_undecided():
    rng = np.random.default_rng(1)
    rows = made_rows("RMSprop", "SGD")
    for row in rows["test"]:
        row["test_accuracy"] = rng.normal(0.9, 0.01)
    claim = next(
        c for c in task2_claims.judge_claims(["SGD", "RMSprop"], rows, 2.3) if c["id"] == "better_generalisation"
    )
    assert claim["verdict"] == "undecided"


def test_a_run_that_ended_without_a_loss_counts_as_knowing_nothing():
    rows = made_rows("RMSprop", "SGD")
    lost = next(r for r in rows["history"] if (r["optimizer"], r["setting"], r["seed"]) == ("SGD", "tuned", 2))
    lost["train_loss"] = math.nan
    claim = task2_claims.judge_claims(["SGD", "RMSprop"], rows, math.log(10))[0]
    assert claim["n"] == 4
    assert claim["effect"] > 0.5


@pytest.mark.parametrize("loss", [math.nan, math.inf, 0.0, 2.3])
def test_losses_that_have_no_place_on_a_log_scale_are_drawn(loss, tmp_path):
    row = {"lr": 1.0, "label_noise": 0.0, "epoch": 1, "seconds": 1.0, "val_loss": loss, "val_accuracy": 0.1}
    keys = [(name, setting, seed) for name in ("SGD", "RMSprop") for setting in ("tuned", "default") for seed in (1, 2)]
    rows = [row | dict(zip(("optimizer", "setting", "seed"), key, strict=True)) for key in keys]
    losses = {key: [loss] for key in keys}
    task2_report.draw_comparison(tmp_path / "comparison.png", rows, losses, ["SGD", "RMSprop"], "title")
    assert (tmp_path / "comparison.png").stat().st_size > 100


def test_running_mean_equals_a_loop():
    losses = [3.0, 1.0, 2.0, 5.0, 4.0]
    slow = [np.mean(losses[max(0, i - 2) : i + 1]) for i in range(5)]
    assert task2_report.smooth(losses, 3) == pytest.approx(slow)


def assert_ends(group):
    """Within seconds nobody of the process group is left."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("processes are left behind")


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_finished_stages_survive_ctrl_c_and_kill(end, tmp_path):
    command = [sys.executable, ROOT / "task2_optimizers.py", "--quick", "--epochs", "1", "--lr-grid", "0.1", "1"]
    saved = tmp_path / "interrupted" / "sweep.csv"
    saved.parent.mkdir()
    (saved.parent / "small_batch.csv").write_text("of an earlier unfinished run")
    process = subprocess.Popen(
        [*command, "--output-dir", tmp_path], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_until(saved.exists, process)
    os.killpg(process.pid, end)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == (130 if end == signal.SIGINT else -end)
    assert "Traceback" not in errors
    assert {row["optimizer"] for row in rows_of(saved)} == {"SGD", "RMSprop"}
    assert not (saved.parent / "small_batch.csv").exists()
    assert_ends(process.pid)


BAD = [
    (["--optimizers", "SGD", "Sgdd"], "unknown optimizer 'Sgdd'"),
    (["--optimizers", "SGD"], "two or more"),
    (["--optimizers", "SGD", "SparseAdam"], "cannot train"),
    (["--optimizers", "SGD", "LBFGS"], "cannot train"),
    (["--dataset", "no/such/folder"], "no/such/folder"),
    (["--epochs", "0"], "at least 1"),
    (["--seeds", "-1"], "at least 1"),
    (["--batch-size", "many"], "no whole number"),
    (["--lr-grid"], "expected at least one argument"),
    (["--lr-grid", "0.1", "nan"], "positive"),
    (["--noise", "1.5"], "between 0 and 1"),
    (["--width", "20"], "multiple of 16"),
    (["--seed", "-1"], "at least 0"),
    (["--seed", "99999999999999999999"], "too large"),
    (["--device", "cuda:9"], "--device"),
    (["--output-dir", "/proc/none/results"], "/proc/none"),
    (["--precision", "int4"], "invalid choice"),
    (["--output-dir", ""], "the path is empty"),
    (["--device", "meta"], "neither a cpu"),
]


@pytest.mark.parametrize(
    ("options", "words"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input_is_one_clear_line_and_harms_nothing(options, words, tmp_path, capsys):
    (tmp_path / "summary.json").write_text("an earlier result")
    arguments = ["--quick", "--output-dir", str(tmp_path), *options]
    try:
        status = task2_optimizers.main(arguments)
    except SystemExit as error:  # argparse's own way out
        status = error.code
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2
    assert words in message
    assert (tmp_path / "summary.json").read_text() == "an earlier result"


def test_own_pictures_of_any_kind(picture_folder, tmp_path, capsys):
    options = ["--quick", "--lr-grid", "0.01", "0.1", "--batch-size", "16", "--output-dir", str(tmp_path / "out")]
    assert task2_optimizers.main([*options, "--dataset", str(picture_folder)]) == 0
    assert last_json(capsys.readouterr().out)["source"] == "bücher und schuhe, image folder"
    first_line = (tmp_path / "out" / "report.md").read_text(encoding="utf-8").splitlines()[0]
    # all of them, not the limit of --quick
    assert first_line.endswith("bücher und schuhe, image folder, one-cycle rates, 72 pictures")


def test_unreadable_picture_is_named(picture_folder, tmp_path, capsys):
    (picture_folder / "test" / "Trouser" / "torn.png").write_bytes(b"\x89PNG torn")
    options = ["--quick", "--dataset", str(picture_folder), "--output-dir", str(tmp_path / "out")]
    assert task2_optimizers.main(options) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: unreadable picture")
    assert "torn.png" in message
    assert not (tmp_path / "out").exists()
