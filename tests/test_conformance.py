"""The table: every estimator on every problem with an answer that it promises."""

from functools import cache

import pytest

from bilevel.testing import ESTIMATORS, PROBLEMS, applies, assert_row

case_of = cache(lambda name: PROBLEMS[name]())

# Where variants of one estimator are told apart; the others run on every problem.
TELLING = ("quadratic-momentum-20", "quadratic-schedule-5", "dead-relu-rates-5", "implicit-quadratic")
VARIANTS = ("checkpoint", "sqrt", "tree", "chunk", "truncated", "multi")
# Five steps differ from twenty in the length of a loop alone; these are held to both.
BOTH_LENGTHS = ("unroll", "mixed")
PAIRS = [
    (row, problem)
    for row in ESTIMATORS
    for problem in PROBLEMS
    if applies(ESTIMATORS[row], case_of(problem))
    and (problem in TELLING or not any(variant in row for variant in VARIANTS))
    and (problem in TELLING or row in BOTH_LENGTHS or not problem.endswith("-5"))
]


@pytest.mark.parametrize(("row", "problem"), PAIRS)
def test_table(row, problem):
    assert_row(ESTIMATORS[row], case_of(problem))


def test_every_row_is_held_to_something():
    assert {row for row, _ in PAIRS} == set(ESTIMATORS)
    assert {problem for _, problem in PAIRS} == set(PROBLEMS)
