"""Task 2: the whole script on real images, and the parts that carry its conclusions."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import common
import task2_optimizers as task2

NAMES = ["SGD", "SGD+momentum", "RMSprop"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """(exit status, stdout, stderr, output directory) of one --quick run with three optimizers."""
    output, out, err = tmp_path_factory.mktemp("task2") / "out", io.StringIO(), io.StringIO()
    options = ["--quick", "--optimizers", *NAMES, "--lr-grid", "0.003", "0.03", "0.3", "--images", "320"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = task2.main([*options, "--output-dir", str(output)])
    return status, out.getvalue(), err.getvalue(), output


def make_plan(**changes):
    recipe = common.Recipe(model="PlainCNN", width=16, crop_padding=0, batch_size=32, epochs=2)
    plan = task2.Plan(["SGD", "RMSprop"], {"plain": recipe}, [0.01, 0.1, 1.0], 0.4, 0, 4, 600)
    return replace(plan, **changes)


# ---------------------------------------------------------------- the whole script


def test_quick_run_writes_everything(quick):
    status, stdout, stderr, output = quick
    assert (status, stderr) == (0, "")
    assert max(map(len, stdout.splitlines())) <= 100
    names = "comparison.png lr_sensitivity.png noise.png history.csv sweep.csv step_loss.csv step_time.csv test.csv"
    names += " candidates.csv claims.csv small_batch.csv summary.json config.json environment.json report.md"
    for name in [*names.split(), *(f"loss_plot_{name}.png" for name in NAMES)]:
        assert (output / name).stat().st_size > 100, name
    assert not (output / "unfinished_run").exists()
    assert not (output / ".dataset.pt").exists()


def test_columns_and_keys_are_the_contract(quick):
    *_, output = quick
    history, sweep = pd.read_csv(output / "history.csv"), pd.read_csv(output / "sweep.csv")
    columns = "optimizer setting lr label_noise seed epoch train_loss val_loss val_accuracy seconds"
    assert set(history) == set(columns.split())
    assert {"network", "optimizer", "lr", "seed", "val_loss", "val_accuracy", "diverged"} <= set(sweep)
    assert set(history.setting) == {"default", "default_constant", "tuned", "noise"}
    assert set(sweep.network) == {"PlainCNN", "PlainCNN with BatchNorm"}
    assert sweep.groupby(["network", "optimizer"]).lr.apply(frozenset).groupby("network").nunique().max() == 1
    config = json.loads((output / "config.json").read_text())  # what really ran
    assert (config["images"], config["epochs"], config["seeds"]) == (320, 2, 2)
    options = task2.parse_args(["--quick", "--images", "5000", "--epochs", "9", "--seeds", "9"])
    assert (options.images, options.epochs, options.seeds, len(options.lr_grid)) == (400, 2, 2, 5)
    summary = json.loads((output / "summary.json").read_text())
    assert {"censored", "censored_seeds"} <= set(summary["lr_ranges"][0])
    assert summary["source"] == "Fashion-MNIST, embedded"
    assert list(summary["optimizers"]) == NAMES
    assert set(summary["optimizers"]["SGD"]["tuned"]["test_accuracy"]) == {"mean", "sd", "n"}
    primary = [claim for claim in summary["claims"] if claim["primary"]]
    wanted = ["lower_loss", "lr_robustness", "noise_robustness", "cheaper_step", "better_generalisation"]
    assert [claim["id"] for claim in primary] == wanted
    for claim in summary["claims"]:
        keys = "id statement verdict effect ci_low ci_high n unit p p_holm primary"
        assert set(claim) == set(keys.split())
        allowed = ("supported", "contradicted", "cannot be told apart") if claim["primary"] else (None,)
        assert claim["verdict"] in allowed
    assert "RMSprop" in primary[0]["statement"]  # the last against the first


def test_the_loss_of_every_step_is_kept_and_its_mean_is_the_epochs(quick):
    *_, output = quick
    steps, history = pd.read_csv(output / "step_loss.csv"), pd.read_csv(output / "history.csv")
    keys = ["optimizer", "setting", "seed"]
    for key, mine in steps.groupby(keys):
        rows = history[(history[keys] == list(key)).all(axis=1)].sort_values("epoch")
        each = len(mine) // len(rows)
        means = mine.sort_values("step").train_loss.to_numpy().reshape(len(rows), each).mean(1)
        assert rows.train_loss.to_numpy() == pytest.approx(means, abs=1e-5)


def test_differences_are_paired_and_runs_that_share_a_seed_start_alike(quick):
    *_, output = quick
    steps = pd.read_csv(output / "step_loss.csv")
    first = steps[(steps.step == 1) & (steps.label_noise == 0)]
    assert first.groupby("seed").train_loss.apply(lambda x: x.max() - x.min()).max() < 1e-6
    assert first.groupby("seed").train_loss.mean().nunique() == 2  # different seeds really differ
    times = pd.read_csv(output / "step_time.csv").pivot(index="start", columns="optimizer", values="step_ms")
    claims = pd.read_csv(output / "claims.csv").set_index("id")
    assert claims.effect["cheaper_step"] == pytest.approx((100 * (times.RMSprop / times.SGD - 1)).mean())
    assert claims.n["cheaper_step"] == 2


def test_no_stage_and_no_other_seed_shares_a_seed():
    seeds = [seed for number in (0, 1, 10) for stage in range(5) for seed in make_plan(seed=number).seeds_of(stage, 50)]
    assert len(set(seeds)) == len(seeds)


def test_what_was_finished_survives_an_interruption(tmp_path):
    def train(jobs):
        for number in (2, 0):
            yield number, {"losses": [0.5] * 10, "history": [{"epoch": 1, "val_accuracy": 0.5 + number, "val_loss": 1}]}
        raise KeyboardInterrupt

    run = pretend(None)
    run.train, run.table = train, lambda name, frame: common.write(tmp_path / name, frame)
    with pytest.raises(KeyboardInterrupt):
        task2.sweep_learning_rates(run, make_plan())
    finished = pd.read_csv(tmp_path / "sweep.csv")
    assert finished[["optimizer", "lr", "seed", "val_accuracy"]].to_numpy().tolist() == [
        ["SGD", 0.01, 0, 0.5],
        ["SGD", 0.01, 2, 2.5],
    ]


BAD = [
    (["--optimizers", "SGD", "Sgdd"], "unknown optimizer 'Sgdd'"),
    (["--optimizers", "SGD"], "at least two"),
    (["--optimizers", "SGD", "SparseAdam"], "unknown optimizer"),
    (["--dataset", "no/such/folder"], "no/such/folder"),
    (["--epochs", "0"], "'0' is not"),
    (["--seeds", "1"], "from 2"),
    (["--batch-size", "many"], "'many' is not"),
    (["--lr-grid"], "expected at least one argument"),
    (["--lr-grid", "0.1", "nan"], "'nan' is not"),
    (["--lr-grid", "0.1"], "at least two"),
    (["--noise", "1.5"], "'1.5' is not"),
    (["--width", "20"], "multiple of 16"),
    (["--seed", "-1"], "'-1' is not"),
    (["--device", "cuda:9"], "--device"),
    (["--output-dir", "/proc/none/results"], "/proc/none"),
    (["--precision", "int4"], "invalid choice"),
    (["--output-dir", ""], "not a path"),
    (["--model", "torchvision.models:resnet"], "cannot be made"),
]


@pytest.mark.parametrize(("options", "words"), BAD, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_bad_input_is_one_clear_line_and_harms_nothing(options, words, tmp_path, capsys):
    (tmp_path / "summary.json").write_text("an earlier result")
    try:
        status = task2.main(["--quick", "--output-dir", str(tmp_path), *options])
    except SystemExit as error:  # argparse's own way out
        status = error.code
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2
    assert words in message
    assert (tmp_path / "summary.json").read_text() == "an earlier result"


# ---------------------------------------------------------------- learning rates


def pretend(accuracy, diverged=lambda rate: False):
    """A run whose trainings give a known accuracy at every learning rate."""

    def train(jobs):
        for number, job in enumerate(jobs):
            loss = math.nan if diverged(job.recipe.lr) else 0.5
            row = {"epoch": 1, "val_accuracy": accuracy(job.recipe.lr), "val_loss": loss}
            yield number, {"losses": [loss] * 10, "history": [row]}

    bar = SimpleNamespace(total=0)
    return SimpleNamespace(train=train, table=lambda *_: None, stage=lambda *_: None, bar=bar)


def test_the_grid_is_extended_while_good_rates_reach_its_edge_and_nothing_is_trained_twice():
    trained = []

    def accuracy(rate):
        trained.append(rate)
        return 0.9 - abs(math.log10(rate / 3)) / 10

    sweep = task2.sweep_learning_rates(pretend(accuracy), make_plan(grid=[0.1, 0.316, 1.0], sweep_seeds=2))
    grid = sorted(sweep.lr.unique())
    assert len(trained) == len(sweep) == len(grid) * 2 * 2
    means = task2.curve(sweep, "plain", "SGD")
    low, high, censored = task2.good_range(means, 2)
    assert not censored
    assert low < means.mean(axis=1).idxmax() < high
    assert means.mean(axis=1).idxmax() == pytest.approx(3.16)


def test_a_range_without_an_end_is_censored():
    sweep = task2.sweep_learning_rates(pretend(lambda rate: 0.9), make_plan(sweep_seeds=2))
    assert task2.good_range(task2.curve(sweep, "plain", "SGD"), 2)[2]
    assert sweep.lr.nunique() == 3 + 2 * task2.EXTENSIONS


def test_an_optimizer_that_diverges_everywhere_is_one_clear_line():
    with pytest.raises(common.UserError, match="SGD diverged at every"):
        task2.sweep_learning_rates(pretend(lambda rate: 0.1, lambda rate: True), make_plan(sweep_seeds=2))
    every_other = itertools.cycle([True, False])  # one of the two seeds at every rate
    with pytest.raises(common.UserError, match="SGD diverged at every"):
        task2.sweep_learning_rates(pretend(lambda rate: 0.1, lambda rate: next(every_other)), make_plan(sweep_seeds=2))


def test_rates_that_round_to_the_same_are_trained_once():
    sweep = task2.sweep_learning_rates(pretend(lambda rate: 0.9), make_plan(grid=[0.1, 0.1001], sweep_seeds=2))
    assert not sweep.duplicated(["network", "optimizer", "lr", "seed"]).any()


def test_optimizers_without_weight_decay_have_a_default_rate_too():
    assert (task2.default_rate("Rprop"), task2.default_rate("SGD+momentum")) == (0.01, 0.001)


@pytest.mark.parametrize(("long", "expected"), [(0.898, 0.01), (0.896, 0.1)])
def test_candidates_are_the_best_and_its_neighbours_and_in_a_near_tie_the_sweep_decides(long, expected):
    plan = make_plan(grid=[0.001, 0.01, 0.1, 1.0], sweep_seeds=2)
    run = pretend(lambda rate: {0.01: 0.91, 0.1: 0.9, 1.0: 0.95}.get(rate, 0.5), lambda rate: rate >= 1)
    sweep = task2.sweep_learning_rates(run, plan)
    run = pretend(lambda rate: {0.01: long, 0.1: 0.9, 1.0: 0.95}.get(rate, 0.5), lambda rate: rate >= 1)
    candidates = task2.judge_candidates(run, plan, sweep)
    assert set(candidates.lr) == {0.001, 0.01, 0.1}  # at 1 it diverged
    assert task2.chosen_rates(candidates) == {"SGD": expected, "RMSprop": expected}
    ties = {(row.lr, row.near_tie) for row in candidates.itertuples() if row.lr > 0.001}
    assert ties == {(0.01, long > 0.897), (0.1, True)}


def table_of(rates, accuracies):
    return pd.DataFrame(accuracies, index=pd.Index(rates, name="lr"))


def test_width_of_good_rates_against_a_fine_search():
    rates, accuracies = [0.001, 0.01, 0.1, 1.0], np.array([0.5, 0.88, 0.9, 0.86])
    fine = np.linspace(-3, 0, 300_001)
    line = np.interp(fine, np.log10(rates), accuracies)
    for points in (1, 2, 5):
        good = fine[line >= 0.9 - points / 100]
        table = table_of(rates, np.stack([accuracies - 0.01, accuracies + 0.01], 1))
        assert task2.decades(table, points) == pytest.approx(good[-1] - good[0], abs=1e-4)


def test_difference_of_ranges_is_paired_over_the_seeds_own_curves():
    generator = np.random.default_rng(0)
    rates = [0.001, 0.01, 0.1, 1.0]
    first, last = (
        table_of(rates, np.array(means)[:, None] + generator.normal(0, 0.003, (4, 5)))
        for means in ([0.5, 0.8, 0.9, 0.5], [0.6, 0.89, 0.9, 0.7])
    )
    found = task2.range_difference(first, last, 2)
    by_seed = [task2.decades(last[[k]], 2) - task2.decades(first[[k]], 2) for k in range(5)]
    expected = stats.ttest_1samp(by_seed, 0)
    assert (found.mean, found.p, found.n) == (pytest.approx(np.mean(by_seed)), pytest.approx(expected.pvalue), 5)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))


# ---------------------------------------------------------------- trainings


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


@pytest.mark.parametrize(
    ("optimizer", "lr", "diverged"), [("SGD", 1e30, True), ("RMSprop", 2.0, True), ("SGD", 1e-4, False)]
)
def test_divergence_is_seen_and_a_rate_too_small_is_none(fashion, runtime, optimizer, lr, diverged):
    def train(jobs):
        for number, job in enumerate(jobs):
            generator = common.train_job(fashion, runtime, job)
            while True:
                try:
                    next(generator)
                except StopIteration as end:
                    yield number, end.value
                    break

    run = SimpleNamespace(train=train, table=lambda *_: None)
    job = common.Job(make_plan().recipe(optimizer, lr, schedule="constant"), 7, images=900)
    assert task2.train_all(run, "", [{"job": job}]).diverged.item() == diverged


# ---------------------------------------------------------------- verdicts


def made_tables(strong="RMSprop", weak="SGD", seeds=5, images=400):
    """Measurements in which ``strong`` is better than ``weak`` in everything that is claimed of RMSprop."""
    generator = np.random.default_rng(0)
    sweep, finals, tests, batches, times = [], [], [], [], []
    for name, plus in ((strong, 1.0), (weak, 0.0)):
        for seed in range(seeds):
            jitter = generator.normal(0, 0.002)
            for rate in (0.01, 0.1, 1.0):
                accuracy = 0.9 - (0.02 if plus else 0.3 + 10 * jitter) * abs(math.log10(rate / 0.1)) + jitter
                sweep.append(
                    {"network": "plain", "optimizer": name, "lr": rate, "seed": seed, "val_accuracy": accuracy}
                )
            for setting, loss in (("default", 0.4), ("default_constant", 0.5), ("tuned", 0.3), ("noise", 0.6)):
                share = 0.9 - (0.3 - 0.2 * plus) * (setting == "noise")
                right = generator.random(images) < share
                row = {"optimizer": name, "setting": setting, "seed": seed}
                losses = {"final_loss": loss - 0.1 * plus + jitter, "val_loss": loss + jitter, "val_right": right}
                finals.append(row | losses)
                right = generator.random(images) < 0.9 - 0.2 * plus
                tests.append(row | {"test_right": right, "test_accuracy": right.mean(), "train_accuracy": 0.95})
            row = {"optimizer": name, "seed": seed, "val_accuracy": 0.8 + jitter}
            batches += [row | {"batch_size": size} for size in (8, 32)]
            times.append({"optimizer": name, "start": seed, "step_ms": 10 + 2 * plus + jitter})
    frames = {"sweep": sweep, "finals": finals, "tests": tests, "batches": batches, "times": times}
    return {name: pd.DataFrame(rows) for name, rows in frames.items()}


PRIMARY = ("lower_loss", "lr_robustness", "noise_robustness", "cheaper_step", "better_generalisation")


def test_swapping_the_names_swaps_the_verdicts():
    tables = made_tables()
    both = [
        task2.judge_claims(make_plan(optimizers=names), tables, math.log(10))
        for names in itertools.permutations(["SGD", "RMSprop"])
    ]
    straight, swapped = ({row["id"]: row for row in claims} for claims in both)
    for claim in PRIMARY:
        assert straight[claim]["verdict"] == "supported", claim
        assert swapped[claim]["verdict"] == "contradicted", claim
        assert straight[claim]["n"] == 5
    assert straight["lower_loss"]["effect"] == pytest.approx(-swapped["lower_loss"]["effect"])


def test_holms_correction_is_over_the_five_and_nothing_else():
    claims = task2.judge_claims(make_plan(), made_tables(), math.log(10))
    p = sorted((row["p"], row["p_holm"]) for row in claims if row["primary"])
    worst = 0.0
    for rank, (raw, corrected) in enumerate(p):
        worst = max(worst, min(1.0, (5 - rank) * raw))
        assert corrected == pytest.approx(worst)
    assert {row["verdict"] for row in claims if not row["primary"]} == {None}


def test_equal_optimizers_cannot_be_told_apart():
    tables = made_tables()
    generator = np.random.default_rng(1)
    tables["tests"]["test_right"] = [generator.random(400) < 0.9 for _ in range(len(tables["tests"]))]
    claims = {row["id"]: row for row in task2.judge_claims(make_plan(), tables, math.log(10))}
    assert claims["better_generalisation"]["verdict"] == "cannot be told apart"


def test_a_run_that_ended_without_a_loss_counts_as_knowing_nothing():
    tables = made_tables()
    finals = tables["finals"]
    finals.loc[(finals.optimizer == "SGD") & (finals.setting == "tuned") & (finals.seed == 2), "final_loss"] = math.nan
    claim = task2.judge_claims(make_plan(), tables, math.log(10))[0]
    assert claim["n"] == 5
    assert claim["effect"] == pytest.approx((math.log(10) - 0.2 + 4 * 0.1) / 5, abs=0.01)


@pytest.mark.parametrize("loss", [math.nan, 0.0])
def test_losses_that_have_no_place_on_a_log_scale_are_drawn(tmp_path, loss):
    history = [[{"epoch": 1, "val_loss": loss}]]
    runs = {"optimizer": "SGD", "setting": "tuned", "lr": 0.1, "losses": [[loss]], "history": history}
    run = object.__new__(common.Run)
    run.folder = tmp_path
    with run.figure("losses.png", "losses", columns=2) as (_, axes):
        assert task2.draw_losses(axes[0, 0], make_plan(), pd.DataFrame(runs), "SGD", "tuned") == 0.1
        task2.finish_losses(axes[0])
    assert (tmp_path / "losses.png").stat().st_size > 100


@pytest.mark.parametrize(("size", "few"), [(8, 2), (16, 4), (32, 8), (4, 1), (3, None)])
def test_small_batches_are_a_quarter_of_the_usual_ones_whatever_those_are_or_left_out(size, few):
    recipe = replace(make_plan().networks["plain"], batch_size=size)
    plan = make_plan(networks={"plain": recipe})
    candidates = pd.DataFrame({"optimizer": ["SGD", "RMSprop"], "lr": [0.1, 0.01], "chosen": True})
    batches = task2.try_small_batches(pretend(lambda rate: 0.8), plan, candidates)
    claims = task2.judge_claims(plan, made_tables() | {"batches": batches}, math.log(10))
    text = [row["statement"] for row in claims if row["id"] == "noise_robustness_small_batch"]
    if few is None:
        assert text == []
        return
    assert text == [f"RMSprop loses less accuracy to batches of {few} instead of {size}"]
    steps = {number // batch for number, batch in zip(batches["images"], batches.batch_size, strict=True)}
    assert len(steps) == 1  # equally many
    rates = batches.groupby(["optimizer", "batch_size"]).lr.first()
    assert rates["SGD", few] / rates["SGD", size] == pytest.approx(few / size)
    assert rates["RMSprop", few] / rates["RMSprop", size] == pytest.approx((few / size) ** 0.5)


def test_quick_tests_on_images_of_all_classes(fashion, runtime):
    order = fashion.test_labels.argsort(stable=True)  # as in a folder: class after class
    data = replace(fashion, test_images=fashion.test_images[order], test_labels=fashion.test_labels[order])
    job = common.Job(make_plan().recipe("SGD", 0.1, epochs=1), 1, images=64)
    model = common.make_model(job.recipe, data, job.split(data))
    row = {"optimizer": "SGD", "setting": "tuned", "seed": 0, "final_accuracy": 0.5, "job": job}
    row["state"] = {key: value.numpy() for key, value in model.state_dict().items()}
    options = SimpleNamespace(quick=True)
    run = SimpleNamespace(options=options, runtime=runtime, stage=lambda *_: None, table=lambda *_: None)
    right = task2.test_once(run, data, pd.DataFrame([row])).test_right[0]
    spread = torch.arange(0, 10_000, 10)
    assert torch.bincount(data.test_labels[spread]).tolist() == [100] * 10
    _, expected = common.score(common.predict(model, data.test_images, runtime, spread), data.test_labels[spread])
    assert 0 < expected.sum() < 1000
    assert (right == expected).all()
