"""The one table of estimators that `bl.advise` tries."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import hypergrad
from bilevel.analysis.objective import params_like
from bilevel.hypergrad.common import split_keys
from bilevel.hypergrad.residuals import norm
from bilevel.inner.checkpointing import Sqrt
from bilevel.problem import Estimator, InnerSolver, IterativeSolver, Key, Meta, Problem, Task

# Forward mode takes one tangent for each element of meta.
_FORWARD_AT_MOST = 64


def candidates(
    problem: Problem, solver: InnerSolver, meta: Meta, task: Task, key: Key
) -> dict[str, Estimator]:
    """Every estimator that takes this problem and solver, with settings that suit them.

    Step sizes follow the curvature of the inner loss at its solution, which is measured.

    Returns:
        By name; an estimator whose `check` refuses the pair is left out.

    >>> import bilevel as bl
    >>> learner = bl.maml(bl.nets.mlp([1, 8, 1]), bl.learners.mean_squared_error, num_steps=8)
    >>> meta, task = learner.init_meta(jax.random.key(0)), bl.tasks.sinusoid(jax.random.key(1))
    >>> "Mixed" in candidates(learner.problem, learner.solver, meta, task, jax.random.key(2))
    True
    """
    found: dict[str, Estimator] = {}
    for name, make in _table(problem, solver, meta, task, key):
        try:
            estimator = make()
            estimator.check(problem, solver)
        except (TypeError, ValueError):  # not for this pair
            continue
        found[name] = estimator
    return found


def _table(problem, solver, meta, task, key) -> Iterator[tuple[str, Callable[[], Any]]]:
    h: Any = hypergrad
    steps = solver.num_steps if isinstance(solver, IterativeSolver) else 0
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(meta))
    params = params_like(problem, solver, meta, task, key)
    rank = min(10, sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)))
    curvature: list[float] = []

    def step_size() -> float:
        if not curvature:
            curvature.append(largest_curvature(problem, solver, meta, task, key))
        if not 0 < curvature[0] < np.inf:
            raise ValueError("the inner loss has no curvature to take a step size from")
        return 1.0 / curvature[0]

    yield "Mixed", lambda: h.Mixed()
    yield "Unroll", lambda: h.Unroll()
    if steps > 3:
        yield "Mixed, √K checkpoints", lambda: h.Mixed(Sqrt())
        yield "Truncated to K/4", lambda: h.Truncated(max(1, steps // 4))
    if size <= _FORWARD_AT_MOST:
        yield "Forward", lambda: h.Forward()
    yield "Implicit, CG 10", lambda: h.Implicit(h.cg(10))
    yield "Implicit, Neumann 10", lambda: h.Implicit(h.neumann(10, step_size()))
    yield f"Implicit, Nyström {rank}", lambda: h.Implicit(h.nystrom(rank, 0.01 / step_size()))
    yield "OneStep", lambda: h.OneStep(step_size())
    yield "FiniteDifference", lambda: h.FiniteDifference(step_size())
    yield "Sama", lambda: h.Sama()
    yield "Penalty 100", lambda: h.Penalty(100.0)
    yield "EvolutionStrategies", lambda: h.EvolutionStrategies(0.01, 16)
    yield "FirstOrder", lambda: h.FirstOrder()


def largest_curvature(
    problem: Problem, solver: InnerSolver, meta: Meta, task: Task, key: Key, num_iterations: int = 20
) -> float:
    """About the largest eigenvalue of the inner Hessian at the inner solution, by power iteration.

        v ← H v / ‖H v‖,   L ≈ ‖H v‖

    >>> import bilevel as bl, optax
    >>> problem = bl.Problem(init=lambda meta, key: jnp.zeros(2),
    ...                      inner_loss=lambda params, meta, batch, key: params[0]**2 + 4 * params[1]**2,
    ...                      outer_loss=lambda params, meta, batch, key: params.sum())
    >>> solver = bl.inner.Gradient(optax.sgd(0.1), num_steps=1)
    >>> round(largest_curvature(problem, solver, 0.0, bl.Task(None, None), jax.random.key(0)), 3)
    8.0
    """
    inner_key = split_keys(key)[0]

    @jax.jit
    def run(meta, task):
        params = solver.solve(problem, meta, task, inner_key).params

        def gradient(params):
            return jax.grad(problem.inner_loss)(params, meta, task.support, inner_key)

        def body(_, carry):
            vector, _ = carry
            product = jax.jvp(gradient, (params,), (vector,))[1]
            size = norm(product).astype(float)
            unit = jax.tree.map(lambda leaf: (leaf / jnp.maximum(size, 1e-30)).astype(leaf.dtype), product)
            return unit, size

        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        start = [
            jax.random.normal(k, jnp.shape(leaf), jnp.result_type(leaf)) for k, leaf in zip(keys, leaves)
        ]
        return jax.lax.fori_loop(
            0, num_iterations, body, (jax.tree.unflatten(tree, start), jnp.zeros((), float))
        )[1]

    return float(run(meta, task))
