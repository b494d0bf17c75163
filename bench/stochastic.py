"""The benchmark of the stochastic bilevel literature: six single-loop methods, suboptimality against time.

    python bench/stochastic.py                        # about 20 minutes on 2 cores; draws docs/stochastic_*
    python bench/stochastic.py --quick                # two minutes, to see that it runs
    python bench/stochastic.py --ijcnn1 FILE --ijcnn1-test FILE   # the real set, in LIBSVM's format

Data cleaning needs BILEVEL_DATA, the folder of mnist.npz. Every method takes its steps from the same small
grid; the pair that ends lowest is run with several seeds. Time is the processor time of the compiled calls
alone: neither compilation nor the evaluation of h is in it. Protocol after Dagréou et al., 2022; see
docs/stochastic.md.
"""

import argparse
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import run as bench
import scipy.optimize
from kept_in import add_folder, kept_in
from stochastic_problems import Work, bundled, cleaning, ijcnn1, ijcnn1_like, noisy_query
from stochastic_runs import (
    FULL,
    METHODS,
    Method,
    calls,
    compile_steps,
    reference_speed,
    run,
    speed,
    train_speed,
    work_shape,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LEVELS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6)  # of h(θ) − h*, relative to where the run began
LEAST = 1e-13  # what a suboptimality is drawn as at the least


class Curve(NamedTuple):
    """A run judged: seconds, calls, h and |dh/dθ|² at each of its marks."""

    seconds: np.ndarray
    calls: np.ndarray
    value: np.ndarray
    slope: np.ndarray


class Result(NamedTuple):
    """A method's best pair of rates, and its runs with several seeds."""

    rate: float
    outer: float
    curves: list[Curve]
    last: np.ndarray  # θ at the end of the first


def judge(work: Work, metas: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """h and |dh/dθ|² of each θ; φ* of one is where the search for the next begins."""
    params, rows = jnp.zeros(work_shape(work)), []
    for meta in metas:
        h, slope, found = work.value(jnp.asarray(meta, float), params)
        rows.append((float(h), float(jnp.sum(slope**2))))
        if np.isfinite(rows[-1][0]):
            params = found
    values, slopes = zip(*rows, strict=True)
    return np.array(values), np.array(slopes)


def search(work: Work, method: Method, seeds: int, seconds: float) -> Result | None:
    """The best of the grid by its final value, then `seeds` runs of it."""
    found = []
    for rate in work.rates:
        steps = compile_steps(work, method, rate)
        for outer in work.outer_rates:
            trace = run(work, steps, outer, 0, seconds)
            if trace.finite:
                h = judge(work, trace.metas[-1:])[0][-1]
                found.append((h if np.isfinite(h) else np.inf, rate, outer))
    if not found:
        return None
    _, rate, outer = min(found)
    steps, curves, last = compile_steps(work, method, rate), [], work.meta
    for seed in range(1, seeds + 1):
        trace = run(work, steps, outer, seed, seconds)
        value, slope = judge(work, trace.metas)
        curves.append(Curve(trace.seconds, trace.steps * calls(work, method), value, slope))
        last = trace.metas[-1] if seed == 1 else last
    print(f"{work.title}: {method.name} done", file=sys.stderr, flush=True)
    return Result(rate, outer, curves, last)


def optimum(work: Work, results: dict[str, Result], most: int) -> float:
    """h*: the least of all that was seen, and of L-BFGS on h itself from the best θ and from θ₀."""
    best = min(results.values(), key=lambda result: result.curves[0].value[-1])
    least, params = [], jnp.zeros(work_shape(work))

    def flat(meta):
        nonlocal params
        h, slope, params = work.value(jnp.asarray(meta), params)
        least.append(float(h))
        return float(h), np.asarray(slope, float)

    options = {"maxiter": most, "maxfun": 2 * most, "ftol": 1e-15, "gtol": 1e-12}
    for start in (best.last, work.meta):  # h is not convex: from θ₀ it can end lower
        scipy.optimize.minimize(flat, start.astype(float), jac=True, method="L-BFGS-B", options=options)
    return min(*least, *(curve.value.min() for r in results.values() for curve in r.curves))


# What is printed and drawn


def on_grid(curves: list[Curve], axis: str, values: list[np.ndarray], grid: np.ndarray) -> np.ndarray:
    """Each run's value at the last mark before each point of the grid `[runs, points]`."""
    rows = []
    for curve, value in zip(curves, values, strict=True):
        place = np.searchsorted(getattr(curve, axis), grid, side="right") - 1
        row = value[np.clip(place, 0, None)].astype(float)
        row[grid > getattr(curve, axis)[-1]] = np.nan
        rows.append(row)
    return np.array(rows)


def draw(work: Work, results: dict[str, Result], least: float, path: Path) -> None:
    """Medians and quartiles: suboptimality against time and calls, squared slope against time."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2))
    panels = (
        ("seconds", "processor time (s)", "h(θ) − h*", lambda curve: curve.value - least),
        ("calls", "derivatives of a minibatch", "h(θ) − h*", lambda curve: curve.value - least),
        ("seconds", "processor time (s)", "squared norm of the hypergradient", lambda curve: curve.slope),
    )
    for axis, (along, xlabel, ylabel, of) in zip(axes, panels, strict=True):
        for method in (*METHODS, FULL):
            if method.name not in results:
                continue
            # A method that took one step in its time has no line.
            curves = [curve for curve in results[method.name].curves if len(curve.seconds) > 1]
            if not curves:
                continue
            end = max(getattr(curve, along)[-1] for curve in curves)
            start = min(getattr(curve, along)[1] for curve in curves)
            grid = np.geomspace(start, end, 60)
            rows = np.maximum(on_grid(curves, along, [of(curve) for curve in curves], grid), LEAST)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # a column without runs has no median
                low, middle, high = np.nanquantile(rows, (0.25, 0.5, 0.75), axis=0)
            axis.loglog(grid, middle, method.style, color=method.colour, label=method.name, lw=1.8)
            axis.fill_between(grid, low, high, color=method.colour, alpha=0.15, lw=0)
        axis.set(xlabel=xlabel, ylabel=ylabel)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    figure.suptitle(work.title)
    figure.tight_layout()
    axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def reached(curve: Curve, least: float, level: float) -> float:
    """The first second at which the suboptimality is below a share of that at the start; inf for never."""
    share = (curve.value - least) / (curve.value[0] - least)
    under = np.flatnonzero(share <= level)
    return float(curve.seconds[under[0]]) if len(under) else np.inf


def table(work: Work, results: dict[str, Result], least: float) -> None:
    """Prints Markdown: seconds to each level, and where the runs end."""
    start = next(iter(results.values())).curves[0].value[0]
    print(
        f"\n### {work.title}\n\nh(θ₀) = {start:.6f}, h* = {least:.8f}; "
        "median seconds to a share of h(θ₀) − h*"
    )
    heads = [f"{level:g}" for level in LEVELS]
    print(f"\n| method | rate, outer rate | {' | '.join(heads)} | suboptimality at the end (quartiles) |")
    print("|---|---|" + "---|" * (len(LEVELS) + 1))
    for name, result in results.items():
        times = [np.median([reached(curve, least, level) for curve in result.curves]) for level in LEVELS]
        cells = [f"{seconds:.3g}" if np.isfinite(seconds) else "–" for seconds in times]
        ends = [max(curve.value[-1] - least, 0) for curve in result.curves]
        low, middle, high = np.quantile(ends, (0.25, 0.5, 0.75))
        print(
            f"| {name} | {result.rate:g}, {result.outer:g} | {' | '.join(cells)} "
            f"| {middle:.1e} ({low:.1e} to {high:.1e}) |"
        )
    sys.stdout.flush()


def plain_numpy(words: list[str]) -> dict[str, float]:
    """Microseconds of an outer step of the reference, in a process without numba's compiler."""
    command = [sys.executable, str(Path(__file__)), *words, "--only", "numpy"]
    done = subprocess.run(
        command, env=os.environ | {"NUMBA_DISABLE_JIT": "1"}, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def speed_table(works: dict[str, Work], rounds: int, words: list[str]) -> None:
    """Prints Markdown: microseconds of an outer step, ours and the reference's."""
    plain = plain_numpy(words)
    print("\n### Microseconds of an outer step, median (least) over rounds in turn\n")
    print(
        "| problem | method | bilevel | numpy | bilevel / numpy | compiled by numba | bilevel / numba "
        "| in bl.train, least |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, work in works.items():
        for method in METHODS:
            took = speed(work, method, rounds)
            inside = train_speed(work, method, 50 if name == "cleaning" else 200)
            pair = [f"{np.median(part):.1f} ({part.min():.1f})" for part in (took.ours, took.theirs)]
            numpy = plain[f"{name} {method.name}"]
            print(
                f"| {name} | {method.name} | {pair[0]} | {numpy:.1f} | {np.median(took.ours) / numpy:.2f} "
                f"| {pair[1]} | {np.median(took.ratio):.2f} ({took.ours.min() / took.theirs.min():.2f}) "
                f"| {inside:.1f} |",
                flush=True,
            )


def works_of(args: argparse.Namespace) -> dict[str, Work]:
    """The problems asked for."""
    works = {}
    if "ijcnn1" in args.works:
        real = args.ijcnn1 is not None
        works["ijcnn1"] = ijcnn1(args.ijcnn1, args.ijcnn1_test) if real else ijcnn1_like(args.quick)
    if "noisy_query" in args.works:
        works["noisy_query"] = noisy_query()
    for name in ("breast_cancer", "digits"):
        if name in args.works:
            works[name] = bundled(name)
    if "cleaning" in args.works:
        folder = os.environ.get("BILEVEL_DATA")
        if not folder or not (Path(folder) / "mnist.npz").exists():
            sys.exit("set BILEVEL_DATA to the folder that holds mnist.npz, or leave cleaning out of --works")
        works["cleaning"] = cleaning(Path(folder), *((1024, 1024) if args.quick else (args.images, 5000)))
    return works


def main() -> None:
    """Prints the tables and draws the pictures."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("noisy_query", "ijcnn1", "breast_cancer", "digits", "cleaning")
    options.add_argument("--quick", action="store_true", help="smaller sets, a tenth of the time, one seed")
    options.add_argument("--works", nargs="*", choices=names, default=names)
    options.add_argument("--images", type=int, default=5000, help="of data cleaning; 20000 as published")
    options.add_argument("--ijcnn1", type=Path, help="LIBSVM file of the training set")
    options.add_argument("--ijcnn1-test", type=Path, help="LIBSVM file of the test set, for the outer loss")
    options.add_argument(
        "--only", choices=("speed", "curves", "numpy"), help="a part of it; numpy prints JSON"
    )
    add_folder(options)
    args = options.parse_args()
    if (args.ijcnn1 is None) != (args.ijcnn1_test is None):
        options.error("--ijcnn1 and --ijcnn1-test go together: one for the inner loss, one for the outer")
    jax.config.update("jax_enable_x64", True)
    # The calls are waited for one by one: a thread of their own only adds its waking up.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    works = works_of(args)
    rounds = 5 if args.quick else 60
    if args.only == "numpy":
        found = {f"{n} {m.name}": reference_speed(w, m, rounds) for n, w in works.items() for m in METHODS}
        print(json.dumps(found))
        return
    folder = kept_in(args)
    print(f"Machine: {bench.machine()}")
    if args.only != "curves":
        speed_table(works, rounds, [word for word in sys.argv[1:] if word not in ("--only", "speed")])
    for name, work in works.items() if args.only != "speed" else ():
        seconds = work.seconds / 10 if args.quick else work.seconds
        seeds = 1 if args.quick else (3 if name == "cleaning" else 5)
        found = {method.name: search(work, method, seeds, seconds) for method in (*METHODS, FULL)}
        results = {name: result for name, result in found.items() if result is not None}
        least = optimum(work, results, (5 if args.quick else 40) if name == "cleaning" else 500)
        table(work, results, least)
        draw(work, results, least, folder / f"stochastic_{name}.png")


if __name__ == "__main__":
    main()
