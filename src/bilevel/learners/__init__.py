"""The field's methods as thin compositions of a problem, a solver and an estimator."""

from bilevel.learners.baseline_pp import baseline_pp
from bilevel.learners.cavia import FilmContext, InputContext, cavia
from bilevel.learners.from_scratch import from_scratch
from bilevel.learners.imaml import imaml
from bilevel.learners.leap import Leap
from bilevel.learners.learning_to_reweight import Reweight, learning_to_reweight
from bilevel.learners.losses import cross_entropy, mean_squared_error
from bilevel.learners.maml import AllBut, Fixed, PerLayerPerStep, PerParameter, boil, maml
from bilevel.learners.maml_plus_plus import maml_plus_plus
from bilevel.learners.matching_net import matching_net
from bilevel.learners.meta_curvature import conv_modes, leaf_modes, meta_curvature
from bilevel.learners.meta_weight_net import example_weights, meta_weight_net
from bilevel.learners.metaoptnet import metaoptnet
from bilevel.learners.nearest_centroid import nearest_centroid, pixels
from bilevel.learners.pretraining import TrainedBy, cosine_head, pretraining
from bilevel.learners.protonet import protonet
from bilevel.learners.r2d2 import r2d2
from bilevel.learners.relation_net import relation_net
from bilevel.learners.reptile import reptile
from bilevel.learners.warp_grad import WarpGradient, linear_warps, warp_grad
from bilevel.learners.weighted import Online, class_weights, plain_training, weighted_problem

__all__ = [
    "AllBut",
    "FilmContext",
    "Fixed",
    "InputContext",
    "Leap",
    "Online",
    "PerLayerPerStep",
    "PerParameter",
    "Reweight",
    "TrainedBy",
    "WarpGradient",
    "baseline_pp",
    "boil",
    "cavia",
    "class_weights",
    "conv_modes",
    "cosine_head",
    "cross_entropy",
    "example_weights",
    "from_scratch",
    "imaml",
    "leaf_modes",
    "learning_to_reweight",
    "linear_warps",
    "maml",
    "maml_plus_plus",
    "matching_net",
    "mean_squared_error",
    "meta_curvature",
    "meta_weight_net",
    "metaoptnet",
    "nearest_centroid",
    "pixels",
    "plain_training",
    "pretraining",
    "protonet",
    "r2d2",
    "relation_net",
    "reptile",
    "warp_grad",
    "weighted_problem",
]
