"""Estimators by name, for the recipes that let one choose."""

from dataclasses import dataclass
from typing import Literal

from bilevel import hypergrad, inner
from bilevel.problem import Estimator

Name = Literal[
    "mixed",
    "unroll",
    "truncated",
    "forward",
    "implicit-cg",
    "implicit-neumann",
    "implicit-nystrom",
    "implicit-direct",
    "one-step",
    "finite-difference",
    "evolution",
    "pes",
    "nres",
]


@dataclass(frozen=True)
class Settings:
    """What an estimator needs beside its name; each reads only its own."""

    checkpoint: int = 0
    """Of mixed, unroll and truncated: branching of a tree of kept inner states, flat memory over long inner
    loops; 0 keeps every state."""
    truncation: int = 50
    """Of truncated: the last inner steps, which alone are differentiated. Of pes and nres: inner steps of a
    window."""
    linear_steps: int = 20
    """Of implicit-cg and implicit-neumann: products with the inner Hessian. Of implicit-nystrom: columns."""
    step_size: float = 0.1
    """Of implicit-neumann, one-step and finite-difference: the inner step that they differentiate."""
    damping: float = 0.01
    """Of implicit-nystrom: ρ, which stands for the curvatures that the columns do not show."""
    sigma: float = 0.1
    """Of evolution, pes and nres: standard deviation of the changes of θ."""
    num_pairs: int = 4
    """Of evolution, pes and nres: pairs of opposite changes."""

    def estimator(self, name: Name) -> Estimator:
        """The estimator of that name with these settings.

        Raises:
            ValueError: for another name, or a setting that the estimator refuses.

        >>> Settings(linear_steps=5).estimator("implicit-cg").linear_solver.num_steps
        5
        """
        checkpoint = inner.Tree(self.checkpoint) if self.checkpoint else None
        population = {"sigma": self.sigma, "num_pairs": self.num_pairs, "chunk": 1}
        makers = {
            "mixed": lambda: hypergrad.Mixed(checkpoint),
            "unroll": lambda: hypergrad.Unroll(checkpoint),
            "truncated": lambda: hypergrad.Truncated(self.truncation, hypergrad.Mixed(checkpoint)),
            "forward": hypergrad.Forward,
            "implicit-cg": lambda: hypergrad.Implicit(hypergrad.cg(self.linear_steps)),
            "implicit-neumann": lambda: hypergrad.Implicit(
                hypergrad.neumann(self.linear_steps, self.step_size)
            ),
            "implicit-nystrom": lambda: hypergrad.Implicit(
                hypergrad.nystrom(self.linear_steps, self.damping)
            ),
            "implicit-direct": lambda: hypergrad.Implicit(hypergrad.direct()),
            "one-step": lambda: hypergrad.OneStep(self.step_size),
            "finite-difference": lambda: hypergrad.FiniteDifference(self.step_size),
            "evolution": lambda: hypergrad.EvolutionStrategies(**population),
            "pes": lambda: hypergrad.PES(truncation=self.truncation, **population),
            "nres": lambda: hypergrad.NRES(truncation=self.truncation, **population),
        }
        if name not in makers:
            raise ValueError(f"estimator must be one of {', '.join(makers)}, got {name!r}")
        return makers[name]()
