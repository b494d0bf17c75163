"""How the hypergradient is obtained: one estimator a file, all on the same `Problem`."""

from bilevel.hypergrad.first_order import FirstOrder, FirstOrderWarning
from bilevel.hypergrad.mixed import Mixed
from bilevel.hypergrad.multi_step import MultiStep
from bilevel.hypergrad.one_call import hypergradient
from bilevel.hypergrad.unroll import Unroll

__all__ = ["FirstOrder", "FirstOrderWarning", "Mixed", "MultiStep", "Unroll", "hypergradient"]
