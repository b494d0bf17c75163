"""R2-D2: ridge regression on a learned embedding, solved exactly for every task."""

import jax
import jax.numpy as jnp

from bilevel.hypergrad.requirements import require_positive
from bilevel.inner import Ridge
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

# Ridge on features and targets that are given, with meta its penalty.
_RIDGE = Ridge(features=lambda rho, x: x, penalty=lambda rho: rho)


def r2d2(net: Net, ways: int, *, penalty: float = 1.0, scale: float = 5.0) -> Learner:
    """Learn an embedding on which ridge regression to the classes' one-hot codes tells them apart.

        φ = argmin |X φ − Y|² + λ |φ|² = Xᵀ (X Xᵀ + λ I)⁻¹ Y,   logits(x) = s embed(θ, x) φ

    λ and s are learned with the embedding, as logarithms. The paper also learns a shift of all logits; with
    a softmax it has no effect at all, so it is left out. Labels of −1 are padding and count nowhere; a class
    without support is never answered.

    Args:
        net: an embedding, `x [n, ...] -> [n, d]`, for instance `conv4(None, 64)`.
        ways: number of classes of a task.
        penalty: where λ starts.
        scale: where s starts.

    Returns:
        A `Learner` whose meta is `{"embed": ..., "log_penalty", "log_scale"}`; params are
        `{"weights" [d, ways], "present" [ways]}`.

    Raises:
        ValueError: when `ways` is below 2, or `penalty` or `scale` is not positive.

    Cost: one pass through the network each for support and query, and that of `bl.inner.Ridge`. Exact.

    Reference: Bertinetto, Henriques, Torr, Vedaldi, Meta-learning with differentiable closed-form solvers,
    2019.

    >>> import bilevel as bl
    >>> learner = r2d2(bl.nets.mlp([2, 8, 4]), ways=3)
    >>> meta = learner.init_meta(jax.random.key(0))
    >>> task = bl.Task((jnp.eye(3, 2), jnp.arange(3)), None)
    >>> params = bl.adapt(learner, meta, task, jax.random.key(1))
    >>> params["weights"].shape, learner.predict(params, meta, jnp.ones((5, 2))).shape
    ((4, 3), (5, 3))
    """
    check_ways("r2d2", ways)
    require_positive("r2d2", penalty=penalty, scale=scale)
    embed, embed_noisily = embed_with(net), embed_noisily_with(net)
    plain = Problem(lambda rho, key: jnp.zeros(0), _RIDGE.loss, _RIDGE.error)

    def init_meta(key):
        logs = {"log_penalty": penalty, "log_scale": scale}
        return {"embed": net.init(key)} | {n: jnp.log(jnp.asarray(v, float)) for n, v in logs.items()}

    def regression(meta, support):
        """The features and codes of a support, padding as rows of zeros, and Ridge's penalty ρ = λ / n."""
        x, labels = support
        features = embed(meta, x)
        codes = memberships(labels, ways, features.dtype)
        real = (labels >= 0).astype(features.dtype)[:, None]
        return (features * real, codes), jnp.exp(meta["log_penalty"]) / len(labels)

    def fit(meta, support):
        batch, rho = regression(meta, support)
        weights = _RIDGE.solve(plain, rho, Task(batch, None), jax.random.key(0)).params
        return {"weights": weights, "present": jnp.minimum(batch[1].sum(0), 1)}

    def inner_loss(params, meta, batch):
        batch, rho = regression(meta, batch)
        return _RIDGE.loss(params["weights"], rho, batch, jax.random.key(0))

    def answer(params, meta, features):
        return mask_absent(jnp.exp(meta["log_scale"]) * features @ params["weights"], params["present"])

    return closed_form_learner(
        "r2d2",
        init_meta,
        fit,
        inner_loss,
        logits=lambda params, meta, x: answer(params, meta, embed(meta, x)),
        noisy_logits=lambda params, meta, x, key: answer(params, meta, embed_noisily(meta, x, key)),
    )
