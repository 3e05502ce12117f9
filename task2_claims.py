"""The verdicts of Task 2: the original report's claims, each judged by paired differences with an interval."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

import common
import task2_report as reporting
from task2_report import Row


def accuracy_by_rate(rows: list[Row], optimizer: str) -> dict[float, list[float]]:
    """Validation accuracies of the seeds at every learning rate of the sweep, in rising order of the rate."""
    rates = sorted({row["lr"] for row in rows})
    return {r: [row["val_accuracy"] for row in rows if row["optimizer"] == optimizer and row["lr"] == r] for r in rates}


def good_width(rates: Sequence[float], accuracies: Sequence[float], points: float) -> float:
    """Decades of learning rate around the best one that lose at most ``points`` accuracy points.

    Linear interpolation over log10(rate) between grid points; at the grid's edge the width ends.
    """
    log, bar = np.log10(rates), max(accuracies) - points / 100
    ends = []
    for step in (-1, 1):
        position = int(np.argmax(accuracies))
        while 0 <= position + step < len(log) and accuracies[position + step] >= bar:
            position += step
        end = float(log[position])
        if 0 <= position + step < len(log):
            inside, outside = accuracies[position], accuracies[position + step]
            end += float(log[position + step] - log[position]) * (inside - bar) / (inside - outside)
        ends.append(end)
    return ends[1] - ends[0]


def judge(claim: str, statement: str, differences: Any, unit: str) -> Row:
    """One claim's verdict; ``differences`` are paired, one per seed or process, positive where the claim holds."""
    effect, low, high = common.interval(list(map(float, differences)))
    verdict = "supported" if low > 0 else "not supported" if high < 0 else "undecided"
    bounds = {"ci_low": low, "ci_high": high, "n": len(differences), "unit": unit}
    return {"id": claim, "statement": statement, "verdict": verdict, "effect": effect} | bounds


def judge_claims(optimizers: Sequence[str], rows: dict[str, list[Row]], know_nothing: float) -> list[Row]:
    """Step 4: the original report's claims, about the first two ``optimizers``, each from these data alone.

    ``know_nothing``, ln(classes), stands for the loss of a run that ended with none.
    """
    a, b = optimizers[:2]
    epochs = max(row["epoch"] for row in rows["history"])
    final = reporting.final_rows(rows["history"])
    sizes = {row["batch_size"] for row in rows["small_batch"]}
    small_size, large = min(sizes), max(sizes)

    def per_seed(source: list[Row], metric: str, **where: Any) -> np.ndarray:
        chosen = [row for row in source if all(row[key] == value for key, value in where.items())]
        seeds = sorted({row["seed"] for row in chosen})
        values = [np.mean([row[metric] for row in chosen if row["seed"] == seed]) for seed in seeds]
        return np.nan_to_num(values, nan=know_nothing, posinf=know_nothing)

    def difference(source: list[Row], metric: str, **where: Any) -> np.ndarray:
        return per_seed(source, metric, optimizer=a, **where) - per_seed(source, metric, optimizer=b, **where)

    def width(name: str, points: int) -> np.ndarray:
        curves = accuracy_by_rate(rows["sweep"], name)
        return np.array([good_width(list(curves), seed, points) for seed in zip(*curves.values(), strict=True)])

    small = functools.partial(difference, rows["small_batch"], "val_accuracy")
    batch_drop = small(batch_size=large) - small(batch_size=small_size)
    noisy = difference(final, "val_accuracy", setting="noise")
    label_drop = difference(final, "val_accuracy", setting="tuned") - noisy
    step = {name: [row["step_ms"] for row in rows["step_time"] if row["optimizer"] == name] for name in (a, b)}
    gap = [row | {"gap": row["train_accuracy"] - row["test_accuracy"]} for row in rows["test"]]
    tuned = f"tuned, epoch {epochs}"
    lower = f"{b} ends with a lower"
    steady = f"{b} has the wider range of good learning rates, within"
    return [
        judge(
            "lower_loss", f"{lower} training loss ({tuned})", difference(final, "train_loss", setting="tuned"), "nats"
        ),
        judge(
            "lower_loss_default",
            f"{lower} training loss (default rates, epoch {epochs})",
            difference(final, "train_loss", setting="default"),
            "nats",
        ),
        judge(
            "lower_loss_validation",
            f"{lower} validation loss ({tuned})",
            difference(final, "val_loss", setting="tuned"),
            "nats",
        ),
        judge("lr_robustness", f"{steady} 2 points of its best", width(b, 2) - width(a, 2), "decades"),
        judge("lr_robustness_1_point", f"{steady} 1 point of its best", width(b, 1) - width(a, 1), "decades"),
        judge("lr_robustness_5_points", f"{steady} 5 points of its best", width(b, 5) - width(a, 5), "decades"),
        judge(
            "noise_robustness",
            f"{b} loses less accuracy to wrong labels (validation, {tuned})",
            100 * label_drop,
            "points",
        ),
        judge(
            "noise_robustness_small_batch",
            f"{b} loses less (or gains more) by batches of {small_size} (validation, tuned at {large})",
            100 * batch_drop,
            "points",
        ),
        judge("cheaper_step", f"a training step of {a} takes less time", 100 * (np.divide(step[b], step[a]) - 1), "%"),
        judge(
            "better_generalisation",
            f"{a} has the higher test accuracy ({tuned})",
            100 * difference(rows["test"], "test_accuracy", setting="tuned"),
            "points",
        ),
        judge(
            "generalisation_gap",
            f"{a} has the smaller gap from training to test accuracy ({tuned})",
            -100 * difference(gap, "gap", setting="tuned"),
            "points",
        ),
    ]
