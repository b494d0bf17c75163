"""Which training examples help and which harm: what the implicit hypergradient says of each of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.hypergrad import Implicit, cg, hypergradient
from bilevel.problem import Batch, InnerSolver, Key, Meta, Problem, Task


@dataclass(frozen=True)
class Influence:
    """What each support example does to the outer loss.

    Args:
        scores: [n], dF/dwᵢ at weights of 1: to first order, the change of the outer loss when example i is
            counted twice, and minus that when it is left out. Positive is harmful.
        value: the outer loss, all weights 1.
        stats: of the implicit hypergradient: how far it is to be trusted.
    """

    scores: np.ndarray
    value: float
    stats: Mapping[str, float]

    @property
    def most_harmful(self) -> np.ndarray:
        """Rows [n], the most harmful first."""
        return np.argsort(-self.scores, kind="stable")


def influence(
    problem: Problem,
    solver: InnerSolver,
    meta: Meta,
    task: Task,
    key: Key,
    *,
    estimator: Implicit | None = None,
) -> Influence:
    """The influence of every support example on the outer loss, by one linear solve for all of them.

        φ*(w) = argmin (1/n) Σ wᵢ g(φ; zᵢ),   dF/dwᵢ = −(1/n) ∇φ g(φ*; zᵢ)ᵀ (∇²φφ g)⁻¹ ∇φ f   at w = 1

    It is the hypergradient with respect to weights of the examples, by `weighted_rows`.

    Args:
        problem: its `inner_loss` is a mean over the rows of its batch; a ridge, the same for every row, may
            stand beside the mean: leaving a row out of (1/n) Σ (gᵢ + ridge) leaves the minimizer of the
            others' mean and the ridge.
        solver: reaches the minimum; one with 0 steps takes `problem.init` for it, such as a trained model.
        meta: θ, held fixed.
        task: support leaves [n, ...]; the query is what the outer loss is measured on.
        key: all randomness of the solve.
        estimator: its linear solver must reach the solution: `Implicit(cg(100))` when left out. A model that
            is not convex needs a damped one, such as `Implicit(nystrom(...))`.

    Raises:
        ValueError: when support leaves do not share their leading axis, or the inner loss is no mean over
            rows.

    Warns:
        HypergradientWarning: when the minimum is not reached, or the linear system not solved.

    Cost: the inner solve, two gradients for a step of the linear solver, and one more for all n scores.
    First order in the weights: exact for small changes, and short of the effect of leaving out an example
    that the others cannot stand in for, by its leverage.

    Reference: Cook, Weisberg, Residuals and influence in regression, 1982; Koh, Liang, Understanding
    black-box predictions via influence functions, 2017.

    >>> import bilevel as bl, optax
    >>> problem = bl.Problem(init=lambda meta, key: jnp.float32(0.0),
    ...                      inner_loss=lambda params, meta, x, key: jnp.mean((params - x) ** 2),
    ...                      outer_loss=lambda params, meta, x, key: jnp.mean((params - x) ** 2))
    >>> solver = bl.inner.Gradient(optax.sgd(0.5), num_steps=1)
    >>> task = Task(support=jnp.array([0.0, 1.0, 2.0, 9.0]), query=jnp.array([1.0]))
    >>> found = influence(problem, solver, None, task, jax.random.key(0))  # the mean is 3, and should be 1
    >>> print(found.scores, found.most_harmful[0])
    [-3. -2. -1.  6.] 3
    """
    estimator = estimator or Implicit(cg(100))
    count = _num_rows(task.support)
    task = jax.tree.map(jnp.asarray, task)
    _require_mean(problem, meta, task.support, key)
    weighted = weighted_rows(problem, meta)
    run = jax.jit(lambda task, key: hypergradient(weighted, solver, estimator, jnp.ones(count), task, key))
    h = jax.device_get(run(task, key))
    return Influence(np.asarray(h.grad), float(h.value), {name: float(v) for name, v in h.stats.items()})


def weighted_rows(problem: Problem, meta: Meta) -> Problem:
    """The same inner problem with a weight for each support row, which is its only meta.

        inner_loss(φ, w) = (1/n) Σ wᵢ inner_loss(φ, θ, rowᵢ);   outer_loss(φ) as before

    Args:
        problem: its inner loss is a mean over rows.
        meta: θ of the problem, held fixed. The meta of the answer is w [n].

    Cost: that of the problem; memory a few times the rows, as their losses are kept apart.

    >>> problem = Problem(init=lambda meta, key: jnp.float32(1.0),
    ...                   inner_loss=lambda params, meta, x, key: jnp.mean(params * x),
    ...                   outer_loss=lambda params, meta, x, key: params)
    >>> weighted = weighted_rows(problem, None)
    >>> print(weighted.inner_loss(1.0, jnp.array([1.0, 3.0]), jnp.array([2.0, 4.0]), None))
    7.0
    """

    def inner_loss(params, weights, batch, key):
        return jnp.mean(weights * _row_losses(problem, params, meta, batch, key))

    def outer_loss(params, weights, batch, key):
        return problem.outer_loss(params, meta, batch, key)

    def metrics(params, weights, batch, key):
        assert problem.metrics is not None
        return problem.metrics(params, meta, batch, key)

    return Problem(
        init=lambda weights, key: problem.init(meta, key),
        inner_loss=inner_loss,
        outer_loss=outer_loss,
        metrics=None if problem.metrics is None else metrics,
    )


def precision_at(scores: Any, wrong: Any, counts: tuple[int, ...]) -> dict[int, float]:
    """The share of wrong examples among the most harmful ones.

    Args:
        scores: [n], larger is more harmful.
        wrong: bool [n].
        counts: how many of the most harmful.

    >>> precision_at([0.3, -0.1, 0.2], [True, False, False], (1, 2))
    {1: 1.0, 2: 0.5}
    """
    order = np.argsort(-np.asarray(scores), kind="stable")
    found = np.asarray(wrong)[order]
    return {count: float(found[:count].mean()) for count in counts}


def _row_losses(problem: Problem, params: Any, meta: Meta, batch: Batch, key: Key) -> jax.Array:
    """The inner loss of each row alone, [n]."""

    def alone(row):
        return problem.inner_loss(params, meta, jax.tree.map(lambda leaf: leaf[None], row), key)

    return jax.vmap(alone)(batch)


def _require_mean(problem: Problem, meta: Meta, support: Batch, key: Key) -> None:
    """Refuse an inner loss that is no mean over rows, which it then is at no parameters to speak of."""
    params = problem.init(meta, key)
    whole = float(problem.inner_loss(params, meta, support, key))
    mean = float(jnp.mean(_row_losses(problem, params, meta, support, key)))
    if abs(whole - mean) > 1e-3 * max(abs(whole), abs(mean)):
        raise ValueError(
            f"influence needs an inner_loss that is a mean over the rows of its batch, got {whole:.6g} for "
            f"the whole support and {mean:.6g} for the mean over its rows; divide a sum by the number of rows"
        )


def _num_rows(support: Batch) -> int:
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(support)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            "influence weighs the rows of task.support, whose leaves must share their leading axis; got "
            f"leading sizes {sorted(sizes)}. Give every leaf one row per example"
        )
    return sizes.pop()[0]
