"""How the hypergradient is obtained: one estimator a file, all on the same `Problem`.

Exact, through the steps or through a formula: `Unroll`, `Mixed`, `Forward`. Through the last steps only:
`Truncated`. Of a converged inner problem: `Implicit`, `OneStep`. Without second derivatives: `FirstOrder`,
`Reptile`, `Penalty`, `Bome`, `FiniteDifference`, `Sama`. In a single loop over minibatches: `Soba`, `Saba`,
`MaSoba`, `AmIGO`, `StocBiO`, `F2sa`. Of values alone: `EvolutionStrategies`, `PES`, `NRES`, `ScoreFunction`.
"""

from bilevel.hypergrad.amigo import AmIGO
from bilevel.hypergrad.bome import Bome
from bilevel.hypergrad.doubts import HypergradientWarning
from bilevel.hypergrad.evolution_strategies import EvolutionStrategies
from bilevel.hypergrad.f2sa import F2sa
from bilevel.hypergrad.finite_difference import FiniteDifference
from bilevel.hypergrad.first_order import FirstOrder, FirstOrderWarning
from bilevel.hypergrad.forward import Forward
from bilevel.hypergrad.implicit import Implicit
from bilevel.hypergrad.krylov import bicgstab, gmres
from bilevel.hypergrad.linear_solvers import LinearSolver, cg, direct
from bilevel.hypergrad.ma_soba import MaSoba
from bilevel.hypergrad.mixed import Mixed
from bilevel.hypergrad.multi_step import MultiStep
from bilevel.hypergrad.neumann import fixed_point, neumann
from bilevel.hypergrad.nres import NRES
from bilevel.hypergrad.nystrom import nystrom
from bilevel.hypergrad.one_call import hypergradient
from bilevel.hypergrad.one_step import OneStep
from bilevel.hypergrad.penalty import Penalty
from bilevel.hypergrad.pes import PES
from bilevel.hypergrad.reptile import Reptile
from bilevel.hypergrad.saba import Saba
from bilevel.hypergrad.sama import Sama
from bilevel.hypergrad.score_function import LeaveOneOut, MovingAverage, ScoreFunction
from bilevel.hypergrad.soba import Soba
from bilevel.hypergrad.stocbio import StocBiO
from bilevel.hypergrad.truncated import Truncated
from bilevel.hypergrad.unroll import Unroll

__all__ = [
    "NRES",
    "PES",
    "AmIGO",
    "Bome",
    "EvolutionStrategies",
    "F2sa",
    "FiniteDifference",
    "FirstOrder",
    "FirstOrderWarning",
    "Forward",
    "HypergradientWarning",
    "Implicit",
    "LeaveOneOut",
    "LinearSolver",
    "MaSoba",
    "Mixed",
    "MovingAverage",
    "MultiStep",
    "OneStep",
    "Penalty",
    "Reptile",
    "Saba",
    "Sama",
    "ScoreFunction",
    "Soba",
    "StocBiO",
    "Truncated",
    "Unroll",
    "bicgstab",
    "cg",
    "direct",
    "fixed_point",
    "gmres",
    "hypergradient",
    "neumann",
    "nystrom",
]
