"""The hypergradients of TorchOpt, higher and JAXopt, where they are right, are ours to 1e-5.

They run in an environment of their own, the one that `make bench` installs (.venv-peers), or in the one
whose Python BILEVEL_PEERS_PYTHON names. Without one the tests are skipped.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.testing import assert_close

HERE = Path(__file__).parent
KEY = jax.random.key(0)
NUM_STEPS, RATE, TOLERANCE = 6, 0.05, 1e-5
MODES = ("torchopt/sgd", "torchopt/momentum", "torchopt/adam", "higher/sgd", "higher/momentum", "higher/adam")
RIDGE = ("torchopt/ridge-implicit", "jaxopt/ridge-implicit", "jaxopt/ridge-unrolled")


@cache
def data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    x, x_query = rng.normal(size=(2, 20, 3))
    weights = rng.normal(size=3)
    return {
        "x": x,
        "y": np.sin(x @ weights),
        "x_query": x_query,
        "y_query": np.sin(x_query @ weights),
        "hidden": rng.normal(size=(3, 4)),
        "head": rng.normal(size=4),
        "log_penalty": np.array(-3.0),
        "theta": rng.normal(size=3) - 1,
        "num_steps": np.array(NUM_STEPS),
        "rate": np.array(RATE),
    }


@pytest.fixture(scope="module")
def peers(tmp_path_factory) -> dict[str, list[float]]:
    """What the peers answer, by name."""
    named = os.environ.get("BILEVEL_PEERS_PYTHON")
    python = Path(named) if named else HERE.parent / ".venv-peers" / "bin" / "python"
    if not python.exists():
        assert not named, f"BILEVEL_PEERS_PYTHON names {named}, which does not exist"
        pytest.skip(
            "the peers are NOT compared: no .venv-peers (make bench makes it), no BILEVEL_PEERS_PYTHON"
        )
    path = tmp_path_factory.mktemp("peers") / "problems.npz"
    np.savez(path, **data())
    command = (str(python), str(HERE / "peers_hypergradients.py"), str(path))
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    print(done.stderr, file=sys.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def compare(peers, name, h_grad):
    if name not in peers:
        pytest.skip(f"{name.split('/')[0]} is not installed there: NOT compared")
    assert_close(name, np.concatenate([np.ravel(leaf) for leaf in h_grad]), peers[name], TOLERANCE)


@pytest.mark.parametrize("estimator", [bl.hypergrad.Unroll(), bl.hypergrad.Mixed()])
@pytest.mark.parametrize("name", MODES)
def test_through_the_steps(x64, peers, name, estimator):
    d = {key: jnp.asarray(value) for key, value in data().items()}

    def error(params, batch):
        x, y = batch
        return jnp.mean((jnp.tanh(x @ params["hidden"]) @ params["head"] - y) ** 2)

    problem = bl.Problem(
        init=lambda meta, key: {"hidden": meta["hidden"], "head": meta["head"]},
        inner_loss=lambda params, meta, batch, key: (
            error(params, batch) + jnp.exp(meta["log_penalty"]) * optax.tree.norm(params, squared=True)
        ),
        outer_loss=lambda params, meta, batch, key: error(params, batch),
    )
    optimizer = {
        "sgd": optax.sgd(RATE),
        "momentum": optax.sgd(RATE, momentum=0.9),
        "adam": optax.adam(RATE),
    }[name.split("/")[1]]
    task = bl.Task((d["x"], d["y"]), (d["x_query"], d["y_query"]))
    meta = {leaf: d[leaf] for leaf in ("hidden", "head", "log_penalty")}
    solver = bl.inner.Gradient(optimizer, NUM_STEPS)
    grad = bl.hypergradient(problem, solver, estimator, meta, task, KEY).grad
    compare(peers, name, [grad["hidden"], grad["head"], grad["log_penalty"]])


@pytest.mark.parametrize("name", RIDGE)
def test_ridge(x64, peers, name):
    d = {key: jnp.asarray(value) for key, value in data().items()}
    ridge = bl.inner.Ridge(lambda meta, x: x, jnp.exp)
    problem = bl.Problem(
        init=lambda meta, key: jnp.zeros(3),
        inner_loss=ridge.loss,
        outer_loss=lambda params, meta, batch, key: jnp.mean((batch[0] @ params - batch[1]) ** 2),
    )
    task = bl.Task((d["x"], d["y"]), (d["x_query"], d["y_query"]))
    if name == "jaxopt/ridge-unrolled":
        ways = [(bl.inner.Gradient(optax.sgd(RATE), NUM_STEPS), bl.hypergrad.Mixed())]
    else:
        ways = [
            (ridge, bl.hypergrad.Unroll()),
            (ridge, bl.hypergrad.Implicit(bl.hypergrad.cg(10))),
            (bl.inner.Gradient(optax.sgd(0.2), 3000), bl.hypergrad.Implicit(bl.hypergrad.direct())),
        ]
    for solver, estimator in ways:
        grad = bl.hypergradient(problem, solver, estimator, d["theta"], task, KEY).grad
        compare(peers, name, [grad])
