"""Ridge regression on features, solved exactly."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import jax.scipy as jsp

from bilevel.inner.solution import solution_keys, solution_stats
from bilevel.problem import Batch, Key, Meta, Params, Problem, Scalar, Solution, Task


@dataclass(frozen=True)
class Ridge:
    """Linear regression on features with a penalty, solved exactly and differentiable in both.

        g(φ) = |X φ − y|² / 2n + ½ Σⱼ ρⱼ |φⱼ|²,     φ* = (XᵀX / n + diag ρ)⁻¹ Xᵀ y / n
                                                       = D Xᵀ (X D Xᵀ + n I)⁻¹ y,  D = diag(1 / ρ)

    with X = features(θ, x), ρ = penalty(θ). The second form is used when n < d.

    Args:
        features: `features(meta, x) -> [n, d]`.
        penalty: `penalty(meta) -> ρ`, a scalar or `[d]`, positive. Where others write |Xφ − y|² + λ|φ|²,
            ρ = λ / n.
        targets: `targets(labels) -> [n]` or `[n, c]`, for instance a one-hot code; the support's second
            part as it is when left out. φ is `[d]` or `[d, c]`.

    Raises:
        TypeError: when one of them cannot be called.
        ValueError: when the penalty is neither a scalar nor one for each feature, or the rows disagree.

    Stats: `inner_loss`, `inner_residual` of the problem's inner loss. State it as `ridge.loss`, and every
    other solver and estimator works on the same problem. A penalty that is not positive gives NaN where there
    are fewer rows than features, or no minimum. Features of less than float32 are widened to it.

    Cost: n d min(n, d) + min(n, d)³ / 3. Exact with `bl.hypergrad.Unroll()`, `Mixed()`, `Forward()`.

    Reference: Bertinetto et al., R2-D2, 2019, which is
    `Ridge(embed, lambda meta: jnp.exp(meta["log_penalty"]), lambda labels: jax.nn.one_hot(labels, 5))`.

    >>> import bilevel as bl
    >>> ridge = Ridge(lambda meta, x: x, lambda meta: meta)
    >>> problem = bl.Problem(lambda meta, key: jnp.zeros(1), ridge.loss, lambda *args: 0.0)
    >>> task = bl.Task((jnp.array([[1.0], [1.0]]), jnp.array([1.0, 3.0])), None)
    >>> print(jnp.round(ridge.solve(problem, 1.0, task, jax.random.key(0)).params, 4))
    [1.]
    """

    features: Callable[[Meta, Any], jax.Array]
    penalty: Callable[[Meta], jax.Array]
    targets: Callable[[Any], jax.Array] | None = None
    closed_form: ClassVar[bool] = True

    def __post_init__(self):
        for name in ("features", "penalty", "targets"):
            value = getattr(self, name)
            if not callable(value) and not (name == "targets" and value is None):
                raise TypeError(f"Ridge.{name} must be a function, got {type(value).__name__}")

    def solve(self, problem: Problem, meta: Meta, task: Task, key: Key) -> Solution:
        """The exact weights."""
        x, y, rho = self._read(meta, task.support)
        n, d = x.shape
        if n < d:
            scaled = x / rho  # X D
            dual = jsp.linalg.solve(scaled @ x.T + n * jnp.eye(n, dtype=x.dtype), y, assume_a="pos")
            # For a negative penalty that matrix may still be positive, and the point no minimum.
            params = jnp.where(jnp.all(rho > 0), scaled.T @ dual, jnp.nan)
        else:
            params = jsp.linalg.solve(x.T @ x / n + jnp.diag(rho), x.T @ y / n, assume_a="pos")
        _, loss_key = solution_keys(key)
        return Solution(params, solution_stats(problem, params, meta, task, loss_key))

    def loss(self, params: Params, meta: Meta, batch: Batch, key: Key) -> Scalar:
        """g, to be the `inner_loss` of a problem."""
        x, y, rho = self._read(meta, batch)
        squares = params**2 if params.ndim == 1 else jnp.sum(params**2, 1)
        return jnp.sum((x @ params - y) ** 2) / (2 * x.shape[0]) + 0.5 * rho @ squares

    def error(self, params: Params, meta: Meta, batch: Batch, key: Key) -> Scalar:
        """|X φ − y|² / 2n without the penalty, to be the `outer_loss` of a problem."""
        x, y, _ = self._read(meta, batch)
        return jnp.sum((x @ params - y) ** 2) / (2 * x.shape[0])

    def _read(self, meta: Meta, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """X `[n, d]`, y `[n]` or `[n, c]`, ρ `[d]`."""
        inputs, labels = batch
        x = jnp.asarray(self.features(meta, inputs))
        y = jnp.asarray(labels if self.targets is None else self.targets(labels))
        # In floats before anything is compared: whole-numbered features would round the penalty away.
        dtype = jnp.result_type(x, jnp.asarray(self.penalty(meta)), float if x.dtype.kind in "iub" else x)
        dtype = jnp.promote_types(dtype, jnp.float32)  # there is no solver for bfloat16
        x, rho = x.astype(dtype), jnp.asarray(self.penalty(meta), dtype)
        if x.ndim != 2 or x.shape[0] != y.shape[0] or y.ndim not in (1, 2):
            raise ValueError(
                "Ridge needs features [n, d] and targets [n] or [n, c] with the same n, got shapes "
                f"{x.shape} and {y.shape}"
            )
        if rho.shape not in ((), (x.shape[1],)):
            raise ValueError(
                f"Ridge.penalty must return a scalar or one value for each of the {x.shape[1]} features, "
                f"got shape {rho.shape}"
            )
        return x, y, jnp.broadcast_to(rho, (x.shape[1],))
