"""How the inner problem is solved, and what is kept of the way for its derivative."""

from bilevel.inner.checkpointing import Checkpointing, Every, Offload, Sqrt, Tree
from bilevel.inner.closed_form import ClosedForm, prototypes
from bilevel.inner.converged import Converged
from bilevel.inner.differentiable import differentiable
from bilevel.inner.gradient import Gradient, GradientState, unroll
from bilevel.inner.proximal import proximal
from bilevel.inner.ridge import Ridge
from bilevel.inner.simplex_qp import simplex_qp
from bilevel.inner.svm import Svm

__all__ = [
    "Checkpointing",
    "ClosedForm",
    "Converged",
    "Every",
    "Gradient",
    "GradientState",
    "Offload",
    "Ridge",
    "Sqrt",
    "Svm",
    "Tree",
    "differentiable",
    "prototypes",
    "proximal",
    "simplex_qp",
    "unroll",
]
