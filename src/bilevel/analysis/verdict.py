"""From figures to plain words: trust it, trust it only if, do not trust it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bilevel.analysis.check_report import LeafReport, Trust
from bilevel.analysis.compare import Comparison

# Above this relative error, or below this cosine, a hypergradient is called wrong rather than rough.
WRONG_ERROR = 0.45
WRONG_COSINE = 0.8
NO_COSINE = 0.1


def judge(comparison: Comparison, figures: dict[str, Any], tolerance: float) -> tuple[Trust, list[str]]:
    """The verdict, and the reasons for it.

    Args:
        figures: the fields of the `CheckReport` to be.
        tolerance: relative error up to which nothing is said.
    """
    wrong = _wrong(comparison, tolerance)
    if wrong:
        return "no", wrong
    conditions = _conditions(comparison, figures, tolerance)
    return ("if", conditions) if conditions else ("yes", [])


def _wrong(comparison: Comparison, tolerance: float) -> list[str]:
    ref, found, agreed = comparison.reference, comparison.estimates, comparison.agreement
    if not np.isfinite(ref.value):
        return [f"the outer loss itself is {ref.value}: the inner loop diverges, or the loss overflows"]
    if not np.all(np.isfinite(found.grads)):
        bad = [leaf.name for leaf in comparison.leaves if not np.isfinite(leaf.estimate)]
        return [f"its hypergradient is not finite in {', '.join(bad) or 'some leaves'}"]
    said = [
        f"{names} exactly zero: {why}"
        for names, why in zero_leaves([leaf for leaf in comparison.leaves if leaf.dropped], " gets", " get")
    ]
    error = agreed.relative_error
    if not _known(comparison) or not agreed.biased or error <= tolerance:
        return said
    if not np.any(found.grads) and error > tolerance:
        return said or ["it is exactly zero, and the outer loss moves with meta"]
    if abs(agreed.cosine) < NO_COSINE:
        said.insert(0, f"it points nowhere near the gradient (cosine {agreed.cosine:.2g} with {ref.source})")
    elif agreed.cosine < 0:
        said.insert(0, f"it points the wrong way (cosine {agreed.cosine:.2g} with {ref.source})")
    elif error > WRONG_ERROR - 1e-6:
        figures = f"cosine {agreed.cosine:.3g}, {agreed.length:.3g} times the length along it"
        said.insert(
            0, f"it is off by {_percent(error)} of the gradient ({figures}), held against {ref.source}"
        )
    elif agreed.cosine < WRONG_COSINE:
        said.insert(0, f"its direction is off (cosine {agreed.cosine:.3g} with {ref.source})")
    if said and (own := _own_objective(comparison, tolerance)):
        said.append(f"{own}, so that it may well differentiate something else")
    return said


def zero_leaves(leaves: Sequence[LeafReport], one: str, many: str) -> list[tuple[str, str]]:
    """Leaves that are zero for the same reason, together: their names with a verb, and the reason."""
    groups: dict[str, list[str]] = {}
    for leaf in leaves:
        if leaf.zero:
            groups.setdefault(leaf.zero, []).append(leaf.name)
    return [(", ".join(names) + (one if len(names) == 1 else many), why) for why, names in groups.items()]


def _own_objective(comparison: Comparison, tolerance: float) -> str:
    """In words, that its value is not the outer loss; "" where it is."""
    value, expected = float(comparison.estimates.values[0]), comparison.reference.value
    if abs(value - expected) <= max(tolerance, 1e-6) * max(abs(expected), 1e-12):
        return ""
    return f"its value is {value:.6g} where the outer loss of what runs is {expected:.6g}"


def _known(comparison: Comparison) -> bool:
    return bool(comparison.reference.reliable.any()) or comparison.reference.vector is not None


def _conditions(comparison: Comparison, figures: dict[str, Any], tolerance: float) -> list[str]:
    """What the trust depends on; each completes "Trust it only if ..."."""
    ref, found, agreed = comparison.reference, comparison.estimates, comparison.agreement
    said = []
    deterministic = len(found.grads) == 1
    if not _known(comparison):
        said.append(
            "you can check it another way: no slope of this loss could be measured (finite differences with "
            "different steps disagree), and there is no exact unroll to compare it with"
        )
    elif agreed.biased and agreed.relative_error > tolerance:
        said.append(
            f"an error of {_percent(agreed.relative_error)} does no harm (cosine {agreed.cosine:.4g})"
        )
    elif not deterministic and agreed.noise > 0.5:
        said.append(
            f"you average enough: one call's noise is {agreed.noise:.2g} times the gradient, and it is "
            f"unbiased within {_percent(abs(agreed.bias) + agreed.bias_ci95)} as far as "
            f"{len(found.grads)} calls can tell"
        )
    if _known(comparison) and not ref.reliable.any():
        said.append("agreeing with the unroll is enough: finite differences are unreliable here, because "
                    "different steps disagree")  # fmt: skip
    if deterministic and (own := _own_objective(comparison, tolerance)):
        said.append(f"you want its own objective: {own}")
    said += [
        f"{names} meant to have no effect here: {why}"
        for names, why in zero_leaves(comparison.leaves, " is", " are")
    ]
    said += [f"you accept its own doubt: {doubt.rstrip('.')}" for doubt in figures["doubts"]]
    if figures["float32_error"] > max(1e-2, tolerance):
        said.append(f"rounding does no harm: in its own precision it is off by "
                    f"{_percent(figures['float32_error'])}")  # fmt: skip
    said += [f"this is mended: {fault}" for fault in figures["traces"] if "not the same" in fault]
    return said


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2g}%"
