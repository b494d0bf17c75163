"""Score function: hypergradients of discrete choices, by sampling them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel.hypergrad.common import as_floats, gradient_stats, noise_key, outer_objective, split_keys
from bilevel.hypergrad.doubts import doubts_of
from bilevel.hypergrad.evolution.perturbation import error_stats, map_chunks, noise_doubts
from bilevel.hypergrad.requirements import require_count, require_count_or_none
from bilevel.problem import Estimator, Hypergradient, InnerSolver, Key, Meta, Problem, Scalar


def every_leaf(path: str) -> bool:
    """Every leaf of meta is discrete."""
    return True


@dataclass(frozen=True)
class LeaveOneOut:
    """The baseline of a sample is the mean loss of the others: bᵢ = Σ_{j≠i} Fⱼ / (S − 1).

    Independent of sample i, so the gradient stays unbiased. Stateless; needs two samples.

    Reference: Kool, van Hoof, Welling, Buy 4 REINFORCE samples, get a baseline for free, 2019.

    >>> LeaveOneOut().advantages(jnp.array([1.0, 3.0]), ())
    (Array([-2.,  2.], dtype=float32), ())
    """

    min_samples = 2

    def init(self, dtype) -> tuple[()]:
        """Stateless."""
        return ()

    def advantages(self, losses: jax.Array, state: tuple[()]) -> tuple[jax.Array, tuple[()]]:
        """F − b for losses `[S]`."""
        count = losses.shape[0]
        return (losses - losses.mean()) * (count / (count - 1)), state


@dataclass(frozen=True)
class MovingAverage:
    """The baseline is the average loss of earlier calls, weighed down by `decay` a call.

    Independent of this call's samples, so the gradient stays unbiased. It lags where the loss changes fast;
    in the first call there is none. The state is the average before its correction for the start, and its
    weight.

    Args:
        decay: between 0 and 1.

    Raises:
        ValueError: when it is not.

    >>> losses, state = jnp.array([1.0, 3.0]), MovingAverage().init(jnp.float32)
    >>> first, state = MovingAverage().advantages(losses, state)
    >>> print(first, jnp.round(MovingAverage().advantages(losses, state)[0], 3))
    [1. 3.] [-1.  1.]
    """

    decay: float = 0.9
    min_samples = 1

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ValueError(f"MovingAverage.decay must be at least 0 and below 1, got {self.decay!r}")

    def init(self, dtype) -> tuple[jax.Array, jax.Array]:
        """No loss seen yet."""
        return jnp.zeros((), dtype), jnp.zeros((), dtype)

    def advantages(self, losses: jax.Array, state) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """F − b for losses `[S]`, and the average with them in it."""
        total, weight = state
        baseline = total / jnp.where(weight == 0, 1.0, weight)
        grow = 1 - self.decay
        after = (self.decay * total + grow * losses.mean(), self.decay * weight + grow)
        return losses - baseline, jax.tree.map(lambda new, old: new.astype(old.dtype), after, state)


@dataclass(frozen=True)
class ScoreFunction:
    """Gradient of the expected outer loss where some leaves of meta are logits of discrete choices.

        F(θ) = E f(z), z ~ Cat(softmax θ);  g = (1/S) Σᵢ (f(zᵢ) − bᵢ) ∇ log π(zᵢ);  ∇ log π(z) = z − softmax θ

    A selected leaf `[..., num_choices]` holds logits; the problem never sees them: it is run with one-hot
    samples of that shape in their place. The other leaves get the mean of their hypergradients over the
    samples.

    Args:
        num_samples: S.
        discrete: `discrete(path) -> bool` on a leaf's key path, such as `lambda path: "choice" in path`;
            every leaf by default.
        adjoint: a stateless estimator for the leaves that are not discrete, such as `Mixed()`.
        baseline: `LeaveOneOut()`, or `MovingAverage()` for one sample a call.
        chunk: how many samples run side by side; None for all.

    Raises:
        TypeError: when a leaf is not a float, or there are other leaves and no `adjoint`.
        ValueError: when no leaf is selected, one has no axis of choices, a count is not positive, the
            baseline needs more samples, or `adjoint` has a state.

    Cost: S inner solves, forward only, or S times that of `adjoint`. Unbiased, for the logits and for the
    other leaves. The variance falls as 1/S and grows with the number of choices made at once.

    `value` is the mean of the S losses, an estimate of F. `stats["entropy"]` is the mean entropy of the
    choices in nats (0: they are made); `stats["standard_error"]` the error of g over the logits as a multiple
    of its length. State: that of the baseline.

    Reference: Williams, 1992 (REINFORCE).

    >>> import bilevel as bl
    >>> costs = jnp.array([1.0, 2.0, 6.0])
    >>> problem = bl.Problem(init=lambda meta, key: jnp.zeros(()),
    ...                      inner_loss=lambda params, meta, batch, key: (params - costs @ meta) ** 2,
    ...                      outer_loss=lambda params, meta, batch, key: params)
    >>> solver = bl.inner.Gradient(optax.sgd(0.5), num_steps=1)  # reaches the cost of the choice
    >>> task, key = bl.Task(None, None), jax.random.key(0)
    >>> h = bl.hypergradient(problem, solver, ScoreFunction(20_000), jnp.zeros(3), task, key)
    >>> print(jnp.round(h.grad, 1))  # (costs - 3) / 3
    [-0.7 -0.3  1. ]
    """

    num_samples: int
    discrete: Callable[[str], bool] = every_leaf
    adjoint: Estimator | None = None
    baseline: LeaveOneOut | MovingAverage = field(default_factory=LeaveOneOut)
    chunk: int | None = None

    def __post_init__(self):
        require_count(self, num_samples=self.num_samples)
        require_count_or_none(self, chunk=self.chunk)
        if self.num_samples < self.baseline.min_samples:
            raise ValueError(
                f"ScoreFunction.num_samples must be at least {self.baseline.min_samples} with "
                f"{type(self.baseline).__name__}, got {self.num_samples}; use baseline=MovingAverage()"
            )

    def check(self, problem: Problem, solver: InnerSolver) -> None:
        """Needs `solve`, and what `adjoint` needs."""
        if self.adjoint is not None:
            self.adjoint.check(problem, solver)
        elif not isinstance(solver, InnerSolver):
            raise TypeError(
                f"ScoreFunction needs a solver with solve(problem, meta, task, key), and "
                f"{type(solver).__name__} has none; use bl.inner.Gradient(optimizer, num_steps)"
            )

    def init(self, problem: Problem, solver: InnerSolver, meta: Meta, task, key: Key) -> Any:
        """The state of the baseline."""
        meta = as_floats(meta)
        self._selected(meta)
        if self.adjoint is not None and jax.tree.leaves(self.adjoint.init(problem, solver, meta, task, key)):
            raise ValueError(
                f"ScoreFunction.adjoint must carry no state, and {type(self.adjoint).__name__} carries one; "
                "use bl.hypergrad.Mixed() or Unroll()"
            )
        losses = jax.eval_shape(lambda: self._run(problem, solver, meta, task, key))
        return self.baseline.init(losses.value.dtype)

    def estimate(self, problem, solver, meta, task, state, key) -> tuple[Hypergradient, Any]:
        """The hypergradient of one task."""
        meta = as_floats(meta)
        selected = self._selected(meta)

        def one(sample_key):
            choices, score = sample(sample_key, meta, selected)
            return self._run(problem, solver, choices, task, key), score

        keys = jax.random.split(noise_key(key), self.num_samples)
        runs, scores = map_chunks(one, keys, self.chunk)
        advantages, state = self.baseline.advantages(runs.value, state)

        def combine(is_discrete, score, direct):
            if not is_discrete:
                return direct  # [S, ...], to be averaged
            return jnp.einsum("s,s...->s...", advantages.astype(score.dtype), score)

        parts = jax.tree.map(combine, selected, scores, runs.grad)
        means = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), (parts, runs.value, runs.stats))
        grad, value, stats = means

        def logits(tree):
            return [leaf for s, leaf in zip(jax.tree.leaves(selected), jax.tree.leaves(tree)) if s]

        stats = {
            **stats,
            "entropy": mean_entropy(logits(meta)),
            **error_stats(optax.tree.norm(logits(parts), squared=True), logits(grad), self.num_samples),
            **gradient_stats(value, grad),
        }
        return Hypergradient(value, grad, stats), state

    def doubts(self, stats: Mapping[str, float]) -> list[str]:
        """Says so when noise dominates, and what `adjoint` says."""
        noise = noise_doubts(self, stats, "num_samples", "take more samples")
        return noise + doubts_of(self.adjoint, stats)

    def _selected(self, meta: Meta) -> Any:
        """A tree like meta of bool: which leaves are logits."""

        def select(path, leaf):
            name = jax.tree_util.keystr(path)
            if not self.discrete(name):
                if self.adjoint is None:
                    raise TypeError(
                        f"ScoreFunction has no hypergradient for meta{name}, which `discrete` does not "
                        "select; pass adjoint=bl.hypergrad.Mixed() for it, or select it"
                    )
                return False
            if jnp.ndim(leaf) == 0:
                raise ValueError(
                    f"meta{name} is a scalar, and a discrete leaf holds logits [..., num_choices]; "
                    "leave it out with `discrete`"
                )
            return True

        selected = jax.tree_util.tree_map_with_path(select, meta)
        if not any(jax.tree.leaves(selected)):
            raise ValueError(
                "ScoreFunction.discrete selects no leaf of meta; use its `adjoint` as the estimator instead"
            )
        return selected

    def _run(self, problem, solver, choices, task, key) -> Hypergradient:
        """The outer loss at given choices, with the gradient of the other leaves if there is an adjoint."""
        if self.adjoint is not None:
            state = self.adjoint.init(problem, solver, choices, task, key)
            return self.adjoint.estimate(problem, solver, choices, task, state, key)[0]
        inner_key, outer_key = split_keys(key)
        solution = solver.solve(problem, choices, task, inner_key)
        value, stats = outer_objective(problem, solution.params, choices, task, outer_key)
        return Hypergradient(value, optax.tree.zeros_like(choices), {**solution.stats, **stats})


def mean_entropy(logits: list[jax.Array]) -> Scalar:
    """Nats a choice, over all choices.

    >>> print(jnp.exp(mean_entropy([jnp.zeros((2, 4))])))
    4.0
    """
    each = [jnp.sum(jax.scipy.special.entr(jax.nn.softmax(leaf)), -1).reshape(-1) for leaf in logits]
    return jnp.mean(jnp.concatenate(each))


def sample(key: Key, meta: Meta, selected: Any) -> tuple[Meta, Meta]:
    """Meta with one-hot samples for its selected leaves, and ∇ log π of them (zero elsewhere).

    >>> choice, score = sample(jax.random.key(0), jnp.zeros(4), True)
    >>> print(choice.sum(), jnp.sort(score))
    1.0 [-0.25 -0.25 -0.25  0.75]
    """

    def of_leaf(is_discrete, leaf, key):
        if not is_discrete:
            return leaf, jnp.zeros_like(leaf)
        choice = jax.nn.one_hot(jax.random.categorical(key, leaf), leaf.shape[-1], dtype=leaf.dtype)
        return choice, choice - jax.nn.softmax(leaf)

    leaves, tree = jax.tree.flatten(meta)
    keys = jax.random.split(key, len(leaves))
    out = [of_leaf(*row) for row in zip(jax.tree.leaves(selected), leaves, keys, strict=True)]
    return tree.unflatten([choice for choice, _ in out]), tree.unflatten([score for _, score in out])
