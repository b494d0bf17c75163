"""Calibration: whether an answer given with 80% confidence is right in 80% of the cases."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.train.intervals import Curve

NUM_BINS = 15


class Calibration(NamedTuple):
    """How far the confidence of the answers can be believed, after 0..K adaptation steps.

    Bin m holds the query examples with a confidence in (m/M, (m+1)/M], over all tasks.

    Args:
        count: examples in each bin, `[K+1, bins]`.
        confidence: their mean confidence; NaN in an empty bin.
        accuracy: the share of them that is right; NaN in an empty bin.
        ece: expected calibration error, `[K+1]`.
        overconfidence: mean confidence minus accuracy, `[K+1]`; below 0 the answers are too modest.
        nll: negative log likelihood of the true class, mean over tasks with its interval.
        brier: Brier score, likewise.
    """

    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    ece: np.ndarray
    overconfidence: np.ndarray
    nll: Curve
    brier: Curve

    @property
    def num_examples(self) -> int:
        """Query examples that were judged."""
        return int(self.count[0].sum())

    def as_json(self) -> dict[str, Any]:
        """Plain lists and numbers; the diagram before and after adaptation, None in an empty bin."""

        def diagram(step: int) -> dict[str, list]:
            rows = {"confidence": self.confidence[step], "accuracy": self.accuracy[step]}
            filled = {
                name: [float(v) if n else None for v, n in zip(row, self.count[step], strict=True)]
                for name, row in rows.items()
            }
            return {"count": self.count[step].astype(int).tolist(), **filled}

        return {
            "num_bins": self.count.shape[1],
            "bins": "equal width, pooled over all query examples",
            "num_examples": self.num_examples,
            "ece": self.ece.tolist(),
            "overconfidence": self.overconfidence.tolist(),
            "nll": self.nll.as_json(),
            "brier": self.brier.as_json(),
            "before": diagram(0),
            "after": diagram(-1),
        }


def tally(logits: jax.Array, labels: jax.Array, num_bins: int = NUM_BINS) -> dict[str, jax.Array]:
    """What one task adds to a `Calibration`; sums over tasks make the diagram.

    Args:
        logits: `[n, ways]`.
        labels: int `[n]`; an example with label −1 is padding and counts nowhere.
        num_bins: M.

    Returns:
        `bins [num_bins, 3]`: examples, summed confidence, right answers in each bin; and the task's mean
        `nll` and `brier`.

    >>> found = tally(jnp.log(jnp.array([[0.9, 0.1], [0.7, 0.3]])), jnp.array([0, 1]), num_bins=2)
    >>> print(found["bins"][1].tolist()[::2], found["brier"].round(2))
    [2.0, 1.0] 0.5
    """
    real = (labels >= 0).astype(jnp.float32)
    log_odds = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    odds = jnp.exp(log_odds)
    truth = jax.nn.one_hot(labels, logits.shape[-1], dtype=odds.dtype)
    confidence = odds.max(-1)
    right = (logits.argmax(-1) == labels).astype(odds.dtype)
    place = jnp.clip(jnp.ceil(confidence * num_bins) - 1, 0, num_bins - 1).astype(jnp.int32)
    rows = jnp.stack([jnp.ones_like(confidence), confidence, right], axis=-1) * real[:, None]
    count = jnp.maximum(real.sum(), 1)
    # where, not a product: 0 · (−∞) of a certain answer would be NaN.
    nll = -jnp.sum(jnp.where(truth > 0, log_odds, 0.0), axis=-1)
    brier = jnp.sum((odds - truth) ** 2, axis=-1) * real
    return {
        "bins": jnp.zeros((num_bins, 3), odds.dtype).at[place].add(rows),
        "nll": nll.sum() / count,
        "brier": brier.sum() / count,
    }


def calibration(bins: np.ndarray, nll: Curve, brier: Curve) -> Calibration:
    """The figures that follow from the summed bins of all tasks.

        ECE = Σ_m n_m/n · |accuracy_m − confidence_m|

    Args:
        bins: `[K+1, num_bins, 3]`, sums over tasks of what `tally` gave.
        nll, brier: means over tasks.

    Biased: upwards by noise, by about √(1/n) for n examples; compare only figures of equal n and bins.

    Reference: Naeini, Cooper, Hauskrecht, 2015; Guo et al., 2017.

    >>> none = Curve(np.zeros(1), np.zeros(1))
    >>> print(calibration(np.array([[[0.0, 0.0, 0.0], [4.0, 3.2, 2.0]]]), none, none).ece.round(3))
    [0.3]
    """
    bins = np.asarray(bins, np.float64)
    count, confidence, right = np.moveaxis(bins, -1, 0)
    total = count.sum(-1)
    with np.errstate(invalid="ignore"):
        ece = np.abs(right - confidence).sum(-1) / total
        over = (confidence - right).sum(-1) / total
        return Calibration(count, confidence / count, right / count, ece, over, nll, brier)
