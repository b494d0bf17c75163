"""Guided evolution strategies: noise drawn mostly along the gradients of a cheap, biased estimator."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bilevel.hypergrad.common import as_floats
from bilevel.hypergrad.evolution.evolution_strategies import EvolutionStrategies, antithetic
from bilevel.hypergrad.evolution.perturbation import at_rest, noise_doubts
from bilevel.hypergrad.requirements import require_count, require_count_or_none, require_positive
from bilevel.hypergrad.residuals import norm, ratio
from bilevel.problem import Estimator, EstimatorState, Hypergradient, InnerSolver, Problem


class GuidedState(NamedTuple):
    """The last gradients of the guide, `[num_guides, dim θ]`, and the guide's own state."""

    guides: jax.Array
    guide_state: EstimatorState


@dataclass(frozen=True)
class GuidedES:
    """Evolution strategies whose noise lies mostly in the span of a guide's last gradients.

        ε ~ N(0, Σ),   Σ = α I + (1 − α) (n/k) U Uᵀ,   U an orthonormal basis of the k last guides, n = dim θ
        g = 1/(2 N σ c) Σᵢ (F(θ + σ εᵢ) − F(θ − σ εᵢ)) εᵢ,   c = α + (1 − α) n/k

    A truncated or first-order hypergradient is cheap and biased, but rarely useless: where it points, few
    pairs find the slope of the true loss; the rest of the space is still searched.

    Args:
        sigma, num_pairs, chunk: as in `EvolutionStrategies`.
        guide: any estimator that takes the solver, for instance `FirstOrder()` or `Truncated(5)`.
        num_guides: k.
        alpha: α, the share of the noise that ignores the guides, above 0 and at most 1; 1 is plain ES.

    Raises:
        TypeError: when the solver has no `solve`, or the guide refuses it.
        ValueError: when a field is out of range.

    Cost: that of `EvolutionStrategies` and of the guide. Biased on purpose: E[g] is ∇F_σ in the guides' span,
    and α/c times it outside, so that it always descends. Error in the span (k + 1) |∇F|² / N instead of
    (n + 1) |∇F|² / N, where α is small. State: the guides.

    `stats["guided_share"]` is |U Uᵀ g| / |g|.

    Reference: Maheswaranathan, Metz, Tucker, Choi, Sohl-Dickstein, Guided evolutionary strategies, 2019.

    >>> import bilevel as bl, optax
    >>> problem = bl.Problem(init=lambda meta, key: meta,
    ...                      inner_loss=lambda params, meta, batch, key: 0.5 * params**2,
    ...                      outer_loss=lambda params, meta, batch, key: params**2)
    >>> solver = bl.inner.Gradient(optax.sgd(0.5), num_steps=1)
    >>> estimator = GuidedES(0.1, 500, guide=bl.hypergrad.FirstOrder(), num_guides=1)
    >>> task, key = bl.Task(None, None), jax.random.key(0)
    >>> print(jnp.round(bl.hypergradient(problem, solver, estimator, 2.0, task, key).grad))
    1.0
    """

    sigma: float
    num_pairs: int
    guide: Estimator
    num_guides: int = 1
    alpha: float = 0.5
    chunk: int | None = None

    def __post_init__(self):
        require_positive(self, sigma=self.sigma, alpha=self.alpha)
        require_count(self, num_pairs=self.num_pairs, num_guides=self.num_guides)
        require_count_or_none(self, chunk=self.chunk)
        if self.alpha > 1:
            raise ValueError(f"GuidedES.alpha must be at most 1, where it is plain ES, got {self.alpha}")

    def check(self, problem: Problem, solver: InnerSolver) -> None:
        """Needs what `EvolutionStrategies` and the guide need."""
        EvolutionStrategies(self.sigma, self.num_pairs).check(problem, solver)
        self.guide.check(problem, solver)

    def init(self, problem, solver, meta, task, key) -> GuidedState:
        """Random directions in place of the guides to come."""
        flat, _ = ravel_pytree(as_floats(meta))
        if self.num_guides > flat.size:
            raise ValueError(
                f"GuidedES.num_guides must be at most dim meta = {flat.size}, got {self.num_guides}"
            )
        wide = jnp.promote_types(flat.dtype, jnp.float32)  # there is no orthonormal basis in bfloat16
        guides = jax.random.normal(key, (self.num_guides, flat.size), wide)
        return GuidedState(guides, self.guide.init(problem, solver, meta, task, key))

    def estimate(self, problem, solver, meta, task, state, key) -> tuple[Hypergradient, GuidedState]:
        """The hypergradient of one task, with the guide's newest gradient in the basis already."""
        meta = as_floats(meta)
        guide, guide_state = self.guide.estimate(problem, solver, meta, task, state.guide_state, key)
        newest, unravel = ravel_pytree(guide.grad)
        guides = jnp.concatenate([state.guides[1:], newest[None].astype(state.guides.dtype)])
        basis = jnp.linalg.qr(guides.T)[0]  # [n, k]
        size = newest.size
        gain = self.alpha + (1 - self.alpha) * size / self.num_guides

        def sample(key, meta, still):
            whole_key, span_key = jax.random.split(key)
            whole = jax.random.normal(whole_key, (size,), basis.dtype)
            span = basis @ jax.random.normal(span_key, (self.num_guides,), basis.dtype)
            noise = self.alpha**0.5 * whole + (gain - self.alpha) ** 0.5 * span
            return at_rest(unravel(noise.astype(newest.dtype)), still)

        h = antithetic(self, problem, solver, meta, task, key, sample)
        grad = jax.tree.map(lambda leaf: (leaf / gain).astype(leaf.dtype), h.grad)
        flat, _ = ravel_pytree(grad)
        stats = {**h.stats, "guided_share": ratio(norm(basis.T @ flat), norm(flat))}
        return Hypergradient(h.value, grad, stats), GuidedState(guides, guide_state)

    def doubts(self, stats: Mapping[str, float]) -> list[str]:
        """Says so when noise dominates."""
        return noise_doubts(self, stats, "num_pairs", "take more pairs, or a better guide")
