"""Prototypical networks: a class is the mean of its embedded examples."""

import jax
import jax.numpy as jnp

from bilevel.hypergrad.requirements import require_positive
from bilevel.learners.embedding import (
    check_ways,
    class_means,
    closed_form_learner,
    embed_noisily_with,
    embed_with,
    mask_absent,
    memberships,
)
from bilevel.nets import Net
from bilevel.problem import Learner


def protonet(net: Net, ways: int, *, scale: float = 1.0, learn_scale: bool = False) -> Learner:
    """Learn an embedding in which every class lies around the mean of its examples.

        φ_c = mean of embed(θ, x_i) over the support of class c,     logits_c(x) = −s |embed(θ, x) − φ_c|²

    Training and test may differ in `ways`: meta knows nothing of classes. Labels of −1 are padding and count
    nowhere; a class without support is never answered.

    Args:
        net: an embedding, `x [n, ...] -> [n, d]`, for instance `conv4(None, 64)`. Its own normalization
            decides whether the answers are transductive: batch norm mixes what it is given at once.
        ways: number of classes of a task, at most those the labels name.
        scale: s, an inverse temperature.
        learn_scale: make s a leaf of meta, as its logarithm.

    Returns:
        A `Learner` whose meta is `{"embed": ...}`, with `"log_scale"` where it is learned; params are
        `{"prototypes" [ways, d], "present" [ways]}`.

    Raises:
        ValueError: when `ways` is below 2 or `scale` is not positive.

    Cost: one pass through the network each for support and query; nothing is iterated. Exact.

    Reference: Snell, Swersky, Zemel, Prototypical networks for few-shot learning, 2017.

    >>> import bilevel as bl
    >>> learner = protonet(bl.nets.mlp([2, 8, 4]), ways=3)
    >>> meta = learner.init_meta(jax.random.key(0))
    >>> task = bl.Task((jnp.eye(3, 2), jnp.arange(3)), None)
    >>> params = bl.adapt(learner, meta, task, jax.random.key(1))
    >>> learner.predict(params, meta, jnp.ones((5, 2))).shape
    (5, 3)
    """
    check_ways("protonet", ways)
    require_positive("protonet", scale=scale)
    embed, embed_noisily = embed_with(net), embed_noisily_with(net)

    def init_meta(key):
        meta = {"embed": net.init(key)}
        return meta | {"log_scale": jnp.log(jnp.asarray(scale, float))} if learn_scale else meta

    def fit(meta, support):
        x, labels = support
        means, present = class_means(embed(meta, x), labels, ways)
        return {"prototypes": means, "present": present}

    def inner_loss(params, meta, batch):
        x, labels = batch
        distances = squared_distances(embed(meta, x), params["prototypes"])
        return 0.5 * jnp.sum(memberships(labels, ways, distances.dtype) * distances)

    def answer(params, meta, features):
        s = jnp.exp(meta["log_scale"]) if learn_scale else scale
        return mask_absent(-s * squared_distances(features, params["prototypes"]), params["present"])

    return closed_form_learner(
        "protonet",
        init_meta,
        fit,
        inner_loss,
        logits=lambda params, meta, x: answer(params, meta, embed(meta, x)),
        noisy_logits=lambda params, meta, x, key: answer(params, meta, embed_noisily(meta, x, key)),
    )


def squared_distances(a: jax.Array, b: jax.Array) -> jax.Array:
    """|aᵢ − bⱼ|², `[n, d], [m, d] -> [n, m]`.

    The differences are formed: the expansion |a|² − 2ab + |b|² is faster, and loses all digits of near ones.

    >>> print(squared_distances(jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 2.0], [4.0, 6.0]])))
    [[ 0. 25.]]
    """
    return jnp.sum((a[:, None, :] - b[None, :, :]) ** 2, axis=-1)
