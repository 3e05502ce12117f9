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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from common import MUON, PRESETS, Moves, Recipe, Run, Split, Stem, UserError

TARGETS = (0.80, 0.86, 0.90)
# Views averaged, and the share of the images that get them: those for which the first view is least certain.
VIEWS = {
    "accuracy": (1, 1.0),
    "flip_averaged": (2, 1.0),
    "six_views": (6, 1.0),
    "selective_10": (6, 0.1),
    "selective_25": (6, 0.25),
    "selective_50": (6, 0.5),
}
# Ten epochs end at 0.799 of the test images (JPEG copy, n = 2 seeds), eleven are the fewest that pass 0.80.
PLAIN = {"batch": 128, "lr": 0.2, "epochs": 11, "loader_workers": 2}
NOTES = """Views: the image alone, averaged with its mirror image, or with both also shifted by a pixel (six);
selective_25: only the least certain 25 % of the images get six views. of_matrix_products: speed relative to a large
matrix product. Trainings finished by an earlier run are not repeated: the minutes below are for this run alone, and its
speeds were measured at another time than the seconds of those trainings."""
# The record recipe for GPUs (github.com/KellerJordan/cifar10-airbench), without its few epochs of training the stem's
# bias. Its TFLOP are counted as below (published: 290); measured on the JPEG copy of CIFAR-10, three seeds, H200.
ANCHOR = "airbench94_muon"
RECORD = MUON.replace(
    width=64, growth=(1, 4, 4), stem=Stem(1, 2, 24), activation="GELU", lr=0.24, batch_size=2000, epochs=8
)
MEASURED = {"tflop": 273.7, "accuracy": 0.8971, "six_views": 0.9067}
RECIPES = PRESETS | {ANCHOR: RECORD}
KEYS = ["preset", "seed", "setup", "train_seconds", "accuracy"]  # of frontier.csv: every training has them
SETTINGS = ["width", "epochs", "optimizer"]  # of a recipe
COSTS = ["parameters", "tflop", "optimizer_tflop", "train_seconds", "gflop_per_second"]


@dataclass(frozen=True)
class SpeedTest:
    """How much is done to measure images per second."""

    steps: int  # of this lab's loop, in a turn
    seconds: float  # of the plain recipe, in a turn
    matrix: int  # rows and columns of the matrices multiplied for comparison


FULL = SpeedTest(steps=24, seconds=8, matrix=4096)
QUICK = SpeedTest(steps=2, seconds=1, matrix=512)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; --quick makes everything small."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seeds", type=common.whole_number(), default=3, help="(default: %(default)s)")
    add("--rounds", type=common.whole_number(), default=3, help="of the speed test (default: %(default)s)")
    add(
        "--presets",
        nargs="+",
        choices=[*RECIPES, "plain"],
        default=[*PRESETS, "plain"],
        help="what to train (default: all but the record recipe)",
    )
    add("--speed-only", action="store_true")
    common.add_common_args(parser, output_dir=Path("results/benchmark"))
    options = parser.parse_args(argv)
    if options.quick:
        options.images = options.images or 1000
        options.epochs = options.epochs or 1
        options.batch_size = options.batch_size or 128
        options.rounds = min(options.rounds, 2)
        options.seeds = min(options.seeds, 2)
    return options


@common.script
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, draw."""
    options = parse_args(argv)
    data = common.load_data(options)
    if options.quick:
        data = replace(data, test_images=data.test_images[::10], test_labels=data.test_labels[::10])
    split = common.split_dataset(data, options.images, validation=False)
    presets = choose_presets(options, data, split)
    with common.open_run(options, data) as run:
        run.progress.expect(work_of_speed(options, presets) + work_of_trainings(options, split, presets))
        speed = compare_speed(run, options, split, presets)
        tables = {"Images per second": speed}
        summary = {"speed": speed.to_dict("index"), "verdict": "images per second only"}
        figures = []
        if not options.speed_only:
            rows = train_all(run, options, data, split, presets)
            summary |= judge(rows)
            tables |= list_tables(rows)
            draw_frontier(run, rows, f"{describe(run, split)}; {options.seeds} seeds")
            figures = ["![](training_frontier.png)"]
        report = [f"# Training benchmark\n\n{describe(run, split)}", summary["verdict"], *figures, NOTES]
        for title, table in tables.items():
            print(f"\n{title}\n{table.to_string(float_format='{:,.4g}'.format)}")
            report += [f"## {title}", table.astype(object).to_markdown(floatfmt=".4g", intfmt=",")]
        print(f"\n{summary['verdict']}")
        run.finish(summary, report, options, common.command_line(__file__, argv))
    return 0


def choose_presets(options: argparse.Namespace, data: common.Dataset, split: Split) -> dict[str, Recipe]:
    """The recipes of --presets but the plain one; raises UserError if there are none, or too few images."""
    presets = {name: common.recipe_from(options, RECIPES[name]) for name in options.presets if name != "plain"}
    if not presets:
        raise UserError("--presets plain: name the preset, too, whose network it trains")
    needed = max(PLAIN["batch"], *(recipe.training.batch_size for recipe in presets.values()))
    if len(split.train) < needed:
        raise UserError(f"{data.source} has {len(split.train)} training images, {needed} are needed")
    return presets


def describe(run: Run, split: Split) -> str:
    """Data and machine in one line."""
    machine = run.environment
    where = machine.gpu or f"{machine.cpu}, {machine.threads} threads"
    return f"{run.data.source}, {len(split.train):,} images; {where}, {machine.precision}, torch {torch.__version__}"


# ================================================================ the plain recipe


class PlainDataset(Dataset):
    """As torchvision's own CIFAR10: images in memory, a PIL image and its transforms for every item."""

    def __init__(self, data: common.Dataset, split: Split) -> None:
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(data.train_images.shape[-1], padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(split.mean, split.std),
            ]
        )
        self.pixels = data.train_images[split.train].permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = data.train_labels[split.train].tolist()

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index].squeeze())), self.labels[index]

    def __len__(self) -> int:
        return len(self.labels)


class Plain:
    """A training by the plain recipe."""

    def __init__(self, data: common.Dataset, split: Split, recipe: Recipe, device: str, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.loader: Any = DataLoader(
            PlainDataset(data, split),
            PLAIN["batch"],
            shuffle=True,
            drop_last=True,
            num_workers=PLAIN["loader_workers"],
            persistent_workers=True,
        )
        network = recipe.replace(head="biased").network  # an ordinary head for an ordinary optimizer
        self.whole = common.make_model(network, data, split, seed).to(device, memory_format=torch.contiguous_format)
        self.model = self.whole[1]  # without Normalise: the transforms do that
        self.device = device
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.SGD(weights, PLAIN["lr"], momentum=0.9, nesterov=True, weight_decay=5e-4)
        steps = PLAIN["epochs"] * len(self.loader)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, PLAIN["lr"], total_steps=steps)

    def train(self, batches: Any, limit: float = np.inf) -> tuple[int, float]:
        """One step for each of ``batches``, or for ``limit`` seconds without schedule; returns (images, seconds)."""
        start = time.perf_counter()
        images = 0
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

    def epochs(self, data: common.Dataset) -> Iterator[dict[str, float]]:
        """Train; yields epoch, seconds (of training, summed) and test accuracy."""
        fp32 = common.Runtime(self.device, "fp32", torch.get_num_threads())
        seconds = 0.0
        for epoch in range(PLAIN["epochs"]):
            seconds += self.train(self.loader)[1]
            found = common.score(common.predict(self.whole, data.test_images, fp32), data.test_labels)
            yield {"epoch": epoch + 1, "train_seconds": seconds, "accuracy": found.accuracy}


# ================================================================ 1. images per second


def count_tflop(data: common.Dataset, recipe: Recipe, images: int) -> tuple[float, float]:
    """TFLOP of a training on so many ``images``, of convolutions and matrix products: (all, the optimizer's part)."""
    training = recipe.training
    model = common.build_model(recipe.network, data.shape, len(data.classes))
    optimizer = common.make_optimizer(training, model)
    with FlopCounterMode(display=False) as network:
        model(data.train_images[:8].float()).sum().backward()
    with FlopCounterMode(display=False) as update:
        optimizer.step()
    of_update = update.get_total_flops()
    of_step = network.get_total_flops() / 8 * training.batch_size + of_update
    steps = training.epochs * (images // training.batch_size)
    return of_step * steps / 1e12, of_update * steps / 1e12


def work_of_speed(options: argparse.Namespace, presets: Mapping[str, Recipe]) -> float:
    """Images that this lab's loop trains on."""
    steps = (QUICK if options.quick else FULL).steps
    return (1 + options.rounds) * steps * sum(recipe.training.batch_size for recipe in presets.values())


def compare_speed(run: Run, options: argparse.Namespace, split: Split, presets: Mapping[str, Recipe]) -> pd.DataFrame:
    """Images per second of both loops, taking turns; the first round warms up and is not counted."""
    test = QUICK if options.quick else FULL
    rows = []
    gflop = []  # per image
    for name, recipe in presets.items():
        run.progress.stage(f"images per second, {name}")
        once = recipe.replace(epochs=1)
        size = once.training.batch_size
        index = split.train[: test.steps * size]
        ours = common.make_model(once.network, run.data, split)
        plain = Plain(run.data, split, once, run.runtime.device)
        gflop.append(count_tflop(run.data, once, size)[0] * 1000 / size)
        for turn in range(1 + options.rounds):
            epoch = next(common.train_epochs(ours, run.data, once.training, run.runtime, index))
            batches = iter(plain.loader)
            next(batches)  # starting its workers is not timed
            images, seconds = plain.train(batches, test.seconds)
            run.progress.advance(test.steps * size)
            if turn:
                rows.append({"preset": name, "ours": len(index) / epoch.seconds, "plain": images / seconds})
    run.write_table("speed.csv", pd.DataFrame(rows))
    groups = pd.DataFrame(rows).groupby("preset", sort=False)
    ratios = [common.interval(np.log(group.ours / group.plain).to_numpy()) for _, group in groups]
    table = groups.mean().assign(n=options.rounds)
    table[["ratio", "ci_low", "ci_high"]] = np.exp([(ratio.mean, ratio.low, ratio.high) for ratio in ratios])
    table["gflop_per_second"] = table.ours * gflop
    peak = gflop_per_second_of_products(run.runtime, test.matrix)
    return table.assign(of_matrix_products=table.gflop_per_second / peak)


def gflop_per_second_of_products(runtime: common.Runtime, size: int) -> float:
    """The speed of the fastest of a few products of large matrices."""
    matrix = torch.randn(size, size, device=runtime.device)
    if runtime.precision == "bf16":
        matrix = matrix.bfloat16()
    fastest = np.inf
    for _ in range(6):
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # waits for the device
        fastest = min(fastest, time.perf_counter() - start)
    return 2e-9 * size**3 / fastest


# ================================================================ 2. accuracy against arithmetic and time


def work_of_trainings(options: argparse.Namespace, split: Split, presets: Mapping[str, Recipe]) -> float:
    """Images to train on."""
    if options.speed_only:
        return 0
    epochs = sum(recipe.training.epochs for recipe in presets.values())
    if "plain" in options.presets:
        epochs += PLAIN["epochs"]
    return options.seeds * epochs * len(split.train)


def train_all(
    run: Run, options: argparse.Namespace, data: common.Dataset, split: Split, presets: Mapping[str, Recipe]
) -> pd.DataFrame:
    """All trainings that no earlier run has finished: a row per training, of the plain recipe a row per epoch."""
    path = run.output / "frontier.csv"
    rows = read_frontier(path)
    seeds = range(options.seed, options.seed + options.seeds)
    first = next(iter(presets))
    recipes = dict(presets)
    setups = {name: f"{describe(run, split)}; {data.fingerprint}; {recipe}" for name, recipe in presets.items()}
    if "plain" in options.presets:
        recipes["plain"] = presets[first]
        setups["plain"] = f"{setups[first]}; {PLAIN}"
    for seed, (name, recipe) in product(seeds, recipes.items()):  # presets take turns
        epochs = PLAIN["epochs"] if name == "plain" else recipe.training.epochs
        if ((rows.setup == setups[name]) & (rows.seed == seed)).any():
            run.progress.stage(f"{name}, seed {seed}: finished by an earlier run")
        else:
            run.progress.stage(f"{name}, seed {seed}")
            new: Iterable[Mapping[str, Any]] = [measure(data, split, recipe, run.runtime, seed)]
            if name == "plain":
                new = Plain(data, split, recipe, run.runtime.device, seed).epochs(data)
            found = pd.DataFrame([{"preset": name, "seed": seed, "setup": setups[name], **row} for row in new])
            rows = pd.concat([rows, found]) if len(rows) else found
            common.write_table(path, rows)
        run.progress.advance(epochs * len(split.train))
    chosen = rows[rows.setup.isin(setups.values()) & rows.seed.isin(seeds)]
    chosen = chosen.sort_values("preset", key=lambda names: names.map([*setups].index), kind="stable")
    if "plain" in setups:
        columns = ["seed", "epoch", "train_seconds", "accuracy"]
        run.write_table("plain.csv", chosen.loc[chosen.preset == "plain", columns])
    return chosen


def read_frontier(path: Path) -> pd.DataFrame:
    """The trainings that earlier runs have finished; raises UserError for a file that is no such table."""
    if not path.exists():
        return pd.DataFrame(columns=KEYS)
    try:
        return pd.read_csv(path).dropna(subset=KEYS)
    except (ValueError, KeyError):  # of pandas: no table, or another one
        raise UserError(f"{path} is damaged: move it away, and its trainings are measured again") from None


def measure(
    data: common.Dataset, split: Split, recipe: Recipe, runtime: common.Runtime, seed: int
) -> dict[str, float | str]:
    """Train once; returns seconds in all, and test accuracy by number of views."""
    start = time.perf_counter()
    model = common.make_model(recipe.network, data, split, seed)
    for _ in common.train_epochs(model, data, recipe.training, runtime, split.train, seed=seed):
        pass
    seconds = time.perf_counter() - start
    tflop, optimizer_tflop = count_tflop(data, recipe, len(split.train))
    return {
        "width": recipe.network.width,
        "epochs": recipe.training.epochs,
        "optimizer": recipe.training.optimizer,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "tflop": tflop,
        "optimizer_tflop": optimizer_tflop,
        "train_seconds": seconds,
        "gflop_per_second": 1000 * tflop / seconds,
        **accuracies(model, data, runtime),
    }


def accuracies(model: torch.nn.Module, data: common.Dataset, runtime: common.Runtime) -> dict[str, float]:
    """Test accuracy by ``VIEWS``."""
    every = torch.arange(len(data.test_labels))
    logits = []
    for shift, flip in product((0, 1, -1), (False, True)):
        moves = Moves(torch.full((len(every), 2), shift), torch.full((len(every),), flip))
        logits.append(common.predict(model, common.draw_batch(data.test_images, every, moves), runtime))
    least_certain = logits[0].softmax(1).amax(1).argsort()
    found = {}
    for name, (views, share) in VIEWS.items():
        chosen = least_certain[: round(share * len(every))]
        mixed = logits[0].clone()
        mixed[chosen] = torch.stack(logits[:views]).mean(0)[chosen]
        found[name] = common.score(mixed, data.test_labels).accuracy
    return found


# ================================================================ 3. tables, figure


def average_presets(rows: pd.DataFrame) -> pd.DataFrame:
    """Settings, mean costs and mean accuracies of every preset, with the number of seeds."""
    groups = rows[rows.preset != "plain"].groupby("preset", sort=False)
    means = groups[SETTINGS].first().join(groups[[*COSTS, *VIEWS]].mean())
    means = means.astype({"width": int, "epochs": int, "parameters": int})
    return means.assign(accuracy_sd=groups.accuracy.std(), n=groups.size())


def list_costs(means: pd.DataFrame) -> list[dict[str, Any]]:
    """The preset that reaches each target accuracy with the least arithmetic."""
    costs = []
    for target, name in product(TARGETS, ("accuracy", "selective_25", "six_views")):
        cheapest = means[means[name] >= target].nsmallest(1, "tflop").reset_index()
        found = cheapest[["preset", "tflop", "train_seconds"]].to_dict("records") or [{"preset": "none"}]
        costs.append({"target": target, "views": name, **found[0]})
    return costs


def list_tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Means by preset, the cost of each target accuracy, and what more views bring, by title."""
    means = average_presets(rows)
    views = means[list(VIEWS)].T.rename_axis("views")
    views.insert(0, "mean_views", [1 + share * (count - 1) for count, share in VIEWS.values()])
    return {
        "Accuracy against compute and time": means.drop(columns=["width", "optimizer", *list(VIEWS)[1:]]),
        "Cost of an accuracy": pd.DataFrame(list_costs(means)).set_index("target"),
        "Accuracy by views at test time": views.sort_values("mean_views"),
    }


def judge(rows: pd.DataFrame) -> dict[str, Any]:
    """For the summary: means by preset, the cost of each target accuracy, that of the plain recipe, and a verdict."""
    means = average_presets(rows)
    fast = means.iloc[0]
    summary: dict[str, Any] = {"presets": means.to_dict("index"), "to_accuracy": list_costs(means)}
    verdict = f"{fast.name}: {fast.accuracy:.4f} with {fast.tflop:.1f} TFLOP in {fast.train_seconds:.1f} s"
    curves = rows[rows.preset == "plain"]
    if len(curves):
        target = TARGETS[0]
        curve = curves.groupby("epoch")[["train_seconds", "accuracy"]].mean()
        end = curve.iloc[-1]
        plain = curve[curve.accuracy >= target].train_seconds.min()
        verdict += f"; the plain recipe: {end.accuracy:.4f} in {end.train_seconds:.0f} s"
        if plain > 0 and fast.accuracy >= target:
            verdict += f", {target:.2f} after {plain:.0f} s, {plain / fast.train_seconds:.1f} times as long"
        summary["plain"] = {
            "target": target,
            "seconds": plain,
            "accuracy": end.accuracy,
            "n": curves.seed.nunique(),
            "recipe": PLAIN,
        }
    return summary | {"verdict": verdict}


def draw_frontier(run: Run, rows: pd.DataFrame, title: str) -> None:
    """Test accuracy against TFLOP, with the record recipe's, and against seconds, with the plain recipe's."""
    names = {"accuracy": "one view", "flip_averaged": "two views", "six_views": "six views"}
    lines = dict(zip(names, ("-", "--", ":"), strict=True))
    ours = rows[~rows.preset.isin(["plain", ANCHOR])]
    curves = rows[rows.preset == "plain"]
    both = rows.groupby("preset", sort=False)[["tflop", "train_seconds", *names]].mean()
    if ANCHOR not in both.index and run.data.name == "cifar10":
        both.loc[ANCHOR] = pd.Series(MEASURED)
    means = both.drop(index=["plain", ANCHOR], errors="ignore")
    with run.figure("training_frontier.png", title, columns=2, size=(13, 7)) as (_, ((left, right),)):
        axes = {"tflop": left, "train_seconds": right}
        if ANCHOR in both.index:
            for (cost, axis), (views, marker) in product(axes.items(), (("accuracy", "*"), ("six_views", "P"))):
                if not np.isnan(both[cost][ANCHOR]):
                    style = {
                        "markersize": 13,
                        "color": common.PALETTE[1],
                        "label": f"{ANCHOR}'s recipe, {names[views]}",
                    }
                    axis.plot(both[cost][ANCHOR], both[views][ANCHOR], marker, **style)
        label = "plain recipe, the first preset's network"
        for _, curve in curves.groupby("seed"):
            right.plot(curve.train_seconds, curve.accuracy, ".-", color=common.PALETTE[4], label=label)
            label = "_"  # one entry in the legend
        for cost, unit in (("tflop", "TFLOP"), ("train_seconds", "seconds")):
            axis = axes[cost]
            for views, text in names.items():
                style = {"marker": "o", "color": common.PALETTE[0], "label": f"this lab, {text}"}
                axis.plot(means[cost], means[views], lines[views], **style)
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
