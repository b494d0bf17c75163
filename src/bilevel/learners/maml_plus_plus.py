"""MAML++: six stabilizing changes of MAML, each an option."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel.hypergrad import Mixed, MultiStep, Unroll
from bilevel.hypergrad.first_order.annealed import AnnealedOrder
from bilevel.inner import Gradient
from bilevel.learners.maml import Fixed, PerLayerPerStep
from bilevel.learners.supervised import supervised
from bilevel.nets import Net
from bilevel.problem import Estimator, Learner, Params

_NORM_LEAVES = ("scale", "bias")
_STEP = "step"  # the entry of the adapted parameters that counts inner steps


def maml_plus_plus(
    net: Net,
    loss: Callable,
    *,
    num_steps: int = 5,
    rate: float = 0.1,
    learned_rates: bool = True,
    per_step_norm: bool = True,
    multi_step_annealing: int | None = 5_000,
    first_order_steps: int = 25_000,
    adjoint: Mixed | Unroll | None = None,
) -> Learner:
    """MAML with the stabilizing tricks of MAML++.

        min over θ  E[ Σₖ wₖ loss(φₖ(θ), γₖ, βₖ, query) ],   φₖ₊₁ = φₖ − αₖ ⊙ ∇loss(φₖ, γₖ, βₖ, support)

    with a learned rate αₖ for every leaf and inner step, and a learned scale γₖ and bias βₖ of every
    normalization for every inner step, which the inner loop does not adapt. Batch statistics are those of
    the current batch at each step, and never shared between steps. (The authors' code also keeps running
    averages for each step, but normalizes by the current batch all the same.) The sixth change, a cosine
    schedule, is the outer optimizer's: `optax.cosine_decay_schedule`.

    Args:
        net: an init/apply pair; its parameters nested dictionaries, those of a normalization named `scale`
            and `bias`.
        loss: `loss(outputs, targets) -> scalar` or `-> (scalar, {metric: scalar})`; batches are `(x, y)`.
        num_steps: K, inner steps in training. Steps beyond it use the last rates and the last γ, β.
        rate: the inner learning rate, or where the learned ones start.
        learned_rates: one rate for every leaf and step, or one number for all.
        per_step_norm: γ and β for each of the iterates 0..K; else they are adapted like all parameters.
        multi_step_annealing: outer steps in which the weights w move from equal ones to the last step alone;
            None judges the last step from the start.
        first_order_steps: outer steps in which inner gradients count as constants, before second derivatives
            are taken; 0 takes them from the start. The paper's 50 epochs are 25 000 of its 75 000 steps.
        adjoint: `Mixed()` by default; how the inner steps are differentiated.

    Returns:
        A `Learner`; meta is `{"init": params}` with "rates" (one vector `[K]` for each leaf) and "norm"
        (`[K + 1, ...]`). The params that are adapted hold the count of steps besides, as "step".

    Raises:
        ValueError: for fewer than 1 step; at `init_meta`, when there is no normalization to give each step
            its own, or the parameters are no dictionary, or one with an entry "step".

    Cost: that of the estimator: K outer losses until a run ends, about a third of the time in the first-order
    part. Leave `task_chunk` at 1 there, see `AnnealedOrder`. Biased until `first_order_steps`, then exact.

    Reference: Antoniou, Edwards, Storkey, How to train your MAML, 2019.

    >>> import bilevel as bl
    >>> learner = maml_plus_plus(bl.nets.conv4(5, 4), bl.learners.cross_entropy, num_steps=3)
    >>> meta = learner.init_meta(jax.random.key(0))
    >>> sorted(meta), meta["norm"]["block_0"]["scale"].shape, meta["rates"]["head"]["w"].shape
    (['init', 'norm', 'rates'], (4, 4), (3,))
    """
    if num_steps < 1:
        raise ValueError(f"maml_plus_plus needs num_steps of at least 1, got {num_steps}")
    rates = PerLayerPerStep(rate) if learned_rates else Fixed(rate)

    def init_meta(key):
        init, norm = net.init(key), None
        _require_dictionary(init)
        if per_step_norm:
            init, norm = split_norms(init)
        meta = {"init": init}
        if norm is not None:
            meta["norm"] = jax.tree.map(lambda leaf: jnp.stack([leaf] * (num_steps + 1)), norm)
        if learned_rates:
            meta["rates"] = rates.init(init, num_steps)
        return meta

    def assemble(params, meta, x):
        params = dict(params)
        step = jax.lax.stop_gradient(params.pop(_STEP)).astype(jnp.int32)
        if per_step_norm:
            row = jnp.minimum(step, num_steps)
            params = _united(params, jax.tree.map(lambda rows: rows[row], meta["norm"]))
        return params, x

    problem, predict = supervised(
        net, loss, init=lambda meta, key: {**meta["init"], _STEP: jnp.zeros(())}, assemble=assemble
    )
    solver = Gradient(lambda meta: _counting(rates.optimizer(meta.get("rates"))), num_steps)
    estimator: Estimator = adjoint or Mixed()
    if multi_step_annealing is not None:
        estimator = MultiStep(multi_step_annealing, adjoint or Mixed())
    if first_order_steps:
        estimator = AnnealedOrder(estimator, first_order_steps)
    return Learner(problem, solver, estimator, init_meta, predict)


def _counting(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer on all entries but the count of steps, to which 1 is added."""

    def without(tree):
        return {name: leaf for name, leaf in tree.items() if name != _STEP}

    def init(params):
        return optimizer.init(without(params))

    def update(updates, state, params=None):
        before = None if params is None else without(params)
        moved: Any
        moved, state = optimizer.update(without(updates), state, before)
        return {**moved, _STEP: jnp.ones_like(updates[_STEP])}, state

    return optax.GradientTransformation(init, update)


def split_norms(params: Params) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters without their normalizations' scales and biases, and those alone.

    Raises:
        ValueError: when there are none, or the parameters are no nested dictionaries.

    >>> split_norms({"block": {"w": 1, "scale": 2, "bias": 3}, "head": {"w": 4}})
    ({'block': {'w': 1}, 'head': {'w': 4}}, {'block': {'scale': 2, 'bias': 3}})
    """
    rest, norms = _parted(params)
    if not norms:
        raise ValueError(
            "maml_plus_plus(per_step_norm=True) found no normalization: no entries named scale and bias in "
            f"nested dictionaries, got {jax.tree.structure(params)}; pass per_step_norm=False, or a net such "
            "as bl.nets.conv4"
        )
    return rest, norms


def _require_dictionary(params: Params) -> None:
    if not isinstance(params, dict) or _STEP in params:
        raise ValueError(
            "maml_plus_plus counts inner steps in the parameters, which must be a dictionary without an "
            f"entry {_STEP!r}, got {jax.tree.structure(params)}"
        )


def _parted(tree):
    rest, norms = {}, {}
    if not isinstance(tree, dict):
        return tree, norms
    is_norm = all(name in tree and not isinstance(tree[name], dict) for name in _NORM_LEAVES)
    for name, value in tree.items():
        if is_norm and name in _NORM_LEAVES:
            norms[name] = value
            continue
        inner_rest, inner_norms = _parted(value)
        if not (isinstance(inner_rest, dict) and not inner_rest):  # nothing but a normalization
            rest[name] = inner_rest
        if inner_norms:
            norms[name] = inner_norms
    return rest, norms


def _united(a, b):
    """The union of two nested dictionaries that share no leaf."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return b
    return {**a, **b, **{name: _united(a[name], b[name]) for name in a.keys() & b.keys()}}
