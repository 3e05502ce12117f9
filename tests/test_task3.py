"""Task 3: the study's results, resumption, kills, fixed validation pictures, the untouched test set, bad input."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import torch
from conftest import last_json, load, read_trials, run, take_part, tiny_plan
from optuna.trial import TrialState

import common
import task3_experiment
import task3_optuna
import task3_report
import task3_study as studies
from common import UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
    pytest.mark.filterwarnings("ignore:Fixed parameter"),  # of the test that provokes a divergence
]
SCRIPT = "task3_optuna.py"
OPTIONS = ("--dataset", "fashion_mnist", "--quick", "--workers", "2")


# ---------------------------------------------------------------- one whole run, asked many questions


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task3")
    process = run(SCRIPT, *OPTIONS, "--control", "--audit", 2, "--retrain-seeds", 2, "--output-dir", folder)
    assert process.returncode == 0, process.stderr
    return process, folder, json.loads((folder / "summary.json").read_text())


def test_the_last_line_is_the_summary(result):
    process, _, summary = result
    assert last_json(process.stdout) == summary
    assert summary["dataset"] == "fashion_mnist"
    assert summary["interrupted"] is False


def test_all_files_are_written_and_nothing_else_is_on_the_console(result):
    process, folder, _ = result
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    expected = "study.log trials.csv best_params.json best_model.pth summary.json retrain.csv control.png audit.csv"
    expected += " config.json environment.json report.md optimization_history.png intermediate_values.png"
    assert set(expected.split()) | {"parallel_coordinate.png", "slice.png"} <= names
    assert process.stderr == ""  # no warnings, no log, no progress bar without a terminal


def test_the_statistics_have_the_original_form(result):
    process, _, summary = result
    form = (
        r"Study statistics:\n    Number of finished trials:  8\n    Number of pruned trials:  (\d)\n"
        r"    Number of complete trials:  (\d)\nBest trial:\n    Value:  (0\.\d+)\n    Params:\n"
        r"((?:        \w+: \S+\n)+)"
    )
    found = re.search(form, process.stdout)
    assert found, process.stdout
    assert int(found[1]) + int(found[2]) == 8 == summary["n_trials"]["finished"]
    assert float(found[3]) == summary["best"]["value"]
    assert {"dropout", "optimizer", "lr"} <= set(re.findall(r"(\w+):", found[4]))


def test_trials_csv_holds_every_trial(result):
    _, folder, summary = result
    rows = read_trials(folder)
    assert [int(row["number"]) for row in rows] == list(range(8))
    complete = [row for row in rows if row["state"] == "complete"]
    assert max(float(row["value"]) for row in complete) == summary["best"]["value"]
    for row in rows:
        assert row["worker"]
        assert float(row["seconds"]) > 0
        assert (row["state"] == "complete") == (row["epochs_run"] == "3") == (row["reason"] == "")


def test_trial_0_is_the_default_configuration(result):
    _, folder, _ = result
    first, recipe = read_trials(folder)[0], common.Recipe()
    assert first["param_optimizer"] == recipe.optimizer
    for name in ("lr", "weight_decay", "dropout", "label_smoothing", "crop_padding"):
        assert float(first[f"param_{name}"]) == pytest.approx(getattr(recipe, name))


def test_the_saved_model_is_the_best_configuration_and_has_the_accuracy_it_claims(result, fashion, runtime):
    _, folder, summary = result
    model, facts = common.load_checkpoint(folder / "best_model.pth")
    best = json.loads((folder / "best_params.json").read_text())
    assert {name: facts["recipe"][name] for name in best} == best == summary["best"]["params"]
    index = common.subset(torch.arange(10_000), task3_experiment.QUICK_PICTURES)
    _, accuracy = common.evaluate(model, fashion.test_images, fashion.test_labels, runtime, index)
    assert accuracy == pytest.approx(facts["test_accuracy"], abs=0.01)  # bf16 there, fp32 here
    assert facts["test_accuracy"] == summary["retrain"]["best"]["test_accuracy"]["values"][0]


def test_the_truth_adds_up(result):
    _, _, summary = result
    truth, optimism = summary["retrain"], summary["optimism"]
    for suffix in ("", "_study_schedule"):
        best, default = (truth[name + suffix]["test_accuracy"] for name in ("best", "default"))
        assert best["n"] == default["n"] == len(best["values"]) == 2
        difference = truth["difference" + suffix]
        assert difference["mean"] == pytest.approx(best["mean"] - default["mean"])
        assert difference["ci_low"] <= difference["mean"] <= difference["ci_high"]
    tested = truth["best_study_schedule"]["test_accuracy"]["mean"]
    assert optimism["optimism"] == pytest.approx(summary["best"]["value"] - tested)


def test_the_control_is_random_search_in_a_study_of_its_own(result):
    _, folder, summary = result
    assert load(folder, "small-cnn-random").trials
    assert len(summary["control"]["best_at_equal_cost"]) == 2


def test_a_control_without_a_trial_is_drawn_and_has_no_value(tiny, runtime, tmp_path):
    study = take_part(tiny_plan(tmp_path, trials=1), tiny, runtime)
    control = task3_report.draw_control(tmp_path, study, optuna.create_study(), "tpe", "source")
    values = control["best_at_equal_cost"]
    assert values["study (tpe)"] == study.best_value
    assert math.isnan(values["random control"])
    assert (tmp_path / "control.png").stat().st_size > 100


def test_resuming_adds_to_the_count_and_repeats_nothing(result, tmp_path, capsys):
    _, folder, _ = result
    copy = shutil.copytree(folder, tmp_path / "copy")
    before = read_trials(copy)
    with (copy / "study.log").open("ab") as stream:  # and a kill has left half a line
        stream.write(b'{"op_code":5,"worker_id":"half')
    plan = tiny_plan(copy)
    studies.repair_journal(Path(plan.storage))
    assert (copy / "study.log.damaged").read_bytes() == b'{"op_code":5,"worker_id":"half\n'
    assert len(load(copy).trials) == 8
    (copy / "study.log").write_bytes((folder / "study.log").read_bytes() + b'{"op_co')
    again = [*OPTIONS, "--trials", "8", "--retrain-seeds", "0", "--output-dir", str(copy)]
    assert task3_optuna.main(again) == 0
    assert "half-written line" in capsys.readouterr().err
    assert read_trials(copy) == before  # the total was reached before


def test_a_changed_study_is_refused_and_fresh_moves_it_aside(result, tmp_path, capsys):
    _, folder, _ = result
    copy = shutil.copytree(folder, tmp_path / "copy")
    options = [*OPTIONS, "--retrain-seeds", "0", "--output-dir", str(copy)]
    assert task3_optuna.main([*options, "--batch-size", "64"]) == 2
    message = capsys.readouterr().err.strip()
    assert "batch_size: 128, now 64" in message
    assert "--fresh" in message
    content = (copy / "study.log").read_bytes()
    assert content.startswith((folder / "study.log").read_bytes())
    studies.move_aside(tiny_plan(copy))
    (old,) = copy.glob("study-*.log")
    assert old.read_bytes() == content
    assert not (copy / "study.log").exists()


# ---------------------------------------------------------------- honesty


def test_every_trial_is_judged_on_the_same_pictures(tiny, runtime, tmp_path, monkeypatch):
    seen, fit = [], common.fit

    def spy(*args, **options):
        seen.append(options["validation_index"])
        return fit(*args, **options)

    monkeypatch.setattr(common, "fit", spy)
    take_part(tiny_plan(tmp_path, trials=4), tiny, runtime)
    assert len(seen) == 4
    assert all(index is seen[0] for index in seen)
    train_index, validation_index = common.split_validation(tiny.train_labels)
    assert torch.equal(seen[0], validation_index)
    assert not set(seen[0].tolist()) & set(train_index.tolist())


class Untouchable:
    """A test set of which nothing may be used but the fact that it can be left out."""

    def __getitem__(self, key):
        assert key == slice(None, 0), "the test set was read before the selection was over"
        return torch.zeros(0)

    def __len__(self):
        raise AssertionError("the test set was read before the selection was over")

    def __getattr__(self, name):
        return len(self)


def test_the_test_set_is_not_touched_before_the_selection_is_over(fashion, tmp_path, monkeypatch):
    guarded = replace(fashion, test_images=Untouchable(), test_labels=Untouchable())
    monkeypatch.setattr(common, "load_dataset_or_fallback", lambda *_: guarded)
    handed_over, shared = [], common.shared_dataset
    monkeypatch.setattr(common, "shared_dataset", lambda dataset: handed_over.append(dataset) or shared(dataset))
    options = ["--quick", "--workers", "1", "--trials", "2", "--output-dir", str(tmp_path)]
    assert task3_optuna.main([*options, "--retrain-seeds", "0"]) == 0
    assert [len(dataset.test_images) for dataset in handed_over] == [0]  # the workers cannot even see it
    with pytest.raises(AssertionError, match="the test set was read"):
        task3_experiment.test_once(guarded, [], common.make_runtime("cpu", "fp32", 1), None)


@pytest.mark.parametrize(("sampler", "pruner"), [("tpe", "median"), ("random", "hyperband")])
def test_same_seed_and_one_worker_give_the_same_trials(tiny, runtime, tmp_path, sampler, pruner):
    facts = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        plan = tiny_plan(tmp_path / str(number), sampler=sampler, pruner=pruner, trials=8)
        trials = take_part(plan, tiny, runtime).trials
        facts.append([(t.state, t.value, t.params, t.intermediate_values) for t in trials])
    assert facts[0] == facts[1]
    assert len(facts[0]) == 8
    assert {state for state, *_ in facts[0]} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert len({str(params) for _, _, params, _ in facts[0]}) == 8


def test_a_resumed_study_draws_new_configurations(tiny, runtime, tmp_path):
    for trials in (3, 6):
        study = take_part(tiny_plan(tmp_path, trials=trials, sampler="random"), tiny, runtime)
    assert len(study.trials) == 6
    assert len({str(trial.params) for trial in study.trials}) == 6


# ---------------------------------------------------------------- failures of a trial


def test_divergence_and_errors_are_kept_with_their_reason(tiny, runtime, tmp_path):
    plan = tiny_plan(tmp_path, trials=4)
    study = studies.prepare_study(plan, tiny, fresh=False)
    wild = {"optimizer": common.Recipe.optimizer, "lr_scale": 1e30, "weight_decay": 1e-5}
    study.enqueue_trial(wild)
    study.enqueue_trial({"crop_padding": 1000})
    study = take_part(plan, tiny, runtime)
    diverged, broken = study.trials[1:3]
    assert diverged.state == TrialState.PRUNED
    assert "diverged" in diverged.user_attrs["reason"]
    assert broken.state == TrialState.FAIL
    assert broken.user_attrs["reason"]
    assert study.trials[3].state.is_finished()


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sampler", "magic"], ["--sampler", "tpe"]),
        (["--trials", "0"], ["--trials", "at least 1"]),
        (["--timeout", "-3"], ["--timeout", "positive"]),
        (["--timeout", "nan"], ["--timeout", "positive"]),
        (["--audit", "-1"], ["--audit"]),
        (["--storage", "postgresql://user:secret@127.0.0.1:1/nowhere"], ["cannot be reached", "user:***@"]),
        (["--storage", "magic://user:secret@host/db"], ["is no database URL"]),
        (["--storage", "sqlite:////nowhere/at/all.db"], ["cannot be reached"]),
        (["--width", "20"], ["multiple of 16"]),
        (["--dataset", "no/such/folder"], ["no/such/folder"]),
    ],
)
def test_bad_input_gets_one_clear_line(options, words, tmp_path, capsys):
    if "postgresql" in options[-1]:
        pytest.importorskip("psycopg")
    arguments = ["--dataset", "fashion_mnist", "--quick", *options, "--output-dir", str(tmp_path / "out")]
    try:
        status = task3_optuna.main(arguments)
    except SystemExit as exit:  # argparse
        status = exit.code
    captured = capsys.readouterr()
    message = captured.err.strip().splitlines()[-1]
    assert status == 2
    assert all(word in message for word in words), message
    assert "secret" not in captured.err + captured.out
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("content", [b"not a journal\n", b"not even a line", b'{"a": 1}\n{"b": 2}\n', b"\x00\xff" * 99])
def test_a_file_that_is_no_journal_is_refused_and_left_alone(content, tmp_path):
    path = tmp_path / "study.log"
    path.write_bytes(content)
    with pytest.raises(UserError, match="no Optuna journal"):
        studies.repair_journal(path)
    assert path.read_bytes() == content


def test_a_journal_damaged_in_the_middle_is_refused(tiny, tmp_path):
    plan = tiny_plan(tmp_path)
    studies.prepare_study(plan, tiny, fresh=False)
    path = Path(plan.storage)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[1][:20] + lines[2], *lines[1:]]))
    with pytest.raises(UserError, match="line 2"):
        studies.repair_journal(path)


def test_fresh_keeps_an_old_study_in_a_database_under_another_name(tiny, tmp_path):
    plan = tiny_plan(tmp_path, storage=f"sqlite:///{tmp_path}/study.db")
    studies.prepare_study(plan, tiny, fresh=False).enqueue_trial({"dropout": 0.5})
    study = studies.prepare_study(plan, tiny, fresh=True)
    assert len(study.trials) == 1  # the default configuration
    storage = studies.open_storage(plan.storage)
    (old,) = set(optuna.get_all_study_names(storage)) - {"small-cnn"}
    assert len(optuna.load_study(study_name=old, storage=storage).trials) == 2


def test_two_runs_do_not_share_a_folder(tmp_path, capsys):
    hold = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"
    command = [sys.executable, "-c", hold, str(tmp_path / ".lock")]  # a process of its own, as another run is
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        assert task3_optuna.main([*OPTIONS, "--output-dir", str(tmp_path)]) == 2
        other.communicate("\n")
    message = capsys.readouterr().err
    assert message.startswith("error: another run")
    assert message.count("\n") == 1
