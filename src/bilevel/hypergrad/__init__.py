"""How the hypergradient is obtained: one estimator a file, all on the same `Problem`.

Exact, through the steps or through a formula: `Unroll`, `Mixed`, `Forward`. Through the last steps only:
`Truncated`. Of a converged inner problem: `Implicit`, `OneStep`. Without second derivatives: `FirstOrder`,
`Reptile`, `Penalty`, `Bome`, `FiniteDifference`, `Sama`; without them at first: `AnnealedOrder`. In a single
loop over minibatches: `Soba`, `Saba`, `MaSoba`, `AmIGO`, `StocBiO`, `F2sa`. Of values alone:
`EvolutionStrategies`, `GuidedES`, `PES`, `NRES`, `ScoreFunction`.
"""

from bilevel.hypergrad.doubts import FirstOrderWarning, HypergradientWarning
from bilevel.hypergrad.evolution.evolution_strategies import EvolutionStrategies
from bilevel.hypergrad.evolution.guided_es import GuidedES
from bilevel.hypergrad.evolution.nres import NRES
from bilevel.hypergrad.evolution.pes import PES
from bilevel.hypergrad.evolution.score_function import LeaveOneOut, MovingAverage, ScoreFunction
from bilevel.hypergrad.first_order.annealed import AnnealedOrder
from bilevel.hypergrad.first_order.bome import Bome
from bilevel.hypergrad.first_order.finite_difference import FiniteDifference
from bilevel.hypergrad.first_order.first_order import FirstOrder
from bilevel.hypergrad.first_order.penalty import Penalty
from bilevel.hypergrad.first_order.reptile import Reptile
from bilevel.hypergrad.first_order.sama import Sama
from bilevel.hypergrad.implicit.implicit import Implicit
from bilevel.hypergrad.implicit.krylov import bicgstab, gmres
from bilevel.hypergrad.implicit.linear_solvers import LinearSolver, cg, direct
from bilevel.hypergrad.implicit.neumann import fixed_point, neumann
from bilevel.hypergrad.implicit.nystrom import nystrom
from bilevel.hypergrad.implicit.one_step import OneStep
from bilevel.hypergrad.iterations.forward import Forward
from bilevel.hypergrad.iterations.mixed import Mixed
from bilevel.hypergrad.iterations.multi_step import MultiStep
from bilevel.hypergrad.iterations.truncated import Truncated
from bilevel.hypergrad.iterations.unroll import Unroll
from bilevel.hypergrad.one_call import hypergradient
from bilevel.hypergrad.single_loop.amigo import AmIGO
from bilevel.hypergrad.single_loop.f2sa import F2sa
from bilevel.hypergrad.single_loop.ma_soba import MaSoba
from bilevel.hypergrad.single_loop.saba import Saba
from bilevel.hypergrad.single_loop.soba import Soba
from bilevel.hypergrad.single_loop.stocbio import StocBiO

__all__ = [
    "NRES",
    "PES",
    "AmIGO",
    "AnnealedOrder",
    "Bome",
    "EvolutionStrategies",
    "F2sa",
    "FiniteDifference",
    "FirstOrder",
    "FirstOrderWarning",
    "Forward",
    "GuidedES",
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
