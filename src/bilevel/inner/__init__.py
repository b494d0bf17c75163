"""How the inner problem is solved."""

from bilevel.inner.differentiable import differentiable
from bilevel.inner.gradient import Gradient, GradientState, unroll

__all__ = ["Gradient", "GradientState", "differentiable", "unroll"]
