"""Why a leaf of meta gets a hypergradient of exactly zero."""

from dataclasses import replace
from typing import Any

import jax

from bilevel.analysis.objective import is_formula, params_like
from bilevel.dependence import unused_leaves
from bilevel.problem import InnerSolver, IterativeSolver, Key, Meta, Problem, Task


def routes(
    problem: Problem, solver: InnerSolver, meta: Meta, task: Task, key: Key
) -> dict[str, frozenset[str]]:
    """By which ways each leaf of meta can reach the outer loss, read from the traces.

    Returns:
        For each leaf's path some of "outer_loss" (read directly), "init", "inner_loss" and "inner solver"
        (rates and the like).

    >>> import bilevel as bl, optax
    >>> problem = bl.Problem(init=lambda meta, key: meta["init"],
    ...                      inner_loss=lambda params, meta, batch, key: params**2,
    ...                      outer_loss=lambda params, meta, batch, key: params)
    >>> solver = bl.inner.Gradient(lambda meta: optax.sgd(meta["rate"]), num_steps=1)
    >>> found = routes(problem, solver, {"init": 1.0, "rate": 0.1}, bl.Task(None, None), jax.random.key(0))
    >>> sorted(found["['init']"]), sorted(found["['rate']"])
    (['init'], ['inner solver'])
    """
    params = params_like(problem, solver, meta, task, key)
    formula = is_formula(solver)  # it reads meta itself
    # The solver on its own: the problem's functions see a copy of meta that is not traced.
    alone: Any = replace(
        problem,
        init=lambda _, key: problem.init(meta, key),
        inner_loss=lambda params, _, batch, key: problem.inner_loss(params, meta, batch, key),
    )
    functions = {
        "outer_loss": lambda m, p: problem.outer_loss(p, m, task.query, key),
        "inner solver": lambda m, p: solver.solve(problem if formula else alone, m, task, key).params,
    }
    if not formula:
        functions |= {
            "init": lambda m, p: problem.init(m, key),
            "inner_loss": lambda m, p: problem.inner_loss(p, m, task.support, key),
        }
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(meta)]
    found: dict[str, set[str]] = {path: set() for path in paths}
    for name, function in functions.items():
        unused = set(unused_leaves(function, meta, params))
        for path in paths:
            if path not in unused:
                found[path].add(name)
    if not (formula or isinstance(solver, IterativeSolver)):
        # A loop that runs to convergence hides what it reads: believe what the problem itself reads.
        for names in found.values():
            if len(names) > 1:
                names.discard("inner solver")
    return {path: frozenset(names) for path, names in found.items()}


def why_zero(estimator: str, ways: frozenset[str], slope_is_zero: bool | None) -> str:
    """One sentence on a leaf whose hypergradient is exactly zero.

    Args:
        estimator: its name.
        ways: what `routes` found for the leaf.
        slope_is_zero: whether finite differences find no slope either; None where they did not look.

    >>> why_zero("FirstOrder", frozenset(), True)
    'nothing reads it: its true derivative is zero'
    """
    if not ways:
        return "nothing reads it: its true derivative is zero"
    if slope_is_zero:
        return (
            f"its true derivative is zero here too, though {_list(ways)} reads it: a dead unit, a "
            "saturated function, an operation without a derivative, or an inner loop that has converged and "
            "forgets its start and its rates"
        )
    if slope_is_zero is None:
        return f"{_list(ways)} reads it; whether its true derivative is zero could not be measured"
    if ways <= {"inner_loss", "inner solver"}:
        return (
            f"it reaches the outer loss only through the inner loop (read by {_list(ways)}), whose "
            f"derivative {estimator} drops; its true derivative is not zero. Use bl.hypergrad.Mixed() or "
            "Unroll()"
        )
    if ways == {"init"}:
        return (
            f"it reaches the outer loss only through where the inner loop starts, which {estimator} takes to "
            "be forgotten; its true derivative is not zero. Use bl.hypergrad.Mixed() or Unroll(), or tie the "
            "solution to the start with a proximal term"
        )
    return (
        f"{estimator} drops every way it reaches the outer loss by ({_list(ways)}); its true derivative is "
        "not zero. Use bl.hypergrad.Mixed() or Unroll()"
    )


def _list(ways: frozenset[str]) -> str:
    return " and ".join(sorted(ways))
