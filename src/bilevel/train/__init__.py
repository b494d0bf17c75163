"""The outer loop: one step, the loop around it, checkpoints, metrics, evaluation."""

from bilevel.train.calibration import Calibration
from bilevel.train.compare import Paired, paired
from bilevel.train.early_stopping import EarlyStopping, Validation
from bilevel.train.evaluate import Curve, Evaluation, adapt, evaluate
from bilevel.train.loop import HypergradientError, Options, Run, train
from bilevel.train.specialization import Specialization, specialization
from bilevel.train.step import MetaState, Metrics, init_state, mean_hypergradient, meta_step
from bilevel.train.transduction import transduction

__all__ = [
    "Calibration",
    "Curve",
    "EarlyStopping",
    "Evaluation",
    "HypergradientError",
    "MetaState",
    "Metrics",
    "Options",
    "Paired",
    "Run",
    "Specialization",
    "Validation",
    "adapt",
    "evaluate",
    "init_state",
    "mean_hypergradient",
    "meta_step",
    "paired",
    "specialization",
    "train",
    "transduction",
]
