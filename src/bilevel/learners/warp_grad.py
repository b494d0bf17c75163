"""WarpGrad: layers that no task adapts, learned so that the gradients of the others point well."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel import hypergrad
from bilevel.hypergrad.common import differentiate, gradient_stats, split_keys
from bilevel.hypergrad.doubts import doubts_of
from bilevel.inner import Gradient
from bilevel.learners.supervised import supervised
from bilevel.linalg import reverse_gradient
from bilevel.nets import Net
from bilevel.problem import Estimator, Hypergradient, InnerSolver, Learner, Problem


@dataclass(frozen=True)
class WarpGradient:
    """The warp objective: how good is one more step, from wherever on the way a task may be?

        F(ω) = (1/K) Σₖ f(φₖ − α ∇φ g(φₖ, ω), ω),   k = 0..K−1,   each φₖ taken as a constant

    The gradient in ω passes through one step only, so it neither vanishes nor explodes with K, and ω learns a
    geometry that is good all along the way instead of a way to one point. The initialization, `meta["init"]`,
    has no part in F: it is learned by another estimator.

    Args:
        start: the estimator of the initialization: `Mixed()` (the paper's Warp-MAML, for few steps),
            `bilevel.learners.leap.Leap()` (its Warp-Leap, for many) or `Reptile()`.

    Stats: those of `start`, and `warp_loss` = F. `value` is that of `start`, the outer loss at φ_K.

    Raises:
        TypeError: when the inner solver is no `bl.inner.Gradient` of one fixed optimizer.
        ValueError: when it has no steps.

    Cost: that of `start`, K inner gradients for the way and 2 to 3 more for each of its points; memory
    O(K dim φ + one step). As an estimate of dF/dω exact for F, which is not the loss at φ_K.

    Reference: Flennerhag et al., Meta-learning with warped gradient descent, 2020.
    """

    start: Estimator = field(default_factory=hypergrad.Mixed)

    def check(self, problem: Problem, solver: InnerSolver) -> None:
        """Needs steps, whose optimizer learns nothing."""
        if not (isinstance(solver, Gradient) and isinstance(solver.optimizer, optax.GradientTransformation)):
            raise TypeError(
                "WarpGradient needs an inner solver bl.inner.Gradient(optimizer, num_steps) with an optax "
                f"optimizer, not a function of meta, got {solver!r}"
            )
        if solver.num_steps < 1:
            raise ValueError(f"WarpGradient needs num_steps of at least 1, got {solver.num_steps}")
        self.start.check(problem, solver)

    def init(self, problem, solver, meta, task, key):
        """The state of `start`."""
        return self.start.init(_of_part(problem, meta, "init"), solver, meta["init"], task, key)

    def estimate(self, problem, solver, meta, task, state, key) -> tuple[Hypergradient, object]:
        """Both parts of the hypergradient, for one task."""
        fixed = jax.lax.stop_gradient(meta)
        start, state = self.start.estimate(
            _of_part(problem, fixed, "init"), solver, meta["init"], task, state, key
        )
        ahead = _one_step_ahead(_of_part(problem, fixed, "warp"), solver, meta["warp"], task, key)
        grad = {"init": start.grad, "warp": ahead.grad}
        stats = {**start.stats, "warp_loss": ahead.value, **gradient_stats(start.value, grad)}
        return Hypergradient(start.value, grad, stats), state

    def doubts(self, stats: Mapping[str, float]) -> list[str]:
        """Those of `start`."""
        return doubts_of(self.start, stats)


def _of_part(problem: Problem, meta: Mapping, name: str) -> Problem:
    """The same problem, of which only one entry of meta is left to learn."""

    def whole(part):
        return {**meta, name: part}

    metrics = problem.metrics
    return Problem(
        init=lambda part, key: problem.init(whole(part), key),
        inner_loss=lambda params, part, batch, key: problem.inner_loss(params, whole(part), batch, key),
        outer_loss=lambda params, part, batch, key: problem.outer_loss(params, whole(part), batch, key),
        metrics=metrics and (lambda params, part, batch, key: metrics(params, whole(part), batch, key)),
    )


def _one_step_ahead(problem: Problem, solver: Gradient, meta, task, key) -> Hypergradient:
    """Gradient of the mean outer loss one step after each point of the way."""
    inner_key, outer_key = split_keys(key)
    init_key, step_key = jax.random.split(inner_key)  # as `unroll` splits it
    fixed = jax.lax.stop_gradient(meta)

    def forward(state, _):
        return solver.step(problem, fixed, task, state, step_key)[0], state

    first = solver.init(problem, fixed, task, init_key)
    _, states = jax.lax.scan(forward, first, length=solver.num_steps)
    states = jax.lax.stop_gradient(states)

    def objective(meta):
        @jax.checkpoint
        def ahead(state):
            state, _ = solver.step(problem, meta, task, state, step_key, reverse_gradient)
            return problem.outer_loss(state.params, meta, task.query, outer_key)

        return jnp.mean(jax.lax.map(ahead, states)), {}

    return differentiate(objective, meta)


def warp_grad(
    net: Net,
    loss: Callable,
    *,
    warp: Collection[str] = ("warp",),
    num_steps: int = 5,
    rate: float = 0.1,
    optimizer: optax.GradientTransformation | None = None,
    start: Estimator | None = None,
) -> Learner:
    """Learn layers that shape the gradients of the layers between them.

        φₖ₊₁ = φₖ − α ∇φ loss(net(φₖ, ω), support);   ω by the warp objective of `WarpGradient`, φ₀ by `start`

    The Jacobians of the warp layers precondition the gradients of the task layers; no metric has to be
    stated. Because ω is judged a step at a time, tasks may take many steps.

    Args:
        net: an init/apply pair. `linear_warps(net)` gives one with warps; or name layers of your own.
        loss: `loss(outputs, targets) -> scalar` or `-> (scalar, {metric: scalar})`; batches are `(x, y)`.
        warp: the top-level entries of the parameters that are warp layers; all others are adapted.
        num_steps: K, inner steps in training.
        rate: α.
        optimizer: another inner optimizer, in place of gradient descent of this rate.
        start: the estimator of the initialization: `Mixed()` by default, the paper's Warp-MAML. `Leap()` or
            `Reptile()` cost less for many steps; their directions want an outer rate of their own, such as
            `optax.sgd(0.1)` for `meta["init"]` beside Adam for `meta["warp"]` by `optax.multi_transform`.

    Returns:
        A `Learner` whose meta is `{"init": task layers, "warp": warp layers}`.

    Raises:
        KeyError: at `init_meta`, when an entry of `warp` is none of the parameters.
        ValueError: at `init_meta`, when nothing is left to adapt.

    Cost: that of `WarpGradient`. Biased as a gradient of the loss at φ_K.

    Reference: Flennerhag, Rusu, Pascanu, Visin, Yin, Hadsell, Meta-learning with warped gradient descent,
    2020.

    >>> import bilevel as bl
    >>> net = bl.nets.mlp([1, 8, 8, 8, 1])  # every second hidden layer is a warp
    >>> learner = warp_grad(net, bl.learners.mean_squared_error, warp=("hidden_1",))
    >>> {name: sorted(part) for name, part in learner.init_meta(jax.random.key(0)).items()}
    {'init': ['head', 'hidden_0', 'hidden_2'], 'warp': ['hidden_1']}
    """
    warp = tuple(warp)

    def init_meta(key):
        params = net.init(key)
        if missing := [name for name in warp if name not in params]:
            raise KeyError(
                f"warp_grad(warp={warp}): the network's parameters have the entries {sorted(params)}, "
                f"and no {missing[0]!r}; linear_warps(net) adds an entry 'warp'"
            )
        task_layers = {name: part for name, part in params.items() if name not in warp}
        if not task_layers or not warp:
            raise ValueError(
                "warp_grad needs layers to adapt and layers to warp them, got "
                f"warp={warp} of {sorted(params)}"
            )
        return {"init": task_layers, "warp": {name: params[name] for name in warp}}

    problem, predict = supervised(
        net,
        loss,
        lambda meta, key: meta["init"],
        lambda params, meta, x: ({**meta["warp"], **params}, x),
    )
    solver = Gradient(optimizer or optax.sgd(rate), num_steps)
    return Learner(problem, solver, WarpGradient(start or hypergrad.Mixed()), init_meta, predict)


def linear_warps(net: Net) -> Net:
    """The network with a linear warp behind each layer but the head, the identity at the start.

        h = W x + b  becomes  V (W x + b)   with V `[features, features]`, before normalization and activation

    V is folded into the weights, so that any network of such layers will do: `{"w": [fan_in, features], "b"}`
    for dense ones, `{"w": [features, fan_in], "scale", "bias"}` for those of `conv4`, where V is a
    convolution of size 1.

    Returns:
        A `Net` whose parameters have one entry more, `{"warp": {layer: V}}`.

    Raises:
        KeyError: at `init`, when the parameters have no such layer.

    Reference: Lee, Choi, Gradient-based meta-learning with learned layerwise metric and subspace, 2018.

    >>> import bilevel as bl
    >>> net = linear_warps(bl.nets.mlp([1, 8, 1]))
    >>> net.init(jax.random.key(0))["warp"]["hidden_0"].shape
    (8, 8)
    """

    def init(key):
        params = net.init(key)
        sizes = {name: _features(layer) for name, layer in params.items() if name != "head"}
        warps = {name: jnp.eye(n, dtype=params[name]["w"].dtype) for name, n in sizes.items() if n}
        if not warps:
            raise KeyError(f"linear_warps finds no layer with w and b, or w and scale, in {sorted(params)}")
        return {**params, "warp": warps}

    def warped(params):
        folded = {name: layer for name, layer in params.items() if name != "warp"}
        for name, v in params["warp"].items():
            layer = folded[name]
            if "scale" in layer:
                folded[name] = {**layer, "w": v @ layer["w"]}
            else:
                folded[name] = {**layer, "w": layer["w"] @ v.T, "b": v @ layer["b"]}
        return folded

    noisy = net.noisy
    return net._replace(
        init=init,
        apply=lambda params, x: net.apply(warped(params), x),
        noisy=noisy and (lambda params, x, key: noisy(warped(params), x, key)),
    )


def _features(layer: Any) -> int | None:
    """The width of a layer that a warp fits behind, or None."""
    if not isinstance(layer, Mapping) or "w" not in layer or jnp.ndim(layer["w"]) != 2:
        return None
    if "scale" in layer:
        return layer["w"].shape[0]
    return layer["w"].shape[1] if "b" in layer else None
