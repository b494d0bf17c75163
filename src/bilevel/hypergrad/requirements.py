"""What estimators ask of their fields and of a solver, refused with the remedy when it is not so."""

from typing import Any

from bilevel.inner.checkpointing import Checkpointing
from bilevel.problem import InnerSolver, IterativeSolver


def require_iterative(estimator: object, solver: InnerSolver) -> IterativeSolver:
    """The solver, if it can be run step by step; refused otherwise."""
    if not isinstance(solver, IterativeSolver):
        raise TypeError(
            f"{type(estimator).__name__} differentiates through the steps of the inner solver, and "
            f"{type(solver).__name__} has no steps (num_steps, init, step); "
            "use bl.inner.Gradient(optimizer, num_steps), or keep this solver and differentiate its solution "
            "with bl.hypergrad.Implicit(bl.hypergrad.cg(10))"
        )
    return solver


def require_stepping(estimator: object, solver: InnerSolver) -> IterativeSolver:
    """The solver, if it can be run a step at a time and takes at least one; refused otherwise."""
    name = type(estimator).__name__
    if not isinstance(solver, IterativeSolver):
        raise TypeError(
            f"{name} keeps the inner parameters between calls and moves them step by step, and "
            f"{type(solver).__name__} has no steps (num_steps, init, step); use "
            "bl.inner.Gradient(optimizer, num_steps=1)"
        )
    if solver.num_steps < 1:
        raise ValueError(f"{name} needs an inner solver with num_steps of at least 1, got {solver.num_steps}")
    return solver


def require_single_step(estimator: object, solver: InnerSolver) -> IterativeSolver:
    """The solver, if it takes exactly one step a call; refused otherwise."""
    solver = require_stepping(estimator, solver)
    if solver.num_steps != 1:
        raise ValueError(
            f"{type(estimator).__name__} is a single loop: one inner step for each outer step, but the "
            f"solver has num_steps={solver.num_steps}; use num_steps=1, or bl.hypergrad.AmIGO, which takes "
            "several"
        )
    return solver


def require_checkpoint(estimator: object, checkpoint: int | Checkpointing | None) -> None:
    """Refuse what is neither a positive number of steps nor a checkpointing policy."""
    if isinstance(checkpoint, int) and not isinstance(checkpoint, bool):
        allowed = checkpoint >= 1
    else:
        allowed = checkpoint is None or isinstance(checkpoint, Checkpointing)
    if not allowed or isinstance(checkpoint, type):
        raise ValueError(
            f"{type(estimator).__name__}.checkpoint must be None or a number of inner steps of at least 1, "
            f"or a policy such as bl.inner.Sqrt() or bl.inner.Tree(), got {checkpoint!r}"
        )


def require_positive(owner: object, **fields: Any) -> None:
    """Refuse fields that are no positive finite number; `owner` is an object, or the name it goes by.

    >>> require_positive("cg", tolerance=-1.0)
    Traceback (most recent call last):
    ValueError: cg.tolerance must be a positive number, got -1.0
    """
    for name, value in fields.items():
        if not (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")):
            raise ValueError(f"{name_of(owner)}.{name} must be a positive number, got {value!r}")


def require_count(owner: object, **fields: Any) -> None:
    """Refuse fields that are no whole number of at least 1."""
    for name, value in fields.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name_of(owner)}.{name} must be a whole number of at least 1, got {value!r}")


def require_count_or_none(owner: object, **fields: Any) -> None:
    """Refuse fields that are neither None nor a whole number of at least 1."""
    for name, value in fields.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(
                f"{name_of(owner)}.{name} must be None or a whole number of at least 1, got {value!r}"
            )


def name_of(owner: object) -> str:
    """What an estimator is called; `owner` is an object, or the name itself."""
    return owner if isinstance(owner, str) else type(owner).__name__
