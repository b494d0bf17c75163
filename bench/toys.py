"""Where short windows mislead: three published toys, by truncation, evolution strategies and PES.

    python bench/toys.py                       # prints the tables, draws docs/toys_*.png; about a minute
    python bench/toys.py --quick               # a tenth of the outer steps

Every method sees the same problem and takes the same outer steps; only the estimator differs.
"""

import argparse
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from kept_in import add_folder, kept_in

from bilevel.hypergrad import MultiStep
from bilevel.hypergrad.evolution.nres import NRES
from bilevel.hypergrad.evolution.pes import PES
from bilevel.inner import unroll
from bilevel.testing.toy_problems import (
    OnlineES,
    OnlineUnroll,
    influence_balancing,
    learning_rate_schedule,
    noisy_quadratic,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

KEY = jax.random.key(3)
# Okabe and Ito: told apart with any kind of colour vision. Line styles tell them apart without colour.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"


class Method(NamedTuple):
    """A row of a table and a line of a picture."""

    name: str
    estimator: Any
    colour: str
    style: str = "-"


def mean_loss(toy, meta):
    """F(θ): the mean of the outer losses after each step."""
    each = lambda params: toy.problem.outer_loss(params, meta, None, KEY)  # noqa: E731
    return jnp.mean(unroll(toy.problem, toy.solver, meta, toy.task, KEY, each=each)[1])


def descend(toy, estimator, optimizer, num_meta_steps):
    """θ before each outer step and after the last: `[num_meta_steps + 1, ...]`."""

    @jax.jit
    def run(meta):
        def step(carry, key):
            meta, state, opt_state = carry
            h, state = estimator.estimate(toy.problem, toy.solver, meta, toy.task, state, key)
            updates, opt_state = optimizer.update(h.grad, opt_state, meta)
            return (optax.apply_updates(meta, updates), state, opt_state), meta

        state = estimator.init(toy.problem, toy.solver, meta, toy.task, KEY)
        keys = jax.random.split(KEY, num_meta_steps)
        carry = (meta, state, optimizer.init(meta))
        (last, _, _), path = jax.lax.scan(step, carry, keys)
        return jnp.concatenate([path, last[None]])

    return np.asarray(run(jnp.asarray(toy.meta)))


def table(title, header, rows):
    """Prints Markdown."""
    print(f"\n{title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def finish(figure, axes, folder, name):
    """Labels are given; this takes away what is not needed and writes the file."""
    for axis in np.ravel(axes):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    figure.savefig(folder / name, dpi=130, bbox_inches="tight")
    plt.close(figure)


def influence(num_meta_steps, folder):
    """Influence balancing: SGD with rate 1e-4 from θ = 1/2, as published."""
    methods = [
        Method("backprop, window 1", OnlineUnroll(1), BLUE),
        Method("backprop, window 10", OnlineUnroll(10, last=True), SKY, "--"),
        Method("backprop, window 100", OnlineUnroll(100, last=True), GREEN, "-."),
        Method("backprop, window 100, mean", OnlineUnroll(100), "black", ":"),
        Method("ES, window 1", OnlineES(0.1, 500, 1), ORANGE, ":"),
        Method("NRES, window 1", NRES(0.1, 500, 1), PURPLE, "--"),
        Method("PES, window 1", PES(0.1, 500, 1), RED),
    ]
    figure, axis = plt.subplots(figsize=(7, 4.2))
    rows = []
    for method in methods:
        toy = influence_balancing(num_meta_steps * method.estimator.truncation)
        theta = descend(toy, method.estimator, optax.sgd(1e-4), num_meta_steps)
        loss = 0.5 * (6 * theta + 1) ** 2
        rows.append((method.name, f"{theta[-1]:.4g}", f"{loss[-1]:.2g}"))
        axis.semilogy(np.minimum(loss, 1e6), method.style, color=method.colour, label=method.name, lw=1.8)
    axis.set(
        title="Influence balancing: short windows have the wrong sign",
        xlabel="outer step",
        ylabel="loss in the limit of many steps",
        ylim=(1e-17, 1e5),
    )
    axis.legend(frameon=False, fontsize=9, loc="lower left")
    finish(figure, axis, folder, "toys_influence.png")
    table(f"Influence balancing, {num_meta_steps} outer steps (θ* = −0.1667)", ("method", "θ", "loss"), rows)


def schedule(num_meta_steps, folder):
    """The two-parameter learning-rate schedule: Adam with rate 1e-2 and β₁ = 0.99, windows of 10 steps."""
    toy = learning_rate_schedule()
    methods = [
        Method("backprop", OnlineUnroll(10), BLUE),
        Method("ES", OnlineES(0.3, 50, 10), ORANGE),
        Method("NRES", NRES(0.3, 50, 10), PURPLE),
        Method("PES", PES(0.3, 50, 10), RED),
    ]
    ticks = np.linspace(-8, 5, 261)
    grid = np.stack(np.meshgrid(ticks, ticks, indexing="ij"), axis=-1)
    loss = jax.jit(lambda at: mean_loss(toy, at))
    losses = np.asarray(
        jax.jit(lambda rows: jax.lax.map(jax.vmap(lambda at: mean_loss(toy, at)), rows))(grid)
    )
    best = grid[np.unravel_index(np.argmin(losses), losses.shape)]

    figure, axis = plt.subplots(figsize=(7, 5.2))
    shades = axis.contourf(ticks, ticks, np.minimum(losses, 30).T, levels=24, cmap="Greys_r")
    figure.colorbar(shades, label="mean loss over 100 inner steps (30 and above in white)")
    rows = [("start", *(f"{x:.2f}" for x in toy.meta), f"{loss(toy.meta):.2f}")]
    for method in methods:
        path = descend(toy, method.estimator, optax.adam(1e-2, b1=0.99), num_meta_steps)
        end = path[-len(path) // 10 :].mean(0)  # the noise of the last tenth is averaged away
        rows.append((method.name, f"{end[0]:.2f}", f"{end[1]:.2f}", f"{loss(end):.2f}"))
        axis.plot(*path.T, color=method.colour, lw=1.2, alpha=0.9, zorder=3)
        axis.plot(*end, "o", color=method.colour, mec="white", ms=9, label=method.name, zorder=5)
    rows.append(("best of the grid", f"{best[0]:.2f}", f"{best[1]:.2f}", f"{losses.min():.2f}"))
    axis.plot(*toy.meta, "s", color="black", mec="white", ms=8, label="start", zorder=5)
    axis.plot(*best, "*", color="#F0E442", mec="black", ms=17, label="best of the grid", zorder=6)
    axis.set(
        title="Learning-rate schedule, judged 10 of 100 steps at a time",
        xlabel="θ₁, log rate of the first step",
        ylabel="θ₂, log rate of the last step",
        xlim=(-6, 5),
        ylim=(-6.5, 3),
    )
    axis.legend(frameon=False, fontsize=9, ncol=3, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    finish(figure, axis, folder, "toys_schedule.png")
    title = f"Learning-rate schedule, {num_meta_steps} outer steps, windows of 10 of 100 steps"
    table(title, ("method", "θ₁", "θ₂", "F(θ)"), rows)


def horizon(num_meta_steps, folder):
    """The rate of SGD on a noisy quadratic: Adam with rate 1e-2, 1000 inner steps."""
    toy = noisy_quadratic()
    methods = [
        Method("backprop, window 10", OnlineUnroll(10), BLUE),
        Method("backprop, window 100", OnlineUnroll(100), SKY, "--"),
        Method("ES, window 10", OnlineES(0.1, 10, 10), ORANGE, ":"),
        Method("PES, window 10", PES(0.1, 10, 10), RED),
        Method("backprop, all 1000 steps", MultiStep(), GREEN, "-."),
    ]
    ticks = np.linspace(-5, 0.5, 221)
    losses = np.asarray(jax.jit(jax.vmap(lambda at: mean_loss(toy, at)))(ticks))
    best = ticks[np.argmin(losses)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    left.plot(ticks, losses, color="black", lw=1.8)
    left.axvline(float(toy.meta), color="grey", lw=1, ls="--")
    left.text(float(toy.meta) - 0.08, 0.75, "start", rotation=90, color="dimgrey", ha="right")
    left.set(title="Loss of 1000 steps", xlabel="θ, log rate", ylabel="mean loss", ylim=(0, 1))
    rows = [("start", f"{toy.meta:.2f}", f"{mean_loss(toy, jnp.asarray(toy.meta)):.3f}")]
    for method in methods:
        path = descend(toy, method.estimator, optax.adam(1e-2), num_meta_steps)
        end = path[-len(path) // 10 :].mean()
        rows.append((method.name, f"{end:.2f}", f"{mean_loss(toy, jnp.asarray(end)):.3f}"))
        right.plot(path, method.style, color=method.colour, label=method.name, lw=1.6)
    rows.append(("best of the grid", f"{best:.2f}", f"{losses.min():.3f}"))
    right.axhline(best, color="black", lw=1, ls="--")
    right.text(0.99, best + 0.2, "best", ha="right", transform=right.get_yaxis_transform())
    right.set(title="Where the outer loop goes", xlabel="outer step", ylabel="θ, log rate", ylim=(-4, -0.4))
    figure.suptitle("Short-horizon bias: a short window asks for a smaller rate, the whole loop for a larger")
    figure.tight_layout()
    figure.legend(frameon=False, fontsize=9, ncol=5, loc="upper center", bbox_to_anchor=(0.5, 0.02))
    finish(figure, (left, right), folder, "toys_horizon.png")
    title = f"Short-horizon bias, {num_meta_steps} outer steps"
    table(title, ("method", "θ", "F(θ)"), rows)


def main() -> None:
    """Prints the tables and draws the pictures."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--quick", action="store_true", help="a tenth of the outer steps")
    add_folder(options)
    args = options.parse_args()
    folder = kept_in(args)
    fewer = 10 if args.quick else 1
    with jax.enable_x64(True):
        influence(3000 // fewer, folder)
        schedule(20_000 // fewer, folder)
        horizon(3000 // fewer, folder)


if __name__ == "__main__":
    main()
