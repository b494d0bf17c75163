"""What the warm-started implicit estimators share: products, residuals, stats and doubts.

All of them track φ ≈ argmin g and q ≈ (∇²φφ g)⁻¹ ∂φ f from call to call and return

    ∂θ f − (∂θ∇φ g)ᵀ q
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bilevel.hypergrad.common import differentiate, gradient_stats, outer_objective, split_keys
from bilevel.hypergrad.residuals import (
    doubt_above,
    inner_product,
    norm,
    ratio,
    warn_of_zero_leaves,
)
from bilevel.hypergrad.single_loop.minibatch import pick
from bilevel.linalg import mixed_gradient
from bilevel.problem import (
    Batch,
    Hypergradient,
    InnerState,
    IterativeSolver,
    Key,
    Meta,
    Params,
    Problem,
    Scalar,
    Task,
)

_NO_DRIFT = 0.1


class Trail(NamedTuple):
    """The residuals of the calls before.

    Args:
        largest: the largest ‖∇φ g‖ so far, the scale that later ones are held against.
        previous: ∇φ g and the residual of the linear system at the last call; () for full batches.
    """

    largest: Scalar
    previous: tuple[()] | tuple[Params, Params]


class Warm(NamedTuple):
    """What is kept between calls.

    Args:
        inner: the solver's state; `inner.params` is φ.
        q: like φ, the running solution of the linear system.
        trail: what the residuals are held against.
    """

    inner: InnerState
    q: Params
    trail: Trail


class Products(NamedTuple):
    """What one batch of the inner loss says at (φ, q): g, ∇φ g, ∇²φφ g q, (∂θ∇φ g)ᵀ q."""

    loss: Scalar
    gradient: Params
    hessian_q: Params
    cross_q: Meta


def warm_start(
    problem: Problem,
    solver: IterativeSolver,
    meta: Meta,
    task: Task,
    key: Key,
    linear_rate: float,
    noisy: bool,
) -> Warm:
    """φ₀, and a q that is one step away from 0: from 0 the first hypergradient could be exactly zero."""
    inner_key, outer_key = split_keys(key)
    init_key, step_key = jax.random.split(inner_key)
    inner = solver.init(problem, meta, task, init_key)
    slope = jax.grad(problem.outer_loss)(inner.params, meta, task.query, outer_key)
    gradient = jax.grad(problem.inner_loss)(inner.params, meta, task.support, step_key)
    return Warm(inner, jax.tree.map(lambda s: linear_rate * s, slope), start_trail(gradient, noisy))


def start_trail(gradient: Params, noisy: bool) -> Trail:
    """A trail that begins at the inner gradient of φ₀; `noisy` when later residuals are of minibatches."""
    zeros = jax.tree.map(jnp.zeros_like, gradient)
    return Trail(norm(gradient), (zeros, zeros) if noisy else ())


def follow(trail: Trail, gradient: Params, mismatch: Params) -> tuple[dict[str, Scalar], Trail]:
    """How the residuals of this call stand to those before, and the trail with them.

    Stats: `inner_residual` ‖∇φ g‖; `inner_residual_share`, the same over the largest so far; on minibatches
    also `inner_drift` and `linear_drift`, the cosines between a residual and the one before. They are near 1
    while a residual is mostly bias, and at or below 0 once it is only noise (Pflug's test): r √drift is an
    estimate of the bias in a residual r. 1 where there is none before.
    """
    residual = norm(gradient)
    largest = jnp.maximum(trail.largest, residual.astype(trail.largest.dtype))
    stats = {"inner_residual": residual, "inner_residual_share": ratio(residual, largest)}
    if not trail.previous:
        return stats, Trail(largest, ())
    for name, now, before in zip(("inner", "linear"), (gradient, mismatch), trail.previous, strict=True):
        size = norm(now) * norm(before)
        cosine = inner_product(now, before) / jnp.where(size == 0, 1.0, size)
        stats[f"{name}_drift"] = jnp.where(size == 0, 1.0, cosine)
    return stats, Trail(largest, (gradient, mismatch))


def inner_products(
    problem: Problem, params: Params, meta: Meta, support: Batch, key: Key, q: Params
) -> Products:
    """Both products with q from one forward-over-reverse pass, and the gradient it starts from."""

    def gradient(params, meta):
        loss, grads = mixed_gradient(problem.inner_loss)(params, meta, support, key)
        return grads, loss

    grads, pullback, loss = jax.vjp(gradient, params, meta, has_aux=True)
    hessian_q, cross_q = pullback(q)
    return Products(loss, grads, hessian_q, cross_q)


def outer_parts(
    problem: Problem, params: Params, meta: Meta, task: Task, key: Key
) -> tuple[Hypergradient, Params]:
    """The outer loss with its direct derivative ∂θ f, and ∂φ f."""
    direct = differentiate(lambda meta: outer_objective(problem, params, meta, task, key), meta)
    return direct, jax.grad(problem.outer_loss)(params, meta, task.query, key)


def given(loss: Scalar, gradient: Params) -> Callable:
    """The `gradient` argument of a solver's step that makes it use what was computed already."""
    return lambda _: lambda *arguments: (loss, gradient)


def linear_step(q: Params, hessian_q: Params, slope: Params, rate: float) -> Params:
    """q − rate (∇²φφ g q − ∂φ f)."""
    return jax.tree.map(lambda q, h, s: q - rate * (h - s), q, hessian_q, slope)


def move_inner(
    problem: Problem,
    solver: IterativeSolver,
    meta: Meta,
    task: Task,
    inner: InnerState,
    key: Key,
    numbers: jax.Array | None,
) -> InnerState:
    """All steps of the solver from where it stands, each on rows of its own: `numbers` [num_steps, batch]."""

    def step(inner, numbers):
        rows = task._replace(support=pick(task.support, numbers))
        return solver.step(problem, meta, rows, inner, key)[0], None

    return jax.lax.scan(step, inner, numbers, length=solver.num_steps)[0]


def implicit_hypergradient(
    direct: Hypergradient, products: Products, slope: Params, q: Params, trail: Trail
) -> tuple[Hypergradient, Trail]:
    """∂θ f − (∂θ∇φ g)ᵀ q with its stats, and the trail after this call."""
    grad = jax.tree.map(lambda d, c: d - c, direct.grad, products.cross_q)
    mismatch = jax.tree.map(lambda h, s: h - s, products.hessian_q, slope)
    residuals, trail = follow(trail, products.gradient, mismatch)
    stats = {
        "inner_loss": products.loss,
        **direct.stats,
        **gradient_stats(direct.value, grad),
        **residuals,
        "linear_residual": ratio(norm(mismatch), norm(slope)),
        "curvature": ratio(inner_product(q, products.hessian_q), inner_product(q, q)),
    }
    return Hypergradient(direct.value, grad, stats), trail


def warn_of_leaves_out_of_sight(
    estimator: object, problem: Problem, params: Params, meta: Meta, task: Task, key: Key
) -> None:
    """Name the leaves that enter neither loss: an estimator that only sees losses gives them zero."""

    def both(meta, params, task):
        inner = problem.inner_loss(params, meta, task.support, key)
        return inner, problem.outer_loss(params, meta, task.query, key)

    warn_of_zero_leaves(estimator, both, meta, params, task)


def without_noise(stats: Mapping[str, float]) -> dict[str, float]:
    """The stats with both residuals shrunk to the part of them that is not noise, as their drifts tell.

    A drift below 0.1 counts as none: a mean of a few hundred cosines of small vectors is no surer than that.
    """
    shrunk = dict(stats)
    for residual, drift in (("inner_residual_share", "inner_drift"), ("linear_residual", "linear_drift")):
        if drift in stats and residual in stats:
            shrunk[residual] = stats[residual] * max(stats[drift] - _NO_DRIFT, 0.0) ** 0.5
    return shrunk


def warm_doubts(
    stats: Mapping[str, float], *, rate_name: str, rate: float, tolerance: float, series: str | None = None
) -> list[str]:
    """Why the state that was carried along may not be what the formula needs.

    `series` names the field of an estimator whose q starts afresh at each call, so that more calls do not
    help.
    """
    curvature = stats.get("curvature", 0.0)
    said = []
    if curvature < 0:
        said.append(
            f"the inner loss is not convex along q: curvature is {curvature:.3g}, and the linear system has "
            "no stable solution there; add a ridge to inner_loss, or use bl.hypergrad.Mixed()"
        )
    elif rate * curvature >= 2:
        said.append(
            f"{rate_name} = {rate:g} makes the linear system diverge: times the curvature {curvature:.3g} it "
            f"must stay below 2; use {rate_name} = {1 / curvature:.2g}"
        )
    remedy = (
        f"raise {series}"
        if series
        else "carry the state through more calls, or lower the outer learning rate"
    )
    on = ", noise taken out" if "linear_drift" in stats else ""
    return [
        *said,
        *doubt_above(
            without_noise(stats),
            "inner_residual_share",
            tolerance,
            f"the inner parameters have not settled{on}: carry the state through more calls, or raise the "
            "inner rate or num_steps",
        ),
        *doubt_above(
            without_noise(stats),
            "linear_residual",
            tolerance,
            f"q is not solved for{on}: {remedy}, or change {rate_name}",
        ),
    ]
