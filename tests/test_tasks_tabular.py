"""Tables and 20 newsgroups: what is where, and no figure of one part reaches another."""

import pickle
import sys
import zlib

import numpy as np
import pytest
from sklearn.utils import Bunch

from bilevel.tasks.newsgroups import newsgroups
from bilevel.tasks.tabular import BUNDLED, divide, tabular


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_set_has_three_parts_in_units_of_the_support(name):
    data = tabular(name)
    (x, y), sizes = data.support, [len(part[1]) for part in data[:3]]
    assert sizes[0] == sum(sizes) // 2 and abs(sizes[1] - sizes[2]) <= 1
    assert x.dtype == np.float32 and len(data.features) == x.shape[1]
    spread = x.std(0)[x.std(0) > 0]  # digits have pixels that are always white
    assert np.abs(x.mean(0)).max() < 1e-5 and np.abs(spread - 1).max() < 1e-4
    if data.classes:
        shares = [np.bincount(part[1], minlength=len(data.classes)) / len(part[1]) for part in data[:3]]
        assert y.dtype == np.int32 and np.abs(np.diff(shares, axis=0)).max() < 0.04
    else:
        assert y.dtype == np.float32 and abs(y.mean()) < 1e-5 and abs(y.std() - 1) < 1e-4


def test_the_parts_are_disjoint_and_follow_from_the_seed():
    x = np.arange(80.0)[:, None]
    data = divide(x, np.arange(80) % 4)
    rows = [set(part[0][:, 0].tolist()) for part in data[:3]]
    assert sum(map(len, rows)) == len(set.union(*rows)) == 80
    again, other = divide(x, np.arange(80) % 4), divide(x, np.arange(80) % 4, seed=1)
    np.testing.assert_array_equal(data.test[0], again.test[0])
    assert not np.array_equal(data.test[1], other.test[1]) or not np.array_equal(data.test[0], other.test[0])


def test_only_the_support_sets_the_scale():
    x, y = np.stack([np.arange(40.0), np.random.default_rng(0).normal(size=40)], axis=1), np.arange(40) % 2
    before = divide(x, y)
    # The first column is the row's number in other units: its ranks say which rows became the test part.
    ranks = np.argsort(np.argsort(np.concatenate([part[0][:, 0] for part in before[:3]])))
    x[ranks[-10:], 1] += 1000
    after = divide(x, y)
    np.testing.assert_array_equal(before.support[0], after.support[0])
    np.testing.assert_array_equal(before.validation[0], after.validation[0])
    assert (after.test[0][:, 1] > 100).all()


def test_a_csv_file_is_read_by_its_header(tmp_path):
    path = tmp_path / "mine.csv"
    rows = [f"{'yes' if i % 2 else 'no'},{i},{i * i / 7}" for i in range(20)]
    path.write_text("\n".join(["bought,age,income", *rows]) + "\n")
    data = tabular(path, target="bought")
    assert (data.features, data.classes) == (("age", "income"), ("no", "yes"))
    with pytest.raises(ValueError, match="no column 'sold'; it has bought, age, income"):
        tabular(path, target="sold")
    path.write_text("\n".join(["age,income", *(row.partition(",")[2] for row in rows)]))
    assert tabular(str(path)).classes == ()  # the last column holds numbers that are not whole: a regression
    path.write_text("age,bought\n31,yes\n,no\n")
    with pytest.raises(ValueError, match=r"row 3 of .*: age is '', expected a number; fill in"):
        tabular(path)
    path.write_text("age,bought\n31\n")
    with pytest.raises(ValueError, match=r"row 2 .* has 1 columns, expected 2"):
        tabular(path)
    with pytest.raises(FileNotFoundError, match="header line"):
        tabular(tmp_path / "none.csv")


def test_what_is_no_table_is_refused():
    x, y = np.ones((20, 2)), np.arange(20) % 2
    with pytest.raises(ValueError, match="no table 'boston'; there are breast_cancer"):
        tabular("boston")
    with pytest.raises(ValueError, match="leave it out"):
        tabular("iris", target="species")
    with pytest.raises(TypeError, match="columns of 0 and 1"):
        divide(np.full((20, 2), "a"), y)
    with pytest.raises(ValueError, match=r"x\[3, 1\] is nan"):
        divide(np.where(np.arange(40).reshape(20, 2) == 7, np.nan, 1.0), y)
    with pytest.raises(ValueError, match=r"as few as 1 \(class 1\)"):
        divide(x, (np.arange(20) == 3).astype(int))
    with pytest.raises(ValueError, match="sum of 1"):
        divide(x, y, shares=(0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="give more rows"):
        divide(np.ones((24, 2)), np.arange(24) % 6, shares=(0.8, 0.1, 0.1))
    with pytest.raises(ValueError, match=r"y\[2\] is not finite"):
        divide(x, np.where(np.arange(20) == 2, np.inf, 0.5))
    with pytest.raises(ValueError, match=r"got \(20,\) and \(20,\)"):
        divide(x[:, 0], y)


GROUPS = ("rec.autos", "sci.space")
WORDS = (("engine", "wheel", "road"), ("orbit", "rocket", "moon"))


def made_up(count: int, seed: int) -> tuple[list[str], np.ndarray]:
    """Messages that the words tell apart; the test ones have a word that no other has."""
    rng, labels = np.random.default_rng(seed), np.arange(count) % 2
    return [" ".join(rng.choice(WORDS[label], 6)) + f" only{seed}" for label in labels], labels


@pytest.fixture(params=["cache of scikit-learn", "official folders"])
def messages(tmp_path, request):
    """A small folder in either of the two forms."""
    parts = {"train": made_up(40, 0), "test": made_up(10, 1)}
    if request.param == "official folders":
        for part, (texts, labels) in parts.items():
            for i, (text, label) in enumerate(zip(texts, labels, strict=True)):
                folder = tmp_path / f"20news-bydate-{part}" / GROUPS[label]
                folder.mkdir(parents=True, exist_ok=True)
                (folder / str(i)).write_text(text, encoding="latin1")
        return tmp_path
    kept = {
        part: Bunch(data=texts, target=labels, target_names=list(GROUPS), filenames=np.arange(len(texts)))
        for part, (texts, labels) in parts.items()
    }
    (tmp_path / "20news-bydate_py3.pkz").write_bytes(zlib.compress(pickle.dumps(kept)))
    return tmp_path


def test_newsgroups_halves_the_training_messages(messages):
    data = newsgroups(messages)
    assert [len(part[1]) for part in data[:3]] == [20, 20, 10] and data.classes == GROUPS
    assert [part[1].sum() for part in data[:3]] == [10, 10, 5]
    assert set(data.features) == {"only0", *WORDS[0], *WORDS[1]}  # no word of the test alone
    x, y = data.test
    assert x.dtype == np.float32 and y.dtype == np.int32
    np.testing.assert_allclose((x**2).sum(1), 1, rtol=1e-5)
    of_space = [data.features.index(word) for word in WORDS[1]]
    assert ((x[:, of_space].sum(1) > 0) == (y == 1)).all()
    assert len(newsgroups(messages, num_features=3).features) == 3
    assert not np.array_equal(newsgroups(messages, seed=1).support[0], data.support[0])


def test_newsgroups_says_what_it_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "cache"))
    monkeypatch.delenv("BILEVEL_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"download=True .* 20news-bydate-train"):
        newsgroups()
    with pytest.raises(FileNotFoundError, match="no folder"):
        newsgroups(tmp_path / "none")
    (tmp_path / "20news-bydate_py3.pkz").write_bytes(b"no archive")
    with pytest.raises(OSError, match=r"is damaged .*; remove 20news-bydate_py3\.pkz"):
        newsgroups(tmp_path)


def test_without_scikit_learn_the_remedy_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        tabular("iris")
