"""iMAML: the inner problem is tied to its start, and only its solution is differentiated."""

from collections.abc import Callable

import optax

from bilevel.hypergrad import Implicit, gmres
from bilevel.inner import Gradient, proximal
from bilevel.learners.supervised import supervised
from bilevel.nets import Net
from bilevel.problem import InnerSolver, Learner


def imaml(
    net: Net,
    loss: Callable,
    *,
    num_steps: int = 16,
    rate: float = 0.1,
    strength: float = 2.0,
    solver: InnerSolver | None = None,
    estimator: Implicit | None = None,
) -> Learner:
    """MAML without a derivative through its steps.

        min over θ  E[ loss(φ*(θ), query) ],   φ*(θ) = argmin over φ of  loss(φ, support) + λ/2 |φ − θ|²
        dF/dθ = λ (∇² loss(φ*) + λ I)⁻¹ ∇ loss(φ*, query)

    Args:
        net: an init/apply pair.
        loss: `loss(outputs, targets) -> scalar` or `-> (scalar, {metric: scalar})`; batches are `(x, y)`.
        num_steps: K, steps of gradient descent towards φ*.
        rate: of these steps.
        strength: λ. 2.0 is the published value for Omniglot, 0.5 for mini-ImageNet. Small values adapt more
            and are harder to solve for; where λ is below the most negative curvature of the loss there is no
            minimum to speak of.
        solver: in place of `num_steps` and `rate`, any way to solve the inner problem, such as
            `bl.inner.Converged(optimistix.BFGS(...))`.
        estimator: `Implicit(gmres(5))` by default, with any linear solver. The paper has `cg(5)`, which needs
            positive curvature: with ReLU and batch norm it often finds none at the published λ, and what it
            then returns is mostly noise. (The published code adds 1 to the diagonal of its system and 10 to λ
            in it; here the system is the one that the formula states.)

    Returns:
        A `Learner` whose meta is `{"init": params}`.

    Raises:
        ValueError: when `strength` is not positive.

    Cost: K inner gradients and about 2 more for each step of the linear solver; memory independent of K, of a
    vector a step of the linear solver.
    Biased by what is missing to φ* and to the linear solve: `stats["inner_error"]` and `["linear_residual"]`
    say how much. Evaluation takes steps of the same tied problem.

    Reference: Rajeswaran, Finn, Kakade, Levine, Meta-learning with implicit gradients, 2019.

    >>> import bilevel as bl
    >>> learner = imaml(bl.nets.mlp([1, 8, 1]), bl.learners.mean_squared_error, rate=0.01)
    >>> type(learner.estimator).__name__
    'Implicit'
    """
    problem, predict = supervised(
        net, loss, lambda meta, key: meta["init"], lambda params, meta, x: (params, x)
    )
    return Learner(
        proximal(problem, strength),
        solver or Gradient(optax.sgd(rate), num_steps),
        estimator or Implicit(gmres(5)),
        lambda key: {"init": net.init(key)},
        predict,
    )
