"""Relation networks: the measure of likeness is learned with the embedding."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

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


def relation_net(net: Net, relation: Net, ways: int, *, loss: Callable | None = None) -> Learner:
    """Learn an embedding, and a network that says how alike a query and a class are.

        logits_c(x) = relation(θ, [φ_c, embed(θ, x)]),   φ_c = mean of embed(θ, x_i) over class c
        loss = mean over examples and classes of (sigmoid(logits_c(x)) − 1[y = c])²

    The paper adds up the embeddings of a class; their mean is the same up to a factor, and lets classes
    have different numbers of examples. Labels of −1 are padding and count nowhere.

    Args:
        net: an embedding, `x [n, ...] -> [n, ..., d]`; vectors or maps of features.
        relation: `[pairs, ..., 2 d] -> [pairs, 1]`, for instance `mlp([128, 64, 1])`.
        ways: number of classes of a task.
        loss: `loss(logits, labels) -> scalar` or `-> (scalar, {metric: scalar})`, in place of the paper's
            `relation_error`.

    Returns:
        A `Learner` whose meta is `{"embed": ..., "relation": ...}`; params are
        `{"prototypes" [ways, ..., d], "present" [ways]}`.

    Raises:
        ValueError: when `ways` is below 2, or `relation` does not give one number a pair.

    Cost: one pass through the embedding each for support and query, and one of the relation network for
    each of n · ways pairs. Exact.

    Reference: Sung, Yang, Zhang, Xiang, Torr, Hospedales, Learning to compare, 2018.

    >>> import bilevel as bl
    >>> learner = relation_net(bl.nets.mlp([2, 8, 4]), bl.nets.mlp([8, 8, 1]), ways=3)
    >>> meta = learner.init_meta(jax.random.key(0))
    >>> task = bl.Task((jnp.eye(3, 2), jnp.arange(3)), None)
    >>> params = bl.adapt(learner, meta, task, jax.random.key(1))
    >>> learner.predict(params, meta, jnp.ones((5, 2))).shape
    (5, 3)
    """
    check_ways("relation_net", ways)
    embed, embed_noisily = embed_with(net), embed_noisily_with(net)

    def init_meta(key):
        embed_key, relation_key = jax.random.split(key)
        return {"embed": net.init(embed_key), "relation": relation.init(relation_key)}

    def fit(meta, support):
        x, labels = support
        features = embed(meta, x)
        means, present = class_means(features.reshape(len(features), -1), labels, ways)
        return {"prototypes": means.reshape(ways, *features.shape[1:]), "present": present}

    def inner_loss(params, meta, batch):
        x, labels = batch
        apart = (embed(meta, x)[:, None] - params["prototypes"]) ** 2
        members = memberships(labels, ways, apart.dtype)
        return 0.5 * jnp.sum(members * apart.reshape(*members.shape, -1).sum(-1))

    def answer(params, meta, features):
        shape = (len(features), ways, *features.shape[1:])
        pairs = jnp.concatenate(
            [jnp.broadcast_to(part, shape) for part in (params["prototypes"][None], features[:, None])], -1
        )
        scores = relation.apply(meta["relation"], pairs.reshape(-1, *pairs.shape[2:]))
        if scores.shape != (pairs.shape[0] * ways, 1):
            raise ValueError(
                f"relation_net: the relation network must give one number a pair, [{pairs.shape[0] * ways}, "
                f"1], got {scores.shape}"
            )
        return mask_absent(scores.reshape(-1, ways), params["present"])

    return closed_form_learner(
        "relation_net",
        init_meta,
        fit,
        inner_loss,
        logits=lambda params, meta, x: answer(params, meta, embed(meta, x)),
        noisy_logits=lambda params, meta, x, key: answer(params, meta, embed_noisily(meta, x, key)),
        loss=loss or relation_error,
    )


def relation_error(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean squared error of the relation scores, and the accuracy.

        (1 / (n · ways)) Σ (sigmoid(logits_c(x)) − 1[y = c])²

    Args:
        logits: `[n, ways]`.
        labels: int `[n]`, in 0..ways-1; examples of label −1 count nowhere.

    Loss and accuracy are NaN for any other label, and when no example has one, as in `cross_entropy`.

    >>> loss, metrics = relation_error(jnp.array([[9.0, -9.0], [0.0, 0.0]]), jnp.array([0, -1]))
    >>> print(loss < 1e-6, metrics["accuracy"])
    True 1.0
    """
    wrong = jnp.any((labels < -1) | (labels >= logits.shape[-1]))
    real = jnp.where(wrong, jnp.nan, (labels >= 0).astype(logits.dtype))
    count = real.sum()
    error = (jax.nn.sigmoid(logits) - memberships(labels, logits.shape[-1], logits.dtype)) ** 2
    right = (jnp.argmax(logits, axis=-1) == labels).astype(logits.dtype)
    return jnp.sum(real * error.mean(-1)) / count, {"accuracy": jnp.sum(real * right) / count}
