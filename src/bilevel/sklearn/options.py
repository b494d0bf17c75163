"""What a search is asked to do, read and refused before anything runs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bilevel.problem import Estimator
from bilevel.sklearn.models import Parameter


@dataclass(frozen=True)
class Space:
    """What is tuned.

    Args:
        bounds: of the logarithm of each parameter, by its name in the model.
        prefix: "step__" in a Pipeline.
    """

    bounds: dict[str, tuple[float, float]]
    prefix: str


def read_space(given: Any, known: Mapping[str, Parameter], prefix: str) -> Space:
    """Names, {name: (low, high)} or None, as logarithms.

    Raises:
        ValueError: for a name that cannot be tuned, or bounds that are not 0 < low < high.

    >>> read_space({"m__alpha": (1, 10)}, {"alpha": Parameter(lambda e, d: 1.0, 0.1, 1.0)}, "m__").bounds
    {'alpha': (0.0, 2.302585092994046)}
    """
    names = [prefix + name for name in known]
    space = given if isinstance(given, Mapping) else dict.fromkeys(names if given is None else given)
    if isinstance(given, str) or not space or set(space) - set(names):
        raise ValueError(
            f"param_space must name some of {names}, as a list or with (low, high), got {given!r}"
        )
    bounds = {}
    for name, pair in space.items():
        short = name.removeprefix(prefix)
        low, high = (known[short].low, known[short].high) if pair is None else _pair(name, pair)
        bounds[short] = (math.log(low), math.log(high))
    return Space(bounds, prefix)


def _pair(name: str, pair: Any) -> tuple[float, float]:
    try:
        low, high = map(float, pair)
    except (TypeError, ValueError):
        low = high = math.nan
    if not 0 < low < high < math.inf:
        raise ValueError(f"param_space[{name!r}] must be (low, high) with 0 < low < high, got {pair!r}")
    return low, high


def require_options(search: Any) -> None:
    """Refuse arguments out of range.

    Raises:
        ValueError, TypeError: naming the argument and what it got.
    """
    for name in ("num_meta_steps", "num_starts"):
        value = getattr(search, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    if not (isinstance(search.tol, int | float) and search.tol > 0):
        raise ValueError(f"tol must be positive, got {search.tol!r}")
    if isinstance(search.cv, float) and not 0 < search.cv < 1:
        raise ValueError(
            f"cv as a held-out share must be between 0 and 1, got {search.cv!r}; for folds use an int"
        )
    own = search.hypergradient
    if own is not None and (isinstance(own, type) or not isinstance(own, Estimator)):
        raise TypeError(
            "hypergradient must be an estimator such as bl.hypergrad.Implicit(bl.hypergrad.cg(100)), got "
            f"{own!r}"
        )
