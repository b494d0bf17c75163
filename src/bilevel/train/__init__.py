"""The outer loop: one step, the loop around it, checkpoints, metrics, evaluation."""

from bilevel.train.evaluate import Curve, Evaluation, adapt, evaluate
from bilevel.train.loop import HypergradientError, Options, Run, train
from bilevel.train.step import MetaState, Metrics, init_state, mean_hypergradient, meta_step

__all__ = [
    "Curve",
    "Evaluation",
    "HypergradientError",
    "MetaState",
    "Metrics",
    "Options",
    "Run",
    "adapt",
    "evaluate",
    "init_state",
    "mean_hypergradient",
    "meta_step",
    "train",
]
