"""Task 3: the study's results, resumption, honesty about the test set, databases, bad input."""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import json
import logging
import math
import os
import re
import shlex
import shutil
import sqlite3
import sys
import threading
import time
import warnings
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import optuna
import pandas as pd
import pytest
import torch
from conftest import InProcess, make_run
from matplotlib import colors, image, pyplot
from optuna.trial import TrialState, create_trial

import common
import task3_optuna as task3
from common import UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
    pytest.mark.filterwarnings("ignore:Fixed parameter"),  # of the test that provokes a divergence
]
OPTIONS = ["--dataset", "fashion_mnist", "--quick", "--images", "320", "--workers", "2"]
FILES = "study.log trials.csv best_params.json best_model.pth summary.json retrain.csv confirmation.csv ablation.csv "
FILES += (
    "config.json environment.json report.md ablation.png optimization_history.png intermediate_values.png slice.png "
)
FILES += "coverage.png"
optuna.logging.set_verbosity(optuna.logging.CRITICAL)


# ---------------------------------------------------------------- studies on very few images, in this process


class Rehearsed(InProcess):
    """Workers that are this process and die in ``deaths`` trainings of the first recipe; they keep the jobs they got.

    ``events``: functions to call, by the number of a training and that of its epochs before.
    """

    def __init__(self, *arguments, deaths=0, **settings):
        super().__init__(*arguments, **settings)
        self.deaths = deaths
        self.jobs = []
        self.events = {}

    def run(self, function, job):
        number = len(self.jobs)
        self.jobs.append(job)
        if self.deaths and job.recipe == self.jobs[0].recipe:
            self.deaths -= 1
            raise common.WorkerDied("killed")
        self.happen(number, 0)
        epochs = super().run(function, job)
        while True:
            try:
                epoch = next(epochs)
            except StopIteration as end:
                return end.value
            yield epoch
            self.happen(number, epoch.number)

    def happen(self, *moment):
        if moment in self.events:
            self.events[moment]()


@functools.cache
def tiny_data(each=20):
    """Few real images of each class and no test set."""
    fashion = common.load_dataset("fashion_mnist")
    order = torch.cat([(fashion.train_labels == label).nonzero()[:each, 0] for label in range(10)])
    images, labels = fashion.train_images[order], fashion.train_labels[order]
    none = {"test_images": fashion.test_images[:0], "test_labels": fashion.test_labels[:0]}
    return replace(fashion, train_images=images, train_labels=labels, **none)


@pytest.fixture(scope="module")
def tiny():
    return tiny_data()


@pytest.fixture
def no_figures(monkeypatch):
    """For runs whose figures nobody looks at."""
    monkeypatch.setattr(task3, "draw_figures", lambda *_: None)


class Started(NamedTuple):
    """A small study that is about to run."""

    run: common.Run
    plan: task3.Plan
    study: optuna.Study

    def search(self):
        return task3.search(*self)

    @property
    def workers(self):
        return self.run.workers


def begin(folder, data, *options, kind=Rehearsed, count=1, **settings):
    """A small study in ``folder``, whose workers are of this kind."""
    small = ["--width", "16", "--epochs", "3", "--batch-size", "32", "--images", "64"]
    parsed = task3.parse_args([*small, *map(str, options), "--output-dir", str(folder)])
    plan = task3.make_plan(parsed, data)
    if "path" not in settings:
        settings["data"] = data
    workers = kind(count, common.Runtime("cpu", "fp32", 1), **settings)
    run = make_run(folder, data, workers)
    return Started(run, plan, task3.open_study(run, plan))


def take_part(folder, data, *options, **workers):
    return begin(folder, data, *options, **workers).search()


def load(folder):
    return optuna.load_study(study_name=task3.STUDY, storage=task3.open_journal(folder / "study.log"))


# ---------------------------------------------------------------- one whole run, asked many questions


def state_of_this_process():
    """What a run may change while it lasts."""
    levels = {name: logging.getLogger(name).level for name in ("optuna", "sqlalchemy")}
    return levels | {"PGTZ": os.environ.get("PGTZ"), "warnings": list(warnings.filters)}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "Workers", InProcess)
        patch.setenv("PGTZ", "Asia/Tokyo")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        before = state_of_this_process()
        assert task3.main([*OPTIONS, "--audit", "2", "--output-dir", str(folder)]) == 0
        assert state_of_this_process() == before
    return folder, json.loads((folder / "summary.json").read_text()), pd.read_csv(folder / "trials.csv")


def test_all_files_are_written(result):
    folder, summary, _ = result
    assert set(FILES.split()) <= {path.name for path in folder.iterdir()}
    assert (folder / ".dataset.pt").exists() is False
    assert summary["task"] == "task3"
    assert summary["dataset"] == "fashion_mnist"
    assert summary["interrupted"] is False
    report = (folder / "report.md").read_text()
    for link in re.findall(r"!\[.*\]\((.*)\)", report):
        assert (folder / link).stat().st_size > 1000
    assert task3.PROTOCOL in report
    assert (
        "Searched: optimizer Adam, Muon, RMSprop, SGD+nesterov; learning rate / usual 0.1 to 30 (logarithmic)" in report
    )
    training = task3.TRIAL.training
    assert f"for {training.epochs} epochs, in batches of {training.batch_size}," in task3.PROTOCOL
    settings = [json.loads((folder / "best_params.json").read_text()), *summary["retrain"]["settings"].values()]
    assert all(set(one) == {*task3.TEXTBOOK, "lr"} - {"lr_scale"} for one in settings)


def test_the_protocol_needs_no_docstring(capsys, monkeypatch):
    monkeypatch.setattr(task3, "__doc__", None)  # as under PYTHONOPTIMIZE=2
    with pytest.raises(SystemExit):
        task3.parse_args(["--help"])
    assert task3.PROTOCOL in capsys.readouterr().out


def test_the_statistics_have_the_original_form(result):
    folder, summary, _ = result
    form = (
        r"Study statistics:\n    Number of finished trials:  8\n    Number of pruned trials:  (\d)\n"
        r"    Number of complete trials:  (\d)\nBest trial:\n    Value:  (0\.\d+)\n    Params:\n"
        r"((?:        \w+: \S+\n)+)"
    )
    found = re.search(form, (folder / "report.md").read_text())
    assert found
    assert int(found[1]) + int(found[2]) == 8 == summary["n_trials"]["finished"]
    assert float(found[3]) == summary["best"]["value"]
    assert {"dropout", "optimizer", "lr"} <= set(re.findall(r"(\w+):", found[4]))


def test_trials_csv_holds_every_trial_and_trial_0_is_the_textbook(result):
    _, summary, trials = result
    assert list(trials["number"]) == list(range(8))
    assert trials["value"][trials["state"] == "complete"].max() == summary["highest_value"]["value"]
    assert trials["value"][summary["best"]["number"]] == summary["best"]["value"]
    assert (trials["seconds"] > 0).all()
    assert trials["worker"].notna().all()
    complete = trials["state"] == "complete"
    assert (complete == (trials["epochs_run"] == 3)).all()
    assert (complete == trials["reason"].isna()).all()
    first = trials.iloc[0]
    assert (first["param_optimizer"], first["param_lr"], first["param_schedule"]) == ("Adam", 1e-3, "constant")
    assert not first[["param_weight_decay", "param_dropout", "param_label_smoothing", "param_crop_padding"]].any()


def test_the_lab_s_recipe_is_not_given_to_the_study_but_lies_within_its_reach(result):
    _, summary, trials = result
    lab = summary["retrain"]["settings"]["lab"]
    assert lab["lr"] == common.PRESETS["small"].training.lr
    assert lab["lr"] not in trials["param_lr"].tolist()
    scale = lab["lr"] / task3.USUAL_LR[lab["optimizer"]]
    params = {name: value for name, value in lab.items() if name != "lr"} | {"lr_scale": scale}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Optuna warns of values out of range
        assert task3.suggest(optuna.trial.FixedTrial(params), task3.TRIAL) == lab


def test_the_network_is_the_same_for_every_optimizer_and_nothing_dead_is_drawn(tiny, tmp_path):
    plan = begin(tmp_path, tiny).plan
    networks = set()
    for optimizer in task3.USUAL_LR:
        params = task3.TEXTBOOK | {"optimizer": optimizer}
        trial = optuna.trial.FixedTrial(params)
        networks.add(plan.job(task3.suggest(trial, task3.TRIAL), task3.Stage.TRIAL).recipe.network)
        assert ("weight_decay" in trial.params) is (optimizer != "Muon")  # which rescales kernels in every step
    assert len(networks) == 1


def test_the_saved_model_is_the_best_configuration_and_has_the_accuracy_it_claims(result):
    folder, summary, _ = result
    checkpoint = common.load_checkpoint(folder / "best_model.pth")
    best = json.loads((folder / "best_params.json").read_text())
    used = task3.fields_of(checkpoint.recipe)
    assert {name: used[name] for name in best} == best == summary["best"]["params"]
    fashion = common.load_dataset("fashion_mnist")
    index = fashion.test_labels.argsort(stable=True)[:: 10_000 // task3.QUICK_IMAGES]
    logits = common.predict(checkpoint.model, fashion.test_images, common.Runtime("cpu", "fp32", 1), index)
    accuracy = common.score(logits, fashion.test_labels[index]).accuracy
    claimed = checkpoint.facts["test_accuracy"]
    assert accuracy == pytest.approx(claimed, abs=0.02)  # bf16 there, fp32 here
    assert claimed == summary["retrain"]["full"]["test_accuracy"]


def test_the_truth_adds_up(result):
    folder, summary, trials = result
    truth, optimism = summary["retrain"], summary["optimism"]
    rows = pd.read_csv(folder / "retrain.csv")
    study = rows[rows["schedule"] == "study"]
    names = {"textbook", "best", "lab"} | {f"best but {effect['setting']}" for effect in summary["ablation"]}
    assert set(study["configuration"]) == names
    assert (study.groupby("seed")["configuration"].nunique() == len(names)).all()  # the same seeds: paired
    means = study.groupby("configuration")["test_accuracy"].mean()
    for name in ("textbook", "best", "lab"):
        assert truth[name]["test_accuracy"]["n"] == 2
        assert truth[name]["test_accuracy"]["mean"] == pytest.approx(means[name])
    for key, other in (("difference", "textbook"), ("difference_to_lab", "lab")):
        assert truth[key]["mean"] == pytest.approx(means["best"] - means[other])
        assert truth[key]["ci_low"] < truth[key]["mean"] < truth[key]["ci_high"]
    for effect in summary["ablation"]:
        assert effect["effect"] == pytest.approx(100 * (means["best"] - means[f"best but {effect['setting']}"]))
        assert effect["n"] == 2
    validation = study[study["configuration"] == "best"]["validation_accuracy"].mean()
    value = trials["value"][summary["best"]["number"]]
    assert optimism["winners_curse"] == pytest.approx(value - validation)
    assert optimism["validation_minus_test"] == pytest.approx(validation - means["best"])
    assert optimism["optimism"] == pytest.approx(value - means["best"])
    assert (summary["audit"]["finished"] > 0) == (folder / "audit.csv").exists()


def test_the_confirmation_decides_on_seeds_of_its_own_and_the_study_s_values_do_not_count(result):
    folder, summary, trials = result
    rows = pd.read_csv(folder / "confirmation.csv")
    means = rows.groupby("trial")["validation_accuracy"].mean()
    assert summary["best"]["number"] == summary["confirmation"]["trial"] == means.idxmax()
    assert summary["confirmation"]["mean"] == pytest.approx(means.max())
    complete = trials[trials["state"] == "complete"]
    assert set(means.index) == set(complete.nlargest(2, "value")["number"])
    assert (rows.groupby("trial")["seed"].apply(tuple).nunique(), rows["seed"].nunique()) == (1, 2)  # common ones
    assert not set(rows["seed"]) & set(pd.read_csv(folder / "retrain.csv")["seed"])


def test_the_winner_of_the_confirmation_is_the_one_with_the_highest_mean():
    lucky, solid = (task3.CompleteTrial(number, value, {}) for number, value in ((3, 0.9), (8, 0.8)))
    confirmed = [task3.Confirmed(lucky, np.array([0.6, 0.7])), task3.Confirmed(solid, np.array([0.75, 0.75]))]
    confirmation = task3.Confirmation(confirmed, [1, 2])
    assert confirmation.winner.candidate is solid
    words = task3.confirmation_in_words(confirmation)
    assert "trial 8 has the highest mean of the 2 most accurate trials, 0.7500 (0.8000 in the study)" in words
    assert "Its lead over trial 3, the second, is +10.00 points [" in words
    assert "Trial 3, with the highest value in the study, changed by -25.00 points, all 2 by -15.00 on average" in words


# ---------------------------------------------------------------- what mattered


def test_an_ablation_sets_back_one_setting_at_a_time_and_leaves_out_those_that_do_not_differ():
    params = {"optimizer": "Muon", "lr_scale": 6.0, "schedule": "linear", "dropout": 0.0}
    params |= {"label_smoothing": 0.2, "crop_padding": 2, "activation": "Mish"}
    best = task3.settings_of(params)
    changed = task3.ablated(params)
    assert set(changed) == {"optimizer", "lr_scale", "schedule", "label_smoothing", "crop_padding", "activation"}
    for name, settings in changed.items():
        others = {key for key in best if settings[key] != best[key]}
        assert others == {"optimizer": {"optimizer", "lr"}, "lr_scale": {"lr"}}.get(name, {name})
    assert changed["optimizer"]["lr"] == pytest.approx(0.006)  # the same multiple of the usual learning rate
    assert changed["lr_scale"]["lr"] == 0.02
    assert changed["schedule"]["schedule"] == "constant"
    assert task3.ablated(task3.TEXTBOOK) == {}


def test_settings_at_an_end_of_their_range_are_told(tiny, tmp_path):
    started = begin(tmp_path, tiny)
    study = study_of(TrialState.COMPLETE, TrialState.COMPLETE, TrialState.COMPLETE)
    words = task3.ends_in_words(results_of(started, study))
    assert words == "No setting of the best lies at an end of its range."
    study = optuna.create_study(direction="maximize")
    params = task3.TEXTBOOK | {"label_smoothing": 0.3, "weight_decay": 1e-3, "crop_padding": 1}
    study.add_trial(create_trial(value=0.5, params=params, distributions=started.plan.space))
    words = task3.ends_in_words(results_of(started, study))
    assert words == "At an end of its range: dropout 0, the lowest; label smoothing 0.3, the highest."


def test_effects_are_those_of_a_slow_loop_and_corrected_for_their_number():
    random = np.random.default_rng(0)
    chances = {"best": 0.7, "best but schedule": 0.6, "best but dropout": 0.7, "best but crop_padding": 0.75}
    right = {name: (random.random((4, 2000)) < chance).astype(float) for name, chance in chances.items()}
    best = {"schedule": "linear", "dropout": 0.2, "crop_padding": 3}
    back = {"schedule": "constant", "dropout": 0.0, "crop_padding": 0}
    effects = task3.judge_effects(best, right)
    assert [effect.setting for effect in effects] == ["schedule", "dropout", "crop_padding"]
    for effect in effects:
        lost = [
            np.mean([b - o for b, o in zip(*pair, strict=True)])
            for pair in zip(right["best"], right[f"best but {effect.setting}"], strict=True)
        ]
        assert effect.estimate.mean == pytest.approx(np.mean(lost))
        assert (effect.best, effect.textbook) == (best[effect.setting], back[effect.setting])
    ranked = sorted(effects, key=lambda effect: effect.estimate.p)
    assert ranked[0].p_holm == pytest.approx(3 * ranked[0].estimate.p)
    lines = task3.effects_in_words(effects)
    assert "schedule linear instead of constant: +" in lines[0]
    assert "The study was wrong about crop padding 3 instead of 0" in lines[1]
    assert "No effect shown, corrected for 3 settings: dropout" in lines[2]


def test_resuming_repeats_nothing_heals_the_journal_and_tells_another_sampler(result, tmp_path, capsys, no_figures):
    folder, _, trials = result
    copy = shutil.copytree(folder, tmp_path / "copy")
    with (copy / "study.log").open("ab") as stream:  # a kill has left half a line
        stream.write(b'{"op_code":5,"worker_id":"half')
    (copy / "study.log.lock").touch()  # and a lock
    again = [*OPTIONS, "--trials", "8", "--retrain-seeds", "0", "--sampler", "random", "--output-dir", str(copy)]
    assert task3.main(again) == 0
    assert "half-written line" in capsys.readouterr().err
    assert pd.read_csv(copy / "trials.csv").equals(trials)  # the total was reached before
    assert "The sampler changed during the study: GPSampler, then RandomSampler" in (copy / "report.md").read_text()
    assert (copy / "previous" / "best_model.pth").exists()  # of another run than this one


def test_a_changed_study_is_refused_and_fresh_moves_it_aside(result, tmp_path, capsys, fashion, monkeypatch):
    folder, _, _ = result
    monkeypatch.setattr(common, "load_data", lambda _: fashion)
    (tmp_path / "study.log").write_bytes((folder / "study.log").read_bytes())
    options = [*OPTIONS, "--retrain-seeds", "0", "--output-dir", str(tmp_path)]
    for change, words in ((["--batch-size", "32"], "batch_size: 64, now 32"), (["--seed", "1"], "seed: 0, now 1")):
        assert task3.main([*options, *change]) == 2
        message = capsys.readouterr().err
        assert words in message
        assert "--fresh" in message
    content = (tmp_path / "study.log").read_bytes()
    begin(tmp_path, tiny_data(), "--fresh")
    (old,) = tmp_path.glob("study-*.log")
    assert old.read_bytes() == content
    assert len(load(tmp_path).trials) == 1  # the textbook configuration


# ---------------------------------------------------------------- honesty


def test_every_trial_is_judged_on_the_same_images_which_another_seed_changes(tiny, tmp_path):
    started = begin(tmp_path, tiny, "--trials", 4)
    started.search()
    splits = [job.split for job in started.workers.jobs]
    assert len(splits) == 4
    assert all(split is splits[0] for split in splits)
    assert not set(splits[0].validation.tolist()) & set(splits[0].train.tolist())
    other = task3.make_plan(task3.parse_args(["--seed", "1", "--images", "64"]), tiny).template.split
    assert other.validation.tolist() != splits[0].validation.tolist()


class Untouchable:
    """A test set of which nothing may be used but the fact that it can be left out."""

    def __getitem__(self, key):
        assert key == slice(None, 0), "the test set was read before the selection was over"
        return torch.zeros(0)

    def __getattr__(self, name):
        raise AssertionError("the test set was read before the selection was over")


def test_the_test_set_is_not_touched_before_the_selection_is_over(tmp_path, monkeypatch, capsys, no_figures):
    fashion = common.load_dataset("fashion_mnist")
    guarded = replace(fashion, test_images=Untouchable(), test_labels=Untouchable())
    monkeypatch.setattr(common, "load_data", lambda _: guarded)
    monkeypatch.setattr(common, "Workers", InProcess)
    small = ["--trials", "2", "--audit", "1", "--images", "160", "--epochs", "2", "--workers", "1"]
    with pytest.raises(AssertionError, match="the test set was read"):
        task3.main(["--quick", *small, "--output-dir", str(tmp_path)])
    stages = re.findall(r"^\[.*s\] (.*)", capsys.readouterr().out, re.M)
    assert stages[-1] == "test set"
    trained = pd.read_csv(tmp_path / "retrain.csv")
    assert {"textbook", "best", "lab"} < set(trained["configuration"])
    assert "test_accuracy" not in trained


OTHERS = ("--sampler", "QMCSampler", "--pruner", "hyperband"), ("--sampler", "CmaEsSampler", "--pruner", "none")


class Uneven(common.Workers):
    """Real workers, of which now this one and now that one is slow."""

    def __init__(self, count, runtime, path, slow):
        super().__init__(count, runtime, path)
        self.slow = slow  # trainings

    def run(self, function, job):
        is_slow = next(self.slow)
        for epoch in super().run(function, job):
            yield epoch
            time.sleep(0.03 * is_slow)


@pytest.mark.parametrize("options", [(), ("--sampler", "tpe"), *OTHERS])
def test_same_seed_gives_the_same_trials_with_one_worker_or_two(tiny, tmp_path, options):
    common.share_dataset(tmp_path / "data.pt", tiny)
    facts = []
    # What Hyperband prunes depends on trials that run at the same time.
    counts = (1, 1, 1) if "hyperband" in options else (1, 2, 2)
    for workers, slow in zip(counts, ([0, 1], [0, 1, 1], [1, 0, 0]), strict=True):
        kind = {"kind": Uneven, "path": tmp_path / "data.pt", "slow": itertools.cycle(slow)}
        started = begin(tmp_path / str(len(facts)), tiny, "--trials", 14, *options, count=workers, **kind)
        study, stopped = started.search()
        started.workers.stop()
        assert stopped is None
        facts.append([(t.state, t.value, t.params, t.intermediate_values) for t in study.trials])
    assert all(other == facts[0] for other in facts)
    assert len({str(params) for _, _, params, _ in facts[0]}) == 14


def test_the_start_is_balanced_and_random_search_has_none(tmp_path, tiny):
    for sampler, is_even in (("gp", True), ("random", False)):
        started = begin(tmp_path / sampler, tiny, "--trials", 100, "--sampler", sampler)
        trials = [started.study.ask() for _ in range(33)]
        for trial in trials:
            task3.suggest(trial, task3.TRIAL)
        places = [np.log(trial.params["lr_scale"] / 0.1) / np.log(300) for trial in trials[1:32]]
        assert (len({int(16 * place) for place in places}) == 16) is is_even
        if is_even:
            counts = pd.Series([trial.params["optimizer"] for trial in trials[1:32]]).value_counts()
            assert counts.between(7, 9).all()


def test_a_resumed_study_draws_new_configurations_and_stops_at_its_number(tiny, tmp_path):
    for trials in (3, 6):
        study, _ = take_part(tmp_path, tiny, "--trials", trials, "--sampler", "random", count=2)
    assert len(study.trials) == len({str(trial.params) for trial in study.trials}) == 6


def test_the_time_limit_starts_no_more_trials_and_lets_the_running_ones_finish(tiny, tmp_path):
    study, stopped = take_part(tmp_path, tiny, "--trials", 1000, "--timeout", 0.5, count=2)
    assert stopped is None
    assert 1 <= len(study.trials) < 1000
    assert all(trial.state in task3.DONE for trial in study.trials)


# ---------------------------------------------------------------- failures of a trial


class Diverging(InProcess):
    """The second training diverges in its first epoch."""

    trainings = 0

    def run(self, function, job):
        self.trainings += 1
        if self.trainings == 2:
            yield common.Epoch(1, math.nan, 0.1, (math.nan,), common.Score(math.nan, np.arange(10) == 0))
        return (yield from super().run(function, job))


def test_divergence_is_kept_with_its_reason(tiny, tmp_path):
    table = task3.trial_table(take_part(tmp_path, tiny, "--trials", 3, kind=Diverging).study)
    assert table["state"][1] == "pruned"
    assert "diverged" in table["reason"][1]
    assert table["state"][2] in ("complete", "pruned")


@pytest.mark.parametrize(("deaths", "failed", "kept"), [(1, 1, True), (4, 4, False)])
def test_a_trial_whose_worker_dies_is_tried_again_but_not_for_ever(tiny, tmp_path, deaths, failed, kept):
    study = take_part(tmp_path, tiny, "--trials", 2, deaths=deaths).study
    table = task3.trial_table(study)
    assert (table["state"] == "fail").sum() == failed
    assert re.fullmatch(r"its worker died; tried again as trial \d", table["reason"][0])
    finished = [trial.params for trial in study.get_trials(states=task3.DONE)]
    assert (task3.TEXTBOOK in finished) is kept
    assert len(finished) == 2


class Faulty(InProcess):
    """Workers in which every training fails."""

    def run(self, function, job):
        raise common.WorkerFailed("in a worker process:\nTraceback (most recent call last):\nKeyError: 'no such thing'")
        yield


def test_errors_in_every_trial_end_the_study(tiny, tmp_path):
    study, stopped = take_part(tmp_path, tiny, "--trials", 50, kind=Faulty)
    assert 5 <= len(study.trials) < 12
    assert {trial.user_attrs["reason"] for trial in study.trials} == {"KeyError: 'no such thing'"}
    assert isinstance(stopped, common.WorkerFailed)  # whose traceback is shown


def test_a_study_goes_on_that_was_often_killed_before_anything_was_finished(tiny, tmp_path):
    for _ in range(4):
        study = begin(tmp_path, tiny, "--trials", 1).study
        for _ in range(2):
            study.ask()  # and no more is heard of it
    study, _ = take_part(tmp_path, tiny, "--trials", 1)
    assert len(study.get_trials(states=task3.DONE)) == 1


def results_of(started, study=None):
    """What a run knows after the search."""
    return task3.Results(started.plan, started.run.data.source, study or started.search().study)


def test_an_audit_without_pruned_trials_says_so(tiny, tmp_path):
    started = begin(tmp_path, tiny, "--trials", 3, "--pruner", "none", "--audit", 4)
    results = results_of(started)
    results = replace(results, audit=task3.run_audit(started.run, started.plan, results.study))
    assert results.audit.finished == 0
    text = " ".join(task3.conclude(results))
    assert "no pruned trials" in text
    assert "interrupted" not in text
    assert "interrupted" in task3.conclude(replace(results, is_interrupted=True))[0]


def test_an_audit_finishes_pruned_trials_with_their_own_seeds(tiny, tmp_path):
    started = begin(tmp_path, tiny, "--trials", 6, "--audit", 20)
    study = started.search().study
    seeds = [job.seed for job in started.workers.jobs]
    copy = optuna.create_study(direction="maximize")
    for trial in study.trials:  # 2, 4 and 5 as if pruned after one epoch
        if trial.number in (2, 4, 5):
            trial.state = TrialState.PRUNED
            trial.user_attrs["reason"] = "diverged: the loss is not finite" if trial.number == 5 else "MedianPruner"
        copy.add_trial(trial)
    audit = task3.run_audit(started.run, started.plan, copy)
    table = pd.read_csv(started.run.folder / "audit.csv")
    assert list(table["number"]) == [2, 4]
    assert [job.seed for job in started.workers.jobs[-2:]] == [seeds[2], seeds[4]]
    assert table["value_finished"].tolist() == [study.trials[2].value, study.trials[4].value]  # the same training
    assert audit.would_have_won == (table["value_finished"] > copy.best_value).sum()
    lowest = sorted(trial.value for trial in copy.get_trials(states=(TrialState.COMPLETE,)))[0]  # of three candidates
    assert audit.would_have_been_confirmed == (table["value_finished"] > lowest).sum()
    assert (audit.finished, audit.pruned) == (2, 2)


# ---------------------------------------------------------------- sampling and pruning


@pytest.mark.parametrize("learns", [True, False])
def test_the_sampler_does_not_go_back_to_where_trials_are_pruned(learns):
    """Accuracy rises up to 0.6, and what lies beyond is pruned: Optuna's own sampler goes there again and again."""
    kind = task3.GPSampler if learns else optuna.samplers.GPSampler
    study = optuna.create_study(direction="maximize", sampler=kind(seed=0, n_startup_trials=6))
    for place in range(6):
        study.enqueue_trial({"x": place / 10})
    pruned = 0
    for _ in range(16):
        trial = study.ask()
        x = trial.suggest_float("x", 0, 1)
        trial.report(x if x <= 0.6 else 0.1, 3)
        if x <= 0.6:
            study.tell(trial, x)
        else:
            study.tell(trial, state=TrialState.PRUNED)
            pruned += 1
    assert (pruned < 5) is learns


def test_a_study_prunes_poor_trials_after_its_start_and_after_the_warm_up(tiny, tmp_path):
    started = begin(tmp_path, tiny, "--trials", 24, "--epochs", 5, "--sampler", "random")
    study = started.search().study
    start = [trial.intermediate_values for trial in study.trials[:8]]
    assert study.user_attrs["start"] == 8
    pruned = study.get_trials(states=(TrialState.PRUNED,))
    assert pruned
    for trial in study.trials[8 + task3.AHEAD - 1 :]:
        best = np.maximum.accumulate([trial.intermediate_values[epoch] for epoch in sorted(trial.intermediate_values)])
        medians = {epoch: np.median([values[epoch] for values in start]) for epoch in (3, 4)}
        poor = [epoch for epoch, median in medians.items() if epoch <= len(best) and best[epoch - 1] < median]
        assert (trial.state == TrialState.PRUNED) is bool(poor)
        assert trial.last_step == (poor[0] if poor else 5)
    assert all(trial.number >= 8 + task3.AHEAD - 1 for trial in pruned)


@pytest.mark.parametrize(("accuracy", "number", "is_pruned"), [(0.1, 9, True), (0.4, 9, False), (0.1, 3, False)])
def test_trials_are_compared_with_the_start_which_is_never_pruned(accuracy, number, is_pruned):
    """Later trials are good ones: compared with these, most of the good ones would be pruned."""
    study = optuna.create_study(direction="maximize")
    for place in range(12):
        values = dict.fromkeys(range(1, 6), 0.2 if place < 4 else 0.9)
        study.add_trial(create_trial(value=values[5], intermediate_values=values))
    trial = create_trial(state=TrialState.RUNNING, intermediate_values=dict.fromkeys(range(1, 5), accuracy))
    trial.number = number
    median = optuna.pruners.MedianPruner(n_startup_trials=1)
    assert bool(task3.StartPruner(4, task3.AHEAD, median).prune(study, trial)) is is_pruned


# ---------------------------------------------------------------- figures


def study_of(*states):
    """A study of trials in these states: the first is the textbook's, the third, if it is complete, the best."""
    drawn = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study = optuna.create_study(direction="maximize")
    for number, state in enumerate(states):
        trial = drawn.ask()
        task3.suggest(trial, task3.TRIAL)
        epochs = 5 if state == TrialState.COMPLETE else 3
        values = {epoch: 0.1 * epoch + 0.001 * number for epoch in range(1, epochs + 1)}
        if number == 2:
            values[epochs] += 0.1
        distributions = trial.distributions
        params = trial.params
        if number == 0:
            textbook = optuna.trial.FixedTrial(task3.TEXTBOOK)
            task3.suggest(textbook, task3.TRIAL)
            params, distributions = textbook.params, textbook.distributions
        facts = {"params": params, "distributions": distributions, "intermediate_values": values}
        study.add_trial(create_trial(state=state, value=values[epochs], **facts))
    study.set_user_attr("machinery", [])
    study.set_user_attr("start", 4)
    return study


def has_colour(path, colour):
    pixels = image.imread(path)[..., :3].reshape(-1, 3)
    return bool((np.abs(pixels - colors.to_rgb(colour)).max(1) < 0.01).any())


@pytest.mark.parametrize("complete", [1, 12])
def test_a_kind_of_trial_has_the_same_colour_in_every_figure(tiny, tmp_path, capsys, complete):
    started = begin(tmp_path, tiny)
    study = study_of(*[TrialState.COMPLETE] * complete, TrialState.PRUNED)
    task3.draw_figures(started.run, results_of(started, study))
    assert "could not be drawn" not in capsys.readouterr().err
    kinds = {"best", "pruned"} if complete == 1 else {"best", "pruned", "complete"}
    figures = dict.fromkeys(("intermediate_values", "slice"), kinds)
    figures["optimization_history"] = kinds | {"complete"}  # the line
    for name, expected in figures.items():
        path = started.run.folder / f"{name}.png"
        shown = {kind for kind, colour in task3.COLOURS.items() if has_colour(path, colour)}
        assert expected <= shown, name
        assert shown - expected <= {"textbook", "pruned"}, name  # letters are black and grey
    assert (started.run.folder / "coverage.png").exists()
    assert pyplot.get_fignums() == []


# ---------------------------------------------------------------- databases


def lock(path, seconds):
    """Hold an exclusive lock on an SQLite file, from now on for so long."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("BEGIN EXCLUSIVE")
    timer = threading.Timer(seconds, lambda: (connection.execute("COMMIT"), connection.close()))
    timer.daemon = True
    timer.start()


def in_sqlite(folder):
    return "--storage", f"sqlite:///{folder}/study.db?timeout=0.2"


def test_a_database_that_is_locked_for_a_while_is_waited_for(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(task3, "RETRY_SECONDS", 0.1)
    started = begin(tmp_path, tiny, "--trials", 4, *in_sqlite(tmp_path))
    started.workers.events[1, 0] = lambda: lock(tmp_path / "study.db", 0.6)  # waited for in the trial
    study, stopped = started.search()
    assert stopped is None
    assert sum(trial.state in task3.DONE for trial in study.trials) == 4


def test_a_result_waits_for_a_database_that_is_away(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(task3, "RETRY_SECONDS", 0.1)
    started = begin(tmp_path, tiny, "--trials", 4, "--pruner", "none", *in_sqlite(tmp_path))
    started.workers.events[1, 3] = lambda: lock(tmp_path / "study.db", 0.6)  # after its last epoch
    study, stopped = started.search()
    assert stopped is None
    assert study.trials[1].state == TrialState.COMPLETE
    assert sum(trial.state == TrialState.COMPLETE for trial in study.trials) == 4


def test_a_trial_is_tried_again_whose_parameters_could_not_be_drawn(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(task3, "RETRY_SECONDS", 0.1)
    started = begin(tmp_path, tiny, "--trials", 4, "--pruner", "none", *in_sqlite(tmp_path))
    suggest = task3.suggest

    def locked(trial, recipe):
        if trial.number == 1:
            lock(tmp_path / "study.db", 0.6)
        return suggest(trial, recipe)

    monkeypatch.setattr(task3, "suggest", locked)
    study, stopped = started.search()
    assert stopped is None
    assert sum(trial.state in task3.DONE for trial in study.trials) == 4
    again = task3.retried(study.trials)[1]
    assert study.trials[1].state == TrialState.FAIL
    assert study.trials[1].params.items() <= study.trials[again].params.items()
    assert task3.trial_table(study)["reason"][1] == f"the database was away; tried again as trial {again}"


def test_a_heart_goes_on_beating_after_an_outage(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(task3, "RETRY_SECONDS", 0.1)
    monkeypatch.setattr(task3, "HEARTBEAT_SECONDS", 1)
    dead = []
    monkeypatch.setattr(threading, "excepthook", dead.append)
    started = begin(tmp_path, tiny, "--trials", 2, *in_sqlite(tmp_path))
    ages = []

    def miss_a_beat():
        lock(tmp_path / "study.db", 1.3)
        time.sleep(2.5)
        with contextlib.closing(sqlite3.connect(tmp_path / "study.db")) as connection:
            age = "SELECT MIN(unixepoch('now') - unixepoch(heartbeat)) FROM trial_heartbeats"
            ages.append(connection.execute(age).fetchone()[0])

    started.workers.events[1, 0] = miss_a_beat
    study, stopped = started.search()
    assert stopped is None
    assert [trial.state in task3.DONE for trial in study.trials] == [True] * 2
    assert ages[0] <= 1
    assert dead == []


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_machine_that_slept_loses_its_trial_and_goes_on(tiny, tmp_path, epoch):
    started = begin(tmp_path, tiny, "--trials", 4, "--pruner", "none", *in_sqlite(tmp_path))

    def taken_for_dead():
        url = in_sqlite(tmp_path)[1]
        other = optuna.load_study(study_name=task3.STUDY, storage=task3.open_database(url))
        other.tell(1, state=TrialState.FAIL)

    started.workers.events[1, epoch] = taken_for_dead
    study, stopped = started.search()
    assert stopped is None
    assert study.trials[1].state == TrialState.FAIL
    assert sum(trial.state in task3.DONE for trial in study.trials) == 4


@pytest.mark.parametrize("finished", [0, 2])
def test_a_database_that_stays_away_is_one_line_and_a_report_of_what_is_finished(tiny, tmp_path, monkeypatch, finished):
    monkeypatch.setattr(task3, "RETRY_SECONDS", 0.1)
    monkeypatch.setattr(task3, "PATIENCE_SECONDS", 0.5)
    started = begin(tmp_path, tiny, "--trials", 9, *in_sqlite(tmp_path))
    if finished:
        started.workers.events[finished, 0] = lambda: lock(tmp_path / "study.db", 30.0)
    else:
        lock(tmp_path / "study.db", 30.0)
    begun = time.monotonic()
    study, stopped = started.search()
    assert time.monotonic() < begun + 10
    assert isinstance(stopped, UserError)
    assert "database is locked" in str(stopped)
    assert "\n" not in str(stopped)
    results = results_of(started, study)
    assert finished - 1 <= results.counts["finished"] <= finished  # the last result may not have been told
    assert task3.write_report(started.run, replace(results, is_interrupted=True))


def test_a_study_is_waited_for_that_is_about_to_be_joined(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(task3, "RETRY_SECONDS", 0.1)
    started = begin(tmp_path, tiny, *in_sqlite(tmp_path))
    storage = task3.open_storage(started.plan.options, tmp_path)
    lock(tmp_path / "study.db", 0.5)
    study = task3.Patience().call(task3.join_study, started.run, started.plan, storage)
    assert len(study.trials) == 1


def test_tables_of_another_optuna_are_one_line_with_its_advice(tiny, tmp_path):
    begin(tmp_path, tiny, *in_sqlite(tmp_path))
    with contextlib.closing(sqlite3.connect(tmp_path / "study.db")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v3.0.0.d'")
        connection.execute("UPDATE version_info SET library_version = '3.6.1'")
        connection.commit()
    with pytest.raises(UserError, match=r"set up by optuna 3\.6\.1.*optuna storage upgrade --storage"):
        begin(tmp_path, tiny, *in_sqlite(tmp_path))


def test_a_database_holds_many_studies_and_another_is_started_by_its_name(tiny, tmp_path):
    database = in_sqlite(tmp_path)
    begin(tmp_path, tiny, *database)
    with pytest.raises(UserError, match=r"seed: 0, now 1.*use another --study-name$") as refused:
        begin(tmp_path, tiny, "--seed", 1, *database)
    assert "--fresh" not in str(refused.value)
    another = begin(tmp_path, tiny, "--seed", 1, "--study-name", "ещё одна", *database).study
    assert len(another.trials) == 1
    assert set(optuna.get_all_study_names(database[1])) == {"small-cnn", "ещё одна"}


@pytest.mark.parametrize(
    ("directions", "words"), [(["minimize"], "was made to minimize"), (["maximize"] * 2, "maximize and maximize")]
)
def test_studies_made_for_something_else_are_refused(tiny, tmp_path, directions, words):
    database = in_sqlite(tmp_path)
    optuna.create_study(study_name=task3.STUDY, storage=database[1], directions=directions)
    with pytest.raises(UserError, match=rf"{words}.*use another --study-name"):
        begin(tmp_path, tiny, *database)
    other = optuna.create_study(study_name="theirs", storage=database[1], direction="maximize")
    other.add_trial(create_trial(value=0.5))
    with pytest.raises(UserError, match=r"theirs has trials, but not of this script"):
        begin(tmp_path, tiny, "--study-name", "theirs", *database)


@pytest.mark.parametrize("sampler", ["gp", "tpe"])
def test_trials_that_somebody_added_are_left_out(tiny, tmp_path, capsys, sampler):
    options = ("--sampler", sampler, *in_sqlite(tmp_path))
    first = take_part(tmp_path, tiny, "--trials", 4, *options).study
    stored = optuna.load_study(study_name=task3.STUDY, storage=options[-1])
    rate = optuna.distributions.FloatDistribution(1e-5, 1)
    stored.add_trial(create_trial(value=1.0, params={"lr": 2e-3}, distributions={"lr": rate}))
    trial = first.trials[1]  # of unknown origin
    stored.add_trial(create_trial(value=1.0, params=trial.params, distributions=trial.distributions))
    again = take_part(tmp_path, tiny, "--trials", 8, *options).study
    assert "trials 4, 5 of the stored study are not of this script: left out" in capsys.readouterr().err
    states = [trial.state for trial in again.trials]
    assert states[4:6] == [TrialState.FAIL] * 2
    assert sum(state in task3.DONE for state in states) == 8
    assert all("left out" in again.trials[number].user_attrs["reason"] for number in (4, 5))
    assert [trial.number for trial in again.trials] == list(range(10))
    assert again.best_value < 1
    assert again.trials[-1].params.keys() >= task3.TEXTBOOK.keys() - {"weight_decay"}


def test_a_study_of_a_network_that_was_edited_since_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "from torch import nn\ndef Net(num_classes):\n    "
    code += "return nn.Sequential(nn.Flatten(), nn.Dropout(SHARE), nn.Linear(2352, num_classes))"
    options = ("--model", "edited_net:Net", "--trials", 2)
    for share, outcome in ((0.1, contextlib.nullcontext()), (0.1, contextlib.nullcontext()), (0.2, UserError)):
        (tmp_path / "edited_net.py").write_text(code.replace("SHARE", f"{share}"))
        monkeypatch.delitem(sys.modules, "edited_net", raising=False)
        importlib.invalidate_caches()
        if outcome is UserError:
            outcome = pytest.raises(UserError, match=r"edited_net:Net is another network now.*--fresh")
        with outcome, pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "dont_write_bytecode", True)
            begin(tmp_path, tiny, *options)


@pytest.mark.parametrize(
    ("arguments", "published"),
    [
        ("--storage postgresql://me:secret@host:5432/db?sslpassword=a@secret", "--storage postgresql://host:5432/db"),
        ("--storage=postgresql+psycopg2://secret@host/db", "--storage=postgresql+psycopg2://host/db"),
        ("--stor mysql://me:se/cr?secret@host/db --seed=1", "--stor mysql://host/db --seed=1"),
        ("--storage sqlite:////tmp/a.db?timeout=1", "--storage sqlite:////tmp/a.db"),
        ("--storage magic://a:b@c@secret/db --storage sqlite:///a.db", "--storage *** --storage sqlite:///a.db"),
    ],
)
def test_neither_user_nor_password_nor_query_of_a_database_is_published(arguments, published):
    command = shlex.split(task3.command_without_secrets(shlex.split(arguments)))
    assert command == ["python", "task3_optuna.py", *shlex.split(published)]
    options = task3.parse_args(["--storage", "postgresql://me:secret@host/db?a=secret"])
    assert task3.options_without_secrets(options).storage == "postgresql://host/db"
    assert options.storage.startswith("postgresql://me:secret@")  # still needed


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sampler", "magic"], ["--sampler", "tpe", "optuna.samplers"]),
        (["--sampler", "GridSampler"], ["--sampler", "search_space"]),
        (["--pruner", "ThresholdPruner"], ["--pruner", "hyperband"]),
        (["--trials", "0"], ["--trials"]),
        (["--timeout", "-3"], ["--timeout"]),
        (["--timeout", "nan"], ["--timeout"]),
        (["--audit", "-1"], ["--audit"]),
        (["--storage", "postgresql://user:secret@127.0.0.1:1/nowhere"], ["cannot be used", "user:***@"]),
        (["--storage", "postgresql://user:sec@secret@127.0.0.1/nowhere"], ["%40"]),
        (["--storage", "postgresql://user:secret@127.0.0.1:54secret32/nowhere"], ["%3A", ":5432"]),
        (["--storage", "postgresql://user:abc:secret@127.0.0.1:1/nowhere"], ["cannot be used", "user:***@"]),
        (["--storage", "mysql://user:secret@host/db"], ["MySQLdb", "pip install mysqlclient"]),
        (["--storage", "postgresql+psycopg2://user:secret@host/db"], ["psycopg2", "pip install psycopg2-binary"]),
        (["--storage", "magic://user:secret@host/db"], ["cannot be used", "magic"]),
        (["--storage", "secret"], ["not a database URL"]),
        (["--storage", "sqlite:////nowhere/at/all.db"], ["cannot be used"]),
        (["--storage", "sqlite:///a.db", "--fresh"], ["--fresh", "--study-name"]),
        (["--study-name", ""], ["--study-name"]),
        (["--width", "20"], ["multiple of 16"]),
        (["--dataset", "no/such/folder"], ["no/such/folder"]),
    ],
)
def test_bad_input_gets_one_clear_line(options, words, tmp_path, capsys, monkeypatch):
    if "psycopg" not in words and "postgresql:" in options[-1]:
        pytest.importorskip("psycopg")
    monkeypatch.setattr(common, "load_data", lambda options: (options.dataset == "fashion_mnist" and tiny_data())
                        or common.load_dataset(options.dataset))  # fmt: skip
    try:
        status = task3.main([*OPTIONS, *options, "--output-dir", str(tmp_path / "out")])
    except SystemExit as exit:  # argparse
        status = exit.code
    captured = capsys.readouterr()
    message = captured.err.strip().splitlines()[-1]
    assert status == 2
    assert all(word in message for word in words), message
    assert "secret" not in captured.err.replace("--storage secret", "") + captured.out
    assert "Traceback" not in captured.err


def test_a_sampler_that_is_not_made_for_such_a_study_is_one_line_and_a_report(tiny, tmp_path):
    started = begin(tmp_path, tiny, "--trials", 9, "--sampler", "BruteForceSampler")
    study, stopped = started.search()
    assert isinstance(stopped, UserError)
    assert str(stopped).startswith("--sampler BruteForceSampler cannot go on: ")
    results = replace(results_of(started, study), is_interrupted=True)
    assert task3.write_report(started.run, results)


@pytest.mark.parametrize("content", [b"not a journal\n", b"not even a line", b'{"a": 1}\n{"b": 2}\n', b"\x00\xff" * 99])
def test_a_file_that_is_no_journal_is_refused_and_left_alone(content, tmp_path):
    path = tmp_path / "study.log"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not an Optuna journal"):
        task3.open_journal(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"{", b'{"op_co', b'{"op_code": 0, "wor'])
def test_a_kill_in_the_first_line_of_a_journal_is_healed(content, tmp_path, tiny):
    (tmp_path / "study.log").write_bytes(content)
    study = begin(tmp_path, tiny).study
    assert len(study.trials) == len(load(tmp_path).trials) == 1


def test_seconds_are_those_of_training_whatever_the_clock_says(tiny, tmp_path):
    study, _ = take_part(tmp_path, tiny, "--trials", 2)
    slept = optuna.create_study(direction="maximize")
    for trial in study.trials:
        trial.datetime_complete += pd.Timedelta(hours=8)
        slept.add_trial(trial)
    assert task3.trial_table(slept)["seconds"].between(0, 30, inclusive="neither").all()
