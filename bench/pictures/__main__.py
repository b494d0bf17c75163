"""The pictures of docs/: from figures kept under docs/results/, and from small computations.

    python bench/pictures                    # make pictures: all, into docs/pictures/
    python bench/pictures memory speed       # some of them
    python bench/pictures --measure runs     # first measure anew what is kept for these

Pictures of other benchmarks (make bench-toys, bench-hpo, ...) are drawn by those.
"""

import argparse
import warnings
from pathlib import Path

import choosing
import drawn
import estimators
import kept
import learners
import runs
from style import DOCS

from bilevel import FirstOrderWarning, HypergradientWarning

MODULES = (kept, choosing, estimators, learners, drawn, runs)


def main() -> None:
    """Draws what is asked for."""
    draw = {name: picture for module in MODULES for name, picture in module.PICTURES.items()}
    measured = {name: take for module in MODULES for name, take in getattr(module, "MEASURED", {}).items()}
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(draw)}")
    options.add_argument("--measure", action="store_true", help=f"measure anew: {', '.join(measured)}")
    options.add_argument("--folder", type=Path, default=DOCS / "pictures")
    args = options.parse_args()
    unknown = sorted(set(args.names) - set(draw))
    if unknown:
        options.error(f"expected names of {', '.join(draw)}, got {', '.join(unknown)}")
    # What estimators say of themselves here is the picture: steps too few, directions too few.
    for kind in (HypergradientWarning, FirstOrderWarning):
        warnings.filterwarnings("ignore", category=kind)
    for name in args.names or draw:
        if args.measure and name in measured:
            measured[name]()
        draw[name](args.folder)


if __name__ == "__main__":
    main()
