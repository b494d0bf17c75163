"""Which estimator gives which error at which cost: one quadratic, 400 steps of descent, float64."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from estimators import EXACT, error
from style import BLUE, GREEN, GREY, ORANGE, RED, save

from bilevel import hypergrad as hg
from bilevel import inner

K, DIM = 400, 3  # inner steps; dim θ
# Name, estimator, kind, cost in inner gradients: what the table of docs/choosing.md says.
_ROWS = (
    ("Mixed()", hg.Mixed(), "through the steps", 4 * K),
    ("Mixed(Sqrt())", hg.Mixed(checkpoint=inner.Sqrt()), "through the steps", 5 * K),
    ("Forward()", hg.Forward(), "through the steps", DIM * K),
    ("Truncated(100)", hg.Truncated(100), "through the steps", K + 300),
    ("Truncated(10)", hg.Truncated(10), "through the steps", K + 30),
    ("Implicit(cg(12))", hg.Implicit(hg.cg(12)), "implicit", K + 26),
    ("Implicit(cg(4))", hg.Implicit(hg.cg(4)), "implicit", K + 10),
    ("Implicit(neumann(20, 1))", hg.Implicit(hg.neumann(20, 1.0)), "implicit", K + 42),
    ("Implicit(nystrom(4, 0.01))", hg.Implicit(hg.nystrom(4, 0.01)), "implicit", K + 10),
    ("OneStep(1)", hg.OneStep(1.0), "implicit", K + 3),
    ("FiniteDifference(1)", hg.FiniteDifference(1.0), "first derivatives", K + 4),
    ("Penalty(1000)", hg.Penalty(1e3), "first derivatives", 2 * K),
    ("FirstOrder()", hg.FirstOrder(), "first derivatives", K),
    ("EvolutionStrategies(0.1, 8)", hg.EvolutionStrategies(0.1, 8), "values only", 16 * K),
    ("EvolutionStrategies(0.1, 64)", hg.EvolutionStrategies(0.1, 64), "values only", 128 * K),
)
_COLOURS = {"through the steps": BLUE, "implicit": ORANGE, "first derivatives": GREEN, "values only": RED}


def choosing(folder: Path) -> None:
    """Error and cost of each, a line each."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True)
    places = np.arange(len(_ROWS))[::-1]
    for place, (name, estimator, kind, cost) in zip(places, _ROWS, strict=True):
        found = error(estimator, K, 1.0, EXACT)
        for axis, value, start in ((left, found, 1e-10), (right, cost, 100)):
            axis.plot([start, value], [place, place], color=_COLOURS[kind], lw=1)
            axis.plot(value, place, "o", color=_COLOURS[kind])
        left.text(found * 1.7, place, f"{found:.1g}", va="center", fontsize=8)
        right.text(cost * 1.15, place, f"{cost}", va="center", fontsize=8)
        print(f"{name:<30} error {found:.1e}, {cost} inner gradients")
    for kind, colour in _COLOURS.items():
        left.plot([], [], "o-", color=colour, label=kind, lw=1)
    left.set(xscale="log", xlim=(1e-10, 40), xlabel="relative error", yticks=places)
    left.set(yticklabels=[row[0] for row in _ROWS], title="how far off")
    right.set(xscale="log", xlim=(100, 3e5), xlabel="inner gradients", title="at which cost")
    right.axvline(K, color=GREY, ls=":", lw=1)
    right.text(K * 1.2, len(_ROWS) - 0.4, "dotted: the inner loop itself", color=GREY, fontsize=8)
    figure.tight_layout()
    figure.legend(*left.get_legend_handles_labels(), ncol=4, loc="upper center", bbox_to_anchor=(0.5, 0.02))
    save(figure, folder, "choosing")


PICTURES = {"choosing": choosing}
