"""Figures, tables and report of Task 3, made of the study and of the rows that the CSV files hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

import common
from task3_study import Row, default_params, retried, settings_of

BLUE, ORANGE, GREEN = common.PALETTE[:3]
ACCURACY = "validation accuracy"
FIGURES = ("optimization_history", "param_importances", "intermediate_values", "slice", "parallel_coordinate")


def trial_rows(trials: Sequence[FrozenTrial]) -> list[Row]:
    """One row of trials.csv per trial, the parameters with the absolute learning rate beside the relative one."""
    again = retried(trials)
    rows = []
    for trial in trials:
        reason = trial.user_attrs.get("reason", "its worker died" if trial.state == TrialState.FAIL else "")
        if trial.number in again:
            reason = f"its worker died; tried again as trial {again[trial.number]}"
        params = dict(trial.params)
        if "lr_scale" in params:
            params["lr"] = settings_of(params)["lr"]
        rows.append(
            {"number": trial.number, "state": trial.state.name.lower(), "value": trial.value}
            | {f"param_{name}": params.get(name) for name in (*default_params(), "lr")}
            | {
                "epochs_run": len(trial.intermediate_values),
                "seconds": trial.duration.total_seconds() if trial.duration else None,
                "worker": trial.user_attrs.get("worker", ""),
                "reason": reason,
            }
        )
    return rows


def count_states(trials: Sequence[FrozenTrial]) -> dict[str, int]:
    """Numbers of finished trials: all, pruned, complete, failed."""
    states = [trial.state for trial in trials if trial.state.is_finished()]
    names = {"pruned": TrialState.PRUNED, "complete": TrialState.COMPLETE, "failed": TrialState.FAIL}
    return {"finished": len(states)} | {name: states.count(state) for name, state in names.items()}


def statistics(counts: dict[str, int], best: Row | None) -> str:
    """The block on the console."""
    lines = ["Study statistics:"]
    lines += [f"    Number of {name} trials:  {n}" for name, n in counts.items() if n or name != "failed"]
    if best is None:
        return "\n".join([*lines, "Best trial:  none was completed"])
    lines += ["Best trial:", f"    Value:  {best['value']}", "    Params:"]
    return "\n".join(lines + [f"        {name}: {value}" for name, value in best["params"].items()])


def report_study(output: Path, study: optuna.Study, source: str) -> Row:
    """Print the study's statistics; write trials.csv, best_params.json and the figures; returns the facts."""
    trials = study.get_trials(deepcopy=False)
    counts = count_states(trials)
    facts: Row = {"source": source, "n_trials": counts, "best": None, "importances": {}}
    common.write_csv(output / "trials.csv", trial_rows(trials))
    if counts["complete"]:
        best = study.best_trial
        facts["best"] = {"number": best.number, "value": best.value, "params": settings_of(best.params)}
        if counts["complete"] > 1:
            facts["importances"] = optuna.importance.get_param_importances(study)
        common.write_json(output / "best_params.json", facts["best"]["params"])
        draw_figures(output, study, source, facts["importances"])
    print(statistics(counts, facts["best"]))
    return facts


def conclude(summary: Row) -> list[str]:
    """The conclusions in plain words, from the figures of ``summary`` alone."""
    best, counts, lines = summary["best"], summary["n_trials"], []
    if best is None:
        return ["No trial was completed."]
    lines.append(
        f"Of {counts['finished']} trials ({counts['pruned']} pruned, {counts['complete']} complete, "
        f"{counts['failed']} failed) number {best['number']} was the best: {best['value']:.4f} of the validation "
        f"pictures right. What mattered most: {', '.join(list(summary['importances'])[:3]) or 'not measured'}."
    )
    if "retrain" in summary:
        truth, optimism = summary["retrain"], summary["optimism"]
        for key, schedule in (("", "with the full schedule"), ("_study_schedule", "as short as in the study")):
            tuned, default = (truth[name + key]["test_accuracy"] for name in ("best", "default"))
            gain = truth["difference" + key]
            low, high = gain["ci_low"], gain["ci_high"]
            verdict = "tuning helped" if low > 0 else "tuning did harm" if high < 0 else "no difference is proved"
            doubt = "one seed: no interval" if gain["n"] < 2 else f"95 % interval {100 * low:+.2f} to {100 * high:+.2f}"
            lines.append(
                f"Trained {schedule}, the best configuration reaches {tuned['mean']:.4f} of the test pictures, the "
                f"default one {default['mean']:.4f}: {100 * gain['mean']:+.2f} points ({doubt}; n = {gain['n']} pairs "
                f"of seeds): {verdict}."
            )
        luck = 100 * optimism["winners_curse"]
        lines.append(
            f"The study's value was {100 * optimism['optimism']:+.2f} points off the test accuracy of the same "
            f"schedule on fresh seeds, and {luck:+.2f} off their accuracy on its own validation pictures"
            + (": the luckiest of many trials is chosen." if luck > 0 else ".")
        )
    if "control" in summary:
        values = "; ".join(f"{name} {value:.4f}" for name, value in summary["control"]["best_at_equal_cost"].items())
        cost = summary["control"]["train_seconds"]
        lines.append(f"Best validation accuracy at equal cost ({cost:.0f} s of training, one run each): {values}.")
    if "audit" in summary:
        lines.append(
            f"Of {summary['audit']['finished']} pruned trials that were finished afterwards, "
            f"{summary['audit']['would_have_won']} would have beaten the best (the share of such trials is at most "
            f"{summary['audit']['share_ci_high']:.0%}, 95 % interval)."
        )
    return lines


def report(output: Path, summary: Row) -> None:
    """Print the retraining table and the conclusions; write them with the statistics and figures as report.md."""
    text = [
        f"# Task 3: an Optuna study on {summary['source']}",
        f"```\n{statistics(summary['n_trials'], summary['best'])}\n```",
    ]
    if summary["importances"]:
        rows = [[name, f"{value:.3f}"] for name, value in summary["importances"].items()]
        text.append(common.table(rows, ["parameter", "importance (PED-ANOVA)"], markdown=True))
    if "retrain" in summary:
        rows = []
        for key, schedule in (("", "full"), ("_study_schedule", "as in the study")):
            for name in ("best", "default"):
                entry = summary["retrain"][name + key]["test_accuracy"]
                sd = "" if entry["sd"] is None else f" ± {100 * entry['sd']:.2f}"
                rows.append([name, schedule, f"{100 * entry['mean']:.2f}{sd}", entry["n"]])
        header = ["configuration", "schedule", "test accuracy, % (mean ± sd)", "seeds"]
        print("\nRetrained on fresh seeds\n" + common.table(rows, header))
        text += ["## Retrained on fresh seeds", common.table(rows, header, markdown=True)]
    conclusion = conclude(summary)
    print("\n" + "\n".join(conclusion))
    names = [f"{name}.png" for name in (*FIGURES, "control") if (output / f"{name}.png").exists()]
    text += ["## Conclusion", *conclusion, "## Figures", *(f"![{name}]({name})" for name in names)]
    common.write_text(output / "report.md", "\n\n".join(text) + "\n")


# ---------------------------------------------------------------- figures


def best_so_far(study: optuna.Study) -> tuple[list[float], list[float]]:
    """(seconds of training spent, best value then), after every trial in the order of their ends."""
    trials: Any = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished() and t.duration]
    trials.sort(key=lambda trial: trial.datetime_complete)
    values = [trial.value if trial.state == TrialState.COMPLETE else float("-inf") for trial in trials]
    spent = np.cumsum([trial.duration.total_seconds() for trial in trials])
    return spent.tolist(), np.maximum.accumulate(values).tolist() if values else []


def save_plot(path: Path, drawing: Any, title: str, size: tuple[float, float], layout: str = "constrained") -> None:
    """Bring a figure of optuna.visualization into the style of the others and save it."""
    from matplotlib.ticker import LogLocator, NullFormatter

    drawing.set_size_inches(*size)
    drawing.set_layout_engine(layout)
    for axes in drawing.axes:
        axes.set_title("")
        axes.set_title("", loc="left")
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":  # 0.1, 0.3, 1, 3 or, over more than two decades, their powers only
                low, high = np.log10(axis.get_view_interval())
                axis.set_major_locator(LogLocator(subs=(1.0, 3.0) if high - low < 2 else (1.0,)))
                axis.set_major_formatter("{x:g}")
                axis.set_minor_formatter(NullFormatter())
        axes.set_facecolor("none")
        axes.grid(False)
        if axes.get_label() != "<colorbar>" and axes.xaxis.get_visible():
            axes.grid(color="black", alpha=0.15)
        axes.tick_params(labelsize=13, colors="black")
        axes.xaxis.label.set(size=14, color="black")
        axes.yaxis.label.set(size=14, color="black")
        if axes.get_legend():
            axes.legend(handles=axes.get_legend().legend_handles, loc="lower right", fontsize=13)
    drawing.suptitle(title, fontsize=15, parse_math=False)
    with common.atomic_path(path) as temporary:
        drawing.savefig(temporary, dpi=110, facecolor="white")


def draw_figures(output: Path, study: optuna.Study, source: str, importances: dict[str, float]) -> None:
    """The study's five figures, drawn by optuna.visualization.matplotlib and made legible."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from optuna.visualization import matplotlib as plots

    trials = study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED and trial.value is not None]
    where = f"{source}; {len(complete)} complete, {len(pruned)} pruned trials"
    names = list(importances)[:4] or None  # the most important ones: more do not fit legibly
    with plt.rc_context():  # Optuna sets a style of its own and leaves it set
        history: Any = plots.plot_optimization_history(study, target_name=ACCURACY)
        history.collections[0].set(color=BLUE, label="complete")
        history.lines[0].set(color=GREEN, linewidth=2.5, alpha=1, label="best so far", drawstyle="steps-post")
        history.scatter([t.number for t in pruned], [t.value for t in pruned], marker="x", color=ORANGE, label="pruned")
        history.set(xlabel="trial", ylabel=ACCURACY)
        history.legend()
        title = f"Best so far: {study.best_value:.4f}, of trial {study.best_trial.number}"
        save_plot(output / "optimization_history.png", history.figure, f"{title}\n{where}", (9, 5.5))

        values: Any = plots.plot_intermediate_values(study)
        by_label = {f"Trial{trial.number}": trial for trial in trials}
        styles: Any = {True: {"color": BLUE, "marker": "o"}, False: {"color": ORANGE, "marker": "x"}}
        for line in values.lines:
            done = by_label[line.get_label()].state == TrialState.COMPLETE
            line.set(alpha=0.55, linewidth=1.5, markersize=6, zorder=2 if done else 3, **styles[done])
        labels = {True: "complete", False: "pruned or failed"}
        values.legend(handles=[plt.Line2D([], [], label=labels[done], **style) for done, style in styles.items()])
        values.set(xlabel="epoch", ylabel=ACCURACY)
        values.xaxis.get_major_locator().set_params(integer=True)
        epochs = [len(trial.intermediate_values) for trial in complete + pruned]
        title = f"Pruning saved {1 - np.mean(epochs) / max(epochs):.0%} of the epochs"
        save_plot(output / "intermediate_values.png", values.figure, f"{title}\n{where}", (9, 5.5))

        if any(importances.values()):
            bars: Any = plots.plot_param_importances(study)
            for bar, text in zip(bars.patches, bars.texts, strict=True):
                bar.set(color=BLUE)
                text.set(fontsize=13)
            bars.get_legend().remove()
            bars.set(xlabel="importance (PED-ANOVA)", ylabel="")
            title = f"{next(iter(importances))} matters most for reaching the best tenth of the trials"
            save_plot(output / "param_importances.png", bars.figure, f"{title}\n{where}", (9, 5))

        parallel: Any = plots.plot_parallel_coordinate(study, names, target_name=ACCURACY)
        lines = parallel.collections[0]
        low, high = lines.get_clim()
        lines.set_clim(low - (high - low) / 3, high)  # else the poor trials are drawn in white
        parallel.tick_params(axis="x", rotation=0)
        for axes in parallel.figure.axes[1:-1]:
            for label in axes.get_yticklabels():
                label.set_bbox({"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1})
        title = "The settings of every complete trial, the good ones dark"
        save_plot(output / "parallel_coordinate.png", parallel.figure, f"{title}\n{where}", (12, 6), "tight")
        slices: Any = plots.plot_slice(study, names, target_name=ACCURACY)
        title = "Where the good values are (darker points are later trials)"
        save_plot(output / "slice.png", np.ravel(slices)[0].figure, f"{title}\n{where}", (14, 5))
        plt.close("all")


def draw_control(output: Path, study: optuna.Study, control: optuna.Study, sampler: str, source: str) -> Row:
    """Both best-so-far curves over the seconds of training spent; returns the values at equal cost."""
    curves = {f"study ({sampler})": best_so_far(study), "random control": best_so_far(control)}
    cost = min(spent[-1] for spent, _ in curves.values() if spent)  # a control stopped at once has no trial
    at_cost = {
        name: max((value for at, value in zip(*curve, strict=True) if at <= cost), default=float("nan"))
        for name, curve in curves.items()
    }
    ends = ", ".join(f"{name} {value:.4f}" for name, value in at_cost.items())
    title = f"At equal cost: {ends}\n{source}, one run each"
    with common.figure(output / "control.png", title) as (drawing, axes):
        for (name, (spent, values)), colour in zip(curves.items(), (BLUE, ORANGE), strict=True):
            axes[0, 0].step(spent, values, where="post", color=colour, label=f"{name}, {len(spent)} trials")
        axes[0, 0].axvline(cost, color="grey", linestyle=":", label="cost of the comparison")
        axes[0, 0].set(xlabel="training time of all trials (s)", ylabel=f"best {ACCURACY} so far")
        drawing.legend(loc="outside lower center", ncols=2)
    return {"train_seconds": cost, "best_at_equal_cost": at_cost}
