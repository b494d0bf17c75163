"""Pictures of figures that are kept under docs/results/: nothing is computed here."""

import csv
import json
import runpy
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from style import BLUE, CYCLE, GREEN, GREY, INK, MARKS, ORANGE, PURPLE, RED, RESULTS, number, save, table

_POLICIES = {
    "`Unroll()`": ("plain reverse mode", INK, "s"),
    "`Mixed()`": ("Mixed()", BLUE, "o"),
    "`Mixed(Sqrt())`": ("Mixed, Sqrt()", ORANGE, "^"),
    "`Mixed(Tree(22))`": ("Mixed, Tree(22)", GREEN, "D"),
}


def memory(folder: Path) -> None:
    """Temporary memory against K; hollow where the row was compiled and not run."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, name, title in zip(axes, ("mlp", "transformer"), ("perceptron", "transformer"), strict=True):
        rows = table(f"memory/{name}")
        for estimator, (label, colour, mark) in _POLICIES.items():
            mine = [row for row in rows if row["estimator"] == estimator]
            steps = [int(row["K"]) for row in mine]
            size = [number(row["temporary memory"]) for row in mine]
            axis.loglog(steps, size, color=colour, label=label)
            for k, mib, row in zip(steps, size, mine, strict=True):
                run = row["peak of the process"] != "not run"
                axis.plot(k, mib, mark, color=colour, mfc=colour if run else "white")
        axis.axhline(2048, color=GREY, lw=1, ls=":")
        axis.set(title=f"{title}: what the reverse pass keeps", xlabel="K, inner steps")
        axis.text(9, 2500, "2 GiB", color=GREY, fontsize=8.5)
    axes[0].set(ylabel="temporary memory, MiB")
    axes[0].plot([], [], "s", color=INK, mfc="white", label="compiled, not run")
    figure.tight_layout()
    figure.legend(
        *axes[0].get_legend_handles_labels(), ncol=5, loc="upper center", bbox_to_anchor=(0.5, 0.02)
    )
    save(figure, folder, "memory")


def speed(folder: Path) -> None:
    """Milliseconds of an outer step, with the ratio to bilevel's best beside each bar."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.3))
    for axis, row in zip(axes, table("speed/sinusoid"), strict=False):
        cells = list(row.items())
        names = [name.replace("`", "").replace(", MetaSGD as", ", as") for name, _ in cells[1:]]
        names[0] = "bilevel, meta_step per call"
        names[1:3] = ["bilevel, in bl.train", "bilevel, two devices"]
        times = [number(cell) for _, cell in cells[1:]]
        title = "sinusoid, 25 tasks, " + ("1 inner step" if "1 inner" in cells[0][1] else "5 inner steps")
        _bars(axis, names, times, times[2], title)
        axis.set(xscale="log", xlim=(0.1, 60 * max(times)))
    rows = [list(row.values()) for row in table("speed/omniglot")]
    names = [cells[0].split(", `")[0] for cells in rows]
    names[1:3] = ["bilevel, in bl.train", "bilevel, two devices"]
    times = [number(cells[1]) for cells in rows]
    _bars(axes[2], names, times, times[2], "Omniglot, 32 tasks, 64 filters")
    axes[2].set(xlim=(0, 1.25 * max(times)))
    figure.tight_layout()
    save(figure, folder, "speed")


def _bars(axis, names, times, least, title) -> None:
    places = np.arange(len(names))[::-1]
    colours = [BLUE if name.startswith("bilevel") else GREY for name in names]
    axis.barh(places, times, color=colours, height=0.65)
    for place, time in zip(places, times, strict=True):
        ratio = time / least
        text = f" {time:g}" if ratio == 1 else f" {time:g}  ({ratio:.3g}x)"
        axis.text(time, place, text, va="center", fontsize=8)
    axis.set(title=title, xlabel="ms an outer step", yticks=places, yticklabels=names)
    axis.grid(axis="y", visible=False)


def plan(folder: Path) -> None:
    """Predicted against measured peak memory."""
    rows = table("plan/grid")
    figure, axis = plt.subplots(figsize=(5.2, 4.2))
    line = np.array([90, 800])
    axis.fill_between(line, line / 1.25, line * 1.25, color=GREY, alpha=0.12, lw=0)
    axis.plot(line, line, color=GREY, lw=1)
    axis.text(250, 345, "25 % off", color=GREY, rotation=43, fontsize=8.5)
    for net, colour, mark in (("mlp", BLUE, "o"), ("conv4", ORANGE, "^")):
        mine = [row for row in rows if row["net"] == net]
        places = [(number(row["measured MB"]), number(row["predicted MB"])) for row in mine]
        axis.plot(*zip(*places, strict=True), mark, color=colour, label=f"{net}, {len(mine)} problems")
    ticks = [100, 200, 400, 700]
    axis.set(xscale="log", yscale="log", xlim=(90, 800), ylim=(90, 800))
    axis.set_xticks(ticks, map(str, ticks))
    axis.set_yticks(ticks, map(str, ticks))
    axis.minorticks_off()
    axis.set(title="Peak memory of a hypergradient", xlabel="measured, MB", ylabel="predicted by bl.plan, MB")
    axis.legend(loc="upper left")
    save(figure, folder, "plan")


def cleaning(folder: Path) -> None:
    """Test accuracy and F1 of every estimator on hyper-data-cleaning, against its seconds."""
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.2))
    panels = {
        "test accuracy %": "accuracy on 10 000 test images, %",
        "F1 of the found corruption %": "F1 of the corruption found, %",
    }
    rows, full = table("hyper_cleaning/tenth"), table("hyper_cleaning/single_loop")
    kinds = {"single loop": (RED, "o"), "double loop": (BLUE, "s"), "values only": (GREY, "v")}
    loops = {row["estimator"] for row in full}
    for axis, (column, label) in zip(axes, panels.items(), strict=True):
        for kind, (colour, mark) in kinds.items():
            mine = [row for row in rows if row["seconds"] and _kind(row["estimator"], loops) == kind]
            axis.plot(
                [number(row["seconds"]) for row in mine], [number(row[column]) for row in mine],
                mark, color=colour, label=f"{kind}, a tenth of the outer steps",
            )  # fmt: skip
        mine = [row for row in full if row["seconds"]]
        axis.plot(
            [number(row["seconds"]) for row in mine], [number(row[column]) for row in mine],
            "o", color=RED, mfc="white", label="single loop, all outer steps",
        )  # fmt: skip
        axis.set(xscale="log", xlabel="seconds of training", ylabel=label)
        axis.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
        axis.minorticks_off()
    for row, at, side in ((rows[0], 1, "left"), (rows[1], 50, "right")):
        axes[0].axhline(number(row["test accuracy %"]), color=INK, lw=1, ls="--")
        axes[0].text(at, number(row["test accuracy %"]) - 0.35, row["estimator"], ha=side, fontsize=8.5)
    figure.tight_layout()
    figure.legend(
        *axes[0].get_legend_handles_labels(), ncol=2, loc="upper center", bbox_to_anchor=(0.5, 0.02)
    )
    save(figure, folder, "hyper_cleaning")


def _kind(estimator: str, loops: set[str]) -> str:
    if "volution" in estimator or "PES" in estimator:
        return "values only"
    return "single loop" if estimator in loops else "double loop"


def demo(folder: Path) -> None:
    """What `make demo` prints: accuracy on unseen glyphs, with 95% intervals."""
    rows = table("demo/accuracy")
    figure, axis = plt.subplots(figsize=(7, 2.6))
    places = np.arange(len(rows))[::-1]
    for place, row in zip(places, rows, strict=True):
        mean, half = number(row["accuracy %"]), number(row["± 95% interval"])
        colour = BLUE if "meta-learned" in row["learner"] else GREY
        axis.barh(place, mean, color=colour, height=0.65, xerr=half if half == half else None)
        axis.text(mean + (half if half == half else 0) + 1.5, place, f"{mean:g}", va="center", fontsize=8.5)
    axis.set(xlim=(0, 109), yticks=places, yticklabels=[row["learner"] for row in rows])
    axis.set(title="5-way 1-shot on unseen glyphs, 600 tasks", xlabel="test accuracy, %")
    axis.grid(axis="y", visible=False)
    save(figure, folder, "demo")


def sinusoid(folder: Path) -> None:
    """Training curves, and the error after each inner step at test."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    runs = (("maml", "MAML", BLUE, "o"), ("meta-sgd", "Meta-SGD", ORANGE, "^"))
    runs += (("cavia", "CAVIA", GREEN, "s"), ("reptile", "Reptile", PURPLE, "D"))
    for name, label, colour, mark in runs:
        with (RESULTS / "sinusoid" / f"{name}.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        left.semilogy(
            [int(row["step"]) / 1000 for row in rows], [float(row["query_loss"]) for row in rows],
            color=colour, label=label, lw=1.4,
        )  # fmt: skip
        found = json.loads((RESULTS / "sinusoid" / f"{name}.json").read_text())["query_loss"]
        mean, half = np.array(found["mean"], float), np.array(found["ci95"], float)
        steps = np.arange(len(mean))[:11]
        mean, half = mean[:11], half[:11]
        shown = np.isfinite(mean) & (mean < 20)
        right.errorbar(
            steps[shown], mean[shown], half[shown], color=colour, marker=mark, label=label, capsize=2, lw=1.5
        )
    left.set(title="Training", xlabel="outer steps, thousands", ylabel="mean squared error, query points")
    right.set(title="Adapting to 10 points of a new wave", xlabel="inner steps", yscale="log")
    right.set(ylabel="mean squared error, 1000 waves")
    for axis, ticks in ((left, (0.2, 0.5, 1, 2, 5)), (right, (0.03, 0.1, 0.3, 1, 3))):
        axis.set_yticks(ticks, map(str, ticks))
        axis.minorticks_off()
        axis.legend()
    figure.tight_layout()
    save(figure, folder, "sinusoid")


def omniglot(folder: Path) -> None:
    """Training of every kept run, and its test accuracy beside the published one."""
    names = {"5w1s": "5-way 1-shot", "5w5s": "5-way 5-shot"}
    names |= {"20w1s": "20-way 1-shot", "20w5s": "20-way 5-shot"}
    module = runpy.run_path(str(Path(__file__).parents[1] / "omniglot_table.py"))
    runs = {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / "omniglot").glob("*.json"))}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 3.9), width_ratios=(1.2, 1.25))
    for place, (name, run) in enumerate(runs.items()):
        colour, mark = CYCLE[place % len(CYCLE)], MARKS[place % len(MARKS)]
        again = place >= len(CYCLE)  # a colour's second run: dashed, and hollow
        with (RESULTS / "omniglot" / f"{name}.csv").open(encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get("query_accuracy")]
        left.plot(
            [int(row["step"]) for row in rows], [100 * float(row["query_accuracy"]) for row in rows],
            color=colour, lw=1.2, ls="--" if again else "-", label=name,
        )  # fmt: skip
        aside = 0.6 * (place + 0.5) / len(runs) - 0.3
        for setting, accuracy in module["_cells"](run).items():
            at = list(names).index(setting) + aside
            mean, half = (100 * accuracy[what][-1] for what in ("mean", "ci95"))
            fill = "white" if again else colour
            right.errorbar(at, mean, half, color=colour, marker=mark, mfc=fill, capsize=2)
            level = number(module["PUBLISHED"][run["learner"]].get(setting, ""))
            right.plot([at - 0.05, at + 0.05], [level, level], color=INK, lw=2)
    right.plot([], [], color=INK, lw=2, label="published")
    left.set(title="Training tasks", xlabel="outer steps", ylabel="query accuracy, %")
    right.set(title="Tasks of unseen classes", xticks=range(4), xticklabels=list(names.values()))
    right.set(ylabel="accuracy, %, with 95 % intervals")
    left.set_xlim(right=1.6 * left.get_xlim()[1])  # room for the names beside the curves
    left.legend(loc="center right")
    right.legend(loc="lower right")
    figure.tight_layout()
    save(figure, folder, "omniglot")


PICTURES = {
    "omniglot": omniglot,
    "memory": memory,
    "speed": speed,
    "plan": plan,
    "hyper_cleaning": cleaning,
    "demo": demo,
    "sinusoid": sinusoid,
}
