"""Published toy problems on which short windows of the inner loop mislead, and the methods they mislead."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel.hypergrad.common import as_floats, gradient_stats, noise_key, outer_objective, split_keys
from bilevel.hypergrad.evolution.particles import num_windows, require_steps, run_window
from bilevel.hypergrad.evolution.perturbation import draw, shift
from bilevel.inner import Gradient, unroll
from bilevel.linalg import reverse_gradient
from bilevel.problem import (
    Hypergradient,
    InnerSolver,
    InnerState,
    Key,
    Meta,
    Params,
    Problem,
    Solution,
    Task,
)


class Toy(NamedTuple):
    """A problem without data, and where its outer loop starts."""

    problem: Problem
    solver: InnerSolver
    meta: Meta
    task: Task = Task(None, None)


class RecurrenceState(NamedTuple):
    """Where a recurrence is."""

    params: Params
    step: jax.Array


@dataclass(frozen=True)
class Recurrence:
    """An inner solver that is any dynamical system: φₖ₊₁ = transition(φₖ, θ, k).

    >>> toy = influence_balancing(num_steps=2)
    >>> toy.solver.solve(toy.problem, toy.meta, toy.task, jax.random.key(0)).params.shape
    (23,)
    """

    transition: Callable[[Params, Meta, jax.Array], Params]
    num_steps: int

    def init(self, problem, meta, task, key) -> RecurrenceState:
        """φ₀."""
        return RecurrenceState(problem.init(meta, key), jnp.int32(0))

    def step(self, problem, meta, task, state, key, gradient=reverse_gradient):
        """One step, and the inner loss where it began."""
        loss = problem.inner_loss(state.params, meta, task.support, key)
        return RecurrenceState(self.transition(state.params, meta, state.step), state.step + 1), loss

    def solve(self, problem, meta, task, key) -> Solution:
        """All steps."""
        state, losses = unroll(problem, self, meta, task, key)
        return Solution(state.params, {"inner_loss": losses[-1]})


def influence_balancing(num_steps: int = 3000) -> Toy:
    """A linear system in which a number acts one way at first and the other way in the end.

        sₖ₊₁ = A sₖ + θ (1, ..., 1, −1, ..., −1),   10 times +1 and 13 times −1,   f = ½ (s₁ − 1)²

    A has ½ on and above its diagonal, s ∈ R²³, s₀ = 1. What enters at component j reaches s₁ after j steps:
    the +1s at once, the −1s late. In the limit s₁ = 2 (10 − 13) θ = −6 θ, so θ* = −1/6, and a window of up to
    forty steps sees the derivative with the wrong sign. θ starts at ½, where the limit of f is 8.

    Reference: Tallec, Ollivier, Unbiased online recurrent optimization, 2017.

    >>> toy = influence_balancing(num_steps=500)
    >>> s = toy.solver.solve(toy.problem, jnp.float32(-1 / 6), toy.task, jax.random.key(0)).params
    >>> print(jnp.round(s[0], 4))
    1.0
    """
    size, positive = 23, 10
    a = 0.5 * (np.eye(size) + np.eye(size, k=1))
    signs = np.where(np.arange(size) < positive, 1.0, -1.0)

    def transition(s, theta, step):
        return jnp.asarray(a, s.dtype) @ s + theta * jnp.asarray(signs, s.dtype)

    problem = Problem(
        init=lambda theta, key: jnp.ones(size, jnp.result_type(theta)),
        inner_loss=lambda s, theta, batch, key: 0.5 * jnp.sum((s - transition(s, theta, 0)) ** 2),
        outer_loss=lambda s, theta, batch, key: 0.5 * (s[0] - 1) ** 2,
    )
    return Toy(problem, Recurrence(transition, num_steps), np.array(0.5))


def learning_rate_schedule(num_steps: int = 100) -> Toy:
    """Two numbers that set how the rate of gradient descent runs from its first step to its last.

        αₖ = e^θ₁ (1 − k/K) + e^θ₂ k/K,   f = g = √(x² + 5) − √5 + sin²(y) e^(−5 x²) + ¼ |y − 100|

    from (1, 1), with K = 100. To get along y the rate must be large, which does harm at first: judged ten
    steps at a time a schedule looks good that is far from the best. θ starts at log 0.01 twice.

    Reference: Vicol, Metz, Sohl-Dickstein, 2021 (their toy regression).

    >>> toy = learning_rate_schedule(num_steps=10)
    >>> toy.solver.solve(toy.problem, jnp.log(jnp.full(2, 0.01)), toy.task, jax.random.key(0)).params.shape
    (2,)
    """

    def surface(params, meta, batch, key):
        x, y = params
        ripple = jnp.sin(y) ** 2 * jnp.exp(-5 * x**2)
        return jnp.sqrt(x**2 + 5) - jnp.sqrt(5.0) + ripple + 0.25 * jnp.abs(y - 100)

    def optimizer(meta):
        first, last = jnp.exp(meta)
        return optax.sgd(lambda step: first + (last - first) * (step * (1 / num_steps)))

    problem = Problem(lambda meta, key: jnp.ones(2, meta.dtype), surface, surface)
    return Toy(problem, Gradient(optimizer, num_steps), np.log(np.full(2, 0.01)))


def noisy_quadratic(num_steps: int = 1000) -> Toy:
    """The rate of stochastic gradient descent on a quadratic with one steep, noisy and one flat direction.

        mₖ₊₁ = (1 − αh)² mₖ + α² h² c²,   f = ½ Σ h m,   h = (1, 0.01), c = 1, m₀ = (1, 100), α = e^θ

    m is the mean square of each coordinate, in closed form, so nothing is random. A smaller rate
    takes noise off the steep direction at once; the flat one needs a large rate for long. A short window
    asks for ever smaller rates (short-horizon bias). θ starts at log 0.1.

    Reference: Wu, Ren, Liao, Grosse, Understanding short-horizon bias in stochastic meta-optimization, 2018.

    >>> toy = noisy_quadratic(num_steps=10)
    >>> toy.solver.solve(toy.problem, jnp.log(0.1), toy.task, jax.random.key(0)).params.shape
    (2,)
    """
    curvature, noise, start = np.array([1.0, 0.01]), 1.0, np.array([1.0, 100.0])

    def transition(m, log_rate, step):
        moved = jnp.exp(log_rate) * jnp.asarray(curvature, m.dtype)
        return (1 - moved) ** 2 * m + moved**2 * noise**2

    def loss(m, log_rate, batch, key):
        return 0.5 * jnp.sum(jnp.asarray(curvature, m.dtype) * m)

    problem = Problem(lambda meta, key: jnp.asarray(start, jnp.result_type(meta)), loss, loss)
    return Toy(problem, Recurrence(transition, num_steps), np.log(np.array(0.1)))


class OnlineState(NamedTuple):
    """One inner loop that lives on between calls; at window 0 the next call begins it anew."""

    inner: InnerState
    window: jax.Array
    key: Key


@dataclass(frozen=True)
class OnlineUnroll:
    """Truncated backpropagation, online: biased, as what PES is compared with.

    One inner loop goes on by `truncation` steps a call; the gradient is that of the window's losses, as if
    the state it began with did not depend on θ. After `solver.num_steps` steps it begins anew.

    Args:
        truncation: steps in a window.
        last: the loss of a window is the outer loss after its last step; otherwise that of `PES`, the mean.

    >>> toy = influence_balancing(num_steps=4)
    >>> key, estimator = jax.random.key(0), OnlineUnroll(truncation=2)
    >>> state = estimator.init(toy.problem, toy.solver, 0.5, toy.task, key)
    >>> h, state = estimator.estimate(toy.problem, toy.solver, 0.5, toy.task, state, key)
    >>> int(state.inner.step), int(state.window)
    (2, 1)
    """

    truncation: int
    last: bool = False

    def check(self, problem, solver) -> None:
        """Needs a solver with steps."""
        require_steps(self, solver)

    def init(self, problem, solver, meta, task, key) -> OnlineState:
        """An inner loop that the first call begins."""
        return OnlineState(solver.init(problem, as_floats(meta), task, key), jnp.int32(0), key)

    def estimate(self, problem, solver, meta, task, state, key) -> tuple[Hypergradient, OnlineState]:
        """The gradient of one window."""
        at, loss, after = _window_loss(self, problem, solver, meta, task, state, key)
        (value, stats), grad = jax.value_and_grad(loss, has_aux=True)(at)
        return Hypergradient(value, grad, {**stats, **gradient_stats(value, grad)}), after


@dataclass(frozen=True)
class OnlineES:
    """Evolution strategies on one window at a time: biased as `OnlineUnroll` is, with noise on top.

    >>> toy = influence_balancing(num_steps=4)
    >>> key, estimator = jax.random.key(0), OnlineES(sigma=0.1, num_pairs=3, truncation=2)
    >>> state = estimator.init(toy.problem, toy.solver, 0.5, toy.task, key)
    >>> h, state = estimator.estimate(toy.problem, toy.solver, 0.5, toy.task, state, key)
    >>> int(state.inner.step), int(state.window)
    (2, 1)
    """

    sigma: float
    num_pairs: int
    truncation: int
    last: bool = False

    check = OnlineUnroll.check
    init = OnlineUnroll.init

    def estimate(self, problem, solver, meta, task, state, key) -> tuple[Hypergradient, OnlineState]:
        """The smoothed gradient of one window."""
        at, loss, after = _window_loss(self, problem, solver, meta, task, state, key)

        def pair(key):
            noise = draw(key, at)
            ahead, behind = (loss(shift(at, sign * self.sigma, noise))[0] for sign in (1, -1))
            return jax.tree.map(lambda leaf: (ahead - behind) / (2 * self.sigma) * leaf, noise)

        grads = jax.vmap(pair)(jax.random.split(noise_key(key), self.num_pairs))
        grad = jax.tree.map(lambda leaf: leaf.mean(0), grads)
        value, stats = loss(at)
        return Hypergradient(value, grad, {**stats, **gradient_stats(value, grad)}), after


def _window_loss(estimator, problem, solver, meta, task, state: OnlineState, key: Key):
    """Meta as arrays, the loss of the next window as a function of it, and the state after the window."""
    meta = as_floats(meta)
    life_key = jnp.where(state.window == 0, key, state.key)

    def run(at):
        return run_window(
            problem, solver, at, task, state.inner, state.window, life_key, truncation=estimator.truncation
        )

    def loss(at):
        inner, mean, stats = run(at)
        if not estimator.last:
            return mean, stats
        return outer_objective(problem, inner.params, at, task, split_keys(life_key)[1])[0], stats

    after = (state.window + 1) % num_windows(estimator, solver)
    return meta, loss, OnlineState(run(meta)[0], after, life_key)
