"""Statistics, figures, tables and report of Task 4, made of the latencies and of what ``summary.json`` holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import common

Row = dict[str, Any]

COLOURS = {  # one per engine, in every figure
    "torch_fp32": common.PALETTE[6],
    "torch_tuned_fp32": "#8C8C8C",
    "torch_bf16": common.PALETTE[3],
    "torch_compiled": common.PALETTE[4],
    "torch_compiled_bf16": common.PALETTE[2],
    "onnx_fp32": common.PALETTE[0],
    "onnx_int8": common.PALETTE[1],
    "torch_cuda": common.PALETTE[5],
    "onnx_cuda": common.PALETTE[7],
}
SPEED_FILES = ("latency.csv", "latency_distribution.csv", "latency.png", "throughput.png", "pareto.png")
RIVALS = {"speedup": "torch_fp32", "speedup_over_tuned": "torch_tuned_fp32", "speedup_over_compiled": "torch_compiled"}
TIMER = (
    "Timed is one call of a loaded engine, from a batch of test pictures (float32 in [0, 1], in memory, in the order "
    "the engine likes: NCHW for torch_fp32 and ONNX, channels_last for the other torch engines) to its logits in "
    "memory; reading, decoding and scaling pictures is not included, copies to and from a GPU are. torch_fp32 is the "
    "checkpoint as it is loaded; torch_tuned_fp32 has BatchNorm folded into the convolutions, too. Every engine has a "
    "process of its own and the same number of threads, which do not spin. A round times every engine at every batch "
    "size in random order. A speed-up is a ratio of median latencies (p50) within a round; given are the geometric "
    "mean over the rounds and its 95 % interval (Student's t, of logarithms). load_ms and first_call_ms (batch 1) were "
    "measured once, without importing the libraries; peak memory is of the whole process, libraries included."
)

# ---------------------------------------------------------------- statistics


def describe(latencies: Sequence[float], batch_size: int) -> Row:
    """Percentiles and mean of latencies in ms; images per second from their sum, the slow tail included."""
    p50, p90, p99 = np.percentile(latencies, (50, 90, 99)).tolist()
    mean = float(np.mean(latencies))
    return {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "mean_ms": mean, "images_per_second": 1000 * batch_size / mean}


def speedup(rows: list[Row], engine: str, baseline: str, size: int) -> tuple[float, float, float]:
    """How many times as fast as ``baseline``: (geometric mean, low, high) of the ratio of p50 by round."""
    p50 = {
        name: np.array([np.median(r["latencies_ms"]) for r in rows if (r["engine"], r["batch_size"]) == (name, size)])
        for name in (engine, baseline)
    }
    mean, low, high = np.exp(common.interval(np.log(p50[baseline] / p50[engine]).tolist())).tolist()
    return mean, low, high


def add_speeds(results: dict[str, Row], rows: list[Row]) -> None:
    """Add to ``results`` peak memory and, per batch size, latencies and speed-ups over the ``RIVALS``."""
    for name, result in results.items():
        own = [row for row in rows if row["engine"] == name]
        result["peak_rss_bytes"] = own[-1]["peak_rss_bytes"] if own else None
        result["batch"] = {}
        for size in sorted({row["batch_size"] for row in own}):
            pooled = np.concatenate([row["latencies_ms"] for row in own if row["batch_size"] == size]).tolist()
            entry = describe(pooled, size) | {"calls": len(pooled)}
            for key, rival in RIVALS.items():
                if rival in results:
                    values = speedup(rows, name, rival, size)
                    entry |= dict(zip((key, f"{key}_ci_low", f"{key}_ci_high"), values, strict=True))
            result["batch"][str(size)] = entry


# ---------------------------------------------------------------- words


def in_words(entry: Row, key: str, engine: str, rival: str, size: str) -> str:
    """A speed-up as a sentence, which claims no difference where the interval includes 1."""
    ratio, low, high = (entry[key + suffix] for suffix in ("", "_ci_low", "_ci_high"))
    figures = f"{ratio:.2f} times as fast [{low:.2f}, {high:.2f}]"
    if low <= 1 <= high:
        return f"At batch {size} no difference between {engine} and {rival} is shown: {figures}."
    return f"At batch {size} {engine} is {'faster' if ratio > 1 else 'SLOWER'} than {rival}: {figures}."


def conclude(summary: Row) -> list[str]:
    """The verdict in sentences: equality first, then speed."""
    engines, count = summary["engines"], summary["test_pictures"]
    fp32, int8, torch = engines["onnx_fp32"], engines["onnx_int8"], engines["torch_fp32"]
    share = int8["size_bytes"] / fp32["size_bytes"]
    sentences = [
        f"onnx_fp32 gives torch's label on {round(fp32['agreement'] * count):,} of {count:,} test pictures "
        f"(max |Δlogit| {fp32['max_abs_logit_diff']:.1g}); accuracy {100 * fp32['accuracy']:.2f} %, "
        f"torch's {100 * torch['accuracy']:.2f} %.",
        f"onnx_int8 changes the accuracy by {-int8['accuracy_drop']:+.2f} points "
        f"[{-int8['accuracy_drop_ci_high']:+.2f}, {-int8['accuracy_drop_ci_low']:+.2f}] and takes {100 * share:.0f} % "
        "of the file size.",
    ]
    batch = fp32["batch"]
    ends = dict.fromkeys([*list(batch)[:1], *list(batch)[-1:]])  # the smallest and the largest; none without speeds
    sentences += [
        in_words(engines[engine]["batch"][size], key, engine, rival, size)
        for key, rival in RIVALS.items()
        if rival in engines
        for engine in ("onnx_fp32", "onnx_int8")
        for size in ends
    ]
    for size in ends:
        fastest = min(engines, key=lambda name: engines[name]["batch"][size]["p50_ms"])
        sentences.append(f"The fastest engine at batch {size} is {fastest}.")
    if ends:
        work, speed = summary["flop_per_picture"], summary["matrix_product_flop_per_second"]
        own = " and ".join(
            f"{work / batch[size]['p50_ms'] * int(size) / 1e6:.0f} GFLOP/s at batch {size}" for size in ends
        )
        bound = " and ".join(
            f"{torch['batch'][size]['p50_ms'] / 1000 / int(size) * speed / work:.2f} at batch {size}" for size in ends
        )
        sentences.append(
            f"A picture takes {work / 1e6:.0f} MFLOP of convolutions and matrix products: onnx_fp32 computes {own}; "
            f"large fp32 matrix products reach {speed / 1e9:.0f} GFLOP/s on {summary['threads']} thread(s). "
            f"An engine at that speed would be so many times as fast as torch_fp32: {bound}."
        )
    return sentences


def console(results: dict[str, Row], classes: Sequence[str]) -> str:
    """Accuracy per class and time in the original report's form, for torch and then for ONNX."""
    lines = []
    for name in ("torch_fp32", "onnx_fp32", "onnx_int8"):
        lines += [f"\n{name}:"]
        accuracies = zip(classes, results[name]["class_accuracy"], strict=True)
        lines += [f"Accuracy for class: {label} is {100 * accuracy:.1f} %" for label, accuracy in accuracies]
        if results[name]["batch"]:
            lines += [f"Time, ms:  {next(iter(results[name]['batch'].values()))['p50_ms']}"]
    return "\n".join(lines)


def quality_table(results: dict[str, Row], markdown: bool = False) -> str:
    """One line per engine: how right it is, and what it costs."""
    rows = [
        [
            name,
            f"{100 * r['accuracy']:.2f}",
            f"{100 * r['agreement']:.2f}",
            f"{r['max_abs_logit_diff']:.1e}",
            f"{r['size_bytes'] / 1e6:.2f}",
            f"{r['load_ms']:.0f}",
            f"{r['first_call_ms']:.1f}",
            f"{r['peak_rss_bytes'] / 1e6:.0f}" if r["peak_rss_bytes"] else "",
        ]
        for name, r in results.items()
    ]
    header = ["engine", "accuracy %", "agreement %", "max |Δlogit|", "MB", "load ms", "1st call ms", "peak RAM MB"]
    return common.table(rows, header, markdown)


def speed_table(results: dict[str, Row], markdown: bool = False) -> str:
    """One line per engine: p50 in ms per batch size; below, the speed-ups over eager torch with their intervals."""
    sizes = list(next(iter(results.values()))["batch"])

    def ratio(entry: Row) -> str:
        return f"{entry['speedup']:.2f} [{entry['speedup_ci_low']:.2f}, {entry['speedup_ci_high']:.2f}]"

    latency = [[name, *(f"{entry['p50_ms']:.3g}" for entry in r["batch"].values())] for name, r in results.items()]
    ratios = [[name, *map(ratio, r["batch"].values())] for name, r in results.items()]
    headers = [[title, *(f"batch {size}" for size in sizes)] for title in ("p50, ms", "times as fast [95 %]")]
    return "\n\n".join(common.table(*cells, markdown) for cells in zip((latency, ratios), headers, strict=True))


# ---------------------------------------------------------------- files


def report(output: Path, summary: Row, rows: list[Row], classes: Sequence[str]) -> None:
    """Write the CSV files, the figures and report.md, and print the console's part of it."""
    results = summary["engines"]
    accuracy = [
        {"class": label} | {name: result["class_accuracy"][number] for name, result in results.items()}
        for number, label in enumerate(classes)
    ]
    accuracy.append({"class": "all"} | {name: result["accuracy"] for name, result in results.items()})
    common.write_csv(output / "accuracy.csv", accuracy)
    where = f"{summary['source']}, {summary['test_pictures']:,} test pictures"
    draw_classes(output / "per_class_accuracy.png", results, classes, where)
    lines = [f"# Task 4: what does ONNX buy?\n\n{where}; {summary['threads']} thread(s) per engine.\n"]
    lines += [*(f"- {sentence}" for sentence in summary["verdict"]), "", quality_table(results, markdown=True)]
    figures = ["per_class_accuracy.png"]
    print(f"{console(results, classes)}\n\n{quality_table(results)}")
    if rows:
        write_latencies(output, rows)
        where += f", {summary['rounds']} rounds"
        draw_latency(output / "latency.png", rows, where)
        draw_throughput(output / "throughput.png", results, where)
        draw_pareto(output / "pareto.png", results, where)
        figures += [name for name in SPEED_FILES if name.endswith(".png")]
        lines += ["", speed_table(results, markdown=True), "", TIMER]
        print("\n" + speed_table(results))
    else:  # an earlier run's speeds would belong to other files
        for name in SPEED_FILES:
            (output / name).unlink(missing_ok=True)
    print("\n" + "\n".join(summary["verdict"]))
    lines += ["", *(f"![{name}]({name})\n" for name in figures)]
    common.write_text(output / "report.md", "\n".join(lines))


def write_latencies(output: Path, rows: list[Row]) -> None:
    """latency.csv: one row per engine, batch size and round; latency_distribution.csv: what latency.png shows."""
    columns = ("engine", "batch_size", "threads", "round")
    by_round = [{key: row[key] for key in columns} | describe(row["latencies_ms"], row["batch_size"]) for row in rows]
    common.write_csv(output / "latency.csv", by_round)
    curves = [
        {"engine": engine, "batch_size": size, "percentile": percentile, "latency_ms": latency}
        for (engine, size), (percentiles, latencies) in distributions(rows).items()
        for percentile, latency in zip(percentiles, latencies, strict=True)
    ]
    common.write_csv(output / "latency_distribution.csv", curves)


def distributions(rows: list[Row]) -> dict[tuple[str, int], tuple[list[float], list[float]]]:
    """(percentiles, latencies in ms) of all rounds together, per engine and batch size."""
    percentiles = [*range(100), 99.5, 99.9, 100]
    pooled: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        pooled.setdefault((row["engine"], row["batch_size"]), []).extend(row["latencies_ms"])
    return {key: (percentiles, np.percentile(values, percentiles).tolist()) for key, values in pooled.items()}


# ---------------------------------------------------------------- figures


def draw_classes(path: Path, results: dict[str, Row], classes: Sequence[str], where: str) -> None:
    """Accuracy per class, and what converting changed of it."""
    shown = [name for name in ("torch_fp32", "onnx_fp32", "torch_bf16", "onnx_int8") if name in results]
    position = np.arange(len(classes))
    torch = 100 * np.array(results["torch_fp32"]["class_accuracy"])
    changes = {name: 100 * np.array(results[name]["class_accuracy"]) - torch for name in shown}
    fp32, int8 = (np.nanmax(np.abs(changes[name])) for name in ("onnx_fp32", "onnx_int8"))
    title = f"Converting moves no class's accuracy by more than {fp32:.1f} points in fp32, {int8:.1f} in int8\n{where}"
    with common.figure(path, title, columns=2, size=(12, 6)) as (drawing, axes):
        left, right = axes[0]
        for number, name in enumerate(shown):
            offset = position + 0.17 * (number - (len(shown) - 1) / 2)
            style = {"color": COLOURS[name], "marker": "os^D"[number], "linestyle": "", "markersize": 7}
            left.plot(torch + changes[name], offset, label=name, **style)
            if name != "torch_fp32":
                right.plot(changes[name], offset, **style)
        left.set(xlabel="accuracy, %")
        right.set(xlabel="change against torch_fp32, points")
        right.axvline(0, color=COLOURS["torch_fp32"])
        for axis in (left, right):
            axis.set_yticks(position, classes, parse_math=False)  # names of folders
            axis.invert_yaxis()
        drawing.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(shown))


def draw_latency(path: Path, rows: list[Row], where: str) -> None:
    """The share of calls that are done after so many ms, per engine, at the smallest and the largest batch."""
    curves = distributions(rows)
    sizes = sorted({size for _, size in curves})
    shown = sorted({sizes[0], sizes[-1]})
    done = {name: dict(zip(*curves[name, sizes[0]], strict=True)) for name in ("torch_fp32", "onnx_int8")}
    title = f"Batch {sizes[0]}: 99 of 100 calls of onnx_int8 take at most {done['onnx_int8'][99]:.2g} ms, "
    title += f"half of torch_fp32's {done['torch_fp32'][50]:.2g} ms or more\n{where}"
    with common.figure(path, title, columns=len(shown), size=(6.5 * len(shown), 6)) as (drawing, axes):
        for axis, size in zip(axes[0], shown, strict=True):
            for engine in COLOURS:
                if (engine, size) in curves:
                    percentiles, latencies = curves[engine, size]
                    axis.plot(latencies, percentiles, color=COLOURS[engine], label=engine)
            axis.axhline(50, color="black", linewidth=0.8, linestyle=":")
            axis.set(xscale="log", xlabel="latency, ms (log scale)", ylabel="calls done, %", title=f"batch {size}")
            common.plain_numbers(axis.xaxis)
        drawing.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def draw_throughput(path: Path, results: dict[str, Row], where: str) -> None:
    """Images per second against batch size."""
    sizes = [int(size) for size in results["torch_fp32"]["batch"]]

    def rates(name: str) -> list[float]:
        return [entry["images_per_second"] for entry in results[name]["batch"].values()]

    order = sorted(results, key=lambda name: -rates(name)[-1])
    title = f"{order[0]} has the highest throughput at batch {sizes[-1]}: {rates(order[0])[-1]:,.0f} images/s\n{where}"
    with common.figure(path, title, size=(10, 6)) as (drawing, axes):
        axis = axes[0][0]
        for name in order:
            axis.plot(sizes, rates(name), color=COLOURS[name], marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="batch size", ylabel="images per second (log scale)")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        common.plain_numbers(axis.yaxis)
        drawing.legend(*axis.get_legend_handles_labels(), loc="outside right center")


def draw_pareto(path: Path, results: dict[str, Row], where: str) -> None:
    """Accuracy against latency at the smallest batch; a circle's area is the file's size."""
    latency = {name: next(iter(result["batch"].values()))["p50_ms"] for name, result in results.items()}
    size = next(iter(results["torch_fp32"]["batch"]))
    gain, drop = results["onnx_int8"]["batch"][size]["speedup"], results["onnx_int8"]["accuracy_drop"]
    title = f"int8: {gain:.1f} times as fast at batch {size}, accuracy {-drop:+.2f} points\n{where}"
    with common.figure(path, title, size=(10.5, 6)) as (drawing, axes):
        axis = axes[0][0]
        for name, result in results.items():
            x, y = latency[name], 100 * result["accuracy"]
            bounds = [
                100 * results["torch_fp32"]["accuracy"] - result[f"accuracy_drop_ci_{end}"] for end in ("high", "low")
            ]
            megabytes = result["size_bytes"] / 1e6
            style = {"facecolor": (COLOURS[name], 0.35), "edgecolor": COLOURS[name], "linewidth": 2}
            axis.scatter(x, y, s=300 * megabytes, label=f"{name}, {megabytes:.2f} MB", **style)
            axis.vlines(x, *bounds, color=COLOURS[name], linewidth=1.5)
        axis.set(
            xscale="log",
            xlabel=f"latency (p50) at batch {size}, ms (log scale)",
            ylabel="test accuracy, %\n(bars: 95 % of the difference to torch_fp32)",
        )
        axis.margins(0.2, 0.4)
        common.plain_numbers(axis.xaxis)
        drawing.legend(*axis.get_legend_handles_labels(), loc="outside right center", labelspacing=1.1)
