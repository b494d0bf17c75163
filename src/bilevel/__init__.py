"""One engine for bilevel (meta-) optimization: state the problem once, choose everything else."""

from importlib.metadata import version as _version

from bilevel import hypergrad, inner, learners, nets, tasks
from bilevel.analysis import Advice, CheckReport, Plan, advise, check, influence, plan
from bilevel.hypergrad import FirstOrderWarning, HypergradientWarning, hypergradient
from bilevel.learners import maml
from bilevel.problem import Hypergradient, Learner, Problem, Solution, Task
from bilevel.train import (
    Evaluation,
    HypergradientError,
    MetaState,
    Options,
    Run,
    adapt,
    evaluate,
    init_state,
    mean_hypergradient,
    meta_step,
    train,
)

__version__ = _version("bilevel")

__all__ = [
    "Advice",
    "CheckReport",
    "Evaluation",
    "FirstOrderWarning",
    "Hypergradient",
    "HypergradientError",
    "HypergradientWarning",
    "Learner",
    "MetaState",
    "Options",
    "Plan",
    "Problem",
    "Run",
    "Solution",
    "Task",
    "adapt",
    "advise",
    "check",
    "evaluate",
    "hypergrad",
    "hypergradient",
    "influence",
    "init_state",
    "inner",
    "learners",
    "maml",
    "mean_hypergradient",
    "meta_step",
    "nets",
    "plan",
    "tasks",
    "train",
]
