"""Multi-class support vector machine on features, solved exactly."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from optax.projections import projection_simplex

from bilevel.inner.simplex_qp import simplex_qp
from bilevel.inner.solution import solution_keys, solution_stats
from bilevel.problem import Batch, Key, Meta, Params, Problem, Scalar, Solution, Task

# A class that no example of the support has costs this much: it takes no part.
_ABSENT = 1e4


@dataclass(frozen=True)
class Svm:
    """Linear multi-class support vector machine (Crammer and Singer), differentiable in its features.

        g(W) = ½ |W|² + Σᵢ hinge_ε(Wᵀ xᵢ, yᵢ)
        hinge_ε(s, y) = max over b ≥ 0, Σb = C of  Σ_k b_k (1[k ≠ y] + s_k − s_y) − ½ ε |C 1_y − b|²

    With ε = 0 that is C max_k (1[k ≠ y] + s_k − s_y), the usual hinge; ε > 0 rounds its corners, so that g
    has a gradient everywhere. Its dual is a quadratic program over one simplex an example,

        min over B of ½ ⟨C Y − B, (X Xᵀ + ε I)(C Y − B)⟩ + ⟨B, Y⟩,    W = Xᵀ (C Y − B)

    which an interior-point method solves. MetaOptNet adds the same ε = 1 to keep its program well posed.

    Args:
        features: `features(meta, x) -> [n, d]`.
        num_classes: how many; labels are whole numbers below it. Examples of label −1 count nowhere, and a
            class without an example has no part in the problem.
        slack: C, the weight of an example.
        smoothing: ε.

    Raises:
        TypeError: when `features` cannot be called.
        ValueError: when the number of classes is below 2, or a figure is not positive.

    Stats: `inner_loss`, `inner_residual` of the problem's inner loss, and `duality_gap`, 0 if exact. State
    the inner loss as `svm.loss`, and every other solver and estimator works on the same problem.

    Cost: some 15 Newton steps of (classes + 1) n³ / 3 each, and one such solve for a derivative of any kind.
    Exact with `bl.hypergrad.Unroll()`, `Mixed()`, `Forward()`: to about 1e-9 in float64, 1e-4 in float32.

    Reference: Crammer, Singer, On the algorithmic implementation of multiclass kernel-based vector machines,
    2001; Lee, Maji, Ravichandran, Soatto, Meta-learning with differentiable convex optimization, 2019.

    >>> import bilevel as bl
    >>> svm = Svm(lambda meta, x: meta * x, num_classes=2, slack=10.0)
    >>> problem = bl.Problem(lambda meta, key: jnp.zeros((1, 2)), svm.loss, lambda *args: 0.0)
    >>> task = bl.Task((jnp.array([[1.0], [-1.0]]), jnp.array([0, 1])), None)
    >>> found = jax.jit(lambda meta: svm.solve(problem, meta, task, jax.random.key(0)))(1.0)
    >>> print(jnp.round(found.params, 3), found.stats["inner_residual"] < 1e-3)
    [[ 0.333 -0.333]] True
    """

    features: Callable[[Meta, Any], jax.Array]
    num_classes: int
    slack: float = 0.1
    smoothing: float = 1.0
    closed_form: ClassVar[bool] = True

    def __post_init__(self):
        if not callable(self.features):
            raise TypeError(f"Svm.features must be a function, got {type(self.features).__name__}")
        if (
            isinstance(self.num_classes, bool)
            or not isinstance(self.num_classes, int)
            or self.num_classes < 2
        ):
            raise ValueError(
                f"Svm.num_classes must be a whole number of at least 2, got {self.num_classes!r}"
            )
        for name in ("slack", "smoothing"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"Svm.{name} must be a positive number, got {value!r}")

    def solve(self, problem: Problem, meta: Meta, task: Task, key: Key) -> Solution:
        """The exact weights, `[d, num_classes]`."""
        x, codes, cost = self._read(meta, task.support)
        n, c = len(x), self.slack
        kernel = x @ x.T + self.smoothing * jnp.eye(n, dtype=x.dtype)
        # In units of C, so that every row of the dual lies in the unit simplex.
        dual, multipliers = simplex_qp(c * kernel, codes + cost - c * kernel @ codes)
        params = c * x.T @ (codes - dual)
        _, loss_key = solution_keys(key)
        stats = solution_stats(problem, params, meta, task, loss_key)
        return Solution(
            params, {**stats, "duality_gap": c * jax.lax.stop_gradient(jnp.sum(dual * multipliers))}
        )

    def loss(self, params: Params, meta: Meta, batch: Batch, key: Key) -> Scalar:
        """g, to be the `inner_loss` of a problem."""
        x, codes, cost = self._read(meta, batch)
        c, e = self.slack, self.smoothing
        scores = x @ params
        gains = 1 - codes - cost + scores - jnp.sum(codes * scores, 1, keepdims=True)  # of b_k, [n, classes]
        b = jax.vmap(projection_simplex, (0, None))(c * codes + gains / e, c)
        hinge = jnp.sum(b * gains, 1) - 0.5 * e * jnp.sum((c * codes - b) ** 2, 1)
        return 0.5 * jnp.sum(params**2) + jnp.sum(codes.sum(1) * hinge)

    def _read(self, meta: Meta, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """X `[n, d]` with padding as rows of zeros, Y `[n, classes]`, and what a class costs, `[classes]`."""
        inputs, labels = batch
        x = jnp.asarray(self.features(meta, inputs))
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if x.ndim != 2 or jnp.shape(labels) != x.shape[:1]:
            raise ValueError(
                "Svm needs features [n, d] and labels [n] with the same n, got shapes "
                f"{x.shape} and {jnp.shape(labels)}"
            )
        codes = jax.nn.one_hot(labels, self.num_classes, dtype=x.dtype)
        return x * codes.sum(1, keepdims=True), codes, _ABSENT * (codes.sum(0) == 0)
