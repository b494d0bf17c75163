"""Exact hypergradient with forward-over-reverse inner gradients: less memory and time."""

from dataclasses import dataclass
from typing import ClassVar

from bilevel.hypergrad.iterations.unroll import Unroll
from bilevel.hypergrad.requirements import require_checkpoint
from bilevel.inner.checkpointing import Checkpointing
from bilevel.linalg import mixed_gradient


@dataclass(frozen=True)
class Mixed:
    """Exact hypergradient; the inner gradient is differentiated forward over reverse (mixed mode).

        (∂φ, ∂θ) ⟨v, ∇φ g⟩ = ∂ε ∇₍φ,θ₎ g(φ + ε v, θ)

    The same numbers as `Unroll`. No activation of the inner backward pass is kept, only φₖ.

    Args:
        checkpoint: as in `Unroll`. With an adaptive optimizer `bl.inner.Every(keep_gradients=True)` keeps
            the inner gradients and recomputes only the optimizer's arithmetic.

    Raises:
        TypeError: when the solver has neither steps nor a closed form, or the inner loss holds a
            `jax.custom_vjp`, whose rule need not be a true derivative (use `Unroll`).
        ValueError: when `checkpoint` is neither a positive whole number nor a policy.

    Cost: about 4 inner gradients a step in time; memory O(K dim φ + activations of one inner gradient).
    Independent of dim θ. Unbiased: exact for the K steps run.

    Reference: Kemaev et al., MixFlow-MG, 2025.

    >>> import bilevel as bl, jax, optax
    >>> problem = bl.Problem(init=lambda meta, key: meta,
    ...                      inner_loss=lambda params, meta, batch, key: 0.5 * params**2,
    ...                      outer_loss=lambda params, meta, batch, key: params)
    >>> solver = bl.inner.Gradient(optax.sgd(0.5), num_steps=3)
    >>> task, key = bl.Task(None, None), jax.random.key(0)
    >>> print(bl.hypergradient(problem, solver, Mixed(), 8.0, task, key).grad)
    0.125
    """

    checkpoint: int | Checkpointing | None = None
    gradient: ClassVar = staticmethod(mixed_gradient)
    nests: ClassVar[bool] = True  # the estimate itself can be differentiated

    def __post_init__(self):
        require_checkpoint(self, self.checkpoint)

    # Only the derivative of the inner gradient differs from Unroll.
    check = Unroll.check
    init = Unroll.init
    solve = Unroll.solve
    estimate = Unroll.estimate
