"""The inner problem solved by a fixed number of steps of an optax optimizer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name

from bilevel.inner.checkpointing import GRADIENT, Checkpointing, as_policy
from bilevel.inner.differentiable import differentiable
from bilevel.inner.hoisting import hoisted
from bilevel.linalg import reverse_gradient
from bilevel.problem import InnerState, IterativeSolver, Key, Meta, Params, Problem, Scalar, Solution, Task

_WRITTEN_OUT = 5  # inner steps; each of them is compiled apart, so not many


class GradientState(NamedTuple):
    """Where the inner loop is."""

    params: Params
    opt_state: optax.OptState
    step: jax.Array  # int32, counts from 0


@dataclass(frozen=True)
class Gradient:
    """`num_steps` steps of any optax optimizer on `inner_loss`, from `init(meta)`.

        φ₀ = init(θ),   φₖ₊₁ = φₖ + update(∇φ inner_loss(φₖ, θ, support), θ),   k < K

    Args:
        optimizer: an `optax.GradientTransformation`, or a function of `meta` that returns one, so that
            rates, momenta and schedules can be learned.
        num_steps: K, at least 0.
        hoist: compute what of the inner loss neither φ nor the step's key reaches once, before the first
            step, and keep it: worth it where the steps adapt a part of a network that comes late in it.

    Raises:
        TypeError: when `optimizer` is neither, or `num_steps` is not a whole number.
        ValueError: when `num_steps` is negative.

    The step's value is what optax computes; its derivative is finite where a gradient is exactly zero
    (see `inner.differentiable`). Step k draws its randomness from `fold_in(key, k)`.

    >>> import bilevel as bl
    >>> solver = Gradient(lambda meta: optax.sgd(meta["rate"]), num_steps=2)
    >>> problem = bl.Problem(init=lambda meta, key: jnp.float32(8.0),
    ...                      inner_loss=lambda params, meta, batch, key: 0.5 * params**2,
    ...                      outer_loss=lambda params, meta, batch, key: params)
    >>> print(solver.solve(problem, {"rate": 0.5}, bl.Task(None, None), jax.random.key(0)).params)
    2.0
    """

    optimizer: optax.GradientTransformation | Callable[[Meta], optax.GradientTransformation]
    num_steps: int
    hoist: bool = False

    def __post_init__(self):
        if not (isinstance(self.optimizer, optax.GradientTransformation) or callable(self.optimizer)):
            raise TypeError(
                "Gradient.optimizer must be an optax optimizer or a function of meta that returns one, "
                f"got {type(self.optimizer).__name__}"
            )
        if isinstance(self.num_steps, bool) or not isinstance(self.num_steps, int):
            raise TypeError(f"Gradient.num_steps must be an int, got {self.num_steps!r}")
        if self.num_steps < 0:
            raise ValueError(f"Gradient.num_steps must be at least 0, got {self.num_steps}")

    def init(self, problem: Problem, meta: Meta, task: Task, key: Key) -> GradientState:
        """φ₀ and the optimizer's first state."""
        params = problem.init(meta, key)
        return GradientState(params, self._optimizer(meta).init(params), jnp.int32(0))

    def step(
        self,
        problem: Problem,
        meta: Meta,
        task: Task,
        state: GradientState,
        key: Key,
        gradient: Callable = reverse_gradient,
    ) -> tuple[GradientState, Scalar]:
        """One step: the next state, and the inner loss where it began."""
        step_key = jax.random.fold_in(key, state.step)
        loss, grads = gradient(problem.inner_loss)(state.params, meta, task.support, step_key)
        grads = jax.tree.map(lambda leaf: checkpoint_name(leaf, GRADIENT), grads)
        update = differentiable(self._optimizer(meta).update)
        try:
            updates, opt_state = update(grads, state.opt_state, state.params)
        except TypeError as error:
            if "keyword-only argument" not in str(error):
                raise
            raise TypeError(
                f"this optimizer cannot drive an inner loop, because its update needs more than the "
                f"gradient ({error}); use one that needs only gradient, state and parameters"
            ) from error
        params = optax.apply_updates(state.params, updates)
        return GradientState(params, opt_state, state.step + 1), loss

    def solve(self, problem: Problem, meta: Meta, task: Task, key: Key) -> Solution:
        """Run all steps. `Solution.stats["inner_loss"]` is the loss where the last step began."""
        state, losses = unroll(problem, self, meta, task, key)
        return Solution(state.params, {"inner_loss": losses[-1]} if self.num_steps else {})

    def _optimizer(self, meta: Meta) -> optax.GradientTransformation:
        if isinstance(self.optimizer, optax.GradientTransformation):
            return self.optimizer
        optimizer = self.optimizer(meta)
        if not isinstance(optimizer, optax.GradientTransformation):
            raise TypeError(
                f"Gradient.optimizer(meta) must return an optax optimizer, got {type(optimizer).__name__}"
            )
        return optimizer


def unroll(
    problem: Problem,
    solver: IterativeSolver,
    meta: Meta,
    task: Task,
    key: Key,
    *,
    gradient: Callable = reverse_gradient,
    checkpoint: int | Checkpointing | None = None,
    each: Callable[[Params], Any] | None = None,
) -> tuple[InnerState, Any]:
    """Run every step of an iterative solver: the last state, and the inner losses `[num_steps]`.

    Args:
        gradient: how the inner gradient is differentiated (see `linalg`).
        checkpoint: what is kept for the backward pass: None keeps everything, an int n is `Every(n)`,
            and `inner.checkpointing` has more policies.
        each: when given, its value at the parameters after each step is returned instead of the losses.
    """
    init_key, step_key = jax.random.split(key)
    state = solver.init(problem, meta, task, init_key)
    return run_steps(
        problem,
        solver,
        meta,
        task,
        state,
        step_key,
        solver.num_steps,
        gradient=gradient,
        checkpoint=checkpoint,
        each=each,
    )


def run_steps(
    problem: Problem,
    solver: IterativeSolver,
    meta: Meta,
    task: Task,
    state: InnerState,
    step_key: Key,
    num_steps: int,
    *,
    gradient: Callable = reverse_gradient,
    checkpoint: int | Checkpointing | None = None,
    each: Callable[[Params], Any] | None = None,
) -> tuple[InnerState, Any]:
    """As `unroll`, for `num_steps` steps from `state`: a part of the loop.

    Args:
        step_key: the second half of `jax.random.split(key)` for the key that `unroll` takes.
    """

    if num_steps > 1 and getattr(solver, "hoist", False):
        problem, task = hoisted(problem, meta, task, state.params, step_key)

    def body(state, _):
        state, loss = solver.step(problem, meta, task, state, step_key, gradient)
        return state, loss if each is None else each(state.params)

    def run(state, n):
        # One step needs no loop; without it the compiler shares work with what surrounds it.
        if n == 1:
            state, out = body(state, None)
            return state, jax.tree.map(lambda leaf: leaf[None], out)
        # A short loop is written out: the compiler then works across its steps.
        return jax.lax.scan(body, state, length=n, unroll=n <= _WRITTEN_OUT)

    policy = as_policy(checkpoint)
    return run(state, num_steps) if policy is None else policy.run(run, state, num_steps)
