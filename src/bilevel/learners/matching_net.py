"""Matching networks: an answer is a weighted vote of the support examples."""

import jax
import jax.numpy as jnp

from bilevel.hypergrad.requirements import require_positive
from bilevel.learners.embedding import (
    ABSENT,
    check_ways,
    closed_form_learner,
    embed_noisily_with,
    embed_with,
    memberships,
    unit_rows,
)
from bilevel.nets import Net
from bilevel.problem import Learner


def matching_net(net: Net, ways: int, *, scale: float = 10.0, learn_scale: bool = False) -> Learner:
    """Learn an embedding in which the nearest support examples, by angle, tell the class.

        p_c(x) = Σ_{i: y_i = c} a_i(x),   a(x) = softmax over i of  s cos(embed(θ, x), embed(θ, x_i))

    The logits are log p. Labels of −1 are padding and count nowhere; a class without support is never
    answered. The embeddings are those of the examples alone: the paper's full-context embeddings (an LSTM
    over the support) are not part of this; they add little on Omniglot by its own table.

    Args:
        net: an embedding, `x [n, ...] -> [n, d]`, for instance `conv4(None, 64)`.
        ways: number of classes of a task.
        scale: s, an inverse temperature. The paper has 1, where cosines can tell classes only weakly apart
            and training is slow.
        learn_scale: make s a leaf of meta, as its logarithm.

    Returns:
        A `Learner` whose meta is `{"embed": ...}`, with `"log_scale"` where it is learned; params are
        `{"embedded" [n, d] of length 1, "members" [n, ways]}`.

    Raises:
        ValueError: when `ways` is below 2 or `scale` is not positive.

    Cost: one pass through the network each for support and query, and their n·m cosines. Exact.

    Reference: Vinyals, Blundell, Lillicrap, Kavukcuoglu, Wierstra, Matching networks for one shot learning,
    2016.

    >>> import bilevel as bl
    >>> learner = matching_net(bl.nets.mlp([2, 8, 4]), ways=3)
    >>> meta = learner.init_meta(jax.random.key(0))
    >>> task = bl.Task((jnp.eye(3, 2) + 1, jnp.arange(3)), None)
    >>> params = bl.adapt(learner, meta, task, jax.random.key(1))
    >>> jnp.exp(learner.predict(params, meta, jnp.ones((5, 2)))).sum(1).round(4).tolist()
    [1.0, 1.0, 1.0, 1.0, 1.0]
    """
    check_ways("matching_net", ways)
    require_positive("matching_net", scale=scale)
    embed, embed_noisily = embed_with(net), embed_noisily_with(net)

    def init_meta(key):
        meta = {"embed": net.init(key)}
        return meta | {"log_scale": jnp.log(jnp.asarray(scale, float))} if learn_scale else meta

    def fit(meta, support):
        x, labels = support
        embedded = unit_rows(embed(meta, x))
        return {"embedded": embedded, "members": memberships(labels, ways, embedded.dtype)}

    def inner_loss(params, meta, batch):
        # The support is kept, not fitted: at the solution the kept embeddings are those of the support.
        return 0.5 * jnp.sum((params["embedded"] - unit_rows(embed(meta, batch[0]))) ** 2)

    def answer(params, meta, features):
        s = jnp.exp(meta["log_scale"]) if learn_scale else scale
        scores = s * unit_rows(features) @ params["embedded"].T  # [n, support]
        real = params["members"].sum(1)  # 0 for padding
        log_a = jax.nn.log_softmax(jnp.where(real > 0, scores, ABSENT))
        votes = jnp.where(params["members"].T > 0, log_a[:, None, :], ABSENT)  # [n, ways, support]
        return jax.nn.logsumexp(votes, axis=-1)

    return closed_form_learner(
        "matching_net",
        init_meta,
        fit,
        inner_loss,
        logits=lambda params, meta, x: answer(params, meta, embed(meta, x)),
        noisy_logits=lambda params, meta, x, key: answer(params, meta, embed_noisily(meta, x, key)),
    )
