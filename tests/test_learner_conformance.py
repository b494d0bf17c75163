"""Every learner of the package keeps the promises that all of them make."""

import pytest

from bilevel.testing import LEARNERS, assert_learner, learned_accuracy, scratch_accuracy


@pytest.mark.filterwarnings("ignore::bilevel.HypergradientWarning")  # six steps settle nothing
@pytest.mark.parametrize("name", LEARNERS)
def test_promises(name):
    assert_learner(LEARNERS[name])


@pytest.fixture(scope="module")
def scratch():
    return scratch_accuracy()


@pytest.mark.filterwarnings("ignore::bilevel.HypergradientWarning")
@pytest.mark.parametrize("name", [name for name, row in LEARNERS.items() if row.vectors])
def test_learns(name, scratch):
    after, before = learned_accuracy(LEARNERS[name])
    assert after > max(scratch, before) + 0.2, (
        f"{after:.3f}, {before:.3f} untrained, {scratch:.3f} from scratch"
    )
