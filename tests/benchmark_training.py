"""How much compute, and how much time here, does a training need to reach an accuracy? Run by hand.

  python tests/benchmark_training.py                 everything, on CIFAR-10, three seeds
  python tests/benchmark_training.py --speed-only    only images per second
  python tests/benchmark_training.py --quick         every step on a few images, in about a minute

1. Images per second of this lab's loop and of the plain recipe's on every preset's network, alternating in one run.
2. Every preset, trained on all training images: test accuracy against TFLOP (counted; the same on every processor) and
   seconds (on this machine; a whole training without imports and reading the data). "plain" trains the first preset's
   network as an ordinary tutorial does: DataLoader, PIL transforms per image, NCHW, fp32, SGD with Nesterov momentum
   and torch's one-cycle schedule; its clock is stopped while the accuracy is measured. "airbench94_muon" is the record
   recipe for GPUs (274 TFLOP), in this lab's loop.
3. Views at test time: the image, its mirror image, and both shifted by a pixel, averaged for all images or only for
   those for which the first view is least certain.

Finished trainings are kept in frontier.csv, and a later run continues from there: delete it if the training changes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.ticker import LogLocator
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
from common import PRESETS, Recipe, Row

TARGETS = (0.80, 0.86, 0.90)
# Views averaged, and the share of the images that get them: those for which the first view is least certain.
VIEWS = {"accuracy": (1, 1.0), "flip_averaged": (2, 1.0), "six_views": (6, 1.0)}
VIEWS |= {"selective_10": (6, 0.1), "selective_25": (6, 0.25), "selective_50": (6, 0.5)}
# Ten epochs end at 0.799 of the test images (JPEG copy, n = 2 seeds), eleven are the fewest that pass 0.80.
PLAIN = {"batch": 128, "lr": 0.2, "epochs": 11, "loader_workers": 2}
NOTES = """Views: the image alone, averaged with its mirror image, or with both also shifted by a pixel (six);
selective_25: only the least certain 25 % of the images get six views. of_matrix_products: speed relative to a large
matrix product. Trainings finished by an earlier run are not repeated: the minutes below are for this run alone, and its
speeds were measured at another time than the seconds of those trainings."""
# The record recipe for GPUs (github.com/KellerJordan/cifar10-airbench), without its few epochs of training the stem's
# bias. Its TFLOP are counted as below (published: 290); measured on the JPEG copy of CIFAR-10, three seeds, H200.
ANCHOR = "airbench94_muon"
RECORD = {"growth": (1, 4, 4), "stem": (1, 2, 24), "activation": "GELU", "lr": 0.24, "batch_size": 2000, "epochs": 8}
MEASURED = {"tflop": 273.7, "accuracy": 0.8971, "six_views": 0.9067}
RECIPES = PRESETS | {ANCHOR: replace(common.MUON, width=64, **RECORD)}
FACTS = ["width", "epochs", "optimizer", "parameters", "tflop", "optimizer_tflop", "train_seconds", "gflop_per_second"]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; --quick makes everything small."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=common.number(), default=3, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=common.number(), default=3, help="of the speed test (default: %(default)s)")
    names: Row = {"choices": [*RECIPES, "plain"], "default": [*PRESETS, "plain"]}
    parser.add_argument("--presets", nargs="+", **names, help="what to train (default: all but the record recipe)")
    parser.add_argument("--speed-only", action="store_true")
    common.add_common_args(parser, presets=False, output_dir=Path("results/benchmark"))
    options = parser.parse_args(argv)
    if options.quick:
        given = options.images or 1000, options.epochs or 1, options.batch_size or 128
        options.images, options.epochs, options.batch_size = given
        options.rounds, options.seeds = min(options.rounds, 2), min(options.seeds, 2)
    return options


@common.script
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, draw."""
    options = parse_args(argv)
    data = common.load_data(options)
    if options.quick:
        data = replace(data, test_images=data.test_images[::10], test_labels=data.test_labels[::10])
    split = common.split_dataset(data, options.images, validation=False)
    presets = {name: common.recipe_from(options, RECIPES[name]) for name in options.presets if name != "plain"}
    if not presets:
        raise common.UserError("--presets plain: name the preset, too, whose network it trains")
    needed = max(PLAIN["batch"], *(recipe.batch_size for recipe in presets.values()))
    if len(split.train) < needed:
        raise common.UserError(f"{data.source} has {len(split.train)} training images, {needed} are needed")
    with common.open_run(options, data) as run:
        tables = {"Images per second": compare_speed(run, split, presets)}
        summary: Row = {"speed": tables["Images per second"].to_dict("index"), "verdict": "images per second only"}
        if not options.speed_only:
            rows = train_all(run, data, split, presets)
            summary |= judge(rows, tables)
            draw_frontier(run, rows, f"{describe(run, split)}; {options.seeds} seeds")
        report = [f"# Training benchmark\n\n{describe(run, split)}", summary["verdict"]]
        report += ["![](training_frontier.png)"] * (not options.speed_only) + [NOTES]
        for title, table in tables.items():
            print(f"\n{title}\n{table.to_string(float_format='{:,.4g}'.format)}")
            report += [f"## {title}", table.astype(object).to_markdown(floatfmt=".4g", intfmt=",")]
        print(f"\n{summary['verdict']}")
        run.finish(summary, report, keep=["frontier.csv"])
    return 0


def describe(run: common.Run, split: common.Split) -> str:
    """Data and machine in one line."""
    machine, (_, precision, threads) = run.environment, run.runtime
    where = machine["gpu"] or f"{machine['cpu']}, {threads} threads"
    return f"{run.data.source}, {len(split.train):,} images; {where}, {precision}, torch {torch.__version__}"


# ================================================================ the plain recipe


class PlainDataset(Dataset):
    """As torchvision's own CIFAR10: images in memory, a PIL image and its transforms for every item."""

    def __init__(self, data: common.Dataset, split: common.Split) -> None:
        steps = [transforms.RandomCrop(data.train_images.shape[-1], padding=4), transforms.RandomHorizontalFlip()]
        steps += [transforms.ToTensor(), transforms.Normalize(split.mean, split.std)]
        self.transform = transforms.Compose(steps)
        self.pixels = data.train_images[split.train].permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = data.train_labels[split.train].tolist()

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index].squeeze())), self.labels[index]

    def __len__(self) -> int:
        return len(self.labels)


class Plain:
    """A training by the plain recipe."""

    def __init__(self, data: common.Dataset, split: common.Split, recipe: Recipe, device: str, seed: int = 0) -> None:
        torch.manual_seed(seed)
        workers = {"num_workers": PLAIN["loader_workers"], "persistent_workers": True}
        self.loader: Any = DataLoader(PlainDataset(data, split), PLAIN["batch"], True, drop_last=True, **workers)
        recipe = replace(recipe, optimizer="SGD+nesterov")  # Muon has a head of its own
        self.whole = common.make_model(recipe, data, split, seed).to(device, memory_format=torch.contiguous_format)
        self.model, self.device = self.whole[1], device  # without Normalise: the transforms do that
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.SGD(weights, PLAIN["lr"], momentum=0.9, nesterov=True, weight_decay=5e-4)
        steps = PLAIN["epochs"] * len(self.loader)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, PLAIN["lr"], total_steps=steps)

    def train(self, batches: Any, limit: float = np.inf) -> tuple[int, float]:
        """One step for each of ``batches``, or for ``limit`` seconds without schedule; returns (images, seconds)."""
        start, images = time.perf_counter(), 0
        self.model.train()
        for inputs, labels in batches:
            loss = F.cross_entropy(self.model(inputs.to(self.device)), labels.to(self.device))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if limit == np.inf:
                self.schedule.step()
            images += len(labels)
            if time.perf_counter() - start > limit:
                break
        return images, time.perf_counter() - start

    def epochs(self, data: common.Dataset) -> Iterator[Row]:
        """Train; yields epoch, seconds (of training, summed) and test accuracy."""
        seconds, fp32 = 0.0, common.Runtime(self.device, "fp32", torch.get_num_threads())
        for epoch in range(PLAIN["epochs"]):
            seconds += self.train(self.loader)[1]
            right = common.score(common.predict(self.whole, data.test_images, fp32), data.test_labels)[1]
            yield {"epoch": epoch + 1, "train_seconds": seconds, "accuracy": right.mean()}


# ================================================================ 1. images per second


def count_tflop(data: common.Dataset, recipe: Recipe, images: int) -> tuple[float, float]:
    """TFLOP of a training on so many ``images``, of convolutions and matrix products: (all, the optimizer's part)."""
    model, steps = common.make_model(recipe, data), recipe.epochs * (images // recipe.batch_size)
    optimizer = common.make_optimizer(recipe, model)
    with FlopCounterMode(display=False) as network:
        model(data.train_images[:8].float()).sum().backward()
    with FlopCounterMode(display=False) as update:
        optimizer.step()
    of_update = update.get_total_flops()
    of_step = network.get_total_flops() / 8 * recipe.batch_size + of_update
    return of_step * steps / 1e12, of_update * steps / 1e12


def compare_speed(run: common.Run, split: common.Split, presets: dict[str, Recipe]) -> pd.DataFrame:
    """Images per second of both loops, taking turns; the first round warms up and is not counted."""
    batches, limit, size = (2, 1, 512) if run.options.quick else (24, 8, 4096)
    rows, gflop = [], []
    for name, recipe in presets.items():
        run.stage(f"images per second, {name}")
        index, once = split.train[: batches * recipe.batch_size], replace(recipe, epochs=1)
        ours, plain = common.make_model(recipe, run.data, split), Plain(run.data, split, recipe, run.runtime.device)
        gflop.append(count_tflop(run.data, once, recipe.batch_size)[0] * 1000 / recipe.batch_size)
        for turn in range(run.options.rounds + 1):
            row = next(common.train_epochs(ours, run.data, once, run.runtime, index))
            batch = iter(plain.loader)
            next(batch)  # starting its workers is not timed
            images, seconds = plain.train(batch, limit)
            if turn:
                rows.append({"preset": name, "ours": len(index) / row["seconds"], "plain": images / seconds})
    run.table("speed.csv", pd.DataFrame(rows))
    groups = pd.DataFrame(rows).groupby("preset", sort=False)
    ratios = [common.interval(np.log(group.ours / group.plain)) for _, group in groups]
    table = groups.mean().assign(n=run.options.rounds)
    table[["ratio", "ci_low", "ci_high"]] = np.exp([ratio[:3] for ratio in ratios])
    table["gflop_per_second"] = table.ours * gflop
    matrix = torch.randn(size, size, device=run.runtime.device)
    matrix = matrix.bfloat16() if run.runtime.precision == "bf16" else matrix
    clock = [time.perf_counter() for _ in range(6) if (matrix @ matrix)[0, 0].isfinite()]  # which waits for the device
    peak = 2e-9 * size**3 / np.diff(clock).min()
    return table.assign(of_matrix_products=table.gflop_per_second / peak)


# ================================================================ 2. accuracy against arithmetic and time


def train_all(run: common.Run, data: common.Dataset, split: common.Split, presets: dict[str, Recipe]) -> pd.DataFrame:
    """All trainings that no earlier run has finished: a row per training, of the plain recipe a row per epoch."""
    path, keys = run.output / "frontier.csv", ["preset", "seed", "setup", "train_seconds", "accuracy"]
    try:
        rows = pd.read_csv(path).dropna(subset=keys) if path.exists() else pd.DataFrame(columns=keys)
    except (ValueError, KeyError):  # of pandas: no table, or another one
        raise common.UserError(f"{path} is damaged: move it away, and its trainings are measured again") from None
    seeds = range(run.options.seed, run.options.seed + run.options.seeds)
    setups = {name: f"{describe(run, split)}; {data.fingerprint}; {recipe}" for name, recipe in presets.items()}
    if "plain" in run.options.presets:
        setups["plain"] = f"{setups[next(iter(presets))]}; {PLAIN}"
    for seed in seeds:  # in the outer loop: presets take turns
        for name, setup in setups.items():
            done = bool(((rows.setup == setup) & (rows.seed == seed)).any())
            run.stage(f"{name}, seed {seed}{': finished by an earlier run' * done}")
            if done:
                continue
            recipe = presets.get(name, next(iter(presets.values())))
            plain = name == "plain" and Plain(data, split, recipe, run.runtime.device, seed)
            new = plain.epochs(data) if plain else [measure(data, split, recipe, run.runtime, seed)]
            frame = pd.DataFrame([{"preset": name, "seed": seed, "setup": setup} | row for row in new])
            rows = pd.concat([rows, frame]) if len(rows) else frame
            with common.atomic_path(path) as temporary:
                rows.to_csv(temporary, index=False)
    chosen = rows[rows.setup.isin(setups.values()) & rows.seed.isin(seeds)]
    chosen = chosen.sort_values("preset", key=lambda names: names.map([*setups].index), kind="stable")
    if "plain" in setups:
        run.table("plain.csv", chosen.loc[chosen.preset == "plain", ["seed", "epoch", "train_seconds", "accuracy"]])
    return chosen


def measure(data: common.Dataset, split: common.Split, recipe: Recipe, runtime: common.Runtime, seed: int) -> Row:
    """Train once; returns seconds in all, and test accuracy by number of views."""
    start = time.perf_counter()
    model = common.make_model(recipe, data, split, seed)
    list(common.train_epochs(model, data, recipe, runtime, split.train, seed=seed))
    seconds = time.perf_counter() - start
    tflop, optimizer = count_tflop(data, recipe, len(split.train))
    facts: Row = {name: getattr(recipe, name) for name in FACTS[:3]}
    facts["parameters"] = sum(weight.numel() for weight in model.parameters())
    facts |= {"tflop": tflop, "optimizer_tflop": optimizer, "train_seconds": seconds}
    return facts | {"gflop_per_second": 1000 * tflop / seconds} | accuracies(model, data, runtime)


def accuracies(model: torch.nn.Module, data: common.Dataset, runtime: common.Runtime) -> Row:
    """Test accuracy by ``VIEWS``."""
    every, logits = torch.arange(len(data.test_labels)), []
    for shift, flip in product((0, 1, -1), (False, True)):
        moves = torch.full((len(every), 2), shift), torch.full((len(every),), flip)
        logits.append(common.predict(model, common.draw_batch(data.test_images, every, *moves), runtime))
    least_certain, found = logits[0].softmax(1).amax(1).argsort(), {}
    for name, (views, share) in VIEWS.items():
        chosen, mixed = least_certain[: round(share * len(every))], logits[0].clone()
        mixed[chosen] = torch.stack(logits[:views]).mean(0)[chosen]
        found[name] = common.score(mixed, data.test_labels)[1].mean()
    return found


# ================================================================ 3. tables, figure


def judge(rows: pd.DataFrame, tables: dict[str, pd.DataFrame]) -> Row:
    """Means by preset, the cost of each target accuracy, that of the plain recipe; adds tables, returns a summary."""
    groups, curves = rows[rows.preset != "plain"].groupby("preset", sort=False), rows[rows.preset == "plain"]
    means = groups[FACTS[:3]].first().join(groups[[*FACTS[3:], *VIEWS]].mean())
    means = means.astype({"width": int, "epochs": int, "parameters": int}).assign(
        accuracy_sd=groups.accuracy.std(), n=groups.size()
    )
    costs: list[Row] = []
    for target, name in product(TARGETS, ("accuracy", "selective_25", "six_views")):
        cheapest = means[means[name] >= target].nsmallest(1, "tflop").reset_index()
        found = cheapest[["preset", "tflop", "train_seconds"]].to_dict("records") or [{"preset": "none"}]
        costs.append({"target": target, "views": name} | found[0])
    views = means[list(VIEWS)].T.rename_axis("views")
    views.insert(0, "mean_views", [1 + share * (count - 1) for count, share in VIEWS.values()])
    fast, target, summary = means.iloc[0], TARGETS[0], Row(presets=means.to_dict("index"), to_accuracy=costs)
    verdict = f"{fast.name}: {fast.accuracy:.4f} with {fast.tflop:.1f} TFLOP in {fast.train_seconds:.1f} s"
    if len(curves):
        curve = curves.groupby("epoch")[["train_seconds", "accuracy"]].mean()
        end, plain = curve.iloc[-1], curve[curve.accuracy >= target].train_seconds.min()
        verdict += f"; the plain recipe: {end.accuracy:.4f} in {end.train_seconds:.0f} s"
        if plain > 0 and fast.accuracy >= target:
            verdict += f", {target:.2f} after {plain:.0f} s, {plain / fast.train_seconds:.1f} times as long"
        facts = {"target": target, "seconds": plain, "accuracy": end.accuracy, "n": curves.seed.nunique()}
        summary["plain"] = facts | {"recipe": PLAIN}
    tables["Accuracy against compute and time"] = means.drop(columns=["width", "optimizer", *list(VIEWS)[1:]])
    tables["Cost of an accuracy"] = pd.DataFrame(costs).set_index("target")
    tables["Accuracy by views at test time"] = views.sort_values("mean_views")
    return summary | {"verdict": verdict}


def draw_frontier(run: common.Run, rows: pd.DataFrame, title: str) -> None:
    """Test accuracy against TFLOP, with the record recipe's, and against seconds, with the plain recipe's."""
    names = {"accuracy": "one view", "flip_averaged": "two views", "six_views": "six views"}
    ours, curves = rows[~rows.preset.isin(["plain", ANCHOR])], rows[rows.preset == "plain"]
    both = rows.groupby("preset", sort=False)[["tflop", "train_seconds", *names]].mean()
    if ANCHOR not in both.index and run.data.name == "cifar10":
        both.loc[ANCHOR] = pd.Series(MEASURED)
    means = both.drop(index=["plain", ANCHOR], errors="ignore")
    with run.figure("training_frontier.png", title, columns=2, size=(13, 7)) as (_, ((left, right),)):
        for (axis, cost), views in product(((left, "tflop"), (right, "train_seconds")), ("accuracy", "six_views")):
            if ANCHOR in both.index and not np.isnan(both[cost][ANCHOR]):
                style = {"markersize": 13, "color": common.PALETTE[1], "label": f"{ANCHOR}'s recipe, {names[views]}"}
                axis.plot(both[cost][ANCHOR], both[views][ANCHOR], "*" if views == "accuracy" else "P", **style)
        for number, (_, curve) in enumerate(curves.groupby("seed")):
            label = "_" * (number > 0) + "plain recipe, the first preset's network"
            right.plot(curve.train_seconds, curve.accuracy, ".-", color=common.PALETTE[4], label=label)
        for axis, cost, unit in ((left, "tflop", "TFLOP"), (right, "train_seconds", "seconds")):
            for (views, text), line in zip(names.items(), ("-", "--", ":"), strict=True):
                style = {"marker": "o", "color": common.PALETTE[0], "label": f"this lab, {text}"}
                axis.plot(means[cost], means[views], line, **style)
            axis.scatter(ours[cost], ours.accuracy, s=18, color="black", zorder=3)
            for name, row in means.iterrows():
                axis.annotate(name, (row[cost], row.accuracy), (6, -16), textcoords="offset points", fontsize=12)
            axis.hlines(TARGETS, 0, 1, "grey", "--", linewidth=0.8, transform=axis.get_yaxis_transform())
            axis.set(xscale="log", xlabel=f"{unit} of training (log scale)", ylabel="test accuracy")
            axis.set_ylim(bottom=min(0.7, means.accuracy.min() - 0.05))
            axis.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter="")
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=11)


if __name__ == "__main__":
    sys.exit(main())
