"""What an estimator has to say against its own answer, brought to the user as a warning."""

import re
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from bilevel.problem import Estimator


class HypergradientWarning(UserWarning):
    """A hypergradient that its own figures give reason to doubt: unconverged, truncated, noisy."""


class FirstOrderWarning(UserWarning):
    """A meta leaf gets a hypergradient of exactly zero, because the estimator drops the path it acts by."""


def doubts_of(estimator: Any, stats: Mapping[str, float]) -> list[str]:
    """What an estimator says of these stats; nothing, of one that never doubts.

    For estimators around another one: whoever passes its stats on passes its doubts on.
    """
    return getattr(estimator, "doubts", lambda stats: [])(stats)


class Doubter:
    """Warns of an estimator's doubts, of each kind once however the figures in it change.

    >>> from bilevel.hypergrad import Implicit, cg
    >>> doubter = Doubter(Implicit(cg(1)))
    >>> stats = {"finite": 1.0, "inner_residual": 3.0, "inner_error": 0.5, "linear_residual": 0.0}
    >>> with warnings.catch_warnings(record=True) as seen:
    ...     warnings.simplefilter("always")
    ...     doubter(stats), doubter({**stats, "inner_error": 0.4})
    (None, None)
    >>> len(seen)
    1
    """

    def __init__(self, estimator: Estimator):
        self._ask = getattr(estimator, "doubts", None)
        self._said: set[str] = set()

    def __call__(self, stats: Mapping[str, Any], stacklevel: int = 2) -> None:
        """Stats are numbers, or arrays of which the mean counts (one call may stand for many tasks)."""
        figures = {name: float(np.mean(value)) for name, value in stats.items()}
        said = [] if self._ask is None else self._ask(figures)
        if not said and not figures.get("finite", 1.0) >= 1:
            said = [
                "the hypergradient or the outer loss is not finite: the inner loop diverges, or a loss "
                "divides by zero. Lower the inner rate, or find the operation with JAX_DEBUG_NANS=1"
            ]
        for sentence in said:
            kind = re.sub(r"[-+]?\b\d[\d.]*(e[-+]?\d+)?|\b(nan|inf)\b", "#", sentence)
            if kind not in self._said:
                self._said.add(kind)
                warnings.warn(sentence, HypergradientWarning, stacklevel=stacklevel + 1)

    def watch(self, stats: Mapping[str, Any], stacklevel: int = 2) -> None:
        """Warn now, or, where the stats are still being traced, each time the compiled program has them."""
        if not any(isinstance(value, Tracer) for value in stats.values()):
            self(stats, stacklevel + 1)
            return
        if self._ask is None:  # it would cost a call back from each compiled step; `stats["finite"]` tells
            return

        # Under vmap the means are sent, once: JAX would write a callback out for each row of the batch.
        @jax.custom_batching.custom_vmap
        def send(stats):
            jax.debug.callback(self, stats)
            return ()

        @send.def_vmap
        def _(size, batched, stats):
            return send(jax.tree.map(lambda s, b: s.mean(0) if b else s, stats, batched[0])), ()

        send(jax.lax.stop_gradient(dict(stats)))
