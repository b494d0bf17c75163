"""A small decoder-only transformer, in plain products that can be differentiated twice."""

import math

import jax
import jax.numpy as jnp

from bilevel.nets.net import Net


def transformer(
    vocab_size: int,
    width: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    max_length: int = 128,
    *,
    mlp_ratio: int = 4,
    tied: bool = True,
) -> Net:
    """A causal transformer with normalization before each block, GELU and learned positions.

        x ← E[token] + P[position]
        x ← x + W_o · softmax(q kᵀ / √d + causal mask) v,   q, k, v = W (norm x)
        x ← x + V gelu(U norm x + a) + b;      logits = norm(x) Eᵀ, or norm(x) H when not tied

    Attention is written as two products and a softmax: fused kernels often have no second derivative, and
    this passes reverse over reverse and forward over reverse.

    Args:
        vocab_size: number of tokens.
        width: of the residual stream; `num_heads` divides it.
        num_layers: blocks of attention and perceptron.
        num_heads: heads of attention.
        max_length: the longest sequence; shorter ones use the first positions.
        mlp_ratio: hidden width of the perceptron over `width`.
        tied: read the logits off with the embedding's own table.

    Returns:
        A `Net`: `tokens [n, length] -> logits [n, length, vocab_size]`, whole numbers in. Logits at position
        t depend on tokens up to t only. Its parameters are `{"embed", "positions", "layer_0": {"attention",
        "attention_norm", "mlp", "mlp_norm"}, ..., "norm"}`, and "head" when not tied.

    Raises:
        ValueError: for a size below 1, or a width that `num_heads` does not divide; at the call, for a
            sequence that is too long.
        TypeError: at the call, for tokens that are not whole numbers.

    Reference: Vaswani et al., 2017; Radford et al., GPT-2, 2019.

    >>> net = transformer(vocab_size=10, width=8, num_layers=1, num_heads=2, max_length=6)
    >>> net.apply(net.init(jax.random.key(0)), jnp.zeros((3, 6), int)).shape
    (3, 6, 10)
    """
    sizes = (vocab_size, width, num_layers, num_heads, max_length, mlp_ratio)
    if min(sizes) < 1 or width % num_heads:
        raise ValueError(
            "transformer needs sizes of at least 1 and a width that num_heads divides, got "
            f"vocab_size={vocab_size}, width={width}, num_layers={num_layers}, num_heads={num_heads}, "
            f"max_length={max_length}, mlp_ratio={mlp_ratio}"
        )
    names = [f"layer_{i}" for i in range(num_layers)]
    hidden = mlp_ratio * width

    def init(key):
        keys = iter(jax.random.split(key, 3 + 4 * num_layers))

        def dense(fan_in, fan_out, scale=1.0):
            return scale * fan_in**-0.5 * jax.random.normal(next(keys), (fan_in, fan_out))

        # The blocks' outputs add up over the layers: smaller ones keep the sum of unit size (GPT-2).
        last = (2 * num_layers) ** -0.5
        params = {
            "embed": width**-0.5 * jax.random.normal(next(keys), (vocab_size, width)),
            "positions": 0.1 * width**-0.5 * jax.random.normal(next(keys), (max_length, width)),
            "norm": _norm_params(width),
        }
        for name in names:
            params[name] = {
                "attention": {"qkv": dense(width, 3 * width), "out": dense(width, width, last)},
                "attention_norm": _norm_params(width),
                "mlp": {
                    "up": dense(width, hidden),
                    "up_b": jnp.zeros(hidden),
                    "down": dense(hidden, width, last),
                    "down_b": jnp.zeros(width),
                },
                "mlp_norm": _norm_params(width),
            }
        if not tied:
            params["head"] = dense(width, vocab_size)
        return params

    def apply(params, tokens):
        _require_tokens(tokens, max_length)
        x = params["embed"][tokens] + params["positions"][: tokens.shape[1]]
        for name in names:
            layer = params[name]
            x = x + _attention(layer["attention"], _norm(layer["attention_norm"], x), num_heads)
            x = x + _perceptron(layer["mlp"], _norm(layer["mlp_norm"], x))
        head = params["embed"].T if tied else params["head"]
        return _norm(params["norm"], x) @ head

    return Net(init, apply)


def _require_tokens(tokens: jax.Array, max_length: int) -> None:
    if not jnp.issubdtype(jnp.result_type(tokens), jnp.integer):
        raise TypeError(f"transformer reads tokens that are whole numbers, got {jnp.result_type(tokens)}")
    shape = jnp.shape(tokens)
    if len(shape) != 2 or shape[1] > max_length:
        raise ValueError(
            f"transformer reads tokens [n, length] with length at most {max_length}, got {list(shape)}; "
            "make it with a larger max_length="
        )


def _norm_params(width: int) -> dict[str, jax.Array]:
    return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}


def _norm(params, x):
    mean = x.mean(-1, keepdims=True)
    centred = x - mean
    variance = (centred**2).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + 1e-5) * params["scale"] + params["bias"]


def _attention(params, x, num_heads: int):
    n, length, width = x.shape
    size = width // num_heads
    qkv = (x @ params["qkv"]).reshape(n, length, 3, num_heads, size)
    q, k, v = (qkv[:, :, i].swapaxes(1, 2) for i in range(3))  # [n, heads, length, size]
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(size)
    causal = jnp.tril(jnp.ones((length, length), bool))
    # The least finite number and not minus infinity, whose derivatives are NaN.
    weights = jax.nn.softmax(jnp.where(causal, scores, jnp.finfo(scores.dtype).min), -1)
    return (weights @ v).swapaxes(1, 2).reshape(n, length, width) @ params["out"]


def _perceptron(params, x):
    return jax.nn.gelu(x @ params["up"] + params["up_b"]) @ params["down"] + params["down_b"]
