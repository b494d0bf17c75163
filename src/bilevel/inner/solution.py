"""What solvers without steps share: which randomness they use, and what they say of their solution."""

import jax
import optax

from bilevel.linalg import reverse_gradient
from bilevel.problem import Key, Meta, Params, Problem, Scalar, Task


def solution_keys(key: Key) -> tuple[Key, Key]:
    """The key of `init` and the key of the inner loss, those of step 0 of a solver with steps.

    A solution belongs to one function, so the inner loss keeps one key throughout.
    """
    init_key, step_key = jax.random.split(key)
    return init_key, jax.random.fold_in(step_key, 0)


def solution_stats(
    problem: Problem, params: Params, meta: Meta, task: Task, loss_key: Key
) -> dict[str, Scalar]:
    """`inner_loss` at the solution, and `inner_residual`, the 2-norm of its gradient there: 0 if exact."""
    params, meta, task = jax.lax.stop_gradient((params, meta, task))
    loss, gradient = reverse_gradient(problem.inner_loss)(params, meta, task.support, loss_key)
    return jax.lax.stop_gradient({"inner_loss": loss, "inner_residual": optax.tree.norm(gradient)})
