"""Run by test_peers_agree.py in an environment with the peers: their hypergradients of the same problems.

    python peers_hypergradients.py problems.npz      prints {"torchopt/sgd": {"grad": [...]}, ...}

It imports nothing of bilevel. A peer that is not installed is left out and named on stderr.
"""

import json
import sys

import numpy as np

DATA: dict[str, np.ndarray] = {}  # filled by the argument


def torch_problem():
    """The leaves of meta, and the two losses of the unrolled problem, in torch and float64."""
    import torch

    torch.set_default_dtype(torch.float64)
    leaves = [torch.tensor(DATA[name], requires_grad=True) for name in ("hidden", "head", "log_penalty")]
    x, y, x_query, y_query = (torch.tensor(DATA[name]) for name in ("x", "y", "x_query", "y_query"))

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.head = (torch.nn.Parameter(leaf.detach().clone()) for leaf in leaves[:2])

        def forward(self, x):
            return torch.tanh(x @ self.hidden) @ self.head

    def inner(model, params):
        penalty = sum((p**2).sum() for p in params)
        return ((model(x) - y) ** 2).mean() + torch.exp(leaves[2]) * penalty

    def outer(model):
        return ((model(x_query) - y_query) ** 2).mean()

    return torch, Model, leaves, inner, outer


def flat(tensors) -> list[float]:
    return np.concatenate([np.asarray(t.detach()).ravel() for t in tensors]).tolist()


def torchopt(optimizer: str):
    """Unrolled through MetaSGD or MetaAdam; the initialization is the module's own parameter."""
    import torchopt

    torch, Model, leaves, inner, outer = torch_problem()
    model = Model()
    start = list(model.parameters())
    inner_optimizer = {
        "sgd": lambda: torchopt.MetaSGD(model, lr=float(DATA["rate"])),
        "momentum": lambda: torchopt.MetaSGD(model, lr=float(DATA["rate"]), momentum=0.9),
        "adam": lambda: torchopt.MetaAdam(model, lr=float(DATA["rate"])),
    }[optimizer]()
    for _ in range(int(DATA["num_steps"])):
        inner_optimizer.step(inner(model, [model.hidden, model.head]))
    return flat(torch.autograd.grad(outer(model), [*start, leaves[2]]))


def higher(optimizer: str):
    import higher

    torch, Model, leaves, inner, outer = torch_problem()
    model = Model()
    settings = {
        "sgd": (torch.optim.SGD, {}),
        "momentum": (torch.optim.SGD, {"momentum": 0.9}),
        "adam": (torch.optim.Adam, {}),
    }
    kind, options = settings[optimizer]
    base = kind(model.parameters(), lr=float(DATA["rate"]), **options)
    with higher.innerloop_ctx(model, base, copy_initial_weights=False) as (net, diffopt):
        for _ in range(int(DATA["num_steps"])):
            diffopt.step(inner(net, list(net.parameters())))
        return flat(torch.autograd.grad(outer(net), [*model.parameters(), leaves[2]]))


def torchopt_implicit():
    """Ridge with a penalty for each feature, solved to the end; conjugate gradient."""
    import torch
    import torchopt

    torch.set_default_dtype(torch.float64)
    x, y, x_query, y_query = (torch.tensor(DATA[name]) for name in ("x", "y", "x_query", "y_query"))
    theta = torch.tensor(DATA["theta"], requires_grad=True)

    def stationarity(params, theta, x, y):
        return x.T @ (x @ params - y) / x.shape[0] + torch.exp(theta) * params

    @torchopt.diff.implicit.custom_root(
        stationarity,
        argnums=1,
        solve=torchopt.linear_solve.solve_cg(maxiter=100, atol=0.0, rtol=1e-14),
    )
    def solve(params, theta, x, y):
        a = x.T @ x / x.shape[0] + torch.diag(torch.exp(theta))
        return torch.linalg.solve(a, x.T @ y / x.shape[0]).detach()

    params = solve(torch.zeros_like(theta), theta, x, y)
    outer = ((x_query @ params - y_query) ** 2).mean()
    return flat(torch.autograd.grad(outer, [theta]))


def jaxopt_implicit(unrolled: bool):
    """The same, by JAXopt's gradient descent: implicit, or unrolled for the steps it takes."""
    import jax

    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp
    import jaxopt

    x, y, x_query, y_query = (jnp.array(DATA[name]) for name in ("x", "y", "x_query", "y_query"))

    def inner(params, theta):
        error = x @ params - y
        return 0.5 * jnp.mean(error**2) + 0.5 * jnp.sum(jnp.exp(theta) * params**2)

    steps = int(DATA["num_steps"]) if unrolled else 5000
    solver = jaxopt.GradientDescent(
        inner,
        maxiter=steps,
        tol=0.0 if unrolled else 1e-13,
        stepsize=float(DATA["rate"]),
        acceleration=False,
        implicit_diff=not unrolled,
        unroll=unrolled,
        jit=not unrolled,
    )

    def outer(theta):
        params = solver.run(jnp.zeros(x.shape[1]), theta).params
        return jnp.mean((x_query @ params - y_query) ** 2)

    return np.asarray(jax.grad(outer)(jnp.array(DATA["theta"]))).tolist()


PEERS = {
    **{f"torchopt/{name}": lambda name=name: torchopt(name) for name in ("sgd", "momentum", "adam")},
    **{f"higher/{name}": lambda name=name: higher(name) for name in ("sgd", "momentum", "adam")},
    "torchopt/ridge-implicit": torchopt_implicit,
    "jaxopt/ridge-implicit": lambda: jaxopt_implicit(unrolled=False),
    "jaxopt/ridge-unrolled": lambda: jaxopt_implicit(unrolled=True),
}

if __name__ == "__main__":
    DATA.update(np.load(sys.argv[1]))
    found = {}
    for name, run in PEERS.items():
        try:
            found[name] = run()
        except ImportError as error:
            print(f"left out: {name}: {error}", file=sys.stderr)
    print(json.dumps(found))
