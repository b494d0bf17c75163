"""Ridge and logistic regression as inner problems, with scikit-learn's meaning of their parameters."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import hypergrad, inner
from bilevel.problem import Estimator, Learner, Problem, Task
from bilevel.sklearn.folds import Fold, center
from bilevel.sklearn.losses import log_loss, squared_error
from bilevel.sklearn.newton import ConjugateGradients, Newton


@dataclass(frozen=True)
class RidgeModel:
    """`sklearn.linear_model.Ridge`, by its formula.

        φ* = argmin over φ, b of Σᵢ wᵢ |yᵢ − xᵢφ − b|² + Σⱼ αⱼ |φⱼ|²,     judged by the mean squared error

    The intercept is taken out by centring. α is a scalar or one for each feature.

    Cost: n d min(n, d) a fold and its derivative. Exact.

    >>> RidgeModel(fit_intercept=True).names
    ('alpha',)
    """

    fit_intercept: bool
    names: ClassVar[tuple[str, ...]] = ("alpha",)
    per_feature: ClassVar[str | None] = "alpha"
    warm: ClassVar[bool] = False

    def learner(self, estimator: Estimator | None) -> Learner:
        """The bilevel problem; θ holds the logarithm of α."""
        ridge = inner.Ridge(lambda meta, x: x, lambda meta: jnp.exp(meta["alpha"]))

        def outer_loss(params, meta, batch, key):
            x, y, w = batch
            return squared_error(x @ params, y, w)

        problem = Problem(lambda meta, key: jnp.zeros(()), ridge.loss, outer_loss)
        return Learner(problem, ridge, estimator or hypergrad.Unroll())

    def task(self, fold: Fold, seed: int) -> Task:
        """Centred, and weighted so that the mean over rows of `bl.inner.Ridge` is the sum of scikit-learn."""
        (x, y, w), (x_query, y_query, w_query), *_ = fold
        mean, _ = center(fold.support, self.fit_intercept)
        level = (w @ y) / w.sum() if self.fit_intercept else np.zeros(y.shape[1])
        root = np.sqrt(len(w) * w)[:, None]
        return Task((root * (x - mean), root * (y - level)), (x_query - mean, y_query - level, w_query))


class Rows(NamedTuple):
    """A part of a fold as logistic regression reads it.

    Args:
        x: `[n, d]`, every feature with mean 0 and deviation 1 on the support.
        y, w: `[n, t]` and `[n]`; the weights of a support have the sum 1.
        shrink: `[d]`: the penalty of a feature for C = 1, so that its meaning does not change by the scale.
        start: where Newton's method begins.
    """

    x: Any
    y: Any
    w: Any
    shrink: Any
    start: Any


@dataclass(frozen=True)
class LogisticModel:
    """`sklearn.linear_model.LogisticRegression` with the L2 penalty, by Newton's method.

        φ* = argmin over φ, b of Σᵢ wᵢ CE(yᵢ, xᵢφ + b) + ½ Σⱼ |φⱼ|² / Cⱼ,     judged by the log loss

    The features are standardized, the penalty is not changed by it: raw features of any size converge. φ is
    stored divided by (¼ + penaltyⱼ)^-½, about the root of its curvature, for the same reason.

    Cost: some ten Newton steps a fold at first, two or three from the solution before; then conjugate
    gradients.

    >>> LogisticModel(fit_intercept=True).names
    ('C',)
    """

    fit_intercept: bool
    names: ClassVar[tuple[str, ...]] = ("C",)
    per_feature: ClassVar[str | None] = "C"
    warm: ClassVar[bool] = True

    def learner(self, estimator: Estimator | None) -> Learner:
        """The bilevel problem; θ holds the logarithm of C."""

        def weights(params, meta, rows):
            penalty = rows.shrink * jnp.exp(-meta["C"])
            return params["w"] * jax.lax.rsqrt(0.25 + penalty)[:, None], penalty

        def fit(params, meta, rows):
            w, _ = weights(params, meta, rows)
            return log_loss(rows.x @ w + params.get("b", 0.0), rows.y, rows.w)

        def inner_loss(params, meta, rows, key):
            w, penalty = weights(params, meta, rows)
            return fit(params, meta, rows) + 0.5 * jnp.sum(penalty[:, None] * w**2)

        def outer_loss(params, meta, rows, key):
            return fit(params, meta, rows)

        problem = Problem(lambda meta, key: jnp.zeros(()), inner_loss, outer_loss)
        solver = Newton(lambda rows: rows.start)
        return Learner(problem, solver, estimator or hypergrad.Implicit(ConjugateGradients()))

    def task(self, fold: Fold, seed: int) -> Task:
        """Standardized by the support."""
        (x, y, w), (x_query, y_query, w_query), *_ = fold
        mean, scale = center(fold.support, self.fit_intercept, scale=True)
        shrink = 1 / (w.sum() * scale**2)
        start = {"w": np.zeros((x.shape[1], y.shape[1]))}
        if self.fit_intercept:
            start["b"] = np.zeros(y.shape[1])
        return Task(
            Rows((x - mean) / scale, y, w / w.sum(), shrink, start),
            Rows((x_query - mean) / scale, y_query, w_query, shrink, ()),
        )
