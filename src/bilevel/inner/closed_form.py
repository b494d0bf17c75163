"""Inner problems whose solution is a formula."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax

from bilevel.inner.solution import solution_keys, solution_stats
from bilevel.problem import Batch, Key, Meta, Params, Problem, Solution, Task


@dataclass(frozen=True)
class ClosedForm:
    """The inner solution is a formula: nothing is iterated, and plain reverse mode is exact.

        φ*(θ) = function(θ, support, key)

    Args:
        function: `function(meta, support, key) -> params`, differentiable in `meta`.

    Raises:
        TypeError: when it cannot be called.

    Stats: `inner_loss` and `inner_residual` of `Problem.inner_loss` at the solution. A residual that is not
    about zero says that the formula does not minimize the inner loss that the problem states.

    Cost: that of the function and, for the stats, of one inner gradient. Exact with `bl.hypergrad.Unroll()`,
    `Mixed()`, `Forward()`.

    >>> import bilevel as bl
    >>> problem = bl.Problem(init=lambda meta, key: 0.0,
    ...                      inner_loss=lambda params, meta, batch, key: (params - meta * batch) ** 2,
    ...                      outer_loss=lambda params, meta, batch, key: params**2)
    >>> solver = ClosedForm(lambda meta, support, key: meta * support)
    >>> print(solver.solve(problem, 2.0, bl.Task(3.0, None), jax.random.key(0)).params)
    6.0
    """

    function: Callable[[Meta, Batch, Key], Params]
    closed_form: ClassVar[bool] = True

    def __post_init__(self):
        if not callable(self.function):
            raise TypeError(
                "ClosedForm.function must be a function (meta, support, key) -> params, "
                f"got {type(self.function).__name__}"
            )

    def solve(self, problem: Problem, meta: Meta, task: Task, key: Key) -> Solution:
        """Evaluate the formula."""
        _, loss_key = solution_keys(key)
        params = self.function(meta, task.support, loss_key)
        return Solution(params, solution_stats(problem, params, meta, task, loss_key))


def prototypes(embed: Callable[[Meta, jax.Array], jax.Array], num_classes: int) -> ClosedForm:
    """The mean embedding of each class, as in prototypical networks.

        φ_c = (1 / n_c) Σ_{i: y_i = c} embed(θ, x_i)     the minimum of  Σᵢ |embed(θ, x_i) − φ_{y_i}|²

    Args:
        embed: `embed(meta, x) -> [n, d]`.
        num_classes: how many; labels are whole numbers below it. A class without an example has no
            prototype: its row is NaN, and `stats["finite"]` tells.

    Raises:
        ValueError: when `num_classes` is no positive whole number.

    Returns:
        A `ClosedForm` for a support of `(x, labels)`; params are `[num_classes, d]`.

    Reference: Snell, Swersky, Zemel, 2017.

    >>> import bilevel as bl, jax.numpy as jnp
    >>> problem = bl.Problem(lambda meta, key: jnp.zeros((2, 1)),
    ...                      lambda params, meta, batch, key: jnp.sum((batch[0] - params[batch[1]]) ** 2),
    ...                      lambda params, meta, batch, key: jnp.sum(params))
    >>> task = bl.Task((jnp.array([[1.0], [3.0], [5.0]]), jnp.array([0, 0, 1])), None)
    >>> found = prototypes(lambda meta, x: x, 2).solve(problem, None, task, jax.random.key(0))
    >>> print(found.params.ravel(), found.stats["inner_residual"])
    [2. 5.] 0.0
    """
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"prototypes: num_classes must be a whole number of at least 1, got {num_classes!r}")

    def means(meta, support, key):
        x, labels = support
        embedded = embed(meta, x)
        members = jax.nn.one_hot(labels, num_classes, axis=0, dtype=embedded.dtype)  # [num_classes, n]
        return members @ embedded / members.sum(1, keepdims=True)

    return ClosedForm(means)
