"""Baseline++: a classifier pretrained on all classes at once, whose head is trained anew for every task."""

import optax

from bilevel.hypergrad import Unroll
from bilevel.hypergrad.requirements import require_count, require_positive
from bilevel.inner import Gradient
from bilevel.learners.embedding import check_ways, embed_with
from bilevel.learners.losses import cross_entropy
from bilevel.learners.pretraining import TrainedBy, cosine_head
from bilevel.nets import Net
from bilevel.problem import Learner, Problem


def baseline_pp(
    net: Net,
    ways: int,
    width: int,
    *,
    scale: float = 10.0,
    optimizer: optax.GradientTransformation | None = None,
    num_steps: int = 100,
    trained_by: Learner | None = None,
) -> Learner:
    """Freeze a pretrained embedding, and train a new cosine head on the support of each task.

        φ₀ random,  φₖ₊₁ = φₖ + optimizer(∇ loss(s cos(embed(θ, x), φₖ), y)),  θ pretrained

    The paper takes minibatches of 4 of the support; here every step reads all of it.

    Args:
        net: an embedding, `x [n, ...] -> [n, width]`.
        ways: number of classes of a task.
        width: of the features.
        scale: s.
        optimizer: of the new head; gradient descent with rate 0.1 and momentum 0.9 by default.
        num_steps: inner steps.
        trained_by: the learner that trains the embedding, `pretraining(net, cosine_head(width, classes))`;
            they share meta. Without one the embedding is trained through the inner loop.

    Returns:
        A `Learner` whose meta is that of `trained_by`, else `{"embed": ...}`; params are
        `{"w" [ways, width]}`.

    Raises:
        ValueError: when `ways` is below 2, or a figure is not positive.

    Cost: one pass through the network each for support and query a step; a compiler computes the frozen
    part once.

    Reference: Chen, Liu, Kira, Wang, Huang, A closer look at few-shot classification, 2019.

    >>> import bilevel as bl, jax, jax.numpy as jnp
    >>> learner = baseline_pp(bl.nets.mlp([2, 8, 4]), ways=3, width=4, num_steps=5)
    >>> meta = learner.init_meta(jax.random.key(0))
    >>> task = bl.Task((jnp.eye(3, 2) + 1, jnp.arange(3)), None)
    >>> bl.adapt(learner, meta, task, jax.random.key(1))["w"].shape
    (3, 4)
    """
    check_ways("baseline_pp", ways)
    require_positive("baseline_pp", scale=scale)
    require_count("baseline_pp", width=width, num_steps=num_steps)
    embed, head = embed_with(net), cosine_head(width, ways, scale=scale)

    def predict(params, meta, x):
        return head.apply(params, embed(meta, x))

    def loss(params, meta, batch, key):
        x, labels = batch
        return cross_entropy(predict(params, meta, x), labels)[0]

    def metrics(params, meta, batch, key):
        x, labels = batch
        value, figures = cross_entropy(predict(params, meta, x), labels)
        return {"loss": value, **figures}

    problem = Problem(lambda meta, key: head.init(key), loss, loss, metrics)
    solver = Gradient(optimizer or optax.sgd(0.1, momentum=0.9), num_steps, hoist=True)  # embeds once
    if trained_by is None:
        return Learner(problem, solver, Unroll(), lambda key: {"embed": net.init(key)}, predict)
    return Learner(problem, solver, TrainedBy(trained_by), trained_by.init_meta, predict)
