"""One estimator against the truth at one point: the figures without the judgement."""

from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.analysis.agreement import Agreement, agreement
from bilevel.analysis.check_report import LeafReport
from bilevel.analysis.measure import Estimates, Reference, estimates, reference, truths
from bilevel.analysis.objective import leaf_names, task_at
from bilevel.analysis.why_zero import routes, why_zero
from bilevel.problem import Key, Learner, Meta, Task

_SETTLED = 1000  # calls after which the inner parameters of a single-loop estimator are taken to rest


@dataclass(frozen=True)
class Comparison:
    """Everything measured at one meta."""

    reference: Reference
    estimates: Estimates
    agreement: Agreement
    leaves: tuple[LeafReport, ...]


def compare(
    learner: Learner, meta: Meta, tasks: Task, key: Key, repeats: int, warmup: int,
    ref: Reference | None = None,
) -> Comparison:  # fmt: skip
    """Call the estimator as often as its noise asks for, and put it beside the truth.

    Args:
        repeats: calls with independent keys; a deterministic estimator gets 2.
        warmup: calls before each that counts, for an estimator with a state.
        ref: the truth, where it was measured before with the same key.
    """
    problem, solver = learner.problem, learner.solver
    if getattr(learner.estimator, "settles", False):  # its inner loop goes on from call to call
        warmup = max(warmup, _SETTLED)
        steps = _SETTLED * getattr(solver, "num_steps", 1)
        solver = replace(cast(Any, solver), num_steps=steps)
        ref = reference(problem, solver, meta, tasks, key)
        ref = replace(ref, source=f"{ref.source}, all after {steps} inner steps")
    ref = reference(problem, solver, meta, tasks, key) if ref is None else ref
    # The first key is the reference's own; it stays first however many there are.
    keys = jnp.stack([key, *(jax.random.fold_in(key, 100 + r) for r in range(1, repeats))])
    found = estimates(learner, meta, tasks, keys[:2], warmup)
    if not ref.draws and np.array_equal(found.grads[0], found.grads[1], equal_nan=True):
        keys = keys[:1]
        found = Estimates(
            found.values[:1], found.grads[:1], found.stats, found.stateful, found.warnings
        )  # fmt: skip
    elif repeats > 2:
        found = estimates(learner, meta, tasks, keys, warmup)
    vectors, slopes = truths(ref, problem, solver, meta, tasks, keys)
    return Comparison(
        ref,
        found,
        _overall(ref, found, vectors, slopes),
        _leaves(learner, meta, tasks, key, ref, found, vectors),
    )


def _overall(ref: Reference, found: Estimates, vectors, slopes) -> Agreement:
    claims = found.grads @ ref.moves.T
    good = ref.reliable
    tests = (claims - slopes)[:, good]
    if vectors is not None:
        return agreement(found.grads, vectors, tests if len(claims) > 1 else None)
    whole = good & np.array([name == "" for name in ref.names])
    whole = whole if whole.any() else good
    low, high = np.array([[s.low, s.high] for s in ref.slopes]).T
    # At a kink any slope between the two sides is right.
    right = slopes if not ref.kinks or len(slopes) > 1 else np.clip(claims.mean(0), low, high)[None]
    return agreement(claims[:, whole], right[:, whole], tests if len(claims) > 1 else None)


def _is_flat(ref: Reference, places: list[int], exact, part: slice) -> bool | None:
    """Whether the outer loss does not move with a leaf, beyond rounding; None where nobody looked."""
    if places:
        steepest = max((abs(s.value) for s in ref.slopes if s.reliable), default=0.0)
        least = max(1e-6 * steepest, 1e-7 * abs(ref.value))
        return all(abs(ref.slopes[j].value) <= least + 3 * ref.slopes[j].uncertainty for j in places)
    if exact is not None:
        return bool(np.linalg.norm(exact[part]) <= 1e-6 * np.linalg.norm(exact))
    return None


def _leaves(learner, meta, tasks, key, ref: Reference, found: Estimates, vectors) -> tuple[LeafReport, ...]:
    """Each leaf's part of the estimate and of the truth, and why it is zero where it is."""
    sizes = [np.size(leaf) for leaf in jax.tree.leaves(meta)]
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(meta)]
    ends = np.cumsum([0, *sizes])
    mean = found.grads.mean(0)
    exact = None if vectors is None else vectors.mean(0)
    ways = None
    rows = []
    for i, (name, path) in enumerate(zip(leaf_names(meta), paths, strict=True)):
        part = slice(ends[i], ends[i + 1])
        places = [j for j, n in enumerate(ref.names) if n == path and ref.slopes[j].reliable]
        if exact is not None:
            estimate, truth = np.linalg.norm(mean[part]), np.linalg.norm(exact[part])
            off = np.linalg.norm(mean[part] - exact[part])
        elif len(places) == 1:
            estimate, truth = ref.moves[places[0]] @ mean, ref.slopes[places[0]].value
            off = abs(estimate - truth)
        else:
            estimate, truth, off = np.linalg.norm(mean[part]), float("nan"), float("nan")
        zero, dropped = "", False
        if sizes[i] and not np.any(found.grads[:, part]):
            if ways is None:
                ways = routes(learner.problem, learner.solver, meta, task_at(tasks, 0), key)
            flat = _is_flat(ref, places, exact, part)
            zero = why_zero(type(learner.estimator).__name__, ways[path], flat)
            dropped = bool(ways[path]) and flat is False
        error = off / abs(truth) if truth else (0.0 if off == 0 else float("inf"))
        rows.append(LeafReport(name, sizes[i], float(estimate), float(truth), float(error), zero, dropped))
    return tuple(rows)
