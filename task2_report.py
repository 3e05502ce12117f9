"""Figures and report of Task 2, made of the rows that its CSV files hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import common

Row = dict[str, Any]
RUN = ("optimizer", "setting", "label_noise", "seed")  # what tells one run's history from another's


def colour_of(name: str, optimizers: Sequence[str]) -> str:
    """SGD is blue and RMSprop vermilion in every figure; the others take what is left, in order."""
    fixed = {"SGD": common.PALETTE[0], "RMSprop": common.PALETTE[1]}
    others = [other for other in optimizers if other not in fixed]
    return fixed.get(name) or common.PALETTE[2 + others.index(name) % 6]


def smooth(losses: Sequence[float], span: int) -> np.ndarray:
    """Running mean over ``span`` steps (fewer at the start)."""
    total = np.cumsum(np.insert(np.asarray(losses, dtype=float), 0, 0.0))
    start = np.maximum(np.arange(len(losses)) + 1 - span, 0)
    return (total[1:] - total[start]) / (np.arange(len(losses)) + 1 - start)


def band(axis: Any, x: Any, curves: Sequence[Any], **style: Any) -> None:
    """Mean over the seeds as a line, from the lowest to the highest seed as a band."""
    values = np.asarray(curves, dtype=float)
    axis.plot(x, values.mean(0), **style)
    axis.fill_between(x, values.min(0), values.max(0), color=style["color"], alpha=0.18, linewidth=0)


def runs_of(history: list[Row], name: str, setting: str, noise: float = 0.0) -> list[list[Row]]:
    """The history rows of one optimizer, setting and noise level, a list per seed; runs of full length only."""
    runs: dict[int, list[Row]] = {}
    for row in history:
        if (row["optimizer"], row["setting"], row["label_noise"]) == (name, setting, noise):
            runs.setdefault(row["seed"], []).append(row)
    longest = max(map(len, runs.values()))
    return [run for run in runs.values() if len(run) == longest]


def draw_losses(
    path: Path, name: str, rates: dict[str, float], history: list[Row], losses: dict[Any, list[float]], title: str
) -> None:
    """loss_plot_<optimizer>.png: training loss per step and validation loss per epoch, at every setting's rate.

    ``losses`` are those of every step, by (optimizer, setting, seed).
    """
    with common.figure(path, title, 1, len(rates), (12, 5.4)) as (drawing, axes):
        for axis, (setting, rate) in zip(axes[0], rates.items(), strict=True):
            runs = runs_of(history, name, setting)
            epochs = len(runs[0])
            steps = [losses[name, setting, run[0]["seed"]] for run in runs]
            x = (np.arange(len(steps[0])) + 1) * epochs / len(steps[0])
            curves = [smooth(values, max(1, len(x) // 100)) for values in steps]
            colour = common.PALETTE[6]
            band(axis, x, curves, color=colour_of(name, [name]), label="training, running mean over 1 % of the steps")
            validation = [[row["val_loss"] for row in run] for run in runs]
            style = {"color": colour, "marker": "o", "linestyle": "--", "label": "validation, at the end of an epoch"}
            band(axis, range(1, epochs + 1), validation, **style)
            axis.set(xlabel="epoch", title=f"{setting} learning rate {rate:g}, n = {len(runs)} seeds", yscale="log")
            common.plain_numbers(axis.yaxis)
        axes[0, 0].set_ylabel("cross-entropy, nats (log scale)")
        lows, highs = zip(*(axis.get_ylim() for axis in axes[0]), strict=True)
        for axis in axes[0]:
            axis.set_ylim(min(lows), max(highs))
        drawing.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)


def draw_comparison(
    path: Path, history: list[Row], losses: dict[Any, list[float]], optimizers: list[str], title: str
) -> None:
    """comparison.png: loss and validation accuracy against epochs and against seconds.

    ``losses`` are those of every training step, by (optimizer, setting, seed).
    """
    with common.figure(path, title, 2, 2, (12, 9)) as (drawing, axes):
        for name in optimizers:
            for setting, line in (("tuned", "-"), ("default", ":")):
                runs = runs_of(history, name, setting)
                epochs = range(1, len(runs[0]) + 1)
                seconds = np.mean([[row["seconds"] for row in run] for run in runs], axis=0)
                style = {"color": colour_of(name, optimizers), "linestyle": line}
                steps = [losses[name, setting, run[0]["seed"]] for run in runs]
                part = (np.arange(len(steps[0])) + 1) / len(steps[0])
                training = [smooth(values, max(1, len(part) // 30)) for values in steps]
                validation = np.mean([[row["val_loss"] for row in run] for run in runs], axis=0)
                accuracies = [[row["val_accuracy"] for row in run] for run in runs]
                for column, x in zip(axes.T, (epochs, seconds), strict=True):
                    band(column[0], part * x[-1], training, label=f"{name}, {setting}", **style)
                    column[0].plot(x, validation, color=style["color"], marker="o", markersize=7, linestyle="")
                    band(column[1], list(x), accuracies, marker="o", markersize=5, **style)
        labels = ("loss, nats (log scale)\nlines: training; dots: validation", "validation accuracy (log error scale)")
        for axis, label in zip(axes, labels, strict=True):
            axis[0].set(xlabel="epoch", ylabel=label)
            axis[0].xaxis.get_major_locator().set_params(integer=True)
            axis[0].set_xlim(left=0)
            axis[1].set_xlim(left=0)
            axis[1].set(xlabel="seconds of training, one thread per run")
        for axis in axes[0]:  # the tuned runs lie far below an untuned one
            if np.isfinite(axis.dataLim.minposy):  # a run of nothing but nan has no place on a log scale
                axis.set_yscale("log")
                common.plain_numbers(axis.yaxis)
        for axis in axes[1]:  # as in the losses' panels: from 0.9 to 0.95 is as far as from 0.8 to 0.9
            axis.set_yscale("function", functions=(lambda a: -np.log1p(-np.minimum(a, 0.999)), lambda b: -np.expm1(-b)))
            axis.set_yticks([0, 0.5, 0.7, 0.8, 0.9, 0.93, 0.95, 0.98, 0.99])
            axis.set_ylim(0, axis.dataLim.y1 + 0.1 * (1 - axis.dataLim.y1))
        drawing.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def draw_sensitivity(
    path: Path, sweep: list[Row], optimizers: list[str], rates: dict[tuple[str, str], float], title: str
) -> None:
    """lr_sensitivity.png: validation accuracy at every learning rate; crosses are runs that diverged."""
    with common.figure(path, title, size=(10, 6.5)) as (drawing, axes):
        axis = axes[0, 0]
        for name in optimizers:
            colour = colour_of(name, optimizers)
            mine = sorted((row for row in sweep if row["optimizer"] == name), key=lambda row: row["lr"])
            grid = sorted({row["lr"] for row in mine})
            seeds = sorted({row["seed"] for row in mine})
            curves = [[row["val_accuracy"] for row in mine if row["seed"] == seed] for seed in seeds]
            band(axis, grid, curves, color=colour, marker="o", label=name)
            default, best = rates[name, "default"], rates[name, "tuned"]
            axis.axvline(default, color=colour, linestyle=":", label=f"framework default {default:g}")
            chosen = np.mean(curves, axis=0)[grid.index(best)]
            style = {"s": 380, "color": colour, "edgecolor": "black", "zorder": 6}
            axis.scatter([best], [chosen], marker="*", label=f"chosen {best:g}", **style)
            lost = [row for row in mine if row["diverged"]]
            style = {"marker": "x", "s": 90, "linewidths": 2.5, "color": colour, "zorder": 5}
            label = f"{len(lost)} of {len(mine)} diverged"
            axis.scatter([row["lr"] for row in lost], [row["val_accuracy"] for row in lost], label=label, **style)
        axis.set(xscale="log", xlabel="highest learning rate of a run (log scale)", ylabel="validation accuracy")
        drawing.legend(loc="outside lower center", ncols=len(optimizers), fontsize=11)


def draw_noise(path: Path, history: list[Row], small_batch: list[Row], optimizers: list[str], title: str) -> None:
    """noise.png: what wrong labels and small batches do to each optimizer."""
    levels = sorted({row["label_noise"] for row in history})
    sizes = sorted({row["batch_size"] for row in small_batch})
    with common.figure(path, title, 1, 3, (15, 5.6)) as (drawing, axes):
        left, middle, right = axes[0]
        for name in optimizers:
            style = {"color": colour_of(name, optimizers), "marker": "o"}
            runs = [runs_of(history, name, "noise" if level else "tuned", level) for level in levels]
            final = [[run[-1]["val_accuracy"] for run in group] for group in runs]
            complete = min(map(len, final))  # a run may have ended without a loss
            curves = list(zip(*(values[:complete] for values in final), strict=True))
            band(left, [100 * level for level in levels], curves, label=name, **style)
            losses = [[row["val_loss"] for row in run] for run in runs[-1]]
            band(middle, range(1, len(losses[0]) + 1), losses, **style)
            mine = [row for row in small_batch if row["optimizer"] == name]
            points = [[row["val_accuracy"] for row in mine if row["batch_size"] == size] for size in sizes]
            band(right, range(len(sizes)), list(zip(*points, strict=True)), **style)
        left.set(xlabel="wrong training labels, %", ylabel="validation accuracy", title="wrong labels: final accuracy")
        middle.set(xlabel="epoch", ylabel="validation loss, nats", title=f"{levels[-1]:.0%} wrong labels: loss")
        middle.xaxis.get_major_locator().set_params(integer=True)
        pictures = small_batch[0]["pictures"]
        right.set(
            xlabel="pictures per step",
            ylabel="validation accuracy",
            title=f"small batches: after {pictures:,} pictures",
        )
        right.set(xticks=range(len(sizes)), xticklabels=sizes, xlim=(-0.3, len(sizes) - 0.7))
        drawing.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)


# ---------------------------------------------------------------- report


def final_rows(history: list[Row]) -> list[Row]:
    """The last history row of every run, also of those that a loss without value ended early."""
    return list({tuple(row[key] for key in RUN): row for row in history}.values())


def summarise(rates: dict[tuple[str, str], float], rows: dict[str, list[Row]]) -> dict[str, Row]:
    """{optimizer: {setting: {lr, n, diverged, and {mean, sd, n} of every final measure}}}."""
    summary: dict[str, Row] = {name: {} for name, _ in rates}
    for (name, setting), rate in rates.items():
        tested = [row for row in rows["test"] if (row["optimizer"], row["setting"]) == (name, setting)]
        ended = [row for row in final_rows(rows["history"]) if (row["optimizer"], row["setting"]) == (name, setting)]
        epochs = max(row["epoch"] for row in rows["history"])
        entry: Row = {"lr": rate, "epochs": epochs, "diverged": sum(row["diverged"] for row in tested)}
        for source, metrics in (
            (ended, ("train_loss", "val_loss", "val_accuracy", "seconds")),
            (tested, ("test_loss", "test_accuracy", "train_accuracy")),
        ):
            for metric in metrics:
                values = [row[metric] for row in source]
                sd = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
                entry[metric] = {"mean": float(np.mean(values)) if values else math.nan, "sd": sd, "n": len(values)}
        summary[name][setting] = entry
    return summary


def cost_of_noise(history: list[Row], name: str, level: float) -> float:
    """Points of validation accuracy that wrong labels cost at the end, over the seeds that ran with and without."""
    final = {
        kind: {run[-1]["seed"]: run[-1]["val_accuracy"] for run in runs_of(history, name, *kind)}
        for kind in (("tuned", 0.0), ("noise", level))
    }
    clean, noisy = final.values()
    return 100 * float(np.mean([clean[seed] - noisy[seed] for seed in clean.keys() & noisy.keys()] or [math.nan]))


def draw(
    output: Path,
    rows: dict[str, list[Row]],
    results: Any,
    rates: dict[tuple[str, str], float],
    summary: dict[str, Row],
    where: str,
    seeds: int,
) -> list[str]:
    """Draw every figure; returns their file names."""
    optimizers = list(dict.fromkeys(name for name, _ in rates))
    history, sweep = rows["history"], rows["sweep"]
    n, m = f"n = {seeds} seeds", f"n = {len({row['seed'] for row in sweep})} seeds"
    losses = {
        (name, setting, seed): run["losses"] for (name, setting, level, seed), run in results.items() if not level
    }
    for name in optimizers:
        mine = {setting: rate for (other, setting), rate in rates.items() if other == name}
        ends = {setting: summary[name][setting]["val_loss"]["mean"] for setting in ("tuned", "default")}
        title = f"{name}: validation loss ends at {ends['tuned']:.3g} (tuned rate), {ends['default']:.3g} (default)"
        title += f"\n{where}"
        draw_losses(output / f"loss_plot_{name}.png", name, mine, history, losses, title)
    losses_of = {
        setting: ", ".join(f"{name} {summary[name][setting]['val_loss']['mean']:.3g}" for name in optimizers)
        for setting in ("tuned", "default")
    }
    title = f"Validation loss at the end: {losses_of['tuned']} (tuned rates); {losses_of['default']} (defaults)"
    draw_comparison(output / "comparison.png", history, losses, optimizers, f"{title}\n{where}, {n}")
    source = where.rsplit(", ", 1)[0]
    ratios = {name: float(f"{rates[name, 'tuned'] / rates[name, 'default']:.3g}") for name in optimizers}
    factors = ", ".join(f"{ratio:,g} times the default of {name}" for name, ratio in ratios.items())
    title = f"Best in short runs: {factors}\n{source}, {m}, bands: lowest to highest"
    draw_sensitivity(output / "lr_sensitivity.png", sweep, optimizers, rates, title)
    level = max(row["label_noise"] for row in history)
    costs = (f"{name} {cost_of_noise(history, name, level):.1f}" for name in optimizers)
    title = f"{level:.0%} wrong labels cost, in points of accuracy: {', '.join(costs)} (tuned rates)"
    draw_noise(output / "noise.png", history, rows["small_batch"], optimizers, f"{title}\n{where}, {n}")
    return [f"loss_plot_{name}.png" for name in optimizers] + ["comparison.png", "lr_sensitivity.png", "noise.png"]


def conclude(optimizers: Sequence[str], summary: dict[str, Row], claims: list[Row]) -> list[str]:
    """A short conclusion in plain words, a sentence per question, made of the measured claims and figures."""
    a, b = optimizers[:2]
    found = {claim["id"]: claim for claim in claims}

    def says(claim: str, yes: str, no: str, neither: str) -> str:
        row = found[claim]
        text = {"supported": yes, "not supported": no}.get(row["verdict"], neither)
        low, effect, high = row["ci_low"], row["effect"], row["ci_high"]
        if row["verdict"] == "not supported":  # the sentence names the winner, whose lead is positive
            low, effect, high = -high, -effect, -low
        return f"{text} ({effect:+.3g} {row['unit']}, 95 % interval {low:+.3g} to {high:+.3g}, n = {row['n']})."

    tuned, default = (
        {name: 100 * summary[name][setting]["test_accuracy"]["mean"] for name in (a, b)}
        for setting in ("tuned", "default")
    )
    ahead = max(default, key=lambda name: default[name])
    return [
        f"Test accuracy, tuned: {a} {tuned[a]:.2f} %, {b} {tuned[b]:.2f} %; at the framework's default learning "
        f"rates: {a} {default[a]:.2f} %, {b} {default[b]:.2f} %.",
        says(
            "lower_loss",
            f"{b} ends lower in training loss",
            f"{a} ends lower in training loss",
            "The training losses end alike",
        ),
        says(
            "better_generalisation",
            f"{a} is better on new pictures",
            f"{b} is better on new pictures",
            "On new pictures neither is clearly better",
        ),
        says(
            "lr_robustness",
            f"{b} forgives a wrong learning rate more",
            f"{a} forgives a wrong learning rate more",
            "Neither forgives a wrong learning rate clearly more",
        ),
        says(
            "noise_robustness",
            f"{b} stands wrong labels better",
            f"{a} stands wrong labels better",
            "Neither stands wrong labels clearly better",
        ),
        says(
            "noise_robustness_small_batch",
            f"{b} stands small batches better",
            f"{a} stands small batches better",
            "Neither stands small batches clearly better",
        ),
        says(
            "cheaper_step",
            f"A step of {a} is cheaper",
            f"A step of {b} is cheaper",
            "A step costs the same, as far as can be told",
        ),
        f"So: untuned, take {ahead} ({default[ahead]:.2f} % at its default). With a swept learning rate the two differ "
        f"by {abs(tuned[a] - tuned[b]):.2f} points of test accuracy.",
    ]


def report(
    path: Path, where: str, summary: dict[str, Row], claims: list[Row], optimizers: list[str], names: list[str]
) -> None:
    """Print the tables and the conclusion, and write them with the figures as report.md."""

    def spread(entry: Row, scale: float = 1, digits: int = 3) -> str:
        return f"{scale * entry['mean']:.{digits}f} ± {scale * entry['sd']:.{digits}f}"

    results = [
        [name, setting, f"{row['lr']:g}", spread(row["train_loss"]), spread(row["val_loss"])]
        + [spread(row[metric], 100, 2) for metric in ("test_accuracy", "train_accuracy")]
        + [row["test_accuracy"]["n"], row["diverged"]]
        for name, settings in summary.items()
        for setting, row in settings.items()
    ]
    judged = [
        [
            c["statement"],
            c["verdict"],
            f"{c['effect']:+.3g} {c['unit']}",
            f"[{c['ci_low']:+.3g}, {c['ci_high']:+.3g}]",
            c["n"],
        ]
        for c in claims
    ]
    header = ["optimizer", "rate", "lr", "train loss", "val loss", "test acc., %", "train acc., %", "n", "diverged"]
    tables = {
        "Final results, mean ± standard deviation over seeds": (results, header),
        "Claims (an effect above zero speaks for the claim)": (
            judged,
            ["claim", "verdict", "effect", "95 % interval", "n"],
        ),
    }
    conclusion = conclude(optimizers, summary, claims)
    text = [f"# Task 2: {' and '.join(optimizers)} on {where}"]
    for title, (rows, head) in tables.items():
        print(f"\n{title}\n{common.table(rows, head)}")
        text.append(f"## {title}\n\n{common.table(rows, head, markdown=True)}")
    print("\n" + "\n".join(conclusion))
    text += ["## Conclusion", *conclusion, "## Figures", *(f"![{name}]({name})" for name in names)]
    common.write_text(path, "\n\n".join(text) + "\n")
