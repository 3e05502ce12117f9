"""Task 2: the whole script on real images, and the parts that carry its conclusions."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_run
from scipy import stats
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

import common
import task2_optimizers as task2
from common import Epoch, Job, Score, TrainingResult
from task2_optimizers import Horizon

NAMES = ["SGD", "SGD+momentum", "RMSprop"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """(exit status, stdout, stderr, output directory) of one --quick run with three optimizers."""
    output, out, err = tmp_path_factory.mktemp("task2") / "out", io.StringIO(), io.StringIO()
    options = ["--quick", "--optimizers", *NAMES, "--lr-grid", "0.0003", "0.003", "0.03", "--images", "320"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = task2.main([*options, "--output-dir", str(output)])
    return status, out.getvalue(), err.getvalue(), output


def make_plan(**changes):
    network = common.Network(model="PlainCNN", width=16)
    training = common.Training(crop_padding=0, label_smoothing=0, weight_decay=0, batch_size=32)
    plan = task2.Plan(
        optimizers=["SGD", "RMSprop"],
        networks={"plain": common.Recipe(network, training)},
        grid=[0.01, 0.1, 1.0],
        noise=0.4,
        seed=0,
        seeds=4,
        short=Horizon(task2.SHORT, 600, 2),
        fitted=Horizon(task2.FIT, 200, 3),
        sweep=Horizon("sweep", 300, 1),
        chance_loss=math.log(10),
    )
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


def make_score(accuracy, loss=0.5):
    """A score with exactly this accuracy."""
    return Score(loss, np.array([accuracy]))


def make_result(losses=(0.5,) * 10, accuracy=0.5, val_loss=0.5, judged=None, **networks):
    """What a training of one epoch with these losses, of its steps, has found; it fits its images."""
    judged = judged or make_score(1.0)
    epoch = Epoch(1, float(np.mean(losses)), 1.0, tuple(losses), make_score(accuracy, val_loss), judged)
    return TrainingResult((epoch,), **networks)


def make_final(name, setting, seed, result, job=None):
    """A finished final run at the learning rate 0.1."""
    horizon, _, has_wrong_labels = task2.SETTINGS[setting]
    facts = {"optimizer": name, "setting": setting, "horizon": horizon, "lr": 0.1, "seed": seed}
    split = common.Split(torch.arange(3), torch.arange(3), (0.0,), (1.0,))
    job = job or Job(make_plan().recipe(name, 0.1, make_plan().horizon(horizon)), 0, split)
    return task2.Trained({**facts, "label_noise": 0.4 if has_wrong_labels else 0.0}, job, result)


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
    names = "comparison.png lr_sensitivity.png generalisation.png noise.png tuning_budget.png sweep.csv candidates.csv"
    names += " fitted_rates.csv noisy_rates.csv finals.csv history.csv step_loss.csv step_time.csv test.csv claims.csv"
    names += " target.csv tuning_budget.csv summary.json config.json environment.json report.md"
    for name in [*names.split(), *(f"loss_plot_{name}.png" for name in NAMES)]:
        assert (output / name).stat().st_size > 100, name
    assert not (output / "unfinished_run").exists()
    assert not (output / ".dataset.pt").exists()


def test_columns_of_the_tables_are_the_contract(quick):
    *_, output = quick
    tables = {path.stem: pd.read_csv(path) for path in output.glob("*.csv")}
    facts = {"optimizer", "setting", "horizon", "lr", "label_noise", "seed"}
    scores = {"epoch", "train_loss", "seconds", "val_loss", "val_accuracy", "final_loss", "final_accuracy"}
    assert set(tables["history"]) == {*facts, *scores, "agreement"}
    assert set(tables["finals"]) == {*facts, *scores, "diverged"}
    assert {"network", "optimizer", "lr", "seed", "val_loss", "val_accuracy", "diverged"} <= set(tables["sweep"])
    assert {"start", "optimizer", "step_ms", "update_us"} == set(tables["step_time"])
    for name in ("history", "finals", "step_loss", "test"):
        assert set(tables[name].setting) == {"tuned", "default", "fitted", "noise", "noise_fitted"}
    assert set(tables["target"].setting) == {"tuned", "default"}
    assert tables["history"].agreement.notna().equals(tables["history"].label_noise > 0)
    assert tables["test"].stopped_test_accuracy.notna().equals(tables["test"].horizon == "fitted")
    both = {"PlainCNN", "PlainCNN with BatchNorm"}
    networks = {"sweep": both, "tuning_budget": both, "fitted_rates": both}
    for name in ("sweep", "tuning_budget", "fitted_rates", "candidates", "noisy_rates"):
        assert set(tables[name].network) == networks.get(name, {"PlainCNN"})
        assert set(tables[name].optimizer) == set(NAMES)
    rates = tables["sweep"].groupby(["network", "optimizer"]).lr.apply(set)
    for network, tries in tables["tuning_budget"].groupby("network").k.max().items():
        common_rates = set.intersection(*rates[network])
        assert common_rates == {0.0003, 0.003, 0.03}  # --quick does not extend the grid
        assert tries == len(common_rates)


def test_keys_of_the_summary_are_the_contract_and_two_seeds_are_too_few_for_verdicts(quick):
    _, stdout, _, output = quick
    config = json.loads((output / "config.json").read_text())  # what really ran
    assert (config["images"], config["epochs"], config["fit_images"], config["fit_epochs"]) == (320, 2, 100, 3)
    assert config["seeds"] == 2
    summary = json.loads((output / "summary.json").read_text())
    assert {"horizon", "censored", "censored_seeds"} <= set(summary["lr_ranges"][0])
    assert summary["source"] == "Fashion-MNIST, embedded"
    assert list(summary["optimizers"]) == NAMES
    finals = pd.read_csv(output / "finals.csv")
    for name, found in summary["optimizers"].items():
        fits = finals[(finals.optimizer == name) & (finals.setting == "fitted")].final_accuracy
        mean, lowest, fitted = fits.mean(), fits.min(), (fits >= 0.99).sum()
        assert found["fit"] == {"mean": pytest.approx(mean), "min": pytest.approx(lowest), "n": 2, "fitted": fitted}
        assert set(found["tuned"]["test_accuracy"]) == {"mean", "sd", "n"}
        assert {"stopped_test_accuracy", "lr_is_inside", "lr_fits"} <= set(found["fitted"])
    primary = {claim["id"]: claim["horizon"] for claim in summary["claims"] if claim["primary"]}
    assert primary == HORIZONS
    keys = "id horizon statement verdict not_judged effect ci_low ci_high n unit p p_holm primary"
    for claim in summary["claims"]:
        assert set(claim) == set(keys.split())
        assert claim["verdict"] == ("not judged" if claim["primary"] else None)
        assert claim["p_holm"] is None
        assert bool(claim["not_judged"]) == claim["primary"]
    for word in ("supported", "contradicted", "told apart"):
        assert word not in stdout
    assert "RMSprop" in summary["claims"][0]["statement"]  # the last against the first


def test_the_console_and_the_report_list_the_sentences_of_the_five_claims(quick):
    _, stdout, _, output = quick
    report = (output / "report.md").read_text(encoding="utf-8")
    sentences = report.split("## Answer\n\n")[1].split("\n\n")[0].splitlines()
    verdicts = stdout.split("\nVerdicts")[1]
    assert len(sentences) == verdicts.count("\n- ") == 5
    for sentence in sentences:
        assert sentence in " ".join(verdicts.split())
        assert re.search(r"^- .* is not judged: 2 (seeds|processes) are too few\.$", sentence)


def test_quick_limits_every_loop(fashion):
    options = ["--images", "5000", "--epochs", "9", "--seeds", "9", "--fit-images", "900", "--fit-epochs", "50"]
    found = task2.parse_args(["--quick", *options])
    assert (found.images, found.epochs, found.seeds, len(found.lr_grid)) == (400, 2, 2, 5)
    assert (found.fit_images, found.fit_epochs) == (100, 3)
    plan = task2.make_plan(found, fashion)
    assert (plan.extensions, plan.sweep.images, plan.starts) == (0, 200, 2)


def test_the_loss_of_every_step_is_kept_and_its_mean_is_the_epochs(quick):
    *_, output = quick
    steps, history = pd.read_csv(output / "step_loss.csv"), pd.read_csv(output / "history.csv")
    keys = ["optimizer", "setting", "seed"]
    for key, mine in steps.groupby(keys):
        rows = history[(history[keys] == list(key)).all(axis=1)].sort_values("epoch")
        each = len(mine) // len(rows)
        means = mine.sort_values("step").train_loss.to_numpy().reshape(len(rows), each).mean(1)
        assert rows.train_loss.to_numpy() == pytest.approx(means, abs=1e-5)


def test_runs_that_share_a_seed_start_alike_wrong_labels_included(quick):
    *_, output = quick
    steps = pd.read_csv(output / "step_loss.csv")
    first = steps[steps.step == 1].groupby(["horizon", "label_noise", "seed"]).train_loss
    assert (first.max() - first.min()).max() < 1e-6
    assert first.count().to_dict() == {  # three optimizers in one or two settings
        ("short", 0.0, 0): 6,
        ("short", 0.0, 1): 6,
        ("fitted", 0.0, 0): 3,
        ("fitted", 0.0, 1): 3,
        ("fitted", 0.4, 0): 6,
        ("fitted", 0.4, 1): 6,
    }
    assert first.mean().nunique() == 6  # different seeds, images and labels really differ


def test_primary_effects_are_differences_between_the_first_and_the_last_optimizer_in_the_tables(quick):
    *_, output = quick
    claims = pd.read_csv(output / "claims.csv").set_index("id")
    times = pd.read_csv(output / "step_time.csv").pivot(index="start", columns="optimizer")
    updates_ms = times.update_us / 1000
    shares = 100 * (updates_ms.RMSprop - updates_ms.SGD) / times.step_ms.SGD
    assert claims.effect["cheaper_step"] == pytest.approx(shares.mean())
    assert claims.n["cheaper_step"] == 2

    def difference(table, setting, column):
        """B's mean minus A's."""
        found = pd.read_csv(output / table)
        means = found[found.setting == setting].groupby("optimizer")[column].mean()
        return means.RMSprop - means.SGD

    accuracy = "test_accuracy"
    assert claims.effect["lower_loss"] == pytest.approx(-difference("finals.csv", "tuned", "final_loss"))
    assert claims.effect["better_generalisation"] == pytest.approx(-100 * difference("test.csv", "fitted", accuracy))
    assert claims.effect["noise_robustness"] == pytest.approx(100 * difference("test.csv", "noise", accuracy))
    stopped = difference("test.csv", "fitted", "stopped_test_accuracy")
    assert claims.effect["better_generalisation_stopped"] == pytest.approx(-100 * stopped)


def test_no_stage_and_no_other_seed_shares_a_seed():
    seeds = [
        seed for number in (0, 1, 10) for stage in task2.Stage for seed in make_plan(seed=number).seeds_of(stage, 50)
    ]
    assert len(set(seeds)) == len(seeds)


def test_every_stage_does_as_much_work_as_it_announces(tmp_path, fashion):
    few = torch.arange(640)
    data = replace(fashion, train_images=fashion.train_images[few], train_labels=fashion.train_labels[few])
    plan = make_plan(
        short=Horizon(task2.SHORT, 64, 2),
        fitted=Horizon(task2.FIT, 32, 2),
        sweep=Horizon("sweep", 32, 1),
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
    recipe = make_plan().recipe("SGD", 0.1, make_plan().sweep)
    planned = [task2.Planned({"seed": seed}, Job(recipe, seed, split)) for seed in range(3)]
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
    (["--noise", "0.01", "--fit-images", "20"], "not one gets a wrong label"),
    (["--fit-images", "0"], "'0' is not"),
    (["--fit-epochs", "0"], "'0' is not"),
    (["--other-runs"], "expected at least one argument"),
    (["--other-runs", "no/such/run"], "--other-runs no/such/run: not the results"),
    (["--other-runs", ""], "not a path"),
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


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("summary.json", '{"task": "task3"}', "another script"),
        ("summary.json", '{"task": "task', "Unterminated string"),
        ("summary.json", "[]", ""),
        ("summary.json", '{"task": "task2"}', "claims"),
        ("summary.json", '{"task": "task2", "claims": [{"primary": true}]}', ""),
        ("config.json", "{}", "seed"),
        ("config.json", '{"seed": 7}', "--seed 7 is this run's, too"),
        ("environment.json", "null", ""),
    ],
)
def test_a_folder_without_the_results_of_another_run_is_one_clear_line(quick, tmp_path, capsys, file, content, words):
    *_, output = quick
    for name in common.PublishedRun._fields:
        shutil.copy(output / f"{name}.json", tmp_path)
    (tmp_path / file).write_text(content)
    options = ["--quick", "--seed", "7", "--output-dir", str(tmp_path / "out"), "--other-runs", str(tmp_path)]
    assert task2.main(options) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(f"error: --other-runs {tmp_path}: ")
    assert words in message
    assert not (tmp_path / "out").exists()


def test_the_report_shows_the_verdicts_of_other_runs_in_the_columns_of_its_own(quick, tmp_path, fashion):
    *_, output = quick
    for name in common.PublishedRun._fields:
        shutil.copy(output / f"{name}.json", tmp_path)
    claims = list(judge(make_measurements()).values())
    others = list(judge(make_measurements(), optimizers=["RMSprop", "SGD"]).values())
    summary = {"task": "task2", "fingerprint": "another", "source": "Other images"}
    common.write_json(tmp_path / "summary.json", summary | {"claims": [claim.row() for claim in others]})
    assert task2.compare_runs(claims, []) == []
    table = task2.compare_runs(claims, [task2.read_other_run(tmp_path, task2.parse_args(["--seed", "1"]), fashion)])[-1]
    heads, _, own, other = (dict(enumerate(line.split("|"))) for line in table.splitlines())
    environment = json.loads((output / "environment.json").read_text())
    assert "--seed 0" in other[1]
    assert "other images (Other images)" in other[1]
    assert "--optimizers SGD SGD+momentum RMSprop" in other[1]  # how it differs from a default run, such as this
    assert "--images 320" in other[1]
    assert "--batch-norm" not in other[1]
    assert "--output-dir" not in other[1]
    assert environment["precision"] in other[1]
    assert environment["cpu"] in other[1]
    columns = {name.strip(): at for at, name in heads.items()}
    for claim, of_other in zip(claims[:5], others, strict=False):
        at = columns[claim.id]
        assert own[at].strip() == f"supported, {claim.effect}"
        assert other[at].strip() == f"contradicted, {of_other.effect}"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("seed", 10, "--seed 10"),
        ("batch_norm", True, "--batch-norm"),
        ("batch_norm", False, "(without --batch-norm)"),
        ("model", None, "(without --model)"),
        ("lr_grid", [0.1, 1.0], "--lr-grid 0.1 1.0"),
    ],
)
def test_an_option_of_another_run_is_shown_as_one_would_type_it(name, value, words):
    assert common.option_in_words(name, value) == words


def test_an_interval_that_another_run_has_not_got_is_no_error(quick, tmp_path, fashion):
    *_, output = quick
    for name in common.PublishedRun._fields:
        shutil.copy(output / f"{name}.json", tmp_path)
    claim = make_claim(0.5, estimate=common.interval([0.5, 0.5]))  # equal values: no interval
    summary = {"task": "task2", "fingerprint": fashion.fingerprint, "claims": [claim.row()]}
    common.write_json(tmp_path / "summary.json", summary)
    text = "\n".join(
        task2.compare_runs([], [task2.read_other_run(tmp_path, task2.parse_args(["--seed", "1"]), fashion)])
    )
    assert "cannot be told apart, +0.5 points (no interval)" in text


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


PAIR = task2.Pair("plain", "SGD")


def tried_by_a_search(run, start, margin=0.0, **changes):
    """The table of a search for SGD's learning rate that begins at ``start``, and its rates, rising."""
    plan = make_plan(grid=[0.001, 0.01, 0.1, 1.0], **changes)
    search = replace(task2.Search.short(plan), pairs=[PAIR], margin=margin)
    table = task2.table_of(task2.search_rates(run, plan, search, {PAIR: start}))
    assert set(table.groupby("lr").seed.apply(tuple)) == {(0, 1)}  # and nothing is trained twice
    return table, sorted(table.lr.unique())


def peak_at(best, lost_per_decade):
    """Accuracy by learning rate: 0.9 at the best, less towards both sides."""
    return lambda rate: 0.9 - lost_per_decade * abs(math.log10(rate / best))


@pytest.mark.parametrize(
    ("start", "best", "lost_per_decade", "margin", "expected"),
    [
        (0.01, 0.01, 0.012, 0, [0.001, 0.01, 0.1]),  # the start and its neighbours
        (1.0, 1.0, 0.012, 0, [0.1, 1, 10]),  # at the end of the grid, which continues
        (0.001, 0.001, 0.012, 0, [0.0001, 0.001, 0.01]),
        (0.1, 0.001, 0.012, 0, [0.0001, 0.001, 0.01, 0.1, 1]),  # follows the best one outwards
        (0.1, 10.0, 0.012, 0, [0.01, 0.1, 1, 10, 100]),
        (0.1, 0.1, 0.012, 0.02, [0.001, 0.01, 0.1, 1, 10]),  # while an end is within the margin
        (0.01, 0.01, 0.03, 0, [0.001, 0.00316, 0.01, 0.0316, 0.1]),  # midway to what loses more than 2 points
        (0.01, 0.01, 0.03, 0.02, [0.001, 0.00316, 0.01, 0.0316, 0.1]),
        (0.1, 0.06, 0.025, 0, [0.01, 0.1, 0.316, 1]),
    ],
)
def test_a_search_tries_its_start_and_neighbours_follows_the_best_and_looks_midway(
    pretend, start, best, lost_per_decade, margin, expected
):
    _, rates = tried_by_a_search(pretend(peak_at(best, lost_per_decade)), start, margin)
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    ("grid", "rates"),
    [
        ([0.01, 0.1, 1.0], [0.0001, 0.001, 0.01, 0.1, 1.0, 10.0, 100.0]),
        ([0.001, 0.01, 0.02], [0.00001, 0.0001, 0.001, 0.01, 0.02, 0.04, 0.08]),
    ],
)
def test_neighbours_of_rates_continue_the_grid_at_each_end_as_it_ends_there(grid, rates):
    for lower, higher in itertools.pairwise(rates):
        assert task2.rate_above(lower, grid) == higher
        assert task2.rate_below(higher, grid) == lower
        if grid[0] <= lower < grid[-1]:
            between = math.sqrt(lower * higher)
            assert (task2.rate_below(between, grid), task2.rate_above(between, grid)) == (lower, higher)


def test_rates_beyond_the_grid_have_three_digits():
    assert task2.rate_above(1.0, [0.1, 0.3, 1.0]) == 3.33
    assert task2.rate_below(0.1, [0.1, 0.3, 1.0]) == 0.0333
    assert task2.midway_rates(pd.Series({0.1: 0.9, 1.0: 0.5})) == [0.316]


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ([0.7, 0.89, 0.9, 0.5], [0.00316, 0.316]),  # from the ends of the good range, on both sides
        ([0.8, 0.89, 0.9, 0.81], []),  # slopes
        ([0.5, 0.7, 0.9, 0.89], [0.0316]),  # not from the cliff further down
        ([0.9, 0.7, 0.6, 0.5], [0.00316]),  # there is no rate below the best
    ],
)
def test_the_rate_midway_down_a_cliff_is_next_to_the_good_range(accuracies, expected):
    assert task2.cliff_rates(pd.Series(accuracies, [0.001, 0.01, 0.1, 1.0])) == expected


def test_a_cliff_without_a_rate_between_has_none_midway():
    assert task2.cliff_rates(pd.Series({0.1: 0.9, 0.1001: 0.5})) == []


def test_the_sweep_tries_the_rate_midway_down_a_cliff_for_the_optimizer_that_has_it(tmp_path, fashion):
    def train(job):
        training = job.recipe.training
        if training.optimizer == "SGD" and training.lr > 1:
            return make_result(accuracy=0.5)
        return make_result(accuracy=peak_at(1.0, 0.03)(training.lr))

    plan = make_plan(sweep_seeds=2)
    run = make_run(tmp_path, fashion, Pretended(train))
    run.progress.expect(task2.work_of_sweep(plan))
    sweep = task2.sweep_learning_rates(run, plan)
    rates = sweep.groupby("optimizer").lr.apply(lambda tried: sorted(set(tried)))
    assert rates["SGD"] == [0.01, 0.1, 1.0, 3.16, 10.0]  # beyond the grid, which is extended first
    assert rates["RMSprop"] == [0.01, 0.1, 1.0, 10.0]
    assert not sweep.duplicated(["optimizer", "lr", "seed"]).any()
    assert run.progress.done == run.progress.total
    for name in plan.optimizers:
        assert list(task2.common_curve(sweep, plan, "plain", name).index) == [0.01, 0.1, 1.0, 10.0]
        assert task2.common_curve(sweep, plan, "plain", name).shape == (4, 2)


SWEEP = pd.DataFrame(
    [("plain", name, 0.1, 0, 0.9, False) for name in ("SGD", "RMSprop")],
    columns=["network", "optimizer", "lr", "seed", "val_accuracy", "diverged"],
)


@pytest.mark.parametrize(("best", "seeds"), [(0.316, 5), (0.1, 2)])
def test_a_best_rate_next_to_one_that_diverged_is_confirmed_on_more_seeds(pretend, best, seeds):
    plan = make_plan()
    run = pretend(peak_at(best, 0.012), lambda rate: rate == 1.0)
    run.progress.expect(task2.Search.short(plan).expected_work(plan))
    table = task2.search_short(run, plan, SWEEP)
    assert set(table.lr) == {0.01, 0.1, 0.316, 1.0}  # 0.316 lies between 0.1 and what diverged
    for pair in task2.Search.short(plan).pairs:
        assert task2.best_rate(table, pair) == best
        tried = table[table.optimizer == pair.optimizer].groupby("lr").seed.apply(sorted)
        assert tried.pop(best) == list(range(seeds))
        assert tried.to_list() == [[0, 1]] * 3
    assert run.progress.done == run.progress.total
    assert len(pd.read_csv(run.folder / "candidates.csv")) == len(table)


def test_a_rate_that_diverges_on_one_of_the_additional_seeds_is_not_chosen(tmp_path, fashion):
    plan = make_plan()
    seeds = plan.seeds_of(task2.Stage.SHORT_SEARCH, 5)

    def train(job):
        rate = job.recipe.training.lr
        is_lost = rate == 1.0 or (rate == 0.316 and job.seed == seeds[3])
        return make_result([math.nan if is_lost else 0.5], peak_at(0.316, 0.012)(rate))

    table = task2.search_short(make_run(tmp_path, fashion, Pretended(train)), plan, SWEEP)
    assert task2.choose_rate(task2.mean_accuracies(table, "plain", "SGD")).lr == 0.1
    tried = table[table.optimizer == "SGD"].groupby("lr").seed.count()
    assert (tried[0.316], tried[0.1]) == (5, 5)  # the new best one lies next to one that diverged, too


@pytest.mark.parametrize(("best", "seeds", "is_doubtful"), [(0.01, 2, False), (0.1, 2, True), (0.1, 5, False)])
def test_a_best_rate_is_doubtful_if_a_run_diverged_next_to_it_and_it_has_few_seeds(best, seeds, is_doubtful):
    rates = (0.001, 0.01, 0.1, 1.0)
    rows = [(rate, seed) for rate in rates for seed in range(seeds if rate == best else 2)]
    table = pd.DataFrame(rows, columns=["lr", "seed"]).assign(network="plain", optimizer="SGD")
    table["val_accuracy"] = 0.5 + 0.4 * (table.lr == best)
    table["diverged"] = (table.lr == 1.0) & (table.seed == 1)
    assert task2.is_doubtful(table, PAIR) == is_doubtful


def test_a_search_looks_midway_to_a_neighbour_that_diverges(pretend):
    run = pretend(peak_at(0.1, 0.012), lambda rate: rate > 0.5)
    assert tried_by_a_search(run, 0.1)[1] == pytest.approx([0.01, 0.1, 0.316, 1])


@pytest.mark.parametrize("extensions", [0, 1, 3])
def test_a_search_ends_after_so_many_extensions_and_its_choice_is_then_the_outermost(pretend, extensions):
    table, rates = tried_by_a_search(pretend(lambda rate: math.atan(rate) / 2), 0.001, extensions=extensions)
    on_the_grid = [rate for rate in rates if math.log10(rate).is_integer()]  # not midway
    assert on_the_grid == pytest.approx([0.0001, 0.001, 0.01, 0.1, 1, 10][: 3 + extensions])
    choice = task2.choose_rate(task2.mean_accuracies(table, "plain", "SGD"))
    assert choice.lr == max(rates)
    assert not choice.is_inside


@pytest.mark.parametrize("margin", [0, 0.02])
@pytest.mark.parametrize("lost_per_decade", [0.005, 0.1])
@pytest.mark.parametrize("best", [0.0001, 0.0004, 0.02, 0.1, 0.7, 30])
def test_where_accuracy_has_one_peak_no_rate_of_the_grid_is_better_than_the_chosen_one(
    pretend, best, lost_per_decade, margin
):
    accuracy = peak_at(best, lost_per_decade)
    table, _ = tried_by_a_search(pretend(accuracy), 0.01, margin)
    choice = task2.choose_rate(task2.mean_accuracies(table, "plain", "SGD"))
    assert choice.is_inside
    assert accuracy(choice.lr) >= max(accuracy(10.0**power) for power in range(-6, 4)) - 1e-12


def test_rates_of_the_grid_are_tried_as_they_are_however_many_digits_they_have(pretend):
    plan = make_plan(grid=[0.01, 0.123456, 1.0])
    search = replace(task2.Search.short(plan), pairs=[PAIR])
    trained = task2.search_rates(pretend(lambda rate: math.atan(rate) / 2), plan, search, {PAIR: 0.01})
    assert set(plan.grid) <= set(task2.table_of(trained).lr)


def test_a_rate_midway_that_rounds_to_one_that_was_tried_is_not_trained_again(pretend):
    plan = make_plan(grid=[0.1, 0.1001])
    search = replace(task2.Search.short(plan), pairs=[PAIR])
    run = pretend(lambda rate: 0.9 if rate == 0.1 else 0.5)
    table = task2.table_of(task2.search_rates(run, plan, search, {PAIR: 0.1}))
    assert not table.duplicated(["lr", "seed"]).any()


@pytest.mark.parametrize("best", [100.0, 0.0001])
def test_neighbours_of_a_rate_that_the_sweep_has_found_beyond_the_grid_are_as_near_as_on_it(pretend, best):
    plan = make_plan(extensions=2)
    run = pretend(peak_at(best, 0.005))
    table = task2.search_short(run, replace(plan, extensions=0), task2.sweep_learning_rates(run, plan))
    assert sorted(table.lr.unique()) == pytest.approx([best / 10, best, best * 10])


@pytest.mark.parametrize(("lost_per_decade", "extensions"), [(0.012, 4), (0.1, 0), (0.0, 9)])
def test_the_progress_bar_ends_at_its_end_whether_a_search_is_short_or_long(pretend, lost_per_decade, extensions):
    plan = make_plan(extensions=extensions)
    run = pretend(peak_at(0.1, lost_per_decade))
    search = task2.Search.fitted(plan)
    run.progress.expect(search.expected_work(plan))
    table = task2.table_of(task2.search_rates(run, plan, search, dict.fromkeys(search.pairs, 0.1)))
    assert (len(table) < 2 * 7 * 2) == (extensions < 9)
    assert not table.duplicated(["network", "optimizer", "lr", "seed"]).any()
    assert run.progress.done == run.progress.total


@pytest.mark.parametrize(
    ("grid", "rates_of_other"),
    [([0.01, 0.0316, 0.1, 0.316, 1.0], [0.01, 0.1, 1.0]), ([0.01, 0.1, 1.0], [0.01, 0.1, 1.0])],
)
def test_on_the_network_that_is_not_tested_the_fitted_search_tries_every_other_rate(pretend, grid, rates_of_other):
    plan = make_plan(grid=grid, extensions=0)
    plan = replace(plan, networks={**plan.networks, "other": plan.networks["plain"].replace(batch_norm=True)})
    search = task2.Search.fitted(plan)
    run = pretend(peak_at(0.1, 0.01))
    table = task2.table_of(task2.search_rates(run, plan, search, dict.fromkeys(search.pairs, 0.1)))
    rates = table.groupby("network").lr.apply(lambda tried: sorted(set(tried)))
    at = grid.index(0.1)
    assert rates["plain"] == grid[at - 1 : at + 2]
    assert rates["other"] == rates_of_other


def test_searches_start_with_the_best_rate_of_the_sweep_and_with_wrong_labels_with_the_lowest_good_one(pretend):
    plan = make_plan(extensions=0)
    run = pretend(peak_at(0.1, 0.012))
    sweep = task2.sweep_learning_rates(run, plan)
    fitted = task2.search_fitted(run, plan, sweep)
    for table in (task2.search_short(run, plan, sweep), fitted):
        assert table.groupby("optimizer").lr.apply(set).to_dict() == {
            "SGD": {0.01, 0.1, 1.0},
            "RMSprop": {0.01, 0.1, 1.0},
        }
    noisy = task2.search_noisy(run, plan, fitted)
    assert noisy.groupby("optimizer").lr.apply(set).to_dict() == {
        "SGD": {0.001, 0.01, 0.1},
        "RMSprop": {0.001, 0.01, 0.1},
    }
    assert set(noisy.label_noise) == {0.4}


def test_a_seed_that_diverged_counts_as_an_accuracy_of_zero():
    rows = [(0.01, 0, 0.6, False), (0.01, 1, 0.5, False), (0.1, 0, 0.9, False), (0.1, 1, 0.9, True)]
    table = pd.DataFrame(rows, columns=["lr", "seed", "val_accuracy", "diverged"])
    means = task2.mean_accuracies(table.assign(network="plain", optimizer="SGD"), "plain", "SGD")
    assert means.to_dict() == pytest.approx({0.01: 0.55, 0.1: 0.45})
    assert task2.choose_rate(means).lr == 0.01


def test_only_rates_that_fit_can_win_at_the_fitted_horizon():
    means = pd.Series({0.001: 0.7, 0.01: 0.8, 0.1: 0.9})
    none = task2.choose_fitted_rate(means, pd.Series(False, means.index))
    assert (none.lr, none.fits) == (0.1, False)
    lower = task2.choose_fitted_rate(means, pd.Series([True, True, False], means.index))
    assert (lower.lr, lower.fits, lower.is_inside) == (0.01, True, True)
    assert lower.accuracies == means.to_dict()


@pytest.mark.parametrize(
    ("accuracies", "fits", "lr"),
    [
        ([0.88, 0.895, 0.9, 0.7], "1111", 0.01),  # level with the best
        ([0.895, 0.88, 0.9, 0.7], "1111", 0.001),  # the lowest, whatever lies between
        ([0.7, 0.88, 0.9, 0.895], "1111", 0.1),  # a higher rate is no better than the best
        ([0.895, 0.8, 0.9, 0.7], "0111", 0.1),  # a lower one that does not fit is out
        ([0.7, 0.85, 0.855, 0.9], "1110", 0.01),  # as is one that is better
    ],
)
def test_of_the_rates_that_fit_the_lowest_within_a_point_of_the_best_of_them_is_chosen(accuracies, fits, lr):
    means = pd.Series(accuracies, [0.001, 0.01, 0.1, 1.0])
    choice = task2.choose_fitted_rate(means, pd.Series([each == "1" for each in fits], means.index))
    assert (choice.lr, choice.fits) == (lr, True)


def test_every_setting_has_the_rate_of_its_own_search_and_a_rate_fits_if_it_does_for_every_seed(pretend):
    plan = make_plan()
    pairs = dict.fromkeys(task2.Search.short(plan).pairs, 0.1)
    short, fitted, noisy = (
        task2.table_of(task2.search_rates(pretend(peak_at(best, 0.012)), plan, search(plan), pairs))
        for best, search in ((1.0, task2.Search.short), (0.1, task2.Search.fitted), (0.01, task2.Search.noisy))
    )
    choices = task2.choose_rates(plan, short, fitted, noisy)
    rates = {setting: choices[setting]["SGD"].lr for setting in task2.SETTINGS}
    assert rates == {"tuned": 1.0, "default": 0.001, "fitted": 0.1, "noise": 0.01, "noise_fitted": 0.1}
    fitted.loc[(fitted.optimizer == "SGD") & (fitted.lr == 0.1) & (fitted.seed == 1), "final_accuracy"] = 0.99
    choices = task2.choose_rates(plan, short, fitted, noisy)
    for setting in ("fitted", "noise_fitted"):
        assert choices[setting]["SGD"].lr in (0.01, 1.0)
        assert choices[setting]["SGD"].fits
        assert choices[setting]["RMSprop"].lr == 0.1
    choices = task2.choose_rates(plan, short, fitted.assign(final_accuracy=0.99), noisy)
    assert (choices["fitted"]["SGD"].lr, choices["fitted"]["SGD"].fits) == (0.1, False)


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


def test_difference_of_ranges_is_that_of_the_mean_curves_with_an_interval_by_jackknife():
    generator = np.random.default_rng(0)
    rates = [0.001, 0.01, 0.1, 1.0]
    first, last = (
        table_of(rates, np.array(means)[:, None] + generator.normal(0, 0.003, (4, 5)))
        for means in ([0.5, 0.8, 0.9, 0.5], [0.6, 0.89, 0.9, 0.7])
    )

    def difference(seeds):
        widths = []
        for table in (first, last):
            mean = sum(table[seed] for seed in seeds) / len(seeds)
            widths.append(task2.good_range(mean.to_frame(), 2).decades)
        return widths[1] - widths[0]

    whole = difference(range(5))
    pseudo_values = [5 * whole - 4 * difference([seed for seed in range(5) if seed != out]) for out in range(5)]
    error = stats.sem(pseudo_values)
    found = task2.range_difference(first, last[[3, 1, 4, 0, 2]], 2)  # paired by seed, not by place
    assert (found.mean, found.n) == (pytest.approx(whole), 5)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(whole) / error, 4))
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 4, whole, error))


def test_a_difference_of_ranges_of_one_seed_has_no_interval():
    first, last = (table_of([0.01, 0.1, 1.0], [[0.9 - lost], [0.9], [0.9 - lost]]) for lost in (0.08, 0.04))
    found = task2.range_difference(first, last, 2)
    assert (found.mean, found.n, found.is_bounded) == (pytest.approx(2 * (1 / 2 - 1 / 4)), 1, False)


def test_the_expected_best_of_k_rates_is_the_mean_over_all_choices_of_k():
    accuracies = table_of([0.001, 0.01, 0.1, 1.0, 10.0], np.random.default_rng(0).random((5, 3)))
    best = task2.expected_best(accuracies)
    assert list(best.index) == [1, 2, 3, 4, 5]
    for k in best.index:
        highest = [accuracies.loc[list(rates)].max() for rates in itertools.combinations(accuracies.index, k)]
        assert best.loc[k].to_numpy() == pytest.approx(np.mean(highest, axis=0))
    assert best.loc[1].to_numpy() == pytest.approx(accuracies.mean().to_numpy())
    assert best.loc[5].to_numpy() == pytest.approx(accuracies.max().to_numpy())


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
    recipe = make_plan().recipe(optimizer, lr, make_plan().short).replace(schedule="constant")
    job = Job(recipe, 7, common.split_dataset(fashion, 900))
    (trained,) = task2.train_all(make_run(tmp_path, fashion), "runs.csv", [task2.Planned({}, job)])
    assert trained.diverged == diverged


def choose(**rates):
    """Choices with the same rate for every optimizer in a setting, with one tried to each side."""
    return {
        setting: {name: task2.Choice(rate, {rate / 10: 0.4, rate: 0.5, rate * 10: 0.4}) for name in ("SGD", "RMSprop")}
        for setting, rate in rates.items()
    }


def test_final_runs_share_seeds_images_and_wrong_labels_and_differ_in_what_their_setting_says(fashion):
    plan = make_plan(seeds=2)
    splits = {horizon: common.split_dataset(fashion, images) for horizon, images in (("short", 600), ("fitted", 200))}
    rates = {"tuned": 0.1, "default": 0.2, "fitted": 0.3, "noise": 0.4, "noise_fitted": 0.5}
    planned = task2.plan_finals(fashion, plan, choose(**rates))
    runs = {(each.facts["optimizer"], each.facts["setting"], each.facts["seed"]): each for each in planned}
    assert len(runs) == len(planned) == 2 * 5 * 2
    assert [each.facts["seed"] for each in planned] == [0] * 10 + [1] * 10  # whole seeds first
    for (name, setting, number), (facts, job) in runs.items():
        training = job.recipe.training
        horizon = "short" if setting in ("tuned", "default") else "fitted"
        split = splits[horizon]
        assert (training.optimizer, training.lr, facts["lr"]) == (name, rates[setting], rates[setting])
        assert (facts["horizon"], training.epochs) == (horizon, {"short": 2, "fitted": 3}[horizon])
        assert job.seed == runs["SGD", "tuned", number].job.seed
        assert torch.equal(job.split.train, split.train)
        assert torch.equal(job.judged, split.train)  # there are fewer than are judged
        assert (job.keeps_network, job.keeps_best, job.scores_every_epoch) == (True, horizon == "fitted", True)
        if setting in ("noise", "noise_fitted"):
            wrong = job.labels != fashion.train_labels
            assert int(wrong.sum()) == int(wrong[split.train].sum()) == 80
            assert torch.equal(job.labels, runs["SGD", "noise", number].job.labels)
            assert facts["label_noise"] == 0.4
        else:
            assert job.labels is None
            assert facts["label_noise"] == 0
    assert runs["SGD", "tuned", 0].job.seed != runs["SGD", "tuned", 1].job.seed
    assert not torch.equal(runs["SGD", "noise", 0].job.labels, runs["SGD", "noise", 1].job.labels)


@pytest.mark.parametrize("is_noisy", [False, True])
def test_a_search_trains_all_optimizers_and_rates_on_the_same_seeds_and_labels(fashion, is_noisy):
    plan = make_plan()
    search = task2.Search.noisy(plan) if is_noisy else task2.Search.fitted(plan)
    rates = {pair: [0.01, 0.1] for pair in search.pairs}
    planned = task2.plan_search(fashion, plan, search, rates, range(2))
    split = common.split_dataset(fashion, plan.fitted.images)
    validation = common.split_dataset(fashion, plan.short.images).validation  # of which there are more
    first, second = ([each.job for each in planned if each.facts["seed"] == number] for number in range(2))
    assert len(planned) == 2 * 2 * 2
    for jobs in (first, second):
        assert len({job.seed for job in jobs}) == 1
        for job in jobs:
            assert job.recipe.training.epochs == plan.fitted.epochs
            assert torch.equal(job.judged, split.train)
            assert torch.equal(job.split.validation, validation)
            if is_noisy:
                wrong = job.labels != fashion.train_labels
                assert int(wrong.sum()) == int(wrong[split.train].sum()) == 80
                assert torch.equal(job.labels, jobs[0].labels)
            else:
                assert job.labels is None
    assert first[0].seed != second[0].seed
    assert not is_noisy or not torch.equal(first[0].labels, second[0].labels)
    later = [each for each in task2.plan_search(fashion, plan, search, rates, [1, 3]) if each.facts["seed"] == 1]
    for (_, job), same in zip(later, second, strict=True):  # a number has the same seed in every round
        assert job.seed == same.seed
        assert not is_noisy or torch.equal(job.labels, same.labels)


def test_agreement_is_the_share_of_the_wrong_labels_that_are_predicted_by_epoch(fashion):
    data = replace(fashion, train_labels=torch.tensor([0, 0, 1, 1, 2, 2]))
    labels = torch.tensor([0, 1, 1, 2, 2, 0])  # wrong: images 1, 3 and 5
    split = common.Split(torch.arange(6), torch.arange(0), (0.0,), (1.0,))
    recipe = make_plan().recipe("SGD", 0.1, make_plan().fitted)
    rights = ([1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1])  # on images 1, 4, 3 and 0
    epochs = tuple(
        Epoch(number, 0.5, 1.0, (0.5,), judged=Score(0.5, np.array(right, dtype=bool)))
        for number, right in enumerate(rights, 1)
    )
    job = Job(recipe, 0, split, labels, judged=torch.tensor([1, 4, 3, 0]))
    final = make_final("SGD", "noise", 0, TrainingResult(epochs), job)
    assert task2.agreement_with_wrong_labels(final, data) == [0.5, 1.0, 0.5]
    final = make_final("SGD", "fitted", 0, TrainingResult(epochs), replace(job, labels=None))
    assert str(task2.agreement_with_wrong_labels(final, data)) == "[nan, nan, nan]"


def test_time_to_the_target_against_a_slow_loop():
    losses = 2 * np.exp(-np.arange(400) / 80) + np.random.default_rng(0).normal(0, 0.3, 400)
    window = 400 // 50
    for step in range(1, 401):
        if losses[max(0, step - window) : step].mean() <= math.log(10) / 6:
            break
    assert 1 < step < 400
    assert losses[: step - 1].min() < math.log(10) / 6  # a single loss below it is not enough
    finals = [
        make_final("SGD", "tuned", 0, make_result(losses)),
        make_final("SGD", "tuned", 1, make_result(losses + 2)),
        make_final("SGD", "default", 0, make_result(losses + 2)),
        make_final("SGD", "fitted", 0, make_result(losses)),
    ]
    step_ms = {"SGD": [10.0, 12.0, 50.0], "RMSprop": [20.0, 20.0, 20.0]}
    times = pd.DataFrame(step_ms).melt(var_name="optimizer", value_name="step_ms")
    found = task2.time_to_target(make_plan(), finals, times)
    assert found.setting.to_list() == ["tuned", "tuned", "default"]  # of the short horizon
    assert str(found.steps.to_list()) == f"[{step}.0, nan, nan]"
    assert found.seconds[0] == pytest.approx(step * 0.012)  # the median of SGD
    measured = replace(make_measurements(), finals=finals, times=times)
    table = task2.target_table(make_plan(), measured)
    assert table["reached by"].to_list() == ["1 of 2", "0 of 1"]
    assert table.steps.to_list() == [str(step), "–"]
    assert table.seconds.to_list() == [f"{step * 0.012:.1f}", "–"]


class Slow(torch.optim.SGD):
    """An optimizer whose steps take 5 ms, and do nothing."""

    def step(self, closure=None):
        time.sleep(0.005)


def test_the_time_of_the_optimizers_own_step_is_told_from_that_of_all_else(monkeypatch, fashion, runtime):
    monkeypatch.setattr(torch.optim, "Slow", Slow, raising=False)
    plan = make_plan()
    recipes = [plan.recipe(name, 0.01, plan.sweep) for name in ("SGD", "Slow")]
    (times,) = task2.take_turns(fashion, runtime, recipes, turns=2, steps=3)
    assert times["SGD"].update_us < 5000 < times["Slow"].update_us
    for each in times.values():
        assert 0 < each.update_us / 1000 < each.step_ms
    assert not _global_optimizer_pre_hooks
    assert not _global_optimizer_post_hooks


def test_a_clock_of_steps_stops_where_it_is_left_even_by_an_error(runtime):
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters())
    with contextlib.suppress(RuntimeError), task2.StepClock(runtime) as clock:
        optimizer.step()
        optimizer.step()
        raise RuntimeError
    optimizer.step()
    assert len(clock.seconds) == 2


# ---------------------------------------------------------------- verdicts


HORIZONS = {
    "lower_loss": "short",
    "lr_robustness": "short",
    "cheaper_step": "short",
    "better_generalisation": "fitted",
    "noise_robustness": "fitted",
}
SHARES = {  # of test images that SGD and RMSprop classify correctly; last, with early stopping
    "tuned": (0.9, 0.7, None),
    "default": (0.9, 0.7, None),
    "fitted": (0.9, 0.7, 0.9),
    "noise": (0.6, 0.8, 0.8),
    "noise_fitted": (0.5, 0.55, 0.8),
}
LOSSES = {"tuned": 0.3, "default": 0.4, "fitted": 0.3, "noise": 0.6, "noise_fitted": 0.6}


def make_measurements(seeds=5, images=400):
    """Measurements in which all that is claimed of SGD, A, and of RMSprop, B, is true."""
    generator = np.random.default_rng(0)
    sweep, search, times = [], [], []
    finals, tests = [], {}
    for name, plus in (("RMSprop", 1.0), ("SGD", 0.0)):
        for seed in range(seeds):
            jitter = generator.normal(0, 0.002)
            for rate in (0.001, 0.01, 0.1, 1.0, 10.0):
                slope = 0.02 if plus else 0.3 + 10 * jitter
                accuracy = 0.9 - slope * abs(math.log10(rate / 0.1)) + jitter
                row = {"network": "plain", "optimizer": name, "lr": rate, "seed": seed, "val_accuracy": accuracy}
                sweep.append({**row, "diverged": False})
                search.append({**row, "diverged": False, "val_loss": 0.5, "final_loss": 0.3, "final_accuracy": 1.0})
            for setting, loss in LOSSES.items():
                judged = Score(loss - 0.1 * plus + jitter, np.ones(20, dtype=bool))
                final = make_final(name, setting, seed, make_result(val_loss=loss + jitter, judged=judged))
                finals.append(final)
                of_sgd, of_rmsprop, stopped = SHARES[setting]
                shares = [of_rmsprop if plus else of_sgd, *([stopped] if stopped else [])]
                tests[final] = task2.Tested(*[Score(0.5, generator.random(images) < share) for share in shares])
            step = {"step_ms": 10 + 2 * plus + jitter, "update_us": 100 + 500 * plus + 1000 * jitter}
            times.append({"optimizer": name, "start": seed, **step})
    choices = choose(**dict.fromkeys(LOSSES, 0.1))
    return task2.Measurements(pd.DataFrame(sweep), pd.DataFrame(search), choices, finals, pd.DataFrame(times), tests)


def with_results(measured, change):
    """The measurements with the results of the final runs for which ``change(run)`` gives one."""
    finals, tests = [], {}
    for run in measured.finals:
        changed = replace(run, result=change(run) or run.result)
        finals.append(changed)
        tests[changed] = measured.tests[run]
    return replace(measured, finals=finals, tests=tests)


def judge(measured, **changes):
    """The claims by their names."""
    return {claim.id: claim for claim in task2.judge_claims(make_plan(**changes), measured)}


def assert_holm(claims):
    """That the claims that are judged are corrected for all five, and the others have no verdict."""
    judged = sorted((claim.estimate.p, claim.p_holm) for claim in claims if claim.is_primary and not claim.not_judged)
    worst = 0.0
    for rank, (raw, corrected) in enumerate(judged):
        worst = max(worst, min(1.0, (5 - rank) * raw))
        assert corrected == pytest.approx(worst)
    assert {(claim.p_holm, claim.verdict) for claim in claims if not claim.is_primary} == {(None, None)}
    return len(judged)


def test_swapping_the_names_swaps_the_verdicts():
    measured = make_measurements()
    straight = judge(measured)
    swapped = judge(measured, optimizers=["RMSprop", "SGD"])
    for name, horizon in HORIZONS.items():
        assert straight[name].verdict == "supported", name
        assert swapped[name].verdict == "contradicted", name
        assert straight[name].estimate.n == 5
        assert straight[name].horizon == horizon
    assert straight["lower_loss"].estimate.mean == pytest.approx(-swapped["lower_loss"].estimate.mean)
    assert straight["lower_loss"].estimate.mean == pytest.approx(0.1, abs=0.01)
    assert straight["cheaper_step"].estimate.mean == pytest.approx(5, abs=0.5)  # 500 us of 10 ms
    assert straight["cheaper_step"].unit == "% of a training step"
    assert "SGD has the cheaper optimizer.step(), by " in straight["cheaper_step"].sentence
    assert straight["lr_robustness"].estimate.mean == pytest.approx(2 - 2 * 0.02 / 0.3, abs=0.1)
    assert straight["cheaper_step_whole"].estimate.mean == pytest.approx(20, abs=0.5)
    assert straight["better_generalisation"].estimate.mean == pytest.approx(20, abs=5)
    assert straight["noise_robustness"].estimate.mean == pytest.approx(20, abs=5)
    assert straight["noise_robustness_lost"].estimate.mean == pytest.approx(40, abs=5)  # SGD from 90 to 60 %
    assert straight["noise_robustness_memorised"].estimate.mean == pytest.approx(5, abs=4)
    for name in ("better_generalisation_stopped", "noise_robustness_stopped"):
        assert straight[name].estimate.mean == pytest.approx(0, abs=4)


def test_holms_correction_is_over_the_five_and_nothing_else():
    assert assert_holm(judge(make_measurements()).values()) == 5


def assert_only_not_judged(claims, name, reason):
    """That all but one of the claims are judged, and why that one is not; the correction is still for all five."""
    for claim in HORIZONS:
        assert claims[claim].not_judged == (reason if claim == name else "")
        assert (claims[claim].verdict == "not judged") == (claim == name)
    assert f"is not judged: {reason}." in claims[name].sentence
    assert assert_holm(claims.values()) == 4


@pytest.mark.parametrize("name", ["SGD", "RMSprop"])
def test_generalisation_is_not_judged_where_a_network_has_not_fitted(name):
    def unfit(run):
        if (run.facts["optimizer"], run.facts["setting"], run.facts["seed"]) == (name, "fitted", 3):
            return make_result(judged=make_score(0.98))
        return None

    measured = with_results(make_measurements(), unfit)
    assert task2.fit_of(measured, name) == task2.Fit(mean=pytest.approx(0.996), min=0.98, n=5, fitted=4)
    reason = (
        f"4 of 5 networks trained by {name} have fitted their images (lowest training accuracy 98.0 %); "
        "try more --fit-epochs"
    )
    assert_only_not_judged(judge(measured), "better_generalisation", reason)


@pytest.mark.parametrize("name", ["SGD", "RMSprop"])
@pytest.mark.parametrize("outside", [(0.01, 0.1), (0.1, 1.0)])
def test_noise_is_not_judged_where_the_best_rate_is_the_outermost(name, outside):
    measured = make_measurements()
    measured.choices["noise"][name] = task2.Choice(0.1, dict.fromkeys(outside, 0.5))
    reason = f"the best learning rate of {name} is the outermost of those tried; give another --lr-grid"
    assert_only_not_judged(judge(measured), "noise_robustness", reason)


@pytest.mark.parametrize("name", ["SGD", "RMSprop"])
def test_noise_is_not_judged_where_no_rate_fits_correct_labels(name):
    measured = make_measurements()
    measured.choices["fitted"][name] = replace(measured.choices["fitted"][name], fits=False)
    reason = f"{name} does not even fit correct labels; try more --fit-epochs"
    assert_only_not_judged(judge(measured), "noise_robustness", reason)


@pytest.mark.parametrize("name", ["SGD", "RMSprop"])
@pytest.mark.parametrize("end", [0.001, 10.0])
def test_ranges_are_not_judged_where_one_is_cut_off_by_the_grid(name, end):
    measured = make_measurements()
    sweep = measured.sweep
    is_cut = (sweep.optimizer == name) & ((sweep.lr - 0.1) * (end - 0.1) > 0)  # from the best up to this end
    sweep.loc[is_cut, "val_accuracy"] = 0.895
    reason = f"the range of {name} goes on beyond the grid; give another --lr-grid"
    assert_only_not_judged(judge(measured), "lr_robustness", reason)


def test_fewer_than_three_repetitions_are_not_judged():
    measured = make_measurements(seeds=2)
    claims = judge(replace(measured, times=make_measurements(seeds=3).times))
    assert {name: claims[name].verdict for name in HORIZONS} == {
        **dict.fromkeys(HORIZONS, "not judged"),
        "cheaper_step": "supported",
    }
    assert claims["lower_loss"].not_judged == "2 seeds are too few"
    assert assert_holm(claims.values()) == 1


def test_equal_optimizers_cannot_be_told_apart():
    measured = make_measurements()
    generator = np.random.default_rng(1)
    tests = {run: task2.Tested(*[Score(0.5, generator.random(400) < 0.9)] * 2) for run in measured.tests}
    claims = judge(replace(measured, tests=tests))
    for name in ("better_generalisation", "noise_robustness"):
        assert claims[name].verdict == "cannot be told apart"
        assert "leaves open" not in claims[name].sentence


@pytest.mark.parametrize(
    ("lead", "verdict"),
    [
        (0.6, "cannot be told apart"),
        (-0.6, "cannot be told apart"),
        (1.1, "cannot be told apart"),  # above the margin, but not significantly
        (2, "supported"),
        (-2, "contradicted"),
    ],
)
def test_claims_about_the_fitted_horizon_need_an_effect_significantly_above_a_point(lead, verdict):
    images = 5000
    measured = make_measurements()
    generator = np.random.default_rng(1)
    tests = {}
    for run in measured.finals:
        favourite = "RMSprop" if run.facts["setting"] == "noise" else "SGD"
        wrong = 500 - (round(lead / 100 * images) if run.facts["optimizer"] == favourite else 0)
        right = np.arange(images) >= wrong
        right[generator.integers(images, size=5)] = False
        tests[run] = task2.Tested(Score(0.5, right), Score(0.5, right))
    measured = replace(measured, tests=tests)
    comparison = task2.Comparison(make_plan(), measured)
    claims = judge(measured)
    for name, setting in (("better_generalisation", "fitted"), ("noise_robustness", "noise")):
        without_margin = comparison.test_accuracies(setting)
        with_margin = comparison.test_accuracies(setting, margin=1)
        assert with_margin[:3] == without_margin[:3]
        assert without_margin.p < 1e-4  # each is significantly above 0
        claim = claims[name]
        assert (claim.margin, claim.verdict) == (1, verdict)
        assert claim.estimate.p == with_margin.p > without_margin.p
        assert claim.estimate.mean == pytest.approx(lead, abs=0.1)
        is_explained = "no difference in test accuracy beyond 1 point is shown" in claim.sentence
        assert is_explained == (verdict == "cannot be told apart")
    for name in ("lower_loss", "lr_robustness", "cheaper_step"):
        assert claims[name].margin == 0


def test_the_p_value_against_a_margin_is_that_of_the_part_of_the_effect_beyond_it():
    comparison = task2.Comparison(make_plan(), make_measurements())
    for plan, sign in ((comparison.plan, 1), (make_plan(optimizers=["RMSprop", "SGD"]), -1)):
        found = replace(comparison, plan=plan).test_accuracies("fitted", margin=15)
        assert sign * found.mean == pytest.approx(20, abs=5)
        scores = [comparison.tested(name, "fitted") for name in plan.optimizers]
        assert found.p == pytest.approx(common.crossed_interval(scores[0] - scores[1] - 15 * sign).p)
        assert found.p > common.crossed_interval(scores[0] - scores[1]).p
        assert replace(comparison, plan=plan).test_accuracies("fitted", margin=25).p == 1


def make_claim(effect, p_holm=1.0, not_judged="", estimate=None, margin=0.0):
    """A primary claim about SGD with an interval of one point to each side."""
    return task2.Claim(
        id="x",
        horizon="fitted",
        favourite="SGD",
        rival="RMSprop",
        advantage="higher test accuracy",
        when="after 3 epochs",
        unit="points",
        estimate=estimate or common.Estimate(effect, effect - 1, effect + 1, 0.01, 5),
        margin=margin,
        is_primary=True,
        not_judged=not_judged,
        p_holm=p_holm,
    )


@pytest.mark.parametrize(("n", "text"), [(2, "+2 points (no interval)"), (3, "+2 points [+1, +3]")])
def test_an_effect_has_an_interval_from_three_repetitions_on(n, text):
    assert make_claim(2, estimate=common.Estimate(2, 1, 3, 0.01, n)).effect == text


@pytest.mark.parametrize(("effect", "verdict", "winner"), [(2, "supported", "SGD"), (-2, "contradicted", "RMSprop")])
def test_conclusions_name_the_winner_and_by_how_much_it_wins(effect, verdict, winner):
    claim = make_claim(effect, p_holm=0.01)
    assert claim.verdict == verdict
    for text in (claim.sentence, task2.headline(claim)):
        assert text.startswith(f"After 3 epochs, {winner} ")
        assert "2 points [1, 3]" in text
        assert "-" not in text
    assert verdict in claim.sentence


def test_conclusions_without_a_winner_name_both_or_say_why_there_is_none():
    claim = make_claim(-0.5)
    for text in (claim.sentence, task2.headline(claim)):
        assert "SGD and RMSprop cannot be told apart in test accuracy" in text
    assert claim.effect in claim.sentence
    assert "when corrected" not in claim.sentence  # its interval holds 0
    at_the_edge = make_claim(2, p_holm=0.13)
    assert "(p = 0.13 when corrected for five claims)" in at_the_edge.sentence
    with_margin = make_claim(-0.5, margin=1)
    for text in (with_margin.sentence, task2.headline(with_margin)):
        assert "no difference in test accuracy beyond 1 point is shown" in text
    assert "SGD's lead over RMSprop is -0.5 points" in with_margin.sentence
    claim = make_claim(-0.5, p_holm=None, not_judged="SGD has not fitted")
    assert "SGD has not fitted" in claim.sentence
    assert "not judged" in task2.headline(claim)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_run_that_ended_without_a_loss_counts_as_knowing_nothing(loss):
    def lose(run):
        if (run.facts["optimizer"], run.facts["setting"], run.facts["seed"]) == ("SGD", "tuned", 2):
            return make_result(judged=make_score(0.1, loss), val_loss=loss)
        return None

    measured = with_results(make_measurements(), lose)
    (lost,) = (run for run in measured.finals if run.result.judged.accuracy == 0.1)
    measured.tests[lost] = task2.Tested(Score(loss, measured.tests[lost].end.right))
    comparison = task2.Comparison(make_plan(), measured)
    expected = {
        comparison.losses("tuned"): math.log(10) - 0.2 + 4 * 0.1,
        comparison.losses("tuned", "val_loss"): math.log(10) - 0.3,
        comparison.losses("tuned", "test_loss"): math.log(10) - 0.5,
    }
    for difference, total in expected.items():
        assert difference.n == 5
        assert difference.mean == pytest.approx(total / 5, abs=0.01)


def test_a_value_at_a_training_loss_is_that_of_the_line_through_the_runs_around_it():
    losses = np.array([0.8, np.nan, 0.05, 0.001, 0.05, 0.0])
    accuracies = 0.9 - 0.02 * np.log([0.8, 1, 0.05, 0.001, 1, 1])  # the last two at rates that fit less well again
    assert task2.value_at(0.2, losses, accuracies) == pytest.approx(0.9 - 0.02 * math.log(0.2))
    assert math.isnan(task2.value_at(0.9, losses, accuracies))
    assert math.isnan(task2.value_at(0.0009, losses, accuracies))
    assert task2.value_at(0.05, losses, accuracies) == pytest.approx(accuracies[2])
    for nothing in (np.array([np.nan]), np.array([0.0])):
        assert math.isnan(task2.value_at(0.05, nothing, np.array([0.9])))
    assert math.isnan(task2.value_at(math.nan, losses, accuracies))


def test_one_network_that_has_not_fitted_does_not_move_the_loss_of_the_comparison_at_equal_fit():
    def unfit(run):
        if (run.facts["optimizer"], run.facts["setting"], run.facts["seed"]) == ("RMSprop", "fitted", 3):
            return make_result(judged=make_score(0.1, 9.0))
        return None

    measured = make_measurements()
    plan = make_plan()
    losses = [run.result.judged.loss for run in task2.runs_of(measured.finals, "SGD", "fitted")]
    assert task2.equal_loss(plan, measured) == np.median(losses)  # of SGD, which fits less well
    assert task2.equal_loss(plan, with_results(measured, unfit)) == np.median(losses)


@pytest.mark.parametrize("lowest", [0.001, 0.35])
def test_optimizers_are_compared_at_the_training_loss_that_both_of_them_reach(lowest):
    generator = np.random.default_rng(0)
    rows = []
    for name, seed, loss in itertools.product(("SGD", "RMSprop"), range(2), np.geomspace(1, lowest, 4)):
        rate = {"SGD": 0.1, "RMSprop": 0.01}[name] / loss
        loss *= generator.uniform(1, 1.05)
        accuracy = (0.93 if name == "SGD" else 0.9) - 0.01 * math.log(loss) + 0.001 * seed * (name == "SGD")
        row = {"network": "plain", "optimizer": name, "lr": rate, "seed": seed, "final_loss": loss}
        rows.append({**row, "val_accuracy": accuracy, "val_loss": 1 - accuracy})
    measured = replace(make_measurements(), fitted_search=pd.DataFrame(rows))
    assert task2.equal_loss(make_plan(), measured) == pytest.approx(0.3, abs=0.01)  # SGD's; that of RMSprop is 0.2
    found = task2.Comparison(make_plan(), measured).at_equal_fit("val_accuracy", 100)
    assert found.n == 2
    equal_fit = {claim.id: claim for claim in judge(measured).values() if "_equal_fit" in claim.id}
    if lowest > 0.3:
        assert not equal_fit
        assert (math.isnan(found.mean), found.is_bounded) == (True, False)
    else:
        assert found.mean == pytest.approx(3 + 0.1 / 2)
        assert list(equal_fit) == ["better_generalisation_equal_fit", "better_generalisation_equal_fit_loss"]
        assert equal_fit["better_generalisation_equal_fit"].estimate == found


def test_losses_that_no_seed_has_are_shown_but_not_summarised():
    def lose(run):
        if (run.facts["optimizer"], run.facts["setting"]) == ("SGD", "default"):
            return make_result([math.nan], val_loss=math.nan, judged=make_score(0.1, math.nan))
        return None

    measured = with_results(make_measurements(), lose)
    table = task2.outcome_table(measured, "short").set_index(["optimizer", "learning rate"])
    assert table["training loss"]["SGD", "0.1, default"] == "nan ± nan"
    assert table.diverged.to_dict() == {
        ("RMSprop", "0.1, tuned"): "0 of 5",
        ("RMSprop", "0.1, default"): "0 of 5",
        ("SGD", "0.1, tuned"): "0 of 5",
        ("SGD", "0.1, default"): "5 of 5",
    }
    of_sgd = task2.summarise(make_plan(), measured, [])["optimizers"]["SGD"]
    assert of_sgd["tuned"]["final_loss"] == {
        "mean": pytest.approx(0.3, abs=0.01),
        "sd": pytest.approx(0, abs=0.01),
        "n": 5,
    }
    assert not {"final_loss", "val_loss"} & set(of_sgd["default"])
    assert of_sgd["default"]["diverged"] == 5


def test_horizons_of_the_same_size_have_rows_of_their_own_in_the_table_of_ranges():
    plan = make_plan(sweep=Horizon("sweep", 100, 1), fitted=Horizon(task2.FIT, 100, 1))
    assert len(task2.range_table(plan, make_measurements())) == 2


@pytest.mark.parametrize("loss", [math.nan, 0.0])
def test_losses_that_have_no_place_on_a_log_scale_are_drawn(tmp_path, fashion, capsys, loss):
    measured = with_results(
        make_measurements(seeds=2), lambda run: make_result([loss], val_loss=loss, judged=make_score(0.1, loss))
    )
    run = make_run(tmp_path, fashion)
    plan = make_plan()
    task2.draw_optimizer(run, plan, measured.finals, "SGD", "")
    task2.draw_generalisation(run, plan, measured, "")
    for name in ("loss_plot_SGD.png", "generalisation.png"):
        assert (run.folder / name).stat().st_size > 100
    assert capsys.readouterr().err == ""


def test_the_test_is_of_the_last_and_of_the_best_weights_on_images_of_all_classes(tmp_path, fashion, runtime):
    order = fashion.test_labels.argsort(stable=True)  # as in a folder: class after class
    data = replace(fashion, test_images=fashion.test_images[order], test_labels=fashion.test_labels[order])
    plan = make_plan(most_test_images=1000)
    job = Job(plan.recipe("SGD", 0.1, plan.fitted), 1, common.split_dataset(data, 64))
    last, best = (common.make_model(job.recipe.network, data, job.split, seed) for seed in (1, 2))
    saved = [common.SavedNetwork.of(model, job.recipe.network, data.shape, 10, 3) for model in (last, best)]
    fitted = make_final("SGD", "fitted", 0, make_result(network=saved[0], best_network=saved[1]), job)
    tuned = make_final("SGD", "tuned", 0, make_result(network=saved[0]), job)
    tests = task2.test_once(make_run(tmp_path, data), plan, data, [fitted, tuned])
    spread = torch.arange(0, 10_000, 10)
    assert torch.bincount(data.test_labels[spread]).tolist() == [100] * 10
    end, stopped = (
        common.score(common.predict(model, data.test_images, runtime, spread), data.test_labels[spread]).right
        for model in (last, best)
    )
    assert (end != stopped).any()
    assert 0 < end.sum() < 1000
    assert (tests[fitted].end.right == end).all()
    assert (tests[fitted].stopped.right == stopped).all()
    assert (tests[tuned].end.right == end).all()
    assert tests[tuned].stopped is None
