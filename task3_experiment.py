"""Task 3 from the options to the files; ``task3_optuna.py`` states the protocol and runs it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import torch
from optuna.trial import TrialState
from tqdm import tqdm

import common
import task3_report as reporting
import task3_study as studies
from common import UserError
from task3_study import Plan, Row, default_params, settings_of, split

RETRAIN_SEED = 1_000_000  # added to --seed: far from the seeds of any trial
TRIAL_PICTURES = 22_500  # of a trial's training: more trials, and more epochs each, for the same time
QUICK_PICTURES = 600
RETRAIN = ("configuration", "schedule", "seed", "validation_accuracy", "test_accuracy")  # columns of retrain.csv
AUDIT = ("number", "epochs_run", "value_when_pruned", "value_finished", "best_value", "would_have_won")


def tune(
    *,
    trials: int,
    timeout: float,
    sampler: str,
    pruner: str,
    storage: str | None,
    fresh: bool,
    retrain_seeds: int,
    control: bool,
    audit: int,
    dataset: str | None,
    data_dir: Path,
    output_dir: Path,
    epochs: int,
    batch_size: int,
    width: int,
    seed: int,
    device: str,
    precision: str,
    workers: int,
    quick: bool,
) -> int:
    """The experiment, from the options to the files."""
    options, start = dict(locals()), time.perf_counter()
    studies.quiet_optuna()
    limit = QUICK_PICTURES if quick else None
    if quick:
        trials, retrain_seeds, audit, epochs = min(trials, 8), min(retrain_seeds, 2), min(audit, 2), min(epochs, 3)
        batch_size = min(batch_size, 128)
    runtime = common.make_runtime(device, precision, 1)
    recipe = common.Recipe(width=width, stem_stride=2, batch_size=batch_size, epochs=epochs)
    pictures = common.load_dataset_or_fallback(dataset, data_dir)
    common.make_model(pictures, recipe)  # better refused here than in every trial
    recipe = replace(recipe, width=16) if quick else recipe
    unseen = replace(pictures, test_images=pictures.test_images[:0], test_labels=pictures.test_labels[:0])
    with common.output_directory(output_dir) as output, common.shared_dataset(unseen) as data:  # no test set there
        journal, used = str(output / "study.log"), limit or TRIAL_PICTURES
        plan = Plan(storage or journal, "small-cnn", sampler, pruner, seed, trials, recipe, used)
        study = studies.prepare_study(plan, unseen, fresh)
        print(f"{pictures.source}; {runtime.device}, {runtime.precision}, {workers} processes of one thread")
        interrupted = False
        try:
            studies.search(study, plan, data, runtime, workers, timeout)
        except KeyboardInterrupt:
            interrupted = True
        facts = {"task": "task3", "dataset": pictures.name, "sampler": sampler, "pruner": pruner, "seed": seed}
        summary = facts | reporting.report_study(output, study, pictures.source)
        try:
            if summary["best"] and not interrupted:
                if control:
                    rival = run_control(study, unseen, plan, data, runtime, workers)
                    summary["control"] = reporting.draw_control(output, study, rival, plan.sampler, pictures.source)
                if audit:
                    rows, summary["audit"] = run_audit(study, data, plan, runtime, workers, audit)
                    common.write_csv(output / "audit.csv", rows, AUDIT)
                if retrain_seeds:
                    jobs = retraining_jobs(study.best_params, plan, retrain_seeds, limit)
                    run_jobs(jobs, data, runtime, workers, "retraining")
                    common.make_runtime(device, precision, workers)  # the workers are gone: all cores for what follows
                    test_once(pictures, jobs, runtime, limit)
                    summary |= judge(jobs, study.best_value)
                    common.write_csv(output / "retrain.csv", jobs, RETRAIN)
                    save_best(output / "best_model.pth", pictures, jobs)
        except KeyboardInterrupt:
            interrupted = True
        options["storage"] = studies.without_password(plan.storage)
        common.write_json(output / "config.json", options)
        common.write_json(output / "environment.json", common.environment(runtime))
        reporting.report(output, summary)
        common.finish(output, summary | {"interrupted": interrupted, "wall_seconds": time.perf_counter() - start})
        if interrupted:
            raise KeyboardInterrupt
        if not summary["best"]:
            raise UserError(f"no trial was completed in {timeout:g} s: give a longer --timeout")
    return 0


# ---------------------------------------------------------------- the truth: fresh seeds, then the test set


def train_network(
    data: Path, recipe: common.Recipe, runtime: common.Runtime, seed: int, pictures: int | None, with_validation: bool
) -> Row:
    """Train one network on at most ``pictures`` training pictures, or on the validation pictures as well."""
    dataset = common.open_shared(data)
    train_index, validation_index = split(dataset, pictures)
    if with_validation:
        train_index = torch.cat([train_index, validation_index])
    model = common.make_model(dataset, recipe, seed)
    torch.manual_seed(seed)  # dropout draws from torch's global generator
    common.fit(model, dataset, recipe, runtime, train_index=train_index, seed=seed)
    _, accuracy = common.evaluate(model, dataset.train_images, dataset.train_labels, runtime, validation_index)
    weights = {key: value.numpy() for key, value in model.cpu().state_dict().items()}
    return {"weights": weights, "validation_accuracy": None if with_validation else accuracy}


def run_jobs(jobs: list[Row], data: Path, runtime: common.Runtime, workers: int, title: str) -> None:
    """``train_network`` for every job (keys: recipe, seed, pictures, with_validation); adds the results to the jobs."""
    order = [(data, job["recipe"], runtime, job["seed"], job["pictures"], job["with_validation"]) for job in jobs]
    with tqdm(total=len(jobs), desc=title, unit="network", disable=None) as bar:
        for number, result in common.run_parallel(train_network, order, workers, runtime):
            jobs[number] |= result
            bar.update()


def retraining_jobs(best: Row, plan: Plan, seeds: int, limit: int | None) -> list[Row]:
    """Best and default configuration, as the study trains and with the full schedule, ``seeds`` times each.

    The study trains fast networks, whose stem has stride 2. Full schedule: the project's own stem, width and epochs,
    on all training and validation pictures (at most ``limit`` of each). Both configurations get the same seeds, hence
    the same initial weights and batches: their difference is paired.
    """
    own, full = common.Recipe(), plan.recipe
    if limit is None:
        size: Row = {"width": max(own.width, full.width), "stem_stride": own.stem_stride}
        full = replace(full, epochs=max(own.epochs, full.epochs), **size)
    schedules = {"full": (full, limit, True), "study": (plan.recipe, plan.pictures, False)}
    return [
        {"configuration": configuration, "schedule": schedule, "seed": plan.seed + RETRAIN_SEED + number}
        | {"recipe": replace(recipe, **settings_of(params)), "pictures": pictures, "with_validation": everything}
        for number in range(seeds)  # the first seeds of everything come first, for whoever interrupts
        for schedule, (recipe, pictures, everything) in schedules.items()
        for configuration, params in (("best", best), ("default", default_params()))
    ]


def test_once(dataset: common.Dataset, jobs: list[Row], runtime: common.Runtime, pictures: int | None) -> None:
    """Read the test set, once, for all retrained networks."""
    test_index = common.subset(torch.arange(len(dataset.test_labels)), pictures)
    for job in tqdm(jobs, desc="test", unit="network", disable=None):
        model = rebuild(dataset, job)
        _, job["test_accuracy"] = common.evaluate(model, dataset.test_images, dataset.test_labels, runtime, test_index)


def rebuild(dataset: common.Dataset, job: Row) -> common.SmallCNN:
    """The trained network of ``job``."""
    model = common.make_model(dataset, job["recipe"])
    model.load_state_dict({key: torch.from_numpy(value) for key, value in job["weights"].items()})
    return model


def save_best(path: Path, dataset: common.Dataset, jobs: list[Row]) -> None:
    """Save the best configuration's network of the first seed: choosing among seeds would be using the test set."""
    job = next(job for job in jobs if (job["configuration"], job["schedule"]) == ("best", "full"))
    facts = {"seed": job["seed"], "test_accuracy": job["test_accuracy"]}
    common.save_checkpoint(path, rebuild(dataset, job), dataset, job["recipe"], **facts)


def judge(jobs: list[Row], study_value: float) -> Row:
    """Accuracies by configuration and schedule, what tuning bought, and how optimistic the study was."""

    def values(configuration: str, schedule: str, metric: str = "test_accuracy") -> list[float]:
        return [j[metric] for j in jobs if (j["configuration"], j["schedule"]) == (configuration, schedule)]

    truth: Row = {}
    for schedule, suffix in (("full", ""), ("study", "_study_schedule")):
        for configuration in ("best", "default"):
            accuracies = values(configuration, schedule)
            sd = float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else None
            truth[configuration + suffix] = {
                "test_accuracy": {
                    "mean": float(np.mean(accuracies)),
                    "sd": sd,
                    "n": len(accuracies),
                    "values": accuracies,
                }
            }
        mean, low, high = common.interval(np.subtract(values("best", schedule), values("default", schedule)).tolist())
        truth["difference" + suffix] = {"mean": mean, "ci_low": low, "ci_high": high, "n": len(accuracies)}
    again = float(np.mean(values("best", "study", "validation_accuracy")))
    tested = truth["best_study_schedule"]["test_accuracy"]["mean"]
    optimism = {
        "study_value": study_value,
        "fresh_seeds_validation": again,
        "fresh_seeds_test": tested,
        "winners_curse": study_value - again,
        "optimism": study_value - tested,
    }
    return {"retrain": truth, "optimism": optimism}


def run_audit(
    study: optuna.Study, data: Path, plan: Plan, runtime: common.Runtime, workers: int, count: int
) -> tuple[list[Row], Row]:
    """Train ``count`` pruned trials, drawn by chance, to their end, each from its own seed; (rows, verdict)."""
    from scipy.stats import binomtest

    pruned = [t for t in study.get_trials(states=(TrialState.PRUNED,)) if t.value is not None]
    chosen = np.random.default_rng(plan.seed).permutation(len(pruned))[:count]
    trials = [pruned[position] for position in sorted(chosen)]
    jobs = [
        {"recipe": replace(plan.recipe, **settings_of(trial.params)), "seed": plan.seed + trial.number}
        | {"pictures": plan.pictures, "with_validation": False}
        for trial in trials
    ]
    run_jobs(jobs, data, runtime, workers, "audit")
    rows = [
        {"number": trial.number, "epochs_run": len(trial.intermediate_values), "value_when_pruned": trial.value}
        | {"value_finished": job["validation_accuracy"], "best_value": study.best_value}
        | {"would_have_won": job["validation_accuracy"] > study.best_value}
        for trial, job in zip(trials, jobs, strict=True)
    ]
    wrong = sum(row["would_have_won"] for row in rows)
    bound = float(binomtest(wrong, len(rows)).proportion_ci(0.95).high) if rows else None
    return rows, {"finished": len(rows), "would_have_won": wrong, "share_ci_high": bound}


def run_control(
    study: optuna.Study, dataset: common.Dataset, plan: Plan, data: Path, runtime: common.Runtime, workers: int
) -> optuna.Study:
    """Random search with the same pruner, until it has cost as many seconds of training as the study."""
    plan = replace(plan, sampler="random", study_name=plan.study_name + studies.CONTROL, trials=10 * plan.trials)
    control = studies.prepare_study(plan, dataset, fresh=False)
    left = (reporting.best_so_far(study)[0][-1] - ([0.0, *reporting.best_so_far(control)[0]])[-1]) / workers
    if left > 0:  # a study with --quick costs less than its workers take to start
        studies.search(control, plan, data, runtime, workers, max(left, 2.0))
    return control
