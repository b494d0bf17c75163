"""Ordinary training of a classifier, as a learner without an inner loop; and learners that it serves."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bilevel.hypergrad import Unroll
from bilevel.hypergrad.doubts import doubts_of
from bilevel.inner import ClosedForm
from bilevel.learners.embedding import embed_noisily_with, embed_with, unit_rows
from bilevel.learners.losses import cross_entropy
from bilevel.nets import Net
from bilevel.problem import InnerSolver, Learner, Problem


def pretraining(net: Net, head: Net, *, loss: Callable = cross_entropy) -> Learner:
    """Train an embedding and a head over all training classes at once: no tasks, no inner problem.

        min over θ  E over minibatches  loss(head(θ, embed(θ, x)), label)

    In the nouns: an inner problem with nothing to adapt, whose query is a minibatch of the whole
    classification problem (`bilevel.tasks.minibatch.Minibatch`). `TrainedBy` lends it to the learner that is
    tested.

    Args:
        net: an embedding, `x [n, ...] -> [n, d]`.
        head: `[n, d] -> [n, num_classes]`, for instance `cosine_head(64, 4800)` or `mlp([64, 4800])`.
        loss: `loss(logits, labels) -> scalar` or `-> (scalar, {metric: scalar})`.

    Returns:
        A `Learner` whose meta is `{"embed": ..., "head": ...}` and whose params are empty.

    Cost: a gradient. Exact.

    >>> import bilevel as bl
    >>> learner = pretraining(bl.nets.mlp([2, 8, 4]), cosine_head(4, 10))
    >>> meta = learner.init_meta(jax.random.key(0))
    >>> learner.predict((), meta, jnp.ones((5, 2))).shape
    (5, 10)
    """
    embed, embed_noisily = embed_with(net), embed_noisily_with(net)

    def init_meta(key):
        embed_key, head_key = jax.random.split(key)
        return {"embed": net.init(embed_key), "head": head.init(head_key)}

    def judged(logits, labels):
        result = loss(logits, labels)
        return result if isinstance(result, tuple) else (result, {})

    def predict(params, meta, x):
        return head.apply(meta["head"], embed(meta, x))

    def outer_loss(params, meta, batch, key):
        x, labels = batch
        return judged(head.apply(meta["head"], embed_noisily(meta, x, key)), labels)[0]

    def metrics(params, meta, batch, key):
        x, labels = batch
        value, figures = judged(predict(params, meta, x), labels)
        return {"loss": value, **figures}

    problem = Problem(
        init=lambda meta, key: (),
        inner_loss=lambda params, meta, batch, key: jnp.float32(0),
        outer_loss=outer_loss,
        metrics=metrics,
    )
    return Learner(problem, ClosedForm(lambda meta, support, key: ()), Unroll(), init_meta, predict)


def cosine_head(width: int, num_classes: int, *, scale: float = 10.0) -> Net:
    """Logits that are scaled cosines between features and one direction for each class.

        logits_c = s cos(features, w_c)

    Args:
        width: d, of the features.
        num_classes: how many.
        scale: s. The paper's code has 2 for few classes and 10 for more than 200.

    Raises:
        ValueError: for a width below 1 or fewer than 2 classes.

    Reference: Chen, Liu, Kira, Wang, Huang, A closer look at few-shot classification, 2019.

    >>> head = cosine_head(2, 3)
    >>> print(head.apply({"w": jnp.array([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])}, jnp.array([[3.0, 0.0]])))
    [[ 10.   0. -10.]]
    """
    if width < 1 or num_classes < 2:
        raise ValueError(f"cosine_head needs width >= 1 and num_classes >= 2, got {width}, {num_classes}")

    def init(key):
        return {"w": jax.random.normal(key, (num_classes, width)) * width**-0.5}

    return Net(init, lambda params, x: scale * unit_rows(x) @ unit_rows(params["w"]).T)


@dataclass(frozen=True)
class TrainedBy:
    """An estimator that trains meta by another learner's problem; its own learner is only tested.

        dθ = the hypergradient of `learner`, whatever problem and solver it stands beside

    Pretraining is this: what is trained (a classifier over all classes) is not what is tested (a new head
    for each task). The two share their meta.

    Args:
        learner: what is trained. Tasks of the outer loop are its tasks.

    Cost, bias: those of the learner's own estimator. It says nothing of the gradient of the tested learner's
    outer loss, and `bl.check` will find it different.

    >>> import bilevel as bl
    >>> trained = pretraining(bl.nets.mlp([2, 8, 4]), cosine_head(4, 10))
    >>> TrainedBy(trained).init(None, None, trained.init_meta(jax.random.key(0)), None, None)
    ()
    """

    learner: Learner

    def check(self, problem: Problem, solver: InnerSolver) -> None:
        """Any problem and solver: it looks at neither."""

    def init(self, problem, solver, meta, task, key):
        """The state of the learner's estimator."""
        return self.learner.estimator.init(self.learner.problem, self.learner.solver, meta, task, key)

    def estimate(self, problem, solver, meta, task, state, key):
        """The hypergradient of the learner's own problem."""
        return self.learner.estimator.estimate(
            self.learner.problem, self.learner.solver, meta, task, state, key
        )

    def doubts(self, stats) -> list[str]:
        """Those of the learner's estimator."""
        return doubts_of(self.learner.estimator, stats)
