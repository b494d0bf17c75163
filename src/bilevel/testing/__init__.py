"""Conformance tables: estimators x problems with exact answers, for tests of this package and of yours."""

from bilevel.testing.conformance import (
    ESTIMATORS,
    PROBLEMS,
    Row,
    assert_close,
    assert_matches,
    assert_trees_close,
)
from bilevel.testing.finite_differences import assert_derivative, gradient_by_differences
from bilevel.testing.problems import Answer, Case, dead_relu, quadratic

__all__ = [
    "ESTIMATORS",
    "PROBLEMS",
    "Answer",
    "Case",
    "Row",
    "assert_close",
    "assert_derivative",
    "assert_matches",
    "assert_trees_close",
    "dead_relu",
    "gradient_by_differences",
    "quadratic",
]
