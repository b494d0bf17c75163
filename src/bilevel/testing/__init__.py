"""Conformance tables: estimators x problems with exact answers, for tests of this package and of yours."""

from bilevel.testing.conformance import (
    ESTIMATORS,
    PROBLEMS,
    Row,
    applies,
    assert_close,
    assert_expected,
    assert_matches,
    assert_row,
    assert_trees_close,
)
from bilevel.testing.finite_differences import assert_derivative, gradient_by_differences
from bilevel.testing.implicit_problems import implicit_quadratic, logistic, ridge_penalties
from bilevel.testing.learner_conformance import (
    LEARNERS,
    LearnerRow,
    Nets,
    assert_learner,
    learned_accuracy,
    scratch_accuracy,
)
from bilevel.testing.problems import Answer, Case, dead_relu, quadratic

__all__ = [
    "ESTIMATORS",
    "LEARNERS",
    "PROBLEMS",
    "Answer",
    "Case",
    "LearnerRow",
    "Nets",
    "Row",
    "applies",
    "assert_close",
    "assert_derivative",
    "assert_expected",
    "assert_learner",
    "assert_matches",
    "assert_row",
    "assert_trees_close",
    "dead_relu",
    "gradient_by_differences",
    "implicit_quadratic",
    "learned_accuracy",
    "logistic",
    "quadratic",
    "ridge_penalties",
    "scratch_accuracy",
]
