"""Over-specialization of an initialization: how far and how fast it adapts, and what comes after."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.hypergrad.common import problem_metrics, split_keys
from bilevel.problem import IterativeSolver, Key, Learner, Meta, Params, Task
from bilevel.train.along import along_adaptation, shown_steps, with_num_steps
from bilevel.train.evaluate import over_tasks
from bilevel.train.intervals import Curve, interval

_START = "start"
_FAST = 0.9  # share of the gain from which one step is called nearly all of it


class Specialization(NamedTuple):
    """What adaptation does to the parameters and to the loss, over tasks.

    Args:
        num_tasks: tasks it is a mean over.
        num_steps: K, the steps it is meant for; what follows is beyond them.
        steps: after which inner steps the points of the curves are, 0, 1, K and K+beyond among them.
        query_loss: along them, without the noise of dropout, as `evaluate` gives it.
        support_loss: the inner loss, likewise.
        moved: ‖φₖ − φ₀‖ / ‖φ₀‖ of each part of the parameters, likewise; the plain distance for a part that
            starts at zero, listed in `from_zero`.
        from_zero: parts that start at zero.
        first_step: the share of the whole gain in query loss that the first step brings; NaN where K steps
            bring no gain.
        beyond: query loss after the last step minus that after K steps, with its paired interval.
        entropy: of the answers before adaptation, over log(ways): 1 says that the start favours no class;
            NaN without a classifier.
    """

    num_tasks: int
    num_steps: int
    steps: tuple[int, ...]
    query_loss: Curve
    support_loss: Curve
    moved: dict[str, Curve]
    from_zero: tuple[str, ...]
    first_step: float
    beyond: Curve
    entropy: float

    def as_json(self) -> dict[str, Any]:
        """Plain lists and numbers, and the reading in words."""
        return {
            "num_tasks": self.num_tasks,
            "num_steps": self.num_steps,
            "query_loss": self.query_loss.as_json(self.steps),
            "support_loss": self.support_loss.as_json(self.steps),
            "moved": {name: curve.as_json(self.steps) for name, curve in self.moved.items()},
            "from_zero": list(self.from_zero),
            "first_step": None if np.isnan(self.first_step) else self.first_step,
            "beyond": {"mean": float(self.beyond.mean), "ci95": float(self.beyond.ci95)},
            "entropy": None if np.isnan(self.entropy) else self.entropy,
            "reading": self.reading(),
        }

    def reading(self) -> str:
        """One sentence: how fast, how far, and whether more steps hurt."""
        steps, more = self.num_steps, self.steps[-1] - self.num_steps
        last = self.steps.index(steps)
        if not np.isfinite(self.query_loss.mean).all():
            return "how specialized the start is cannot be said: the inner loop diverges on some tasks"
        if np.isnan(self.first_step):
            plural = "s" * (steps != 1)
            speed = f"{steps} step{plural} bring no gain in query loss: nothing is adapted, or too coarsely"
        elif steps == 1:
            speed = "the one step it is meant for brings all of the gain"
        elif self.first_step >= _FAST:
            speed = f"one step brings {100 * self.first_step:.0f} % of the gain of {steps}: made for one step"
        else:
            speed = f"the first of {steps} steps brings {100 * self.first_step:.0f} % of the gain"
        parts = [speed]
        far = {name: curve.mean[last] for name, curve in self.moved.items() if name not in self.from_zero}
        if far:
            name = max(far, key=lambda part: far[part])
            most = f", most in {name} ({100 * far[name]:.1f} %)" if len(far) > 1 else ""
            parts.append(f"parameters move by {100 * float(np.median(list(far.values()))):.1f} %{most}")
        if more:
            change = f"{self.beyond.mean:+.3g} ± {self.beyond.ci95:.2g}".replace("-", "−")
            low, high = self.beyond.mean - self.beyond.ci95, self.beyond.mean + self.beyond.ci95
            verdict = "worse" if low > 0 else "better" if high < 0 else "no better and no worse"
            warning = " (over-specialized to its horizon)" if low > 0 else ""
            plural = "s" * (more != 1)
            parts.append(f"{more} step{plural} beyond it is {verdict}: query loss {change}{warning}")
        return "; ".join(parts)


def specialization(
    learner: Learner,
    meta: Meta,
    sample_task: Callable[[Key], Task],
    key: Key,
    *,
    num_tasks: int = 200,
    num_steps: int | None = None,
    beyond: int | None = None,
    every: int | None = None,
    task_chunk: int = 1,
) -> Specialization:
    """How specialized a meta-learned start is: to one step, to its horizon, to a class.

        moved = ‖φₖ − φ₀‖ / ‖φ₀‖,   first step = (L₀ − L₁) / (L₀ − L_K),   beyond = L_{K+beyond} − L_K

    with L the mean query loss over tasks.

    Args:
        sample_task: as in `evaluate`; the tasks are the same for the same key.
        num_steps: K; the solver's own when left out.
        beyond: further steps; as many again when left out.
        every: as in `evaluate`, of the steps up to K and of those beyond.

    Raises:
        ValueError: for a solver without steps, `num_steps` or `every` below 1, or fewer than 2 tasks.

    Cost: that of `evaluate` with K + beyond steps.

    Reference: Jamal, Qi, 2019 (the entropy of the start); Raghu et al., 2020 (how far parts move).

    >>> import bilevel as bl
    >>> learner = bl.maml(bl.nets.mlp([1, 8, 1]), bl.learners.mean_squared_error, rates=0.01)
    >>> meta = learner.init_meta(jax.random.key(1))
    >>> found = specialization(learner, meta, bl.tasks.sinusoid, jax.random.key(2), num_tasks=4)
    >>> found.query_loss.mean.shape, found.num_steps
    ((3,), 1)
    """
    if not isinstance(learner.solver, IterativeSolver):
        raise ValueError(f"{type(learner.solver).__name__} has no steps, so nothing adapts gradually")
    steps = learner.solver.num_steps if num_steps is None else num_steps
    if steps < 1:
        raise ValueError(f"num_steps must be at least 1 to see what adaptation does, got {steps}")
    if num_tasks < 2:
        raise ValueError(f"num_tasks must be at least 2 for a confidence interval, got {num_tasks}")
    beyond = steps if beyond is None else beyond
    longer = with_num_steps(learner, steps + beyond)
    shown = (*shown_steps(steps, every), *(steps + n for n in shown_steps(beyond, every)[1:]))
    last = shown.index(steps)

    run = over_tasks(
        lambda meta, task, key: _figures(longer, meta, task, key, shown),
        sample_task,
        num_tasks,
        task_chunk=task_chunk,
    )
    found = jax.tree.map(lambda *parts: np.concatenate(parts), *run(meta, key))
    start = found.pop(_START)
    query = interval(found["query_loss"])
    gain = query.mean[0] - query.mean[last]
    from_zero = tuple(name for name, norm in start["norms"].items() if not np.all(norm))
    moved = {
        name: interval(far if name in from_zero else far / start["norms"][name][:, None])
        for name, far in found["moved"].items()
    }
    entropy = start.get("entropy")
    return Specialization(
        num_tasks=num_tasks,
        num_steps=steps,
        steps=shown,
        query_loss=query,
        support_loss=interval(found["support_loss"]),
        moved=moved,
        from_zero=from_zero,
        first_step=float((query.mean[0] - query.mean[1]) / gain) if gain > 0 else float("nan"),
        beyond=interval(found["query_loss"][:, -1] - found["query_loss"][:, last]),
        entropy=float("nan") if entropy is None else float(entropy.mean()),
    )


def _figures(learner: Learner, meta: Meta, task: Task, key: Key, steps: tuple[int, ...]) -> dict[str, Any]:
    """Losses and distances of one task along adaptation, `[points]` each, and its start."""
    problem = learner.problem
    inner_key, outer_key = split_keys(key)
    first = problem.init(meta, jax.random.split(inner_key)[0])  # where `along_adaptation` starts too

    def read(params):
        away = jax.tree.map(lambda now, then: now - then, params, first)
        # A metric "loss" is the outer loss without dropout's noise, which would hide small differences.
        quiet = problem_metrics(problem, params, meta, task, outer_key)
        noisy = problem.outer_loss(params, meta, task.query, outer_key)
        return {
            "query_loss": quiet.get("query_loss", noisy),
            "support_loss": problem.inner_loss(params, meta, task.support, outer_key),
            "moved": _norms(away),
        }

    start: dict[str, Any] = {"norms": _norms(first)}
    x, labels = task.query if isinstance(task.query, tuple) and len(task.query) == 2 else (None, None)
    if learner.predict is not None and labels is not None and _whole(labels):
        start["entropy"] = _entropy(learner.predict(first, meta, x))
    return {_START: start, **along_adaptation(learner, meta, task, key, read, steps)}


def _whole(labels: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(labels), jnp.integer))


def _entropy(logits: jax.Array) -> jax.Array:
    """Mean entropy of the answers over log(ways)."""
    odds = jax.nn.softmax(logits)
    return -jnp.mean(jnp.sum(jax.scipy.special.xlogy(odds, odds), -1)) / jnp.log(logits.shape[-1])


def _norms(params: Params) -> dict[str, jax.Array]:
    """The norm of each top-level entry of the parameters."""
    parts = params if isinstance(params, dict) and params else {"params": params}
    return {
        str(name): jnp.sqrt(sum(jnp.sum(jnp.abs(leaf) ** 2) for leaf in jax.tree.leaves(part)))
        for name, part in parts.items()
    }
