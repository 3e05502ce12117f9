"""Does a study find the good region? Whole studies by several designs, each judged on fresh seeds. Run by hand.

  python tests/benchmark_search.py                           eight studies by each design, on CIFAR-10
  python tests/benchmark_search.py --designs default tpe     other designs
  python tests/benchmark_search.py --quick                   every step on a few images

A study is that of task3_optuna.py: the same trials, confirmation and fresh seeds as by its own command with this
--seed. The best configuration after some of the trials and after all of them is compared with the lab's settings on the
test images. Finished studies are kept in studies.csv, and a later run continues from there: delete it if the study
changes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import task3_optuna as task3
from common import Run, UserError
from task3_optuna import CompleteTrial, Confirmation, Confirmed, Plan

# Options of task3_optuna.py; random search has no pruner: it is what the others are measured by.
DESIGNS = {"default": [], "tpe": ["--sampler", "tpe"], "random": ["--sampler", "random", "--pruner", "none"]}
SHOWN = ("design", "seed", "trials", "pruned", "trial", "value", "confirmed", "difference", "best_activation")
SHARES = (0.5, 1.0)  # of the trials, after which a study is judged
COLOURS = {"default": common.PALETTE[0], "tpe": common.PALETTE[3], "random": common.PALETTE[4]}
NOTES = """Each point is the best configuration of one study: of the trials with the highest validation accuracies, the
one with the highest mean on the seeds of the confirmation. All accuracies are test accuracies on other fresh seeds,
which the lab's settings share. A band reaches from the worst to the best study. Seconds: of the search alone."""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; --quick makes everything small."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--studies", type=common.whole_number(), default=8, help="of each design (default: %(default)s)")
    help = "(default: %(default)s)"
    add("--designs", nargs="+", choices=DESIGNS, default=["default", "random"], help=help)
    add("--trials", type=common.whole_number(2), default=100, help="of a study (default: %(default)s)")
    add("--fresh-seeds", type=common.whole_number(2), default=6, help="of the comparison (default: %(default)s)")
    common.add_common_args(parser, output_dir=Path("results/searches"))
    options = parser.parse_args(argv)
    if options.quick:
        options.studies = min(options.studies, 2)
        options.trials = min(options.trials, 6)
        options.fresh_seeds = 2
    return options


@common.script
@task3.quiet_libraries()
def main(argv: Sequence[str] | None = None) -> int:
    """Run all studies, print, draw."""
    options = parse_args(argv)
    data = common.load_data(options)
    with common.open_run(options, data) as run:
        rows = run_studies(run, options, data)
        table = summarise(rows)
        print(f"\n{table.to_string()}")
        draw(run, options, rows)
        figure = "![Test accuracy of the best configuration against trials](searches.png)"
        title = f"# How good is the configuration that a study finds? {run.data.source}"
        report = [title, table.to_markdown(), figure, NOTES, "## Every study", listed(rows).to_markdown(index=False)]
        summary = {"task": "searches", "designs": table.to_dict("index"), "studies": rows.to_dict("records")}
        run.finish(summary, report, options, common.command_line(__file__, argv))
    return 0


def plan_study(options: argparse.Namespace, data: common.Dataset, design: str, seed: int) -> Plan:
    """The study that task3_optuna.py would run."""
    given = ["--seed", seed, "--trials", options.trials, "--retrain-seeds", options.fresh_seeds]
    quick = ["--quick"] if options.quick else []
    own = task3.parse_args([*map(str, given), *quick, *DESIGNS[design]])
    for name in ("images", "epochs", "width", "batch_size", "model"):
        if getattr(options, name) is not None:
            setattr(own, name, getattr(options, name))
    plan = task3.make_plan(own, data)
    if plan.lab is None:
        raise UserError(f"--model {options.model}: the lab has no settings of its own for it to be compared with")
    return plan


def run_studies(run: Run, options: argparse.Namespace, data: common.Dataset) -> pd.DataFrame:
    """Run the studies that are missing; a row per study of this kind and number of trials, earlier runs' included."""
    path = run.output / "studies.csv"
    rows: list[dict[str, Any]] = []
    if path.exists():
        with common.user_error(f"{path} is not of this program: move it away", ValueError, LookupError):
            table = pd.read_csv(path)
            rows = table.dropna(subset=["setup", "design", "seed", "trials"]).to_dict("records")
    for seed in range(options.seed, options.seed + options.studies):
        for design in options.designs:
            plan = plan_study(options, data, design, seed)
            setup = setup_of(run, plan)
            if any((row["setup"], row["design"], row["seed"]) == (setup, design, seed) for row in rows):
                print(f"{design}, seed {seed}: finished by an earlier run")
                continue
            for row in run_study(run, plan, data):
                rows.append({"setup": setup, "design": design, "seed": seed} | row)
                print({name: value for name, value in rows[-1].items() if name in SHOWN}, flush=True)
            common.write_table(path, pd.DataFrame(rows))  # at once: an interruption loses one study
    table = pd.DataFrame(rows)
    setups = {setup_of(run, plan_study(options, data, design, options.seed)) for design in DESIGNS}
    return table[table["setup"].isin(setups)]


def setup_of(run: Run, plan: Plan) -> str:
    """A checksum of what a study's results depend on, but for its seed."""
    options = plan.options
    definition = task3.define_study(run, plan) | {"seed": None, "precision": run.runtime.precision}
    chosen = [options.sampler, options.pruner, options.trials, options.timeout, options.retrain_seeds, options.quick]
    return hashlib.sha256(json.dumps([definition, chosen], sort_keys=True).encode()).hexdigest()[:12]


def run_study(run: Run, plan: Plan, data: common.Dataset) -> list[dict[str, Any]]:
    """One study, confirmed and compared with the lab's settings after some and after all of its trials."""
    started = time.perf_counter()
    run.progress.expect(task3.work_of_search(plan) + task3.work_of_final_trainings(plan))
    study, stopped = task3.search(run, plan, task3.join_study(run, plan, optuna.storages.InMemoryStorage()))
    if stopped:
        raise stopped
    seconds = time.perf_counter() - started
    candidates = task3.complete_trials_of(study)
    checkpoints = [round(share * plan.options.trials) for share in SHARES]
    parts = {end: [one for one in candidates if one.number < end][: plan.candidate_count] for end in checkpoints}
    if not all(parts.values()):
        raise UserError(f"none of the first {min(checkpoints)} trials was completed")
    together = {one.number: one for part in parts.values() for one in part}
    run.progress.expect(task3.work_of_confirmation(plan, len(together)))
    confirmation = task3.train_candidates(run, plan, list(together.values()))
    winners = {end: winner_of(confirmation, part) for end, part in parts.items()}
    right = test_all(run, plan, data, {str(one.candidate.number): one.candidate for one in winners.values()})
    pruned = [trial.number for trial in study.get_trials(states=(optuna.trial.TrialState.PRUNED,))]
    rows = []
    for end, winner in winners.items():
        own = right[str(winner.candidate.number)]
        difference = common.crossed_interval(own - right["lab"]).times(100)
        row = {
            "trials": end,
            "pruned": sum(number < end for number in pruned),
            "seconds": seconds if end == checkpoints[-1] else None,
            "trial": winner.candidate.number,
            "value": winner.candidate.value,
            "confirmed": winner.mean,
            "test_accuracy": float(own.mean()),
            "lab_test_accuracy": float(right["lab"].mean()),
            "difference": difference.mean,
            "ci_low": difference.low,
            "ci_high": difference.high,
            "n": difference.n,
        }
        rows.append(row | {f"best_{name}": value for name, value in winner.candidate.settings.items()})
    return rows


def winner_of(confirmation: Confirmation, part: Sequence[CompleteTrial]) -> Confirmed:
    """The best of some of the candidates."""
    numbers = {one.number for one in part}
    chosen = [one for one in confirmation.candidates if one.candidate.number in numbers]
    return Confirmation(chosen, confirmation.seeds).winner


def test_all(run: Run, plan: Plan, data: common.Dataset, winners: dict[str, CompleteTrial]) -> dict[str, np.ndarray]:
    """Which test images the winners and the lab's settings label correctly on fresh seeds: (seeds, images) each."""
    assert plan.lab  # plan_study sees to it
    settings = {name: winner.settings for name, winner in winners.items()} | {"lab": plan.lab}
    trained = task3.train_again(run, plan, settings)
    index = task3.test_index(plan, data)
    right = [task3.is_right(run, data, index, one.network) for one in trained]
    groups = task3.grouped([one.configuration for one in trained], right)
    return {name: np.stack(group) for name, group in groups.items()}


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per design: best minus lab, in points of test accuracy, over its studies."""
    last = rows[rows["trials"] == rows["trials"].max()]
    groups = last.groupby("design")
    table = groups["difference"].agg(studies="count", median="median", worst="min", best="max").round(2)
    return table.assign(
        test_accuracy=groups["test_accuracy"].median().round(4),
        pruned=groups["pruned"].median(),
        seconds=groups["seconds"].median().round(0),
    ).sort_values("median", ascending=False)


def listed(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per study, as people read it."""
    last = rows[rows["trials"] == rows["trials"].max()]
    difference = [
        f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
        for mean, low, high in zip(last["difference"], last["ci_low"], last["ci_high"], strict=True)
    ]
    columns = ["design", "seed", "value", "confirmed", "test_accuracy", "best_optimizer", "best_schedule"]
    columns += ["best_activation", "best_lr"]
    return last[columns].assign(best_minus_lab=difference).round(4)


def draw(run: Run, options: argparse.Namespace, rows: pd.DataFrame) -> None:
    """searches.png: test accuracy of the best configuration against trials, a band per design."""
    where = f"{run.data.source}; {options.fresh_seeds} fresh seeds each"
    title = f"How good is the best configuration after so many trials?\n{where}"
    with run.figure("searches.png", title, size=(9, 5.5)) as (_, axes):
        axis = axes[0, 0]
        for design, part in rows.groupby("design"):
            accuracies = 100 * part.pivot_table(index="trials", columns="seed", values="test_accuracy")
            colour = COLOURS[design]
            axis.fill_between(accuracies.index, accuracies.min(axis=1), accuracies.max(axis=1), color=colour, alpha=0.2)
            axis.plot(
                accuracies.index,
                accuracies.median(axis=1),
                "o-",
                color=colour,
                label=f"{design}: median and range of {accuracies.shape[1]} studies",
            )
        lab = 100 * rows["lab_test_accuracy"].mean()
        axis.axhline(lab, color=task3.COLOURS["lab"], linestyle="--", label="the lab's settings: mean")
        axis.set(xlabel="trials", ylabel="test accuracy on fresh seeds, %", xticks=sorted(set(rows["trials"])))
        axis.legend()


if __name__ == "__main__":
    sys.exit(main())
