"""Task 2: the whole script on real images, and the parts that carry its conclusions."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_run
from scipy import stats

import common
import task2_optimizers as task2
from common import Epoch, Job, Score, TrainingResult

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
    network = common.Network(model="PlainCNN", width=16)
    recipe = common.Recipe(network, common.Training(crop_padding=0, batch_size=32, epochs=2))
    plan = task2.Plan(["SGD", "RMSprop"], {"plain": recipe}, [0.01, 0.1, 1.0], 0.4, 0, 4, 600)
    return replace(plan, **changes)


class Pretended(common.Workers):
    """Workers whose trainings give a known result."""

    def __init__(self, train: Callable[[Job], TrainingResult], count: int = 1) -> None:
        super().__init__(count, common.Runtime("cpu", "fp32", 1), Path())
        self.train = train

    def run(self, function: Callable[..., common.Conversation], *arguments: Job) -> common.Conversation:
        result = self.train(*arguments)
        yield from result.epochs
        return result


def make_result(losses=(0.5,) * 10, accuracy=0.5, val_loss=0.5, val_right=(), judged=None, weights=None):
    """What a training of one epoch with these losses, of its steps, has found."""
    epoch = Epoch(1, float(np.mean(losses)), 1.0, tuple(losses), val_loss, accuracy)
    return TrainingResult((epoch,), Score(val_loss, np.array(val_right, dtype=bool)), judged, weights)


@pytest.fixture
def pretend(tmp_path, fashion):
    """Gives runs whose trainings have a known accuracy, and maybe no loss, at every learning rate."""

    def start(accuracy, diverged=lambda rate: False):
        def train(job):
            rate = job.recipe.training.lr
            loss = math.nan if diverged(rate) else 0.5
            return make_result([loss] * 10, accuracy(rate), loss)

        return make_run(tmp_path, fashion, Pretended(train))

    return start


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
    assert set(pd.read_csv(output / "test.csv").setting) == {"default", "default_constant", "tuned"}
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
    seeds = [
        seed for number in (0, 1, 10) for stage in task2.Stage for seed in make_plan(seed=number).seeds_of(stage, 50)
    ]
    assert len(set(seeds)) == len(seeds)


def test_every_stage_does_as_much_work_as_it_announces(tmp_path, fashion):
    few = torch.arange(640)
    data = replace(fashion, train_images=fashion.train_images[few], train_labels=fashion.train_labels[few])
    plan = make_plan(
        images=64,
        sweep_images=32,
        seeds=2,
        sweep_seeds=2,
        starts=2,
        turns=1,
        steps=2,
        times_in_fresh_processes=False,
        most_test_images=100,
    )
    run = make_run(tmp_path, data)
    run.progress.expect(task2.work_of_all(plan, data))
    task2.measure(run, plan, data)
    assert run.progress.done == pytest.approx(run.progress.total)


def test_candidates_at_an_end_of_the_grid_are_fewer_and_the_progress_bar_knows(pretend):
    run = pretend(lambda rate: math.atan(rate) / 2)
    plan = make_plan()
    run.progress.expect(task2.work_of_sweep(plan) + task2.work_of_candidates(plan))
    sweep = task2.sweep_learning_rates(run, plan)
    candidates = task2.judge_candidates(run, plan, sweep)
    assert set(candidates.lr) == {*sorted(sweep.lr.unique())[-2:]}
    assert run.progress.done == run.progress.total


class Interrupt(KeyboardInterrupt, Exception):
    """Ctrl-C, as a thread of the pool can pass it on."""


def test_what_was_finished_survives_an_interruption(tmp_path, fashion):
    finished = []

    def train(job):
        if len(finished) == 2:
            raise Interrupt
        finished.append(job.seed)
        return make_result(accuracy=len(finished) / 4)

    run = make_run(tmp_path, fashion, Pretended(train))
    with pytest.raises(KeyboardInterrupt):
        task2.sweep_learning_rates(run, make_plan())
    table = pd.read_csv(run.folder / "sweep.csv")
    assert table[["optimizer", "lr", "seed", "val_accuracy"]].to_numpy().tolist() == [
        ["SGD", 0.01, 0, 0.25],
        ["SGD", 0.01, 1, 0.5],
    ]
    assert finished == make_plan().seeds_of(task2.Stage.SWEEP, 2)


def test_tables_are_in_the_order_of_the_plan_whatever_is_finished_first(tmp_path, fashion):
    second_is_done = threading.Event()

    def train(job):
        if job.seed == 0:
            assert second_is_done.wait(60)
        else:
            second_is_done.set()
        return make_result(accuracy=job.seed / 4)

    run = make_run(tmp_path, fashion, Pretended(train, count=2))
    split = common.split_dataset(fashion, 64)
    planned = [task2.Planned({"seed": seed}, Job(make_plan().recipe("SGD", 0.1), seed, split)) for seed in range(3)]
    trained = task2.train_all(run, "sweep.csv", planned)
    assert [each.job.seed for each in trained] == [0, 1, 2]
    table = pd.read_csv(run.folder / "sweep.csv")
    assert table[["seed", "val_accuracy"]].to_numpy().tolist() == [[0, 0], [1, 0.25], [2, 0.5]]


def test_without_docstrings_the_help_and_the_report_still_have_the_protocol(quick, capsys, monkeypatch):
    *_, output = quick
    assert task2.PROTOCOL in (output / "report.md").read_text(encoding="utf-8")
    monkeypatch.setattr(task2, "__doc__", None)  # as with python -OO
    with pytest.raises(SystemExit) as end:
        task2.parse_args(["--help"])
    assert end.value.code == 0
    assert task2.PROTOCOL in capsys.readouterr().out


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


def test_the_grid_is_extended_while_good_rates_reach_its_edge_and_nothing_is_trained_twice(pretend):
    trained = []

    def accuracy(rate):
        trained.append(rate)
        return 0.9 - abs(math.log10(rate / 3)) / 10

    sweep = task2.sweep_learning_rates(pretend(accuracy), make_plan(grid=[0.1, 0.316, 1.0], sweep_seeds=2))
    grid = sorted(sweep.lr.unique())
    assert len(trained) == len(sweep) == len(grid) * 2 * 2
    means = task2.curve(sweep, "plain", "SGD")
    good = task2.good_range(means, 2)
    assert not good.is_censored
    assert good.low < means.mean(axis=1).idxmax() < good.high
    assert means.mean(axis=1).idxmax() == pytest.approx(3.16)


def test_a_range_without_an_end_is_censored(pretend):
    sweep = task2.sweep_learning_rates(pretend(lambda rate: 0.9), make_plan(sweep_seeds=2))
    assert task2.good_range(task2.curve(sweep, "plain", "SGD"), 2).is_censored
    assert sweep.lr.nunique() == 3 + 2 * task2.EXTENSIONS


def test_an_optimizer_that_diverges_everywhere_is_one_clear_line(pretend):
    with pytest.raises(common.UserError, match="SGD diverged at every"):
        task2.sweep_learning_rates(pretend(lambda rate: 0.1, lambda rate: True), make_plan(sweep_seeds=2))
    every_other = itertools.cycle([True, False])  # one of the two seeds at every rate
    with pytest.raises(common.UserError, match="SGD diverged at every"):
        task2.sweep_learning_rates(pretend(lambda rate: 0.1, lambda rate: next(every_other)), make_plan(sweep_seeds=2))


def test_rates_that_round_to_the_same_are_trained_once(pretend):
    sweep = task2.sweep_learning_rates(pretend(lambda rate: 0.9), make_plan(grid=[0.1, 0.1001], sweep_seeds=2))
    assert not sweep.duplicated(["network", "optimizer", "lr", "seed"]).any()


def test_optimizers_without_weight_decay_have_a_default_rate_too():
    assert (task2.default_rate("Rprop"), task2.default_rate("SGD+momentum")) == (0.01, 0.001)


@pytest.mark.parametrize(("long", "expected"), [(0.898, 0.01), (0.896, 0.1)])
def test_candidates_are_the_best_and_its_neighbours_and_in_a_near_tie_the_sweep_decides(pretend, long, expected):
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
        assert task2.good_range(table, points).decades == pytest.approx(good[-1] - good[0], abs=1e-4)


def test_difference_of_ranges_is_paired_over_the_seeds_own_curves():
    generator = np.random.default_rng(0)
    rates = [0.001, 0.01, 0.1, 1.0]
    first, last = (
        table_of(rates, np.array(means)[:, None] + generator.normal(0, 0.003, (4, 5)))
        for means in ([0.5, 0.8, 0.9, 0.5], [0.6, 0.89, 0.9, 0.7])
    )
    found = task2.range_difference(first, last, 2)
    widths = [[task2.good_range(table[[seed]], 2).decades for seed in range(5)] for table in (first, last)]
    by_seed = np.subtract(widths[1], widths[0])
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
def test_divergence_is_seen_and_a_rate_too_small_is_none(tmp_path, fashion, optimizer, lr, diverged):
    job = Job(make_plan().recipe(optimizer, lr, schedule="constant"), 7, common.split_dataset(fashion, 900))
    (trained,) = task2.train_all(make_run(tmp_path, fashion), "runs.csv", [task2.Planned({}, job)])
    assert trained.diverged == diverged


def test_final_runs_share_seeds_and_images_and_differ_in_what_their_setting_says(fashion):
    plan = make_plan(seeds=2)
    split = common.split_dataset(fashion, plan.images)
    planned = task2.plan_finals(fashion, plan, {"SGD": 0.1, "RMSprop": 0.02})
    runs = {(each.facts["optimizer"], each.facts["setting"], each.facts["seed"]): each for each in planned}
    assert len(runs) == len(planned) == 2 * 4 * 2
    assert [each.facts["seed"] for each in planned] == [0] * 8 + [1] * 8  # whole seeds first
    tuned = {"SGD": 0.1, "RMSprop": 0.02}
    default = {"SGD": 0.001, "RMSprop": 0.01}
    for (name, setting, number), (facts, job) in runs.items():
        training = job.recipe.training
        rate = tuned[name] if setting in ("tuned", "noise") else default[name]
        assert (training.optimizer, training.lr, facts["lr"]) == (name, rate, rate)
        assert training.schedule == ("constant" if setting == "default_constant" else "one_cycle")
        assert job.seed == runs["SGD", "tuned", number].job.seed
        assert torch.equal(job.split.train, split.train)
        assert torch.equal(job.judged, split.train)  # there are fewer than are judged
        assert job.keep_weights == (setting != "noise")
        assert facts["label_noise"] == (0.4 if setting == "noise" else 0)
        if setting == "noise":
            wrong = job.labels != fashion.train_labels
            assert int(wrong.sum()) == int(wrong[split.train].sum()) == 240
            assert torch.equal(job.labels, runs["SGD", "noise", number].job.labels)
        else:
            assert job.labels is None
    assert runs["SGD", "tuned", 0].job.seed != runs["SGD", "tuned", 1].job.seed


# ---------------------------------------------------------------- verdicts


SETTING_LOSSES = {"default": 0.4, "default_constant": 0.5, "tuned": 0.3, "noise": 0.6}


def make_measurements(seeds=5, images=400):
    """Measurements in which RMSprop is better than SGD in everything that is claimed of it."""
    generator = np.random.default_rng(0)
    job = Job(make_plan().recipe("SGD", 0.1), 0, common.Split(torch.arange(3), torch.arange(3), (0.0,), (1.0,)))
    sweep, finals, batches, times = [], [], [], []
    tests = {}
    for name, plus in (("RMSprop", 1.0), ("SGD", 0.0)):
        for seed in range(seeds):
            key = {"optimizer": name, "seed": seed}
            jitter = generator.normal(0, 0.002)
            for rate in (0.01, 0.1, 1.0):
                slope = 0.02 if plus else 0.3 + 10 * jitter
                accuracy = 0.9 - slope * abs(math.log10(rate / 0.1)) + jitter
                sweep.append({"network": "plain", "lr": rate, "val_accuracy": accuracy, **key})
            for setting, loss in SETTING_LOSSES.items():
                share = 0.6 + 0.2 * plus if setting == "noise" else 0.9
                final = make_result(
                    accuracy=share,
                    val_loss=loss + jitter,
                    val_right=generator.random(images) < share,
                    judged=Score(loss - 0.1 * plus + jitter, np.arange(20) > 0),
                )
                run = task2.Trained({"setting": setting, "lr": 0.1, **key}, job, final)
                finals.append(run)
                right = generator.random(images) < 0.9 - 0.2 * plus
                if setting != "noise":
                    tests[run] = Score(0.5, right)
            batches += [{"batch_size": size, "val_accuracy": 0.8 + jitter, **key} for size in (8, 32)]
            times.append({"optimizer": name, "start": seed, "step_ms": 10 + 2 * plus + jitter})
    sweep, candidates, batches, times = map(pd.DataFrame, (sweep, [], batches, times))
    return task2.Measurements(sweep, candidates, finals, batches, times, tests)


def judge(measured, **changes):
    """The claims by their names."""
    return {claim.id: claim for claim in task2.judge_claims(make_plan(**changes), measured, math.log(10))}


PRIMARY = ("lower_loss", "lr_robustness", "noise_robustness", "cheaper_step", "better_generalisation")


def test_swapping_the_names_swaps_the_verdicts():
    measured = make_measurements()
    straight = judge(measured)
    swapped = judge(measured, optimizers=["RMSprop", "SGD"])
    for name in PRIMARY:
        assert straight[name].verdict == "supported", name
        assert swapped[name].verdict == "contradicted", name
        assert straight[name].estimate.n == 5
    assert straight["lower_loss"].estimate.mean == pytest.approx(-swapped["lower_loss"].estimate.mean)


def test_holms_correction_is_over_the_five_and_nothing_else():
    claims = judge(make_measurements()).values()
    primary = sorted((claim.estimate.p, claim.p_holm) for claim in claims if claim.is_primary)
    assert len(primary) == 5
    worst = 0.0
    for rank, (raw, corrected) in enumerate(primary):
        worst = max(worst, min(1.0, (5 - rank) * raw))
        assert corrected == pytest.approx(worst)
    assert {(claim.p_holm, claim.verdict) for claim in claims if not claim.is_primary} == {(None, None)}


def test_equal_optimizers_cannot_be_told_apart():
    measured = make_measurements()
    generator = np.random.default_rng(1)
    tests = {run: Score(0.5, generator.random(400) < 0.9) for run in measured.tests}
    claims = judge(replace(measured, tests=tests))
    assert claims["better_generalisation"].verdict == "cannot be told apart"


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_run_that_ended_without_a_loss_counts_as_knowing_nothing(loss):
    measured = make_measurements()
    finals = []
    for run in measured.finals:
        if (run.facts["optimizer"], run.facts["setting"], run.facts["seed"]) == ("SGD", "tuned", 2):
            run = replace(run, result=replace(run.result, judged=Score(loss, run.result.judged.right)))
        finals.append(run)
    comparison = task2.Comparison("SGD", "RMSprop", replace(measured, finals=finals), math.log(10))
    difference = comparison.losses("tuned")
    assert difference.n == 5
    assert difference.mean == pytest.approx((math.log(10) - 0.2 + 4 * 0.1) / 5, abs=0.01)


def test_losses_that_no_seed_has_are_shown_but_not_summarised():
    measured = make_measurements()
    finals = []
    for run in measured.finals:
        if (run.facts["optimizer"], run.facts["setting"]) == ("SGD", "default_constant"):
            result = make_result([math.nan], val_loss=math.nan, judged=Score(math.nan, np.array([False])))
            run = replace(run, result=result)
        finals.append(run)
    measured = replace(measured, finals=finals, tests=dict.fromkeys(finals, Score(0.5, np.array([True, False]))))
    table = task2.outcome_table(measured).set_index(["optimizer", "learning rate"])
    assert table["training loss"]["SGD", "0.1 (default, constant)"] == "nan ± nan"
    assert table.diverged.to_list() == ["0 of 5"] * 4 + ["5 of 5", "0 of 5"]
    of_sgd = task2.summarise(make_plan(), measured, [])["optimizers"]["SGD"]
    assert of_sgd["default"]["final_loss"] == {
        "mean": pytest.approx(0.4, abs=0.01),
        "sd": pytest.approx(0, abs=0.01),
        "n": 5,
    }
    assert not {"final_loss", "val_loss"} & set(of_sgd["default_constant"])
    assert of_sgd["default_constant"]["diverged"] == 5


@pytest.mark.parametrize("loss", [math.nan, 0.0])
def test_losses_that_have_no_place_on_a_log_scale_are_drawn(tmp_path, fashion, capsys, loss):
    job = Job(make_plan().recipe("SGD", 0.1), 0, common.split_dataset(fashion, 64))
    facts = {"optimizer": "SGD", "setting": "tuned", "lr": 0.1, "seed": 0}
    finals = [task2.Trained(facts, job, make_result([loss], val_loss=loss))]
    run = make_run(tmp_path, fashion)
    with run.figure("losses.png", "losses", columns=2) as (_, axes):
        assert task2.draw_losses(axes[0, 0], make_plan(), finals, "SGD", "tuned") == 0.1
        task2.finish_losses(axes[0])
    assert (run.folder / "losses.png").stat().st_size > 100
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("size", "few"), [(8, 2), (16, 4), (32, 8), (4, 1), (3, None)])
def test_small_batches_are_a_quarter_of_the_usual_ones_whatever_those_are_or_left_out(pretend, size, few):
    networks = {"plain": make_plan().networks["plain"].replace(batch_size=size)}
    candidates = pd.DataFrame({"optimizer": ["SGD", "RMSprop"], "lr": [0.1, 0.01], "chosen": True})
    batches = task2.try_small_batches(pretend(lambda rate: 0.8), make_plan(networks=networks), candidates)
    claims = judge(replace(make_measurements(seeds=4), small_batches=batches), networks=networks)
    if few is None:
        assert "noise_robustness_small_batch" not in claims
        return
    text = claims["noise_robustness_small_batch"].statement
    assert text == f"RMSprop loses less accuracy to batches of {few} instead of {size}"
    steps = {number // batch for number, batch in zip(batches["images"], batches.batch_size, strict=True)}
    assert len(steps) == 1  # equally many
    rates = batches.groupby(["optimizer", "batch_size"]).lr.first()
    assert rates["SGD", few] / rates["SGD", size] == pytest.approx(few / size)
    assert rates["RMSprop", few] / rates["RMSprop", size] == pytest.approx((few / size) ** 0.5)


def test_quick_tests_on_images_of_all_classes(tmp_path, fashion, runtime):
    order = fashion.test_labels.argsort(stable=True)  # as in a folder: class after class
    data = replace(fashion, test_images=fashion.test_images[order], test_labels=fashion.test_labels[order])
    job = Job(make_plan().recipe("SGD", 0.1, epochs=1), 1, common.split_dataset(data, 64))
    model = common.make_model(job.recipe.network, data, job.split)
    result = make_result(judged=Score(1.0, np.array([True, False])), weights=model.state_dict())
    final = task2.Trained({"optimizer": "SGD", "setting": "tuned", "seed": 0}, job, result)
    plan = make_plan(most_test_images=1000)
    right = task2.test_once(make_run(tmp_path, data), plan, data, [final])[final].right
    spread = torch.arange(0, 10_000, 10)
    assert torch.bincount(data.test_labels[spread]).tolist() == [100] * 10
    expected = common.score(common.predict(model, data.test_images, runtime, spread), data.test_labels[spread]).right
    assert 0 < expected.sum() < 1000
    assert (right == expected).all()
