"""One-step hypergradient: the inverse of the inner Hessian is taken as a multiple of the identity."""

from collections.abc import Mapping
from dataclasses import dataclass

from bilevel.hypergrad.implicit.implicit import Implicit, implicit_hypergradient, inner_doubts
from bilevel.hypergrad.implicit.inner_system import require_solution
from bilevel.hypergrad.implicit.neumann import neumann
from bilevel.hypergrad.requirements import require_positive
from bilevel.problem import Hypergradient, InnerSolver, Key, Meta, Params, Problem, Task


@dataclass(frozen=True)
class OneStep:
    """One-step hypergradient (T1-T2): one gradient step at the solution is differentiated.

        dF/dθ ≈ ∂θ f − η (∂θ ∇φ g)ᵀ ∂φ f

    The implicit hypergradient with the first term of the Neumann series for the inverse Hessian.

    Args:
        step_size: η, usually the inner rate; best near 1 / the eigenvalues of the inner Hessian.
        inner_tolerance: as in `Implicit`.
        linear_tolerance: `doubts` speaks when `stats["linear_residual"]`, |η H ∂φf − ∂φf| / |∂φf|, is larger:
            the part of the system that one step leaves unsolved. It is 1 for q = 0.

    Raises:
        TypeError: when the solver has no `solve`, or the inner loss holds a `jax.custom_vjp`.
        ValueError: when an argument is not positive.

    Warns:
        FirstOrderWarning: as `Implicit`, for leaves that act only through the start or the rates.

    Cost: the inner solve and about 3 inner gradients, one of them for the residual that it reports.
    Independent of K in memory and of dim θ. Biased: q is off by at most max|1 − η λ| of its length
    over the eigenvalues λ of the Hessian, which is small only where they are all near 1 / η.

    Reference: Luketina et al., T1-T2, 2016; Bolte, Pauwels, Vaiter, 2023.

    >>> import bilevel as bl, jax, jax.numpy as jnp, optax
    >>> problem = bl.Problem(init=lambda meta, key: jnp.float32(0.0),
    ...                      inner_loss=lambda params, meta, batch, key: (params - 3 * meta) ** 2,
    ...                      outer_loss=lambda params, meta, batch, key: params)
    >>> solver = bl.inner.Gradient(optax.sgd(0.5), num_steps=1)
    >>> task, key = bl.Task(None, None), jax.random.key(0)
    >>> h = bl.hypergradient(problem, solver, OneStep(step_size=0.25), 1.0, task, key)
    >>> print(h.grad, h.stats["linear_residual"])
    1.5 0.5
    """

    step_size: float
    inner_tolerance: float = 1e-2
    linear_tolerance: float = 0.5

    def __post_init__(self):
        for name in ("step_size", "inner_tolerance", "linear_tolerance"):
            require_positive(self, **{name: getattr(self, name)})

    def check(self, problem: Problem, solver: InnerSolver) -> None:
        """Needs a solver."""
        require_solution(self, solver, "gradient")

    def init(self, problem, solver, meta, task, key) -> tuple[()]:
        """Stateless."""
        return ()

    def solve(self, problem: Problem, solver: InnerSolver, meta: Meta, task: Task, key: Key) -> Params:
        """The inner solution, differentiable in `meta` as `estimate` does, in both modes.

        A second derivative treats the inverse Hessian as η I as well.
        """
        return Implicit(neumann(1, self.step_size)).solve(problem, solver, meta, task, key)

    def estimate(self, problem, solver, meta, task, state, key) -> tuple[Hypergradient, tuple[()]]:
        """The hypergradient of one task."""
        linear_solver = neumann(1, self.step_size)
        return implicit_hypergradient("OneStep", problem, solver, linear_solver, meta, task, key), state

    def doubts(self, stats: Mapping[str, float]) -> list[str]:
        """What the figures give reason to doubt, with the remedy; empty when nothing."""
        said = inner_doubts("OneStep", stats, self.inner_tolerance)
        if not stats["linear_residual"] <= self.linear_tolerance:
            said.append(
                f"OneStep: one step of size {self.step_size:g} leaves {stats['linear_residual']:.2g} of the "
                f"linear system unsolved (linear_tolerance is {self.linear_tolerance:g}): the "
                "hypergradient is biased by about as much, in the flat directions more. Use "
                "bl.hypergrad.Implicit(cg(10)), or a step_size nearer to 1 / the eigenvalues of the inner "
                "Hessian"
            )
        return said
