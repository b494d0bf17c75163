"""The one-call door for people who bring their own outer loop."""

import jax
import jax.numpy as jnp

from bilevel.hypergrad.doubts import Doubter
from bilevel.problem import Estimator, Hypergradient, InnerSolver, Key, Learner, Meta, Problem, Task


def hypergradient(
    problem: Problem,
    solver: InnerSolver,
    estimator: Estimator,
    meta: Meta,
    task: Task,
    key: Key,
) -> Hypergradient:
    """The outer loss of one task and its gradient in `meta`.

        (F(θ), dF/dθ)   with   F(θ) = outer_loss(solve(inner_loss, θ, support), θ, query)

    Args:
        problem: what is learnt.
        solver: how the inner problem is solved.
        estimator: how the gradient is obtained; exchanging it never changes the problem.
        meta: θ, any tree of floats.
        task: one task; for a batch use `jax.vmap` over its leading axis, or `bl.meta_step`.
        key: all randomness of the call.

    Returns:
        A `Hypergradient`. Pure and traceable: put `jax.jit` around your own loop.

    Raises:
        ValueError, TypeError: when the three do not go together, or meta holds something other than floats.

    Warns:
        HypergradientWarning: when its own figures give an estimator reason to doubt its answer, under jit too

    Cost and bias: those of the estimator. An estimator with a state starts afresh at each call.

    >>> import bilevel as bl, jax, optax
    >>> problem = bl.Problem(init=lambda meta, key: meta["init"],
    ...                      inner_loss=lambda params, meta, batch, key: 0.5 * (params - batch) ** 2,
    ...                      outer_loss=lambda params, meta, batch, key: 0.5 * (params - batch) ** 2)
    >>> solver = bl.inner.Gradient(lambda meta: optax.sgd(meta["rate"]), num_steps=1)
    >>> h = hypergradient(problem, solver, bl.hypergrad.Mixed(), {"init": 4.0, "rate": 0.5},
    ...                   bl.Task(0.0, 1.0), jax.random.key(0))
    >>> print(h.value, h.grad["init"], h.grad["rate"])
    0.5 0.5 -4.0
    """
    Learner(problem, solver, estimator)  # refuses what does not go together
    nests = getattr(estimator, "nests", False)
    if not nests:  # an outer level that reaches in by meta, and one that reaches in by a closure
        meta = _final(meta, type(estimator).__name__)
    state = estimator.init(problem, solver, meta, task, key)
    h, _ = estimator.estimate(problem, solver, meta, task, state, key)
    Doubter(estimator).watch(h.stats)
    return h if nests else _final(h, type(estimator).__name__)


def _final(tree, name: str):
    """The same tree, which refuses to be differentiated: the estimator holds fixed what should move."""

    @jax.custom_jvp
    def identity(leaf):
        return leaf

    @identity.defjvp
    def _(primals, tangents):
        raise TypeError(
            f"a hypergradient by {name} cannot be differentiated again: it holds the inner solution fixed, "
            "and a part of the derivative would be missing. For a level above use bl.hypergrad.Mixed() or "
            "Unroll(), or differentiate the outer loss at estimator.solve(problem, solver, meta, task, key), "
            "which Implicit, OneStep, Forward and Truncated have"
        )

    def guard(leaf):
        return identity(leaf) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf

    return jax.tree.map(guard, tree)
