"""Runs: one that is killed and resumed over one that is not; and how a derivative is held to differences."""

import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from style import BLUE, GREY, INK, ORANGE, RED, keep, number, save, table

from bilevel.testing import quadratic

_PALE = "#BFDDEC"
_STEPS, _EVERY, _CHUNK = 3000, 500, 100
_KILLED_AFTER = (800, 1700)  # outer steps: each between two checkpoints
_TRAIN = ("-m", "bilevel", "train", "maml-sinusoid", "--num-meta-steps", str(_STEPS))
_TRAIN += ("--loop.chunk-size", str(_CHUNK), "--loop.checkpoint-every", str(_EVERY), "--folder")


def measure_resume() -> None:
    """Train twice, once with a SIGKILL in the middle of two places, and keep both losses."""
    with tempfile.TemporaryDirectory() as name:
        whole, cut = Path(name) / "whole", Path(name) / "cut"
        subprocess.run([sys.executable, *_TRAIN, str(whole)], check=True, stdout=subprocess.DEVNULL)
        attempts = []
        for place, after in enumerate(_KILLED_AFTER):
            attempts.append(_killed(cut, after, resume=place > 0))
        command = [sys.executable, *_TRAIN, str(cut), "--resume"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        first, last = _losses(whole), _losses(cut)
        same = [name for name in first[0] if name not in ("time", "steps_per_second")]
        unequal = sum(a[name] != b[name] for a, b in zip(first, last, strict=True) for name in same)
        print(f"{len(first) * len(same)} figures, of which {unequal} differ")
        rows = [{"step": a["step"], "undisturbed": a["query_loss"], "resumed": b["query_loss"]}
                for a, b in zip(first, last, strict=True)]  # fmt: skip
        for place, lines in enumerate(attempts):
            reached = {line["step"]: line["query_loss"] for line in lines}
            for row in rows:
                row[f"until kill {place + 1}"] = reached.get(row["step"], "")
    keep("resume/maml_sinusoid", rows)


def _killed(folder: Path, after: int, resume: bool) -> list[dict[str, str]]:
    """Start a run, kill it once it has written `after` outer steps, and return what it had written."""
    command = [sys.executable, *_TRAIN, str(folder), *(["--resume"] if resume else [])]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ)
    while process.poll() is None:
        written = _losses(folder)
        if written and int(written[-1]["step"]) >= after:
            process.kill()
        time.sleep(0.005)
    return _losses(folder)


def _losses(folder: Path) -> list[dict[str, str]]:
    path = folder / "metrics.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row.get("query_loss")]


def runs(folder: Path) -> None:
    """Both loss curves, the kills, and what was lost and done again."""
    rows = table("resume/maml_sinusoid")
    figure, axis = plt.subplots(figsize=(7.2, 3.7))
    steps = [int(row["step"]) for row in rows]
    axis.plot(steps, [number(row["undisturbed"]) for row in rows], color=_PALE, lw=6, label="undisturbed")
    axis.plot(
        steps, [number(row["resumed"]) for row in rows], color=BLUE, lw=1.5, label="killed twice, resumed"
    )
    for place, colour in enumerate((RED, ORANGE)):
        column = f"until kill {place + 1}"
        ends = [(step, number(row[column])) for step, row in zip(steps, rows, strict=True) if row[column]]
        axis.plot(*ends[-1], "X", color=colour, ms=10, label=f"SIGKILL after step {ends[-1][0]}")
        axis.axvspan(ends[-1][0] // _EVERY * _EVERY, ends[-1][0], color=colour, alpha=0.12, lw=0)
    for step in range(_EVERY, _STEPS + 1, _EVERY):
        axis.axvline(step, color=GREY, lw=0.8, ls=":")
    axis.plot([], [], color=GREY, lw=0.8, ls=":", label="checkpoint")
    axis.fill_between([], [], color=GREY, alpha=0.25, lw=0, label="lost, and done again")
    axis.set(title="maml-sinusoid", xlabel="outer step", ylabel="mean squared error on the query points")
    axis.set(yscale="log", yticks=[1, 2, 3, 5, 8], yticklabels=[1, 2, 3, 5, 8])
    axis.minorticks_off()
    axis.legend()
    save(figure, folder, "runs")


def check(folder: Path) -> None:
    """Central differences against a known derivative over h, and the table of `bilevel advise`."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.7))
    case = quadratic(20)
    exact = float(case.exact.grad["log_rate"])
    lengths = np.geomspace(1e-9, 1, 28)
    for dtype, colour, mark in (("float64", BLUE, "o"), ("float32", ORANGE, "s")):
        off = np.abs(_differences(case, lengths, dtype) - exact) / abs(exact)
        left.loglog(lengths, np.maximum(off, 1e-16), mark + "-", color=colour, label=dtype, lw=1, ms=4)
    left.axvspan(1e-6, 1e-2, color=GREY, alpha=0.12, lw=0)
    left.text(1e-4, 2, "bl.check looks here", ha="center", color=INK, fontsize=8.5)
    left.set(title="Central differences against a closed form", xlabel="h", ylabel="relative error")
    left.set(ylim=(1e-14, 10))
    left.legend(loc="lower left")
    rows = table("advise/maml_sinusoid")
    places = np.arange(len(rows))[::-1]
    errors = [np.hypot(number(row["bias"]), number(row["noise"])) for row in rows]
    colours = [BLUE if error < 1e-3 else GREY for error in errors]
    right.barh(places, [number(row["ms"]) for row in rows], color=colours, height=0.65)
    for place, row, error in zip(places, rows, errors, strict=True):
        text = "exact" if error < 1e-3 else f"error {error:.2g}"
        right.text(number(row["ms"]) * 1.08, place, text, va="center", fontsize=8.5)
    right.set(xscale="log", xlim=(0.2, 90), yticks=places, yticklabels=[row["estimator"] for row in rows])
    right.set(title="bilevel advise maml-sinusoid", xlabel="ms of a hypergradient")
    right.grid(axis="y", visible=False)
    figure.tight_layout()
    save(figure, folder, "check")


def _differences(case, lengths: np.ndarray, dtype: str) -> np.ndarray:
    """(F(θ + h) − F(θ − h)) / 2h in the log rate, for each h."""
    key = jax.random.key(0)
    with jax.enable_x64(dtype == "float64"):
        meta = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), case.meta)

        def value(log_rate):
            at = meta | {"log_rate": log_rate}
            params = case.solver.solve(case.problem, at, case.task, key).params
            return case.problem.outer_loss(params, at, case.task.query, key)

        both = jax.jit(lambda h: jax.vmap(value)(meta["log_rate"] + jnp.stack([h, -h]).ravel()))
        ahead, behind = np.asarray(both(jnp.asarray(lengths, dtype)), float).reshape(2, -1)
    return (ahead - behind) / (2 * lengths)


PICTURES = {"runs": runs, "check": check}
MEASURED = {"runs": measure_resume}
