"""Learning to reweight examples: weights from nothing at every step, by the hypergradient at zero weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import optax

from bilevel.hypergrad import Mixed
from bilevel.hypergrad.doubts import doubts_of
from bilevel.inner import Gradient
from bilevel.learners.weighted import require_model, weighted_problem, with_model_step
from bilevel.nets import Net
from bilevel.problem import Estimator, Hypergradient, InnerSolver, Key, Learner, Meta, Problem, Task


def learning_to_reweight(net: Net, rate: float = 0.1) -> Learner:
    """A classifier whose training examples count as much as they would help on clean ones.

        wᵢ ∝ max(0, −∂F/∂εᵢ at ε = 0),   F(ε) = CE(φ − rate ∇φ Σ εᵢ CE(φ; xᵢ, yᵢ); clean),   Σ wᵢ = 1

    Args:
        net: `x [n, ...] -> logits [n, classes]`.
        rate: of the step looked ahead; to first order the weights do not depend on it.

    Returns:
        A `Learner` whose meta is {"model": ...}; support is (x, labels) to train on, query the same, clean.
        It has nothing to adapt: evaluate with 0 steps.

    Raises:
        ValueError: when the rate is not positive.

    Cost: about 5 gradients of a minibatch; nothing is kept between steps. The weights are exact for one step.

    Reference: Ren, Zeng, Yang, Urtasun, Learning to reweight examples for robust deep learning, 2018.

    >>> import bilevel as bl
    >>> learner = learning_to_reweight(bl.nets.mlp([4, 2]))
    >>> sorted(learner.init_meta(jax.random.key(0)))
    ['model']
    """
    if not rate > 0:
        raise ValueError(f"learning_to_reweight needs a positive rate, got {rate}")

    def weigh(meta, losses, labels):
        equal = jnp.full(losses.shape, 1 / losses.size)
        return meta.get(
            "weights", equal
        )  # the estimator puts them in; a look ahead without it has equal ones

    return Learner(
        weighted_problem(net, weigh),
        Gradient(optax.sgd(rate), 1),
        Reweight(),
        init_meta=lambda key: {"model": net.init(key)},
        predict=lambda params, meta, x: net.apply(params, x),
    )


@dataclass(frozen=True)
class Reweight:
    """Weigh the examples of a batch by their hypergradient at zero, and move the model by their loss.

        grad of "model" = ∇φ inner_loss(φ; w),   w = u / Σ u,   u = max(0, −∂F/∂ε at ε = 0)

    Where no example helps all weights are 0, and the model stays.

    Args:
        estimator: of the hypergradient with respect to ε.

    Raises:
        TypeError: when meta is no dict with a "model".
        ValueError: when the estimator has a state.

    Stats: `used_share` of the examples that have a weight, and those of the estimator.

    Cost: that of the estimator on one step, and a gradient.

    Reference: Ren, Zeng, Yang, Urtasun, 2018.

    >>> Reweight().init(None, None, {"model": 0.0}, None, None)
    ()
    """

    estimator: Estimator = field(default_factory=Mixed)

    def check(self, problem: Problem, solver: InnerSolver) -> None:
        """What the estimator asks for."""
        self.estimator.check(problem, solver)

    def init(self, problem: Problem, solver: InnerSolver, meta: Meta, task: Task, key: Key) -> tuple[()]:
        """Stateless: the model is in meta."""
        require_model(self, meta)
        if jax.tree.leaves(self.estimator.init(problem, solver, meta, task, key)):
            raise ValueError(
                f"Reweight.estimator must carry no state, and {type(self.estimator).__name__} carries one: "
                "the weights are new at every step; use bl.hypergrad.Mixed() or Unroll()"
            )
        return ()

    def estimate(self, problem, solver, meta, task, state, key) -> tuple[Hypergradient, tuple[()]]:
        """The direction of the model."""
        h = self.weight_hypergradient(problem, solver, meta, task, key)
        useful = jnp.maximum(-h.grad, 0.0)
        total = jnp.sum(useful)
        weights = useful / jnp.where(total == 0, 1.0, total)
        stats = {**h.stats, "used_share": jnp.mean(weights > 0, dtype=weights.dtype)}
        h = Hypergradient(h.value, {}, stats)
        return with_model_step(h, problem, {**meta, "weights": weights}, task, key), state

    def doubts(self, stats: Mapping[str, float]) -> list[str]:
        """Those of the estimator."""
        return doubts_of(self.estimator, stats)

    def weight_hypergradient(self, problem, solver, meta, task, key) -> Hypergradient:
        """∂F/∂ε at ε = 0, [n], by the same problem with ε for its meta."""
        count = jnp.shape(task.support[1])[0]

        def inner_loss(params, weights, batch, key):
            return problem.inner_loss(params, {**meta, "weights": weights}, batch, key)

        def outer_loss(params, weights, batch, key):
            return problem.outer_loss(params, meta, batch, key)

        def metrics(params, weights, batch, key):
            assert problem.metrics is not None
            return problem.metrics(params, meta, batch, key)

        of_weights = Problem(
            lambda weights, key: meta["model"],
            inner_loss,
            outer_loss,
            None if problem.metrics is None else metrics,
        )
        start = jnp.zeros(count, jnp.result_type(*jax.tree.leaves(meta["model"])))
        return self.estimator.estimate(of_weights, solver, start, task, (), key)[0]
