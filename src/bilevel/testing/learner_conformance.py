"""What every learner must do, whichever method it is. A new learner is one row of `LEARNERS`."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import learners, nets
from bilevel.hypergrad import FirstOrder, MultiStep
from bilevel.nets import Net
from bilevel.problem import Key, Learner, Task
from bilevel.tasks import FewShot, Minibatch, batch, classification
from bilevel.train import Options, Run, evaluate, init_state, mean_hypergradient, train
from bilevel.train.evaluate import evaluator

WAYS, SHOTS, QUERIES, CLASSES = 3, 2, 4, 12
_SIGNAL, _NUISANCE, _WIDTH = 3, 9, 16
_OPTIONS = Options(chunk_size=4, zero_leaves="allow")  # one program for all that a learner is held to


class Nets(NamedTuple):
    """The networks that a row builds its learner from, for the same inputs.

    Args:
        classifier: `x [n, ...] -> logits [n, ways]`, with an entry "head".
        embedding: `x [n, ...] -> features [n, width]`.
        ways: classes of a task.
        width: of the features.
        classes: of the whole problem, for learners that are trained as ordinary classifiers.
        pictures: whether the layers are convolutions, as in `conv4`.
    """

    classifier: Net
    embedding: Net
    ways: int
    width: int
    classes: int
    pictures: bool = False


class LearnerRow(NamedTuple):
    """A learner and what it takes to learn.

    Args:
        make: the learner, from networks.
        descent: the outer loop is plain descent with this rate, and not Adam.
        pretrained: trained on minibatches of all classes, and not on tasks.
        nested: takes networks whose parameters are lists and tuples inside dictionaries.
        vectors: learns `clusters` with a small perceptron; else it needs pictures (`bench/learners.py`).
        train_shots: examples of a class that a training task of pictures gives.
    """

    make: Callable[[Nets], Learner]
    descent: float | None = None
    pretrained: bool = False
    nested: bool = True
    vectors: bool = True
    train_shots: int = 1

    def optimizer(self, rate: float = 1e-2) -> optax.GradientTransformation:
        """Of the outer loop: Adam with this rate, or plain descent."""
        return optax.adam(rate) if self.descent is None else optax.sgd(self.descent)


def _loss(logits, labels):
    return learners.cross_entropy(logits, labels)


def _pretrained(nets_: Nets) -> Learner:
    return learners.pretraining(nets_.embedding, learners.cosine_head(nets_.width, nets_.classes))


def _normalized(net: Net) -> Net:
    """The network behind a normalization over the examples at hand, with a scale and a bias to learn."""

    def init(key):
        return {"norm": {"scale": jnp.float32(1), "bias": jnp.float32(0)}, **net.init(key)}

    def apply(params, x):
        normed = (x - x.mean(0)) * jax.lax.rsqrt(x.var(0) + 1e-5)
        rest = {name: part for name, part in params.items() if name != "norm"}
        return net.apply(rest, params["norm"]["scale"] * normed + params["norm"]["bias"])

    return Net(init, apply)


LEARNERS: dict[str, LearnerRow] = {
    "maml": LearnerRow(lambda n: learners.maml(n.classifier, _loss, num_steps=2, rates=0.1)),
    "fomaml": LearnerRow(
        lambda n: learners.maml(n.classifier, _loss, num_steps=2, rates=0.1, estimator=FirstOrder())
    ),
    "anil": LearnerRow(lambda n: learners.maml(n.classifier, _loss, num_steps=3, rates=0.3, adapt="head")),
    "boil": LearnerRow(lambda n: learners.boil(n.classifier, _loss, num_steps=2, rates=0.4), vectors=False),
    "meta-sgd": LearnerRow(
        lambda n: learners.maml(n.classifier, _loss, num_steps=2, rates=learners.PerParameter(0.1))
    ),
    "maml++": LearnerRow(
        lambda n: learners.maml_plus_plus(
            n.classifier if n.pictures else _normalized(n.classifier),
            _loss,
            num_steps=2,
            multi_step_annealing=50,
            first_order_steps=4,
        ),
        nested=False,
    ),
    "maml-multi-step": LearnerRow(
        lambda n: learners.maml(
            n.classifier, _loss, num_steps=2, rates=learners.PerLayerPerStep(0.1), estimator=MultiStep(100)
        )
    ),
    "reptile": LearnerRow(
        lambda n: learners.reptile(
            n.classifier, _loss, num_steps=5, batch_size=10 if n.pictures else None, rate=1e-2
        ),
        descent=0.5,
        vectors=False,
        train_shots=10,
    ),
    "imaml": LearnerRow(lambda n: learners.imaml(n.classifier, _loss, num_steps=20, rate=0.1, strength=1.0)),
    "cavia": LearnerRow(
        lambda n: learners.cavia(
            n.classifier,
            _loss,
            context=learners.FilmContext(100, "block_2") if n.pictures else learners.FilmContext(8, "head"),
            num_steps=2,
            rate=1.0,
        )
    ),
    "meta-curvature": LearnerRow(
        lambda n: learners.meta_curvature(
            n.classifier,
            _loss,
            num_steps=2,
            rate=0.1,
            modes=learners.conv_modes if n.pictures else learners.leaf_modes,
        )
    ),
    "warp-grad": LearnerRow(
        lambda n: learners.warp_grad(learners.linear_warps(n.classifier), _loss, num_steps=3, rate=0.1),
        nested=False,
    ),
    "protonet": LearnerRow(lambda n: learners.protonet(n.embedding, n.ways)),
    "matching-net": LearnerRow(lambda n: learners.matching_net(n.embedding, n.ways)),
    "relation-net": LearnerRow(
        lambda n: learners.relation_net(n.embedding, nets.mlp([2 * n.width, 16, 1]), n.ways)
    ),
    "r2d2": LearnerRow(lambda n: learners.r2d2(n.embedding, n.ways)),
    "metaoptnet": LearnerRow(lambda n: learners.metaoptnet(n.embedding, n.ways)),
    "baseline++": LearnerRow(
        lambda n: learners.baseline_pp(n.embedding, n.ways, n.width, trained_by=_pretrained(n)),
        pretrained=True,
    ),
    "nearest-centroid": LearnerRow(
        lambda n: learners.nearest_centroid(n.embedding, n.ways, trained_by=_pretrained(n)), pretrained=True
    ),
}


def clusters(key: Key, classes: int = CLASSES, per_class: int = SHOTS + QUERIES) -> jax.Array:
    """Examples `[classes, per_class, 12]` whose class shows in three directions of twelve.

    The other nine are noise with ten times the spread, so that what tells classes apart has to be learned
    from other classes.
    """
    mean_key, noise_key, nuisance_key = jax.random.split(key, 3)
    signal = jax.random.normal(mean_key, (classes, 1, _SIGNAL))
    signal = signal + 0.2 * jax.random.normal(noise_key, (classes, per_class, _SIGNAL))
    nuisance = 2.0 * jax.random.normal(nuisance_key, (classes, per_class, _NUISANCE))
    # A fixed turn, so that the directions are not those of single inputs.
    turn = jnp.linalg.qr(jax.random.normal(jax.random.key(7), (_SIGNAL + _NUISANCE,) * 2))[0]
    return jnp.concatenate([signal, nuisance], -1) @ turn


def sample_vectors(key: Key) -> Task:
    """A task of `WAYS` new classes of `clusters`."""
    return classification(clusters(key, WAYS), SHOTS)


def vector_nets(nested: bool = False) -> Nets:
    """Perceptrons for `clusters`; nested, with lists and tuples in their parameters."""
    inputs = _SIGNAL + _NUISANCE
    classifier, embedding = nets.mlp([inputs, 32, WAYS]), nets.mlp([inputs, 32, _WIDTH])
    if nested:
        classifier, embedding = _nested(classifier), _nested(embedding)
    return Nets(classifier, embedding, WAYS, _WIDTH, CLASSES)


def _nested(net: Net) -> Net:
    def init(key):
        params = net.init(key)
        return {"body": [(params["hidden_0"]["w"],), params["hidden_0"]["b"]], "head": params["head"]}

    def apply(params, x):
        (weights,), bias = params["body"]
        return net.apply({"hidden_0": {"w": weights, "b": bias}, "head": params["head"]}, x)

    return Net(init, apply)


def sampler(row: LearnerRow, num_tasks: int) -> Callable[[Key], Task]:
    """Batches of what the learner is trained on: tasks, or minibatches of one large problem."""
    if not row.pretrained:
        return batch(sample_vectors, num_tasks)
    images = np.asarray(clusters(jax.random.key(11), CLASSES, 40))
    labels = np.repeat(np.arange(CLASSES), 40)
    source = FewShot(images.reshape(len(labels), -1), labels, WAYS, SHOTS, QUERIES)
    return batch(Minibatch(source, 32), num_tasks)


def assert_learner(row: LearnerRow, num_tasks: int = 4) -> None:
    """Hold a learner to what all of them promise, in float32.

    It is traced once however many chunks it runs; tasks side by side give what tasks one by one give; a run
    that was cut and resumed ends with the same bits.

    Raises:
        AssertionError: saying which promise is broken.

    >>> assert_learner(LEARNERS["protonet"])  # doctest: +ELLIPSIS
    training ...
    """
    learner, sample = row.make(vector_nets(row.nested)), sampler(row, num_tasks)
    optimizer = row.optimizer()
    _assert_vmapped_is_looped(learner, sample, num_tasks)
    traces = []

    def counted(key):
        traces.append(1)
        return sample(key)

    counts = []

    def run(folder: Path | None, steps: int, resume: bool = False):
        state = init_state(learner, optimizer, sample, jax.random.key(0))
        traces.clear()
        where = None if folder is None else Run(folder, {}, resume)
        watch = [lambda state, values: counts.append(len(traces))]
        return train(learner, optimizer, counted, state, steps, options=_OPTIONS, run=where, on_chunk=watch)

    whole = run(None, 6)
    assert counts[0] > 0 and len(set(counts)) == 1, f"traced again after the first chunk: {counts}"
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), 3)
        resumed = run(Path(folder), 6, resume=True)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(_plain(whole)), jax.tree.leaves(_plain(resumed)), strict=True
    ):
        same = np.array_equal(a, b, equal_nan=True)
        assert same, f"a resumed run ends with other bits: {jax.tree_util.keystr(path)}"


def _plain(state):
    return jax.tree.map(np.asarray, state._replace(key=jax.random.key_data(state.key)))


def _assert_vmapped_is_looped(learner: Learner, sample: Callable[[Key], Task], num_tasks: int) -> None:
    state = init_state(learner, optax.sgd(1.0), sample, jax.random.key(1))
    tasks = sample(jax.random.key(2))
    looped, vmapped = (
        jax.jit(lambda meta, tasks, chunk=chunk: mean_hypergradient(
            learner, meta, tasks, state.estimator_state, jax.random.key(3), chunk
        )[0].grad)(state.meta, tasks)
        for chunk in (1, num_tasks)
    )  # fmt: skip
    named = jax.tree_util.tree_leaves_with_path(looped)
    largest = max(float(jnp.max(jnp.abs(leaf))) for _, leaf in named)
    for (path, a), b in zip(named, jax.tree.leaves(vmapped), strict=True):
        error = float(jnp.max(jnp.abs(a - b), initial=0.0))
        assert error <= 1e-3 * largest, (
            f"tasks side by side differ from tasks one by one: grad{jax.tree_util.keystr(path)} by "
            f"{error:.2g} of {largest:.2g}"
        )


def learned_accuracy(row: LearnerRow, num_meta_steps: int = 800, num_tasks: int = 4) -> tuple[float, float]:
    """The accuracy on unseen classes of `clusters` after training, and that of the learner untrained."""
    learner, sample = row.make(vector_nets(row.nested)), sampler(row, num_tasks)
    optimizer = row.optimizer()
    state = init_state(learner, optimizer, sample, jax.random.key(0))
    judge = evaluator(learner, sample_vectors, num_tasks=300)  # compiled once for both

    def accuracy(meta):
        return float(judge(meta, jax.random.key(5)).curves["query_accuracy"].mean[-1])

    before = accuracy(state.meta)
    state = train(learner, optimizer, sample, state, num_meta_steps, options=_OPTIONS)
    return accuracy(state.meta), before


def scratch_accuracy() -> float:
    """The accuracy on `clusters` of a new network trained on the support alone."""
    learner = learners.from_scratch(vector_nets().classifier, _loss, optax.adam(1e-2), 30)
    curves = evaluate(learner, {}, sample_vectors, jax.random.key(5), num_tasks=300).curves
    return float(curves["query_accuracy"].mean[-1])
