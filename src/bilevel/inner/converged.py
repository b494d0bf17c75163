"""The inner problem solved until it is solved, by a minimizer of optimistix."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.inner.solution import solution_keys, solution_stats
from bilevel.problem import Key, Meta, Problem, Solution, Task


@dataclass(frozen=True)
class Converged:
    """Minimize `inner_loss` to a tolerance, with any minimizer or root finder of optimistix.

        φ* = argmin over φ of inner_loss(φ, θ, support)      from φ₀ = init(θ)

    Args:
        minimizer: `optimistix.BFGS(rtol, atol)`, `LBFGS`, `NonlinearCG`, ...; or a root finder such as
            `optimistix.Newton(rtol, atol)`, which is given the gradient of the inner loss.
        max_steps: where it stops if it has not converged. That is never an error: it is told in stats.

    Raises:
        TypeError: when `minimizer` is none of optimistix.
        ValueError: when `max_steps` is no positive whole number.

    Stats: `inner_loss` and `inner_residual` = |∇φ inner_loss| at the solution, `num_steps` taken,
    `converged` (1.0, or 0.0 when it stopped for another reason or is not finite).

    Cost: as many inner gradients as it takes. It has no steps to differentiate: use it with
    `bl.hypergrad.Implicit(...)` or `OneStep(...)`. The inner loss keeps one key throughout. Needs optimistix.

    Reference: Rader, Lyons, Kidger, Optimistix, 2024.

    >>> import bilevel as bl, optimistix
    >>> problem = bl.Problem(init=lambda meta, key: jnp.zeros(2),
    ...                      inner_loss=lambda params, meta, batch, key: jnp.sum((params - meta) ** 2),
    ...                      outer_loss=lambda params, meta, batch, key: jnp.sum(params))
    >>> solver = Converged(optimistix.BFGS(rtol=1e-6, atol=1e-6))
    >>> found = solver.solve(problem, jnp.array([1.0, 2.0]), bl.Task(None, None), jax.random.key(0))
    >>> print(jnp.round(found.params, 3), found.stats["converged"])
    [1. 2.] 1.0
    """

    minimizer: Any
    max_steps: int = 1000

    def __post_init__(self):
        import optimistix  # here and not above: `import bilevel` stays light

        if not isinstance(self.minimizer, optimistix.AbstractMinimiser | optimistix.AbstractRootFinder):
            raise TypeError(
                "Converged.minimizer must be a minimizer or a root finder of optimistix, such as "
                f"optimistix.BFGS(rtol=1e-6, atol=1e-6), got {self.minimizer!r}"
            )
        if isinstance(self.max_steps, bool) or not isinstance(self.max_steps, int) or self.max_steps < 1:
            raise ValueError(
                f"Converged.max_steps must be a whole number of at least 1, got {self.max_steps!r}"
            )

    def solve(self, problem: Problem, meta: Meta, task: Task, key: Key) -> Solution:
        """Run it to its tolerance, or to `max_steps`."""
        import optimistix

        init_key, loss_key = solution_keys(key)
        start = jax.tree.map(jnp.asarray, problem.init(meta, init_key))

        def loss(params, args):
            meta, support = args
            return problem.inner_loss(params, meta, support, loss_key)

        args = (meta, task.support)
        if isinstance(self.minimizer, optimistix.AbstractMinimiser):
            run, function = optimistix.minimise, loss
        else:
            run, function = optimistix.root_find, jax.grad(loss)
        found = run(function, self.minimizer, start, args, max_steps=self.max_steps, throw=False)
        stats = solution_stats(problem, found.value, meta, task, loss_key)
        done = (found.result == optimistix.RESULTS.successful) & jnp.isfinite(stats["inner_residual"])
        more = {"num_steps": found.stats["num_steps"].astype(float), "converged": done.astype(float)}
        return Solution(found.value, {**stats, **more})
