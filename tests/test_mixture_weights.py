"""Weights of text sources: exact hypergradients, and noise gets the least of them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.recipes.mixture_weights import MixtureWeights, mixture_weights, weights_of
from bilevel.tasks import Fixed
from bilevel.tasks.text_sources import read_sources, small_languages, windows
from bilevel.testing import assert_derivative

KEY = jax.random.key(0)


def pairs(count=40, seed=0):
    """Three sources over four letters: "abab...", the target; partly so; letters at random."""
    rng = np.random.default_rng(seed)
    text = {"alike": b"ab" * 100, "part": b"abababba" * 25, "noise": bytes(rng.choice(list(b"abcd"), 200))}
    return windows(text, b"ab" * count, 4)


def task_of(text):
    return bl.Task(jnp.asarray(text.support), jnp.asarray(text.query))


def bigrams(size):
    """The smallest language model: the next letter from this one."""
    return bl.nets.Net(lambda key: 0.1 * jax.random.normal(key, (size, size)), lambda table, x: table[x])


def small_learner(net, text, **options):
    options = {"optimizer": optax.sgd(0.5), "num_steps": 3, "batch_size": 4, "query_size": 4} | options
    return mixture_weights(net, text.names, **options)


def test_hypergradient_is_the_slope_of_the_value(x64):
    text = pairs()
    learner = small_learner(bigrams(4), text, optimizer=optax.adam(0.05))
    task, meta = task_of(text), {"logits": jnp.array([0.3, -0.2, 0.5])}

    @jax.jit
    def run(meta):
        return bl.hypergradient(learner.problem, learner.solver, learner.estimator, meta, task, KEY)

    h = run(meta)
    assert_derivative(lambda meta: run(meta).value, h.grad, meta)
    assert abs(float(h.grad["logits"].sum())) < 1e-12  # weights add up to 1, whatever is added to all logits


@pytest.mark.filterwarnings("ignore::bilevel.hypergrad.doubts.HypergradientWarning")
@pytest.mark.parametrize(
    ("estimator", "steps"),
    [
        (bl.hypergrad.Mixed(), 30),
        (bl.hypergrad.Sama(), 30),
        (bl.hypergrad.F2sa(10.0), 150),
    ],
    ids=lambda value: type(value).__name__,
)
def test_noise_gets_the_least_weight(estimator, steps):
    text = pairs()
    single = isinstance(estimator, bl.hypergrad.F2sa)
    learner = small_learner(bigrams(4), text, num_steps=1 if single else 10, estimator=estimator)
    sample, optimizer = bl.tasks.batch(Fixed(task_of(text)), 1), optax.adam(0.1)
    state = bl.init_state(learner, optimizer, sample, KEY)
    state = bl.train(learner, optimizer, sample, state, steps)
    alike, part, noise = weights_of(state.meta, 3)
    assert alike > 0.5 and noise < 0.2
    if not single:  # the penalty is biased: it may take the two that are of little use for each other
        assert noise < part


def test_uniform_weights_have_nothing_to_learn():
    learner = small_learner(bigrams(4), pairs(), learned=False)
    text = task_of(pairs())
    assert learner.init_meta(KEY) == {}
    params = learner.problem.init({}, KEY)
    alike = small_learner(bigrams(4), pairs())
    assert learner.problem.inner_loss(params, {}, text.support, KEY) == alike.problem.inner_loss(
        params, {"logits": jnp.zeros(3)}, text.support, KEY
    )


def test_windows_are_the_texts_in_order():
    text = windows({"long": b"abcdef" * 2, "short": b"abc"}, b"defdefdef", length=2)
    assert text.alphabet == b"abcdef" and text.support.shape == (2, 4, 3)
    letters = [bytes(text.alphabet[i] for i in rows.ravel()) for rows in text.support]
    assert letters == [b"abcdefabcdef", b"abcabcabcabc"]  # the short one four times
    assert text.query.shape == (1, 1, 3) and text.test.shape == (1, 1, 3)


def test_small_languages_are_what_they_say():
    text = small_languages(length=32, characters=3000)
    again = small_languages(length=32, characters=3000)
    assert (text.support == again.support).all() and (text.query == again.query).all()
    assert (small_languages(32, 3000, seed=1).support != text.support).any()

    def read(rows):
        return bytes(text.alphabet[i] for i in rows.ravel()).decode()

    by_name = dict(zip(text.names, map(read, text.support), strict=True))
    for line in by_name["sums"].split("\n")[1:-1]:
        left, right = line.split("=")
        assert sum(map(int, left.split("+"))) == int(right)
    stack = []
    for letter in by_name["brackets"].split("\n")[0]:
        if letter in ")]>":
            assert stack.pop() + letter in ("()", "[]", "<>")
        else:
            stack.append(letter)
    assert not stack
    words = set(by_name["words"].replace(".", " ").split())
    target = set(read(text.query).replace(".", " ").split())
    assert len(target & words) > 20 and not words & {"gur", *by_name["foreign"].split()}
    # A shuffled line has the letters of the target but not its words; noise has all letters alike.
    assert by_name["shuffled"].count("the ") < by_name["words"].count("the ") / 10
    counts = np.bincount(text.support[text.names.index("noise")].ravel())
    assert counts.min() > 0.5 * counts.mean()


def test_text_of_your_own_is_read(tmp_path):
    (tmp_path / "sources" / "books").mkdir(parents=True)
    (tmp_path / "sources" / "books" / "1.txt").write_text("one " * 20)
    (tmp_path / "sources" / "books" / "2.txt").write_text("two " * 20)
    for version, text in {"v1.0": "old ", "v1.1": "new "}.items():  # of one stem
        (tmp_path / "sources" / version).mkdir()
        (tmp_path / "sources" / version / "1.txt").write_text(text * 20)
    (tmp_path / "sources" / "chat.txt").write_bytes("höflich ".encode() * 20)
    (tmp_path / "target.txt").write_text("three " * 20)
    recipe = MixtureWeights(
        sources=tmp_path / "sources", target=tmp_path / "target.txt", length=8, width=4, num_layers=1
    )
    experiment = recipe.build()
    names = {f"weight of {name}" for name in ("books", "chat", "v1.0", "v1.1")}
    assert set(experiment.meta_figures({"logits": jnp.zeros(4)})) == names
    assert experiment.sample_test(KEY).support.shape[0] == 4


def test_what_cannot_be_mixed_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("x" * 100)
    (tmp_path / "short.txt").write_text("abc")
    with pytest.raises(ValueError, match="at least two sources, got 1"):
        read_sources(tmp_path / "a", tmp_path / "short.txt")
    (tmp_path / "twins").mkdir()
    for name in ("code.py", "code.js"):
        (tmp_path / "twins" / name).write_text("x" * 100)
    with pytest.raises(ValueError, match=r"code.js and .*code.py would both be the source 'code'"):
        read_sources(tmp_path / "twins", tmp_path / "short.txt")
    with pytest.raises(FileNotFoundError, match="no folder"):
        read_sources(tmp_path / "b", tmp_path / "short.txt")
    with pytest.raises(FileNotFoundError, match="no target"):
        read_sources(tmp_path / "a", tmp_path / "c")
    with pytest.raises(ValueError, match="the target's first half has 1 bytes"):
        windows({"a": b"x" * 100, "b": b"y" * 100}, b"abc", 8)
    with pytest.raises(ValueError, match="length must be"):
        windows({"a": b"x"}, b"abc", 0)
    with pytest.raises(ValueError, match="go together"):
        MixtureWeights(sources=tmp_path)
    with pytest.raises(ValueError, match="at least two sources"):
        mixture_weights(bigrams(4), ("a",))


@pytest.mark.parametrize("estimator", ["mixed", "truncated", "sama", "one-step", "pes", "online"])
def test_recipe_builds_with_every_estimator(estimator):
    recipe = MixtureWeights(estimator=estimator, length=8, width=8, num_layers=1)
    experiment = recipe.build()
    shapes = jax.eval_shape(experiment.sample_tasks, KEY)
    assert shapes.support.shape[:2] == (1, 6) and shapes.query.shape[:2] == (1, 1)
    figures = experiment.meta_figures(experiment.learner.init_meta(KEY))
    assert figures["weight of noise"] == pytest.approx(1 / 6)
    assert experiment.scratch.solver.num_steps == recipe.eval_steps
    alone = experiment.other_tests["trained on the target's first half alone"](KEY)
    assert (alone.support == alone.support[:1]).all() and (
        alone.query == experiment.sample_test(KEY).query
    ).all()
    assert replace(recipe, seed=1).build().sample_test(KEY).query.shape == alone.query.shape
