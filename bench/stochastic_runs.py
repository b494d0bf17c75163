"""Runs of `bench/stochastic.py`: a method on a problem for a while; the time of a step, ours and theirs."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import stochastic_reference as reference
from stochastic_problems import Work

import bilevel as bl
from bilevel.hypergrad import AmIGO, F2sa, Implicit, MaSoba, Saba, Soba, StocBiO, cg
from bilevel.tasks.fixed import Fixed

MULTIPLIER = (10.0, 1e-3)  # of F2SA: λ and its growth
MOST = 1000  # outer steps of a compiled call


class Method(NamedTuple):
    """An algorithm for an inner rate: estimator, inner steps, derivatives of a batch that a step takes."""

    name: str
    make: Callable
    num_steps: int
    calls: int
    colour: str
    style: str


METHODS = (
    Method("SABA", lambda rate, size: Saba(rate, batch_size=size), 1, 5, "#D55E00", "-"),
    Method("SOBA", lambda rate, size: Soba(rate, batch_size=size), 1, 5, "#0072B2", "-"),
    Method("MA-SOBA", lambda rate, size: MaSoba(rate, batch_size=size), 1, 5, "#56B4E9", "--"),
    Method("AmIGO", lambda rate, size: AmIGO(rate, batch_size=size), 10, 23, "#009E73", "-."),
    Method("stocBiO", lambda rate, size: StocBiO(rate, batch_size=size), 10, 22, "#E69F00", "-."),
    Method("F2SA", lambda rate, size: F2sa(*MULTIPLIER, batch_size=size), 1, 6, "#CC79A7", ":"),
)
FULL = Method("Implicit, all rows", lambda rate, size: Implicit(cg(20)), 100, 123, "black", ":")


def learner(work: Work, method: Method, rate: float) -> bl.Learner:
    """The same inner rate for the inner problem and the linear system, as published."""
    solver = bl.inner.Gradient(optax.sgd(rate), method.num_steps)
    return bl.Learner(work.problem, solver, method.make(rate, work.batch_size))


def calls(work: Work, method: Method) -> float:
    """Derivatives of a batch in an outer step."""
    batches = len(work.arrays.x) / work.batch_size if method is FULL else 1
    return method.calls * batches


class Steps(NamedTuple):
    """A method compiled: `start()` makes a carry, `go(carry, n, outer, key)` takes n outer steps."""

    start: Callable
    go: Callable


def compile_steps(work: Work, method: Method, rate: float, most: int = MOST) -> Steps:
    """Outer steps of plain SGD on θ in one compiled call; the state is given away: tables stay in place."""
    learned = learner(work, method, rate)
    estimator, solver = learned.estimator, learned.solver

    @jax.jit
    def start(task, meta):
        return meta, estimator.init(work.problem, solver, meta, task, jax.random.key(0))

    @partial(jax.jit, donate_argnums=1)
    def go(task, carry, n, outer, key):
        keys = jax.random.split(key, most)

        def body(i, carry):
            meta, state = carry
            h, state = estimator.estimate(work.problem, solver, meta, task, state, keys[i])
            return jax.tree.map(lambda m, g: m - outer.astype(m.dtype) * g, meta, h.grad), state

        return jax.lax.fori_loop(0, n, body, carry)

    return Steps(
        lambda: start(work.task, jnp.asarray(work.meta)),
        lambda carry, n, outer, key: go(work.task, carry, n, np.float64(outer), key),
    )


class Trace(NamedTuple):
    """A run: seconds of processor time, outer steps and θ at each of its marks; the first is the start."""

    seconds: np.ndarray
    steps: np.ndarray
    metas: list[np.ndarray]
    finite: bool


def run(work: Work, steps: Steps, outer: float, seed: int, seconds: float, first: float = 0.01) -> Trace:
    """Outer steps until `seconds` have passed in compiled calls, with marks 1.5 times as far apart each."""
    key = jax.random.key(seed)
    jax.block_until_ready(steps.go(steps.start(), 1, outer, key))  # compiles
    carry, size = steps.start(), 1
    jax.block_until_ready(carry)
    spent, done, mark = 0.0, 0, first
    times, counts, metas = [0.0], [0], [np.asarray(carry[0])]
    while spent < seconds:
        part_key = jax.block_until_ready(jax.random.fold_in(key, done))
        began = time.process_time()  # of all threads; it does not see what else the machine does
        carry = steps.go(carry, size, outer, part_key)
        jax.block_until_ready(carry)
        took = time.process_time() - began
        spent, done = spent + took, done + size
        if spent >= mark or spent >= seconds:
            meta = np.asarray(carry[0])
            if not np.all(np.isfinite(meta)):
                return Trace(np.array(times), np.array(counts), metas, finite=False)
            times.append(spent)
            counts.append(done)
            metas.append(meta)
            mark = 1.5 * spent
        # Calls of about a tenth of the way to the next mark, so that marks are met closely.
        size = int(np.clip(0.1 * max(mark, first) / (spent / done), 1, MOST))
    return Trace(np.array(times), np.array(counts), metas, finite=True)


# The time of a step


def first_state(work: Work, method: str, rate: float) -> tuple[np.ndarray, ...]:
    """What the reference starts from: θ, φ₀ = 0 and, as bilevel does, q one step away from 0."""
    arrays, oracles, size = work.arrays, work.oracles, work.batch_size
    theta, rows = work.meta.copy(), np.arange(len(arrays.query_x))
    w = np.zeros(work_shape(work), theta.dtype)
    q = (rate * oracles.slope(arrays.query_x, arrays.query_y, rows, w)).astype(theta.dtype)
    if method == "MA-SOBA":
        return theta, w, q, np.zeros_like(theta), np.zeros(1)
    if method == "F2SA":
        return theta, w, w.copy(), np.array(MULTIPLIER)
    if method != "SABA":
        return theta, w, q
    batch = lambda i: np.arange(i * size, (i + 1) * size)  # noqa: E731
    inner = [
        oracles.products(arrays.x, arrays.y, batch(i), w, theta, q) for i in range(len(arrays.x) // size)
    ]
    outer = [
        oracles.slope(arrays.query_x, arrays.query_y, batch(j), w) for j in range(len(arrays.query_x) // size)
    ]
    tables = [np.stack(column) for column in (*zip(*inner, strict=True), outer)]
    return theta, w, q, *tables, *(table.mean(0) for table in tables)


def work_shape(work: Work) -> tuple[int, ...]:
    """Of φ."""
    return work.problem.init(jnp.asarray(work.meta), jax.random.key(0)).shape


class Speed(NamedTuple):
    """Microseconds of an outer step in each round, ours and the reference's, and their ratio."""

    ours: np.ndarray
    theirs: np.ndarray
    ratio: np.ndarray


def speed(work: Work, method: Method, rounds: int) -> Speed:
    """Rounds in which ours and the reference take the same number of steps, one after the other."""
    rate, outer = work.rates[0], work.outer_rates[0]
    n = 16 if method.num_steps > 1 else 256 if work.oracles is reference.LOGISTIC else 64
    steps = compile_steps(work, method, rate, n)
    theirs, rng = reference.METHODS[method.name], np.random.default_rng(0)
    state = first_state(work, method.name, rate)
    kind, key = work.meta.dtype.type, jax.random.key(0)

    def ours_round(carry, n):
        began = time.process_time()
        carry = jax.block_until_ready(steps.go(carry, n, outer, key))
        return carry, time.process_time() - began

    def their_round(n):
        began = time.process_time()
        rows = reference.draw(theirs, work.arrays, work.batch_size, n, rng)
        theirs.run(work.oracles, work.arrays, state, *rows, kind(rate), kind(outer))
        return time.process_time() - began

    carry, _ = ours_round(steps.start(), n)
    their_round(n)  # both have compiled
    ours, reference_times = [], []
    for _ in range(rounds):
        carry, took = ours_round(carry, n)
        ours.append(took / n * 1e6)
        reference_times.append(their_round(n) / n * 1e6)
    ours, others = np.array(ours), np.array(reference_times)
    return Speed(ours, others, ours / others)


def reference_speed(work: Work, method: Method, rounds: int) -> float:
    """Median microseconds of an outer step of the reference as it is, numba's compiler on or off."""
    theirs, rng, kind = reference.METHODS[method.name], np.random.default_rng(0), work.meta.dtype.type
    state, times, n = first_state(work, method.name, work.rates[0]), [], 16
    rates = kind(work.rates[0]), kind(work.outer_rates[0])
    for _ in range(rounds + 1):
        began = time.process_time()
        rows = reference.draw(theirs, work.arrays, work.batch_size, n, rng)
        theirs.run(work.oracles, work.arrays, state, *rows, *rates)
        times.append((time.process_time() - began) / n * 1e6)
    return float(np.median(times[1:]))


def train_speed(work: Work, method: Method, num_steps: int) -> float:
    """Microseconds of an outer step inside `bl.train`, the fastest of its chunks."""
    learned, optimizer = learner(work, method, work.rates[0]), optax.sgd(work.outer_rates[0])
    sample = bl.tasks.batch(Fixed(work.task), 1)
    state = bl.init_state(learned, optimizer, sample, jax.random.key(0), jnp.asarray(work.meta))
    options = bl.Options(chunk_size=num_steps, zero_leaves="allow")
    rates: list[float] = []

    def note(state: Any, values: dict[str, float]) -> None:
        rates.append(values["steps_per_second"])

    bl.train(learned, optimizer, sample, state, 6 * num_steps, options=options, on_chunk=[note])
    return 1e6 / max(rates)
