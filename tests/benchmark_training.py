"""How fast is our training loop, and how fast does it reach an accuracy? Run by hand: it takes 30 to 80 minutes.

  python tests/benchmark_training.py                 everything, on CIFAR-10, three seeds
  python tests/benchmark_training.py --speed-only    pictures per second alone, four minutes
  python tests/benchmark_training.py --quick         everything on a few pictures, about a minute

1. Pictures per second, ours against the plain recipe that everyone copies (torchvision-style Dataset and
   DataLoader over PIL transforms, NCHW, fp32, constant learning rate) for every preset's network, the two
   taking turns in one run; and how much of the processor that uses, against large matrix products.
2. Seconds to a test accuracy: every preset of ``common.PRESETS``, several seeds, and the plain recipe, which
   is given ten minutes. The clock includes all of a training but imports and reading the data; for the plain recipe
   it stands still while the accuracy is measured.

Prints a table and, last, one line of JSON; writes results/benchmark/ and, when all presets took part on CIFAR-10,
docs/images/training_frontier.png. Every finished training stays in frontier.csv: run again, it goes on, and the tables
and the figure are of all that this setup has finished. Delete the file after a change to the training itself.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.datasets import VisionDataset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common

# Of a round, our batches and the plain recipe's seconds; seconds for the plain recipe's training; rows of a matrix.
SIZES = {"batches": 24, "plain_seconds": 8, "plain_limit": 600, "matrix": 4096}
QUICK_SIZES = {"batches": 2, "plain_seconds": 1, "plain_limit": 1, "matrix": 512}
QUICK_PICTURES = 1000
PLAIN_LR, PLAIN_BATCH, PLAIN_WORKERS = 0.05, 128, 2
FACTS = ("width", "stem_stride", "epochs", "optimizer", "parameters")  # of a preset, in tables
TARGETS = (0.80, 0.86, 0.90)
VIEWS = {"accuracy": 1, "flip_averaged": 2, "six_views": 6}  # averaged at test time; see common.predict


class PlainDataset(VisionDataset):
    """As torchvision's own CIFAR10: pictures in memory, a PIL image and its transforms for every item."""

    def __init__(self, data: common.Dataset) -> None:
        padding = [transforms.RandomCrop(data.train_images.shape[-1], padding=4), transforms.RandomHorizontalFlip()]
        steps = [*padding, transforms.ToTensor(), transforms.Normalize(data.mean, data.std)]
        super().__init__(root="", transform=transforms.Compose(steps))
        self.pixels = data.train_images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = data.train_labels.tolist()

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index].squeeze())), self.labels[index]

    def __len__(self) -> int:
        return len(self.labels)


def plain_loader(data: common.Dataset) -> DataLoader:
    """The loader of the plain recipe."""
    return DataLoader(PlainDataset(data), PLAIN_BATCH, shuffle=True, num_workers=PLAIN_WORKERS, drop_last=True)


def plain_model(data: common.Dataset, recipe: common.Recipe) -> tuple[common.SmallCNN, torch.optim.Optimizer]:
    """The same network, NCHW in fp32; its own normalisation is switched off, the transform does it."""
    model = common.make_model(data, recipe).to(memory_format=torch.contiguous_format)
    model.mean.zero_()
    model.std.fill_(1)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return model, torch.optim.SGD(weights, PLAIN_LR, momentum=0.9, weight_decay=5e-4)


def plain_steps(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, loader: Any, seconds: float
) -> tuple[int, float]:
    """Train for one epoch or ``seconds``; returns (pictures, seconds)."""
    model.train()
    start, pictures = time.perf_counter(), 0
    for images, labels in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        pictures += len(labels)
        if time.perf_counter() - start > seconds:
            break
    return pictures, time.perf_counter() - start


def compare_speed(
    data: common.Dataset, runtime: common.Runtime, recipe: common.Recipe, rounds: int, batches: int, seconds: float
) -> list[dict[str, Any]]:
    """Pictures per second of both loops, taking turns; the first round warms up and is not counted.

    A turn is so many ``batches`` of ours, and so many ``seconds`` of the plain one.
    """
    ours = common.make_model(data, recipe)
    plain, optimizer = plain_model(data, recipe)
    loader = plain_loader(data)
    index = torch.arange(min(batches * recipe.batch_size, len(data.train_labels)))
    rows = []
    for turn in tqdm(range(rounds + 1), desc="pictures per second", disable=None):
        history, losses = common.fit(ours, data, replace(recipe, epochs=1), runtime, train_index=index)
        our_speed = len(losses) * recipe.batch_size / history[-1]["seconds"]
        iterator = iter(loader)
        next(iterator)  # starting its workers is not its fault
        pictures, taken = plain_steps(plain, optimizer, iterator, seconds)
        del iterator
        if turn:
            rows.append({"round": turn, "ours": our_speed, "plain": pictures / taken})
    return rows


def plain_seconds_to(data: common.Dataset, recipe: common.Recipe, target: float, limit: float) -> dict[str, Any]:
    """Train the plain recipe until ``target`` test accuracy, or for ``limit`` seconds; the clock stops for tests."""
    model, optimizer = plain_model(data, recipe)
    loader = plain_loader(data)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (data.mean, data.std))
    seconds, curve = 0.0, []
    while seconds < limit:
        seconds += plain_steps(model, optimizer, loader, limit - seconds)[1]
        model.eval()
        with torch.inference_mode():
            right = sum(
                (model((images.float() / 255 - mean) / std).argmax(1) == labels).sum().item()
                for images, labels in zip(data.test_images.split(500), data.test_labels.split(500), strict=True)
            )
        curve.append({"seconds": seconds, "accuracy": right / len(data.test_labels)})
        print(f"plain recipe: {seconds:4.0f} s, {curve[-1]['accuracy']:.4f}", file=sys.stderr)
        if curve[-1]["accuracy"] >= target:
            break
    reached = next((point["seconds"] for point in curve if point["accuracy"] >= target), None)
    return {"target": target, "seconds": reached, "limit_seconds": limit, "curve": curve}


def flop_per_picture(data: common.Dataset, runtime: common.Runtime, recipe: common.Recipe) -> float:
    """Floating-point operations of training on one picture: convolutions and matrix products, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        model = common.make_model(data, recipe)
        common.fit(model, data, replace(recipe, epochs=1), runtime, train_index=torch.arange(recipe.batch_size))
    return counter.get_total_flops() / recipe.batch_size


def measure_preset(data: common.Dataset, runtime: common.Runtime, recipe: common.Recipe, seed: int) -> dict[str, Any]:
    """Train once on all training pictures; seconds of everything, test accuracy of 1, 2 and 6 views (``predict``)."""
    start = time.perf_counter()
    model = common.make_model(data, recipe, seed)
    common.fit(model, data, recipe, runtime, train_index=torch.arange(len(data.train_labels)), seed=seed)
    seconds = time.perf_counter() - start
    accuracy = {}
    for name, views in VIEWS.items():
        predicted = common.predict(model, data.test_images, runtime, views=views).argmax(1)
        accuracy[name] = float((predicted == data.test_labels).double().mean())
    parameters = sum(weight.numel() for weight in model.parameters())
    facts = {key: getattr(recipe, key) for key in ("width", "stem_stride", "epochs", "optimizer")}
    facts |= {"parameters": parameters, "seed": seed}
    flop = flop_per_picture(data, runtime, recipe) * len(data.train_labels) * recipe.epochs
    return facts | {"train_seconds": seconds, "gflop_per_second": flop / seconds / 1e9} | accuracy


def few_pictures(data: common.Dataset, count: int) -> common.Dataset:
    """``count`` training and test pictures, spread evenly, to try everything out."""
    train, test = (common.subset(torch.arange(len(labels)), count) for labels in (data.train_labels, data.test_labels))
    images = {"train_images": data.train_images[train], "test_images": data.test_images[test]}
    return replace(data, **images, train_labels=data.train_labels[train], test_labels=data.test_labels[test])


def earlier_trainings(path: Path) -> list[dict[str, Any]]:
    """The rows that earlier runs left in ``path``; raises UserError where it is no such table."""
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            return [{key: number(text) for key, text in row.items()} for row in csv.DictReader(stream)]
    except (ValueError, TypeError, csv.Error):
        raise common.UserError(f"{path} is damaged: move it away, and its trainings are measured again") from None


def number(text: str) -> int | float | str:
    """What a cell of a CSV file holds."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def draw_frontier(path: Path, rows: list[dict[str, Any]], plain: dict[str, Any] | None, title: str) -> None:
    """Accuracy against seconds of training."""
    with common.figure(path, title, size=(10, 6)) as (_, axes):
        axis = axes[0, 0]
        groups = {row["preset"]: [r for r in rows if r["preset"] == row["preset"]] for row in rows}
        labels = ("this lab", "this lab, mean of picture and mirror image", "this lab, mean of six views")
        for metric, label, line in zip(VIEWS, labels, ("-", "--", ":"), strict=True):
            x = [np.mean([row["train_seconds"] for row in group]) for group in groups.values()]
            y = [np.mean([row[metric] for row in group]) for group in groups.values()]
            axis.plot(x, y, line, marker="o", color=common.PALETTE[0], label=label)
        for name, group in groups.items():
            seconds, accuracy = (np.mean([row[key] for row in group]) for key in ("train_seconds", "accuracy"))
            text = f"{name}: {group[0]['parameters'] / 1000:,.0f} k parameters"
            last = name == list(groups)[-1]
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            style: dict[str, Any] = {"fontsize": 11, "ha": "right" if last else "left", "bbox": box}
            axis.annotate(text, (seconds, accuracy), (8, -36 if last else -20), textcoords="offset points", **style)
            points = zip(*((row["train_seconds"], row["accuracy"]) for row in group), strict=True)
            axis.scatter(*points, s=18, color="black", zorder=3)
        if plain:
            x, y = ([point[key] for point in plain["curve"]] for key in ("seconds", "accuracy"))
            axis.plot(x, y, color=common.PALETTE[1], marker=".", label="plain recipe, same network as the first preset")
        for target in TARGETS:
            axis.axhline(target, color="grey", linewidth=0.8, linestyle="--")
        axis.set(xscale="log", xlabel="seconds of training (log scale)", ylabel="test accuracy")
        axis.set_ylim(bottom=min(0.6, *(row["accuracy"] - 0.1 for row in rows)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="x", which="both", labelsize=9)
        axis.legend(loc="lower right")


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the trainings of a preset, by preset."""
    summary = {}
    for name in dict.fromkeys(row["preset"] for row in rows):
        group = [row for row in rows if row["preset"] == name]
        facts = {key: group[0][key] for key in FACTS}
        metrics = ("train_seconds", "gflop_per_second", *VIEWS)
        mean = {key: float(np.mean([row[key] for row in group])) for key in metrics}
        sd = float(np.std([row["accuracy"] for row in group], ddof=1)) if len(group) > 1 else float("nan")
        summary[name] = facts | mean | {"accuracy_sd": sd, "n": len(group)}
    return summary


def frontier_table(presets: dict[str, Any]) -> str:
    """What ``summarise`` gave, as a text table."""
    cells = []
    for name, row in presets.items():
        accuracy = [f"{row['accuracy']:.4f} ± {row['accuracy_sd']:.4f}", *(f"{row[key]:.4f}" for key in [*VIEWS][1:])]
        facts = [row[key] for key in FACTS]
        cells.append(
            [name, *facts, f"{row['train_seconds']:.1f}", f"{row['gflop_per_second']:.0f}", *accuracy, row["n"]]
        )
    header = ["preset", "width", "stem stride", "epochs", "optimizer", "parameters", "seconds", "GFLOP/s"]
    return common.table(cells, [*header, "test accuracy", "flip averaged", "six views", "n"])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=common.positive_int, default=3, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=common.positive_int, default=5, help="(default: %(default)s)")
    parser.add_argument("--presets", nargs="+", choices=list(common.PRESETS), default=list(common.PRESETS))
    parser.add_argument("--speed-only", action="store_true")
    common.add_common_args(parser, output_dir=Path("results/benchmark"))
    options = parser.parse_args(argv)
    return common.run_script(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """The benchmark."""
    runtime = common.make_runtime(options.device, options.precision, options.workers)
    data = common.load_dataset_or_fallback(options.dataset, options.data_dir)
    given = {key: getattr(options, key) for key in ("epochs", "batch_size", "width")}
    changes = {key: value for key, value in given.items() if value is not None}
    sizes, rounds, seeds = SIZES, options.rounds, options.seeds
    if options.quick:
        sizes, rounds, seeds = QUICK_SIZES, min(rounds, 2), min(seeds, 2)
        changes = {"epochs": 1, "batch_size": 128} | changes
        data = few_pictures(data, QUICK_PICTURES)
    presets = {name: replace(common.PRESETS[name], **changes) for name in options.presets}
    needed = max(2 * PLAIN_BATCH, *(recipe.batch_size for recipe in presets.values()))
    if len(data.train_labels) < needed:
        raise common.UserError(f"{data.source} has {len(data.train_labels)} training pictures, {needed} are needed")
    facts = common.environment(runtime)
    summary: dict[str, Any] = {"source": data.source, "cpu": facts["cpu"], "threads": runtime.threads}
    peak = common.matrix_product_speed(runtime.device, runtime.precision, size=sizes["matrix"]) / 1e9
    summary |= {"matrix_product_gflop_per_second": peak, "speed": {}}
    print(f"{data.source}; {runtime.threads} threads, {runtime.precision} (plain: fp32), n = {rounds} rounds")
    print(f"large {runtime.precision} matrix products: {peak:.0f} GFLOP/s")
    speed, cells = [], []
    for name, recipe in presets.items():
        rows = compare_speed(data, runtime, recipe, rounds, sizes["batches"], sizes["plain_seconds"])
        speed += [{"preset": name} | row for row in rows]
        ours, plain_speed = (float(np.mean([row[loop] for row in rows])) for loop in ("ours", "plain"))
        ratio, low, high = np.exp(common.interval([np.log(row["ours"] / row["plain"]) for row in rows])).tolist()
        gflop = flop_per_picture(data, runtime, recipe) * ours / 1e9
        entry = {"ours": ours, "plain": plain_speed, "ratio": ratio, "ci_low": low, "ci_high": high}
        summary["speed"][name] = entry | {"gflop_per_second": gflop, "n": len(rows)}
        cells.append([name, f"{ours:.0f}", f"{plain_speed:.0f}", f"{ratio:.2f} [{low:.2f}, {high:.2f}]"])
        cells[-1].append(f"{gflop:.0f} ({gflop / peak:.0%})")
    print(common.table(cells, ["network of", "pictures/s, ours", "plain", "ratio [95 %]", "GFLOP/s, ours"]))
    with common.output_directory(options.output_dir) as output:
        common.write_csv(output / "speed.csv", speed)
        if not options.speed_only:
            machine = f"{facts['cpu']}, {runtime.threads} threads, {runtime.precision}, torch {torch.__version__}"
            pictures = f"{data.source}, {len(data.train_labels)} pictures"
            setups = {name: f"{pictures}; {machine}; {recipe}" for name, recipe in presets.items()}
            finished = earlier_trainings(output / "frontier.csv")
            for seed in range(options.seed, options.seed + seeds):  # seeds outside: the presets take turns
                for name, setup in setups.items():
                    if any(row.get("setup") == setup and row["seed"] == seed for row in finished):
                        print(f"{name}, seed {seed}: finished by an earlier run", file=sys.stderr)
                        continue
                    row = {"preset": name} | measure_preset(data, runtime, presets[name], seed)
                    print("  ".join(f"{key} {value}" for key, value in row.items()), file=sys.stderr)
                    finished.append(row | {"setup": setup})
                    common.write_csv(output / "frontier.csv", finished, list(finished[-1]))
            rows = [row for setup in setups.values() for row in finished if row.get("setup") == setup]
            name, first = next(iter(presets.items()))
            plain = plain_seconds_to(data, first, TARGETS[0], sizes["plain_limit"])
            common.write_csv(output / "plain.csv", plain["curve"])
            means = summarise(rows)
            summary |= {"presets": means, "plain": plain}
            print(frontier_table(means))
            reached = f"{plain['seconds']:.0f} s" if plain["seconds"] else f"not within {plain['limit_seconds']:.0f} s"
            print(f"plain recipe, network of {name}, to {TARGETS[0]:.2f}: {reached}")
            trainings = ", ".join(f"{mean['n']} of {preset}" for preset, mean in means.items())
            where = f"{data.source}, {runtime.threads} cores, {runtime.precision}; trainings: {trainings}"
            fastest = f"{means[name]['train_seconds']:.0f} s of training"
            title = f"{name}: {fastest}; the plain recipe to {TARGETS[0]:.2f}: {reached}\n{where}"
            whole = presets == common.PRESETS and data.name == "cifar10" and not options.quick
            folder = common.ROOT / "docs" / "images" if whole else output
            draw_frontier(folder / "training_frontier.png", rows, plain, title)
        common.finish(output, summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
