"""Task 2, from the options to the files; ``task2_optimizers.py`` states the protocol and runs it."""

from __future__ import annotations

import functools
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import common
import task2_report as reporting
from common import UserError
from task2_claims import accuracy_by_rate, judge_claims
from task2_report import RUN, Row

SWEEP_SEED, FINAL_SEED = 1000, 2000  # added to --seed: the final runs are never judged on the seeds that chose
SWEEP_SEEDS = 5
SWEEP_SHARE = 5  # a sweep run sees a fifth of the pictures: what is bought is many rates, not long runs
MAX_EXTENSIONS = 6  # of the learning-rate grid, at each end
TIMING = {"processes": 6, "spawned": True, "at_once": 1, "turns": 4, "steps": 25}  # one more turn warms up, before them
QUICK_TIMING = {"processes": 2, "spawned": False, "at_once": 2, "turns": 1, "steps": 3}
QUICK_PICTURES = 300
SMALL_BATCH = 16
NETWORK: dict[str, Any] = {"stem_stride": 2, "growth": (2, 4)}  # two stages: little arithmetic, yet above 0.91
GAP_PICTURES = 10_000  # training pictures on which the gap between training and test accuracy is measured

Run = Callable[[list[Row], str], Iterator[tuple[Row, Row]]]  # (jobs, title) -> (job, result) as they end


def compare_optimizers(
    *,
    optimizers: list[str],
    seeds: int,
    sweep_epochs: int,
    lr_grid: list[float],
    noise: list[float],
    schedule: str,
    dataset: str,
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
    check_options(optimizers, lr_grid, noise)
    sweep_seeds, timing, limit = SWEEP_SEEDS, TIMING, None
    if quick:
        sweep_seeds, limit, seeds, epochs = 2, QUICK_PICTURES, min(seeds, 2), min(epochs, 2)
        timing = QUICK_TIMING
        lr_grid, noise = sorted(lr_grid)[:: max(1, len(lr_grid) // 4)], noise[:1]
    runtime = common.make_runtime(device, precision, 1)
    base = common.Recipe(width=width, batch_size=batch_size, epochs=epochs, schedule=schedule)
    base = replace(base, **NETWORK, weight_decay=0.0, label_smoothing=0.0, crop_padding=0)
    pictures = common.load_dataset(dataset, data_dir)
    check_optimizers(optimizers, pictures, base)
    rows: dict[str, list[Row]] = {"sweep": [], "history": [], "small_batch": [], "step_time": []}
    unseen = replace(pictures, test_images=pictures.test_images[:0], test_labels=pictures.test_labels[:0])
    with common.output_directory(output_dir) as output, common.shared_dataset(unseen) as data:  # no test set there
        print(f"{pictures.source}; {runtime.device}, {runtime.precision}, {workers} processes of one thread")
        share = (limit or len(pictures.train_labels)) // SWEEP_SHARE
        try:
            with common.worker_pool(workers, runtime) as parallel:
                run = functools.partial(run_jobs, parallel, data, runtime, limit)
                sweep = functools.partial(run_jobs, parallel, data, runtime, limit or share)
                short = replace(base, epochs=sweep_epochs)
                tuned = sweep_rates(sweep, optimizers, lr_grid, short, seed + SWEEP_SEED, sweep_seeds, rows["sweep"])
                save_unfinished(output / "interrupted", rows)
                rates = {(name, "default"): default_rate(name) for name in optimizers}
                rates |= {(name, "tuned"): rate for name, rate in tuned.items()}
                fresh = range(seed + FINAL_SEED, seed + FINAL_SEED + seeds)
                results = converge(run, rates, base, fresh, noise, rows["history"])
                save_unfinished(output / "interrupted", rows)
                try_small_batches(run, tuned, base, fresh, share, rows["small_batch"])
                save_unfinished(output / "interrupted", rows)
            time_steps(data, tuned, base, runtime, timing, rows["step_time"])
        except KeyboardInterrupt:
            save_unfinished(output / "interrupted", rows)
            done = f"{len(rows['sweep'])} sweep runs and {len(rows['history'])} epochs"
            print(f"{done} are saved in {output / 'interrupted'}", file=sys.stderr)
            raise
        common.make_runtime(device, precision, workers)  # the workers are gone: all cores for what follows
        rows["test"] = test_once(pictures, results, base, runtime, limit)
        rows["step_loss"] = [
            dict(zip(RUN, run, strict=True)) | {"step": step, "train_loss": loss}
            for run, result in sorted(results.items())
            for step, loss in enumerate(result["losses"], start=1)
        ]
        claims = judge_claims(optimizers, rows, math.log(len(pictures.classes)))
        summary = reporting.summarise(rates, rows)
        used = f"{min(limit or math.inf, len(pictures.train_labels)):,} pictures"
        where = f"{pictures.source}, {schedule.replace('_', '-')} rates, {used}"
        for name, content in rows.items():
            common.write_csv(output / f"{name}.csv", content)
        shutil.rmtree(output / "interrupted", ignore_errors=True)
        names = reporting.draw(output, rows, results, rates, summary, where, seeds)
        common.write_json(output / "config.json", options)
        common.write_json(output / "environment.json", common.environment(runtime))
        reporting.report(output / "report.md", where, summary, claims, optimizers, names)
        facts = {"task": "task2", "dataset": pictures.name, "source": pictures.source, "optimizers": summary}
        common.finish(output, facts | {"claims": claims, "wall_seconds": time.perf_counter() - start})
    return 0


def check_options(optimizers: list[str], lr_grid: list[float], noise: list[float]) -> None:
    """Refuse options that cannot be meant, before anything is written."""
    if len(set(optimizers)) != len(optimizers) or len(optimizers) < 2:
        raise UserError(f"--optimizers {' '.join(optimizers)}: name two or more different ones")
    for name in optimizers:
        common.optimizer_class(name)
    if not all(math.isfinite(rate) and rate > 0 for rate in lr_grid) or len(set(lr_grid)) < 2:
        raise UserError(f"--lr-grid {' '.join(map(str, lr_grid))}: give two or more different positive numbers")
    if not all(0 < level < 1 for level in noise):
        raise UserError(f"--noise {' '.join(map(str, noise))}: a share of wrong labels lies between 0 and 1")


def check_optimizers(optimizers: list[str], pictures: common.Dataset, base: common.Recipe) -> None:
    """Let every optimizer take one step: better refused here than in the middle of the experiment."""
    for name in optimizers:
        model = common.make_model(pictures, base)
        optimizer = common.make_optimizer(name, model, base.lr)
        model(torch.rand(2, *pictures.train_images.shape[1:])).sum().backward()
        try:
            optimizer.step()
        except (TypeError, RuntimeError, ValueError) as error:
            raise UserError(f"optimizer {name} cannot train this model: {common.first_line(error)}") from None


# ---------------------------------------------------------------- one training run, in a worker process


def flip_labels(labels: torch.Tensor, share: float, num_classes: int, seed: int) -> torch.Tensor:
    """``labels`` (N,) int64 with exactly round(share * N) of them changed to another class, by chance."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    offset = torch.randint(1, num_classes, (len(wrong),), generator=generator)
    noisy = labels.clone()
    noisy[wrong] = (noisy[wrong] + offset) % num_classes
    return noisy


def train_run(
    data: Path, recipe: common.Recipe, runtime: common.Runtime, seed: int, pictures: int | None, label_noise: float
) -> Row:
    """Train one network; returns its history, the loss of every step, its weights, and whether it diverged.

    ``pictures`` limits the training set. Diverged: the loss is not finite; or it shot up to more than twice the
    first step's and, in the last tenth of the steps, is not even a fifth below that first one.
    """
    dataset = common.open_shared(data)
    train_index, validation_index = common.split_validation(dataset.train_labels)
    train_index, validation_index = common.subset(train_index, pictures), common.subset(validation_index, pictures)
    labels = dataset.train_labels.clone()
    labels[train_index] = flip_labels(labels[train_index], label_noise, len(dataset.classes), seed)
    model = common.make_model(dataset, recipe, seed)
    fit = functools.partial(common.fit, train_index=train_index, validation_index=validation_index, labels=labels)
    history, losses = fit(model, dataset, recipe, runtime, seed=seed)
    end = float(np.mean(losses[-max(1, len(losses) // 10) :]))
    return {
        "history": history,
        "losses": losses,
        "weights": {key: value.numpy() for key, value in model.cpu().state_dict().items()},
        "diverged": not math.isfinite(end) or (max(losses) > 2 * losses[0] and end > 0.8 * losses[0]),
    }


# ---------------------------------------------------------------- the steps of the experiment


def run_jobs(
    parallel: common.Parallel, data: Path, runtime: common.Runtime, pictures: int | None, jobs: list[Row], title: str
) -> Iterator[tuple[Row, Row]]:
    """Train every job (keys: recipe, seed, and optionally pictures, label_noise) in parallel processes."""
    order = [
        (data, job["recipe"], runtime, job["seed"], job.get("pictures", pictures), job.get("label_noise", 0.0))
        for job in jobs
    ]
    with tqdm(total=len(jobs), desc=title, unit="run", disable=None) as bar:
        for number, result in parallel(train_run, order):
            bar.update()
            yield jobs[number], result


def sweep_rates(
    run: Run, optimizers: list[str], grid: list[float], base: common.Recipe, seed: int, seeds: int, rows: list[Row]
) -> dict[str, float]:
    """Step 1: validate every learning rate for every optimizer; returns the best one of each.

    The grid grows, for all optimizers alike, as long as somebody's best rate lies on its edge, or one that is within
    the widest of the ranges that are judged: cut off by the edge, it would seem narrower than it is.
    """
    pending, grid = sorted(set(grid)), sorted(set(grid))
    for _ in range(1 + MAX_EXTENSIONS):
        jobs = [
            {"optimizer": name, "lr": rate, "seed": seed + number, "recipe": replace(base, optimizer=name, lr=rate)}
            for name in optimizers
            for rate in pending
            for number in range(seeds)
        ]
        for job, result in run(jobs, "1 learning rates"):
            last = result["history"][-1]
            rows.append(
                {key: job[key] for key in ("optimizer", "lr", "seed")}
                | {"val_loss": last["val_loss"], "val_accuracy": last["val_accuracy"], "diverged": result["diverged"]}
            )
        best = {name: best_rate(rows, name) for name in optimizers}
        good = set(best.values()).union(*(good_rates(rows, name) for name in optimizers))
        pending = []
        if grid[-1] in good:
            pending.append(float(f"{grid[-1] ** 2 / grid[-2]:.3g}"))
        if grid[0] in good:
            pending.append(float(f"{grid[0] ** 2 / grid[1]:.3g}"))
        if not pending:
            break
        grid = sorted(grid + pending)
    else:
        low, high = min(row["lr"] for row in rows), max(row["lr"] for row in rows)
        print(f"good rates go on beyond {low:g} to {high:g}: ranges are at least so wide", file=sys.stderr)
    rows.sort(key=lambda row: (optimizers.index(row["optimizer"]), row["lr"], row["seed"]))
    for row in rows:
        if row["diverged"] and row["lr"] == best[row["optimizer"]]:
            raise UserError(f"{row['optimizer']} diverged down to {row['lr']:g}: give a lower --lr-grid")
    return best


def mean_by_rate(rows: list[Row], optimizer: str) -> dict[float, float]:
    """Mean validation accuracy over the seeds at every learning rate."""
    return {rate: float(np.mean(values)) for rate, values in accuracy_by_rate(rows, optimizer).items()}


def good_rates(rows: list[Row], optimizer: str) -> set[float]:
    """The learning rates whose mean validation accuracy is at most 5 points below the best one's."""
    means = mean_by_rate(rows, optimizer)
    return {rate for rate, mean in means.items() if mean >= max(means.values()) - 0.05}


def best_rate(rows: list[Row], optimizer: str) -> float:
    """The learning rate of the highest mean validation accuracy among those where no seed diverged.

    The lowest one where all diverged: the grid then grows downwards.
    """
    diverged = {row["lr"] for row in rows if row["optimizer"] == optimizer and row["diverged"]}
    means = mean_by_rate(rows, optimizer)
    return max((rate for rate in means if rate not in diverged), key=means.__getitem__, default=min(means))


def default_rate(optimizer: str) -> float:
    """The framework's own default learning rate of ``optimizer``."""
    return float(common.make_optimizer(optimizer, torch.nn.Conv2d(1, 1, 1)).defaults["lr"])


def converge(
    run: Run,
    rates: dict[tuple[str, str], float],
    base: common.Recipe,
    seeds: range,
    noise: list[float],
    rows: list[Row],
) -> dict[tuple[str, str, float, int], Row]:
    """Steps 2 and 3: train at ``rates`` {(optimizer, setting): lr} on clean labels, the tuned also on noisy ones.

    Returns {(optimizer, setting, label noise, seed): result of train_run}.
    """
    kinds = [(name, setting, rate, 0.0) for (name, setting), rate in rates.items()]
    kinds += [
        (name, "noise", rates[name, "tuned"], level) for name, setting in rates if setting == "tuned" for level in noise
    ]
    jobs: list[Row] = [
        dict(zip(RUN, (name, setting, level, seed), strict=True))
        | {"lr": rate, "recipe": replace(base, optimizer=name, lr=rate)}
        for seed in seeds  # the first seed of everything comes first, for whoever interrupts
        for name, setting, rate, level in kinds
    ]
    results = {}
    for job, result in run(jobs, "2 convergence, 3 label noise"):
        results[tuple(job[key] for key in RUN)] = result
        facts = {name: job[name] for name in ("optimizer", "setting", "lr", "label_noise", "seed")}
        rows += [facts | row for row in result["history"]]
    rows.sort(key=lambda row: (*(row[key] for key in RUN), row["epoch"]))
    return results


def try_small_batches(
    run: Run, tuned: dict[str, float], base: common.Recipe, seeds: range, pictures: int, rows: list[Row]
) -> None:
    """Step 3, noise in gradients: one pass over ``pictures`` at the usual and at a very small batch size."""
    jobs = [
        {
            "optimizer": name,
            "lr": rate,
            "batch_size": size,
            "seed": seed,
            "pictures": pictures,
            "recipe": replace(base, optimizer=name, lr=rate, batch_size=size, epochs=1),
        }
        for name, rate in tuned.items()
        for size in (base.batch_size, SMALL_BATCH)
        for seed in seeds
    ]
    for job, result in run(jobs, "3 gradient noise"):
        facts = {name: job[name] for name in ("optimizer", "lr", "batch_size", "seed", "pictures")}
        last = result["history"][-1]
        rows.append(facts | {name: last[name] for name in ("train_loss", "val_loss", "val_accuracy", "seconds")})
    rows.sort(key=lambda row: (row["optimizer"], row["batch_size"], row["seed"]))


def time_steps(
    data: Path,
    tuned: dict[str, float],
    base: common.Recipe,
    runtime: common.Runtime,
    timing: dict[str, int],
    rows: list[Row],
) -> None:
    """Milliseconds per training step of every optimizer, in several fresh processes, one after the other.

    One value a process: an interval over the turns of one process would say nothing about the next process.
    (``--quick`` runs two of them at once, forked: its times only try the code out.)
    """
    recipes = [replace(base, optimizer=name, lr=rate, epochs=1) for name, rate in tuned.items()]
    jobs = [(data, recipes, runtime, timing["turns"], timing["steps"])] * timing["at_once"]
    for first in tqdm(range(1, 1 + timing["processes"], len(jobs)), desc="4 time of a step", disable=None):
        for number, times in common.run_parallel(take_turns, jobs, len(jobs), runtime, bool(timing["spawned"])):
            rows += [{"process": first + number, "optimizer": name, "step_ms": ms} for name, ms in times.items()]


def take_turns(
    data: Path, recipes: list[common.Recipe], runtime: common.Runtime, turns: int, steps: int
) -> dict[str, float]:
    """Median milliseconds per step of every recipe's optimizer, taking turns; one thread and nothing else running."""
    dataset = common.open_shared(data)
    index = torch.arange(min(steps * recipes[0].batch_size, len(dataset.train_labels)))
    models = {recipe.optimizer: common.make_model(dataset, recipe) for recipe in recipes}
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(1 + turns):
        for recipe in recipes if turn % 2 else reversed(recipes):
            history, losses = common.fit(models[recipe.optimizer], dataset, recipe, runtime, train_index=index)
            if turn:  # the first one warms up
                times[recipe.optimizer].append(1000 * history[-1]["seconds"] / len(losses))
    return {name: float(np.median(values)) for name, values in times.items()}


def test_once(
    dataset: common.Dataset, results: dict[Any, Row], base: common.Recipe, runtime: common.Runtime, limit: int | None
) -> list[Row]:
    """Step 5: read the test set, once, for the final networks of step 2 (correct labels).

    Their accuracy on pictures they were trained on is measured in the same way: the difference is the gap.
    """
    train_index, _ = common.split_validation(dataset.train_labels)
    seen = common.subset(common.subset(train_index, limit), GAP_PICTURES)
    test_index = common.subset(torch.arange(len(dataset.test_labels)), limit)
    rows = []
    for (name, setting, _, seed), result in sorted(results.items()):
        if setting == "noise":
            continue
        model = common.make_model(dataset, base)
        model.load_state_dict({key: torch.from_numpy(value) for key, value in result["weights"].items()})
        loss, accuracy = common.evaluate(model, dataset.test_images, dataset.test_labels, runtime, test_index)
        _, train_accuracy = common.evaluate(model, dataset.train_images, dataset.train_labels, runtime, seen)
        rows.append(
            {"optimizer": name, "setting": setting, "seed": seed, "test_loss": loss}
            | {"test_accuracy": accuracy, "train_accuracy": train_accuracy, "diverged": result["diverged"]}
        )
    return rows


def save_unfinished(folder: Path, rows: dict[str, list[Row]]) -> None:
    """Keep what is finished, apart from the results of an earlier run that went through."""
    folder.mkdir(exist_ok=True)
    for name, content in rows.items():
        if content:
            common.write_csv(folder / f"{name}.csv", content)
        else:  # a table of an earlier unfinished run does not belong to this one
            (folder / f"{name}.csv").unlink(missing_ok=True)
