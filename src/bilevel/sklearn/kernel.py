"""Kernel ridge regression as an inner problem, with scikit-learn's meaning of its parameters."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import hypergrad, inner
from bilevel.problem import Estimator, Learner, Problem, Task
from bilevel.sklearn.folds import Fold
from bilevel.sklearn.losses import squared_error


@dataclass(frozen=True)
class KernelRidgeModel:
    """`sklearn.kernel_ridge.KernelRidge(kernel="rbf")`, by its formula.

        K_ij = exp(−Σₖ γₖ (x_ik − x_jk)²),   φ* = W (W K W + α I)⁻¹ W y,  W = diag(√w)

    judged by the mean squared error. γ is a scalar, or one for each feature (relevance determination).

    Cost: n² d + n³ / 3 a fold and twice that for its derivative. Exact.

    Reference: Williams, Rasmussen, Gaussian processes for machine learning, 2006, section 5.1.

    >>> KernelRidgeModel().names
    ('alpha', 'gamma')
    """

    names: ClassVar[tuple[str, ...]] = ("alpha", "gamma")
    per_feature: ClassVar[str | None] = "gamma"
    warm: ClassVar[bool] = False

    def learner(self, estimator: Estimator | None) -> Learner:
        """The bilevel problem; θ holds the logarithms. φ are the dual coefficients over W."""

        def system(meta, support):
            x, _, root = support
            return root[:, None] * kernel(meta["gamma"], x, x) * root + jnp.exp(meta["alpha"]) * jnp.eye(
                len(x)
            )

        def solve(meta, support, key):
            return jax.scipy.linalg.solve(system(meta, support), support[1], assume_a="pos")

        def inner_loss(params, meta, support, key):
            return jnp.sum(params * (0.5 * system(meta, support) @ params - support[1]))

        def outer_loss(params, meta, query, key):
            x, y, w, x_support, root = query
            return squared_error(kernel(meta["gamma"], x, x_support) @ (root[:, None] * params), y, w)

        problem = Problem(lambda meta, key: jnp.zeros(()), inner_loss, outer_loss)
        return Learner(problem, inner.ClosedForm(solve), estimator or hypergrad.Unroll())

    def task(self, fold: Fold, seed: int) -> Task:
        """A row of padding has root weight 0: its dual coefficient is 0."""
        (x, y, w), query, *_ = fold
        root = np.sqrt(w)
        mean = (w @ x) / w.sum()  # distances do not change, their rounding errors do
        return Task((x - mean, root[:, None] * y, root), (query.x - mean, query.y, query.w, x - mean, root))


def kernel(log_gamma: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """`[n, d]` and `[m, d]` to `[n, m]`.

    >>> print(np.asarray(kernel(jnp.float32(0), jnp.array([[0.0]]), jnp.array([[0.0], [1.0]]))).round(2))
    [[1.   0.37]]
    """
    root = jnp.exp(0.5 * log_gamma)
    a, b = a * root, b * root
    distances = jnp.sum(a**2, 1)[:, None] + jnp.sum(b**2, 1) - 2 * a @ b.T
    return jnp.exp(-jnp.maximum(distances, 0))
