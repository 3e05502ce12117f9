"""Task 3: the study's results, resumption, honesty about the test set, databases, bad input."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import shutil
import sqlite3
import threading
from dataclasses import replace
from types import SimpleNamespace

import optuna
import pandas as pd
import pytest
import torch

import common
import task3_optuna as task3
from common import UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
    pytest.mark.filterwarnings("ignore:Fixed parameter"),  # of the test that provokes a divergence
]
OPTIONS = ["--dataset", "fashion_mnist", "--quick", "--images", "320", "--workers", "2"]
FILES = "study.log trials.csv best_params.json best_model.pth summary.json retrain.csv config.json "
FILES += "environment.json report.md optimization_history.png intermediate_values.png param_importances.png slice.png"
FILES += " parallel_coordinate.png"
optuna.logging.set_verbosity(optuna.logging.CRITICAL)


# ---------------------------------------------------------------- studies on very few images, in this process


class Here(common.Workers):
    """Workers that are this process: a training takes a blink. ``deaths``: so many trainings end as a dead worker's."""

    def __init__(self, count, runtime, path, deaths=0):
        super().__init__(count, runtime, path)
        torch.set_num_threads(1)  # threads of threads wait for each other
        self.deaths, self.jobs = deaths, []

    @functools.cached_property
    def data(self):
        return common.Dataset(**torch.load(self.path, weights_only=True))

    def run(self, function, job):
        self.jobs.append(job)
        if self.deaths:
            self.deaths -= 1
            raise common.WorkerDied("killed")
        return (yield from function(self.data, self.runtime, job))


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
    monkeypatch.setattr(task3, "draw_study", lambda *_: None)


def begin(folder, data, *options, **workers):
    """(run, plan, study) of a small study in ``folder``."""
    small = ["--width", "16", "--epochs", "3", "--batch-size", "32", "--images", "64"]
    parsed = task3.parse_args([*small, *map(str, options), "--output-dir", str(folder)])
    plan = task3.make_plan(parsed, data)
    bar, runtime = SimpleNamespace(n=0, update=lambda images: None), common.make_runtime("cpu", "fp32", 1)
    run = SimpleNamespace(data=data, runtime=runtime, bar=bar, output=folder, folder=folder, options=parsed)
    run.environment = {"git_commit": None}
    run.workers, run.stage = Here(**{"count": 1, "runtime": runtime, "path": None} | workers), lambda *_: None
    run.workers.data = data
    return run, plan, task3.open_study(run, plan)


def take_part(folder, data, *options, **workers):
    return task3.search(*begin(folder, data, *options, **workers))


def load(folder):
    return optuna.load_study(study_name=task3.STUDY, storage=task3.open_journal(folder / "study.log"))


# ---------------------------------------------------------------- one whole run, asked many questions


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "Workers", Here)
        assert task3.main([*OPTIONS, "--audit", "2", "--output-dir", str(folder)]) == 0
    return folder, json.loads((folder / "summary.json").read_text()), pd.read_csv(folder / "trials.csv")


def test_all_files_are_written(result):
    folder, summary, _ = result
    assert set(FILES.split()) <= {path.name for path in folder.iterdir()}
    assert (folder / ".dataset.pt").exists() is False
    assert summary["task"] == "task3"
    assert summary["dataset"] == "fashion_mnist"
    assert summary["interrupted"] is False
    for link in re.findall(r"!\[.*\]\((.*)\)", (folder / "report.md").read_text()):
        assert (folder / link).stat().st_size > 1000


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
    assert trials["value"][trials["state"] == "complete"].max() == summary["best"]["value"]
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
    assert lab["lr"] == common.PRESETS["small"].lr
    assert lab["lr"] not in trials["param_lr"].tolist()
    scale = lab["lr"] / task3.USUAL_LR[lab["optimizer"]]
    params = {name: value for name, value in lab.items() if name != "lr"} | {"lr_scale": scale}
    space = optuna.trial.FixedTrial(params)
    assert task3.suggest(space, task3.TRIAL) == lab
    for name, distribution in space.distributions.items():
        assert distribution._contains(distribution.to_internal_repr(params[name])), name


def test_the_saved_model_is_the_best_configuration_and_has_the_accuracy_it_claims(result):
    folder, summary, _ = result
    model, facts = common.load_checkpoint(folder / "best_model.pth")
    best = json.loads((folder / "best_params.json").read_text())
    assert {name: getattr(facts["recipe"], name) if not isinstance(facts["recipe"], dict) else facts["recipe"][name]
            for name in best} == best == summary["best"]["params"]  # fmt: skip
    fashion = common.load_dataset("fashion_mnist")
    index = fashion.test_labels.argsort(stable=True)[:: 10_000 // task3.QUICK_IMAGES]
    logits = common.predict(model, fashion.test_images, common.make_runtime("cpu", "fp32", 1), index)
    _, right = common.score(logits, fashion.test_labels[index])
    assert right.mean() == pytest.approx(facts["test_accuracy"], abs=0.02)  # bf16 there, fp32 here
    assert facts["test_accuracy"] == summary["retrain"]["full"]["test_accuracy"]


def test_the_truth_adds_up(result):
    folder, summary, _ = result
    truth, optimism = summary["retrain"], summary["optimism"]
    rows = pd.read_csv(folder / "retrain.csv")
    study = rows[rows["schedule"] == "study"]
    assert (study.groupby("seed")["configuration"].nunique() == 3).all()  # the same seeds: paired
    means = study.groupby("configuration")["test_accuracy"].mean()
    for name in ("textbook", "best", "lab"):
        assert truth[name]["test_accuracy"]["n"] == 2
        assert truth[name]["test_accuracy"]["mean"] == pytest.approx(means[name])
    for key, other in (("difference", "textbook"), ("difference_to_lab", "lab")):
        assert truth[key]["mean"] == pytest.approx(means["best"] - means[other])
        assert truth[key]["ci_low"] < truth[key]["mean"] < truth[key]["ci_high"]
    assert optimism["optimism"] == pytest.approx(summary["best"]["value"] - means["best"])
    assert (summary["audit"]["finished"] > 0) == (folder / "audit.csv").exists()


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
    assert "The sampler changed during the study: TPESampler, then RandomSampler" in (copy / "report.md").read_text()
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
    run, plan, study = begin(tmp_path, tiny, "--trials", 4)
    task3.search(run, plan, study)
    splits = [job.split(tiny) for job in run.workers.jobs]
    assert len(splits) == 4
    assert all(split is splits[0] for split in splits)
    assert not set(splits[0].validation.tolist()) & set(splits[0].train.tolist())
    other = task3.make_plan(task3.parse_args(["--seed", "1", "--images", "64"]), tiny).trial.split(tiny)
    assert other.validation.tolist() != splits[0].validation.tolist()


class Untouchable:
    """A test set of which nothing may be used but the fact that it can be left out."""

    def __getitem__(self, key):
        assert key == slice(None, 0), "the test set was read before the selection was over"
        return torch.zeros(0)

    def __getattr__(self, name):
        raise AssertionError("the test set was read before the selection was over")


def test_the_test_set_is_not_touched_before_the_selection_is_over(tmp_path, monkeypatch, no_figures):
    fashion = common.load_dataset("fashion_mnist")
    guarded = replace(fashion, test_images=Untouchable(), test_labels=Untouchable())
    monkeypatch.setattr(common, "load_data", lambda _: guarded)
    monkeypatch.setattr(common, "Workers", Here)
    events, retrain = [], task3.retrain
    monkeypatch.setattr(task3, "retrain", lambda *args: events.append("selected") or retrain(*args))
    small = ["--trials", "2", "--audit", "1", "--images", "160", "--epochs", "2", "--workers", "1"]
    with pytest.raises(AssertionError, match="the test set was read"):
        task3.main(["--quick", *small, "--output-dir", str(tmp_path)])
    assert events == ["selected"]


OTHERS = ("--sampler", "QMCSampler", "--pruner", "hyperband"), ("--sampler", "CmaEsSampler", "--pruner", "none")


@pytest.mark.parametrize("options", [(), *OTHERS])
def test_same_seed_and_one_worker_give_the_same_trials(tiny, tmp_path, options):
    facts = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        study, stopped = take_part(tmp_path / str(number), tiny, "--trials", 8, *options)
        assert stopped is None
        facts.append([(t.state, t.value, t.params, t.intermediate_values) for t in study.trials])
    assert facts[0] == facts[1]
    assert len({str(params) for _, _, params, _ in facts[0]}) == 8
    assert all(len(epochs) >= 2 for *_, epochs in facts[0]) or "hyperband" in options  # of warm-up


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


def test_divergence_is_kept_with_its_reason(tiny, tmp_path):
    run, plan, study = begin(tmp_path, tiny, "--trials", 3)
    train, row = run.workers.run, {"epoch": 1, "train_loss": math.nan, "val_accuracy": 0.1, "seconds": 0.1}
    run.workers.run = lambda *args: (row for row in [row]) if study.trials[-1].number == 1 else train(*args)
    copy, _ = task3.search(run, plan, study)
    table = task3.trial_table(copy)
    assert table["state"][1] == "pruned"
    assert "diverged" in table["reason"][1]
    assert table["state"][2] in ("complete", "pruned")


@pytest.mark.parametrize(("deaths", "failed", "kept"), [(1, 1, True), (99, 4, False)])
def test_a_trial_whose_worker_dies_is_tried_again_but_not_for_ever(tiny, tmp_path, deaths, failed, kept):
    run, plan, study = begin(tmp_path, tiny, "--trials", 2, deaths=min(deaths, 4))
    copy, _ = task3.search(run, plan, study)
    table = task3.trial_table(copy)
    assert (table["state"] == "fail").sum() == failed
    assert table["reason"][0] == "its worker died; tried again as trial 1"
    finished = [trial.params for trial in copy.get_trials(states=task3.DONE)]
    assert (task3.TEXTBOOK in finished) is kept
    assert len(finished) == 2


def test_errors_in_every_trial_end_the_study(tiny, tmp_path):
    run, plan, study = begin(tmp_path, tiny, "--trials", 50)
    run.workers.run = lambda *_: (_ for _ in ()).throw(RuntimeError("no such thing"))
    copy, _ = task3.search(run, plan, study)
    assert 5 <= len(copy.trials) < 12
    assert {trial.user_attrs["reason"] for trial in copy.trials} == {"no such thing"}


def test_a_study_goes_on_that_was_often_killed_before_anything_was_finished(tiny, tmp_path):
    for _ in range(4):
        _, _, study = begin(tmp_path, tiny, "--trials", 1)
        for _ in range(2):
            study.ask()  # and no more is heard of it
    study, _ = take_part(tmp_path, tiny, "--trials", 1)
    assert len(study.get_trials(states=task3.DONE)) == 1


def test_an_audit_without_pruned_trials_says_so_and_ties_are_no_ranking(tiny, tmp_path):
    run, plan, study = begin(tmp_path, tiny, "--trials", 3, "--pruner", "none", "--audit", 4)
    copy, _ = task3.search(run, plan, study)
    audit = task3.run_audit(run, plan, copy)
    assert audit["audit"]["finished"] == 0
    counts = {"finished": 3, "pruned": 0, "complete": 3, "failed": 0}
    best = {"number": 0, "value": 0.5, "params": {}}
    results = {"machinery": [], "best": best, "n_trials": counts, "importances": {}, "interrupted": False} | audit
    text = " ".join(task3.conclude(plan, results))
    assert "no pruned trials" in text
    assert "interrupted" not in text
    assert "interrupted" in task3.conclude(plan, results | {"interrupted": True})[0]
    assert "Too few complete trials" in text
    ties = task3.conclude(plan, results | {"importances": {"a": 0.5, "b": 0.5}})
    assert "no difference in importance" in " ".join(ties)


def test_optunas_plots_are_drawn_into_the_labs_figures_and_nowhere_else(tiny, tmp_path):
    from matplotlib import pyplot

    run, plan, study = begin(tmp_path, tiny, "--trials", 3, "--pruner", "none")
    copy, _ = task3.search(run, plan, study)
    seen = {}

    @contextlib.contextmanager
    def figure(name, *arguments, **settings):
        with common.Run.figure(run, name, *arguments, **settings) as (drawing, axes):
            yield drawing, axes
            seen[name] = [label.get_text() for label in axes[0, 0].get_xticklabels()]

    run.figure, best = figure, {"number": 0, "value": 0.5}
    task3.draw_study(run, copy, {"n_trials": {"complete": 3, "pruned": 0}, "best": best, "importances": {}})
    assert "optimizer" in seen["parallel_coordinate.png"]
    assert len(seen) == 5
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
    return "--storage", f"sqlite:///{folder}/study.db?timeout=0.05"


def lock_after(run, path, trainings, seconds):
    train = run.workers.run

    def locked(*arguments):
        if len(run.workers.jobs) == trainings:
            lock(path, seconds)
        return train(*arguments)

    run.workers.run = locked


def test_a_database_that_is_locked_for_a_while_is_waited_for(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(task3, "RETRY_SECONDS", 0.1)
    run, plan, study = begin(tmp_path, tiny, "--trials", 4, *in_sqlite(tmp_path))
    lock_after(run, tmp_path / "study.db", 2, 0.6)
    copy, stopped = task3.search(run, plan, study)
    assert stopped is None
    assert [trial.state in task3.DONE for trial in copy.trials] == [True] * 4


def test_a_database_that_stays_away_is_one_line_and_keeps_what_is_finished(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(task3, "RETRY_SECONDS", 0.1)
    monkeypatch.setattr(task3, "PATIENCE_SECONDS", 0.5)
    run, plan, study = begin(tmp_path, tiny, "--trials", 9, *in_sqlite(tmp_path))
    lock_after(run, tmp_path / "study.db", 2, 30.0)
    copy, stopped = task3.search(run, plan, study)
    assert isinstance(stopped, UserError)
    assert "database is locked" in str(stopped)
    assert "\n" not in str(stopped)
    assert sum(trial.state in task3.DONE for trial in copy.trials) == 2


def test_tables_of_another_optuna_are_one_line_with_its_advice(tiny, tmp_path):
    begin(tmp_path, tiny, *in_sqlite(tmp_path))
    with contextlib.closing(sqlite3.connect(tmp_path / "study.db")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v3.0.0.d'")
        connection.execute("UPDATE version_info SET library_version = '3.6.1'")
        connection.commit()
    with pytest.raises(UserError, match=r"set up by optuna 3\.6\.1.*optuna storage upgrade --storage"):
        begin(tmp_path, tiny, *in_sqlite(tmp_path))


def test_fresh_keeps_an_old_study_in_a_database_but_not_while_others_work_on_it(tiny, tmp_path):
    _, _, study = begin(tmp_path, tiny, *in_sqlite(tmp_path))
    study._thread_local.in_optimize_loop = True  # as another machine's
    trial = study.ask()
    study._storage.record_heartbeat(trial._trial_id)
    with pytest.raises(UserError, match="1 trials of small-cnn are running; stop them, wait 60 s"):
        begin(tmp_path, tiny, "--fresh", *in_sqlite(tmp_path))
    study.tell(trial, 0.5)
    study.ask()  # and was killed before its first heartbeat
    with pytest.raises(UserError, match="1 trials of small-cnn are running; stop them, wait 60 s"):
        begin(tmp_path, tiny, "--fresh", *in_sqlite(tmp_path))
    with contextlib.closing(sqlite3.connect(tmp_path / "study.db")) as connection:
        connection.execute("UPDATE trials SET datetime_start = datetime('now', '-2 days') WHERE state = 'RUNNING'")
        connection.commit()
    _, _, fresh = begin(tmp_path, tiny, "--fresh", *in_sqlite(tmp_path))
    assert len(fresh.trials) == 1
    (old,) = set(optuna.get_all_study_names(study._storage)) - {task3.STUDY}
    assert optuna.load_study(study_name=old, storage=study._storage).trials[0].value == 0.5


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
    _, _, study = begin(tmp_path, tiny)
    assert len(study.trials) == len(load(tmp_path).trials) == 1


def test_seconds_are_those_of_training_whatever_the_clock_says(tiny, tmp_path):
    study, _ = take_part(tmp_path, tiny, "--trials", 2)
    slept = optuna.create_study(direction="maximize")
    for trial in study.trials:
        trial.datetime_complete += pd.Timedelta(hours=8)
        slept.add_trial(trial)
    assert task3.trial_table(slept)["seconds"].between(0, 30, inclusive="neither").all()
