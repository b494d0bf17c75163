"""MetaOptNet: a support vector machine on a learned embedding, solved exactly for every task."""

import jax
import jax.numpy as jnp

from bilevel.hypergrad.requirements import require_positive
from bilevel.inner.svm import Svm
from bilevel.learners.embedding import (
    check_ways,
    closed_form_learner,
    embed_noisily_with,
    embed_with,
    mask_absent,
    memberships,
)
from bilevel.nets import Net
from bilevel.problem import Learner, Problem, Task


def metaoptnet(
    net: Net, ways: int, *, slack: float = 0.1, smoothing: float = 1.0, scale: float = 7.0
) -> Learner:
    """Learn an embedding on which a linear support vector machine tells the classes apart.

        φ = argmin ½ |W|² + Σᵢ hinge_ε(Wᵀ embed(θ, xᵢ), yᵢ),   logits(x) = s embed(θ, x) φ

    with the multi-class hinge of `bl.inner.svm.Svm`, smoothed as the paper's program does. s is learned
    with the embedding, as a logarithm. Labels of −1 are padding and count nowhere; a class without support
    is never answered.

    Args:
        net: an embedding, `x [n, ...] -> [n, d]`, for instance `conv4(None, 64)` or `resnet12(None)`.
        ways: number of classes of a task.
        slack: C, the weight of an example; the paper's is 0.1.
        smoothing: ε; the paper's code has 1.
        scale: where s starts.

    Returns:
        A `Learner` whose meta is `{"embed": ..., "log_scale"}`; params are
        `{"weights" [d, ways], "present" [ways]}`.

    Raises:
        ValueError: when `ways` is below 2, or a figure is not positive.

    Cost: one pass through the network each for support and query, and that of `Svm`. Exact.

    Reference: Lee, Maji, Ravichandran, Soatto, Meta-learning with differentiable convex optimization, 2019.

    >>> import bilevel as bl
    >>> learner = metaoptnet(bl.nets.mlp([2, 8, 4]), ways=3)
    >>> meta = learner.init_meta(jax.random.key(0))
    >>> task = bl.Task((jnp.eye(3, 2), jnp.arange(3)), None)
    >>> params = bl.adapt(learner, meta, task, jax.random.key(1))
    >>> params["weights"].shape, learner.predict(params, meta, jnp.ones((5, 2))).shape
    ((4, 3), (5, 3))
    """
    check_ways("metaoptnet", ways)
    require_positive("metaoptnet", slack=slack, smoothing=smoothing, scale=scale)
    embed, embed_noisily = embed_with(net), embed_noisily_with(net)
    svm = Svm(embed, ways, slack, smoothing)
    plain = Problem(lambda meta, key: jnp.zeros((0, ways)), svm.loss, svm.loss)

    def init_meta(key):
        return {"embed": net.init(key), "log_scale": jnp.log(jnp.asarray(scale, float))}

    def fit(meta, support):
        weights = svm.solve(plain, meta, Task(support, None), jax.random.key(0)).params
        return {"weights": weights, "present": jnp.minimum(memberships(support[1], ways).sum(0), 1)}

    def answer(params, meta, features):
        return mask_absent(jnp.exp(meta["log_scale"]) * features @ params["weights"], params["present"])

    return closed_form_learner(
        "metaoptnet",
        init_meta,
        fit,
        lambda params, meta, batch: svm.loss(params["weights"], meta, batch, jax.random.key(0)),
        logits=lambda params, meta, x: answer(params, meta, embed(meta, x)),
        noisy_logits=lambda params, meta, x, key: answer(params, meta, embed_noisily(meta, x, key)),
    )
