"""Nearest centroid: the floor that every few-shot learner has to rise above."""

from dataclasses import replace

from bilevel.learners.embedding import unit_rows
from bilevel.learners.pretraining import TrainedBy
from bilevel.learners.protonet import protonet
from bilevel.nets import Net
from bilevel.problem import Learner


def nearest_centroid(
    net: Net, ways: int, *, scale: float = 10.0, normalize: bool = True, trained_by: Learner | None = None
) -> Learner:
    """Answer the class whose mean is nearest, in an embedding that was trained otherwise, or not at all.

        φ_c = mean of z_i over class c,   logits_c(x) = −s |z − φ_c|²,   z = embed(θ, x) / |embed(θ, x)|

    Args:
        net: an embedding, `x [n, ...] -> [n, d]`; `pixels()` compares the pictures themselves.
        ways: number of classes of a task.
        scale: s, an inverse temperature; the answers do not depend on it, their odds do.
        normalize: divide every embedding by its length.
        trained_by: the learner that trains the embedding, such as `pretraining(net, head)`; they share meta.
            Without one it is trained like a prototypical network.

    Returns:
        A `Learner` whose meta is that of `trained_by`, else `{"embed": ...}`.

    Raises:
        ValueError: when `ways` is below 2 or `scale` is not positive.

    Cost: one pass through the network each for support and query.

    Reference: Wang, Chao, Weinberger, van der Maaten, SimpleShot, 2019; Mensink et al., 2013.

    >>> import bilevel as bl, jax, jax.numpy as jnp
    >>> learner = nearest_centroid(pixels(), ways=2)
    >>> task = bl.Task((jnp.eye(2), jnp.arange(2)), None)
    >>> params = bl.adapt(learner, {"embed": {}}, task, jax.random.key(1))
    >>> learner.predict(params, {"embed": {}}, jnp.array([[1.0, 0.2]])).argmax().item()
    0
    """
    if normalize:
        noisy = net.noisy
        net = net._replace(
            apply=lambda params, x, apply=net.apply: unit_rows(apply(params, x)),
            noisy=None if noisy is None else lambda params, x, key: unit_rows(noisy(params, x, key)),
        )
    learner = protonet(net, ways, scale=scale)
    if trained_by is None:
        return learner
    return replace(learner, estimator=TrainedBy(trained_by), init_meta=trained_by.init_meta)


def pixels() -> Net:
    """The embedding that is none: a picture as a vector of its pixels; nothing to learn.

    >>> import jax.numpy as jnp
    >>> pixels().apply({}, jnp.ones((2, 28, 28, 1))).shape
    (2, 784)
    """
    return Net(lambda key: {}, lambda params, x: x.reshape(x.shape[0], -1))
