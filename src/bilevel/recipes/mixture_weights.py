"""How much of each source of text to train a small language model on, learned for a target."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel as bl
from bilevel.nets import Net
from bilevel.problem import Estimator, Learner, Meta, Task
from bilevel.recipes.experiment import Experiment
from bilevel.tasks import Fixed
from bilevel.tasks.text_sources import TextSources, read_sources, small_languages
from bilevel.train.along import with_num_steps


def mixture_weights(
    net: Net,
    names: tuple[str, ...],
    *,
    optimizer: optax.GradientTransformation | None = None,
    num_steps: int = 50,
    batch_size: int = 8,
    query_size: int = 64,
    estimator: Estimator | None = None,
    learned: bool = True,
) -> Learner:
    """Train a language model on a weighted mixture of sources; learn the weights by its loss on a target.

        min over θ  CE(φ_K; target)   with   φₖ₊₁ = φₖ + optimizer(∇φ Σ_s softmax(θ)_s CE(φₖ; source s))

    A step draws `batch_size` windows of each source by its key, a query `query_size` windows of the target.

    Args:
        net: tokens `[n, length]` to logits `[n, length, vocabulary]`.
        names: of the S sources.
        optimizer: of the inner loop; Adam at 3e-3 when left out.
        num_steps: K.
        batch_size: windows of each source in an inner step.
        query_size: windows of the target in an outer loss, and in the figures.
        estimator: `Mixed()` when left out.
        learned: False weighs all sources alike; meta is empty then.

    Returns:
        A `Learner` whose meta is `{"logits": [S]}`; all zero, that is alike, at first. Support is tokens int
        `[S, N, length + 1]`, query `[1, M, length + 1]`.

    Raises:
        ValueError: for fewer than two sources, or a size below 1.

    Cost: that of the estimator; an inner gradient sees `S * batch_size` windows. The draws of a query make it
    noisy, not biased; a short K favours what is learned first, the frequency of letters.

    Reference: Xie et al., DoReMi, 2023, who fit the mixture by a proxy model and group DRO (Sagawa et al.,
    2020); Pan et al., ScaleBiO, 2025, this problem by a penalty in a single loop; Choe et al., SAMA, 2023.

    >>> net = bl.nets.transformer(vocab_size=5, width=8, num_layers=1, num_heads=2, max_length=4)
    >>> mixture_weights(net, ("a", "b")).init_meta(jax.random.key(0))["logits"].shape
    (2,)
    """
    count = len(names)
    if count < 2 or min(batch_size, query_size) < 1:
        raise ValueError(
            "mixture_weights needs at least two sources and batches of at least 1, got "
            f"{count} sources, batch_size={batch_size}, query_size={query_size}"
        )

    def losses(params, tokens, size, key):
        """Mean cross-entropy in each row of texts, nats a token: `[S]`."""
        rows, length = tokens.shape[0], tokens.shape[2]
        drawn = jax.random.randint(key, (rows, size), 0, tokens.shape[1])
        tokens = jnp.take_along_axis(tokens, drawn[:, :, None], 1).reshape(rows * size, length)
        logs = jax.nn.log_softmax(net.apply(params, tokens[:, :-1]))
        # A product with one-hot rows, whose derivatives are elementwise.
        right = jnp.sum(logs * jax.nn.one_hot(tokens[:, 1:], logs.shape[-1], dtype=logs.dtype), -1)
        return -right.reshape(rows, -1).mean(1)

    def inner_loss(params, meta, batch, key):
        return weights_of(meta, count) @ losses(params, batch, batch_size, key)

    def outer_loss(params, meta, batch, key):
        return losses(params, batch, query_size, key).mean()

    def metrics(params, meta, batch, key):
        target = batch.shape[0] == 1
        figures = {"loss": losses(params, batch, query_size if target else batch_size, key).mean()}
        if target:  # once is enough
            weights = weights_of(meta, count)
            figures |= {f"weight_{name}": weights[i] for i, name in enumerate(names)}
        return figures

    problem = bl.Problem(lambda meta, key: net.init(key), inner_loss, outer_loss, metrics)
    solver = bl.inner.Gradient(optax.adam(3e-3) if optimizer is None else optimizer, num_steps)
    estimator = bl.hypergrad.Mixed() if estimator is None else estimator
    return Learner(
        problem,
        solver,
        estimator if learned else bl.hypergrad.Unroll(),
        (lambda key: {"logits": jnp.zeros(count)}) if learned else (lambda key: {}),
    )


def weights_of(meta: Meta, count: int) -> jax.Array:
    """Weights of the sources, `[count]`, which add up to 1; alike where meta has none.

    >>> weights_of({}, 4).tolist()
    [0.25, 0.25, 0.25, 0.25]
    """
    return jax.nn.softmax(meta["logits"] if "logits" in meta else jnp.zeros(count))


@dataclass(frozen=True)
class MixtureWeights:
    """Learn how much of each source of text a small language model is to be trained on, for a target."""

    num_meta_steps: int = 40
    """Outer steps; with --estimator online an outer step is one inner step, so take hundreds."""
    seed: int = 0
    """All randomness of the run follows from it."""
    estimator: Literal["mixed", "truncated", "sama", "one-step", "pes", "online"] = "mixed"
    """mixed goes through all inner steps, truncated through the last ones; sama and one-step see the last
    one; pes and online (a penalty in a single loop) keep one training going while the weights change."""
    num_steps: int = 50
    """Inner steps, K."""
    truncation: int = 10
    """Of truncated the steps that are differentiated, of pes the steps of a window."""
    rate: float = 3e-3
    """Of the inner Adam."""
    batch_size: int = 8
    """Windows of each source in an inner step."""
    query_size: int = 64
    """Windows of the target in an outer step."""
    width: int = 32
    """Of the transformer."""
    num_layers: int = 2
    """Of the transformer."""
    length: int = 32
    """Tokens of a window."""
    learning_rate: float = 0.2
    """Of the outer Adam."""
    eval_steps: int = 300
    """Inner steps of the full training that an evaluation runs with the learned weights."""
    eval_tasks: int = 2
    """Trainings of an evaluation, each from its own random start."""
    sources: Path | None = None
    """A folder with a file or folder of text for each source; six small languages when left out."""
    target: Path | None = None
    """A file or folder of text that the model is for; goes with --sources."""
    loop: bl.Options = field(default_factory=lambda: bl.Options(chunk_size=5, checkpoint_every=10))

    def __post_init__(self):
        if (self.sources is None) != (self.target is None):
            raise ValueError("--sources FOLDER and --target FILE go together: give both, or neither")

    def build(self) -> Experiment:
        """Put the experiment together."""
        text = self._text()
        support, query, test = (jnp.asarray(part) for part in (text.support, text.query, text.test))
        net = bl.nets.transformer(
            len(text.alphabet), self.width, self.num_layers, num_heads=4, max_length=self.length
        )

        def learner(**more):
            return mixture_weights(
                net,
                text.names,
                optimizer=optax.adam(self.rate),
                num_steps=1 if self.estimator == "online" else self.num_steps,
                batch_size=self.batch_size,
                query_size=self.query_size,
                **more,
            )

        # What the target's own text teaches, in place of all sources; the weights do not matter then.
        alone = Task(jnp.broadcast_to(query, (len(text.names), *query.shape[1:])), test)
        uniform = learner(learned=False)
        return Experiment(
            learner=learner(estimator=self._estimator()),
            optimizer=optax.adam(self.learning_rate),
            sample_tasks=bl.tasks.batch(Fixed(Task(support, query)), 1),
            sample_test=Fixed(Task(support, test)),
            protocol=(
                f"nats a byte on the target's second half after {self.eval_steps} steps of training on "
                f"{', '.join(text.names)}"
            ),
            eval_steps=self.eval_steps,
            eval_tasks=self.eval_tasks,
            other_tests={"trained on the target's first half alone": Fixed(alone)},
            scratch=with_num_steps(uniform, self.eval_steps),
            chance={"query_loss": float(np.log(len(text.alphabet)))},
            meta_figures=lambda meta: self._figures(meta, text.names),
        )

    def _text(self) -> TextSources:
        if self.sources is None or self.target is None:
            return small_languages(self.length, seed=self.seed)
        return read_sources(self.sources, self.target, self.length)

    def _estimator(self) -> Estimator:
        made: dict[str, Callable[[], Estimator]] = {
            "mixed": lambda: bl.hypergrad.Mixed(checkpoint=1),
            "truncated": lambda: bl.hypergrad.Truncated(self.truncation),
            "sama": bl.hypergrad.Sama,
            "one-step": lambda: bl.hypergrad.OneStep(self.rate),
            "pes": lambda: bl.hypergrad.PES(0.1, num_pairs=4, truncation=self.truncation, chunk=1),
            "online": lambda: bl.hypergrad.F2sa(10.0),
        }
        return made[self.estimator]()

    @staticmethod
    def _figures(meta: Meta, names: tuple[str, ...]) -> dict[str, float]:
        weights = np.asarray(weights_of(meta, len(names)))
        return {f"weight of {name}": float(w) for name, w in zip(names, weights, strict=True)}
