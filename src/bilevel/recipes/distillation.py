"""Dataset distillation: a few synthetic images from which a network learns what thousands teach."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel as bl
from bilevel.learners.supervised import supervised
from bilevel.nets import Net
from bilevel.problem import Estimator, Key, Learner, Params
from bilevel.recipes.experiment import Experiment
from bilevel.tasks.few_beside_many import FewBesideMany, few_beside_many
from bilevel.tasks.mnist import mnist

_MEAN, _STD = 0.1307, 0.3081  # of MNIST's pixels
_SIDE, _CLASSES = 28, 10
NUM_TRAIN = 50_000  # the other 10 000 training images are for --validation.every
_SCRATCH_STEPS = 30
_FIRST_HEAD = 0.1  # of the usual spread of the last layer


def distillation(
    net: Net,
    start: Callable[[Key], jax.Array],
    labels: jax.Array,
    *,
    init: Callable[[Key], Params] | None = None,
    num_classes: int = _CLASSES,
    num_steps: int = 10,
    rate: float = 0.02,
    soft_labels: bool = False,
    estimator: Estimator | None = None,
) -> Learner:
    """Learn the images that a network is trained on, their labels, and how far each step goes.

        min over θ = (x̃, α, ỹ)  E over φ₀, queries [ CE(φ_K, query) ],   φₖ₊₁ = φₖ − e^{αₖ} ∇φ CE(φₖ, x̃, ỹ)

    The inner loop reads θ alone: the support of a task is not looked at.

    Args:
        net: images `[n, ...]` to logits `[n, num_classes]`.
        start: `start(key) -> images [n, ...]`, where the synthetic images begin.
        labels: int `[n]`, the class of each synthetic image.
        init: `init(key) -> params`, where the network starts; `net.init` when left out: a new one each time.
        num_classes: of the labels.
        num_steps: K; each step has a learned rate of its own, later ones use the last.
        rate: where the rates start.
        soft_labels: learn a distribution over the classes for each image too; it starts near its class.
        estimator: `Mixed()` when left out.

    Returns:
        A `Learner` whose meta is `{"images": [n, ...], "log_rates": [K]}`, and "labels" `[n, num_classes]`
        (logits) where they are soft.

    Raises:
        ValueError: for a rate that is not positive, no steps, or labels out of range.

    Cost: K gradients on n images, about four times that for their derivative, and one gradient on the query;
    memory of K copies of the network, or of the checkpointing of the estimator. Exact for the K steps.

    Reference: Wang, Zhu, Torralba, Efros, Dataset distillation, 2018; Maclaurin, Duvenaud, Adams, 2015, who
    learn training data and rates by gradients first; soft labels: Sucholutsky, Schonlau, 2019.

    >>> net = bl.nets.mlp([4, 2])
    >>> learner = distillation(net, lambda key: jnp.zeros((2, 4)), jnp.arange(2), num_classes=2, num_steps=3)
    >>> {name: leaf.shape for name, leaf in sorted(learner.init_meta(jax.random.key(0)).items())}
    {'images': (2, 4), 'log_rates': (3,)}
    """
    classes = np.asarray(labels)
    if not rate > 0 or num_steps < 1 or classes.min() < 0 or classes.max() >= num_classes:
        raise ValueError(
            "distillation needs a positive rate, at least one step and labels in 0..num_classes-1, got "
            f"rate={rate}, num_steps={num_steps}, num_classes={num_classes}, labels {classes.tolist()[:12]}"
        )
    one_hot = jax.nn.one_hot(classes, num_classes)
    first_net = net.init if init is None else init
    problem, predict = supervised(
        net,
        bl.learners.cross_entropy,
        init=lambda meta, key: first_net(key),
        assemble=lambda params, meta, x: (params, x),
    )

    def init_meta(key):
        meta = {"images": start(key), "log_rates": jnp.full(num_steps, jnp.log(jnp.asarray(rate, float)))}
        return meta | {"labels": 4.0 * one_hot} if soft_labels else meta

    def inner_loss(params, meta, batch, key):
        targets = jax.nn.softmax(meta["labels"]) if soft_labels else one_hot
        return bl.learners.cross_entropy(net.apply(params, meta["images"]), targets)[0]

    def optimizer(meta):
        return optax.sgd(lambda step: jnp.exp(meta["log_rates"][jnp.minimum(step, num_steps - 1)]))

    solver = bl.inner.Gradient(optimizer, num_steps)
    estimator = bl.hypergrad.Mixed() if estimator is None else estimator
    return Learner(replace(problem, inner_loss=inner_loss), solver, estimator, init_meta, predict)


def mnist_net(name: str, width: int) -> Net:
    """A network for images `[n, 28, 28]` in 0..1: "linear", "mlp" or "conv4".

    >>> net = mnist_net("linear", 0)
    >>> net.apply(net.init(jax.random.key(0)), jnp.zeros((3, 28, 28))).shape
    (3, 10)
    """
    if name == "conv4":
        # No batch statistics: a network trained on ten synthetic images has to judge real ones one by one.
        net, shape = bl.nets.conv4(_CLASSES, width, norm="group"), (_SIDE, _SIDE, 1)
    else:
        hidden = [] if name == "linear" else [width]
        net = bl.nets.mlp([_SIDE**2, *hidden, _CLASSES], jax.nn.gelu)  # smooth, unlike ReLU
        shape = (_SIDE**2,)

    def init(key):
        # Small outputs at first, or what a random start says by chance outweighs what a few steps teach.
        params = net.init(key)
        head = {**params["head"], "w": _FIRST_HEAD * params["head"]["w"]}
        return {**params, "head": head}

    return Net(init, lambda params, x: net.apply(params, (x.reshape(-1, *shape) - _MEAN) / _STD))


@dataclass(frozen=True)
class Distillation:
    """Distil MNIST's 50 000 training digits into a few synthetic images of each class."""

    num_meta_steps: int = 3000
    """Outer steps."""
    seed: int = 0
    """All randomness of the run follows from it."""
    net: Literal["linear", "mlp", "conv4"] = "mlp"
    """What is trained on the images."""
    width: int = 128
    """Hidden units of the mlp, or filters of conv4."""
    init: Literal["fixed", "random"] = "fixed"
    """Whether the network starts at the same parameters each time, which the images come to need, or not."""
    per_class: int = 1
    """Synthetic images of each class."""
    num_steps: int = 10
    """Inner steps, K, all of them on all synthetic images."""
    rate: float = 0.1
    """Where the learned inner rates start."""
    soft_labels: bool = False
    """Learn a distribution over the classes for each image too."""
    start: Literal["real", "noise"] = "noise"
    """Where the images begin: at random real ones, or at noise of their mean and spread."""
    batch_size: int = 256
    """Real images of an outer loss."""
    num_tasks: int = 1
    """Starts of the network in an outer step; several where they are random."""
    estimator: Literal["mixed", "unroll"] = "mixed"
    """Both are exact; unroll is reverse over reverse."""
    checkpoint: int | None = None
    """Keep every so-many-th inner state only, and compute the steps between again: for many steps."""
    learning_rate: float = 0.02
    """Of the outer Adam, at the start; it falls to a hundredth along a cosine."""
    eval_tasks: int | None = None
    """Trainings of an evaluation; left out, 2 from a fixed start and 20 from random ones."""
    data: Path | None = None
    """mnist.npz or a folder with it, else BILEVEL_DATA and the cache are tried."""
    download: bool = False
    """Get MNIST's official files into the cache folder when no data is found."""
    loop: bl.Options = field(default_factory=lambda: bl.Options(chunk_size=100, checkpoint_every=500))

    def build(self) -> Experiment:
        """Put the experiment together."""
        net = mnist_net(self.net, self.width)
        train, validation, test = self._samplers()
        fixed = self.init == "fixed"
        init = partial(_first_params, net, jax.random.key(self.seed)) if fixed else net.init
        scratch = bl.learners.from_scratch(net, bl.learners.cross_entropy, optax.adam(3e-3), _SCRATCH_STEPS)
        scratch = replace(scratch, problem=replace(scratch.problem, init=lambda meta, key: init(key)))
        count = _CLASSES * self.per_class
        trainings = self.eval_tasks or (2 if fixed else 20)
        return Experiment(
            learner=self._learner(net, init, train),
            optimizer=optax.chain(
                optax.clip_by_global_norm(1.0),  # a start that diverges must not spoil the images
                optax.adam(optax.cosine_decay_schedule(self.learning_rate, self.num_meta_steps, alpha=0.01)),
            ),
            sample_tasks=bl.tasks.batch(train, self.num_tasks),
            sample_test=test,
            sample_validation=validation,
            protocol=(
                f"MNIST's 10 000 test images after {self.num_steps} steps on {count} synthetic ones, from "
                f"{'one known start' if fixed else 'random starts'}; from scratch: {_SCRATCH_STEPS} steps of "
                f"Adam on {count} real ones"
            ),
            eval_steps=self.num_steps,
            eval_tasks=trainings,
            scratch=scratch,
            chance={"query_accuracy": 1 / _CLASSES},
            meta_figures=_largest_rates,
            meta_lines=lambda meta: {"inner rate": np.exp(np.asarray(meta["log_rates"]))},
            meta_pictures=lambda meta: pictures(meta["images"], self.per_class),
        )

    def _samplers(self) -> tuple[FewBesideMany, FewBesideMany, FewBesideMany]:
        images, labels, *test = mnist(self.data, self.download)
        held = images[NUM_TRAIN:], labels[NUM_TRAIN:]
        images, labels = images[:NUM_TRAIN], labels[:NUM_TRAIN]
        train = few_beside_many(images, labels, shots=self.per_class, size=self.batch_size)
        whole = few_beside_many(images, labels, shots=self.per_class, test=held)
        return train, whole, few_beside_many(images, labels, shots=self.per_class, test=(test[0], test[1]))

    def _learner(self, net: Net, init: Callable[[Key], Params], train: FewBesideMany) -> Learner:
        def start(key):
            if self.start == "real":
                return train(key).support[0]
            return _MEAN + _STD * jax.random.normal(key, (_CLASSES * self.per_class, _SIDE, _SIDE))

        kind = bl.hypergrad.Mixed if self.estimator == "mixed" else bl.hypergrad.Unroll
        return distillation(
            net,
            start,
            jnp.repeat(jnp.arange(_CLASSES), self.per_class),
            init=init,
            num_steps=self.num_steps,
            rate=self.rate,
            soft_labels=self.soft_labels,
            estimator=kind(self.checkpoint),
        )


def pictures(images: jax.Array, per_class: int) -> dict[str, np.ndarray]:
    """Synthetic images as pictures in 0..1, by class: one scale for all of them, their mean in the middle.

    Args:
        images: `[classes * per_class, height, width]`, any values, sorted by class.
        per_class: images of each class.

    >>> {name: rows.shape for name, rows in pictures(jnp.ones((4, 2, 2)), 2).items()}
    {'0': (2, 2, 2), '1': (2, 2, 2)}
    """
    values = np.asarray(images, np.float32)
    spread = np.quantile(np.abs(values - _MEAN), 0.995)  # a few far pixels must not make the rest grey
    shown = np.clip(0.5 + 0.5 * (values - _MEAN) / max(float(spread), 1e-6), 0, 1)
    return {str(i): rows for i, rows in enumerate(shown.reshape(-1, per_class, *values.shape[1:]))}


def _largest_rates(meta: dict[str, jax.Array]) -> dict[str, float]:
    rates = np.exp(np.asarray(meta["log_rates"]))
    return {"smallest inner rate": float(rates.min()), "largest inner rate": float(rates.max())}


def _first_params(net: Net, first: Key, key: Key) -> Params:
    """The start that does not depend on the key."""
    return net.init(first)
