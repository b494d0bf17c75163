"""The transformer is causal, computes its formula, and can be differentiated as often as needed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.hypergrad import Mixed, Unroll
from bilevel.nets.transformer import transformer
from bilevel.testing import assert_close, assert_derivative, assert_trees_close

KEY = jax.random.key(0)
NET = transformer(vocab_size=7, width=6, num_layers=2, num_heads=2, max_length=5, mlp_ratio=2)
APPLY = jax.jit(NET.apply)
TOKENS = jnp.array([[1, 4, 2, 0, 6], [3, 3, 5, 1, 0]])


def moved(net):
    """Away from scale 1 and bias 0, where faults could hide."""
    params = net.init(KEY)
    return optax.tree.add_scale(params, 0.3, optax.tree.random_like(jax.random.key(1), params))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def reference(params, tokens, heads):
    """One sequence, one head and one position at a time, in NumPy."""
    p = jax.tree.map(np.asarray, params)

    def norm(q, x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * q["scale"] + q[
            "bias"
        ]

    x = p["embed"][tokens] + p["positions"][: len(tokens)]
    width = x.shape[1]
    for name in sorted(n for n in p if n.startswith("layer")):
        layer = p[name]
        q, k, v = np.split(norm(layer["attention_norm"], x) @ layer["attention"]["qkv"], 3, axis=1)
        mixed = np.zeros_like(x)
        for h in range(heads):
            part = slice(h * width // heads, (h + 1) * width // heads)
            for t in range(len(tokens)):
                weights = softmax(k[: t + 1, part] @ q[t, part] / np.sqrt(width // heads))
                mixed[t, part] = weights @ v[: t + 1, part]
        x = x + mixed @ layer["attention"]["out"]
        up = norm(layer["mlp_norm"], x) @ layer["mlp"]["up"] + layer["mlp"]["up_b"]
        gelu = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
        x = x + gelu @ layer["mlp"]["down"] + layer["mlp"]["down_b"]
    return norm(p["norm"], x) @ (p["head"] if "head" in p else p["embed"].T)


@pytest.mark.parametrize("tied", [True, False])
def test_it_computes_its_formula(x64, tied):
    net = transformer(7, 6, 2, 2, 5, mlp_ratio=2, tied=tied)
    params = jax.tree.map(jnp.float64, moved(net))
    assert ("head" in params) is not tied
    got = jax.jit(net.apply)(params, TOKENS)
    for i in range(2):
        assert_close("logits", got[i], reference(params, np.asarray(TOKENS[i]), 2), 1e-12)


def test_it_is_causal():
    params = moved(NET)
    before = APPLY(params, TOKENS)
    for t in range(5):
        after = APPLY(params, TOKENS.at[:, t].add(1) % 7)
        changed = np.any(np.asarray(before != after), axis=(0, 2))
        assert not np.any(changed[:t]) and np.all(changed[t:])


def test_a_shorter_sequence_is_a_prefix():
    params = moved(NET)
    assert_close("logits", APPLY(params, TOKENS[:, :3]), APPLY(params, TOKENS)[:, :3], 1e-5)


def test_activations_start_at_unit_size():
    net = transformer(50, 64, 6, 4, 16)
    logits = net.apply(net.init(KEY), jax.random.randint(KEY, (4, 16), 0, 50))
    assert 0.5 < float(logits.std()) < 2


SHALLOW = transformer(vocab_size=7, width=4, num_layers=1, num_heads=2, max_length=5, mlp_ratio=2)


def next_token(params, meta, batch, key):
    logits = SHALLOW.apply(params, batch)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch[:, 1:]).mean() * jnp.exp(
        meta["log_weight"]
    )


def test_second_derivatives(x64):
    """Both adjoints through two steps, against each other and finite differences."""
    problem = bl.Problem(lambda meta, key: meta["init"], next_token, next_token)
    meta = {"init": jax.tree.map(jnp.float64, moved(SHALLOW)), "log_weight": jnp.array(0.2)}
    task, solver = bl.Task(TOKENS, TOKENS[::-1, ::-1]), bl.inner.Gradient(optax.sgd(0.3), 2)
    runs = [
        jax.jit(lambda m, e=e: bl.hypergradient(problem, solver, e, m, task, KEY))
        for e in (Unroll(), Mixed())
    ]
    reverse, mixed = (run(meta).grad for run in runs)
    assert_trees_close("grad", mixed, reverse, 1e-10)
    assert_derivative(lambda m: runs[0](m).value, reverse, meta, step=1e-6)


def test_under_a_batch_of_weights():
    params = jax.vmap(NET.init)(jax.random.split(KEY, 2))
    together = jax.jit(jax.vmap(NET.apply, (0, None)))(params, TOKENS)
    one = APPLY(jax.tree.map(lambda leaf: leaf[1], params), TOKENS)
    assert_close("second", together[1], one, 1e-5)


@pytest.mark.parametrize("sizes", [(0, 6, 1, 2, 5), (7, 6, 1, 4, 5), (7, 6, 0, 2, 5), (7, 6, 1, 2, 0)])
def test_impossible_sizes(sizes):
    with pytest.raises(ValueError, match="transformer needs sizes of at least 1 and a width that num_heads"):
        transformer(*sizes)


def test_impossible_tokens():
    params = NET.init(KEY)
    with pytest.raises(ValueError, match=r"length at most 5, got \[1, 6\].*max_length="):
        NET.apply(params, jnp.zeros((1, 6), int))
    with pytest.raises(ValueError, match=r"tokens \[n, length\]"):
        NET.apply(params, jnp.zeros(5, int))
    with pytest.raises(TypeError, match="whole numbers, got float32"):
        NET.apply(params, jnp.zeros((1, 5)))
