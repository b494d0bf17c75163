"""Meta-Weight-Net: a small network from an example's loss to its weight, learned while the model trains."""

import jax
import jax.numpy as jnp
import optax

from bilevel.inner import Gradient
from bilevel.learners.weighted import Online, weighted_problem
from bilevel.nets import Net, mlp
from bilevel.problem import Learner, Meta


def meta_weight_net(net: Net, rate: float = 0.1, *, hidden: int = 100) -> Learner:
    """A classifier whose examples weigh what a network makes of their losses, for the sake of clean ones.

        w(ℓ) = σ(mlp(ℓ; θ)),   F(θ) = CE(φ − rate ∇φ Σ w(ℓᵢ) ℓᵢ / Σ w(ℓᵢ); clean)

    Under label noise it learns to fall with the loss, under imbalance to rise. The weights of a batch are
    scaled to sum to 1: only then is it their proportion that is learned. In the paper's (1/n) Σ w ℓ every
    weight first grows for the sake of a larger step, and a sigmoid at 1 learns no more.

    Args:
        net: `x [n, ...] -> logits [n, classes]`.
        rate: of the step looked ahead; the steps of model and weights are the outer optimizer's.
        hidden: units of the weight network, a perceptron 1-hidden-1.

    Returns:
        A `Learner` whose meta is {"model": ..., "weights": ...}; support is (x, labels) to train on, query
        the same, clean. It has nothing to adapt: evaluate with 0 steps.

    Raises:
        ValueError: when the rate is not positive, or there are no hidden units.

    Cost: about 5 gradients of a minibatch. Exact for the step looked ahead, and as shortsighted.

    Reference: Shu, Xie, Yi, Zhao, Zhou, Xu, Meng, Meta-Weight-Net, 2019.

    >>> import bilevel as bl
    >>> learner = meta_weight_net(bl.nets.mlp([4, 2]))
    >>> sorted(learner.init_meta(jax.random.key(0)))
    ['model', 'weights']
    """
    if not rate > 0 or hidden < 1:
        raise ValueError(f"meta_weight_net needs a positive rate and hidden units, got {rate}, {hidden}")
    weight_net = mlp([1, hidden, 1])

    def weigh(meta, losses, labels):
        weights = example_weights(meta, losses)
        return weights / jnp.sum(weights)

    def init_meta(key):
        model_key, weight_key = jax.random.split(key)
        weights = weight_net.init(weight_key)
        head = jax.tree.map(jnp.zeros_like, weights["head"])  # all weights alike at first
        return {"model": net.init(model_key), "weights": {**weights, "head": head}}

    return Learner(
        weighted_problem(net, weigh),
        Gradient(optax.sgd(rate), 1),
        Online(),
        init_meta=init_meta,
        predict=lambda params, meta, x: net.apply(params, x),
    )


def example_weights(meta: Meta, losses: jax.Array) -> jax.Array:
    """The learned weight, 0..1, of examples of these losses [n].

    >>> import bilevel as bl
    >>> meta = meta_weight_net(bl.nets.mlp([4, 2]), hidden=3).init_meta(jax.random.key(0))
    >>> example_weights(meta, jnp.array([0.0, 1.0])).shape
    (2,)
    """
    hidden = meta["weights"]["hidden_0"]["b"].size
    return jax.nn.sigmoid(mlp([1, hidden, 1]).apply(meta["weights"], losses[:, None])[:, 0])
