"""Find, before anything runs, the operations through which a hypergradient cannot pass.

The traces of the problem's functions are walked; only operations on values that depend on params or meta
count. A loop or a branch is entered, a `custom_jvp` is trusted.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.extend.core.primitives import custom_jvp_call_p
from jax.interpreters import ad

from bilevel.analysis.objective import is_formula, params_like
from bilevel.analysis.sources import inside_function, where, written_by_user
from bilevel.problem import InnerSolver, IterativeSolver, Key, Meta, Problem, Task

_ROUNDING = {"round", "floor", "ceil", "sign", "argmax", "argmin"}
_HOST = {"pure_callback", "io_callback", "ffi_call"}
_HARMLESS = {"debug_callback", "debug_print"}


@dataclass(frozen=True)
class Finding:
    """One operation that stops or breaks a derivative.

    Args:
        function: which of the problem's functions holds it: "inner_loss", "outer_loss", "init" or
            "inner optimizer".
        operation: its name.
        where: `file.py:line (function)`, or None where the trace does not say.
        consequence: what happens because of it, and the remedy, in words.
        kind: "no derivative" (some estimators cannot run), "own rule" (a derivative that need not be one),
            "zero derivative" (nothing is learned through it), "precision" (rounds below float64).
    """

    function: str
    operation: str
    where: str | None
    consequence: str
    kind: str

    def __str__(self):
        place = f" at {self.where}" if self.where else ""
        return f"{self.function}: {self.operation}{place}: {self.consequence}"


def find_operations(
    problem: Problem, solver: InnerSolver, meta: Meta, task: Task, key: Key
) -> tuple[Finding, ...]:
    """Every operation in the problem, and in the inner optimizer, that a derivative does not survive.

    Args:
        task: one task, without the leading axis.

    Returns:
        Findings in the order of the functions, each place once. A function that cannot be traced is
        left out: running it will say why.

    Cost: one trace of each function; nothing is run.

    >>> import bilevel as bl, optax
    >>> problem = bl.Problem(init=lambda meta, key: meta,
    ...                      inner_loss=lambda params, meta, batch, key: jnp.round(params) ** 2,
    ...                      outer_loss=lambda params, meta, batch, key: params)
    >>> solver = bl.inner.Gradient(optax.sgd(0.1), num_steps=3)
    >>> [f.operation for f in find_operations(problem, solver, 1.0, bl.Task(None, None), jax.random.key(0))]
    ['round']
    """
    params = params_like(problem, solver, meta, task, key)
    # name, function, its differentiated arguments, the others
    traced: list[tuple[str, Callable, tuple, tuple]] = [
        ("inner_loss", problem.inner_loss, (params, meta), (task.support, key)),
        ("outer_loss", problem.outer_loss, (params, meta), (task.query, key)),
    ]
    if not is_formula(solver):
        traced.insert(0, ("init", problem.init, (meta,), (key,)))
    if isinstance(solver, IterativeSolver):
        traced.append(("inner optimizer", _optimizer_step(problem, solver), (params, params, meta), (key,)))
    findings: list[Finding] = []
    for name, function, moving, fixed in traced:
        try:
            closed = jax.make_jaxpr(lambda m, f, function=function: function(*m, *f))(moving, fixed)
        except Exception:  # its own error comes out where it is run
            continue
        leaves = jax.tree.leaves(moving)
        active = [i < len(leaves) and _is_float(v.aval) for i, v in enumerate(closed.jaxpr.invars)]
        _walk(closed.jaxpr, active, _Context(name, findings))
    return tuple(dict.fromkeys(findings))


def _optimizer_step(problem, solver):
    """One inner step whose gradient is given: what remains is the optimizer."""

    def step(params, gradient, meta, key):
        def given(loss):
            return lambda *args: (jnp.zeros(()), gradient)

        state = solver.init(problem, meta, Task(None, None), key)
        if hasattr(state, "_replace") and hasattr(state, "params"):
            state = state._replace(params=params)
        return solver.step(problem, meta, Task(None, None), state, key, given)[0]

    return step


@dataclass(frozen=True)
class _Context:
    function: str
    findings: list[Finding]
    place: str | None = None  # of the enclosing library call, whose trace may be an older caller's
    around: str | None = None  # of the enclosing loop or branch, for operations without a place of their own
    chosen: bool = True  # whether the user wrote the enclosing call

    def is_chosen(self, eqn) -> bool:
        own = written_by_user(eqn)
        return self.chosen if own is None else own

    def add(self, eqn, operation, consequence, kind):
        place = self.place or where(eqn) or self.around
        self.findings.append(Finding(self.function, operation, place, consequence, kind))


def _walk(jaxpr: Jaxpr, active_inputs: list[bool], context: _Context) -> list[bool]:
    """Report what stops a derivative; returns which outputs depend on the active inputs."""
    live = {v for v, a in zip(jaxpr.invars, active_inputs, strict=True) if a}

    def is_active(v):
        return not isinstance(v, Literal) and v in live

    for eqn in jaxpr.eqns:
        inputs = [is_active(v) for v in eqn.invars]
        if any(inputs):
            outputs = _visit(eqn, inputs, context)
            live |= {v for v, a in zip(eqn.outvars, outputs, strict=True) if a and _is_float(v.aval)}
    return [is_active(v) for v in jaxpr.outvars]


def _visit(eqn, inputs: list[bool], context: _Context) -> list[bool]:
    name = eqn.primitive.name
    everything = [True] * len(eqn.outvars)
    if name in _HARMLESS or eqn.primitive is custom_jvp_call_p:
        return everything
    if name == "while":
        context.add(
            eqn,
            "while_loop",
            "it has no reverse-mode derivative; give it a fixed number of steps (jax.lax.scan, or fori_loop "
            "with constant bounds)",
            "no derivative",
        )
        return everything
    if name.startswith("custom_vjp_call"):
        context.add(
            eqn,
            "jax.custom_vjp",
            "it has no forward-mode derivative, and its reverse rule need not be the derivative of its "
            "value: "
            + (
                "bl.hypergrad.Mixed() refuses it, Forward() and Hessian-vector products fail, Unroll() runs "
                "only if the rule can itself be differentiated; write it as a jax.custom_jvp"
                if context.function == "inner_loss"
                else "forward mode fails; write it as a jax.custom_jvp"
            ),
            "own rule",
        )
        return everything
    if name in _HOST or (eqn.primitive not in ad.primitive_jvps and not _bodies(eqn)):
        if name not in _HOST and not any(_is_float(v.aval) for v in eqn.outvars):
            return [False] * len(eqn.outvars)
        context.add(
            eqn,
            name,
            "it has no derivative; write it in jax.numpy, or wrap it in a jax.custom_jvp",
            "no derivative",
        )
        return everything
    if bodies := _bodies(eqn):
        return _enter(eqn, bodies, inputs, context)
    return _leaf(eqn, name, context)


def _leaf(eqn, name: str, context: _Context) -> list[bool]:
    """Operations that have a derivative, of zero or of too few digits."""
    blocked = [False] * len(eqn.outvars)
    # What a library rounds for reasons of its own is right where it stands; an optimizer is a library.
    chosen = context.function == "inner optimizer" or context.is_chosen(eqn)
    if name in _ROUNDING:
        if chosen:
            consequence = "its derivative is zero: nothing is learned through it"
            context.add(eqn, name, consequence, "zero derivative")
        return blocked
    if name == "stop_gradient":
        if chosen:
            context.add(eqn, name, "nothing is learned through it", "zero derivative")
        return blocked
    if name == "convert_element_type":
        into, source = eqn.outvars[0].aval.dtype, eqn.invars[0].aval.dtype
        if jnp.issubdtype(into, jnp.integer):
            context.add(eqn, f"cast to {into}", "its derivative is zero: nothing is learned through it",
                        "zero derivative")  # fmt: skip
            return blocked
        if jnp.finfo(into).bits < jnp.finfo(source).bits:
            context.add(eqn, f"cast from {source} to {into}", "it rounds, so finite differences are noisy",
                        "precision")  # fmt: skip
    return [True] * len(eqn.outvars)


def _enter(eqn, bodies: list[Jaxpr], inputs: list[bool], context: _Context) -> list[bool]:
    """Walk the body of a call, a loop or the branches of a conditional."""
    name = eqn.primitive.name
    context = replace(context, around=where(eqn) or context.around, chosen=context.is_chosen(eqn))
    if name in ("jit", "pjit"):
        body, called = bodies[0], eqn.params.get("name", "")
        # A jitted function is traced once for all its callers: its frames may be those of the first.
        if context.place is None and not any(inside_function(inner, called) for inner in body.eqns):
            context = replace(context, place=context.around)
        return _walk(body, inputs, context)
    if name == "scan":
        body = bodies[0]
        consts, carry = eqn.params["num_consts"], eqn.params["num_carry"]
        current = list(inputs)
        while True:  # what a carry depends on grows until it does not
            outputs = _walk(body, current, replace(context, findings=[]))
            grown = [
                current[consts + i] or (outputs[i] and _is_float(body.outvars[i].aval)) for i in range(carry)
            ]
            if grown == current[consts : consts + carry]:
                return _walk(body, current, context)
            current[consts : consts + carry] = grown
    if name == "cond":
        results = [_walk(body, inputs[1:], context) for body in bodies]
        return [any(column) for column in zip(*results, strict=True)]
    for body in bodies:
        matches = len(body.invars) == len(inputs)
        outputs = _walk(body, inputs if matches else [_is_float(v.aval) for v in body.invars], context)
        if len(bodies) == 1 and matches and len(outputs) == len(eqn.outvars):
            return outputs
    return [True] * len(eqn.outvars)


def _bodies(eqn) -> list[Jaxpr]:
    found = []
    for param in eqn.params.values():
        for item in param if isinstance(param, tuple | list) else (param,):
            if isinstance(item, ClosedJaxpr | Jaxpr):
                found.append(item.jaxpr if isinstance(item, ClosedJaxpr) else item)
    return found


def draws_randomness(function: Callable, *args: Any) -> bool:
    """Whether a function draws random numbers: keys that are only split or folded do not count.

    >>> draws_randomness(lambda key: jax.random.normal(key), jax.random.key(0))
    True
    >>> draws_randomness(lambda key: jax.random.split(key), jax.random.key(0))
    False
    """
    return _draws(jax.make_jaxpr(function)(*args).jaxpr)


def _draws(jaxpr: Jaxpr) -> bool:
    sources = ("random_bits", "random_gamma", "rng_bit_generator", "threefry2x32")
    return any(eqn.primitive.name in sources or any(map(_draws, _bodies(eqn))) for eqn in jaxpr.eqns)


def _is_float(aval) -> bool:
    return hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.inexact)
