"""What a check found, as a value and as a page of text."""

from dataclasses import dataclass, field
from typing import Literal

from bilevel.analysis.second_order import Finding

Trust = Literal["yes", "if", "no"]


@dataclass(frozen=True)
class LeafReport:
    """One leaf of meta.

    Args:
        name: `meta['init']['w']`.
        size: its elements.
        estimate, truth: the norms of the mean estimate and of the true gradient, or, where only slopes are
            known (`slopes_only`), their slopes along a random direction of the leaf. NaN where the leaf was
            not looked at.
        relative_error: of this leaf alone.
        zero: why its hypergradient is exactly zero; "" where it is not.
        dropped: whether it is zero although its true derivative is not.
    """

    name: str
    size: int
    estimate: float
    truth: float
    relative_error: float
    zero: str = ""
    dropped: bool = False


@dataclass(frozen=True)
class CheckReport:
    """What `bl.check` found.

    Args:
        trust: "yes", "if" or "no".
        reasons: in words, what `trust` depends on.
        estimator: its repr.
        compared_with: in words, what the truth was taken from.
        value: the outer loss there.
        cosine, relative_error, length, bias, bias_ci95, noise: see `Agreement`; NaN where nothing could
            be compared.
        repeats: calls with independent keys; 1 for a deterministic estimator.
        reliable, directions: how many slopes of how many could be relied on.
        kinks: along how many directions the outer loss has two slopes.
        float32_error: relative change of the hypergradient from float64 to the precision of `meta`; NaN
            where it was not compared.
        leaves: each leaf of meta.
        stats: the estimator's, float64: `inner_residual`, `linear_residual`, ...
        doubts: what the estimator says about itself.
        operations: what stops or breaks a derivative, found in the traces.
        traces: what makes it compile more than once, or not be the same twice.
        notes: what else was seen.
    """

    trust: Trust
    reasons: tuple[str, ...]
    estimator: str
    compared_with: str = ""
    value: float = float("nan")
    cosine: float = float("nan")
    relative_error: float = float("nan")
    length: float = float("nan")
    bias: float = float("nan")
    bias_ci95: float = float("nan")
    noise: float = float("nan")
    repeats: int = 0
    reliable: int = 0
    directions: int = 0
    kinks: int = 0
    float32_error: float = float("nan")
    leaves: tuple[LeafReport, ...] = ()
    stats: dict[str, float] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()
    operations: tuple[Finding, ...] = ()
    traces: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """One paragraph in plain words."""
        if self.trust == "yes":
            return "Trust it."
        opening = "Trust it only if" if self.trust == "if" else "Do not trust it:"
        joined = "; and if ".join(self.reasons) if self.trust == "if" else "; ".join(self.reasons)
        return f"{opening} {joined}."

    def __str__(self):
        return "\n".join(
            [self.estimator, *_figures(self), *_leaf_table(self.leaves), *_lists(self), self.verdict]
        )


def _figures(report: CheckReport) -> list[str]:
    if not report.compared_with:
        return []
    rows = [
        ("outer loss", f"{report.value:.6g}"),
        ("compared with", report.compared_with),
        ("slopes relied on", f"{report.reliable} of {report.directions}"),
        ("cosine", f"{report.cosine:.6f}"),
        ("relative error", f"{report.relative_error:.2g}"),
    ]
    if report.repeats > 1:
        rows += [
            ("calls", f"{report.repeats}, each with its own key"),
            ("bias along the truth", f"{report.bias:+.2g} ± {report.bias_ci95:.2g} (95%)"),
            ("noise of one call", f"{report.noise:.2g} of the gradient's norm"),
        ]
    if report.kinks:
        rows.append(("kinks", f"along {report.kinks} of {report.directions} directions"))
    if report.float32_error == report.float32_error:
        rows.append(("own precision", f"off by {report.float32_error:.2g} from float64"))
    rows += [(name, f"{value:.4g}") for name, value in report.stats.items()]
    width = max(len(name) for name, _ in rows)
    return [f"  {name:<{width}}  {value}" for name, value in rows]


def _leaf_table(leaves: tuple[LeafReport, ...]) -> list[str]:
    if not leaves:
        return []
    width = max(4, *(len(leaf.name) for leaf in leaves))
    lines = [f"  {'leaf':<{width}}  {'size':>8}  {'estimate':>10}  {'truth':>10}  {'error':>8}"]
    for leaf in leaves:
        lines.append(
            f"  {leaf.name:<{width}}  {leaf.size:>8}  {leaf.estimate:>10.4g}  {leaf.truth:>10.4g}  "
            f"{leaf.relative_error:>8.2g}"
        )
        if leaf.zero:
            lines.append(f"    exactly zero: {leaf.zero}")
    return lines


def _lists(report: CheckReport) -> list[str]:
    lines = []
    for title, items in (
        ("operations", report.operations),
        ("tracing", report.traces),
        ("the estimator says", report.doubts),
        ("notes", report.notes),
    ):
        if items:
            lines += [f"  {title}:", *(f"    {item}" for item in items)]
    return lines
